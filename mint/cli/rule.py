"""`mint rule`: mine a habit's call sites, check a rule on any model. And `mint repair --rule`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mint import console
from mint.cli import options as o
from mint.errors import MintError, NoRepair

if TYPE_CHECKING:
    from mint.patch import Patch
    from mint.rules.mine import Progress
    from mint.rules.repair import RulesOutcome, RuleWishes

app = typer.Typer(
    help="Habits of a model: mine prompts that show one, check whether it is gone.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)

Judges = Annotated[
    list[str] | None,
    typer.Option("--judge", help="Also count by ruff:CODE, regex:PATTERN or cmd:COMMAND; may be repeated."),
]
Accept = Annotated[
    float, typer.Option(min=0, max=1, help="Least share of unseen prompts that must come out right.")
]


@app.callback()
def _group() -> None:
    pass


@app.command()
def mine(
    model: o.Model,
    wrong: Annotated[
        str, typer.Option(help="Text to stop writing; in Python $NAME stands for any one argument.")
    ],
    right: Annotated[str, typer.Option(help="Text to write instead.")],
    folders: Annotated[list[Path], typer.Option("--from", help="Folder of source code; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", help="Rule file to write.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the rule; default made from the wrong text.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most faults; near misses twice as many.")] = 60,
    lines: Annotated[int, typer.Option(min=0, help="Lines before a site that make its prompt.")] = 12,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Glob of files or folders to leave out, e.g. tests; may be repeated."),
    ] = None,
    chat: o.Chat = False,
    system: o.System = None,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Find call sites of two texts in source code, ask the model at each, and write a rule file.

    Interrupted (Ctrl-C), the same command goes on where it stopped: what was read and asked stands in a journal beside
    --out until the file is written.

    \b
    Examples:
      mint rule mine -m smollm2-135m --wrong 'time.time()' --right 'time.perf_counter()' --from src --out clock.jsonl
      mint rule mine -m ./my-model --wrong 'open($P)' --right 'open($P, encoding="utf-8")' --from src --exclude tests --out open.jsonl
    """
    o.check_free(out, force)
    journal = out.with_name(out.name + ".journal")
    with console.working() as say:
        say("importing")
        from mint.files import write_file
        from mint.rules.mine import Search, check_search
        from mint.rules.mine import mine as search_for
        from mint.rules.rule import dump_rule

        search = Search(
            wrong, right, tuple(map(str, folders)), name, limit, lines, seed, tuple(exclude or ())
        )
        check_search(search)
        lm, _ = o.load(model, device, dtype, revision, chat, system, None, say)
    with _bars(not as_json) as progress:
        mined = search_for(lm, search, journal=journal, progress=progress)
    write_file(out, dump_rule(mined.rule), force=force)
    journal.unlink(missing_ok=True)
    result = mined.as_dict()
    if as_json:
        console.print_json(result | {"out": str(out)})
        return 0
    rows = [(key, result[key]) for key in ("files", "sites", "asked", "fault", "near", "healthy")]
    rows += [(f"skipped: {reason}", n) for reason, n in result["skipped"].items()]
    console.table(f"rule {mined.rule.name}", ["", "count"], rows, ["count"])
    if result["note"]:
        console.note(result["note"], "yellow")
    console.print_result(
        f"{out}: {result['fault']} faults ({result['learn']} to learn from, {result['unseen']} unseen),"
        f" {result['near']} near, {result['healthy']} healthy\n"
    )
    return 0


@contextmanager
def _bars(show: bool) -> Iterator["Progress"]:
    """Within: a progress bar for each part of the search, on a terminal."""
    screen = console.stderr()
    if not show or not screen.is_terminal:
        yield lambda _what, _done, _of: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as bars:
        tasks: dict = {}

        def tell(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield tell


@app.command()
def check(
    rule: Annotated[Path, typer.Argument(help="Rule file.")],
    model: o.Model,
    patch: o.Patches = None,
    accept: Accept = 0.7,
    judge: Judges = None,
    chat: o.Chat = False,
    system: o.System = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    as_json: o.Json = False,
) -> int:
    """Test a rule on any model or patch: exit code 0 if enough unseen prompts come out right, 3 if not.

    \b
    Examples:
      mint rule check clock.jsonl -m smollm2-135m --patch fix.safetensors
      mint rule check clock.jsonl -m ./upgraded-model --json
    """
    from mint.rules.judge import judge_named
    from mint.rules.rule import load_rule

    loaded = load_rule(rule)
    for name in judge or []:
        judge_named(name)
    with console.working() as say:
        from mint.patch import load as load_patch

        patches = [load_patch(path) for path in patch or []]
        lm, _ = o.load(model, device, dtype, revision, chat, system, None, say)
        from mint.rules.check import check_rule

        checked = check_rule(lm, loaded, patches, accept=accept, judges=tuple(judge or ()), say=say)
    result = checked.as_dict()
    if as_json:
        console.print_json(result)
    else:
        _show_figures(result["rule"], result)
        if result["note"]:
            console.note(result["note"], "green")
        console.print_result(f"{'holds' if result['holds'] else 'fails'}: {result['rule']}\n")
    if not result["holds"]:
        raise NoRepair(f"rule '{result['rule']}' does not hold: {result['reason']}")
    return 0


# ---------------------------------------------------------------------- mint repair --rule


@dataclass(frozen=True)
class Report:
    """The page that is asked for."""

    path: Path
    curve: bool
    """Whether it shows the learn curve."""


def repair_rules(
    files: list[Path],
    wishes: "RuleWishes",
    *,
    model: dict,
    out: Path,
    report: Report | None,
    partial: bool,
    force: bool,
    as_json: bool,
) -> int:
    """`mint repair --rule`. model: arguments of `options.load`. Writes the patch only if every rule is accepted."""
    from mint.rules.judge import judge_named
    from mint.rules.rule import load_rule

    rules = [load_rule(path) for path in files]
    for name in wishes.judges:
        judge_named(name)
    with console.working() as say:
        from mint.cli import results

        say("importing")
        from mint.rules.repair import outcome_as_dict, preparation
        from mint.rules.repair import repair_rules as repair_all

        lm, applied = o.load(**model, say=say, prepare=preparation(wishes, say))
        wishes = replace(wishes, applied=applied)
        outcome = repair_all(lm, rules, wishes, say=say)
        page = None
        if report is not None:
            from mint.rules.curve import learn_curve
            from mint.rules.report import report_page

            drawn = [r for r in outcome.repairs if report.curve and r.learnt]
            curves = {r.rule.name: learn_curve(lm, r, wishes, say) for r in drawn}
            say("writing the report")
            page = report_page(lm, outcome, curves)
        path = None if report is None else report.path
        written = results.store(outcome, out, page=page, report=path, partial=partial, force=force)
    result = outcome_as_dict(outcome, None if written is None else str(written))
    if as_json:
        console.print_json(result)
    else:
        _show(outcome, result)
    return results.conclude(outcome, written)


def rebase_rules(
    patch: "Patch",
    files: list[Path],
    wishes: "RuleWishes",
    *,
    model: dict,
    out: Path,
    force: bool,
    as_json: bool,
) -> int:
    """`mint rebase --rule`. model: arguments of `options.load`. Writes the patch only if every rule is accepted."""
    from mint.rules.rule import load_rule

    rules = [load_rule(path) for path in files]
    with console.working() as say:
        from mint.cli import results
        from mint.rules.rebase import rebase_rules as again
        from mint.rules.repair import outcome_as_dict

        lm, _ = o.load(**model, chat=bool(patch.info.get("chat")), say=say)
        done = again(lm, patch, rules, wishes, say=say)
        written = results.store(done.outcome, out, page=None, report=None, partial=False, force=force)
    result = outcome_as_dict(done.outcome, None if written is None else str(written)) | {"moved": done.moved}
    if as_json:
        console.print_json(result)
    else:
        _show(done.outcome, result)
        stayed = len(done.moved["stayed"])
        console.note(
            f"{stayed} of {len(done.moved['before'])} neurons stayed, cosines {done.moved['cosine']}"
        )
    return results.conclude(done.outcome, written)


def _show(outcome: "RulesOutcome", result: dict) -> None:
    for one, record in zip(outcome.repairs, result["rules"], strict=True):
        _show_figures(one.rule.name, record)
        if one.note:
            console.note(one.note, "green")
        if one.reason:
            console.note(f"refused: {one.reason}", "red")
    edits = [(n["layer"], n["index"], n["kind"]) for n in result["neurons"]]
    if edits:
        console.table("neurons changed", ["layer", "neuron", "edit"], edits, ["layer", "neuron"])
    effects = result["specificity"]
    if effects:
        console.note(
            f"on {effects['tokens']} tokens of other text {effects['argmax_unchanged']:.2%} of the next tokens are"
            f" unchanged, {effects['argmax_broken']:.2%} were right and are wrong now"
        )
    if result["patch"]:
        console.print_result(f"{result['patch']}\n")


def _show_figures(name: str, figures: dict) -> None:
    """The figures of one rule as a table."""
    rows = []
    for part in ("learn", "unseen"):
        one = figures[part]
        interval = one["interval"]
        between = "" if interval is None else f"{interval[0]:.0%} to {interval[1]:.0%}"
        rows.append(
            (
                part,
                one["cases"],
                one["right_before"],
                one["right_after"],
                one["avoided"],
                one["wrong"],
                between,
            )
        )
    columns = ["prompts", "cases", "right before", "right after", "neither", "wrong text", "95 % interval"]
    console.table(f"rule {name}", columns, rows, columns[1:])
    kept = [(part, figures[part]["cases"], figures[part]["kept"]) for part in ("near", "healthy")]
    console.table("what must stay", ["prompts", "cases", "kept"], kept, ["cases", "kept"])
    for judge, counts in figures["unseen"].get("judges", {}).items():
        console.note(f"{judge}: {counts['passed_before']} unseen passed before, {counts['passed_after']} now")


def check_options(files: list[Path], given: dict[str, object]) -> None:
    """Raise a usage error where options of a single repair stand beside --rule; given: option -> its value or None."""
    wrong = next((option for option, value in given.items() if value not in (None, False)), None)
    if wrong is not None:
        raise typer.BadParameter(f"{wrong} goes with --prompt or --cases, not with --rule")
    missing = next((path for path in files if not path.is_file()), None)
    if missing is not None:
        raise MintError(f"{missing}: no such file; write a rule file with `mint rule mine`")


def register(parent: typer.Typer) -> None:
    """Add this group."""
    parent.add_typer(app, name="rule")
