"""Linear patching: the effect of replacing every neuron at every position, from one forward and one backward.

score_j = sum_t (n_j^ref(t) - n_j(t)) * dM/dn_j(t), the first-order effect on M = logit(wrong) - logit(desired) of
replacing neuron j by its reference (attribution patching: Syed et al. 2310.10348; Kramar et al. 2403.00745). Guilty
neurons score negative. Weights stay frozen, one `autograd.grad` covers all layers, and since the node lies after the
nonlinearity no attention probabilities are needed. What this misses is curvature: `exact.py` checks.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mint.attribution.faults import Fault, differences
from mint.model.lm import LM, Encoded

_ROWS = 768
"""Most fault x token rows that one backward carries: bounds the memory of long prompts and many faults."""


@dataclass(frozen=True)
class LinearScores:
    """First-order effects on logit(wrong) - logit(desired) of replacing each neuron by its reference.

    Each list has one tensor [faults, d_ff] a layer, float32, on the model's device; [1, d_ff] if combined.
    """

    at_fault: list[Tensor]
    """Replaced at the fault's own position only."""
    summed: list[Tensor]
    """Replaced at every position up to the fault's, summed: what a weight edit would touch."""


@contextmanager
def _leaves(lm: LM) -> Iterator[dict[str, Tensor]]:
    """Within: a forward fills block -> activations (the model's own shape), as nodes of a graph that starts there."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for block in lm.layout.blocks:

            def hook(_module, args, block=block):
                # Nothing below the first neurons is asked for, so the graph starts at them.
                first = block.layer == lm.layout.repairable[0]
                seen[block.out] = args[0].detach().requires_grad_() if first else args[0]
                return (seen[block.out], *args[1:])

            stack.callback(lm.module(block.out).register_forward_pre_hook(hook).remove)
        yield seen


Nodes = Sequence[Sequence[Tensor]]
"""Layer -> activations of its blocks, in the model's own shape ([1, tokens, d_ff], or flattened)."""


def forward_with_graph(
    lm: LM, ids: Sequence[int], faults: Sequence[Fault]
) -> tuple[Tensor, list[list[Tensor]]]:
    """One forward of `ids` (1 sequence): the metric of each fault, [faults], and the neurons of every layer as nodes.

    Frozen weights give no graph: it starts at the first neurons.
    """
    with torch.enable_grad(), _leaves(lm) as seen:
        logits = lm.logits([list(ids)], [[f.position for f in faults]])
        blocks = [lm.layout.blocks_of(layer) for layer in range(lm.n_layers)]
        return differences(logits, faults), [[seen[block.out] for block in row] for row in blocks]


def backward(metrics: Tensor, nodes: Nodes) -> list[Tensor]:
    """d metrics[i] / d neurons for every i and layer, [faults, tokens, d_ff] a layer; the graph is kept."""
    n = len(metrics)
    if n == 1:
        return _grad(metrics[0], nodes)
    eye = torch.eye(n, device=metrics.device, dtype=metrics.dtype)
    try:
        with warnings.catch_warnings():
            # vmap says which operations it runs one by one; nothing the user could act on.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return _grad(metrics, nodes, eye)
    except (RuntimeError, NotImplementedError):  # an operation of the model that vmap cannot batch
        each = [backward(m[None], nodes) for m in metrics]
        return [torch.cat(layer) for layer in zip(*each, strict=True)]


def _grad(metrics: Tensor, nodes: Nodes, eye: Tensor | None = None) -> list[Tensor]:
    """Gradients of the metric (of each, with `eye`), [faults, tokens, d_ff] a layer; a layer may have no neurons."""
    flat = [node for row in nodes for node in row]
    batched = eye is not None
    found = iter(torch.autograd.grad(metrics, flat, eye, retain_graph=True, is_grads_batched=batched))
    rows = 1 if eye is None else len(eye)
    out = []
    for row in nodes:
        parts = [next(found).reshape(rows, -1, node.shape[-1]) for node in row]
        out.append(torch.cat(parts, -1) if parts else flat[0].new_zeros(rows, 1, 0))
    return out


def deltas(nodes: Nodes, reference: Sequence[Tensor] | None) -> list[Tensor]:
    """reference - activation, [tokens, d_ff] a layer, float32. reference: [d_ff] or [tokens, d_ff] a layer; None: zero."""
    out = []
    for layer, row in enumerate(nodes):
        parts = [node.detach().reshape(-1, node.shape[-1]).float() for node in row]
        n = torch.cat(parts, -1) if parts else torch.zeros(1, 0)
        if reference is None or not parts:
            out.append(-n)
            continue
        wanted = reference[layer].to(n.device).float()
        out.append((wanted[: len(n)] if wanted.dim() == 2 else wanted) - n)
    return out


def _weigh(
    change: Sequence[Tensor], gradient: Sequence[Tensor], positions: Sequence[Sequence[int]]
) -> LinearScores:
    """Scores from changes [tokens, d_ff] and gradients [rows, tokens, d_ff]; positions[i]: where row i is at fault."""
    at_fault, summed = [], []
    for d, g in zip(change, gradient, strict=True):
        product = g.float() * d  # [rows, tokens, d_ff]
        if not product.shape[-1]:  # a layer without a block
            product = product.new_zeros(len(positions), 1 + max(map(max, positions)), 0)
        at_fault.append(torch.stack([row[p].sum(0) for row, p in zip(product, positions, strict=True)]))
        summed.append(product.sum(1))
    return LinearScores(at_fault, summed)


def linear_scores(
    lm: LM,
    encoded: Encoded | Sequence[int],
    faults: Sequence[Fault],
    reference: Sequence[Tensor] | None = None,
    combined: bool = False,
) -> LinearScores:
    """Linear scores of all neurons for all faults of one case.

    reference: the activations to replace by, one tensor [d_ff] (every position alike) or [tokens, d_ff] a layer, e.g.
    `statistics(lm).neurons_mean`; None (default): zero. combined: explain the sum of the faults' metrics in a single
    backward, about 2.3 plain forwards in all however many faults there are; otherwise each fault costs a backward more
    (batched). Peak memory: the graph of one forward plus one gradient [rows, tokens, d_ff] a layer.
    """
    ids = encoded.ids if isinstance(encoded, Encoded) else list(encoded)
    ids = ids[: max(f.position for f in faults) + 1]  # causal: later tokens change nothing
    metrics, nodes = forward_with_graph(lm, ids, faults)
    change = deltas(nodes, reference)
    if combined:
        return _weigh(change, backward(metrics.sum()[None], nodes), [[f.position for f in faults]])
    step = max(1, min(8, _ROWS // len(ids)))
    parts = [
        _weigh(change, backward(metrics[i : i + step], nodes), [[f.position] for f in faults[i : i + step]])
        for i in range(0, len(faults), step)
    ]
    return LinearScores(
        [torch.cat(t) for t in zip(*(p.at_fault for p in parts), strict=True)],
        [torch.cat(t) for t in zip(*(p.summed for p in parts), strict=True)],
    )
