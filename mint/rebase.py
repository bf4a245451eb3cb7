"""Carry a patch over to another version of its model: the same cases are solved again, starting from the old neurons."""

from dataclasses import dataclass, fields

import torch

from mint.case import Case
from mint.console import Say
from mint.errors import PatchError
from mint.model.lm import LM
from mint.patch import NeuronEdit, Patch
from mint.patch.record import cases_of
from mint.session import Outcome, Prepare, Wishes, repair
from mint.solver.problem import Problem, Settings, Solution
from mint.solver.solve import solve, solve_at


@dataclass(frozen=True)
class Rebased:
    """What became of a patch on another model."""

    outcome: Outcome
    moved: tuple[dict, ...]
    """A row a case: id, neurons before and after, cosine of their columns where the neuron stayed, whether needed."""


def rebase(lm: LM, patch: Patch, *, prepare: Prepare | None = None, say: Say = lambda _: None) -> Rebased:
    """Solve the cases that a patch records again on another model; the model is as before afterwards.

    The old neurons are tried first, so that as little as possible moves; where they fail the solver chooses. Raises
    `PatchError` for a patch without cases.
    """
    cases = cases_of(patch)
    if not cases:
        raise PatchError(
            "the patch records no cases, so it cannot be solved again; give one that `mint repair` wrote, or repair its rule on the"
            " new model with `mint repair --rule`"
        )
    asked = Wishes(settings=_settings(patch), stop=str(patch.info.get("stop") or "auto"))
    places = _places(patch)

    def again(lm: LM, problem: Problem, settings: Settings) -> Solution:
        old = [p for p in places.get(problem.case.id, []) if p not in problem.used and _fits(lm, p)]
        if old and len({layer for layer, _ in old}) == 1:
            found = solve_at(lm, problem, settings, old)
            if found.change is not None:
                return found
        return solve(lm, problem, settings)

    outcome = repair(lm, cases, asked, again, prepare=prepare, say=say)
    return Rebased(outcome, tuple(_moved(patch, places, outcome, case) for case in cases))


def _fits(lm: LM, place: tuple[int, int]) -> bool:
    return place[0] < lm.n_layers and place[1] < lm.block(place[0]).d_ff


def _settings(patch: Patch) -> Settings:
    """What the patch was made with, as far as it says so in a way that can be used."""
    said = patch.info.get("settings")
    known = {f.name: f for f in fields(Settings)}
    kept = {k: v for k, v in said.items() if k in known} if isinstance(said, dict) else {}
    kept.pop("reference", None)  # names and digests of files, not the files
    layers = kept.pop("layers", None)
    try:
        return Settings(**kept, layers=tuple(layers) if layers else None)
    except TypeError:
        return Settings()


def _places(patch: Patch) -> dict[str, list[tuple[int, int]]]:
    """Case id -> its neurons; of a patch with one case, all neurons."""
    records = [c for c in patch.info.get("cases") or [] if isinstance(c, dict)]
    every = [(e.layer, e.index) for e in patch.edits]
    found = {}
    for record in records:
        listed = [n for n in record.get("neurons") or [] if isinstance(n, dict)]
        named = [(n.get("layer"), n.get("index")) for n in listed]
        found[str(record.get("id"))] = [p for p in named if p in every] or (
            every if len(records) == 1 else []
        )
    return found


def _moved(patch: Patch, places: dict, outcome: Outcome, case: Case) -> dict:
    done = next(r for r in outcome.repairs if r.case.id == case.id)
    new = {(e.layer, e.index): e for e in (done.patch.edits if done.patch else ())}
    old = {(e.layer, e.index): e for e in patch.edits if (e.layer, e.index) in places.get(case.id, [])}
    stayed = sorted(new.keys() & old.keys())
    return {
        "id": case.id,
        "before": [list(p) for p in old],
        "after": [list(p) for p in new],
        "stayed": [list(p) for p in stayed],
        "cosine": [round(_cosine(old[p], new[p]), 4) for p in stayed],
        "needed": done.patch is not None or done.reason is not None,
        "reason": done.reason,
    }


def _cosine(a: NeuronEdit, b: NeuronEdit) -> float:
    x, y = a.after["out"].float(), b.after["out"].float()
    return float(torch.nn.functional.cosine_similarity(x, y, dim=0)) if x.shape == y.shape else float("nan")
