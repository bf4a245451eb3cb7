"""The solver of rules: one neuron that writes the right text at every prompt of a kind, learnt from a few of them.

A linear classifier on a layer's inputs says where the neuron fires (solver/classifier.py), one column says what it writes
(column.py). Whatever has to be chosen (layer, ridge, threshold, which neuron, one or two) is chosen by how an edit does
at learn prompts that were left out of it. Knows nothing about files, mining or generated text. Formulas: docs/rules.md.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mint.console import Say, quiet
from mint.errors import MintError
from mint.model.lm import LM, Encoded
from mint.patch import NeuronEdit, Patch, applied, identity, make_edit, versions
from mint.reference import Statistics, sample_layers, statistics
from mint.rules import column as program
from mint.rules.contexts import in_other_contexts
from mint.rules.neuron import (
    Neuron,
    Reading,
    idle_neuron,
    learn_gates,
    own_direction,
    place_groups,
    read_layer,
    responsible_neurons,
    value_edit,
)
from mint.solver.bundle import Bundle, bundle
from mint.solver.problem import Solution

NAME = "rule"
REACHABLE = 0.4
"""Largest margin aimed at, as a share of how far the best logit stands above the mean of all."""
MARGIN = 4.0
"""Default margin, in logits over the soft maximum of all rivals."""
PRICE = 0.3
"""Cost of one logit short, in units of the squared length of the residual stream."""
FLOOR = 0.35
"""Least activation at which the column must work at a fault, as a share of the typical one."""
ITERATIONS = 6
HEARD = 0.02
"""Activation from which on a kept text is looked at again."""
KEEP_TOKENS = 2
"""First tokens of a kept text that the column must leave as they are."""
LOO_DAMPING = 0.2
"""Holds the columns of cross-validation near the one that they leave a text out of, where the linear model is good."""
LOUD = 0.03
"""What a neuron writes counts as loud from this share of the residual stream's length on."""
LOUD_COST = 20.0
"""What a share of loud reference inputs costs, against shares of prompts held out."""
FINALISTS = 2
"""Gates, each of another layer, that get a column of their own."""
FEW = 4
"""Learn prompts below which further ones are made by putting their last lines behind other code."""
FEW_RIDGE = 2.0
"""Ridge of the gate where prompts had to be made."""
ROUNDS = 3
"""How often the solver looks for kept texts that broke, and gives them more weight."""


@dataclass(frozen=True)
class RuleSettings:
    """What a user may ask of the solver of rules."""

    max_neurons: int = 2
    """Most neurons that may change; 1 or 2. A second is taken only where one cannot write the target."""
    margin: float | None = None
    """Logits by which every target token must lead at the learn prompts; None: 4, less where logits lie closer."""
    layers: tuple[int, ...] | None = None
    """Layers to edit in; None: the first three of `sample_layers`, the best by cross-validation."""
    where: str = "auto"
    """`responsible`: only neurons that attribution blames; `idle`: only idle carriers; `auto`: the best of all."""
    folds: int = 8
    """Most parts that the learn prompts are split into for cross-validation; each is left out once."""
    ridges: tuple[float, ...] = (0.05, 0.5)
    """Softness of the classifier's margin (its ridge over d_model), tried in turn."""
    silence: float = 0.3
    """How far below zero the classifier pulls other inputs."""
    thresholds: tuple[float, ...] = (0.2, 0.5, 0.8)
    """Where the neuron starts to fire, from other inputs (0) to the weakest held-out fault (1), tried in turn."""
    reference: tuple[str, ...] = ()
    """The user's own text files, for `mint.reference.statistics` beside the text that ships."""
    seed: int = 0


WHERE = ("auto", "responsible", "idle")


def _check(learn: Sequence[Encoded], settings: RuleSettings) -> None:
    if not learn:
        raise MintError("a rule needs at least one learn prompt, found none; mine call sites first")
    if settings.max_neurons not in (1, 2):
        raise MintError(f"max_neurons must be 1 or 2, found {settings.max_neurons}")
    if settings.where not in WHERE:
        raise MintError(f"where must be one of {', '.join(WHERE)}, found '{settings.where}'")
    if settings.margin is not None and not 0 < settings.margin < float("inf"):
        raise MintError(
            f"margin must be a positive number of logits, found {settings.margin}; the default is 4"
        )


# ---------------------------------------------------------------------- one candidate


@dataclass(frozen=True)
class Candidate:
    """An edit, and how edits made like it do at prompts that were left out of them."""

    reading: Reading
    neurons: tuple[Neuron, ...]
    columns: Tensor
    """[neurons, d_model]."""
    right: float
    """Share of learn prompts that an edit made without them gets right, teacher-forced."""
    kept: float
    """Share of kept texts that gates made without them leave as they are, teacher-forced."""
    loud: float
    """Share of reference inputs at which the neurons write more than `LOUD` of the residual stream's length."""
    held: Tensor
    """[learn prompts] the smallest held-out margin."""
    margins: Tensor
    """[learn prompts] the smallest margin of the edit itself."""
    iterations: int

    @property
    def score(self) -> float:
        """Held-out prompts right and texts kept, less what is heard elsewhere; near ties go to the larger margins."""
        tie = float(self.held.clamp(-3, 3).mean()) / 30
        learnt = float((self.margins > 0).float().mean())
        return self.right + self.kept + learnt - LOUD_COST * self.loud + tie

    def describe(self) -> dict:
        """JSON values."""
        return {
            "layer": self.reading.layer,
            "neurons": [n.describe() for n in self.neurons],
            "held_out_right": round(self.right, 4),
            "held_out_kept": round(self.kept, 4),
            "loud_share": round(self.loud, 6),
            "learnt": round(float((self.margins > 0).float().mean()), 4),
            "norm": round(float(self.columns.norm()), 3),
            "score": round(self.score, 4),
        }


def _wanted(bundle_: Bundle, fire: Tensor, margin: float) -> Tensor:
    """[b, m]: the margin where the neuron fires; elsewhere at most half of what is there may be lost."""
    rest = bundle_.clean_soft - bundle_.clean.clamp(min=0, max=2 * margin) / 2
    wanted = torch.where(fire, torch.tensor(margin), rest.clamp(max=margin))
    return wanted.masked_fill(~bundle_.real, -torch.inf)


def _task(
    bundle_: Bundle, levels: Tensor, wanted: Tensor, price: Tensor, neurons: Sequence[Neuron], lm: LM
) -> program.Task:
    base = torch.zeros_like(bundle_.inputs)
    for neuron in neurons:
        if neuron.overwritten:
            old = lm.columns(bundle_.layer)[neuron.index].float().cpu()
            base = base - bundle_.neurons[..., neuron.index, None] * old
    return program.Task(bundle_, levels, wanted, price, base)


def _smallest(found: Tensor, real: Tensor) -> Tensor:
    return found.masked_fill(~real, torch.inf).amin(1)


def _fit(
    lm: LM,
    at: Reading,
    neurons: Sequence[Neuron],
    margin: float,
    keep_price: Tensor | None,
    start: Tensor | None,
) -> Candidate:
    """Columns for neurons whose rows are given, and the cross-validation of the whole."""
    size = at.size
    learn = at.learn
    levels = torch.stack([n.levels for n in neurons], 1)  # [2, k, b, m]
    # A prompt that the gate would hardly have seen cannot shape the column: its scenario is a floor.
    fire = torch.stack([n.fire for n in neurons])
    trained = levels.clone()
    trained[1] = torch.where(fire, levels[1].clamp(min=FLOOR), levels[1])
    price = torch.full((len(learn),), PRICE * size)
    tasks = [_task(learn, trained, _wanted(learn, at.fire, margin), price, neurons, lm)]
    keep_levels = torch.stack([n.keep_levels for n in neurons], 1)  # [2, k, kept texts, m]
    heard = (keep_levels.abs() > HEARD).any(0).any(0).any(1).nonzero()[:, 0]
    close = keep_levels[:, :, heard, :KEEP_TOKENS]
    if at.keep is not None and len(heard):
        few = at.keep.part(heard, KEEP_TOKENS)
        close = close[..., : few.real.shape[1]]
        louder = torch.where(close[0].abs() > close[1].abs(), close[0], close[1])[None]
        worth = torch.ones(len(heard)) if keep_price is None else keep_price[heard]
        wanted = _wanted(few, torch.zeros_like(few.real), margin)
        tasks.append(_task(few, louder, wanted, worth * PRICE * size, neurons, lm))
    first = torch.zeros(len(neurons), learn.inputs.shape[2]) if start is None else start
    found = program.fit(tasks, first, ITERATIONS)
    # Leave one text out: the programme of the last iteration without its constraints, the gate without its fold.
    flat = found.columns.flatten()
    without = torch.stack(
        [found.linear.solve(i, flat, LOO_DAMPING).view_as(found.columns) for i in range(len(learn))], 1
    )  # [k, b, d]
    judged = replace(tasks[0], levels=levels)
    held = _smallest(program.margins(judged, 1, without)[0], learn.real)
    full = _smallest(program.margins(judged, 0, found.columns)[0], learn.real)
    kept = 1.0
    if at.keep is not None and len(heard):
        # The same for what must stay: without its constraints, and as a gate answers that had not seen it.
        apart = torch.stack(
            [
                found.linear.solve(len(learn) + j, flat, LOO_DAMPING).view_as(found.columns)
                for j in range(len(heard))
            ],
            1,
        )
        unseen = replace(tasks[1], levels=close[1:])
        after = _smallest(program.margins(unseen, 0, apart)[0], unseen.bundle.real)
        kept = 1 - float((after <= 0).sum()) / len(at.keep)
    written = torch.stack([n.elsewhere for n in neurons], 1) @ found.columns  # [samples, d]
    loud = float((written.norm(dim=1) > LOUD * size**0.5).float().mean())
    return Candidate(
        at,
        tuple(neurons),
        found.columns,
        float((held > 0).float().mean()),
        kept,
        loud,
        held,
        full,
        found.iterations,
    )


def _edits(lm: LM, candidate: Candidate) -> tuple[NeuronEdit, ...]:
    layer = candidate.reading.layer
    edits = []
    for neuron, column in zip(candidate.neurons, candidate.columns, strict=True):
        if not neuron.overwritten:
            old = lm.columns(layer)[neuron.index].float().cpu()
            edits.append(make_edit(lm, layer, neuron.index, {"out": old + column / neuron.rows.gain}))
            continue
        after = {"out": column / neuron.rows.gain, "gate": neuron.rows.gate}
        if neuron.rows.up is not None:
            after["up"] = neuron.rows.up
        slices = lm.block(layer).slices(neuron.index)
        after |= {role: torch.zeros(()) for role in slices if role.endswith("_bias")}
        edits.append(make_edit(lm, layer, neuron.index, after))
    return tuple(edits)


# ---------------------------------------------------------------------- the choice


@dataclass(frozen=True)
class _Job:
    """What stays the same over all candidates."""

    lm: LM
    settings: RuleSettings
    stats: Statistics
    margin: float
    used: frozenset[tuple[int, int]]
    say: Say


def _gated_neurons(
    job: _Job, at: Reading, groups: Sequence[Tensor], taken: int | None = None
) -> list[list[Neuron]]:
    """Ways to give a layer neurons with learnt gates, one neuron a group of places: the best, best first."""
    ways: list[list[Neuron]] = [[]]
    indices: set[tuple[int, int]] = set(job.used)
    for places in groups:
        index = taken if taken is not None else idle_neuron(job.lm, job.stats, at.layer, frozenset(indices))
        indices.add((at.layer, index))
        tried = [
            neuron
            for ridge in job.settings.ridges
            for neuron in learn_gates(
                job.lm, at, places, index, ridge, job.settings.silence, job.settings.thresholds
            )
        ]
        tried.sort(key=lambda n: -n.promise)
        ways = [way + [neuron] for way in ways for neuron in tried[:1]]
    return ways


def _promise(way: Sequence[Neuron]) -> float:
    return min(n.promise for n in way)


def _carried(job: _Job, readings: Sequence[Reading]) -> list[Candidate]:
    """Rewrites of idle neurons: the most promising gate of each layer, a column for the best few."""
    ways = [(at, way) for at in readings for way in _gated_neurons(job, at, [at.fire])]
    ways.sort(key=lambda pair: -_promise(pair[1]))
    found = []
    for at, way in ways[:FINALISTS]:
        found.append(_fit(job.lm, at, way, job.margin, None, None))
        _tell(job, found[-1])
    best = max(found, key=lambda c: c.score)
    if job.settings.max_neurons == 2 and not bool((best.margins > 0).all()):
        at = best.reading
        groups = place_groups(at.fire)
        for way in _gated_neurons(job, at, groups) if len(groups) == 2 else []:
            found.append(_fit(job.lm, at, way, job.margin, None, None))
            _tell(job, found[-1])
    return found


def _caused(job: _Job, readings: Sequence[Reading]) -> tuple[list[Candidate], list[dict]]:
    """Edits of the neurons that attribution blames, as they are and sharpened; and the ranking."""
    lm, found = job.lm, []
    ranked = responsible_neurons(lm, job.stats, readings, job.used)
    for suspect in ranked[:1]:
        at, how = suspect.reading, job.settings
        prior = own_direction(lm, at, suspect.index)
        ways = [
            neuron
            for ridge in how.ridges
            for neuron in learn_gates(
                lm, at, at.fire, suspect.index, ridge, how.silence, how.thresholds, prior
            )
        ]
        chosen = [value_edit(lm, at, suspect), max(ways, key=lambda n: n.promise)]
        for neuron in (n for n in chosen if n is not None):
            found.append(_fit(lm, at, [neuron], job.margin, None, None))
            _tell(job, found[-1])
    return found, [s.describe() for s in ranked[:10]]


def _tell(job: _Job, candidate: Candidate) -> None:
    kinds = ", ".join(n.kind for n in candidate.neurons)
    job.say(
        f"layer {candidate.reading.layer}, {kinds}: {candidate.right:.0%} of the prompts left out are right,"
        f" {candidate.kept:.0%} of what must stay is kept"
    )


def _checked(job: _Job, candidate: Candidate) -> tuple[Patch, Tensor, list[int]]:
    """The patch, the smallest margins [learn prompts] in the real weights, and the kept texts that break there."""
    patch = Patch(_edits(job.lm, candidate), identity(job.lm))
    at = candidate.reading
    with applied(job.lm, patch):
        now = _smallest(at.learn.present_margins(), at.learn.real)
        broken: list[int] = []
        if at.keep is not None:
            after = _smallest(at.keep.present_margins(), at.keep.real)
            before = _smallest(at.keep.clean, at.keep.real)
            broken = ((after <= 0) & (before > 0)).nonzero()[:, 0].tolist()
    return patch, now, broken


def _settled(job: _Job, candidate: Candidate) -> tuple[Candidate, Patch, Tensor, list[int], int]:
    """The candidate, made again with more weight on kept texts that it breaks, as long as that helps."""
    at = candidate.reading
    patch, now, broken = _checked(job, candidate)
    best = (candidate, patch, now, broken)
    weight = torch.ones(len(at.keep)) if at.keep is not None else torch.ones(0)
    rounds = 0
    while broken and rounds < ROUNDS and all(n.settings is not None for n in candidate.neurons):
        rounds += 1
        weight[broken] *= 4
        heavier = at.weighted(weight)
        neurons = [n.again(job.lm, heavier) for n in candidate.neurons]
        candidate = _fit(job.lm, heavier, neurons, job.margin, weight, candidate.columns)
        patch, now, broken = _checked(job, candidate)
        if (int((now <= 0).sum()), len(broken)) < (int((best[2] <= 0).sum()), len(best[3])):
            best = (candidate, patch, now, broken)
    return *best, rounds


# ---------------------------------------------------------------------- the whole


def layers_of(lm: LM, settings: RuleSettings) -> list[int]:
    """The layers that a rule may be solved in."""
    return list(settings.layers) if settings.layers is not None else sample_layers(lm)[:3]


def solve_rule(
    lm: LM,
    learn: Sequence[Encoded],
    keep: Sequence[Encoded],
    settings: RuleSettings,
    *,
    wrong: Sequence[tuple[int, ...]] | None = None,
    earlier: Sequence[Encoded] = (),
    used: frozenset[tuple[int, int]] = frozenset(),
    say: Say = quiet,
) -> Solution:
    """One joint edit under which every learn prompt is followed by its target. The model is left as it was.

    learn: prompts and right texts; a last token that begins with the right one counts as right. keep: prompts and what
    the model writes there now; must stay. wrong: what it writes at the learn prompts; places of any prompt where the
    same tokens follow are not taught to be silent. earlier: guards of earlier repairs, kept like `keep`. used: neurons not
    to be rewritten again. Raises `MintError` for settings or texts that make no sense; otherwise a failure is a `Solution`
    without a change. A change may still miss some learn prompts: `details["conflicts"]` lists their indices.
    """
    started = time.perf_counter()
    _check(learn, settings)
    stats = statistics(lm, settings.reference, say)
    layers = layers_of(lm, settings)
    stats.measure(layers, layers)  # one pass over the text for all of them
    guards = [*keep, *earlier]
    made, groups = (
        in_other_contexts(lm, learn, FEW, settings) if len(learn) < FEW else ([], list(range(len(learn))))
    )
    texts = [*learn, *made]
    say(f"reading {len(texts)} prompts to learn from and {len(guards)} to keep")
    learnt = bundle(lm, texts, layers)
    kept = bundle(lm, guards, layers, exact=True) if guards else {}
    habits = {tuple(w) for w in wrong or ()}
    readings = [
        read_layer(lm, stats, learnt[layer], kept.get(layer), groups, settings.folds, texts, guards, habits)
        for layer in layers
    ]
    if made:
        # Prompts made from one another cannot show what varies: the softest gate that there is, early awake.
        settings = replace(settings, ridges=(FEW_RIDGE,), thresholds=settings.thresholds[:1])
    solution = solve_readings(lm, readings, len(learn), settings, stats, used, say)
    return replace(solution, seconds=time.perf_counter() - started)


def solve_readings(
    lm: LM,
    readings: Sequence[Reading],
    n: int,
    settings: RuleSettings,
    stats: Statistics,
    used: frozenset[tuple[int, int]] = frozenset(),
    say: Say = quiet,
) -> Solution:
    """`solve_rule` for texts that were read already; the first n of them are the user's own."""
    first = readings[0].learn
    own = torch.arange(n)
    if bool((_smallest(first.clean, first.real)[own] > 0).all()):
        return Solution(NAME, None, "the model already writes the right text at every learn prompt")
    # A margin is a number of logits; small or young models have logits too close together to give it.
    margin = min(settings.margin or MARGIN, REACHABLE * first.spread)
    job = _Job(lm, settings, stats, margin, used, say)
    candidates: list[Candidate] = []
    ranking: list[dict] = []
    if settings.where != "responsible":
        candidates += _carried(job, readings)
    if settings.where != "idle":
        caused, ranking = _caused(job, readings)
        candidates += caused
    if not candidates:
        return Solution(NAME, None, "no neuron of these layers is to blame; allow idle ones (where 'auto')")
    candidates.sort(key=lambda c: -c.score)
    best, patch, now, broken, rounds = _settled(job, candidates[0])
    own_now = now[own]
    cause = any(neuron.role == "responsible" for neuron in best.neurons)
    details = best.describe() | {
        "margin_aimed": margin,
        "verdict": "cause" if cause else "carrier",
        "candidates": [c.describe() for c in candidates],
        "responsible": ranking,
        "conflicts": (own_now <= 0).nonzero()[:, 0].tolist(),
        "held_out_margins": [round(m, 3) for m in best.held[own].tolist()],
        "learn_margins": [round(m, 3) for m in own_now.tolist()],
        "broken_keep": broken,
        "rounds": rounds,
        "prompts_made": len(first) - n,
    }
    least = float(own_now.min())
    if not bool((own_now > 0).any()):
        reason = (
            f"no edit of {settings.max_neurons} neuron(s) writes the right text at any learn prompt; repair one prompt as"
            " a case, or give learn prompts that have more in common"
        )
        return Solution(NAME, None, reason, least, details=details)
    info = {
        "solver": NAME,
        "settings": {"margin": margin, "where": settings.where},
        "versions": versions(),
    }
    return Solution(NAME, replace(patch, info=info), None, least, details=details)
