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
    return NearMisses(tuple(cases), tuple(encoded), tuple(_written(lm, encoded)))


def _written(lm: LM, encoded: Sequence[Encoded]) -> list[str]:
    """Greedy text behind each prompt, of a fixed number of tokens: it does not stop at line ends."""
    texts: dict[int, str] = {}
    budget = max((len(e.target) for e in encoded), default=0) + EXTRA
    for batch in alike([len(e.prompt) for e in encoded], BATCH_TOKENS):
        ids = lm.generate([encoded[i].prompt for i in batch], budget)
        texts |= {i: lm.continuation(encoded[i].prompt, g) for i, g in zip(batch, ids, strict=True)}
    return [texts[i] for i in range(len(encoded))]


def measure(lm: LM, near: NearMisses) -> dict[str, int]:
    """{cases, became_target, changed} on the present model, in numbers of prompts.

    A prompt behind which the clean model writes the target already can be changed, but cannot become it.
    """
    pairs = list(zip(_written(lm, near.encoded), near.clean, near.cases, strict=True))
    return {
        "cases": len(pairs),
        "became_target": sum(
            now.startswith(c.target) and not before.startswith(c.target) for now, before, c in pairs
        ),
        "changed": sum(now != before for now, before, _ in pairs),
    }
