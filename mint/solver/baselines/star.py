"""CleanOutputs: STAR, batch mode (Gu, Aleti, Chen, Zhang, "STAR: semantic-targeted repair", arXiv 2503.12899, method
section: steering by semantics, prior by least squares, sign from the gradient), from a description of the method.

Followed: all tokens of the target at once; the steering vector of a token is the difference of two rows of the
unembedding's pseudo-inverse (target minus argmax; zero where they agree), divided by its inter-quartile range; in
every layer the prior for the whole output matrix is the least-norm solution D of Z D = S, Z the neurons at the
positions that predict the target, S the steering vectors; each epoch every entry of the prior gets the sign that
opposes the gradient of the target's cross-entropy, and 1e-2 times it is added to the matrix; at most 10 epochs; no
sparsity. The prior is computed once, before the first epoch.

Differs deliberately: Z is the input of the output matrix (the authors hook the activation function, which in gated
blocks is another quantity) and is read at the positions that predict the tokens (theirs is one position too late); the
prefix stays token ids; it stops at the epoch at which every target token is right, and gives up after the last.
The prior is kept as two thin factors and multiplied out one layer at a time. Ignores `keep`, earlier repairs,
`max_neurons`, `generalize` and `where`; `settings.layers` restricts the matrices.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from mint.model.hooks import record
from mint.model.lm import LM
from mint.model.margins import margins
from mint.solver.baselines.matrices import (
    ALREADY_RIGHT,
    Trace,
    changed_matrices,
    chosen_layers,
    forced,
    output_names,
    refused,
    restored,
    traced,
    wanted_margin,
)
from mint.solver.baselines.mint_paper import UNFIT, fits, semantic_rows
from mint.solver.problem import Problem, Settings, Solution

NAME = "star"
RATE = 1e-2
EPOCHS = 10


def steering(lm: LM, target: Sequence[int], argmax: Sequence[int]) -> Tensor:
    """Steering vectors [tokens, d_model]: where the hidden state of each token should move to."""
    drift = semantic_rows(lm, target) - semantic_rows(lm, argmax)
    quartiles = torch.quantile(drift, torch.tensor([0.25, 0.75], device=drift.device), dim=1)
    return drift / (quartiles[1] - quartiles[0] + 1e-8)[:, None]


@torch.no_grad()
def _inverses(lm: LM, problem: Problem, layers: Sequence[int]) -> tuple[dict[int, Tensor], Tensor]:
    """pinv(Z) of every layer, [d_ff, tokens], and the tokens that the model writes now, [tokens]."""
    positions = problem.encoded.positions
    with record(lm, layers) as neurons:
        logits = lm.logits([problem.encoded.ids], [positions])
    # The least-norm solution of Z D = S is pinv(Z) S.
    found = {layer: torch.linalg.pinv(neurons[layer][0, positions].float()) for layer in layers}
    return found, logits.argmax(1)


@torch.no_grad()
def _step(lm: LM, trace: Trace, loss: Tensor, inverses: dict[int, Tensor], steer: Tensor) -> None:
    for layer, gradient in trace.gradients(loss):
        inverse = inverses[layer]
        prior = inverse @ steer.to(inverse.device)
        lm.columns(layer).sub_(RATE * prior.abs() * gradient.sign())


def solve(lm: LM, problem: Problem, settings: Settings) -> Solution:
    """Take up to `EPOCHS` steps until all margins exceed the wanted one (default 0: the target is the argmax).

    The model is bit-identical afterwards. Raises `MintError` for layers that the model has not.
    """
    started = time.perf_counter()
    layers = chosen_layers(lm, settings, range(lm.n_layers))
    wanted, encoded = wanted_margin(settings), problem.encoded
    with torch.no_grad():
        smallest = float(margins(lm, encoded).min())
    if smallest > wanted:
        return refused(NAME, ALREADY_RIGHT, started, smallest)
    if not fits(lm):
        return refused(NAME, UNFIT, started)
    inverses, argmax = _inverses(lm, problem, layers)
    steer = steering(lm, encoded.target, argmax.tolist())
    with restored(lm, output_names(lm, layers)) as before:
        for epoch in range(1, EPOCHS + 1):
            with torch.enable_grad(), traced(lm, layers) as trace:
                _, loss = forced(lm, encoded)
            _step(lm, trace, loss, inverses, steer)
            with torch.no_grad():
                smallest = float(margins(lm, encoded).min())
            if smallest > wanted:
                return changed_matrices(NAME, lm, before, started, smallest, epochs=epoch)
    reason = f"a target token is still {wanted - smallest:.2f} below the wanted margin after {EPOCHS} epochs"
    return refused(NAME, reason, started, margin_reached=smallest, epochs=EPOCHS)
