"""Figures of matplotlib as files. Knows nothing about what they show."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from mint.errors import MintError
from mint.files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")


def check_picture(path: Path, force: bool = False) -> None:
    """Raise `MintError` for a name that ends in neither .png nor .svg, or that is taken."""
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


def write_picture(figure: "Figure", path: Path, *, force: bool = False) -> Path:
    """Write a figure; the ending chooses the format. Raises as `check_picture`, and `PatchError` where it cannot be written."""
    check_picture(path, force)
    if path.suffix.lower() == ".svg":
        return write_file(path, svg(figure), force=force)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return write_file(path, stream.getvalue(), force=force)
