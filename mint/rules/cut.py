"""Where a prompt ends: at a place where the model itself would have a boundary between tokens.

A prompt cut by characters is one the model never saw: `time.time()` may be `time` + `.time` + `()`, so text that ends
in `time.` asks for something else. Here the text with the wrong continuation and the text with the right one are
tokenised whole; the prompt is what both begin with, in tokens. Prompt and target are then ids whose joint text is the
text that was meant, and the prompt's own text gives the same ids again. Knows nothing about files or syntax.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mint.errors import CaseError
from mint.model.lm import LM, Encoded
from mint.rules.rule import Row

BACK = 4
"""Tokens that a cut may move to the left of the first difference to reach a place that tokenises on its own."""

DIFFERS_NOWHERE = "wrong and right give the same tokens"
ONE_BEGINS_THE_OTHER = "the tokens of one text begin those of the other"
NO_PROMPT = "nothing stands before the first difference"
NO_ROUND_TRIP = "the cut does not round-trip in this tokenizer"
TOO_LONG = "longer than the context"
NOT_WRITABLE = "text that the tokenizer cannot read back"


class Uncuttable(CaseError):
    """A place that cannot be cut; `why` is one of the reasons above, for counting."""

    def __init__(self, why: str):
        super().__init__(why)
        self.why = why


@dataclass(frozen=True)
class Cut:
    """A prompt, what should follow and what follows now, as text and as ids."""

    prompt: str
    target: str
    wrong: str | None
    encoded: Encoded
    """Ids of prompt and target."""
    wrong_ids: tuple[int, ...] = ()
    """Ids of `wrong` behind the same prompt; empty where there is no wrong text."""


def cut(lm: LM, before: str, wrong: str, right: str) -> Cut:
    """Cut the two texts before + wrong and before + right at their first difference in tokens.

    Prompt, target and wrong may begin earlier or later than `before` ends: text moves between them, none is lost.
    Raises `Uncuttable`.
    """
    return _cut(lm, before, right, wrong, None)


def encode_row(lm: LM, row: Row) -> tuple[Row, Cut]:
    """A row of a rule file as ids, for this model: (the row as it can be used, its cut).

    Tokenised jointly with its target (and its wrong text), a prompt must come out with its own ids; where it does not,
    the cut moves back to the last common token, and the text between goes over to target and wrong. A `near` row
    without a target has an empty one here. Raises `Uncuttable`.
    """
    prompt = _encode(lm, row.prompt)
    if row.target is not None:
        found = _cut(lm, row.prompt, row.target, row.wrong, prompt)
    elif row.wrong is not None:
        found = _cut(lm, row.prompt, row.wrong, None, prompt)
    else:
        return row, Cut(row.prompt, "", None, Encoded(tuple(prompt), ()))
    moved = replace(
        row,
        prompt=found.prompt,
        target=found.target if row.target is not None else None,
        wrong=found.wrong if row.target is not None else found.target,
    )
    if row.target is None:
        found = Cut(found.prompt, "", moved.wrong, Encoded(found.encoded.prompt, ()), found.encoded.target)
    return moved, found


def settle(lm: LM, cuts: Sequence[Cut]) -> list[Encoded]:
    """Targets as the model itself would end them: the last token may carry the text on.

    Behind `perf_counter` a tokenizer may have `()` and `()` + newline as one token each, and text that starts with the
    target is right with either. Where the model's own token at a place begins with all that is left of the target, it
    is taken, and nothing is asked of the model that it does not need to change.
    """
    encoded = [c.encoded for c in cuts]
    settled = list(encoded)
    for batch, logits in lm.batched_logits([e.ids for e in encoded], [e.positions for e in encoded]):
        best = logits.argmax(-1).split([len(encoded[i].target) for i in batch])
        for i, own in zip(batch, best, strict=True):
            settled[i] = _settled(lm, encoded[i], cuts[i].target, own.tolist())
    return settled


def _settled(lm: LM, encoded: Encoded, text: str, own: list[int]) -> Encoded:
    for n, token in enumerate(own):
        if token == encoded.target[n]:
            continue
        ids = (*encoded.target[:n], token)
        if lm.continuation(encoded.prompt, ids).startswith(text):
            return replace(encoded, target=ids)
    return encoded


# ---------------------------------------------------------------------- parts


def _encode(lm: LM, text: str) -> list[int]:
    if not text:
        raise Uncuttable(NO_PROMPT)
    try:
        return lm.encode_prompt(text)
    except CaseError as error:
        raise Uncuttable(TOO_LONG if "context" in str(error) else NOT_WRITABLE) from None


def _answer(lm: LM, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """(ids of the dressed prompt, ids of the answer's start) in a chat template, tokenised as one text."""
    ids = _encode(lm, prompt)
    joint = lm.tokenizer(lm.dressed(prompt) + text, add_special_tokens=False).input_ids
    if joint[: len(ids)] != ids or lm.continuation(ids, joint[len(ids) :]) != text:
        raise Uncuttable(NO_ROUND_TRIP)
    return ids, joint[len(ids) :]


def _cut_answer(lm: LM, prompt: str, right: str, wrong: str | None) -> Cut:
    """In a chat template the answer starts where the template ends; nothing can move into what the user said."""
    ids, target = _answer(lm, prompt, right)
    against = () if wrong is None else tuple(_answer(lm, prompt, wrong)[1])
    if against == tuple(target):
        raise Uncuttable(DIFFERS_NOWHERE)
    return Cut(prompt, right, wrong, Encoded(tuple(ids), tuple(target)), against)


def _cut(lm: LM, before: str, right: str, wrong: str | None, own: list[int] | None) -> Cut:
    """Cut before + right (and before + wrong, and the ids `own` of a prompt that somebody chose) where they part."""
    if lm.template is not None:
        return _cut_answer(lm, before, right, wrong)
    joint = _encode(lm, before + right)
    other = _encode(lm, before + wrong) if wrong is not None else None
    parted = [ids for ids in (other, own) if ids is not None]
    first = min((_common(joint, ids) for ids in parted), default=len(joint))
    if own is None and (first == len(joint) or (other is not None and first == len(other))):
        raise Uncuttable(DIFFERS_NOWHERE if joint == other else ONE_BEGINS_THE_OTHER)
    if other is not None and own is not None and joint[first:] == other[first:]:
        raise Uncuttable(DIFFERS_NOWHERE)
    if first == 0 or first >= len(joint):
        raise Uncuttable(NO_PROMPT if first == 0 else DIFFERS_NOWHERE)
    for place in range(first, max(0, first - BACK - 1), -1):
        tail = _tail(lm, before + right, joint, place)
        if tail is None:
            continue
        prompt = (before + right)[: len(before + right) - len(tail)]
        wrong_tail = None if wrong is None else (before + wrong)[len(prompt) :]
        if wrong is not None and other is not None and _tail(lm, before + wrong, other, place) != wrong_tail:
            continue
        if not prompt or _quiet(lm, prompt) != joint[:place]:
            continue
        ids = Encoded(tuple(joint[:place]), tuple(joint[place:]))
        return Cut(prompt, tail, wrong_tail, ids, () if other is None else tuple(other[place:]))
    raise Uncuttable(NO_ROUND_TRIP)


def _tail(lm: LM, text: str, ids: list[int], place: int) -> str | None:
    """The end of the text that ids[place:] stand for; None where the ids do not give the text back."""
    tail = lm.continuation(ids[:place], ids[place:])
    return tail if tail and text.endswith(tail) else None


def _quiet(lm: LM, prompt: str) -> list[int] | None:
    try:
        return lm.encode_prompt(prompt)
    except CaseError:
        return None


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common at their start."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
