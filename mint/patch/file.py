"""The patch file: one safetensors file with a JSON header. Whatever a stranger made is checked before it is believed."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mint import __version__
from mint.errors import PatchError
from mint.files import write_file
from mint.patch.edit import KINDS, ROLES, NeuronEdit, Patch

FORMAT = 2
"""What this mint writes. 1: without `mint` and `spare`; read for ever."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_BYTES = 256 << 20
"""A patch of two neurons is a few kilobytes; anything this large is no patch."""


def to_bytes(patch: Patch) -> bytes:
    """The patch as one safetensors file: tensors `LAYER.INDEX.before|after.ROLE` (`LAYER.eEXPERT.INDEX...` for a
    neuron of a routed expert), JSON under the key `mint`."""
    tensors = {
        f"{_name(e.layer, e.expert, e.index)}.{side}.{role}": value.contiguous().clone()
        for e in patch.edits
        for side in ("before", "after")
        for role, value in getattr(e, side).items()
    }
    header = {
        "format": FORMAT,
        "mint": __version__,
        "edits": [e.named() for e in patch.edits],
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
    places: set[tuple[int, int | None, int]] = set()
    for item in listed:
        place = _place(item, where)
        if place in places:
            raise PatchError(f"{where}: {_where(*place)} is listed twice; a patch names a neuron once")
        places.add(place)
    edits = tuple(_edit(item, tensors, where) for item in listed)
    if tensors:
        raise PatchError(
            f"{where}: holds a tensor '{min(tensors)}' that belongs to no listed edit; make the patch again"
        )
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
    if not isinstance(header, dict) or header.get("format") not in range(1, FORMAT + 1):
        found = header.get("format") if isinstance(header, dict) else None
        raise PatchError(
            f"{where}: format version {found!r}, this mint reads 1 to {FORMAT}; use the mint that wrote it"
        )
    return header


def _name(layer: int, expert: int | None, index: int) -> str:
    return f"{layer}.{index}" if expert is None else f"{layer}.e{expert}.{index}"


def _where(layer: int, expert: int | None, index: int) -> str:
    return f"layer {layer}, {'' if expert is None else f'expert {expert}, '}neuron {index}"


def _place(item: object, where: str) -> tuple[int, int | None, int]:
    """(layer, expert, index) of a listed edit."""
    wanted = {"layer", "index"} | ({"expert"} if isinstance(item, dict) and "expert" in item else set())
    listed = item if isinstance(item, dict) else {}
    numbers = {k: n for k in wanted if type(n := listed.get(k)) is int and n >= 0}
    if numbers.keys() != wanted or listed.get("kind") not in KINDS:
        raise PatchError(
            f"{where}: an edit needs layer and index >= 0 and kind {' or '.join(KINDS)}; found {item!r}"[:300]
        )
    return numbers["layer"], numbers.get("expert"), numbers["index"]


def _edit(item: dict, tensors: dict[str, Tensor], where: str) -> NeuronEdit:
    """Take one listed edit's tensors out of `tensors`."""
    layer, index, expert = item["layer"], item["index"], item.get("expert")
    sides: dict[str, dict[str, Tensor]] = {"before": {}, "after": {}}
    for side, found in sides.items():
        for role in ROLES:
            value = tensors.pop(f"{_name(layer, expert, index)}.{side}.{role}", None)
            if value is not None:
                found[role] = value
    place = f"{where}: {_where(layer, expert, index)}"
    if set(sides["before"]) != set(sides["after"]) or "out" not in sides["after"]:
        raise PatchError(
            f"{place}: 'before' and 'after' must hold the same weights, 'out' among them; make the patch again"
        )
    if (item["kind"] == "value") != (set(sides["after"]) == {"out"}):
        raise PatchError(
            f"{place}: a value edit holds 'out' alone, a rewrite the input rows too; make the patch again"
        )
    for side, found in sides.items():
        for role, value in found.items():
            if value.shape != sides["before"][role].shape or value.dim() != (
                0 if role.endswith("bias") else 1
            ):
                raise PatchError(f"{place}: '{side}.{role}' has shape {tuple(value.shape)}")
            if not value.is_floating_point() or not torch.isfinite(value.float()).all():
                raise PatchError(
                    f"{place}: '{side}.{role}' holds values that are no finite numbers; make the patch again"
                )
    return NeuronEdit(layer, index, item["kind"], sides["before"], sides["after"], expert)


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
