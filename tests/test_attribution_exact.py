"""Exact patching against naive hooks on every family, denoising and noising on circuits whose truth is known."""

import pytest
import torch

from mint.attribution import find_faults, linear_scores
from mint.attribution.exact import (
    block_effects,
    exact_all,
    exact_scores,
    joint_effect,
    leave_one_out,
    record_run,
    rerun,
    row_logits,
)
from mint.attribution.faults import Fault, differences
from mint.case import Case
from mint.model.hooks import override
from mint.model.layout import find_layout
from mint.model.lm import LM
from tests.conftest import byte_tokenizer, same_bits, tiny_lm, tiny_model, weights_of

CASE = Case("a", "hello w", "orld!")
CANDIDATES = [(layer, index) for layer in range(3) for index in (0, 5, 9)]


def prepared(lm):
    encoded = lm.encode(CASE)
    fault = find_faults(lm, encoded)[2]
    return encoded, fault, record_run(lm, encoded.ids, fault)


def naive(lm, ids, fault, layer, index, value) -> float:
    """Effect by a plain hook on a plain forward of everything."""

    def change(n):
        n = n.clone()
        n[:, fault.position, index] = value
        return n

    def metric():
        return float(differences(lm.logits([ids], [[fault.position]]), [fault])[0])

    with torch.no_grad():
        base = metric()
        with override(lm, {layer: change}):
            return metric() - base


def test_exact_equals_plain_hooks(any_lm):
    encoded, fault, run = prepared(any_lm)
    assert run.prefix is not None, "the fast path through kept keys and values should serve every family"
    scores = exact_scores(any_lm, run, CANDIDATES, None)
    for (layer, index), score in zip(CANDIDATES, scores.tolist(), strict=True):
        assert score == pytest.approx(naive(any_lm, encoded.ids, fault, layer, index, 0.0), abs=2e-5)


def test_exact_without_kept_keys_equals_with_them(any_lm):
    _, _, run = prepared(any_lm)
    slow = type(run)(**{**run.__dict__, "prefix": None})
    a, b = exact_scores(any_lm, run, CANDIDATES, None), exact_scores(any_lm, slow, CANDIDATES, None)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert float(a.abs().max()) > 1e-4


def test_every_neuron_at_once_equals_one_at_a_time(lm):
    _, _, run = prepared(lm)
    reference = [torch.full((b.d_ff,), -0.1) for b in lm.layout.blocks]
    every = exact_all(lm, run, reference)
    some = exact_scores(lm, run, CANDIDATES, reference)
    torch.testing.assert_close(
        torch.stack([every[layer][index] for layer, index in CANDIDATES]), some, rtol=1e-4, atol=2e-6
    )


def test_a_fault_at_the_very_first_position_is_patched_too(lm):
    fault = Fault(0, 5, 6, 0.0)
    ids = [40, 41]
    run = record_run(lm, ids, fault)
    score = exact_scores(lm, run, [(1, 3)], None)
    assert float(score[0]) == pytest.approx(naive(lm, ids[:1], fault, 1, 3, 0.0), abs=1e-5)


def test_a_patch_that_changes_nothing_has_no_effect(any_lm):
    _, _, run = prepared(any_lm)
    own = [n[-1].float() for n in run.neurons]
    assert float(exact_scores(any_lm, run, CANDIDATES, own).abs().max()) < 1e-6  # rounding of a batch
    assert run.no_op_error < 1e-4


def test_bf16_effects_agree_with_float32():
    found = []
    fault = find_faults(tiny_lm("gemma2"), tiny_lm("gemma2").encode(CASE))[2]
    for dtype in (torch.float32, torch.bfloat16):
        lm = tiny_lm("gemma2", dtype=dtype)
        found.append(torch.cat(exact_all(lm, record_run(lm, lm.encode(CASE).ids, fault), None)))
    top = found[0].abs().topk(10).indices
    torch.testing.assert_close(found[1][top], found[0][top], rtol=0.15, atol=0.01)


def test_joint_effect_of_one_is_its_single_effect_and_of_none_is_zero(lm):
    _, _, run = prepared(lm)
    assert joint_effect(lm, run, []) == 0.0
    single = float(exact_scores(lm, run, [(1, 5)], None)[0])
    assert joint_effect(lm, run, [(1, 5, 0.0)]) == pytest.approx(single, abs=1e-5)


def test_row_logits_give_the_same_effects(lm):
    _, fault, run = prepared(lm)
    logits = row_logits(lm, run, [(layer, index, 0.0) for layer, index in CANDIDATES])
    metric = logits[:, fault.wrong] - logits[:, fault.desired]
    torch.testing.assert_close(
        metric[:-1] - metric[-1], exact_scores(lm, run, CANDIDATES, None), rtol=1e-3, atol=1e-5
    )


def test_block_effects_equal_plain_hooks(any_lm):
    encoded, fault, run = prepared(any_lm)
    reference = [torch.full((b.d_ff,), 0.1) for b in any_lm.layout.blocks]
    positions = [0, fault.position]
    effects = block_effects(any_lm, run, reference, positions)
    for layer in range(3):
        for column, position in enumerate(positions):

            def change(n, position=position):
                n = n.clone()
                n[:, position] = 0.1
                return n

            with torch.no_grad():
                plain = differences(any_lm.logits([encoded.ids], [[fault.position]]), [fault])
                with override(any_lm, {layer: change}):
                    moved = differences(any_lm.logits([encoded.ids], [[fault.position]]), [fault])
            assert float(effects[layer, column]) == pytest.approx(float(moved - plain), abs=5e-5)


def test_patching_leaves_the_model_as_it_was(lm):
    before = weights_of(lm)
    _, fault, run = prepared(lm)
    exact_all(lm, run, None)
    assert same_bits(before, weights_of(lm))
    assert not any("forward" in m.__dict__ for m in lm.model.modules())
    assert torch.equal(lm.logits([list(run.ids)], [[fault.position]])[0], run.logits)


# ---------------------------------------------------------------------- circuits

IDS = [10, 20, 30]
WRONG, DESIRED = 100, 200


def blank_lm() -> LM:
    """A tiny gated model in which attention and feed-forward blocks write nothing: circuits are planted into it.

    A neuron that reads the last token with gate and up has an activation of about 32 there.
    """
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.mlp.gate_proj.weight.zero_()
            layer.mlp.up_proj.weight.zero_()
            layer.input_layernorm.weight.fill_(1.0)
            layer.post_attention_layernorm.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        # Rows of length 1, so that what a token is can be read off as a direction.
        for matrix in (model.model.embed_tokens.weight, model.lm_head.weight):
            matrix.copy_(torch.nn.functional.normalize(torch.randn(matrix.shape, generator=generator), dim=1))
        # The last token alone says nothing about the two logits: whatever differs was planted.
        basis = torch.linalg.qr(model.lm_head.weight[[WRONG, DESIRED]].T).Q
        embedding = model.model.embed_tokens.weight[IDS[-1]]
        embedding.copy_(torch.nn.functional.normalize(embedding - basis @ (basis.T @ embedding), dim=0))
    return LM(model, byte_tokenizer(), find_layout(tiny_model("llama")), "blank")


def plant(lm, layer, index, gate, up, column) -> None:
    mlp = lm.model.model.layers[layer].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[index] = gate
        mlp.up_proj.weight[index] = up
        mlp.down_proj.weight[:, index] = column


def token(lm, at=-1):
    return lm.model.model.embed_tokens.weight[IDS[at]]


def towards_wrong(lm):
    head = lm.model.lm_head.weight
    return head[WRONG] - head[DESIRED]


def planted_run(lm):
    return record_run(lm, IDS, Fault(2, WRONG, DESIRED, 0.0))


def orthogonal(lm, count):
    """Directions with nothing in common with the last token, the two logits and each other."""
    taken = [token(lm), towards_wrong(lm)]
    out = []
    for direction in torch.randn(count, 32, generator=torch.Generator().manual_seed(5)):
        for other in taken:
            basis = torch.linalg.qr(torch.stack(taken, 1)).Q
            direction = direction - basis @ (basis.T @ direction)
            del other
        taken.append(direction)
        out.append(direction / direction.norm())
    return out


def test_a_planted_guilty_neuron_is_found_and_nothing_else():
    lm = blank_lm()
    plant(lm, 1, 7, token(lm), token(lm), 0.03 * towards_wrong(lm))
    plant(lm, 0, 3, token(lm), token(lm), -0.01 * towards_wrong(lm))  # holds the fault back
    run = planted_run(lm)
    exact = torch.stack(exact_all(lm, run, None))
    linear = torch.stack([s[0] for s in linear_scores(lm, IDS, [run.fault]).at_fault])
    for scores in (exact, linear):
        assert divmod(int(scores.argmin()), 64) == (1, 7)
        assert divmod(int(scores.argmax()), 64) == (0, 3)
        assert int((scores.abs() > 1e-5).sum()) == 2
    assert float(exact[1, 7]) < -1.0


def and_circuit():
    """A and B write two directions in layer 0; C of layer 2 multiplies them and writes the wrong token."""
    lm = blank_lm()
    a, b = orthogonal(lm, 2)
    plant(lm, 0, 1, token(lm), token(lm), 0.02 * a)
    plant(lm, 0, 2, token(lm), token(lm), 0.02 * b)
    plant(lm, 2, 3, a, b, 0.2 * towards_wrong(lm))
    return lm


def test_and_circuit_denoising_finds_both_inputs_and_noising_misses_them():
    lm = and_circuit()
    run = planted_run(lm)
    pair = [(0, 1), (0, 2)]
    whole = joint_effect(lm, run, [(*p, 0.0) for p in pair])
    assert whole < -1.0
    denoised = exact_scores(lm, run, pair, None)
    noised = leave_one_out(lm, run, [(*p, 0.0) for p in pair])
    assert all(float(s) < 0.5 * whole for s in denoised)
    assert all(abs(float(s)) < 0.2 * abs(whole) for s in noised)


def or_circuit():
    """A and B write the same direction so strongly that the norms hide whether one or both are there."""
    lm = blank_lm()
    (a,) = orthogonal(lm, 1)
    plant(lm, 0, 1, token(lm), token(lm), 0.3 * a)
    plant(lm, 0, 2, token(lm), token(lm), 0.3 * a)
    plant(lm, 2, 3, a, a, 3.0 * towards_wrong(lm))
    return lm


def test_or_circuit_denoising_misses_both_inputs_and_noising_finds_them():
    lm = or_circuit()
    run = planted_run(lm)
    pair = [(0, 1), (0, 2)]
    whole = joint_effect(lm, run, [(*p, 0.0) for p in pair])
    assert whole < -1.0
    denoised = exact_scores(lm, run, pair, None)
    noised = leave_one_out(lm, run, [(*p, 0.0) for p in pair])
    assert all(abs(float(s)) < 0.2 * abs(whole) for s in denoised)
    assert all(float(s) < 0.5 * whole for s in noised)


def test_rerun_restarts_with_two_layers_changed_together():
    lm = and_circuit()
    run = planted_run(lm)
    silent = {0: lambda n: n * 0, 2: lambda n: n * 0}
    assert float(rerun(lm, run, silent, 1)[0]) == pytest.approx(
        run.metric + joint_effect(lm, run, [(2, 3, 0.0), (0, 1, 0.0), (0, 2, 0.0)]), abs=1e-5
    )
