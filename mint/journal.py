"""Change a few bytes of files that lie in one folder, all or nothing, though the process may be killed at any point.

A write-ahead journal: what stood there and what shall stand there is on the disk before the first byte changes, so that
whoever comes next can finish. A lock keeps two writers apart. Knows nothing about models or patches.
"""

import base64
import errno
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import SoftFileLock, Timeout

from mint.errors import PatchError

JOURNAL = ".mint-journal"
LOCK = ".mint-lock"
_DRAFT = JOURNAL + ".new"
OWN_FILES = (JOURNAL, _DRAFT, LOCK)
"""What this module may leave in a folder while it works, or when it was killed; no part of what lies there."""
PATIENCE = 60.0
"""Seconds that a second writer waits: the first needs far less than one."""
NAMELESS = 5.0
"""Seconds after which an empty lock is that of a killed process: a live one writes its name at once."""
_MAX_BYTES = 256 << 20
"""More than any patch changes; a crafted journal must not fill the memory."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Write:
    """`run` bytes at `start`, `start + step`, ...: together `old` before and `new` afterwards."""

    file: str
    """Name inside the folder."""
    start: int
    step: int
    run: int
    old: bytes
    new: bytes

    def spans(self) -> Iterator[tuple[int, int]]:
        """(byte offset in the file, byte offset in `old` and `new`) of each run."""
        return ((self.start + k * self.step, k * self.run) for k in range(len(self.new) // self.run))

    def read(self, descriptor: int) -> bytes:
        """What stands there now."""
        if self.step == self.run:
            return os.pread(descriptor, len(self.new), self.start)
        return b"".join(os.pread(descriptor, self.run, offset) for offset, _ in self.spans())

    def put(self, descriptor: int, side: bytes) -> None:
        if self.read(descriptor) == side:
            return  # also where a full or failing disk would refuse to write what stands there already
        if self.step == self.run:
            _pwrite(descriptor, side, self.start)
            return
        for offset, at in self.spans():
            _pwrite(descriptor, side[at : at + self.run], offset)


def _pwrite(descriptor: int, data: bytes, offset: int) -> None:
    if os.pwrite(descriptor, data, offset) != len(data):
        raise OSError(errno.EIO, "short write")


# ---------------------------------------------------------------------- one writer at a time


def _holder(lock: Path) -> str:
    """Who holds a lock, for people."""
    try:
        pid, host = lock.read_text(encoding="utf-8").split("\n")[:2]
        return f"process {pid} on {host}"
    except (OSError, ValueError):
        return "another process"


def _drop_nameless(lock: Path) -> None:
    """Remove the lock of a process that was killed before it could write its name into it."""
    with suppress(OSError):
        seen = lock.stat()
        if seen.st_size == 0 and time.time() - seen.st_mtime > NAMELESS:
            lock.unlink()


@contextmanager
def _lock(path: Path, what: str, say: Say, patience: float) -> Iterator[None]:
    # An existence lock: it names its holder, goes when released, and is broken where its holder was killed.
    lock = SoftFileLock(path)
    _drop_nameless(path)
    try:
        try:
            lock.acquire(timeout=0.1)
        except Timeout:
            say(f"waiting for {_holder(path)}")
            lock.acquire(timeout=patience)
    except Timeout:
        raise PatchError(
            f"{what} is being changed by {_holder(path)}; wait until that ends and run this again (if no such process"
            f" runs, remove {path})"
        ) from None
    except OSError as error:
        raise PatchError(
            f"{what} cannot be written ({error.strerror or error}), nothing was changed there; give --out DIR for a copy"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def locked(folder: Path, say: Say = lambda _: None, patience: float = PATIENCE) -> Iterator[None]:
    """Within: no other process writes into the folder through this module.

    Waits up to `patience` seconds for another writer. Raises `PatchError` saying who holds it, or that the folder cannot
    be written.
    """
    with _lock(folder / LOCK, str(folder), say, patience):
        yield


# ---------------------------------------------------------------------- all or nothing


def commit(folder: Path, what: str, writes: Sequence[Write], texts: Mapping[str, str | None]) -> None:
    """Change bytes and whole small files of a locked folder. Call within `locked`.

    what: told to whoever finishes it ("applying 1a2b"). texts: file name -> new text, None to remove it. Raises `OSError`
    with everything as before; if even that fails, the journal stays and `recover` does it later.
    """
    entry = {
        "format": 1,
        "what": what,
        "writes": [
            {"file": w.file, "start": w.start, "step": w.step, "run": w.run}
            | {side: base64.b64encode(getattr(w, side)).decode() for side in ("old", "new")}
            for w in writes
        ],
        "texts": {name: {"old": _text(folder / name), "new": new} for name, new in texts.items()},
        "modes": {name: (folder / name).stat().st_mode & 0o7777 for name in sorted({w.file for w in writes})},
    }
    body = json.dumps(entry, sort_keys=True).encode()
    data = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    with uninterrupted():
        _replace(folder, JOURNAL, data)
        try:
            _play(folder, entry, "new")
        except BaseException:
            _play(folder, entry, "old")
            _end(folder)
            raise
        _end(folder)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within: Ctrl-C and SIGTERM wait until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    previous: dict[int, Any] = {
        s: signal.signal(s, lambda number, frame: waiting.append((number, frame))) for s in signals
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number, frame in waiting[:1]:
            handler = previous[number]
            if callable(handler):
                handler(number, frame)
            elif handler == signal.SIG_DFL:
                signal.raise_signal(number)


def _end(folder: Path) -> None:
    os.unlink(folder / JOURNAL)
    flush(folder)


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None


def _replace(folder: Path, name: str, data: bytes) -> None:
    """Write a small file whole or not at all, on the disk when this returns."""
    draft = folder / (_DRAFT if name == JOURNAL else f".{name}.mint-new")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            view = memoryview(data)
            while len(view):
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(draft, folder / name)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    flush(folder)


def flush(folder: Path) -> None:
    """Flush a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some file systems cannot flush a folder; the files themselves are flushed
    finally:
        os.close(descriptor)


def _writable(path: Path, mode: int) -> int:
    """An open file, also where its owner took the right to write; its mode stays."""
    flags = os.O_RDWR | os.O_NOFOLLOW
    try:
        return os.open(path, flags)
    except PermissionError:
        os.chmod(path, mode | 0o200)
        try:
            return os.open(path, flags)
        finally:
            os.chmod(path, mode)


def _play(folder: Path, entry: Mapping, side: str) -> None:
    """Bring the folder to one side of a journal, from any state between the two."""
    for name, mode in entry["modes"].items():
        descriptor = _writable(folder / name, mode)
        try:
            for write in _writes(entry):
                if write.file == name:
                    write.put(descriptor, getattr(write, side))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if os.stat(folder / name).st_mode & 0o7777 != mode:
            os.chmod(folder / name, mode)
    for name, text in entry["texts"].items():
        if text[side] is not None:
            _replace(folder, name, text[side].encode())
        elif os.path.lexists(folder / name):
            os.unlink(folder / name)
    flush(folder)


def _writes(entry: Mapping) -> list[Write]:
    return [
        Write(
            w["file"],
            w["start"],
            w["step"],
            w["run"],
            base64.b64decode(w["old"], validate=True),
            base64.b64decode(w["new"], validate=True),
        )
        for w in entry["writes"]
    ]


# ---------------------------------------------------------------------- after a kill


def recover(folder: str | Path, say: Say = lambda _: None) -> str | None:
    """Finish what a killed process began in a folder; returns what was done, None if there was nothing to do.

    Every command calls this before it reads a model directory. Raises `PatchError` if it cannot be finished, nothing
    changed: the folder cannot be written, or something else has changed the same bytes since.
    """
    folder = Path(folder)
    if not folder.exists():
        return recover_folder(folder, say)
    if not any((folder / name).exists() for name in (JOURNAL, _DRAFT)):
        if (folder / LOCK).exists():  # of a live writer, or left by a killed one: then it goes
            with suppress(PatchError), locked(folder, patience=0):
                pass
        return None
    with locked(folder, say):
        for draft in folder.glob(".*.mint-new"):
            draft.unlink()
        if not (folder / JOURNAL).exists():
            if not (folder / _DRAFT).exists():
                return None  # whoever was at work has just ended
            (folder / _DRAFT).unlink()
            return f"{folder}: an edit was interrupted before it changed anything; it was dropped"
        entry = _read_journal(folder)
        for write in _writes(entry):
            _check_between(folder, write)
        try:
            _play(folder, entry, "new")
            _end(folder)
        except OSError as error:
            raise PatchError(
                f"{folder}: {entry['what']} was interrupted and cannot be finished ({error.strerror or error}); make the"
                " folder writable, or make room, and run this again"
            ) from None
    return f"{folder}: {entry['what']} was interrupted; it has been finished now"


def _read_journal(folder: Path) -> dict:
    """The journal, checked as if a stranger had written it: no name outside the folder, sizes that fit."""
    path = folder / JOURNAL
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("too large")
        digest, _, body = path.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise ValueError("its checksum does not fit")
        entry = json.loads(body)
        names = [*entry["modes"], *entry["texts"], *(w["file"] for w in entry["writes"])]
        if entry["format"] != 1 or any(os.path.basename(n) != n or n in ("", ".", "..") for n in names):
            raise ValueError("it names files elsewhere")
        for write in _writes(entry):
            sizes = (write.start, write.step, write.run)
            if not all(type(n) is int and n >= 0 for n in sizes) or write.file not in entry["modes"]:
                raise ValueError("its offsets make no sense")
            if not write.run or len(write.old) != len(write.new) or len(write.new) % write.run:
                raise ValueError("its sizes do not fit")
        return entry
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PatchError(
            f"{path} cannot be used ({' '.join(str(error).split())[:100]}), so the interrupted edit cannot be finished;"
            " fetch the model again, or remove that file if you know the weights to be right"
        ) from None


def _check_between(folder: Path, write: Write) -> None:
    """Raise `PatchError` unless every byte is the old or the new one, and the file is a plain one of this folder."""
    path = folder / write.file
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise PatchError(
            f"{path} cannot be read ({error.strerror}), so an interrupted edit cannot be finished; restore the file"
        ) from None
    try:
        now = write.read(descriptor)
    finally:
        os.close(descriptor)
    fits = len(now) == len(write.new) and all(
        n in (a, b) for n, a, b in zip(now, write.old, write.new, strict=True)
    )
    if not fits:
        raise PatchError(
            f"{path} was changed by something else after an edit was interrupted; fetch the model again, or remove"
            f" {folder / JOURNAL} if you know the weights to be right"
        )


# ---------------------------------------------------------------------- whole folders


def _beside(out: Path) -> tuple[Path, Path]:
    """Where a folder is made, and where the one that it replaces stays meanwhile."""
    return out.with_name(f".{out.name}.mint-part"), out.with_name(f".{out.name}.mint-old")


def remove(folder: Path) -> None:
    """Remove a folder whatever the modes inside it."""
    if not folder.exists():
        return
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o700)
    shutil.rmtree(folder)


def recover_folder(out: Path, say: Say = lambda _: None) -> str | None:
    """Put back what a killed `new_folder` was about to replace, and drop what it was making."""
    making, old = _beside(out)
    if not (making.exists() or old.exists()) or not out.name:
        return None
    with _lock(out.with_name(f".{out.name}.mint-lock"), str(out), say, PATIENCE):
        done = None
        if old.exists() and not out.exists():
            old.rename(out)
            done = f"{out}: replacing it was interrupted; what was there before is back"
        for left in (making, old):
            if left.exists():
                done = done or f"{out}: making it was interrupted; the unfinished copy was removed"
                remove(left)
        return done


@contextmanager
def new_folder(out: Path, say: Say = lambda _: None) -> Iterator[Path]:
    """Within: a folder beside `out` to fill; afterwards it is `out`. After a failure nothing of it is left.

    After a kill, `recover_folder` cleans up. Raises `OSError`.
    """
    recover_folder(out, say)
    with _lock(out.with_name(f".{out.name}.mint-lock"), str(out), say, PATIENCE):
        making, old = _beside(out)
        making.mkdir(0o755)
        try:
            yield making
            flush(making)
            if out.exists():
                out.rename(old)
            try:
                making.rename(out)
            except BaseException:
                if old.exists():
                    old.rename(out)
                raise
            flush(out.parent)
            remove(old)
        finally:
            remove(making)
