"""The moving line on a terminal: what is done now, how much of it, and how long it took. Knows nothing about models."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


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


class _Bar(ProgressColumn):
    """A bar where it is known how much there is to do, nothing elsewhere."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._bar = BarColumn(width)

    def render(self, task: Task) -> RenderableType:
        return Text() if task.total is None else self._bar.render(task)


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
def reporting(console: Console) -> Iterator[Reporter]:
    """Within: a `Reporter` whose line stands on the console, and is gone afterwards."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        _Bar(20),
        _Left(),
        _Since(),
    )
    with Progress(*columns, console=console, transient=True) as line:
        yield Reporter(line)
