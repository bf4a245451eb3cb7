"""Guards: what must stay as it is. A prompt, the tokens that are written behind it, and why; collected and looked at again.

One kind for all who protect something: the solver (what a change must leave alone), the session (what must hold before
a change is kept) and the evaluation (what was kept, what broke). Knows nothing about edits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mint.case import Case, Keep, case_from_dict
from mint.errors import CaseError
from mint.model.foretell import clear_margin
from mint.model.lm import LM, Encoded
from mint.model.margins import all_margins
from mint.model.stop import Stop

KEEP_TOKENS = 32
"""Most tokens of a model's own output that a `keep` prompt without a target protects."""
KEEP_LINES = 2
"""Most lines of it."""
BATCH = 16
"""Guards generated at a time."""

KEPT = "keep"
EARLIER = "an earlier repair"


@dataclass(frozen=True)
class Guard:
    """A prompt, what must be written behind it, and why."""

    encoded: Encoded
    why: str
    """`KEPT`, `EARLIER` or another word for messages."""
    name: str
    """Which one: the id of a case, the number of a `keep`."""
    text: str | None = None
    """The text that somebody asked for; None: the model's own output, compared token for token."""
    holds: bool = True
    """Whether the model wrote it when the guard was made. What never held can be asked for but not broken."""


# ---------------------------------------------------------------------- making them


def collect(lm: LM, keep: Sequence[Keep], stop: str = "auto") -> list[Guard]:
    """Guards of `keep` prompts, measured on the model as it is; make them before the edit.

    Without a target, the model's own greedy output is what must stay: up to `KEEP_TOKENS` tokens and `KEEP_LINES`
    lines. Raises `CaseError` for a prompt or target that cannot be encoded.
    """
    return [_of_keep(lm, item, f"keep {number}", stop) for number, item in enumerate(keep, start=1)]


def _of_keep(lm: LM, item: Keep, name: str, stop: str) -> Guard:
    if item.target is None:
        prompt = lm.encode_prompt(item.prompt)
        room = min(KEEP_TOKENS, lm.context - len(prompt))
        written = lm.generate([prompt], room, [Stop("line", lines=KEEP_LINES)])[0]
        return Guard(Encoded(tuple(prompt), tuple(written)), KEPT, name)
    case = Case(name, item.prompt, item.target)
    encoded = lm.encode(case, stop)
    guard = Guard(encoded, KEPT, name, item.target, lm.write(encoded, case) == item.target)
    if guard.holds and not float(all_margins(lm, [encoded])[0].min()) > 0:
        # The model writes the text with other tokens than the tokenizer would: those are the ones to protect.
        budget = min(len(encoded.target), lm.context - len(encoded.prompt))
        own = lm.generate([encoded.prompt], budget, [encoded.stop])[0]
        return Guard(Encoded(encoded.prompt, tuple(own)), KEPT, name)
    return guard


def of_repair(case: Case, encoded: Encoded) -> Guard:
    """The guard that a repaired case leaves behind."""
    return Guard(encoded, EARLIER, case.id, case.target)


def of_records(lm: LM, records: Sequence[object], stop: str = "auto") -> list[Guard]:
    """Guards of repairs recorded in patches that the model holds, as far as they hold (a patch may have been scaled).

    records: the `cases` of a patch's header. They are written for people; one that cannot be used is passed over.
    """
    found = []
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            continue
        try:
            known = {k: record[k] for k in ("prompt", "target", "stop") if k in record}
            case = case_from_dict(known | {"id": f"earlier {number}"})
            guard = of_repair(case, lm.encode(case, stop))
        except CaseError:
            continue
        found.append(guard)
    return [g for g, holds in zip(found, still_hold(lm, found), strict=True) if holds]


# ---------------------------------------------------------------------- looking again


def first_broken(lm: LM, encoded: Sequence[Encoded]) -> int | None:
    """Index of a text whose target is no longer the argmax throughout, teacher-forced; None if all are. What a solver asks."""
    for indices, logits in lm.batched_logits([e.ids for e in encoded], [e.positions for e in encoded]):
        wanted = torch.tensor([t for i in indices for t in encoded[i].target], device=logits.device)
        wrong = (logits.argmax(1) != wanted).nonzero().flatten()
        if len(wrong):
            ends = torch.tensor([len(encoded[i].target) for i in indices]).cumsum(0)
            return indices[int((ends <= int(wrong[0])).sum())]
    return None


def still_hold(lm: LM, guards: Sequence[Guard], *, quick: bool = False) -> list[bool]:
    """Per guard, whether the present model writes, by free greedy generation, what is guarded.

    quick: where every token leads clearly with the true tokens before it fed in, generation cannot give anything else
    and is left out; all others are generated.
    """
    held = [True] * len(guards)
    doubtful = list(range(len(guards)))
    if quick and guards:
        clear = clear_margin(lm)
        leads = all_margins(lm, [g.encoded for g in guards])
        doubtful = [i for i, m in enumerate(leads) if len(m) and not float(m.min()) > clear]
    order = sorted(doubtful, key=lambda i: (len(guards[i].encoded.ids), i))
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        for i, (_, same) in zip(part, _write(lm, [guards[i] for i in part]), strict=True):
            held[i] = same
    return held


def written(lm: LM, guard: Guard) -> str:
    """What the present model writes behind the prompt of a guard, as far as it is compared."""
    return _write(lm, [guard])[0][0]


def wanted(lm: LM, guard: Guard) -> str:
    """The text that is guarded."""
    if guard.text is not None:
        return guard.text
    return lm.continuation(guard.encoded.prompt, guard.encoded.target)


def _write(lm: LM, guards: Sequence[Guard]) -> list[tuple[str, bool]]:
    """What is written behind each prompt, and whether it is what is guarded."""
    texts = [g for g in guards if g.text is not None]
    cases = [Case(g.name, "", g.text) for g in texts if g.text is not None]
    by_text = iter(lm.write_all([g.encoded for g in texts], cases) if texts else [])
    own = [g.encoded for g in guards if g.text is None]
    longest = max((len(e.target) for e in own), default=0)
    by_token = iter(lm.generate([e.prompt for e in own], longest) if longest else [[] for _ in own])
    found = []
    for guard in guards:
        if guard.text is not None:
            text = next(by_text)
            found.append((text, text == guard.text))
            continue
        ids = next(by_token)[: len(guard.encoded.target)]
        found.append((lm.continuation(guard.encoded.prompt, ids), tuple(ids) == guard.encoded.target))
    return found
