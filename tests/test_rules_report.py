"""The report of rules: failures first, where the edit fires, the matrix; all that a model wrote is text."""

from dataclasses import replace

import pytest

from mint import patch as P
from mint.rules.curve import CurvePoint
from mint.rules.figures import Line
from mint.rules.fires import LEVELS, fire_levels, matrix
from mint.rules.repair import RuleRepair, RulesOutcome
from mint.rules.report import report_page
from mint.rules.rule import Row, Rule
from mint.solver.problem import Solution
from tests.conftest import same_bits, tiny_lm, weights_of


@pytest.fixture
def outcome():
    lm = tiny_lm("llama")
    change = P.make_edit(lm, 1, 3, {"out": lm.columns(1)[3] * 40})
    patch = P.Patch((change,), P.identity(lm))
    rows = [
        Row(
            "a",
            "fault",
            f"x{i} = time",
            ".perf()",
            ".time()",
            f"f{i}.py",
            "learn" if i < 2 else "unseen",
            str(i),
        )
        for i in range(6)
    ]
    rows.append(Row("a", "near", "time", None, None, "n.py", "unseen", "n"))
    lines = [Line(r, ".time()\n", ".perf()\n" if i != 3 else "<script>\u202e\n") for i, r in enumerate(rows)]
    details = {
        "candidates": [
            {"neurons": [{"index": 7, "kind": "rewrite", "role": "idle", "ridge": 0.5}], "score": 0.51234},
            {"neurons": [{"index": 9, "kind": "value", "role": "responsible"}], "score": 0.4},
        ],
        "responsible": [{"layer": 1, "index": 3, "linear": -2.0}],
        "verdict": "carrier",
    }
    one = RuleRepair(
        Rule("a", tuple(rows)),
        tuple(lines),
        frozenset({"0", "1"}),
        patch,
        solution=Solution("s", patch, details=details),
    )
    return lm, RulesOutcome((one,), patch, None)


def test_the_page_shows_what_became_of_every_prompt(outcome):
    lm, found = outcome
    before = weights_of(lm)
    page = report_page(lm, found)
    assert same_bits(weights_of(lm), before)
    assert "<script" not in page and "&lt;script&gt;" in page and "\u202e" not in page
    assert page.index("not right") < page.index(">right<"), "what failed stands first"
    assert "Where the edit fires" in page and 'class="f3"' in page
    assert "Neurons ranked responsible" in page and "0.5123" in page and "carrier" in page
    assert "rewrite of 7 (idle)" in page and "ridge" not in page, "neurons in words"


def test_a_refused_point_of_the_learn_curve_says_so(outcome):
    lm, found = outcome
    figures = found.repairs[0].figures
    points = [
        CurvePoint(n, figures["unseen"], figures["near"], reason)
        for n, reason in ((1, "no column"), (2, None))
    ]
    page = report_page(lm, found, {"a": points})
    assert page.count("would be refused") == 1 and "<svg" in page
    assert "How many prompts" not in report_page(lm, found, {"b": points})


def test_several_rules_have_a_matrix(outcome):
    lm, found = outcome
    (one,) = found.repairs
    other = replace(one, rule=Rule("b", tuple(replace(r, rule="b") for r in one.rule.rows)), patch=None)
    both = RulesOutcome((one, other), found.patch, None)
    (first, second) = matrix(lm, both)
    assert second == [None, None] and first[0] == first[1] and 0 <= first[0] <= 1
    assert "at another" in report_page(lm, both)


def test_fire_levels_are_relative_to_the_strongest(outcome):
    lm, found = outcome
    levels = fire_levels(lm, found.patch, [lm.encode_prompt("x = time"), lm.encode_prompt("y")])
    assert [len(x) for x in levels] == [8, 1]
    assert max(max(x) for x in levels) == LEVELS - 1 and min(min(x) for x in levels) >= 0
