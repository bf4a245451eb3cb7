"""What a repair does next door: prompts of the same frame that ask for something else. By free generation.

Their output must not become the repair's target, nor change at all: as many tokens as the target has and `EXTRA` more
are compared, across line ends. The clean model's output is taken before the edit.
Knows nothing about solvers or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mint import prompts
from mint.batches import alike
from mint.case import Case
from mint.errors import CaseError
from mint.measure.contexts import BATCH_TOKENS
from mint.model.foretell import foretold
from mint.model.lm import LM, Encoded

EXCHANGES = 6
"""Most prompts that differ in one content word."""
INTENTS = 4
"""Prompts that ask for something else in the same frame."""
EXTRA = 8
"""Tokens compared beyond the length of the target."""


@dataclass(frozen=True)
class NearMisses:
    """Prompts next door, as cases with the repair's target, and what the clean model writes behind them."""

    cases: tuple[Case, ...]
    encoded: tuple[Encoded, ...]
    clean: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    """The tokens of that."""


def prepare(lm: LM, case: Case, stop: str = "auto", keep: Sequence[str] = (), seed: int = 0) -> NearMisses:
    """The near misses of a case on the clean model; call it before the edit. keep: prompts that the user named.

    Exchanged words and other requests come from the sets that no solver sees (mint/prompts.py, set `measure`).
    """
    texts = prompts.near_misses(
        case, "measure", exchanges=EXCHANGES, intents=INTENTS, chat=lm.template is not None, seed=seed
    )
    named = [k.prompt for k in case.keep if k.target != case.target] + list(keep)
    cases, encoded = [], []
    for prompt in dict.fromkeys([*named, *texts]):
        other = replace(case, prompt=prompt)
        try:
            found = lm.encode(other, stop)
        except CaseError:
            continue
        if len(found.ids) + 8 <= lm.context and prompt != case.prompt:
            cases.append(other)
            encoded.append(found)
    ids = _written(lm, encoded, [()] * len(encoded))
    return NearMisses(tuple(cases), tuple(encoded), tuple(_texts(lm, encoded, ids)), tuple(ids))


def _written(lm: LM, encoded: Sequence[Encoded], before: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Greedy tokens behind each prompt, a fixed number: they do not stop at line ends.

    before: what was written earlier; where one forward shows that it is written again, it is not generated.
    """
    old = [i for i, ids in enumerate(before) if ids]
    again = [Encoded(encoded[i].prompt, before[i]) for i in old]
    told = foretold(lm, again, [""] * len(again)) if again else []
    found = {i: before[i] for i, same in zip(old, told, strict=True) if same}
    asked = [i for i in range(len(encoded)) if i not in found]
    budget = max((len(e.target) for e in encoded), default=0) + EXTRA
    for part in alike([len(encoded[i].prompt) for i in asked], BATCH_TOKENS):
        batch = [asked[k] for k in part]
        ids = lm.generate([encoded[i].prompt for i in batch], budget)
        found |= {i: tuple(g) for i, g in zip(batch, ids, strict=True)}
    return [found[i] for i in range(len(encoded))]


def _texts(lm: LM, encoded: Sequence[Encoded], ids: Sequence[Sequence[int]]) -> list[str]:
    return [lm.continuation(e.prompt, g) for e, g in zip(encoded, ids, strict=True)]


def measure(lm: LM, near: NearMisses) -> dict[str, int]:
    """{cases, became_target, changed} on the present model, in numbers of prompts.

    A prompt behind which the clean model writes the target already can be changed, but cannot become it.
    """
    now = _texts(lm, near.encoded, _written(lm, near.encoded, near.ids))
    pairs = list(zip(now, near.clean, near.cases, strict=True))
    return {
        "cases": len(pairs),
        "became_target": sum(
            now.startswith(c.target) and not before.startswith(c.target) for now, before, c in pairs
        ),
        "changed": sum(now != before for now, before, _ in pairs),
    }
