"""Controls: the main solver's own edit on neurons drawn at random, and a random direction on its own neuron.

What they answer: does it matter which neuron was chosen, and does it matter in which direction it was moved? No paper's
method; see Heimersheim & Nanda, arXiv 2404.15255, on matched controls.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from mint.model.lm import LM
from mint.patch import NeuronEdit, Patch
from mint.solver import solve as minimal
from mint.solver.baselines.matrices import chosen_layers
from mint.solver.problem import Problem, Settings, Solution

NAME = "random"


def _generator(*parts: object) -> torch.Generator:
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def draw(
    lm: LM, layers: Sequence[int], generator: torch.Generator, avoid: frozenset[tuple[int, int]] = frozenset()
) -> list[tuple[int, int]]:
    """One neuron (layer, index) for each entry of `layers`, drawn evenly among those not in `avoid`, none twice."""
    drawn: list[tuple[int, int]] = []
    for layer in layers:
        free = [i for i in range(lm.block(layer).d_ff) if (layer, i) not in avoid and (layer, i) not in drawn]
        drawn.append((layer, free[int(torch.randint(len(free), (), generator=generator))]))
    return drawn


def same_edit(lm: LM, problem: Problem, patch: Patch, settings: Settings) -> Solution:
    """The main solver's algorithm on as many neurons as `patch` has, in the same layers, drawn at random.

    The patch's own neurons and those of earlier repairs are not drawn. Same result for the same `settings.seed` and
    case.
    """
    generator = _generator(settings.seed, problem.case.id)
    avoid = problem.used | {(edit.layer, edit.index) for edit in patch.edits}
    return _solve_at(lm, problem, settings, draw(lm, [edit.layer for edit in patch.edits], generator, avoid))


def solve(lm: LM, problem: Problem, settings: Settings) -> Solution:
    """The main solver's algorithm on one neuron drawn evenly from all layers (or from `settings.layers`).

    Same result for the same `settings.seed` and case. Raises `MintError` for layers that the model has not.
    """
    layers = chosen_layers(lm, settings, range(lm.n_layers))
    generator = _generator(settings.seed, problem.case.id)
    layer = layers[int(torch.randint(len(layers), (), generator=generator))]
    return _solve_at(lm, problem, settings, draw(lm, [layer], generator, problem.used))


def _solve_at(lm: LM, problem: Problem, settings: Settings, neurons: list[tuple[int, int]]) -> Solution:
    started = time.perf_counter()
    found = minimal.solve_at(lm, problem, settings, neurons=neurons)
    details = found.details | {"drawn": [list(neuron) for neuron in neurons]}
    return replace(found, solver=NAME, seconds=time.perf_counter() - started, details=details)


def random_direction(lm: LM, patch: Patch, seed: int) -> Patch:
    """The same neurons, moved as far as `patch` moves them, in a random direction.

    A value edit: the column's change becomes a random vector of the same norm. A rewrite: the input rows stay the
    patch's, so the neuron fires where the patch lets it, and what it then writes becomes a random vector of the same
    norm. Norms are equal up to rounding to the patch's dtype. Same result for the same seed.
    """
    generator = _generator(seed, [(edit.layer, edit.index) for edit in patch.edits])
    edits = tuple(_turned(edit, generator) for edit in patch.edits)
    return replace(patch, edits=edits, info=patch.info | {"control": "random direction", "seed": seed})


def _turned(edit: NeuronEdit, generator: torch.Generator) -> NeuronEdit:
    old, new = edit.before["out"], edit.after["out"]
    # A rewritten neuron's old column no longer matters: what it writes counts from zero, as in `patch.scale`.
    start = old.float() if edit.kind == "value" else torch.zeros_like(old, dtype=torch.float32)
    noise = torch.randn(new.shape, generator=generator)
    out = start + noise * ((new.float() - start).norm() / noise.norm())
    return replace(edit, after=edit.after | {"out": out.to(new.dtype)})
