"""`python -m tasks NAME --data DIR --split test --out cases.jsonl`: write a data set as a file of cases."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from mint.case import dump_cases
from mint.errors import MintError
from tasks import TASKS
from tasks.common import MAX_REPHRASINGS, MAX_TARGET_CHARS, Loaded
from tasks.shellcode_ia32 import SEVERAL


def _source(data: Path | None, hub: str | None, sample: bool) -> str:
    chosen = [name for name, given in (("data", data), ("hub", hub), ("sample", sample)) if given]
    if len(chosen) != 1:
        raise click.UsageError("give exactly one of --data DIR, --hub ID, --sample")
    return chosen[0]


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(
            f"{path}: cannot be written ({error.strerror}); choose another --out"
        ) from None


def _report(loaded: Loaded, found: int, show_skipped: bool) -> None:
    click.echo(f"{len(loaded.cases)} cases of {found}, {len(loaded.skipped)} rows skipped", err=True)
    if show_skipped:
        for skipped in loaded.skipped:
            click.echo(str(skipped), err=True)
    elif loaded.skipped:
        click.echo(f"first skipped: {loaded.skipped[0]} (all with --show-skipped)", err=True)


@click.command(context_settings={"show_default": True})
@click.argument("name", type=click.Choice(list(TASKS)))
@click.option("--data", type=click.Path(path_type=Path), help="Folder that holds NAME/SPLIT.jsonl.")
@click.option("--hub", help="Data set on the hub, or 'default' for the task's own.")
@click.option("--sample", is_flag=True, help="The sample shipped with the task.")
@click.option("--split", default="test", help="Split to read.")
@click.option("--pool", multiple=True, help="Another split whose rows lend rephrasings (only with --data).")
@click.option("--limit", type=click.IntRange(min=1), help="Draw at most this many cases.")
@click.option("--seed", default=0, help="Seed of the draw.")
@click.option(
    "--max-target-chars", default=MAX_TARGET_CHARS, type=click.IntRange(min=1), help="Skip longer targets."
)
@click.option(
    "--max-rephrasings", default=MAX_REPHRASINGS, type=click.IntRange(min=0), help="Keep at most so many."
)
@click.option("--several", is_flag=True, help="shellcode_ia32: also rows of several instructions.")
@click.option("--show-skipped", is_flag=True, help="List every skipped row on standard error.")
@click.option("--out", type=click.Path(path_type=Path), help="File to write; else standard output.")
def main(
    name: str,
    data: Path | None,
    hub: str | None,
    sample: bool,
    split: str,
    pool: tuple[str, ...],
    limit: int | None,
    seed: int,
    max_target_chars: int,
    max_rephrasings: int,
    several: bool,
    show_skipped: bool,
    out: Path | None,
) -> None:
    """Write the cases of task NAME.

    Beside --out F.jsonl lie F.skipped.jsonl (rows not used: where, reason) and, where the task has them, the
    tests of the code in F.tests.jsonl (id, before, after).
    """
    source = _source(data, hub, sample)
    if several and name != "shellcode_ia32":
        raise click.UsageError("--several is for shellcode_ia32")
    task = SEVERAL if several else TASKS[name]
    limits = {"max_target_chars": max_target_chars, "max_rephrasings": max_rephrasings}
    try:
        if source == "data":
            loaded = task.load(data, split, pool=pool, **limits)
        elif source == "hub":
            loaded = task.load_hub(split, None if hub == "default" else hub, **limits)
        else:
            loaded = task.load_sample(**limits)
    except MintError as error:
        raise click.ClickException(str(error)) from None
    found = len(loaded.cases)
    loaded = loaded.sample(limit, seed)
    text = dump_cases(loaded.cases)
    if out is None:
        click.echo(text, nl=False)
    else:
        _write(out, text)
        if loaded.tests:
            lines = [
                json.dumps({"id": i, **test}, ensure_ascii=False) + "\n" for i, test in loaded.tests.items()
            ]
            _write(out.with_suffix(".tests.jsonl"), "".join(lines))
        lines = [json.dumps(asdict(skipped), ensure_ascii=False) + "\n" for skipped in loaded.skipped]
        _write(out.with_suffix(".skipped.jsonl"), "".join(lines))
    _report(loaded, found, show_skipped)


if __name__ == "__main__":
    main(prog_name="python -m tasks")
