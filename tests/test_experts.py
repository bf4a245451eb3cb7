"""Mixtures of experts: neurons of routed experts are found by structure and obey the same identities as dense ones."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from mint import patch as patches
from mint import session
from mint.attribution import attribute
from mint.attribution.exact import exact_scores, record_run
from mint.attribution.faults import find_faults
from mint.attribution.linear import linear_scores
from mint.case import Case
from mint.errors import LayoutError, PatchError
from mint.measure import specificity
from mint.model.experts import focused, focused_at, focused_for, record_routes, routes
from mint.model.hooks import override, record, record_block_inputs
from mint.model.layout import find_layout
from mint.model.lm import LM
from mint.patch import Patch, applied, apply, checkpoint, identity, make_edit, revert
from mint.patch.names import describe
from mint.reference import moments
from mint.reference.texts import passages
from mint.solver.problem import Problem, Settings
from mint.solver.solve import solve
from tests.conftest import MIXTURES, same_bits, tiny_lm, weights_of

IDS = [5, 40, 77, 12, 200, 9]
ROUTED_ONLY = ("mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss")


@pytest.fixture(autouse=True)
def short_reference(monkeypatch):
    monkeypatch.setattr(moments, "passages", lambda lm, texts: [p[:48] for p in passages(lm, texts)[:6]])
    monkeypatch.setattr(moments, "reference_lines", lambda: ["x = 1\n", "def f():\n"])


@pytest.fixture(params=sorted(MIXTURES))
def mixture(request) -> LM:
    return tiny_lm(request.param)


def every_expert(lm):
    return focused(lm, {layer: range(e.count) for layer, e in lm.layout.experts.items()})


def plain_logits(lm, ids=IDS):
    with torch.no_grad():
        return lm.model(torch.tensor([ids]), use_cache=False).logits[0].float()


def plain_neurons(lm, layer, expert, x):
    """The activations [tokens, d_ff] of one expert on inputs [tokens, width], written out from the raw parameters."""
    module = lm.module(lm.layout.experts[layer].module)
    if "GptOss" in type(module).__name__:
        parts = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        gate, up = parts[:, ::2].clamp(max=7), parts[:, 1::2].clamp(-7, 7)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    if not hasattr(module, "gate_up_proj"):
        return F.relu(x @ module.up_proj[expert].T).square()
    gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, -1)
    return F.silu(gate) * up


def column_of(lm, layer, expert, index):
    down = lm.module(lm.layout.experts[layer].module).down_proj[expert]
    return down[index] if "gpt_oss" in lm.name else down[:, index]


def case_of(lm, prompt="ab c"):
    best = int(plain_logits(lm, lm.encode_prompt(prompt))[-1].argmax())
    return Case("one", prompt, "q" if lm.decode([best]) != "q" else "z")


def test_experts_are_found_by_structure(mixture):
    layout = mixture.layout
    assert layout.experts and all(e.count in (4, 8) for e in layout.experts.values())
    dense = {block.layer for block in layout.blocks}
    assert dense | set(layout.experts) | {2} >= set(range(layout.n_layers)) - {2}
    if mixture.name.removeprefix("tiny-") in ROUTED_ONLY:
        assert not layout.blocks


def test_recorded_activations_equal_plain_arithmetic(mixture):
    lm = mixture
    before = plain_logits(lm)
    every = every_expert(lm)
    with record(every) as neurons, record_block_inputs(every) as inputs, record_routes(lm) as sent:
        watched = every.logits([IDS], [range(6)])
    torch.testing.assert_close(watched, before, atol=1e-5, rtol=1e-5)
    assert torch.equal(plain_logits(lm), before), "without hooks the model runs as it did"
    for layer, experts in lm.layout.experts.items():
        x = inputs[layer][0]
        offset = sum(b.d_ff for b in every.layout.blocks_of(layer) if b.expert is None)
        for expert in range(experts.count):
            asked = (sent[layer].index[0] == expert).any(-1)
            found = neurons[layer][0][:, offset + expert * experts.d_ff :][:, : experts.d_ff]
            wanted = plain_neurons(lm, layer, expert, x) * asked[:, None]
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_column_edit_moves_the_stream_by_weight_times_activation_times_delta(mixture):
    lm = mixture
    layer = max(lm.layout.experts)
    experts = lm.layout.experts[layer]
    sent = routes(lm, IDS)[layer]
    expert = int(sent.index[0, 5, 0])
    view = focused(lm, {layer: [expert]})
    number = view.d_ff(layer) - experts.d_ff + 3
    assert view.place(layer, number) == (expert, 3)
    torch.manual_seed(1)
    delta = torch.randn(32)
    seen = {}

    def hook(_m, _a, output):
        seen["y"] = output.detach().reshape(6, 32)

    handle = lm.module(experts.module).register_forward_hook(hook)
    with record(view, [layer]) as neurons:
        view.logits([IDS], [[0]])
    n, before = neurons[layer][0, :, number].clone(), seen["y"].clone()
    column = column_of(lm, layer, expert, 3)
    torch.testing.assert_close(view.columns(layer)[number], column)
    untouched = weights_of(lm)
    alone = LM(lm.model, lm.tokenizer, view.layout, lm.name, expert_maps=view.expert_maps)
    slices = lm.layout.slices(layer, 3, expert)
    edit = patches.NeuronEdit(layer, 3, "value", {"out": column.clone()}, {"out": column + delta}, expert)
    assert torch.equal(slices["out"].of(lm.parameter(slices["out"].parameter)), column)
    with applied(lm, Patch((edit,), identity(lm))):
        alone.logits([IDS], [[0]])
        moved = seen["y"] - before
    handle.remove()
    assert n.abs().max() > 0
    torch.testing.assert_close(moved, (sent.share(expert)[0] * n)[:, None] * delta, atol=2e-5, rtol=1e-3)
    assert same_bits(untouched, weights_of(lm))


def test_a_rewrite_makes_the_neuron_fire_where_asked(mixture):
    """With chosen rows and neutral biases, a neuron is act(g.x) * (u.x) for the tokens that its expert gets."""
    lm = mixture
    layer = max(lm.layout.experts)
    sent = routes(lm, IDS)[layer]
    expert = int(sent.index[0, 5, 0])
    plain = LM(lm.model, lm.tokenizer, lm.layout, lm.name)
    plain.layout.__dict__["blocks"] = tuple(b for b in lm.layout.blocks if b.layer != layer)
    view = focused(plain, {layer: [expert]})
    block = view.block(layer)
    torch.manual_seed(2)
    after = {"out": torch.randn(32), "gate": torch.randn(32) / 4}
    if block.gated:
        after["up"] = torch.randn(32) / 4
    after |= {r: torch.tensor(block.neutral(r)) for r in block.slices(7) if r.endswith("_bias")}
    with applied(view, Patch((make_edit(view, layer, 7, after),), identity(view))):
        with record(view, [layer]) as neurons, record_block_inputs(view, [layer]) as inputs:
            view.logits([IDS], [[0]])
    x = inputs[layer][0]
    wanted = view.layout.act(layer)(x @ after["gate"])
    if block.gated:
        wanted = wanted * (x @ after["up"])
    wanted = wanted * (sent.index[0] == expert).any(-1)
    torch.testing.assert_close(neurons[layer][0, :, 7], wanted, atol=2e-5, rtol=1e-3)


def test_exact_patching_equals_plain_hooks_and_linear_its_gradient(mixture):
    lm = mixture
    encoded = lm.encode(case_of(lm), "none")
    fault = find_faults(lm, encoded)[0]
    ids = encoded.ids[: fault.position + 1]
    sent = routes(lm, ids)
    view = focused_at(lm, ids, fault.position)
    run = record_run(view, ids, fault)
    assert run.no_op_error < 1e-4
    linear = linear_scores(view, ids, [fault], None).at_fault

    def metric():
        logits = plain_logits(lm, ids)[-1]
        return float(logits[fault.wrong] - logits[fault.desired])

    base = metric()
    for layer, experts in lm.layout.experts.items():
        module = lm.module(experts.module)
        assert {b.expert for b in view.layout.blocks_of(layer)} - {None} == set(
            sent[layer].index[0, -1].tolist()
        )
        number = view.d_ff(layer) - experts.d_ff + 5
        expert, index = view.place(layer, number)
        (found,) = exact_scores(view, run, [(layer, number)], None).tolist()

        def silence(_m, args, kwargs, output, layer=layer, expert=expert, index=index, share=1.0):
            # What the neuron wrote at the last token is taken out of the module's output.
            hidden, chosen, weights = [*args, *kwargs.values()][:3]
            hidden = hidden.reshape(-1, 32)
            n = plain_neurons(lm, layer, expert, hidden[-1:])[0, index]
            weight = (
                weights.reshape(len(hidden), -1)[-1] * (chosen.reshape(len(hidden), -1)[-1] == expert)
            ).sum()
            moved = output.clone().reshape(-1, 32)
            moved[-1] -= share * weight * n * column_of(lm, layer, expert, index)
            return moved.reshape(output.shape)

        handle = module.register_forward_hook(silence, with_kwargs=True)
        assert metric() - base == pytest.approx(found, abs=2e-4)
        handle.remove()
        step = 1e-2

        def nudge(*given):
            return silence(*given, share=step)  # noqa: B023 (used within this turn of the loop)

        handle = module.register_forward_hook(nudge, with_kwargs=True)
        slope = (metric() - base) / step
        handle.remove()
        assert float(linear[layer][0, number]) == pytest.approx(slope, abs=5e-3, rel=5e-2)


def test_attribution_names_the_expert(mixture):
    lm = mixture
    found = attribute(
        lm, case_of(lm), encoded=lm.encode(case_of(lm), "none"), exact=8, stability=False, top=200
    )
    routed = [row for row in found.neurons + found.opposing if "expert" in row]
    assert routed
    for row in routed:
        experts = lm.layout.experts[row["layer"]]
        assert row["expert"] < experts.count and row["index"] < experts.d_ff
    json.dumps(found.to_json())
    if not lm.layout.blocks:
        assert len(routed) == len(found.neurons + found.opposing)


@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_a_target_is_repaired_and_reverted_bit_for_bit(family):
    lm = tiny_lm(family)
    case, before = case_of(lm), weights_of(lm)
    encoded = lm.encode(case, "none")
    solution = solve(lm, Problem(case, encoded), Settings(generalize=0.0))
    assert solution.change is not None, solution.reason
    routed = {e.expert for e in solution.change.edits}
    assert (None not in routed) if family in ROUTED_ONLY else (routed == {None} or family == "lfm2_moe")
    assert same_bits(before, weights_of(lm))
    stored = patches.from_bytes(patches.to_bytes(solution.change))
    assert [e.named() for e in stored.edits] == [e.named() for e in solution.change.edits]
    fresh = tiny_lm(family)  # another load, which was never narrowed to an expert
    apply(fresh, stored)
    assert plain_logits(fresh, encoded.ids[:-1])[encoded.positions].argmax(1).tolist() == list(encoded.target)
    revert(fresh, stored)
    assert same_bits(before, weights_of(fresh))


def test_the_expert_that_most_tokens_go_to_is_chosen():
    lm = tiny_lm("mixtral")
    sent = routes(lm, IDS)
    view = focused_for(lm, IDS, [2, 3, 4])
    counts = {
        layer: [int((r.index[0, 2:5] == e).any(-1).sum()) for e in range(4)] for layer, r in sent.items()
    }
    most = max(max(c) for c in counts.values())
    assert view.layout.repairable == [layer for layer, c in counts.items() if max(c) == most]
    for block in view.layout.blocks:
        assert counts[block.layer][block.expert] == most
    assert focused_for(tiny_lm("llama"), IDS, [1]).layout.experts == {}


def test_overriding_one_block_leaves_the_layers_others_alone():
    lm = tiny_lm("qwen2_moe")
    view = every_expert(lm)
    before = view.logits([IDS], [range(6)])
    with override(view, {0: lambda n: n}):
        torch.testing.assert_close(view.logits([IDS], [range(6)]), before, atol=1e-5, rtol=1e-5)

    def silence(n):
        n = n.clone()
        n[..., :48] = 0
        return n

    with override(view, {0: silence}):
        quiet = view.logits([IDS], [range(6)])
    with override(lm, {0: torch.zeros_like}):
        torch.testing.assert_close(lm.logits([IDS], [range(6)]), quiet, atol=1e-5, rtol=1e-5)


def test_a_copy_of_a_narrowed_model_runs_its_own_weights():
    import copy

    lm = tiny_lm("mixtral")
    every_expert(lm)
    twin = copy.deepcopy(lm.model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("down_proj"):
                parameter.zero_()
    ids = torch.tensor([IDS])
    with torch.no_grad():
        assert not torch.allclose(twin(ids).logits, lm.model(ids).logits)


def test_neurons_that_are_not_there_are_named():
    lm = tiny_lm("mixtral")
    with pytest.raises(LayoutError, match="experts 0 to 3, asked for expert 9"):
        lm.layout.slices(0, 1, 9)
    with pytest.raises(LayoutError, match="expert 2 has neurons 0 to 63, asked for neuron 64"):
        lm.layout.slices(0, 64, 2)
    with pytest.raises(LayoutError, match="experts 0 to 3, asked for"):
        focused(lm, {0: [4]})
    with pytest.raises(LayoutError, match="routed experts"):
        lm.block(0)
    edit = patches.NeuronEdit(1, 2, "value", {"out": torch.zeros(32)}, {"out": torch.ones(32)}, 7)
    with pytest.raises(PatchError, match="layer 1, expert 7, neuron 2"):
        apply(lm, Patch((edit,)))


@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_files_are_changed_and_given_back_byte_for_byte(family, tmp_path):
    """The files hold each expert's tensors apart (or stacked, as gpt-oss): the same neuron changes as in memory."""
    lm = tiny_lm(family)
    lm.model.save_pretrained(tmp_path / "m")
    lm.tokenizer.save_pretrained(tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    layer = max(lm.layout.experts)
    edits = []
    for expert, index in ((1, 3), (3, 0)):
        slices = lm.layout.slices(layer, index, expert)
        old = {role: s.of(lm.parameter(s.parameter)).detach().clone() for role, s in slices.items()}
        new = {role: torch.randn_like(value) for role, value in old.items()}
        edits.append(patches.NeuronEdit(layer, index, "rewrite", old, new, expert))
    patch = Patch(tuple(edits), identity(lm) | {"layout": describe(lm)})
    checkpoint.apply(tmp_path / "m", patch)
    apply(lm, patch)
    again = type(lm.model).from_pretrained(tmp_path / "m")
    stored = dict(again.named_parameters())
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(stored[name], parameter), name
    checkpoint.revert(tmp_path / "m", patch)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    missing = patches.NeuronEdit(layer, 3, "rewrite", edits[0].before, edits[0].after, 99)
    with pytest.raises(PatchError, match="expert 99"):
        checkpoint.apply(tmp_path / "m", Patch((missing,), patch.base))


def test_the_layout_of_a_saved_mixture_is_the_same(tmp_path):
    lm = tiny_lm("mixtral")
    lm.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert find_layout(again) == lm.layout and find_layout(again).experts == lm.layout.experts


def test_tokens_that_are_sent_to_other_experts_are_counted(mixture):
    lm, layer = mixture, min(mixture.layout.experts)
    sequences = [specificity.of_ids(IDS), specificity.of_ids([7, 8, 9, 10])]
    clean = specificity.clean_outputs(lm, sequences, states=[1, 2])
    assert specificity.compare(lm, clean).routing_changed == 0
    before = [routes(lm, ids) for ids, _, _ in sequences]
    module = lm.module(lm.layout.experts[layer].module)
    torch.manual_seed(3)
    with torch.no_grad():
        module.down_proj.add_(torch.randn_like(module.down_proj) / 2)
    effects = specificity.compare(lm, clean)
    moved = []
    for (ids, positions, _), old in zip(sequences, before, strict=True):
        new = routes(lm, ids)
        moved += [
            any(set(new[at].index[0, p].tolist()) != set(old[at].index[0, p].tolist()) for at in new)
            for p in positions
        ]
    assert effects.routing_changed == pytest.approx(sum(moved) / len(moved))
    assert effects.as_dict()["routing_changed"] == effects.routing_changed
    if len(lm.layout.experts) > 1 and lm.layout.experts.keys() - {layer, layer + 1}:
        assert effects.routing_changed > 0


def test_a_dense_model_has_no_routing_to_change(lm):
    clean = specificity.clean_outputs(lm, [specificity.of_ids(IDS)])
    assert specificity.compare(lm, clean).routing_changed is None


def test_a_repair_that_sends_other_text_to_other_experts_is_refused(monkeypatch):
    lm = tiny_lm("qwen3_moe")
    before = weights_of(lm)
    case = replace(case_of(lm), stop="none")
    wishes = session.Wishes(settings=Settings(generalize=0.0, layers=(0,)), contexts=False)
    monkeypatch.setattr(session, "REROUTED", 1.0)
    allowed = session.repair(lm, [case], wishes, solve)
    assert allowed.success and allowed.specificity.routing_changed > 0
    monkeypatch.setattr(session, "REROUTED", 0.0)
    refused = session.repair(lm, [case], wishes, solve)
    assert not refused.success and "to other experts" in refused.reason and refused.patch is None
    assert same_bits(before, weights_of(lm))


def test_a_target_whose_tokens_share_no_expert_is_refused_in_one_line():
    lm = tiny_lm("mixtral")
    encoded = lm.encode(Case("long", "ab c", "qzjkxvw ypmq"), "none")
    solution = solve(lm, Problem(Case("long", "ab c", "qzjkxvw ypmq"), encoded), Settings(generalize=0.0))
    assert solution.change is None
    assert re.search(
        r"cannot write all 1\d wrong tokens when no expert gets more than \d+ of them", solution.reason
    )
