"""What the solver `contexts` learns from: a case in other files and words, near misses and other cases, as inputs of a layer."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from mint import prompts
from mint.batches import alike
from mint.case import Case
from mint.errors import CaseError
from mint.model.lm import LM, Encoded
from mint.reference import statistics
from mint.solver.bundle import Bundle, bundle
from mint.solver.inputs import block_inputs
from mint.solver.problem import Problem, Settings, case_key
from mint.solver.recipe import Recipe
from mint.solver.variants import contexts, wordings

EXTRA = 8
"""Tokens beyond the length of the target for which the model's own text behind a near miss is to stay."""
OTHERS = 6000
"""Tokens of other cases of the same run that a gate learns to be silent at, at most: time and memory grow with them."""


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
