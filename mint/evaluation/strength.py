"""What a patch does at other strengths: how often its own cases come out right, and what else changes, over its scale."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from mint.console import Say
from mint.errors import MintError
from mint.evaluation import charts
from mint.measure import specificity
from mint.model.lm import LM
from mint.patch import Patch, applied, scale
from mint.patch.record import ask_patch, cases_of, promised
from mint.session import measured_sequences

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


@dataclass(frozen=True)
class Strength:
    """A patch at one scale. Shares are 0 to 1."""

    factor: float
    cases: int
    right: int
    """Of the prompts that the patch promises: how many give their target, generated greedily."""
    rephrasings: int
    """Recorded rephrasings of its cases, which the repair did not learn from unless it was told to."""
    rephrasings_right: int
    argmax_unchanged: float
    """Share of the next tokens that stay, teacher-forced on the lines that ship with mint."""
    kl_mean: float


def over_scale(
    lm: LM, patch: Patch, factors: Sequence[float] = FACTORS, say: Say = lambda _: None
) -> list[Strength]:
    """Generate behind every prompt of a patch at each scale, and measure the side effects there.

    lm: the model without the patch; as before afterwards. Raises `MintError` for a patch that records no prompts, and
    `PatchError` where it does not belong to the model.
    """
    wanted = promised(patch)
    if not wanted:
        raise MintError(
            "the patch records no cases and no rules, so nothing can be asked; use one that mint made"
        )
    reworded = [
        {"id": f"{case.id}/{number}", "prompt": prompt, "target": case.target, "stop": case.stop}
        for case in cases_of(patch)
        for number, prompt in enumerate(case.rephrasings)
    ]
    others = replace(
        patch, info={k: patch.info[k] for k in ("stop", "chat") if k in patch.info} | {"cases": reworded}
    )
    since = min(edit.layer for edit in patch.edits)
    clean = specificity.clean_outputs(lm, measured_sequences(lm), states=specificity.late_layers(lm))
    found = []
    for factor in factors:
        say(f"generating at scale {factor:g}")
        with applied(lm, scale(patch, factor)):
            right, also = ask_patch(lm, patch), ask_patch(lm, others)
            effects = specificity.compare(lm, clean, since=since)
        found.append(
            Strength(
                factor,
                len(right),
                sum(a.holds for a in right),
                len(also),
                sum(a.holds for a in also),
                effects.argmax_unchanged,
                effects.kl_mean,
            )
        )
    return found


def picture(found: Sequence[Strength]):
    """Figure: the shares over the scale."""
    x = [one.factor for one in found]
    curves = [charts.Curve("own prompts right", x, [one.right / one.cases for one in found])]
    if found[0].rephrasings:
        shares = [one.rephrasings_right / one.rephrasings for one in found]
        curves.append(charts.Curve("rephrasings right", x, shares))
    curves.append(charts.Curve("other text unchanged", x, [one.argmax_unchanged for one in found]))
    return charts.curves(curves, "scale of the patch", "share (%)", themed=False)


def as_rows(found: Sequence[Strength]) -> list[dict]:
    """JSON values."""
    return [asdict(one) for one in found]
