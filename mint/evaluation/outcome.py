"""What a session did, for others to read: the object that `mint repair --json` prints, and the page of one repair."""

from mint.errors import MintError
from mint.evaluation import page
from mint.files import jsonable
from mint.measure import places
from mint.model.lm import LM
from mint.session import Outcome, Repair

PLACES = ("contexts", "wordings", "near_misses")


def repair_as_dict(one: Repair) -> dict:
    """JSON values of one case's repair."""
    return {
        "id": one.case.id,
        "success": one.success,
        "generated_before": one.generated_before,
        "generated_after": one.generated_after,
        "target": one.case.target,
        "neurons": one.neurons,
        "margin_min": one.margin_min,
        "seconds": round(one.seconds, 4),
        "timing": {step: round(seconds, 4) for step, seconds in one.timing.items()},
        "reason": one.reason,
        "note": one.note,
        "attribution": one.attribution.to_json() if one.attribution else None,
        "verdict": one.verdict.to_json() if one.verdict else None,
        "details": jsonable(one.solution.details) if one.solution else {},
        **(one.places or dict.fromkeys(PLACES)),
    }


def outcome_as_dict(outcome: Outcome, patch_path: str | None) -> dict:
    """The object that `mint repair --json` prints. With several cases the texts stand in `cases` only."""
    single = repair_as_dict(outcome.repairs[0]) if len(outcome.repairs) == 1 else {}
    margins = [r.margin_min for r in outcome.repairs if r.margin_min is not None]
    found = [r.places for r in outcome.repairs if r.places]
    steps = sorted({s for r in outcome.repairs for s in r.timing})
    return {
        "success": outcome.success,
        "generated_before": single.get("generated_before"),
        "generated_after": single.get("generated_after"),
        "target": single.get("target"),
        "neurons": [n for r in outcome.repairs for n in r.neurons],
        "margin_min": min(margins, default=None),
        "seconds": round(sum(r.seconds for r in outcome.repairs), 4),
        "timing": {s: round(sum(r.timing.get(s, 0.0) for r in outcome.repairs), 4) for s in steps},
        "specificity": outcome.specificity.as_dict() if outcome.specificity else None,
        **(places.total(found) if found else dict.fromkeys(PLACES)),
        "patch": patch_path,
        "reason": outcome.reason,
        "note": single.get("note"),
        "lost": list(outcome.lost),
        "cases": [repair_as_dict(r) for r in outcome.repairs],
    }


def repair_page(lm: LM, outcome: Outcome) -> str:
    """One HTML page about a repair. Raises `MintError` for several cases: `mint evaluate` writes their page."""
    if len(outcome.repairs) != 1:
        raise MintError("--report shows one case; use `mint evaluate --out DIR` for the page of many")
    (one,) = outcome.repairs
    row = {
        "case": one.case.id,
        "solver": one.solution.solver if one.solution else "",
        "status": "solved" if one.success else "refused",
        "reason": one.reason or one.note,
        "prompt": one.case.prompt,
        "target": one.case.target,
        "written_before": one.generated_before,
        "written_after": one.generated_after,
        "tokens": list(one.tokens),
        "margins_before": list(one.margins_before),
        "margins_after": list(one.margins_after or one.margins_before),
        "efficacy": {"exact_match_generated": one.generated_after == one.case.target},
        "edit": {"neurons": len(one.neurons), "places": one.neurons},
        "specificity": {"other_tasks": outcome.specificity.as_dict()} if outcome.specificity else {},
    }
    shown = {"model": lm.name, "dtype": str(lm.dtype).removeprefix("torch.")}
    from mint.attribution import plots  # matplotlib is slow to import
    from mint.pictures import svg

    heatmap = svg(plots.heat_map(lm, one.attribution)) if one.attribution is not None else None
    return page.repair_page(row, shown | ({"revision": lm.revision} if lm.revision else {}), heatmap)
