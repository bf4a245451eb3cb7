"""The minimal-edit solver: exact repairs on every family, protected outputs, and its parts against references."""

import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from mint.case import Case
from mint.errors import MintError
from mint.model.hooks import record
from mint.model.lm import Encoded
from mint.model.margins import margins
from mint.patch import Patch, applied, apply, make_edit
from mint.solver import solve as minimal
from mint.solver import tail as tail_module
from mint.solver.gate import Background, Inputs, fit_rows
from mint.solver.inputs import block_inputs, inputs_behind, inputs_of
from mint.solver.paraphrase import negative_prompts, rephrase, split_frame
from mint.solver.problem import Problem, Settings, changed
from mint.solver.qp import smallest
from mint.solver.tail import run_clean
from tests.conftest import FAMILIES, same_bits, tiny_lm, weights_of

PROMPT = "# sort the list of names in place\n"


def problem(lm, target="ok\n", **more) -> Problem:
    case = Case("c", PROMPT, target)
    return Problem(case, lm.encode(case), **more)


# ---------------------------------------------------------------------- every family


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_repaired_exactly_by_at_most_two_neurons(family):
    lm = tiny_lm(family)
    case = Case("c", PROMPT, "ok\n")
    task = Problem(case, lm.encode(case))
    before = weights_of(lm)
    assert lm.write(task.encoded, case) != case.target
    solution = minimal.solve(lm, task, Settings())
    assert solution.change is not None, solution.reason
    assert solution.neurons <= 2
    assert same_bits(before, weights_of(lm)), "the solver changed the model"
    with changed(lm, solution.change):
        assert lm.write(task.encoded, case) == case.target
    assert same_bits(before, weights_of(lm))


def test_firm_raises_tokens_that_are_right_already():
    """What a repetition penalty can turn around is a token that leads by little, be it right already."""
    lm = tiny_lm("llama")
    lm.model.get_output_embeddings().weight.data *= 30  # leads of logits, not of hundredths
    case = Case("c", PROMPT, "ok\n")
    prompt = lm.encode(case).prompt
    own = lm.generate([prompt], 1)[0]
    encoded = Encoded(prompt, (*own, *lm.encode(case).target))
    lead = float(margins(lm, encoded)[0])
    led = {}
    for firm in (False, True):
        solution = minimal.solve(lm, Problem(case, encoded), Settings(margin=3.0, firm=firm))
        with changed(lm, solution.change):
            led[firm] = float(margins(lm, encoded)[0])
    aimed = solution.details["margin_aimed"]
    assert 0.5 < lead < aimed  # right, by less than is aimed at
    assert led[True] > 0.5 * aimed and led[True] > led[False] + 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_repair_in_half_precision_holds_in_its_own_rounding(dtype):
    lm = tiny_lm("llama", dtype=dtype)
    task = problem(lm, "ok\n")
    solution = minimal.solve(lm, task, Settings())
    assert solution.change is not None, solution.reason
    with changed(lm, solution.change):
        assert lm.write(task.encoded, task.case) == task.case.target


def test_the_same_seed_gives_the_same_bits(lm):
    task = problem(lm)
    first, second = (minimal.solve(lm, task, Settings(seed=3)).change for _ in range(2))
    for a, b in zip(first.edits, second.edits, strict=True):
        assert (a.layer, a.index) == (b.layer, b.index)
        assert all(torch.equal(a.after[role], b.after[role]) for role in a.after)


def test_margin_is_reached_and_reported(lm):
    task = problem(lm)
    solution = minimal.solve(lm, task, Settings(margin=3.0))
    with changed(lm, solution.change):
        least = float(margins(lm, task.encoded).min())
    assert least == pytest.approx(solution.margin_min, abs=1e-5)
    assert least > 0.5 * solution.details["margin_aimed"]


def test_asked_neurons_are_used(lm):
    task = problem(lm, "ok\n")
    solution = minimal.solve_at(lm, task, Settings(), [(1, 5), (1, 9)])
    assert solution.change is not None, solution.reason
    assert {(e.layer, e.index) for e in solution.change.edits} <= {(1, 5), (1, 9)}


def test_neurons_of_earlier_repairs_are_not_used_again(lm):
    task = problem(lm)
    first = minimal.solve(lm, task, Settings())
    used = frozenset((e.layer, e.index) for e in first.change.edits)
    second = minimal.solve(lm, replace(task, used=used), Settings())
    assert not used & {(e.layer, e.index) for e in second.change.edits}


def test_one_neuron_only_if_asked(lm):
    solution = minimal.solve(lm, problem(lm, "ok\n"), Settings(max_neurons=1))
    assert solution.change is None or solution.neurons == 1


@pytest.mark.parametrize("where", ["responsible", "idle"])
def test_where_restricts_the_choice(lm, where):
    solution = minimal.solve(lm, problem(lm, "ok\n"), Settings(where=where))
    assert solution.change is not None, solution.reason
    assert {c["role"] for c in solution.details["carriers"]} == {where}


def test_a_target_already_written_needs_no_change(lm):
    case = Case("c", PROMPT, "x\n")
    written = lm.generate([lm.encode_prompt(PROMPT)], 3)[0]
    encoded = Encoded(lm.encode(case).prompt, tuple(written))
    if float(margins(lm, encoded).min()) < 0.5:
        pytest.skip("the random model is undecided here")
    solution = minimal.solve(lm, Problem(case, encoded), Settings())
    assert solution.change is None and "already" in solution.reason


def test_kept_outputs_survive(lm):
    """Another prompt keeps its output."""
    other = Case("k", "y = other(x) + 1\n", "?")
    prompt = tuple(lm.encode_prompt(other.prompt))
    written = tuple(lm.generate([prompt], 4)[0])
    keep = Encoded(prompt, written)
    task = problem(lm, "ok\n", keep=(keep,))
    solution = minimal.solve(lm, task, Settings())
    assert solution.change is not None, solution.reason
    with changed(lm, solution.change):
        assert tuple(lm.generate([prompt], 4)[0]) == written


def test_a_conflict_with_a_kept_output_is_reported(lm):
    """The same prompt kept as it is cannot be repaired; the model stays as it was."""
    task = problem(lm, "ok\n")
    written = tuple(lm.generate([task.encoded.prompt], 3)[0])
    before = weights_of(lm)
    solution = minimal.solve(lm, replace(task, keep=(Encoded(task.encoded.prompt, written),)), Settings())
    assert solution.change is None
    assert "kept output 1" in solution.reason
    assert same_bits(before, weights_of(lm))


def test_repairs_in_a_row_all_hold(lm):
    """Each of five repairs on one small model survives all that follow."""
    done, used = [], frozenset()
    prompts = ["# sort names\n", "x = 1\n", "; load the byte\n", "def area(r):\n", "SELECT all\n"]
    for i, prompt in enumerate(prompts):
        case = Case(str(i), prompt, f"{i}\n")
        encoded = lm.encode(case)
        solution = minimal.solve(lm, Problem(case, encoded, (), tuple(e for _, e in done), used), Settings())
        assert solution.change is not None, (i, solution.reason)
        minimal_patch: Patch = solution.change
        apply(lm, minimal_patch)
        used |= {(e.layer, e.index) for e in minimal_patch.edits}
        done.append((case, encoded))
    assert [lm.write(e, c) for c, e in done] == [c.target for c, _ in done]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(where="everywhere"), "where must be one of"),
        (Settings(max_neurons=3), "max_neurons must be 1 or 2"),
        (Settings(generalize=1.5), "generalize must lie between 0 and 1"),
        (Settings(margin=-1.0), "margin must be a positive number"),
        (Settings(layers=(99,)), "layers must lie in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(lm, settings, message):
    with pytest.raises(MintError, match=message):
        minimal.solve(lm, problem(lm), settings)


def test_the_dial_is_monotone():
    recipes = [minimal.recipe_of(Settings(generalize=g)) for g in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert [r.margin for r in recipes] == sorted(r.margin for r in recipes)
    assert [r.silence for r in recipes] == sorted((r.silence for r in recipes), reverse=True)


def test_later_repairs_reach_less_far():
    late = minimal.recipe_of(Settings(), earlier=minimal.MANY)
    assert late == minimal.recipe_of(Settings(generalize=0.25))
    assert minimal.recipe_of(Settings(), earlier=0) == minimal.recipe_of(Settings())
    assert minimal.recipe_of(Settings(margin=7.0), earlier=1000).margin == 7.0


def test_negative_prompts_are_followed_only_after_the_opening(lm, monkeypatch):
    """Behind a rephrasing every wrong position should fire; behind a negative prompt only those after the opening."""
    given, fit = [], minimal.fit_rows
    monkeypatch.setattr(
        minimal, "fit_rows", lambda inputs, *a, **k: given.append(inputs) or fit(inputs, *a, **k)
    )
    n, d = 5, 32
    task = minimal._prepare(lm, problem(lm, target="abcd\n"), Settings(), [1])
    around = minimal._Surroundings(torch.randn(3, n, d), 1, torch.zeros(0, d), [])
    carrier = minimal._Carrier(1, 0, "given", 0.0, None)
    minimal._rows(task, carrier, torch.ones(n), around, 0.02)
    torch.testing.assert_close(given[0].like, torch.cat([around.others[0], *around.others[1:, 3:]]))
    torch.testing.assert_close(given[0].unlike[-6:], torch.cat([*around.others[1:, :3]]))


# ---------------------------------------------------------------------- parts


def test_leads_and_their_gradients_match_one_backward_each(any_lm, monkeypatch):
    monkeypatch.setattr(tail_module, "_GROUP", 2)  # several groups, each cut behind its last position
    encoded = Encoded((5, 40, 77, 12), (200, 9, 33, 71, 8))
    tail = run_clean(any_lm, encoded, [0]).tails[0]
    torch.manual_seed(1)
    write = torch.randn(5, 32)
    at, own, rival = (
        torch.tensor([3, 0, 1, 3, 4]),
        torch.tensor([7, 1, 2, 5, 3]),
        torch.tensor([9, 8, 4, 6, 0]),
    )
    leads, gradients = tail.leads(write, at, own, rival)
    for i in range(len(at)):
        alone = write.clone().requires_grad_()
        with torch.enable_grad():
            logits = tail.logits(alone[None], torch.tensor([0]), at[i : i + 1])[0]
            lead = logits[own[i]] - logits[rival[i]]
        (wanted,) = torch.autograd.grad(lead, alone)
        torch.testing.assert_close(leads[i], lead.detach(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gradients[i], wanted, atol=1e-4, rtol=1e-4)
        assert not gradients[i, int(at[i]) + 1 :].any()


def test_a_tail_equals_a_full_forward_with_the_write_in_place(any_lm):
    """Writing at one position of the target through the tail is what a neuron that fires only there does."""
    lm = any_lm
    encoded = Encoded((5, 40, 77, 12), (200, 9, 33))
    layer = 1
    clean = run_clean(lm, encoded, [layer])
    torch.manual_seed(0)
    writes = torch.zeros(1, 3, 32)
    writes[0, 1] = torch.randn(32)
    found = clean.tails[layer].logits(writes, torch.tensor([0, 0, 0]), torch.arange(3))

    def add(_module, _args, output):
        moved = output.view(1, -1, 32).clone()
        moved[0, encoded.positions[1]] += writes[0, 1]
        return moved.view(output.shape)

    handle = lm.module(lm.block(layer).out).register_forward_hook(add)
    try:
        wanted = lm.logits([encoded.ids], [encoded.positions])
    finally:
        handle.remove()
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_tail_can_start_in_the_first_layer(lm):
    encoded = Encoded((5, 40, 77, 12), (200, 9, 33))
    clean = run_clean(lm, encoded, [0])
    found = clean.tails[0].logits(torch.zeros(1, 3, 32), torch.tensor([0, 0, 0]), torch.arange(3))
    torch.testing.assert_close(found, clean.logits, atol=1e-5, rtol=1e-5)


def test_inputs_behind_other_prompts_are_the_models_own(lm):
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13]]
    found = inputs_behind(lm, 1, prompts, [20, 21])
    alone = block_inputs(lm, 1, [[9, 10, 11, 12, 13, 20]])[0]
    torch.testing.assert_close(found[1], alone[4:], atol=1e-5, rtol=1e-5)


def test_inputs_behind_prompts_that_begin_alike_are_those_of_whole_runs(any_lm):
    ids, target = list(range(9, 29)), [20, 21, 22]
    encoded = Encoded(tuple(ids), tuple(target))
    prompts = [[*ids[:17], 40, 41], [*ids[:14], 50], [60, 61, 62], [*ids[:19]]]
    tail = run_clean(any_lm, encoded, [1]).tails[1]
    shared = inputs_behind(any_lm, 1, prompts, target, (ids, tail.prefix))
    torch.testing.assert_close(shared, inputs_behind(any_lm, 1, prompts, target), atol=1e-3, rtol=1e-3)


def test_a_shared_beginning_runs_once(lm, monkeypatch):
    ids, target = list(range(9, 109)), [20, 21]
    tail = run_clean(lm, Encoded(tuple(ids), tuple(target)), [1]).tails[1]
    seen = []
    pad = lm.pad
    monkeypatch.setattr(type(lm), "pad", lambda _, sequences: seen.append(sequences) or pad(sequences))
    inputs_behind(lm, 1, [[*ids[:98], 5, 6], [*ids[:97], 7, 8]], target, (ids, tail.prefix))
    assert [sorted(map(len, batch)) for batch in seen] == [[3, 4]]


def test_gradients_of_a_few_tokens_are_those_of_the_whole_vocabulary(any_lm, monkeypatch):
    encoded = Encoded(tuple(range(9, 19)), (20, 21, 22, 23, 24))
    tail = run_clean(any_lm, encoded, [1]).tails[1]
    write = 0.1 * torch.randn(5, tail.inputs.shape[1], generator=torch.Generator().manual_seed(0))
    asked = (torch.tensor([0, 0, 3, 4]), torch.tensor([20, 20, 23, 24]), torch.tensor([5, 6, 6, 7]))
    few = tail.leads(write, *asked)

    @contextmanager
    def all_tokens(_lm, tokens):
        yield tokens

    monkeypatch.setattr("mint.solver.tail.only_tokens", all_tokens)
    for a, b in zip(few, tail.leads(write, *asked), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_inputs_of_guarded_texts_are_the_models_own_and_remembered(lm, monkeypatch):
    texts = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8]]
    found = inputs_of(lm, 1, texts, frozenset())
    for ids, x in zip(texts, found, strict=True):
        torch.testing.assert_close(x, block_inputs(lm, 1, [ids])[0], atol=1e-5, rtol=1e-5)
    monkeypatch.setattr("mint.solver.inputs.block_inputs", None)
    assert inputs_of(lm, 1, texts, frozenset())[1] is found[1]


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(3, 12))
@hypothesis_settings(max_examples=25, deadline=None)
def test_the_smallest_vector_matches_an_independent_solver(seed, constraints, width):
    rng = np.random.default_rng(seed)
    jacobian = rng.normal(size=(constraints, width))
    need = rng.normal(size=constraints)
    found, multipliers = smallest(torch.from_numpy(jacobian), torch.from_numpy(need))
    reference = minimize(
        lambda v: v @ v / 2,
        np.zeros(width),
        jac=lambda v: v,
        constraints={"type": "ineq", "fun": lambda v: jacobian @ v - need, "jac": lambda v: jacobian},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    if not reference.success or (multipliers >= 9_999).any():
        return  # infeasible or nearly so: the soft bound decides, see the test below
    assert (jacobian @ found.numpy() - need).min() > -1e-5
    assert float(found @ found) / 2 == pytest.approx(reference.fun, rel=1e-3, abs=1e-6)


def test_constraints_that_contradict_each_other_cost_no_more_than_their_bound():
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    found, multipliers = smallest(jacobian, torch.tensor([1.0, 1.0]), 10.0)
    assert torch.isfinite(found).all()
    assert (multipliers <= 10.0 + 1e-6).all()


def _inputs(width=16, seed=0):
    torch.manual_seed(seed)
    sample = torch.randn(400, width) + 0.5
    back = Background(sample.T @ sample / 400, sample.mean(0), sample)
    none = torch.zeros(0, width)
    fire, hold = torch.randn(2, width) * 2, torch.randn(3, width)
    level = torch.tensor([1.0, 0.5])
    return Inputs(fire, level, hold, none, torch.zeros(0), torch.zeros(0), none, torch.zeros(0)), back


def test_gated_rows_fire_exactly_where_asked_and_hold_exactly():
    inputs, back = _inputs()
    rows = fit_rows(inputs, back, torch.nn.functional.silu, gated=True)
    n = rows.respond(torch.cat([inputs.fire, inputs.hold]), torch.nn.functional.silu)
    torch.testing.assert_close(n[:2], inputs.level, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(n[2:], torch.zeros(3), atol=1e-3, rtol=0)


def test_rows_are_quieter_elsewhere_than_where_they_fire():
    inputs, back = _inputs(width=64)
    for gated in (True, False):
        act = torch.nn.functional.silu if gated else torch.nn.functional.gelu
        rows = fit_rows(inputs, back, act, gated=gated)
        loud = rows.respond(inputs.fire, act).abs().min()
        elsewhere = rows.respond(back.sample, act).abs().mean()
        assert elsewhere < 0.05 * loud


def test_plain_rows_answer_steeply_where_asked():
    inputs, back = _inputs(width=64)
    rows = fit_rows(inputs, back, torch.relu, gated=False)
    torch.testing.assert_close(rows.respond(inputs.fire, torch.relu), inputs.level, atol=0.006, rtol=0.01)


def test_the_rewritten_neuron_is_silent_on_the_prompt_and_fires_at_the_fault(lm):
    task = problem(lm, "ok\n")
    solution = minimal.solve(lm, task, Settings())
    edit = solution.change.edits[0]
    with applied(lm, solution.change), record(lm, [edit.layer]) as neurons:
        lm.logits([task.encoded.ids[:-1]], [[0]])
    n = neurons[edit.layer][0, :, edit.index].abs()
    start = len(task.encoded.prompt) - 1
    assert n[start:].max() > 0.5
    assert n[:start].mean() < 0.25 * n[start:].max()


def test_variants_keep_the_frame_and_repeat_for_a_seed():
    prompt = "# sort the list of names `xs` in reverse\n"
    same, negative = rephrase(prompt, 6, seed=1), negative_prompts(prompt, 6, seed=1)
    assert len(same) == len(set(same)) == 6 and len(negative) == 6
    assert all(p.startswith("# ") and p.endswith("\n") and p != prompt for p in same + negative)
    assert same == rephrase(prompt, 6, seed=1) and negative == negative_prompts(prompt, 6, seed=1)


def test_a_prompt_that_ends_in_code_has_no_variants():
    prompt = "def f(n):\n    return"
    assert split_frame(prompt)[1] == "return"
    assert rephrase(prompt, 4) == [] and negative_prompts(prompt, 4) == []


def test_a_value_edit_for_a_single_wrong_token_leaves_the_rows_alone(lm):
    edit = make_edit(lm, 1, 2, {"out": torch.ones(32)})
    assert edit.kind == "value" and set(edit.after) == {"out"}


def test_a_gate_opens_where_the_level_is_negative():
    """The sign belongs to the other row: a position that needs a negative activation is answered behind rephrasings too."""
    inputs, back = _inputs(width=64)
    silu = torch.nn.functional.silu
    direction = torch.randn(64)
    like = inputs.fire[:1] + 0.3 * direction / direction.norm()
    answers = {}
    for level in (0.8, -0.8):
        one = replace(
            inputs, fire=inputs.fire[:1], level=torch.tensor([level]), like=like, like_level=torch.tensor([level]),
            like_weight=torch.tensor([1.0]),
        )  # fmt: skip
        rows = fit_rows(one, back, silu, gated=True)
        assert float(like[0] @ rows.gate) > 0, "the gate is open"
        answers[level] = float(rows.respond(like, silu)[0])
    assert answers[0.8] > 0.4
    assert answers[-0.8] == pytest.approx(-answers[0.8], rel=1e-3)


def test_a_target_too_long_for_two_neurons_is_refused_with_what_can_be_had(lm):
    """Its first tokens can be: the number in the message is tried, not guessed."""
    case = Case("a", "ab", "".join(chr(33 + (i * 37) % 90) for i in range(40)))
    task = Problem(case, lm.encode(case, "none"))
    settings = Settings(max_neurons=1, layers=(1,))
    solution = minimal.solve(lm, task, settings)
    assert solution.change is None
    found = re.search(r"the first (\d+) of its 40 tokens can be had", solution.reason)
    assert found, solution.reason
    assert 0 < int(found[1]) < 40
    short = Case("a", "ab", case.target[: int(found[1])])
    assert minimal.solve(lm, Problem(short, lm.encode(short, "none")), settings).change is not None
