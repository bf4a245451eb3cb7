"""Drift: many repairs in a row on one model. What the earlier ones still do, what the rest of the model has become.

Knows the folder of one sequence (`steps.jsonl`, `patches/`), so that a killed run goes on; leaves the model bit for bit
as it came.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mint import guards
from mint.case import Case
from mint.errors import MintError, PatchError
from mint.evaluation import measuring
from mint.evaluation.ledger import Ledger
from mint.evaluation.measuring import Yardstick
from mint.evaluation.progress import progress_bar
from mint.measure import efficacy, judges, specificity
from mint.measure.specificity import CleanOutputs
from mint.model.lm import LM
from mint.model.stop import Stop
from mint.patch import Patch, compose, load, save
from mint.session import Session, Wishes
from mint.solver.problem import Change, Settings, Solver, put_in, take_out
from mint.solver.stack import Stack

_FORMAT = 2


@dataclass(frozen=True)
class Drift:
    """How a sequence is measured, and when it is given up."""

    repairs: int = 100
    """Most repairs in a row."""
    marks: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    """After how many repairs everything is measured; also after the last."""
    others: int = 40
    """Lines outside the sequence on which side effects are measured."""
    max_perplexity_ratio: float | None = 2.0
    """Give up where perplexity of held-out code exceeds this multiple of the clean model's."""
    min_retained: float | None = None
    """Give up where fewer than this share of the earlier repairs still hold."""
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
    protect: bool = True
    """Whether a repair that breaks an earlier one is refused, as `mint repair` does; False: as the editing literature
    measures it."""


@dataclass(frozen=True)
class InARow:
    """One sequence: which solver, with what settings, kept where, measured how."""

    name: str
    solver: Solver
    settings: Settings
    folder: Path
    key: str
    """Digest of all that the sequence depends on besides its cases and `drift`."""
    drift: Drift


@dataclass(frozen=True)
class _CleanSequence:
    """The clean model on what the sequence must not disturb."""

    others: CleanOutputs | None
    code: CleanOutputs
    measured_on: str
    pass_at_1: float | None
    """Of the programs, if there are any."""


def run(
    lm: LM,
    cases: Sequence[Case],
    stick: Yardstick,
    row: InARow,
    progress: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict:
    """Repair `cases` one after the other on one model, and measure at every stop.

    Every repair goes through a `Session`: it is kept only if the model then writes the target by free generation, and
    (`Drift.protect`) everything kept and repaired before; any other change is taken out again and counts as failed.
    Returns {rows: one a stop, stopped: why it ended early or None, revert: what taking everything out again gave}.
    `row.folder` keeps every step; a second call with the same key goes on from the last one (solvers that change whole
    matrices start again, since their steps are too large to keep). The model is left as it came.
    """
    drift, folder = row.drift, row.folder
    cases = list(cases)[: drift.repairs]
    digests = [measuring.case_digest(c) for c in cases]
    row = replace(row, key=measuring.digest([_FORMAT, row.key, row.name, digests, _drift_key(drift)]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "patches").mkdir(exist_ok=True)
    ledger = Ledger(folder / "steps.jsonl")
    clean = _clean(lm, cases, stick, drift, f"{row.key}:programs", ledger)
    weights = measuring.weights_digest(lm)
    wishes = Wishes(
        row.settings, row.name, stick.options.stop, effects=False, any_change=True, protect=drift.protect
    )
    rows: list[dict] = []
    stopped, failures = None, 0
    with Session(lm, wishes, row.solver) as session:
        session.admit(cases, strict=False)
        with progress_bar(f"in a row: {row.name}", len(cases), progress) as step:
            for number, case in enumerate(cases, start=1):
                done = _step(session, case, row, f"{row.key}:{number}", ledger, say)
                failures = 0 if done["succeeded"] else failures + 1
                stopped = _too_many(failures, number, len(cases), drift)
                if number in drift.marks or number == len(cases) or stopped:
                    rows.append(
                        _measured_at(session, clean, number, f"{row.key}:stop:{number}", ledger, drift)
                    )
                    stopped = stopped or _given_up(rows[-1], number, len(cases), drift)
                step(case.id)
                if stopped:
                    say(f"{row.name}, {number} repairs in a row: {stopped}")
                    break
        revert = _revert(session.stack, weights, row.settings.seed)
    return {"rows": [_public(r) for r in rows], "stopped": stopped, "revert": revert}


def _drift_key(drift: Drift) -> list:
    programs = [measuring.case_digest(c) for c in drift.programs]
    return [drift.others, programs, drift.program_tokens, drift.protect]


# ---------------------------------------------------------------------- one step


def _step(session: Session, case: Case, row: InARow, key: str, ledger: Ledger, say: Callable) -> dict:
    """One repair: from the ledger if it was made before, else made now. The model holds it afterwards."""
    path = row.folder / "patches" / f"{measuring.digest(key)}.safetensors"
    known = ledger.rows.get(key)
    if known is not None and known["resumable"] and _again(session, case, known, path, say):
        return known
    done, change = _repair(session, case, row.name, say)
    if isinstance(change, Patch):
        save(change, path, force=True)  # before the row: a row on disk promises its patch
    done["key"] = key
    ledger.append(done)
    return done


def _again(session: Session, case: Case, known: dict, path: Path, say: Callable) -> bool:
    """Bring a step made before back into the model; False where its patch is gone."""
    if known["patch"]:
        try:
            session.stack.put_in(load(path))
        except PatchError as error:
            say(f"{path.name} cannot be used ({error}); this step is made again")
            return False
    if known["succeeded"]:
        session.keep([session.guard(case)])
    return True


def _repair(session: Session, case: Case, name: str, say: Callable) -> tuple[dict, Change | None]:
    row = {
        "case": case.id,
        "solver": name,
        "succeeded": False,
        "resumable": True,
        "patch": False,
        "reason": None,
    }
    change = None
    try:
        repair = session.repair(case)
    except Exception as error:
        row["reason"] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        say(f"case '{case.id}', {name}: {row['reason']}")
        return row, None
    solution = repair.solution
    row |= {"succeeded": repair.success, "reason": repair.reason or repair.note}
    if solution is not None:
        found, change = solution.change, solution.change if repair.success else None
        row |= {
            "seconds": solution.seconds or repair.timing.get("solve"),
            "resumable": found is None or isinstance(found, Patch),
            "edit": measuring.describe_change(found),
        }
    row["patch"] = isinstance(change, Patch)
    return row, change


# ---------------------------------------------------------------------- measuring


def _clean(
    lm: LM, cases: list[Case], stick: Yardstick, drift: Drift, key: str, ledger: Ledger
) -> _CleanSequence:
    """Lines outside the sequence: other cases of the file where there are some, else the shipped lines."""
    prompts = {p for c in cases for p in (c.prompt, *c.rephrasings)}
    targets, ids = {c.target for c in cases}, {c.id for c in cases}
    outside = [
        c for c in stick.cases if c.id not in ids and c.target not in targets and c.prompt not in prompts
    ]
    chosen = measuring.draw(outside, drift.others, stick.seed) if outside else []
    others = (
        measuring.clean_outputs(lm, [specificity.of_case(stick.encoded[c.id]) for c in chosen])
        if chosen
        else stick.other_tasks
    )
    code = measuring.clean_outputs(lm, [specificity.of_ids(p) for p in stick.code])
    if drift.programs and key not in ledger:
        ledger.append({"key": key, "pass_at_1": _pass_at_1(lm, drift)})
    passed = ledger.rows[key]["pass_at_1"] if drift.programs else None
    measured_on = "same_task" if chosen else "other_tasks" if others else "ordinary_code"
    return _CleanSequence(others, code, measured_on, passed)


def _measured_at(
    session: Session, clean: _CleanSequence, number: int, key: str, ledger: Ledger, drift: Drift
) -> dict:
    """Everything after `number` repairs: from the ledger if it was measured before."""
    if key in ledger:
        return ledger.rows[key]
    lm, stack, repaired = session.lm, session.stack, session.earlier
    held = guards.still_hold(lm, repaired)
    tokens = [f.token_accuracy for f in efficacy.forced(lm, [g.encoded for g in repaired])]
    since = None if stack.originals else measuring.first_changed_layer(lm, stack.patches)
    code = specificity.compare(lm, clean.code, since=since).as_dict()
    others = specificity.compare(lm, clean.others, since=since).as_dict() if clean.others else code
    norm, share = stack.norm()
    done = len(repaired)
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
        "lost": [g.name for g, h in zip(repaired, held, strict=True) if not h],
        "others": others,
        "ordinary_code": code,
        "neurons": len(stack.used) if not stack.originals else None,
        "norm": norm,
        "norm_share": share,
    }
    if drift.programs:
        row |= {"pass_at_1": _pass_at_1(lm, drift), "pass_at_1_before": clean.pass_at_1}
    ledger.append(row)
    return row


def _pass_at_1(lm: LM, drift: Drift) -> float:
    return pass_at_1(lm, drift.programs, drift.program_tests, drift.program_tokens)


def pass_at_1(
    lm: LM, cases: Sequence[Case], tests: Mapping[str, dict], max_new_tokens: int = 256, batch: int = 8
) -> float:
    """Share of function-level cases whose greedily written function passes its tests (Chen et al. 2021, section 2.1).

    The text is cut where the function's block ends. Raises `MintError` where a case has no tests.
    """
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


def _revert(stack: Stack, weights: str, seed: int) -> dict:
    """Take everything out, last first, then again in a shuffled order and as one composed patch; compare all bits.

    The shuffled order is tried where no two patches share a neuron (None where they do): only then does it exist. A
    solver that changes whole matrices has no patches to take out: its tensors are put back.
    """
    lm, patches = stack.lm, list(stack.patches)
    whole_matrices = bool(stack.originals)
    stack.clear()
    found: dict = {
        "reverse_order": measuring.weights_digest(lm) == weights,
        "any_order": None,
        "composed": None,
    }
    if whole_matrices or not patches:
        return found
    places = [e.place for p in patches for e in p.edits]
    if len(set(places)) == len(places):
        shuffled = random.Random(seed).sample(patches, len(patches))
        found["any_order"] = _there_and_back(lm, patches, shuffled, weights)
    found["composed"] = _there_and_back(lm, patches, [compose(patches)], weights)
    return found


def _there_and_back(lm: LM, forth: Sequence[Patch], back: Sequence[Patch], weights: str) -> bool:
    """Whether putting `forth` in and taking `back` out gives the clean bits; if not, the clean bits are put back."""
    try:
        for patch in forth:
            put_in(lm, patch)
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
            for role, value in lm.layout.slices(*edit.neuron).items():
                if role in edit.before:
                    value.of(lm.parameter(value.parameter)).copy_(edit.before[role])


def _public(row: dict) -> dict:
    return {k: v for k, v in row.items() if k != "key"}
