"""Cases come back exactly as written, and a bad line is named by file, line and column."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint.case import Case, Keep, case_from_dict, case_to_dict, dump_cases, load_cases, load_keep
from mint.errors import CaseError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
GOOD = {"id": "a", "prompt": "p", "target": "t"}


@given(
    st.lists(
        st.builds(
            Case,
            TEXT,
            TEXT,
            TEXT,
            st.lists(TEXT, max_size=2).map(tuple),
            st.lists(st.builds(Keep, TEXT, st.none() | TEXT), max_size=2).map(tuple),
            st.none() | TEXT,
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda c: c.id,
    )
)
def test_cases_survive_the_file(tmp_path_factory, cases):
    path = tmp_path_factory.mktemp("cases") / "cases.jsonl"
    path.write_text(dump_cases(cases), encoding="utf-8")
    assert load_cases(path) == cases


@pytest.mark.parametrize("space", [" x", "x ", "\n", "\tx\r\n", "x\n\n"])
def test_space_is_taken_as_is(space):
    case = case_from_dict(GOOD | {"prompt": space, "target": space})
    assert (case.prompt, case.target) == (space, space)
    assert case_to_dict(case) == GOOD | {"prompt": space, "target": space}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "expected a JSON object, found list"),
        ({"id": "a", "prompt": "p"}, "no key 'target'"),
        (GOOD | {"target": ""}, "'target' is empty"),
        (GOOD | {"prompt": ""}, "'prompt' is empty"),
        (GOOD | {"prompt": 5}, "'prompt' must be text, found int"),
        (GOOD | {"prompts": "x"}, "unknown key 'prompts'"),
        (GOOD | {"target": "\ud800"}, "lone surrogate at character 0"),
        (GOOD | {"rephrasings": "x"}, "'rephrasings' must be a list"),
        (GOOD | {"rephrasings": [""]}, "'rephrasings' must be a list of non-empty texts"),
        (GOOD | {"keep": {}}, None),
        (GOOD | {"keep": {"prompt": "x"}}, "'keep' must be a list"),
        (GOOD | {"keep": ["x"]}, "is an object with prompt and optional target"),
        (GOOD | {"keep": [3]}, "must be an object, found int"),
        (GOOD | {"keep": [{"prompt": "x", "no": 1}]}, "unknown key 'no' in 'keep'"),
        (GOOD | {"task": 3}, "'task' must be text"),
    ],
)
def test_a_bad_record_is_one_clear_line(record, message):
    if message is None:
        assert case_from_dict(record).keep == ()
        return
    with pytest.raises(CaseError) as caught:
        case_from_dict(record, "f.jsonl:3")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("f.jsonl:3")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no cases"),
        (b"\n \n", "no cases"),
        (b'{"id": "a"\n', ":1:"),
        (json.dumps(GOOD).encode() + b"\n{oops}\n", ":2:2: not JSON"),
        (json.dumps(GOOD).encode() + b'\n{"id": "\xff"}\n', ":2:9: not UTF-8 (byte 0xff)"),
        (json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode(), "id 'a' was used on line 1"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, data, message):
    path = tmp_path / "cases.jsonl"
    path.write_bytes(data)
    with pytest.raises(CaseError) as caught:
        load_cases(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(CaseError, match=str(path)):
            load_cases(path)


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert load_cases(path) == [Case("a", "p", "t")]


def test_keep_files_are_read(tmp_path):
    path = tmp_path / "keep.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "target": "c"}\n')
    assert load_keep(path) == [Keep("a"), Keep("b", "c")]
