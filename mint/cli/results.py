"""How `mint repair` ends, for cases and rules alike: what is written, what is said, the exit code."""

from pathlib import Path
from typing import Protocol

from mint import console
from mint.errors import NoRepair
from mint.files import write_file
from mint.patch import Patch, save


class Outcome(Protocol):
    """What a session of cases or of rules comes to."""

    @property
    def patch(self) -> Patch | None: ...
    @property
    def success(self) -> bool: ...
    @property
    def reason(self) -> str | None: ...


def store(
    outcome: Outcome, out: Path, *, page: str | None, report: Path | None, partial: bool, force: bool
) -> Path | None:
    """Write the patch, if all was accepted or `partial`, and the page; where the patch is, if it was written."""
    written = None
    if outcome.patch is not None and (outcome.success or partial):
        written = save(outcome.patch, out, force=force)
    if report is not None and page is not None:
        write_file(report, page, force=force)
    return written


def conclude(outcome: Outcome, written: Path | None) -> int:
    """The exit code. Raises `NoRepair` where something was refused and nothing written."""
    if outcome.success:
        return 0
    if written is None:
        raise NoRepair(f"no acceptable repair: {outcome.reason}")
    console.note(f"written without what was refused: {outcome.reason}", "yellow")
    return 0
