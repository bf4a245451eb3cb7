"""Text to token ids and back, without a lost or an added character. Knows tokenizers; nothing about weights.

A prompt is encoded as any server does: special tokens once, then the text, or dressed in the chat template. A target is
encoded as what stands behind those very ids: whatever tokens are chosen, they must read as the target there. So every
candidate is checked by decoding it behind the prompt, and none is trusted.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from mint.errors import CaseError, ModelError

# Texts to put in front of a target so that a tokenizer treats it as the middle of a text: one that adds a space in
# front of a text (SentencePiece, `add_prefix_space`) adds it there, and the tokens of the head are cut off again.
_HEADS = ("\n", "a\n", ".\n", ".", "a", "1", ")", " ", "")
# Tokens of the prompt that suffice to see how the next ones read.
_WINDOW = 48


@dataclass(frozen=True)
class Template:
    """How a prompt is dressed before it is encoded: the model's own chat template, with an optional system text."""

    system: str | None = None


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of ids, special tokens included, nothing tidied up."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return cast(str, text)  # the library gives a list for a batch of lists only, and types no overload


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], generated: Sequence[int]) -> str:
    """Text of `generated` as it stands behind `prompt` (a tokenizer may drop the blank of a lone first token)."""
    tail = list(prompt[-_WINDOW:])
    before = decode(tokenizer, tail)
    if len(tail) < len(prompt) and "\ufffd" in before:  # the window cuts a character of several bytes
        tail = list(prompt)
        before = decode(tokenizer, tail)
    after = decode(tokenizer, [*tail, *generated])
    return after[len(before) :] if after.startswith(before) else decode(tokenizer, generated)


def dressed(tokenizer: PreTrainedTokenizerBase, template: Template, text: str, name: str) -> str:
    """A prompt in the model's chat template. Raises `ModelError` without one, `CaseError` where it refuses the prompt."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"{name} has no chat template; leave out --chat")
    messages = [{"role": "user", "content": text}]
    if template.system is not None:
        messages.insert(0, {"role": "system", "content": template.system})
    try:
        shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's author, and fails as it likes
        said = " ".join(str(error).split()) or type(error).__name__
        if type(error).__name__ == "TemplateSyntaxError":
            line = getattr(error, "lineno", None)
            where = f" in line {line}" if line else ""
            raise CaseError(
                f"the chat template of {name} has a mistake{where}: {said}; mend its chat_template, or leave out --chat"
            ) from None
        leave = "--system" if template.system is not None else "--chat"
        raise CaseError(f"the chat template of {name} refuses this: {said}; leave out {leave}") from None
    if text.strip() not in shown:
        raise CaseError(
            f"the chat template of {name} leaves the prompt out or changes it; mend its chat_template, or leave out --chat"
        )
    return cast(str, shown)  # with tokenize=False a text, which the library's type does not say


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text with what the tokenizer puts in front of it (BOS, once) and without what it puts behind it (EOS)."""
    ids = list(tokenizer(text, add_special_tokens=True).input_ids)
    bare = list(tokenizer(text, add_special_tokens=False).input_ids)
    specials = set(tokenizer.all_special_ids)
    while len(ids) > len(bare) and ids and ids[-1] in specials and ids[: len(ids) - 1][-len(bare) :] == bare:
        ids = ids[:-1]
    while len(ids) > len(bare) and len(ids) > 1 and ids[-1] in specials and ids[-1:] != bare[-1:]:
        ids = ids[:-1]
    bos = tokenizer.bos_token_id
    return ids[1:] if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos else ids


def check_read_back(tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> None:
    """Raise `CaseError` if the tokenizer loses blanks or line ends of a prompt: the model would see another text.

    A blank more or less at the very start is the tokenizer's own habit; letters that it folds or does not know (case,
    composed accents, unknown characters) are what the model always sees.
    """
    back = decode(tokenizer, tokenizer(text, add_special_tokens=False).input_ids)
    if back == text or back.removeprefix(" ") == text.removeprefix(" "):
        return
    wanted, found = text.removeprefix(" "), back.removeprefix(" ")
    lost = Counter(c for c in unicodedata.normalize("NFC", wanted) if c.isspace())
    lost.subtract(Counter(c for c in unicodedata.normalize("NFC", found) if c.isspace()))
    if all(n <= 0 for n in lost.values()):
        return
    at = _first_difference(wanted, found)
    raise CaseError(
        f"the tokenizer of {name} cannot read the prompt back: {_differs(tokenizer, text, wanted, found, at)}; write"
        f" the prompt otherwise, or check the tokenizer's files (transformers {transformers_version})"
    )


def encode_target(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], target: str, behind: str | None, name: str
) -> list[int]:
    """Ids that, behind the ids of the prompt, read as exactly `target`.

    behind: the text that `prompt` encodes; the tokens are those of prompt and target encoded together, where that text
    splits between the two, else those of the target in the middle of a text. Raises `CaseError` if no tokens do.
    """
    nearest: str | None = None
    for head in (*([behind] if behind else []), *_HEADS):
        for ids in _tails(tokenizer, head, target):
            written = continuation(tokenizer, prompt, ids)
            if written == target:
                return ids
            if nearest is None or _first_difference(target, written) > _first_difference(target, nearest):
                nearest = written
    nearest = nearest or ""
    at = _first_difference(target, nearest)
    raise CaseError(
        f"the tokenizer of {name} cannot write the target: {_differs(tokenizer, target, target, nearest, at)}; use text that the"
        " tokenizer can make"
    )


def _tails(tokenizer: PreTrainedTokenizerBase, head: str, target: str) -> Iterator[list[int]]:
    """Ends of the ids of head + target that may be the target's, the likeliest first."""
    ids = list(tokenizer(head + target, add_special_tokens=False).input_ids)
    likely = len(tokenizer(head, add_special_tokens=False).input_ids) if head else 0
    if likely < len(ids):
        yield ids[likely:]
    for start in range(likely - 1, max(likely - 4, -1), -1):
        yield ids[start:]
    for start in range(likely + 1, min(likely + 4, len(ids))):
        yield ids[start:]


def _first_difference(wanted: str, found: str) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b),
        min(len(wanted), len(found)),
    )


def _differs(tokenizer: PreTrainedTokenizerBase, text: str, wanted: str, found: str, at: int) -> str:
    """Says what becomes of the character where a text and what came back part."""
    place = at + len(text) - len(wanted)
    if at >= len(wanted):
        return f"behind its end comes {found[at : at + 1]!r}"
    special = next((t for t in tokenizer.all_special_tokens if found.startswith(t, at)), found[at : at + 1])
    becomes = f"comes back as {special!r}" if at < len(found) else "is lost"
    return f"character {place} {wanted[at]!r} {becomes}"
