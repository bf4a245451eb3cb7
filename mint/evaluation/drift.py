"""Drift: many repairs in a row on one model. What the earlier ones still do, what the rest of the model has become.

Knows the folder of one sequence (`steps.jsonl`, `patches/`), so that a killed run goes on; leaves the model bit for bit
as it came.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mint.case import Case
from mint.errors import MintError, PatchError
from mint.evaluation import measuring
from mint.evaluation.ledger import Ledger
from mint.evaluation.measuring import Yardstick
from mint.evaluation.progress import progress_bar
from mint.measure import efficacy, specificity
from mint.measure.specificity import Baseline
from mint.model.lm import LM, Encoded
from mint.model.stop import Stop
from mint.patch import Patch, compose, load, save
from mint.solver.problem import Change, Problem, Settings, Solver, put_in, take_out

_FORMAT = 1


@dataclass(frozen=True)
class Drift:
    """How a sequence is measured, and when it is given up."""

    repairs: int = 100
    """Most repairs in a row."""
    stops: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    """After how many repairs everything is measured; also after the last."""
    others: int = 40
    """Lines outside the sequence on which side effects are measured."""
    max_perplexity_ratio: float | None = 2.0
    """Stop rule: give up where perplexity of held-out code exceeds this multiple of the clean model's."""
    min_retained: float | None = None
    """Stop rule: give up where fewer than this share of the earlier repairs still hold."""
    max_norm_share: float | None = None
    """Stop rule, the norm budget: give up where the change exceeds this share of the edited matrices' norm."""
    max_failures: int | None = 20
    """Stop rule: give up after this many cases in a row without a repair."""
    programs: tuple[Case, ...] = ()
    """Function-level cases (HumanEval, MBPP) for pass@1 at every stop; empty: not measured, it takes long."""
    program_tests: Mapping[str, dict] = field(default_factory=dict)
    """Their tests by case id: {before, after}."""
    program_tokens: int = 256
    """Most tokens to write for one program."""


@dataclass
class UnderRepair:
    """The state of a model under repair: what was put in, in order, and which repairs succeeded."""

    lm: LM
    changes: list[Change] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)
    """Clean tensors that changes of whole matrices overwrote (copies of every step would not fit in memory)."""
    repaired: list[Case] = field(default_factory=list)
    encoded: list[Encoded] = field(default_factory=list)

    @property
    def patches(self) -> list[Patch]:
        return [c for c in self.changes if isinstance(c, Patch)]

    @property
    def used(self) -> frozenset[tuple[int, int]]:
        """Neurons that are taken."""
        return frozenset((e.layer, e.index) for p in self.patches for e in p.edits)

    def put_in(self, change: Change) -> None:
        """Apply one more change."""
        if not isinstance(change, Patch):
            if self.patches:
                raise MintError(
                    "a solver returned patches and then whole matrices; it must return one kind of change"
                )
            for name, value in change.before.items():
                self.originals.setdefault(name, value.clone())
        put_in(self.lm, change)
        self.changes.append(change if isinstance(change, Patch) else _Done())

    @torch.no_grad()
    def clear(self) -> None:
        """Take everything out again, last first; works from any state."""
        while self.changes:
            change = self.changes.pop()
            if isinstance(change, Patch) and not self.originals:
                take_out(self.lm, change)
        for name, value in self.originals.items():
            self.lm.parameter(name).copy_(value)
        self.originals.clear()

    def norm(self) -> tuple[float, float]:
        """Frobenius norm of the whole change, and its share of the norm of the matrices it touched."""
        if self.originals:
            pairs = [(o, self.lm.parameter(n).detach().cpu()) for n, o in self.originals.items()]
            names = sorted(self.originals)
        elif self.patches:
            whole = compose(self.patches)
            pairs = [(e.before[r], e.after[r]) for e in whole.edits for r in e.after]
            blocks = {e.layer: self.lm.block(e.layer).slices(e.index) for e in whole.edits}
            names = sorted({s.parameter for slices in blocks.values() for s in slices.values()})
        else:
            return 0.0, 0.0
        changed = sum((a.float() - b.float()).square().sum(dtype=torch.float64).item() for b, a in pairs)
        whole = sum(self.lm.parameter(n).detach().square().sum(dtype=torch.float64).item() for n in names)
        return changed**0.5, (changed / whole) ** 0.5


@dataclass(frozen=True)
class _Done:
    """A change of whole matrices that is in the model; its clean tensors are kept once for all."""


@dataclass(frozen=True)
class _Clean:
    """The clean model on what the sequence must not disturb."""

    others: Baseline | None
    code: Baseline
    measured_on: str
    pass_at_1: float | None
    """Of the programs, if there are any."""


def run(
    lm: LM,
    cases: Sequence[Case],
    stick: Yardstick,
    name: str,
    solver: Solver,
    settings: Settings,
    folder: Path,
    key: str,
    drift: Drift,
    progress: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict:
    """Repair `cases` one after the other on one model, and measure at every stop.

    A repair is kept only if the model then writes the target by free generation; any other change is taken out again
    and counts as failed. Returns {rows: one a stop, stopped: why it ended early or None, revert: what taking everything
    out again gave}. `folder` keeps every step; a second call with the same `key` goes on from the last one (solvers that
    change whole matrices start again, since their steps are too large to keep). The model is left as it came.
    """
    cases = list(cases)[: drift.repairs]
    key = measuring.digest([_FORMAT, key, name, [measuring.case_digest(c) for c in cases], _drift_key(drift)])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "patches").mkdir(exist_ok=True)
    ledger = Ledger(folder / "steps.jsonl")
    clean = _clean(lm, cases, stick, drift, f"{key}:programs", ledger)
    weights = measuring.weights_digest(lm)
    state = UnderRepair(lm)
    rows: list[dict] = []
    stopped, failures = None, 0
    try:
        with progress_bar(f"in a row: {name}", len(cases), progress) as step:
            for number, case in enumerate(cases, start=1):
                row = _step(
                    state, case, stick, name, solver, settings, folder, f"{key}:{number}", ledger, say
                )
                failures = 0 if row["succeeded"] else failures + 1
                stopped = _too_many(failures, number, len(cases), drift)
                if number in drift.stops or number == len(cases) or stopped:
                    rows.append(_stop(state, clean, number, f"{key}:stop:{number}", ledger, drift))
                    stopped = stopped or _given_up(rows[-1], number, len(cases), drift)
                step(case.id)
                if stopped:
                    say(f"{name}, {number} repairs in a row: {stopped}")
                    break
        revert = _revert(state, weights, settings.seed)
    finally:
        state.clear()
    return {"rows": [_public(r) for r in rows], "stopped": stopped, "revert": revert}


def _drift_key(drift: Drift) -> list:
    programs = [measuring.case_digest(c) for c in drift.programs]
    return [drift.others, programs, drift.program_tokens]


# ---------------------------------------------------------------------- one step


def _step(state, case, stick, name, solver, settings, folder, key, ledger, say) -> dict:
    """One repair: from the ledger if it was made before, else made now. The model holds it afterwards."""
    path = folder / "patches" / f"{measuring.digest(key)}.safetensors"
    known = ledger.rows.get(key)
    if known is not None and known["resumable"] and _again(state, known, path, say):
        row = known
    else:
        row, patch = _repair(state, case, stick, name, solver, settings, say)
        if patch is not None:
            save(patch, path, force=True)  # before the row: a row on disk promises its patch
        row["key"] = key
        ledger.append(row)
    if row["succeeded"]:
        state.repaired.append(case)
        state.encoded.append(stick.encoded[case.id])
    return row


def _again(state: UnderRepair, known: dict, path: Path, say: Callable) -> bool:
    """Bring a step made before back into the model; False where its patch is gone."""
    if not known["patch"]:
        return True
    try:
        state.put_in(load(path))
    except PatchError as error:
        say(f"{path.name} cannot be used ({error}); this step is made again")
        return False
    return True


def _repair(state, case, stick, name, solver, settings, say) -> tuple[dict, Patch | None]:
    lm, encoded = state.lm, stick.encoded[case.id]
    row = {
        "case": case.id,
        "solver": name,
        "succeeded": False,
        "resumable": True,
        "patch": False,
        "reason": None,
    }
    before = len(state.changes)
    change = None
    try:
        keep = tuple(k.encoded for k in efficacy.encode_keep(lm, case.keep, stick.options.stop) if k.right)
        problem = Problem(case, encoded, keep, tuple(state.encoded), state.used)
        solution, wall = measuring.timed(solver, lm, problem, settings)
        change = solution.change
        row |= {"reason": solution.reason, "seconds": solution.seconds or wall}
        if change is not None:
            state.put_in(change)
            row |= {"resumable": isinstance(change, Patch), "edit": measuring.describe_change(change)}
        row["succeeded"] = lm.write(encoded, case) == case.target
        if change is not None and not row["succeeded"]:
            row["reason"] = "taken out again: the model did not write the target by free generation"
    except Exception as error:
        row |= {"succeeded": False, "reason": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        say(f"case '{case.id}', {name}: {row['reason']}")
    if not row["succeeded"] and len(state.changes) > before:
        take_out(lm, change)
        state.changes.pop()
    row["patch"] = row["succeeded"] and isinstance(change, Patch)
    return row, change if row["patch"] else None


# ---------------------------------------------------------------------- measuring


def _clean(lm: LM, cases: list[Case], stick: Yardstick, drift: Drift, key: str, ledger: Ledger) -> _Clean:
    """Lines outside the sequence: other cases of the file where there are some, else the shipped lines."""
    prompts = {p for c in cases for p in (c.prompt, *c.rephrasings)}
    targets, ids = {c.target for c in cases}, {c.id for c in cases}
    outside = [
        c for c in stick.cases if c.id not in ids and c.target not in targets and c.prompt not in prompts
    ]
    chosen = measuring.draw(outside, drift.others, stick.seed) if outside else []
    others = (
        measuring.baseline(lm, [specificity.of_case(stick.encoded[c.id]) for c in chosen])
        if chosen
        else stick.other_tasks
    )
    code = measuring.baseline(lm, [specificity.of_ids(p) for p in stick.code])
    if drift.programs and key not in ledger:
        ledger.append({"key": key, "pass_at_1": _pass_at_1(lm, drift)})
    passed = ledger.rows[key]["pass_at_1"] if drift.programs else None
    measured_on = "same_task" if chosen else "other_tasks" if others else "ordinary_code"
    return _Clean(others, code, measured_on, passed)


def _stop(state: UnderRepair, clean: _Clean, number: int, key: str, ledger: Ledger, drift: Drift) -> dict:
    """Everything after `number` repairs: from the ledger if it was measured before."""
    if key in ledger:
        return ledger.rows[key]
    lm = state.lm
    held, tokens = _retained(state)
    since = None if state.originals else measuring.first_changed_layer(lm, state.patches)
    code = specificity.compare(lm, clean.code, since=since).as_dict()
    others = specificity.compare(lm, clean.others, since=since).as_dict() if clean.others else code
    norm, share = state.norm()
    done = len(state.repaired)
    row = {
        "key": key,
        "repairs": number,
        "succeeded": done,
        "retained_exact_match": sum(held) / done if done else None,
        "retained_token_accuracy": sum(tokens) / done if done else None,
        "exact_match_all": sum(held) / number,
        "argmax_unchanged": others["argmax_unchanged"],
        "argmax_broken": others["argmax_broken"],
        "kl_mean": others["kl_mean"],
        "perplexity_ratio": code["perplexity_ratio"],
        "measured_on": clean.measured_on,
        "lost": [c.id for c, h in zip(state.repaired, held, strict=True) if not h],
        "others": others,
        "ordinary_code": code,
        "neurons": len(state.used) if not state.originals else None,
        "norm": norm,
        "norm_share": share,
    }
    if drift.programs:
        row |= {"pass_at_1": _pass_at_1(lm, drift), "pass_at_1_before": clean.pass_at_1}
    ledger.append(row)
    return row


def _retained(state: UnderRepair, batch: int = 16) -> tuple[list[bool], list[float]]:
    """Per successful repair: whether the model still writes its target by free generation, and token accuracy forced."""
    order = sorted(range(len(state.repaired)), key=lambda i: (len(state.encoded[i].ids), i))
    held = [False] * len(order)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        written = state.lm.write_all([state.encoded[i] for i in part], [state.repaired[i] for i in part])
        for i, text in zip(part, written, strict=True):
            held[i] = text == state.repaired[i].target
    tokens = [f.token_accuracy for f in efficacy.forced(state.lm, state.encoded)] if order else []
    return held, tokens


def _pass_at_1(lm: LM, drift: Drift) -> float:
    return pass_at_1(lm, drift.programs, drift.program_tests, drift.program_tokens)


def pass_at_1(
    lm: LM, cases: Sequence[Case], tests: Mapping[str, dict], max_new_tokens: int = 256, batch: int = 8
) -> float:
    """Share of function-level cases whose greedily written function passes its tests (Chen et al. 2021, section 2.1).

    The text is cut where the function's block ends. Raises `MintError` where a case has no tests.
    """
    from mint.measure import judges

    missing = next((c.id for c in cases if c.id not in tests), None)
    if missing is not None:
        raise MintError(
            f"case '{missing}' has no tests; give the .tests.jsonl file that was written with the cases"
        )
    passed = 0
    order = sorted(cases, key=lambda c: len(c.prompt))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        prompts = [lm.encode_prompt(c.prompt) for c in part]
        room = min(max_new_tokens, lm.context - max(map(len, prompts)))
        block = Stop("block")
        for case, prompt, ids in zip(
            part, prompts, lm.generate(prompts, room, [block] * len(part)), strict=True
        ):
            ended = bool(ids) and ids[-1] in lm.stop_ids()
            text, _ = block.cut(lm.continuation(prompt, ids[:-1] if ended else ids), ended)
            passed += judges.judge("python_tests", text, **tests[case.id]).ok
    return passed / len(cases)


# ---------------------------------------------------------------------- giving up, going back


def _too_many(failures: int, number: int, total: int, drift: Drift) -> str | None:
    if drift.max_failures is not None and failures >= drift.max_failures and number < total:
        return f"{failures} cases in a row without a repair (max_failures {drift.max_failures})"
    return None


def _given_up(row: dict, number: int, total: int, drift: Drift) -> str | None:
    if number >= total:
        return None
    for value, limit, worse, what in (
        (
            row["perplexity_ratio"],
            drift.max_perplexity_ratio,
            1,
            "perplexity of held-out code rose to {:.3g} x",
        ),
        (
            row["retained_exact_match"],
            drift.min_retained,
            -1,
            "only {:.3g} of the earlier repairs still hold",
        ),
        (
            row["norm_share"],
            drift.max_norm_share,
            1,
            "the change reached {:.3g} of the edited matrices' norm",
        ),
    ):
        if value is not None and limit is not None and worse * (value - limit) > 0:
            return what.format(value) + f" (limit {limit:g})"
    return None


def _revert(state: UnderRepair, weights: str, seed: int) -> dict:
    """Take everything out, last first, then again in a shuffled order and as one composed patch; compare all bits.

    The shuffled order is tried where no two patches share a neuron (None where they do): only then does it exist. A
    solver that changes whole matrices has no patches to take out: its tensors are put back.
    """
    lm, patches = state.lm, state.patches
    whole_matrices = bool(state.originals)
    state.clear()
    found: dict = {
        "reverse_order": measuring.weights_digest(lm) == weights,
        "any_order": None,
        "composed": None,
    }
    if whole_matrices or not patches:
        return found
    places = [(e.layer, e.index) for p in patches for e in p.edits]
    if len(set(places)) == len(places):
        shuffled = random.Random(seed).sample(patches, len(patches))
        found["any_order"] = _there_and_back(lm, patches, shuffled, weights)
    found["composed"] = _there_and_back(lm, patches, [compose(patches)], weights)
    return found


def _there_and_back(lm: LM, forth: Sequence[Patch], back: Sequence[Patch], weights: str) -> bool:
    """Whether putting `forth` in and taking `back` out gives the clean bits; if not, the clean bits are put back."""
    state = UnderRepair(lm)
    try:
        for patch in forth:
            state.put_in(patch)
        for patch in back:
            take_out(lm, patch)
    except PatchError:
        pass
    same = measuring.weights_digest(lm) == weights
    if not same:
        _force_clean(lm, forth)
    return same


@torch.no_grad()
def _force_clean(lm: LM, patches: Sequence[Patch]) -> None:
    for patch in reversed(patches):
        for edit in patch.edits:
            for role, value in lm.block(edit.layer).slices(edit.index).items():
                if role in edit.before:
                    lm.parameter(value.parameter).select(value.axis, value.index).copy_(edit.before[role])


def _public(row: dict) -> dict:
    return {k: v for k, v in row.items() if k != "key"}
