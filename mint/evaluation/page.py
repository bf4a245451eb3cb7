"""The report: one HTML page that needs nothing but itself. Opens from disk, prints, works on a phone, light and dark.

Everything a model wrote is text here, never markup: the template escapes it, control and direction characters are
shown by name, and the page's own policy allows no script. Knows rows and summaries, nothing about models.
"""

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache

from mint.evaluation import charts, summary

MAX_CASES = 400
"""Case blocks on one page; beyond that the page says how many it leaves out (they are in results.jsonl)."""
_WORST = 12


def page(result: dict, rows: Sequence[dict], heatmaps: Mapping[str, str] | None = None) -> str:
    """The page of an evaluation.

    result: `summary.json` as a dict. rows: rows of `results.jsonl`. heatmaps: attribution heat maps as `<svg>` text by
    case id, made by mint itself (they are put in as they are; the first element must be `<svg`).
    """
    solved = [r for r in rows if r["solver"] in result["solvers"]]
    everyone = list(result["solvers"].items()) + [
        (f"{n} (control)", s) for n, s in result["controls"].items()
    ]
    return _template("report.html.j2").render(
        title="mint: evaluation",
        result=result,
        table=_table(everyone),
        tradeoffs=_tradeoffs(everyone),
        drifts=_drifts(result["solvers"]),
        drift_tables={n: _drift_table(s["drift"]) for n, s in result["solvers"].items() if s.get("drift")},
        worst=worst_effects(solved),
        cases=[_case(r, heatmaps or {}) for r in solved[:MAX_CASES]],
        left_out=max(0, len(solved) - MAX_CASES),
    )


def repair_page(row: dict, model: Mapping[str, str], heatmap: str | None = None) -> str:
    """The page of a single repair (`mint repair --report`).

    row: as one row of `results.jsonl` (`measuring.measure` plus case, solver, prompt, target, status); keys that were
    not measured may be missing. model: name, dtype and so on, shown as they are.
    """
    return _template("repair.html.j2").render(
        title="mint: repair",
        model=model,
        case=_case(row, {row["case"]: heatmap} if heatmap else {}),
        worst=worst_effects([row]),
    )


def rules_page(
    rules: Sequence[Mapping],
    model: Mapping[str, str],
    effects: Mapping | None = None,
    matrix: Sequence[Sequence[float | None]] = (),
) -> str:
    """The page of rules (`mint repair --rule --report`).

    rules: dicts as of `mint.rules.report`. effects: a `Specificity` as a dict. matrix: one row and column a rule.
    """
    shown = [
        dict(rule)
        | {"lists": [_rule_lines(*part) for part in rule["lists"]], "drawn": _learn_curve(rule["curve"])}
        for rule in rules
    ]
    return _template("rules.html.j2").render(
        title="mint: rules", rules=shown, model=model, effects=effects, matrix=matrix
    )


def _learn_curve(points: Sequence[Mapping]) -> str | None:
    """Unseen prompts right and near misses kept over the prompts learnt from; None where there is nothing to draw."""
    series = []
    for key, name in (("unseen", "unseen prompts right"), ("near", "near misses kept")):
        known = [(p["learn"], p[key]["share"]) for p in points if p[key]["share"] is not None]
        series.append(charts.Curve(name, [n for n, _ in known], [share for _, share in known]))
    drawn = [one for one in series if len(one.x) > 1]
    return charts.svg(charts.curves(drawn, "prompts learnt from", "share, %")) if drawn else None


def _rule_lines(title: str, lines: Sequence[Mapping]) -> tuple[str, list[dict]]:
    return title, [dict(line) | {"change": diff(line["before"], line["after"])} for line in lines]


@cache
def _environment():
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mint.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: spelled(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def picture(text: str) -> Markup:
        if not text.startswith("<svg") or re.search(r"<script|<foreignObject|\son\w+=", text, re.IGNORECASE):
            return Markup("")
        return Markup(text)

    environment.filters |= {
        "visible": visible,
        "percent": summary.percent,
        "number": summary.number,
        "picture": picture,
    }
    return environment


def _template(name: str):
    return _environment().get_template(name)


# ---------------------------------------------------------------------- text


_SPELLED = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories that a reader cannot see, or that reorder what he sees: control, format, surrogate, private."""


def spelled(text: str) -> str:
    """Text with every invisible or reordering character spelled out, but for newlines and tabs."""
    return "".join(
        f"[U+{ord(c):04X}]" if c not in "\n\t" and unicodedata.category(c) in _SPELLED else c for c in text
    )


def visible(text: str) -> str:
    """`spelled`, with a mark before every newline and tab."""
    return spelled(text).replace("\n", "↵\n").replace("\t", "⇥\t")


_PIECES = re.compile(r"\w+|\s|[^\w\s]")


def diff(old: str, new: str) -> list[tuple[str, str]]:
    """The way from `old` to `new` as (kind, text): `same`, `del` (only in old), `ins` (only in new)."""
    a, b = _PIECES.findall(old), _PIECES.findall(new)
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    if matcher.ratio() < 0.5:  # too unlike for a diff to be readable: one text whole, then the other
        return [(kind, text) for kind, text in (("del", old), ("ins", new)) if text]
    parts: list[tuple[str, str]] = []
    for kind, i, j, k, end in matcher.get_opcodes():
        if kind == "equal":
            parts.append(("same", "".join(a[i:j])))
            continue
        if j > i:
            parts.append(("del", "".join(a[i:j])))
        if end > k:
            parts.append(("ins", "".join(b[k:end])))
    return parts


# ---------------------------------------------------------------------- parts of the page


def _table(everyone: list[tuple[str, dict]]) -> dict:
    return {
        "columns": list(summary.COLUMNS),
        "rows": [(name, [cell(s) for cell in summary.COLUMNS.values()]) for name, s in everyone],
        "intervals": {name: s["intervals"] for name, s in everyone if s.get("intervals")},
    }


def _tradeoffs(everyone: list[tuple[str, dict]]) -> list[str]:
    """Side effects against what is gained: exact match, and token accuracy behind rephrasings."""
    exact, wider = [], []
    for name, s in everyone:
        kept, ranges = s["specificity"]["argmax_unchanged"], s.get("intervals", {})
        if kept is None:
            continue
        low, high = ranges.get("argmax_unchanged", (kept, kept))
        side = (1 - high, 1 - low)
        hit = s["efficacy"]["exact_match_generated"]
        if hit is not None:
            exact.append(
                charts.Point(
                    name, 1 - kept, hit, side, tuple(ranges.get("exact_match_generated", (hit, hit)))
                )
            )
        after = s["generalization"]["token_accuracy_after"]
        if after is not None:
            around = tuple(ranges.get("generalization_token_accuracy_after", (after, after)))
            wider.append(charts.Point(name, 1 - kept, after, side, around))
    x = "argmax tokens of other lines changed, %"
    found = []
    if exact:
        found.append(charts.svg(charts.scatter(exact, x, "exact match, generated, %")))
    if wider:
        found.append(charts.svg(charts.scatter(wider, x, "token accuracy behind rephrasings, %")))
    return found


def _drifts(solvers: dict[str, dict]) -> list[str]:
    drifting = {n: s["drift"] for n, s in solvers.items() if s.get("drift")}
    found = []
    for key, label, percent in (
        ("retained_exact_match", "earlier repairs that still hold, %", True),
        ("argmax_broken", "tokens of other lines broken, %", True),
        ("perplexity_ratio", "perplexity of held-out code, x clean", False),
    ):
        series = []
        for name, stops in drifting.items():
            known = [d for d in stops if d[key] is not None]
            if known:
                series.append(charts.Curve(name, [d["repairs"] for d in known], [d[key] for d in known]))
        if series:
            found.append(charts.svg(charts.curves(series, "repairs in a row", label, percent=percent)))
    return found


def _drift_table(stops: list[dict]) -> dict:
    columns = summary.drift_columns(stops)
    return {"columns": list(columns), "rows": [[cell(d) for cell in columns.values()] for d in stops]}


def worst_effects(rows: Sequence[dict], count: int = _WORST) -> list[dict]:
    """The worst tokens of all rows, each text once: broken ones first, then changed ones, then by KL."""
    found = []
    for row in rows:
        for domain, effects in (row.get("specificity") or {}).items():
            for token in (effects or {}).get("worst", []):
                found.append(
                    token | {"case": row["case"], "solver": row["solver"], "domain": domain.replace("_", " ")}
                )
    found.sort(key=lambda t: (-t["broken"], -t["changed"], -t["kl"], t["case"], t["solver"]))
    seen, chosen = set(), []
    for token in found:
        what = (token["solver"], token["context"], token["after"])
        if what not in seen:
            seen.add(what)
            chosen.append(token)
    return chosen[:count]


def _case(row: dict, heatmaps: Mapping[str, str]) -> dict:
    """What the template shows of a row; a row that ended in an error has no measurements."""
    before, after = row.get("written_before"), row.get("written_after")
    tokens = list(
        zip(row.get("tokens", []), row.get("margins_before", []), row.get("margins_after", []), strict=False)
    )
    return {
        "row": row,
        "right": bool((row.get("efficacy") or {}).get("exact_match_generated")),
        "to_target": diff(before, row["target"]) if before is not None else [],
        "to_after": diff(row["target"], after) if after is not None else [],
        "tokens": [{"text": t, "before": b, "after": a, "strength": _strength(a)} for t, b, a in tokens],
        "heatmap": heatmaps.get(row["case"]),
        "places": (row.get("edit") or {}).get("places", []),
        "effects": {d: e for d, e in (row.get("specificity") or {}).items() if e},
        "judge": (row.get("judge") or {}).get("after"),
        "wider": row.get("generalization"),
    }


def _strength(margin: float) -> str:
    """How safe a token is: `bad` is wrong, `thin` under half a logit, `good` above."""
    return "bad" if margin <= 0 else "thin" if margin < 0.5 else "good"
