"""The unembedding by itself: what it would have been given, and what the model makes of that, a few rows at a time.

A vocabulary is wide: a row of logits takes 197 kB for 49 152 tokens in float32, 608 kB for 152 064. No more than `BYTES` of
them need to exist at once, and they stay on the model's device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mint.model.lm import LM
from mint.model.suffix import start_at

BYTES = 64e6
"""Bytes of logits in float32 that exist at once."""


@contextmanager
def only_read(lm: LM, rows: Tensor, columns: Tensor) -> Iterator[list[Tensor]]:
    """Within: each forward appends what its unembedding would be given at (rows[i], columns[i]), [n, width], to the list.

    The unembedding itself does one row: the logits of such a forward mean nothing. Keeps the caller's gradient mode.
    """
    seen: list[Tensor] = []

    def select(_module, args):
        seen.append(args[0][rows.to(args[0].device), columns.to(args[0].device)])
        return (seen[-1][None, :1].detach(),)

    handle = lm.module(lm.layout.unembedding).register_forward_pre_hook(select)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def unembedding(lm: LM, as_tuple: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within: a function from what enters the unembedding, [n, width], to the model's own logits, [n, vocab] in float32.

    With all that the model does behind it (soft caps, scales): it is the model's forward of one token, in which no layer
    runs and the unembedding is given something else. as_tuple: see `start_at`.
    """
    given: list[Tensor] = []
    one = torch.zeros(1, 1, dtype=torch.long, device=lm.device)

    def logits(read: Tensor) -> Tensor:
        given[:] = [read[None]]
        return lm.model(input_ids=one, use_cache=False).logits[0].float()

    nothing = torch.zeros(1, 1, lm.layout.width, dtype=lm.dtype, device=lm.device)
    with start_at(lm, lm.n_layers, nothing, as_tuple):
        handle = lm.module(lm.layout.unembedding).register_forward_pre_hook(lambda *_: tuple(given))
        try:
            yield logits
        finally:
            handle.remove()


def logit_parts(lm: LM, rows: int) -> list[slice]:
    """So many rows in parts, of each of which `BYTES` hold the logits."""
    most = max(1, int(BYTES / 4 / lm.embedding.shape[0]))
    return [slice(start, start + most) for start in range(0, rows, most)]
