"""Solvers for tests of the evaluator: two that really repair tiny models, and several that misbehave."""

import torch

from mint.model.hooks import record
from mint.model.margins import margins
from mint.patch import Patch, identity, make_edit
from mint.solver.problem import Solution, TensorChange, changed

SCALES = (1, 2, 4, 8, 16, 32, 64)


def _columns(lm, encoded, indices, scale):
    """Columns of these neurons of the last layer that push every target token's own unembedding row, [k, width]."""
    layer = lm.n_layers - 1
    with record(lm, [layer]) as seen:
        lm.logits([encoded.ids], [[0]])
    fired = seen[layer][0, encoded.positions][:, indices]
    rows = lm.parameter(f"{lm.layout.unembedding}.weight")[list(encoded.target)]
    return lm.columns(layer)[indices] + torch.linalg.pinv(fired) @ (scale * rows)


def _first_that_holds(lm, problem, make):
    for scale in SCALES:
        change = make(scale)
        with changed(lm, change):
            smallest = float(margins(lm, problem.encoded).min())
        if smallest > 0.1:
            return change, smallest
    return None, smallest


@torch.no_grad()
def column(lm, problem, settings):
    """Repair by changing what a few neurons of the last layer write: the first that no earlier repair used."""
    layer = lm.n_layers - 1
    free = [i for i in range(lm.block(layer).d_ff) if (layer, i) not in problem.used]
    indices = free[: len(problem.encoded.target) + 1]

    def make(scale):
        new = _columns(lm, problem.encoded, indices, scale)
        edits = [make_edit(lm, layer, i, {"out": c}) for i, c in zip(indices, new, strict=True)]
        return Patch(tuple(edits), identity(lm))

    change, smallest = _first_that_holds(lm, problem, make)
    return Solution(
        "column", change, None if change else "no scale does it", smallest, 0.5, {"free": len(free)}
    )


@torch.no_grad()
def matrix(lm, problem, settings):
    """Repair by changing the last layer's whole output matrix."""
    layer = lm.n_layers - 1
    name = f"{lm.block(layer).out}.weight"
    old = lm.parameter(name).detach().clone()

    def make(scale):
        new = _columns(lm, problem.encoded, list(range(lm.block(layer).d_ff)), scale)
        return TensorChange(
            {name: old}, {name: (new.T if lm.block(layer).out_axis == 1 else new).contiguous()}
        )

    change, smallest = _first_that_holds(lm, problem, make)
    return Solution("matrix", change, None if change else "no scale does it", smallest, 0.5)


@torch.no_grad()
def nothing(lm, problem, settings):
    """Never finds anything."""
    return Solution("nothing", None, "refuses everything", seconds=0.01)


@torch.no_grad()
def useless(lm, problem, settings):
    """A large change in a random direction that repairs nothing."""
    generator = torch.Generator().manual_seed(len(problem.case.prompt))
    old = lm.columns(1)[3]
    edit = make_edit(lm, 1, 3, {"out": old + torch.randn(old.shape, generator=generator)})
    return Solution("useless", Patch((edit,), identity(lm)), seconds=0.02)


def broken(lm, problem, settings):
    """Fails on every second case."""
    if problem.case.id.endswith(("1", "3", "5")):
        raise RuntimeError("out of luck\n<script>alert(1)</script>")
    return column(lm, problem, settings)


@torch.no_grad()
def dirty(lm, problem, settings):
    """Leaves the model changed."""
    lm.columns(0)[0].add_(1)
    return Solution("dirty", None, "left a mess")


REGISTRY = {f.__name__: f for f in (column, matrix, nothing, useless, broken, dirty)}
