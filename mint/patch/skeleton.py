"""A model directory without its weights: the names and shapes that its configuration promises, and which tensor of
which file holds what. Reads headers and a few kilobytes, so the size of the model does not matter.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mint.errors import ModelError, PatchError
from mint.journal import Write
from mint.model.layout import Slice
from mint.model.saved import Saved, read_saved, safetensors_header

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file."""

    file: str
    key: str
    dtype: str
    """As the header says it: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""


@dataclass(frozen=True)
class Run:
    """Where a row, a column or an entry lies: every `step` bytes from `start`, `run` bytes each."""

    stored: Stored
    start: int
    step: int
    run: int
    count: int

    def write(self, old: bytes, new: bytes) -> Write:
        return Write(self.stored.file, self.start, self.step, self.run, old, new)


def headers(path: Path) -> list[Stored]:
    """The tensors of a safetensors file, from its header. Raises `ModelError` for a damaged file."""
    header, data = safetensors_header(path)
    return [
        Stored(path.name, k, v["dtype"], tuple(v["shape"]), data + v["data_offsets"][0])
        for k, v in header.items()
    ]


@dataclass
class Skeleton:
    """Names and shapes of a model directory's parameters, and where the files hold them."""

    folder: Path
    model: PreTrainedModel
    """On the meta device: no weights."""
    places: dict[str, list[tuple[Stored, int | None]]]
    """Parameter -> the tensors that hold it (several if files hold copies), each with the number of the expert that it is
    of a stacked parameter, or None."""
    parts: dict[str, int] = field(default_factory=dict)
    """Saved name of an expert's tensor -> its place among those that make up the expert's matrix (gate 0, up 1)."""

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        found = self._shapes.get(parameter)
        return None if found is None else tuple(found)

    def __post_init__(self) -> None:
        self._shapes = {n: p.shape for n, p in self.model.named_parameters(remove_duplicate=False)}

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return sorted((n, tuple(s)) for n, s in self._shapes.items())

    def runs(self, where: Slice) -> list[Run]:
        """Every place in the files that holds a slice of a parameter; empty if none does.

        Raises `PatchError` where a file holds it in another shape than the model has.
        """
        shape = self.shape(where.parameter)
        found = self.places.get(where.parameter, [])
        whole = [_run(stored, where, shape) for stored, expert in found if expert is None]
        if where.expert is None or shape is None:
            return whole
        own = [stored for stored, expert in found if expert == where.expert]
        return whole + self._runs_of_expert(own, where, shape[1:])

    def _runs_of_expert(self, own: Sequence[Stored], where: Slice, shape: tuple[int, ...]) -> list[Run]:
        """The same in the tensors of one expert, which files hold one by one, gate and up apart."""
        found = []
        offsets: dict[tuple[str, int], int] = {}
        for part in sorted({self.parts[s.key] for s in own}):
            for stored in (s for s in own if self.parts[s.key] == part):
                before = offsets.get((stored.file, part - 1), 0)
                # Parts lie one behind the other along the first axis of the expert's matrix.
                size = stored.shape[0] if stored.shape else 0
                offsets[stored.file, part] = before + size
                if where.axis != 0:
                    inside = where
                elif before <= where.index < before + size:
                    inside = replace(where, index=where.index - before)
                else:
                    continue
                wanted = (size, *shape[1:]) if stored.shape != shape else shape
                found.append(_run(stored, replace(inside, expert=None), wanted))
        return found

    def rows(self, parameter: str, indices: range | None = None) -> Tensor | None:
        """Rows of a parameter (all of a vector), read from its first place; None if the files do not hold it."""
        at = self.places.get(parameter)
        if not at:
            return None
        stored = at[0][0]
        with safe_open(self.folder / stored.file, framework="pt") as opened:
            piece = opened.get_slice(stored.key)
            if indices is None:
                return piece[:]
            return torch.stack([piece[i] for i in indices])


def _run(stored: Stored, where: Slice, shape: tuple[int, ...] | None) -> Run:
    axis = where.axis if where.expert is None else where.axis + 1
    if shape is None or stored.shape != shape or not where.index < shape[axis]:
        raise PatchError(
            f"{stored.file} holds '{stored.key}' with shape {stored.shape}, expected {shape}; is this the model that the"
            " patch was made on?"
        )
    size = DTYPES[stored.dtype].itemsize if stored.dtype in DTYPES else 0
    if not size:
        raise PatchError(
            f"{stored.file} holds '{stored.key}' as {stored.dtype}, which mint cannot edit; save the model in bfloat16,"
            " and repair that"
        )
    start = stored.start
    if where.expert is not None:
        if not where.expert < shape[0]:
            raise PatchError(
                f"{stored.file} holds {shape[0]} experts in '{stored.key}', asked for {where.expert}"
            )
        shape = shape[1:]
        start += where.expert * prod(shape) * size
    inner = prod(shape[where.axis + 1 :]) * size
    step = shape[where.axis] * inner
    return Run(stored, start + where.index * inner, step, inner, prod(shape[: where.axis]))


def _build(saved: Saved, config: PreTrainedConfig, architecture: str | None) -> PreTrainedModel:
    """The model without weights, as `load_lm` would make it; where that is another class, as the one that a patch names."""
    auto = AutoModelForCausalLM if saved.causal else AutoModelForImageTextToText
    named = getattr(transformers, str(architecture), None)
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=False)
        if architecture in (None, type(model).__name__):
            return model
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            return named(config)
    return model


def read(folder: Path, architecture: str | None = None) -> Skeleton:
    """The skeleton of a saved model. architecture: class name that a patch was made on, where it differs.

    Raises `ModelError` for what `read_saved` refuses.
    """
    saved = read_saved(str(folder))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = _build(saved, config, architecture)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        text = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{folder}: no '{saved.family}' model can be made from its config.json ({text}); copy the config.json that belongs to"
            " the weights"
        ) from None
    converters = get_model_conversion_mapping(model)
    renamings = [c for c in converters if isinstance(c, WeightRenaming)]
    stackings = [c for c in converters if isinstance(c, WeightConverter)]
    known = {n: True for n, _ in model.named_parameters(remove_duplicate=False)}
    known |= {n: True for n, _ in model.named_buffers()}
    places: dict[str, list[tuple[Stored, int | None]]] = {}
    parts: dict[str, int] = {}
    for file in safetensors_files(saved):
        for stored in headers(folder / file):
            name, stacked = rename_source_key(
                stored.key, renamings, stackings, getattr(model, "base_model_prefix", None), known
            )
            expert, number = _EXPERT.search(stored.key), None
            if stacked and expert:
                number = int(expert.group(1))
                sources = next(c.source_patterns for c in stackings if stacked in c.source_patterns)
                parts[stored.key] = list(sources).index(stacked)
            places.setdefault(name, []).append((stored, number))
    return Skeleton(folder, model, places, parts)


def safetensors_files(saved: Saved) -> list[str]:
    """Names of a model directory's safetensors files, whether or not an index lists them; [] if it is read from others."""
    if not all(n.endswith(".safetensors") for n in saved.weights):
        return []
    names = [*saved.weights, *(n for n in saved.unread if n.endswith(".safetensors"))]
    if bad := [n for n in names if Path(n).name != n]:
        raise ModelError(
            f"{saved.name}: its index names a file elsewhere ({bad[0]!r}); fetch the model again"
        )
    return sorted(names)
