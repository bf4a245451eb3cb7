"""Compute in another number format than the weights are kept in, without a second copy of the model.

Each module's weights are converted when it runs and given back when it is done, so the peak is one module more. Knows
nothing about what is computed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mint.model.lm import LM
from mint.model.suffix import forward_replaced

HALF = (torch.bfloat16, torch.float16)
_CHUNK = 1 << 24
"""Weights of a linear map that are converted at a time."""
_ACTIVE: "WeakKeyDictionary[nn.Module, torch.dtype]" = WeakKeyDictionary()


def is_slow(lm: LM) -> bool:
    """Whether the model keeps its weights in a format that most CPUs compute in slowly, and runs on a CPU."""
    return lm.dtype in HALF and lm.device.type == "cpu"


@contextmanager
def fast(lm: LM) -> Iterator[None]:
    """Within: a half-precision model on a CPU computes in float32, on the weights as they are; others as ever."""
    with in_dtype(lm, torch.float32) if is_slow(lm) else nullcontext():
        yield


def in_hardware() -> bool:
    """Whether this CPU has instructions for products of bfloat16 matrices: about four times as fast as float32 there."""
    tell = getattr(torch.cpu, "get_capabilities", None)  # older versions of torch do not know
    known = tell() if tell is not None else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def is_coarse(lm: LM) -> bool:
    """Whether `coarse` changes anything for a model: it runs on a CPU with instructions for bfloat16."""
    return lm.device.type == "cpu" and in_hardware()


@contextmanager
def coarse(lm: LM) -> Iterator[None]:
    """Within: linear maps multiply in bfloat16 where the CPU does that in hardware; all else as with `fast`.

    For what is averaged over many tokens, or proved afterwards: each output of a map is off by up to 2^-8 of itself, as if the
    model were kept in bfloat16, and the residual stream keeps its format. A graph for gradients keeps the converted weights;
    those of the unembedding, which is gone through a few rows at a time, are kept until the end.
    """
    head = lm.module(lm.layout.unembedding)
    with ExitStack() as stack:
        stack.enter_context(fast(lm))
        for module in lm.model.modules() if is_coarse(lm) else ():
            # A hook of accelerate means that the weights may lie elsewhere.
            if type(module) is nn.Linear and not hasattr(module, "_hf_hook"):
                stack.enter_context(forward_replaced(module, _linear_in_bfloat16(module, module is head)))
        yield


@contextmanager
def in_dtype(lm: LM, dtype: torch.dtype) -> Iterator[None]:
    """Within: forwards of the model compute as if its weights had been saved as `dtype`. The weights stay as they are.

    Entering again with the same dtype changes nothing; another one, while the first is in force, raises `ValueError`.
    """
    active = _ACTIVE.get(lm.model)
    if active is not None and active != dtype:
        raise ValueError(f"the model computes in {active} at the moment; leave that before {dtype}")
    if active == dtype or lm.dtype == dtype:
        yield
        return
    _ACTIVE[lm.model] = dtype
    try:
        with ExitStack() as stack:
            for module in lm.model.modules():
                if any(p is not None and p.is_floating_point() for p in module._parameters.values()):
                    _convert(stack, module, dtype)
            yield
    finally:
        del _ACTIVE[lm.model]


def _convert(stack: ExitStack, module: nn.Module, dtype: torch.dtype) -> None:
    """Make one module compute in the dtype until the stack is left."""
    if type(module) is nn.Embedding:
        hook = module.register_forward_hook(lambda _module, _args, output: output.to(dtype))
        stack.callback(hook.remove)
    elif type(module) is nn.Linear and "forward" not in module.__dict__:
        stack.enter_context(forward_replaced(module, _linear(module)))
    else:
        own: dict[str, Any] = {}

        def enter(module: nn.Module, _args: Any) -> None:
            for name, p in module._parameters.items():
                if p is not None and p.is_floating_point():
                    own[name] = p
                    module._parameters[name] = nn.Parameter(p.detach().to(dtype), requires_grad=False)

        def leave(module: nn.Module, *_: Any) -> None:
            module._parameters.update(own)
            own.clear()

        # Called also where a forward is cut short.
        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(leave, always_call=True).remove)


def _linear_in_bfloat16(module: nn.Linear, keep: bool) -> Callable[[Tensor], Tensor]:
    kept: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        weight = kept[0] if kept else module.weight.bfloat16()
        if keep and not kept:
            kept.append(weight)
        bias = None if module.bias is None else module.bias.bfloat16()
        return F.linear(x.bfloat16(), weight, bias).to(x.dtype)

    return forward


def _linear(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The module's forward with its weights converted, a wide one (an unembedding) a piece at a time."""

    def forward(x: Tensor) -> Tensor:
        product = _Product.apply(x, module.weight)
        return product if module.bias is None else product + module.bias.to(x.dtype)

    return forward


class _Product(torch.autograd.Function):
    """x @ weight.T with the weight converted in pieces, in both directions.

    Torch's own product keeps the converted weight for the backward: over many layers a second copy of the model. The weight itself gets
    no gradient.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        parts = [F.linear(x, piece.to(x.dtype)) for piece in _pieces(weight)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        pieces = _pieces(weight)
        shares = grads[0].split([len(piece) for piece in pieces], dim=-1)
        found = shares[0] @ pieces[0].to(grads[0].dtype)
        for share, piece in zip(shares[1:], pieces[1:], strict=True):
            found = found + share @ piece.to(share.dtype)
        return found, None


def _pieces(weight: Tensor) -> tuple[Tensor, ...]:
    """Rows of a weight [out, in], at most `_CHUNK` numbers at a time."""
    return weight.split(max(1, _CHUNK // weight.shape[1]))
