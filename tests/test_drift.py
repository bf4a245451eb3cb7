"""Many repairs in a row: earlier ones re-tested by generation, the way back bit for bit, a rule for giving up."""

from dataclasses import replace

import pytest
import torch

from mint.case import Case
from mint.errors import MintError
from mint.evaluation import drift, measuring
from mint.evaluation.drift import Drift, InARow
from mint.evaluation.ledger import read_rows
from mint.evaluation.measuring import Options
from mint.patch import Patch, identity, make_edit
from mint.solver.problem import Settings, Solution
from tests.conftest import same_bits, tiny_lm, weights_of
from tests.fakes import REGISTRY, column

WORDS = ["ab", "cd", "xy", "q", "zz", "0"]
CASES = [Case(f"case{i}", f"# {w} {i}\n", f"{w}\n") for i, w in enumerate(WORDS)]
CODE = ["def f(x):\n    return x\n"]
OPTIONS = Options(neighbours=2, outputs=0, ordinary_tokens=12)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def model():
    return tiny_lm("llama")


def sequence(lm, folder, cases=CASES[:4], solver=column, options=None, pool=CASES, key="k", **limits):
    encoded, _ = measuring.usable(lm, pool, OPTIONS)
    stick = measuring.yardstick(lm, pool, encoded, others=CASES[5:], code=CODE, options=OPTIONS, seed=0)
    limits = replace(options or Drift(others=2, protect=False), **limits)
    return drift.run(lm, cases, stick, InARow("it", solver, Settings(), folder, key, limits))


def test_stops_measure_everything_and_the_model_comes_back(model, tmp_path):
    before = weights_of(model)
    found = sequence(model, tmp_path)
    assert same_bits(before, weights_of(model))
    assert [r["repairs"] for r in found["rows"]] == [1, 2, 4]
    first = found["rows"][0]
    assert first["succeeded"] == 1 and first["retained_exact_match"] == 1 and first["lost"] == []
    assert first["measured_on"] == "same_task"
    for row in found["rows"]:
        assert 0 <= row["argmax_unchanged"] <= 1 and row["perplexity_ratio"] > 0 and row["kl_mean"] > 0
    norms = [r["norm"] for r in found["rows"]]
    assert norms == sorted(norms) and norms[0] > 0 and 0 < found["rows"][-1]["norm_share"]
    assert found["revert"] == {"reverse_order": True, "any_order": True, "composed": True}
    assert found["stopped"] is None


def test_retained_is_what_generation_says(model, tmp_path):
    """Recompute the last stop by hand: apply the stored patches in order and write every case."""
    from mint.patch import apply, load, revert

    last = sequence(model, tmp_path)["rows"][-1]
    steps = [r for r in read_rows(tmp_path / "steps.jsonl") if ":stop:" not in r["key"]]
    patches = [
        load(tmp_path / "patches" / f"{measuring.digest(r['key'])}.safetensors") for r in steps if r["patch"]
    ]
    for patch in patches:
        apply(model, patch)
    done = [c for c, r in zip(CASES, steps, strict=False) if r["succeeded"]]
    lost = [c.id for c in done if model.write(model.encode(c), c) != c.target]
    for patch in reversed(patches):
        revert(model, patch)
    assert last["lost"] == lost
    assert last["retained_exact_match"] == 1 - len(lost) / len(done)
    assert last["exact_match_all"] == (len(done) - len(lost)) / 4


def test_solvers_are_told_what_came_before(model, tmp_path):
    told = []

    def watching(lm, problem, settings):
        told.append((len(problem.earlier), len(problem.used)))
        return column(lm, problem, settings)

    sequence(model, tmp_path, CASES[:3], watching)
    assert told == [(0, 0), (1, 4), (2, 8)]


def test_a_change_that_does_not_repair_is_taken_out_again(model, tmp_path):
    found = sequence(model, tmp_path, CASES[:2], REGISTRY["useless"])
    last = found["rows"][-1]
    assert (last["succeeded"], last["retained_exact_match"], last["exact_match_all"]) == (0, None, 0)
    assert (last["argmax_unchanged"], last["norm"]) == (1, 0)
    assert all(
        "the edited model writes" in r["reason"]
        for r in read_rows(tmp_path / "steps.jsonl")
        if ":stop:" not in r["key"]
    )


def test_whole_matrices_come_back_too(model, tmp_path):
    before = weights_of(model)
    found = sequence(model, tmp_path, CASES[:2], REGISTRY["matrix"])
    assert found["rows"][-1]["succeeded"] == 2 and found["rows"][-1]["norm"] > 0
    assert found["revert"] == {"reverse_order": True, "any_order": None, "composed": None}
    assert same_bits(before, weights_of(model))


def test_joint_edits_of_one_neuron_revert_in_reverse_and_composed(model, tmp_path):
    """A solver that re-edits the neurons of earlier repairs: no shuffled order exists, the others hold."""

    @torch.no_grad()
    def joint(lm, problem, settings):
        solution = column(lm, replace(problem, used=frozenset()), settings)
        again = make_edit(lm, 0, 0, {"out": lm.columns(0)[0] * 1.001})
        return Solution("joint", Patch((*solution.change.edits, again), identity(lm)))

    before = weights_of(model)
    found = sequence(model, tmp_path, CASES[:2], joint)
    assert found["rows"][-1]["succeeded"] == 2
    assert found["revert"] == {"reverse_order": True, "any_order": None, "composed": True}
    assert same_bits(before, weights_of(model))


def test_an_interrupted_sequence_goes_on_and_says_the_same(model, tmp_path):
    whole = sequence(model, tmp_path / "whole")
    calls = []

    def interrupted(lm, problem, settings):
        calls.append(problem.case.id)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return column(lm, problem, settings)

    before = weights_of(model)
    with pytest.raises(KeyboardInterrupt):
        sequence(model, tmp_path / "part", solver=interrupted)
    assert same_bits(before, weights_of(model))
    again = sequence(model, tmp_path / "part", solver=interrupted)
    assert again == whole
    assert calls == ["case0", "case1", "case2", "case2", "case3"]


def test_a_lost_patch_file_is_made_again(model, tmp_path):
    whole = sequence(model, tmp_path)
    for file in (tmp_path / "patches").iterdir():
        file.unlink()
    assert sequence(model, tmp_path) == whole
    assert len(list((tmp_path / "patches").iterdir())) == 4


def test_a_failing_solver_never_ends_the_sequence(model, tmp_path):
    found = sequence(model, tmp_path, CASES[:3], REGISTRY["broken"])
    assert found["rows"][-1]["repairs"] == 3 and found["rows"][-1]["succeeded"] == 2


@pytest.mark.parametrize(
    "solver, limits, line, after",
    [
        ("column", {"max_perplexity_ratio": 0.0}, "perplexity of held-out code rose", 1),
        ("column", {"max_norm_share": 0.0}, "of the edited matrices' norm", 1),
        ("column", {"min_retained": 1.1}, "of the earlier repairs still hold", 1),
        ("nothing", {"max_failures": 2}, "2 cases in a row without a repair", 2),
    ],
)
def test_stop_rules(model, tmp_path, solver, limits, line, after):
    found = sequence(model, tmp_path, solver=REGISTRY[solver], **limits)
    assert line in found["stopped"]
    assert found["rows"][-1]["repairs"] == after


def test_without_lines_outside_the_sequence_others_are_measured(model, tmp_path):
    found = sequence(model, tmp_path, CASES[:2], pool=CASES[:2])
    assert found["rows"][0]["measured_on"] == "other_tasks"


def test_pass_at_1_runs_the_programs(model):
    programs = [Case("p1", "def f():\n", "    return 1\n"), Case("p2", "def g():\n", "    return 2\n")]
    tests = {
        "p1": {"before": "pass\n#", "after": "\nassert True\n"},
        "p2": {"before": "#", "after": "\nassert False\n"},
    }
    # The tiny model writes noise; behind a '#', noise up to its first newline is a comment.
    model.generate = lambda prompts, n, stops: [model.tokenizer(" noise").input_ids for _ in prompts]
    assert drift.pass_at_1(model, programs, tests, 4) == 0.5
    with pytest.raises(MintError, match="'p1' has no tests"):
        drift.pass_at_1(model, programs, {}, 4)


def test_pass_at_1_is_measured_before_and_at_every_stop_and_only_once(model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(drift, "pass_at_1", lambda *_: asked.append(1) or len(asked) / 8)
    programs = {"programs": (Case("p", "def f():\n", "    return 1\n"),), "program_tests": {"p": {}}}
    rows = sequence(model, tmp_path, **programs)["rows"]
    assert [r["pass_at_1"] for r in rows] == [0.25, 0.375, 0.5]
    assert {r["pass_at_1_before"] for r in rows} == {0.125}
    assert sequence(model, tmp_path, **programs)["rows"] == rows and len(asked) == 4


def test_a_repair_that_breaks_an_earlier_one_is_refused_as_for_a_user(model, tmp_path):
    """The same sequence measured as the editing literature does loses repairs; protected it refuses instead."""
    loose = sequence(model, tmp_path / "loose")["rows"][-1]
    assert loose["succeeded"] == 4 and loose["lost"]
    kept = sequence(model, tmp_path / "kept", protect=True)["rows"][-1]
    assert kept["retained_exact_match"] == 1 and kept["lost"] == [] and kept["succeeded"] < 4
    steps = [r for r in read_rows(tmp_path / "kept" / "steps.jsonl") if ":stop:" not in r["key"]]
    refused = [r["reason"] for r in steps if not r["succeeded"]]
    assert refused and all(r.startswith("the edit breaks an earlier repair") for r in refused)
