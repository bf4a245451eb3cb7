"""The append-only file of results: one JSON object a line, on disk before the next begins. Survives a kill at any byte.

Knows nothing about what the rows mean, only that each has a `key`, and that one whose `status` is `error` stands for
nothing better.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from mint.errors import MintError


def read_rows(path: str | Path) -> list[dict]:
    """All complete rows of a results file, in order; a line that a kill cut short is passed over."""
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise MintError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    rows = []
    for line in raw.split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("key"), str):
            rows.append(row)
    return rows


def latest(rows: Iterable[dict]) -> dict[str, dict]:
    """Rows by key: of several the last, but a row that ended in an error never stands before one that did not."""
    found: dict[str, dict] = {}
    for row in rows:
        known = found.get(row["key"])
        if known is None or row.get("status") != "error" or known.get("status") == "error":
            found[row["key"]] = row
    return found


class Ledger:
    """Rows by key. `append` returns when the row is on disk; a key that is there already is not written again."""

    def __init__(self, path: str | Path, also: Iterable[str | Path] = ()):
        """path: the file to append to. also: files whose rows count as done too (other processes' parts)."""
        self.path = Path(path)
        self._own = {row["key"] for row in read_rows(self.path)}
        self.rows = latest(row for file in [*also, self.path] for row in read_rows(file))

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def forget(self, keys: Iterable[str]) -> None:
        """Let these rows be written again; which of several with one key counts, `latest` says."""
        for key in list(keys):
            self.rows.pop(key, None)
            self._own.discard(key)

    def append(self, row: dict) -> None:
        """Write one row and flush it to the disk. Raises `MintError` where that fails."""
        if row["key"] in self._own:
            return
        data = json.dumps(row, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        try:
            with self.path.open("ab+") as stream:
                stream.seek(0, os.SEEK_END)
                if stream.tell():
                    stream.seek(-1, os.SEEK_END)
                    if stream.read(1) != b"\n":  # what a kill left: end that line, or ours would join it
                        data = b"\n" + data
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise MintError(
                f"{self.path}: cannot be written ({error.strerror}); free the disk or give another --out, then run"
                " the same command again: it goes on from here"
            ) from None
        self._own.add(row["key"])
        self.rows[row["key"]] = row
