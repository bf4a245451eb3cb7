"""Other devices: nothing asks one for float64, weights behind accelerate's hooks work, and GPUs where there is one."""

import pytest
import torch
from torch import nn

from mint import session, solver
from mint.case import Case
from mint.cli import parts
from mint.evaluation.outcome import outcome_as_dict
from mint.reference import moments
from mint.reference.texts import passages
from mint.session import Wishes
from mint.solver.problem import Settings
from tests.conftest import same_bits, tiny_lm, weights_of

GPU = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
CASE = Case("one", "ab c", "q", stop="none")


class OnDevice(torch.Tensor):
    """A tensor on a device without float64, as MPS is; what is made from one is one, until it comes to the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = super().__torch_function__(function, types, args, kwargs)
        if function is torch.Tensor.cpu or (function is torch.Tensor.to and "cpu" in args[1:]):
            return result.as_subclass(torch.Tensor)
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, cls) and tensor.dtype == torch.float64:
                raise TypeError(f"{function}: this device has no float64")
        return result


def moved(lm):
    """The model with all weights on the device without float64."""
    for module in lm.model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                data = parameter.detach().clone().as_subclass(OnDevice)
                module._parameters[name] = nn.Parameter(data, requires_grad=False)
    lm.__post_init__()
    return lm


@pytest.fixture(autouse=True)
def short_reference(monkeypatch):
    monkeypatch.setattr(moments, "passages", lambda lm, texts: [p[:48] for p in passages(lm, texts)[:6]])
    monkeypatch.setattr(moments, "reference_lines", lambda: ["x = 1\n", "def f():\n"])


def repaired(lm, solve="mint", explained=True):
    """A whole repair with all that `mint repair` does around it."""
    wishes = Wishes(settings=Settings(generalize=0.0), solver=solve, any_change=True)
    explanations = {}
    if explained:
        explanations = {
            "attribute": parts.quick_attribution(wishes), "verdict": parts.cause_or_carrier()
        }  # fmt: skip
    return session.repair(lm, [CASE], wishes, solver.named(solve), **explanations)


def test_the_device_without_float64_refuses_it():
    x = torch.ones(2).as_subclass(OnDevice)
    assert (
        type(x + 1) is OnDevice and type((x + 1).cpu()) is torch.Tensor and type(x.to("cpu")) is torch.Tensor
    )
    with pytest.raises(TypeError, match="no float64"):
        x.double()
    with pytest.raises(TypeError, match="no float64"):
        (x * torch.ones(2)).sum(dtype=torch.float64)
    assert (x.cpu().double() + 1).dtype == torch.float64


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_repair_asks_a_device_for_no_float64(family):
    outcome = repaired(moved(tiny_lm(family)))
    assert outcome.success, outcome.reason
    assert outcome.patch is not None
    outcome_as_dict(outcome, None)


# torch's optimizers, which the others use, take no tensors of a class of one's own.
@pytest.mark.parametrize("name", sorted(set(solver.SOLVERS) - {"mint", "lora", "rank-one"}))
def test_no_solver_asks_a_device_for_float64(name):
    repaired(moved(tiny_lm()), name, explained=False)


def test_weights_behind_accelerates_hooks_are_repaired_and_given_back():
    """What `device_map="auto"` puts around every module of a model that is spread over devices."""
    from accelerate import dispatch_model

    lm = tiny_lm()
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" for i in range(lm.n_layers)}
    dispatch_model(lm.model, places, main_device="cpu", force_hooks=True)
    lm.__post_init__()
    assert hasattr(lm.layer(1), "_hf_hook")
    before = weights_of(lm)
    outcome = repaired(lm)
    assert outcome.success, outcome.reason
    assert same_bits(before, weights_of(lm))


@pytest.mark.gpu
@pytest.mark.skipif(GPU is None, reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "gpt_oss"])
def test_a_gpu_repairs_and_gives_every_bit_back(family, dtype):
    lm = tiny_lm(family, dtype=dtype)
    lm.model.to(GPU)
    lm.__post_init__()
    before = {name: value.cpu() for name, value in weights_of(lm).items()}
    outcome = repaired(lm)
    assert outcome.success, outcome.reason
    assert same_bits(before, {name: value.cpu() for name, value in weights_of(lm).items()})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_spread_over_two_gpus_is_repaired():
    from accelerate import dispatch_model

    lm = tiny_lm()
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{i}": int(i > 0) for i in range(lm.n_layers)}
    dispatch_model(lm.model, places)
    lm.__post_init__()
    outcome = repaired(lm)
    assert outcome.success, outcome.reason
