"""From rows to `summary.json`: means, medians, bootstrap intervals. Pure functions of rows; order does not matter.

Knows the contract of the file, nothing about models.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mint.measure import places, textmetrics

DOMAINS = ("same_task", "other_tasks", "ordinary_code")
_EFFECTS = (
    "argmax_unchanged",
    "argmax_broken",
    "argmax_newly_right",
    "kl_mean",
    "kl_p95",
    "kl_max",
    "perplexity_ratio",
    "sequences_unchanged",
    "routing_changed",
)


def solver_summary(rows: Iterable[dict], resamples: int = 1000) -> dict:
    """One solver's entry of `summary.json` from its rows.

    A case whose solver found nothing, or that ended in an error, counts as not repaired: `cases` is the number of all
    rows. Token accuracies are means over the rows that were measured. Shares are 0 to 1, times in seconds.
    resamples: bootstrap resamples of the intervals over cases (default 1000; 0 leaves them out).
    """
    rows = sorted(rows, key=lambda r: r["key"])
    measured = [r for r in rows if "efficacy" in r]
    wider = [r["generalization"] for r in measured if r.get("generalization")]
    domain = _domain(measured)
    found = {
        "cases": len(rows),
        "errors": sum(r["status"] == "error" for r in rows),
        "no_repair": sum(r["status"] == "no_repair" for r in rows),
        "already_right": sum(_efficacy(r, "exact_match_before") for r in measured),
        "efficacy": {
            "exact_match_generated": _mean([_efficacy(r, "exact_match_generated") for r in rows]),
            "exact_match_forced": _mean([_efficacy(r, "exact_match_forced") for r in rows]),
            "token_accuracy_before": _mean([_efficacy(r, "token_accuracy_before") for r in measured]),
            "token_accuracy_after": _mean([_efficacy(r, "token_accuracy_after") for r in measured]),
            "exact_match_before": _mean([_efficacy(r, "exact_match_before") for r in measured]),
            **_text_scores(measured),
        },
        "generalization": {
            "cases": len(wider),
            "token_accuracy_before": _mean([g["token_accuracy_before"] for g in wider]),
            "token_accuracy_after": _mean([g["token_accuracy_after"] for g in wider]),
            "exact_match_generated": _mean([g["exact_match_generated"] for g in wider]),
        },
        "specificity": {
            **_effects(measured, domain),
            "measured_on": domain,
            "outputs_kept": _mean([r["outputs_kept"] for r in measured if r.get("outputs_kept") is not None]),
            **{d: _effects(measured, d) for d in DOMAINS},
        },
        **_places(measured),
        "keep": {k: sum(r["keep"][k] for r in measured) for k in ("asked", "right_before", "kept", "broken")},
        "judge": _passes(measured),
        "edit": _edit(measured),
        "time": _time(rows),
    }
    if resamples:
        found["intervals"] = _intervals(rows, measured, domain, resamples)
    return found


def _places(measured: list[dict]) -> dict:
    """`contexts` and `wordings`: {kind: {cases, right, share}}, with `mean` and `worst` over kinds; `near_misses`: counts
    and shares. All over prompts; None where they were not measured."""
    found = [r["places"] for r in measured if r.get("places")]
    if not found:
        return {"contexts": None, "wordings": None, "near_misses": None}
    sums = places.total(found)
    result: dict = {}
    for name in ("contexts", "wordings"):
        kinds = {k: c | {"share": c["right"] / c["cases"]} for k, c in sums[name].items()}
        shares = [c["share"] for c in kinds.values()]
        result[name] = {"kinds": kinds, "mean": _mean(shares), "worst": min(shares, default=None)}
    near = sums["near_misses"]
    for key in ("became_target", "changed"):
        near[f"{key}_share"] = near[key] / near["cases"] if near["cases"] else None
    return result | {"near_misses": near}


def _domain(measured: list[dict]) -> str:
    """Where side effects are reported from: other lines of the task, or the next best that was measured."""
    for domain in DOMAINS:
        if any(r["specificity"].get(domain) for r in measured):
            return domain
    return DOMAINS[0]


def _efficacy(row: dict, key: str) -> float:
    return float(row.get("efficacy", {}).get(key, 0))


def _effects(measured: list[dict], domain: str) -> dict:
    """Means over cases of the shares and divergences; `kl_max` is the largest of all."""
    parts = [r["specificity"][domain] for r in measured if r["specificity"].get(domain)]
    found = {name: _mean([p[name] for p in parts if p.get(name) is not None]) for name in _EFFECTS}
    found["kl_max"] = max((p["kl_max"] for p in parts), default=None)
    return found | {"cases": len(parts), "tokens": sum(p["tokens"] for p in parts)}


def _text_scores(measured: list[dict]) -> dict:
    found = {}
    for side in ("before", "after"):
        for name in ("bleu", "chrf", "edit_similarity"):
            found[f"{name}_{side}"] = _mean([r["efficacy"][side][name] for r in measured])
    return found


def _passes(measured: list[dict]) -> dict | None:
    """Shares of written texts that parse (assemble, pass), and that are the same program as the target."""
    judged = [r["judge"] for r in measured if r["judge"]["after"]]
    if not judged:
        return None
    found: dict = {"cases": len(judged), "judge": sorted({j["after"]["judge"] for j in judged})}
    for side in ("before", "after"):
        good = [j[side] for j in judged if j[side] and "error" not in j[side]]
        matched = [g for g in good if g["matches"] is not None]
        found[f"ok_{side}"] = _mean([float(g["ok"]) for g in good])
        found[f"matches_{side}"] = _mean([float(g["matches"]) for g in matched])
    errors = sorted({j["after"]["error"] for j in judged if "error" in j["after"]})
    return found | ({"error": errors[0]} if errors else {})


def _edit(measured: list[dict]) -> dict:
    """Neurons of the cases for which something was changed; None for solvers that change whole matrices."""
    neurons = [r["edit"]["neurons"] for r in measured if r["edit"]["neurons"]]
    norms = [r["edit"]["norm"] for r in measured if r["edit"]["norm"]]
    return {
        "neurons_median": float(np.median(neurons)) if neurons else None,
        "neurons_max": max(neurons) if neurons else None,
        "norm_median": float(np.median(norms)) if norms else None,
    }


def _time(rows: list[dict]) -> dict:
    """Seconds inside the solver; the 90th percentile interpolates linearly."""
    seconds = [r["seconds"] for r in rows if r.get("seconds") is not None]
    if not seconds:
        return {"seconds_median": None, "seconds_p90": None}
    return {"seconds_median": float(np.median(seconds)), "seconds_p90": float(np.percentile(seconds, 90))}


def _intervals(rows: list[dict], measured: list[dict], domain: str, resamples: int) -> dict:
    """95 % percentile bootstrap intervals over cases, [low, high], seed 0."""
    wider = [r["generalization"] for r in measured if r.get("generalization")]
    parts = [r["specificity"][domain] for r in measured if r["specificity"].get(domain)]
    wanted: dict[str, list[float]] = {
        "exact_match_generated": [_efficacy(r, "exact_match_generated") for r in rows],
        "token_accuracy_after": [_efficacy(r, "token_accuracy_after") for r in measured],
        "generalization_token_accuracy_after": [g["token_accuracy_after"] for g in wider],
        "generalization_gain": [g["token_accuracy_after"] - g["token_accuracy_before"] for g in wider],
        "argmax_unchanged": [p["argmax_unchanged"] for p in parts],
        "argmax_broken": [p["argmax_broken"] for p in parts],
        "kl_mean": [p["kl_mean"] for p in parts],
    }
    found = {name: interval(values, resamples) for name, values in wanted.items() if values}
    around = [r["places"] for r in measured if r.get("places")]
    pairs = {
        "contexts": [[(c["right"], c["cases"]) for c in p["contexts"].values()] for p in around],
        "wordings": [[(c["right"], c["cases"]) for c in p["wordings"].values()] for p in around],
        "near_misses_became_target": [
            [(p["near_misses"]["became_target"], p["near_misses"]["cases"])] for p in around
        ],
        "near_misses_changed": [[(p["near_misses"]["changed"], p["near_misses"]["cases"])] for p in around],
    }
    return found | {name: clustered_interval(found_, resamples) for name, found_ in pairs.items() if found_}


def clustered_interval(clusters: Sequence[Sequence[tuple[int, int]]], resamples: int = 1000) -> list[float]:
    """[low, high], 95 %, of the share of hits over all trials, bootstrapped over clusters (cases), seed 0.

    clusters: per case (hits, trials). What is measured on one case is no independent draw, so cases are drawn, whole.
    """
    counts = np.array([[sum(h for h, _ in c), sum(n for _, n in c)] for c in clusters], dtype=float)
    draw = np.random.default_rng(0).integers(len(counts), size=(resamples, len(counts)))
    sums = counts[draw].sum(1)
    shares = np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] > 0)
    return [float(np.percentile(shares, 2.5)), float(np.percentile(shares, 97.5))]


def interval(values: Sequence[float], resamples: int = 1000) -> list[float]:
    """[low, high] of the mean, 95 %."""
    found = textmetrics.bootstrap_interval(values, n=resamples)
    return [found.low, found.high]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def without_time(value: object) -> object:
    """A summary (or row) without what differs from run to run: times and dates. For comparing two runs."""
    if isinstance(value, dict):
        return {
            k: without_time(v)
            for k, v in value.items()
            if k not in ("time", "seconds", "seconds_wall", "run")
        }
    return [without_time(v) for v in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------- table

Cell = Callable[[dict], str]


def percent(value: float | None, digits: int = 1) -> str:
    """A share as text; `-` for None."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int = 2) -> str:
    """A number as text with so many significant digits; `-` for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def seconds(value: float | None) -> str:
    """A time as text; `0` below 5 ms, `-` for None."""
    return (
        "-" if value is None else "0" if value < 0.005 else f"{value:.2g}" if value < 10 else f"{value:.0f}"
    )


COLUMNS: dict[str, Cell] = {
    "cases": lambda s: str(s["cases"]),
    "exact match, generated": lambda s: percent(s["efficacy"]["exact_match_generated"]),
    "exact match, forced": lambda s: percent(s["efficacy"]["exact_match_forced"]),
    "neurons (median, max)": lambda s: (
        "whole matrices"
        if s["edit"]["neurons_median"] is None and s["edit"]["norm_median"] is not None
        else f"{number(s['edit']['neurons_median'])}, {number(s['edit']['neurons_max'], 6)}"
    ),
    "behind rephrasings, before": lambda s: percent(s["generalization"]["token_accuracy_before"]),
    "behind rephrasings, after": lambda s: percent(s["generalization"]["token_accuracy_after"]),
    "behind rephrasings, generated": lambda s: percent(s["generalization"]["exact_match_generated"]),
    "contexts, mean (worst)": lambda s: _mean_worst(s.get("contexts")),
    "wordings, mean (worst)": lambda s: _mean_worst(s.get("wordings")),
    "near misses became target, changed": lambda s: _near(s.get("near_misses")),
    "broken": lambda s: percent(s["specificity"]["argmax_broken"], 2),
    "changed": lambda s: percent(_changed(s["specificity"]["argmax_unchanged"]), 2),
    "KL": lambda s: number(s["specificity"]["kl_mean"]),
    "changed, ordinary code": lambda s: percent(
        _changed(s["specificity"]["ordinary_code"]["argmax_unchanged"]), 2
    ),
    "KL, ordinary code": lambda s: number(s["specificity"]["ordinary_code"]["kl_mean"]),
    "seconds (median, p90)": lambda s: (
        f"{seconds(s['time']['seconds_median'])}, {seconds(s['time']['seconds_p90'])}"
    ),
}

DRIFT_COLUMNS: dict[str, Cell] = {
    "repairs": lambda d: str(d["repairs"]),
    "succeeded": lambda d: str(d["succeeded"]),
    "retained": lambda d: percent(d["retained_exact_match"]),
    "broken": lambda d: percent(d["argmax_broken"], 2),
    "changed": lambda d: percent(_changed(d["argmax_unchanged"]), 2),
    "KL": lambda d: number(d["kl_mean"]),
    "perplexity": lambda d: "-" if d["perplexity_ratio"] is None else f"{d['perplexity_ratio']:.4f} x",
}
PASSED: dict[str, Cell] = {
    "pass@1": lambda d: f"{percent(d['pass_at_1'])} (before {percent(d['pass_at_1_before'])})"
}


def drift_columns(stops: Sequence[dict]) -> dict[str, Cell]:
    """Columns of the table of a sequence; pass@1 where it was measured."""
    return DRIFT_COLUMNS | (PASSED if all("pass_at_1" in d for d in stops) else {})


def _mean_worst(kinds: dict | None) -> str:
    return "-" if kinds is None else f"{percent(kinds['mean'])} ({percent(kinds['worst'])})"


def _near(near: dict | None) -> str:
    if near is None:
        return "-"
    return f"{percent(near['became_target_share'])}, {percent(near['changed_share'])}"


def _changed(unchanged: float | None) -> float | None:
    return None if unchanged is None else 1 - unchanged


def table(heading: str, rows: dict[str, dict], columns: dict[str, Cell]) -> str:
    """A Markdown table: one line a row, first column its name."""
    lines = [f"| {heading} | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 1)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(cell(row) for cell in columns.values()) + " |")
    return "\n".join(lines) + "\n"


def markdown(summary: dict) -> str:
    """`summary.md`: the tables of a summary, with what the columns mean."""
    everyone = summary["solvers"] | {f"{n} (control)": s for n, s in summary["controls"].items()}
    model, parts = summary["model"], ["# Evaluation\n"]
    parts.append(
        f"Model {model['name']} ({model['dtype']}), {summary['cases']} cases, seed {summary['seed']}. Side effects on"
        f" other lines of the same task unless stated; definitions in docs/evaluation.md.\n"
    )
    parts.append(table("solver", everyone, COLUMNS))
    if any(s.get("contexts") for s in everyone.values()):
        parts += [
            "## Contexts, wordings and near misses\n",
            table("solver", everyone, _kind_columns(everyone)),
        ]
    for name, solver in summary["solvers"].items():
        if solver.get("drift"):
            rows = {str(d["repairs"]): d for d in solver["drift"]}
            columns = {k: v for k, v in drift_columns(solver["drift"]).items() if k != "repairs"}
            parts += [f"## Repairs in a row: {name}\n", table("repairs", rows, columns)]
            if solver.get("drift_stopped"):
                parts.append(f"Stopped early: {solver['drift_stopped']}\n")
    skipped = summary["skipped"]
    if skipped["count"]:
        parts.append(f"## Skipped: {skipped['count']}\n")
        parts.append("".join(f"- {_flat(s['where'])}: {_flat(s['reason'])}\n" for s in skipped["rows"]))
    return "\n".join(parts)


def _kind_columns(solvers: dict[str, dict]) -> dict[str, Cell]:
    """One column a kind of context and wording: the share of prompts behind which the target was generated."""
    kinds: dict[str, Cell] = {}
    for solver in solvers.values():
        for name in ("contexts", "wordings"):
            for kind in (solver.get(name) or {"kinds": {}})["kinds"]:
                kinds[kind.replace("_", " ")] = lambda s, name=name, kind=kind: percent(
                    ((s.get(name) or {"kinds": {}})["kinds"].get(kind) or {}).get("share")
                )
    return kinds


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
