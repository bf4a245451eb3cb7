"""What the baselines that change whole output matrices share: snapshots, gradients of those matrices, solutions.

An output matrix is the last linear map of a feed-forward block. Knows nothing about any one baseline.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mint.errors import MintError
from mint.model.lm import LM, Encoded
from mint.solver.problem import Settings, Solution, TensorChange

ALREADY_RIGHT = "the model already writes the target with the wanted margin; nothing was changed"


def chosen_layers(lm: LM, settings: Settings, default: Sequence[int]) -> list[int]:
    """The layers to edit in: the user's, else those of `default` that have a block, or the nearest one; ascending.

    Raises `MintError` for a layer that is not there or has no block.
    """
    have = lm.layout.repairable
    default = [layer for layer in default if layer in have] or [
        min(have, key=lambda layer: abs(layer - default[0]))
    ]
    layers = sorted(set(default if settings.layers is None else settings.layers))
    if not layers or not all(0 <= layer < lm.n_layers for layer in layers):
        raise MintError(
            f"layers must be some of 0 to {lm.n_layers - 1}, found {list(settings.layers or ())}; name at least one"
            " layer that the model has"
        )
    for layer in layers:
        lm.block(layer)
    return layers


def wanted_margin(settings: Settings) -> float:
    """The logit margin that every target token must exceed: the user's, else 0 (the argmax is right)."""
    return 0.0 if settings.margin is None else settings.margin


def output_names(lm: LM, layers: Sequence[int]) -> list[str]:
    """Names of the output matrices of the given layers."""
    return [f"{lm.block(layer).out}.weight" for layer in layers]


@torch.no_grad()
def write_tensors(lm: LM, values: dict[str, Tensor]) -> None:
    """Copy values into the model's parameters of those names, again from the start if interrupted half-way."""
    try:
        for name, value in values.items():
            lm.parameter(name).copy_(value)
    except BaseException:  # Ctrl-C included: finish before passing it on
        for name, value in values.items():
            lm.parameter(name).copy_(value)
        raise


@contextmanager
def restored(lm: LM, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within: the named parameters may be changed; afterwards, whatever happened, they have their old bits.

    Yields copies of the old weights, by name.
    """
    before = {name: lm.parameter(name).detach().clone() for name in names}
    try:
        yield before
    finally:
        write_tensors(lm, before)


@dataclass
class Trace:
    """Neurons and block outputs of one forward of one sequence, held with their graph."""

    neurons: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> [tokens, d_ff], detached."""
    outputs: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> what the output matrix wrote, in the shape that the model uses."""

    def gradients(self, loss: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(layer, gradient of `loss` with respect to `lm.columns(layer)`, [d_ff, d_model] float32), layer by layer.

        Made from activations one layer at a time, so that no more than one matrix is held.
        """
        layers = sorted(self.outputs)
        found = torch.autograd.grad(loss, [self.outputs[layer] for layer in layers])
        for layer, gradient in zip(layers, found, strict=True):
            yield layer, self.neurons[layer].float().T @ gradient.reshape(-1, gradient.shape[-1]).float()


@contextmanager
def traced(lm: LM, layers: Sequence[int]) -> Iterator[Trace]:
    """Within: a forward of one sequence (gradient mode on) fills the yielded trace."""
    trace = Trace()
    with ExitStack() as stack:
        for layer in layers:

            def hook(_module, args, output, layer=layer):
                # Parameters are frozen: the lowest traced layer starts the graph.
                output = output if output.requires_grad else output.detach().requires_grad_()
                trace.neurons[layer] = args[0].detach().reshape(-1, args[0].shape[-1])
                trace.outputs[layer] = output
                # A copy goes on: some models add to it in place.
                return output.clone()

            stack.callback(lm.module(lm.block(layer).out).register_forward_hook(hook).remove)
        yield trace


def forced(lm: LM, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """Logits at the target's positions, [target tokens, vocab], and the mean cross-entropy of the target."""
    logits = lm.logits([encoded.ids], [encoded.positions])
    return logits, cross_entropy(logits, torch.tensor(encoded.target, device=logits.device))


def refused(solver: str, reason: str, started: float, smallest: float | None = None, **details) -> Solution:
    """A solution without a change. smallest: the margin of the model as it is, where that is the point.

    details: JSON values; `margin_reached` is the smallest margin at the end of the failed attempt.
    """
    return Solution(solver, None, reason, smallest, time.perf_counter() - started, details)


def changed_matrices(
    solver: str, lm: LM, before: dict[str, Tensor], started: float, smallest: float, **details
) -> Solution:
    """The solution that the present weights of the matrices in `before` are."""
    after = {name: lm.parameter(name).detach().clone() for name in before}
    return Solution(
        solver, TensorChange(dict(before), after), None, smallest, time.perf_counter() - started, details
    )
