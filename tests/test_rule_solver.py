"""The solver of rules on tiny models: one neuron, learnt from a few prompts, holds behind prompts it has not seen."""

import random

import pytest
import torch

from mint.errors import MintError
from mint.model.lm import Encoded
from mint.patch import applied
from mint.rules.contexts import in_other_contexts
from mint.rules.neuron import habit_of
from mint.rules.solve import RuleSettings, _before_the_habit, solve_rule
from mint.solver.bundle import bundle
from mint.solver.classifier import Examples, fit_constant, fit_direction, fit_level, make_rows
from mint.solver.problem import margins
from tests.conftest import same_bits, tiny_lm, weights_of

QUICK = RuleSettings(layers=(0,), ridges=(0.05,), silence=0.5, thresholds=(-0.3, 0.0), where="idle")


def prompts(ending: str, n: int, seed: int) -> list[list[int]]:
    """Random bytes before a fixed ending."""
    rng = random.Random(seed)
    ids = [1 + b for b in ending.encode()]
    return [[rng.randrange(1, 257) for _ in range(rng.randrange(2, 6))] + ids for _ in range(n)]


def written(lm, prompt: list[int], n: int = 1) -> tuple[int, ...]:
    return tuple(lm.generate([prompt], n)[0])


def rule(lm, n: int = 6, seed: int = 0) -> tuple[list[Encoded], list[Encoded]]:
    wanted = 90
    learn = [Encoded(tuple(p), (wanted,)) for p in prompts(" = call(", n, seed)]
    keep = [Encoded(tuple(p), written(lm, p)) for p in prompts("in other", n, seed + 1)]
    return learn, keep


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_one_neuron_holds_behind_unseen_prompts(family):
    lm = tiny_lm(family, 1)
    before = weights_of(lm)
    learn, keep = rule(lm, 8)
    found = solve_rule(lm, learn, keep, QUICK)
    assert same_bits(before, weights_of(lm))
    assert found.reason is None and found.neurons == 1
    unseen = [Encoded(tuple(p), (90,)) for p in prompts(" = call(", 8, 7)]
    with applied(lm, found.change):
        learnt = sum(float(margins(lm, e).min()) > 0 for e in learn)
        right = sum(float(margins(lm, e).min()) > 0 for e in unseen)
        kept = sum(written(lm, list(e.prompt)) == e.target for e in keep)
    assert learnt >= 6 and right >= 6
    assert kept >= 6


def test_restart_gives_the_clean_margins(lm):
    texts = [Encoded(tuple(p), (5, 6, 7)) for p in prompts("x", 3, 0)] + [Encoded((9,), (8,))]
    for layer, found in bundle(lm, texts, [0, 1, 2], exact=True).items():
        again = found.margins(torch.zeros_like(found.inputs))[0]
        assert torch.allclose(again[found.real], found.clean[found.real], atol=1e-3), layer
        assert torch.allclose(found.present_margins()[found.real], found.clean[found.real], atol=1e-3)
        for i, text in enumerate(texts):
            assert torch.allclose(found.clean[i, : len(text.target)], margins(lm, text), atol=1e-3)


def test_gradients_of_soft_margins_agree_with_differences(lm):
    texts = [Encoded(tuple(p), (5, 6, 7)) for p in prompts("x", 2, 0)]
    found = bundle(lm, texts, [1])[1]
    start = torch.zeros_like(found.inputs)
    everything = torch.full(found.real.shape, torch.inf)
    value, gradient, seen = found.soft_margins(start, found.real, everything)
    assert seen.all()
    step = 1e-2 * torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    up, down = (found.soft_margins(start + s * step, found.real, everything)[0] for s in (1, -1))
    expected = torch.einsum("ipqd,iqd->ip", gradient, step)
    assert torch.allclose((up - down) / 2, expected, atol=2e-2, rtol=0.1)


def test_a_longer_last_token_counts_as_right(lm):
    texts = [Encoded((5, 6), (7,))]
    found = bundle(lm, texts, [1])[1]
    assert found.accepted()[0].tolist() == [7]  # bytes: no token begins with another


def test_direction_separates_and_a_constant_stands_in_for_the_bias():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) + 1.0
    fire = torch.zeros(400, dtype=torch.bool)
    fire[:20] = True
    x[fire, 0] += 6.0
    wide = torch.cat([x, torch.full((400, 1), 30.0)], 1)
    direction = fit_direction(Examples(wide, fire, torch.ones(400)), silence=0.5, ridge=1.0)
    assert (wide @ direction)[fire].min() > (wide @ direction)[~fire].max()
    constant = fit_constant(wide.T @ wide / 400, wide.mean(0), torch.ones(13), wide[fire])
    assert ((wide @ constant) - 1).abs().max() < 0.1


def test_activation_is_the_same_at_the_typical_fault_and_at_its_mirror():
    constant, direction = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    rows = make_rows(direction, constant, torch.ones(2), 2.5, gated=True)
    x = torch.tensor([[1.0, 1.0], [1.0, 1.5], [1.0, -2.0]])
    n = rows.respond(x, torch.nn.functional.silu)
    assert torch.allclose(n[:2], torch.ones(2), atol=0.01) and abs(float(n[2])) < 1e-3


def test_the_level_is_a_ridge_regression_towards_the_even_row():
    torch.manual_seed(0)
    x = torch.randn(60, 8) + torch.eye(8)[0]
    fire, weight = x[:, 1] > 0.5, torch.rand(60) + 0.1
    examples = Examples(x, fire, weight)
    direction, constant = fit_direction(examples, silence=0.3, ridge=0.1), torch.eye(8)[0]
    act = torch.nn.functional.silu
    even = (2.5 * constant - direction) / 1.5

    def cost(u):
        n = act(8 * (x @ direction)) / 8
        return 3 * (u - even).square().sum() + (weight * (n * (x @ u) - fire.float()).square()).sum()

    level = fit_level(examples, direction, constant, 2.5, act, 3.0)
    at = level.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cost(at), at)
    assert float(slope.norm()) < 0.02 * float(cost(even)) and float(cost(level)) < float(cost(even))
    rows = make_rows(direction, constant, torch.ones(8), 2.5, True, (0.0, 0.0), level)
    assert torch.allclose(rows.respond(x, act), act(8 * (x @ direction)) / 8 * (x @ level), atol=1e-5)


def test_nothing_to_repair_is_said(lm):
    p = prompts(" = call(", 2, 0)
    found = solve_rule(lm, [Encoded(tuple(x), written(lm, x)) for x in p], [], QUICK)
    assert found.change is None and "already" in found.reason


def test_bad_settings_are_refused(lm):
    learn, keep = rule(lm, 2)
    with pytest.raises(MintError, match="at least one learn prompt"):
        solve_rule(lm, [], keep, QUICK)
    with pytest.raises(MintError, match="max_neurons must be 1 or 2"):
        solve_rule(lm, learn, keep, RuleSettings(max_neurons=3))
    with pytest.raises(MintError, match="where must be one of"):
        solve_rule(lm, learn, keep, RuleSettings(where="everywhere"))
    with pytest.raises(MintError, match="margin must be a positive number"):
        solve_rule(lm, learn, keep, RuleSettings(margin=-1.0))


def test_all_kinds_of_edits_are_compared(lm):
    learn, keep = rule(tiny_lm("llama", 1), 8)
    found = solve_rule(tiny_lm("llama", 1), learn, keep, RuleSettings(layers=(0, 1)))
    told = [*found.details["candidates"], *found.details["passed_over"]]
    kinds = {n["kind"] for c in told for n in c["neurons"]}
    assert kinds == {"rewrite", "value", "sharpened"}
    assert found.details["verdict"] in ("cause", "carrier")
    scores = [c["score"] for c in found.details["candidates"]]
    assert scores == sorted(scores, reverse=True)
    assert found.details["responsible"][0]["linear_summed"] < 0


def test_a_contradictory_prompt_is_named():
    lm = tiny_lm("gpt2", 1)
    learn, keep = rule(lm, 8)
    odd = Encoded(learn[0].prompt, (91,))
    found = solve_rule(lm, [*learn, odd], keep, QUICK)
    assert set(found.details["conflicts"]) & {0, 8}
    assert len(found.details["conflicts"]) <= 3


def test_few_prompts_are_put_behind_other_code(lm):
    learn, _ = rule(lm, 2)
    made, owners = in_other_contexts(lm, learn, 4, (), 0)
    assert len(owners) == len(made) and len(made) >= 6
    assert set(owners) == {0, 1}
    assert all(m.prompt[-8:] == learn[i].prompt[-8:] for m, i in zip(made, owners, strict=True))


def test_what_every_text_begins_with_stays_in_front_and_conversations_are_left_alone(monkeypatch):
    lm = tiny_lm("llama", 1)
    monkeypatch.setattr(type(lm.tokenizer), "all_special_ids", property(lambda self: [3, 4]))
    text = Encoded((3, *prompts(" = call(", 1, 0)[0]), (90,))
    made, _ = in_other_contexts(lm, [text], 3, (), 0)
    assert made and all(m.prompt[0] == 3 and 3 not in m.prompt[1:] for m in made)
    turns = Encoded((3, 50, 4, 51), (90,))
    assert in_other_contexts(lm, [turns], 3, (), 0) == ([], [])


def test_the_habit_is_told_from_other_uses_of_its_words():
    habit = habit_of([(1, 2, 3), (9, 2, 3)], [(7, 8)])
    assert habit.opening == (2, 3)
    assert habit.places((2, 3, 7, 8, 5, 3, 7, 8)) == [1]


def test_a_kept_text_ends_where_the_habit_itself_begins(lm):
    habit = habit_of([(1, 2, 3), (9, 2, 3)], [(7, 8)])
    kept = _before_the_habit(Encoded((5, 6), (9, 2, 3, 7, 8, 9)), habit)
    assert kept == Encoded((5, 6), (9, 2, 3))
    same = Encoded((5, 2, 3), (7, 8))  # the user's own: the old text stays right here
    assert _before_the_habit(same, habit) is same


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama"])
def test_biases_stay_so_that_a_rule_travels_as_an_adapter(family):
    lm = tiny_lm(family, 1)
    learn, keep = rule(lm, 8)
    found = solve_rule(lm, learn, keep, QUICK)
    assert found.change is not None
    for edit in found.change.edits:
        for role in [r for r in edit.after if r.endswith("_bias")]:
            assert torch.equal(edit.after[role], edit.before[role])


def test_used_neurons_are_left_alone(lm):
    learn, keep = rule(lm, 4)
    first = solve_rule(lm, learn, keep, QUICK)
    taken = {(e.layer, e.index) for e in first.change.edits}
    second = solve_rule(lm, learn, keep, QUICK, used=frozenset(taken))
    assert not taken & {(e.layer, e.index) for e in second.change.edits}


def test_rules_made_apart_rarely_want_the_same_neuron(lm):
    """Which idle neuron carries a rule hangs on its prompts; what else could carry it stands in the patch."""
    taken = set()
    for seed in range(4):
        learn, keep = rule(lm, 4, seed)
        patch = solve_rule(lm, learn, keep, QUICK).change
        (edit,) = patch.edits
        taken.add(edit.index)
        others = patch.info["spare"]
        assert others and all(layer == 0 and index != edit.index for layer, index in others)
    assert len(taken) > 1
    assert solve_rule(lm, learn, keep, QUICK).change.edits[0].index == edit.index


def test_a_layer_without_a_free_neuron_is_said():
    lm = tiny_lm("llama", 1)
    learn, keep = rule(lm, 4)
    every = frozenset((0, i) for i in range(lm.d_ff(0)))
    found = solve_rule(lm, learn, keep, QUICK, used=every)
    assert found.change is None and "earlier repairs have taken every idle neuron" in found.reason
