"""What people see: tables and progress on stderr, results on stdout. Knows nothing about models.

Progress moves only on a terminal; elsewhere stderr stays quiet but for tables and errors. Colours follow the terminal
and NO_COLOR. Text that a model wrote is shown as text, never as markup, with control characters made visible.
"""

import json
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text

Say = Callable[[str], None]


def stderr() -> Console:
    """The console for people. Made anew for each use, so that a redirected stderr is respected."""
    return Console(stderr=True, highlight=False, soft_wrap=False)


def print_json(value: object) -> None:
    """One JSON object on stdout, in ASCII so that no terminal encoding can break it."""
    sys.stdout.write(json.dumps(value, ensure_ascii=True, allow_nan=False, indent=2) + "\n")


def print_result(text: str) -> None:
    """A result on stdout, exactly as it is."""
    if hasattr(sys.stdout, "reconfigure"):
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
    shown = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for column in columns:
        shown.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(c if isinstance(c, Text) else Text(visible(str(c))) for c in row))
    stderr().print(shown)


def note(text: str, style: str = "") -> None:
    """One line on stderr."""
    stderr().print(Text(text, style=style))


@contextmanager
def working(show: bool = True) -> Iterator[Say]:
    """Within: what is told to the yielded function stands behind a spinner with the time so far, on a terminal."""
    console = stderr()
    if not show or not console.is_terminal:
        yield lambda _: None
        return
    started = time.monotonic()
    with console.status("starting") as status:

        def say(text: str) -> None:
            status.update(Text(f"{text} ({time.monotonic() - started:.0f} s)"))

        yield say
