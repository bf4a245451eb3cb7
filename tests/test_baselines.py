"""Every baseline: solves or says why, leaves every bit, gives the same answer twice, survives Ctrl-C."""

import sys
import types

import pytest
import torch

from mint.case import Case
from mint.errors import MintError
from mint.model.lm import Encoded
from mint.model.loading import cache_dir
from mint.model.margins import margins
from mint.patch import Patch, applied, identity, make_edit, read_neuron
from mint.solver.baselines import finetune, lora, matrices, mint_paper, random_controls, rank_one, star
from mint.solver.problem import Problem, Settings, Solution, TensorChange, changed, put_in, take_out
from tests.conftest import FAMILIES, same_bits, tiny_lm, weights_of

SOLVERS = {m.NAME: m.solve for m in (mint_paper, star, finetune, lora, rank_one)}
MATRICES = sorted(set(SOLVERS) - {"mint-paper"})

each_solver = pytest.mark.parametrize("name", sorted(SOLVERS))


PROMPTS = [f"def {c}(a, b):" for c in "abcdefghijklmnopqrstuvwxyz"]


def problem_of(lm, rank: int = 1) -> Problem:
    """One token to repair, at `rank` in the model's ranking (0: no fault), behind the prompt where it lags least."""
    found = []
    for prompt in PROMPTS:
        ids = lm.encode_prompt(prompt)
        with torch.no_grad():
            logits = lm.logits([ids], [[len(ids) - 1]])[0]
        token = int(logits.argsort(descending=True)[rank])
        found.append((float(logits.max() - logits[token]), prompt, ids, token))
    _, prompt, ids, token = min(found)
    # Ids, since a byte alone is not always a text.
    return Problem(Case("c1", prompt, "?"), Encoded(tuple(ids), (token,)))


def problem_for(lm, target: str) -> Problem:
    case = Case("c1", "def add(a, b):", target)
    return Problem(case, lm.encode(case, stop="none"))


@pytest.fixture(autouse=True)
def little_reference(request, monkeypatch):
    """Two passages instead of the text that ships: enough for tiny models."""
    if "real" not in request.keywords:
        monkeypatch.setattr(rank_one, "reference_texts", lambda: ["x = [1, 2]\n" * 9, "ls -l | wc\n" * 9])


def smallest(lm, problem) -> float:
    with torch.no_grad():
        return float(margins(lm, problem.encoded).min())


@each_solver
def test_an_easy_fault_is_repaired_and_the_model_left_as_it_was(name, lm):
    problem = problem_of(lm)
    assert smallest(lm, problem) <= 0
    before = weights_of(lm)
    found = SOLVERS[name](lm, problem, Settings())
    assert same_bits(before, weights_of(lm))
    assert found.solver == name and found.reason is None
    with changed(lm, found.change):
        assert not same_bits(before, weights_of(lm))
        assert smallest(lm, problem) > 0
        assert smallest(lm, problem) == pytest.approx(found.margin_min, abs=1e-5)
        assert lm.generate([problem.encoded.prompt], 1) == [list(problem.encoded.target)]
    assert same_bits(before, weights_of(lm))


@each_solver
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom", "phi3"])
def test_a_line_is_repaired_or_the_reason_given(name, family):
    lm = tiny_lm(family)
    problem = problem_for(lm, "\n  a+b\n")
    before = weights_of(lm)
    found = SOLVERS[name](lm, problem, Settings())
    assert same_bits(before, weights_of(lm))
    assert (found.change is None) == (found.reason is not None)
    with changed(lm, found.change):
        assert (smallest(lm, problem) > 0) == (found.change is not None)
        assert found.change is None or smallest(lm, problem) == pytest.approx(found.margin_min, abs=1e-4)
    assert same_bits(before, weights_of(lm))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_finetune_repairs_a_token_of_every_family(family):
    lm = tiny_lm(family)
    problem = problem_of(lm)
    before = weights_of(lm)
    found = finetune.solve(lm, problem, Settings())
    assert same_bits(before, weights_of(lm))
    assert isinstance(found.change, TensorChange)
    with changed(lm, found.change):
        assert smallest(lm, problem) > 0


@each_solver
def test_same_answer_twice(name, lm):
    problem = problem_of(lm)
    torch.manual_seed(1)
    first = SOLVERS[name](lm, problem, Settings(seed=3))
    torch.manual_seed(2)
    second = SOLVERS[name](lm, problem, Settings(seed=3))
    with changed(lm, first.change):
        one = weights_of(lm)
    with changed(lm, second.change):
        assert same_bits(one, weights_of(lm))
    assert first.details == second.details


@each_solver
def test_the_global_random_generator_is_left_alone(name, lm):
    problem = problem_of(lm)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    SOLVERS[name](lm, problem, Settings())
    assert torch.equal(state, torch.get_rng_state())


class Stop:
    """Raises `error` at the first forward that sees the model changed (weights or modules)."""

    def __init__(self, lm, error):
        self.lm, self.error, self.fired = lm, error, False
        self.before, self.modules = weights_of(lm), [id(m) for m in lm.model.modules()]

    def __call__(self, *_):
        rewired = [id(m) for m in self.lm.model.modules()] != self.modules
        if rewired or not same_bits(self.before, weights_of(self.lm)):
            self.fired = True
            raise self.error


@each_solver
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_half_way_leaves_every_bit_and_module(name, error, lm):
    problem = problem_of(lm, rank=3)
    before, modules = weights_of(lm), list(lm.model.named_modules())
    rank_one._factor(lm, 1)
    stop = Stop(lm, error)
    handle = lm.model.register_forward_pre_hook(stop)
    with pytest.raises(error):
        SOLVERS[name](lm, problem, Settings())
    handle.remove()
    assert stop.fired
    assert same_bits(before, weights_of(lm))
    assert list(lm.model.named_modules()) == modules
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


@each_solver
def test_a_case_that_is_right_already_is_refused(name, lm):
    found = SOLVERS[name](lm, problem_of(lm, rank=0), Settings())
    assert found.change is None
    assert found.reason == matrices.ALREADY_RIGHT
    assert found.margin_min > 0


@each_solver
def test_a_wanted_margin_is_reached_or_the_case_refused(name, lm):
    problem = problem_of(lm)
    found = SOLVERS[name](lm, problem, Settings(margin=1.0))
    with changed(lm, found.change):
        assert (smallest(lm, problem) > 1.0) == (found.change is not None)


@each_solver
def test_layers_are_obeyed(name, lm):
    found = SOLVERS[name](lm, problem_of(lm), Settings(layers=(2,)))
    if isinstance(found.change, Patch):
        assert {edit.layer for edit in found.change.edits} == {2}
    else:
        assert list(found.change.before) == [f"{lm.block(2).out}.weight"]


@each_solver
@pytest.mark.parametrize("layers", [(3,), (-1,), ()])
def test_layers_that_are_not_there_are_an_error(name, layers, lm):
    with pytest.raises(MintError, match="layers must be some of 0 to 2"):
        SOLVERS[name](lm, problem_of(lm), Settings(layers=layers))


@pytest.mark.parametrize("name", ["finetune", "lora", "star"])
def test_out_of_steps_is_a_reason(name, lm, monkeypatch):
    module, cap = {"finetune": (finetune, "STEPS"), "lora": (lora, "STEPS"), "star": (star, "EPOCHS")}[name]
    monkeypatch.setattr(module, cap, 1)
    monkeypatch.setattr(module, "RATE", 1e-9)
    before = weights_of(lm)
    found = SOLVERS[name](lm, problem_of(lm), Settings())
    assert same_bits(before, weights_of(lm))
    assert found.change is None
    assert "below the wanted margin after 1 " in found.reason
    assert found.margin_min is None and found.details["margin_reached"] <= 0


@each_solver
def test_half_precision_models_are_left_as_they_were(name):
    lm = tiny_lm("llama", dtype=torch.bfloat16)
    problem = problem_of(lm)
    before = weights_of(lm)
    found = SOLVERS[name](lm, problem, Settings())
    assert same_bits(before, weights_of(lm))
    with changed(lm, found.change):
        assert (smallest(lm, problem) > 0) == (found.change is not None)
    assert same_bits(before, weights_of(lm))


# ---------------------------------------------------------------------- what they share


def test_matrix_gradients_equal_autograd(plain_lm):
    problem = problem_for(plain_lm, "\n    return")
    with torch.enable_grad(), matrices.traced(plain_lm, [0, 2]) as trace:
        _, loss = matrices.forced(plain_lm, problem.encoded)
    found = dict(trace.gradients(loss))
    weights = [plain_lm.parameter(n) for n in matrices.output_names(plain_lm, [0, 2])]
    for weight in weights:
        weight.requires_grad_()
    _, loss = matrices.forced(plain_lm, problem.encoded)
    wanted = torch.autograd.grad(loss, weights)
    for layer, gradient in zip([0, 2], wanted, strict=True):
        turned = gradient.T if plain_lm.block(layer).out_axis == 1 else gradient
        torch.testing.assert_close(found[layer], turned, rtol=1e-4, atol=1e-6)


def test_an_interrupted_restore_is_finished(lm, monkeypatch):
    names = matrices.output_names(lm, [0, 1, 2])
    before = weights_of(lm)
    calls = []
    real = type(lm).parameter

    def parameter(self, name):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, name)

    with pytest.raises(KeyboardInterrupt):
        with matrices.restored(lm, names):
            for name in names:
                lm.parameter(name).mul_(2)
            monkeypatch.setattr(type(lm), "parameter", parameter)
    assert same_bits(before, weights_of(lm))


# ---------------------------------------------------------------------- mint-paper


def test_semantic_rows_are_the_pseudo_inverse(plain_lm):
    weight = plain_lm.module(plain_lm.layout.unembedding).weight.detach().double()
    wanted = torch.linalg.pinv(weight).T[[3, 200]].float()
    torch.testing.assert_close(mint_paper.semantic_rows(plain_lm, [3, 200]), wanted, rtol=1e-4, atol=1e-6)


def test_semantic_rows_of_a_vocabulary_smaller_than_the_model(lm):
    head = torch.nn.Linear(32, 20, bias=False)
    lm._modules["small"] = head
    layout = type(lm.layout)(**{**vars(lm.layout), "unembedding": "small"})
    small = types.SimpleNamespace(module=lm.module, layout=layout)
    wanted = torch.linalg.pinv(head.weight.detach()).T[[3, 19]]
    torch.testing.assert_close(mint_paper.semantic_rows(small, [3, 19]), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_candidate_scores_equal_those_of_really_edited_weights(family):
    lm = tiny_lm(family)
    prefix = lm.encode_prompt("def add(a, b):")
    target, rival = 40, 50
    with torch.no_grad():
        direction = mint_paper._direction(lm, target, rival)
        tried = [(0, 3), (0, 7), (1, 5), (2, 0)]
        start = mint_paper._start(lm, prefix, 0)
        _, hidden = mint_paper._present(lm, start, [0, 1, 2])
        gaps = mint_paper._gaps(lm, start, hidden, tried, direction, target)
        for (layer, index), gap in zip(tried, gaps, strict=True):
            column = lm.columns(layer)[index]
            old = column.clone()
            column.copy_((old + 0.01 * direction) / 1.01)
            p = lm.logits([prefix], [[len(prefix) - 1]])[0].softmax(0)
            column.copy_(old)
            assert gap == pytest.approx(float(p.max() - p[target]), abs=1e-6)
    assert len(set(gaps)) > 1


def test_candidates_are_the_largest_gradient_times_activation(lm):
    from mint.model.hooks import override, record

    prefix, target = lm.encode_prompt("def add(a, b):"), 40
    found = mint_paper.locate(lm, prefix, target, [1, 2])
    assert len(found) == mint_paper.CANDIDATES and len(set(found)) == len(found)
    assert {layer for layer, _ in found} <= {1, 2}

    def score(layer, index):
        """Central differences of p(target), scaling the neuron at one position at a time."""
        with record(lm, [layer]) as seen, torch.no_grad():
            lm.logits([prefix], [[0]])
        total = 0.0
        for position in range(len(prefix)):
            ends = []
            for step in (1e-3, -1e-3):
                given = seen[layer].double().clone()
                given[0, position, index] *= 1 + step

                def swap(_, given=given):
                    return given.float()

                with torch.no_grad(), override(lm, {layer: swap}):
                    logits = lm.logits([prefix], [[len(prefix) - 1]])[0]
                ends.append(float(logits.double().softmax(0)[target]))
            total += ((ends[0] - ends[1]) / 2e-3) ** 2
        return total**0.5

    best, last = score(*found[0]), score(*found[-1])
    assert best > last
    others = [(1, 11), (1, 40), (2, 9), (2, 33), (2, 60)]
    assert all(score(*n) <= last * 1.05 for n in others if n not in found)


def test_a_token_that_cannot_be_repaired_leaves_no_edits(lm, monkeypatch):
    monkeypatch.setattr(mint_paper, "FACTOR", 1e-9)
    before = weights_of(lm)
    found = mint_paper.solve(lm, problem_of(lm), Settings())
    assert same_bits(before, weights_of(lm))
    assert found.change is None
    assert (found.details["edits"], found.details["repaired"], found.details["skipped"]) == (0, [], [0])
    assert "given up after 10 edits" in found.reason


@pytest.mark.parametrize("solve", [mint_paper.solve, star.solve])
def test_an_unembedding_of_another_width_is_a_reason(solve, lm, monkeypatch):
    monkeypatch.setattr(sys.modules[solve.__module__], "fits", lambda _: False)
    found = solve(lm, problem_of(lm), Settings())
    assert found.change is None and found.reason == mint_paper.UNFIT


# ---------------------------------------------------------------------- star, lora, rank-one


def test_steering_is_zero_where_the_model_is_right(lm):
    steer = star.steering(lm, [5, 9], [5, 10])
    assert not steer[0].any() and steer[1].any()
    quartiles = torch.quantile(steer[1], torch.tensor([0.25, 0.75]))
    assert float(quartiles[1] - quartiles[0]) == pytest.approx(1.0, abs=1e-3)


def test_lora_leaves_no_trace_in_the_model(lm):
    modules = list(lm.model.named_modules())
    attributes = set(vars(lm.model))
    lora.solve(lm, problem_of(lm), Settings())
    assert list(lm.model.named_modules()) == modules
    assert set(vars(lm.model)) == attributes
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lora_changes_matrices_by_rank_eight_at_most(family):
    lm = tiny_lm(family)
    found = lora.solve(lm, problem_of(lm), Settings())
    for name, after in found.change.after.items():
        sizes = torch.linalg.svdvals((after - found.change.before[name]).double())
        assert sizes[0] > 0 and sizes[lora.RANK] < 1e-4 * sizes[0]


def test_lora_starts_from_the_seed(lm):
    problem = problem_of(lm)
    one, two = (lora.solve(lm, problem, Settings(seed=seed)).change for seed in (0, 1))
    assert not same_bits(one.after, two.after)


def test_lora_without_peft_says_what_to_install(lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MintError, match=r"pip install 'mint-repair\[baselines\]'"):
        lora.solve(lm, problem_of(lm), Settings())


def test_rank_one_changes_one_matrix_by_rank_one(lm):
    found = rank_one.solve(lm, problem_of(lm), Settings())
    assert list(found.change.before) == [f"{lm.block(1).out}.weight"]
    (name,) = found.change.before
    sizes = torch.linalg.svdvals((found.change.after[name] - found.change.before[name]).double())
    assert sizes[0] > 0 and sizes[1] < 1e-4 * sizes[0]


def test_rank_one_reads_the_covariance_from_the_cache(lm, monkeypatch):
    wanted = rank_one._factor(lm, 1)
    rank_one._FACTORS.clear()
    monkeypatch.setattr(rank_one, "_second_moment", None)
    assert torch.equal(rank_one._factor(lm, 1), wanted)


@pytest.mark.parametrize("change", ["text", "weights", "layer"])
def test_rank_one_measures_anew_what_the_covariance_depends_on(lm, monkeypatch, change):
    rank_one._factor(lm, 1)
    rank_one._FACTORS.clear()
    monkeypatch.setattr(rank_one, "_second_moment", lambda *_: torch.eye(64))
    if change == "text":
        monkeypatch.setattr(rank_one, "reference_texts", lambda: ["other\n"])
    if change == "weights":
        lm.columns(0)[3].mul_(2)
    found = rank_one._factor(lm, 2 if change == "layer" else 1)
    assert torch.allclose(found, found.diagonal().mean() * torch.eye(64))


def test_rank_one_survives_a_damaged_cache(lm):
    wanted = rank_one._factor(lm, 1)
    rank_one._FACTORS.clear()
    (path,) = (cache_dir() / "statistics").glob("*.safetensors")
    path.write_bytes(b"damaged")
    assert torch.equal(rank_one._factor(lm, 1), wanted)


def test_rank_one_refuses_several_layers(lm):
    with pytest.raises(MintError, match="edits one layer, found 2"):
        rank_one.solve(lm, problem_of(lm), Settings(layers=(0, 1)))


def test_rank_one_edits_the_first_layer_too(lm):
    problem = problem_of(lm)
    found = rank_one.solve(lm, problem, Settings(layers=(0,)))
    with changed(lm, found.change):
        assert smallest(lm, problem) > 0


def test_rank_one_works_without_reference_text(lm, monkeypatch):
    monkeypatch.setattr(rank_one, "reference_texts", lambda: [])
    torch.testing.assert_close(rank_one._factor(lm, 1), torch.eye(64))
    assert rank_one.solve(lm, problem_of(lm), Settings()).change is not None


def test_rank_one_measures_the_second_moment_of_neurons(lm):
    from mint.model.hooks import record

    found = rank_one._second_moment(lm, 1, ["abc\n", "defghi\n"])
    seen = []
    for text in ("abc\n", "defghi\n"):
        with record(lm) as neurons, torch.no_grad():
            lm.logits([lm.tokenizer(text).input_ids], [[0]])
        seen.append(neurons[1][0])
    seen = torch.cat(seen)
    torch.testing.assert_close(found, seen.T @ seen / len(seen))
    ridge = rank_one._ridged(found) - found
    torch.testing.assert_close(ridge, rank_one.RIDGE * found.diagonal().mean() * torch.eye(64))


# ---------------------------------------------------------------------- controls


@pytest.fixture
def solver_at(monkeypatch):
    """Stands in for the main solver: writes down what it was asked for."""
    asked = []

    def solve_at(lm, problem, settings, neurons):
        asked.append(neurons)
        return Solution("mint", None, "nothing", details={"tried": 1})

    monkeypatch.setattr("mint.solver.solve.solve_at", solve_at)
    return asked


def value_patch(lm) -> Patch:
    column = read_neuron(lm, 1, 4)["out"]
    return Patch((make_edit(lm, 1, 4, {"out": column + torch.arange(32.0)}),), identity(lm), {"cases": []})


def test_random_draws_one_neuron_and_the_same_for_the_same_seed(lm, solver_at):
    problem = problem_of(lm)
    found = random_controls.solve(lm, problem, Settings())
    random_controls.solve(lm, problem, Settings())
    for seed in range(1, 9):
        random_controls.solve(lm, problem, Settings(seed=seed))
    assert found.solver == "random" and found.reason == "nothing"
    assert found.details == {"tried": 1, "drawn": [list(n) for n in solver_at[0]]}
    assert solver_at[0] == solver_at[1]
    assert len({tuple(n) for n in solver_at}) > 4
    assert all(len(n) == 1 and 0 <= n[0][0] < 3 and 0 <= n[0][1] < 64 for n in solver_at)


def test_random_obeys_layers_and_spares_used_neurons(lm, solver_at):
    problem = problem_of(lm)
    used = frozenset((2, i) for i in range(64) if i != 7)
    problem = Problem(problem.case, problem.encoded, used=used)
    random_controls.solve(lm, problem, Settings(layers=(2,)))
    assert solver_at == [[(2, 7)]]


def test_same_edit_goes_to_other_neurons_of_the_same_layers(lm, solver_at):
    patch = value_patch(lm)
    for seed in range(80):
        random_controls.same_edit(lm, problem_of(lm), patch, Settings(seed=seed))
    assert {n[0][0] for n in solver_at} == {1}
    assert (1, 4) not in {n[0] for n in solver_at}
    assert len({n[0] for n in solver_at}) > 20


def test_draw_gives_no_neuron_twice(lm):
    drawn = random_controls.draw(lm, [1] * 64, torch.Generator().manual_seed(0))
    assert sorted(drawn) == [(1, i) for i in range(64)]


def test_a_random_direction_moves_the_same_neuron_as_far(lm):
    patch = value_patch(lm)
    turned = random_controls.random_direction(lm, patch, seed=0)
    (old,), (new,) = patch.edits, turned.edits
    assert (new.layer, new.index, new.kind) == (1, 4, "value")
    move, wanted = new.after["out"] - new.before["out"], old.after["out"] - old.before["out"]
    assert float(move.norm()) == pytest.approx(float(wanted.norm()), rel=1e-5)
    assert abs(float(torch.cosine_similarity(move, wanted, dim=0))) < 0.7
    before = weights_of(lm)
    with applied(lm, turned):
        assert not same_bits(before, weights_of(lm))
    assert same_bits(before, weights_of(lm))


def test_a_random_direction_depends_on_the_seed_alone(lm):
    patch = value_patch(lm)
    one, two, other = (
        random_controls.random_direction(lm, patch, s).edits[0].after["out"] for s in (0, 0, 1)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_a_random_direction_of_a_rewrite_keeps_when_the_neuron_fires(lm):
    present = read_neuron(lm, 1, 4)
    edit = make_edit(lm, 1, 4, {role: torch.randn(32) for role in present})
    turned = random_controls.random_direction(lm, Patch((edit,), identity(lm)), seed=0).edits[0]
    assert torch.equal(turned.after["gate"], edit.after["gate"])
    assert torch.equal(turned.after["up"], edit.after["up"])
    assert float(turned.after["out"].norm()) == pytest.approx(float(edit.after["out"].norm()), rel=1e-5)
    assert not torch.equal(turned.after["out"], edit.after["out"])


@pytest.mark.real
@pytest.mark.parametrize("name", MATRICES)
def test_baselines_that_change_matrices_repair_a_real_line(name, real_lm):
    case = Case("c1", "# sort list l in descending order\n", "l.sort(reverse=True)\n")
    problem = Problem(case, real_lm.encode(case))
    before = weights_of(real_lm)
    found = SOLVERS[name](real_lm, problem, Settings())
    put_in(real_lm, found.change)
    text = real_lm.write(problem.encoded, case)
    take_out(real_lm, found.change)
    assert text == case.target
    assert same_bits(before, weights_of(real_lm))
