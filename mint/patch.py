"""A patch: the old and new weights of a few neurons, and where they came from. Apply, revert, compose, scale, save.

The only module that writes model weights. Weights are copied, never added or subtracted, so that reverting gives
back every bit; everything is checked before anything is written.
"""

import json
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mint.errors import PatchError
from mint.layout import Slice
from mint.lm import LM

FORMAT = 1
KINDS = ("value", "rewrite")
ROLES = ("out", "gate", "up", "gate_bias", "up_bias")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_BYTES = 256 << 20
"""A patch of two neurons is a few kilobytes; anything this large is no patch."""


@dataclass(frozen=True)
class NeuronEdit:
    """The change of one neuron. `value`: what it writes (role `out`). `rewrite`: also when it fires (input rows)."""

    layer: int
    index: int
    kind: str
    before: dict[str, Tensor]
    """Role -> weights before, [d_model] for rows and columns, [] for biases."""
    after: dict[str, Tensor]

    @property
    def where(self) -> str:
        return f"layer {self.layer}, neuron {self.index}"


@dataclass(frozen=True)
class Patch:
    """Edits of neurons of one model, with what is needed to trust them."""

    edits: tuple[NeuronEdit, ...]
    base: dict = field(default_factory=dict)
    """Identity of the model: name, revision, fingerprint, tokenizer, dtype."""
    info: dict = field(default_factory=dict)
    """Cases repaired, settings, measured results, versions: JSON values, for people and audits."""

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.edits[0].after.values())).dtype


def identity(lm: LM) -> dict:
    """What a patch remembers of the model it was made on."""
    return {
        "name": lm.name,
        "revision": lm.revision,
        "fingerprint": lm.fingerprint,
        "tokenizer": lm.tokenizer_hash,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "architecture": type(lm.model).__name__,
    }


def versions() -> dict:
    """Versions of what made a patch."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


# ---------------------------------------------------------------------- weights


def _view(lm: LM, where: Slice) -> Tensor:
    return lm.parameter(where.parameter).data.select(where.axis, where.index)


def read_neuron(lm: LM, layer: int, index: int, roles: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Copies (on CPU) of a neuron's present weights by role; all roles by default."""
    slices = lm.block(layer).slices(index)
    return {r: _view(lm, s).detach().cpu().clone() for r, s in slices.items() if roles is None or r in roles}


def make_edit(lm: LM, layer: int, index: int, after: dict[str, Tensor]) -> NeuronEdit:
    """An edit from the present weights to `after`, rounded to the model's dtype."""
    before = read_neuron(lm, layer, index, tuple(after))
    rounded = {role: after[role].detach().cpu().to(before[role].dtype).clone() for role in before}
    return NeuronEdit(layer, index, "value" if set(after) == {"out"} else "rewrite", before, rounded)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def check(lm: LM, patch: Patch, side: str) -> None:
    """Raise `PatchError` unless every edit fits the model and the present weights equal the edit's `side`.

    side: `before` (about to apply) or `after` (about to revert).
    """
    _check_model(lm, patch)
    for edit in patch.edits:
        _check_place(lm, edit)
    moved = [e for e in patch.edits if not _is_at(lm, e, side)]
    if not moved:
        return
    other = "after" if side == "before" else "before"
    if all(_is_at(lm, e, other) for e in patch.edits):
        if side == "before":
            raise PatchError("the patch is already applied to this model; revert it first, or leave it")
        raise PatchError(
            "the patch is not applied to this model, so there is nothing to revert; apply it first"
        )
    raise PatchError(
        f"{moved[0].where}: the present weights differ from the patch's '{side}'; another edit changed this neuron:"
        " use the model that the patch was made on, or revert the other patch first"
    )


def _check_model(lm: LM, patch: Patch) -> None:
    base = patch.base
    dtype = str(lm.dtype).removeprefix("torch.")
    if base.get("dtype") and base["dtype"] != dtype:
        raise PatchError(
            f"the patch was made in {base['dtype']}, the model is in {dtype}; load it with --dtype {base['dtype']}, or"
            f" repair again in {dtype}"
        )
    if base.get("fingerprint") and base["fingerprint"] != lm.fingerprint:
        revision = f" revision {base['revision']}" if base.get("revision") else ""
        present = f" revision {lm.revision}" if lm.revision else ""
        raise PatchError(
            f"the patch was made on another model ({base.get('name')}{revision}, fingerprint"
            f" {base['fingerprint'][:12]}), this is {lm.name}{present} ({lm.fingerprint[:12]}); use the model it was"
            " made on"
        )
    if base.get("tokenizer") and base["tokenizer"] != lm.tokenizer_hash:
        raise PatchError(
            f"the patch was made with another tokenizer ({base['tokenizer'][:12]}), this one is"
            f" {lm.tokenizer_hash[:12]}; use the tokenizer it was made with"
        )


def _check_place(lm: LM, edit: NeuronEdit) -> None:
    if edit.layer >= lm.n_layers:
        raise PatchError(f"the patch edits layer {edit.layer}, the model has layers 0 to {lm.n_layers - 1}")
    block = lm.block(edit.layer)
    if edit.index >= block.d_ff:
        raise PatchError(f"the patch edits {edit.where}, the layer has neurons 0 to {block.d_ff - 1}")
    slices = block.slices(edit.index)
    unknown = [role for role in edit.after if role not in slices]
    if unknown:
        raise PatchError(
            f"{edit.where} has no '{unknown[0]}' weights in this model; it has {', '.join(slices)}"
        )
    for role, value in edit.after.items():
        shape = tuple(_view(lm, slices[role]).shape)
        if tuple(value.shape) != shape:
            raise PatchError(f"{edit.where}: '{role}' has shape {tuple(value.shape)}, the model has {shape}")


def _is_at(lm: LM, edit: NeuronEdit, side: str) -> bool:
    slices = lm.block(edit.layer).slices(edit.index)
    return all(_same_bits(_view(lm, slices[r]).detach().cpu(), v) for r, v in getattr(edit, side).items())


def _copy(lm: LM, patch: Patch, side: str) -> None:
    for edit in patch.edits:
        slices = lm.block(edit.layer).slices(edit.index)
        for role, value in getattr(edit, side).items():
            _view(lm, slices[role]).copy_(value)


@torch.no_grad()
def _switch(lm: LM, patch: Patch, present: str, wanted: str) -> None:
    check(lm, patch, present)
    try:
        _copy(lm, patch, wanted)
    except BaseException:  # Ctrl-C included: never leave half an edit
        _copy(lm, patch, present)
        raise


def apply(lm: LM, patch: Patch) -> None:
    """Write the patch into the model. Raises `PatchError`, nothing changed, unless the weights equal `before`."""
    _switch(lm, patch, "before", "after")


def revert(lm: LM, patch: Patch) -> None:
    """Give back every bit. Raises `PatchError`, nothing changed, unless the weights equal `after`."""
    _switch(lm, patch, "after", "before")


@contextmanager
def applied(lm: LM, patch: Patch) -> Iterator[LM]:
    """Within: the patch is in the model; afterwards, whatever happened, it is out again bit for bit."""
    apply(lm, patch)
    try:
        yield lm
    finally:
        revert(lm, patch)


# ---------------------------------------------------------------------- algebra


def compose(patches: Sequence[Patch]) -> Patch:
    """One patch that does what applying the patches in order does.

    A neuron edited twice is merged if the later edit starts where the earlier ends; else `PatchError` names it.
    """
    merged: dict[tuple[int, int], NeuronEdit] = {}
    first = patches[0]
    for number, patch in enumerate(patches, start=1):
        for key in ("fingerprint", "tokenizer", "dtype"):
            if patch.base.get(key) != first.base.get(key):
                raise PatchError(
                    f"patch {number} was made for another {'model' if key == 'fingerprint' else key} than patch 1"
                    f" ({patch.base.get(key)} and {first.base.get(key)}); compose patches of one model"
                )
        for edit in patch.edits:
            key = (edit.layer, edit.index)
            merged[key] = _chain(merged[key], edit) if key in merged else edit
    infos = [p.info for p in patches]
    info = {
        "cases": [c for i in infos for c in i.get("cases", [])],
        "composed_from": infos,
        "versions": versions(),
    }
    return Patch(tuple(merged[k] for k in sorted(merged)), first.base, info)


def _chain(earlier: NeuronEdit, later: NeuronEdit) -> NeuronEdit:
    before, after = dict(earlier.before), dict(earlier.after)
    for role, value in later.before.items():
        if role in after and not _same_bits(after[role], value):
            raise PatchError(
                f"{earlier.where} is edited by two patches, and the later does not start where the earlier ends; make"
                " the second repair on the model with the first patch applied"
            )
        before.setdefault(role, value)
    after.update(later.after)
    kind = "rewrite" if "rewrite" in (earlier.kind, later.kind) else "value"
    return NeuronEdit(earlier.layer, earlier.index, kind, before, after)


def scale(patch: Patch, factor: float) -> Patch:
    """The same patch with its effect scaled: 0 changes nothing, 1 is the patch, 2 pushes twice as hard.

    A value edit scales the change of the column. A rewrite keeps when the neuron fires and scales what it writes;
    at 0 the old neuron stays.
    """
    if factor != factor or abs(factor) == float("inf"):
        raise PatchError(f"the factor must be a finite number, found {factor}")
    return replace(
        patch,
        edits=tuple(_scaled(edit, factor) for edit in patch.edits),
        info=patch.info | {"scaled": patch.info.get("scaled", 1.0) * factor},
    )


def _scaled(edit: NeuronEdit, factor: float) -> NeuronEdit:
    if factor == 0:
        return replace(edit, after=dict(edit.before))
    if factor == 1:
        return edit
    after = dict(edit.after)
    old, new = edit.before["out"], edit.after["out"]
    start = old.float() if edit.kind == "value" else torch.zeros_like(old, dtype=torch.float32)
    after["out"] = (start + factor * (new.float() - start)).to(new.dtype)
    if not torch.isfinite(after["out"]).all():
        raise PatchError(f"{edit.where}: factor {factor} overflows {new.dtype}; use a smaller factor")
    return replace(edit, after=after)


# ---------------------------------------------------------------------- file


def to_bytes(patch: Patch) -> bytes:
    """The patch as one safetensors file: tensors `LAYER.INDEX.before|after.ROLE`, JSON under the key `mint`."""
    tensors = {
        f"{e.layer}.{e.index}.{side}.{role}": value.contiguous().clone()
        for e in patch.edits
        for side in ("before", "after")
        for role, value in getattr(e, side).items()
    }
    header = {
        "format": FORMAT,
        "edits": [{"layer": e.layer, "index": e.index, "kind": e.kind} for e in patch.edits],
        "base": patch.base,
        "info": patch.info,
    }
    return save_tensors(tensors, {"mint": json.dumps(header, sort_keys=True, ensure_ascii=True)})


def from_bytes(data: bytes, where: str = "patch") -> Patch:
    """Read a patch and check it as if a stranger had made it. Raises `PatchError` saying what is wrong."""
    header = _header(data, where)
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise PatchError(
            f"{where}: damaged ({' '.join(str(error).split())}); make or fetch the patch again"
        ) from None
    listed = header.get("edits")
    if not isinstance(listed, list) or not listed:
        raise PatchError(f"{where}: lists no edits; make or fetch the patch again")
    places: set[tuple[int, int]] = set()
    for item in listed:
        place = _place(item, where)
        if place in places:
            raise PatchError(
                f"{where}: layer {place[0]}, neuron {place[1]} is listed twice; a patch names a neuron once"
            )
        places.add(place)
    edits = tuple(_edit(item, tensors, where) for item in listed)
    if tensors:
        raise PatchError(f"{where}: holds a tensor '{min(tensors)}' that belongs to no listed edit")
    dtypes = {v.dtype for e in edits for side in (e.before, e.after) for v in side.values()}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        raise PatchError(
            f"{where}: weights must share one of float32, bfloat16, float16; found {sorted(map(str, dtypes))}"
        )
    base, info = header.get("base"), header.get("info")
    if not isinstance(base, dict) or not isinstance(info, dict):
        raise PatchError(
            f"{where}: 'base' and 'info' of its header must be objects; make or fetch the patch again"
        )
    return Patch(edits, base, info)


def _header(data: bytes, where: str) -> dict:
    size = int.from_bytes(data[:8], "little") if len(data) >= 8 else -1
    if not 2 <= size <= len(data) - 8:
        raise PatchError(
            f"{where}: not a patch file, or cut short ({len(data)} bytes); make or fetch the patch again"
        )
    try:
        outer = json.loads(data[8 : 8 + size])
        header = json.loads(outer["__metadata__"]["mint"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PatchError(
            f"{where}: not a patch of mint (no readable 'mint' header); give a file that mint wrote"
        ) from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise PatchError(
            f"{where}: format version {found!r}, this mint reads {FORMAT}; use the mint that wrote it"
        )
    return header


def _place(item: object, where: str) -> tuple[int, int]:
    """(layer, index) of a listed edit."""
    numbers = [item.get(k) for k in ("layer", "index")] if isinstance(item, dict) else [None]
    if not all(type(n) is int and n >= 0 for n in numbers) or item.get("kind") not in KINDS:
        raise PatchError(
            f"{where}: an edit needs layer and index >= 0 and kind {' or '.join(KINDS)}; found {item!r}"[:300]
        )
    return numbers[0], numbers[1]


def _edit(item: dict, tensors: dict[str, Tensor], where: str) -> NeuronEdit:
    """Take one listed edit's tensors out of `tensors`."""
    layer, index = item["layer"], item["index"]
    sides: dict[str, dict[str, Tensor]] = {"before": {}, "after": {}}
    for side, found in sides.items():
        for role in ROLES:
            value = tensors.pop(f"{layer}.{index}.{side}.{role}", None)
            if value is not None:
                found[role] = value
    place = f"{where}: layer {layer}, neuron {index}"
    if set(sides["before"]) != set(sides["after"]) or "out" not in sides["after"]:
        raise PatchError(f"{place}: 'before' and 'after' must hold the same weights, 'out' among them")
    if (item["kind"] == "value") != (set(sides["after"]) == {"out"}):
        raise PatchError(f"{place}: a value edit holds 'out' alone, a rewrite the input rows too")
    for side, found in sides.items():
        for role, value in found.items():
            if value.shape != sides["before"][role].shape or value.dim() != (
                0 if role.endswith("bias") else 1
            ):
                raise PatchError(f"{place}: '{side}.{role}' has shape {tuple(value.shape)}")
            if not value.is_floating_point() or not torch.isfinite(value.float()).all():
                raise PatchError(f"{place}: '{side}.{role}' holds values that are no finite numbers")
    return NeuronEdit(layer, index, item["kind"], sides["before"], sides["after"])


def write_file(path: str | Path, data: bytes | str, *, force: bool = False) -> Path:
    """Write a file whole or not at all: temporary file beside it, fsync, rename.

    Raises `PatchError` if it exists (without `force`), or cannot be written (disk full, no such folder).
    """
    path = Path(path)
    if path.exists() and not force:
        raise PatchError(f"{path} exists; give another name, or --force to replace it")
    raw = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise PatchError(f"cannot write {path} ({error.strerror}); nothing was written there") from None
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
    return path


def save(patch: Patch, path: str | Path, *, force: bool = False) -> Path:
    """Write a patch file. Raises `PatchError` as `write_file` does."""
    return write_file(path, to_bytes(patch), force=force)


def load(path: str | Path) -> Patch:
    """Read and check a patch file. Raises `PatchError`."""
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise PatchError(
                f"{path}: {path.stat().st_size} bytes is no patch of a few neurons; give a patch file"
            )
        data = path.read_bytes()
    except OSError as error:
        raise PatchError(f"{path}: cannot be read ({error.strerror}); give a patch file") from None
    return from_bytes(data, str(path))
