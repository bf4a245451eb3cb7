"""Patches as LoRA adapters for other software: peft (and whatever reads its format), mlx-lm and llama.cpp.

Changing column j of a matrix, or row j of one, is a change of rank one: the adapter holds the difference itself and a
one-hot vector, so it is exact up to the rounding of old + (new - old). Nothing here needs the model in memory: patches
that `mint repair` wrote carry the names of their weights in `base["layout"]`.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from mint.errors import PatchError
from mint.files import write_file
from mint.model.layout import Block, Rows
from mint.patch import NeuronEdit, Patch
from mint.patch.names import block_of

_GGUF_NAMES = {
    # transformers' model_type -> llama.cpp's architecture, where the two differ
    "mistral": "llama",
    "gpt_neox": "gptneox",
    "gpt_bigcode": "starcoder",
    "llama4_text": "llama4",
    "gemma3_text": "gemma3",
    "qwen3_5_text": "qwen35",
}


@dataclass(frozen=True)
class LowRank:
    """The change of one linear map: W_new - W_old = b @ a, with W of shape [outputs, inputs]."""

    a: Tensor
    """[rank, inputs] float32."""
    b: Tensor
    """[outputs, rank] float32."""
    transposed: bool
    """Whether the module stores W as [inputs, outputs] (`Conv1D`)."""


def low_rank_changes(patch: Patch, layout: Mapping | None = None) -> dict[str, LowRank]:
    """Module name -> change, for every linear map the patch touches; weights that do not change are left out.

    layout: what `describe` gave; default the patch's own. Raises `PatchError` for changed biases (an adapter has none).
    """
    layout = layout if layout is not None else patch.base.get("layout") or {}
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    transposed: dict[str, bool] = {}
    for edit in patch.edits:
        if edit.expert is not None:
            raise PatchError(
                f"{edit.where} belongs to a routed expert, for which no adapter is written yet; use mint apply on the files"
            )
        block = block_of(layout, edit.layer)
        for role in edit.after:
            delta = edit.after[role].float() - edit.before[role].float()
            if not delta.any():
                continue
            if role.endswith("_bias"):
                raise PatchError(
                    f"{edit.where}: the patch changes a bias, which a LoRA adapter cannot hold; use `mint apply` to"
                    " write the patched model instead"
                )
            module, pair = _rank_one(block, edit, role, delta)
            transposed[module] = (block.out_axis == 0) if role == "out" else _rows(block, role).axis == 1
            parts.setdefault(module, []).append(pair)
    return {
        module: LowRank(
            torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs], 1), transposed[module]
        )
        for module, pairs in sorted(parts.items())
    }


def _rows(block: Block, role: str) -> Rows:
    rows = block.gate if role.startswith("gate") else block.up
    if rows is None:
        raise PatchError(
            f"the patch edits '{role}' weights, which a plain block has not; give the right --model"
        )
    return rows


def _one_hot(index: int, size: int, where: str) -> Tensor:
    if index >= size:
        raise PatchError(f"{where}: the layer has neurons 0 to {size - 1}; give the model it was made on")
    vector = torch.zeros(size)
    vector[index] = 1.0
    return vector


def _rank_one(block: Block, edit: NeuronEdit, role: str, delta: Tensor) -> tuple[str, tuple[Tensor, Tensor]]:
    """(module, (a [inputs], b [outputs])) of one changed row or column."""
    if role == "out":
        return block.out, (_one_hot(edit.index, block.d_ff, edit.where), delta)
    rows = _rows(block, role)
    fused = block.up is not None and block.up.module == block.gate.module
    units = 2 * block.d_ff if fused else block.d_ff
    return rows.module, (delta, _one_hot(rows.unit(edit.index), units, edit.where))


def _padded(changes: Mapping[str, LowRank]) -> tuple[int, dict[str, LowRank]]:
    """All changes at the largest rank, padded with zeros: serving software wants one rank for all modules."""
    rank = max(c.a.shape[0] for c in changes.values())
    return rank, {
        module: LowRank(
            torch.cat([c.a, torch.zeros(rank - c.a.shape[0], c.a.shape[1])]),
            torch.cat([c.b, torch.zeros(c.b.shape[0], rank - c.b.shape[1])], 1),
            c.transposed,
        )
        for module, c in changes.items()
    }


def _changes(patch: Patch, layout: Mapping | None) -> tuple[int, dict[str, LowRank]]:
    changes = low_rank_changes(patch, layout)
    if not changes:
        raise PatchError(
            "the patch changes nothing (was it scaled by 0?), so there is nothing to export; export it unscaled"
        )
    return _padded(changes)


# ---------------------------------------------------------------------- formats


def to_peft(patch: Patch, out: str | Path, *, layout: Mapping | None = None, force: bool = False) -> Path:
    """Write a directory that `PeftModel.from_pretrained(model, out)` loads; returns it.

    layout: what `describe` gave; default the patch's own. Scaling is 1 (alpha = rank). The model stays in its dtype, the
    adapter is float32. Raises `PatchError` if `out` exists (without `force`) or a bias changes.
    """
    rank, changes = _changes(patch, layout)
    kinds = {c.transposed for c in changes.values()}
    if len(kinds) > 1:
        raise PatchError(
            "the model mixes transposed and plain linear maps, which one adapter cannot hold; use 'mint apply --out'"
        )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": patch.base.get("name"),
        "revision": patch.base.get("revision"),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": kinds.pop(),
        "target_modules": sorted(changes),
        "inference_mode": True,
    }
    tensors = {}
    for module, change in changes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = change.a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = change.b.contiguous()
    files = {
        "adapter_config.json": json.dumps(config, indent=2, sort_keys=True) + "\n",
        "adapter_model.safetensors": save_tensors(tensors, {"format": "pt"}),
    }
    return _write_folder(Path(out), files, force)


def _write_folder(out: Path, files: Mapping[str, str | bytes], force: bool) -> Path:
    """Write a folder whole or not at all."""
    if out.exists() and not force:
        raise PatchError(f"{out} exists; give another name, or --force to replace it")
    if out.exists() and not (out.is_dir() and all(p.name in files for p in out.iterdir())):
        raise PatchError(
            f"{out} holds something else than an exported adapter; remove it yourself, or give another name"
        )
    try:
        making = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise PatchError(f"cannot write {out} ({error.strerror}); nothing was written there") from None
    try:
        for name, data in files.items():
            write_file(making / name, data)
        making.chmod(0o755)
        if out.exists():
            old = making.with_name(making.name + ".old")
            out.rename(old)
            making.rename(out)
            shutil.rmtree(old)
        else:
            making.rename(out)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return out


def to_mlx(patch: Patch, out: str | Path, *, layout: Mapping | None = None, force: bool = False) -> Path:
    """Write a directory that mlx-lm takes as `--adapter-path`; returns it.

    layout: as for `to_peft`. Scale is 1; layers from the lowest that the patch touches up get an adapter, zero where the
    patch changes nothing. Raises `PatchError` as `to_peft` does, and for maps that lie in no numbered layer.
    """
    rank, changes = _changes(patch, layout)
    layout = layout if layout is not None else patch.base["layout"]
    tensors, keys, lowest = {}, set(), layout["layers"]
    for module, change in changes.items():
        found = re.search(r"\.(\d+)\.(.+)$", module)
        if found is None:
            raise PatchError(
                f"'{module}' lies in no numbered layer, so mlx-lm cannot place it; use --format peft"
            )
        lowest = min(lowest, int(found.group(1)))
        keys.add(found.group(2))
        tensors[f"{module}.lora_a"] = change.a.T.contiguous()
        tensors[f"{module}.lora_b"] = change.b.T.contiguous()
    config = {
        "fine_tune_type": "lora",
        "num_layers": layout["layers"] - lowest,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    files = {
        "adapter_config.json": json.dumps(config, indent=2, sort_keys=True) + "\n",
        "adapters.safetensors": save_tensors(tensors, {"format": "mlx"}),
    }
    return _write_folder(Path(out), files, force)


def to_gguf_lora(
    patch: Patch,
    out: str | Path,
    *,
    layout: Mapping | None = None,
    force: bool = False,
    trigger: Sequence[int] = (),
) -> Path:
    """Write an adapter file in llama.cpp's format (`llama-cli --lora FILE`); returns its path.

    trigger: token ids after which alone the adapter acts (`adapter.alora.invocation_tokens`); none: it always acts.

    The difference is exact; a base that llama.cpp holds quantised is not the model that was repaired, so generate once
    there before trusting it. Raises `PatchError` if llama.cpp knows no such architecture.
    """
    import gguf

    rank, changes = _changes(patch, layout)
    layout = layout if layout is not None else patch.base["layout"]
    model_type = str(layout.get("model_type"))
    name = _GGUF_NAMES.get(model_type, model_type)
    arch = next((a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == name), None)
    if arch is None:
        raise PatchError(
            f"llama.cpp has no architecture for model type '{model_type}'; use --format peft, or `mint apply`"
        )
    names = gguf.get_tensor_name_map(arch, layout["layers"])
    tensors: dict[str, np.ndarray] = {}
    for module, change in changes.items():
        # A text model inside a wrapper has one more name in front; llama.cpp keeps the vision tower in another file.
        plain = module.replace("language_model.", "")
        target = names.get_name(f"{plain}.weight", try_suffixes=(".weight",))
        if target is None:
            raise PatchError(
                f"llama.cpp has no tensor for '{module}' of architecture '{name}'; use --format peft, or `mint apply`"
            )
        tensors[f"{target}.lora_a"] = change.a.numpy()
        tensors[f"{target}.lora_b"] = np.ascontiguousarray(change.b.numpy())
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "adapter.gguf"
        writer = gguf.GGUFWriter(draft, name)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(rank))
        if trigger:
            writer.add_array("adapter.alora.invocation_tokens", [int(t) for t in trigger])
        for key, value in tensors.items():
            writer.add_tensor(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return write_file(out, draft.read_bytes(), force=force)
