"""A log of failures becomes cases; every line that does not is listed with its reason."""

import json

import pytest

from mint.case import load_cases
from mint.errors import CaseError
from mint.fromdiff import contradictions, from_log


def log(tmp_path, *rows):
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


GOOD = {"prompt": "# sort l\n", "written": "l.reverse()\n", "wanted": "l.sort()\n"}


def test_a_failure_becomes_a_case(tmp_path):
    cases, refused = from_log(log(tmp_path, GOOD))
    assert not refused
    assert (cases[0].prompt, cases[0].target) == ("# sort l\n", "l.sort()\n")
    assert cases[0].id.startswith("diff-")
    assert from_log(log(tmp_path, GOOD))[0] == cases


def test_other_names_and_extras_are_understood(tmp_path):
    row = {
        "input": "p",
        "completion": "x",
        "expected": "y",
        "id": "n7",
        "task": "t",
        "rephrasings": ["q"],
        "noise": 1,
    }
    (case,), _ = from_log(log(tmp_path, row))
    assert (case.id, case.prompt, case.target, case.task, case.rephrasings) == ("n7", "p", "y", "t", ("q",))


def test_text_is_taken_as_it_is(tmp_path):
    (case,), _ = from_log(log(tmp_path, {"prompt": " a ", "written": "b", "wanted": "  b \n"}))
    assert (case.prompt, case.target) == (" a ", "  b \n")


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "a", "written": "b"}, "no 'wanted'"),
        ({"prompt": "a", "wanted": "b"}, "no 'written'"),
        ({"written": "a", "wanted": "b"}, "no 'prompt'"),
        ({"prompt": "a", "written": "b", "wanted": "b"}, "no failure"),
        ({"prompt": "a", "written": "b", "wanted": ""}, "'target' is empty"),
        ({"prompt": "a", "written": 3, "wanted": "b"}, "must be text, found int"),
        ({"prompt": "a", "written": "b", "wanted": "c", "expected": "d"}, "both 'wanted' and 'expected'"),
        ("[1]", "expected a JSON object, found list"),
        ("{", "not JSON"),
        (GOOD, "the same failure as log.jsonl:1"),
        (GOOD | {"id": "one", "wanted": "x\n"}, "id 'one' was used at log.jsonl:2"),
    ],
)
def test_bad_lines_are_listed_and_the_rest_is_kept(tmp_path, row, reason):
    cases, refused = from_log(log(tmp_path, GOOD, GOOD | {"id": "one", "wanted": "other\n"}, row))
    assert len(cases) == 2
    assert len(refused) == 1 and refused[0].where == "log.jsonl:3" and reason in refused[0].reason


def test_bytes_that_are_no_text_are_listed(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\n")
    cases, refused = from_log(path)
    assert len(cases) == 1 and "not UTF-8" in str(refused[0])


@pytest.mark.parametrize(
    "text, line", [("", "no case among 0 lines"), ("{}", "no case among 1 lines; the first")]
)
def test_a_log_without_failures_is_an_error(tmp_path, text, line):
    with pytest.raises(CaseError, match=line):
        from_log(log(tmp_path, text))


def test_a_missing_log_is_an_error(tmp_path):
    with pytest.raises(CaseError, match="no such file"):
        from_log(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "written, wanted, prompt, target",
    [
        ("a = 1\nb = 2\n", "a = 1\nb = 3\n", "p\na = 1\n", "b = 3\n"),
        ("x\n", "y\n", "p\n", "y\n"),
        ("same\n", "same\nmore\n", "p\nsame\n", "more\n"),
        ("same\nmore\n", "same\n", "p\n", "same\n"),
        ("", "y", "p\n", "y"),
    ],
)
def test_minimal_starts_where_things_go_wrong(tmp_path, written, wanted, prompt, target):
    (case,), _ = from_log(
        log(tmp_path, {"prompt": "p\n", "written": written, "wanted": wanted}), minimal=True
    )
    assert (case.prompt, case.target) == (prompt, target)


def test_contradictions_are_found(tmp_path):
    cases, _ = from_log(log(tmp_path, GOOD, GOOD | {"wanted": "sorted(l)\n"}, GOOD | {"prompt": "other"}))
    assert [(a.target, b.target) for a, b in contradictions(cases)] == [("l.sort()\n", "sorted(l)\n")]


def test_what_is_written_can_be_loaded(tmp_path):
    from mint.case import dump_cases

    cases, _ = from_log(log(tmp_path, GOOD))
    (tmp_path / "cases.jsonl").write_text(dump_cases(cases))
    assert load_cases(tmp_path / "cases.jsonl") == cases
