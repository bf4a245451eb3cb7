"""Other devices: nothing asks one for float64, weights behind accelerate's hooks work, and GPUs where there is one."""

import pytest
import torch

from mint import session, solver
from mint.case import Case
from mint.cli import parts
from mint.evaluation.outcome import outcome_as_dict
from mint.reference import moments
from mint.reference.texts import passages
from mint.rules.mine import Search, mine
from mint.rules.repair import RuleWishes, repair_rules
from mint.session import Wishes
from mint.solver.problem import Settings, TensorChange
from mint.solver.stack import Stack
from tests.conftest import same_bits, tiny_lm, weights_of
from tests.elsewhere import PLACE, Elsewhere, moved
from tests.habits import RIGHT, WRONG, habitual_lm, write_files

GPU = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
CASE = Case("one", "ab c", "q", stop="none")


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


@pytest.fixture
def elsewhere():
    with Elsewhere():
        yield


def test_the_device_refuses_what_a_gpu_refuses(elsewhere):
    x, here = torch.ones(2, device=PLACE), torch.ones(2)
    assert x.device == (x + 1).device == here.to(PLACE).device == PLACE
    assert x.cpu().device == x.to("cpu").device == here.device != PLACE
    assert x[torch.tensor([0])].device == PLACE and float(x.sum()) == 2
    for mixed in (
        lambda: x + here,
        lambda: here.index_select(0, x.long()),
        lambda: here[x.long()],
        lambda: here.add_(x),
    ):
        with pytest.raises(RuntimeError, match="one device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(TypeError, match="no float64"):
        x.double()
    with pytest.raises(TypeError, match="no float64"):
        (x * torch.ones(2, device=PLACE)).sum(dtype=torch.float64)
    assert (x.cpu().double() + 1).dtype == torch.float64


@pytest.mark.parametrize("family", ["llama", "gpt2", "jamba", "mixtral", "gpt_oss"])
def test_a_repair_keeps_to_one_device_and_asks_it_for_no_float64(family, elsewhere):
    outcome = repaired(moved(tiny_lm(family)))
    assert outcome.success, outcome.reason
    assert outcome.patch is not None
    outcome_as_dict(outcome, None)


# peft moves an adapter to its model's device in a way that a class of tensors cannot follow.
@pytest.mark.parametrize("name", sorted(set(solver.SOLVERS) - {"mint", "lora"}))
def test_every_solver_keeps_to_one_device_and_asks_it_for_no_float64(name, elsewhere):
    repaired(moved(tiny_lm()), name, explained=False)


def test_a_rule_is_mined_and_repaired_on_another_device(tmp_path, elsewhere):
    lm = moved(habitual_lm())
    source = write_files(tmp_path / "src", n=14, seed=5)
    rule = mine(lm, Search(WRONG, RIGHT, (str(source),), limit=30)).rule
    outcome = repair_rules(lm, [rule], RuleWishes(accept=0.0))
    assert outcome.success, outcome.repairs[0].reason
    assert outcome.repairs[0].figures["unseen"]["right_after"] > 0


def test_whole_matrices_are_put_back_on_another_device(elsewhere):
    lm = moved(tiny_lm())
    before = weights_of(lm)
    stack = Stack(lm)
    for layer in range(2):
        name = lm.block(layer).slices(0)["out"].parameter
        weights = lm.parameter(name).detach().clone()
        stack.put_in(TensorChange({name: weights}, {name: weights + 1}))
    norm, share = stack.norm()
    assert norm > 0 and 0 < share
    stack.clear()
    assert same_bits(before, weights_of(lm))


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
    # With other seeds, two tokens of the tiny gemma2 are closer together than half precision tells apart.
    lm = tiny_lm(family, 2, dtype=dtype)
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
