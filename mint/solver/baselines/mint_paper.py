"""CleanOutputs: MINT as published (Gu, Aleti, Chen, Zhang, "Neuron Patching", arXiv 2312.05356, sections on locating,
semantic estimation and planning), from a description of the method and of its authors' settings.

Followed: the target is walked token by token with the true prefix, right tokens are left alone; neurons of the upper
half of the layers are scored by gradient x activation of the softmax probability of the target, L2 norm over tokens,
and the best 10 of all layers are candidates; the direction is the difference of two rows of the pseudo-inverse of the
unembedding (target minus the token first predicted), divided by its range; an edit is
column <- (column + f direction) / (1 + f) with f = 0.01; every edit goes to the candidate that leaves the smallest
p(argmax) - p(target), found by trying them all; at most 10 edits a token, with the same candidates and direction; a
token that still fails is given up and its edits undone; at the end all tokens are checked again.

Differs deliberately, none of it in what is computed: the prefix stays token ids (the authors decode and encode it
again token by token, which changes it on several tokenizers); probabilities are the raw softmax (theirs pass the
repetition penalty, temperature and top-k of the model's generation settings); an exception never leaves edits behind;
neurons are the input of the output matrix in every model. Left out: the projection onto the complement of earlier
repairs' directions, which stands in the authors' code and not in the paper. Ignores `keep`, earlier repairs and
`max_neurons`; success asks every target token to be the argmax with the true prefix (or above `settings.margin`).

Faster, same result: the rows of the pseudo-inverse come from one d_model x d_model factor kept per model; one backward
serves all layers; the candidates of a layer run as one batch from that layer on, each row adding n_j(t) * (change of
column j) to the block's output at every position t, which is what the changed column would write (equal up to
floating-point rounding; the edit that is kept is written into the weights and judged there).
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mint.case import case_to_dict
from mint.model.hooks import override
from mint.model.lm import LM
from mint.model.margins import margins, margins_of
from mint.model.suffix import record_states, suffix_logits
from mint.patch import Patch, identity, make_edit, versions
from mint.solver.baselines.matrices import ALREADY_RIGHT, chosen_layers, refused, wanted_margin
from mint.solver.problem import Problem, Settings, Solution

NAME = "mint-paper"
CANDIDATES = 10
EDITS = 10
"""Most edits for one token."""
FACTOR = 1e-2

Neuron = tuple[int, int]
"""(layer, index)."""

# ---------------------------------------------------------------------- semantic directions

_INVERSES: WeakKeyDictionary = WeakKeyDictionary()


@torch.no_grad()
def semantic_rows(lm: LM, tokens: Sequence[int]) -> Tensor:
    """Rows of the pseudo-inverse of the unembedding: [tokens, d], the hidden states whose logits are nearest one-hot.

    With W the unembedding [vocab, d], row k of pinv(W') is (W'W)^-1 W[k]: one d x d inverse, made once per model.
    """
    head = lm.module(lm.layout.unembedding)
    weight = head.get_parameter("weight").detach()
    inverse = _INVERSES.get(head)
    if inverse is None:
        gram = torch.zeros(
            weight.shape[1], weight.shape[1], dtype=torch.float64
        )  # on the CPU: not every device has it
        for rows in weight.split(4096):
            rows = rows.cpu().double()
            gram += rows.T @ rows
        factor, failed = torch.linalg.cholesky_ex(gram)
        # Fewer tokens than dimensions, or dependent ones: the pseudo-inverse proper.
        inverse = torch.linalg.pinv(gram, hermitian=True) if failed else torch.cholesky_inverse(factor)
        _INVERSES[head] = inverse
    return (weight[list(tokens)].cpu().double() @ inverse).float().to(weight.device)


def fits(lm: LM) -> bool:
    """Whether the unembedding reads vectors of the size that the neurons write."""
    return lm.module(lm.layout.unembedding).get_parameter("weight").shape[1] == lm.layout.width


UNFIT = (
    "the unembedding of this model does not read the residual stream directly, so its pseudo-inverse gives no"
    " direction; use another solver"
)


def _direction(lm: LM, target: int, rival: int) -> Tensor:
    rows = semantic_rows(lm, [target, rival])
    drift = rows[0] - rows[1]
    return drift / (drift.max() - drift.min()).clamp_min(1e-8)


# ---------------------------------------------------------------------- locating


def locate(lm: LM, prefix: Sequence[int], target: int, layers: Sequence[int]) -> list[Neuron]:
    """The `CANDIDATES` neurons with the largest gradient x activation of p(target | prefix), best first.

    Score of a neuron: L2 norm over positions of activation x gradient. Neurons with score 0 are no candidates.
    """
    seen: dict[int, Tensor] = {}

    def watch(layer: int):
        def look(neurons: Tensor) -> Tensor:
            # Parameters are frozen: the lowest layer starts the graph.
            seen[layer] = neurons if neurons.requires_grad else neurons.detach().requires_grad_()
            return seen[layer]

        return look

    with torch.enable_grad(), override(lm, {layer: watch(layer) for layer in layers}):
        logits = lm.logits([list(prefix)], [[len(prefix) - 1]])
        probability = logits[0].softmax(0)[target]
    gradients = torch.autograd.grad(probability, [seen[layer] for layer in layers])
    places, scores = [], []
    for layer, gradient in zip(layers, gradients, strict=True):
        score = (gradient * seen[layer].detach()).float().norm(dim=(0, 1)).cpu()
        best = score.topk(min(CANDIDATES, len(score)))
        places += [(layer, int(index)) for index in best.indices]
        scores += best.values.tolist()
    order = sorted(range(len(places)), key=lambda i: (-scores[i], places[i]))[:CANDIDATES]
    return [places[i] for i in order if scores[i] > 0]


# ---------------------------------------------------------------------- trying candidates


@dataclass(frozen=True)
class _Start:
    """The cached input of the lowest candidate layer; nothing that is edited lies below it."""

    prefix: list[int]
    layer: int
    hidden: Tensor
    as_tuple: int


def _start(lm: LM, prefix: Sequence[int], layer: int) -> _Start:
    with record_states(lm, [layer]) as states:
        lm.logits([list(prefix)], [[len(prefix) - 1]])
    return _Start(list(prefix), layer, states.hidden[layer], states.as_tuple)


def _last_logits(lm: LM, start: _Start, layer: int, hidden: Tensor) -> Tensor:
    """Logits [batch, vocab] at the last position, from `layer` on."""
    batch = hidden.shape[0]
    last = len(start.prefix) - 1
    if layer == 0:  # nothing to skip
        return lm.logits([start.prefix] * batch, [[last]] * batch)
    rows, columns = torch.arange(batch), torch.full((batch,), last)
    return suffix_logits(lm, layer, hidden, start.as_tuple, rows, columns)


@contextmanager
def _columns_moved(lm: LM, layer: int, indices: Sequence[int], moves: Tensor) -> Iterator[None]:
    """Within: in row i of a batch, neuron indices[i] of the layer writes along column + moves[i] ([batch, d_model])."""

    def hook(_module, args, output):
        neurons = args[0].view(len(indices), -1, args[0].shape[-1])
        active = neurons[torch.arange(len(indices)), :, list(indices)]  # [batch, tokens]
        extra = active[..., None].float() * moves[:, None].to(active.device)
        return output + extra.to(output.dtype).view(output.shape)

    handle = lm.module(lm.block(layer).out).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _moved(column: Tensor, direction: Tensor) -> Tensor:
    """The edit rule, rounded to the column's dtype."""
    wanted = (column.float() + FACTOR * direction.to(column.device)) / (1 + FACTOR)
    return wanted.to(column.dtype)


def _present(lm: LM, start: _Start, layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits [vocab] of the model as it is, and what enters each of `layers`."""
    above = [layer for layer in layers if layer > start.layer]
    with record_states(lm, above) as states:
        logits = _last_logits(lm, start, start.layer, start.hidden)[0]
    return logits, states.hidden | {start.layer: start.hidden}


def _gaps(
    lm: LM, start: _Start, hidden: dict[int, Tensor], tried: list[Neuron], direction: Tensor, target: int
):
    """p(argmax) - p(target) after one edit of each candidate alone, in the order of `tried`."""
    gaps: dict[Neuron, float] = {}
    for layer in sorted({layer for layer, _ in tried}):
        indices = [index for place, index in tried if place == layer]
        columns = lm.columns(layer)[indices]
        moves = _moved(columns, direction).float() - columns.float()
        states = hidden[layer].expand(len(indices), -1, -1)
        with _columns_moved(lm, layer, indices, moves):
            probabilities = _last_logits(lm, start, layer, states).softmax(-1)
        gap = probabilities.amax(-1) - probabilities[:, target]
        gaps |= {(layer, index): float(g) for index, g in zip(indices, gap, strict=True)}
    return [gaps[neuron] for neuron in tried]


# ---------------------------------------------------------------------- repairing


class _Columns:
    """The columns that were touched, as they were before any edit."""

    def __init__(self, lm: LM):
        self.lm = lm
        self.before: dict[Neuron, Tensor] = {}

    def read(self, neuron: Neuron) -> Tensor:
        return self.lm.columns(neuron[0])[neuron[1]].detach().clone()

    def write(self, neuron: Neuron, value: Tensor) -> None:
        self.before.setdefault(neuron, self.read(neuron))
        self.lm.columns(neuron[0])[neuron[1]].copy_(value)

    def restore(self, values: dict[Neuron, Tensor]) -> None:
        try:
            self._copy(values)
        except BaseException:  # Ctrl-C included: finish before passing it on
            self._copy(values)
            raise

    def _copy(self, values: dict[Neuron, Tensor]) -> None:
        for (layer, index), value in values.items():
            self.lm.columns(layer)[index].copy_(value)


def _repair_token(
    lm: LM, columns: _Columns, prefix: list[int], target: int, layers: Sequence[int], wanted: float
) -> int | None:
    """Edit until the target is the argmax behind the prefix; the number of edits, or None with the edits undone."""
    tried = locate(lm, prefix, target, layers)
    if not tried:
        return None
    saved = {neuron: columns.read(neuron) for neuron in tried}
    used = sorted({layer for layer, _ in tried})
    start = _start(lm, prefix, used[0])
    direction = None
    for edits in range(EDITS + 1):
        logits, hidden = _present(lm, start, used)
        if float(margins_of(logits[None], (target,))) > wanted:
            return edits
        if edits == EDITS:
            break
        if direction is None:
            # The rival first seen stays in the direction to the end, as in the authors' code.
            rival = int(
                logits.index_fill(0, torch.tensor([target], device=logits.device), -torch.inf).argmax()
            )
            direction = _direction(lm, target, rival)
        gaps = _gaps(lm, start, hidden, tried, direction, target)
        best = tried[min(range(len(tried)), key=gaps.__getitem__)]
        columns.write(best, _moved(columns.read(best), direction))
    columns.restore(saved)
    return None


@torch.no_grad()
def solve(lm: LM, problem: Problem, settings: Settings) -> Solution:
    """Repair the wrong tokens of the target one after the other; a patch of value edits, or a reason.

    Layers: the upper half, or `settings.layers`. The model is bit-identical afterwards. `details`: `edits` (of the
    tokens that could be repaired), `repaired` and `skipped` (positions in the target). Raises `MintError` for layers
    that the model has not.
    """
    started = time.perf_counter()
    layers = chosen_layers(lm, settings, range(lm.n_layers // 2, lm.n_layers))
    encoded, wanted = problem.encoded, wanted_margin(settings)
    first = margins(lm, encoded)
    if float(first.min()) > wanted:
        return refused(NAME, ALREADY_RIGHT, started, float(first.min()))
    if not fits(lm):
        return refused(NAME, UNFIT, started)
    columns = _Columns(lm)
    found: dict[int, int | None] = {}
    try:
        for number, (position, token) in enumerate(zip(encoded.positions, encoded.target, strict=True)):
            prefix = encoded.ids[: position + 1]
            if float(margins_of(lm.logits([prefix], [[position]]), (token,))) <= wanted:
                found[number] = _repair_token(lm, columns, prefix, token, layers, wanted)
        last = margins(lm, encoded)
        after = {neuron: columns.read(neuron) for neuron in sorted(columns.before)}
    finally:
        columns.restore(columns.before)
    details = {
        "edits": sum(n or 0 for n in found.values()),
        "repaired": [n for n, edits in found.items() if edits is not None],
        "skipped": [n for n, edits in found.items() if edits is None],
    }
    smallest = float(last.min())
    if not smallest > wanted:
        wrong = int((last <= wanted).sum())
        reason = (
            f"{wrong} of {len(encoded.target)} target tokens are not right at the end; {len(details['skipped'])} were"
            f" given up after {EDITS} edits"
        )
        return refused(NAME, reason, started, margin_reached=smallest, **details)
    changes = tuple(make_edit(lm, *neuron, {"out": column}) for neuron, column in after.items())
    kept = tuple(edit for edit in changes if not torch.equal(edit.before["out"], edit.after["out"]))
    info = {"solver": NAME, "cases": [case_to_dict(problem.case)], "versions": versions()}
    patch = Patch(kept, identity(lm), info)
    return Solution(NAME, patch, None, smallest, time.perf_counter() - started, details)
