"""Statistics of a model on reference text: what a layer's inputs and neurons look like when nothing is wrong.

The text ships with mint (`data/reference/`, written for it); users add their own. Results are cached per model and
keyed by all they depend on. Knows nothing about faults.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mint.errors import PatchError
from mint.files import write_file
from mint.model.hooks import record, record_block_inputs
from mint.model.lm import LM
from mint.model.loading import cache_dir
from mint.reference.texts import WINDOW, passages, reference_lines, reference_texts

_VERSION = 5
SAMPLE_DEPTHS = (0.8, 0.9, 0.67, 0.5)
"""Layers, as shares of all, whose single inputs are kept too: where the solver edits, in the order it tries them."""
SAMPLE_TOKENS = 8192
"""Most single inputs kept a layer, evenly spaced over the passages; all those of the single lines come on top."""


@dataclass(frozen=True)
class Statistics:
    """Second moments over all tokens of the reference text, per layer. float32 on CPU."""

    tokens: int
    inputs_second: list[Tensor]
    """C = E[x x'] of block inputs, [d_model, d_model] a layer."""
    inputs_mean: list[Tensor]
    """mu = E[x], [d_model] a layer."""
    neurons_mean: list[Tensor]
    """E[n], [d_ff] a layer, without the first token of each passage, where models park outliers a thousand times larger
    than anything behind it: with them the mean is no typical value."""
    neurons_square: list[Tensor]
    """E[n^2], [d_ff] a layer."""
    sample: dict[int, Tensor]
    """Single block inputs of the layers of `sample_layers`, layer -> [tokens kept, d_model], float16."""
    key: str


def sample_layers(lm: LM) -> list[int]:
    """The layers of `SAMPLE_DEPTHS` in this model, without repeats, in order of preference."""
    layers = [min(lm.n_layers - 1, int(depth * lm.n_layers)) for depth in SAMPLE_DEPTHS]
    return list(dict.fromkeys(layers))


_MEMO: "WeakKeyDictionary[nn.Module, dict[tuple, Statistics]]" = WeakKeyDictionary()


def statistics(
    lm: LM, extra: Sequence[str | Path] = (), say: Callable[[str], None] = lambda _: None, cache: bool = True
) -> Statistics:
    """Statistics of the model on the reference text; from the cache if they are there.

    extra: the user's own text files. One forward a passage; memory is one d_model x d_model matrix a layer.
    """
    texts = reference_texts(extra)
    # Edits of a few neurons hardly move these averages: a live model is measured once, not again after each repair.
    memo = _MEMO.setdefault(lm.model, {})
    place = (tuple(texts), lm.dtype)
    if place not in memo:
        memo[place] = _cached(lm, texts, say, cache)
    return memo[place]


def _cached(lm: LM, texts: Sequence[str], say: Callable[[str], None], cache: bool) -> Statistics:
    key = reference_key(lm, texts)
    path = cache_dir() / "statistics" / f"{key}.safetensors"
    if cache and path.exists():
        try:
            return _unpack(load_file(path), key)
        except Exception:  # a damaged cache file is made again, whatever is wrong with it
            path.unlink(missing_ok=True)
    say("measuring the model on reference text (once per model)")
    found = _measure(lm, passages(lm, texts), passages(lm, reference_lines()), key)
    if cache:
        _store(path, found)
    return found


def reference_key(lm: LM, texts: Sequence[str]) -> str:
    """SHA-256 of all that statistics of the model on these texts depend on."""
    digest = hashlib.sha256()
    digest.update(
        json.dumps([_VERSION, WINDOW, lm.fingerprint, str(lm.dtype), lm.tokenizer_hash, texts]).encode()
    )
    digest.update(json.dumps(reference_lines()).encode())
    # Edits change the statistics of later layers: the weights that mint edits belong to the key.
    for block in lm.layout.blocks:
        weight = lm.parameter(f"{block.out}.weight").detach()
        digest.update(weight.float().sum(dim=block.out_axis, dtype=torch.float64).cpu().numpy().tobytes())
    return digest.hexdigest()


def _batches(sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[Sequence[int]], Tensor]]:
    """Sequences of like length together, and which places of the padded batch are real tokens, bool."""
    order = sorted(sequences, key=len)
    while order:
        batch = [order.pop()]
        while order and (len(batch) + 1) * len(batch[0]) <= 1536:
            batch.append(order.pop())
        real = torch.zeros(len(batch), len(batch[0]), dtype=torch.bool)
        for row, ids in enumerate(batch):
            real[row, : len(ids)] = True
        yield batch, real


@torch.no_grad()
def _measure(
    lm: LM, sequences: Sequence[Sequence[int]], lines: Sequence[Sequence[int]], key: str
) -> Statistics:
    layers = range(lm.n_layers)
    sums = {
        "inputs_second": [torch.zeros(b.d_model, b.d_model, dtype=torch.float64) for b in lm.layout.blocks],
        "inputs_mean": [torch.zeros(b.d_model, dtype=torch.float64) for b in lm.layout.blocks],
        "neurons_mean": [torch.zeros(b.d_ff, dtype=torch.float64) for b in lm.layout.blocks],
        "neurons_square": [torch.zeros(b.d_ff, dtype=torch.float64) for b in lm.layout.blocks],
    }
    samples: dict[int, list[Tensor]] = {layer: [] for layer in sample_layers(lm)}
    tokens = inner_tokens = 0
    for batch, real in _batches(sequences):
        inner = real.clone()
        inner[:, 0] = False
        tokens += int(real.sum())
        inner_tokens += int(inner.sum())
        with record(lm) as neurons, record_block_inputs(lm) as inputs:
            lm.logits(batch, [[0] for _ in batch])
        for layer in layers:
            x = inputs[layer][real.to(inputs[layer].device)].float()
            n = neurons[layer][real.to(neurons[layer].device)].float()
            sums["inputs_second"][layer] += (x.T @ x).double().cpu()
            if layer in samples:
                samples[layer].append(x.half().cpu())
            sums["inputs_mean"][layer] += x.sum(0).double().cpu()
            at = inner.to(neurons[layer].device)
            sums["neurons_mean"][layer] += neurons[layer][at].float().sum(0).double().cpu()
            sums["neurons_square"][layer] += n.square().sum(0).double().cpu()
    kept = {layer: [_thin(torch.cat(parts))] for layer, parts in samples.items()}
    for batch, real in _batches(lines):
        with record_block_inputs(lm, list(kept)) as inputs:
            lm.logits(batch, [[0] for _ in batch])
        for layer, parts in kept.items():
            parts.append(inputs[layer][real.to(inputs[layer].device)].half().cpu())
    count = dict.fromkeys(sums, max(tokens, 1)) | {"neurons_mean": max(inner_tokens, 1)}
    means = {name: [(s / count[name]).float() for s in values] for name, values in sums.items()}
    return Statistics(
        tokens, **means, sample={layer: torch.cat(parts) for layer, parts in kept.items()}, key=key
    )


def _thin(rows: Tensor) -> Tensor:
    return rows[:: max(1, -(-len(rows) // SAMPLE_TOKENS))].contiguous()


_FIELDS = ("inputs_second", "inputs_mean", "neurons_mean", "neurons_square")


def store_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to the cache, whole or not at all; a cache that cannot be written costs time, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, save(tensors), force=True)
    except (OSError, PatchError):
        pass


def _store(path: Path, found: Statistics) -> None:
    tensors = {f"{name}.{i}": t for name in _FIELDS for i, t in enumerate(getattr(found, name))}
    tensors |= {f"sample.{layer}": rows for layer, rows in found.sample.items()}
    tensors["tokens"] = torch.tensor(found.tokens)
    store_tensors(path, tensors)


def _unpack(tensors: dict[str, Tensor], key: str) -> Statistics:
    n = sum(name.startswith("inputs_mean.") for name in tensors)
    fields = {name: [tensors[f"{name}.{i}"] for i in range(n)] for name in _FIELDS}
    sample = {int(name.split(".")[1]): rows for name, rows in tensors.items() if name.startswith("sample.")}
    return Statistics(int(tensors["tokens"]), **fields, sample=sample, key=key)
