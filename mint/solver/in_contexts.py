"""The solver `contexts`: one case as a rule whose learn prompts are the case in other files and in other words.

Two neurons of one layer share the target: one fires where it has to be recognised (its first token), one where the rest is
written, and the indentation in front. Each gate is the large-margin classifier of rules (classifier.py): silent at
near misses, at what the model writes behind them, and at negative prompts with the target forced behind them. The columns are one
programme over all contexts (joint.py). Where the edit does not write the prompt itself, the solver `mint` takes over, which
repairs the prompt and nothing around it.
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from mint import prompts
from mint.batches import alike
from mint.case import Case
from mint.errors import CaseError, MintError, ModelError
from mint.guards import first_broken
from mint.model.lm import LM, Encoded
from mint.model.margins import margins
from mint.model.precision import coarse
from mint.patch import Patch, applied, identity, versions
from mint.reference import Statistics, idle_order, other_places, sample_layers, statistics
from mint.solver import solve as minimal
from mint.solver.bundle import Bundle, bundle
from mint.solver.classifier import Examples, fit_constant, fit_direction, fit_level, make_rows
from mint.solver.inputs import block_inputs
from mint.solver.joint import Demand, fit, lost
from mint.solver.problem import Problem, Settings, Solution, case_key
from mint.solver.rows import InputRows, own_bias, rewrite
from mint.solver.variants import contexts, wordings

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
EXTRA = 8
"""Tokens beyond the length of the target for which the model's own text behind a near miss is to stay."""
OTHERS = 6000
"""Tokens of other cases of the same run that a gate learns to be silent at, at most: time and memory grow with them."""
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


# ---------------------------------------------------------------------- what is learnt from


@dataclass(frozen=True)
class _Texts:
    joint: list[Encoded]
    """The prompt itself first; then the contexts and wordings that the columns are fitted to."""
    more: list[Encoded]
    """Contexts and wordings that only the gates learn."""
    near: list[Encoded]
    """Negative prompts (near misses and other requests) with the target forced behind them."""


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
    near = prompts.near_misses(case, "learn", exchanges=10, intents=6, chat=chat, seed=settings.seed)
    return _Texts(
        [problem.encoded, *places[: recipe.places], *words[: recipe.words]],
        [*places[recipe.places :], *words[recipe.words :]],
        _encode(lm, [replace(case, prompt=p) for p in near], problem.encoded),
    )


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


@dataclass(frozen=True)
class Reading:
    """One layer at everything that is learnt from. Texts are inputs [tokens, d_model] and how many come before the target."""

    joint: Bundle
    more: list[tuple[Tensor, int]]
    near: list[tuple[Tensor, int]]
    """With the target forced behind them."""
    own: list[tuple[Tensor, int]]
    """The same prompts with what the model writes there, and other cases of the run with what it is to write there."""
    guarded: Tensor
    sample: Tensor


def read(lm: LM, problem: Problem, settings: Settings, recipe: Recipe, layer: int) -> Reading | None:
    """All forwards of the clean model that the solver needs; None where the prompt has no other context."""
    texts = _texts(lm, problem, settings, recipe)
    if len(texts.joint) < 2:
        return None
    stats = statistics(lm, settings.reference)
    joint = bundle(lm, texts.joint, [layer], exact=True)[layer]
    return Reading(
        joint,
        _seen(lm, layer, texts.more),
        _seen(lm, layer, texts.near),
        _seen(lm, layer, [*_own(lm, texts.near), *_others(problem)]),
        _guarded(lm, layer, problem, joint),
        torch.cat([stats.sample[layer], stats.beyond[layer]]).float(),
    )


def _own(lm: LM, near: Sequence[Encoded]) -> list[Encoded]:
    """Prompts with what the model itself writes behind them, across line ends."""
    found = []
    for batch in alike([len(t.prompt) for t in near], 2048):
        count = max(len(near[i].target) for i in batch) + EXTRA
        room = min(count, lm.context - max(len(near[i].prompt) for i in batch))
        written = lm.generate([near[i].prompt for i in batch], room) if room > 0 else [[]] * len(batch)
        found += [
            Encoded(near[i].prompt, tuple(ids)) for i, ids in zip(batch, written, strict=True) if len(ids)
        ]
    return found


def _others(problem: Problem) -> list[Encoded]:
    """Other cases, as many as `OTHERS` tokens hold; the same ones for the same case."""
    order = list(problem.others)
    random.Random(case_key(problem.case)).shuffle(order)
    tokens = accumulate(len(encoded.ids) for encoded in order)
    return [encoded for encoded, so_far in zip(order, tokens, strict=True) if so_far <= OTHERS]


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
