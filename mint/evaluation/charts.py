"""The plots of a report, as SVG that takes its colours from the page (light or dark), or as figures for files.

Numbers in, pictures out; knows nothing about rows or summaries.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mint import pictures

# Stand-ins that `svg` turns into the page's own colours; any colour that nobody would choose does.
_INK = "#010203"
_FAINT = "#040506"
_SERIES = tuple(f"#0a0b{n:02x}" for n in range(8))
_MARKS = "osD^vPX*"
_MOST_INSIDE = 6
"""Entries of a legend that find room inside the axes."""


@dataclass(frozen=True)
class Point:
    """One solver in a plane, with optional intervals (low, high)."""

    name: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """One solver over the number of repairs."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def _figure(width: float, height: float, themed: bool):
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    inks = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color".split()
    own = dict.fromkeys(inks, _INK) | {"grid.color": _FAINT, "figure.facecolor": "none"}
    settings: dict[Any, Any] = pictures.STYLE | (own if themed else {})
    context = rc_context(settings)
    context.__enter__()
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, context


def scatter(
    points: Sequence[Point], x: str, y: str, *, percent: bool = True, themed: bool = True, title: str = ""
):
    """Figure: solvers as points with their intervals. Shares are drawn in per cent; x on a scale linear near 0."""
    figure, context = _figure(6.4, 4.2, themed)
    try:
        axes = figure.add_subplot()
        factor = 100 if percent else 1
        for number, point in enumerate(points):
            colour = _colour(number, themed)
            x_error, y_error = (
                _error(point.x, point.x_interval, factor),
                _error(point.y, point.y_interval, factor),
            )
            axes.errorbar(
                point.x * factor, point.y * factor, xerr=x_error, yerr=y_error, fmt="none", color=colour, capsize=2
            )  # fmt: skip
            axes.plot(
                [point.x * factor], [point.y * factor], _mark(number), color=colour, markersize=7, label=point.name
            )  # fmt: skip
        _finish(axes, x, y, title)
        widest = max((p.x * factor for p in points), default=0)
        if percent and widest > 5:  # a matrix-wide edit would press everything else against the axis
            axes.set_xscale("symlog", linthresh=1, linscale=1.0)
            axes.set_xlim(left=-0.05)
            ticks = [t for t in (0, 0.5, 1, 2, 5, 10, 20, 50, 100) if t <= widest * 1.6]
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.minorticks_off()
    finally:
        context.__exit__(None, None, None)
    return figure


def curves(
    series: Sequence[Curve], x: str, y: str, *, percent: bool = True, themed: bool = True, title: str = ""
):
    """Figure: one line a solver; shares in per cent, the number of repairs on a logarithmic axis."""
    figure, context = _figure(6.4, 3.4, themed)
    try:
        axes = figure.add_subplot()
        factor = 100 if percent else 1
        for number, curve in enumerate(series):
            axes.plot(
                curve.x,
                [v * factor for v in curve.y],
                marker=_mark(number),
                color=_colour(number, themed),
                label=curve.name,
            )
        _finish(axes, x, y, title)
        ticks = sorted({int(v) for c in series for v in c.x})
        if len(ticks) > 1 and ticks[0] > 0:
            axes.set_xscale("log")
            axes.set_xticks(ticks, [str(t) for t in ticks])
            axes.minorticks_off()
    finally:
        context.__exit__(None, None, None)
    return figure


def grid(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], x: str, y: str, bar: str
):
    """Figure: shares as a grid of shades, white 0 and dark 1. rows, columns: names along the axes."""
    side = max(3.0, 0.26 * len(columns) + 2.2), max(2.6, 0.26 * len(rows) + 1.6)
    figure, context = _figure(*side, False)
    try:
        axes = figure.add_subplot()
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        figure.colorbar(image, label=bar)
    finally:
        context.__exit__(None, None, None)
    return figure


def _colour(number: int, themed: bool) -> str:
    return (_SERIES if themed else pictures.SERIES)[number % len(_SERIES)]


def _mark(number: int) -> str:
    """Colours repeat, the pair of colour and mark does not (up to 64)."""
    return _MARKS[(number + number // len(_SERIES)) % len(_MARKS)]


def _error(value: float, interval: tuple[float, float] | None, factor: float):
    if interval is None:
        return None
    return [[max(0.0, value - interval[0]) * factor], [max(0.0, interval[1] - value) * factor]]


def _finish(axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(0.08)
    if len(axes.get_legend_handles_labels()[0]) > _MOST_INSIDE:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    else:
        axes.legend(loc="best", fontsize=9)


def svg(figure) -> str:
    """The figure as an `<svg>` element for a page that sets `--ink`, `--faint` and `--s0` to `--s7`."""
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "mint"}
    ):  # letters stay text; names of parts repeat
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(_INK, "var(--ink)").replace(_FAINT, "var(--faint)")
    for number, colour in enumerate(_SERIES):
        text = text.replace(colour, f"var(--s{number})")
    # Size comes from the page: the viewBox stays, the fixed points go.
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1),
        count=1,
    )
