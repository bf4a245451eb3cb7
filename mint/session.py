"""Repair cases on one model: attribute, solve, verify by generation, measure the side effects, accept or refuse.

The one loop of the product, and transactional: whatever happens, the model that was handed in keeps every bit, and a
patch comes out only if the repaired model really wrote every target. Knows nothing about files or the command line.
"""

import copy
import difflib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from typing import Any

import torch

from mint.case import Case, Keep, case_from_dict, case_to_dict
from mint.errors import CaseError, MintError
from mint.measure import places, specificity
from mint.measure.specificity import Specificity
from mint.model.lm import LM, Encoded
from mint.model.loading import DTYPES
from mint.model.stop import Stop
from mint.patch import Patch, compose, versions
from mint.patch.export import describe
from mint.reference import passages, reference_texts, statistics
from mint.solver.problem import Problem, Settings, Solution, Solver, changed, margins

KEEP_TOKENS = 32
"""Most tokens of a model's own output that a `keep` prompt without a target protects."""
SPECIFICITY = "specificity.jsonl"

Say = Callable[[str], None]
Attribute = Callable[[LM, Problem], Any]
Judge = Callable[[LM, Problem, Patch], Any]
Prepare = Callable[[LM], Any]
_ASIDE = ("attribute", "statistics", "verdict", "contexts")
"""Steps that are not the repair itself: what explains it, and what is measured once per model and then cached."""


@dataclass(frozen=True)
class Wishes:
    """What the user asks of a repair, beyond the cases."""

    settings: Settings = field(default_factory=Settings)
    solver: str = "mint"
    stop: str = "auto"
    """How a target ends; see `LM.encode`."""
    keep: tuple[Keep, ...] = ()
    """Outputs that must survive every repair."""
    verify_dtypes: tuple[str, ...] = ()
    """Names of dtypes in which the repaired model must write the target too."""
    applied: tuple[Patch, ...] = ()
    """Patches that the model holds already: the repairs in them are protected, their neurons not used again."""
    contexts: bool = False
    """Whether contexts, wordings and near misses of every repair are measured (`mint.measure.places`)."""


@dataclass(frozen=True)
class Repair:
    """What became of one case. Accepted if `reason` is None; `patch` is None where none was needed or found."""

    case: Case
    generated_before: str
    generated_after: str
    """What the model writes with the patch in; without a patch, the same as before."""
    patch: Patch | None = None
    reason: str | None = None
    """Why there is no acceptable repair, one line."""
    note: str | None = None
    margin_min: float | None = None
    """Smallest teacher-forced logit margin over the target, stop included, with the patch in."""
    tokens: tuple[str, ...] = ()
    """The target token by token, stop included, with the margins before and after."""
    margins_before: tuple[float, ...] = ()
    margins_after: tuple[float, ...] = ()
    solution: Solution | None = None
    attribution: Any = None
    """The `Attribution`, where one was asked for."""
    verdict: Any = None
    """Whether the edited neurons were the cause of the fault or carry the repair, where that was asked for."""
    places: dict | None = None
    """Where the repair holds and is felt, see `mint.measure.places.measure`; None where it was not asked for."""
    timing: dict[str, float] = field(default_factory=dict)
    """Seconds by step: generate, statistics, attribute, solve, verify, contexts, verdict."""

    @property
    def success(self) -> bool:
        return self.reason is None

    @property
    def neurons(self) -> list[dict]:
        """The neurons changed: layer, index, kind."""
        edits = self.patch.edits if self.patch else ()
        return [{"layer": e.layer, "index": e.index, "kind": e.kind} for e in edits]

    @property
    def seconds(self) -> float:
        """What the repair took: generate, solve, verify. Not in it: explaining it, measuring side effects, and the
        statistics of the model, which are measured once and cached."""
        return sum(t for step, t in self.timing.items() if step not in _ASIDE)


@dataclass(frozen=True)
class Outcome:
    """Repairs of one or more cases on one model, in order."""

    repairs: tuple[Repair, ...]
    patch: Patch | None
    """All accepted repairs as one patch; None if none was needed or found."""
    specificity: Specificity | None
    """Side effects of that patch on the reference set that ships; None without a patch."""

    @property
    def success(self) -> bool:
        return all(r.success for r in self.repairs)

    @property
    def reason(self) -> str | None:
        """The first refusal."""
        failed = next((r for r in self.repairs if not r.success), None)
        if failed is None:
            return None
        return failed.reason if len(self.repairs) == 1 else f"case '{failed.case.id}': {failed.reason}"


class _Refused(Exception):
    """Ends one case; its text is the reason."""


# ---------------------------------------------------------------------- the loop


def repair(
    lm: LM,
    cases: Sequence[Case],
    wishes: Wishes,
    solve: Solver,
    *,
    attribute: Attribute | None = None,
    judge: Judge | None = None,
    prepare: Prepare | None = None,
    say: Say = lambda _: None,
) -> Outcome:
    """Repair the cases one after another on one model; every repair protects the ones before it.

    The model is bit-identical afterwards. solve: see `mint.solver.SOLVERS`. attribute: called for every case that needs
    a repair, its result goes into `Repair.attribution`. judge: called for every accepted patch while it is not applied,
    its result goes into `Repair.verdict`. prepare: called once if anything needs a repair, for what is cached per model
    and not part of a repair's time. say: told what happens. A case without an acceptable repair is
    refused in its `Repair`; `CaseError` is raised for cases that cannot be used, before anything is solved.
    """
    _check_wishes(wishes)
    encoded = [lm.encode(case, wishes.stop) for case in cases]
    check_contradictions(lm, cases, encoded, wishes)
    clean, protected, taken = None, _earlier(lm, wishes), _neurons(wishes.applied)
    repairs: list[Repair] = []
    with ExitStack() as edits:
        for number, case in enumerate(cases):
            say(f"repairing {case.id}" + (f" ({number + 1} of {len(cases)})" if len(cases) > 1 else ""))
            earlier = [*protected, *(e for e, r in zip(encoded, repairs, strict=False) if r.success)]
            used = taken | _neurons([r.patch for r in repairs if r.patch])
            done, before = _timed(lambda case=case, e=encoded[number]: lm.write(e, case))
            timing = {"generate": done}
            if before == case.target:
                repairs.append(Repair(case, before, before, note=ALREADY_RIGHT, timing=timing))
                continue
            if clean is None:
                say("measuring the model before the repair")
                watched = measured_sequences(lm, wishes)
                clean = specificity.baseline(lm, watched, states=specificity.late_layers(lm))
                if prepare is not None:
                    timing["statistics"], _ = _timed(lambda: prepare(lm))
            problem = Problem(
                case, encoded[number], _keeps(lm, case, wishes), tuple(earlier), frozenset(used)
            )
            accepted = _repair_one(lm, problem, wishes, solve, attribute, judge, say, before, timing)
            repairs.append(accepted)
            if accepted.patch is not None:
                edits.enter_context(changed(lm, accepted.patch))
        patches = [r.patch for r in repairs if r.patch is not None]
        effects = None
        if patches and clean is not None:
            say("measuring what else changed")
            since = min(edit.layer for patch in patches for edit in patch.edits)
            effects = specificity.compare(lm, clean, since=since)
    patch = None
    if patches:
        whole = compose(patches) if len(patches) > 1 else patches[0]
        patch = _signed(lm, whole, [r for r in repairs if r.patch], wishes, effects)
    return Outcome(tuple(repairs), patch, effects)


ALREADY_RIGHT = "the model already writes the target; no patch is needed"


def _repair_one(
    lm: LM,
    problem: Problem,
    wishes: Wishes,
    solve: Solver,
    attribute: Attribute | None,
    judge: Judge | None,
    say: Say,
    before: str,
    timing: dict[str, float],
) -> Repair:
    """Attribute, solve and verify one case; the model is as before when this returns or raises."""
    with torch.no_grad():
        found: dict[str, Any] = {
            "tokens": tuple(lm.decode([t]) for t in problem.encoded.target),
            "margins_before": tuple(margins(lm, problem.encoded).tolist()),
        }
    try:
        if attribute is not None:
            say(f"{problem.case.id}: looking for the neurons behind the fault")
            timing["attribute"], found["attribution"] = _timed(lambda: attribute(lm, problem))
        around = None
        if wishes.contexts:
            say(f"{problem.case.id}: writing behind near misses")
            kept = [keep.prompt for keep in wishes.keep]
            timing["contexts"], around = _timed(
                lambda: places.prepare(lm, problem.case, wishes.stop, kept, wishes.settings.seed)
            )
        say(f"{problem.case.id}: solving")
        timing["solve"], solution = _timed(lambda: solve(lm, problem, wishes.settings))
        found["solution"] = solution
        patch = _patch_of(solution, wishes)
        say(f"{problem.case.id}: generating with the repair")
        started = time.perf_counter()
        try:
            with changed(lm, patch):
                found |= verify(lm, problem, wishes)
        finally:
            timing["verify"] = time.perf_counter() - started
        if around is not None:
            say(f"{problem.case.id}: writing in other contexts")
            with changed(lm, patch):
                seconds, found["places"] = _timed(lambda: places.measure(lm, around))
            timing["contexts"] += seconds
        if judge is not None:
            say(f"{problem.case.id}: cause or carrier")
            timing["verdict"], found["verdict"] = _timed(lambda: judge(lm, problem, patch))
    except _Refused as refusal:
        return Repair(problem.case, before, before, reason=str(refusal), timing=timing, **found)
    return Repair(problem.case, before, problem.case.target, patch, timing=timing, **found)


def _patch_of(solution: Solution, wishes: Wishes) -> Patch:
    if solution.change is None:
        raise _Refused(solution.reason or f"solver '{solution.solver}' found nothing and gave no reason")
    if not isinstance(solution.change, Patch):
        raise _Refused(
            f"solver '{solution.solver}' changes whole matrices, which no patch file can hold; compare it with"
            " `mint evaluate`, repair with --solver mint"
        )
    if len(solution.change.edits) > wishes.settings.max_neurons:
        raise _Refused(
            f"solver '{solution.solver}' needs {len(solution.change.edits)} neurons, more than the"
            f" {wishes.settings.max_neurons} allowed; raise --max-neurons"
        )
    return solution.change


def verify(lm: LM, problem: Problem, wishes: Wishes) -> dict[str, Any]:
    """Prove a repair on the model that holds it, by generating: the target, what is kept, and earlier repairs.

    Returns {margins_after, margin_min}. Raises `_Refused` with what came out instead.
    """
    written = lm.write(problem.encoded, problem.case)
    if written != problem.case.target:
        raise _Refused(f"the edited model writes {_short(written)} instead of {_short(problem.case.target)}")
    for what, kept in (("keep", problem.keep), ("an earlier repair", problem.earlier)):
        for one in kept:
            again = lm.generate([one.prompt], len(one.target))[0]
            if again != list(one.target):
                raise _Refused(
                    f"the edit breaks {what}: behind {_short(lm.decode(one.prompt)[-40:])} it writes"
                    f" {_short(lm.continuation(one.prompt, again))} instead of"
                    f" {_short(lm.continuation(one.prompt, one.target))}"
                )
    for name in wishes.verify_dtypes:
        other = _in_dtype(lm, name).write(problem.encoded, problem.case)
        if other != problem.case.target:
            raise _Refused(
                f"the repair holds in {str(lm.dtype).removeprefix('torch.')}, but in {name} the model writes"
                f" {_short(other)}; ask for a larger --margin"
            )
    with torch.no_grad():
        after = margins(lm, problem.encoded).tolist()
    return {"margins_after": tuple(after), "margin_min": min(after)}


def _in_dtype(lm: LM, name: str) -> LM:
    """A copy of the model in another dtype (twice the memory while it lives)."""
    return replace(lm, model=copy.deepcopy(lm.model).to(DTYPES[name]), _modules={}, _parameters={})


# ---------------------------------------------------------------------- what must hold


def _check_wishes(wishes: Wishes) -> None:
    unknown = [d for d in wishes.verify_dtypes if d not in DTYPES]
    if unknown:
        raise MintError(f"unknown dtype '{unknown[0]}'; known are {', '.join(DTYPES)}")


def _keeps(lm: LM, case: Case, wishes: Wishes) -> tuple[Encoded, ...]:
    """What must stay: targets where given (which the model must write now), else what the model writes now."""
    found = []
    for keep in (*wishes.keep, *case.keep):
        if keep.target is None:
            found.append(_own_output(lm, keep))
            continue
        kept = Case("keep", keep.prompt, keep.target)
        encoded = lm.encode(kept, wishes.stop)
        written = lm.write(encoded, kept)
        if written != keep.target:
            raise CaseError(
                f"keep: behind {_short(keep.prompt)} the model writes {_short(written)}, not"
                f" {_short(keep.target)}; only what holds now can be kept: make it a case of its own"
            )
        found.append(encoded)
    return tuple(e for e in found if e.target)


def _neurons(patches: Iterable[Patch]) -> frozenset[tuple[int, int]]:
    return frozenset((e.layer, e.index) for p in patches for e in p.edits)


def _earlier(lm: LM, wishes: Wishes) -> list[Encoded]:
    """The repairs recorded in the patches that the model holds, as far as they hold (a patch may have been scaled)."""
    found = []
    for number, record in enumerate(c for p in wishes.applied for c in p.info.get("cases") or []):
        try:
            case = case_from_dict({k: record[k] for k in ("prompt", "target")} | {"id": f"earlier {number}"})
            encoded = lm.encode(case, wishes.stop)
        except (CaseError, KeyError, TypeError):
            continue  # the record is for people; a patch without a usable one still applies
        if lm.write(encoded, case) == case.target:
            found.append(encoded)
    return found


def _own_output(lm: LM, keep: Keep) -> Encoded:
    prompt = lm.encode_prompt(keep.prompt)
    room = min(KEEP_TOKENS, lm.context - len(prompt))
    return Encoded(tuple(prompt), tuple(lm.generate([prompt], room, [Stop("line", lines=2)])[0]))


def check_contradictions(
    lm: LM, cases: Sequence[Case], encoded: Sequence[Encoded], wishes: Wishes = Wishes()
) -> None:
    """Raise `CaseError` if two cases, or a case and a kept target, want different tokens behind the same text."""
    wanted: list[tuple[str, Encoded]] = [(f"case '{c.id}'", e) for c, e in zip(cases, encoded, strict=True)]
    for keep in {k for c in cases for k in c.keep}.union(wishes.keep):
        if keep.target is not None:
            kept = lm.encode(Case("keep", keep.prompt, keep.target), wishes.stop)
            wanted.append((f"keep {_short(keep.prompt)}", kept))
    says: dict[tuple[int, ...], tuple[str, int]] = {}
    for name, one in wanted:
        ids = one.ids
        for position in one.positions:
            prefix, token = tuple(ids[: position + 1]), ids[position + 1]
            other, theirs = says.setdefault(prefix, (name, token))
            if theirs != token:
                raise CaseError(
                    f"{other} and {name} contradict each other: behind {_short(lm.decode(prefix)[-60:])} one wants"
                    f" {_short(lm.decode([theirs]))}, the other {_short(lm.decode([token]))}; drop one of them"
                )


def measured_sequences(lm: LM, wishes: Wishes = Wishes()) -> list[specificity.Measured]:
    """What side effects are measured on: the lines that ship, and the user's own reference text."""
    text = (resources.files("mint") / "data" / SPECIFICITY).read_text(encoding="utf-8")
    found = []
    for number, row in enumerate(map(json.loads, text.splitlines()), start=1):
        case = Case(f"{SPECIFICITY}:{number}", row["prompt"], row["target"])
        try:
            found.append(specificity.of_case(lm.encode(case, "none")))
        except CaseError:
            continue  # a tokenizer that cannot write a line, or a tiny context: the others do
    if wishes.settings.reference:
        own = reference_texts(wishes.settings.reference)[len(reference_texts()) :]
        found += [specificity.of_ids(ids) for ids in passages(lm, own)]
    return found


# ---------------------------------------------------------------------- the record


def _signed(
    lm: LM, patch: Patch, repairs: Sequence[Repair], wishes: Wishes, effects: Specificity | None
) -> Patch:
    """The patch with its provenance: the cases, the settings, what was measured, and where the weights live."""
    info = {
        "cases": [
            case_to_dict(r.case)
            | {"generated_before": r.generated_before, "margin_min": r.margin_min, "neurons": r.neurons}
            for r in repairs
        ],
        "solver": wishes.solver,
        "stop": wishes.stop,
        "chat": lm.template is not None,
        "settings": _jsonable(asdict(wishes.settings)),
        "measured": None if effects is None else _jsonable(effects.as_dict()),
        "versions": versions(),
    }
    return replace(patch, base=patch.base | {"layout": describe(lm)}, info=info)


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def _short(text: str, longest: int = 60) -> str:
    shown = repr(text)
    return shown if len(shown) <= longest else shown[: longest - 2] + "…" + shown[0]


# ---------------------------------------------------------------------- parts by name


def solver_named(name: str) -> Solver:
    """A solver of `mint.solver.SOLVERS`. Raises `MintError` for an unknown name, with the nearest and all known ones."""
    from mint.solver import SOLVERS

    if name not in SOLVERS:
        near = difflib.get_close_matches(name, SOLVERS, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise MintError(f"unknown solver '{name}'; known are {', '.join(SOLVERS)}{hint}")
    return SOLVERS[name]


def with_applied(wishes: Wishes, patches: Sequence[Patch]) -> Wishes:
    """The same wishes on a model that holds these patches already."""
    return replace(wishes, applied=tuple(patches))


def default_preparation(wishes: Wishes, say: Say) -> Prepare:
    """The model's statistics on reference text, measured once and cached: what solvers and attribution ask for."""

    def prepare(lm: LM) -> Any:
        return statistics(lm, wishes.settings.reference, say)

    return prepare


def default_verdict() -> Judge:
    """`mint.attribution.verdict`: were the edited neurons the cause of the fault, or do they carry the repair?"""
    from mint.attribution import verdict

    def judge(lm: LM, problem: Problem, patch: Patch) -> Any:
        try:
            return verdict(lm, problem, patch)
        except CaseError:
            return None  # no fault with the answer fed in: nothing to test

    return judge


def default_attribution(wishes: Wishes, exact: int = 32) -> Attribute:
    """A quick `mint.attribution.attribute`: against the healthy mean, the best few checked exactly."""
    from mint.attribution import attribute

    def quick(lm: LM, problem: Problem) -> Any:
        try:
            return attribute(lm, problem, exact=exact, stability=False, seed=wishes.settings.seed)
        except CaseError:
            return None  # every token is right with the answer fed in: there is no fault to explain

    return quick


# ---------------------------------------------------------------------- as a page


def report_page(lm: LM, outcome: Outcome) -> str:
    """One HTML page about a repair. Raises `MintError` for several cases: `mint evaluate` writes their page."""
    from mint.evaluation import page as report

    if len(outcome.repairs) != 1:
        raise MintError("--report shows one case; use `mint evaluate --out DIR` for the page of many")
    (one,) = outcome.repairs
    row = {
        "case": one.case.id,
        "solver": one.solution.solver if one.solution else "",
        "status": "solved" if one.success else "refused",
        "reason": one.reason or one.note,
        "prompt": one.case.prompt,
        "target": one.case.target,
        "written_before": one.generated_before,
        "written_after": one.generated_after,
        "tokens": list(one.tokens),
        "margins_before": list(one.margins_before),
        "margins_after": list(one.margins_after or one.margins_before),
        "efficacy": {"exact_match_generated": one.generated_after == one.case.target},
        "edit": {"neurons": len(one.neurons), "places": one.neurons},
        "specificity": {"other_tasks": outcome.specificity.as_dict()} if outcome.specificity else {},
    }
    shown = {"model": lm.name, "dtype": str(lm.dtype).removeprefix("torch.")}
    heatmap = None
    if one.attribution is not None:
        from mint.attribution import plots

        heatmap = plots.svg(plots.heat_map(lm, one.attribution))
    return report.repair_page(row, shown | ({"revision": lm.revision} if lm.revision else {}), heatmap)


# ---------------------------------------------------------------------- as JSON


def repair_as_dict(one: Repair) -> dict:
    """JSON values of one case's repair."""
    return {
        "id": one.case.id,
        "success": one.success,
        "generated_before": one.generated_before,
        "generated_after": one.generated_after,
        "target": one.case.target,
        "neurons": one.neurons,
        "margin_min": one.margin_min,
        "seconds": round(one.seconds, 4),
        "timing": {step: round(seconds, 4) for step, seconds in one.timing.items()},
        "reason": one.reason,
        "note": one.note,
        "attribution": one.attribution.to_json() if one.attribution else None,
        "verdict": one.verdict.to_json() if one.verdict else None,
        "details": _jsonable(one.solution.details) if one.solution else {},
        **(one.places or dict.fromkeys(("contexts", "wordings", "near_misses"))),
    }


def outcome_as_dict(outcome: Outcome, patch_path: str | None) -> dict:
    """The object that `mint repair --json` prints. With several cases the texts stand in `cases` only."""
    single = repair_as_dict(outcome.repairs[0]) if len(outcome.repairs) == 1 else {}
    margins_ = [r.margin_min for r in outcome.repairs if r.margin_min is not None]
    steps = sorted({s for r in outcome.repairs for s in r.timing})
    neurons = [n for r in outcome.repairs for n in r.neurons]
    found = [r.places for r in outcome.repairs if r.places]
    held = places.total(found) if found else dict.fromkeys(("contexts", "wordings", "near_misses"))
    return {
        "success": outcome.success,
        "generated_before": single.get("generated_before"),
        "generated_after": single.get("generated_after"),
        "target": single.get("target"),
        "neurons": neurons,
        "margin_min": min(margins_, default=None),
        "seconds": round(sum(r.seconds for r in outcome.repairs), 4),
        "timing": {s: round(sum(r.timing.get(s, 0.0) for r in outcome.repairs), 4) for s in steps},
        "specificity": outcome.specificity.as_dict() if outcome.specificity else None,
        **held,
        "patch": patch_path,
        "reason": outcome.reason,
        "note": single.get("note"),
        "cases": [repair_as_dict(r) for r in outcome.repairs],
    }
