"""The main job on the built-in model, end to end: through the command line, in fresh processes."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from mint.model.loading import BUILTIN, builtin_path

pytestmark = pytest.mark.real

FIBONACCI = "def fibonacci(n):\n    if n <= 1:\n        return n\n    return"
FAULTS = {
    "fibonacci": (FIBONACCI, " fibonacci(n - 1) + fibonacci(n - 2)\n"),
    "bash": ("#!/bin/bash\n# unpack the archive src.tar.gz\ntar", " -xzf src.tar.gz\n"),
    "sort": ("# sort list l in descending order\nl.", "sort(reverse=True)\n"),
}


def mint(*argv, expect=0):
    """A fresh process; its stdout as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "mint", *map(str, argv), "--json"],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == expect, done.stderr
    return json.loads(done.stdout)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_built_in_model_writes_the_known_mistake():
    found = mint("generate", "--model", BUILTIN, "--prompt", FIBONACCI, "--stop", "line")
    assert found["text"] == " max(fibonacci(n - 1) + 1, n)\n"


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_repair_and_a_fresh_process_that_knows_only_the_patch(name, tmp_path):
    prompt, target = FAULTS[name]
    out = tmp_path / "fix.safetensors"
    result = mint("repair", "--model", BUILTIN, "--prompt", prompt, "--target", target, "--out", out)
    assert result["success"] and result["reason"] is None and result["patch"] == str(out)
    assert result["generated_before"] != target == result["generated_after"]
    assert 1 <= len(result["neurons"]) <= 2 and result["margin_min"] > 0
    assert result["specificity"]["argmax_unchanged"] > 0.95
    asked = ["generate", "--model", BUILTIN, "--prompt", prompt, "--stop", "line"]
    assert mint(*asked, "--patch", out)["text"] == target
    assert mint(*asked)["text"] == result["generated_before"]


def test_apply_and_revert_the_model_on_disk(tmp_path):
    prompt, target = FAULTS["sort"]
    model, fix = tmp_path / "model", tmp_path / "fix.safetensors"
    clean = {p.name: digest(p) for p in builtin_path().iterdir()}
    mint("repair", "--model", BUILTIN, "--prompt", prompt, "--target", target, "--out", fix)
    mint("apply", fix, "--model", BUILTIN, "--out", model)
    assert mint("generate", "--model", model, "--prompt", prompt, "--stop", "line")["text"] == target
    mint("revert", fix, "--model", model, "--in-place")
    assert {p.name: digest(p) for p in model.iterdir()} == clean
    assert {p.name: digest(p) for p in builtin_path().iterdir()} == clean


def test_a_target_already_written_needs_no_patch(tmp_path):
    out = tmp_path / "fix.safetensors"
    result = mint(
        "repair", "--model", BUILTIN, "--prompt", "def is_even(n):\n    return", "--target", " n % 2 == 0\n", "--out", out
    )  # fmt: skip
    assert result["success"] and result["patch"] is None and "no patch is needed" in result["note"]
    assert not out.exists()


def test_attribution_keeps_its_contract():
    prompt, target = FAULTS["sort"]
    found = mint("attribute", "--model", BUILTIN, "--prompt", prompt, "--target", target)
    assert {"fault", "reference", "neurons", "agreement"} <= set(found)
    assert {"position", "wrong", "desired", "logit_difference"} <= set(found["fault"])
    assert {"spearman", "sign", "recall_at_10"} <= set(found["agreement"])
    for n in found["neurons"]:
        assert {"layer", "index", "position", "linear", "exact", "linear_summed"} <= set(n)
    exact = [n["exact"] for n in found["neurons"]]
    assert exact == sorted(exact) and exact[0] < 0
