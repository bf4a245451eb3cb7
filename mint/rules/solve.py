"""The solver of rules: one neuron that writes the right text at every prompt of a kind, learnt from a few of them.

A linear classifier on a layer's inputs says where the neuron fires (solver/classifier.py), one column says what it writes
(solver/joint.py). Whatever has to be chosen (layer, ridge, threshold, which neuron, one or two) is chosen by how an edit does
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
from mint.patch import NeuronEdit, Patch, applied, identity, versions
from mint.reference import Statistics, idle_order, other_places, sample_layers, statistics
from mint.rules.contexts import in_other_contexts
from mint.rules.neuron import (
    Habit,
    Neuron,
    Reading,
    Texts,
    folds_of,
    habit_of,
    learn_gates,
    own_direction,
    place_groups,
    read_layer,
    responsible_neurons,
    value_edit,
)
from mint.solver import joint
from mint.solver.bundle import Bundle, bundle
from mint.solver.problem import Solution
from mint.solver.rows import rewrite, write_more

NAME = "rule"
REACHABLE = 0.4
"""Largest margin aimed at, as a share of how far the best logit stands above the mean of all."""
MARGIN = 4.0
"""Default margin, in logits over the soft maximum of all rivals."""
PRICE = 3.0
"""Cost of one logit short, in units of the squared length of the residual stream."""
RAISES = 2
"""How often that cost may be raised ten-fold, as long as a learn prompt stays wrong."""
FLOOR = 0.35
"""Least activation at which the column must work at a fault, as a share of the typical one."""
ITERATIONS = 8
HEARD = 0.02
"""Activation from which on a kept text is looked at again."""
KEEP_TOKENS = 4
"""First tokens of a kept text that the column must leave as they are."""
LOO_DAMPING = 0.2
"""Holds the columns of cross-validation near the one that they leave a text out of, where the linear model is good."""
LOUD = 0.03
"""What a neuron writes counts as loud from this share of the residual stream's length on."""
LOUD_COST = 20.0
"""What a share of loud reference inputs costs, against shares of prompts held out."""
HOPELESS = 0.5
"""How much less a blamed neuron's firing may promise than a carrier's, to get a column of its own."""
FINALISTS = 2
"""Gates, each of another layer, that get a column of their own."""
FEW = 4
"""Learn prompts below which further ones are made by putting their last lines behind other code."""
EACH = 2
"""Further faults made from each learn prompt, by putting its last lines behind other code, for the gate to learn from."""
FEW_RIDGE = 2.0
"""Ridge of the gate where prompts had to be made."""


@dataclass(frozen=True)
class RuleSettings:
    """What a user may ask of the solver of rules."""

    max_neurons: int = 2
    """Most neurons that may change; 1 or 2. A second is taken only where one cannot write the target."""
    margin: float | None = None
    """Logits by which every target token must lead at the learn prompts; None: 4, less where logits lie closer."""
    layers: tuple[int, ...] | None = None
    """Layers to edit in; None: the first two of `sample_layers`, the best by cross-validation."""
    where: str = "auto"
    """`responsible`: only neurons that attribution blames; `idle`: only idle carriers; `auto`: the best of all."""
    folds: int = 8
    """Most parts that the learn prompts are split into for cross-validation; each is left out once."""
    ridges: tuple[float, ...] = (0.2, 0.5)
    """Softness of the classifier's margin (its ridge over d_model), tried in turn."""
    silence: float = 0.3
    """How far below zero the classifier pulls other inputs."""
    thresholds: tuple[float, ...] = (-0.3, 0.0, 0.3)
    """Where the neuron starts to fire, from the loudest other inputs (0) to a typical held-out fault (1), tried in turn."""
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


def _demand(
    bundle_: Bundle, levels: Tensor, wanted: Tensor, price: Tensor, neurons: Sequence[Neuron]
) -> joint.Demand:
    base = joint.lost(bundle_, [n.index for n in neurons if n.overwritten])
    return joint.Demand(bundle_, levels, wanted, price, base)


def _smallest(found: Tensor, real: Tensor) -> Tensor:
    return found.masked_fill(~real, torch.inf).amin(1)


def _fit(at: Reading, neurons: Sequence[Neuron], margin: float) -> Candidate:
    """Columns for neurons whose rows are given, and the cross-validation of the whole."""
    size = at.size
    learn = at.learn
    levels = torch.stack([n.levels for n in neurons], 1)  # [2, k, b, m]
    # A prompt that the gate would hardly have seen cannot shape the column: its scenario is a floor.
    fire = torch.stack([n.fire for n in neurons])
    trained = levels.clone()
    trained[1] = torch.where(fire, levels[1].clamp(min=FLOOR), levels[1])
    price = torch.full((len(learn),), PRICE * size)
    demands = [_demand(learn, trained, _wanted(learn, at.fire, margin), price, neurons)]
    keep_levels = torch.stack([n.keep_levels for n in neurons], 1)  # [2, k, kept texts, m]
    heard = (keep_levels.abs() > HEARD).any(0).any(0).any(1).nonzero()[:, 0]
    close = keep_levels[:, :, heard, :KEEP_TOKENS]
    if at.keep is not None and len(heard):
        few = at.keep.part(heard, KEEP_TOKENS)
        close = close[..., : few.real.shape[1]]
        louder = torch.where(close[0].abs() > close[1].abs(), close[0], close[1])[None]
        wanted = _wanted(few, torch.zeros_like(few.real), margin)
        demands.append(_demand(few, louder, wanted, torch.full((len(heard),), PRICE * size), neurons))
    found = joint.fit(demands, torch.zeros(len(neurons), learn.inputs.shape[2]), ITERATIONS)
    for _ in range(RAISES):
        # A price that buys every margin is not known beforehand: raised while a learn prompt would stay wrong.
        if bool((_smallest(demands[0].margins(0, found.columns)[0], learn.real) > 0).all()):
            break
        demands = [replace(d, price=10 * d.price) for d in demands]
        found = joint.fit(demands, found.columns, ITERATIONS)
    # Leave one text out: the programme of the last iteration without its constraints, the gate without its fold.
    flat = found.columns.flatten()
    without = torch.stack(
        [found.linear.solve(i, flat, LOO_DAMPING).view_as(found.columns) for i in range(len(learn))], 1
    )  # [k, b, d]
    judged = replace(demands[0], levels=levels)
    held = _smallest(judged.margins(1, without)[0], learn.real)
    full = _smallest(judged.margins(0, found.columns)[0], learn.real)
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
        unseen = replace(demands[1], levels=close[1:])
        after = _smallest(unseen.margins(0, apart)[0], unseen.bundle.real)
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
    return tuple(
        rewrite(lm, layer, neuron.index, neuron.rows, column)
        if neuron.overwritten
        else write_more(lm, layer, neuron.index, column / neuron.rows.gain)
        for neuron, column in zip(candidate.neurons, candidate.columns, strict=True)
    )


# ---------------------------------------------------------------------- the choice


@dataclass(frozen=True)
class _Job:
    """What stays the same over all candidates."""

    lm: LM
    settings: RuleSettings
    stats: Statistics
    margin: float
    used: frozenset[tuple[int, int]]
    key: str
    """What the choice among idle neurons hangs on."""
    say: Say


def _rewritten(job: _Job, at: Reading, groups: Sequence[Tensor]) -> list[Neuron]:
    """Idle neurons of a layer with learnt gates, one a group of places, the most promising gate each; [] if too few are free."""
    how = job.settings
    idle = idle_order(job.lm, job.stats, at.layer, job.key, job.used)
    if len(idle) < len(groups):
        return []
    return [
        max(
            (
                neuron
                for ridge in how.ridges
                for neuron in learn_gates(job.lm, at, places, index, ridge, how.silence, how.thresholds)
            ),
            key=lambda n: n.promise,
        )
        for places, index in zip(groups, idle, strict=False)
    ]


def _promise(way: Sequence[Neuron]) -> float:
    return min(n.promise for n in way)


def _carried(job: _Job, readings: Sequence[Reading]) -> list[Candidate]:
    """Rewrites of idle neurons: the most promising gate of each layer, a column for the best few."""
    ways = [(at, way) for at in readings if (way := _rewritten(job, at, [at.fire]))]
    ways.sort(key=lambda pair: -_promise(pair[1]))
    found = []
    for at, way in ways[:FINALISTS]:
        found.append(_fit(at, way, job.margin))
        _tell(job, found[-1])
    best = max(found, key=lambda c: c.score, default=None)
    if best is not None and job.settings.max_neurons == 2 and not bool((best.margins > 0).all()):
        at = best.reading
        groups = place_groups(at.fire)
        if len(groups) == 2 and (way := _rewritten(job, at, groups)):
            found.append(_fit(at, way, job.margin))
            _tell(job, found[-1])
    return found


def _caused(
    job: _Job, readings: Sequence[Reading], least: float | None
) -> tuple[list[Candidate], list[dict], list[dict]]:
    """Edits of the neurons that attribution blames, as they are and sharpened; those passed over; and the ranking.

    least: the best promise of a carrier; a blamed neuron that fires much worse gets no column.
    """
    lm, found, passed = job.lm, [], []
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
            if least is not None and neuron.promise < least - HOPELESS:
                passed.append({"layer": at.layer, "neurons": [neuron.describe()], "promise": neuron.promise})
                continue
            found.append(_fit(at, [neuron], job.margin))
            _tell(job, found[-1])
    return found, passed, [s.describe() for s in ranked[:10]]


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


# ---------------------------------------------------------------------- the whole


def layers_of(lm: LM, settings: RuleSettings) -> list[int]:
    """The layers that a rule may be solved in."""
    return list(settings.layers) if settings.layers is not None else sample_layers(lm)[:2]


def _before_the_habit(text: Encoded, habit: Habit) -> Encoded | None:
    """A kept text up to where it shows the habit itself, which is to change there; None if nothing is left."""
    first = len(text.prompt) - 1
    hits = [p for p in habit.places(text.ids) if p > first]
    if not hits:
        return text
    kept = text.target[: hits[0] - first]
    return Encoded(text.prompt, kept) if kept else None


def _made(
    lm: LM,
    learn: Sequence[Encoded],
    wrong: Sequence[tuple[int, ...]] | None,
    layers: Sequence[int],
    each: int,
    settings: RuleSettings,
) -> tuple[list[Encoded], list[int], dict[int, Tensor]]:
    """Texts made from the learn prompts at which the model has the habit, their owners, inputs [k, d_model] by layer."""
    made, owners = (
        in_other_contexts(lm, learn, each, settings.reference, settings.seed) if wrong else ([], [])
    )
    if not wrong or not made:
        return [], [], {layer: torch.zeros(0, lm.columns(layer).shape[1]) for layer in layers}
    asked = bundle(
        lm, [Encoded(t.prompt, wrong[i][:1]) for t, i in zip(made, owners, strict=True)], layers, exact=True
    )
    writes = asked[layers[0]].clean[:, 0] > 0
    keep = writes.nonzero()[:, 0].tolist()
    inputs = {layer: asked[layer].inputs[writes, 0] for layer in layers}
    return [made[i] for i in keep], [owners[i] for i in keep], inputs


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
    habit = habit_of([t.prompt for t in learn], wrong or ())
    guards = [cut for text in (*keep, *earlier) if (cut := _before_the_habit(text, habit)) is not None]
    few = len(learn) < FEW
    made, owners, inputs = _made(
        lm, learn, wrong, layers, -(-3 * FEW // len(learn)) if few else EACH, settings
    )
    texts, groups = [*learn], list(range(len(learn)))
    if few:
        # What is made from a prompt is left out together with it; a single prompt's one by one.
        texts += made
        groups += owners if len(learn) > 1 else list(range(1, 1 + len(made)))
    say(f"reading {len(texts)} prompts to learn from and {len(guards)} to keep")
    seen = Texts(texts, guards, folds_of(groups, settings.folds), habit)
    learnt = bundle(lm, texts, layers)
    kept = bundle(lm, guards, layers, exact=True) if guards else {}
    readings = [
        read_layer(stats, seen, learnt[layer], kept.get(layer), None if few else (inputs[layer], owners))
        for layer in layers
    ]
    if few:
        # Prompts made from one another cannot show what varies: the softest gate that there is, early awake.
        settings = replace(settings, ridges=(FEW_RIDGE,), thresholds=settings.thresholds[:1])
    job = _Job(lm, settings, stats, _margin(readings[0].learn, settings), used, _key(learn), say)
    solution = _solve_readings(job, readings, len(learn))
    return replace(solution, seconds=time.perf_counter() - started)


def _key(learn: Sequence[Encoded]) -> str:
    return repr([(text.prompt, text.target) for text in learn])


def _margin(learn: Bundle, settings: RuleSettings) -> float:
    """What is aimed at. A margin is a number of logits; small or young models have logits too close together to give it."""
    return min(settings.margin or MARGIN, REACHABLE * learn.spread)


def _solve_readings(job: _Job, readings: Sequence[Reading], n: int) -> Solution:
    """`solve_rule` for texts that were read already; the first n of them are the user's own."""
    lm, settings = job.lm, job.settings
    first = readings[0].learn
    own = torch.arange(n)
    if bool((_smallest(first.clean, first.real)[own] > 0).all()):
        return Solution(NAME, None, "the model already writes the right text at every learn prompt")
    candidates: list[Candidate] = []
    ranking: list[dict] = []
    passed: list[dict] = []
    if settings.where != "responsible":
        candidates += _carried(job, readings)
    if settings.where != "idle":
        carried = [min(n.promise for n in c.neurons) for c in candidates]
        caused, passed, ranking = _caused(job, readings, max(carried, default=None))
        candidates += caused
    if not candidates:
        reason = (
            "no neuron of these layers is to blame; allow idle ones (where 'auto')"
            if settings.where == "responsible"
            else "earlier repairs have taken every idle neuron of these layers; repair in others, or drop a patch"
        )
        return Solution(NAME, None, reason)
    candidates.sort(key=lambda c: -c.score)
    best = candidates[0]
    patch, now, broken = _checked(job, best)
    own_now = now[own]
    cause = any(neuron.role == "responsible" for neuron in best.neurons)
    details = best.describe() | {
        "margin_aimed": job.margin,
        "verdict": "cause" if cause else "carrier",
        "candidates": [c.describe() for c in candidates],
        "passed_over": passed,
        "responsible": ranking,
        "conflicts": (own_now <= 0).nonzero()[:, 0].tolist(),
        "held_out_margins": [round(m, 3) for m in best.held[own].tolist()],
        "learn_margins": [round(m, 3) for m in own_now.tolist()],
        "broken_keep": broken,
        "prompts_made": len(first) - n + len(readings[0].made),
    }
    least = float(own_now.min())
    if not bool((own_now > 0).any()):
        reason = (
            f"no edit of {settings.max_neurons} neuron(s) writes the right text at any learn prompt; repair one prompt as"
            " a case, or give learn prompts that have more in common"
        )
        return Solution(NAME, None, reason, least, details=details)
    layer = best.reading.layer
    taken = {*job.used, *((layer, neuron.index) for neuron in best.neurons)}
    info = {
        "solver": NAME,
        "spare": other_places(lm, layer, idle_order(lm, job.stats, layer, job.key, taken)),
        "settings": {"margin": job.margin, "where": settings.where},
        "versions": versions(),
    }
    return Solution(NAME, replace(patch, info=info), None, least, details=details)
