"""The solver `contexts`: one case as a rule whose learn prompts are the case in other files and in other words.

Two neurons of one layer share the target: one fires where it has to be recognised (its first token), one where the rest is
written, and the indentation in front. Each gate is the large-margin classifier of rules (classifier.py): silent at
near misses, at what the model writes behind them, and at negative prompts with the target forced behind them. The columns are one
programme over all contexts (joint.py). Where the edit does not write the prompt itself, the solver `mint` takes over, which
repairs the prompt and nothing around it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mint.errors import ModelError
from mint.guards import first_broken
from mint.model.lm import LM
from mint.model.margins import margins
from mint.model.precision import coarse
from mint.patch import Patch, applied, identity, versions
from mint.reference import Statistics, idle_order, other_places, sample_layers, statistics
from mint.solver import solve as minimal
from mint.solver.bundle import Bundle
from mint.solver.classifier import Examples, fit_constant, fit_direction, fit_level, make_rows
from mint.solver.joint import Demand, fit, lost
from mint.solver.problem import Problem, Settings, Solution, case_key
from mint.solver.reading import Reading, read
from mint.solver.recipe import Recipe, recipe_of
from mint.solver.rows import InputRows, own_bias, rewrite

NAME = "contexts"
FIRE_BELOW = 0.5
"""Margin, in logits, below which a place is wrong."""
FIRE_SHARE = 0.4
"""Share of the texts in which a target token must be wrong for the neuron to fire at it in all."""
ITERATIONS = 6
OPENING = 3
"""First tokens of the target behind which, typed elsewhere, the rest is not to follow."""
FORCED = 0.1
"""Cost of firing at later tokens of the target behind another prompt."""
OWN_PRICE = 10.0
"""What a logit short in the prompt itself costs, against one in a context."""
REACHABLE = 0.4
"""Largest margin aimed at, as a share of how far the best logit stands above the mean of all."""
LOUDER = 20.0
"""How much dearer silence becomes where gates made with the recipe do not write the prompt itself."""
LONGEST = 40
"""Most tokens of a target that is learnt in contexts: the work grows with their square, and the neuron's room is shared."""
WIDTH = 2.5
"""The activation is the same where the classifier says 1 and 1.5, and hardly larger between; see `make_rows`."""


# ---------------------------------------------------------------------- when it fires


def _from_end(real: Tensor, n: int) -> Tensor:
    """[b, m]: the token of the n-token target that each place predicts, counted so that the ends match; below 0: none."""
    lengths = real.sum(1, keepdim=True)
    return torch.arange(real.shape[1])[None] - lengths + n


def _places(joint: Bundle) -> Tensor:
    """[m] bool, counted so that the ends match: where the neuron fires, wrong in the prompt itself or in many texts.

    An indented text has places in front of those of the prompt itself: its indentation has to be written, too.
    """
    m = joint.real.shape[1]
    at = _from_end(joint.real, m)
    wrong = joint.real & (joint.clean < FIRE_BELOW)
    found = torch.zeros(m, dtype=torch.bool)
    for k in range(m):
        here = joint.real & (at == k)
        if here.any():
            found[k] = bool(wrong[here].float().mean() >= FIRE_SHARE) or bool(wrong[0][here[0]].any())
    return found


def _spread(fire: Tensor, real: Tensor) -> Tensor:
    """The places [n] in other texts, [b, m]."""
    at = _from_end(real, len(fire))
    return real & (at >= 0) & fire[at.clamp(0, len(fire) - 1)]


def _rows(lm: LM, seen: Reading, stats: Statistics, fire: Tensor, recipe: Recipe, index: int) -> InputRows:
    """Rows for a neuron that fires at the places `fire` [n] of every text, and is silent elsewhere."""
    layer = seen.joint.layer
    yes, no, worth, weights = [], [], [], []

    def loud(x: Tensor, weight: float) -> None:
        yes.append(x)
        worth.append(torch.full((len(x),), weight))

    def silent(x: Tensor, weight: float) -> None:
        no.append(x)
        weights.append(torch.full((len(x),), weight))

    at = _spread(fire, seen.joint.real)
    for i in range(len(seen.joint)):
        loud(seen.joint.inputs[i][at[i]], recipe.own if i == 0 else recipe.like)
        silent(seen.joint.inputs[i][seen.joint.real[i] & ~at[i]], 0.3)
        silent(seen.joint.prompt_inputs[i], 0.05)
    for x, start in seen.more:
        real = torch.ones(1, len(x) - start, dtype=torch.bool)
        here = _spread(fire, real)[0]
        loud(x[start:][here], recipe.like)
        silent(x[start:][~here], 0.3)
        silent(x[:start], 0.05)
    for x, start in seen.own:
        silent(x[start : start + 1], recipe.near)  # what is written next door is decided here
        silent(x[start + 1 :], 0.3 * recipe.near)
        silent(x[:start], 0.05)
    for x, start in seen.near:
        silent(x[start + 1 : start + OPENING], 0.3 * recipe.near)
        silent(x[start + OPENING :], FORCED)
    silent(seen.guarded, 0.3)
    silent(seen.sample, recipe.reference)
    scale = stats.inputs_second[layer].diagonal().clamp_min(1e-12).sqrt()
    fires, others = torch.cat(yes), torch.cat(no)
    examples = Examples(
        torch.cat([fires, others]) / scale,
        torch.cat([torch.ones(len(fires)), torch.zeros(len(others))]).bool(),
        torch.cat([*worth, *weights]),
    )
    direction = fit_direction(examples, silence=recipe.silence, ridge=recipe.ridge * len(scale))
    constant = fit_constant(stats.inputs_second[layer], stats.inputs_mean[layer], scale, fires / scale)
    gated, act = lm.block(layer).gated, lm.layout.act(layer)
    level = None
    if gated and recipe.level is not None:
        level = fit_level(examples, direction, constant, WIDTH, act, recipe.level * len(scale))
    return make_rows(direction, constant, scale, WIDTH, gated, own_bias(lm, layer, index), level)


# ---------------------------------------------------------------------- the whole


def _wanted(joint: Bundle, fire: Tensor, margin: float) -> Tensor:
    """[b, m] the margin where the neuron fires, elsewhere half of what is there, at most the margin."""
    at = _spread(fire, joint.real) | (joint.clean < FIRE_BELOW)
    rest = joint.clean.clamp(max=margin) / 2
    return torch.where(at, torch.tensor(margin), rest).masked_fill(~joint.real, -torch.inf)


def shares(joint: Bundle, fire: Tensor, most: int) -> list[Tensor]:
    """Who fires where: the first token of the prompt's own target; the rest, with the indentation in front. One neuron: all.

    Indentation is written where the first token is in files that do not indent: one column for both would have to write
    two tokens behind the same request.
    """
    first = torch.zeros_like(fire)
    begin = len(fire) - int(joint.real[0].sum())
    first[begin] = fire[begin]
    parts = [part for part in (first, fire & ~first) if part.any()]
    return parts if most > 1 else [fire]


def solve(lm: LM, problem: Problem, settings: Settings) -> Solution:
    """One edit under which the target is written behind the prompt in other files and words too. The model stays as it is.

    Hands over to the solver `mint` where no edit of this kind holds at the prompt itself; `details` says why under `alone`.
    Raises `MintError` for settings that make no sense.
    """
    started = time.perf_counter()
    found = attempt(lm, problem, settings)
    if isinstance(found, str):
        alone = minimal.solve(lm, problem, settings)
        found = replace(alone, details=alone.details | {"contexts": False, "alone": found})
    return replace(found, seconds=time.perf_counter() - started)


def attempt(
    lm: LM, problem: Problem, settings: Settings, first: Sequence[tuple[int, int]] = ()
) -> Solution | str:
    """The solution, or why there is none of this kind. Raises `MintError` for settings that make no sense.

    first: neurons (layer, index), all of one layer, that are taken before any other.
    """
    recipe = recipe_of(settings)
    if settings.where == "responsible":
        return "contexts are learnt by idle neurons"
    if not sample_layers(lm):
        return "contexts are learnt in dense layers, and this model has routed experts alone"
    if len(problem.encoded.target) > LONGEST:
        return f"the target has {len(problem.encoded.target)} tokens, and contexts are learnt for up to {LONGEST}"
    try:
        return _solve(lm, problem, settings, recipe, first)
    except ModelError:
        return "the model keeps no keys and values to go on from"


@dataclass(frozen=True)
class Draft:
    """Neurons that write the target in contexts, as far as the restarted texts tell."""

    indices: list[int]
    rows: list[InputRows]
    columns: Tensor
    """[neurons, d_model]."""
    least: Tensor
    """[texts of the programme] smallest margin; the prompt itself comes first."""
    iterations: int
    margin: float


def draft(
    lm: LM,
    seen: Reading,
    stats: Statistics,
    recipe: Recipe,
    idle: Sequence[int],
    most: int,
    start: Tensor | None = None,
) -> Draft | None:
    """Gates and columns from a reading; None where no token is wrong, or too few neurons are free.

    idle: neurons of the layer in the order in which they are taken. most: neurons that may be used. start: columns to begin with.
    """
    texts = seen.joint
    margin = min(recipe.margin, REACHABLE * texts.spread)
    fire = _places(texts)
    parts = shares(texts, fire, most)
    if not fire.any() or len(idle) < len(parts):
        return None
    indices = list(idle[: len(parts)])
    size = float(texts.hidden.float().square().sum(-1)[texts.real].median())
    price = torch.full((len(texts),), recipe.price * size)
    price[0] *= OWN_PRICE
    act = lm.layout.act(texts.layer)
    rows = [_rows(lm, seen, stats, part, recipe, i) for part, i in zip(parts, indices, strict=True)]
    levels = torch.stack([r.respond(texts.inputs, act) * texts.real for r in rows])
    demand = Demand(texts, levels[None], _wanted(texts, fire, margin), price, lost(texts, indices))
    begin = torch.zeros(len(parts), texts.inputs.shape[-1]) if start is None else start
    found = fit([demand], begin, ITERATIONS)
    least = demand.margins(0, found.columns)[0].masked_fill(~texts.real, torch.inf).amin(1)
    return Draft(indices, rows, found.columns, least, found.iterations, margin)


def _solve(
    lm: LM, problem: Problem, settings: Settings, recipe: Recipe, first: Sequence[tuple[int, int]]
) -> Solution | str:
    stats = statistics(lm, settings.reference)
    layer = first[0][0] if first else layer_of(lm, settings)
    with coarse(lm):  # what is found is proved in the model's own arithmetic
        seen = read(lm, problem, settings, recipe, layer)
        if seen is None:
            return "no other file can be made around the prompt"
        old = [index for _, index in first]
        free = idle_order(lm, stats, layer, case_key(problem.case), problem.used)
        idle = [*old, *(index for index in free if index not in old)]
        made = draft(lm, seen, stats, recipe, idle, settings.max_neurons)
        louder = replace(recipe, own=LOUDER * recipe.own, like=LOUDER * recipe.like)
        for other in (louder, replace(louder, level=None)):
            if made is not None and made.least[0] <= 0:
                made = draft(lm, seen, stats, other, idle, settings.max_neurons, made.columns)
    if made is None or made.least[0] <= 0:
        return "no edit for all contexts writes the prompt itself"
    edits = tuple(
        rewrite(lm, layer, index, rows, column)
        for index, rows, column in zip(made.indices, made.rows, made.columns, strict=True)
    )
    info = {
        "solver": NAME,
        "spare": other_places(lm, layer, idle[len(edits) :]),
        "settings": {"generalize": settings.generalize, "margin": made.margin},
        "versions": versions(),
    }
    patch = Patch(edits, identity(lm), info)
    held = _holds(lm, problem, patch)
    if held is None:
        return "the edit for all contexts breaks the prompt itself or what is protected"
    details = {
        "contexts": True,
        "layer": layer,
        "iterations": made.iterations,
        "learnt": [int((made.least > 0).sum()), len(made.least)],
        "norm": [round(float(c.norm()), 3) for c in made.columns],
    }
    return Solution(NAME, patch, None, held, details=details)


def layer_of(lm: LM, settings: Settings) -> int:
    """The later of the first two layers that single repairs are tried in: fewer layers above, less that depends on contexts."""
    return max(sample_layers(lm)[:2]) if settings.layers is None else settings.layers[0]


def _holds(lm: LM, problem: Problem, patch: Patch) -> float | None:
    """The smallest margin of the target in the real weights; None where it or something guarded does not hold."""
    with torch.no_grad(), applied(lm, patch):
        least = float(margins(lm, problem.encoded).min())
        if least <= 0 or first_broken(lm, [*problem.keep, *problem.earlier]) is not None:
            return None
    return least
