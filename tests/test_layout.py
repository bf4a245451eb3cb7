"""Neurons found by behaviour: exact identities on every family, refusals in one line."""

import pytest
import torch
import transformers as T

from mint.errors import LayoutError
from mint.model.hooks import override, record, record_block_inputs
from mint.model.layout import find_layout
from mint.model.suffix import record_states, suffix_logits
from mint.patch import Patch, applied, identity, make_edit
from tests.conftest import FAMILIES, tiny_lm

IDS = [5, 40, 77, 12, 200, 9]


def block_output(lm, layer):
    seen = {}

    def hook(_m, _a, output):
        seen["y"] = output.detach()

    return seen, lm.module(lm.block(layer).out).register_forward_hook(hook)


def test_every_layer_has_a_block(any_lm):
    assert [b.layer for b in any_lm.layout.blocks] == [0, 1, 2]
    assert all(b.d_model == 32 for b in any_lm.layout.blocks)
    assert any_lm.layout.final_norm is not None


def test_a_column_edit_moves_the_block_by_activation_times_delta(any_lm):
    lm, layer, index = any_lm, 1, 7
    torch.manual_seed(1)
    delta = torch.randn(32)
    seen, handle = block_output(lm, layer)
    with record(lm, [layer]) as neurons:
        lm.logits([IDS], [[0]])
    before, n = seen["y"].clone(), neurons[layer][0, :, index].clone()
    column = lm.columns(layer)[index].clone()
    edit = make_edit(lm, layer, index, {"out": column + delta})
    with applied(lm, Patch((edit,), identity(lm))):
        lm.logits([IDS], [[0]])
    handle.remove()
    moved = (seen["y"] - before).reshape(-1, 32)
    assert n.abs().max() > 0
    torch.testing.assert_close(moved, n[:, None] * delta, atol=2e-5, rtol=1e-4)


def test_a_rewrite_makes_the_neuron_fire_where_asked(any_lm):
    """With chosen rows, the neuron's activation is act(g.x + b) (times u.x + c), at every position."""
    lm, layer, index = any_lm, 1, 7
    block = lm.block(layer)
    torch.manual_seed(2)
    rows = {"gate": torch.randn(32)} | ({"up": torch.randn(32)} if block.gated else {})
    slices = block.slices(index)
    after = {"out": torch.randn(32), **rows}
    after |= {role: torch.tensor(0.25) for role in slices if role.endswith("bias")}
    with applied(lm, Patch((make_edit(lm, layer, index, after),), identity(lm))):
        with record(lm, [layer]) as neurons, record_block_inputs(lm, [layer]) as inputs:
            lm.logits([IDS], [[0]])
    x = inputs[layer].reshape(-1, 32)
    wanted = lm.layout.act(layer)(x @ rows["gate"] + after.get("gate_bias", 0.0))
    if block.gated:
        wanted = wanted * (x @ rows["up"] + after.get("up_bias", 0.0))
    torch.testing.assert_close(neurons[layer].reshape(-1, block.d_ff)[:, index], wanted, atol=2e-5, rtol=1e-4)


def test_overriding_an_activation_equals_editing_the_stream(any_lm):
    """Zeroing a neuron's activation is the same as zeroing its column."""
    lm = any_lm
    layer, index = 0, 3

    def silence(n):
        n = n.clone()
        n[..., index] = 0
        return n

    with override(lm, {layer: silence}):
        by_activation = lm.logits([IDS], [[5]])
    with applied(lm, Patch((make_edit(lm, layer, index, {"out": torch.zeros(32)}),), identity(lm))):
        by_column = lm.logits([IDS], [[5]])
    torch.testing.assert_close(by_activation, by_column, atol=1e-4, rtol=1e-4)


def test_a_suffix_run_equals_a_full_run(any_lm):
    lm = any_lm
    with record_states(lm, range(lm.n_layers)) as states:
        full = lm.logits([IDS], [[3, 5]])
    for layer in range(1, lm.n_layers):
        part = suffix_logits(
            lm, layer, states.hidden[layer], states.as_tuple, torch.tensor([0, 0]), torch.tensor([3, 5])
        )
        torch.testing.assert_close(part, full, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lm.logits([IDS], [[3, 5]]), full, atol=0, rtol=0)


def test_logits_at_chosen_positions_equal_the_models_own(any_lm):
    lm = any_lm
    with torch.no_grad():
        whole = lm.model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(
        lm.logits([IDS, IDS[:3]], [[1, 5], [2]]), whole[[1, 5, 2]], atol=1e-5, rtol=1e-5
    )


def test_tied_embeddings_are_noticed():
    assert tiny_lm("gpt2").layout.tied
    assert not tiny_lm("gpt_neox").layout.tied


def test_in_half_precision_too():
    for family in ("llama", "gpt2", "phi3"):
        assert tiny_lm(family, dtype=torch.bfloat16).layout == tiny_lm(family).layout


def test_encoder_decoder_is_refused():
    config = T.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=97)
    with pytest.raises(LayoutError, match="encoder-decoder"):
        find_layout(T.T5ForConditionalGeneration(config))


def test_quantised_weights_are_refused():
    lm = tiny_lm("llama")
    linear = lm.module(lm.block(0).out)
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(LayoutError, match="quantised"):
        find_layout(lm.model)


def test_offloaded_weights_are_refused():
    lm = tiny_lm("llama")
    lm.module(lm.block(1).out).to("meta")
    with pytest.raises(LayoutError, match="offloaded"):
        find_layout(lm.model)


def test_an_activation_unknown_to_the_library_is_taken_from_the_layer():
    lm = tiny_lm("llama")
    for layer in range(lm.n_layers):
        lm.layer(layer).mlp.act_fn = torch.nn.Softsign()
    layout = find_layout(lm.model)
    assert layout.block(1).activation == "model.layers.1.mlp.act_fn"
    torch.testing.assert_close(layout.act(1)(torch.ones(2)), torch.full((2,), 0.5))


def test_an_activation_that_mixes_neurons_is_refused():
    lm = tiny_lm("llama")
    for layer in range(lm.n_layers):
        lm.layer(layer).mlp.act_fn = torch.nn.Softmax(dim=-1)
    with pytest.raises(LayoutError, match="no feed-forward block found"):
        find_layout(lm.model)


def test_families_cover_gated_plain_fused_and_transposed():
    blocks = {f: tiny_lm(f).block(0) for f in FAMILIES}
    assert blocks["phi3"].gate.module == blocks["phi3"].up.module
    assert blocks["gpt2"].out_axis == 0 and blocks["llama"].out_axis == 1
    assert not blocks["opt"].gated and blocks["gemma2"].gated
