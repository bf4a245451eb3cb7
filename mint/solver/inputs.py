"""What a layer's input rows see: at the target behind other prompts, and at outputs that must survive.

Forwards stop at the layer. Inputs of guarded texts are remembered as long as the model lives.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mint.model.hooks import record_block_inputs, stopped_after
from mint.model.lm import LM

_BATCH = 16
_SEEN: "WeakKeyDictionary[nn.Module, dict[tuple, Tensor]]" = WeakKeyDictionary()


@torch.no_grad()
def block_inputs(lm: LM, layer: int, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Block inputs of a layer, float32 on CPU, one [tokens, d_model] a sequence."""
    with record_block_inputs(lm, [layer]) as seen, stopped_after(lm.module(lm.block(layer).gate.module)):
        lm.logits(sequences, [[0] for _ in sequences])
    return [seen[layer][i, : len(s)].float().cpu() for i, s in enumerate(sequences)]


def inputs_behind(lm: LM, layer: int, prompts: Sequence[Sequence[int]], target: Sequence[int]) -> Tensor:
    """Block inputs [prompts, n, d_model] at the positions that predict the n target tokens behind each prompt."""
    found = block_inputs(lm, layer, [[*p, *target[:-1]] for p in prompts])
    return torch.stack([x[len(p) - 1 :] for x, p in zip(found, prompts, strict=True)])


def inputs_of(
    lm: LM, layer: int, texts: Sequence[Sequence[int]], below: frozenset[tuple[int, int]]
) -> list[Tensor]:
    """Block inputs [tokens, d_model] of guarded texts; remembered for the edits `below` the layer as they are."""
    seen = _SEEN.setdefault(lm.model, {})
    keys = [(layer, tuple(ids), below) for ids in texts]
    missing = sorted({key for key in keys if key not in seen}, key=lambda key: len(key[1]))
    for start in range(0, len(missing), _BATCH):
        part = missing[start : start + _BATCH]
        seen |= zip(part, block_inputs(lm, layer, [ids for _, ids, _ in part]), strict=True)
    return [seen[key] for key in keys]
