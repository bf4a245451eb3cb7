"""Cause or carrier: does a patch remove what makes the model wrong, or push against it from somewhere else?

That a repair works says nothing about where the fault lives: optimal edits at random sites work as well (Wang & Veitch
2502.11447), and a direction can carry a repair that it never carried before (Makelov, Lange & Nanda 2311.17030, the
interpretability illusion; Wu et al. 2401.12631 disagree with their test, so every figure is given, and none fails
silently). A carrier is a good repair; it is no explanation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from mint.attribution.exact import Run, record_run
from mint.attribution.faults import Fault, differences, find_faults
from mint.attribution.methods import direct_gradient
from mint.attribution.references import draws
from mint.case import Case
from mint.console import quiet
from mint.errors import CaseError
from mint.model.hooks import override, record
from mint.model.lm import LM, Encoded
from mint.model.suffix import record_states, start_at
from mint.patch import NeuronEdit, Patch, applied, read_neuron
from mint.reference import Statistics, statistics

CAUSE = 0.5
"""Ablating the edited neurons alone must win at least this share of the patch's gain to call them the cause."""
CARRIER = 0.2
"""Below this share the patch is a carrier."""
LAYER = 0.2
"""Ablating the whole layer should win this share too; less, or the wrong way round, warns of a layer in the middle."""
TWO_WAY = 0.5
"""Smaller over larger of the two directions' effects, of the same sign, from which they agree."""
CONTROL = 0.8
"""Matched neurons that reach this share of the gain (median) show that the place does not matter."""
CONTROLS = 20
FAULTS = 8
"""Most faults of a case that are looked at."""


@dataclass(frozen=True)
class Verdict:
    """What the tests say of one patch on one case. Effects are in logits, mean over the case's faults."""

    label: str
    """`cause`, `carrier`, `mixed`, or `no effect` (the patch wins nothing on the case's faults)."""
    reasons: list[str]
    gain: float
    """By how much the patch lowers logit(wrong) - logit(desired)."""
    cause: dict = field(default_factory=dict)
    """effect of mean-ablating the edited neurons, its ratio to the gain, and the same for zero ablation."""
    layer: dict = field(default_factory=dict)
    two_way: dict = field(default_factory=dict)
    dormancy: list[dict] = field(default_factory=list)
    control: dict = field(default_factory=dict)
    readout: dict = field(default_factory=dict)
    faults: int = 0

    def to_json(self) -> dict:
        """JSON values only, the thresholds included."""
        return asdict(self) | {
            "thresholds": {
                "cause": CAUSE,
                "carrier": CARRIER,
                "layer": LAYER,
                "two_way": TWO_WAY,
                "control": CONTROL,
            }
        }


@dataclass(frozen=True)
class _Bench:
    """What all tests share: the unpatched and the patched run over one case."""

    lm: LM
    patch: Patch
    ids: list[int]
    faults: Sequence[Fault]
    run: Run
    """Unpatched, up to the first fault."""
    before: dict[int, Tensor]
    """Edited layer -> activations [tokens, d_ff], unpatched."""
    after: dict[int, Tensor]
    """The same with the patch applied."""
    base: Tensor
    """Metrics [faults] unpatched."""
    patched: Tensor
    stats: Statistics

    @property
    def layers(self) -> list[int]:
        return sorted({edit.layer for edit in self.patch.edits})

    @property
    def gain(self) -> float:
        return float((self.base - self.patched).mean())

    def metrics(self) -> Tensor:
        logits = self.lm.logits([self.ids], [[f.position for f in self.faults]])
        return differences(logits, self.faults).cpu()

    def won_by(self, changes: dict[int, Callable[[Tensor], Tensor]]) -> float:
        """How much overriding activations lowers the metric, mean over the faults."""
        with torch.no_grad(), override(self.lm, changes):
            return float((self.base - self.metrics()).mean())


@torch.no_grad()
def _bench(lm: LM, patch: Patch, ids: list[int], faults: Sequence[Fault], stats: Statistics) -> _Bench:
    layers = sorted({edit.layer for edit in patch.edits})

    def forward() -> tuple[dict[int, Tensor], Tensor]:
        with record(lm, layers) as seen:
            logits = lm.logits([ids], [[f.position for f in faults]])
        return {layer: seen[layer][0].clone() for layer in layers}, differences(logits, faults).cpu()

    before, base = forward()
    with applied(lm, patch):
        after, patched = forward()
    return _Bench(lm, patch, ids, faults, record_run(lm, ids, faults[0]), before, after, base, patched, stats)


def verdict(
    lm: LM,
    case: Case,
    patch: Patch,
    *,
    encoded: Encoded | None = None,
    stats: Statistics | None = None,
    faults: Sequence[Fault] | None = None,
    say: Callable[[str], None] = quiet,
) -> Verdict:
    """Test whether a patch (not applied at the moment) removes the cause of a case's faults or carries around it.

    encoded: `lm.encode(case)`, stats: `statistics(lm)`, if at hand.
    faults: default the first 8 of the case. The model is left as it was, bit for bit. Costs about ten forwards of the
    case and one batch of 20 from the edited layer on. Raises `CaseError` if the unpatched model has no fault, and
    `PatchError` if the patch does not fit the model or is applied.
    """
    encoded = encoded or lm.encode(case)
    faults = list(faults if faults is not None else find_faults(lm, encoded))[:FAULTS]
    if not faults:
        raise CaseError(
            f"case '{case.id}': expected a fault to judge the patch by, but the unpatched model writes the target; give"
            " the case that the patch repairs"
        )
    stats = stats or statistics(lm, say=say)
    say("testing whether the patch removes the cause")
    bench = _bench(lm, patch, encoded.ids[: max(f.position for f in faults) + 1], faults, stats)
    cause, layer = _cause(bench), _layer(bench)
    parts = {
        "cause": cause,
        "layer": layer,
        "two_way": _two_way(bench, cause["mean"], layer["mean"]),
        "dormancy": _dormancy(bench, say),
        "control": _control(bench),
        "readout": _readout(bench),
    }
    label, reasons = _label(bench.gain, parts)
    return Verdict(label, reasons, bench.gain, **parts, faults=len(faults))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if abs(whole) > 1e-6 else None


# ---------------------------------------------------------------------- the tests


def _set(indices: Sequence[int], value: Tensor) -> Callable[[Tensor], Tensor]:
    def change(n: Tensor) -> Tensor:
        n = n.clone()
        at = torch.tensor(list(indices), device=n.device)
        n[..., at] = value.to(n.device, n.dtype)[at]
        return n

    return change


def _edited(bench: _Bench) -> dict[int, list[int]]:
    return {layer: [e.index for e in bench.patch.edits if e.layer == layer] for layer in bench.layers}


def _cause(bench: _Bench) -> dict:
    """Replace the edited neurons, unedited, by their mean (and by zero) at every position."""
    mean = bench.stats.neurons_mean
    won = bench.won_by({layer: _set(rows, mean[layer]) for layer, rows in _edited(bench).items()})
    zero = bench.won_by(
        {layer: _set(rows, torch.zeros_like(mean[layer])) for layer, rows in _edited(bench).items()}
    )
    return {
        "mean": won,
        "zero": zero,
        "ratio": _ratio(won, bench.gain),
        "ratio_zero": _ratio(zero, bench.gain),
    }


def _layer(bench: _Bench) -> dict:
    """Replace the whole feed-forward blocks that the patch edits by their mean at every position."""
    mean = bench.stats.neurons_mean
    won = bench.won_by({layer: _set(range(len(mean[layer])), mean[layer]) for layer in bench.layers})
    return {"mean": won, "ratio": _ratio(won, bench.gain)}


def _two_way(bench: _Bench, denoise: float, layer_won: float) -> dict:
    """Fault to healthy: the neurons replaced in the faulty run. Healthy to fault: their faulty values put back into the
    run in which their whole layers are replaced. Both are positive if the neurons promote the fault."""
    mean = bench.stats.neurons_mean
    but = {
        layer: _set(sorted(set(range(len(mean[layer]))) - set(rows)), mean[layer])
        for layer, rows in _edited(bench).items()
    }
    noise = layer_won - bench.won_by(but)
    large = max(abs(denoise), abs(noise))
    share = min(abs(denoise), abs(noise)) / large if large > 1e-6 else None
    agree = denoise * noise > 0 and share is not None and share >= TWO_WAY
    return {"denoise": denoise, "noise": noise, "agree": agree}


def _written(bench: _Bench, edit: NeuronEdit) -> Tensor:
    """By how much what the neuron writes changes when the patch is applied, [tokens, d_model]."""
    old = bench.before[edit.layer][:, edit.index].float().cpu()
    new = bench.after[edit.layer][:, edit.index].float().cpu()
    return new[:, None] * edit.after["out"].float() - old[:, None] * edit.before["out"].float()


def _dormancy(bench: _Bench, say: Callable) -> list[dict]:
    """Does the patch write a direction that the neuron, or its layer, never writes?"""
    drawn = draws(bench.lm, bench.stats.key, say=say)
    out = []
    for edit in bench.patch.edits:
        delta = _written(bench, edit)[bench.faults[0].position]
        old = edit.before["out"].float()
        change = edit.after["out"].float() - old
        value = float(bench.before[edit.layer][bench.faults[0].position, edit.index])
        sample = drawn[edit.layer][:, edit.index]
        outputs = drawn[edit.layer] @ bench.lm.columns(edit.layer).float().cpu()  # [draws, d_model]
        unit = delta / delta.norm().clamp_min(1e-12)
        along = outputs @ unit
        written = bench.before[edit.layer][bench.faults[0].position].float().cpu()
        place = float((written @ bench.lm.columns(edit.layer).float().cpu() + delta) @ unit)
        share = along.var() / outputs.var(0).mean().clamp_min(1e-12)
        out.append(
            {
                "layer": edit.layer,
                "index": edit.index,
                "kind": edit.kind,
                "cosine": _cosine(delta, old),
                "relative_size": float(change.norm() / old.norm().clamp_min(1e-12)),
                "value": value,
                "percentile": float((sample.abs() < abs(value)).float().mean()),
                # 1: the layer varies along the written direction as along any other; near 0: it never writes it.
                "direction_share": float(share),
                # Mahalanobis distance along that direction: standard deviations from what the layer writes.
                "output_z": float((place - along.mean()).abs() / along.std().clamp_min(1e-12)),
            }
        )
    return out


def _cosine(a: Tensor, b: Tensor) -> float | None:
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 1e-12 else None


def _matched(bench: _Bench, edit: NeuronEdit, count: int) -> list[int]:
    """Neurons of the edit's layer most like the edited one: as active here (value), or as quiet in general (rewrite)."""
    if edit.kind == "value":
        size = bench.before[edit.layer][bench.faults[0].position].float().abs().cpu()
    else:
        columns = bench.lm.columns(edit.layer).float().norm(dim=1).cpu()
        size = bench.stats.neurons_square[edit.layer].sqrt() * columns
    near = (size - size[edit.index]).abs()
    for other in bench.patch.edits:
        if other.layer == edit.layer:
            near[other.index] = float("inf")
    return near.argsort()[: min(count, int((near < float("inf")).sum()))].tolist()


@torch.no_grad()
def _control(bench: _Bench) -> dict:
    """The same edit on matched neurons of the same layer: the same change of column (value), or the same rewrite."""
    chosen = [_matched(bench, edit, CONTROLS) for edit in bench.patch.edits]
    rows = min(map(len, chosen))
    if not rows:
        return {"matched": 0, "median_share": None, "percentile": None}
    # The last row is the edit where it belongs.
    places = [[*others[:rows], e.index] for e, others in zip(bench.patch.edits, chosen, strict=True)]
    won = (bench.base - _moved(bench, places)).mean(1)  # [rows + 1]
    share = won[:-1] / bench.gain if abs(bench.gain) > 1e-6 else None
    return {
        "matched": rows,
        "median_share": None if share is None else float(share.median()),
        "largest_share": None if share is None else float(share.max()),
        "percentile": float((won[:-1] < bench.gain).float().mean()),
        # The edit where it belongs, by the control's short cut: 1 if that reproduces the patch.
        "own_share": _ratio(float(won[-1]), bench.gain),
    }


@contextmanager
def _as_others(bench: _Bench, edit: NeuronEdit, places: Sequence[int]) -> Iterator[None]:
    """Within: in row i the edit sits on neuron places[i] of its layer, without any weight being written."""
    lm, block = bench.lm, bench.lm.block(edit.layer)
    seen: list[Tensor] = []

    def enter(_module, args):
        seen[:] = [args[0]]

    def leave(_module, args, output):
        n, x = args[0].view(len(places), -1, block.d_ff), seen[0].view(len(places), -1, block.d_model)
        row, at = torch.arange(len(places), device=n.device), torch.tensor(list(places), device=n.device)
        old = n[row, :, at].float()[..., None] * lm.columns(edit.layer)[at].float()[:, None]
        new = _activation(lm, edit, x) if edit.kind == "rewrite" else n[row, :, at].float()
        if edit.kind == "value":
            change = (edit.after["out"].float() - edit.before["out"].float()).to(n.device)
            extra = new[..., None] * change
        else:
            extra = new[..., None] * edit.after["out"].float().to(n.device) - old
        return output + extra.to(output.dtype).reshape(output.shape)

    with ExitStack() as stack:
        stack.callback(lm.module(block.gate.module).register_forward_pre_hook(enter).remove)
        stack.callback(lm.module(block.out).register_forward_hook(leave).remove)
        yield


def _activation(lm: LM, edit: NeuronEdit, x: Tensor) -> Tensor:
    """The rewritten neuron's activations, [rows, tokens], for block inputs x [rows, tokens, d_model]."""
    now = read_neuron(lm, edit.layer, edit.index) | edit.after

    def row(role: str) -> Tensor:
        bias = now.get(f"{role}_bias")
        return x.float() @ now[role].float().to(x.device) + (0 if bias is None else float(bias))

    gate = lm.layout.act(edit.layer)(row("gate"))
    return gate * row("up") if "up" in now else gate


@torch.no_grad()
def _moved(bench: _Bench, places: Sequence[Sequence[int]]) -> Tensor:
    """Metrics [rows, faults] with each edit moved to another neuron a row; places: [edits][rows]."""
    lm, rows, lowest = bench.lm, len(places[0]), bench.layers[0]
    with record_states(lm, [lowest]) as states:
        lm.logits([bench.ids], [[0]])
    ids = torch.tensor([bench.ids], device=lm.device).expand(rows, -1)
    positions = [f.position for f in bench.faults]
    row = torch.arange(rows, device=lm.device).repeat_interleave(len(positions))
    column = torch.tensor(positions, device=lm.device).repeat(rows)
    with ExitStack() as stack:
        for edit, where in zip(bench.patch.edits, places, strict=True):
            stack.enter_context(_as_others(bench, edit, where))
        hidden = states.hidden[lowest].expand(rows, -1, -1)
        stack.enter_context(start_at(lm, lowest, hidden, states.as_tuple))
        stack.enter_context(lm.only_at(row, column))
        logits = lm.model(input_ids=ids, use_cache=False).logits[0].float()
    return differences(logits, list(bench.faults) * rows).view(rows, -1).cpu()


def _readout(bench: _Bench) -> dict:
    """Share of the gain at the first fault that the final norm and the unembedding read off the write directly."""
    gain = float(bench.base[0] - bench.patched[0])
    if bench.lm.layout.final_norm is None:
        return {"direct": None, "share": None}
    reads = direct_gradient(bench.lm, bench.run).cpu()
    delta = torch.stack([_written(bench, e)[bench.faults[0].position] for e in bench.patch.edits]).sum(0)
    direct = -float(delta @ reads)
    return {"direct": direct, "gain": gain, "share": _ratio(direct, gain)}


# ---------------------------------------------------------------------- the judgement


def _label(gain: float, parts: dict) -> tuple[str, list[str]]:
    """The label and its reasons, from the figures alone."""
    if gain <= 1e-6:
        return "no effect", [f"the patch wins {gain:.2f} logits on the faults of this case"]
    ratio, layer = parts["cause"]["ratio"], parts["layer"]["ratio"]
    reasons = [f"ablating the edited neurons wins {ratio:.0%} of what the patch wins"]
    warnings = []
    if layer < LAYER:
        how = "makes it worse" if layer < 0 else f"wins {layer:.0%}"
        warnings.append(f"ablating the whole layer {how}: other neurons of the layer cancel the edited ones")
    if ratio >= CARRIER and not parts["two_way"]["agree"]:
        warnings.append(
            "replacing the neurons in the faulty run and putting them back in a healthy one disagree"
        )
    share = parts["control"]["median_share"]
    if share is not None and share >= CONTROL:
        warnings.append(
            f"the same edit on matched neurons of the layer wins {share:.0%}: the place does not matter"
        )
    for row in parts["dormancy"]:
        if row["direction_share"] < 0.1:
            warnings.append(
                f"layer {row['layer']} hardly ever writes the direction that the patch writes"
                f" ({row['direction_share']:.2f} of its variance along an average direction)"
            )
    if ratio < CARRIER:
        return "carrier", reasons + warnings
    label = "cause" if ratio >= CAUSE and not warnings else "mixed"
    return label, reasons + warnings
