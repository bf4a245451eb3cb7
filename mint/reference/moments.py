"""Statistics of a model on reference text: what a layer's inputs and neurons look like when nothing is wrong.

The text ships with mint (`data/reference/`, written for it); users add their own. A layer is measured when it is first
asked for, in forwards that end at the topmost layer in question, and cached per model, keyed by all it depends on.
Knows nothing about faults.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, overload
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mint.console import Counts, Say
from mint.errors import PatchError
from mint.files import write_file
from mint.model.hooks import record, record_block_inputs, stopped_after
from mint.model.lm import LM
from mint.model.loading import cache_dir
from mint.model.precision import coarse, is_coarse
from mint.reference.texts import WINDOW, passages, reference_lines, reference_texts

_VERSION = 8
SAMPLE_DEPTHS = (0.8, 0.9, 0.67, 0.5)
"""Layers, as shares of all, in which the solver edits, in the order it tries them."""
PASSAGE_TOKENS = 3584
"""Most tokens of the passages that ship, evenly spread over them; as many again of the user's own text."""
LINE_TOKENS = 7168
"""Most tokens of the single lines that ship."""
_BATCH_TOKENS = 768


@dataclass(frozen=True)
class Statistics:
    """Moments over the reference text, by layer. float32 on CPU; a layer that was not measured yet is when it is read.

    Reading one layer costs one pass over the text up to that layer; iterating, one pass for all that are missing.
    `measure` fetches several things in one pass.
    """

    tokens: int
    """Tokens of the passages that the moments are taken over."""
    inputs_second: Sequence[Tensor]
    """C = E[x x'] of block inputs, [d_model, d_model] a layer."""
    inputs_mean: Sequence[Tensor]
    """mu = E[x], [d_model] a layer."""
    neurons_mean: Sequence[Tensor]
    """E[n], [d_ff] a layer, without the first token of each passage, where models park outliers a thousand times larger
    than anything behind it: with them the mean is no typical value."""
    neurons_square: Sequence[Tensor]
    """E[n^2], [d_ff] a layer, over the same tokens as `neurons_mean`."""
    neurons_energy: Sequence[Tensor]
    """E[n^2], [d_ff] a layer, over all tokens, the first ones too: what is lost where the neuron is overwritten."""
    sample: Mapping[int, Tensor]
    """Single block inputs, layer -> [tokens, d_model] float16: those of the passages, then those of the single lines."""
    key: str
    """SHA-256 of all that the statistics depend on."""
    beyond: Mapping[int, Tensor] = field(default_factory=dict)
    """As `sample`, of all other text that ships: for a gate that has to be silent on text that nobody wrote down. One more pass."""
    measure: "Measure" = field(default=lambda *_: None, repr=False, compare=False)
    """measure(inputs, neurons, beyond): have the inputs of some layers, the neurons of some (None: all) and the other text's
    inputs of some (default: none), in one pass."""


class Measure(Protocol):
    def __call__(
        self, inputs: Iterable[int], neurons: Iterable[int] | None, beyond: Iterable[int] = (), /
    ) -> None: ...


def sample_layers(lm: LM) -> list[int]:
    """The layers of `SAMPLE_DEPTHS` in this model, without repeats, in order of preference.

    Where the layer at a depth has no block, the nearest that has one. None in a mixture of routed experts alone, before
    it is narrowed to some (`experts.focused_for`).
    """
    if not lm.layout.repairable:
        return []
    depths = [min(lm.n_layers - 1, int(depth * lm.n_layers)) for depth in SAMPLE_DEPTHS]
    layers = [min(lm.layout.repairable, key=lambda layer: abs(layer - depth)) for depth in depths]
    return list(dict.fromkeys(layers))


_FIELDS = {
    "inputs": ("second", "mean", "sample"),
    "neurons": ("mean", "square", "energy"),
    "beyond": ("sample",),
}
_Parts = dict[tuple[str, int], dict[str, Tensor]]
"""(kind, layer) -> field -> tensor."""


@dataclass
class _Known:
    """What is known of one model on one text; kept as long as the model lives."""

    key: str
    tokens: int
    parts: _Parts = field(default_factory=dict)


_MEMO: "WeakKeyDictionary[nn.Module, dict[tuple, _Known]]" = WeakKeyDictionary()


def statistics(
    lm: LM, extra: Sequence[str | Path] = (), say: Say = lambda _: None, cache: bool = True
) -> Statistics:
    """Statistics of the model on the reference text, measured layer by layer as they are read.

    extra: the user's own text files. say: told what happens; if it has a method `progress(text, done, total)`, that is
    told the tokens done. cache: read and write the cache on disk. Edits of a few neurons hardly move these averages: what
    is known of a live model stays valid while it carries some, but a pass over an edited model never goes to the disk.
    Time: at most `PASSAGE_TOKENS` + `LINE_TOKENS` tokens up to the topmost layer asked for, as many more with own text; for
    `beyond`, about 19,000 tokens more.
    Memory: one d_model x d_model matrix and about as many inputs [tokens, d_model] a layer read.
    """
    texts = reference_texts(extra)
    shipped = len(reference_texts())
    memo = _MEMO.setdefault(lm.model, {})
    place = (tuple(texts), lm.dtype, lm.layout.blocks)
    if place not in memo:
        chosen = _chosen(lm, texts, shipped)
        memo[place] = _Known(reference_key(lm, texts), sum(map(len, chosen)))
    known = memo[place]

    def measure(inputs: Iterable[int], neurons: Iterable[int] | None, beyond: Iterable[int] = (), /) -> None:
        wanted = [("inputs", layer) for layer in inputs]
        wanted += [("neurons", layer) for layer in (range(lm.n_layers) if neurons is None else neurons)]
        wanted += [("beyond", layer) for layer in beyond]
        for part in wanted:
            if not lm.d_ff(part[1]):  # a layer without a block
                known.parts[part] = dict.fromkeys(_FIELDS[part[0]], torch.zeros(0))
        missing = [part for part in wanted if part not in known.parts]
        if cache:
            known.parts |= _read(known.key, missing)
            missing = [part for part in missing if part not in known.parts]
        if missing:
            with coarse(lm):
                rest = _left_out(lm, texts[:shipped]) if any(kind == "beyond" for kind, _ in missing) else []
                found = _measure(lm, _chosen(lm, texts, shipped), rest, missing, say)
            known.parts |= found
            if cache and reference_key(lm, texts) == known.key:
                _store(known.key, found)

    def field_of(kind: str, name: str) -> "_ByLayer":
        def read(layers: Sequence[int]) -> list[Tensor]:
            measure(*(layers if kind == which else () for which in _FIELDS))
            return [known.parts[kind, layer][name] for layer in layers]

        return _ByLayer(read, lm.n_layers)

    return Statistics(
        known.tokens,
        inputs_second=field_of("inputs", "second"),
        inputs_mean=field_of("inputs", "mean"),
        neurons_mean=field_of("neurons", "mean"),
        neurons_square=field_of("neurons", "square"),
        neurons_energy=field_of("neurons", "energy"),
        sample=_Rows(field_of("inputs", "sample")),
        key=known.key,
        beyond=_Rows(field_of("beyond", "sample")),
        measure=measure,
    )


class _ByLayer(Sequence[Tensor]):
    """One tensor a layer, read when asked for; all in one go where they are iterated over."""

    def __init__(self, read: Callable[[Sequence[int]], list[Tensor]], layers: int):
        self._read, self._layers = read, layers

    def __len__(self) -> int:
        return self._layers

    @overload
    def __getitem__(self, layer: int) -> Tensor: ...
    @overload
    def __getitem__(self, layer: slice) -> list[Tensor]: ...
    def __getitem__(self, layer: int | slice) -> Tensor | list[Tensor]:
        if isinstance(layer, slice):
            return self._read(range(self._layers)[layer])
        if not -self._layers <= layer < self._layers:
            raise IndexError(f"the model has layers 0 to {self._layers - 1}, found {layer}")
        return self._read([layer % self._layers])[0]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._read(range(self._layers)))


class _Rows(Mapping[int, Tensor]):
    """The same as a mapping from layer to tensor."""

    def __init__(self, layers: _ByLayer):
        self._layers = layers

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in range(len(self)):
            raise KeyError(layer)
        return self._layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))


def reference_key(lm: LM, texts: Sequence[str]) -> str:
    """SHA-256 of all that statistics of the model on these texts depend on."""
    digest = hashlib.sha256()
    amounts = [_VERSION, WINDOW, PASSAGE_TOKENS, LINE_TOKENS]
    amounts.append(is_coarse(lm))
    digest.update(json.dumps([*amounts, lm.fingerprint, str(lm.dtype), lm.tokenizer_hash, texts]).encode())
    digest.update(json.dumps(reference_lines()).encode())
    # Edits change the statistics of later layers: the weights that mint edits belong to the key.
    for block in lm.layout.blocks:
        digest.update(_checksum(lm.parameter(f"{block.out}.weight").detach()).cpu().numpy().tobytes())
    return digest.hexdigest()


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checksum(weight: Tensor) -> Tensor:
    """Sums of the bits along the last axis as int64: exact, so the same on every device and with any number of threads."""
    return weight.view(_BITS[weight.element_size()]).sum(-1, dtype=torch.int64)


# ---------------------------------------------------------------------- the text


def _spread(sequences: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """Sequences evenly spread over all of them, with at most about `tokens` tokens together."""
    total, chosen, done = sum(map(len, sequences)), [], 0
    for ids in sequences:
        # A sequence joins when the share of the budget that is due before its end has not been spent.
        done += len(ids)
        if sum(map(len, chosen)) + len(ids) / 2 <= done * min(1.0, tokens / max(total, 1)):
            chosen.append(ids)
    return list(sequences) if total <= tokens else chosen


def _chosen(lm: LM, texts: Sequence[str], shipped: int) -> list[Sequence[int]]:
    """Passages of the text that ships and of the user's own, as many as are measured."""
    own = passages(lm, texts[shipped:])
    return [*_spread(passages(lm, texts[:shipped]), PASSAGE_TOKENS), *_spread(own, PASSAGE_TOKENS)]


def _lines(lm: LM) -> list[Sequence[int]]:
    """Single lines, as many as are measured."""
    return _spread(passages(lm, reference_lines()), LINE_TOKENS)


def _left_out(lm: LM, texts: Sequence[str]) -> list[Sequence[int]]:
    """Passages and single lines of the text that ships which `_chosen` and `_lines` leave out."""
    taken = {tuple(ids) for ids in (*_spread(passages(lm, texts), PASSAGE_TOKENS), *_lines(lm))}
    every = (*passages(lm, texts), *passages(lm, reference_lines()))
    return [ids for ids in dict.fromkeys(map(tuple, every)) if ids not in taken]


def _batches(sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[Sequence[int]], Tensor]]:
    """Sequences of like length together, and which places of the padded batch are real tokens, bool."""
    order = sorted(sequences, key=len)
    while order:
        batch = [order.pop()]
        while order and (len(batch) + 1) * len(batch[0]) <= _BATCH_TOKENS:
            batch.append(order.pop())
        real = torch.zeros(len(batch), len(batch[0]), dtype=torch.bool)
        for row, ids in enumerate(batch):
            real[row, : len(ids)] = True
        yield batch, real


# ---------------------------------------------------------------------- measuring


class _Sums:
    """Running sums over tokens by name, in float32 where the tokens are."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def over(self, name: str, count: int) -> Tensor:
        return (self._sums[name] / max(count, 1)).cpu()


@torch.no_grad()
def _measure(
    lm: LM,
    sequences: Sequence[Sequence[int]],
    rest: Sequence[Sequence[int]],
    parts: Sequence[tuple[str, int]],
    say: Say,
) -> _Parts:
    """The given parts in one pass over the sequences, the single lines where inputs are among them, and the rest."""
    inputs, neurons, beyond = (
        sorted(layer for kind, layer in parts if kind == which) for which in ("inputs", "neurons", "beyond")
    )
    if not inputs and not neurons:
        sequences = []
    lines = _lines(lm) if inputs else []
    total, done = sum(map(len, [*sequences, *lines, *rest])), 0
    tokens = inner_tokens = 0
    sums = {part: _Sums() for part in parts}
    samples: dict[tuple[str, int], list[Tensor]] = {part: [] for part in parts}

    def tell(more: int) -> None:
        nonlocal done
        done += more
        text = "measuring the model on reference text (once per model)"
        if isinstance(say, Counts):
            say.progress(text, done, total)
        elif not done:
            say(text)

    tell(0)
    for batch, real in _batches(sequences):
        inner = real.clone()
        inner[:, 0] = False
        tokens, inner_tokens = tokens + int(real.sum()), inner_tokens + int(inner.sum())
        seen_inputs, seen_neurons = _run(lm, batch, inputs, neurons)
        for layer in inputs:
            x = seen_inputs[layer][real.to(seen_inputs[layer].device)].float()
            sums["inputs", layer].add("second", x.T @ x)
            sums["inputs", layer].add("mean", x.sum(0))
            samples["inputs", layer].append(x.half().cpu())
        for layer in neurons:
            n = seen_neurons[layer].float()
            behind, first = n[inner.to(n.device)], n[:, 0]
            sums["neurons", layer].add("mean", behind.sum(0))
            sums["neurons", layer].add("square", behind.square().sum(0))
            sums["neurons", layer].add("first", first.square().sum(0))
        tell(int(real.sum()))
    for kind, texts, layers in (("inputs", lines, inputs), ("beyond", rest, beyond)):
        for batch, real in _batches(texts):
            seen_inputs, _ = _run(lm, batch, layers, ())
            for layer in layers:
                x = seen_inputs[layer][real.to(seen_inputs[layer].device)]
                samples[kind, layer].append(x.half().cpu())
            tell(int(real.sum()))
    found: _Parts = {}
    for kind, layer in parts:
        total_of = sums[kind, layer]
        if kind == "inputs":
            found[kind, layer] = {name: total_of.over(name, tokens) for name in ("second", "mean")}
            found[kind, layer]["sample"] = torch.cat(samples[kind, layer])
        elif kind == "beyond":
            width = lm.layout.width
            none = [torch.zeros(0, width, dtype=torch.float16)]
            found[kind, layer] = {"sample": torch.cat(samples[kind, layer] or none)}
        else:
            found[kind, layer] = {name: total_of.over(name, inner_tokens) for name in ("mean", "square")}
            behind = found[kind, layer]["square"] * (inner_tokens / max(tokens, 1))
            found[kind, layer]["energy"] = behind + total_of.over("first", tokens)
    return found


def _run(
    lm: LM, batch: Sequence[Sequence[int]], inputs: Sequence[int], neurons: Sequence[int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Block inputs and activations [batch, tokens, ...] of some layers; nothing above the topmost runs."""
    with ExitStack() as stack:
        seen_inputs = stack.enter_context(record_block_inputs(lm, inputs))
        seen_neurons = stack.enter_context(record(lm, neurons))
        stack.enter_context(stopped_after(lm.layer(max([*inputs, *neurons]))))
        lm.logits(batch, [[0] for _ in batch])
    return seen_inputs, seen_neurons


# ---------------------------------------------------------------------- the cache


def store_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to the cache, whole or not at all; a cache that cannot be written costs time, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, save(tensors), force=True)
    except (OSError, PatchError):
        pass


def _path(key: str, kind: str, layer: int) -> Path:
    return cache_dir() / "statistics" / key / f"{kind}-{layer}.safetensors"


def _store(key: str, parts: _Parts) -> None:
    for (kind, layer), tensors in parts.items():
        store_tensors(_path(key, kind, layer), tensors)


def _read(key: str, parts: Sequence[tuple[str, int]]) -> _Parts:
    """Those of the parts that the cache holds."""
    found: _Parts = {}
    for kind, layer in parts:
        path = _path(key, kind, layer)
        if not path.exists():
            continue
        try:
            tensors = load_file(path)
            found[kind, layer] = {name: tensors[name] for name in _FIELDS[kind]}
        except Exception:  # a damaged cache file is made again, whatever is wrong with it
            path.unlink(missing_ok=True)
    return found
