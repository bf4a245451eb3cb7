"""Models whose layers are not all alike, and text models inside wrappers: the same identities as the dense families."""

import pytest
import torch
import transformers as T
from transformers import AutoModelForCausalLM

from mint.attribution import attribute
from mint.attribution.exact import exact_scores, record_run
from mint.attribution.faults import find_faults
from mint.case import Case
from mint.errors import LayoutError
from mint.model.hooks import override, record, record_block_inputs
from mint.model.layout import find_layout
from mint.model.suffix import record_states, suffix_logits
from mint.patch import Patch, applied, apply, identity, make_edit, revert
from mint.reference import moments, sample_layers, statistics
from mint.reference.texts import passages
from mint.solver.problem import Problem, Settings
from mint.solver.solve import solve
from mint.solver.tail import run_clean
from tests.conftest import HYBRIDS, same_bits, tiny_lm, tiny_model, weights_of

IDS = [5, 40, 77, 12, 200, 9]


@pytest.fixture(autouse=True)
def short_reference(monkeypatch):
    """State spaces are slow on a CPU: a few short reference passages are enough here."""
    monkeypatch.setattr(moments, "passages", lambda lm, texts: [p[:48] for p in passages(lm, texts)[:6]])
    monkeypatch.setattr(moments, "reference_lines", lambda: ["x = 1\n", "def f():\n"])


@pytest.fixture(params=sorted(HYBRIDS))
def hybrid(request):
    return tiny_lm(request.param)


def plain_logits(lm, ids=IDS):
    with torch.no_grad():
        return lm.model(torch.tensor([ids]), use_cache=False).logits[0].float()


def case_of(lm, prompt="ab c"):
    """A case whose first target character is not what the model writes."""
    best = int(plain_logits(lm, lm.encode_prompt(prompt))[-1].argmax())
    return Case("one", prompt, "q\n" if lm.decode([best]) != "q" else "z\n")


def test_blocks_are_found_in_every_layer_that_has_one(hybrid):
    lm = hybrid
    wanted = [0, 3] if lm.name == "tiny-nemotron_h" else list(range(lm.n_layers))
    assert lm.layout.repairable == wanted
    assert sorted(lm.layout.absent) == [i for i in range(lm.n_layers) if i not in wanted]
    assert lm.layout.final_norm is not None


def test_activation_times_column_is_the_blocks_output(hybrid):
    lm = hybrid
    for layer in lm.layout.repairable:
        block, seen = lm.block(layer), {}

        def hook(_m, _a, output, seen=seen):
            seen["y"] = output.detach()

        handle = lm.module(block.out).register_forward_hook(hook)
        with record(lm, [layer]) as neurons, record_block_inputs(lm, [layer]) as inputs:
            lm.logits([IDS], [[0]])
        handle.remove()
        n = neurons[layer].reshape(-1, block.d_ff)
        bias = getattr(lm.module(block.out), "bias", None)
        y = n @ lm.columns(layer) + (0 if bias is None else bias)
        torch.testing.assert_close(y, seen["y"].reshape(y.shape), atol=1e-5, rtol=1e-4)
        x = inputs[layer].reshape(-1, block.d_model)
        for index in (0, 7, block.d_ff - 1):
            weights = {
                role: lm.parameter(s.parameter).select(s.axis, s.index)
                for role, s in block.slices(index).items()
            }
            wanted = lm.layout.act(layer)(x @ weights["gate"] + weights.get("gate_bias", 0))
            if block.gated:
                wanted = wanted * (x @ weights["up"] + weights.get("up_bias", 0))
            torch.testing.assert_close(n[:, index], wanted, atol=1e-5, rtol=1e-3)


def test_a_suffix_run_equals_a_full_run(hybrid):
    lm = hybrid
    full = plain_logits(lm)
    with record_states(lm, range(lm.n_layers)) as states:
        lm.logits([IDS], [[0]])
    for layer in range(1, lm.n_layers):
        part = suffix_logits(
            lm, layer, states.hidden[layer], states.as_tuple, torch.tensor([0, 0]), torch.tensor([3, 5])
        )
        torch.testing.assert_close(part, full[[3, 5]], atol=1e-4, rtol=1e-4)


def test_a_trial_of_the_solver_equals_the_edited_model(hybrid):
    """What the tail computes behind a kept (or rerun) prompt is what the whole model computes with the write in it."""
    lm = hybrid
    encoded = lm.encode(Case("one", "ab cd", "xyz\n"))
    layer = lm.layout.repairable[-2]
    tail = run_clean(lm, encoded, [layer]).tails[layer]
    torch.manual_seed(3)
    write = torch.randn(len(encoded.target), lm.layout.width)
    at = torch.arange(len(encoded.target))
    with torch.no_grad():
        tried = tail.logits(write[None], torch.zeros_like(at), at)

    def add(_m, _a, output):
        moved = output.clone().reshape(1, -1, lm.layout.width)
        moved[0, encoded.positions] += write
        return moved.reshape(output.shape)

    handle = lm.module(lm.block(layer).out).register_forward_hook(add)
    wanted = plain_logits(lm, encoded.ids[:-1])[encoded.positions]
    handle.remove()
    torch.testing.assert_close(tried, wanted, atol=2e-4, rtol=1e-3)


def test_exact_patching_equals_plain_hooks(hybrid):
    lm = hybrid
    case = case_of(lm)
    encoded = lm.encode(case)
    fault = find_faults(lm, encoded)[0]
    run = record_run(lm, encoded.ids, fault)
    chosen = [(layer, index) for layer in lm.layout.repairable for index in (0, 5, 17)]
    found = exact_scores(lm, run, chosen, None)
    ids = encoded.ids[: fault.position + 1]

    def metric():
        logits = plain_logits(lm, ids)[-1]
        return float(logits[fault.wrong] - logits[fault.desired])

    base = metric()
    for (layer, index), score in zip(chosen, found.tolist(), strict=True):

        def silence(n, index=index):
            n = n.clone()
            n[:, -1, index] = 0
            return n

        with override(lm, {layer: silence}):
            assert metric() - base == pytest.approx(score, abs=2e-4)


def test_attribution_lists_neurons_of_layers_that_have_them(hybrid):
    lm = hybrid
    found = attribute(lm, case_of(lm), exact=4, stability=False, top=3)
    assert found.neurons and {row["layer"] for row in found.neurons} <= set(lm.layout.repairable)
    assert found.no_op < 1e-3
    stats = statistics(lm)
    assert [len(m) for m in stats.neurons_mean] == [lm.d_ff(layer) for layer in range(lm.n_layers)]


def test_a_short_target_is_repaired_and_reverted_bit_for_bit(hybrid):
    lm = hybrid
    case, before = case_of(lm), weights_of(lm)
    encoded = lm.encode(case)
    solution = solve(lm, Problem(case, encoded), Settings(generalize=0.0))
    assert solution.change is not None, solution.reason
    assert same_bits(before, weights_of(lm))
    apply(lm, solution.change)
    logits = plain_logits(lm, encoded.ids[:-1])[encoded.positions]
    assert logits.argmax(1).tolist() == list(encoded.target)
    assert lm.generate([list(encoded.prompt)], len(encoded.target))[0] == list(encoded.target)
    revert(lm, solution.change)
    assert same_bits(before, weights_of(lm))


def test_layers_without_a_block_are_left_out_and_named():
    lm = tiny_lm("nemotron_h")
    assert set(sample_layers(lm)) <= {0, 3}
    case = case_of(lm)
    with pytest.raises(LayoutError, match="layer 1 has no feed-forward block.*use one of the layers 0, 3"):
        solve(lm, Problem(case, lm.encode(case)), Settings(layers=(1,)))


def test_a_multiplier_before_the_activation_is_seen():
    lm = tiny_lm("falcon_h1")
    assert lm.block(0).activation == "silu(0.7x)"
    z = torch.randn(9)
    torch.testing.assert_close(lm.layout.act(0)(z), torch.nn.functional.silu(0.7 * z), atol=1e-5, rtol=1e-4)


def test_an_activation_with_parameters_is_the_layers_own():
    model = tiny_model("apertus")
    with torch.no_grad():
        model.model.layers[2].mlp.act_fn.alpha_p.add_(1.0)
    layout = find_layout(model)
    z = torch.linspace(0.5, 3, 5)
    assert not torch.allclose(layout.act(1)(z), layout.act(2)(z))
    torch.testing.assert_close(layout.act(2)(z), model.model.layers[2].mlp.act_fn(z))


def test_the_larger_vision_tower_is_not_taken_for_the_decoder():
    model = tiny_model("gemma3")
    eye = sum(p.numel() for p in model.model.vision_tower.parameters())
    assert eye > sum(p.numel() for p in model.model.language_model.layers.parameters())
    assert find_layout(model).layers == "model.language_model.layers"


@pytest.mark.parametrize("layers", [[1, 2], [0, 1, 2]])
def test_weights_that_layers_share_are_not_repaired(layers):
    lm = tiny_lm("llama")
    for layer in layers[1:]:
        lm.model.model.layers[layer].mlp = lm.model.model.layers[layers[0]].mlp
    if len(layers) == 3:
        with pytest.raises(LayoutError, match=r"shared by layers \[0, 1, 2\]"):
            find_layout(lm.model)
    else:
        layout = find_layout(lm.model)
        assert layout.repairable == [0] and "shared by layers [1, 2]" in layout.absent[2]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            lambda: T.Mamba2Config(
                hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=16, n_groups=1,
                vocab_size=97,
            ),
            "no feed-forward block found",
        ),
        (
            lambda: T.BitNetConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=64, vocab_size=97,
            ),
            "no feed-forward block found",
        ),
        (
            lambda: T.Gemma3nTextConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                intermediate_size=64, vocab_size=97, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8,
                num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0],
                layer_types=["sliding_attention", "full_attention"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
            ),
            "expects one residual stream",
        ),
    ],
    ids=["mamba2", "bitnet", "gemma3n"],
)  # fmt: skip
def test_what_cannot_be_repaired_is_refused_for_the_true_reason(config, reason):
    with pytest.raises(LayoutError, match=reason):
        find_layout(AutoModelForCausalLM.from_config(config()).eval())


def test_an_edit_of_one_layer_leaves_the_others_alone():
    lm = tiny_lm("jamba")
    before = weights_of(lm)
    edit = make_edit(lm, 1, 3, {"out": torch.ones(32)})
    with applied(lm, Patch((edit,), identity(lm))):
        changed = [n for n, p in lm.model.named_parameters() if not torch.equal(p, before[n])]
    assert changed == [f"{lm.block(1).out}.weight"]
