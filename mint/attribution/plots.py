"""Pictures of an attribution: block effects over layers and positions, the top neurons, what they write. PNG or SVG.

Draws what `mint.attribution` measured; measures nothing but the block effects of the heat map.
"""

from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from mint.attribution.exact import block_effects
from mint.attribution.rank import Attribution
from mint.errors import MintError
from mint.model.lm import LM
from mint.pictures import FAINT, INK, STYLE, check_picture, write_picture

POSITIONS = 48
"""Most positions of the heat map: the last ones before the fault."""
_GUILTY, _OPPOSING, _LINEAR = "#b2182b", "#2166ac", "#8c8c8c"


def _visible(text: str) -> str:
    """A token as it can be read on an axis."""
    shown = text.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "·")
    return "".join(c if c.isprintable() and ord(c) < 0x2500 and c != "\ufffd" else "?" for c in shown)


def _title(found: Attribution) -> str:
    wrong, desired = (_visible(found.fault[key]) for key in ("wrong", "desired"))
    return f"'{wrong}' instead of '{desired}' at position {found.fault['position']}"


@rc_context(STYLE)
def heat_map(lm: LM, found: Attribution, positions: int = POSITIONS) -> Figure:
    """Layers x positions: exact change of logit(wrong) - logit(desired) when one block is set to its reference there.

    Shows the last `positions` positions up to the fault. Costs one batch of that many sequences a layer.
    """
    run = found.run
    first = max(0, len(run.ids) - positions)
    shown = list(range(first, len(run.ids)))
    effects = block_effects(lm, run, found.used.values, shown).numpy()
    # One block can outweigh all others a hundredfold; the colours stop at the 99th percentile, and the bar says so.
    limit = max(float(torch.quantile(torch.from_numpy(effects).abs(), 0.99)), 1e-6)
    figure = Figure(
        figsize=(max(5.0, 1.8 + 0.3 * len(shown)), max(3.2, 1.4 + 0.16 * lm.n_layers)), layout="constrained"
    )
    axes = figure.add_subplot()
    image = axes.imshow(effects, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit, origin="lower")
    axes.set_xticks(
        range(len(shown)), [_visible(lm.decode([run.ids[p]])) for p in shown], rotation=90, fontsize=8
    )
    axes.set_xlabel("token (the last one precedes the fault)")
    axes.set_ylabel("layer")
    axes.set_title(f"Effect of each feed-forward block\n{_title(found)}", fontsize=10)
    extend = "both" if abs(effects).max() > limit else "neither"
    bar = figure.colorbar(image, ax=axes, extend=extend)
    bar.set_label("change of logit(wrong) − logit(desired)\nnegative (red): promotes the fault", fontsize=8)
    return figure


@rc_context(STYLE)
def bars(found: Attribution, top: int = 15) -> Figure:
    """The guiltiest and the most opposing neurons: exact effect as bars, linear estimate as marks."""
    rows = [*found.neurons[:top], *reversed(found.opposing[: max(3, top // 3)])]
    names = [f"{r['layer']}.{r['index']}{' *' if r['always_on'] else ''}" for r in rows]
    exact = [r["exact"] if r["exact"] is not None else r["estimate"] for r in rows]
    figure = Figure(figsize=(6.4, 1.5 + 0.24 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.barh(places, exact, color=[_GUILTY if e < 0 else _OPPOSING for e in exact], label="exact effect")
    # Linear estimates of very large writes can be far outside; they are clipped to the axis and drawn as arrows.
    pad = 0.15 * (max(0, *exact) - min(0, *exact))
    low, high = min(0, *exact) - pad, max(0, *exact) + pad
    for place, row in zip(places, rows, strict=True):
        inside = low <= row["linear"] <= high
        marker = "D" if inside else ("<" if row["linear"] < 0 else ">")
        axes.plot(max(low, min(high, row["linear"])), place, marker, color=INK, ms=4, mfc=_LINEAR)
    axes.plot([], [], "D", color=INK, ms=4, mfc=_LINEAR, label="linear estimate (arrow: off the axis)")
    axes.set_xlim(low - pad / 3, high + pad / 3)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color=INK, lw=0.8)
    starred = any(r["always_on"] for r in rows)
    axes.set_ylabel("layer.neuron" + ("   (* always on)" if starred else ""))
    axes.set_xlabel("change of logit(wrong) − logit(desired) when set to its reference")
    axes.set_title(_title(found), fontsize=10)
    axes.legend(fontsize=8, loc="lower left" if abs(min(exact)) > max(exact) else "upper right")
    return figure


@rc_context(STYLE)
def lens(found: Attribution, top: int = 10) -> Figure:
    """A table: the tokens that each of the guiltiest neurons pushes up and down at the fault (logit lens)."""
    rows = [r for r in found.neurons[:top] if "promotes" in r]
    if not rows:
        raise MintError(
            "the model's final norm could not be found, so what a neuron writes cannot be read off; leave this"
            " picture out"
        )
    cells = [
        [
            f"{r['layer']}.{r['index']}",
            f"{r['exact'] if r['exact'] is not None else r['estimate']:+.2f}",
            "  ".join(f"'{_visible(t)}'" for t in r["promotes"]),
            "  ".join(f"'{_visible(t)}'" for t in r["suppresses"]),
        ]
        for r in rows
    ]
    figure = Figure(figsize=(11, 0.9 + 0.26 * len(cells)), layout="constrained")
    axes = figure.add_subplot()
    axes.axis("off")
    table = axes.table(
        cells,
        colLabels=["neuron", "effect", "what it writes promotes", "and suppresses"],
        colWidths=[0.08, 0.07, 0.43, 0.43],
        cellLoc="left",
        loc="upper center",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.scale(1, 1.3)
    for (row, _), cell in table.get_celld().items():
        cell.set_edgecolor(FAINT)
        cell.PAD = 0.02
        if row == 0:
            cell.set_facecolor("none")
    axes.set_title(f"What the guiltiest neurons write\n{_title(found)}", fontsize=10)
    return figure


def pictures(lm: LM, found: Attribution) -> dict[str, Figure]:
    """All pictures of an attribution by name: `heat_map`, `bars` and, where the final norm is known, `lens`."""
    out = {"heat_map": heat_map(lm, found), "bars": bars(found)}
    if found.neurons and "promotes" in found.neurons[0]:
        out["lens"] = lens(found)
    return out


def save(lm: LM, found: Attribution, path: str | Path, *, force: bool = False) -> list[Path]:
    """Write the pictures of an attribution beside each other: `why.png` (heat map), `why-bars.png`, `why-lens.png`.

    The ending chooses the format: .png or .svg. Raises `MintError` for another ending, for files that exist (without
    `force`) and for a place that cannot be written.
    """
    path = Path(path)
    check_picture(path, force)
    if not found.neurons or found.used is None:
        raise MintError("this attribution was read back, not made; run attribute again to draw it")
    figures = pictures(lm, found)
    targets = [path, *(path.with_name(f"{path.stem}-{name}{path.suffix}") for name in list(figures)[1:])]
    for target in targets:
        check_picture(target, force)
    return [write_picture(f, t, force=force) for t, f in zip(targets, figures.values(), strict=True)]
