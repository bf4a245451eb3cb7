"""Computing in another number format than the weights are kept in."""

import copy
import json

import pytest
import torch

from mint.attribution.faults import Fault
from mint.attribution.linear import linear_scores
from mint.model import precision
from mint.model.precision import fast, in_dtype, is_slow
from mint.model.suffix import only_tokens
from mint.reference import statistics
from mint.solver.inputs import block_inputs
from tests.conftest import same_bits, tiny_lm, weights_of

IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
AT = [[2, 5], [2]]


def whole(lm, dtype):
    """The same model with all weights converted, the plain way: a second copy."""
    other = copy.deepcopy(lm)
    for parameter in other.model.parameters():
        parameter.data = parameter.data.to(dtype)
    other.__post_init__()
    return other


@pytest.mark.parametrize("kept, used", [("bfloat16", "float32"), ("float32", "bfloat16")])
@torch.no_grad()
def test_it_computes_as_a_converted_copy_would(any_lm, kept, used):
    kept, used = getattr(torch, kept), getattr(torch, used)
    any_lm.model.to(kept)
    before = weights_of(any_lm)
    wanted = whole(any_lm, used).logits(IDS, AT)
    plain = any_lm.logits(IDS, AT)
    with in_dtype(any_lm, used):
        found = any_lm.logits(IDS, AT)
    tolerance = 1e-4 if used == torch.float32 else 0.05 * float(wanted.std())
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=1e-3)
    assert same_bits(before, weights_of(any_lm)) and torch.equal(any_lm.logits(IDS, AT), plain)


def test_it_generates_as_a_converted_copy_would(lm):
    wanted = whole(lm, torch.bfloat16).generate([IDS[0]], 8)
    with in_dtype(lm, torch.bfloat16):
        assert lm.generate([IDS[0]], 8) == wanted


@torch.no_grad()
def test_weights_come_back_where_a_forward_is_cut_short(any_lm):
    any_lm.model.to(torch.bfloat16)
    before, plain = weights_of(any_lm), any_lm.logits(IDS, AT)
    with in_dtype(any_lm, torch.float32):
        assert block_inputs(any_lm, 1, IDS)[0].dtype == torch.float32
        assert same_bits(before, weights_of(any_lm))
    assert torch.equal(any_lm.logits(IDS, AT), plain)


def test_gradients_are_those_of_float32():
    lm = tiny_lm(dtype=torch.bfloat16)
    fault = Fault(5, 3, 4, 0.0)
    wanted = linear_scores(whole(lm, torch.float32), IDS[0], [fault])
    with in_dtype(lm, torch.float32):
        found = linear_scores(lm, IDS[0], [fault])
    for a, b in zip(found.summed, wanted.summed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_gradients_of_many_places_at_once_are_those_of_float32(monkeypatch):
    lm = tiny_lm(dtype=torch.bfloat16)
    monkeypatch.setattr("mint.model.precision._CHUNK", 32 * 7)  # pieces in the backward, too
    faults = [Fault(5, 3, 4, 0.0), Fault(4, 3, 7, 0.0), Fault(2, 9, 4, 0.0)]
    wanted = linear_scores(whole(lm, torch.float32), IDS[0], faults)
    with in_dtype(lm, torch.float32):
        found = linear_scores(lm, IDS[0], faults)
    for a, b in zip(found.summed, wanted.summed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_no_converted_weight_stays_in_the_graph():
    lm = tiny_lm(dtype=torch.bfloat16)
    linear = {tuple(m.weight.shape) for m in lm.model.modules() if type(m) is torch.nn.Linear}
    kept = []

    def keep(x):
        kept.append((x.dtype, tuple(x.shape)))
        return x

    with (
        in_dtype(lm, torch.float32),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        linear_scores(lm, IDS[0], [Fault(5, 3, 4, 0.0)])
    assert (torch.bfloat16, next(iter(linear))) in kept  # the weights themselves do
    turned = {(b, a) for a, b in linear}
    assert not [one for one in kept if one[0] == torch.float32 and one[1] in linear | turned]


def test_a_few_tokens_are_unembedded_in_the_same_format():
    lm = tiny_lm(dtype=torch.bfloat16)
    with torch.no_grad(), in_dtype(lm, torch.float32):
        every = lm.logits(IDS, AT)
        with only_tokens(lm, torch.tensor([7, 3])) as place:
            torch.testing.assert_close(lm.logits(IDS, AT)[:, place], every[:, [7, 3]])


def test_a_wide_unembedding_is_converted_in_pieces(monkeypatch):
    lm = tiny_lm(dtype=torch.bfloat16)
    with torch.no_grad(), in_dtype(lm, torch.float32):
        wanted = lm.logits(IDS, AT)
        monkeypatch.setattr("mint.model.precision._CHUNK", 32 * 100)
        torch.testing.assert_close(lm.logits(IDS, AT), wanted)


def test_entering_twice_is_once_and_another_format_is_refused(lm):
    with in_dtype(lm, torch.bfloat16), in_dtype(lm, torch.bfloat16):
        with pytest.raises(ValueError, match="bfloat16 at the moment"), in_dtype(lm, torch.float16):
            pass
    with in_dtype(lm, torch.float16):
        pass


def test_half_precision_on_a_cpu_is_fast_in_float32():
    half = tiny_lm(dtype=torch.bfloat16)
    assert is_slow(half) and not is_slow(tiny_lm())
    with fast(half):
        assert block_inputs(half, 1, IDS)[0].dtype == torch.float32
    assert statistics(half).inputs_second[0].dtype == torch.float32


@pytest.mark.real
def test_a_bfloat16_model_is_repaired_from_the_command_line(tmp_path, capsys):
    from mint.cli import main

    out = tmp_path / "fix.safetensors"
    code = main(
        ["repair", "--model", "smollm2-135m", "--dtype", "bfloat16", "--prompt", "# sort list l in descending order\n"]
        + ["--target", "l.sort(reverse=True)\n", "--verify-dtype", "float32", "--out", str(out), "--json"]
    )  # fmt: skip
    told = capsys.readouterr()
    assert code == 0 and json.loads(told.out)["generated_after"] == "l.sort(reverse=True)\n"
    assert "solved in float32 on the same weights" in told.err
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(out).values()} == {torch.bfloat16}


def test_a_torch_that_does_not_know_the_cpu_is_no_error(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision.in_hardware() is False
