"""CleanOutputs: a key/value edit of one output matrix, after ROME (Meng et al., arXiv 2202.05262, section 3.1 and
equation 2) with several keys as in MEMIT (arXiv 2210.07229, section 4.2 and equation 14).

Followed: keys are neuron activations k_i of one layer, C = E[n n'] of that layer over reference text; the change of the
matrix is C^-1 K (K' C^-1 K)^-1 V', the smallest in the metric C that adds v_i to the output for key k_i; the values v
are found by Adam on the cross-entropy of the target, held within `CLAMP` x the norm of the layer's own output there.

Differs deliberately, since a fault here is a line and has no subject: keys are the activations at the positions that
predict the target's tokens, all of them, so that right tokens stay right (with one target token it is rank one, with n
tokens rank n); the values are optimised through the edit itself, which adds S v at *every* position, so that what is
optimised is what the written matrix does; no random prefixes, no essence term (there is no subject to keep), and the
layer is a fixed depth (`DEPTH`, chosen on training rows) instead of causal tracing; C is ridged. It stops at the
first step at which every target token has the wanted margin (default 0), and gives up after `STEPS`. Ignores `keep`,
earlier repairs, `max_neurons`, `generalize` and `where`; `settings.layers` must then name one layer.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from mint.errors import MintError
from mint.model.hooks import record
from mint.model.lm import LM, Encoded
from mint.model.loading import cache_dir
from mint.model.margins import margins, margins_of
from mint.model.suffix import States, record_states, suffix_logits
from mint.reference import passages, reference_key, reference_texts, store_tensors
from mint.solver.baselines.matrices import (
    ALREADY_RIGHT,
    changed_matrices,
    chosen_layers,
    output_names,
    refused,
    restored,
    wanted_margin,
)
from mint.solver.problem import Problem, Settings, Solution

NAME = "rank-one"
DEPTH = 0.6
"""Which layer, as a share of the depth."""
STEPS = 50
RATE = 0.1
"""Adam's step, in units of the root mean square of the layer's own output at the keys."""
CLAMP = 4.0
"""Largest norm of a value, in units of the norm of the layer's own output at its key (ROME's clamp factor)."""
RIDGE = 1e-2
"""Added to the diagonal of C, as a share of its mean: the reference text is short."""

_FACTORS: WeakKeyDictionary = WeakKeyDictionary()


@torch.no_grad()
def _factor(lm: LM, layer: int) -> Tensor:
    """Cholesky factor of the ridged C = E[n n'] of a layer, [d_ff, d_ff] float32 on CPU.

    Kept in memory per model and layer, as first seen: as in ROME, later edits of the same model do not renew it. C is
    kept in the cache folder too, keyed by the model's weights and the reference text.
    """
    kept = _FACTORS.setdefault(lm.model, {})
    if layer not in kept:
        kept[layer] = torch.linalg.cholesky(_ridged(_cached_moment(lm, layer)))
    return kept[layer]


def _ridged(moment: Tensor) -> Tensor:
    # Without reference text: the identity, all directions cost the same.
    ridge = RIDGE * float(moment.diagonal().mean()) or 1.0
    return moment + ridge * torch.eye(len(moment))


def _cached_moment(lm: LM, layer: int) -> Tensor:
    texts = reference_texts()
    path = cache_dir() / "statistics" / f"neurons-{layer}-{reference_key(lm, texts)}.safetensors"
    if path.exists():
        try:
            return load_file(path)["second"]
        except Exception:  # a damaged cache file is made again, whatever is wrong with it
            path.unlink(missing_ok=True)
    found = _second_moment(lm, layer, texts)
    store_tensors(path, {"second": found})
    return found


class _Cut(Exception):
    """Ends a forward as soon as the wanted layer is done."""


@contextmanager
def _cut_behind(lm: LM, layer: int) -> Iterator[None]:
    """Within: a forward that reaches the end of the layer goes no further, and the block ends there."""

    def leave(*_):
        raise _Cut

    handle = lm.layer(layer).register_forward_hook(leave)
    try:
        yield
    except _Cut:
        pass
    finally:
        handle.remove()


def _second_moment(lm: LM, layer: int, texts: Sequence[str]) -> Tensor:
    """E[n n'] over all tokens of the texts, [d_ff, d_ff] float32 on CPU; 0 without text."""
    size = lm.block(layer).d_ff
    total = torch.zeros(size, size)
    tokens = 0
    for ids in passages(lm, texts):
        with record(lm, [layer]) as neurons, _cut_behind(lm, layer):
            lm.logits([ids], [[0]])
        seen = neurons[layer][0].float().cpu()
        total += seen.T @ seen
        tokens += len(ids)
    return total / max(tokens, 1)


@contextmanager
def _added(lm: LM, layer: int, extra: Tensor) -> Iterator[None]:
    """Within: extra [tokens, d_model] is added to what the layer's output matrix writes for the one sequence."""

    def hook(_module, _args, output):
        return output + extra.to(output.dtype).view(output.shape)

    handle = lm.module(lm.block(layer).out).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class _Place:
    """One case seen from the edited layer."""

    encoded: Encoded
    layer: int
    states: States
    """What enters the layer; the edit does not change it."""
    moves: Tensor
    """[d_ff, keys]: how the matrix moves per value."""
    share: Tensor
    """[tokens, keys]: how much of each value the edited matrix adds at each position."""
    own: Tensor
    """[keys, d_model]: what the matrix writes at the keys now."""

    def logits(self, lm: LM) -> Tensor:
        """Logits [target tokens, vocab], from the layer on."""
        positions = self.encoded.positions
        if self.layer == 0:  # nothing to skip
            return lm.logits([self.encoded.ids], [positions])
        rows, columns = torch.zeros(len(positions), dtype=torch.long), torch.tensor(positions)
        hidden = self.states.hidden[self.layer]
        return suffix_logits(lm, self.layer, hidden, self.states.as_tuple, rows, columns)


@torch.no_grad()
def _place(lm: LM, encoded: Encoded, layer: int) -> _Place:
    columns = lm.columns(layer)
    with record(lm, [layer]) as neurons, record_states(lm, [layer]) as states:
        lm.logits([encoded.ids], [[0]])
    seen = neurons[layer][0].float().cpu()
    keys = seen[encoded.positions].T
    spread = torch.cholesky_solve(keys, _factor(lm, layer))
    overlap = keys.T @ spread
    # Nearly equal keys (a token repeated) must not make huge values.
    overlap.diagonal().add_(1e-4 * float(overlap.diagonal().mean()))
    moves = torch.linalg.solve(overlap, spread.T).T
    own = keys.T.to(columns.device) @ columns.float()
    return _Place(encoded, layer, states, moves.to(columns.device), (seen @ moves).to(columns.device), own)


def _values(lm: LM, place: _Place, wanted: float) -> tuple[Tensor, int]:
    """Values [keys, d_model] under which every margin exceeds `wanted`, or the last ones; and the steps taken."""
    target = torch.tensor(place.encoded.target)
    limit = CLAMP * place.own.norm(dim=1, keepdim=True)
    values = torch.zeros_like(place.own, requires_grad=True)
    optimiser = torch.optim.Adam([values], lr=RATE * float(place.own.square().mean().sqrt()))
    step = 0
    while True:
        with torch.enable_grad(), _added(lm, place.layer, place.share @ values):
            logits = place.logits(lm)
            loss = cross_entropy(logits, target.to(logits.device))
        if float(margins_of(logits.detach(), place.encoded.target).min()) > wanted or step == STEPS:
            return values.detach(), step
        step += 1
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            values.mul_((limit / values.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0))


def solve(lm: LM, problem: Problem, settings: Settings) -> Solution:
    """Edit one output matrix so that the target's tokens win; a change of that matrix, or a reason.

    The model is bit-identical afterwards. `seconds` excludes the covariance, which is measured once per model.
    Raises `MintError` if `settings.layers` names more than one layer, or one that the model has not.
    """
    layers = chosen_layers(lm, settings, [min(int(DEPTH * lm.n_layers), lm.n_layers - 1)])
    if len(layers) > 1:
        raise MintError(f"rank-one edits one layer, found {len(layers)} layers; name one")
    layer = layers[0]
    _factor(lm, layer)
    started = time.perf_counter()
    wanted = wanted_margin(settings)
    with torch.no_grad():
        smallest = float(margins(lm, problem.encoded).min())
    if smallest > wanted:
        return refused(NAME, ALREADY_RIGHT, started, smallest)
    place = _place(lm, problem.encoded, layer)
    values, steps = _values(lm, place, wanted)
    with restored(lm, output_names(lm, layers)) as before, torch.no_grad():
        columns = lm.columns(layer)
        columns.copy_(columns.float() + place.moves @ values)
        smallest = float(margins(lm, problem.encoded).min())
        if smallest > wanted:
            return changed_matrices(NAME, lm, before, started, smallest, layer=layer, steps=steps)
    reason = f"a target token is still {wanted - smallest:.2f} below the wanted margin after {steps} steps in layer {layer}"
    return refused(NAME, reason, started, margin_reached=smallest, layer=layer, steps=steps)
