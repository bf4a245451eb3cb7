"""`mint doctor`, `mint merge`: what mint sees in a model, and an adapter made part of one."""

from pathlib import Path
from typing import Annotated

import typer

from mint import console
from mint.cli import options as o
from mint.errors import MintError


def doctor(
    model: o.Model,
    adapter: o.Adapter = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    as_json: o.Json = False,
) -> int:
    """Look at a model as a repair would: what is read, what is not, and what a repair will need.

    Exit code 1, and one line that says why, where mint cannot repair the model.

    \b
    Examples:
      mint doctor -m ./my-model
      mint doctor -m model-00001-of-00002.gguf --json
    """
    with console.working() as say:
        lm, _ = o.load(model, device, dtype, revision, say=say, adapter=adapter)
        from mint.model.probe import probe

        say("looking")
        found = probe(lm)
    if as_json:
        console.print_json(found)
        return 0
    for key, value in _lines(found):
        console.print_result(f"{key:<12} {value}\n")
    return 0


def _lines(found: dict) -> list[tuple[str, str]]:
    """The facts as (name, text), in the order in which people ask."""
    tensors, dtype, tokenizer = found["tensors"], found["dtype"], found["tokenizer"]
    blocks, needs = found["blocks"], found["needs"]
    saved = ", ".join(f"{n} {kind}" for kind, n in dtype["saved"].items()) or "not safetensors"
    unread = tensors["not_read"]
    lines = [
        ("model", f"{found['model']}: {found['class']}, family {found['family']}, {found['parameters']:,} weights"),
        (
            "tensors",
            (f"{tensors['read']} of {tensors['saved']} saved ones read" if tensors["saved"] else "all read")
            + (f"; not read: {unread[0]}" + (f" and {len(unread) - 1} more" if unread[1:] else "") if unread else ""),
        ),
        ("files", ", ".join(tensors["files"]) or "from the hub's cache"),
        ("dtype", f"saved {saved}; in memory {dtype['memory']}"),
        (
            "tokenizer",
            f"{tokenizer['class']} ({tokenizer['kind']}), {tokenizer['tokens']:,} tokens, reads its text back"
            + (f"; puts {tokenizer['adds_in_front']!r} in front" if tokenizer["adds_in_front"] else ""),
        ),
        ("ends at", ", ".join(repr(e["text"]) for e in found["end_tokens"]) or "no end-of-sequence token"),
        ("context", f"{found['context']} tokens" if found["context"] else "not limited"),
        ("chat", {None: "no template", "works": "its template works (--chat)"}.get(found["chat_template"], found["chat_template"])),
        (
            "blocks",
            f"{len(blocks['repairable'])} of {blocks['layers']} layers repairable, {blocks['neurons']:,} neurons"
            f" ({blocks['activation']}{', gated' if blocks['gated'] else ''}), width {blocks['width']}",
        ),
        ("embedding", "tied to the unembedding" if found["tied"] else "not tied"),
        (
            "a repair",
            f"about {needs['memory_bytes'] / 1e9:.1f} GB; about {needs['seconds_reference_once']:.0f} s once for the"
            f" model, then about {needs['seconds_repair']:.0f} s each",
        ),
    ]  # fmt: skip
    if tensors["files_not_read"]:
        lines.append(("not read", ", ".join(tensors["files_not_read"])))
    if tokenizer["tokens_without_a_row"]:
        lines.append(("no row for", ", ".join(map(repr, tokenizer["tokens_without_a_row"]))))
    lines += [("fails at", text) for text in tokenizer["boundaries_that_fail"]]
    return [(key, console.visible(str(value))) for key, value in lines]


def merge(
    model: o.Model,
    adapter: Annotated[str, typer.Option(help="PEFT adapter, a directory or hub id.")],
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist.")],
    revision: o.Revision = None,
) -> int:
    """Merge a PEFT adapter into its model and save the result, which mint then repairs like any model.

    \b
    Examples:
      mint merge -m ./base --adapter ./adapter --out ./merged
    """
    if out.exists():
        raise MintError(f"{out} exists; give another name")
    if not out.parent.is_dir():
        raise MintError(f"cannot write {out}: {out.parent} is no directory; make it first")
    with console.working() as say:
        say("importing")
        from mint.model.loading import save_merged

        save_merged(model, adapter, out, revision, say)
    console.print_result(f"{out}\n")
    return 0


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(doctor)
    app.command()(merge)
