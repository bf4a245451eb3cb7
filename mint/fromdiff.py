"""`mint cases from-diff`: a log of failures (prompt, what was written, what should have been) becomes cases.

Text in, cases out; knows nothing about models.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from mint.case import Case, case_from_dict
from mint.errors import CaseError

NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "input", "context"),
    "written": ("written", "output", "actual", "completion", "generated"),
    "wanted": ("wanted", "should", "expected", "target", "fixed", "correct"),
}
"""Keys that a log may use, the first one being ours."""
_OPTIONAL = ("id", "rephrasings", "keep", "task")


@dataclass(frozen=True)
class Refused:
    """A line of the log that gives no case."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def from_log(path: str | Path, *, minimal: bool = False) -> tuple[list[Case], list[Refused]]:
    """Cases from a log in JSON Lines: one object a line with `prompt`, `written` and `wanted` (or names like them).

    A line whose `wanted` equals what was written is no failure, and one like an earlier line no new case: both are
    listed with their reason, as is every line that cannot be read. `id`, `rephrasings`, `keep` and `task` are carried
    over; without an `id`, one is made from the content. minimal: move the common beginning of `written` and `wanted`,
    up to the last whole line, into the prompt, so that the case starts where things go wrong.

    Raises `CaseError` where the file cannot be read or gives no case at all.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        reason = (
            "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        )
        raise CaseError(f"{path}: {reason}; give a log in JSON Lines: prompt, written, wanted") from None
    cases: list[Case] = []
    refused: list[Refused] = []
    seen: dict[str, str] = {}
    content: dict[tuple[str, str], str] = {}
    for number, line in enumerate(raw.split(b"\n"), start=1):
        where = f"{path.name}:{number}"
        if not line.strip():
            continue
        try:
            case = _case(_decoded(line, where), where, minimal)
        except CaseError as error:
            refused.append(Refused(where, str(error).removeprefix(f"{where}: ")))
            continue
        earlier = content.get((case.prompt, case.target))
        if earlier is not None:
            refused.append(Refused(where, f"the same failure as {earlier}"))
        elif case.id in seen:
            refused.append(Refused(where, f"id '{case.id}' was used at {seen[case.id]}; ids must be unique"))
        else:
            seen[case.id] = content[(case.prompt, case.target)] = where
            cases.append(case)
    if not cases:
        first = f"; the first: {refused[0]}" if refused else ""
        raise CaseError(
            f"{path}: no case among {len(refused)} lines{first}; give prompt, written and wanted a line"
        )
    return cases, refused


def contradictions(cases: list[Case]) -> list[tuple[Case, Case]]:
    """Pairs of cases that want different texts behind the same prompt: no model can satisfy both."""
    first: dict[str, Case] = {}
    found = []
    for case in cases:
        other = first.setdefault(case.prompt, case)
        if other.target != case.target:
            found.append((other, case))
    return found


def _decoded(line: bytes, where: str) -> dict:
    try:
        value = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise CaseError(f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise CaseError(f"{where}: not JSON ({reason}); one object a line") from None
    if not isinstance(value, dict):
        raise CaseError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _field(record: dict, name: str, where: str) -> str:
    present = [key for key in NAMES[name] if record.get(key) is not None]
    if not present:
        raise CaseError(
            f"{where}: no '{name}' (also read: {', '.join(NAMES[name][1:])}); a failure needs all three"
        )
    if len(present) > 1:
        raise CaseError(f"{where}: both '{present[0]}' and '{present[1]}' are given for '{name}'; keep one")
    value = record[present[0]]
    if not isinstance(value, str):
        raise CaseError(f"{where}: '{present[0]}' must be text, found {type(value).__name__}")
    return value


def _case(record: dict, where: str, minimal: bool) -> Case:
    prompt, written, wanted = (_field(record, name, where) for name in ("prompt", "written", "wanted"))
    if written == wanted:
        raise CaseError(f"{where}: what was written is what was wanted; no failure")
    if minimal:
        shared = _shared_lines(written, wanted)
        prompt, wanted = prompt + wanted[:shared], wanted[shared:]
    digest = hashlib.sha256(f"{prompt}\0{wanted}".encode("utf-8", "replace")).hexdigest()[:12]
    made = {"id": f"diff-{digest}", "prompt": prompt, "target": wanted}
    made |= {key: record[key] for key in _OPTIONAL if record.get(key) is not None}
    return case_from_dict(made, where)


def _shared_lines(a: str, b: str) -> int:
    """Length of the common beginning, cut back to the end of a line, so that something is left to write."""
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return b.rfind("\n", 0, min(n, len(b) - 1)) + 1
