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
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Say = Callable[[str], None]


def quiet(_: str) -> None:
    """A `Say` that nobody listens to."""


def quoted(text: str, longest: int = 60) -> str:
    """Text in quotation marks, escaped, cut off behind `longest` characters: for messages of one line."""
    shown = repr(text)
    return shown if len(shown) <= longest else shown[: longest - 2] + "…" + shown[0]


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


class Reporter:
    """Tells what happens on one moving line: a spinner with the time so far, and a bar with the time left."""

    def __init__(self, line: Progress):
        self._line = line
        self._task = line.add_task("starting", total=None)

    def __call__(self, text: str) -> None:
        """Say what is being done now, for which nobody knows how long it takes."""
        self._line.update(self._task, description=text, total=None)

    def progress(self, text: str, done: int, total: int) -> None:
        """Say what is being done, and how much of it is: `done` of `total`, in any unit."""
        if not done:  # begins anew: what came before says nothing about the speed of this
            self._line.remove_task(self._task)
            self._task = self._line.add_task("", total=total)
        self._line.update(self._task, description=text, total=total, completed=done)


class _Bar(BarColumn):
    """A bar where it is known how much there is to do, nothing elsewhere."""

    def render(self, task: Task) -> ProgressBar | Text:
        return Text() if task.total is None else super().render(task)


class _Left(TimeRemainingColumn):
    """The time left, where it is known how much there is to do."""

    def render(self, task: Task) -> Text:
        left = None if task.total is None else task.time_remaining
        return Text() if left is None else Text(f"{left:.0f} s left")


class _Since(ProgressColumn):
    """Seconds since the first task."""

    def __init__(self) -> None:
        super().__init__()
        self._started = time.monotonic()

    def render(self, task: Task) -> Text:
        return Text(f"({time.monotonic() - self._started:.0f} s)")


@contextmanager
def working(show: bool = True) -> Iterator[Say]:
    """Within: what is told to the yielded `Reporter` stands behind a spinner with the time so far, on a terminal."""
    console = stderr()
    if not show or not console.is_terminal:
        yield lambda _: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        _Bar(bar_width=20),
        _Left(),
        _Since(),
    )
    with Progress(*columns, console=console, transient=True) as line:
        yield Reporter(line)
