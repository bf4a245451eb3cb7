"""Patches on saved models: apply and revert on a model directory, in place or into a copy, without loading the model.

The weights are changed inside the safetensors files, a few rows and columns found from the headers; every other byte
stays, so a revert gives back the very files. Everything is checked first, and written through a journal
(mint/journal.py): a failure or a kill at any point leaves a state that the next command finishes or rolls back.
Models in other formats are loaded and saved anew into a copy.
"""

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import AutoTokenizer

from mint import journal
from mint.console import Say
from mint.errors import ModelError, PatchError
from mint.model.layout import weight_of
from mint.model.lm import fingerprint, hash_vocabulary, sampled
from mint.model.loading import BUILTIN, builtin_path, load_lm, quiet_transformers
from mint.model.saved import read_saved
from mint.patch import Patch, check
from mint.patch import apply as apply_in_memory
from mint.patch import revert as revert_in_memory
from mint.patch.edit import NeuronEdit, same_bits
from mint.patch.names import describe, slices_of
from mint.patch.provenance import PROVENANCE, applied_patches, patch_id, texts_after
from mint.patch.skeleton import DTYPES, Run, Skeleton, safetensors_files
from mint.patch.skeleton import read as read_skeleton

__all__ = ["PROVENANCE", "applied_patches", "apply", "patch_id", "revert"]

_log = logging.getLogger("mint")
_SIDES = {"apply": ("before", "after"), "revert": ("after", "before")}
_COPIES = (
    "pytorch_model*.bin", "consolidated*", "pytorch_model*.pt", "*.pth", "tf_model*.h5",
    "flax_model*.msgpack",
)  # fmt: skip
"""Files that hold the same weights once more, and that some reader prefers to the safetensors files."""
_EXPORTS = (
    "*.gguf",
    "*.onnx",
    "onnx/*.onnx",
    "original/*.pth",
    "original/*.safetensors",
    "*.mlmodelc",
    "*.engine",
)
"""What the weights were exported to for software that reads nothing else: it has to be exported anew."""
_FICLONE = 0x40049409
"""ioctl of Linux: make a file share the blocks of another until either changes (btrfs, xfs, bcachefs)."""


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
    if out is None and not Path(model).is_dir():
        raise PatchError(
            f"{model} is no model directory, so it cannot be changed in place; give --out DIR for a copy"
        )
    for place in {Path(model), *([out] if out is not None else [])}:
        if done := journal.recover(place, say):
            _log.warning(done)
    folder = _folder_of(model, patch, say)
    if out is not None:
        _check_out(folder, out, force)
    files = safetensors_files(read_saved(str(folder))) if folder is not None else []
    if folder is None or not files:
        if out is None:
            raise PatchError(
                f"{model} holds no safetensors file that the patch can be written into; give --out DIR for a copy"
            )
        return _save_anew(model, folder, patch, verb, out, say)
    skeleton = read_skeleton(folder, patch.base.get("architecture"))
    layout = _layout(model, patch, say)
    _check_base(patch, skeleton, layout.get("final_norm"))
    _check_tokenizer(patch, folder)
    pieces = _pieces(patch, skeleton, layout)
    _check_copies(folder, files)
    _tell_exports(folder, out or folder)
    if out is None:
        _check_alone(folder, pieces)
        with _as_patch_error(folder), journal.locked(folder, say):
            writes = _writes(folder, patch, pieces, verb)
            what = f"{'applying' if verb == 'apply' else 'reverting'} patch {patch_id(patch)[:12]}"
            say(f"writing {folder}")
            texts = texts_after(folder, patch, verb, card=False)
            journal.commit(folder, what, writes, texts)
        return folder
    with _as_patch_error(out), journal.new_folder(out, say) as making:
        say(f"copying to {out}")
        _copy_folder(folder, making)
        with journal.locked(making):
            texts = texts_after(making, patch, verb, card=True)
            journal.commit(making, f"writing {out}", _writes(making, patch, pieces, verb), texts)
    return out


def _folder_of(model: str, patch: Patch, say: Say) -> Path | None:
    """The directory whose files can be copied and edited; None for what has to be loaded and saved anew."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if model == BUILTIN:
        return builtin_path(say)
    if folder.exists() or model.lower().endswith(".gguf"):
        return None
    try:
        cached = try_to_load_from_cache(model, "config.json", revision=patch.base.get("revision"))
    except (ValueError, OSError):
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _check_out(folder: Path | None, out: Path, force: bool) -> None:
    if folder is not None and (
        out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents
    ):
        raise PatchError(f"{out} lies in the model's own directory; give another --out, or --in-place")
    if out.suffix == ".gguf":
        raise PatchError(
            f"{out}: no GGUF file is written, only a model directory; give --out a directory, or export the patch for"
            " llama.cpp with `mint export --format gguf-lora`"
        )
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


def _save_anew(model: str, folder: Path | None, patch: Patch, verb: str, out: Path, say: Say) -> Path:
    lm = load_lm(model, say=say)
    check(lm, patch, _SIDES[verb][0])
    with _as_patch_error(out), journal.new_folder(out, say) as making:
        say(f"writing {out}")
        (apply_in_memory if verb == "apply" else revert_in_memory)(lm, patch)
        with quiet_transformers():
            lm.model.save_pretrained(making)
            lm.tokenizer.save_pretrained(making)
        if folder is not None:
            _copy_rest(folder, making)
        for name, text in texts_after(making, patch, verb, card=True).items():
            if text is not None:
                (making / name).write_bytes(text.encode())
    return out


@contextmanager
def _as_patch_error(where: Path) -> Iterator[None]:
    try:
        yield
    except shutil.Error as error:
        raise PatchError(f"cannot copy to {where} ({str(error)[:200]}); nothing was changed there") from None
    except OSError as error:
        raise PatchError(
            f"cannot write {where} ({error.strerror or error}); nothing was changed there"
        ) from None


# ---------------------------------------------------------------------- does the patch belong here


def _layout(model: str, patch: Patch, say: Say) -> Mapping:
    """Names of the neurons' weights: what the patch says, or, where it does not, from the loaded model."""
    layout = patch.base.get("layout")
    if isinstance(layout, dict) and "final_norm" in layout:
        return layout
    return describe(load_lm(model, say=say))


def _check_base(patch: Patch, skeleton: Skeleton, norm: object) -> None:
    """Raise `PatchError` unless the directory's fingerprint is that of the model the patch was made on."""
    base = patch.base
    if not base.get("fingerprint"):
        return
    model = skeleton.model
    table = weight_of(model.get_input_embeddings())
    name = next(n for n, p in model.named_parameters(remove_duplicate=False) if p is table)
    wanted = [skeleton.rows(name, sampled(table.shape[0]))]
    if isinstance(norm, str):
        wanted.append(skeleton.rows(f"{norm}.weight"))
    sample = [rows for rows in wanted if rows is not None]
    found = None
    dtype = getattr(torch, str(base.get("dtype")), None)
    cast = dtype if isinstance(dtype, torch.dtype) and dtype in DTYPES.values() else patch.dtype
    if len(sample) == len(wanted):
        found = fingerprint(type(model).__name__, skeleton.shapes(), [s.to(cast) for s in sample])
    if found != base["fingerprint"]:
        stored = sample[0].dtype if sample else cast
        if stored != cast:
            raise PatchError(
                f"the patch was made in {_name(cast)}, the model is in {_name(stored)}, and their weights differ; repair"
                f" again with --dtype {_name(stored)}"
            )
        revision = f" revision {base['revision']}" if base.get("revision") else ""
        raise PatchError(
            f"the patch was made on another model ({base.get('name')}{revision}, fingerprint"
            f" {str(base['fingerprint'])[:12]}), this is {skeleton.folder} ({str(found)[:12]}); use the model it was made on"
        )


def _check_tokenizer(patch: Patch, folder: Path) -> None:
    wanted = patch.base.get("tokenizer")
    if not wanted:
        return
    try:
        found = hash_vocabulary(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab())
    except Exception as error:  # readers of tokenizers raise whatever they stumble over
        raise ModelError(
            f"{folder}: its tokenizer cannot be read ({' '.join(str(error).split())[:150]}); is the directory complete?"
        ) from None
    if found != wanted:
        raise PatchError(
            f"the patch was made with another tokenizer ({str(wanted)[:12]}), this one is {found[:12]}; use the tokenizer"
            " it was made with"
        )


# ---------------------------------------------------------------------- where the bytes are


@dataclass(frozen=True)
class _Piece:
    """One row, column or entry in one file."""

    run: Run
    edit: NeuronEdit
    role: str

    @property
    def where(self) -> str:
        return f"{self.edit.where} ('{self.role}' in {self.run.stored.file})"

    def bytes_of(self, side: str) -> bytes:
        """Old or new weights in the dtype of the file. Raises `PatchError` where that dtype cannot hold them exactly."""
        value = getattr(self.edit, side)[self.role]
        dtype = DTYPES[self.run.stored.dtype]
        cast = value.to(dtype)
        if not same_bits(cast.to(value.dtype), value):
            raise PatchError(
                f"{self.run.stored.file} holds {_name(dtype)} weights, which cannot hold this {_name(value.dtype)} patch"
                f" exactly; repair again with --dtype {_name(dtype)}"
            )
        return cast.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pieces(patch: Patch, skeleton: Skeleton, layout: Mapping) -> list[_Piece]:
    """Every place in the files that the patch touches, copies included. Raises `PatchError` if the model has none."""
    found = []
    for edit in patch.edits:
        if edit.layer >= layout.get("layers", 0):
            raise PatchError(
                f"the patch edits layer {edit.layer}, the model has layers 0 to {layout.get('layers', 0) - 1}"
            )
        slices = slices_of(layout, edit)
        for role, value in edit.after.items():
            if role not in slices:
                raise PatchError(
                    f"{edit.where} has no '{role}' weights in this model; it has {', '.join(slices)}"
                )
            runs = skeleton.runs(slices[role])
            if not runs:
                raise PatchError(
                    f"no file of {skeleton.folder} holds '{slices[role].parameter}', where {edit.where} lives; use the"
                    " model that the patch was made on"
                )
            for run in runs:
                if run.run * run.count != value.numel() * DTYPES[run.stored.dtype].itemsize:
                    raise PatchError(
                        f"{edit.where}: '{role}' has {value.numel()} weights, {run.stored.file} has"
                        f" {run.run * run.count // DTYPES[run.stored.dtype].itemsize}; use the model it was made on"
                    )
                found.append(_Piece(run, edit, role))
    return found


def _writes(folder: Path, patch: Patch, pieces: Sequence[_Piece], verb: str) -> list[journal.Write]:
    """What is to be written. Raises `PatchError` unless the present bytes are the patch's."""
    present, wanted = _SIDES[verb]
    writes = [p.run.write(p.bytes_of(present), p.bytes_of(wanted)) for p in pieces]
    now: list[bytes] = []
    for piece, write in zip(pieces, writes, strict=True):
        descriptor = os.open(folder / piece.run.stored.file, os.O_RDONLY)
        try:
            now.append(write.read(descriptor))
        finally:
            os.close(descriptor)
    moved = [(p, n) for p, w, n in zip(pieces, writes, now, strict=True) if n != w.old]
    if not moved:
        return writes
    if all(n == w.new for w, n in zip(writes, now, strict=True)):
        if verb == "apply":
            raise PatchError("the patch is already applied to this model; revert it first, or leave it")
        raise PatchError(
            "the patch is not applied to this model, so there is nothing to revert; apply it first"
        )
    first, raw = moved[0]
    dtype = DTYPES[first.run.stored.dtype]
    if dtype != patch.dtype and _rounds_to(raw, dtype, getattr(first.edit, present)[first.role]):
        raise PatchError(
            f"{first.where}: the file holds {_name(dtype)} weights that the {_name(patch.dtype)} patch has rounded, so"
            f" they could not be given back; repair again with --dtype {_name(dtype)}"
        )
    raise PatchError(
        f"{first.where}: the saved weights differ from the patch's '{present}'; another edit changed this neuron: use the"
        " model that the patch was made on, or revert the other patch first"
    )


def _rounds_to(raw: bytes, dtype: torch.dtype, value: Tensor) -> bool:
    stored = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(value.shape)
    return same_bits(stored.to(value.dtype), value)


def _check_copies(folder: Path, files: Sequence[str]) -> None:
    """Raise `PatchError` if the folder holds the weights once more in files that cannot be patched."""
    others = sorted({p.name for pattern in _COPIES for p in folder.glob(pattern)} - set(files))
    read = [n for n in files if not n.startswith("consolidated")]
    others += [n for n in files if n.startswith("consolidated")]
    if others:
        raise PatchError(
            f"{folder} also holds {others[0]}, whose weights would stay unpatched for software that reads it; remove it"
            f" (transformers reads {read[0] if read else 'other files'}), and run this again"
        )


def _tell_exports(folder: Path, changed: Path) -> None:
    """Warn of what the folder holds that is neither patched nor in anybody's way."""
    exports = sorted({p.relative_to(folder).as_posix() for pattern in _EXPORTS for p in folder.glob(pattern)})
    if exports:
        more = f" and {len(exports) - 1} more" if exports[1:] else ""
        _log.warning(
            f"{changed} also holds {exports[0]}{more}, which stays as it is; export it anew from the changed model"
        )


def _check_alone(folder: Path, pieces: Sequence[_Piece]) -> None:
    """Raise `PatchError` if writing in place would change files elsewhere, too."""
    for name in sorted({p.run.stored.file for p in pieces} | {PROVENANCE}):
        path = folder / name
        if path.is_symlink():
            raise PatchError(
                f"{path} is a link to {os.readlink(path)}, a cache that other programs share; give --out DIR for a copy"
            )
        if path.exists() and path.stat().st_nlink > 1:
            raise PatchError(
                f"{path} has other names (hard links), which would change with it; give --out DIR for a copy"
            )


# ---------------------------------------------------------------------- copies


def _copy_folder(source: Path, target: Path) -> None:
    """Copy everything but mint's own lock and journal, links followed, writable for the owner."""
    for path in sorted(source.iterdir()):
        if path.name in journal.OWN_FILES:
            continue
        there = target / path.name
        if path.is_dir():
            there.mkdir(path.stat().st_mode & 0o777 | 0o700)
            _copy_folder(path, there)
        elif path.is_file():
            _copy_file(path, there)
            there.chmod(path.stat().st_mode & 0o777 | 0o600)
        elif path.is_symlink():
            raise PatchError(f"{path} is a link to nothing ({os.readlink(path)}); is the model complete?")


def _copy_rest(source: Path, target: Path) -> None:
    """Copy what a model saved anew does not say itself: tokenizer, generation settings, cards, as they were."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in (".bin", ".pt", ".pth", ".safetensors", ".gguf") or path.name.endswith(
            ".index.json"
        )
        if path.is_file() and not weights and path.name not in ("config.json", *journal.OWN_FILES):
            shutil.copyfile(path, target / path.name)


def _copy_file(source: Path, target: Path) -> None:
    """A copy that shares the disk blocks of the original until either is changed, where the file system can do that.

    Never a hard link: whatever writes into the copy later, mint or not, must not write into the original.
    """
    with source.open("rb") as reading, target.open("xb") as writing:
        try:
            fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
            return
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
    shutil.copyfile(source, target)
