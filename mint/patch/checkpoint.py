"""Patches on saved models: apply and revert on a model directory, in place or into a copy.

The weights are changed inside the safetensors files, a few rows and columns; every other byte stays, so a revert gives
back the very files. Everything is checked and written beside the originals first, then renamed: a failure at any point,
Ctrl-C and a full disk included, leaves the directory as it was. Models in other formats are loaded and saved anew.
"""

import hashlib
import json
import os
import shutil
import signal
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mint.errors import PatchError
from mint.model.lm import LM
from mint.model.loading import load_lm
from mint.patch import Patch, check, to_bytes
from mint.patch import apply as apply_in_memory
from mint.patch import revert as revert_in_memory

PROVENANCE = "mint_patches.json"
"""Lists the patches in a directory, for people; what may be applied or reverted is decided by the weights' bits."""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SIDES = {"apply": ("before", "after"), "revert": ("after", "before")}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Say = Callable[[str], None]


def apply(
    model: str | Path,
    patch: Patch,
    *,
    out: str | Path | None = None,
    force: bool = False,
    say: Say = lambda _: None,
) -> Path:
    """Write a patch into a saved model: into the copy `out`, or in place where `out` is None. Returns the directory.

    force: replace `out` if it is a saved model already. Raises `PatchError`, nothing changed, unless the patch fits the
    model and the present weights equal `before`; `ModelError` for a model that cannot be read.
    """
    return _edit(str(model), patch, "apply", None if out is None else Path(out), force, say)


def revert(
    model: str | Path,
    patch: Patch,
    *,
    out: str | Path | None = None,
    force: bool = False,
    say: Say = lambda _: None,
) -> Path:
    """Take a patch out of a saved model; the files are byte for byte what they were. Else as `apply`."""
    return _edit(str(model), patch, "revert", None if out is None else Path(out), force, say)


def _edit(model: str, patch: Patch, verb: str, out: Path | None, force: bool, say: Say) -> Path:
    folder = Path(model)
    if out is None and not folder.is_dir():
        raise PatchError(
            f"{model} is no model directory, so it cannot be changed in place; give --out DIR for a copy"
        )
    if out is not None:
        _check_out(folder, out, force)
    lm = load_lm(model, say=say)
    present, wanted = _SIDES[verb]
    check(lm, patch, present)
    source = _folder_of(lm, folder)
    places = _places(lm, patch, source) if source is not None else None
    if out is None:
        if places is None:
            raise PatchError(
                f"{model} holds no safetensors file that the patch can be written into; give --out DIR for a copy"
            )
        say(f"writing {model}")
        _in_place(folder, places, patch, verb)
        return folder
    say(f"writing {out}")
    with _new_folder(out) as making:
        if places is not None and source is not None:
            shutil.copytree(source, making, dirs_exist_ok=True)
            for shard, slices in places.items():
                _write(making / shard, slices, present, wanted)
        else:
            (apply_in_memory if verb == "apply" else revert_in_memory)(lm, patch)
            lm.model.save_pretrained(making)
            lm.tokenizer.save_pretrained(making)
        noted = _noted(making, patch, verb)
        if noted is None:
            (making / PROVENANCE).unlink(missing_ok=True)
        else:
            (making / PROVENANCE).write_text(noted, encoding="utf-8")
    return out


def _check_out(folder: Path, out: Path, force: bool) -> None:
    if folder.is_dir() and (out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents):
        raise PatchError(f"{out} lies in the model's own directory; give another --out, or --in-place")
    if not out.parent.is_dir():
        raise PatchError(f"cannot write {out}: {out.parent} is no directory; make it first")
    if not out.exists():
        return
    if not force:
        raise PatchError(f"{out} exists; give another name, or --force to replace it")
    if not (out / "config.json").is_file():
        raise PatchError(
            f"{out} exists and is no saved model, so --force does not replace it; give another name"
        )


def _folder_of(lm: LM, folder: Path) -> Path | None:
    """The directory whose files can be copied and edited; None for hub ids and GGUF files, which are saved anew."""
    if folder.is_dir():
        return folder
    loaded = Path(getattr(lm.model.config, "_name_or_path", "") or "")
    return loaded if loaded.is_dir() and (loaded / _SINGLE).exists() else None


# ---------------------------------------------------------------------- where the bytes are


@dataclass(frozen=True)
class _Slice:
    """One row, column or entry inside a safetensors file, with its old and new weights."""

    start: int
    """Byte offset of the tensor in the file."""
    shape: tuple[int, ...]
    axis: int
    index: int
    before: Tensor
    after: Tensor
    what: str

    def offsets(self) -> list[tuple[int, int]]:
        """(byte offset, byte count) of each contiguous run of the slice."""
        size = self.before.element_size()
        inner = prod(self.shape[self.axis + 1 :])
        step = self.shape[self.axis] * inner
        outer = prod(self.shape[: self.axis])
        return [(self.start + (o * step + self.index * inner) * size, inner * size) for o in range(outer)]


def _header(path: Path) -> tuple[dict, int]:
    """The header of a safetensors file, and the offset of its data."""
    try:
        with path.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            return json.loads(stream.read(min(size, 1 << 28))), 8 + size
    except (OSError, ValueError, struct.error) as error:
        raise PatchError(f"{path} cannot be read as safetensors ({error}); is the model complete?") from None


def _shards(folder: Path) -> list[str]:
    """Names of the safetensors files that make up the saved model; empty if it has none."""
    if (folder / _SINGLE).exists():
        return [_SINGLE]
    if not (folder / _INDEX).exists():
        return []
    try:
        weights = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(weights.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PatchError(f"{folder / _INDEX} cannot be read; is the model complete?") from None


def _key_of(parameter: str, keys: Sequence[str]) -> str | None:
    """The name under which a parameter is saved: its own, or the only one that differs by a prefix alone."""
    if parameter in keys:
        return parameter
    like = [k for k in keys if k.endswith("." + parameter) or parameter.endswith("." + k)]
    return like[0] if len(like) == 1 else None


def _places(lm: LM, patch: Patch, folder: Path) -> dict[str, list[_Slice]] | None:
    """Shard name -> what the patch touches in it; None if the saved names or shapes are not the model's own."""
    tensors: dict[str, tuple[str, dict, int]] = {}
    for shard in _shards(folder):
        header, data = _header(folder / shard)
        tensors |= {k: (shard, v, data) for k, v in header.items() if k != "__metadata__"}
    keys = list(tensors)
    found: dict[str, list[_Slice]] = {}
    for edit in patch.edits:
        for role, where in lm.block(edit.layer).slices(edit.index).items():
            if role not in edit.after:
                continue
            key = _key_of(where.parameter, keys)
            if key is None:
                return None
            shard, meta, data = tensors[key]
            shape = tuple(meta["shape"])
            if shape != tuple(lm.parameter(where.parameter).shape):
                return None
            if _DTYPES.get(meta["dtype"]) != patch.dtype:
                raise PatchError(
                    f"the patch was made in {str(patch.dtype).removeprefix('torch.')}, {shard} holds '{key}' as"
                    f" {meta['dtype']}; repair the model in its own dtype"
                )
            piece = _Slice(
                data + meta["data_offsets"][0],
                shape,
                where.axis,
                where.index,
                edit.before[role],
                edit.after[role],
                f"{edit.where} ('{role}' in {shard})",
            )
            found.setdefault(shard, []).append(piece)
    return found


def _raw(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _read(descriptor: int, piece: _Slice) -> bytes:
    return b"".join(os.pread(descriptor, count, offset) for offset, count in piece.offsets())


def _write(path: Path, slices: Sequence[_Slice], present: str, wanted: str) -> None:
    """Change the slices of one file, checked before and after, and flushed to the disk."""
    path.chmod(path.stat().st_mode | 0o200)
    descriptor = os.open(path, os.O_RDWR)
    try:
        for piece in slices:
            if _read(descriptor, piece) != _raw(getattr(piece, present)):
                raise PatchError(
                    f"{piece.what}: the saved weights differ from the patch's '{present}'; use the model that the patch"
                    " was made on"
                )
        for piece in slices:
            new, done = _raw(getattr(piece, wanted)), 0
            for offset, count in piece.offsets():
                if os.pwrite(descriptor, new[done : done + count], offset) != count:
                    raise OSError(5, "short write")
                done += count
        os.fsync(descriptor)
        if any(_read(descriptor, piece) != _raw(getattr(piece, wanted)) for piece in slices):
            raise PatchError(f"{path} does not read back as written; check the disk")
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------- provenance


def patch_id(patch: Patch) -> str:
    """SHA-256 of a patch's file contents."""
    return hashlib.sha256(to_bytes(patch)).hexdigest()


def applied_patches(folder: str | Path) -> list[dict]:
    """What `mint_patches.json` of a directory lists; empty without one. Raises `PatchError` if it cannot be read."""
    path = Path(folder) / PROVENANCE
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["patches"]
        if not all(isinstance(p, dict) for p in listed):
            raise ValueError("not a list of objects")
        return list(listed)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatchError(f"{path} cannot be read ({error}); remove it, it only informs") from None


def _noted(folder: Path, patch: Patch, verb: str) -> str | None:
    """The new text of the list of patches; None if it becomes empty, so that the file goes."""
    listed, identity = applied_patches(folder), patch_id(patch)
    if verb == "apply":
        listed.append(
            {
                "sha256": identity,
                "neurons": [{"layer": e.layer, "index": e.index, "kind": e.kind} for e in patch.edits],
                "cases": [c.get("id") for c in patch.info.get("cases", []) if isinstance(c, dict)],
            }
        )
    else:
        last = next((i for i in reversed(range(len(listed))) if listed[i].get("sha256") == identity), None)
        if last is not None:
            del listed[last]
    return json.dumps({"format": 1, "patches": listed}, indent=2) + "\n" if listed else None


# ---------------------------------------------------------------------- all or nothing


@contextmanager
def _as_patch_error(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PatchError(
            f"cannot write {where} ({error.strerror or error}); nothing was changed there"
        ) from None
    except shutil.Error as error:
        raise PatchError(f"cannot copy to {where} ({str(error)[:200]}); nothing was changed there") from None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within: Ctrl-C and SIGTERM wait until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, object]] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {s: signal.signal(s, lambda number, frame: waiting.append((number, frame))) for s in signals}
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


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Within: a temporary directory beside `out` to fill; afterwards it is `out`. After a failure nothing is there."""
    with _as_patch_error(out):
        making = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            yield making
            making.chmod(0o755)
            with uninterrupted():
                old = None
                if out.exists():
                    old = making.with_name(making.name + ".old")
                    out.rename(old)
                try:
                    making.rename(out)
                except BaseException:
                    if old is not None:
                        old.rename(out)
                    raise
                if old is not None:
                    shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(making, ignore_errors=True)


def _in_place(folder: Path, places: dict[str, list[_Slice]], patch: Patch, verb: str) -> None:
    present, wanted = _SIDES[verb]
    staged: dict[Path, Path | None] = {}
    """What replaces each file; None: the file goes."""
    with _as_patch_error(folder):
        try:
            for shard, slices in places.items():
                staged[folder / shard] = _beside(folder / shard)
                shutil.copyfile(folder / shard, staged[folder / shard])
                _write(staged[folder / shard], slices, present, wanted)
                shutil.copymode(folder / shard, staged[folder / shard])
            noted = _noted(folder, patch, verb)
            note = folder / PROVENANCE
            if noted is not None:
                staged[note] = _beside(note)
                with staged[note].open("w", encoding="utf-8") as stream:
                    stream.write(noted)
                    stream.flush()
                    os.fsync(stream.fileno())
                staged[note].chmod(0o644)
            elif note.exists():
                staged[note] = None
            with uninterrupted():
                _replace_all(staged)
        finally:
            for temporary in staged.values():
                if temporary is not None:
                    temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".new")
    os.close(handle)
    return Path(name)


def _replace_all(staged: dict[Path, Path | None]) -> None:
    """Replace all files, or none: the originals stay under another name until the last one is in its place."""
    backups: dict[Path, Path | None] = {}
    try:
        for target in staged:
            backups[target] = _backup(target) if target.exists() else None
        for target, temporary in staged.items():
            if temporary is None:
                target.unlink()
            else:
                os.replace(temporary, target)
        _flush(next(iter(staged)).parent)
    except BaseException:
        for target, backup in backups.items():
            if backup is not None:
                os.replace(backup, target)
                # Renaming a hard link onto its own file does nothing, and leaves the link.
                backup.unlink(missing_ok=True)
            else:
                target.unlink(missing_ok=True)
        raise
    for backup in backups.values():
        if backup is not None:
            backup.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Flush a directory's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some file systems cannot flush a directory; the files themselves are flushed
    finally:
        os.close(descriptor)


def _backup(target: Path) -> Path:
    path = _beside(target)
    path.unlink()
    try:
        os.link(target, path)
    except OSError:  # a file system without hard links
        shutil.copy2(target, path)
    return path
