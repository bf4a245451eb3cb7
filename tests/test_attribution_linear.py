"""Linear patching: against finite differences, on every family, in bf16; what must not matter does not matter."""

import pytest
import torch

from mint.attribution import find_faults, first_fault, linear_scores
from mint.attribution.faults import differences
from mint.case import Case
from mint.errors import CaseError
from mint.model.hooks import override, record
from tests.conftest import tiny_lm

CASE = Case("a", "def f(x):", " return x")


def metric(lm, ids, fault) -> float:
    return float(differences(lm.logits([ids], [[fault.position]]), [fault])[0])


def activations(lm, ids) -> list[torch.Tensor]:
    with torch.no_grad(), record(lm) as seen:
        lm.logits([ids], [[0]])
    return [seen[layer][0].clone() for layer in range(lm.n_layers)]


def moved(lm, ids, fault, layer, index, position, amount) -> float:
    """The metric with one neuron moved by `amount` at `position` (None: everywhere)."""

    def shift(n):
        n = n.clone()
        n[:, slice(None) if position is None else position, index] += amount
        return n

    with torch.no_grad(), override(lm, {layer: shift}):
        return metric(lm, ids, fault)


def test_faults_are_the_positions_where_the_argmax_is_not_the_target(lm):
    encoded = lm.encode(CASE)
    best = lm.logits([encoded.ids], [encoded.positions]).argmax(1).tolist()
    expected = [p for p, b, t in zip(encoded.positions, best, encoded.target, strict=True) if b != t]
    found = find_faults(lm, encoded)
    assert [f.position for f in found] == expected and expected
    assert all(encoded.ids[f.position + 1] == f.desired and f.logit_difference > 0 for f in found)


def test_a_case_that_is_right_is_refused_with_the_next_step(lm):
    prompt = lm.encode_prompt("ab")
    right = int(lm.logits([prompt], [[1]])[0].argmax())
    encoded = type(lm.encode(CASE))(tuple(prompt), (right,))
    with pytest.raises(CaseError, match="already prefers every token.*give the target"):
        first_fault(lm, encoded)


def test_linear_scores_equal_finite_differences(any_lm):
    encoded = any_lm.encode(CASE)
    faults = find_faults(any_lm, encoded)[:2]
    scores = linear_scores(any_lm, encoded, faults)
    values = activations(any_lm, encoded.ids)
    for row, fault in enumerate(faults):
        for layer in range(any_lm.n_layers):
            index = int(scores.at_fault[layer][row].abs().argmax())
            step = 1e-2
            up = moved(any_lm, encoded.ids, fault, layer, index, fault.position, step)
            down = moved(any_lm, encoded.ids, fault, layer, index, fault.position, -step)
            expected = -values[layer][fault.position, index] * (up - down) / (2 * step)
            assert scores.at_fault[layer][row, index] == pytest.approx(float(expected), rel=0.02, abs=1e-4)


def test_summed_scores_are_the_derivative_of_scaling_the_neuron_everywhere(any_lm):
    encoded = any_lm.encode(CASE)
    fault = find_faults(any_lm, encoded)[-1]
    scores = linear_scores(any_lm, encoded, [fault])
    layer = 1
    index = int(scores.summed[layer][0].abs().argmax())

    def scaled(factor):
        def change(n):
            n = n.clone()
            n[..., index] *= factor
            return n

        with torch.no_grad(), override(any_lm, {layer: change}):
            return metric(any_lm, encoded.ids, fault)

    expected = -(scaled(1.01) - scaled(0.99)) / 0.02
    assert scores.summed[layer][0, index] == pytest.approx(expected, rel=0.02, abs=1e-4)


def test_faults_of_one_pass_equal_faults_one_by_one(any_lm):
    encoded = any_lm.encode(CASE)
    faults = find_faults(any_lm, encoded)[:3]
    together = linear_scores(any_lm, encoded, faults)
    for row, fault in enumerate(faults):
        alone = linear_scores(any_lm, encoded, [fault])
        for layer in range(any_lm.n_layers):
            torch.testing.assert_close(
                together.summed[layer][row], alone.summed[layer][0], rtol=1e-4, atol=1e-6
            )
            torch.testing.assert_close(
                together.at_fault[layer][row], alone.at_fault[layer][0], rtol=1e-4, atol=1e-6
            )


def test_combined_scores_are_the_sum_over_the_faults(lm):
    encoded = lm.encode(CASE)
    faults = find_faults(lm, encoded)
    each, combined = linear_scores(lm, encoded, faults), linear_scores(lm, encoded, faults, combined=True)
    for layer in range(lm.n_layers):
        torch.testing.assert_close(each.summed[layer].sum(0), combined.summed[layer][0], rtol=1e-4, atol=1e-5)


def test_a_reference_equal_to_the_run_itself_scores_nothing(lm):
    encoded = lm.encode(CASE)
    scores = linear_scores(lm, encoded, find_faults(lm, encoded), activations(lm, encoded.ids))
    assert all(float(layer.abs().max()) < 1e-6 for layer in scores.summed)


def test_reference_moves_the_score_by_gradient_times_reference(lm):
    encoded = lm.encode(CASE)
    fault = find_faults(lm, encoded)[0]
    ones = [torch.full((b.d_ff,), 0.5) for b in lm.layout.blocks]
    twos = [torch.full((b.d_ff,), 1.0) for b in lm.layout.blocks]
    zero, half, full = (linear_scores(lm, encoded, [fault], r).at_fault[1] for r in (None, ones, twos))
    torch.testing.assert_close(full - half, half - zero, rtol=1e-3, atol=1e-6)
    assert float((half - zero).abs().max()) > 1e-4


def test_a_constant_added_to_all_logits_changes_no_score():
    lm = tiny_lm("codegen")  # its unembedding has a bias
    encoded = lm.encode(CASE)
    fault = find_faults(lm, encoded)[0]
    before = linear_scores(lm, encoded, [fault])
    with torch.no_grad():
        lm.module(lm.layout.unembedding).bias.add_(3.0)
    after = linear_scores(lm, encoded, [fault])
    for layer in range(lm.n_layers):
        torch.testing.assert_close(before.summed[layer], after.summed[layer], rtol=1e-4, atol=1e-6)


def test_bf16_scores_agree_with_float32():
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        lm = tiny_lm("qwen2", dtype=dtype)
        encoded = lm.encode(CASE)
        fault = find_faults(tiny_lm("qwen2"), encoded)[0]
        scores.append(torch.cat([s[0] for s in linear_scores(lm, encoded, [fault]).at_fault]))
    top = scores[0].abs().topk(10).indices
    torch.testing.assert_close(scores[1][top], scores[0][top], rtol=0.1, atol=0.02)


def test_the_model_is_left_as_it_was(lm):
    encoded = lm.encode(CASE)
    before = lm.logits([encoded.ids], [encoded.positions])
    linear_scores(lm, encoded, find_faults(lm, encoded))
    assert torch.equal(before, lm.logits([encoded.ids], [encoded.positions]))
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())
