"""A device beside the CPU that needs no hardware: what CUDA and MPS refuse is refused here too.

Tensors on it are CPU tensors of a class of their own, which says where they are. Operations between the two places raise as
they do on a GPU, so does float64 as it does on MPS.
"""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mint.model.lm import LM

PLACE = torch.device("xla", 0)
"""What such a tensor calls its device: a kind that no library treats apart where its driver is missing."""
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
_ACROSS = {
    Tensor.to,
    Tensor.copy_,
    Tensor.type_as,
    nn.Module.__setattr__,
    Tensor.data.__set__,
    Tensor.__deepcopy__,
    torch.autograd.grad,
    Tensor.backward,
}  # type: ignore[attr-defined]
_TO_THE_CPU = {Tensor.numpy, Tensor.__array__}


class OnDevice(Tensor):
    """A tensor on the device; what is made from one is one, until it comes to the CPU."""


def _tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for one in value for t in _tensors(one)] if isinstance(value, list | tuple) else []


def _mapped(value, change):
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value):
        parts = [_mapped(v, change) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _there(value) -> bool:
    """Whether an argument names the device."""
    return isinstance(value, torch.device | str) and str(value).split(":")[0] == PLACE.type


def _here(value) -> bool:
    return isinstance(value, torch.device | str) and str(value) == "cpu"


def _moved(t: Tensor) -> Tensor:
    return t if isinstance(t, OnDevice) else t.as_subclass(OnDevice)


class Elsewhere(TorchFunctionMode):
    """While it is entered, the device exists."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__ and isinstance(args[0], OnDevice):  # type: ignore[attr-defined]
            return PLACE
        given = _tensors(args) + _tensors(kwargs)
        on_it = [isinstance(t, OnDevice) for t in given]
        if func in _TO_THE_CPU and any(on_it):
            raise TypeError(f"{func}: can't convert a tensor of this device to numpy; use .cpu() first")
        if any(on_it) and not all(on_it) and func not in _ACROSS:
            self._refuse_two_places(func, args, given)
        moving_there = _there(kwargs.get("device")) or (func is Tensor.to and any(map(_there, args)))
        if func is Tensor.to and len(given) == 2 and isinstance(given[1], OnDevice):
            moving_there = True
        moving_here = func is Tensor.cpu or (
            (func is Tensor.to or any(on_it))
            and (_here(kwargs.get("device")) or (func is Tensor.to and any(map(_here, args))))
        )
        if moving_there:
            args = tuple(torch.device("cpu") if _there(a) else a for a in args)
            kwargs = {k: torch.device("cpu") if _there(v) else v for k, v in kwargs.items()}
        if func is torch.histc and not args[0].is_floating_point():  # a GPU counts integers too
            args = (args[0].float(), *args[1:])
        result = func(*args, **kwargs)
        if func is Tensor.requires_grad_:
            return args[0]  # itself, a leaf still
        if func is torch.autograd.grad:
            asked = _tensors(args[1] if len(args) > 1 else kwargs["inputs"])
            return tuple(
                g if g is None else (_moved(g) if isinstance(t, OnDevice) else g.as_subclass(Tensor))
                for g, t in zip(result, asked, strict=True)
            )
        if func == Tensor.grad.__get__ and result is not None and any(on_it):  # type: ignore[attr-defined]
            result = _moved(result)
        if moving_here:
            return _mapped(result, lambda t: t.as_subclass(Tensor))
        if moving_there:
            result = _mapped(result, _moved)
        if kwargs.get("requires_grad") and isinstance(result, OnDevice):
            result = result.detach()
            result.requires_grad_()  # a new tensor is a leaf
        for t in _tensors(result):
            if isinstance(t, OnDevice) and t.dtype == torch.float64:
                raise TypeError(f"{func}: this device has no float64")
        return result

    @staticmethod
    def _refuse_two_places(func, args, given) -> None:
        if func in _INDEXING:
            table, index, *value = args
            indices = _tensors(index)
            if isinstance(table, OnDevice) and (
                not value
                or not indices
                or all(isinstance(v, OnDevice) or v.dim() == 0 for v in _tensors(value))
            ):
                return
            if not any(isinstance(t, OnDevice) for t in indices) and not indices:
                return
        elif all(isinstance(t, OnDevice) or t.dim() == 0 for t in given):
            return
        raise RuntimeError(f"{func}: expected all tensors on one device, found {PLACE} and cpu")


def moved(lm: LM) -> LM:
    """The model with all its tensors on the device."""
    for module in lm.model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                data = parameter.detach().clone().as_subclass(OnDevice)
                module._parameters[name] = nn.Parameter(data, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.detach().clone().as_subclass(OnDevice)
    lm.__post_init__()
    return lm
