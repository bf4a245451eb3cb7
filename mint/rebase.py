"""Carry a patch over to another version of its model: the same cases are solved again, starting from the old neurons."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from mint.case import Case
from mint.console import Say
from mint.errors import LayoutError, PatchError
from mint.model.experts import focused
from mint.model.lm import LM
from mint.patch import NeuronEdit, Patch
from mint.patch.record import cases_of, places_named
from mint.session import Outcome, Prepare, Wishes, repair
from mint.solver import in_contexts
from mint.solver import solve as minimal
from mint.solver.problem import Problem, Settings, Solution


@dataclass(frozen=True)
class Rebased:
    """What became of a patch on another model."""

    outcome: Outcome
    moved: tuple[dict, ...]
    """A row a case: id, neurons before and after, cosine of their columns where the neuron stayed, whether needed."""


def rebase(lm: LM, patch: Patch, *, prepare: Prepare | None = None, say: Say = lambda _: None) -> Rebased:
    """Solve the cases that a patch records again on another model; the model is as before afterwards.

    The old neurons are tried first, so that as little as possible moves; where they fail the solver chooses. A patch that
    was made to hold in other files and wordings is solved for them again. Raises `PatchError` for a patch without cases.
    """
    cases = cases_of(patch)
    if not cases:
        raise PatchError(
            "the patch records no cases, so it cannot be solved again; give one that `mint repair` wrote, and the file of its rule"
            " with --rule where it was made from one"
        )
    asked = Wishes(
        settings=_settings(patch), stop=str(patch.info.get("stop") or "auto"), solver=solver_of(patch)
    )
    places = _places(patch)

    def again(lm: LM, problem: Problem, settings: Settings) -> Solution:
        known = places.get(problem.case.id, [])
        old = [p for p in known if (p[0], p[2]) not in problem.used and _fits(lm, p)]
        together = len({place[:2] for place in old}) == 1
        if solver_of(patch) == in_contexts.NAME:
            first = [(layer, index) for layer, expert, index in old if together and expert < 0]
            found = in_contexts.attempt(lm, problem, settings, first)
            if isinstance(found, Solution):
                return found
        if together:
            layer, expert, _ = old[0]
            view = lm if expert < 0 else focused(lm, {layer: [expert]})
            found = minimal.solve_at(view, problem, settings, [(layer, index) for layer, _, index in old])
            if found.change is not None:
                return found
        return minimal.solve(lm, problem, settings)

    outcome = repair(lm, cases, asked, again, prepare=prepare, say=say)
    return Rebased(outcome, tuple(_moved(patch, places, outcome, case) for case in cases))


def solver_of(patch: Patch) -> str:
    """The solver that the patch was made with; `mint` if it does not say so."""
    return str(patch.info.get("solver") or minimal.NAME)


def _fits(lm: LM, place: tuple[int, int, int]) -> bool:
    """Whether the model has the neuron at all."""
    layer, expert, index = place
    try:
        lm.layout.slices(layer, index, None if expert < 0 else expert)
    except LayoutError:
        return False
    return True


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


def _places(patch: Patch) -> dict[str, list[tuple[int, int, int]]]:
    """Case id -> its neurons, (layer, expert or -1, index); of a patch with one case, all neurons."""
    records = [c for c in patch.info.get("cases") or [] if isinstance(c, dict)]
    every = [e.place for e in patch.edits]
    found = {}
    for record in records:
        found[str(record.get("id"))] = [p for p in places_named(record) if p in every] or (
            every if len(records) == 1 else []
        )
    return found


def moved_between(old: Sequence[NeuronEdit], new: Sequence[NeuronEdit]) -> dict:
    """Which neurons two versions of a repair change, as JSON values: `before`, `after`, `stayed`, and the `cosine` of the
    columns of those that stayed."""
    earlier, later = ({e.place: e for e in edits} for edits in (old, new))
    stayed = sorted(earlier.keys() & later.keys())
    return {
        "before": [e.named() for e in earlier.values()],
        "after": [e.named() for e in later.values()],
        "stayed": [later[p].named() for p in stayed],
        "cosine": [round(_cosine(earlier[p], later[p]), 4) for p in stayed],
    }


def _moved(patch: Patch, places: dict, outcome: Outcome, case: Case) -> dict:
    done = next(r for r in outcome.repairs if r.case.id == case.id)
    old = [e for e in patch.edits if e.place in places.get(case.id, [])]
    return (
        {"id": case.id}
        | moved_between(old, done.patch.edits if done.patch else ())
        | {"needed": done.patch is not None or done.reason is not None, "reason": done.reason}
    )


def _cosine(a: NeuronEdit, b: NeuronEdit) -> float:
    x, y = a.after["out"].float(), b.after["out"].float()
    return float(torch.nn.functional.cosine_similarity(x, y, dim=0)) if x.shape == y.shape else float("nan")
