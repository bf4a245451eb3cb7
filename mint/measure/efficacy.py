"""Efficacy: does the model now write the target? By free greedy generation and, labelled apart, with the answer fed in.

Text and token scores of one case; knows nothing about solvers, files or other cases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mint.case import Case
from mint.errors import MintError
from mint.measure import judges, textmetrics
from mint.model.lm import LM, Encoded
from mint.model.margins import all_margins


@dataclass(frozen=True)
class Forced:
    """One target with the true prefix fed in (teacher-forced)."""

    margins: tuple[float, ...]
    """Per target token, the stop included: its logit minus the best other logit."""

    @property
    def token_accuracy(self) -> float:
        """Share of target tokens that are the argmax, 0 to 1; a tie counts as wrong."""
        return sum(m > 0 for m in self.margins) / len(self.margins)

    @property
    def exact(self) -> bool:
        """Whether every target token, the stop included, is the argmax."""
        return all(m > 0 for m in self.margins)


def forced(lm: LM, encoded: Sequence[Encoded]) -> list[Forced]:
    """Teacher-forced margins of targets, in order."""
    return [Forced(tuple(found.tolist())) for found in all_margins(lm, encoded)]


def scores(found: str, wanted: str) -> dict[str, float]:
    """Sentence BLEU, chrF and edit similarity of a written text, all 0 to 1."""
    return {
        "bleu": textmetrics.bleu(found, wanted),
        "chrf": textmetrics.chrf(found, wanted),
        "edit_similarity": textmetrics.edit_similarity(found, wanted),
    }


def judge_of(case: Case, tests: Mapping[str, dict] | None = None) -> str | None:
    """The name of the judge of a case's task; None for a task without one, or without its tests."""
    name = judges.JUDGE_OF_TASK.get(case.task or "")
    return None if name == "python_tests" and case.id not in (tests or {}) else name


def judged(case: Case, text: str, tests: Mapping[str, dict] | None = None) -> dict | None:
    """What the code judge of the case's task says of a text; None for a task without one, or without its tests.

    tests: by case id, {before, after} for the judge that runs programs. A judge whose tool is missing gives `error`.
    """
    name = judge_of(case, tests)
    if name is None:
        return None
    options = {}
    if name == "python_tests" and tests:
        options = {k: tests[case.id][k] for k in ("before", "after")}
    try:
        found = judges.judge(name, text, case.target, **options)
    except MintError as error:
        return {"judge": name, "error": str(error)}
    return {"judge": name, "ok": found.ok, "matches": found.matches_expected, "detail": found.detail}


def rephrased(case: Case) -> list[Case]:
    """The case behind each of its rephrasings."""
    return [replace(case, id=f"{case.id} / {i}", prompt=p) for i, p in enumerate(case.rephrasings, start=1)]
