"""A case: one prompt, the text that should follow it, and what must stay as it is. Reads and writes JSON Lines.

This module knows nothing about models or tokens: text goes in and comes out exactly as given.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from mint.errors import CaseError

STOPS = ("line", "block", "eos", "none")
"""Ways a target can end; what they mean stands in `mint.model.stop.Stop`."""


@dataclass(frozen=True)
class Keep:
    """A prompt whose output must not change. With `target`, the model must go on writing exactly that."""

    prompt: str
    target: str | None = None


@dataclass(frozen=True)
class Case:
    """One fault: after `prompt` the model should write `target`."""

    id: str
    prompt: str
    target: str
    rephrasings: tuple[str, ...] = ()
    """Other prompts that should give the target too; for measuring, unless the user asks to learn from them."""
    keep: tuple[Keep, ...] = ()
    """Constraints: outputs that must not change; re-checked after the repair."""
    task: str | None = None
    """Name of the task the case belongs to, e.g. `conala`."""
    stop: str | None = None
    """How the target ends, one of `STOPS`; None: as asked for, or as the model's kind suggests."""


_KEYS = ("id", "prompt", "target", "rephrasings", "keep", "task", "stop")


def _text(record: dict, key: str, where: str, *, empty: bool = False) -> str:
    value = record.get(key)
    if key not in record:
        raise CaseError(f"{where}: no key '{key}'; a case needs id, prompt and target")
    return checked_text(value, key, where, empty=empty)


def checked_text(value: object, key: str, where: str, *, empty: bool = False) -> str:
    """The value of a key, if it is text that a model can see. empty: whether it may be empty. Raises `CaseError`."""
    if not isinstance(value, str):
        raise CaseError(f"{where}: '{key}' must be text, found {type(value).__name__}")
    if not value and not empty:
        raise CaseError(f"{where}: '{key}' is empty; write the text that the model should see or produce")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CaseError(
            f"{where}: '{key}' has a lone surrogate at character {error.start}; use valid Unicode text"
        ) from None
    return value


def _keep(item: object, where: str) -> Keep:
    if isinstance(item, str):
        raise CaseError(
            f"{where}: an entry of 'keep' is an object with prompt and optional target, found text; write"
            ' {"prompt": "..."}'
        )
    if not isinstance(item, dict):
        raise CaseError(f"{where}: an entry of 'keep' must be an object, found {type(item).__name__}")
    unknown = sorted(set(item) - {"prompt", "target"})
    if unknown:
        raise CaseError(f"{where}: unknown key '{unknown[0]}' in 'keep'; known are prompt, target")
    target = _text(item, "target", f"{where}, keep") if item.get("target") is not None else None
    return Keep(_text(item, "prompt", f"{where}, keep"), target)


def case_from_dict(record: object, where: str = "case") -> Case:
    """Check one decoded JSON object and make it a `Case`. Raises `CaseError` naming `where`."""
    if not isinstance(record, dict):
        raise CaseError(f"{where}: expected a JSON object, found {type(record).__name__}")
    unknown = sorted(set(record) - set(_KEYS))
    if unknown:
        raise CaseError(f"{where}: unknown key '{unknown[0]}'; known are {', '.join(_KEYS)}")
    identity = _text(record, "id", where)
    prompt = _text(record, "prompt", where)
    target = _text(record, "target", where)
    rephrasings = record.get("rephrasings") or []
    if not isinstance(rephrasings, list) or not all(isinstance(r, str) and r for r in rephrasings):
        raise CaseError(f"{where}: 'rephrasings' must be a list of non-empty texts; leave empty ones out")
    keep = record.get("keep") or []
    if not isinstance(keep, list):
        raise CaseError(f"{where}: 'keep' must be a list, found {type(keep).__name__}")
    task = record.get("task")
    if task is not None and not isinstance(task, str):
        raise CaseError(f"{where}: 'task' must be text, found {type(task).__name__}")
    stop = record.get("stop")
    if stop is not None and stop not in STOPS:
        raise CaseError(f"{where}: 'stop' must be one of {', '.join(STOPS)}, found {stop!r}")
    kept = tuple(_keep(k, where) for k in keep)
    return Case(identity, prompt, target, tuple(rephrasings), kept, task, stop)


def case_to_dict(case: Case) -> dict:
    """The JSON object of a case; optional keys only where they say something."""
    record: dict = {"id": case.id, "prompt": case.prompt, "target": case.target}
    if case.rephrasings:
        record["rephrasings"] = list(case.rephrasings)
    if case.keep:
        record["keep"] = [
            {"prompt": k.prompt} | ({"target": k.target} if k.target is not None else {}) for k in case.keep
        ]
    if case.task is not None:
        record["task"] = case.task
    if case.stop is not None:
        record["stop"] = case.stop
    return record


def read_jsonl(path: str | Path) -> list[tuple[int, object]]:
    """All (line number, decoded value) of a JSON Lines file. Raises `CaseError` with file, line and column."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CaseError(f"{path}: no such file; give a JSON Lines file, one object a line") from None
    except OSError as error:
        raise CaseError(f"{path}: cannot be read ({error.strerror}); give a JSON Lines file") from None
    values = []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CaseError(
                f"{path}:{number}:{error.start + 1}: not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8"
            ) from None
        text = text.removeprefix("\ufeff") if number == 1 else text
        if not text.strip():
            continue
        try:
            values.append((number, json.loads(text)))
        except json.JSONDecodeError as error:
            raise CaseError(
                f"{path}:{number}:{error.colno}: not JSON ({error.msg}); one object a line"
            ) from None
    return values


def load_cases(path: str | Path) -> list[Case]:
    """Read a file of cases. Raises `CaseError` for the first bad line; ids must be unique."""
    cases: list[Case] = []
    seen: dict[str, int] = {}
    for number, record in read_jsonl(path):
        case = case_from_dict(record, f"{path}:{number}")
        if case.id in seen:
            raise CaseError(
                f"{path}:{number}: id '{case.id}' was used on line {seen[case.id]}; ids must be unique"
            )
        seen[case.id] = number
        cases.append(case)
    if not cases:
        raise CaseError(f"{path}: no cases; write one JSON object a line with id, prompt and target")
    return cases


def load_keep(path: str | Path) -> list[Keep]:
    """Read a file of {prompt, target?} objects, one a line (the format of a case's `keep`)."""
    return [_keep(record, f"{path}:{number}") for number, record in read_jsonl(path)]


def dump_cases(cases: list[Case]) -> str:
    """JSON Lines text of the cases; `load_cases` reads it back unchanged."""
    return "".join(json.dumps(case_to_dict(c), ensure_ascii=False) + "\n" for c in cases)
