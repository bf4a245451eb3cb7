"""The report page of rules: what became of unseen prompts and near misses, where the edit fires, what was ranked."""

from collections.abc import Mapping, Sequence
from typing import Any

from mint.evaluation.page import rules_page
from mint.model.lm import LM
from mint.reference import reference_texts
from mint.rules.curve import CurvePoint
from mint.rules.figures import Line
from mint.rules.fires import fires, matrix
from mint.rules.repair import RuleRepair, RulesOutcome, repair_as_dict

SHOWN = 40
"""Prompts of a kind on the page, what failed first."""
LINES = 4
"""Last lines of each prompt."""


def report_page(
    lm: LM, outcome: RulesOutcome, curves: Mapping[str, Sequence[CurvePoint]] | None = None
) -> str:
    """One HTML page about rules repaired on this model, which is clean again. curves: the learn curve of rules, by name."""
    texts = reference_texts()
    shown = {"model": lm.name, "dtype": str(lm.dtype).removeprefix("torch.")}
    return rules_page(
        [_rule(lm, one, texts, (curves or {}).get(one.rule.name, ())) for one in outcome.repairs],
        shown | ({"revision": lm.revision} if lm.revision else {}),
        outcome.specificity.as_dict() if outcome.specificity else None,
        matrix(lm, outcome) if len(outcome.repairs) > 1 else (),
    )


def _rule(lm: LM, one: RuleRepair, texts: Sequence[str], curve: Sequence[CurvePoint]) -> dict[str, Any]:
    record = repair_as_dict(one)
    details = record["details"]
    return {
        "name": one.rule.name,
        "figures": one.figures,
        "lists": [
            ("Unseen prompts", _lines(one.part("fault", "unseen"))),
            ("Learn prompts", _lines(one.part("fault", "learn"))),
            ("Near misses", _lines(one.part("near"))),
            ("Healthy prompts", _lines(one.part("healthy"))),
        ],
        "curve": [
            {"learn": p.learn, "unseen": p.unseen, "near": p.near, "refused": p.reason is not None}
            for p in curve
        ],
        "fires": fires(lm, one, texts),
        "candidates": _flat(details.get("candidates")),
        "responsible": _flat(details.get("responsible")),
        "verdict": details.get("verdict"),
        **{key: record[key] for key in ("success", "reason", "note", "neurons")},
    }


def _lines(lines: Sequence[Line]) -> list[dict]:
    """What is shown of some lines, failures first."""

    def good(x: Line) -> bool:
        return x.right_after if x.row.role == "fault" else x.kept

    words = {"fault": ("right", "not right"), "near": ("kept", "changed"), "healthy": ("kept", "broken")}
    return [
        {
            "source": x.row.source or x.row.id,
            "prompt": "\n".join(x.row.prompt.split("\n")[-LINES:]),
            "before": x.before,
            "after": x.after,
            "good": good(x),
            "word": words[x.row.role][not good(x)],
        }
        for x in sorted(lines, key=good)[:SHOWN]
    ]


def _flat(rows: Any) -> list[dict]:
    """Rows of a table: the keys that every row has, neurons in words, anything else that is no single value left out."""
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
        return []
    told = [{key: _cell(key, value) for key, value in row.items()} for row in rows[:12]]
    keys = [k for k in told[0] if all(r.get(k) is not None for r in told)]
    return [{k: r[k] for k in keys} for r in told]


def _cell(key: str, value: Any) -> Any:
    """A value as it stands in a table; None for what has no place in one."""
    if key == "neurons" and isinstance(value, list):
        return ", ".join(f"{n['kind']} of {n['index']} ({n['role']})" for n in value)
    if isinstance(value, (dict, list)):
        return None
    return round(value, 4) if isinstance(value, float) else value
