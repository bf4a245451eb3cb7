"""`mint attribute`, `mint generate`, `mint show`: look, change nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mint import console
from mint.cli import options as o
from mint.cli.repair import show_neurons


def attribute(
    model: o.Model,
    prompt: o.Prompt = None,
    target: o.Target = None,
    prompt_file: o.PromptFile = None,
    target_file: o.TargetFile = None,
    suffix: o.Suffix = None,
    reference: Annotated[
        str, typer.Option(help="What replaces an activation: mean, zero, resample or counterfactual.")
    ] = "mean",
    counterfactual: Annotated[
        str | None,
        typer.Option(help="Prompt behind which the model is right, for --reference counterfactual."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Neurons to list.")] = 20,
    method: Annotated[str, typer.Option(help="Estimate that screens the neurons.")] = "linear",
    exact: Annotated[str, typer.Option(help="How many neurons to patch exactly: a number, or all.")] = "128",
    plot: Annotated[Path | None, typer.Option(help="Picture to write, .png or .svg.")] = None,
    patch: o.Patches = None,
    stop: o.Stop = "auto",
    chat: o.Chat = False,
    system: o.System = None,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    adapter: o.Adapter = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Rank the neurons behind a fault, by patching their activations.

    \b
    Examples:
      mint attribute -m smollm2-135m -p $'# sort list l in descending order\\n' -t $'l.sort(reverse=True)\\n'
      mint attribute -m ./my-model -p ... -t ... --reference zero --top 50 --json
      mint attribute -m ./my-model -p ... -t ... --plot fault.svg
    """
    from mint.case import case_from_dict

    o.check_stop(stop)
    if exact != "all" and not exact.isdigit():
        raise typer.BadParameter(f"--exact is a number or 'all', found '{exact}'")
    texts = {"prompt": o.text(prompt, prompt_file, "prompt"), "target": o.text(target, target_file, "target")}
    case = case_from_dict({"id": "case"} | texts, "command line")
    if plot is not None:
        from mint import pictures

        pictures.check_picture(plot, force)
    with console.working() as say:
        from mint import attribution
        from mint.attribution import methods

        methods.check_method(method)
        lm, _ = o.load(model, device, dtype, revision, chat, system, patch, say, adapter=adapter)

        case = replace(case, prompt=o.filled(lm, case.prompt, suffix))

        found = attribution.attribute(
            lm,
            case,
            encoded=lm.encode(case, stop),
            reference=reference,
            method=method,
            top=top,
            exact=exact if exact == "all" else int(exact),
            counterfactual=counterfactual,
            seed=seed,
            say=say,
        )
        if plot is not None:
            from mint.attribution import plots

            plots.save(lm, found, plot, force=force)
    if as_json:
        console.print_json(found.to_json())
        return 0
    result = found.to_json()
    show_neurons(result, top)
    agreement = {k: v for k, v in result["agreement"].items() if isinstance(v, int | float)}
    console.table(
        "linear estimate against exact effect",
        ["measure", "value"],
        [(k, f"{v:.3f}") for k, v in agreement.items()],
        ["value"],
    )
    for n in result["neurons"]:
        exact_effect = "" if n["exact"] is None else f"{n['exact']:.4f}"
        console.print_result(f"{n['layer']}\t{n['index']}\t{n['linear']:.4f}\t{exact_effect}\n")
    return 0


def generate(
    model: o.Model,
    prompt: o.Prompt = None,
    prompt_file: o.PromptFile = None,
    suffix: o.Suffix = None,
    patch: o.Patches = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 64,
    stop: Annotated[
        str,
        typer.Option(
            help="eos (end of sequence), or also line (end of the line) or block (end of the indented block)."
        ),
    ] = "eos",
    chat: o.Chat = False,
    system: o.System = None,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    adapter: o.Adapter = None,
    as_json: o.Json = False,
) -> int:
    """Write what the model writes, greedily, with or without patches.

    \b
    Examples:
      mint generate -m smollm2-135m -p $'# sort list l in descending order\\n' --stop line
      mint generate -m smollm2-135m --patch fix.safetensors -p $'# sort list l in descending order\\n' --json
    """
    if stop not in ("eos", "line", "block"):
        raise typer.BadParameter(f"unknown stop rule '{stop}'; known are eos, line, block")
    asked = o.text(prompt, prompt_file, "prompt")
    with console.working() as say:
        lm, patches = o.load(model, device, dtype, revision, chat, system, patch, say, adapter=adapter)
        ids = lm.encode_prompt(o.filled(lm, asked, suffix))
        say("generating")
        room = min(max_new_tokens, lm.context - len(ids))
        from mint.model.stop import Stop

        rule = Stop(stop)
        new = lm.generate([ids], room, [rule])[0]
    ended = bool(new) and new[-1] in lm.stop_ids()
    whole = lm.continuation(ids, new[:-1] if ended else new)
    written, _ = rule.cut(whole, ended)
    if as_json:
        console.print_json(
            {
                "text": written,
                "prompt": asked,
                "tokens": len(new),
                "stopped": "eos" if ended else stop if rule.halt(whole) else "length",
                "model": lm.name,
                "patches": [str(p) for p in patch or []],
            }
        )
    else:
        console.print_result(written if written.endswith("\n") else written + "\n")
    return 0


def show(
    patch: Annotated[Path, typer.Argument(help="Patch file.")],
    as_json: o.Json = False,
) -> int:
    """Show what is inside a patch: neurons, cases, the model it was made on, what was measured.

    \b
    Examples:
      mint show fix.safetensors
      mint show fix.safetensors --json
    """
    from mint import patch as patches
    from mint.patch import checkpoint

    loaded = patches.load(patch)
    result = {
        "patch": str(patch),
        "bytes": patch.stat().st_size,
        "sha256": checkpoint.patch_id(loaded),
        "format": patches.FORMAT,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "edits": [
            {
                **e.named(),
                "norm_before": _norm(e.before),
                "norm_change": _norm({r: e.after[r].float() - e.before[r].float() for r in e.after}),
            }
            for e in loaded.edits
        ],
        "base": {k: v for k, v in loaded.base.items() if k != "layout"},
        "info": loaded.info,
    }
    if as_json:
        console.print_json(result)
        return 0
    out = console.print_result
    out(f"{patch}: {result['bytes']} bytes, {result['dtype']}, sha256 {result['sha256'][:16]}\n")
    base = loaded.base
    revision = f", revision {base['revision']}" if base.get("revision") else ""
    out(
        f"made on {console.visible(str(base.get('name')))}{revision}, fingerprint {str(base.get('fingerprint'))[:16]}\n"
    )
    for e in result["edits"]:
        out(
            f"layer {e['layer']}, neuron {e['index']}: {e['kind']}, norm {e['norm_before']:.3g},"
            f" changed by {e['norm_change']:.3g}\n"
        )
    for case in loaded.info.get("cases") or []:
        if isinstance(case, dict):
            fields = (case.get(k) for k in ("id", "prompt", "generated_before", "target"))
            name, asked, before, wanted = (console.visible(str(f)) for f in fields)
            out(f"case {name}: behind {asked!r} it wrote {before!r} and now writes {wanted!r}\n")
    for rule in loaded.info.get("rules") or []:
        if isinstance(rule, dict):
            out(_rule_line(rule))
    measured = loaded.info.get("measured")
    if isinstance(measured, dict):
        kept, kl = measured.get("argmax_unchanged"), measured.get("kl_mean")
        if isinstance(kept, float) and isinstance(kl, float):
            out(f"elsewhere: {kept:.2%} of next tokens unchanged, mean KL {kl:.2g}\n")
    return 0


def _rule_line(rule: dict) -> str:
    """What a patch's header says of a rule that it repairs, on one line."""
    name, learn, figures = (rule.get(k) for k in ("name", "learn", "figures"))
    text = f"rule {console.visible(str(name))}: learnt from {len(learn) if isinstance(learn, list) else '?'} prompts"
    unseen = figures.get("unseen") if isinstance(figures, dict) else None
    if isinstance(unseen, dict):
        text += f", {unseen.get('right_after')} of {unseen.get('cases')} unseen prompts right"
    return text + "\n"


def _norm(weights: dict) -> float:
    return sum(float(w.float().square().sum()) for w in weights.values()) ** 0.5


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(attribute)
    app.command()(generate)
    app.command()(show)
