"""Controls: what any edit of the same kind and size would have done. Measured beside every solver, always.

`no-edit` shows the noise of the measurement; `random-neuron` asks the main solver for the same repair on neurons drawn
at random; `random-direction` moves the solver's own neurons as far as it did, but anywhere. Knows nothing about
measuring.
"""

import importlib.util
from collections.abc import Callable

from mint.model.lm import LM
from mint.patch import Patch
from mint.solver.baselines import random_controls
from mint.solver.problem import Problem, Settings, Solution

NO_EDIT = "no-edit"
RANDOM_NEURON = "random-neuron"
RANDOM_DIRECTION = "random-direction"
Control = Callable[[LM, Problem, Patch | None, Settings], Solution]
"""(model, problem, the solver's patch or None, settings) -> what to measure."""


def no_edit(lm: LM, problem: Problem, patch: Patch | None, settings: Settings) -> Solution:
    """Change nothing."""
    return Solution(NO_EDIT, None, "control: nothing is changed")


def random_neuron(lm: LM, problem: Problem, patch: Patch | None, settings: Settings) -> Solution:
    """The main solver's own repair, on as many other neurons of the same layers, drawn at random."""
    return (
        _nothing(RANDOM_NEURON) if patch is None else random_controls.same_edit(lm, problem, patch, settings)
    )


def random_direction(lm: LM, problem: Problem, patch: Patch | None, settings: Settings) -> Solution:
    """The solver's patch with what its neurons write turned to a random direction of the same norm."""
    if patch is None:
        return _nothing(RANDOM_DIRECTION)
    return Solution(RANDOM_DIRECTION, random_controls.random_direction(lm, patch, settings.seed))


def _nothing(name: str) -> Solution:
    return Solution(name, None, "control: the solver changed no neurons that could be imitated")


def installed() -> dict[str, Control]:
    """All controls by name; `random-neuron` only where the main solver is there to make its edit elsewhere."""
    found: dict[str, Control] = {NO_EDIT: no_edit}
    if importlib.util.find_spec("mint.solver.solve") is not None:
        found[RANDOM_NEURON] = random_neuron
    return found | {RANDOM_DIRECTION: random_direction}
