"""The commands, one module a group, put together."""

import typer

from mint.cli import INTERRUPTED, bank, cases, doctor, evaluate, inspect, patches, rebase, repair, rule


def _version(show: bool) -> None:
    if show:
        from mint import __version__

        print(f"mint {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="mint",
    help="Repair a mistake or a habit of a causal language model by changing one or two of its neurons.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog="Results go to stdout, progress to stderr. Exit codes: 0 done, 1 error, 2 usage, 3 no acceptable repair.",
)


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    import mint.model  # noqa: F401  # raises where transformers is too old, before that fails in its own words


for group in (repair, rule, inspect, doctor, patches, bank, rebase, evaluate, cases):
    group.register(app)


def run(argv: list[str]) -> int:
    """Run one command. Raises what goes wrong; `mint.cli.main` explains it."""
    try:
        code = typer.main.get_command(app).main(args=argv, prog_name="mint", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None  # typer turns Ctrl-C into this, or (newer ones) into exit code 130
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0
