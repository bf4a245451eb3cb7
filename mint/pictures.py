"""How pictures look, and figures of matplotlib as files. Knows nothing about what they show.

An SVG file carries both a light and a dark set of colours and follows the reader's choice; a PNG file is light.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mint.errors import MintError
from mint.extras import need
from mint.files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
INK, FAINT, PAPER = "#1f2937", "#d1d5db", "#ffffff"
SERIES = ("#0b5fa5", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490", "#be185d", "#4b5563")
"""Colours told apart also by most people who see fewer of them, and in print; marks differ besides."""
DARK = {INK: "#e5e9ef", FAINT: "#343d4a", PAPER: "#12161c"} | dict(
    zip(
        SERIES,
        ("#6cb6ff", "#ff9a5c", "#6fdc9a", "#c9a0ff", "#f2cb6c", "#5fd3e6", "#ff8fc0", "#b0b9c6"),
        strict=True,
    )
)
"""What each colour becomes for readers who chose a dark page."""
STYLE: dict[Any, Any] = {  # matplotlib types the keys, as literals, only in its newer versions
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "text.parse_math": False,  # names hold dollars and carets
}
"""Settings of matplotlib under which every picture is drawn."""


def check_picture(path: Path, force: bool = False) -> None:
    """Raise `MintError` for a name that ends in neither .png nor .svg, or that is taken, and without matplotlib."""
    need(f"drawing {path}", "matplotlib")
    if path.suffix.lower() not in ENDINGS:
        raise MintError(
            f"{path}: expected a name ending in .png or .svg, found '{path.suffix}'; rename the picture"
        )
    if path.exists() and not force:
        raise MintError(f"{path} exists; give another name, or --force to replace it")
    if not path.parent.is_dir():
        raise MintError(f"cannot write {path}: {path.parent} is no directory; make it first")


def svg(figure: "Figure") -> str:
    """The figure as an `<svg>` element for a page, with text as text; the same figure gives the same bytes."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mint"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def light_and_dark(text: str) -> str:
    """An `<svg>` element that follows the reader's choice of a light or a dark page, also inside an `<img>`."""
    light, dark = [], []
    for number, (colour, instead) in enumerate(DARK.items()):
        text = text.replace(colour, f"var(--c{number})")
        light.append(f"--c{number}: {colour}")
        dark.append(f"--c{number}: {instead}")
    rules = f"svg {{ {'; '.join(light)}; font-family: system-ui, sans-serif }}"
    rules += f" @media (prefers-color-scheme: dark) {{ svg {{ {'; '.join(dark)} }} }}"
    end = text.index(">") + 1  # of the element's own tag
    return f"{text[:end]}\n <style>{rules}</style>{text[end:]}"


def write_picture(figure: "Figure", path: Path, *, force: bool = False) -> Path:
    """Write a figure; the ending chooses the format. Raises as `check_picture`, and `PatchError` where it cannot be written."""
    check_picture(path, force)
    if path.suffix.lower() == ".svg":
        return write_file(path, light_and_dark(svg(figure)), force=force)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return write_file(path, stream.getvalue(), force=force)
