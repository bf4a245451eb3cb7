"""A patch over its scale: how often its prompts come out right, generated, and what else changes."""

import json
from dataclasses import replace

import pytest

from mint import patch as P
from mint.cli import main
from mint.errors import MintError
from mint.evaluation import strength
from mint.model.loading import load_lm
from tests.conftest import same_bits, tiny_lm, weights_of
from tests.test_bank import CASES, repaired
from tests.test_checkpoint import saved
from tests.test_patch import random_patch


def test_nothing_at_zero_and_right_at_one():
    lm = tiny_lm("llama")
    patch = repaired(lm, CASES[0])
    record = patch.info["cases"][0] | {"rephrasings": [CASES[0].prompt, "# quite another thing\n"]}
    patch = replace(patch, info=patch.info | {"cases": [record]})
    clean = weights_of(lm)
    found = strength.over_scale(lm, patch, (0.0, 1.0, 2.0))
    assert same_bits(clean, weights_of(lm))
    assert [one.right for one in found] == [0, 1, 1] and {one.cases for one in found} == {1}
    assert [one.rephrasings_right for one in found][:2] == [0, 1] and found[0].rephrasings == 2
    assert found[0].argmax_unchanged == 1.0 and found[0].kl_mean == 0.0
    assert found[1].argmax_unchanged < 1.0 or found[1].kl_mean > 0


def test_a_patch_without_prompts_cannot_be_measured(lm):
    with pytest.raises(MintError, match="records no cases and no rules"):
        strength.over_scale(lm, random_patch(lm))


def test_the_command_measures_draws_and_writes(tmp_path, capsys):
    model = saved(tmp_path / "m")
    file = str(P.save(repaired(load_lm(str(model)), CASES[0]), tmp_path / "fix.safetensors"))
    picture, half = tmp_path / "scale.svg", tmp_path / "half.safetensors"
    assert main(["scale", file, "-m", str(model), "--plot", str(picture), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [r["factor"] for r in result["scales"]] == list(strength.FACTORS)
    assert "own prompts right" in picture.read_text() and result["plot"] == str(picture)
    assert main(["scale", file, "0.5", "--out", str(half), "-m", str(model)]) == 0
    assert P.load(half).info["scaled"] == 0.5
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["0.5"], 2, "go together"),
        (["--out", "x"], 2, "go together"),
        ([], 2, "or --model to measure"),
        (["--plot", "x.svg"], 2, "--plot needs --model"),
        (["-m", "nowhere", "--plot", "x.gif"], 1, "ending in .png or .svg"),
    ],
)
def test_options_that_make_no_sense(tmp_path, lm, capsys, options, code, told):
    file = str(P.save(random_patch(lm), tmp_path / "fix.safetensors"))
    assert main(["scale", file, *options]) == code
    assert told in " ".join(capsys.readouterr().err.split())
