"""Look at and override neuron activations. Hooks always come off.

A neuron's activation is the input of its block's last linear map: one tensor [batch, tokens, d_ff] a layer, after
the nonlinearity and, in gated blocks, after the product. This module knows nothing about faults or metrics.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mint.model.lm import LM


class _Reached(Exception):
    """Ends a forward once what is looked for is known."""


@contextmanager
def stopped_after(module: nn.Module) -> Iterator[None]:
    """Within: a forward of the model ends where this module has run, and the block ends with it.

    What hooks have recorded by then stays; what the forward would have returned never comes.
    """

    def stop(*_):
        raise _Reached

    handle = module.register_forward_hook(stop)
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()


@contextmanager
def record(lm: LM, layers: Sequence[int] | None = None) -> Iterator[dict[int, Tensor]]:
    """Within: forwards fill the yielded dict with activations, layer -> [batch, tokens, d_ff] (the last forward's).

    layers: default all that have a block.
    """
    seen: dict[int, Tensor] = {}
    with ExitStack() as stack:
        batch = stack.enter_context(_batch_size(lm))
        for layer in lm.layout.repairable if layers is None else layers:
            parts: list[Tensor | None] = [None] * len(lm.layout.blocks_of(layer))
            for number, block in enumerate(lm.layout.blocks_of(layer)):

                def hook(_module, args, layer=layer, number=number, parts=parts):
                    parts[number] = args[0].view(batch[0], -1, args[0].shape[-1])
                    if all(part is not None for part in parts):
                        seen[layer] = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
                        parts[:] = [None] * len(parts)

                stack.callback(lm.module(block.out).register_forward_pre_hook(hook).remove)
        yield seen


@contextmanager
def record_block_inputs(lm: LM, layers: Sequence[int] | None = None) -> Iterator[dict[int, Tensor]]:
    """Within: forwards fill the yielded dict with what the input rows see, layer -> [batch, tokens, d_model]."""
    seen: dict[int, Tensor] = {}
    with ExitStack() as stack:
        batch = stack.enter_context(_batch_size(lm))
        for layer in lm.layout.repairable if layers is None else layers:

            def hook(_module, args, layer=layer):
                seen[layer] = args[0].view(batch[0], -1, args[0].shape[-1])

            handle = lm.module(lm.block(layer).gate.module).register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        yield seen


@contextmanager
def _batch_size(lm: LM) -> Iterator[list[int]]:
    """Within: the yielded list holds the batch size of the forward under way (some models flatten it in the block)."""
    size = [1]

    def hook(_module, args, kwargs):
        size[0] = (args[0] if args else kwargs["input_ids"]).shape[0]

    handle = lm.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield size
    finally:
        handle.remove()


@contextmanager
def override(lm: LM, changes: dict[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within: each layer's activations [batch, tokens, d_ff] are replaced by what its function returns.

    A layer of several blocks asks its function once a block, with zeros for the neurons of the others.
    """
    with ExitStack() as stack:
        batch = stack.enter_context(_batch_size(lm))
        for layer, function in changes.items():
            sizes = [block.d_ff for block in lm.layout.blocks_of(layer)]
            for number, block in enumerate(lm.layout.blocks_of(layer)):
                before, behind = sum(sizes[:number]), sum(sizes[number + 1 :])

                def hook(_module, args, function=function, before=before, behind=behind):
                    given = args[0]
                    n = F.pad(given.view(batch[0], -1, given.shape[-1]), (before, behind))
                    changed = function(n)[..., before : n.shape[-1] - behind]
                    return (changed.reshape(given.shape), *args[1:])

                stack.callback(lm.module(block.out).register_forward_pre_hook(hook).remove)
        yield
