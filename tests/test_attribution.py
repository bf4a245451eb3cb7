"""`attribute` end to end on tiny models: contract, signs, references and their checks, named methods, trust figures."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mint.attribution import attribute, find_faults, linear_scores, plots, rank
from mint.attribution.exact import exact_scores, joint_effect, noise_scores, record_run
from mint.attribution.faults import Fault
from mint.attribution.methods import METHODS, estimate, norms, relevance_rules
from mint.attribution.rank import jaccard, pearson, recall_at, screened, sign_agreement, spearman
from mint.attribution.references import draws, make_reference
from mint.case import Case
from mint.errors import CaseError, MintError
from mint.model.lm import Encoded
from mint.pictures import svg
from mint.reference import Statistics
from tests.conftest import tiny_lm
from tests.test_attribution_exact import (
    DESIRED,
    IDS,
    WRONG,
    blank_lm,
    naive,
    orthogonal,
    plant,
    token,
    towards_wrong,
)

CASE = Case("a", "hello w", "orld!")


def flat_statistics(lm, key="k") -> Statistics:
    """Statistics without a pass over the reference text: zero means, unit squares."""
    blocks = lm.layout.blocks
    return Statistics(
        tokens=1,
        inputs_second=[torch.eye(b.d_model) for b in blocks],
        inputs_mean=[torch.zeros(b.d_model) for b in blocks],
        neurons_mean=[torch.full((b.d_ff,), 0.01) for b in blocks],
        neurons_square=[torch.ones(b.d_ff) for b in blocks],
        neurons_energy=[torch.ones(b.d_ff) for b in blocks],
        sample={},
        key=key,
    )


@pytest.fixture(autouse=True)
def _few_passages(monkeypatch):
    monkeypatch.setattr("mint.attribution.references.PASSAGES", 3)


def run_on(lm, **options):
    return attribute(lm, CASE, stats=flat_statistics(lm), **options)


# ---------------------------------------------------------------------- contract


def test_json_has_the_keys_of_the_contract_and_nothing_that_is_no_json(lm):
    found = run_on(lm, top=5).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {"position", "wrong", "desired", "logit_difference"} <= found["fault"].keys()
    wanted = {"layer", "index", "position", "linear", "exact", "linear_summed", "value", "reference_value"}
    assert all(wanted <= row.keys() for row in found["neurons"])
    assert {"spearman", "sign", "recall_at_10"} <= found["agreement"].keys()
    assert found["reference"] == "mean"
    assert len(found["neurons"]) == len(found["opposing"]) == 5


def test_printed_effects_are_those_of_plain_hooks_with_the_printed_values(any_lm):
    found = run_on(any_lm, top=4, stability=False)
    encoded = any_lm.encode(CASE)
    fault = find_faults(any_lm, encoded)[0]
    assert found.fault["position"] == fault.position
    for row in found.neurons + found.opposing:
        expected = naive(any_lm, encoded.ids, fault, row["layer"], row["index"], row["reference_value"])
        assert row["exact"] == pytest.approx(expected, abs=2e-5)


def test_guilty_is_negative_most_guilty_first_and_opposing_positive(lm):
    found = run_on(lm)
    effects = [row["exact"] for row in found.neurons]
    assert effects == sorted(effects) and effects[0] < 0
    against = [row["exact"] for row in found.opposing]
    assert against == sorted(against, reverse=True) and against[0] > 0


def test_exact_all_finds_the_ten_guiltiest_of_the_whole_model(lm):
    some, every = run_on(lm, exact=32), run_on(lm, exact="all")
    assert every.checked == lm.layout.n_neurons
    places = [{(r["layer"], r["index"]) for r in a.neurons[:10]} for a in (some, every)]
    assert len(places[0] & places[1]) >= 9


def test_without_exact_check_the_linear_order_stands_and_says_so(lm):
    found = run_on(lm, exact=0)
    assert found.checked == 0 and found.agreement["spearman"] is None
    assert all(row["exact"] is None for row in found.neurons)
    linear = [row["linear"] for row in found.neurons]
    assert linear == sorted(linear)


def test_the_planted_guilty_neuron_leads_the_list():
    lm = blank_lm()
    plant(lm, 1, 7, token(lm), token(lm), 0.03 * towards_wrong(lm))
    encoded = Encoded(tuple(IDS), (DESIRED,))
    fault = Fault(2, WRONG, DESIRED, 0.0)
    found = attribute(
        lm, CASE, encoded=encoded, fault=fault, stats=flat_statistics(lm), reference="zero", stability=False
    )
    first = found.neurons[0]
    assert (first["layer"], first["index"]) == (1, 7)
    assert first["direct"] == pytest.approx(first["exact"], rel=0.5)  # all of it is read off directly
    assert first["noise"] < 0
    assert found.controls[0]["percentile"] == 1.0
    assert "joint" in found.joint["pair"]


def test_rephrasings_are_used_for_stability_and_identical_ones_are_perfectly_stable(lm):
    case = replace(CASE, rephrasings=(CASE.prompt, CASE.prompt))
    found = attribute(lm, case, stats=flat_statistics(lm))
    assert found.stability["kind"] == "rephrasings"
    assert found.stability["jaccard_at_10"] == 1.0 and found.stability["same_wrong_token"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradeint"}, "unknown method 'gradeint'; known are linear, ig"),
        ({"reference": "noise"}, "unknown reference 'noise'; known are mean, zero"),
        ({"top": 0}, "at least 1, found 0"),
        ({"exact": -1}, "found -1"),
        ({"exact": "some"}, "found 'some'"),
        ({"reference": "counterfactual"}, "needs a prompt behind which the model is right"),
    ],
)
def test_bad_options_are_refused_in_one_line(lm, options, message):
    with pytest.raises(MintError, match=message) as caught:
        run_on(lm, **options)
    assert "\n" not in str(caught.value)


def test_a_case_without_fault_is_refused(lm):
    prompt = lm.encode_prompt("ab")
    right = int(lm.logits([prompt], [[1]])[0].argmax())
    with pytest.raises(CaseError, match="already prefers every token"):
        attribute(lm, CASE, encoded=Encoded(tuple(prompt), (right,)), stats=flat_statistics(lm))


# ---------------------------------------------------------------------- references


def counterfactual_setting(length):
    lm = tiny_lm("llama")
    prompt = lm.encode_prompt("hello w")
    wrong = int(lm.logits([prompt], [[6]])[0].argmax())
    other = lm.encode_prompt("ABCDEFGHIJ"[:length])
    desired = int(lm.logits([other], [[length - 1]])[0].argmax())
    assert wrong != desired
    return lm, Encoded(tuple(prompt), (desired,)), "ABCDEFGHIJ"[:length], desired


def test_counterfactual_of_equal_length_is_aligned_and_patched_both_ways():
    lm, encoded, healthy, desired = counterfactual_setting(7)
    found = attribute(
        lm,
        CASE,
        encoded=encoded,
        stats=flat_statistics(lm),
        reference="counterfactual",
        counterfactual=healthy,
    )
    assert found.details["counterfactual_aligned"] == "equal"
    assert found.details["counterfactual_ids"] == lm.encode_prompt(healthy)
    run = record_run(lm, lm.encode_prompt(healthy), Fault(6, 0, desired, 0.0))
    first = found.neurons[0]
    assert first["reference_value"] == pytest.approx(float(run.neurons[first["layer"]][-1, first["index"]]))
    # Noising by hand: the faulty value put into the healthy run makes it worse by what `noise` says.
    fault = Fault(6, int(found.fault["wrong_id"]), desired, 0.0)
    worse = naive(lm, lm.encode_prompt(healthy), fault, first["layer"], first["index"], first["value"])
    assert first["noise"] == pytest.approx(-worse, abs=2e-5)


def test_counterfactual_of_another_length_is_aligned_from_the_end():
    lm, encoded, healthy, _ = counterfactual_setting(4)
    found = attribute(
        lm,
        CASE,
        encoded=encoded,
        stats=flat_statistics(lm),
        reference="counterfactual",
        counterfactual=healthy,
    )
    assert found.details["counterfactual_aligned"] == "end"


def test_a_counterfactual_behind_which_the_model_is_wrong_is_refused():
    lm, encoded, _, _ = counterfactual_setting(7)
    with pytest.raises(
        CaseError, match="behind the counterfactual prompt the model writes .*expected the desired"
    ):
        attribute(
            lm,
            CASE,
            encoded=encoded,
            stats=flat_statistics(lm),
            reference="counterfactual",
            counterfactual="hello v",
        )


def test_the_faulty_prompt_is_no_counterfactual():
    lm, encoded, _, _ = counterfactual_setting(7)
    with pytest.raises(CaseError, match="is the faulty prompt itself"):
        attribute(
            lm,
            CASE,
            encoded=encoded,
            stats=flat_statistics(lm),
            reference="counterfactual",
            counterfactual="hello w",
        )


def test_a_counterfactual_longer_than_the_context_is_refused():
    lm = tiny_lm("gpt2")
    encoded = lm.encode(CASE)
    run = record_run(lm, encoded.ids, find_faults(lm, encoded)[0])
    with pytest.raises(CaseError, match="shorten"):
        make_reference(lm, "counterfactual", run, flat_statistics(lm), counterfactual="x" * 2000)


def test_resample_takes_one_healthy_token_by_seed_and_draws_are_cached(lm):
    drawn = draws(lm, "k")
    run = record_run(lm, lm.encode(CASE).ids, find_faults(lm, lm.encode(CASE))[0])
    one, two = (make_reference(lm, "resample", run, flat_statistics(lm), seed=s).values for s in (1, 2))
    assert torch.equal(one[0], drawn[0][1]) and not torch.equal(one[0], two[0])
    again = draws(lm, "k")
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_a_damaged_cache_of_draws_is_made_again(lm, tmp_path):
    first = draws(lm, "k")
    (path,) = (tmp_path / "cache" / "statistics").glob("draws-*.safetensors")
    path.write_bytes(b"damaged")
    assert torch.equal(draws(lm, "k")[0], first[0])


# ---------------------------------------------------------------------- methods


def setting(lm):
    encoded = lm.encode(CASE)
    fault = find_faults(lm, encoded)[0]
    return encoded, fault, record_run(lm, encoded.ids, fault)


def test_captums_gradient_times_activation_agrees_with_our_zero_reference(any_lm):
    encoded, fault, run = setting(any_lm)
    ours = linear_scores(any_lm, encoded, [fault]).at_fault
    theirs = estimate(any_lm, run, None, "captum")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[0], b, rtol=1e-3, atol=1e-6)


def test_integrated_gradients_of_a_layer_add_up_to_replacing_the_whole_layer(any_lm):
    _, _, run = setting(any_lm)
    generator = torch.Generator().manual_seed(0)
    reference = [n[-1] + 0.2 * torch.randn(n.shape[-1], generator=generator) for n in run.neurons]
    scores = estimate(any_lm, run, reference, "ig")
    for layer, values in enumerate(reference):
        whole = joint_effect(any_lm, run, [(layer, i, float(v)) for i, v in enumerate(values)])
        assert float(scores[layer].sum()) == pytest.approx(whole, rel=0.05, abs=0.005)


def test_relevance_rules_change_gradients_but_no_value(any_lm):
    encoded, fault, run = setting(any_lm)
    plain = any_lm.logits([encoded.ids], [encoded.positions])
    with relevance_rules(any_lm):
        ruled = any_lm.logits([encoded.ids], [encoded.positions])
    torch.testing.assert_close(plain, ruled, rtol=1e-5, atol=1e-5)
    linear, relp = (torch.cat(estimate(any_lm, run, None, m)) for m in ("linear", "relp"))
    assert norms(any_lm) and float((linear - relp).abs().max()) > 1e-4
    assert spearman(linear, relp) > 0.3


def test_relevance_rules_halve_the_gradient_through_a_gated_neuron():
    lm = blank_lm()
    (a,) = orthogonal(lm, 1)
    reader = 0.5 * token(lm) + a
    plant(lm, 0, 1, token(lm), token(lm), 0.02 * a)
    plant(lm, 2, 3, reader, reader, 0.1 * towards_wrong(lm))
    run = record_run(lm, IDS, Fault(2, WRONG, DESIRED, 0.0))
    relp = estimate(lm, run, None, "relp")
    # Neuron (2, 3) reads 0.5 from the token and the rest from neuron (0, 1). With norms and act(z)/z held constant and
    # the product halved, its effect is shared out among what it reads in proportion.
    written = 0.02 * float(run.neurons[0][-1, 1])
    assert float(relp[0][1]) == pytest.approx(float(relp[2][3]) * written / (0.5 + written), rel=0.01)


def test_controls_know_nothing(lm):
    _, _, run = setting(lm)
    exact = torch.cat([s for s in estimate(lm, run, None, "random")])
    again = torch.cat([s for s in estimate(lm, run, None, "random")])
    assert torch.equal(exact, again)
    assert all(float(s.max()) <= 0 for s in estimate(lm, run, None, "activation"))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_runs_through_attribute_in_bf16(method):
    lm = tiny_lm("qwen2", dtype=torch.bfloat16)
    found = run_on(lm, method=method, top=3, stability=False)
    assert found.method == method and len(found.neurons) == 3
    assert json.dumps(found.to_json(), allow_nan=False)


def test_noise_scores_have_the_sign_of_denoising(lm):
    encoded, fault, run = setting(lm)
    healthy = record_run(lm, encoded.ids, fault, {1: lambda n: n * 0})
    scores = noise_scores(lm, healthy, run, [(1, 5)])
    alone = exact_scores(lm, healthy, [(1, 5)], [n[-1].float() for n in run.neurons])
    assert float(scores[0]) == pytest.approx(-float(alone[0]))


# ---------------------------------------------------------------------- figures


def test_rank_correlation_agrees_with_scipy():
    from scipy import stats

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, generator=generator).round(decimals=1)
    b = a + torch.randn(50, generator=generator).round(decimals=1)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)


def test_figures_of_nothing_are_none_and_not_nan():
    assert spearman(torch.ones(5), torch.arange(5.0)) is None
    assert pearson(torch.tensor([1.0]), torch.tensor([1.0])) is None
    assert jaccard([], []) == 0.0


def test_recall_and_sign_agreement_by_hand():
    estimated, exact = torch.tensor([-3.0, -2.0, 1.0, 2.0]), torch.tensor([-3.0, 1.0, -2.0, 2.0])
    assert recall_at(estimated, exact, 2) == 0.5
    assert sign_agreement(estimated, exact) == 0.5


def test_the_screen_takes_both_ends_and_the_largest_writes():
    estimated = torch.tensor([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0])
    share = torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0, 0.0])
    assert screened(estimated, share, 1) == [0, 3, 5]


@pytest.mark.real
def test_the_default_holds_its_promise_on_the_real_model(real_lm):
    case = Case("c", "# sort list `l` in descending order\n", "l.sort(reverse=True)\n")
    found = attribute(real_lm, case, stability=False)
    assert found.agreement["spearman"] >= 0.95 and found.agreement["screen_recall_at_10"] >= 0.9
    assert found.no_op < 1e-3


# ---------------------------------------------------------------------- pictures


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_pictures_are_written_and_not_overwritten(lm, tmp_path, ending):
    found = run_on(lm, top=4, stability=False)
    written = plots.save(lm, found, tmp_path / f"why.{ending}")
    assert [p.name for p in written] == [f"why.{ending}", f"why-bars.{ending}", f"why-lens.{ending}"]
    start = b"<svg" if ending == "svg" else b"\x89PNG"
    assert all(p.read_bytes().startswith(start) and p.stat().st_size > 2000 for p in written)
    with pytest.raises(MintError, match="exists; give another name"):
        plots.save(lm, found, tmp_path / f"why.{ending}")
    assert plots.save(lm, found, tmp_path / f"why.{ending}", force=True) == written


def test_pictures_of_another_format_or_without_a_run_are_refused(lm, tmp_path):
    found = run_on(lm, top=4, stability=False)
    with pytest.raises(MintError, match="ending in .png or .svg, found '.gif'"):
        plots.save(lm, found, tmp_path / "why.gif")
    with pytest.raises(MintError, match="run attribute again"):
        plots.save(lm, replace(found, used=None), tmp_path / "why.png")


def test_tokens_that_matplotlib_would_read_as_mathematics_can_be_drawn(lm):
    found = run_on(lm, top=4, stability=False)
    odd = replace(found, fault=found.fault | {"wrong": "$x^", "desired": "\x00\n\u4e2d"})
    assert svg(plots.bars(odd)).startswith("<svg")


def test_recall_at_10_can_fail():
    """It compares the estimate's first ten with the exact first ten, whatever was screened."""
    n = 40
    exact, estimate = torch.arange(n, dtype=torch.float32), -torch.arange(n, dtype=torch.float32)

    def agreement(estimate, checked, tail=()):
        flat = SimpleNamespace(
            checked=torch.tensor(checked), estimate=estimate, exact=exact, tail=list(tail), share=torch.zeros(n),
            neuron=lambda i: (0, i),
        )  # fmt: skip
        return rank._agreement(flat)

    everything = list(range(n))
    assert agreement(estimate, everything)["recall_at_10"] == 0
    assert agreement(exact, everything)["recall_at_10"] == 1
    assert agreement(estimate, everything)["screen_recall_at_10"] is None, (
        "nothing but the screen was patched"
    )
    assert agreement(exact, everything[:10])["recall_at_10"] is None, "ten of ten cannot fail"
    found = agreement(estimate, everything, tail=range(5))
    assert found["screen_recall_at_10"] == 0.5, (
        "five of the ten guiltiest were found by the random sample alone"
    )
