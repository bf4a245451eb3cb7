"""Which neuron carries a rule, and when it fires: gates learnt from examples, and neurons that attribution blames.

A `Reading` is one layer as the learn prompts, the kept texts and the reference text show it; a `Neuron` is one way to
make one neuron of it fire at the faults, with its activations everywhere, also those it would have without a prompt's
own fold. Knows nothing about what a neuron writes.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mint.model.lm import LM, Encoded
from mint.patch import read_neuron
from mint.reference import Statistics
from mint.solver.bundle import Bundle
from mint.solver.classifier import Examples, activation, fit_constant, fit_direction, make_rows
from mint.solver.rows import InputRows, own_bias, present_rows

FIRE_BELOW = 0.5
"""Logits of lead below which a target token needs the neuron."""
FIRE_SHARE = 0.25
"""Share of learn prompts whose token at a place needs the neuron, from which on it fires there in all of them."""
TOP = 0.9995
"""Quantile of the answers to reference text that counts as the loudest other input."""
OPENING = 8
"""Most tokens before the cut that tell the habit from other uses of its words."""
SURER = 3.0
"""How many times as sure of a prompt a gate may be that learnt from it, against one that did not."""
SUSPECTS = 20
"""Most guilty neurons of a layer that are looked at."""

# Cost of a violation by what an input is, where a learn prompt's first wrong place costs 1.
PROMPT = 0.05
"""Earlier tokens of learn prompts and kept texts, and reference inputs."""
HOLD = 0.3
"""Places of the target that are right already, and later tokens of kept texts."""
NEAR = 1.0
"""The last prompt token of kept texts: the most dangerous neighbours."""
BESIDE = 0.5
"""What it costs to be heard at a kept text, against a fault left out: the column can often leave the text as it is."""
FAR = 50.0
"""The same for a reference input: 1 in 1,000 counts as much as 1 prompt in 20."""
MADE = 0.3
"""A fault that was made from a learn prompt."""


@dataclass(frozen=True)
class Reading:
    """One layer of the model at everything that matters to a rule."""

    layer: int
    learn: Bundle
    keep: Bundle | None
    fire: Tensor
    """[b, m] bool: places of the learn prompts where the rule's neurons act."""
    fold: Tensor
    """[b] the fold that each learn prompt is left out with."""
    keep_fold: Tensor
    silent: Tensor
    """[k, d_model] raw inputs to keep silent at: prompts, kept texts, reference."""
    silent_weight: Tensor
    silent_fold: Tensor
    """[k] the fold that an input is left out with."""
    scale: Tensor
    """[d_model] root mean square of inputs on reference text."""
    constant: Tensor
    """[d_model] direction that answers 1 to scaled inputs."""
    sample: Tensor
    """Reference inputs, raw."""
    sample_fold: Tensor
    """The fold that each of them is left out with: blocks of neighbours, which are of the same texts."""
    made: Tensor
    """[k, d_model] raw inputs at faults that were made from the learn prompts."""
    made_fold: Tensor
    """[k] the fold of the prompt that each was made from."""

    @property
    def folds(self) -> int:
        return int(self.fold.max()) + 1

    @property
    def size(self) -> float:
        """Squared length of the residual stream at the learn prompts."""
        return float(self.learn.hidden.float().square().sum(-1)[self.learn.real].median())


def fire_places(learn: Bundle) -> Tensor:
    """[b, m] bool: where the neuron fires."""
    needs = learn.real & (learn.clean < FIRE_BELOW)
    share = needs.sum(0) / learn.real.sum(0).clamp(min=1)
    return learn.real & (share >= FIRE_SHARE)[None]


def place_groups(fire: Tensor) -> list[Tensor]:
    """Two neurons' places: the first, where the habit has to be recognised, and the rest, where it is being undone."""
    first = torch.zeros_like(fire)
    first[:, 0] = fire[:, 0]
    groups = [first, fire & ~first]
    return [g for g in groups if g.any()]


@dataclass(frozen=True)
class Habit:
    """Tokens that show the habit wherever they stand: what is common to all prompts before the cut, and a wrong text."""

    opening: tuple[int, ...]
    wrong: frozenset[tuple[int, ...]]

    def places(self, ids: Sequence[int]) -> list[int]:
        """Tokens of a text behind which it goes on as the habit does."""
        before = len(self.opening)
        return [
            p
            for p in range(max(0, before - 1), len(ids) - 1)
            if tuple(ids[p + 1 - before : p + 1]) == self.opening
            and any(tuple(ids[p + 1 : p + 1 + len(wrong)]) == wrong for wrong in self.wrong)
        ]


def habit_of(prompts: Sequence[Sequence[int]], wrong: Collection[tuple[int, ...]]) -> Habit:
    """The habit that learn prompts show: up to `OPENING` tokens that all of them end in, then one of the wrong texts."""
    opening: tuple[int, ...] = ()
    for n in range(1, OPENING + 1):
        ends = {tuple(p[-n:]) for p in prompts}
        if len(ends) != 1 or min(map(len, ends)) < n:
            break
        opening = next(iter(ends))
    # One token alone, such as a bracket, is everywhere.
    return Habit(opening, frozenset(tuple(w) for w in wrong if len(opening) + len(w) > 1))


def folds_of(groups: Sequence[int], most: int) -> Tensor:
    """[b] the fold that each text is left out with, at most `most` of them; texts of one group share theirs."""
    numbers = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    count = max(1, min(len(numbers), most))
    return torch.tensor([numbers[g] % count for g in groups])


@dataclass(frozen=True)
class Texts:
    """What a rule's gates learn from, as tokens."""

    learn: Sequence[Encoded]
    keep: Sequence[Encoded]
    fold: Tensor
    """[learn] see `folds_of`."""
    habit: Habit


def read_layer(
    stats: Statistics,
    texts: Texts,
    learn: Bundle,
    keep: Bundle | None,
    made: tuple[Tensor, Sequence[int]] | None = None,
) -> Reading:
    """Collect what a layer's gates learn from. learn, keep: the texts there.

    made: inputs [k, d_model] at further faults, and the learn prompt that each was made from.
    """
    fold, habit = texts.fold, texts.habit
    layer = learn.layer
    second, mean = stats.inputs_second[layer], stats.inputs_mean[layer]
    scale = second.diagonal().clamp_min(1e-12).sqrt()
    fire = fire_places(learn)
    count = int(fold.max()) + 1
    keep_fold = torch.arange(len(texts.keep)) % count
    sample = stats.sample[layer].float() if layer in stats.sample else mean[None]
    xs, ws, fs = [], [], []

    def add(x: Tensor, weight: Tensor, fold: int) -> None:
        xs.append(x)
        ws.append(weight)
        fs.append(torch.full((len(x),), fold))

    def prompt(x: Tensor, text: Encoded, fold: int) -> None:
        weight = torch.full((len(x),), PROMPT)
        weight[[p for p in habit.places(text.prompt) if p < len(x)]] = 0.0
        add(x, weight, fold)

    for i, text in enumerate(texts.learn):
        held = learn.inputs[i][learn.real[i] & ~fire[i]]
        add(held, torch.full((len(held),), HOLD), int(fold[i]))
        prompt(learn.prompt_inputs[i], text, int(fold[i]))
    if keep is not None:
        for i, text in enumerate(texts.keep):
            x = keep.inputs[i][keep.real[i]]
            weight = torch.full((len(x),), HOLD)
            weight[:1] = NEAR
            add(x, weight, int(keep_fold[i]))
            prompt(keep.prompt_inputs[i], text, int(keep_fold[i]))
    sample_fold = torch.arange(len(sample)) * count // len(sample)
    for k in range(count):
        block = sample[sample_fold == k]
        add(block, torch.full((len(block),), PROMPT), k)
    constant = fit_constant(second, mean, scale, learn.inputs[fire] / scale)
    return Reading(
        layer,
        learn,
        keep,
        fire,
        fold,
        keep_fold,
        torch.cat(xs),
        torch.cat(ws),
        torch.cat(fs),
        scale,
        constant,
        sample,
        sample_fold,
        torch.zeros(0, learn.inputs.shape[2]) if made is None else made[0],
        fold[list(made[1])] if made is not None else torch.zeros(0, dtype=torch.long),
    )


# ---------------------------------------------------------------------- a neuron


@dataclass(frozen=True)
class GateSettings:
    """How a gate was learnt."""

    places: Tensor
    """[b, m] bool."""
    ridge: float
    silence: float
    threshold: float
    prior: Tensor | None = None
    """The direction that it started from, if that is a neuron's own."""


@dataclass(frozen=True)
class Neuron:
    """One neuron of a layer, made to fire at the faults."""

    index: int
    kind: str
    """`rewrite` (gate learnt), `sharpened` (gate learnt from its own direction on), `value` (as it is)."""
    role: str
    """`idle` or `responsible`."""
    rows: InputRows
    fire: Tensor
    """[b, m] bool: places of the learn prompts where it is to act."""
    levels: Tensor
    """[2, b, m] activation over gain at the learn prompts: as it is, and by the gate made without the prompt's fold."""
    keep_levels: Tensor
    """[2, keep texts, m] the same at kept texts."""
    elsewhere: Tensor
    """[samples] activation over gain at reference inputs, by gates made without them."""
    settings: GateSettings | None = None

    @property
    def overwritten(self) -> bool:
        """Whether what it wrote before is lost."""
        return self.kind != "value"

    @property
    def promise(self) -> float:
        """How surely it fires at faults left out, less how much it does at kept texts left out and at reference text."""
        at = self.levels[1][self.fire]
        first = self.levels[1][:, 0][self.fire[:, 0]]
        right = sum(float((x / 0.6).clamp(0, 1).mean()) for x in (at, first) if len(x)) / (
            2 if len(first) else 1
        )
        beside = (
            float((self.keep_levels[1].abs() / 0.6).clamp(0, 1).amax(1).mean())
            if len(self.keep_levels[1])
            else 0.0
        )
        far = float((self.elsewhere.abs() / 0.6).clamp(0, 1).mean())
        return right - BESIDE * beside - FAR * far

    def describe(self) -> dict:
        """JSON values."""
        known = {"index": self.index, "kind": self.kind, "role": self.role}
        if self.settings is not None:
            s = self.settings
            known |= {"ridge": s.ridge, "silence": s.silence, "threshold": s.threshold}
        return known


def learn_gates(
    lm: LM,
    at: Reading,
    places: Tensor,
    index: int,
    ridge: float,
    silence: float,
    thresholds: Sequence[float],
    prior: Tensor | None = None,
) -> list[Neuron]:
    """Neurons with a learnt gate that acts at `places`, one a threshold.

    prior: the neuron's own direction, from which the learnt one departs (the neuron is then sharpened).
    """
    learn = at.learn
    # The first place is where the habit has to be recognised: all later ones together weigh as much.
    first = torch.zeros_like(places)
    first[:, 0] = True
    later = max(1.0, float((places & ~first).sum()) / max(1, len(learn)))
    i, p = places.nonzero().T
    others = at.fire & ~places
    j, q = others.nonzero().T
    made = at.made if bool(places[:, 0].any()) else at.made[:0]
    x = torch.cat([learn.inputs[i, p], made, learn.inputs[j, q], at.silent]) / at.scale
    fire = torch.zeros(len(x), dtype=torch.bool)
    fire[: len(i) + len(made)] = True
    weight = torch.cat(
        [
            torch.where(p == 0, 1.0, 1.0 / later),
            torch.full((len(made),), MADE),
            torch.full((len(j),), HOLD),
            at.silent_weight,
        ]
    )
    fold = torch.cat([at.fold[i], at.made_fold[: len(made)], at.fold[j], at.silent_fold])
    examples = Examples(x, fire, weight)
    strength = ridge * x.shape[1]
    # Started where everything is answered by -silence, only the faults are short at first, which makes it fast.
    begin = -silence * at.constant if prior is None else prior
    full = fit_direction(examples, silence=silence, ridge=strength, start=begin, prior=prior)
    few = examples.fire | (x @ full > -silence - 0.2)  # only what comes near the border can matter to a fold
    close, close_fold = examples.without(~few), fold[few]
    made = [
        fit_direction(
            close.without(close_fold == k), silence=silence, ridge=strength, start=full, prior=prior
        )
        for k in range(at.folds)
    ]
    if at.folds == 1:  # nothing can be left out
        made = [full]
    # Answers to reference inputs, each by the gate made without it, and those of the constant: [samples] each.
    columns = torch.stack([*made, at.constant], 1) / at.scale[:, None]
    answers = at.sample @ columns
    held = answers.gather(1, at.sample_fold[:, None])[:, 0]
    return [
        _calibrated(
            lm,
            at,
            index,
            full,
            made,
            (held, answers[:, -1]),
            GateSettings(places, ridge, silence, threshold, prior),
        )
        for threshold in thresholds
    ]


def _calibrated(
    lm: LM,
    at: Reading,
    index: int,
    full: Tensor,
    made: list[Tensor],
    answers: tuple[Tensor, Tensor],
    settings: GateSettings,
) -> Neuron:
    """Shift and stretch the answers: 0 at the threshold, 1 at a typical fault that was left out."""
    learn, places = at.learn, settings.places
    x = learn.inputs / at.scale
    each = torch.stack([x @ g for g in made])
    held = each[at.fold, torch.arange(len(learn))]  # [b, m]
    # The weakest place of the target decides where the neuron has to be awake.
    by_place = [held[:, p][places[:, p]] for p in range(places.shape[1]) if places[:, p].any()]
    faults = min(by_place, key=lambda v: float(v.median()))
    typical = float(faults.median())
    others = float(answers[0].quantile(TOP))
    threshold = others + settings.threshold * max(typical - others, 0.0)
    # Faults that a fold's gate ranks no higher than other text: awake from just below half of them on.
    least = max(float((faults - typical).abs().median()) / 2, 0.05 * abs(typical), 1e-3)
    threshold = min(threshold, typical - least)
    # Whatever was learnt from and is told from other text has to be half awake itself.
    own = (x @ full)[places]
    if bool((own > others).any()):
        threshold = min(threshold, 2 * float(own[own > others].min()) - typical)
    # Where a fold's gate hardly knows the faults, the size goes by what the whole gate says of them.
    span = max(typical - threshold, (float(own.median()) - threshold) / SURER)

    def moved(a: Tensor) -> Tensor:
        return (a - threshold * at.constant) / span

    width = 1 + max(1.0, (float(own.max()) - threshold) / span)
    elsewhere = (answers[0] - threshold * answers[1]) / span, answers[1]
    return _neuron(lm, at, index, moved(full), [moved(g) for g in made], elsewhere, width, settings)


def _neuron(
    lm: LM,
    at: Reading,
    index: int,
    full: Tensor,
    made: list[Tensor],
    elsewhere: tuple[Tensor, Tensor],
    width: float,
    settings: GateSettings,
) -> Neuron:
    act, gated, bias = lm.layout.act(at.layer), lm.block(at.layer).gated, own_bias(lm, at.layer, index)
    rows = [make_rows(a, at.constant, at.scale, width, gated, bias) for a in (full, *made)]

    def both(bundle_: Bundle, fold: Tensor) -> Tensor:
        each = torch.stack([r.respond(bundle_.inputs, act) for r in rows]) * bundle_.real
        return torch.stack([each[0], each[1:][fold, torch.arange(len(bundle_))]])

    keep_levels = both(at.keep, at.keep_fold) if at.keep is not None else torch.zeros(2, 0, 1)
    return Neuron(
        index,
        "rewrite" if settings.prior is None else "sharpened",
        "idle" if settings.prior is None else "responsible",
        rows[0],
        settings.places,
        both(at.learn, at.fold),
        keep_levels,
        activation(*elsewhere, width, act, gated, bias),
        settings,
    )


# ---------------------------------------------------------------------- responsible neurons


@dataclass(frozen=True)
class Suspect:
    """A neuron that attribution blames for the habit."""

    reading: Reading
    index: int
    score: float
    """Linear effect of silencing it on logit(wrong) - logit(right), summed over the learn prompts; negative: guilty."""
    selectivity: float
    """Mean of n^2 at the faults over E[n^2] on reference text."""

    def describe(self) -> dict:
        """JSON values."""
        return {
            "layer": self.reading.layer,
            "index": self.index,
            "linear_summed": round(self.score, 4),
            "selectivity": round(self.selectivity, 2),
        }


def blame(lm: LM, stats: Statistics, at: Reading) -> Tensor:
    """Linear scores [d_ff]: effect on -margin of the first fault's token, neuron replaced by its mean, summed over prompts.

    At the fault's own position only, since the restart behind the kept prompt knows no other.
    """
    learn = at.learn
    first = torch.zeros_like(at.fire)
    first[torch.arange(len(learn)), at.fire.float().argmax(1)] = at.fire.any(1)
    anything = torch.full(learn.real.shape, torch.inf)
    _, gradient, seen = learn.soft_margins(torch.zeros_like(learn.inputs), first, anything)
    i, p = seen.nonzero().T
    change = stats.neurons_mean[at.layer] - learn.neurons[i, p]  # [faults, d_ff]
    return -(change * (gradient[i, p, p] @ lm.columns(at.layer).float().cpu().T)).sum(0)


def responsible_neurons(
    lm: LM, stats: Statistics, readings: Sequence[Reading], used: frozenset[tuple[int, int]]
) -> list[Suspect]:
    """Blamed neurons of all layers, the most telling first: guilt times how much louder they are at the faults."""
    found = []
    for at in readings:
        scores = blame(lm, stats, at)
        i, p = at.fire.nonzero().T
        loud = at.learn.neurons[i, p].square().mean(0) / stats.neurons_square[at.layer].clamp_min(1e-12)
        for index in scores.argsort()[:SUSPECTS].tolist():
            if scores[index] < 0 and (at.layer, index) not in used:
                found.append(Suspect(at, index, float(scores[index]), float(loud[index])))
    return sorted(found, key=lambda s: s.score * s.selectivity**0.5)


def value_edit(lm: LM, at: Reading, suspect: Suspect) -> Neuron | None:
    """The blamed neuron as it is: only what it writes may change. None if it hardly fires at the faults."""
    n = at.learn.neurons[..., suspect.index]
    typical = float(n[at.fire].median())
    if abs(typical) < 1e-6:
        return None
    rows = present_rows(lm, at.layer, suspect.index, typical)
    keep = at.keep.neurons[..., suspect.index] / typical if at.keep is not None else torch.zeros(0, 1)
    levels = n / typical
    elsewhere = rows.respond(at.sample, lm.layout.act(at.layer))
    return Neuron(
        suspect.index,
        "value",
        "responsible",
        rows,
        at.fire,
        torch.stack([levels, levels]),
        torch.stack([keep, keep]),
        elsewhere,
    )


def own_direction(lm: LM, at: Reading, index: int) -> Tensor:
    """The row of a neuron (gate or up, either sign) that tells the faults from reference text best, for scaled inputs.

    Shifted and stretched to answer 1 at a typical fault and -1 to typical reference text.
    """
    own = read_neuron(lm, at.layer, index)
    x, sample = at.learn.inputs[at.fire] / at.scale, at.sample / at.scale
    found: list[tuple[float, Tensor]] = []
    for role in ("gate", "up"):
        for sign in (1.0, -1.0) if role in own else ():
            a = sign * own[role].float() * at.scale
            here, elsewhere = (x @ a).median(), sample @ a
            lead = float((here - elsewhere.median()) / elsewhere.std().clamp_min(1e-9))
            middle, half = (here + elsewhere.median()) / 2, (here - elsewhere.median()) / 2
            found.append((lead, (a - middle * at.constant) / half.clamp_min(1e-6)))
    return max(found, key=lambda one: one[0])[1]
