"""The dial of the solver `contexts` in numbers. Knows nothing about models."""

import math
from dataclasses import dataclass, replace

from mint.errors import MintError
from mint.solver.problem import Settings


@dataclass(frozen=True)
class Recipe:
    """The dial in numbers, see docs/contexts.md."""

    margin: float = 4.0
    """Logits by which every target token must lead, in every context."""
    silence: float = 0.5
    """How far below the firing threshold other inputs are pulled."""
    ridge: float = 0.087
    """Softness of the classifier's margin: its ridge over d_model."""
    places: int = 9
    """Contexts that the columns are fitted to, beside the prompt itself."""
    words: int = 3
    """Wordings that they are fitted to."""
    loose: int = 3
    """Rephrasings made from the prompt that the gate learns."""
    own: float = 10.0
    """Cost of silence at a wrong place of the prompt itself."""
    like: float = 3.0
    """Cost of silence at one in another context or wording."""
    near: float = 18.0
    """Cost of firing where the answer to a near miss or another request begins."""
    reference: float = 0.75
    """Cost of firing at a token of reference text."""
    level: float | None = 0.3
    """How strongly what a gated neuron multiplies by is held to the even row, over d_model; None: it is that row."""
    price: float = 0.02
    """Cost of one logit short in a context, in units of the squared length of the residual stream; ten times as much in the
    prompt itself."""


def recipe_of(settings: Settings) -> Recipe:
    """The recipe for `settings.generalize` (0 to 1) and `settings.margin`. Raises `MintError` for others."""
    dial = settings.generalize
    if not 0 <= dial <= 1:
        raise MintError(
            f"generalize must lie between 0 and 1, found {dial}; 0 changes least, 1 carries over most"
        )
    if settings.margin is not None and not 0 < settings.margin < math.inf:
        raise MintError(
            f"margin must be a positive number of logits, found {settings.margin}; the default is 4"
        )
    found = Recipe(
        margin=2.0 + 4.0 * dial,
        near=6.0 * 9.0 ** (1 - dial),
        loose=round(6 * dial),
        price=0.02 * 10 ** (2 * dial - 1),
    )
    return found if settings.margin is None else replace(found, margin=settings.margin)
