"""The one loop of the product: solve, prove, keep or refuse; in a row on one model, each protecting the ones before.

Transactional: whatever happens, the model that was handed in keeps every bit once the session is over, and a change is
kept only if the changed model really wrote what was asked for and everything guarded. What is repaired is a `Job`: a
case here, a rule in `mint.rules`. Knows nothing about files or the command line.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch

from mint import guards
from mint.case import Case, Keep, case_to_dict
from mint.console import Say, quoted
from mint.errors import CaseError, MintError
from mint.files import jsonable
from mint.guards import Guard
from mint.measure import places, specificity
from mint.measure.places import Places
from mint.measure.specificity import Specificity
from mint.model.lm import LM, Encoded
from mint.model.loading import DTYPES
from mint.model.margins import margins
from mint.model.precision import in_dtype
from mint.patch import Patch, compose, versions
from mint.patch.names import describe
from mint.reference import reference_digest
from mint.solver.problem import Change, Problem, Settings, Solution, Solver, changed
from mint.solver.stack import Stack, neurons_of

SPECIFICITY = "specificity.jsonl"
ALREADY_RIGHT = "the model already writes the target; no patch is needed"

SETTINGS_MARGINS = (5.0, 10.0, 20.0)
"""Logit margins tried one after another where a repair does not hold under the model's own generation settings: a
repetition penalty of 1.1 takes a tenth of the logit of a token that was seen before, of one that is right already, too."""

REROUTED = 0.1
"""In a mixture of experts, the largest share of tokens of other text that a repair may send to other experts in some layer:
what they write there is no longer what the model was trained to write."""

Attribute = Callable[[LM, Problem], Any]
GiveVerdict = Callable[[LM, Problem, Patch], Any]
Prepare = Callable[[LM], Any]
_ASIDE = ("attribute", "statistics", "verdict", "contexts")
"""Steps that are not the repair itself: what explains it, and what is measured once per model and then cached."""


@dataclass(frozen=True)
class Wishes:
    """What the user asks of a session, beyond what is to be repaired."""

    settings: Settings = field(default_factory=Settings)
    solver: str = "contexts"
    stop: str = "auto"
    """How a target ends; see `LM.encode`."""
    keep: tuple[Keep, ...] = ()
    """Outputs that must survive every repair."""
    verify_dtypes: tuple[str, ...] = ()
    """Names of dtypes in which the repaired model must write the target too."""
    verify_settings: bool = False
    """Whether the repaired model must write the target under its own generation settings too, greedily; where it does not,
    the case is solved again with larger margins (`SETTINGS_MARGINS`)."""
    applied: tuple[Patch, ...] = ()
    """Patches that the model holds already: the repairs in them are protected, their neurons not used again."""
    contexts: bool = False
    """Whether contexts, wordings and near misses of every repair are measured (`mint.measure.places`)."""
    effects: bool = True
    """Whether side effects are measured on the lines that ship; an evaluation measures its own."""
    any_change: bool = False
    """Whether a change may touch more neurons than allowed, or whole matrices: for measuring baselines, since no patch
    file holds those."""
    protect: bool = True
    """Whether a change that breaks a guard is refused. False measures editing as its literature does."""


@dataclass(frozen=True)
class Hooks:
    """What is called along the way; all optional."""

    attribute: Attribute | None = None
    """For every case that needs a repair, before it is solved; the result goes into `Repair.attribution`."""
    verdict: GiveVerdict | None = None
    """For every accepted patch while it is not applied; the result goes into `Repair.verdict`."""
    prepare: Prepare | None = None
    """Once, before anything is solved, for what is cached per model and not part of a repair's time."""
    say: Say = lambda _: None
    """Told what happens."""


class Refused(Exception):
    """Ends one attempt; its text is the reason, one line."""


class Bent(Refused):
    """The repair holds in plain greedy text, and not under the model's own generation settings."""


class Job(Protocol):
    """Something to repair. The model is as before whenever one of these is called, but for `prove`."""

    kind: str
    """Under which key of a patch's header `record` belongs: `cases` or `rules`."""

    def solve(self, lm: LM, protected: "Protected") -> Solution:
        """Find a change; leave the model as it is."""
        ...

    def prove(self, lm: LM) -> None:
        """Called while the change is in: raise `Refused` unless the model really writes what was asked for."""
        ...

    def explain(self, lm: LM, change: Change) -> None:
        """Called for a proven change while it is out: anything that should be known about it."""
        ...

    def guards(self) -> Sequence[Guard]:
        """What later repairs must leave alone, once this one is kept."""
        ...

    def record(self, change: Change) -> dict:
        """The entry of a patch's header about this repair, JSON values."""
        ...


@dataclass(frozen=True)
class Protected:
    """What a job must leave alone: the fields of a `Problem` of the same names."""

    keep: tuple[Encoded, ...] = ()
    earlier: tuple[Encoded, ...] = ()
    used: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Attempt:
    """What became of a job. Kept if `reason` is None."""

    solution: Solution | None
    change: Change | None
    reason: str | None
    timing: dict[str, float]
    """Seconds by step: statistics (the first attempt), solve, verify."""


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
        return _places(self.patch)

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
    lost: tuple[str, ...] = ()
    """Accepted repairs that the finished model, generating all of them once more, does not write: none, unless
    rounding in batches differs."""

    @property
    def success(self) -> bool:
        return not self.lost and all(r.success for r in self.repairs)

    @property
    def reason(self) -> str | None:
        """The first refusal."""
        failed = next((r for r in self.repairs if not r.success), None)
        if failed is not None:
            return failed.reason if len(self.repairs) == 1 else f"case '{failed.case.id}': {failed.reason}"
        return (
            f"case '{self.lost[0]}' did not hold to the end; ask for a larger --margin" if self.lost else None
        )


# ---------------------------------------------------------------------- the loop


class Session:
    """Repairs in a row on one model. A context manager: at its end everything is taken out, every bit as before.

    `admit` what is to be repaired, so that bad cases are found before anything is solved; `repair` one case after
    another, or `attempt` any other job; then `patch` and `effects` while the changes are still in.
    """

    def __init__(self, lm: LM, wishes: Wishes, solve: Solver, hooks: Hooks | None = None):
        """solve: see `mint.solver.SOLVERS`. Raises `MintError` for wishes that make no sense."""
        unknown = [d for d in wishes.verify_dtypes if d not in DTYPES]
        if unknown:
            raise MintError(f"unknown dtype '{unknown[0]}'; known are {', '.join(DTYPES)}")
        self.lm, self.wishes, self.solve, self.hooks = lm, wishes, solve, hooks or Hooks()
        self.stack = Stack(lm)
        """The changes that were kept."""
        self.kept: list[Guard] = []
        """Outputs that must stay: of the wishes, and of every case admitted."""
        self.earlier: list[Guard] = []
        """Repairs that must stay, oldest first."""
        self._records: list[tuple[str, dict]] = []
        self._admitted: dict[str, tuple[Case, Encoded]] = {}
        self._clean: specificity.CleanOutputs | None = None
        self._ready = self._prepared = False

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.clear()

    # ------------------------------------------------------------------ what must hold

    def admit(self, cases: Sequence[Case], strict: bool = True) -> None:
        """Encode cases, and take their `keep` under protection: from here on, for every repair.

        strict: raise `CaseError` where a case cannot be used, where two texts contradict each other, or where a `keep`
        target does not hold now. Otherwise contradictions are left to the solver, and such a target is not kept.
        """
        new = [
            (case, self.lm.encode(case, self.wishes.stop)) for case in cases if case.id not in self._admitted
        ]
        known = {case.id: (case, encoded) for case, encoded in [*self._admitted.values(), *new]}
        if strict:
            all_cases, encoded = zip(*known.values(), strict=True) if known else ((), ())
            check_contradictions(self.lm, all_cases, encoded, self.wishes)
        if self.wishes.verify_settings and self.lm.settings.changing and new:
            # Raises now what it would after solving.
            self.lm.generate([new[0][1].prompt], 1, own_settings=True)
        self._begin()
        keep = [k for case, _ in new for k in case.keep]
        self.kept += self._collected(keep, [case for case, _ in known.values()], strict)
        self._admitted = known

    def _begin(self) -> None:
        """Once: what the model holds already, and what the wishes keep."""
        if self._ready:
            return
        records = [c for p in self.wishes.applied for c in p.info.get("cases") or []]
        self.earlier += guards.of_records(self.lm, records, self.wishes.stop)
        self.kept += self._collected(self.wishes.keep, [], True)
        self._ready = True

    def _collected(self, keep: Sequence[Keep], cases: Sequence[Case], strict: bool) -> list[Guard]:
        # What is a case of its own is protected once it is repaired, and need not hold before.
        own = {(c.prompt, c.target) for c in cases}
        wanted = [k for k in dict.fromkeys(keep) if (k.prompt, k.target) not in own]
        found = guards.collect(self.lm, wanted, self.wishes.stop)
        for asked, guard in zip(wanted, found, strict=True):
            if strict and not guard.holds:
                raise CaseError(
                    f"keep: behind {quoted(asked.prompt)} the model writes {quoted(guards.written(self.lm, guard))},"
                    f" not {quoted(asked.target or '')}; only what holds now can be kept: make it a case of its own"
                )
        return [g for g in found if g.holds and g.encoded.target]

    @property
    def protected(self) -> Protected:
        """What the next job must leave alone."""
        return Protected(
            tuple(g.encoded for g in self.kept),
            tuple(g.encoded for g in self.earlier),
            neurons_of(self.wishes.applied) | self.stack.used,
        )

    def others(self, case: Case) -> tuple[Encoded, ...]:
        """The admitted cases that want another text than this one does."""
        return tuple(encoded for other, encoded in self._admitted.values() if other.target != case.target)

    # ------------------------------------------------------------------ one job

    def attempt(self, job: Job) -> Attempt:
        """Solve a job, prove the change by generating, and keep it; or leave the model as it was, with the reason.

        Whatever is raised leaves the model as it was before the call.
        """
        self._begin()
        timing = self._prepare()
        solution = None
        try:
            timing["solve"], solution = _timed(lambda: job.solve(self.lm, self.protected))
            change = self._acceptable(solution)
            started = time.perf_counter()
            try:
                with changed(self.lm, change):
                    job.prove(self.lm)
                    if self.wishes.protect:
                        self._check_guards()
                        self._check_routing(change)
            finally:
                timing["verify"] = time.perf_counter() - started
        except Refused as refusal:
            return Attempt(solution, None, str(refusal), timing)
        job.explain(self.lm, change)
        found, record = job.guards(), job.record(change)
        self.stack.put_in(change)
        self.keep(found, job.kind, record)
        return Attempt(solution, change, None, timing)

    def guard(self, case: Case) -> Guard:
        """The guard that an admitted case leaves once it is repaired."""
        return guards.of_repair(case, self._admitted[case.id][1])

    def keep(self, found: Iterable[Guard], kind: str | None = None, record: dict | None = None) -> None:
        """Protect a repair that the model now holds; record: its entry in the header of the patch."""
        self.earlier += found
        if kind is not None and record is not None:
            self._records.append((kind, record))

    def _prepare(self) -> dict[str, float]:
        """Before the first change: the clean model on what must not be disturbed."""
        if self._prepared:
            return {}
        self._prepared = True
        if self.wishes.effects:
            self.hooks.say("measuring the model before the repair")
            watched = measured_sequences(self.lm)
            self._clean = specificity.clean_outputs(self.lm, watched, states=specificity.late_layers(self.lm))
        prepare = self.hooks.prepare
        return {} if prepare is None else {"statistics": _timed(lambda: prepare(self.lm))[0]}

    def _acceptable(self, solution: Solution) -> Change:
        """The change of a solution, if it is one that may be kept at all."""
        change, limit = solution.change, self.wishes.settings.max_neurons
        if change is None:
            raise Refused(solution.reason or f"solver '{solution.solver}' found nothing and gave no reason")
        if self.wishes.any_change:
            return change
        if not isinstance(change, Patch):
            raise Refused(
                f"solver '{solution.solver}' changes whole matrices, which no patch file can hold; compare it with"
                " `mint evaluate`, repair with --solver mint"
            )
        if len(change.edits) > limit:
            raise Refused(
                f"solver '{solution.solver}' needs {len(change.edits)} neurons, more than the {limit} allowed;"
                " raise --max-neurons"
            )
        return change

    def _check_guards(self) -> None:
        found = [*self.kept, *self.earlier]
        for guard, holds in zip(found, guards.still_hold(self.lm, found, quick=True), strict=True):
            if not holds:
                raise Refused(
                    f"the edit breaks {guard.why}: behind {quoted(self.lm.decode(guard.encoded.prompt)[-40:])} it writes"
                    f" {quoted(guards.written(self.lm, guard))} instead of {quoted(guards.wanted(self.lm, guard))}"
                )

    def _check_routing(self, change: Change) -> None:
        """Called while the change is in; a dense model has nothing to check."""
        if self._clean is None or not self.lm.layout.experts or not isinstance(change, Patch):
            return
        changes = [*self.stack.patches, change]
        since = min(edit.layer for patch in changes for edit in patch.edits)
        share = specificity.compare(self.lm, self._clean, worst=0, since=since).routing_changed or 0.0
        if share > REROUTED:
            raise Refused(
                f"the edit sends {share:.0%} of the tokens of other text to other experts, more than {REROUTED:.0%}; lower"
                " --generalize or --margin"
            )

    # ------------------------------------------------------------------ one case

    def repair(self, case: Case) -> Repair:
        """Repair one case; what is kept is in the model until the session ends. Raises `CaseError`, see `admit`."""
        if case.id not in self._admitted:
            self.admit([case])
        encoded = self._admitted[case.id][1]
        seconds, before = _timed(lambda: self.lm.write(encoded, case))
        timing = {"generate": seconds}
        if before == case.target:
            self.keep([guards.of_repair(case, encoded)])
            return Repair(case, before, before, note=ALREADY_RIGHT, timing=timing)
        job = _CaseJob(self, case, encoded, before)
        attempt = self.attempt(job)
        for margin in SETTINGS_MARGINS:
            if job.bent and margin > (job.settings.margin or 0):
                self.hooks.say(f"{case.id}: again with a margin of {margin:g}, for the model's own settings")
                job = _CaseJob(self, case, encoded, before, replace(job.settings, margin=margin, firm=True))
                attempt = self.attempt(job)
        return job.repair(attempt, timing)

    # ------------------------------------------------------------------ what came of it

    def effects(self) -> Specificity | None:
        """Side effects of all that is in the model; None if nothing is, or they were not asked for."""
        if self._clean is None or not self.stack.patches:
            return None
        self.hooks.say("measuring what else changed")
        since = min(edit.layer for patch in self.stack.patches for edit in patch.edits)
        return specificity.compare(self.lm, self._clean, since=since)

    def lost(self) -> tuple[str, ...]:
        """Names of the repairs made so far, and of what is kept, that the model as it is now does not write."""
        found = [*self.kept, *self.earlier]
        held = guards.still_hold(self.lm, found)
        return tuple(g.name for g, h in zip(found, held, strict=True) if not h)

    def patch(self, effects: Specificity | None = None) -> Patch | None:
        """All that was kept as one patch, with its provenance: what it repairs, the settings, what was measured."""
        if not self.stack.patches:
            return None
        whole = compose(self.stack.patches) if len(self.stack.patches) > 1 else self.stack.patches[0]
        info: dict[str, Any] = {}
        for kind, record in self._records:
            info.setdefault(kind, []).append(record)
        info |= {
            "spare": [s for p in self.stack.patches for s in p.info.get("spare") or []],
            "solver": self.wishes.solver,
            "stop": self.wishes.stop,
            "chat": self.lm.template is not None,
            "system": None if self.lm.template is None else self.lm.template.system,
            "settings": _recorded(self.wishes.settings),
            "measured": None if effects is None else jsonable(effects.as_dict()),
            "reference": reference_digest(self.wishes.settings.reference),
            "versions": versions(),
        }
        return replace(whole, base=whole.base | {"layout": describe(self.lm)}, info=info)


def repair(
    lm: LM,
    cases: Sequence[Case],
    wishes: Wishes,
    solve: Solver,
    *,
    attribute: Attribute | None = None,
    verdict: GiveVerdict | None = None,
    prepare: Prepare | None = None,
    say: Say = lambda _: None,
) -> Outcome:
    """Repair the cases one after another on one model; every repair protects the ones before it.

    The model is bit-identical afterwards. solve: see `mint.solver.SOLVERS`. attribute, verdict, prepare, say: see `Hooks`.
    A case without an acceptable repair is refused in its `Repair`; `CaseError` is raised for cases that cannot be used,
    before anything is solved.
    """
    with Session(lm, wishes, solve, Hooks(attribute, verdict, prepare, say)) as session:
        session.admit(cases)
        repairs = []
        for number, case in enumerate(cases, start=1):
            say(f"repairing {case.id}" + (f" ({number} of {len(cases)})" if len(cases) > 1 else ""))
            repairs.append(session.repair(case))
        effects = session.effects()
        return Outcome(
            tuple(repairs),
            session.patch(effects),
            effects,
            session.lost() if len(session.stack.patches) > 1 else (),
        )


class _CaseJob:
    """One case as a job of its session."""

    kind = "cases"

    def __init__(
        self, session: Session, case: Case, encoded: Encoded, before: str, settings: Settings | None = None
    ):
        self.session, self.case, self.encoded, self.before = session, case, encoded, before
        self.settings = settings or session.wishes.settings
        self.bent = False
        self.problem = Problem(case, encoded)
        self.around: Places | None = None
        self.found: dict[str, Any] = {}
        self.timing: dict[str, float] = {}

    def solve(self, lm: LM, protected: Protected) -> Solution:
        self.problem = Problem(
            self.case,
            self.encoded,
            protected.keep,
            protected.earlier,
            protected.used,
            self.session.others(self.case),
        )
        with torch.no_grad():
            self.found["tokens"] = tuple(lm.decode([t]) for t in self.encoded.target)
            self.found["margins_before"] = tuple(margins(lm, self.encoded).tolist())
        hooks, wishes = self.session.hooks, self.session.wishes
        if hooks.attribute is not None:
            attribute = hooks.attribute
            hooks.say(f"{self.case.id}: looking for the neurons behind the fault")
            self.timing["attribute"], self.found["attribution"] = _timed(lambda: attribute(lm, self.problem))
        if wishes.contexts:
            hooks.say(f"{self.case.id}: writing behind near misses")
            kept = [keep.prompt for keep in wishes.keep]
            self.timing["contexts"], self.around = _timed(
                lambda: places.prepare(lm, self.case, wishes.stop, kept, wishes.settings.seed)
            )
        hooks.say(f"{self.case.id}: solving")
        self.timing["solve"], solution = _timed(lambda: self.session.solve(lm, self.problem, self.settings))
        return solution

    def prove(self, lm: LM) -> None:
        self.session.hooks.say(f"{self.case.id}: generating with the repair")
        try:
            self.found |= verify(lm, self.problem, self.session.wishes)
        except Bent:
            self.bent = True
            raise

    def explain(self, lm: LM, change: Change) -> None:
        give, around = self.session.hooks.verdict, self.around
        if around is not None:
            self.session.hooks.say(f"{self.case.id}: writing in other contexts")
            with changed(lm, change):
                seconds, self.found["places"] = _timed(lambda: places.measure(lm, around))
            self.timing["contexts"] += seconds
        if give is None or not isinstance(change, Patch):
            return
        self.session.hooks.say(f"{self.case.id}: cause or carrier")
        self.timing["verdict"], self.found["verdict"] = _timed(lambda: give(lm, self.problem, change))

    def guards(self) -> list[Guard]:
        return [guards.of_repair(self.case, self.encoded)]

    def record(self, change: Change) -> dict:
        return case_to_dict(self.case) | {
            "generated_before": self.before,
            "margin_min": self.found["margin_min"],
            "neurons": _places(change),
        }

    def repair(self, attempt: Attempt, timing: dict[str, float]) -> Repair:
        """The attempt as a `Repair`; timing: of the steps before it."""
        taken = timing | attempt.timing | self.timing
        order = ("generate", "statistics", "attribute", "solve", "verify", "contexts", "verdict")
        kept = attempt.reason is None
        return Repair(
            self.case,
            self.before,
            self.case.target if kept else self.before,
            attempt.change if isinstance(attempt.change, Patch) else None,
            attempt.reason,
            solution=attempt.solution,
            timing={step: taken[step] for step in order if step in taken},
            **self.found,
        )


def verify(lm: LM, problem: Problem, wishes: Wishes) -> dict[str, Any]:
    """Prove a repair on the model that holds it, by generating the target, in every dtype asked for
    and, if asked for, under the model's own generation settings.

    Returns {margins_after, margin_min}. Raises `Refused` with what came out instead.
    """
    written = lm.write(problem.encoded, problem.case)
    if written != problem.case.target:
        raise Refused(f"the edited model writes {quoted(written)} instead of {quoted(problem.case.target)}")
    dtypes: list[str] = [*wishes.verify_dtypes, *([lm.served] if lm.served else [])]
    for name in dict.fromkeys(dtypes):
        with in_dtype(lm, DTYPES[name]):
            other = lm.write(problem.encoded, problem.case)
        if other != problem.case.target:
            raise Refused(
                f"the repair holds in {str(lm.dtype).removeprefix('torch.')}, but in {name} the model writes"
                f" {quoted(other)}; ask for a larger --margin"
            )
    if wishes.verify_settings and lm.settings.changing:
        other = lm.write(problem.encoded, problem.case, own_settings=True)
        if other != problem.case.target:
            raise Bent(
                f"the repair holds in plain greedy text, but under the model's own generation settings"
                f" ({lm.settings.told}) it writes {quoted(other)}; ask for a larger --margin, or leave out --verify-settings"
            )
    with torch.no_grad():
        after = margins(lm, problem.encoded).tolist()
    return {"margins_after": tuple(after), "margin_min": min(after)}


# ---------------------------------------------------------------------- what is checked and measured


def check_contradictions(
    lm: LM, cases: Sequence[Case], encoded: Sequence[Encoded], wishes: Wishes | None = None
) -> None:
    """Raise `CaseError` if two cases, or a case and a kept target, want different tokens behind the same text, or if the
    present output of a case's own prompt is to be kept."""
    wishes = wishes or Wishes()
    wanted: list[tuple[str, Encoded]] = [(f"case '{c.id}'", e) for c, e in zip(cases, encoded, strict=True)]
    prompts = {c.prompt: c.id for c in cases}
    for keep in dict.fromkeys([*wishes.keep, *(k for c in cases for k in c.keep)]):
        if keep.target is not None:
            kept = lm.encode(Case("keep", keep.prompt, keep.target), wishes.stop)
            wanted.append((f"keep {quoted(keep.prompt)}", kept))
        elif keep.prompt in prompts:
            raise CaseError(
                f"keep {quoted(keep.prompt)} and case '{prompts[keep.prompt]}' contradict each other: one wants what the"
                " model writes now, the other something else; drop one of them"
            )
    says: dict[tuple[int, ...], tuple[str, int]] = {}
    for name, one in wanted:
        ids = one.ids
        for position in one.positions:
            prefix, token = tuple(ids[: position + 1]), ids[position + 1]
            other, theirs = says.setdefault(prefix, (name, token))
            if theirs != token:
                raise CaseError(
                    f"{other} and {name} contradict each other: behind {quoted(lm.decode(prefix)[-60:])} one wants"
                    f" {quoted(lm.decode([theirs]))}, the other {quoted(lm.decode([token]))}; drop one of them"
                )


def measured_sequences(lm: LM) -> list[specificity.Measured]:
    """What side effects are measured on: the lines that ship. Reference text is optimised on, so nothing is measured on it."""
    text = (resources.files("mint") / "data" / SPECIFICITY).read_text(encoding="utf-8")
    found = []
    for number, row in enumerate(map(json.loads, text.splitlines()), start=1):
        case = Case(f"{SPECIFICITY}:{number}", row["prompt"], row["target"])
        try:
            found.append(specificity.of_case(lm.encode(case, "none")))
        except CaseError:
            continue  # a tokenizer that cannot write a line, or a tiny context: the others do
    return found


# ---------------------------------------------------------------------- small


def _places(change: Change | None) -> list[dict]:
    edits = change.edits if isinstance(change, Patch) else ()
    return [e.named() for e in edits]


def _recorded(settings: Settings) -> object:
    """Settings for the header of a patch; of the user's own texts their names and digests, nothing of what they say."""
    own = [
        {"name": Path(path).name, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
        for path in settings.reference
    ]
    return jsonable(asdict(settings) | {"reference": own})


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result
