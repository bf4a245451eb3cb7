"""`mint rebase`: a patch for a newer version of its model."""

from pathlib import Path
from typing import Annotated

import typer

from mint import console
from mint.cli import options as o
from mint.cli.rule import rebase_rules
from mint.errors import NoRepair


def rebase(
    patch: Annotated[Path, typer.Argument(help="Patch file.")],
    model: o.Model,
    out: Annotated[Path, typer.Option("--out", help="Patch file to write.")],
    rule: Annotated[
        list[Path] | None,
        typer.Option("--rule", help="Rule file of a patch that was made from one; may be repeated."),
    ] = None,
    learn: Annotated[
        int | None,
        typer.Option(min=1, help="With --rule: faults to learn from; default as many as the patch did."),
    ] = None,
    accept: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="With --rule: least share of unseen prompts right; default the patch's own."
        ),
    ] = None,
    margin: Annotated[
        float | None, typer.Option(min=0, help="Logit margin; default the patch's own.")
    ] = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Solve a patch's cases, or its rule, again on a newer version of its model, starting from the old neurons.

    Says what moved, and which cases the newer model writes by itself. Exit 3, nothing written, if a case or rule is refused.

    \b
    Examples:
      mint rebase fix.safetensors --model ./my-model-v2 --out fix-v2.safetensors
      mint rebase clock.safetensors --rule clock.jsonl --model ./my-model-v2 --out clock-v2.safetensors
    """
    from dataclasses import replace

    o.check_free(out, force)
    if rule:
        from mint import patch as patches
        from mint.rules.rebase import wishes_of

        loaded = patches.load(patch)
        made = wishes_of(loaded)
        wishes = replace(
            made,
            learn=made.learn if learn is None else learn,
            accept=made.accept if accept is None else accept,
            margin=margin,
        )
        wanted = {"model": model, "device": device, "dtype": dtype, "revision": revision}
        return rebase_rules(loaded, rule, wishes, model=wanted, out=out, force=force, as_json=as_json)
    with console.working() as say:
        say("importing")
        from mint import patch as patches
        from mint.cli import parts
        from mint.rebase import rebase as again
        from mint.rebase import solver_of
        from mint.session import Wishes

        loaded = patches.load(patch)
        if margin is not None:
            settings = loaded.info.get("settings")
            kept = settings if isinstance(settings, dict) else {}
            loaded = replace(loaded, info=loaded.info | {"settings": kept | {"margin": margin}})
        chat = bool(loaded.info.get("chat"))
        lm, _ = o.load(model, device, dtype, revision, chat, say=say)
        done = again(lm, loaded, prepare=parts.preparation(Wishes(solver=solver_of(loaded)), say), say=say)
        written = None
        if done.outcome.success and done.outcome.patch is not None:
            written = patches.save(done.outcome.patch, out, force=force)
    if as_json:
        console.print_json(
            {
                "success": done.outcome.success,
                "patch": None if written is None else str(written),
                "cases": list(done.moved),
                "reason": done.outcome.reason,
            }
        )
    else:
        rows = [
            (
                m["id"],
                _list(m["before"]),
                _list(m["after"]) if m["needed"] else "not needed any more",
                m["cosine"],
            )
            for m in done.moved
        ]
        console.table("what moved", ["case", "neurons before", "after", "cosine of the columns"], rows)
        if written is not None:
            console.print_result(f"{written}\n")
    if not done.outcome.success:
        raise NoRepair(f"the patch cannot be carried over: {done.outcome.reason}")
    return 0


def _list(neurons: list[dict]) -> str:
    from mint.patch.provenance import named_place

    return "; ".join(map(named_place, neurons))


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(rebase)
