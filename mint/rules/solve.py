"""The solver of rules: one neuron that writes the right text at every prompt of a kind, learnt from a few of them.

A linear classifier on a layer's inputs says where the neuron fires (gate.py), one column says what it writes
(column.py). Everything that has to be chosen (layer, ridge, silence, threshold) is chosen by how the edit does at learn
prompts that were left out of it. Knows nothing about files, mining or generated text. Formulas: docs/rules.md.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mint.errors import MintError
from mint.model.lm import LM, Encoded
from mint.patch import NeuronEdit, Patch, applied, identity, make_edit, versions
from mint.reference import Statistics, sample_layers, statistics
from mint.rules import column as program
from mint.rules.bundle import Bundle, bundle
from mint.rules.gate import Detector, Examples, fit_constant, fit_direction, make_detector
from mint.solver.problem import Solution

NAME = "rule"
FIRE_BELOW = 0.5
"""Logits of lead below which a target token needs the neuron."""
FIRE_SHARE = 0.25
"""Share of learn prompts whose token at a place needs the neuron, from which on it fires there in all of them."""
LOUD = 0.998
"""Quantile of the answers to reference text that counts as the loudest other input."""


def quiet(_message: str) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class RuleSettings:
    """What a user may ask of the solver of rules."""

    max_neurons: int = 2
    """Most neurons that may change; 1 or 2."""
    margin: float | None = None
    """Logits by which every target token must lead at the learn prompts; None: 4."""
    layers: tuple[int, ...] | None = None
    """Layers to edit in; None: those of `sample_layers`, the best by cross-validation."""
    folds: int = 8
    """Most parts that the learn prompts are split into for cross-validation; each is left out once."""
    ridges: tuple[float, ...] = (0.05, 0.5, 2.0)
    """Softness of the classifier's margin (its ridge over d_model), tried in turn."""
    silences: tuple[float, ...] = (0.1, 0.5)
    """How far below zero the classifier pulls other inputs, tried in turn."""
    thresholds: tuple[float, ...] = (0.3, 0.7)
    """Where the neuron starts to fire, from other inputs (0) to the weakest held-out fault (1), tried in turn."""
    reference: tuple[str, ...] = ()
    """The user's own text files, for `mint.reference.statistics` beside the text that ships."""
    seed: int = 0


# ---------------------------------------------------------------------- one layer


@dataclass(frozen=True)
class _Weights:
    """Cost of a violation by what an input is, where a learn prompt's first wrong place costs 1."""

    prompt: float = 0.05
    """Earlier tokens of learn and keep prompts."""
    reference: float = 0.05
    hold: float = 0.3
    """Places of the target that are right already, and later tokens of what must stay."""
    near: float = 1.0
    """The last prompt token of what must stay: the most dangerous neighbours."""


@dataclass
class _Layer:
    """Everything about one layer, scaled; learn and kept texts by fold."""

    layer: int
    learn: Bundle
    keep: Bundle | None
    examples: Examples
    fold: Tensor
    """[n] the fold of each example; -1 for those that are never left out."""
    scale: Tensor
    constant: Tensor
    sample: Tensor
    """Reference inputs, raw, [k, d_model]."""


def _fire_places(learn: Bundle) -> Tensor:
    """[b, m] bool: where the neuron fires."""
    needs = learn.real & (learn.clean < FIRE_BELOW)
    share = needs.sum(0) / learn.real.sum(0).clamp(min=1)
    return learn.real & (share >= FIRE_SHARE)[None]


def _fold_numbers(n: int, folds: int) -> Tensor:
    return torch.arange(n) % max(1, min(n, folds))


def _prepare_layer(
    layer: int,
    learn: Bundle,
    keep: Bundle | None,
    stats: Statistics,
    settings: RuleSettings,
    near_weight: Tensor | None,
) -> _Layer:
    weights = _Weights()
    second, mean = stats.inputs_second[layer], stats.inputs_mean[layer]
    scale = second.diagonal().clamp_min(1e-12).sqrt()
    fire = _fire_places(learn)
    folds = max(1, min(len(learn), settings.folds))
    sample = stats.sample[layer].float() if layer in stats.sample else mean[None]
    xs, fires, ws, fs = [], [], [], []

    def add(x: Tensor, firing: bool, weight: Tensor | float, fold: Tensor | int) -> None:
        xs.append(x)
        fires.append(torch.full((len(x),), firing))
        ws.append(weight if isinstance(weight, Tensor) else torch.full((len(x),), weight))
        fs.append(fold if isinstance(fold, Tensor) else torch.full((len(x),), fold))

    for bundle_, is_learn in ((learn, True), (keep, False)):
        if bundle_ is None:
            continue
        fold = _fold_numbers(len(bundle_), folds)
        for i in range(len(bundle_)):
            k = int(fold[i])
            if is_learn:
                places = fire[i] & bundle_.real[i]
                held = bundle_.real[i] & ~fire[i]
                add(bundle_.inputs[i][places], True, 1.0 / max(1, int(places.sum())) ** 0.5, k)
                add(bundle_.inputs[i][held], False, weights.hold, k)
            else:
                x = bundle_.inputs[i][bundle_.real[i]]
                w = torch.full((len(x),), weights.hold)
                w[0] = weights.near
                if near_weight is not None:
                    w = w * near_weight[i]
                add(x, False, w, k)
            add(bundle_.prompt_inputs[i], False, weights.prompt, k)
    add(sample, False, weights.reference, -1)
    x = torch.cat(xs) / scale
    examples = Examples(x, torch.cat(fires), torch.cat(ws))
    constant = fit_constant(second, mean, scale, x[examples.fire])
    return _Layer(layer, learn, keep, examples, torch.cat(fs), scale, constant, sample)


@dataclass(frozen=True)
class _Gates:
    """Classifier directions of one layer and setting: with everything, and with each fold left out."""

    full: Tensor
    folds: list[Tensor]
    width: float = 2.0
    """See `make_detector`."""


def _fit_gates(at: _Layer, silence: float, ridge: float, folds: int) -> _Gates:
    start = -silence * at.constant  # answers -silence everywhere, so that few inputs are short at first
    ridge = ridge * len(start)
    full = fit_direction(at.examples, silence=silence, ridge=ridge, start=start)
    # Only what comes near the border can ever matter to a fold.
    answer = at.examples.x @ full
    close = at.examples.fire | (answer > -silence - 0.2)
    few = at.examples.without(~close)
    fold = at.fold[close]
    out = [
        fit_direction(few.without(fold == k), silence=silence, ridge=ridge, start=full) for k in range(folds)
    ]
    return _Gates(full, out)


def _held_answers(at: _Layer, gates: _Gates, which: Tensor) -> Tensor:
    """Answers to the examples `which` [n] bool by the gates fitted without them."""
    x, fold = at.examples.x[which], at.fold[which]
    each = torch.stack([x @ g for g in gates.folds], 1)
    return each.gather(1, fold[:, None])[:, 0]


def _calibrate(at: _Layer, gates: _Gates, place: float) -> _Gates:
    """Moves the threshold between the loudest other inputs and the weakest held-out faults."""
    faults = _held_answers(at, gates, at.examples.fire)
    typical = float(faults.median())
    spread = float(faults.std()) if len(faults) > 1 else 0.3 * typical
    weakest = typical - 1.5 * spread
    others = float((at.sample / at.scale @ gates.full).quantile(LOUD))
    threshold = others + place * (weakest - others)
    threshold = min(threshold, typical - max(spread, 0.05 * abs(typical), 1e-3))

    def moved(a: Tensor) -> Tensor:
        return (a - threshold * at.constant) / (typical - threshold)

    own = (at.examples.x[at.examples.fire] @ moved(gates.full)).median()
    return _Gates(moved(gates.full), [moved(a) for a in gates.folds], 1 + max(1.0, float(own)))


def _levels(lm: LM, at: _Layer, bundle_: Bundle, direction: Tensor, width: float) -> Tensor:
    """[b, m] activation over gain."""
    rows = make_detector(direction, at.constant, at.scale, width, lm.block(at.layer).gated)
    return rows.respond(bundle_.inputs, lm.layout.act(at.layer)) * bundle_.real


def _both_levels(lm: LM, at: _Layer, bundle_: Bundle, gates: _Gates) -> list[Tensor]:
    """Two of [b, m]: the activation, and that which the gate would have without the text's own fold."""
    fold = _fold_numbers(len(bundle_), len(gates.folds))
    each = torch.stack([_levels(lm, at, bundle_, g, gates.width) for g in gates.folds])
    return [_levels(lm, at, bundle_, gates.full, gates.width), each[fold, torch.arange(len(bundle_))]]


# ---------------------------------------------------------------------- one candidate


@dataclass
class _Candidate:
    layer: int
    index: int
    ridge: float
    silence: float
    threshold: float
    detector: Detector
    columns: Tensor
    right: float
    """Share of learn prompts that an edit made without them gets right, teacher-forced."""
    kept: float
    """Share of kept texts that an edit made without them leaves as they are, teacher-forced."""
    far: float
    """Mean of n^2 |column|^2 on reference inputs, over the mean square of the residual stream."""
    held_margin: Tensor
    """[learn prompts] the smallest held-out margin."""
    learn_margin: Tensor
    short: float

    @property
    def score(self) -> float:
        return self.right + self.kept - 20.0 * self.far + 0.01 * float(self.held_margin.clamp(-5, 5).mean())

    def describe(self) -> dict:
        return {
            "layer": self.layer,
            "index": self.index,
            "ridge": self.ridge,
            "silence": self.silence,
            "threshold": self.threshold,
            "held_out_right": round(self.right, 4),
            "held_out_kept": round(self.kept, 4),
            "far": self.far,
            "norm": round(float(self.columns.norm()), 3),
        }


def _wanted(bundle_: Bundle, fire: Tensor, margin: float) -> Tensor:
    """[b, m]: the margin where the neuron fires, elsewhere half of what is there, at most the margin."""
    rest = bundle_.clean_soft - bundle_.clean.clamp(min=0).clamp(max=margin) / 2
    return torch.where(fire, torch.tensor(margin), torch.minimum(rest, torch.tensor(margin))).masked_fill(
        ~bundle_.real, -torch.inf
    )


def _idle(lm: LM, stats: Statistics, layer: int, used: frozenset[tuple[int, int]]) -> int:
    energy = stats.neurons_square[layer] * lm.columns(layer).float().square().sum(1).cpu()
    for at, index in used:
        if at == layer:
            energy[index] = torch.inf
    return int(energy.argmin())


def _try_candidate(
    lm: LM,
    at: _Layer,
    gates: _Gates,
    stats: Statistics,
    choice: tuple[float, float, float],
    margin: float,
    used: frozenset[tuple[int, int]],
    start: Tensor | None,
) -> _Candidate:
    ridge, silence, threshold = choice
    gated = lm.block(at.layer).gated
    index = _idle(lm, stats, at.layer, used)
    old = lm.columns(at.layer)[index].float().cpu()
    levels = _both_levels(lm, at, at.learn, gates)
    size = float(at.learn.hidden.float().square().sum(-1)[at.learn.real].median())
    price = PRICE * size
    fire = _fire_places(at.learn)
    # A prompt that the gate would hardly have seen cannot shape the column: its scenario is a floor.
    trained = [levels[0], torch.where(fire, levels[1].clamp(min=FLOOR), levels[1])]
    tasks = [_task(at.learn, trained, _wanted(at.learn, fire, margin), price, index, old)]
    keep_levels, heard = [], torch.zeros(0, dtype=torch.long)
    if at.keep is not None:
        keep_levels = _both_levels(lm, at, at.keep, gates)
        heard = (torch.stack(keep_levels).abs() > HEARD).any(0).any(1).nonzero()[:, 0]
    if len(heard):
        few = at.keep.part(heard, KEEP_TOKENS)
        m = few.real.shape[1]
        nothing = torch.zeros_like(few.real)
        close = [level[heard, :m] for level in keep_levels]
        tasks.append(_task(few, close, _wanted(few, nothing, margin), price, index, old))
    first = torch.zeros(1, len(old)) if start is None else start
    found = program.fit(tasks, first, ITERATIONS)
    # Leave one text out: the programme of the last iteration without its constraints, the gate without its fold.
    without = torch.stack(
        [found.linear.solve(i, found.columns[0], LOO_DAMPING) for i in range(len(at.learn))]
    )[None]
    judged = replace(tasks[0], levels=torch.stack(levels)[:, None])
    held = program.margins(judged, 1, without)[0].masked_fill(~at.learn.real, torch.inf).amin(1)
    full = program.margins(judged, 0, found.columns)[0].masked_fill(~at.learn.real, torch.inf).amin(1)
    kept = 1.0
    if len(heard):
        after = program.margins(tasks[1], 1, found.columns)[0]
        broken = ((after <= 0) & tasks[1].bundle.real).any(1).sum()
        kept = 1 - float(broken) / len(at.keep)
    detector = make_detector(gates.full, at.constant, at.scale, gates.width, gated)
    answer = detector.respond(at.sample, lm.layout.act(at.layer))
    far = float(answer.square().mean() * found.columns.square().sum() / size)
    return _Candidate(
        at.layer,
        index,
        ridge,
        silence,
        threshold,
        detector,
        found.columns,
        float((held > 0).float().mean()),
        kept,
        far,
        held,
        full,
        found.short,
    )


def _task(
    bundle_: Bundle, levels: list[Tensor], wanted: Tensor, price: float, index: int, old: Tensor
) -> program.Task:
    base = -bundle_.neurons[..., index, None] * old
    return program.Task(
        bundle_, torch.stack(levels)[:, None], wanted, torch.full((len(bundle_),), price), base
    )


PRICE = 1.0
"""Cost of one logit short, in units of the squared length of the residual stream."""
REACHABLE = 0.4
"""Largest margin aimed at, as a share of how far the best logit stands above the mean of all."""
MARGIN = 4.0
"""Default margin: log-odds, nearly, of a target token at a learn prompt."""
FLOOR = 0.35
"""Least activation at which the column must work at a fault, as a share of the typical one."""
ITERATIONS = 8
HEARD = 0.02
"""Activation from which on a kept text is looked at again."""
KEEP_TOKENS = 4
"""First tokens of a kept text that the column must leave as they are."""
LOO_DAMPING = 0.2


def _edit(lm: LM, candidate: _Candidate) -> NeuronEdit:
    rows = candidate.detector
    after = {"out": candidate.columns[0] / rows.gain, "gate": rows.gate}
    if rows.up is not None:
        after["up"] = rows.up
    slices = lm.block(candidate.layer).slices(candidate.index)
    after |= {role: torch.zeros(()) for role in slices if role.endswith("_bias")}
    return make_edit(lm, candidate.layer, candidate.index, after)


# ---------------------------------------------------------------------- the whole


def solve_rule(
    lm: LM,
    learn: Sequence[Encoded],
    keep: Sequence[Encoded],
    settings: RuleSettings,
    *,
    wrong: Sequence[tuple[int, ...]] | None = None,
    earlier: Sequence[Encoded] = (),
    used: frozenset[tuple[int, int]] = frozenset(),
    say: Callable[[str], None] = quiet,
) -> Solution:
    """One joint edit under which every learn prompt is followed by its target. The model is left as it was.

    learn: prompts and right texts. keep: prompts and what the model writes there now; must stay. wrong: what it writes at
    the learn prompts. earlier: guards of earlier repairs, kept like `keep`. used: neurons not to be rewritten again.
    Raises `MintError` for settings or texts that make no sense; otherwise a failure is a `Solution` without a change.
    """
    started = time.perf_counter()
    solution = _solve(lm, list(learn), [*keep, *earlier], settings, used, say)
    return replace(solution, seconds=time.perf_counter() - started)


def _check(learn: Sequence[Encoded], settings: RuleSettings) -> None:
    if not learn:
        raise MintError("a rule needs at least one learn prompt, found none; mine call sites first")
    if settings.max_neurons not in (1, 2):
        raise MintError(f"max_neurons must be 1 or 2, found {settings.max_neurons}")
    if settings.margin is not None and not 0 < settings.margin < float("inf"):
        raise MintError(
            f"margin must be a positive number of logits, found {settings.margin}; the default is 4"
        )


def _solve(
    lm: LM,
    learn: list[Encoded],
    keep: list[Encoded],
    settings: RuleSettings,
    used: frozenset[tuple[int, int]],
    say: Callable[[str], None],
) -> Solution:
    _check(learn, settings)
    stats = statistics(lm, settings.reference, say)
    layers = list(settings.layers) if settings.layers is not None else sample_layers(lm)
    say(f"reading {len(learn)} learn prompts and {len(keep)} prompts to keep")
    learnt = bundle(lm, learn, layers)
    kept = bundle(lm, keep, layers, exact=True) if keep else None
    return solve_bundles(lm, learnt, kept, stats, settings, used, say)


def solve_bundles(
    lm: LM,
    learn: dict[int, Bundle],
    keep: dict[int, Bundle] | None,
    stats: Statistics,
    settings: RuleSettings,
    used: frozenset[tuple[int, int]] = frozenset(),
    say: Callable[[str], None] = quiet,
) -> Solution:
    """`solve_rule` for texts that were read already: learn and keep by layer."""
    first = next(iter(learn.values()))
    if bool((first.clean > 0)[first.real].all()):
        return Solution(NAME, None, "the model already writes the right text at every learn prompt")
    # A margin is a number of logits; small or young models have logits too close together to give it.
    margin = min(settings.margin or MARGIN, REACHABLE * first.spread)
    folds = max(1, min(len(first), settings.folds))
    candidates: list[_Candidate] = []
    for layer in learn:
        at = _prepare_layer(layer, learn[layer], keep[layer] if keep else None, stats, settings, None)
        start = None
        for ridge, silence in itertools.product(settings.ridges, settings.silences):
            gates = _fit_gates(at, silence, ridge, folds)
            for place in settings.thresholds:
                choice = (ridge, silence, place)
                found = _try_candidate(
                    lm, at, _calibrate(at, gates, place), stats, choice, margin, used, start
                )
                start = found.columns
                candidates.append(found)
                say(f"layer {layer}: {found.right:.0%} of the prompts left out right, {found.kept:.0%} kept")
    candidates.sort(key=lambda c: -c.score)
    best = candidates[0]
    patch = Patch((_edit(lm, best),), identity(lm), {"solver": NAME, "versions": versions()})
    with applied(lm, patch):
        bundle_ = learn[best.layer]
        now = bundle_.present_margins().masked_fill(~bundle_.real, torch.inf).amin(1)
        broken = []
        if keep:
            after = keep[best.layer].present_margins()
            broken = ((after <= 0) & keep[best.layer].real).any(1).nonzero()[:, 0].tolist()
    conflicts = (now <= 0).nonzero()[:, 0].tolist()
    details = best.describe() | {
        "candidates": [c.describe() for c in candidates],
        "conflicts": conflicts,
        "held_out_margins": [round(m, 3) for m in best.held_margin.tolist()],
        "learn_margins": [round(m, 3) for m in now.tolist()],
        "broken_keep": broken,
    }
    return Solution(NAME, patch, None, float(now.min()), details=details)
