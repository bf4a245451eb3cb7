"""A rule: prompts at which a model has a habit, and prompts at which it must not change. Reads and writes JSON Lines.

A rule says "never `wrong`, write `target`" by example. Rows of role `fault` show the habit; `near` rows stand at the
same place or opening and go on otherwise; `healthy` rows are right already. Knows nothing about models or tokens.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rapidfuzz import fuzz, process

from mint.case import checked_text, read_jsonl
from mint.errors import CaseError

ROLES = ("fault", "near", "healthy")
SPLITS = ("learn", "unseen")
LEARN_SHARE = 0.4
"""Share of the faults that go to the `learn` side where a file of rules does not say."""
LEARN_SHARE_BESIDE = 0.6
"""The same for sources without a fault: what must stay is learnt from many examples, faults from few."""
ALIKE = 90.0
"""Prompts whose last lines are this similar (rapidfuzz ratio, 0 to 100) are near-duplicates: one side of the split."""
_TAIL = 240
"""Characters before the cut that are compared for near-duplicates: what the next token depends on most."""
_KEYS = ("rule", "role", "prompt", "target", "wrong", "source", "split", "id")


@dataclass(frozen=True)
class Row:
    """One prompt of a rule."""

    rule: str
    """Name of the rule."""
    role: str
    """`fault`, `near` or `healthy`."""
    prompt: str
    target: str | None
    """Where greedy text must start. A `near` row may have none: what the model writes now must stay."""
    wrong: str | None = None
    """Where greedy text starts that must not; every `fault` row has it."""
    source: str | None = None
    """The file the prompt is from; a file never stands on both sides of the split."""
    split: str | None = None
    """`learn` or `unseen`."""
    id: str = ""


@dataclass(frozen=True)
class Rule:
    """The rows of one rule, each with its side of the split."""

    name: str
    rows: tuple[Row, ...]

    def part(self, role: str, split: str | None = None) -> tuple[Row, ...]:
        """Rows of a role, of one side or of both."""
        return tuple(r for r in self.rows if r.role == role and split in (None, r.split))

    @property
    def learn(self) -> tuple[Row, ...]:
        """Faults that may be learnt from."""
        return self.part("fault", "learn")

    @property
    def unseen(self) -> tuple[Row, ...]:
        """Faults that nothing may look at but the final test."""
        return self.part("fault", "unseen")

    @property
    def near(self) -> tuple[Row, ...]:
        return self.part("near")

    @property
    def healthy(self) -> tuple[Row, ...]:
        return self.part("healthy")


# ---------------------------------------------------------------------- reading


def _text(record: dict, key: str, where: str) -> str | None:
    value = record.get(key)
    return None if value in (None, "") else checked_text(value, key, where)


def _needed(record: dict, key: str, where: str) -> str:
    if record.get(key) is None:
        raise CaseError(
            f"{where}: no key '{key}'; a row needs rule, role, prompt, and target where it is a fault"
        )
    return checked_text(record[key], key, where)


def _one_of(record: dict, key: str, known: Sequence[str], where: str) -> None:
    if record[key] not in known:
        raise CaseError(f"{where}: unknown {key} {record[key]!r}; known are {', '.join(known)}")


def row_from_dict(record: object, where: str = "row") -> Row:
    """Check one decoded JSON object and make it a `Row`. Raises `CaseError` naming `where`."""
    if not isinstance(record, dict):
        raise CaseError(f"{where}: expected a JSON object, found {type(record).__name__}")
    unknown = sorted(set(record) - set(_KEYS))
    if unknown:
        raise CaseError(f"{where}: unknown key '{unknown[0]}'; known are {', '.join(_KEYS)}")
    name, role = _needed(record, "rule", where), _needed(record, "role", where)
    _one_of(record, "role", ROLES, where)
    if record.get("split") is not None:
        _one_of(record, "split", SPLITS, where)
    prompt = _needed(record, "prompt", where)
    target = (_text if role == "near" else _needed)(record, "target", where)
    wrong = (_needed if role == "fault" else _text)(record, "wrong", where)
    row = Row(
        rule=name,
        role=role,
        prompt=prompt,
        target=target,
        wrong=wrong,
        source=_text(record, "source", where),
        split=record.get("split"),
        id=_text(record, "id", where) or "",
    )
    if role == "fault" and wrong is not None and target is not None:
        check_texts(wrong, target, f"{where}: 'wrong'", "'target'")
    return row


def check_texts(
    wrong: str, right: str, name_wrong: str = "the wrong text", name_right: str = "the right text"
) -> None:
    """Raise `CaseError` where no prompt can tell the two texts apart: they are equal, or one begins with the other."""
    if wrong == right:
        raise CaseError(f"{name_wrong} and {name_right} are the same text {wrong!r}; give two that differ")
    short, long = sorted((wrong, right), key=len)
    if long.startswith(short):
        raise CaseError(
            f"{name_wrong} and {name_right}: {long!r} begins with {short!r}, so one cannot be told from the other;"
            f" add what follows {short!r}, for example the closing bracket"
        )


def load_rule(path: str | Path) -> Rule:
    """Read a rule file. Raises `CaseError` for the first bad line, for rows that contradict each other, for two names.

    Rows without `split` are put on a side here, by source and deterministically; see `with_split`.
    """
    rows: list[Row] = []
    ids: dict[str, int] = {}
    wanted: dict[str, tuple[int, str]] = {}
    for number, record in read_jsonl(path):
        where = f"{path}:{number}"
        row = row_from_dict(record, where)
        if not row.id:
            row = replace(row, id=f"{row.rule}-{number}")
        if row.id in ids:
            raise CaseError(f"{where}: id '{row.id}' was used on line {ids[row.id]}; ids must be unique")
        ids[row.id] = number
        if rows and row.rule != rows[0].rule:
            raise CaseError(
                f"{where}: rule '{row.rule}' in a file of rule '{rows[0].rule}'; write one file a rule"
            )
        if row.target is not None:
            line, other = wanted.setdefault(row.prompt, (number, row.target))
            if not (other.startswith(row.target) or row.target.startswith(other)):
                raise CaseError(
                    f"{where}: contradicts line {line}: behind the same prompt one wants {other!r}, the other"
                    f" {row.target!r}; drop one of them"
                )
        rows.append(row)
    if not rows:
        raise CaseError(
            f"{path}: no rows; write one JSON object a line with rule, role, prompt, target and wrong"
        )
    return with_split(Rule(rows[0].rule, tuple(rows)))


def row_to_dict(row: Row) -> dict:
    """The JSON object of a row; optional keys only where they say something."""
    return {key: getattr(row, key) for key in _KEYS if getattr(row, key) not in (None, "")}


def dump_rule(rule: Rule) -> str:
    """JSON Lines text of a rule; `load_rule` reads it back unchanged."""
    return "".join(json.dumps(row_to_dict(r), ensure_ascii=False) + "\n" for r in rule.rows)


# ---------------------------------------------------------------------- the split


def with_split(rule: Rule, seed: int = 0) -> Rule:
    """The rule with a side for every row; rows that have one keep it.

    Rows of one source, and near-duplicates across sources (copied files), go to one side together; a row without a
    source is a source of its own. Sources are drawn in an order that depends on nothing but their names and the seed,
    for `learn` until it has `LEARN_SHARE` of the faults (at least 8 where half of them are as many), then
    `unseen`; those without a fault by `LEARN_SHARE_BESIDE`.
    """
    if all(row.split for row in rule.rows):
        return rule
    group = _groups(rule.rows)
    faults = Counter(g for g, row in zip(group, rule.rows, strict=True) if row.role == "fault")
    total = sum(faults.values())
    quota = max(round(LEARN_SHARE * total), min(8, total // 2))
    sides = {g: row.split for g, row in zip(group, rule.rows, strict=True) if row.split}
    placed = sum(faults[g] for g, side in sides.items() if side == "learn")
    open_groups = sorted(set(group) - set(sides), key=lambda g: _digest(f"{seed}:{g}"))
    for g in [g for g in open_groups if faults[g]]:
        # A group that would overshoot by more than it fills goes to the other side.
        sides[g] = (
            "learn" if placed < quota and placed + faults[g] <= quota + max(2, quota // 4) else "unseen"
        )
        placed += faults[g] if sides[g] == "learn" else 0
    draw = random.Random(seed)
    for g in [g for g in open_groups if not faults[g]]:
        sides[g] = "learn" if draw.random() < LEARN_SHARE_BESIDE else "unseen"
    return replace(
        rule,
        rows=tuple(replace(r, split=r.split or sides[g]) for g, r in zip(group, rule.rows, strict=True)),
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _groups(rows: Sequence[Row]) -> list[str]:
    """Per row the name of its group: rows of one source, and of sources with near-duplicate prompts."""
    names = [r.source or f"\0{r.prompt}" for r in rows]
    parent = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    tails = [r.prompt[-_TAIL:] for r in rows]
    for start in range(
        0, len(rows), 512
    ):  # in strips, so that memory does not grow with the square of the rows
        scores = process.cdist(
            tails[start : start + 512], tails, scorer=fuzz.ratio, score_cutoff=ALIKE, dtype=np.uint8
        )
        for i, j in zip(*(axis.tolist() for axis in scores.nonzero()), strict=True):
            a, b = sorted((root(names[start + i]), root(names[j])))
            parent[b] = a
    return [root(name) for name in names]
