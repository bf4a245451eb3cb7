"""`mint apply`, `revert`, `compose`, `scale`, `export`: patches on saved models, and patches from patches."""

from pathlib import Path
from typing import Annotated

import typer

from mint import console
from mint.cli import options as o
from mint.errors import MintError, NoRepair

PatchFile = Annotated[Path, typer.Argument(help="Patch file.")]
OutDirectory = Annotated[Path | None, typer.Option("--out", help="Directory for the changed copy.")]
InPlace = Annotated[bool, typer.Option("--in-place", help="Change the model directory itself.")]
OutFile = Annotated[Path, typer.Option("--out", help="Patch file to write.")]


def _on_disk(
    verb: str, patch: Path, model: str, out: Path | None, in_place: bool, force: bool, as_json: bool
) -> int:
    if (out is None) != in_place:
        raise typer.BadParameter("give one of --out DIR and --in-place")
    with console.working() as say:
        say("importing")
        from mint import patch as patches
        from mint.patch import checkpoint

        loaded = patches.load(patch)
        where = getattr(checkpoint, verb)(model, loaded, out=out, force=force, say=say)
        listed = checkpoint.applied_patches(where)
    if as_json:
        neurons = [e.named() for e in loaded.edits]
        console.print_json({"model": str(where), "patch": str(patch), "neurons": neurons, "applied": listed})
    else:
        console.print_result(f"{where}\n")
    return 0


def apply(
    patch: PatchFile,
    model: o.Model,
    out: OutDirectory = None,
    in_place: InPlace = False,
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Write a patch into a saved model. Everything is checked first; a failure changes nothing.

    \b
    Examples:
      mint apply fix.safetensors --model ./my-model --out ./my-model-fixed
      mint apply fix.safetensors --model ./my-model --in-place
    """
    return _on_disk("apply", patch, model, out, in_place, force, as_json)


def revert(
    patch: PatchFile,
    model: o.Model,
    out: OutDirectory = None,
    in_place: InPlace = False,
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Take a patch out of a saved model again: every byte is what it was.

    \b
    Examples:
      mint revert fix.safetensors --model ./my-model --in-place
      mint revert fix.safetensors --model ./my-model-fixed --out ./my-model-again
    """
    return _on_disk("revert", patch, model, out, in_place, force, as_json)


def compose(
    patch: Annotated[list[Path], typer.Argument(help="Patch files, in the order in which they apply.")],
    out: OutFile,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Move rewrites that took the same idle neuron, and prove all cases by generating.",
        ),
    ] = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Put patches together into one that does what applying them in order does.

    Patches made without knowing of each other may have taken the same idle neuron: with --model the later one moves to
    another, and every case of all patches is asked again (exit 3 if one is no longer written).

    \b
    Examples:
      mint compose first.safetensors second.safetensors --out both.safetensors
      mint compose a.safetensors b.safetensors c.safetensors --model ./my-model --out all.safetensors
    """
    from mint import patch as patches

    o.check_free(out, force)
    read = [patches.load(p) for p in patch]
    moves, answers = [], []
    with console.working() as say:
        if model is not None:
            from mint.patch import record
            from mint.patch.relocate import relocate
            from mint.reference import idle_neurons

            if clash := record.contradictions(read):
                one, other = clash[0]
                raise MintError(
                    f"cases '{one.id}' and '{other.id}' contradict each other: behind {console.visible(one.prompt)[-60:]!r} they want"
                    f" {one.target!r} and {other.target!r}; leave one of the patches out"
                )
            lm, _ = o.load(model, device, dtype, say=say)
            read, moves = relocate(lm, read, idle_neurons(lm, say))
            whole = patches.compose(read)
            say("generating behind every recorded prompt")
            with patches.applied(lm, whole):
                for one in read:
                    answers += record.ask_patch(lm, one)
        else:
            whole = patches.compose(read)
    broken = [a for a in answers if not a.holds]
    if broken:
        first = broken[0]
        raise NoRepair(
            f"together {len(broken)} of {len(answers)} repairs do not hold (first: '{first.case.id}' writes"
            f" {first.written!r} instead of {first.case.target!r}); make the later repairs with `mint repair --patch`"
        )
    where = patches.save(whole, out, force=force)
    result = {
        "moved": [
            {"patch": str(patch[m.patch]), "layer": m.layer, "index": m.index, "to": m.to}
            | ({} if m.expert is None else {"expert": m.expert})
            for m in moves
        ],
        "cases": [a.to_json() for a in answers],
    }
    for move in moves if not as_json else []:
        console.note(f"{patch[move.patch]}: {move.told}")
    return _written(whole, where, as_json, result)


def scale(
    patch: PatchFile,
    factor: Annotated[
        float | None, typer.Argument(help="0 changes nothing, 1 is the patch, 2 pushes twice as hard.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Patch file to write.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Measure the patch at scales 0 to 2, by generating its prompts."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="With --model: picture of it, .png or .svg.")] = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Weaken or strengthen a patch; or see how strong it has to be.

    With --model, a table says for scales from 0 to 2 how many of the patch's own prompts (and of its cases' rephrasings) come
    out right, generated, and how much of other text stays.

    \b
    Examples:
      mint scale fix.safetensors 0.5 --out half.safetensors
      mint scale fix.safetensors --model ./my-model --plot scale.svg
    """
    if (factor is None) != (out is None):
        raise typer.BadParameter("a factor and --out go together: the patch to write, and where")
    if plot is not None and model is None:
        raise typer.BadParameter("--plot needs --model, on which the patch is measured")
    if factor is None and model is None:
        raise typer.BadParameter("give a factor and --out, or --model to measure the patch at scales 0 to 2")
    from mint import patch as patches
    from mint import pictures

    o.check_free(out, force)
    if plot is not None:
        pictures.check_picture(plot, force)
    loaded = patches.load(patch)
    rows: list[dict] = []
    if model is not None:
        with console.working() as say:
            lm, _ = o.load(model, device, dtype, say=say)
            from mint.evaluation import strength

            found = strength.over_scale(lm, loaded, say=say)
            rows = strength.as_rows(found)
            if plot is not None:
                pictures.write_picture(strength.picture(found), plot, force=force)
        if not as_json:
            _show_scales(rows)
    more = {} if model is None else {"scales": rows, "plot": None if plot is None else str(plot)}
    if factor is None or out is None:
        if as_json:
            console.print_json(more)
        elif plot is not None:
            console.print_result(f"{plot}\n")
        return 0
    whole = patches.scale(loaded, factor)
    return _written(whole, patches.save(whole, out, force=force), as_json, more)


def _show_scales(rows: list[dict]) -> None:
    columns = ["scale", "right", "rephrasings right", "other text unchanged", "KL (nats)"]
    shown = [
        (
            f"{r['factor']:g}",
            f"{r['right']} of {r['cases']}",
            f"{r['rephrasings_right']} of {r['rephrasings']}" if r["rephrasings"] else "",
            f"{r['argmax_unchanged']:.2%}",
            f"{r['kl_mean']:.2g}",
        )
        for r in rows
    ]
    console.table("the patch over its scale", columns, shown, columns)


def _written(patch, path: Path, as_json: bool, more: dict | None = None) -> int:
    if as_json:
        neurons = [e.named() for e in patch.edits]
        console.print_json({"patch": str(path), "neurons": neurons} | (more or {}))
    else:
        console.print_result(f"{path}\n")
    return 0


def diff(
    first: Annotated[Path, typer.Argument(help="Patch file.")],
    second: Annotated[Path, typer.Argument(help="Another patch file.")],
    as_json: o.Json = False,
) -> int:
    """Compare two patches, neuron by neuron.

    \b
    Example:
      mint diff first.safetensors second.safetensors
    """
    from mint import patch as patches
    from mint.patch import compare

    rows = compare.diff(patches.load(first), patches.load(second))
    if as_json:
        console.print_json({"first": str(first), "second": str(second), "neurons": rows})
        return 0
    for row in rows:
        owner = f", expert {row['expert']}" if "expert" in row else ""
        place = f"layer {row['layer']}{owner}, neuron {row['index']}: {row['kind']}"
        if row["only"]:
            told = f"only in {first if row['only'] == 1 else second}"
        elif row["same"]:
            told = "the same in both"
        else:
            start = "" if row["same_start"] else ", from other weights"
            told = f"columns {row.get('distance', 0):.3g} apart, cosine {row.get('cosine', 0):.2f}{start}"
        console.print_result(f"{place}, {told}\n")
    return 0


def split(
    patch: PatchFile,
    out: Annotated[Path, typer.Option("--out", help="Directory for one patch a case.")],
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Take a patch of several repairs apart: one file a case.

    \b
    Example:
      mint split fixes.safetensors --out parts
    """
    from mint import patch as patches
    from mint.patch import compare

    parts = compare.split(patches.load(patch))
    if not out.is_dir():
        if not out.parent.is_dir():
            raise MintError(f"cannot write {out}: {out.parent} is no directory; make it first")
        out.mkdir()
    names = compare.names_of(parts, out)
    for name in names:
        o.check_free(name, force)
    written = [patches.save(p, n, force=force) for p, n in zip(parts, names, strict=True)]
    if as_json:
        console.print_json({"patches": [str(p) for p in written]})
    else:
        console.print_result("".join(f"{p}\n" for p in written))
    return 0


def diff_models(
    before: Annotated[str, typer.Argument(help="Directory of the model without the patch.")],
    after: Annotated[str, typer.Argument(help="Directory of the model with it.")],
    out: OutFile,
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Recover a patch from two saved models that differ in a few neurons.

    \b
    Example:
      mint diff-models ./my-model ./my-model-fixed --out fix.safetensors
    """
    o.check_free(out, force)
    with console.working() as say:
        first, _ = o.load(before, "cpu", "auto", say=say)
        second, _ = o.load(after, "cpu", "auto", say=say)
        from mint import patch as patches
        from mint.patch import compare

        found = compare.between(first, second)
    return _written(found, patches.save(found, out, force=force), as_json)


def log(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    as_json: o.Json = False,
) -> int:
    """List the patches that were written into a model directory, with their cases.

    \b
    Example:
      mint log ./my-model
    """
    from mint import journal
    from mint.patch import provenance
    from mint.patch.provenance import named_place

    if done := journal.recover(model):
        console.note(done)
    if not model.is_dir():
        raise MintError(f"{model}: no such directory; give a model directory")
    listed = provenance.applied_patches(model)
    if as_json:
        console.print_json({"model": str(model), "patches": listed})
        return 0
    for entry in listed:
        neurons = [n for n in entry.get("neurons") or [] if isinstance(n, dict)]
        places = "; ".join(map(named_place, neurons))
        console.print_result(f"{str(entry.get('sha256'))[:16]}  {entry.get('applied', '')}  {places}\n")
        for case in entry.get("cases") or []:
            if isinstance(case, dict):
                asked, wanted = (console.visible(str(case.get(k))) for k in ("prompt", "target"))
                console.print_result(f"  {case.get('id')}: behind {asked!r} it writes {wanted!r}\n")
    if not listed:
        console.note(f"{model} lists no patches")
    return 0


def export(
    patch: PatchFile,
    out: Annotated[Path, typer.Option("--out", help="Directory (peft, mlx) or file (gguf-lora) to write.")],
    to: Annotated[str, typer.Option("--format", help="peft, mlx or gguf-lora.")] = "peft",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Only for patches that do not say where their weights live, and --trigger."
        ),
    ] = None,
    trigger: Annotated[
        str | None, typer.Option(help="gguf-lora: text after which alone the adapter acts; needs --model.")
    ] = None,
    verify_gguf: Annotated[
        Path | None,
        typer.Option(
            help="gguf-lora: generate with this model file and the adapter in llama.cpp; the patch is scaled up to 2"
            " where the file needs more margin; exit 3 if a case fails even so."
        ),
    ] = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Turn a patch into a LoRA adapter for peft, mlx-lm or llama.cpp. How to serve it: docs/serving.md.

    \b
    Examples:
      mint export fix.safetensors --format peft --out fix-lora
      mint export fix.safetensors --format gguf-lora --out fix.gguf --verify-gguf model-Q4_K_M.gguf
    """
    formats = {"peft": "to_peft", "mlx": "to_mlx", "gguf-lora": "to_gguf_lora"}
    if to not in formats:
        raise typer.BadParameter(f"unknown format '{to}'; known are {', '.join(formats)}")
    if (trigger is not None or verify_gguf is not None) and to != "gguf-lora":
        raise typer.BadParameter("--trigger and --verify-gguf belong to --format gguf-lora")
    if trigger is not None and model is None:
        raise typer.BadParameter("--trigger needs --model, whose tokenizer makes its tokens")
    if verify_gguf is not None:
        from mint.patch import consumer

        consumer.check_library()
    answers, scaled = [], 1.0
    with console.working() as say:
        say("importing")
        from mint import patch as patches
        from mint.patch import export as exports
        from mint.patch import names

        loaded, more = patches.load(patch), {}
        if model is not None:
            lm = o.load(model, "cpu", "auto", say=say)[0]
            more["layout"] = names.describe(lm)
            if trigger is not None:
                more["trigger"] = lm.tokenizer(trigger, add_special_tokens=False).input_ids
        path = getattr(exports, formats[to])(loaded, out, force=force, **more)
        if verify_gguf is not None:
            from mint.patch import consumer

            say(f"generating in llama.cpp with {verify_gguf}")
            scaled, answers = consumer.fit_to_llama_cpp(
                verify_gguf, loaded, lambda one: exports.to_gguf_lora(one, out, force=True, **more)
            )
    broken = [a for a in answers if not a.holds]
    if as_json:
        result = {"out": str(path), "format": to}
        verified = {"cases": [a.to_json() for a in answers], "scale": scaled}
        console.print_json(result | (verified if verify_gguf else {}))
    else:
        if scaled != 1:
            console.note(
                f"{verify_gguf} needs a larger margin: the adapter holds the patch at scale {scaled:g}, as `mint scale"
                f" {patch} {scaled:g}` would make it"
            )
        console.print_result(f"{path}\n")
    if broken:
        raise NoRepair(
            f"the adapter was written, but with {verify_gguf} llama.cpp writes {broken[0].written!r} instead of"
            f" {broken[0].case.target!r}, even at scale 2; repair on that file (mint repair -m {verify_gguf}), or with a larger"
            " --margin"
        )
    return 0


def selftest(
    url: Annotated[
        str, typer.Option(help="Address of an OpenAI-compatible server, such as http://127.0.0.1:8000.")
    ],
    patch: Annotated[Path | None, typer.Option(help="Patch whose cases are asked.")] = None,
    cases: Annotated[Path | None, typer.Option(help="JSON Lines file of cases instead.")] = None,
    name: Annotated[
        str | None, typer.Option("--served-model", help="Model name to ask; default the server's first.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 60.0,
    as_json: o.Json = False,
) -> int:
    """Ask a running server the patch's own prompts: does it really serve the patched model? Exit 3 if not.

    A server that silently ignores an adapter answers like the model without it.

    \b
    Examples:
      mint selftest --url http://127.0.0.1:8000 --patch fix.safetensors --served-model fix
      mint selftest --url http://127.0.0.1:8080 --cases faults.jsonl
    """
    if (patch is None) == (cases is None):
        raise typer.BadParameter("give one of --patch and --cases")
    with console.working() as say:
        from mint.case import load_cases
        from mint.patch import consumer

        before: dict[str, str] = {}
        template = None
        if cases is not None:
            wanted = load_cases(cases)
        elif patch is not None:
            from mint import patch as patches
            from mint.patch.record import promised, template_of

            loaded = patches.load(patch)
            wanted, template = promised(loaded), template_of(loaded)
            before = consumer.wrote_before(loaded)
        else:
            wanted = []
        if not wanted:
            raise MintError(f"{patch} records no cases and no rules; give --cases")
        say(f"asking {url}")
        served, answers = consumer.ask_server(url, wanted, name, timeout, template)
    wrong = [a for a in answers if not a.holds]
    base = [
        a for a in wrong if before.get(a.case.id) and a.written.startswith(before[a.case.id].rstrip("\n"))
    ]
    if as_json:
        console.print_json(
            {
                "url": url,
                "served_model": served,
                "patched": not wrong,
                "like_the_base": len(base),
                "cases": [a.to_json() for a in answers],
            }
        )
    else:
        rows = [(a.case.id, a.case.target, a.written, "yes" if a.holds else "no") for a in answers]
        console.table(f"'{served}' at {url}", ["case", "should write", "writes", "right"], rows)
    if wrong:
        hint = (
            f"'{served}' answers {len(base)} of {len(answers)} prompts like the model without the patch: the adapter is not"
            " in use; see docs/serving.md"
            if base
            else f"'{served}' writes {wrong[0].written!r} instead of {wrong[0].case.target!r}"
        )
        raise NoRepair(hint)
    return 0


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(apply)
    app.command()(revert)
    app.command()(compose)
    # Factors may be negative: what starts with a dash and a digit is no option.
    app.command(context_settings={"ignore_unknown_options": True})(scale)
    app.command()(export)
    app.command()(selftest)
    app.command()(diff)
    app.command()(split)
    app.command("diff-models")(diff_models)
    app.command()(log)
