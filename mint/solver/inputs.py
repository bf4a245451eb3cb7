"""What a layer's input rows see: at the target behind other prompts, and at outputs that must survive.

Forwards stop at the layer. Inputs of guarded texts are remembered as long as the model lives.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mint.model.hooks import record_block_inputs, stopped_after
from mint.model.lm import LM
from mint.model.suffix import kept_cache

_TOKENS = 2048
"""Padded tokens of one forward."""
_SEEN: "WeakKeyDictionary[nn.Module, dict[tuple, Tensor]]" = WeakKeyDictionary()


@torch.no_grad()
def block_inputs(
    lm: LM,
    layer: int,
    sequences: Sequence[Sequence[int]],
    prefix: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> list[Tensor]:
    """Block inputs of a layer, float32 on CPU, one [tokens, d_model] a sequence; like lengths together.

    prefix: keys and values, layer by layer, of tokens that stand before all of them (default: nothing does).
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    found: dict[int, Tensor] = {}
    while order:
        batch = [order.pop()]
        while order and (len(batch) + 1) * len(sequences[batch[0]]) <= _TOKENS:
            batch.append(order.pop())
        options = {"use_cache": False}
        if prefix is not None:
            options = {"past_key_values": kept_cache(prefix), "use_cache": True}
        stop = lm.module(lm.block(layer).gate.module)
        with record_block_inputs(lm, [layer]) as seen, stopped_after(stop):
            lm.model(input_ids=lm.pad([sequences[i] for i in batch]), **options)
        for row, i in enumerate(batch):
            found[i] = seen[layer][row, : len(sequences[i])].float().cpu()
    return [found[i] for i in range(len(sequences))]


def inputs_behind(
    lm: LM,
    layer: int,
    prompts: Sequence[Sequence[int]],
    target: Sequence[int],
    known: tuple[Sequence[int], Sequence[tuple[Tensor, Tensor]]] | None = None,
) -> Tensor:
    """Block inputs [prompts, n, d_model] at the positions that predict the n target tokens behind each prompt.

    known: ids whose keys and values are at hand, and these: prompts that begin like them, by more than a half, run from
    where they differ.
    """
    shared = [0 if known is None else min(_common(p, known[0]), len(p) - 1) for p in prompts]
    alike = [i for i, p in enumerate(prompts) if 2 * shared[i] > len(p)]
    least = min((shared[i] for i in alike), default=0)
    found: dict[int, Tensor] = {}
    for group, cut in ((alike, least), ([i for i in range(len(prompts)) if i not in alike], 0)):
        prefix = None
        if cut and known is not None:
            prefix = [(keys[..., :cut, :], values[..., :cut, :]) for keys, values in known[1]]
        sequences = [[*prompts[i][cut:], *target[:-1]] for i in group]
        found |= zip(group, block_inputs(lm, layer, sequences, prefix), strict=True)
    return torch.stack([found[i][-len(target) :] for i in range(len(prompts))])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def inputs_of(
    lm: LM, layer: int, texts: Sequence[Sequence[int]], below: frozenset[tuple[int, int]]
) -> list[Tensor]:
    """Block inputs [tokens, d_model] of guarded texts; remembered for the edits `below` the layer as they are."""
    seen = _SEEN.setdefault(lm.model, {})
    keys = [(layer, tuple(ids), below) for ids in texts]
    missing = list(dict.fromkeys(key for key in keys if key not in seen))
    if missing:
        seen |= zip(missing, block_inputs(lm, layer, [ids for _, ids, _ in missing]), strict=True)
    return [seen[key] for key in keys]
