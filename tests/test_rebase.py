"""A patch carried over to a newer version of its model, and many independent patches put together."""

import json

import pytest
import torch

from mint import patch as P
from mint.case import Case
from mint.cli import main
from mint.patch.record import ask, cases_of
from mint.patch.relocate import relocate
from mint.rebase import rebase
from mint.session import Wishes, repair
from mint.solver import in_contexts
from mint.solver.problem import Problem, Settings
from mint.solver.solve import solve
from tests.conftest import same_bits, tiny_lm, weights_of
from tests.test_bank import CASES, repaired
from tests.test_checkpoint import saved


def newer(lm, size=1e-3):
    """The same model a little further trained: every matrix moved a bit."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return lm


def test_the_same_neuron_is_solved_again_on_a_newer_model():
    lm = tiny_lm("llama")
    patch = repaired(lm, CASES[0])
    other = newer(tiny_lm("llama"))
    clean = weights_of(other)
    done = rebase(other, patch)
    assert done.outcome.success and same_bits(clean, weights_of(other))
    (row,) = done.moved
    assert row["stayed"] == row["before"] == row["after"] and row["cosine"][0] > 0.5 and row["needed"]
    with P.applied(other, done.outcome.patch):
        assert all(a.holds for a in ask(other, cases_of(done.outcome.patch)))


@pytest.mark.real
def test_a_patch_that_learnt_contexts_learns_them_again(real_lm, monkeypatch):
    case = Case("sort", "# sort list l in descending order\n", "l.sort(reverse=True)\n")
    wishes = Wishes(contexts=False, effects=False)
    made = repair(real_lm, [case], wishes, in_contexts.solve)
    assert made.patch and made.repairs[0].solution.details["contexts"]
    asked = []
    attempt = in_contexts.attempt
    monkeypatch.setattr(in_contexts, "attempt", lambda *a: asked.append(a[-1]) or attempt(*a))
    done = rebase(real_lm, made.patch)
    assert asked == [[(e.layer, e.index) for e in made.patch.edits]]
    assert done.outcome.repairs[0].solution.details["contexts"]
    assert done.moved[0]["stayed"] == done.moved[0]["before"]
    assert done.outcome.patch.info["solver"] == "contexts"


def test_a_case_that_the_newer_model_writes_needs_no_patch():
    lm = tiny_lm("llama")
    patch = repaired(lm, CASES[0])
    other = tiny_lm("llama")
    P.apply(other, patch)
    done = rebase(other, patch)
    assert done.outcome.success and done.outcome.patch is None and not done.moved[0]["needed"]


def test_the_command_says_what_moved(tmp_path, capsys):
    model = saved(tmp_path / "m", dtype=torch.bfloat16)
    lm = tiny_lm("llama")
    file = P.save(repaired(lm, CASES[0]), tmp_path / "f32.safetensors")
    out = tmp_path / "bf16.safetensors"
    assert main(["rebase", str(file), "--model", str(model), "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["success"] and result["cases"][0]["stayed"]
    assert P.load(out).dtype == torch.bfloat16
    assert main(["apply", str(out), "--model", str(model), "--in-place"]) == 0


TEN = [
    ("# sort list l in descending order\n", "l.sort(reverse=True)\n"),
    ("# reverse string s\n", "s[::-1]\n"),
    ("# get the current working directory\n", "os.getcwd()\n"),
    ("# remove duplicates from list a\n", "list(set(a))\n"),
    ("# read file f line by line\n", "for line in f:\n"),
    ("# merge dictionaries x and y\n", "{**x, **y}\n"),
    ("# largest value of dict d\n", "max(d.values())\n"),
    ("# split string s on commas\n", "s.split(',')\n"),
    ("# flatten list of lists x\n", "[z for y in x for z in y]\n"),
    ("# count words in text t\n", "len(t.split())\n"),
]


@pytest.mark.real
def test_ten_independent_repairs_of_the_real_model_hold_together(real_lm):
    made = []
    for number, (prompt, target) in enumerate(TEN):
        case = Case(f"case {number}", prompt, target)
        solution = solve(real_lm, Problem(case, real_lm.encode(case)), Settings(where="idle"))
        assert solution.change is not None, (prompt, solution.reason)
        record = {"id": case.id, "prompt": prompt, "target": target}
        made.append(
            P.Patch(solution.change.edits, solution.change.base, solution.change.info | {"cases": [record]})
        )
    moved, moves = relocate(real_lm, made)
    whole = P.compose(moved)
    assert len(whole.edits) == sum(len(p.edits) for p in made)
    with P.applied(real_lm, whole):
        answers = ask(real_lm, cases_of(whole))
    assert [a.written for a in answers] == [t for _, t in TEN], moves
