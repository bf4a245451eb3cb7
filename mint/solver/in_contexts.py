"""The solver `contexts`: one case as a rule whose learn prompts are the case in other files and in other words.

The gate is the large-margin classifier of rules (gate.py): it fires at the case's wrong places in every context and
wording, and keeps silent at near misses and strangers, with the target forced behind them too. The column is one
quadratic programme over all contexts (`fit_columns`). Where one neuron does not carry the prompt itself, two share its
places; where these do not, the solver `mint` takes over, which repairs the prompt and nothing around it.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mint import prompts
from mint.case import Case
from mint.errors import CaseError, MintError, ModelError
from mint.guards import first_broken
from mint.model.lm import LM, Encoded
from mint.model.margins import margins
from mint.patch import NeuronEdit, Patch, applied, identity, make_edit, versions
from mint.reference import Statistics, sample_layers, statistics
from mint.solver.bundle import Bundle, bundle
from mint.solver.classifier import Detector, Examples, fit_constant, fit_direction, make_detector
from mint.solver.inputs import block_inputs
from mint.solver.problem import Problem, Settings, Solution
from mint.solver.qp import HARD, smallest
from mint.solver.variants import contexts, wordings

NAME = "contexts"
FIRE_BELOW = 0.5
"""Margin, in logits, below which a place is wrong."""
FIRE_SHARE = 0.4
"""Share of the texts in which a target token must be wrong for the neuron to fire at it in all."""
ITERATIONS = 8
WIDTH = 2.5
"""The activation is the same where the classifier says 1 and 1.5, and hardly larger between; see `make_detector`."""


@dataclass(frozen=True)
class Recipe:
    """The dial in numbers, see docs/contexts.md."""

    margin: float = 4.0
    """Logits by which every target token must lead, in every context."""
    silence: float = 1.0
    """How far below the firing threshold other inputs are pulled."""
    ridge: float = 3.0
    """Softness of the classifier's margin."""
    joint: int = 9
    """Contexts and wordings that the column is fitted to, beside the prompt itself."""
    loose: int = 3
    """Rephrasings made from the prompt that the gate learns."""
    near: float = 3.0
    """Cost of firing where a near miss or a stranger begins its answer; a prompt's own wrong place costs 1."""
    price: float = 500.0
    """Most that one logit short in a context may cost, in units of |column|^2 / 2."""


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
        margin=2.0 + 4.0 * dial, ridge=1.0 + 4.0 * dial, loose=round(6 * dial), price=1000.0 * dial
    )
    return found if settings.margin is None else replace(found, margin=settings.margin)


# ---------------------------------------------------------------------- what is learnt from


@dataclass(frozen=True)
class _Texts:
    joint: list[Encoded]
    """The prompt itself first; then the contexts and wordings that the column is fitted to."""
    more: list[Encoded]
    """Contexts and wordings that only the gate learns."""
    near: list[Encoded]
    """Near misses and strangers with the target forced behind them."""


def _encode(lm: LM, cases: Sequence[Case], like: Encoded) -> list[Encoded]:
    """The cases as ids, stopped as the case itself is; what does not fit is left out."""
    found = []
    for case in cases:
        try:
            one = lm.encode(case, "none")
        except CaseError:
            continue
        stop = like.target[len(like.target) - like.n_stop :]
        if len(one.ids) + len(stop) <= lm.context:
            found.append(replace(one, target=(*one.target, *stop), n_stop=like.n_stop))
    return found


def _texts(lm: LM, problem: Problem, settings: Settings, recipe: Recipe) -> _Texts:
    case, chat = problem.case, lm.template is not None
    places = _encode(lm, contexts(case, chat=chat), problem.encoded)
    words = _encode(lm, wordings(case, recipe.loose, chat=chat, seed=settings.seed), problem.encoded)
    if settings.learn_rephrasings:
        words = _encode(lm, [replace(case, prompt=p) for p in case.rephrasings], problem.encoded) + words
    split = min(recipe.joint - min(2, len(words)), len(places))
    few = recipe.joint - split
    near = prompts.near_misses(case, "learn", exchanges=10, intents=6, chat=chat, seed=settings.seed)
    return _Texts(
        [problem.encoded, *places[:split], *words[:few]],
        [*places[split:], *words[few:]],
        _encode(lm, [replace(case, prompt=p) for p in near], problem.encoded),
    )


# ---------------------------------------------------------------------- when it fires


def _from_end(real: Tensor, n: int) -> Tensor:
    """[b, m]: the token of the n-token target that each place predicts, counted so that the ends match; below 0: none."""
    lengths = real.sum(1, keepdim=True)
    return torch.arange(real.shape[1])[None] - lengths + n


def _places(joint: Bundle) -> Tensor:
    """[n] bool: target tokens at which the neuron fires, in every text: wrong in the prompt itself, or in many."""
    n = int(joint.real[0].sum())
    at = _from_end(joint.real, n)
    wrong = joint.real & (joint.clean < FIRE_BELOW)
    found = torch.zeros(n, dtype=torch.bool)
    for k in range(n):
        here = joint.real & (at == k)
        found[k] = bool(wrong[here].float().mean() >= FIRE_SHARE) or bool(wrong[0, k])
    return found


def _spread(fire: Tensor, real: Tensor) -> Tensor:
    """The places [n] in other texts, [b, m]."""
    at = _from_end(real, len(fire))
    return real & (at >= 0) & fire[at.clamp(0, len(fire) - 1)]


@dataclass(frozen=True)
class _Inputs:
    """Inputs of one layer."""

    joint: Bundle
    more: list[tuple[Tensor, int]]
    """Per text, inputs [tokens, d_model] and how many of them come before the target."""
    near: list[tuple[Tensor, int]]
    guarded: Tensor
    sample: Tensor


def _detect(lm: LM, seen: _Inputs, stats: Statistics, fire: Tensor, recipe: Recipe) -> Detector:
    """Rows that fire at the places `fire` [n] of every text, and are silent elsewhere."""
    layer = seen.joint.layer
    yes, no, weights = [], [], []

    def silent(x: Tensor, weight: float) -> None:
        no.append(x)
        weights.append(torch.full((len(x),), weight))

    at = _spread(fire, seen.joint.real)
    for i in range(len(seen.joint)):
        yes.append(seen.joint.inputs[i][at[i]])
        silent(seen.joint.inputs[i][seen.joint.real[i] & ~at[i]], 0.3)
        silent(seen.joint.prompt_inputs[i], 0.05)
    for x, start in seen.more:
        real = torch.ones(1, len(x) - start, dtype=torch.bool)
        here = _spread(fire, real)[0]
        yes.append(x[start:][here])
        silent(x[start:][~here], 0.3)
        silent(x[:start], 0.05)
    for x, start in seen.near:
        silent(x[start : start + 1], recipe.near)  # the position that predicts the near miss's first token
        silent(x[start + 1 :], 0.3 * recipe.near)
        silent(x[:start], 0.05)
    silent(seen.guarded, 0.3)
    silent(seen.sample, 0.05)
    scale = stats.inputs_second[layer].diagonal().clamp_min(1e-12).sqrt()
    fires, others = torch.cat(yes), torch.cat(no)
    examples = Examples(
        torch.cat([fires, others]) / scale,
        torch.cat([torch.ones(len(fires)), torch.zeros(len(others))]).bool(),
        torch.cat([torch.ones(len(fires)), *weights]),
    )
    direction = fit_direction(examples, silence=recipe.silence, ridge=recipe.ridge)
    constant = fit_constant(stats.inputs_second[layer], stats.inputs_mean[layer], scale, fires / scale)
    return make_detector(direction, constant, scale, WIDTH, lm.block(layer).gated)


# ---------------------------------------------------------------------- what it writes


def fit_columns(
    joint: Bundle, levels: Tensor, wanted: Tensor, price: Tensor, iterations: int = ITERATIONS
) -> tuple[Tensor, Tensor, int]:
    """Columns [neurons, d_model] that minimise |columns|^2 / 2 + price * shortfall, the margins [b, m], the iterations.

    levels: [neurons, b, m] activations. wanted: [b, m] margins, -inf where nothing is asked. price: [b] per logit short.
    Margins are exact; their gradients leave out what a token does to later ones, so one backward serves all places and
    constraints are corrected as the iteration goes. Constraints of the last iterations stay: a rival does not return.
    """
    k, b, m = levels.shape
    columns = torch.zeros(k, joint.hidden.shape[-1])
    best, at_best = None, columns
    kept: dict[tuple[int, int, int], tuple[Tensor, Tensor, int]] = {}
    moved = (levels.abs().amax(0) > 1e-3) & joint.real
    step, iteration = columns, 0
    for iteration in range(iterations + 1):
        found, rivals, gradients = joint.own_leads(torch.einsum("kbm,kd->bmd", levels, columns))
        short = (wanted - found).clamp(min=0).masked_fill(~joint.real, 0)
        cost = 0.5 * float(columns.square().sum()) + float((short * price[:, None]).sum())
        if best is None or cost < best[0]:
            best, at_best = (cost, found), columns
        elif float(step.norm()) > 1e-3 and iteration < iterations:
            step = step / 3  # too far: the linear model does not hold there
            columns = at_best + step
            continue
        if iteration == iterations or not bool((short > 0).any()):
            break
        near = moved & (found < wanted + 1.0)
        for i, p in near.nonzero().tolist():
            row = (levels[:, i, p, None] * gradients[i, p]).flatten()
            need = wanted[i, p] - found[i, p] + row @ columns.flatten()
            kept[i, p, int(rivals[i, p])] = (row, need, iteration)
        kept = {key: value for key, value in kept.items() if value[2] > iteration - 3}
        if not kept:
            break
        bound = torch.stack([price[i] for i, _, _ in kept])
        rows, needs = torch.stack([v[0] for v in kept.values()]), torch.stack([v[1] for v in kept.values()])
        goal = smallest(rows, needs, bound)[0].view_as(columns)
        step = goal - at_best
        columns = goal
    assert best is not None
    return at_best, best[1], iteration


# ---------------------------------------------------------------------- the whole


def _wanted(joint: Bundle, fire: Tensor, margin: float) -> Tensor:
    """[b, m] the margin where the neuron fires, elsewhere half of what is there, at most the margin."""
    at = _spread(fire, joint.real) | (joint.clean < FIRE_BELOW)
    rest = joint.clean.clamp(max=margin) / 2
    return torch.where(at, torch.tensor(margin), rest).masked_fill(~joint.real, -torch.inf)


def _idle(lm: LM, stats: Statistics, layer: int, used: frozenset[tuple[int, int]], count: int) -> list[int]:
    energy = stats.neurons_square[layer] * lm.columns(layer).float().square().sum(1).cpu()
    for at, index in used:
        if at == layer:
            energy[index] = torch.inf
    return energy.argsort()[:count].tolist()


def _edit(lm: LM, layer: int, index: int, rows: Detector, column: Tensor) -> NeuronEdit:
    after = {"out": column / rows.gain, "gate": rows.gate}
    if rows.up is not None:
        after["up"] = rows.up
    slices = lm.block(layer).slices(index)
    after |= {role: torch.zeros(()) for role in slices if role.endswith("_bias")}
    return make_edit(lm, layer, index, after)


def _shares(fire: Tensor, most: int) -> list[list[Tensor]]:
    """Who fires where: one neuron at all places; two at half of them each, in reading order."""
    ways = [[fire]]
    places = fire.nonzero().flatten()
    if most > 1 and len(places) > 1:
        halves = [torch.zeros_like(fire), torch.zeros_like(fire)]
        halves[0][places[: len(places) // 2]] = True
        halves[1][places[len(places) // 2 :]] = True
        ways.append(halves)
    return ways


def solve(lm: LM, problem: Problem, settings: Settings) -> Solution:
    """One edit under which the target is written behind the prompt in other files and words too. The model stays as it is.

    Falls back to the solver `mint` where no edit of this kind holds at the prompt itself; `details` says so. Raises
    `MintError` for settings that make no sense.
    """
    started = time.perf_counter()
    try:
        found = _solve(lm, problem, settings)
    except ModelError:  # no keys and values to restart behind
        found = None
    if found is None:
        from mint.solver.solve import solve as alone

        found = alone(lm, problem, settings)
        found = replace(found, details=found.details | {"contexts": False})
    return replace(found, seconds=time.perf_counter() - started)


def _solve(lm: LM, problem: Problem, settings: Settings) -> Solution | None:
    recipe = recipe_of(settings)
    stats = statistics(lm, settings.reference)
    layer = sample_layers(lm)[0] if settings.layers is None else settings.layers[0]
    texts = _texts(lm, problem, settings, recipe)
    if len(texts.joint) < 2:
        return None
    joint = bundle(lm, texts.joint, [layer], exact=True)[layer]
    margin = min(recipe.margin, 0.4 * joint.spread)
    fire = _places(joint)
    if not fire.any():
        return None
    seen = _Inputs(
        joint,
        _seen(lm, layer, texts.more),
        _seen(lm, layer, texts.near),
        _guarded(lm, layer, problem, joint),
        stats.sample[layer].float() if layer in stats.sample else stats.inputs_mean[layer][None],
    )
    price = torch.full((len(joint),), recipe.price)
    price[0] = HARD
    wanted = _wanted(joint, fire, margin)
    for share in _shares(fire, settings.max_neurons):
        detectors = [_detect(lm, seen, stats, part, recipe) for part in share]
        act = lm.layout.act(layer)
        levels = torch.stack([d.respond(joint.inputs, act) * joint.real for d in detectors])
        columns, margins_, iterations = fit_columns(joint, levels, wanted, price)
        least = margins_.masked_fill(~joint.real, torch.inf).amin(1)
        if least[0] <= 0:
            continue
        indices = _idle(lm, stats, layer, problem.used, len(share))
        edits = tuple(
            _edit(lm, layer, index, rows, column)
            for index, rows, column in zip(indices, detectors, columns, strict=True)
        )
        info = {"solver": NAME, "settings": {"generalize": settings.generalize, "margin": margin}}
        patch = Patch(edits, identity(lm), info | {"versions": versions()})
        held = _holds(lm, problem, patch)
        if held is None:
            continue
        details = {
            "contexts": True,
            "layer": layer,
            "iterations": iterations,
            "learnt": [int((least > 0).sum()), len(least)],
            "norm": [round(float(c.norm()), 3) for c in columns],
        }
        return Solution(NAME, patch, None, held, details=details)
    return None


def _seen(lm: LM, layer: int, texts: Sequence[Encoded]) -> list[tuple[Tensor, int]]:
    found = []
    ordered = sorted(texts, key=lambda t: len(t.ids))
    for k in range(0, len(ordered), 8):
        part = ordered[k : k + 8]
        inputs = block_inputs(lm, layer, [t.ids[:-1] for t in part])
        found += [(x, len(t.prompt) - 1) for x, t in zip(inputs, part, strict=True)]
    return found


def _guarded(lm: LM, layer: int, problem: Problem, joint: Bundle) -> Tensor:
    guards = [*problem.keep, *problem.earlier]
    return torch.cat([joint.inputs[0, :0], *(x for x, _ in _seen(lm, layer, guards))])


def _holds(lm: LM, problem: Problem, patch: Patch) -> float | None:
    """The smallest margin of the target in the real weights; None where it or something guarded does not hold."""
    with torch.no_grad(), applied(lm, patch):
        least = float(margins(lm, problem.encoded).min())
        if least <= 0 or first_broken(lm, [*problem.keep, *problem.earlier]) is not None:
            return None
    return least
