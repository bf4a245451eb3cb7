"""Exact patching: the true effect of replacing neurons, by running the model again from the patched layer on.

A patch at the last position cannot change earlier positions, so their keys and values are kept, and every candidate is
one extra row of one token that enters at its own layer: thousands of neurons cost what a few prompts do. The two
logits of the metric are all that is unembedded. Patches at every position run the whole sequence from their layer on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from mint.attribution.faults import Fault, differences
from mint.errors import ModelError
from mint.model.hooks import override, record
from mint.model.layout import weight_of
from mint.model.lm import LM
from mint.model.suffix import forward_replaced, kept_cache, kept_prefix, new_cache, record_states, start_at

ROWS = 512
"""Most candidates that run together."""
_CACHE_BYTES = 128 << 20
"""Most memory for the repeated keys and values of one layer."""

Change = Callable[[Tensor], Tensor]
"""Activations [rows, tokens, d_ff] -> activations as they should be."""


@dataclass(frozen=True)
class Run:
    """One forward up to a fault, kept so that later forwards can restart inside it."""

    ids: tuple[int, ...]
    """Tokens up to and including the fault's position."""
    fault: Fault
    hidden: dict[int, Tensor]
    """Layer -> [1, tokens, width], the residual stream as it enters the layer."""
    as_tuple: int
    neurons: list[Tensor]
    """Activations [tokens, d_ff] a layer."""
    logits: Tensor
    """[vocab] at the fault, float32."""
    prefix: list[tuple[Tensor, Tensor]] | None
    """Keys and values [1, heads, tokens - 1, size] a layer; None where the model's cache cannot be lent."""
    no_op_error: float = 0.0
    """|metric of a restart that changes nothing - metric of the plain forward|: the self-test of every run."""

    @property
    def metric(self) -> float:
        return float(differences(self.logits[None], [self.fault])[0])


@contextmanager
def _two_logits(lm: LM, fault: Fault) -> Iterator[None]:
    """Within: the model's logits are [..., 2], wrong and desired, in float32 (bf16 logits are too coarse to subtract)."""
    head = lm.module(lm.layout.unembedding)
    weight = weight_of(head)
    weight = weight.T if isinstance(head, Conv1D) else weight
    chosen = torch.tensor([fault.wrong, fault.desired], device=weight.device)
    bias = getattr(head, "bias", None)
    rows = weight[chosen].float()
    offset = None if bias is None else bias[chosen].float()

    def forward(hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), rows, offset)

    with forward_replaced(head, forward):
        yield


@torch.no_grad()
def record_run(lm: LM, ids: Sequence[int], fault: Fault, changes: dict[int, Change] | None = None) -> Run:
    """Run `ids` up to the fault and keep what restarts need. changes: layer -> override of its activations, if any.

    Memory: L x tokens x (width + d_ff + keys and values). Checks itself: a restart that changes nothing.
    """
    ids = list(ids)[: fault.position + 1]
    cache = new_cache(lm) if len(ids) > 1 else None
    row = torch.tensor([0], device=lm.device)
    column = torch.tensor([len(ids) - 1], device=lm.device)
    with ExitStack() as stack:
        states = stack.enter_context(record_states(lm, range(lm.n_layers)))
        if changes:
            stack.enter_context(override(lm, changes))
        neurons = stack.enter_context(record(lm))
        stack.enter_context(lm.only_at(row, column))
        options = {"past_key_values": cache, "use_cache": True} if cache is not None else {"use_cache": False}
        logits = lm.model(input_ids=lm.pad([ids]), **options).logits[0, 0].float()
    none = torch.zeros(1, len(ids), 0, device=lm.device)  # a layer without a block
    kept = [neurons.get(layer, none)[0].clone() for layer in range(lm.n_layers)]
    run = Run(
        tuple(ids), fault, states.hidden, states.as_tuple, kept, logits, _prefix(lm, cache, len(ids) - 1)
    )
    return _self_tested(lm, run)


def _prefix(lm: LM, cache: Cache | None, length: int) -> list[tuple[Tensor, Tensor]] | None:
    if cache is None:
        return None
    try:
        return kept_prefix(lm, cache, length)
    except ModelError:
        return None  # a model that keeps something else is run from the start


def _self_tested(lm: LM, run: Run) -> Run:
    """The run with the error of a no-op restart; the prefix is dropped where restarting on it does not reproduce."""
    scale = 1.0 + float(run.logits[[run.fault.wrong, run.fault.desired]].abs().max())
    tolerance = scale * (1e-4 if lm.dtype in (torch.float32, torch.float64) else 5e-2)
    for prefix in (run.prefix, None):
        tried = Run(**{**run.__dict__, "prefix": prefix})
        try:
            error = abs(float(rerun(lm, tried, {lm.layout.repairable[0]: lambda n: n}, 1)[0]) - run.metric)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            if prefix is None:
                raise
            continue  # a model whose attention wants another kind of cache
        if error <= tolerance or prefix is None:
            return Run(**{**tried.__dict__, "no_op_error": error})
    raise AssertionError("unreachable")


def differentiable_rerun(lm: LM, run: Run, changes: dict[int, Change], rows: int) -> Tensor:
    """`rerun` at the fault's position, with a graph from whatever the changes put in."""
    with torch.enable_grad():
        return _rerun(lm, run, changes, rows, everywhere=False, full=False)


@torch.no_grad()
def rerun(
    lm: LM, run: Run, changes: dict[int, Change], rows: int, *, everywhere: bool = False, full: bool = False
) -> Tensor:
    """Run again with changed activations, from the lowest changed layer on, as `rows` rows.

    changes: layer -> function of that layer's activations [rows, tokens, d_ff], where tokens is 1 (the fault's
    position) or, if `everywhere`, all of them. Returns the metric, [rows], or if `full` the logits, [rows, vocab].
    """
    return _rerun(lm, run, changes, rows, everywhere=everywhere, full=full)


def _rerun(
    lm: LM, run: Run, changes: dict[int, Change], rows: int, *, everywhere: bool, full: bool
) -> Tensor:
    layer = min(changes)
    prefix = None if everywhere else run.prefix
    hidden = run.hidden[layer] if prefix is None else run.hidden[layer][:, -1:]
    hidden = hidden.expand(rows, -1, -1)
    tokens = hidden.shape[1]
    if prefix is None and not everywhere:
        changes = {at: _at_last(function) for at, function in changes.items()}
    options: dict = {"use_cache": False}
    if prefix is not None:
        options = {"past_key_values": kept_cache(prefix), "use_cache": True}
    ids = torch.tensor([run.ids[-tokens:]], device=lm.device).expand(rows, -1)
    with ExitStack() as stack:
        stack.enter_context(start_at(lm, layer, hidden, run.as_tuple))
        stack.enter_context(override(lm, changes))
        index = torch.arange(rows, device=lm.device)
        stack.enter_context(lm.only_at(index, torch.full_like(index, tokens - 1)))
        if not full:
            stack.enter_context(_two_logits(lm, run.fault))
        logits = lm.model(input_ids=ids, **options).logits[0].float()
    return logits if full else logits[:, 0] - logits[:, 1]


def _at_last(change: Change) -> Change:
    def function(n: Tensor) -> Tensor:
        return torch.cat([n[:, :-1], change(n[:, -1:])], dim=1)

    return function


def _rows(run: Run, everywhere: bool) -> int:
    if everywhere or run.prefix is None:
        return max(1, min(64, 2048 // len(run.ids)))
    key = run.prefix[0][0]
    each = 2 * key.numel() * key.element_size()
    return max(8, min(ROWS, _CACHE_BYTES // max(each, 1)))


def patch_layer(lm: LM, run: Run, layer: int, indices: Tensor, values: Tensor) -> Tensor:
    """Exact change of the metric for each of k neurons of one layer, patched one at a time. [k], float32, CPU.

    indices: [k]. values: [k], the new activation at the fault's position. Effects are taken against an unpatched row of
    the same batch.
    """
    parts = []
    step = _rows(run, False)
    indices = indices.to(run.hidden[layer].device)
    values = values.to(run.hidden[layer].device)
    for start in range(0, len(indices), step):
        index, value = indices[start : start + step], values[start : start + step]

        def change(n: Tensor, index=index, value=value) -> Tensor:
            n = n.clone()
            row = torch.arange(len(index), device=n.device)
            index, value = index.to(n.device), value.to(n.device, n.dtype)
            n[row, :, index] = value[:, None]
            return n

        # The last row is left as it is: batches of another size round otherwise.
        metric = rerun(lm, run, {layer: change}, len(index) + 1)
        parts.append((metric[:-1] - metric[-1]).cpu())
    return torch.cat(parts) if parts else torch.zeros(0)


def reference_at(run: Run, reference: Sequence[Tensor] | None, layer: int) -> Tensor:
    """The reference activations of a layer at the fault's position, [d_ff] float32 (None: zero)."""
    if reference is None:
        return torch.zeros(run.neurons[layer].shape[-1], device=run.neurons[layer].device)
    wanted = reference[layer].to(run.neurons[layer].device).float()
    return wanted[len(run.ids) - 1] if wanted.dim() == 2 else wanted


def exact_scores(
    lm: LM, run: Run, candidates: Sequence[tuple[int, int]], reference: Sequence[Tensor] | None
) -> Tensor:
    """Exact change of the metric when each (layer, index) alone is replaced by its reference at the fault. [k].

    Denoising if the run is the faulty one and the reference healthy. reference: as in `linear_scores`. Candidates of
    neighbouring layers share a batch that starts at the lowest of them: few large batches beat many small ones.
    """
    values = {layer: reference_at(run, reference, layer).cpu() for layer in {at for at, _ in candidates}}
    members = [(layer, index, float(values[layer][index])) for layer, index in candidates]
    scores = torch.zeros(len(members))
    for group in _groups(members, _rows(run, False)):
        scores[torch.tensor(group)] = _patch_group(lm, run, [members[i] for i in group])
    return scores


def _groups(members: Sequence[tuple[int, int, float]], limit: int) -> Iterator[list[int]]:
    """Places of the members in batches of neighbouring layers."""
    size = min(limit, max(32, len(members) // 6))
    order = sorted(range(len(members)), key=lambda i: members[i][0])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _patch_group(lm: LM, run: Run, members: Sequence[tuple[int, int, float]]) -> Tensor:
    """Exact effects of single neurons (layer, index, value) of several layers, one row each and an unpatched one. [k]."""
    metric = rerun(lm, run, _one_each(members), len(members) + 1)
    return (metric[:-1] - metric[-1]).cpu()


def _one_each(members: Sequence[tuple[int, int, float]]) -> dict[int, Change]:
    """Changes that set neuron i (layer, index, value) in row i alone, at the last position."""
    changes: dict[int, Change] = {}
    for layer in sorted({layer for layer, _, _ in members}):
        rows = [(row, index, value) for row, (at, index, value) in enumerate(members) if at == layer]
        row, index, value = (torch.tensor(part) for part in zip(*rows, strict=True))

        def change(n: Tensor, row=row, index=index, value=value) -> Tensor:
            n = n.clone()
            n[row.to(n.device), -1, index.to(n.device)] = value.to(n.device, n.dtype)
            return n

        changes[layer] = change
    return changes


def exact_all(
    lm: LM, run: Run, reference: Sequence[Tensor] | None, say: Callable[[str], None] = lambda _: None
) -> list[Tensor]:
    """Exact scores of every neuron of the model at the fault's position, one tensor [d_ff] a layer."""
    out = []
    for layer in range(lm.n_layers):
        every = torch.arange(lm.d_ff(layer))
        out.append(patch_layer(lm, run, layer, every, reference_at(run, reference, layer).cpu()))
        say(f"exact patching: layer {layer + 1} of {lm.n_layers}")
    return out


def set_at_fault(members: Sequence[tuple[int, int, float]]) -> dict[int, Change]:
    """Changes for `rerun` that set several neurons (layer, index, value) together at the fault's position."""
    changes: dict[int, Change] = {}
    for layer in sorted({layer for layer, _, _ in members}):
        chosen = [(index, value) for at, index, value in members if at == layer]

        def change(n: Tensor, chosen=tuple(chosen)) -> Tensor:
            n = n.clone()
            for index, value in chosen:
                n[:, -1, index] = value
            return n

        changes[layer] = change
    return changes


def joint_effect(lm: LM, run: Run, members: Sequence[tuple[int, int, float]]) -> float:
    """Exact change of the metric when several neurons (layer, index, value) are replaced together at the fault."""
    if not members:
        return 0.0
    lowest = min(layer for layer, _, _ in members)
    base = float(rerun(lm, run, {lowest: lambda n: n}, 1)[0])
    return float(rerun(lm, run, set_at_fault(members), 1)[0]) - base


def leave_one_out(lm: LM, run: Run, members: Sequence[tuple[int, int, float]]) -> Tensor:
    """Noising without a healthy prompt: effect of each neuron's replacement where all other members are replaced. [k].

    Entry i = M(all replaced) - M(all but i replaced): the healthy run is the one with every member replaced, and the
    neuron's faulty value is put back into it. Negative: its faulty value alone brings the fault back.
    """
    if not members:
        return torch.zeros(0)
    k = len(members)
    changes: dict[int, Change] = {}
    for layer in sorted({layer for layer, _, _ in members}):
        chosen = [(i, index, value) for i, (at, index, value) in enumerate(members) if at == layer]

        def change(n: Tensor, chosen=tuple(chosen), layer=layer) -> Tensor:
            n = n.clone()
            for i, index, value in chosen:
                n[:, -1, index] = value
                n[i, -1, index] = run.neurons[layer][-1, index].to(n.device)
            return n

        changes[layer] = change
    metric = rerun(lm, run, changes, k + 1)
    return (metric[-1] - metric[:-1]).cpu()


def noise_scores(lm: LM, healthy: Run, run: Run, candidates: Sequence[tuple[int, int]]) -> Tensor:
    """Noising: each neuron's faulty activation put into the healthy run at its last position. [k].

    Same sign as denoising: M(healthy) - M(healthy with the faulty activation), so a guilty neuron is negative.
    """
    faulty = [n[-1].float() for n in run.neurons]
    return -exact_scores(lm, healthy, candidates, faulty)


def row_logits(lm: LM, run: Run, members: Sequence[tuple[int, int, float]]) -> Tensor:
    """Logits at the fault with each neuron (layer, index, value) patched alone, and unpatched last, [k + 1, vocab]."""
    return rerun(lm, run, _one_each(members), len(members) + 1, full=True)


def block_effects(
    lm: LM,
    run: Run,
    reference: Sequence[Tensor],
    positions: Sequence[int],
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Exact change of the metric when a whole block is set to its reference at one position. [layers, positions].

    Blocks linearise badly, so there is no linear version. Each layer runs one batch of whole sequences.
    """
    out = []
    for layer in lm.layout.repairable if layers is None else layers:
        wanted = reference[layer]

        def change(n: Tensor, wanted=wanted) -> Tensor:
            n = n.clone()
            value = wanted.to(n.device, n.dtype)
            for row, position in enumerate(chunk):  # noqa: B023 (used within this turn of the loop)
                n[row, position] = value[position] if value.dim() == 2 else value
            return n

        parts = []
        step = _rows(run, True)
        for start in range(0, len(positions), step):
            chunk = positions[start : start + step]
            metric = rerun(lm, run, {layer: change}, len(chunk) + 1, everywhere=True)
            parts.append((metric[:-1] - metric[-1]).cpu())
        out.append(torch.cat(parts))
    return torch.stack(out)
