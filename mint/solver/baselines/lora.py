"""CleanOutputs: a LoRA of rank 8 on all feed-forward output matrices (Hu et al., arXiv 2106.09685, section 4), by peft,
trained on the target with Adam and merged into the matrices.

Usual practice, no paper's recipe for repair: alpha = 2 x rank, no dropout, learning rate 2e-3, mean cross-entropy of
the target; it stops at the first step at which every target token has the wanted margin (default 0), and gives up
after `STEPS`. Deliberately only the output matrices, found by the layout, so that all baselines change the same
weights. Merged, because a solution is a change of weights; judged after merging. Ignores `keep`, earlier repairs,
`max_neurons`, `generalize` and `where`; `settings.layers` restricts the matrices.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mint.extras import need
from mint.model.lm import LM
from mint.model.margins import margins, margins_of
from mint.solver.baselines.matrices import (
    ALREADY_RIGHT,
    changed_matrices,
    chosen_layers,
    forced,
    output_names,
    refused,
    restored,
    wanted_margin,
)
from mint.solver.problem import Problem, Settings, Solution

NAME = "lora"
RANK = 8
RATE = 2e-3
STEPS = 100


def check_library() -> None:
    """Raise `MintError` where peft, which makes the adapters, is not installed."""
    need("the solver 'lora'", "peft")


@contextmanager
def _wrapped(lm: LM, layers: Sequence[int], seed: int) -> Iterator[dict[int, Any]]:
    """Within: LoRA modules stand in for the output matrices, layer -> module; afterwards the same old objects do.

    The modules are `peft.tuners.lora.Linear`, which an installation without the extra cannot name.
    """
    check_library()
    import peft

    model = lm.model
    names = [lm.block(layer).out for layer in layers]
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    modules = [lm.module(name) for name in names]
    attributes = dict(vars(model))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    training = model.training
    plain = isinstance(modules[0], nn.Linear)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=names, fan_in_fan_out=not plain
    )
    try:
        with torch.random.fork_rng():  # peft draws the start from torch's global generator
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, model)
        model.train(training)
        yield {layer: model.get_submodule(name) for layer, name in zip(layers, names, strict=True)}
    finally:
        for (parent, child), module in zip(places, modules, strict=True):
            setattr(parent, child, module)
        for name in vars(model).keys() - attributes.keys():
            delattr(model, name)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])


def _train(lm: LM, problem: Problem, wrapped: dict[int, Any], wanted: float) -> tuple[int, float, float]:
    """Adam on the adapters until all margins exceed `wanted`: (steps, loss, smallest margin)."""
    parameters = [p for module in wrapped.values() for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=RATE)
    step = 0
    with torch.enable_grad():
        while True:
            logits, loss = forced(lm, problem.encoded)
            smallest = float(margins_of(logits.detach(), problem.encoded.target).min())
            if smallest > wanted or step == STEPS:
                return step, loss.item(), smallest
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1


@torch.no_grad()
def _deltas(wrapped: dict[int, Any]) -> dict[int, Tensor]:
    """What each adapter adds to its matrix, in the matrix's own orientation."""
    return {layer: module.get_delta_weight("default").detach() for layer, module in wrapped.items()}


def solve(lm: LM, problem: Problem, settings: Settings) -> Solution:
    """Train, merge, judge; a change of the output matrices, or a reason.

    The model and its module objects are the same afterwards. Same result for the same `settings.seed`. Raises
    `MintError` for layers that the model has not, or without the package peft.
    """
    check_library()
    started = time.perf_counter()
    layers = chosen_layers(lm, settings, range(lm.n_layers))
    wanted = wanted_margin(settings)
    with torch.no_grad():
        smallest = float(margins(lm, problem.encoded).min())
    if smallest > wanted:
        return refused(NAME, ALREADY_RIGHT, started, smallest)
    with _wrapped(lm, layers, settings.seed) as wrapped:
        steps, loss, smallest = _train(lm, problem, wrapped, wanted)
        deltas = _deltas(wrapped)
    if not smallest > wanted:
        reason = f"a target token is still {wanted - smallest:.2f} below the wanted margin after {STEPS} Adam steps"
        return refused(NAME, reason, started, margin_reached=smallest, steps=steps, loss=loss)
    with restored(lm, output_names(lm, layers)) as before, torch.no_grad():
        for layer, name in zip(layers, before, strict=True):
            weight = lm.parameter(name)
            weight.copy_(weight.float() + deltas[layer].float())
        smallest = float(margins(lm, problem.encoded).min())
        if smallest > wanted:
            return changed_matrices(NAME, lm, before, started, smallest, steps=steps, loss=loss)
    reason = (
        f"merged into {lm.dtype} weights, a target token is {wanted - smallest:.2g} below the wanted margin"
    )
    return refused(NAME, reason, started, margin_reached=smallest, steps=steps, loss=loss)
