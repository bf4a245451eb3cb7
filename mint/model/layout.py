"""Where a causal language model keeps its feed-forward neurons, found by behaviour, never by model name.

A neuron is one entry of the input of the last linear map of a feed-forward block. One probe forward on a few
random tokens, cut off at the first decoder layer, shows which linear map that is: its input at a position depends
on its own row's pre-activation alone, at that position alone, through a known activation function. An attention
output fails this, since it mixes positions. This module knows nothing about tokenizers or files.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
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
    """One row, column or entry of a parameter: `parameter.select(axis, index)`."""

    parameter: str
    axis: int
    index: int


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
    """Key of `transformers.activations.ACT2FN`."""
    d_model: int
    d_ff: int

    @property
    def gated(self) -> bool:
        return self.up is not None

    def slices(self, index: int) -> dict[str, Slice]:
        """Every weight of neuron `index`, by role: `out`, `gate`, `up`, and `gate_bias`, `up_bias` where they exist."""
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
    unembedding: str
    """Name of the linear map to the vocabulary."""
    final_norm: str | None
    """Name of the module whose output the unembedding reads; None if it cannot be told."""
    tied: bool
    """Whether the unembedding shares its weight with the input embedding."""
    width: int
    """Size of the residual stream."""
    activations: dict[str, Callable[[Tensor], Tensor]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def n_neurons(self) -> int:
        return sum(block.d_ff for block in self.blocks)

    def act(self, layer: int) -> Callable[[Tensor], Tensor]:
        """The activation function of a layer's block."""
        return self.activations[self.blocks[layer].activation]


class _Cut(Exception):
    """Ends the probe forward as soon as the first layer is done."""


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    lists = [(n, m) for n, m in lists if not any(n != o and n.startswith(o + ".") for o, _ in lists)]
    lists = [(n, m) for n, m in lists if len({type(child) for child in m}) == 1]
    if not lists:
        raise LayoutError(
            f"{type(model).__name__} has no list of decoder layers; mint repairs decoder-only models"
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear | Conv1D) and isinstance(weight, Tensor) and weight.dim() == 2


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear map."""
    shape = module.weight.shape
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
    method = getattr(getattr(config, "quantization_config", None), "quant_method", None)
    if method is None and isinstance(getattr(config, "quantization_config", None), dict):
        method = config.quantization_config.get("quant_method")
    if method is not None:
        raise LayoutError(f"the model is quantised ({method}); load the unquantised model")


def _refuse_experts(model: nn.Module, layer: nn.Module) -> None:
    config = model.config
    count = next(
        (
            getattr(config, key)
            for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
            if isinstance(getattr(config, key, None), int) and getattr(config, key) > 1
        ),
        None,
    )
    nested = any(
        isinstance(m, nn.ModuleList) and len(m) > 1 and sum(_is_linear(x) for x in m.modules()) >= 2 * len(m)
        for m in layer.modules()
    )
    stacked = any(
        p.dim() == 3 and min(p.shape) > 1 and p.shape[0] < min(p.shape[1:]) for p in layer.parameters()
    )
    if count or nested or stacked:
        raise LayoutError(
            f"{type(model).__name__} is a mixture of experts; mint repairs dense feed-forward blocks only"
        )


@dataclass
class _Trace:
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


def _trace_layer(model: nn.Module, layer: nn.Module) -> tuple[_Trace, int]:
    """One forward through the first layer with gradients; inputs and outputs of its linear maps, and the width."""
    trace = _Trace()
    handles = []
    width = 0

    def enter(_module, args, kwargs):
        nonlocal width
        if args:
            hidden = args[0].detach().requires_grad_()
            width = hidden.shape[-1]
            return (hidden, *args[1:]), kwargs
        hidden = kwargs["hidden_states"].detach().requires_grad_()
        width = hidden.shape[-1]
        return args, kwargs | {"hidden_states": hidden}

    def leave(*_):
        raise _Cut

    def record(name):
        def hook(_module, args, output):
            trace.inputs[name] = args[0]
            trace.outputs[name] = output
            return output

        return hook

    handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
    handles.append(layer.register_forward_hook(leave))
    for name, module in layer.named_modules():
        if _is_linear(module):
            handles.append(module.register_forward_hook(record(name)))
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (1, _PROBE_TOKENS), generator=generator)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            model(input_ids=ids.to(model.get_input_embeddings().weight.device), use_cache=False)
    except _Cut:
        pass
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return trace, width


def _unit_map(neurons: Tensor, pre: Tensor, d_ff: int) -> list[tuple[int, int]] | None:
    """How neuron j at a position hangs on the pre-activations of a linear map: [(offset, stride), ...], or None.

    neurons: [1, tokens, d_ff]; pre: [1, tokens, units]. Accepted only if neuron j depends on units offset + stride*j,
    at its own position and on no other entry.
    """
    position = neurons.shape[1] - 1
    found: dict[int, list[int]] = {}
    # A dead ReLU has no gradient anywhere; look at neurons until two spoke.
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


def _match_activation(
    neurons: Tensor, gate: Tensor, up: Tensor | None, functions: dict[str, Callable]
) -> tuple[str, float]:
    """The activation with the smallest relative error of act(gate) * up against the neurons seen, and that error."""
    with torch.no_grad():
        scale = neurons.float().abs().max().clamp_min(1e-30)
        errors = {}
        for name, function in functions.items():
            # In the model's own dtype, so that rounding tells look-alikes (the kinds of GELU) apart.
            guess = function(gate) if up is None else function(gate) * up
            error = ((guess.float() - neurons.float()).abs().max() / scale).item()
            errors[name] = error if error == error else float("inf")
    # min keeps the first of equals: the list above names the common ones first.
    best = min(errors, key=errors.__getitem__)
    return best, errors[best]


def _find_block(trace: _Trace, layer: nn.Module, width: int, functions: dict[str, Callable]) -> Block | None:
    """The feed-forward block inside the traced layer, with module names relative to the layer."""
    modules = dict(layer.named_modules())
    best: tuple[float, Block] | None = None
    for out, neurons in trace.inputs.items():
        d_ff, outputs = _sizes(modules[out])
        if outputs != width or not neurons.requires_grad or neurons.grad_fn is None:
            continue
        neurons = neurons.reshape(1, -1, d_ff)
        rows: list[tuple[Rows, Tensor]] = []
        for name, pre in trace.outputs.items():
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
            name, error = _match_activation(
                neurons, rows[gate][1], None if up is None else rows[up][1], functions
            )
            if error <= tolerance and (best is None or error < best[0]):
                axis = 1 - _unit_axis(modules[out])
                found = rows[gate][0], None if up is None else rows[up][0]
                best = error, Block(0, out, axis, *found, name, width, d_ff)
    return best[1] if best else None


def _in_layer(block: Block, prefix: str, index: int, layer: nn.Module) -> Block:
    """The same block in another layer of the same build, sizes taken from that layer."""
    modules = dict(layer.named_modules())
    wanted = [r for r in (block.gate, block.up) if r is not None]
    missing = [
        n for n in (block.out, *(r.module for r in wanted)) if n not in modules or not _is_linear(modules[n])
    ]
    if missing:
        raise LayoutError(
            f"layer {index} has no linear map '{missing[0]}' as layer 0 has; its block is built otherwise"
        )
    d_ff, width = _sizes(modules[block.out])
    if width != block.d_model:
        raise LayoutError(
            f"layer {index} writes {width} values, layer 0 writes {block.d_model}; expected the same"
        )

    def place(rows: Rows | None) -> Rows | None:
        if rows is None:
            return None
        # A fused second half starts at d_ff, which may differ between layers.
        offset = d_ff if rows.offset == block.d_ff else rows.offset
        bias = getattr(modules[rows.module], "bias", None) is not None
        return Rows(f"{prefix}.{rows.module}", rows.axis, offset, rows.stride, bias)

    out = f"{prefix}.{block.out}"
    return Block(
        index, out, block.out_axis, place(block.gate), place(block.up), block.activation, width, d_ff
    )


def _find_head(model: nn.Module, layers: nn.ModuleList, layers_name: str) -> tuple[str, str | None]:
    """Names of the unembedding and of the module whose output it reads (the final norm)."""
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    if head is None or id(head) not in names:
        raise LayoutError(
            f"{type(model).__name__} has no unembedding; mint needs a causal language model with a head"
        )
    parent = layers_name.rsplit(".", 1)[0] if "." in layers_name else ""
    stem = model.get_submodule(parent) if parent else model
    width = head.weight.shape[1]
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


def find_layout(model: nn.Module) -> Layout:
    """Locate the feed-forward neurons of a causal language model.

    Runs one forward of six random tokens up to the first decoder layer. Raises `LayoutError` for encoder-decoder,
    quantised, offloaded and mixture-of-experts models and for blocks that follow none of the known forms:
    out(act(gate x)) and out(act(gate x) * (up x)).
    """
    refuse_unsupported(model)
    layers_name, layers = _decoder_layers(model)
    _refuse_experts(model, layers[0])
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        trace, width = _trace_layer(model, layers[0])
        functions = _activation_functions()
        block = _find_block(trace, layers[0], width, functions)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    if block is None:
        raise LayoutError(
            f"no feed-forward block found in '{layers_name}.0' of {type(model).__name__}; expected"
            " out(act(gate x)) or out(act(gate x) * (up x)) built from linear maps"
        )
    blocks = tuple(_in_layer(block, f"{layers_name}.{i}", i, layer) for i, layer in enumerate(layers))
    head, final_norm = _find_head(model, layers, layers_name)
    embedding = model.get_input_embeddings().weight
    tied = model.get_submodule(head).weight.data_ptr() == embedding.data_ptr()
    return Layout(layers_name, blocks, head, final_norm, tied, width, functions)
