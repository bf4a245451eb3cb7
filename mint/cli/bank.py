"""`mint bank`: a directory of patches, each of them also a regression test."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mint import console
from mint.cli import options as o
from mint.errors import NoRepair

if TYPE_CHECKING:
    from mint.bank import Checked

group = typer.Typer(
    help="A directory of patches: add, list, apply, revert, check, log.", no_args_is_help=True
)
Bank = Annotated[Path, typer.Argument(help="Directory of the bank.")]
Names = Annotated[
    list[str] | None, typer.Option("--only", help="Name of one patch; may be repeated. Default all.")
]
OutDirectory = Annotated[Path | None, typer.Option("--out", help="Directory for the changed copy.")]
InPlace = Annotated[bool, typer.Option("--in-place", help="Change the model directory itself.")]


@group.command()
def add(
    bank: Bank,
    patch: Annotated[Path, typer.Argument(help="Patch file; it is copied.")],
    name: Annotated[str | None, typer.Option(help="Name in the bank; default the file's.")] = None,
    note: Annotated[str, typer.Option(help="Why, for people.")] = "",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Move a rewrite that took the same idle neuron as an earlier one."
        ),
    ] = None,
    as_json: o.Json = False,
) -> int:
    """Add a patch; the bank is made where there is none.

    \b
    Example:
      mint bank add ./fixes fix.safetensors --note "ticket 12"
    """
    from dataclasses import asdict

    from mint import bank as banks
    from mint.reference import idle_neurons

    with console.working() as say:
        lm = None if model is None else o.load(model, "cpu", "auto", say=say)[0]
        idle = (lambda layer: ()) if lm is None else idle_neurons(lm, say)
        entry, moves = banks.add(bank, patch, name, note, lm, idle)
    if as_json:
        console.print_json({"bank": str(bank), "moved": [asdict(m) for m in moves]} | asdict(entry))
    else:
        for move in moves:
            console.note(f"{patch}: {move.told}")
        console.print_result(f"{entry.name}\n")
    return 0


@group.command("list")
def list_(bank: Bank, as_json: o.Json = False) -> int:
    """List the patches of a bank.

    \b
    Example:
      mint bank list ./fixes
    """
    from dataclasses import asdict

    from mint import bank as banks

    found = banks.entries(bank)
    if as_json:
        console.print_json({"bank": str(bank), "patches": [asdict(e) for e in found]})
        return 0
    for e in found:
        console.print_result(f"{e.name}\t{e.sha256[:12]}\t{e.cases} cases\t{console.visible(e.note)}\n")
    return 0


def _on_disk(verb: str, bank: Path, model: str, only, out, in_place, force, as_json) -> int:
    if (out is None) != in_place:
        raise typer.BadParameter("give one of --out DIR and --in-place")
    with console.working() as say:
        say("importing")
        from mint import bank as banks
        from mint.patch import checkpoint, compose

        found = banks.patches(bank, only or ())
        whole = compose(list(found.values()))
        where = getattr(checkpoint, verb)(model, whole, out=out, force=force, say=say)
    if as_json:
        console.print_json({"model": str(where), "patches": list(found)})
    else:
        console.print_result(f"{where}\n")
    return 0


@group.command()
def apply(
    bank: Bank,
    model: o.Model,
    only: Names = None,
    out: OutDirectory = None,
    in_place: InPlace = False,
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Write all patches of a bank into a saved model, as one.

    \b
    Example:
      mint bank apply ./fixes --model ./my-model --out ./my-model-fixed
    """
    return _on_disk("apply", bank, model, only, out, in_place, force, as_json)


@group.command()
def revert(
    bank: Bank,
    model: o.Model,
    only: Names = None,
    out: OutDirectory = None,
    in_place: InPlace = False,
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Take the patches of a bank out of a saved model again, every byte as it was.

    \b
    Example:
      mint bank revert ./fixes --model ./my-model-fixed --in-place
    """
    return _on_disk("revert", bank, model, only, out, in_place, force, as_json)


@group.command()
def check(
    bank: Bank,
    model: o.Model,
    only: Names = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of who fires at whose prompts, .png or .svg.")
    ] = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Put all patches into the model in memory, and run every case of each as a regression test.

    Says how often each patch fires on its own prompts, on the others' and on ordinary code. Exit 3 if a case broke.

    \b
    Examples:
      mint bank check ./fixes --model ./my-model
      mint bank check ./fixes --model ./my-model --plot fires.svg
    """
    from mint import pictures

    if plot is not None:
        pictures.check_picture(plot, force)
    with console.working() as say:
        say("importing")
        from mint import bank as banks

        found = banks.patches(bank, only or ())
        lm, _ = o.load(model, device, dtype, say=say)
        say("generating behind every recorded prompt")
        from mint.session import measured_sequences

        # Not the reference text: solvers are silent there by construction.
        result = banks.check(lm, found, [ids for ids, _, _ in measured_sequences(lm)])
        if plot is not None:
            pictures.write_picture(_picture(result), plot, force=force)
    if as_json:
        console.print_json(
            {
                "cases": {n: [a.to_json() for a in many] for n, many in result.answers.items()},
                "fires": result.fires,
                "matrix": result.matrix,
                "broken": result.broken,
                "plot": None if plot is None else str(plot),
            }
        )
    else:
        wheres = ("own", "others", "elsewhere", "elsewhere_tokens")
        rows = []
        for name, many in result.answers.items():
            shares = result.fires[name]
            shown = [f"{shares[w]:.1%}" if w in shares else "" for w in wheres]
            rows.append((name, f"{sum(a.holds for a in many)} of {len(many)}", *shown))
        columns = ["hold", "fires: own prompts", "others' prompts", "lines of code", "tokens of code"]
        console.table("patches", ["patch", *columns], rows, columns)
    if result.broken:
        raise NoRepair(f"{len(result.broken)} cases no longer hold: {', '.join(result.broken[:5])}")
    return 0


def _picture(result: "Checked"):
    from mint.evaluation import charts

    names = list(result.matrix)
    values = [
        [*(result.matrix[a].get(b, 0.0) for b in names), result.fires[a].get("elsewhere", 0.0)] for a in names
    ]
    return charts.grid(
        values, names, [*names, "code"], "prompts of", "patch that fires", "share of the prompts"
    )


@group.command()
def log(bank: Bank, as_json: o.Json = False) -> int:
    """Show what each patch of a bank repairs.

    \b
    Example:
      mint bank log ./fixes
    """
    from mint import bank as banks
    from mint.patch.record import as_cases

    found = {n: as_cases(p) for n, p in banks.patches(bank).items()}
    if as_json:
        console.print_json({"bank": str(bank), "patches": found})
        return 0
    for name, cases in found.items():
        console.print_result(f"{name}\n")
        for c in cases:
            console.print_result(
                f"  behind {console.visible(c['prompt'])!r}: {console.visible(c['target'])!r}\n"
            )
    return 0


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(group, name="bank")
