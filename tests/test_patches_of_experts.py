"""Patches of routed experts: a neuron is (layer, expert, index) wherever patches meet, move or are compared."""

import json
from dataclasses import replace

import pytest
import torch

from mint import bank as B
from mint import patch as P
from mint.case import Case
from mint.cli import main
from mint.patch import compare
from mint.patch.names import describe
from mint.patch.record import ask, cases_of
from mint.patch.relocate import collisions, relocate
from mint.rebase import rebase
from mint.reference import moments
from mint.reference.texts import passages
from mint.solver.problem import Problem, Settings
from mint.solver.solve import solve
from tests.conftest import same_bits, tiny_lm, weights_of
from tests.test_checkpoint import saved

ROUTED = ("mixtral", "granitemoe", "gpt_oss")


@pytest.fixture(autouse=True)
def short_reference(monkeypatch):
    monkeypatch.setattr(moments, "passages", lambda lm, texts: [p[:48] for p in passages(lm, texts)[:6]])
    monkeypatch.setattr(moments, "reference_lines", lambda: ["x = 1\n", "def f():\n"])


def rewritten(lm, expert, index, seed=1, **info):
    """A random rewrite of a neuron of the last layer's expert; its biases stay."""
    layer = max(lm.layout.experts)
    torch.manual_seed(seed)
    now = P.read_neuron(lm, layer, index, expert=expert)
    after = {r: v if r.endswith("bias") else torch.randn(v.shape) for r, v in now.items()}
    record = {"id": f"e{expert}.{index}", "prompt": "p", "target": f"{seed}"}
    record["neurons"] = [{"layer": layer, "index": index, "kind": "rewrite", "expert": expert}]
    edit = P.make_edit(lm, layer, index, after, expert)
    base = P.identity(lm) | {"layout": describe(lm)}
    return P.Patch((edit,), base, {"cases": [record]} | info)


@pytest.fixture(params=ROUTED)
def mixture(request):
    return tiny_lm(request.param)


def test_the_same_index_of_two_experts_is_two_neurons(mixture):
    lm = mixture
    one, other = rewritten(lm, 0, 3, 1), rewritten(lm, 1, 3, 2)
    assert collisions([one, other]) == []
    whole = P.compose([one, other])
    assert [e.expert for e in whole.edits] == [0, 1]
    rows = compare.diff(one, whole)
    assert [(r["expert"], r["only"]) for r in rows] == [(0, None), (1, 2)] and rows[0]["same"]
    assert [p.edits[0].place for p in compare.split(whole)] == [one.edits[0].place, other.edits[0].place]
    clean = weights_of(lm)
    with P.applied(lm, whole):
        P.check(lm, whole, "after")
    assert same_bits(clean, weights_of(lm))


def test_a_rewrite_that_collides_moves_inside_its_expert(mixture):
    lm = mixture
    layer = max(lm.layout.experts)
    one = rewritten(lm, 1, 3, 1)
    two = rewritten(lm, 1, 3, 2, spare=[[layer, 3, 1], [layer, 5], [layer, 7, 0], [layer, 9, 1]])
    (_, moved), (move,) = relocate(lm, [one, two])
    assert (move.layer, move.expert, move.index, move.to) == (layer, 1, 3, 9)
    assert move.told == f"layer {layer}, expert 1, neuron 3 moved to neuron 9"
    edit = moved.edits[0]
    assert edit.neuron == (layer, 9, 1) and moved.info["cases"][0]["neurons"][0]["index"] == 9
    assert all(torch.equal(edit.after[r], two.edits[0].after[r]) for r in ("out", "gate"))
    with P.applied(lm, P.compose([one, moved])):
        pass


@pytest.mark.parametrize("family", [*ROUTED, "deepseek_v3", "nemotron_h_moe"])
def test_a_patch_of_an_expert_is_recovered_from_two_models(family):
    before, after = tiny_lm(family), tiny_lm(family)
    patch = rewritten(before, 2, 5)
    P.apply(after, patch)
    found = compare.between(before, after)
    assert [(e.place, e.kind) for e in found.edits] == [(e.place, e.kind) for e in patch.edits]
    P.apply(before, found)
    assert same_bits(weights_of(before), weights_of(after))


def solved(lm, case):
    solution = solve(lm, Problem(case, lm.encode(case)), Settings(where="idle"))
    assert solution.change is not None, solution.reason
    record = {"id": case.id, "prompt": case.prompt, "target": case.target}
    record["neurons"] = [e.named() for e in solution.change.edits]
    return replace(
        solution.change,
        base=solution.change.base | {"layout": describe(lm)},
        info=solution.change.info | {"cases": [record]},
    )


CASES = [Case("one", "ab c", "q"), Case("two", "xy z", "k")]


def test_a_bank_of_experts_patches_is_checked_and_applied(tmp_path, capsys):
    model = saved(tmp_path / "m", "mixtral")
    lm = tiny_lm("mixtral")
    made = [solved(lm, case) for case in CASES]
    assert all(e.expert is not None for p in made for e in p.edits)
    bank = str(tmp_path / "bank")
    for patch, case in zip(made, CASES, strict=True):
        file = P.save(patch, tmp_path / f"{case.id}.safetensors")
        assert main(["bank", "add", bank, str(file), "-m", str(model)]) == 0
    capsys.readouterr()
    assert main(["bank", "check", bank, "-m", str(model), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["broken"] == [] and checked["fires"]["one"]["own"] == 1.0
    assert main(["bank", "apply", bank, "-m", str(model), "--in-place"]) == 0
    capsys.readouterr()
    assert main(["log", str(model)]) == 0
    assert ", expert " in capsys.readouterr().out
    assert len(B.entries(bank)) == 2


def test_an_experts_patch_is_solved_again_on_a_newer_model():
    lm, other = tiny_lm("mixtral"), tiny_lm("mixtral")
    patch = solved(lm, CASES[0])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1e-4 * torch.randn(parameter.shape, generator=generator))
    done = rebase(other, patch)
    stayed = {(n["layer"], n["expert"], n["index"]) for n in done.moved[0]["stayed"]}
    assert done.outcome.success and stayed == {e.place for e in patch.edits}
    with P.applied(other, done.outcome.patch):
        assert all(a.holds for a in ask(other, cases_of(done.outcome.patch)))
