"""What a neuron is replaced by: the mean over healthy text, zero, one healthy token's activations, or a counterfactual run.

`mean` is the default. It asks what is special about the neuron here, it needs nothing from the user, and it keeps the
model near what it usually sees: zero ablation costs nine times the loss of the best constant, the mean three times
(Li & Janson 2409.09951). `resample` is a second opinion drawn from real tokens; `counterfactual` (a prompt behind which
the model is right) is the best where the user has one (Mueller et al. 2504.13151, MIB).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from mint.attribution.exact import Run, record_run
from mint.attribution.faults import Fault
from mint.console import Say, quiet
from mint.errors import CaseError, MintError
from mint.model.hooks import record
from mint.model.lm import LM
from mint.model.loading import cache_dir
from mint.model.precision import coarse
from mint.reference import Statistics, passages, reference_texts, store_tensors

NAMES = ("mean", "zero", "resample", "counterfactual")
PASSAGES, PER_PASSAGE, LENGTH = 16, 4, 64
"""Draws: how many passages, tokens of each, and how far into a passage they may lie."""
_TOGETHER = 8
"""Passages of one forward."""


@dataclass(frozen=True)
class Reference:
    """The activations that replace a neuron's own."""

    name: str
    values: list[Tensor]
    """[d_ff] a layer (every position alike), or [tokens, d_ff] (counterfactual)."""
    healthy: Run | None = None
    """The counterfactual run, for patching the other way round."""
    prompt_ids: tuple[int, ...] | None = None
    """Token ids of the counterfactual prompt."""
    aligned: str | None = None
    """Counterfactual: `equal` (same length) or `end` (aligned from the end; earlier positions stay as they are)."""


def draws(lm: LM, key: str, seed: int = 0, say: Say = quiet) -> list[Tensor]:
    """Activations of single tokens of the reference text, [draws, d_ff] float32 a layer; from the cache if there.

    key: `Statistics.key` of the same model and text. 64 tokens, 4 from each of 16 passages, at seeded positions.
    """
    path = cache_dir() / "statistics" / f"draws-{key}-{seed}.safetensors"
    if path.exists():
        try:
            found = load_file(path)
            return [found[str(layer)] for layer in range(lm.n_layers)]
        except Exception:  # a damaged cache file is made again, whatever is wrong with it
            path.unlink(missing_ok=True)
    say("drawing activations from reference text (once per model)")
    drawn = _draw(lm, seed)
    store_tensors(path, {str(layer): t for layer, t in enumerate(drawn)})
    return drawn


@torch.no_grad()
def _draw(lm: LM, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    every = [p[:LENGTH] for p in passages(lm, reference_texts())]
    chosen = every[:: max(1, len(every) // PASSAGES)][:PASSAGES]
    out: list[list[Tensor]] = [[] for _ in range(lm.n_layers)]
    for start in range(0, len(chosen), _TOGETHER):
        batch = chosen[start : start + _TOGETHER]
        with coarse(lm), record(lm) as seen:
            lm.logits(batch, [[0] for _ in batch])
        for row, ids in enumerate(batch):
            # The first token of a text is no token of a text: models park outliers there.
            count = min(PER_PASSAGE, len(ids) - 1)
            at = 1 + torch.randperm(len(ids) - 1, generator=generator)[:count]
            for layer in range(lm.n_layers):
                n = seen[layer][row][at.to(seen[layer].device)] if layer in seen else torch.zeros(count, 0)
                out[layer].append(n.float().cpu())
    return [torch.cat(parts) for parts in out]


def _counterfactual(lm: LM, run: Run, prefix: Sequence[int], prompt: str) -> Reference:
    """The counterfactual run, checked: right where the fault is wrong. prefix: target tokens before the fault."""
    prompt_ids = lm.encode_prompt(prompt)
    ids = [*prompt_ids, *prefix]
    if len(ids) >= lm.context:
        raise CaseError(
            f"the counterfactual has {len(ids)} tokens, the context of {lm.name} is {lm.context}; shorten it"
        )
    if tuple(ids) == run.ids:
        raise CaseError(
            "the counterfactual prompt is the faulty prompt itself; give a prompt behind which the model is right"
        )
    fault = run.fault
    healthy = record_run(lm, ids, Fault(len(ids) - 1, fault.wrong, fault.desired, 0.0))
    best = int(healthy.logits.argmax())
    if best != fault.desired:
        raise CaseError(
            f"behind the counterfactual prompt the model writes {lm.decode([best])!r}, expected the desired token"
            f" {lm.decode([fault.desired])!r}; give a prompt behind which it is right"
        )
    if int(run.logits.argmax()) != fault.wrong:
        raise CaseError(
            f"behind the faulty prompt the model does not write {lm.decode([fault.wrong])!r}; there is no fault to"
            " explain"
        )
    values = []
    for own, other in zip(run.neurons, healthy.neurons, strict=True):
        shared = min(len(own), len(other))
        values.append(torch.cat([own[: len(own) - shared], other[len(other) - shared :]]))
    aligned = "equal" if len(ids) == len(run.ids) else "end"
    return Reference("counterfactual", values, healthy, tuple(prompt_ids), aligned)


def make_reference(
    lm: LM,
    name: str,
    run: Run,
    stats: Statistics,
    *,
    prefix: Sequence[int] = (),
    counterfactual: str | None = None,
    seed: int = 0,
    say: Say = quiet,
) -> Reference:
    """The reference of a name for one fault.

    name: `mean`, `zero`, `resample` (the activations of healthy token number `seed` of 64) or `counterfactual`.
    prefix: target tokens before the fault; counterfactual: the prompt, needed for that reference. Raises `MintError`
    for an unknown name, `CaseError` for a counterfactual that is missing or fails its checks.
    """
    if name not in NAMES:
        raise MintError(f"unknown reference '{name}'; known are {', '.join(NAMES)}")
    if name == "counterfactual":
        if not counterfactual:
            raise CaseError(
                "the reference 'counterfactual' needs a prompt behind which the model is right; give one, or use mean"
            )
        return _counterfactual(lm, run, prefix, counterfactual)
    if name == "mean":
        return Reference(name, list(stats.neurons_mean))
    if name == "zero":
        return Reference(name, [torch.zeros(lm.d_ff(layer)) for layer in range(lm.n_layers)])
    drawn = draws(lm, stats.key, say=say)
    return Reference(name, [layer[seed % len(layer)] for layer in drawn])
