"""Where a causal language model keeps its feed-forward neurons, found by behaviour, never by model name.

A neuron is one entry of the input of the last linear map of a feed-forward block. One probe forward on a few
random tokens, cut off behind the last layer that is built otherwise than those before it, shows which linear map that
is: its input at a position depends on its own row's pre-activation alone, at that position alone, through an activation
function. The outputs of attention, convolutions and state spaces fail this, since they mix positions. Layers of one
model may differ, and a layer may have no such block. This module knows nothing about tokenizers or files.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from mint.errors import LayoutError

_PROBE_TOKENS = 6
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Activations of ACT2FN that take no argument and act entry by entry.
_ACTIVATIONS = (
    "silu",
    "gelu",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "relu",
    "relu2",
    "mish",
    "tanh",
    "sigmoid",
    "leaky_relu",
    "gelu_new",
    "gelu_fast",
)


@dataclass(frozen=True)
class Slice:
    """One row, column or entry of a parameter: `parameter.select(axis, index)`, of one expert where they are stacked."""

    parameter: str
    axis: int
    """Axis of the parameter, or of the one expert's part of it."""
    index: int
    expert: int | None = None
    """Which entry of the first axis of a parameter that stacks experts; None for any other."""

    def of(self, weight: Tensor) -> Tensor:
        """The slice of the parameter's values, a view."""
        return (weight if self.expert is None else weight[self.expert]).select(self.axis, self.index)


@dataclass(frozen=True)
class Rows:
    """The input rows of a block's neurons inside one linear map (which may hold gate and up fused)."""

    module: str
    axis: int
    """Axis of the weight that counts units: 0 for `nn.Linear`, 1 for `Conv1D`."""
    offset: int = 0
    stride: int = 1
    bias: bool = False

    def unit(self, index: int) -> int:
        """The unit of the linear map that feeds neuron `index`."""
        return self.offset + self.stride * index


@dataclass(frozen=True)
class Experts:
    """The routed experts of one decoder layer, stacked in parameters [experts, ...] of one module."""

    layer: int
    module: str
    count: int
    d_model: int
    d_ff: int
    """Neurons of one expert."""
    transposed: bool
    """Whether the weights are stored [inputs, outputs]."""
    interleaved: bool
    """Whether gate and up alternate in the first linear map, instead of one behind the other."""
    gated: bool
    bias: bool
    activation: str
    """Key of `Layout.activations`."""
    shift: float
    """What is added to the up part before the product (1 in gpt-oss)."""

    def slices(self, expert: int, index: int) -> dict[str, Slice]:
        """Every weight of neuron `index` of an expert, by role."""
        first = f"{self.module}.{'gate_up_proj' if self.gated else 'up_proj'}"
        axis = 1 if self.transposed else 0
        gate, up = (2 * index, 2 * index + 1) if self.interleaved else (index, self.d_ff + index)
        units = {"gate": gate} | ({"up": up} if self.gated else {})
        found = {"out": Slice(f"{self.module}.down_proj", 1 - axis, index, expert)}
        for role, unit in units.items():
            found[role] = Slice(first, axis, unit, expert)
            if self.bias:
                found[f"{role}_bias"] = Slice(f"{first}_bias", 0, unit, expert)
        return found

    def block(self, expert: int) -> "Block":
        """One expert as a block whose maps are `ExpertInput` and `ExpertOutput` (experts.py)."""
        name = f"{self.module}.{expert}"
        gate = Rows(f"{name}.in", 0, 0, 1, self.bias)
        up = Rows(f"{name}.in", 0, self.d_ff, 1, self.bias) if self.gated else None
        return Block(
            self.layer, f"{name}.out", 1, gate, up, self.activation, self.d_model, self.d_ff, self, expert
        )


@dataclass(frozen=True)
class Block:
    """The feed-forward block of one decoder layer."""

    layer: int
    out: str
    """Name of the last linear map, whose input holds the neurons' activations."""
    out_axis: int
    """Axis of its weight that counts neurons: 1 for `nn.Linear`, 0 for `Conv1D`."""
    gate: Rows
    """Rows inside the activation function; the only ones of a plain block."""
    up: Rows | None
    """Rows multiplied with the activated gate; None in a plain block."""
    activation: str
    """Key of `Layout.activations`: a name of `transformers.activations.ACT2FN`, where one fits."""
    d_model: int
    d_ff: int
    experts: Experts | None = None
    """The routed experts that the block is one of; None for a block that every token passes."""
    expert: int | None = None
    """Its number among them."""

    @property
    def gated(self) -> bool:
        return self.up is not None

    def neutral(self, role: str) -> float:
        """The bias of a role with which the neuron is act(gate x) * (up x), and nothing is added to either."""
        return -self.experts.shift if role == "up_bias" and self.experts is not None else 0.0

    def slices(self, index: int) -> dict[str, Slice]:
        """Every weight of neuron `index`, by role: `out`, `gate`, `up`, and `gate_bias`, `up_bias` where they exist."""
        if self.experts is not None and self.expert is not None:
            return self.experts.slices(self.expert, index)
        found = {"out": Slice(f"{self.out}.weight", self.out_axis, index)}
        for role, rows in (("gate", self.gate), ("up", self.up)):
            if rows is None:
                continue
            found[role] = Slice(f"{rows.module}.weight", rows.axis, rows.unit(index))
            if rows.bias:
                found[f"{role}_bias"] = Slice(f"{rows.module}.bias", 0, rows.unit(index))
        return found


@dataclass(frozen=True)
class Layout:
    """All blocks of a model, and the way from its last layer to the logits."""

    layers: str
    """Name of the module list of decoder layers."""
    blocks: tuple[Block, ...]
    """In the order of the layers; a layer may have none. Of routed experts only those that a model was narrowed to
    (`experts.focused`), behind the block that every token passes."""
    unembedding: str
    """Name of the linear map to the vocabulary."""
    final_norm: str | None
    """Name of the module whose output the unembedding reads; None if it cannot be told."""
    tied: bool
    """Whether the unembedding shares its weight with the input embedding."""
    width: int
    """Size of the residual stream."""
    n_layers: int
    """Number of decoder layers, with and without a block."""
    experts: dict[int, Experts] = field(default_factory=dict, compare=False)
    """Layer -> its routed experts."""
    absent: dict[int, str] = field(default_factory=dict, compare=False)
    """Layer -> why nothing in it can be repaired."""
    activations: dict[str, Callable[[Tensor], Tensor]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def n_neurons(self) -> int:
        return sum(block.d_ff for block in self.blocks)

    @property
    def repairable(self) -> list[int]:
        """The layers that have a block, in order."""
        return sorted({block.layer for block in self.blocks})

    def blocks_of(self, layer: int) -> list[Block]:
        """All blocks of a layer."""
        return [block for block in self.blocks if block.layer == layer]

    def block(self, layer: int) -> Block:
        """The (first) block of a layer. Raises `LayoutError` where the layer has none."""
        if found := self.blocks_of(layer):
            return found[0]
        have = ", ".join(map(str, self.repairable)) or "none"
        raise LayoutError(
            f"layer {layer} has no feed-forward block that mint can repair ({self.absent.get(layer, 'no such layer')});"
            f" use one of the layers {have}"
        )

    def slices(self, layer: int, index: int, expert: int | None = None) -> dict[str, Slice]:
        """Every weight of a neuron, by role. expert: number of the routed expert that it belongs to, or None.

        Raises `LayoutError` where there is no such neuron.
        """
        if expert is None:
            block = next((b for b in self.blocks_of(layer) if b.expert is None), None) or self.block(layer)
            if block.expert is not None:
                raise LayoutError(f"layer {layer} has neurons of routed experts only; name the expert, too")
            count, owner, slices = block.d_ff, "the layer", block.slices
        else:
            experts = self.experts.get(layer)
            if experts is None or not 0 <= expert < experts.count:
                have = "no routed experts" if experts is None else f"experts 0 to {experts.count - 1}"
                raise LayoutError(f"layer {layer} has {have}, asked for expert {expert}")
            count, owner, slices = experts.d_ff, f"expert {expert}", partial(experts.slices, expert)
        if not 0 <= index < count:
            raise LayoutError(
                f"layer {layer}: {owner} has neurons 0 to {count - 1}, asked for neuron {index}"
            )
        return slices(index)

    def act(self, layer: int) -> Callable[[Tensor], Tensor]:
        """The activation function of a layer's block."""
        return self.activations[self.block(layer).activation]


class _Cut(Exception):
    """Ends the probe forward as soon as enough was seen."""


def weight_of(module: nn.Module | None) -> Tensor:
    """The weight of a linear map, an embedding or a norm. Raises `LayoutError` for a module that has none."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise LayoutError(f"expected a module with a weight, found {type(module).__name__}")
    return weight


def _decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The largest list of layers that a forward of plain tokens runs through (a vision tower is not one of them)."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    lists = [(n, m) for n, m in lists if not any(n != o and n.startswith(o + ".") for o, _ in lists)]
    lists.sort(key=lambda item: sum(p.numel() for p in item[1].parameters()), reverse=True)
    for name, module in lists:
        if _is_reached(model, module[0]):
            return name, module
    raise LayoutError(
        f"{type(model).__name__} has no list of decoder layers; mint repairs decoder-only models"
    )


def _is_reached(model: PreTrainedModel, module: nn.Module) -> bool:
    def cut(*_):
        raise _Cut

    handle = module.register_forward_pre_hook(cut)
    try:
        with torch.no_grad():
            _run_probe(model)
    except _Cut:
        return True
    finally:
        handle.remove()
    return False


def _run_probe(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = weight_of(model.get_input_embeddings())
    ids = torch.randint(0, embedding.shape[0], (1, _PROBE_TOKENS), generator=generator)
    was_training = model.training
    model.eval()
    try:
        model(input_ids=ids.to(embedding.device), use_cache=False)
    finally:
        model.train(was_training)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear | Conv1D) and isinstance(weight, Tensor) and weight.dim() == 2


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear map."""
    shape = weight_of(module).shape
    return (shape[0], shape[1]) if isinstance(module, Conv1D) else (shape[1], shape[0])


def _unit_axis(module: nn.Module) -> int:
    return 1 if isinstance(module, Conv1D) else 0


def refuse_unsupported(model: nn.Module) -> None:
    """Raise `LayoutError` for models whose weights mint cannot edit: encoder-decoder, quantised, offloaded."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise LayoutError(
            f"{type(model).__name__} is an encoder-decoder model; mint repairs decoder-only causal language models"
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise LayoutError(
                f"'{name}' is offloaded, not in memory; load the model with enough memory for all weights"
                " (device_map without cpu or disk offload)"
            )
    linears = [
        (n, m) for n, m in model.named_modules() if type(m).__name__ != "Embedding" and hasattr(m, "weight")
    ]
    for name, module in linears:
        weight = module.weight
        if isinstance(weight, Tensor) and weight.dim() >= 2 and weight.dtype not in _FLOATS:
            raise LayoutError(
                f"'{name}' is quantised ({str(weight.dtype).removeprefix('torch.')}); load the unquantised model"
            )
    stated = getattr(config, "quantization_config", None)
    method = stated.get("quant_method") if isinstance(stated, dict) else getattr(stated, "quant_method", None)
    if method is not None:
        raise LayoutError(f"the model is quantised ({method}); load the unquantised model")


@dataclass
class _Trace:
    """What the maps of one layer saw and gave in the probe; names relative to the layer."""

    width: int = 0
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    pointwise: list[str] = field(default_factory=list)
    """Modules without linear maps that gave as many values as they took: possible activation functions."""


def _build(layer: nn.Module) -> tuple:
    """What a layer is made of; layers with equal builds have their block in the same place."""
    parts = tuple((name, type(module).__name__) for name, module in layer.named_modules())
    return type(layer).__name__, parts


def _trace_layers(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[_Trace]:
    """One forward through the model up to the last of `layers`, with gradients inside each of them."""
    traces = [_Trace() for _ in layers]
    handles = []

    def enter(trace):
        def hook(_module, args, kwargs):
            hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
            if hidden.dim() != 3 or hidden.shape[:2] != (1, _PROBE_TOKENS):
                raise LayoutError(
                    f"the layers of {type(model).__name__} pass on values of shape {tuple(hidden.shape)}; mint expects one"
                    " residual stream, [batch, tokens, width]"
                )
            trace.width = hidden.shape[-1]
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        return hook

    def record(trace, name, linear):
        def hook(_module, args, output):
            if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                return
            if linear and args[0].numel() == _PROBE_TOKENS * args[0].shape[-1]:
                trace.inputs[name], trace.outputs[name] = args[0], output
            elif not linear and args[0].shape == output.shape:
                trace.pointwise.append(name)

        return hook

    def leave(*_):
        raise _Cut

    for trace, layer in zip(traces, layers, strict=True):
        handles.append(layer.register_forward_pre_hook(enter(trace), with_kwargs=True))
        for name, module in layer.named_modules():
            handles.append(module.register_forward_hook(record(trace, name, _is_linear(module))))
    handles.append(layers[-1].register_forward_hook(leave))
    try:
        with torch.enable_grad():
            _run_probe(model)
    except _Cut:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return traces


def _unit_map(neurons: Tensor, pre: Tensor, d_ff: int) -> list[tuple[int, int]] | None:
    """How neuron j at a position hangs on the pre-activations of a linear map: [(offset, stride), ...], or None.

    neurons: [1, tokens, d_ff]; pre: [1, tokens, units]. Accepted only if neuron j depends on units offset + stride*j,
    at its own position and on no other entry.
    """
    position = neurons.shape[1] - 1
    found: dict[int, list[int]] = {}
    # A dead ReLU has no gradient anywhere; look at neurons until two have one.
    for j in [0, *range(1, d_ff, max(1, d_ff // 64))]:
        (gradient,) = torch.autograd.grad(neurons[0, position, j], pre, retain_graph=True, allow_unused=True)
        if gradient is None:
            return None
        gradient = gradient.reshape(-1, gradient.shape[-1])
        if gradient.shape[0] != neurons.shape[1] or gradient[:position].any():
            return None
        units = gradient[position].nonzero().flatten().tolist()
        if len(units) > 2:
            return None
        if units:
            found[j] = units
        if len(found) == 2 and max(len(u) for u in found.values()) >= (2 if pre.shape[-1] == 2 * d_ff else 1):
            break
    full = max((len(u) for u in found.values()), default=0)
    pairs = [(j, u) for j, u in found.items() if len(u) == full][:2]
    if len(pairs) < 2:
        return None
    (j1, u1), (j2, u2) = pairs
    strides = [(b - a) / (j2 - j1) for a, b in zip(u1, u2, strict=True)]
    if any(s != int(s) or s < 1 for s in strides):
        return None
    return [(a - int(s) * j1, int(s)) for a, s in zip(u1, strides, strict=True)]


def _activation_functions() -> dict[str, Callable[[Tensor], Tensor]]:
    return {name: ACT2FN[name] for name in _ACTIVATIONS if name in ACT2FN}


class _ModuleActivation:
    """A model's own activation module (one with parameters, say), usable on any device and in any dtype."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._copies: dict[tuple, nn.Module] = {}

    def __call__(self, z: Tensor) -> Tensor:
        at = (z.device, z.dtype)
        if at not in self._copies:
            self._copies[at] = copy.deepcopy(self._module).to(device=z.device, dtype=z.dtype)
        return self._copies[at](z)


class _Scaled:
    """An activation function of `factor` times its input."""

    def __init__(self, function: Callable[[Tensor], Tensor], factor: float):
        self._function, self._factor = function, factor

    def __call__(self, z: Tensor) -> Tensor:
        return self._function(self._factor * z)


def _mismatch(function: Callable, neurons: Tensor, gate: Tensor, up: Tensor | None) -> float:
    """Largest error of act(gate) * up against the neurons seen, relative to the largest of them."""
    with torch.no_grad():
        try:
            # In the model's own dtype, so that rounding tells look-alikes (the kinds of GELU) apart.
            guess = function(gate) if up is None else function(gate) * up
        except (RuntimeError, TypeError, ValueError, IndexError):
            return float("inf")  # a module that is no function of single values
        if guess.shape != neurons.shape:
            return float("inf")
        scale = neurons.float().abs().max().clamp_min(1e-30)
        error = ((guess.float() - neurons.float()).abs().max() / scale).item()
    return error if error == error else float("inf")


def _match_activation(
    neurons: Tensor, gate: Tensor, up: Tensor | None, functions: dict[str, Callable], tolerance: float
) -> tuple[str, Callable, float] | None:
    """(name, function, error) of the activation under which act(gate) * up gives the neurons seen, or None."""
    errors = {name: _mismatch(function, neurons, gate, up) for name, function in functions.items()}
    # min keeps the first of equals: the list above names the common ones first.
    best = min(errors, key=errors.__getitem__)
    if errors[best] <= tolerance:
        return best, functions[best], errors[best]
    for name in _ACTIVATIONS[:3]:  # a fixed multiplier before the activation (Falcon-H1)
        factor, error = _fitted_factor(functions[name], neurons, gate, up)
        if error <= tolerance:
            return f"{name}({factor:.6g}x)", _Scaled(functions[name], factor), error
    return None


def _fitted_factor(
    function: Callable, neurons: Tensor, gate: Tensor, up: Tensor | None
) -> tuple[float, float]:
    """The factor c with the smallest error of act(c gate) * up, by golden section from the best of a coarse grid."""

    def error(power: float) -> float:
        return _mismatch(_Scaled(function, 10**power), neurons, gate, up)

    grid = [k / 20 for k in range(-60, 61)]
    middle = min(grid, key=error)
    low, high = middle - 0.05, middle + 0.05
    for _ in range(50):
        a, b = high - 0.618034 * (high - low), low + 0.618034 * (high - low)
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return 10 ** ((low + high) / 2), error((low + high) / 2)


def _candidates(trace: _Trace, layer: nn.Module) -> dict[str, nn.Module]:
    """Linear maps of the layer that all tokens pass, without those of lists of experts."""
    lists = [n for n, m in layer.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    modules = dict(layer.named_modules())
    return {n: modules[n] for n in trace.inputs if not any(n.startswith(f"{x}.") for x in lists)}


def _find_block(
    trace: _Trace, layer: nn.Module, functions: dict[str, Callable]
) -> tuple[Block, Callable] | None:
    """The largest feed-forward block inside the traced layer (names relative to the layer) and its activation."""
    modules, width = _candidates(trace, layer), trace.width
    own = {name: layer.get_submodule(name) for name in trace.pointwise if name}
    functions = functions | {name: _ModuleActivation(module) for name, module in own.items()}
    best: tuple[int, float, Block, Callable] | None = None
    for out in modules:
        neurons = trace.inputs[out]
        d_ff, outputs = _sizes(modules[out])
        if outputs != width or not neurons.requires_grad or neurons.grad_fn is None:
            continue
        neurons = neurons.reshape(1, -1, d_ff)
        rows: list[tuple[Rows, Tensor]] = []
        for name in modules:
            pre = trace.outputs[name]
            units = pre.shape[-1]
            if name == out or units not in (d_ff, 2 * d_ff) or not pre.requires_grad:
                continue
            if _sizes(modules[name])[0] != width:
                continue
            for offset, stride in _unit_map(neurons, pre, d_ff) or []:
                bias = getattr(modules[name], "bias", None) is not None
                chosen = pre.reshape(1, -1, units)[..., offset : offset + stride * (d_ff - 1) + 1 : stride]
                rows.append((Rows(name, _unit_axis(modules[name]), offset, stride, bias), chosen))
        orders = {1: [(0, None)], 2: [(0, 1), (1, 0)]}.get(len(rows), [])
        tolerance = {torch.float32: 1e-4, torch.float64: 1e-4}.get(neurons.dtype, 3e-2)
        for gate, up in orders:
            match = _match_activation(
                neurons, rows[gate][1], None if up is None else rows[up][1], functions, tolerance
            )
            if match is None:
                continue
            name, function, error = match
            if best is None or (d_ff, -error) > (best[0], -best[1]):
                axis = 1 - _unit_axis(modules[out])
                found = rows[gate][0], None if up is None else rows[up][0]
                best = d_ff, error, Block(0, out, axis, *found, name, width, d_ff), function
    return best[2:] if best else None


def _in_layer(block: Block, prefix: str, index: int, layer: nn.Module) -> Block:
    """The same block in another layer of the same build, sizes taken from that layer."""
    d_ff, width = _sizes(layer.get_submodule(block.out))

    def place(rows: Rows | None) -> Rows | None:
        if rows is None:
            return None
        # A fused second half starts at d_ff, which may differ between layers.
        offset = d_ff if rows.offset == block.d_ff else rows.offset
        bias = getattr(layer.get_submodule(rows.module), "bias", None) is not None
        return Rows(f"{prefix}.{rows.module}", rows.axis, offset, rows.stride, bias)

    out = f"{prefix}.{block.out}"
    return replace(
        block, layer=index, out=out, gate=place(block.gate), up=place(block.up), d_model=width, d_ff=d_ff
    )


def _find_head(model: PreTrainedModel, layers: nn.ModuleList, layers_name: str) -> tuple[str, str | None]:
    """Names of the unembedding and of the module whose output it reads (the final norm)."""
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    if head is None or id(head) not in names:
        raise LayoutError(
            f"{type(model).__name__} has no unembedding; mint needs a causal language model with a head"
        )
    parent = layers_name.rsplit(".", 1)[0] if "." in layers_name else ""
    stem = model.get_submodule(parent) if parent else model
    width = weight_of(head).shape[1]
    inside = {id(m) for m in layers.modules()}
    norms = [
        (name, module)
        for name, module in stem.named_children()
        if id(module) not in inside
        and isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.shape == (width,)
    ]
    # Only one norm follows the layers; an embedding norm, where there is one, is declared before them.
    order = [name for name, _ in stem.named_children()]
    after = [n for n, _ in norms if order.index(n) > order.index(layers_name.rsplit(".", 1)[-1])]
    chosen = after[-1] if after else (norms[-1][0] if norms else None)
    final = None if chosen is None else (f"{parent}.{chosen}" if parent else chosen)
    return names[id(head)], final


_NO_BLOCK = "expected out(act(gate x)) or out(act(gate x) * (up x)) built from linear maps"


def _find_blocks(
    model: PreTrainedModel, name: str, layers: nn.ModuleList
) -> tuple[list[Block], dict[int, str], dict[str, Callable]]:
    """The blocks of all layers, why the other layers have none, and the activation functions of the blocks."""
    builds: dict[tuple, int] = {}
    for index, layer in enumerate(layers):
        builds.setdefault(_build(layer), index)
    firsts = sorted(builds.values())
    traces = _trace_layers(model, [layers[i] for i in firsts])
    known = _activation_functions()
    found = {i: _find_block(trace, layers[i], known) for i, trace in zip(firsts, traces, strict=True)}
    functions: dict[str, Callable] = {}
    blocks, absent = [], {}
    for index, layer in enumerate(layers):
        match = found[builds[_build(layer)]]
        if match is None:
            absent[index] = _NO_BLOCK
            continue
        template, function = match
        block = _in_layer(template, f"{name}.{index}", index, layer)
        if isinstance(function, _ModuleActivation):  # with parameters of its own in every layer
            own = f"{name}.{index}.{template.activation}"
            block, function = (
                replace(block, activation=own),
                _ModuleActivation(layer.get_submodule(template.activation)),
            )
        functions[block.activation] = function
        blocks.append(block)
    return *_without_shared(model, blocks, absent), functions


_ROUTED = "its neurons are those of routed experts, and none is chosen"


class ExpertsModule(nn.Module):
    """What a module of transformers that stacks the routed experts of a layer has. Stands in annotations only."""

    down_proj: Tensor
    """[experts, d_model, d_ff], or [experts, d_ff, d_model] where `is_transposed`."""
    is_transposed: bool
    is_concatenated: bool
    """Whether gate and up lie one behind the other in `gate_up_proj`; they alternate otherwise."""
    has_gate: bool
    has_bias: bool
    act_fn: Callable[[Tensor], Tensor]
    """Of modules without a gate."""
    _apply_gate: Callable[[Tensor], Tensor]
    """Gate and up parts -> neurons, of modules with a gate."""


def stacks_experts(module: nn.Module) -> TypeGuard[ExpertsModule]:
    """Whether a module holds the routed experts of a layer in parameters of three dimensions."""
    down = getattr(module, "down_proj", None)
    return hasattr(module, "is_transposed") and isinstance(down, Tensor) and down.dim() == 3


def _find_experts(name: str, layers: nn.ModuleList, functions: dict[str, Callable]) -> dict[int, Experts]:
    """The routed experts of every layer that has some, by what their module says of itself."""
    found: dict[int, Experts] = {}
    for index, layer in enumerate(layers):
        for inner, module in layer.named_modules():
            if not stacks_experts(module):
                continue
            count, rows, columns = module.down_proj.shape
            width, d_ff = (columns, rows) if module.is_transposed else (rows, columns)
            full = f"{name}.{index}.{inner}"
            fits = _expert_activation(module, d_ff)
            if fits is None or getattr(module, "has_post_expert_norm", False):
                continue
            activation, function, shift = fits
            key = activation or f"{full}.gate"
            functions.setdefault(key, function)
            interleaved = module.has_gate and not module.is_concatenated
            found[index] = Experts(
                layer=index,
                module=full,
                count=count,
                d_model=width,
                d_ff=d_ff,
                transposed=module.is_transposed,
                interleaved=interleaved,
                gated=module.has_gate,
                bias=module.has_bias,
                activation=key,
                shift=shift,
            )
    return found


def _expert_activation(module: ExpertsModule, d_ff: int) -> tuple[str | None, Callable, float] | None:
    """(name in ACT2FN or None, function, shift) with which an expert's neuron is act(gate) * (up + shift), or None."""
    z = torch.linspace(-10, 10, d_ff, device=module.down_proj.device)[None]

    def gated(gate: Tensor) -> Tensor:
        each = gate[..., None]  # the module wants a last axis of neurons
        on, off = torch.ones_like(each), torch.zeros_like(each)
        return (product(module, each, on) - product(module, each, off))[..., 0]

    function = gated if module.has_gate else module.act_fn
    if not module.has_gate:
        wanted, up, shift = function(z), None, 0.0
    else:
        at_zero = product(module, z, torch.zeros_like(z))
        one = function(z)
        largest = one.abs().argmax()
        shift = float((at_zero.flatten() / one.flatten())[largest])
        up = z.flip(-1) / 2
        wanted = product(module, z, up)
        if (wanted - function(z) * (up + shift)).abs().max() > 1e-4 * wanted.abs().max():
            return None
        up = up + shift
    shift = round(shift, 6)
    for name, known in _activation_functions().items():
        if _mismatch(known, wanted, z, up) <= 1e-5:
            return name, known, shift
    return None, function, shift


def product(experts: ExpertsModule, gate: Tensor, up: Tensor) -> Tensor:
    """The neurons of an experts module from their gate and up parts [..., d_ff], as the module itself forms them."""
    parts = torch.cat([gate, up], -1) if experts.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
    return experts._apply_gate(parts)


def _without_shared(
    model: nn.Module, blocks: list[Block], absent: dict[int, str]
) -> tuple[list[Block], dict[int, str]]:
    """The blocks whose weights belong to one layer alone: an edit of one layer must not change another."""
    owners: dict[int, list[int]] = {}
    for block in blocks:
        owners.setdefault(id(weight_of(model.get_submodule(block.out))), []).append(block.layer)
    shared = {layer: group for group in owners.values() if len(group) > 1 for layer in group}
    absent |= {layer: f"its weights are shared by layers {group}" for layer, group in shared.items()}
    return [block for block in blocks if block.layer not in shared], absent


def find_layout(model: PreTrainedModel) -> Layout:
    """Locate the feed-forward neurons of a causal language model.

    Runs one forward of six random tokens up to the last layer that differs in build from all before it (the first, in a
    model whose layers are alike). Layers without a block of one of the known forms, out(act(gate x)) and
    out(act(gate x) * (up x)), are listed in `Layout.absent`. Raises `LayoutError` for encoder-decoder, quantised and
    offloaded models and where no layer has such a block.
    """
    refuse_unsupported(model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        layers_name, layers = _decoder_layers(model)
        blocks, absent, functions = _find_blocks(model, layers_name, layers)
        experts = _find_experts(layers_name, layers, functions)
        absent |= {layer: _ROUTED for layer in experts if layer in absent}
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    if not blocks and not experts:
        reasons = sorted(set(absent.values()))
        raise LayoutError(
            f"no feed-forward block found in the layers '{layers_name}' of {type(model).__name__}: {'; '.join(reasons)}"
        )
    head, final_norm = _find_head(model, layers, layers_name)
    embedding = weight_of(model.get_input_embeddings())
    tied = weight_of(model.get_submodule(head)).data_ptr() == embedding.data_ptr()
    width = (blocks or list(experts.values()))[0].d_model
    return Layout(
        layers_name,
        tuple(blocks),
        head,
        final_norm,
        tied,
        width,
        len(layers),
        experts,
        absent,
        functions,
    )
