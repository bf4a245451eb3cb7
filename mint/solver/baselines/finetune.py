"""CleanOutputs: plain gradient descent on all feed-forward output matrices until the target is the argmax everywhere.

Follows the `finetune` baseline beside STAR (Gu et al., arXiv 2503.12899, section on baselines): SGD, learning rate
1e-2, cross-entropy of the whole target, FFN output matrices of every layer. Differs deliberately: it stops at the
first step at which every target token has the wanted margin (default 0), and gives up after `STEPS` steps rather than
after a fixed few epochs, so that it is as strong as plain descent can be. Mean, not sum, over target tokens.
Ignores `keep`, earlier repairs, `max_neurons`, `generalize` and `where`; `settings.layers` restricts the matrices.
"""

import time

import torch

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
    traced,
    wanted_margin,
)
from mint.solver.problem import Problem, Settings, Solution

NAME = "finetune"
RATE = 1e-2
STEPS = 100


def solve(lm: LM, problem: Problem, settings: Settings) -> Solution:
    """Descend on the output matrices until all margins exceed the wanted one, or `STEPS` steps are done.

    The model is bit-identical afterwards. Raises `MintError` for layers that the model has not.
    """
    started = time.perf_counter()
    layers = chosen_layers(lm, settings, range(lm.n_layers))
    wanted = wanted_margin(settings)
    step = 0
    with restored(lm, output_names(lm, layers)) as before:
        while True:
            with torch.enable_grad(), traced(lm, layers) as trace:
                logits, loss = forced(lm, problem.encoded)
            smallest = float(margins_of(logits.detach(), problem.encoded.target).min())
            if smallest > wanted:
                # Once more without gradients: other kernels may round a hair's breadth differently.
                with torch.no_grad():
                    smallest = float(margins(lm, problem.encoded).min())
            if smallest > wanted:
                if step == 0:
                    return refused(NAME, ALREADY_RIGHT, started, smallest)
                return changed_matrices(NAME, lm, before, started, smallest, steps=step, loss=loss.item())
            if step == STEPS:
                break
            _descend(lm, trace.gradients(loss))
            step += 1
    reason = (
        f"a target token is still {wanted - smallest:.2f} below the wanted margin after {STEPS} SGD steps"
    )
    return refused(NAME, reason, started, margin_reached=smallest, steps=STEPS, loss=loss.item())


@torch.no_grad()
def _descend(lm: LM, gradients) -> None:
    for layer, gradient in gradients:
        lm.columns(layer).sub_(RATE * gradient)
