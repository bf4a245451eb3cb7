"""`mint evaluate`: every case with every solver, resumable, by one process or several; then the summary and the report.

Knows the files of an evaluation (`results.jsonl`, `summary.json`, `summary.md`, `report.html`) and their order. What a
row holds is `measuring`'s affair, what the summary says is `summary`'s.
"""

import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from mint.attribution import attribute
from mint.case import Case
from mint.errors import MintError
from mint.evaluation import controls as controls_module
from mint.evaluation import drift as drift_module
from mint.evaluation import measuring, parallel, summary
from mint.evaluation import page as report
from mint.evaluation.controls import Control
from mint.evaluation.drift import Drift, InARow
from mint.evaluation.ledger import Ledger, latest
from mint.evaluation.measuring import CleanFacts
from mint.evaluation.plan import Plan, Request, make
from mint.evaluation.progress import progress_bar
from mint.extras import need
from mint.files import jsonable, write_file
from mint.measure import sandbox
from mint.model.lm import LM
from mint.patch import Patch, identity, save, versions
from mint.pictures import svg
from mint.solver.problem import Solution, Solver


def check_libraries(page: bool = True) -> None:
    """Raise `MintError` where a library is not installed that every evaluation needs. page: whether it draws one."""
    need("an evaluation", "sacrebleu", *(["matplotlib"] if page else []))


def evaluate(
    lm: LM,
    cases: Sequence[Case],
    out: str | Path,
    request: Request | None = None,
    *,
    progress: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict:
    """Evaluate solvers on cases; returns the summary that it also writes to `out/summary.json`.

    cases: all cases of the file; neighbours are drawn from them, whatever `request.limit` says. progress: a bar on stderr.

    A second call with the same arguments continues where the first stopped, and ends with the same summary, times
    aside. The model is left bit for bit as it came. Raises `MintError` for an unknown solver, for no usable case, where
    a library is missing, and where a solver leaves the model changed.
    """
    request = request or Request()
    check_libraries(request.page)
    team = parallel.team()
    plan, dropped = make(lm, cases, out, request)
    dropped = [*request.skipped, *dropped]
    for row in dropped if team.main else []:
        say(f"skipped {row.where}: {row.reason}")
    if team.main and _runs_programs(request) and (weak := sandbox.weakness()):
        say(weak)
    own = plan.out / ("results.jsonl" if team.size == 1 else f"results.{team.index}.jsonl")
    ledger = Ledger(own, sorted(plan.out.glob("results*.jsonl")))
    if request.retry_errors:
        ledger.forget([k for k, r in ledger.rows.items() if r["status"] == "error"])
    _run_cases(lm, plan, ledger, team, progress, say)
    drifts = _run_drifts(lm, plan, request.drift, team, progress, say) if request.drift else {}
    rows = _merge(plan, ledger, team)
    result = None
    if team.main:
        result = _summary(lm, plan, rows, drifts, dropped, len(cases), request)
        pictures = _heat_maps(lm, plan.chosen[: request.heat_maps], say) if request.page else {}
        _write(plan, result, rows, pictures if request.page else None, say)
    return team.share_result(result)


def _runs_programs(request: Request) -> bool:
    return bool(request.tests or (request.drift and request.drift.programs))


# ---------------------------------------------------------------------- cases


def _run_cases(
    lm: LM, plan: Plan, ledger: Ledger, team: parallel.Team, progress: bool, say: Callable
) -> None:
    names = [*plan.solvers, *plan.controls]
    todo = [c for c in team.share(plan.chosen) if any(plan.row_key(c, n) not in ledger for n in names)]
    done = len(team.share(plan.chosen)) - len(todo)
    if done and team.main:
        say(f"{done} of {done + len(todo)} cases were measured before; going on from there")
    with progress_bar("cases", len(todo), progress and team.main) as step:
        for case in todo:
            _run_case(lm, plan, ledger, case, say)
            step(case.id)


def _run_case(lm: LM, plan: Plan, ledger: Ledger, case: Case, say: Callable) -> None:
    """All missing rows of one case. Whatever fails becomes a row; only a changed model ends the run."""
    try:
        clean = measuring.clean_facts(lm, case, plan.stick)
    except Exception as error:
        for name in [*plan.solvers, *plan.controls]:
            if plan.row_key(case, name) not in ledger:
                ledger.append(_head(plan, case, name) | _failure(error, say, case, name))
        return
    base: Patch | None = None
    for number, (name, solver) in enumerate(plan.solvers.items()):
        wanted = plan.row_key(case, name) not in ledger
        for_controls = number == 0 and any(plan.row_key(case, n) not in ledger for n in plan.controls)
        if not wanted and not for_controls:
            continue
        row, solution = _attempt(
            lm, plan, clean, name, lambda s=solver: _solve(lm, s, clean, plan), say, wanted
        )
        if wanted:
            ledger.append(row)
        if number == 0 and solution is not None and isinstance(solution.change, Patch):
            base = solution.change
    for name, control in plan.controls.items():
        if plan.row_key(case, name) in ledger:
            continue
        row, _ = _attempt(
            lm, plan, clean, name, lambda c=control: _imitate(lm, c, clean, base, plan), say, True
        )
        ledger.append(row)


def _solve(lm: LM, solver: Solver, clean: CleanFacts, plan: Plan) -> tuple[Solution, float]:
    return measuring.timed(solver, lm, measuring.problem_of(clean), plan.settings)


def _imitate(
    lm: LM, control: Control, clean: CleanFacts, base: Patch | None, plan: Plan
) -> tuple[Solution, float]:
    return measuring.timed(control, lm, measuring.problem_of(clean), base, plan.settings)


def _attempt(
    lm: LM, plan: Plan, clean: CleanFacts, name: str, make: Callable, say: Callable, measure: bool
) -> tuple[dict, Solution | None]:
    """Solve and measure one case with one solver: the row, and the solution if there is one."""
    row = _head(plan, clean.case, name)
    solution = None
    try:
        solution, wall = make()
        if measure:
            row |= _measured(lm, plan, clean, name, solution, wall)
    except Exception as error:
        row |= _failure(error, say, clean.case, name)
    if measuring.weights_digest(lm) != plan.clean_weights:
        raise MintError(
            f"solver '{name}' left the model changed on case '{clean.case.id}'; nothing measured after it could be"
            " trusted, so the run ends here: leave this solver out"
        )
    return row, solution


def _measured(lm: LM, plan: Plan, clean: CleanFacts, name: str, solution: Solution, wall: float) -> dict:
    found = measuring.measure(lm, clean, solution, plan.stick)
    if plan.save_patches and isinstance(solution.change, Patch) and name in plan.solvers:
        found["edit"]["patch"] = _save_patch(plan, clean.case, name, solution.change)
    return {
        "status": "no_repair" if solution.change is None and name in plan.solvers else "measured",
        "reason": solution.reason,
        "margin_min": solution.margin_min,
        "seconds": solution.seconds or wall,
        "seconds_wall": wall,
        "details": jsonable(solution.details),
        **found,
    }


def _save_patch(plan: Plan, case: Case, name: str, patch: Patch) -> str:
    relative = Path("patches") / f"{plan.row_key(case, name)}.safetensors"
    (plan.out / "patches").mkdir(exist_ok=True)
    save(patch, plan.out / relative, force=True)
    return str(relative)


def _head(plan: Plan, case: Case, name: str) -> dict:
    return {
        "key": plan.row_key(case, name),
        "settings": plan.key,
        "case": case.id,
        "task": case.task,
        "solver": name,
        "prompt": case.prompt,
        "target": case.target,
    }


def _failure(error: Exception, say: Callable, case: Case, name: str) -> dict:
    line = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    say(f"case '{case.id}', {name}: {line}")
    where = traceback.extract_tb(error.__traceback__)[-3:]
    return {
        "status": "error",
        "error": line,
        "traceback": [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in where],
        "seconds": None,
    }


# ---------------------------------------------------------------------- drift, merging, summary


def _run_drifts(
    lm: LM, plan: Plan, drift: Drift, team: parallel.Team, progress: bool, say: Callable
) -> dict[str, dict]:
    """Drift of every solver; a sequence is one process's work, so processes share the solvers."""
    found = {}
    for name in team.share(list(plan.solvers)):
        row = InARow(name, plan.solvers[name], plan.settings, plan.out / "drift" / name, plan.key, drift)
        found[name] = drift_module.run(lm, plan.chosen, plan.stick, row, progress and team.main, say)
        if measuring.weights_digest(lm) != plan.clean_weights:
            raise MintError(
                f"solver '{name}' left the model changed after its repairs in a row; leave it out"
            )
    together: dict[str, dict] = {}
    for part in team.gather([found]):
        together |= part
    return {name: together[name] for name in plan.solvers}


def _merge(plan: Plan, ledger: Ledger, team: parallel.Team) -> list[dict]:
    """The rows of this evaluation, by case and solver; with several processes, gathered into `results.jsonl`."""
    wanted = {
        plan.row_key(c, n): i for i, c in enumerate(plan.chosen) for n in [*plan.solvers, *plan.controls]
    }
    rows = latest(team.gather([r for k, r in ledger.rows.items() if k in wanted]))
    ordered = [rows[k] for k in wanted if k in rows]
    if team.size > 1 and team.main:
        whole = Ledger(plan.out / "results.jsonl")
        for row in ordered:
            whole.append(row)
    return ordered


def _summary(lm, plan, rows, drifts, dropped, found, request) -> dict:
    def of(name: str) -> dict:
        return summary.solver_summary([r for r in rows if r["solver"] == name])

    solvers = {name: of(name) for name in plan.solvers}
    for name, result in drifts.items():
        solvers[name]["drift"] = result["rows"]
        solvers[name]["drift_stopped"] = result["stopped"]
        solvers[name]["drift_revert"] = result["revert"]
    controls = {name: of(name) for name in plan.controls}
    missing = [
        n
        for n in (controls_module.RANDOM_NEURON, controls_module.RANDOM_DIRECTION)
        if n not in controls and n not in solvers
    ]
    return {
        "solvers": solvers,
        "controls": controls,
        "controls_missing": missing,
        "cases": len(plan.chosen),
        "cases_found": found,
        "limit": request.limit,
        "seed": plan.settings.seed,
        "skipped": {"count": len(dropped), "rows": [asdict(s) for s in dropped]},
        "errors": [
            {"case": r["case"], "solver": r["solver"], "error": r["error"]}
            for r in rows
            if r["status"] == "error"
        ],
        "model": identity(lm),
        "settings": jsonable(asdict(plan.settings)),
        "options": asdict(plan.stick.options),
        "drift_options": jsonable(asdict(request.drift)) if request.drift else None,
        "key": plan.key,
        "versions": versions(),
    }


def _heat_maps(lm: LM, cases: Sequence[Case], say: Callable[[str], None]) -> dict[str, str]:
    """Attribution heat maps as `<svg>` text, by case id; a case that has no fault to show is left out."""
    from mint.attribution import plots  # matplotlib is an extra

    pictures = {}
    for case in cases:
        say(f"heat map of {case.id}")
        try:
            found = attribute(lm, case, exact=0, stability=False)
            pictures[case.id] = svg(plots.heat_map(lm, found))
        except MintError as error:
            say(f"no heat map of {case.id}: {error}")
    return pictures


def _write(plan: Plan, result: dict, rows: list[dict], pictures: dict | None, say: Callable) -> None:
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    write_file(plan.out / "summary.json", text + "\n", force=True)
    write_file(plan.out / "summary.md", summary.markdown(result), force=True)
    if pictures is not None:
        write_file(plan.out / "report.html", report.page(result, rows, pictures), force=True)
    say(f"wrote {plan.out / 'summary.json'}, summary.md" + ("" if pictures is None else ", report.html"))
