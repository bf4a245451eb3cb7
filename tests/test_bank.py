"""A bank of patches: added, kept apart, written into a model, checked as regression tests; patches taken apart, recovered."""

import json
import threading
from dataclasses import replace

import pytest
import torch

from mint import bank as B
from mint import patch as P
from mint.case import Case
from mint.cli import main
from mint.errors import PatchError
from mint.model.loading import load_lm
from mint.patch import compare
from mint.patch.names import describe
from mint.solver.problem import Problem, Settings
from mint.solver.solve import solve
from tests.conftest import same_bits, tiny_lm, weights_of
from tests.test_checkpoint import hashes, saved
from tests.test_patch import random_patch

CASES = [Case("one", "# sort the list\n", "ok\n"), Case("two", "# close the file\n", "no\n")]


def repaired(lm, case, **settings) -> P.Patch:
    solution = solve(lm, Problem(case, lm.encode(case)), Settings(where="idle", **settings))
    assert solution.change is not None, solution.reason
    places = [{"layer": e.layer, "index": e.index, "kind": e.kind} for e in solution.change.edits]
    record = {"id": case.id, "prompt": case.prompt, "target": case.target, "neurons": places}
    info = solution.change.info | {"cases": [record]}
    return replace(solution.change, base=solution.change.base | {"layout": describe(lm)}, info=info)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A saved model and two patches of it, made without knowing of each other, as files."""
    home = tmp_path_factory.mktemp("bank")
    model = saved(home / "m")
    lm = load_lm(str(model))
    files = [P.save(repaired(lm, c), home / f"{c.id}.safetensors") for c in CASES]
    return model, files


def test_a_bank_is_applied_checked_and_reverted(made, tmp_path, capsys):
    model, files = made
    clean, bank = hashes(model), tmp_path / "bank"
    for file in files:
        assert main(["bank", "add", str(bank), str(file), "--model", str(model)]) == 0
    assert [e.name for e in B.entries(bank)] == ["one", "two"]
    places = [(e.layer, e.index) for p in B.patches(bank).values() for e in p.edits]
    assert len(set(places)) == len(places)
    capsys.readouterr()
    assert main(["bank", "check", str(bank), "--model", str(model), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["broken"] == [] and all(a["holds"] for many in checked["cases"].values() for a in many)
    wheres = {"own", "others", "elsewhere", "elsewhere_tokens"}
    assert checked["fires"]["one"]["own"] == 1.0 and set(checked["fires"]["one"]) == wheres
    assert checked["matrix"]["one"]["one"] == 1.0
    assert checked["matrix"]["one"]["two"] == checked["fires"]["one"]["others"]
    picture = tmp_path / "fires.svg"
    assert main(["bank", "check", str(bank), "--model", str(model), "--plot", str(picture)]) == 0
    assert picture.read_text().startswith("<svg")
    assert main(["bank", "check", str(bank), "--model", str(model), "--plot", str(picture)]) == 1
    assert "fires.svg exists" in capsys.readouterr().err
    assert main(["bank", "apply", str(bank), "--model", str(model), "--out", str(tmp_path / "fixed")]) == 0
    lm = load_lm(str(tmp_path / "fixed"))
    assert [lm.write(lm.encode(c), c) for c in CASES] == [c.target for c in CASES]
    assert main(["log", str(tmp_path / "fixed")]) == 0
    assert "# close the file" in capsys.readouterr().out
    assert main(["bank", "revert", str(bank), "--model", str(tmp_path / "fixed"), "--in-place"]) == 0
    assert hashes(tmp_path / "fixed") == clean
    assert main(["bank", "list", str(bank)]) == 0 and main(["bank", "log", str(bank)]) == 0


def test_a_broken_case_is_named_and_exits_three(made, tmp_path, capsys):
    model, files = made
    lm = load_lm(str(model))
    patch = P.load(files[0])
    weak = P.save(P.scale(patch, 0.0), tmp_path / "weak.safetensors")
    B.add(tmp_path / "bank", weak)
    assert main(["bank", "check", str(tmp_path / "bank"), "--model", str(model)]) == 3
    assert "1 cases no longer hold: weak: one" in capsys.readouterr().err
    assert same_bits(weights_of(lm), weights_of(load_lm(str(model))))


def test_what_does_not_go_into_a_bank(made, tmp_path, lm):
    bank = tmp_path / "bank"
    first = random_patch(lm, [(1, 7, "rewrite")], seed=1)
    one, two = (
        P.save(p, tmp_path / f"{n}.safetensors")
        for n, p in (("a", first), ("b", random_patch(lm, [(1, 7, "rewrite")], seed=2)))
    )
    B.add(bank, one)
    with pytest.raises(PatchError, match="already; give another --name"):
        B.add(bank, one)
    with pytest.raises(PatchError, match="this very patch already"):
        B.add(bank, one, "other")
    with pytest.raises(PatchError, match="add it with --model"):
        B.add(bank, two)
    with pytest.raises(PatchError, match="has no patch 'x'; it has a"):
        B.patches(bank, ["x"])
    with pytest.raises(PatchError, match="holds no patches"):
        B.patches(tmp_path / "empty")
    (bank / "a.safetensors").write_bytes(two.read_bytes())
    with pytest.raises(PatchError, match="not the file that was added"):
        B.patches(bank)
    (bank / B.INDEX).write_text("{}")
    with pytest.raises(PatchError, match="cannot be read"):
        B.entries(bank)


def test_a_value_edit_of_a_busy_neuron_fires_on_ordinary_code(made):
    model, files = made
    lm = load_lm(str(model))
    one = P.load(files[0])
    case = {"id": "busy", "prompt": "x = 1\n", "target": "y"}
    busy = replace(random_patch(lm, [(0, 0, "value"), (1, 1, "value")]), info={"cases": [case]})
    code = [lm.encode_prompt(text) for text in ("def f(x):\n", "import os\n")]
    checked = B.check(lm, {"one": one, "busy": busy}, code)
    assert checked.fires["busy"]["elsewhere"] == 1.0 and checked.fires["busy"]["elsewhere_tokens"] > 0.5
    assert checked.matrix["busy"]["one"] == 1.0 and "busy: busy" in checked.broken


def test_patches_of_another_model_do_not_go_into_a_bank(made, tmp_path):
    model, files = made
    other = P.save(random_patch(tiny_lm("llama", seed=5)), tmp_path / "other.safetensors")
    B.add(tmp_path / "bank", files[0])
    with pytest.raises(PatchError, match="for another model than patch 1"):
        B.add(tmp_path / "bank", other)
    with pytest.raises(PatchError, match="made on another model"):
        B.add(tmp_path / "empty", other, lm=load_lm(str(model)))
    assert not (tmp_path / "empty").exists() and len(B.entries(tmp_path / "bank")) == 1


def test_two_who_add_at_once_lose_nothing(made, tmp_path):
    model, files = made
    failures, lm = [], load_lm(str(model))

    def add(number):
        try:
            file = P.save(P.scale(P.load(files[0]), 1 + number), tmp_path / f"p{number}.safetensors")
            B.add(tmp_path / "bank", file, lm=lm, idle=lambda layer: range(64))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=add, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(B.patches(tmp_path / "bank")) == 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "starcoder2"])
def test_a_patch_is_recovered_from_two_models(family):
    before, after = tiny_lm(family), tiny_lm(family)
    patch = random_patch(before)
    P.apply(after, patch)
    found = compare.between(before, after)
    assert [(e.layer, e.index, e.kind) for e in found.edits] == [
        (e.layer, e.index, e.kind) for e in patch.edits
    ]
    P.apply(before, found)
    assert same_bits(weights_of(before), weights_of(after))


def test_two_models_that_differ_elsewhere_are_no_patch():
    before, after = tiny_lm("llama"), tiny_lm("llama")
    with pytest.raises(PatchError, match="differ in 0 neurons"):
        compare.between(before, after)
    with torch.no_grad():
        after.parameter("model.layers.0.self_attn.q_proj.weight").add_(1)
    with pytest.raises(PatchError, match="belongs to no neuron"):
        compare.between(before, after)


def test_a_composed_patch_comes_apart_again(made, tmp_path, capsys):
    model, files = made
    whole = tmp_path / "whole.safetensors"
    assert main(["compose", *map(str, files), "--model", str(model), "--out", str(whole)]) == 0
    assert main(["split", str(whole), "--out", str(tmp_path / "parts")]) == 0
    parts = [P.load(p) for p in sorted((tmp_path / "parts").iterdir())]
    assert [p.info["cases"][0]["id"] for p in parts] == ["one", "two"]
    assert P.to_bytes(P.compose(parts))
    capsys.readouterr()
    assert main(["diff", str(files[0]), str(whole), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["neurons"]
    assert [r["only"] for r in rows].count(2) >= 1 and any(r.get("same") for r in rows)
