"""Side effects are measured exactly, against the clean model, in memory that does not grow with the vocabulary."""

import pytest
import torch

from mint.case import Case
from mint.errors import MintError
from mint.measure import specificity
from mint.measure.specificity import (
    CleanOutputs,
    clean_outputs,
    compare,
    kl_divergence,
    of_case,
    of_ids,
    token_effects,
)
from mint.patch import Patch as MintPatch
from mint.patch import applied, make_edit
from tests.conftest import tiny_lm

TEXTS = [b"def f(x):\n", b"a = 1\n", b"return [y for y in z]\n", b"q"]


def text_ids(lm):
    return [lm.tokenizer(t.decode()).input_ids for t in TEXTS]


def sequences(lm):
    return [of_ids(ids) for ids in text_ids(lm)]


def edit(lm, size=3.0, layer=1, index=5):
    torch.manual_seed(1)
    column = lm.columns(layer)[index].clone()
    return MintPatch((make_edit(lm, layer, index, {"out": column + size * torch.randn_like(column)}),))


def naive(lm, patch, measured):
    """Two plain forwards, one sequence at a time, in float64."""
    rows = []
    for ids, positions, targets in measured:
        if not positions:
            continue
        with torch.no_grad():
            old = lm.model(torch.tensor([list(ids)])).logits[0, list(positions)].double().log_softmax(-1)
            with applied(lm, patch):
                new = lm.model(torch.tensor([list(ids)])).logits[0, list(positions)].double().log_softmax(-1)
        for i, wanted in enumerate(targets):
            kl = (old[i].exp() * (old[i] - new[i])).sum().item()
            rows.append(
                (kl, int(old[i].argmax()), int(new[i].argmax()), wanted, (new[i] - old[i])[wanted].item())
            )
    return rows


def test_every_family_agrees_with_two_plain_forwards(any_lm):
    measured = sequences(any_lm)
    clean = clean_outputs(any_lm, measured)
    patch = edit(any_lm)
    with applied(any_lm, patch):
        found = compare(any_lm, clean)
    rows = naive(any_lm, patch, measured)
    n = len(rows)
    assert found.tokens == n == clean.tokens
    assert found.argmax_unchanged == pytest.approx(sum(b == a for _, b, a, _, _ in rows) / n)
    assert found.argmax_broken == pytest.approx(sum(b == w != a for _, b, a, w, _ in rows) / n)
    assert found.argmax_newly_right == pytest.approx(sum(b != w == a for _, b, a, w, _ in rows) / n)
    assert found.kl_mean == pytest.approx(sum(r[0] for r in rows) / n, rel=1e-3, abs=1e-7)
    assert found.kl_max == pytest.approx(max(r[0] for r in rows), rel=1e-3)
    gain = torch.tensor([r[4] for r in rows]).mean()
    assert found.perplexity_ratio == pytest.approx(torch.exp(-gain).item(), rel=1e-4)
    assert found.kl_mean > 0


def test_unchanged_model_measures_exactly_nothing(any_lm):
    found = compare(any_lm, clean_outputs(any_lm, sequences(any_lm)))
    assert (found.argmax_unchanged, found.argmax_broken, found.argmax_newly_right) == (1, 0, 0)
    assert found.kl_max < 1e-10
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-5)
    assert found.sequences_unchanged == 1


def test_starting_at_the_changed_layer_gives_the_same_numbers(any_lm):
    layers = specificity.late_layers(any_lm)
    assert layers == (1, 2)
    clean = clean_outputs(any_lm, sequences(any_lm), states=layers)
    effects = []
    for layer in range(any_lm.n_layers):
        with applied(any_lm, edit(any_lm, layer=layer)):
            whole, late = compare(any_lm, clean), compare(any_lm, clean, since=layer)
        effects.append(whole.kl_mean)
        assert whole == late
    assert max(effects) > 0


def test_layers_below_the_change_are_not_run(lm):
    clean = clean_outputs(lm, sequences(lm), states=(1, 2))
    runs = []
    handles = [
        lm.module(lm.block(i).out).register_forward_hook(lambda *_, i=i: runs.append(i)) for i in range(3)
    ]
    compare(lm, clean, since=1)
    for handle in handles:
        handle.remove()
    assert set(runs) == {1, 2}


def test_measuring_leaves_every_bit_and_no_hook(lm):
    before = {n: p.clone() for n, p in lm.model.named_parameters()}
    compare(lm, clean_outputs(lm, sequences(lm)))
    assert all(torch.equal(before[n], p) for n, p in lm.model.named_parameters())
    assert not lm.module(lm.layout.unembedding)._forward_pre_hooks


def test_batching_does_not_matter(lm):
    measured, patch = sequences(lm), edit(lm)
    alone = clean_outputs(lm, measured, tokens=1)
    together = clean_outputs(lm, measured, tokens=4096)
    with applied(lm, patch):
        a, b = compare(lm, alone), compare(lm, together)
    assert a.argmax_unchanged == b.argmax_unchanged
    assert a.kl_mean == pytest.approx(b.kl_mean, rel=1e-4)


def test_baseline_is_small_whatever_the_vocabulary(lm):
    clean = clean_outputs(lm, sequences(lm))
    assert [h.numel() for h in clean.hidden] == [32 * len(s[1]) for s in clean.sequences]


@pytest.mark.parametrize("scale", [2e-5, 1e-4, 1e-2, 0.2, 1.0, 30.0])
@pytest.mark.parametrize("vocabulary", [50, 5000, 150_000])
def test_kl_is_right_from_tiny_to_huge(scale, vocabulary):
    """As accurate as the docstring says, with room to spare for another processor's order of summation."""
    torch.manual_seed(0)
    before = 3 * torch.randn(5, vocabulary)
    after = before + scale * torch.randn(5, vocabulary)
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    assert torch.allclose(kl_divergence(before, after), exact, rtol=1e-4, atol=0)


def test_kl_of_equal_logits_is_zero_and_of_opposite_ones_finite():
    logits = torch.tensor([[300.0, 0.0, -300.0]])
    assert kl_divergence(logits, logits).item() == 0
    assert kl_divergence(logits, -logits).item() == pytest.approx(600, rel=1e-6)


def test_broken_counts_only_what_was_right(lm):
    """Targets set to the clean argmax make every change a break; to an impossible token, none."""
    plain = sequences(lm)
    argmax = token_effects(lm, clean_outputs(lm, plain)).before.tolist()
    right, wrong = [], []
    for ids, positions, _ in plain:
        own = [argmax.pop(0) for _ in positions]
        right.append((ids, positions, own))
        wrong.append((ids, positions, [(t + 1) % 257 for t in own]))
    clean_right, clean_wrong = clean_outputs(lm, right), clean_outputs(lm, wrong)
    with applied(lm, edit(lm)):
        all_right, all_wrong = compare(lm, clean_right), compare(lm, clean_wrong)
    assert 0 < all_right.argmax_broken == pytest.approx(1 - all_right.argmax_unchanged)
    assert all_right.argmax_newly_right == 0
    assert all_wrong.argmax_broken == 0


def test_without_targets_nothing_is_called_right_or_broken(lm):
    clean = clean_outputs(lm, [(ids, positions, None) for ids, positions, _ in sequences(lm)])
    with applied(lm, edit(lm)):
        found = compare(lm, clean)
    assert found.argmax_unchanged < 1
    assert (found.argmax_broken, found.argmax_newly_right, found.perplexity_ratio) == (0, 0, None)


def test_worst_tokens_come_with_their_text(lm):
    clean = clean_outputs(lm, sequences(lm))
    with applied(lm, edit(lm)):
        found = compare(lm, clean, worst=3)
    assert len(found.worst) == 3
    ranks = [(t["broken"], t["changed"], t["kl"]) for t in found.worst]
    assert ranks == sorted(ranks, reverse=True)
    assert found.worst[0]["changed"]
    first = found.worst[0]
    ids = clean.sequences[first["sequence"]][0]
    assert first["context"] == lm.decode(ids[: first["position"] + 1])
    assert compare(lm, clean, worst=0).worst == []


def test_case_is_measured_at_its_target_only(lm):
    encoded = lm.encode(Case("a", "# x\n", "y = 1\n"))
    clean = clean_outputs(lm, [of_case(encoded)])
    assert clean.tokens == len(encoded.target)


def test_bfloat16_is_measured_too():
    lm = tiny_lm("llama", dtype=torch.bfloat16)
    found = compare(lm, clean_outputs(lm, sequences(lm)))
    assert found.argmax_unchanged == 1 and found.kl_max < 1e-6


@pytest.mark.parametrize(
    "bad, line",
    [
        (([1, 2], [2], None), "positions must lie in 0 to 1"),
        (([1, 2], [0], [1, 2]), "1 positions and 2 targets"),
        (([1] * 5000, [0], None), "shorten it"),
    ],
)
def test_bad_sequences_are_named_in_one_line(lm, bad, line):
    with pytest.raises(MintError, match=line):
        clean_outputs(lm, [bad])


def test_nothing_to_measure_is_an_error(lm):
    with pytest.raises(MintError, match="found none"):
        compare(lm, clean_outputs(lm, []))


def test_an_edited_unembedding_is_noticed():
    lm = tiny_lm("llama")
    clean = clean_outputs(lm, sequences(lm))
    lm.parameter(f"{lm.layout.unembedding}.weight").data.mul_(2)
    with pytest.raises(MintError, match="unembedding was changed"):
        compare(lm, clean)
    assert isinstance(clean, CleanOutputs) and specificity.of_output([1, 2], [3]) == ([1, 2, 3], [1], [3])
