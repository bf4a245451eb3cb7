"""`mint repair`: cases in, a patch file out, or a reason why not."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mint import console
from mint.cli import options as o
from mint.cli.rule import Accept, Judges, Report, check_options, repair_rules
from mint.errors import MintError
from mint.extras import need

EXAMPLES = """Repair a mistake or a habit of a model with a patch of one or two neurons.

Either the repaired model really writes the target and the patch is written, or the exit code is 3, a reason is
printed, and nothing changes. A prompt is taken as is; end a line of code with a newline ($'...' in bash).

\b
Examples:
  mint repair -m smollm2-135m -p $'# sort list l in descending order\\n' -t $'l.sort(reverse=True)\\n' --out fix.safetensors
  mint repair -m ./my-model --cases faults.jsonl --keep must-not-change.jsonl --out fixes.safetensors --json
  mint repair -m ./my-model --patch fix.safetensors -p ... -t ... --out second.safetensors
  mint repair -m ./coder -p $'def area(r):\\n    return ' --suffix $'\\n\\nprint(area(2))\\n' -t 'math.pi * r ** 2' --stop eos
  mint repair -m ./my-model --rule clock.jsonl --learn 8 --accept 0.7 --out clock.safetensors
"""


def repair(
    model: o.Model,
    prompt: o.Prompt = None,
    target: o.Target = None,
    prompt_file: o.PromptFile = None,
    target_file: o.TargetFile = None,
    suffix: o.Suffix = None,
    cases: Annotated[
        Path | None, typer.Option(help="JSON Lines file of cases; all go into one patch, one after another.")
    ] = None,
    rule: Annotated[
        list[Path] | None,
        typer.Option("--rule", help="Rule file (see `mint rule mine`); may be repeated, one after another."),
    ] = None,
    learn: Annotated[int, typer.Option(min=1, help="With --rule: faults to learn from.")] = 8,
    accept: Accept = 0.7,
    judge: Judges = None,
    keep: Annotated[
        Path | None, typer.Option(help="JSON Lines file of prompts whose outputs must not change.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Patch file to write; default fix.safetensors, or the next free fix-N.safetensors."
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="HTML page to write about the repair.")] = None,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve",
            help="With --rule and --report: solve again from 1, 2, 4, 8 and 16 faults; minutes more.",
        ),
    ] = False,
    solver: Annotated[
        str,
        typer.Option(
            help="contexts: the target in other files and wordings, too; mint: behind this prompt alone, fastest and felt"
            " least elsewhere; or another method, see the documentation."
        ),
    ] = "contexts",
    max_neurons: Annotated[int, typer.Option(min=1, max=2, help="Most neurons that may change.")] = 2,
    margin: Annotated[
        float | None,
        typer.Option(min=0, help="Logit margin of every target token; default the solver's own."),
    ] = None,
    generalize: Annotated[
        float, typer.Option(min=0, max=1, help="0: change least elsewhere; 1: carry over to rephrasings.")
    ] = 0.5,
    where: Annotated[str, typer.Option(help="Which neurons may change: auto, responsible or idle.")] = "auto",
    learn_rephrasings: Annotated[
        bool,
        typer.Option("--learn-rephrasings", help="Learn from the cases' rephrasings, not only measure them."),
    ] = False,
    reference: Annotated[
        list[Path] | None,
        typer.Option(help="Text file of your own that must stay as it is; may be repeated."),
    ] = None,
    verify_dtype: Annotated[
        list[str] | None, typer.Option(help="Dtype in which the repair must hold too; may be repeated.")
    ] = None,
    verify_settings: Annotated[
        bool,
        typer.Option(
            "--verify-settings",
            help="The repair must hold under the model's own generation settings too (repetition penalty), greedily.",
        ),
    ] = False,
    explain: Annotated[
        bool | None,
        typer.Option(
            "--explain/--no-explain",
            help="Rank the neurons behind the fault, and tell cause from carrier; default unless --json.",
            show_default=False,
        ),
    ] = None,
    contexts: Annotated[
        bool,
        typer.Option(
            "--contexts/--no-contexts",
            help="Also generate in other contexts, in other words and next door; takes some seconds a case.",
        ),
    ] = True,
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="With several cases: write the patch although some were refused, and exit with 0.",
        ),
    ] = False,
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
    from mint.case import case_from_dict, load_cases, load_keep

    o.check_stop(stop)
    if where not in ("auto", "responsible", "idle"):
        raise typer.BadParameter(f"unknown --where '{where}'; known are auto, responsible, idle")
    if rule:
        given = {
            "--prompt": prompt,
            "--target": target,
            "--prompt-file": prompt_file,
            "--target-file": target_file,
            "--suffix": suffix,
        }
        given |= {"--cases": cases, "--learn-rephrasings": learn_rephrasings, "--verify-dtype": verify_dtype}
        check_options(rule, given)
        if curve and report is None:
            raise typer.BadParameter("--curve is drawn on the page of --report; name one")
        o.check_free(out, force)
        o.check_free(report, force)
        from mint.rules.repair import RuleWishes

        return repair_rules(
            rule,
            RuleWishes(
                learn=learn,
                accept=accept,
                max_neurons=max_neurons,
                margin=margin,
                reference=tuple(map(str, reference or [])),
                seed=seed,
                keep=tuple(load_keep(keep)) if keep is not None else (),
                judges=tuple(judge or ()),
            ),
            model={
                "model": model,
                "device": device,
                "dtype": dtype,
                "revision": revision,
                "chat": chat,
                "system": system,
                "patches": patch,
            },
            out=out or _free_name(),
            report=None if report is None else Report(report, curve),
            partial=partial,
            force=force,
            as_json=as_json,
        )
    if curve:
        raise typer.BadParameter("--curve goes with --rule: a single repair learns from one prompt")
    if cases is not None:
        if any(v is not None for v in (prompt, target, prompt_file, target_file, suffix)):
            raise typer.BadParameter("give either --cases or a prompt and a target (and a suffix), not both")
        wanted = load_cases(cases)
    else:
        texts = {
            "prompt": o.text(prompt, prompt_file, "prompt"),
            "target": o.text(target, target_file, "target"),
        }
        wanted = [case_from_dict({"id": "case"} | texts, "command line")]
    kept = tuple(load_keep(keep)) if keep is not None else ()
    for path in reference or []:
        if not path.is_file():
            raise MintError(f"{path}: no such file; give a UTF-8 text file as --reference")
    o.check_free(out, force)
    o.check_free(report, force)
    if report is not None and len(wanted) > 1:
        raise typer.BadParameter("--report shows one case; use `mint evaluate` for the page of many")
    if report is not None:
        need("--report, which draws the fault,", "matplotlib")
    with console.working() as say:
        say("importing")
        from mint import session
        from mint import solver as solvers
        from mint.cli import parts, results
        from mint.evaluation.outcome import outcome_as_dict, repair_page
        from mint.model.precision import is_slow
        from mint.solver.problem import Settings

        wishes = session.Wishes(
            settings=Settings(
                max_neurons=max_neurons,
                margin=margin,
                generalize=generalize,
                where=where,
                learn_rephrasings=learn_rephrasings,
                reference=tuple(map(str, reference or [])),
                seed=seed,
            ),
            solver=solver,
            stop=stop,
            keep=kept,
            verify_dtypes=tuple(verify_dtype or []),
            verify_settings=verify_settings,
            contexts=contexts,
        )
        solve = solvers.named(solver)
        explained = (not as_json or report is not None) if explain is None else explain
        prepare = parts.preparation(wishes, say, explained)
        lm, applied = o.load(model, device, dtype, revision, chat, system, patch, say, prepare, adapter)
        wishes = replace(wishes, applied=applied)
        wanted = [replace(case, prompt=o.filled(lm, case.prompt, suffix)) for case in wanted]
        if is_slow(lm):
            half = str(lm.dtype).removeprefix("torch.")
            console.note(
                f"{half} on a CPU: solved in float32 on the same weights, proved by generating in {half}"
            )
        outcome = session.repair(
            lm,
            wanted,
            wishes,
            solve,
            attribute=parts.quick_attribution(wishes) if explained else None,
            verdict=parts.cause_or_carrier() if explained else None,
            prepare=prepare,
            say=say,
        )
        page = None if report is None else repair_page(lm, outcome)
        written = results.store(
            outcome, out or _free_name(), page=page, report=report, partial=partial, force=force
        )
    result = outcome_as_dict(outcome, None if written is None else str(written))
    if as_json:
        console.print_json(result)
    else:
        _show(outcome, result)
    return results.conclude(outcome, written)


repair.__doc__ = EXAMPLES


def _free_name() -> Path:
    """`fix.safetensors`, or the first `fix-N.safetensors` that is free."""
    path, n = Path("fix.safetensors"), 1
    while path.exists():
        n += 1
        path = Path(f"fix-{n}.safetensors")
    return path


def _show(outcome, result: dict) -> None:
    """Tables for people on stderr; the path of the patch on stdout."""
    for one in outcome.repairs:
        rows = [
            ("prompt", one.case.prompt),
            ("wrote", one.generated_before),
            ("should write", one.case.target),
        ]
        if one.note is None:
            rows.append(("writes now", one.generated_after))
        console.table(one.case.id, ["", "text"], rows)
        if one.note:
            console.note(one.note, "green")
        if one.attribution is not None:
            show_neurons(one.attribution.to_json())
        if one.verdict is not None:
            console.note(f"the edited neurons: {one.verdict.label}; {'; '.join(one.verdict.reasons)}")
        if one.reason:
            console.note(f"refused: {one.reason}", "red")
        elif one.solution is not None and "alone" in one.solution.details:
            console.note(f"repaired behind this prompt alone: {one.solution.details['alone']}")
    edits = [(n["layer"], n["index"], n["kind"]) for n in result["neurons"]]
    if edits:
        console.table("neurons changed", ["layer", "neuron", "edit"], edits, ["layer", "neuron"])
    effects = result["specificity"]
    if effects:
        sent = effects["routing_changed"]
        routing = [] if sent is None else [("sent to other experts in some layer", f"{sent:.2%}")]
        console.table(
            f"what else changed, on {effects['tokens']} tokens of other text",
            ["measure", "value"],
            [
                ("next token unchanged", f"{effects['argmax_unchanged']:.2%}"),
                ("right before, wrong now", f"{effects['argmax_broken']:.2%}"),
                ("KL divergence, mean", f"{effects['kl_mean']:.2g}"),
                ("KL divergence, largest", f"{effects['kl_max']:.2g}"),
                *routing,
            ],
            ["value"],
        )
    if result["near_misses"]:
        _show_places(result)
    if result["margin_min"] is not None:
        console.note(f"smallest margin {result['margin_min']:.2f}, {result['seconds']:.1f} s after loading")
    if result["patch"]:
        console.print_result(f"{result['patch']}\n")


def _show_places(result: dict) -> None:
    """Where the repair holds and is felt, as a table on stderr."""
    rows = [
        (kind.replace("_", " "), f"{counts['right']} of {counts['cases']}")
        for name in ("contexts", "wordings")
        for kind, counts in result[name].items()
    ]
    near = result["near_misses"]
    if near["cases"]:
        rows.append(("near misses that became the target", f"{near['became_target']} of {near['cases']}"))
        rows.append(("near misses that changed at all", f"{near['changed']} of {near['cases']}"))
    console.table("the target behind the prompt elsewhere, generated", ["where", "right"], rows, ["right"])


def show_neurons(attribution: dict, top: int = 8) -> None:
    """The ranked neurons of an attribution as a table on stderr."""
    fault = attribution["fault"]
    console.table(
        f"neurons behind {fault['wrong']!r} instead of {fault['desired']!r}"
        f" (logits {fault['logit_difference']:.2f} apart); the change of that difference without each",
        ["layer", "neuron", "linear", "exact", "writes"],
        [
            (
                n["layer"],
                n["index"],
                f"{n['linear']:.3f}",
                "" if n["exact"] is None else f"{n['exact']:.3f}",
                " ".join(map(repr, n.get("promotes", [])[:3])),
            )
            for n in attribution["neurons"][:top]
        ],
        ["layer", "neuron", "linear", "exact"],
    )


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(repair)
