"""A habit of the built-in model, mined from Python's own library, repaired and checked: through the command line."""

import sysconfig

import pytest

from mint.model.loading import BUILTIN
from tests.test_real import mint

pytestmark = pytest.mark.real


def test_a_habit_is_mined_repaired_and_checked(tmp_path):
    rule, fix = tmp_path / "clock.jsonl", tmp_path / "clock.safetensors"
    library = sysconfig.get_path("stdlib")
    texts = ["--wrong", "time.time()", "--right", "time.perf_counter()", "--lines", 6, "--limit", 12]
    left_out = [x for name in ("test", "tests", "site-packages", "idlelib") for x in ("--exclude", name)]
    mined = mint("rule", "mine", "--model", BUILTIN, *texts, "--from", library, *left_out, "--out", rule)
    assert mined["fault"] == 12 and mined["near"] >= 12
    repaired = mint("repair", "--model", BUILTIN, "--rule", rule, "--learn", 5, "--accept", 0.4, "--out", fix)
    assert repaired["success"] and 1 <= len(repaired["neurons"]) <= 2
    assert repaired["learn"]["right_after"] == repaired["learn"]["cases"] >= 4
    assert repaired["unseen"]["right_before"] == 0
    assert repaired["specificity"]["argmax_unchanged"] > 0.99
    checked = mint("rule", "check", rule, "--model", BUILTIN, "--patch", fix, "--accept", 0.4)
    assert checked["holds"] and checked["unseen"]["right_after"] == repaired["unseen"]["right_after"]
    assert not mint("rule", "check", rule, "--model", BUILTIN, "--accept", 0.4, expect=3)["holds"]
