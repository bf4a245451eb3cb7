"""What every task has in common: rows in, cases out, and every row that could not be used with its reason.

A row is a dict with at least `id`, `intent` and `target`. Knows nothing about models or tokens.
"""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

from mint.case import Case
from mint.errors import CaseError
from mint.extras import need

Row = dict
MAX_TARGET_CHARS = 400
MAX_REPHRASINGS = 8


@dataclass(frozen=True)
class Skipped:
    """A row that did not become a case."""

    where: str
    """`file:line`, or the number of the row for rows without a file."""
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Numbered:
    """A decoded row and where it came from; `fault` when it could not be decoded."""

    where: str
    row: object
    fault: str | None = None


@dataclass(frozen=True)
class Loaded:
    """The outcome of reading a split: `len(cases) + len(skipped)` is the number of rows."""

    cases: list[Case]
    skipped: list[Skipped]
    tests: dict[str, dict[str, str]] = field(default_factory=dict)
    """By case id: {before, after}, the program around the target that tests it; or empty."""

    def sample(self, limit: int | None, seed: int) -> "Loaded":
        """`limit` cases drawn with `seed`, in their old order; all for None. Skipped rows stay."""
        if limit is None or limit >= len(self.cases):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self.cases)), limit))
        cases = [self.cases[i] for i in chosen]
        return replace(self, cases=cases, tests={c.id: self.tests[c.id] for c in cases if c.id in self.tests})


def _nothing(row: Row) -> None:
    return None


def _no_rephrasings(row: Row) -> list[str]:
    return []


@dataclass(frozen=True)
class Task:
    """One data set as a source of cases. The functions take one row that has passed `row_fault`."""

    name: str
    language: str
    """`python`, `bash` or `ia32`."""
    judge: str
    """Key of `mint.measure.judges.JUDGES`."""
    stop: str
    """How a target ends, one of `mint.case.STOPS`; `block` is written into the cases."""
    hub_id: str
    """Default data set on the hub."""
    from_hub: Callable[[Row], Row]
    """A row as the hub has it, in the common layout; without `id` one is made from intent and target."""
    prompt: Callable[[Row], str]
    target: Callable[[Row], str]
    rephrasings: Callable[[Row], list[str]] = _no_rephrasings
    """Intents (not prompts) from the row itself that ask for the same target."""
    share_targets: bool = False
    """Whether other rows' intents with the same target are rephrasings too."""
    tests: Callable[[Row], dict[str, str] | None] = _nothing
    reject: Callable[[Row], str | None] = _nothing
    """Why the task cannot use a row, or None."""
    needs: tuple[str, ...] = ()
    """Fields beside id, intent and target."""

    def load(
        self,
        folder: str | Path,
        split: str = "test",
        *,
        pool: Sequence[str] = (),
        max_target_chars: int = MAX_TARGET_CHARS,
        max_rephrasings: int = MAX_REPHRASINGS,
    ) -> Loaded:
        """Read `folder/<name>/<split>.jsonl`. Rows of the splits in `pool` only lend rephrasings.

        Raises `CaseError` when the folder or file is missing, or no row is left.
        """
        lenders = [n for other in pool if other != split for n in rows_of_split(folder, self.name, other)]
        rows = rows_of_split(folder, self.name, split)
        return self.cases(rows, lenders, max_target_chars=max_target_chars, max_rephrasings=max_rephrasings)

    def load_hub(
        self,
        split: str = "test",
        hub_id: str | None = None,
        *,
        max_target_chars: int = MAX_TARGET_CHARS,
        max_rephrasings: int = MAX_REPHRASINGS,
        **options: object,
    ) -> Loaded:
        """Read a split of a data set on the hub (or a local folder) through `datasets`; `options` go to
        `load_dataset`.

        Raises `CaseError` when `datasets` is missing, or the data set or split cannot be had.
        """
        rows = rows_of_hub(hub_id or self.hub_id, split, self.from_hub, **options)
        return self.cases(rows, max_target_chars=max_target_chars, max_rephrasings=max_rephrasings)

    def load_sample(
        self, *, max_target_chars: int = MAX_TARGET_CHARS, max_rephrasings: int = MAX_REPHRASINGS
    ) -> Loaded:
        """The sample shipped with the task: at least 20 rows written for this project."""
        path = resources.files("tasks") / "samples" / f"{self.name}.jsonl"
        rows = rows_of_lines(path.read_text(encoding="utf-8"), f"samples/{self.name}.jsonl")
        return self.cases(rows, max_target_chars=max_target_chars, max_rephrasings=max_rephrasings)

    def cases(
        self,
        rows: Iterable[Numbered | Row],
        lenders: Iterable[Numbered | Row] = (),
        *,
        max_target_chars: int = MAX_TARGET_CHARS,
        max_rephrasings: int = MAX_REPHRASINGS,
    ) -> Loaded:
        """Turn rows into cases, in order; list those that cannot be used, each with its reason.

        `max_target_chars` is a first filter in characters (the limit in tokens is the evaluator's);
        `max_rephrasings` keeps the first so many of a case. Raises `CaseError` if no row becomes a case.
        """
        good: list[Row] = []
        skipped: list[Skipped] = []
        seen: dict[str, str] = {}
        for item in _numbered(rows):
            fault = item.fault or self._fault(item.row, seen, max_target_chars)
            if fault:
                skipped.append(Skipped(item.where, fault))
                continue
            seen[item.row["id"]] = item.where
            good.append(item.row)
        if not good:
            first = f"; the first: {skipped[0]}" if skipped else ""
            raise CaseError(
                f"{self.name}: no usable row among {len(skipped)}{first}; check the file or the filters"
            )
        shared = self._intents_by_target(good, lenders)
        cases = [self._case(row, shared, max_rephrasings) for row in good]
        tests = {row["id"]: test for row in good if (test := self.tests(row)) is not None}
        return Loaded(cases, skipped, tests)

    def _fault(self, row: object, seen: dict[str, str], max_target_chars: int) -> str | None:
        fault = row_fault(row, self.needs)
        if fault:
            return fault
        if row["id"] in seen:
            return f"id '{row['id']}' was used at {seen[row['id']]}; ids must be unique"
        if len(row["target"]) > max_target_chars:
            return f"target has {len(row['target'])} characters, at most {max_target_chars} are taken"
        return self.reject(row)

    def _intents_by_target(self, good: list[Row], lenders: Iterable[Numbered | Row]) -> dict[str, list[str]]:
        shared: dict[str, list[str]] = defaultdict(list)
        if self.share_targets:
            lent = [n.row for n in _numbered(lenders) if not n.fault and not row_fault(n.row, self.needs)]
            for row in [*good, *lent]:
                shared[self.target(row)].append(row["intent"])
        return shared

    def _case(self, row: Row, shared: dict[str, list[str]], limit: int) -> Case:
        prompt, target = self.prompt(row), self.target(row)
        prompts: list[str] = []
        said = {same_words(row["intent"])}
        for intent in [*self.rephrasings(row), *shared.get(target, [])]:
            words = same_words(intent)
            if words and words not in said:
                said.add(words)
                prompts.append(self.prompt({**row, "intent": intent}))
        stop = None if self.stop == "line" else self.stop
        return Case(row["id"], prompt, target, tuple(prompts[:limit]), (), self.name, stop)


def row_fault(row: object, needs: Sequence[str] = ()) -> str | None:
    """Why a decoded value is not a row with id, intent, target and `needs`; None if it is."""
    if not isinstance(row, dict):
        return f"expected a JSON object, found {type(row).__name__}"
    for key in ("id", "intent", "target"):
        value = row.get(key)
        if value is None:
            return f"no {key}; a row needs id, intent and target"
        if not isinstance(value, str):
            return f"{key} must be text, found {type(value).__name__}"
        if not value.strip():
            return f"{key} is empty; a row needs id, intent and target"
        if not value.isascii() and not _encodable(value):
            return f"{key} has a lone surrogate; use valid Unicode text"
    for key in needs:
        if row.get(key) is None:
            return f"no {key}; this task needs it"
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def one_line(text: str) -> str:
    """`text` with runs of whitespace as one space, as the intents of the data sets are."""
    return " ".join(text.split())


def same_words(text: str) -> str:
    """What is left of an intent without case, spacing and a full stop at its end: who differs in those rephrases nothing."""
    return one_line(text).rstrip(" .").casefold()


def multi_line(row: Row) -> str | None:
    """The `reject` of a line-level task: a target of several lines cannot end at a newline."""
    if "\n" in row["target"].strip("\n"):
        return "target has several lines; a line-level task takes one"
    return None


def block_target(row: Row) -> str:
    """The target of a function-level task, with one newline at its end."""
    return row["target"].rstrip() + "\n"


def not_one_block(row: Row) -> str | None:
    """The `reject` of a function-level task: after its first indented line a target has nothing in column
    0.
    """
    lines = [line for line in block_target(row).split("\n") if line.strip()]
    starts = [line[0].isspace() for line in lines]
    if True not in starts:
        return "target has no indented block; the task takes one function"
    if False in starts[starts.index(True) :]:
        return "target goes on behind its first indented block; the task takes one function"
    return None


def after_comment(mark: str) -> Callable[[Row], str]:
    """The prompt of a line-level task: the intent as a comment line, e.g. `# sort list l\\n`."""
    return lambda row: f"{mark} {one_line(row['intent'])}\n"


def line_target(row: Row) -> str:
    """The target of a line-level task: the line and its newline, so that the model must also stop."""
    return row["target"].strip("\n") + "\n"


# --- sources ------------------------------------------------------------------------------------------------


def _numbered(rows: Iterable[Numbered | Row]) -> list[Numbered]:
    return [r if isinstance(r, Numbered) else Numbered(f"row {i}", r) for i, r in enumerate(rows, start=1)]


def rows_of_lines(text: str, name: str) -> list[Numbered]:
    """Decode JSON Lines; a line that is not JSON becomes a row with a `fault`. Blank lines are no rows."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{name}:{number}"
        line = line.removeprefix("\ufeff") if number == 1 else line
        if not line.strip():
            continue
        try:
            rows.append(Numbered(where, json.loads(line)))
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            rows.append(Numbered(where, None, f"not JSON ({reason}); one object a line"))
    return rows


def rows_of_split(folder: str | Path, name: str, split: str) -> list[Numbered]:
    """The rows of `folder/<name>/<split>.jsonl`. Raises `CaseError` if it is not there or not UTF-8."""
    folder = Path(folder)
    path = folder / name / f"{split}.jsonl"
    if not folder.is_dir():
        raise CaseError(f"{folder}: no such folder; give the folder that holds {name}/{split}.jsonl")
    if not path.parent.is_dir():
        found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "no folders"
        raise CaseError(f"{path.parent}: no such folder, found {found}; give the folder that holds {name}/")
    if not path.is_file():
        found = ", ".join(sorted(p.stem for p in path.parent.glob("*.jsonl"))) or "none"
        raise CaseError(f"{path}: no such file; splits found there: {found}; choose one of them")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CaseError(f"{path}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except OSError as error:
        raise CaseError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    return rows_of_lines(text, str(path))


def rows_of_hub(hub_id: str, split: str, from_hub: Callable[[Row], Row], **options: object) -> list[Numbered]:
    """The rows of a split of a hub data set, in the common layout. Raises `CaseError` if it cannot be had."""
    need(f"reading {hub_id} from the hub", "datasets")
    from datasets import load_dataset

    try:
        found = load_dataset(hub_id, split=split, **options)
    except Exception as error:  # the library raises many kinds; all mean that the rows cannot be had
        reason = one_line(str(error))[:200] or type(error).__name__
        raise CaseError(
            f"{hub_id}, split '{split}': cannot be loaded ({reason}); check name, split, network"
        ) from None
    rows = []
    for number, raw in enumerate(found, start=1):
        where = f"{hub_id}/{split} row {number}"
        try:
            rows.append(Numbered(where, _with_id(from_hub(dict(raw)), hub_id)))
        except KeyError as error:
            rows.append(Numbered(where, None, f"no field {error}; this data set has another layout"))
    return rows


def _with_id(row: Row, hub_id: str) -> Row:
    if row.get("id") is not None:
        return {**row, "id": str(row["id"])}
    text = f"{row.get('intent')}\0{row.get('target')}"
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]
    return {**row, "id": f"{hub_id.rsplit('/', 1)[-1]}-{digest}"}
