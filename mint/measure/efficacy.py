"""Efficacy: does the model now write the target? By free greedy generation and, labelled apart, with the answer fed in.

Text and token scores of one case; knows nothing about solvers, files or other cases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mint.case import Case, Keep
from mint.errors import MintError
from mint.measure import judges, textmetrics
from mint.model.lm import LM, Encoded
from mint.solver.problem import margins_of

KEEP_TOKENS = 48
"""Tokens of the clean output that a `keep` prompt without a target must keep."""


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


@torch.no_grad()
def forced(lm: LM, encoded: Sequence[Encoded]) -> list[Forced]:
    """Teacher-forced margins of targets, in order."""
    found: dict[int, Forced] = {}
    for batch, logits in lm.batched_logits([e.ids for e in encoded], [e.positions for e in encoded]):
        parts = logits.split([len(encoded[i].target) for i in batch])
        for i, part in zip(batch, parts, strict=True):
            found[i] = Forced(tuple(margins_of(part, encoded[i].target).tolist()))
    return [found[i] for i in range(len(encoded))]


def scores(found: str, wanted: str) -> dict[str, float]:
    """Sentence BLEU, chrF and edit similarity of a written text, all 0 to 1."""
    return {
        "bleu": textmetrics.bleu(found, wanted),
        "chrf": textmetrics.chrf(found, wanted),
        "edit_similarity": textmetrics.edit_similarity(found, wanted),
    }


def judged(case: Case, text: str, tests: Mapping[str, dict] | None = None) -> dict | None:
    """What the code judge of the case's task says of a text; None for a task without one, or without its tests.

    tests: by case id, {before, after} for the judge that runs programs. A judge whose tool is missing gives `error`.
    """
    name = judges.JUDGE_OF_TASK.get(case.task or "")
    if name is None:
        return None
    options = {}
    if name == "python_tests":
        if not tests or case.id not in tests:
            return None
        options = {k: tests[case.id][k] for k in ("before", "after")}
    try:
        found = judges.judge(name, text, case.target, **options)
    except MintError as error:
        return {"judge": name, "error": str(error)}
    return {"judge": name, "ok": found.ok, "matches": found.matches_reference, "detail": found.detail}


@dataclass(frozen=True)
class Kept:
    """One `keep` prompt and what must go on being written behind it."""

    case: Case
    encoded: Encoded
    right: bool
    """Whether the clean model writes it; a target it never wrote can be asked for but not broken."""
    own: bool
    """Whether it is the clean model's own output, token for token, rather than a target somebody gave."""


def encode_keep(lm: LM, keep: Sequence[Keep], stop: str = "auto") -> list[Kept]:
    """The `keep` prompts of a case, measured on the clean model; call it before the edit.

    Without a target, the clean model's own greedy output is what must be kept (up to `KEEP_TOKENS` tokens).
    """
    return [_encode_keep(lm, item, f"keep {n}", stop) for n, item in enumerate(keep, start=1)]


def _encode_keep(lm: LM, item: Keep, name: str, stop: str) -> Kept:
    if item.target is not None:
        case = Case(name, item.prompt, item.target)
        encoded = lm.encode(case, stop)
        return Kept(case, encoded, lm.write(encoded, case) == case.target, False)
    prompt = lm.encode_prompt(item.prompt)
    written = lm.generate([prompt], min(KEEP_TOKENS, lm.context - len(prompt)))[0]
    case = Case(name, item.prompt, lm.continuation(prompt, written))
    return Kept(case, Encoded(tuple(prompt), tuple(written)), True, True)


def still_kept(lm: LM, kept: Kept) -> bool:
    """Whether the present model writes, by free greedy generation, what was to be kept."""
    if kept.own:
        return tuple(lm.generate([kept.encoded.prompt], len(kept.encoded.target))[0]) == kept.encoded.target
    return lm.write(kept.encoded, kept.case) == kept.case.target


def rephrased(case: Case) -> list[Case]:
    """The case behind each of its rephrasings."""
    return [replace(case, id=f"{case.id} / {i}", prompt=p) for i, p in enumerate(case.rephrasings, start=1)]
