"""Routed experts as blocks: look at, override and edit the neurons of single experts of a mixture of experts.

The library stacks the experts of a layer in a few parameters and has no module per expert, so there is nothing to hang a
hook on. `focused` gives a model some experts as blocks of their own, whose input and output maps are modules: while a
hook sits on one of them, the expert runs through them for all tokens, and its output counts where the router sends it.
Without hooks the model runs as it did. Knows nothing about faults or edits.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mint.errors import LayoutError
from mint.model.layout import Block, Experts, ExpertsModule, product
from mint.model.lm import LM

_PREFIX = "mint-"


class _Map(nn.Module):
    """A linear map of one expert; its weights are views of the stacked parameters."""

    def __init__(self, owner: nn.Module, experts: Experts, expert: int):
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it does not become a part of this module
        self.experts, self.expert = experts, expert

    @property
    def hooked(self) -> bool:
        return bool(self._forward_hooks or self._forward_pre_hooks)

    def _stacked(self, name: str) -> Tensor:
        return getattr(self._owner[0], name)[self.expert]


class ExpertInput(_Map):
    """hidden [tokens, d_model] -> gate and up parts [tokens, 2 d_ff], one behind the other however they are stored."""

    @property
    def _name(self) -> str:
        return "gate_up_proj" if self.experts.gated else "up_proj"

    @property
    def weight(self) -> Tensor:
        """[units, d_model] in the order of the model's own parameter, a view."""
        stacked = self._stacked(self._name)
        return stacked.T if self.experts.transposed else stacked

    @property
    def bias(self) -> Tensor | None:
        return self._stacked(f"{self._name}_bias") if self.experts.bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        units = F.linear(hidden, self.weight, self.bias)
        return torch.cat([units[..., ::2], units[..., 1::2]], -1) if self.experts.interleaved else units


class ExpertOutput(_Map):
    """Activations [tokens, d_ff] -> what the expert writes [tokens, d_model], before the router's weight."""

    @property
    def weight(self) -> Tensor:
        """[d_model, d_ff], a view."""
        stacked = self._stacked("down_proj")
        return stacked.T if self.experts.transposed else stacked

    @property
    def bias(self) -> Tensor | None:
        return self._stacked("down_proj_bias") if self.experts.bias else None

    def forward(self, neurons: Tensor) -> Tensor:
        return F.linear(neurons, self.weight, self.bias)


_MAPS: "WeakKeyDictionary[nn.Module, dict[int, tuple[ExpertInput, ExpertOutput]]]" = WeakKeyDictionary()
"""Experts module -> expert -> its maps, made when an expert is first focused on."""


def _maps(owner: nn.Module, experts: Experts, expert: int) -> tuple[ExpertInput, ExpertOutput]:
    made = _MAPS.setdefault(owner, {})
    if expert not in made:
        made[expert] = ExpertInput(owner, experts, expert), ExpertOutput(owner, experts, expert)
    return made[expert]


def _forward(previous: str, owner: ExpertsModule, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts' forward: hooked experts through their maps, all others as `previous` runs them."""
    hooked = {e: maps for e, maps in _MAPS.get(owner, {}).items() if any(m.hooked for m in maps)}
    # The batched kernels have no second derivative rules for batched gradients; the class's own loop has.
    own = inspect.unwrap(type(owner).forward)
    plain = torch.is_grad_enabled() and hidden.requires_grad
    run = own if plain else ALL_EXPERTS_FUNCTIONS.get_interface(previous, own)
    if not hooked:
        return run(owner, hidden, index, weights)
    chosen = torch.isin(index, torch.tensor(list(hooked), device=index.device))
    out = run(owner, hidden, index, weights.masked_fill(chosen, 0))
    for expert, (first, last) in hooked.items():
        here = index == expert
        parts = first(hidden)
        if first.experts.gated:
            gate, up = parts.chunk(2, dim=-1)
            neurons = product(owner, gate, up)
        else:
            neurons = owner.act_fn(parts)
        # A token that is sent elsewhere has no such neuron; its activation is zero.
        neurons = torch.where(here.any(-1, keepdim=True), neurons, torch.zeros_like(neurons))
        share = (weights * here).sum(-1, keepdim=True)
        out = out + (share * last(neurons)).to(out.dtype)
    return out


def _select_forward(lm: LM) -> None:
    """Have the model run its experts through `_forward`, and those without hooks as it did so far."""
    previous = lm.model.config._experts_implementation or "eager"
    if previous.startswith(_PREFIX):
        return
    ALL_EXPERTS_FUNCTIONS.register(_PREFIX + previous, partial(_forward, previous))
    lm.model.set_experts_implementation(_PREFIX + previous)


def focused(lm: LM, chosen: Mapping[int, Sequence[int]]) -> LM:
    """The same model, whose layout has the given experts as blocks: layer -> expert numbers.

    They come behind the block that every token of the layer passes, if there is one. Weights are shared with `lm`.
    Raises `LayoutError` for a layer without routed experts, or an expert that it has not.
    """
    blocks: list[Block] = [block for block in lm.layout.blocks if block.experts is None]
    modules: dict[str, nn.Module] = {}
    for layer, numbers in chosen.items():
        experts = lm.layout.experts.get(layer)
        if experts is None or not all(0 <= e < experts.count for e in numbers):
            have = "no routed experts" if experts is None else f"experts 0 to {experts.count - 1}"
            raise LayoutError(f"layer {layer} has {have}, asked for {list(numbers)}")
        for expert in numbers:
            blocks.append(experts.block(expert))
            first, last = _maps(lm.module(experts.module), experts, expert)
            modules |= {blocks[-1].gate.module: first, blocks[-1].out: last}
    if not modules:
        return lm
    _select_forward(lm)
    order = sorted(range(len(blocks)), key=lambda i: (blocks[i].layer, i))
    layout = replace(lm.layout, blocks=tuple(blocks[i] for i in order))
    return replace(lm, layout=layout, expert_maps=modules)


@dataclass(frozen=True)
class Routes:
    """Where the router of one layer sends tokens."""

    index: Tensor
    """[batch, tokens, k] expert numbers."""
    weights: Tensor
    """[batch, tokens, k] what their outputs are multiplied by."""

    def share(self, expert: int) -> Tensor:
        """[batch, tokens] the weight of one expert; 0 where it is not asked."""
        return (self.weights * (self.index == expert)).sum(-1)


@contextmanager
def record_routes(lm: LM) -> Iterator[dict[int, Routes]]:
    """Within: forwards fill the yielded dict, layer -> `Routes` of the last forward."""
    seen: dict[int, Routes] = {}
    size = [1]

    def batch(_module, args, kwargs):
        size[0] = (args[0] if args else kwargs["input_ids"]).shape[0]

    def keep(layer: int) -> Callable:
        def hook(_module, args, kwargs):
            index, weights = [*args, *kwargs.values()][1:3]
            shape = (size[0], -1, index.shape[-1])
            seen[layer] = Routes(index.reshape(shape), weights.detach().reshape(shape))

        return hook

    with ExitStack() as stack:
        stack.callback(lm.model.register_forward_pre_hook(batch, with_kwargs=True).remove)
        for layer, experts in lm.layout.experts.items():
            handle = lm.module(experts.module).register_forward_pre_hook(keep(layer), with_kwargs=True)
            stack.callback(handle.remove)
        yield seen


@torch.no_grad()
def routes(lm: LM, ids: Sequence[int]) -> dict[int, Routes]:
    """Where one sequence of token ids is sent, layer -> `Routes` of batch 1. Empty for a dense model."""
    if not lm.layout.experts:
        return {}
    with record_routes(lm) as seen:
        lm.logits([list(ids)], [[0]])
    return seen


def focused_at(lm: LM, ids: Sequence[int], position: int) -> LM:
    """`lm` with all experts as blocks that the token at `position` is sent to."""
    found = routes(lm, ids)
    return focused(lm, {layer: sorted(set(r.index[0, position].tolist())) for layer, r in found.items()})


def focused_for(lm: LM, ids: Sequence[int], positions: Sequence[int]) -> LM:
    """`lm` with one expert as the block of each layer that has no other: the one that most of `positions` are sent to.

    Of equals the one with the larger weight. Layers whose best expert gets fewer of the positions than the best of all
    layers stay without a block, since a neuron acts only where its expert is asked.
    """
    without = [layer for layer in lm.layout.experts if layer not in lm.layout.repairable]
    if not without:
        return lm
    best: dict[int, tuple[int, float, int]] = {}
    for layer, found in routes(lm, ids).items():
        if layer not in without:
            continue
        index, at = found.index[0, list(positions)], list(positions)
        for expert in index.unique().tolist():
            share = float(found.share(expert)[0, at].sum())
            entry = (int((index == expert).any(-1).sum()), share, expert)
            best[layer] = max(best.get(layer, entry), entry)
    most = max(count for count, _, _ in best.values())
    return focused(lm, {layer: [expert] for layer, (count, _, expert) in best.items() if count == most})
