"""Generalization: is the target also written behind prompts that mean the same but were not given to the solver?

Knows nothing about solvers or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mint.case import Case
from mint.errors import CaseError
from mint.measure.efficacy import forced, rephrased
from mint.model.lm import LM, Encoded


@dataclass(frozen=True)
class Rephrasings:
    """A case behind its rephrasings, as ids, with the clean model's token accuracy. Made before the edit."""

    cases: tuple[Case, ...]
    encoded: tuple[Encoded, ...]
    token_accuracy: tuple[float, ...]
    """Teacher-forced share of target tokens right, clean model, one a rephrasing."""


def prepare(lm: LM, case: Case, stop: str = "auto") -> Rephrasings:
    """Encode and measure the rephrasings on the clean model. Those that do not fit the context are left out."""
    cases, encoded = [], []
    for other in rephrased(case):
        try:
            encoded.append(lm.encode(other, stop))
        except CaseError:
            continue
        cases.append(other)
    accuracy = tuple(f.token_accuracy for f in forced(lm, encoded)) if encoded else ()
    return Rephrasings(tuple(cases), tuple(encoded), accuracy)


def measure(lm: LM, prepared: Rephrasings) -> dict | None:
    """Generalization on the present model; None for a case without rephrasings.

    token_accuracy_before/after: teacher-forced share of target tokens right behind a rephrasing, mean over rephrasings.
    exact_match_generated: share of rephrasings behind which free greedy generation gives exactly the target.
    """
    n = len(prepared.cases)
    if n == 0:
        return None
    after = forced(lm, prepared.encoded)
    written = lm.write_all(prepared.encoded, prepared.cases)
    return {
        "rephrasings": n,
        "token_accuracy_before": _mean(prepared.token_accuracy),
        "token_accuracy_after": _mean([f.token_accuracy for f in after]),
        "exact_match_forced": _mean([float(f.exact) for f in after]),
        "exact_match_generated": _mean(
            [float(text == c.target) for text, c in zip(written, prepared.cases, strict=True)]
        ),
        "written": written,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
