"""`mint cases`: make files of cases from what people have."""

from pathlib import Path
from typing import Annotated

import typer

from mint import console
from mint.cli import options as o

app = typer.Typer(
    help="Make files of cases.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.callback()
def _group() -> None:
    pass


@app.command("from-diff")
def from_diff(
    log: Annotated[
        Path, typer.Argument(help="JSON Lines: prompt, written, wanted (or names like them) a line.")
    ],
    out: Annotated[Path, typer.Option("--out", help="File of cases to write.")],
    minimal: Annotated[
        bool, typer.Option("--minimal", help="Move whole lines that both texts share into the prompt.")
    ] = False,
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Turn a log of failures (prompt, what was written, what should have been) into cases.

    \b
    Example:
      mint cases from-diff failures.jsonl --out cases.jsonl
    """
    from mint import fromdiff
    from mint.case import dump_cases

    o.check_free(out, force)
    found, refused = fromdiff.from_log(log, minimal=minimal)
    clashes = fromdiff.contradictions(found)
    from mint.files import write_file

    write_file(out, dump_cases(found), force=force)
    if as_json:
        console.print_json(
            {
                "out": str(out),
                "cases": len(found),
                "skipped": [{"where": r.where, "reason": r.reason} for r in refused],
                "contradictions": [[a.id, b.id] for a, b in clashes],
            }
        )
        return 0
    for line in refused:
        console.note(f"skipped {line}")
    for a, b in clashes:
        console.note(f"'{a.id}' and '{b.id}' want different texts behind the same prompt; drop one", "yellow")
    console.print_result(f"{out}: {len(found)} cases\n")
    return 0


def register(parent: typer.Typer) -> None:
    """Add this group."""
    parent.add_typer(app, name="cases")
