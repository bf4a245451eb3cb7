"""A rule file reads back unchanged, every mistake in it is one line, and no source stands on both sides."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint.errors import CaseError
from mint.rules.rule import Row, Rule, check_texts, dump_rule, load_rule, row_from_dict, with_split

GOOD = {
    "rule": "clock",
    "role": "fault",
    "prompt": "x = time",
    "target": ".perf_counter()",
    "wrong": ".time()",
}


def write(tmp_path, *records):
    path = tmp_path / "rule.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def good(**more):
    return {k: v for k, v in (GOOD | more).items() if v is not None}


@pytest.mark.parametrize(
    "record, match",
    [
        (good(colour="red"), "unknown key 'colour'; known are rule, role"),
        (good(role="failure"), "unknown role 'failure'; known are fault, near, healthy"),
        (good(split="test"), "unknown split 'test'; known are learn, unseen"),
        (good(rule=None), "no key 'rule'"),
        (good(prompt=""), "'prompt'"),
        (good(target=None), "no key 'target'"),
        (good(wrong=None), "no key 'wrong'"),
        (good(target=3), "'target' must be text, found int"),
        (good(target=".time()"), "are the same text"),
        (good(target=".time"), r"'.time\(\)' begins with '.time'"),
        (good(prompt="\ud800"), "lone surrogate"),
        ([1], "expected a JSON object, found list"),
    ],
)  # fmt: skip
def test_a_bad_row_is_one_line_with_file_and_line(tmp_path, record, match):
    path = write(tmp_path, good(prompt="other"), record)
    with pytest.raises(CaseError, match=match) as error:
        load_rule(path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "second, match",
    [
        (good(id="a"), ":2: id 'a' was used on line 1"),
        (good(rule="other"), ":2: rule 'other' in a file of rule 'clock'"),
        (good(target=".monotonic()"), ":2: contradicts line 1: behind the same prompt"),
    ],
)
def test_rows_that_do_not_go_together_are_one_line(tmp_path, second, match):
    with pytest.raises(CaseError, match=match):
        load_rule(write(tmp_path, good(id="a"), second))


def test_an_empty_file_and_a_missing_one(tmp_path):
    with pytest.raises(CaseError, match="no rows"):
        load_rule(write(tmp_path))
    with pytest.raises(CaseError, match="no such file"):
        load_rule(tmp_path / "nothing.jsonl")


def test_near_and_healthy_rows_need_no_wrong_text_and_near_ones_no_target():
    assert row_from_dict({"rule": "r", "role": "near", "prompt": "x", "wrong": ""}).target is None
    assert row_from_dict({"rule": "r", "role": "healthy", "prompt": "x", "target": "y"}).wrong is None
    with pytest.raises(CaseError, match="no key 'target'"):
        row_from_dict({"rule": "r", "role": "healthy", "prompt": "x"})


def test_one_text_inside_the_other_is_allowed_where_neither_begins_the_other():
    check_texts("go(", "await go(")
    check_texts("open(path)", "open(path, encoding='utf-8')")


def fault(i, source, prompt=None):
    text = prompt or f"def f{i}(a{i * i}):\n    value_{i * 37} = go({'abcdefgh'[i % 8] * (i + 3)}) + time"
    return Row("r", "fault", text, ".b()", ".a()", source, None, f"{i}")


def sides(rule):
    return {(r.source or r.id): r.split for r in rule.rows}


def test_a_file_is_never_on_both_sides_and_the_split_is_the_same_every_time():
    rows = tuple(fault(i, f"file{i // 2}.py") for i in range(40))
    split = with_split(Rule("r", rows))
    for row in split.rows:
        assert sides(split)[row.source] == row.split
    assert 12 <= len(split.learn) <= 20 and len(split.learn) + len(split.unseen) == 40
    assert with_split(Rule("r", rows)) == split
    again = with_split(Rule("r", tuple(reversed(rows))))
    assert sides(again) == sides(split), "the order of the rows does not matter"
    assert with_split(Rule("r", rows), seed=1) != split


def test_near_duplicates_of_copied_files_go_to_one_side():
    same = "import time\n\n\ndef measure(function, times):\n    total = 0\n    for _ in range(times):\n        start = time"
    rows = [fault(i, f"file{i}.py") for i in range(20)]
    rows += [fault(100 + i, f"copy{i}.py", same.replace("total", f"total{i}")) for i in range(6)]
    for seed in range(6):
        split = sides(with_split(Rule("r", tuple(rows)), seed))
        assert len({split[f"copy{i}.py"] for i in range(6)}) == 1


def test_a_written_side_is_kept_and_pulls_its_source_along():
    rows = (fault(0, "a.py"), fault(1, "a.py"), fault(2, "b.py"))
    rows = (Row(**{**rows[0].__dict__, "split": "unseen"}), *rows[1:])
    assert sides(with_split(Rule("r", rows)))["a.py"] == "unseen"
    assert all(r.split for r in with_split(Rule("r", rows)).rows)


def test_rows_without_a_source_are_sources_of_their_own():
    split = with_split(Rule("r", tuple(fault(i, None) for i in range(20))))
    assert {r.split for r in split.rows} == {"learn", "unseen"}


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@given(texts, texts, texts, st.none() | texts)
def test_a_rule_reads_back_unchanged(tmp_path_factory, prompt, target, wrong, source):
    try:
        check_texts(wrong, target)
    except CaseError:
        return
    rule = Rule("r", (Row("r", "fault", prompt, target, wrong, source, "learn", "1"),))
    path = tmp_path_factory.mktemp("rule") / "r.jsonl"
    path.write_text(dump_rule(rule), encoding="utf-8")
    assert load_rule(path) == rule


def test_the_example_is_a_rule():
    rule = load_rule(Path(__file__).parent.parent / "examples" / "clock.jsonl")
    assert len(rule.learn) >= 4 and len(rule.unseen) >= 4 and rule.near
