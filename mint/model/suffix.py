"""Restart a forward from a later layer, behind a kept prefix: what lies below an edit never changes.

One implementation for the solver, exact patching, side effects and the verdict. Knows nothing about faults or edits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mint.errors import ModelError
from mint.model.lm import LM

_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
"""Kinds of cache layers that hold keys and values and nothing else."""


@dataclass
class States:
    """What entered the decoder layers in one forward."""

    hidden: dict[int, Tensor]
    """Layer -> [batch, tokens, width], the residual stream as it enters the layer."""
    as_tuple: int
    """How many values the model's layers return in a tuple; 0 where they return the stream alone."""


@contextmanager
def record_states(lm: LM, layers: Sequence[int]) -> Iterator[States]:
    """Within: a forward fills the yielded `States` for the given layers."""
    hidden: dict[int, Tensor] = {}
    states = States(hidden, 0)

    def enter(layer: int) -> Callable:
        def hook(_module, args, kwargs):
            hidden[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def leave(_module, _args, output):
        states.as_tuple = len(output) if isinstance(output, tuple) else 0

    with ExitStack() as stack:
        for layer in layers:
            handle = lm.layer(layer).register_forward_pre_hook(enter(layer), with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(lm.layer(0).register_forward_hook(leave).remove)
        yield states


@contextmanager
def start_at(lm: LM, layer: int, hidden: Tensor, as_tuple: int) -> Iterator[None]:
    """Within: forwards skip the layers below `layer`, and `hidden` [batch, tokens, width] enters it.

    The caller passes input ids of the same batch and length (their values do not matter): positions, masks and
    everything after the last layer stay the model's own.
    """

    def skip(*_args, **_kwargs):
        return (hidden, *[None] * (as_tuple - 1)) if as_tuple else hidden

    def enter(_module, args, kwargs):
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    with ExitStack() as stack:
        for index in range(layer):
            stack.enter_context(forward_replaced(lm.layer(index), skip))
        if layer == 0:
            stack.callback(lm.layer(0).register_forward_pre_hook(enter, with_kwargs=True).remove)
        yield


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    # An instance attribute shadows the class's forward; accelerate may have put one there already.
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


@contextmanager
def only_tokens(lm: LM, tokens: Tensor) -> Iterator[Tensor]:
    """Within: the unembedding gives the logits of some tokens only; yields where each of `tokens` [k] stands in them.

    A vocabulary is wide: a few of its rows cost next to nothing. What is no plain linear map stays whole.
    """
    head = lm.module(lm.layout.unembedding)
    if type(head) is not nn.Linear or hasattr(head, "_hf_hook"):  # the latter's weights may lie elsewhere
        yield tokens
        return
    rows, place = tokens.unique(return_inverse=True)
    at = rows.to(head.weight.device)
    weight, bias = head.weight[at], None if head.bias is None else head.bias[at]

    def forward(x: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    with forward_replaced(head, forward):
        yield place


def suffix_logits(lm: LM, layer: int, hidden: Tensor, as_tuple: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Logits [n, vocab] in float32 at (rows[i], columns[i]), running only the layers from `layer` on.

    hidden: [batch, tokens, width] as it enters `layer`. For layer 0 the caller passes the embedded input.
    """
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=lm.device)
    with start_at(lm, layer, hidden, as_tuple), lm.only_at(rows, columns):
        return lm.model(input_ids=ids, use_cache=False).logits[0].float()


class KeptLayer(DynamicLayer):
    """Keys and values of one layer's prefix, batch 1, lent to any number of rows; new ones are not kept."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.prefix = (keys, values)
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        rows = key_states.shape[0]
        keys, values = (x.expand(rows, -1, -1, -1) for x in self.prefix)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def new_cache(lm: LM) -> Cache:
    """An empty cache of all that the model keeps of earlier tokens, without a sliding window where it keeps keys and values."""
    try:
        own = DynamicCache(config=lm.model.config)
    except (
        KeyError,
        ValueError,
        AttributeError,
        TypeError,
    ):  # a kind of layer that the library has no cache for
        return DynamicCache()
    return DynamicCache() if all(type(x) in _PLAIN for x in own.layers) else own


def kept_prefix(lm: LM, cache: Cache, length: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [1, heads, length, size] of the first tokens in a filled cache, layer by layer.

    Raises `ModelError` for a model that keeps something else.
    """
    pairs = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in getattr(cache, "layers", [])]
    if any(type(x) not in _PLAIN for x in getattr(cache, "layers", [])):
        pairs = []
    found = [
        (k[..., :length, :], v[..., :length, :])
        for k, v in pairs
        if k is not None and v is not None and k.dim() == 4 and k.shape[-2] > length
    ]
    if not len(found) == len(pairs) == lm.n_layers:
        raise ModelError(f"{lm.name} keeps no plain keys and values; mint cannot restart it inside a prompt")
    return found


def kept_cache(prefix: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache that lends the prefix to any number of rows and keeps nothing new."""
    cache = DynamicCache()
    cache.layers.extend(KeptLayer(keys, values) for keys, values in prefix)
    return cache
