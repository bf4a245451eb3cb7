"""The minimal-edit solver `mint`: the smallest change of one neuron, of two if need be, that writes a whole target.

A *rewrite* makes a neuron fire at the fault and nowhere else (rows.py) and write what every position needs; a *value*
edit changes only what a neuron writes where it fires anyway. Either way the column is the smallest vector that lifts
every target token over its rivals by a margin (column.py). This module chooses: which neuron, which layer, one or two,
cause or carrier; protects what must stay; and checks the result in the real weights. Formulas: docs/solver.md.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mint.attribution.faults import find_faults
from mint.attribution.linear import linear_scores
from mint.console import quoted
from mint.errors import CaseError, MintError
from mint.guards import first_broken
from mint.model.experts import focused_for, routes
from mint.model.hooks import record
from mint.model.lm import LM
from mint.model.margins import margins, margins_of
from mint.model.precision import fast
from mint.patch import Patch, applied, identity, versions
from mint.reference import Statistics, idle_order, other_places, sample_layers, statistics, written_energy
from mint.solver.column import Trial, fit_columns, fit_levels_too, shrink
from mint.solver.gate import Background, Inputs, fit_rows
from mint.solver.inputs import inputs_behind, inputs_of
from mint.solver.paraphrase import negative_prompts, rephrase
from mint.solver.problem import Problem, Settings, Solution, case_key
from mint.solver.rows import InputRows, own_bias, rewrite, write_more
from mint.solver.tail import CleanRun, Tail, run_clean

NAME = "mint"
WHERE = ("auto", "responsible", "idle")
RESPONSIBLE = 20
"""How many of the most guilty neurons of a layer count as responsible."""
CHEAP = 0.002
"""A responsible neuron is cheap to overwrite if it writes at most this share of its layer's energy on reference text."""
REACHABLE = 0.4
"""Largest margin aimed at, as a share of how far the best logit stands above the mean of all."""
GUARD_WEIGHT = 0.02
"""Weight of an input that must stay silent for the sake of a kept output or an earlier repair."""
MANY = 20
"""Earlier repairs at which the dial is halved."""
HEARD = 0.02
"""Least activation, as a share of that at the fault, for which a kept output or an earlier repair is looked at again."""
OPENING = 3
"""First positions of a target that stay silent behind negative prompts: many other lines begin like that, too."""


@dataclass(frozen=True)
class Recipe:
    """The dial `generalize` in numbers. Chosen on training rows; see docs/solver.md."""

    margin: float
    """Logits by which every target token must lead its best rival."""
    silence: float
    """How far below the firing threshold other inputs are pulled."""
    like_weight: float
    """Weight of each input that should fire as well."""
    variants: int
    """Rephrasings made from the prompt, and as many negative prompts."""
    ridge: float = 1e-3


_DIAL = (
    (0.0, Recipe(margin=1.0, silence=1.0, like_weight=0.05, variants=4)),
    (0.5, Recipe(margin=2.5, silence=1.0, like_weight=0.2, variants=6)),
    (1.0, Recipe(margin=8.0, silence=0.7, like_weight=0.5, variants=8)),
)


def recipe_of(settings: Settings, earlier: int = 0) -> Recipe:
    """The recipe for `settings.generalize` (0 to 1, geometric between the measured points) and `settings.margin`.

    earlier: repairs that the model carries already. Side effects of many repairs add up, so each later one reaches less
    far: the dial is divided by 1 + earlier / 20.

    Raises `MintError` for a dial outside 0 to 1 or a margin that is no positive number.
    """
    dial = settings.generalize
    if not 0 <= dial <= 1:
        raise MintError(
            f"generalize must lie between 0 and 1, found {dial}; 0 changes least, 1 carries over most"
        )
    dial /= 1 + earlier / MANY
    (low, a), (high, b) = next(pair for pair in zip(_DIAL, _DIAL[1:], strict=False) if dial <= pair[1][0])
    t = (dial - low) / (high - low)

    def between(x: float, y: float) -> float:
        return math.exp((1 - t) * math.log(x) + t * math.log(y))

    recipe = Recipe(
        between(a.margin, b.margin),
        between(a.silence, b.silence),
        between(a.like_weight, b.like_weight),
        round(between(a.variants, b.variants)),
    )
    if settings.margin is None:
        return recipe
    if not 0 < settings.margin < math.inf:
        raise MintError(
            f"margin must be a positive number of logits, found {settings.margin}; the default is 2.5"
        )
    return replace(recipe, margin=settings.margin)


# ---------------------------------------------------------------------- the task of one repair


@dataclass
class _Task:
    """What is known before a neuron is chosen."""

    lm: LM
    problem: Problem
    settings: Settings
    recipe: Recipe
    stats: Statistics
    clean: CleanRun
    target: Tensor
    fire: Tensor
    """[n] bool: positions where the neuron must act, since the target token does not lead by half a logit (`firm`: by the margin)."""
    wanted: Tensor
    """[n] margins to reach: the recipe's where the neuron fires; elsewhere half of what is there, at most the recipe's."""

    @property
    def tolerance(self) -> float:
        """Logits by which a wanted margin may be missed."""
        return 0.1 * self.recipe.margin

    def tail(self, layer: int) -> Tail:
        if layer not in self.clean.tails:
            self.clean.tails.update(run_clean(self.lm, self.problem.encoded, [layer]).tails)
        return self.clean.tails[layer]


def _prepare(lm: LM, problem: Problem, settings: Settings, layers: Sequence[int]) -> _Task:
    recipe = recipe_of(settings, len(problem.earlier))
    stats = statistics(lm, settings.reference)
    stats.measure(layers, layers)
    clean = run_clean(lm, problem.encoded, layers)
    target = torch.tensor(problem.encoded.target)
    found = margins_of(clean.logits, problem.encoded.target).cpu()
    # A margin is a number of logits; small or young models have logits too close together to give it.
    spread = float((clean.logits.amax(1) - clean.logits.mean(1)).mean())
    recipe = replace(recipe, margin=min(recipe.margin, REACHABLE * spread))
    fire = found < (recipe.margin if settings.firm else min(recipe.margin, 0.5))
    margin = torch.tensor(recipe.margin)
    wanted = torch.where(fire, margin, torch.minimum(margin, found) / 2)
    return _Task(lm, problem, settings, recipe, stats, clean, target, fire, wanted)


def _check(settings: Settings) -> None:
    if settings.where not in WHERE:
        raise MintError(f"where must be one of {', '.join(WHERE)}, found '{settings.where}'")
    if settings.max_neurons not in (1, 2):
        raise MintError(f"max_neurons must be 1 or 2, found {settings.max_neurons}")


def _layers(lm: LM, settings: Settings) -> list[int]:
    if settings.layers is None:
        return sample_layers(lm)
    bad = [layer for layer in settings.layers if not 0 <= layer < lm.n_layers]
    if bad or not settings.layers:
        raise MintError(f"layers must lie in 0 to {lm.n_layers - 1}, found {bad or 'none'}")
    for layer in settings.layers:
        lm.block(layer)
    return list(settings.layers)


# ---------------------------------------------------------------------- which neuron


@dataclass(frozen=True)
class _Carrier:
    layer: int
    index: int
    role: str
    """`responsible` or `idle`."""
    energy: float
    """Share of its layer's written energy on reference text, E[n^2] |column|^2 over the layer's sum: what is lost."""
    score: float | None
    """Linear effect of silencing it on the faults; negative: it is behind them."""


def _energies(task: _Task, layer: int) -> Tensor:
    """`written_energy` as shares of the layer's sum."""
    energy = written_energy(task.lm, task.stats, layer)
    return energy / energy.sum().clamp_min(1e-30)


def _blame(task: _Task, layers: Sequence[int]) -> list[Tensor]:
    """Linear score of every neuron for the sum of the faults, summed over positions; one tensor [d_ff] a layer.

    Against the healthy mean in `layers`, which is all that is measured; against zero in the others.
    """
    faults = find_faults(task.lm, task.problem.encoded)
    mean = [
        task.stats.neurons_mean[layer] if layer in layers else torch.zeros(task.lm.d_ff(layer))
        for layer in range(task.lm.n_layers)
    ]
    if not faults:  # every token is right, some by too little: nothing to blame
        return [torch.zeros(task.lm.d_ff(layer)) for layer in range(task.lm.n_layers)]
    return [
        s.sum(0).cpu()
        for s in linear_scores(task.lm, task.problem.encoded, faults, mean, combined=True).summed
    ]


def _idle(task: _Task, layer: int, used: Collection[tuple[int, int]]) -> list[int]:
    """The idle neurons of a layer, in the order in which this case takes them."""
    return idle_order(task.lm, task.stats, layer, case_key(task.problem.case), used)


def _carriers(task: _Task, layer: int, blame: list[Tensor] | None, count: int) -> list[_Carrier]:
    """The `count` best neurons of a layer to rewrite: responsible and cheap ones first, then idle ones."""
    energies = _energies(task, layer)
    used = {index for at, index in task.problem.used if at == layer}
    where = task.settings.where
    responsible: list[int] = []
    if blame is not None and where != "idle":
        order = blame[layer].argsort().tolist()
        guilty = [i for i in order[:RESPONSIBLE] if blame[layer][i] < 0 and i not in used]
        guilty.sort(key=lambda i: float(energies[i]))
        responsible = guilty if where == "responsible" else [i for i in guilty if energies[i] <= CHEAP]
    idle = [] if where == "responsible" else _idle(task, layer, task.problem.used)[:count]
    chosen = [(i, "responsible") for i in responsible] + [(i, "idle") for i in idle if i not in responsible]

    def score(index: int) -> float | None:
        return None if blame is None else float(blame[layer][index])

    return [_Carrier(layer, i, role, float(energies[i]), score(i)) for i, role in chosen[:count]]


# ---------------------------------------------------------------------- rewriting neurons


def _ways(fire: Tensor, most: int, signed: bool) -> list[Tensor]:
    """Levels [neurons, n] of the neurons at the target positions, in the order to be tried.

    One neuron for all positions; two that take half of them each, in reading order; two that take all of them in
    different proportions, position i at angle phi_i: then token i gains most at its own position, however many
    there are. signed: whether activations may be negative (a gated block's may), which spreads the angles wider.
    """
    ways = [fire.float()[None]]
    places = fire.nonzero().flatten()
    if most > 1 and len(places) > 1:
        half = len(places) // 2
        halves, angles = torch.zeros(2, len(fire)), torch.zeros(2, len(fire))
        halves[0, places[:half]] = halves[1, places[half:]] = 1.0
        span = 2 * math.pi * (1 - 1 / len(places)) if signed else math.pi / 2
        phi = torch.linspace(0, span, len(places))
        angles[0, places], angles[1, places] = phi.cos(), phi.sin()
        ways += [halves, angles]
    return ways


def _good(trial: Trial, task: _Task) -> bool:
    """Whether every position leads as asked, up to a fifth of the margin: the rest is left to rounding."""
    return bool((trial.margins >= task.wanted - 0.2 * task.recipe.margin).all() and (trial.margins > 0).all())


def _other_prompts(task: _Task) -> tuple[list[list[int]], int]:
    """Prompts behind which the neuron should fire as well, and how many of them mean the same (they come first)."""
    case = task.problem.case
    same = list(case.rephrasings) if task.settings.learn_rephrasings else []
    same += rephrase(case.prompt, task.recipe.variants, task.settings.seed)
    negative = negative_prompts(case.prompt, task.recipe.variants, task.settings.seed)
    fitting = [_that_fit(task, prompts) for prompts in (same, negative)]
    return fitting[0] + fitting[1], len(fitting[0])


def _that_fit(task: _Task, prompts: Sequence[str]) -> list[list[int]]:
    """Prompts of our own making as ids, without those that are too long with the target, or cannot be encoded."""
    found = []
    for prompt in prompts:
        try:
            ids = task.lm.encode_prompt(prompt)
        except CaseError:
            continue
        if len(ids) + len(task.problem.encoded.target) <= task.lm.context:
            found.append(ids)
    return found


@dataclass(frozen=True)
class _Surroundings:
    """Inputs of one layer around the fault."""

    others: Tensor
    """[prompts, n, d_model] behind other prompts."""
    same: int
    """How many of them mean the same."""
    guarded: Tensor
    """[k, d_model] of kept outputs and earlier repairs, one after the other."""
    lengths: list[int]
    """Tokens of each of them."""


def _surroundings(task: _Task, layer: int) -> _Surroundings:
    prompts, same = _other_prompts(task)
    target = task.problem.encoded.target
    tail = task.tail(layer)
    width = tail.inputs.shape[1]
    known = None if tail.prefix is None else (task.problem.encoded.prompt, tail.prefix)
    others = torch.zeros(0, len(target), width)
    if prompts:
        others = inputs_behind(task.lm, layer, prompts, target, known)
    guards = [*task.problem.keep, *task.problem.earlier]
    below = frozenset(place for place in task.problem.used if place[0] < layer)
    guarded = inputs_of(task.lm, layer, [guard.ids[:-1] for guard in guards], below)
    return _Surroundings(
        others, same, torch.cat([torch.zeros(0, width), *guarded]), [len(x) for x in guarded]
    )


def _rows(task: _Task, carrier: _Carrier, level: Tensor, around: _Surroundings, guard: float) -> InputRows:
    """Rows for one neuron with the given levels [n] at the target's positions, and behind other prompts.

    Behind negative prompts the first positions stay silent: only the later ones show that this very target is being written.
    """
    layer = carrier.layer
    tail, recipe = task.tail(layer), task.recipe
    fire = level.abs() > 1e-3
    like, like_level, unlike = [tail.inputs[:0]], [level[:0]], [tail.prompt_inputs]
    for number, inputs in enumerate(around.others):
        positions = fire.clone()
        if number >= around.same:
            positions[:OPENING] = False
            unlike.append(inputs[:OPENING])
        like.append(inputs[positions])
        like_level.append(level[positions])
    like_x, unlike_x = torch.cat(like), torch.cat(unlike)
    weights = [torch.full((len(unlike_x),), 0.1 * GUARD_WEIGHT), torch.full((len(around.guarded),), guard)]
    inputs = Inputs(
        fire=tail.inputs[fire],
        level=level[fire],
        hold=tail.inputs[~fire],
        like=like_x,
        like_level=torch.cat(like_level),
        like_weight=torch.full((len(like_x),), recipe.like_weight),
        unlike=torch.cat([unlike_x, around.guarded]),
        unlike_weight=torch.cat(weights),
    )
    stats = task.stats
    back = Background(stats.inputs_second[layer], stats.inputs_mean[layer], stats.sample[layer].float())
    lm = task.lm
    act = lm.layout.act(layer)
    return fit_rows(
        inputs,
        back,
        act,
        gated=lm.block(layer).gated,
        bias=own_bias(lm, layer, carrier.index),
        silence=recipe.silence,
        ridge=recipe.ridge,
    )


def _write(task: _Task, tail: Tail, most: int) -> tuple[Trial, int]:
    """Columns for as few neurons as suffice, and the iterations of the last attempt; the best there is if none do."""
    gated = task.lm.block(tail.layer).gated
    known = {"tolerance": task.tolerance}
    ways = _ways(task.fire, most, gated)
    trials: list[Trial] = []
    iterations = 0
    for levels in ways:
        trial, iterations = fit_columns(tail, task.target, levels, task.wanted, task.clean.logits, **known)
        trials.append(trial)
        if _good(trial, task):
            return trial, iterations
    for levels in ways[1:]:
        trial, iterations = fit_levels_too(
            tail, task.target, levels, task.wanted, task.clean.logits, signed=gated, **known
        )
        trials.append(trial)
        if _good(trial, task):
            return trial, iterations
    return max(trials, key=lambda t: float(t.margins.min())), iterations


@dataclass(frozen=True)
class _Draft:
    """A rewrite but for its input rows: what is to be written, by which neurons, and what lies around."""

    carriers: list[_Carrier]
    trial: Trial
    iterations: int
    around: _Surroundings


def _draft(task: _Task, carriers: list[_Carrier]) -> _Draft | None:
    """Columns for the first carriers (all of one layer), as few as possible; None if no column writes the target."""
    layer = carriers[0].layer
    tail = task.tail(layer)
    trial, iterations = _write(task, tail, min(task.settings.max_neurons, len(carriers)))
    if trial.margins.min() <= 0:
        return None
    trial = shrink(tail, task.target, trial, task.wanted, task.tolerance)
    return _Draft(carriers, trial, iterations, _surroundings(task, layer))


def _finish(task: _Task, draft: _Draft, guard: float = GUARD_WEIGHT) -> tuple[Patch, dict]:
    """The draft with input rows, and its details. guard: weight of the inputs that must stay silent."""
    carriers, trial, around = draft.carriers, draft.trial, draft.around
    layer = carriers[0].layer
    edits, loud, cost = [], torch.zeros(len(around.guarded)), 0.0
    act = task.lm.layout.act(layer)
    for carrier, level, column in zip(carriers, trial.levels, trial.columns, strict=False):
        rows = _rows(task, carrier, level, around, guard)
        loud = torch.maximum(loud, rows.respond(around.guarded, act).abs())
        answer = rows.respond(task.stats.sample[layer].float(), act)
        cost += float(answer.square().mean() * column.square().sum())
        cost += float(written_energy(task.lm, task.stats, layer)[carrier.index])
        edits.append(rewrite(task.lm, carrier.layer, carrier.index, rows, column))
    details = {
        "iterations": draft.iterations,
        "norm": [round(float(c.norm()), 4) for c in trial.columns],
        "carriers": [_describe(c) for c in carriers[: len(edits)]],
        "heard_by": [i for i, part in enumerate(loud.split(around.lengths)) if bool((part > HEARD).any())],
        "cost": cost,
        "spare": other_places(
            task.lm, layer, _idle(task, layer, {*task.problem.used, *((layer, e.index) for e in edits)})
        ),
    }
    return Patch(tuple(edits), identity(task.lm)), details


def _describe(carrier: _Carrier) -> dict:
    why = {
        "idle": "nearly silent on reference text, so overwriting it costs least: a carrier, not the cause",
        "responsible": "attribution blames it and it writes little elsewhere",
        "given": "asked for",
    }[carrier.role]
    return {
        "layer": carrier.layer,
        "index": carrier.index,
        "role": carrier.role,
        "energy_share": carrier.energy,
        "linear_score": carrier.score,
        "why": why,
    }


# ---------------------------------------------------------------------- value edits


def _value_edit(task: _Task, blame: list[Tensor], layers: Sequence[int]) -> tuple[Patch, dict] | None:
    """Change only what one responsible neuron writes: for a single wrong token, on the most selective candidate.

    Candidates by effect on the fault against activity elsewhere, n(fault)^2 / E[n^2] (attribution notes, section 3).
    """
    if int(task.fire.sum()) != 1:
        return None
    lm, encoded = task.lm, task.problem.encoded
    place = int(task.fire.nonzero()[0])
    with torch.no_grad(), record(lm, list(layers)) as seen:
        lm.logits([encoded.ids[:-1]], [[0]])
    position = encoded.positions[place]
    used = task.problem.used
    candidates = []
    for layer in layers:
        n = seen[layer][0].float().cpu()
        selective = n[position].square() / task.stats.neurons_energy[layer].clamp_min(1e-12)
        for index in blame[layer].argsort()[:RESPONSIBLE].tolist():
            if blame[layer][index] < 0 and (layer, index) not in used:
                candidates.append((float(selective[index]), layer, index, n[:, index]))
    for selective, layer, index, n in sorted(candidates, key=lambda c: -c[0])[:2]:
        if selective < 25:  # the neuron must be five times its usual size, or its change is felt everywhere
            break
        tail = run_clean(lm, encoded, [layer], whole=True).tails[layer]
        levels = n[None]
        trial, iterations = fit_columns(
            tail, task.target, levels, task.wanted, task.clean.logits, tolerance=task.tolerance
        )
        if not _good(trial, task):
            continue
        trial = shrink(tail, task.target, trial, task.wanted, task.tolerance)
        patch = Patch((write_more(lm, layer, index, trial.columns[0]),), identity(lm))
        energy = float(_energies(task, layer)[index])
        carrier = _Carrier(layer, index, "responsible", energy, float(blame[layer][index]))
        cost = float(task.stats.neurons_energy[layer][index] * trial.columns[0].square().sum())
        details = {
            "iterations": iterations,
            "selectivity": selective,
            "carriers": [_describe(carrier)],
            "cost": cost,
        }
        return patch, details | {"norm": [float(trial.columns.norm())]}
    return None


# ---------------------------------------------------------------------- the whole


def _holds(task: _Task, patch: Patch, details: dict) -> tuple[float, str | None]:
    """Margin of the target in the real weights, and what else broke, if anything."""
    lm, problem = task.lm, task.problem
    with torch.no_grad(), applied(lm, patch):
        least = float(margins(lm, problem.encoded).min())
        if not least > 0:
            return least, "the edit does not hold in the rounded weights"
        # A neuron that is silent at an earlier repair changes nothing there; looking again would cost a forward each.
        first = len(problem.keep)
        heard = details.get("heard_by", range(first, first + len(problem.earlier)))
        earlier = [(i - first, problem.earlier[i - first]) for i in heard if i >= first]
        for name, guards in (("kept output", list(enumerate(problem.keep))), ("earlier repair", earlier)):
            if (broken := first_broken(lm, [guard for _, guard in guards])) is not None:
                return least, f"{name} {guards[broken][0] + 1} would change"
    return least, None


def solve_at(lm: LM, problem: Problem, settings: Settings, neurons: Sequence[tuple[int, int]]) -> Solution:
    """Rewrite the given neurons (all of one layer), as few of them as suffice. The solver without its choices."""
    return _timed(lm, lambda: _solve_given(lm, problem, settings, neurons))


def _solve_given(
    lm: LM, problem: Problem, settings: Settings, neurons: Sequence[tuple[int, int]]
) -> Solution:
    _check(settings)
    layers = sorted({layer for layer, _ in neurons})
    if len(layers) != 1:
        return Solution(NAME, None, "two neurons must lie in one layer to share a target")
    task = _prepare(lm, problem, settings, layers)
    carriers = [
        _Carrier(layer, index, "given", float(_energies(task, layer)[index]), None)
        for layer, index in neurons
    ]
    if not task.fire.any():
        return _already(task)
    draft = _draft(task, carriers)
    if draft is None:
        return Solution(NAME, None, _needs_more(task, layers), details={"layers": layers})
    patch, details = _finish(task, draft)
    return _settle(task, patch, details) or Solution(NAME, None, details["refused"], details=details)


def _already(task: _Task) -> Solution:
    least = float(margins(task.lm, task.problem.encoded).min())
    return Solution(NAME, None, "the model already writes the target with this margin", least)


def _needs_more(task: _Task, layers: Sequence[int]) -> str:
    """Why there is no edit, and how much of the target could be had, found by trying."""
    wrong, n = int(task.fire.sum()), len(task.target)
    most = task.settings.max_neurons
    together, heard = "together", _heard(task, layers)
    if heard < wrong:
        together = f"when no expert gets more than {heard} of them"
    head = f"{most} neuron(s) of one layer cannot write all {wrong} wrong tokens {together}"
    allow = " or allow --max-neurons 2" if most == 1 else ""
    had = _reach(task, layers[0])
    if not had:
        return f"{head}; lower --margin (now {task.recipe.margin:g}){allow}"
    prompt, target = task.problem.encoded.prompt, task.problem.encoded.target
    end = task.lm.continuation(prompt, target[:had])[-24:]
    return (
        f"{head}; the first {had} of its {n} tokens can be had, up to {quoted(end)}: repair those with --stop none and the"
        f" rest behind them with --patch, or lower --margin (now {task.recipe.margin:g}){allow}"
    )


def _heard(task: _Task, layers: Sequence[int]) -> int:
    """To how many of the positions that must change a neuron of the layers' blocks can speak: a routed expert's acts on
    the tokens that are sent to it, any other's on all."""
    encoded = task.problem.encoded
    places = torch.tensor(encoded.positions)[task.fire]
    experts = {layer: task.lm.block(layer).expert for layer in layers}
    if any(expert is None for expert in experts.values()):
        return len(places)
    sent = routes(task.lm, encoded.ids[:-1])
    return max(
        int((sent[layer].share(expert)[0].cpu()[places] > 0).sum())
        for layer, expert in experts.items()
        if expert is not None
    )


def _reach(task: _Task, layer: int) -> int:
    """How many of the first target tokens the neurons of a layer can write together: bisected to a tenth of the target."""
    lm, encoded = task.lm, task.problem.encoded
    low, high = 0, len(encoded.target)
    while high - low > max(1, len(encoded.target) // 10):
        middle = (low + high) // 2
        short = replace(encoded, target=encoded.target[:middle], n_stop=0, stop=None)
        part = _prepare(lm, replace(task.problem, encoded=short), task.settings, [layer])
        holds = not part.fire.any() or any(
            bool((trial.margins > 0).all()) for trial in _quick_trials(part, part.tail(layer))
        )
        low, high = (middle, high) if holds else (low, middle)
    return low


def _quick_trials(task: _Task, tail: Tail) -> Iterator[Trial]:
    """Columns for every way to share the target's positions."""
    for levels in _ways(task.fire, task.settings.max_neurons, task.lm.block(tail.layer).gated):
        yield fit_columns(
            tail, task.target, levels, task.wanted, task.clean.logits, tolerance=task.tolerance
        )[0]


def _settle(task: _Task, patch: Patch, details: dict) -> Solution | None:
    """The solution if the patch holds in the real weights; None, with the reason in `details`, if not."""
    least, broken = _holds(task, patch, details)
    if broken is not None:
        details["refused"] = broken
        return None
    recipe = task.recipe
    info = {
        "solver": NAME,
        "spare": details.get("spare", []),
        "settings": {
            "margin": recipe.margin,
            "generalize": task.settings.generalize,
            "where": task.settings.where,
        },
        "versions": versions(),
    }
    return Solution(
        NAME, replace(patch, info=info), None, least, details=details | {"margin_aimed": recipe.margin}
    )


def solve(lm: LM, problem: Problem, settings: Settings) -> Solution:
    """Find the smallest acceptable edit. The model is left as it was.

    Layers are tried in the order of `sample_layers`; in each, one neuron, then two. `settings.where` restricts the
    choice of neurons; `auto` takes a responsible neuron where overwriting it is cheap, else an idle one. Kept outputs
    and earlier repairs are protected by silence at their inputs, and looked at again. Raises `MintError` for settings
    that make no sense; otherwise a failure is a `Solution` without a change and with a reason.
    """
    return _timed(lm, lambda: _solve(_narrowed(lm, problem), problem, settings))


def _narrowed(lm: LM, problem: Problem) -> LM:
    """The model with one routed expert as the block of every layer that has no other; a dense model as it is."""
    encoded = problem.encoded
    if not lm.layout.experts:
        return lm
    short = margins(lm, encoded) < 0.5
    wrong = [at for at, is_short in zip(encoded.positions, short.tolist(), strict=True) if is_short]
    return focused_for(lm, encoded.ids[:-1], wrong or encoded.positions)


def _timed(lm: LM, run: Callable[[], Solution]) -> Solution:
    started = time.perf_counter()
    with fast(lm):
        solution = run()
    return replace(solution, seconds=time.perf_counter() - started)


def _solve(lm: LM, problem: Problem, settings: Settings) -> Solution:
    _check(settings)
    layers = _layers(lm, settings)
    task = _prepare(lm, problem, settings, layers)
    if not task.fire.any():
        return _already(task)
    single = int(task.fire.sum()) == 1
    blame = (
        _blame(task, layers)
        if settings.where == "responsible" or (settings.where == "auto" and single)
        else None
    )
    tried: list[dict] = []
    value: Solution | None = None
    if blame is not None and (found := _value_edit(task, blame, layers)):
        value = _settle(task, *found)
        if value is None:
            tried.append(found[1])
        elif settings.where == "responsible":
            return value
    reason: str | None = None
    for layer in layers:
        carriers = _carriers(task, layer, blame, settings.max_neurons)
        draft = _draft(task, carriers) if carriers else None
        if draft is None:
            continue
        for guard in (GUARD_WEIGHT, 50 * GUARD_WEIGHT, 2500 * GUARD_WEIGHT):
            patch, details = _finish(task, draft, guard)
            if solution := _settle(task, patch, details):
                cheaper = value if value and value.details["cost"] <= details["cost"] else solution
                return replace(cheaper, details=cheaper.details | {"tried": tried})
            tried.append(details)
            reason = details["refused"]
    if value is not None:
        return value
    reason = reason or _needs_more(task, layers)
    return Solution(NAME, None, reason, details={"tried": tried, "layers": layers})
