"""Judges of what was written: right, wrong or neither; a statement or not; by ruff, a pattern or a command."""

import pytest

from mint.errors import MintError
from mint.rules.figures import Line, count_faults, count_kept
from mint.rules.judge import Share, judge_named, python_statement, verdict, well_formed
from mint.rules.rule import Row


def row(prompt="x = 1\nstart = time", source="a.py", **more):
    given = {"rule": "r", "role": "fault", "target": ".perf_counter()", "wrong": ".time()", "split": "unseen"}
    return Row(prompt=prompt, source=source, **(given | more))


def test_adopted_wrong_and_avoided_are_told_apart():
    assert verdict(".perf_counter() - x", ".perf_counter()", ".time()") == "adopted"
    assert verdict(".time()\n", ".perf_counter()", ".time()") == "wrong"
    assert verdict(".monotonic()", ".perf_counter()", ".time()") == "avoided"
    assert verdict("", "a", None) == "avoided"


def test_the_interval_is_wilsons():
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662 (method 3, without continuity correction)
    low, high = Share(81, 263).interval
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert Share(0, 0).interval is None and Share(0, 0).value is None


@pytest.mark.parametrize(
    "prompt, text, good",
    [
        ("    start = time", ".perf_counter()\n", True),
        ("    start = time", ".perf_counter(\n", False),
        ("def f():\n    if time", ".perf_counter() > 3:\n", True),
        ("    a = 1\n    elif time", ".perf_counter() > 3:\n", True),
        ("    call(a,\n         time", ".perf_counter())\n", True),
        ("    with open(x) as f, go(time", ".time()):\n        pass\n", True),
        ("    except time", ".error:\n", True),
        ("    return time", ".perf_counter() -\n", False),
        ("    @time", ".wrap\n", True),
    ],
)
def test_the_whole_statement_must_be_well_formed(prompt, text, good):
    assert (python_statement(prompt, text) is not None) == good
    assert well_formed(row(prompt), text) is good


def test_unended_lines_and_other_languages_are_not_judged():
    assert well_formed(row(), ".perf_counter()") is None
    assert well_formed(row(source="a.rs"), "x\n") is None and well_formed(row(source=None), "x\n") is None
    assert well_formed(row("which ", "a.sh"), "git | head\n") is True
    assert well_formed(row("which ", "a.sh"), "git | | (\n") is False


def test_ruff_judges_the_statement_as_if_its_modules_were_imported():
    judge = judge_named("ruff:S324")
    assert not judge(row("    h = hashlib"), ".md5(data)\n")
    assert judge(row("    h = hashlib"), ".sha256(data)\n")
    assert not judge(row("    h = hashlib"), ".sha256(data\n"), "what does not parse does not pass"


def test_a_pattern_and_a_command_judge_too():
    assert judge_named(r"regex:^\.perf")(row(), ".perf_counter()")
    assert not judge_named(r"regex:^\.perf")(row(), " .perf_counter()")
    assert judge_named("cmd:grep -q time.perf")(row(), ".perf_counter()")
    assert not judge_named("cmd:grep -q time.perf")(row(), ".time()")


@pytest.mark.parametrize(
    "asked, match",
    [
        ("flake8:E1", "unknown judge 'flake8:E1'; write ruff:CODE"),
        ("regex:", "unknown judge"),
        ("regex:(", "not a regular expression"),
        ("cmd:no-such-command-here", "no such command"),
        ("ruff:ZZ999", "ruff has no rule 'ZZ999'"),
    ],
)
def test_a_judge_that_cannot_be_is_one_line(asked, match):
    with pytest.raises(MintError, match=match):
        judge_named(asked)


def test_figures_count_every_verdict():
    lines = [
        Line(row(), ".time()\n", ".perf_counter()\n"),
        Line(row(), ".time()\n", ".time()\n"),
        Line(row(), ".perf_counter()\n", ".clock(\n"),
    ]
    found = count_faults(lines, {"mine": lambda r, text: "clock" in text})
    assert found["cases"] == 3 and found["right_before"] == found["right_after"] == 1
    assert found["avoided"] == found["wrong"] == 1
    assert found["statements"] == 3 and found["well_formed"] == 2
    assert found["judges"] == {"mine": {"passed_before": 0, "passed_after": 1}}


def test_near_rows_keep_their_text_and_healthy_ones_their_target():
    near, healthy = row(role="near", target="sleep(1)"), row(role="healthy")
    lines = [Line(near, "sleep(1)", "sleep(1)"), Line(near, "sleep(1)", "sleep(2)")]
    assert count_kept(lines)["kept"] == 1 and count_kept(lines)["unseen"] == {"cases": 2, "kept": 1}
    lines = [Line(healthy, ".perf_counter() a", ".perf_counter() b"), Line(healthy, ".perf_counter()", ".x")]
    assert [x.kept for x in lines] == [True, False]
