"""What people see: tables and progress on stderr, results on stdout. Knows nothing about models.

Progress moves only on a terminal; elsewhere stderr stays quiet but for tables and errors. Colours follow the terminal
and NO_COLOR. Text that a model wrote is shown as text, never as markup, with control characters made visible. rich is
imported where something is drawn, so that `mint --help` does not wait for it.
"""

import io
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from rich.console import Console

Say = Callable[[str], None]


@runtime_checkable
class Counts(Protocol):
    """A `Say` that can also be told how much of the work is done."""

    def progress(self, text: str, done: int, total: int) -> None:
        """What is being done, and how much of it is: `done` of `total`, in any unit."""


def quiet(_: str) -> None:
    """A `Say` that nobody listens to."""


def quoted(text: str, longest: int = 60) -> str:
    """Text in quotation marks, escaped, cut off behind `longest` characters: for messages of one line."""
    shown = repr(text)
    return shown if len(shown) <= longest else shown[: longest - 2] + "…" + shown[0]


def stderr() -> "Console":
    """The console for people. Made anew for each use, so that a redirected stderr is respected."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=False)


def print_json(value: object) -> None:
    """One JSON object on stdout, in ASCII so that no terminal encoding can break it."""
    sys.stdout.write(json.dumps(value, ensure_ascii=True, allow_nan=False, indent=2) + "\n")


def print_result(text: str) -> None:
    """A result on stdout, exactly as it is."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # tests put other things there
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout.write(text)


def visible(text: str) -> str:
    """Text on one line: line ends and tabs as escapes, other control and direction characters by their code."""
    out = []
    for character in text:
        if character in "\n\t\r":
            out.append({"\n": "\\n", "\t": "\\t", "\r": "\\r"}[character])
        elif unicodedata.category(character) in ("Cc", "Cf", "Cs"):
            out.append(f"\\u{ord(character):04x}")
        else:
            out.append(character)
    return "".join(out)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], numeric: Sequence[str] = ()
) -> None:
    """A table on stderr. numeric: columns to align on the right."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for column in columns:
        shown.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(c if isinstance(c, Text) else Text(visible(str(c))) for c in row))
    stderr().print(shown)


def note(text: str, style: str = "") -> None:
    """One line on stderr; only a terminal breaks it."""
    from rich.text import Text

    stderr().print(Text(text, style=style), soft_wrap=True)


@contextmanager
def working(show: bool = True) -> Iterator[Say]:
    """Within: what is told to the yielded `Reporter` stands behind a spinner with the time so far, on a terminal."""
    console = stderr()
    if not show or not console.is_terminal:
        yield lambda _: None
        return
    from mint.progress import reporting

    with reporting(console) as say:
        yield say
