"""`mint evaluate`: solvers on many cases, measured; resumable."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mint import console
from mint.cli import options as o
from mint.errors import MintError


def evaluate(
    model: o.Model,
    cases: Annotated[Path, typer.Option(help="JSON Lines file of cases.")],
    out: Annotated[
        Path, typer.Option(help="Folder for results.jsonl, summary.json, summary.md, report.html.")
    ],
    solver: Annotated[
        list[str] | None, typer.Option(help="Solver to evaluate, default contexts; may be repeated.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Repair only so many cases, drawn with the seed.")
    ] = None,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential", help="Also repair the cases in a row on one model, and measure the drift."
        ),
    ] = False,
    repairs: Annotated[int, typer.Option(min=1, help="Most repairs in a row for --sequential.")] = 100,
    others: Annotated[
        Path | None,
        typer.Option(help="Cases of other tasks to measure side effects on; default the lines that ship."),
    ] = None,
    heldout: Annotated[
        list[Path] | None,
        typer.Option(help="Text files of ordinary code, default what ships; may be repeated."),
    ] = None,
    tests: Annotated[
        Path | None,
        typer.Option(
            help="JSON Lines {id, before, after}: tests for cases judged by running; default F.tests.jsonl beside F.jsonl."
        ),
    ] = None,
    programs: Annotated[
        Path | None,
        typer.Option(
            help="With --sequential: cases of HumanEval or MBPP, their tests beside them; pass@1 at every stop."
        ),
    ] = None,
    program_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write for one program.")] = 256,
    neighbours: Annotated[
        int, typer.Option(min=0, help="Other cases to measure each repair's side effects on.")
    ] = 24,
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Cases with more tokens are skipped, and counted.")
    ] = 1024,
    max_target_tokens: Annotated[int, typer.Option(min=1, help="The same for the target alone.")] = 256,
    judge: Annotated[
        bool,
        typer.Option(
            "--judges/--no-judges",
            help="Also ask the code judges of the cases' tasks (parse, assemble, run).",
        ),
    ] = True,
    contexts: Annotated[
        bool,
        typer.Option(
            "--contexts/--no-contexts", help="Also generate in other contexts, in other words and next door."
        ),
    ] = True,
    max_neurons: Annotated[int, typer.Option(min=1, max=2, help="Most neurons that may change.")] = 2,
    margin: Annotated[
        float | None, typer.Option(min=0, help="Logit margin; default the solver's own.")
    ] = None,
    generalize: Annotated[float, typer.Option(min=0, max=1, help="See `mint repair`.")] = 0.5,
    where: Annotated[str, typer.Option(help="auto, responsible or idle.")] = "auto",
    learn_rephrasings: Annotated[
        bool,
        typer.Option(
            "--learn-rephrasings", help="Learn from the rephrasings instead of only measuring on them."
        ),
    ] = False,
    reference: Annotated[
        list[Path] | None, typer.Option(help="Text of your own that must stay; may be repeated.")
    ] = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Run cases again that ended in an error.")
    ] = False,
    patches: Annotated[
        bool, typer.Option("--patches/--no-patches", help="Keep the patch of every repair.")
    ] = True,
    stop: o.Stop = "auto",
    chat: o.Chat = False,
    system: o.System = None,
    protect: Annotated[
        bool,
        typer.Option(
            "--protect/--no-protect",
            help="With --sequential: refuse a repair that breaks an earlier one, as `mint repair` does; or keep it, as the"
            " editing literature measures it.",
        ),
    ] = True,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    as_json: o.Json = False,
) -> int:
    """Measure solvers on many cases: efficacy, generalization, specificity, drift. Continues where it stopped.

    \b
    Examples:
      mint evaluate -m smollm2-135m --cases conala.jsonl --limit 20 --out results/conala
      mint evaluate -m smollm2-135m --cases conala.jsonl --solver mint --solver lora --sequential --out results/both
      accelerate launch --multi_gpu --num_processes 2 -m mint evaluate -m ./my-model --cases cases.jsonl --out results/many --device cuda
    """
    o.check_stop(stop)
    if programs is not None and not sequential:
        raise typer.BadParameter("--programs needs --sequential; pass@1 is measured after repairs in a row")
    if where not in ("auto", "responsible", "idle"):
        raise typer.BadParameter(f"unknown --where '{where}'; known are auto, responsible, idle")
    with console.working(show=False) as say:
        from mint.case import load_cases
        from mint.evaluation import measuring, parallel, run
        from mint.evaluation.drift import Drift
        from mint.evaluation.plan import Request, named_solvers
        from mint.measure import judges
        from mint.solver.problem import Settings

        run.check_libraries()
        wanted, skipped = measuring.read_cases(cases)
        skipped = [*skipped, *measuring.read_skipped(cases.with_name(f"{cases.stem}.skipped.jsonl"))]
        solvers = solver or Request().solvers
        named_solvers(solvers)
        other_cases = None if others is None else load_cases(others)
        code = None if not heldout else [_text(p) for p in heldout]
        known_tests = judges.load_tests_beside(cases) if tests is None else judges.load_tests(tests)
        if judge:
            _check_judges(wanted, known_tests)
        drift = Drift(repairs=repairs, protect=protect)
        if programs is not None:
            drift = _with_programs(drift, programs, program_tokens)
        team = parallel.team()
        if not team.main:
            console.note(f"process {team.index + 1} of {team.size}")
        request = Request(
            solvers=solvers,
            settings=Settings(
                max_neurons=max_neurons,
                margin=margin,
                generalize=generalize,
                where=where,
                learn_rephrasings=learn_rephrasings,
                reference=tuple(map(str, reference or [])),
            ),
            options=measuring.Options(
                stop=stop,
                neighbours=neighbours,
                max_tokens=max_tokens,
                max_target_tokens=max_target_tokens,
                judges=judge,
                contexts=contexts,
            ),
            drift=drift if sequential else None,
            seed=seed,
            limit=limit,
            others=other_cases,
            heldout=code,
            tests=known_tests,
            skipped=skipped,
            save_patches=patches,
            retry_errors=retry_errors,
        )
        lm, _ = o.load(model, team.device(device), dtype, revision, chat, system, say=say)
        bar, told = team.main and console.stderr().is_terminal, team.main and not as_json
        result = run.evaluate(lm, wanted, out, request, progress=bar, say=console.note if told else say)
    if not team.main:
        return 0
    if as_json:
        console.print_json(result)
    else:
        console.print_result((out / "summary.md").read_text(encoding="utf-8"))
    errors = result["errors"]
    if errors and all(s["errors"] == s["cases"] for s in result["solvers"].values()):
        raise MintError(
            f"every row ended in an error (first: {errors[0]['error']}); mend it and add --retry-errors, see"
            f" {out / 'results.jsonl'}"
        )
    return 0


def _check_judges(cases, tests) -> None:
    """What the judges of these cases need is there, before anything is repaired. Raises `MintError`."""
    from mint.measure import efficacy, judges

    for name in sorted({n for c in cases if (n := efficacy.judge_of(c, tests)) is not None}):
        try:
            judges.check_tool(name)
        except MintError as error:
            raise MintError(f"{error}, or leave the judges out with --no-judges") from None


def _with_programs(drift, path: Path, tokens: int):
    """The settings of a sequence with the programs of a file; each needs its tests."""
    from mint.case import load_cases
    from mint.measure import judges

    programs, tests = tuple(load_cases(path)), judges.load_tests_beside(path) or {}
    missing = next((c.id for c in programs if c.id not in tests), None)
    if missing is not None:
        raise MintError(
            f"{path}: case '{missing}' has no tests in {path.stem}.tests.jsonl beside it; `python -m tasks humaneval"
            " --out` writes both"
        )
    return replace(drift, programs=programs, program_tests=tests, program_tokens=tokens)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MintError(f"{path}: cannot be read as text ({error}); give a UTF-8 text file") from None


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command()(evaluate)
