"""Tasks: prompts, targets and rephrasings as promised; bad rows listed; samples pass their judges."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mint.case import STOPS, Case, load_cases
from mint.errors import CaseError, MintError
from mint.measure.judges import JUDGE_OF_TASK, JUDGES, judge, load_tests
from mint.model.stop import Stop
from tasks import TASKS
from tasks.__main__ import main
from tasks.common import rows_of_hub
from tasks.shellcode_ia32 import SEVERAL


def write_split(folder: Path, name: str, rows: list, split: str = "test") -> Path:
    path = folder / name / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def row(i: str, intent: str, target: str, **more) -> dict:
    return {"id": i, "intent": intent, "target": target, **more}


# --- samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_sample_has_twenty_cases_that_pass_their_own_judge(name):
    task = TASKS[name]
    loaded = task.load_sample()
    assert len(loaded.cases) >= 20 and loaded.skipped == []
    for case in loaded.cases:
        found = judge(task.judge, case.target, case.target, **loaded.tests.get(case.id, {}))
        assert found.ok and found.matches_expected, (case, found)
        assert Stop.of(task.stop, case.target).cut(case.target + "next") == (case.target, True)
    assert all(case.id in loaded.tests for case in loaded.cases) == (task.judge == "python_tests")


@pytest.mark.parametrize("name", ["conala", "shellcode_ia32", "nl2bash", "tldr"])
def test_samples_have_rephrasings_where_the_task_has_them(name):
    least = 5 if name == "tldr" else 10
    assert sum(bool(c.rephrasings) for c in TASKS[name].load_sample().cases) >= least


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_sample_tests_can_fail(name):
    loaded = TASKS[name].load_sample()
    body = "    return NotImplemented\n"
    for case in loaded.cases[:3]:
        head = "" if name == "humaneval" else case.target.split("\n", 1)[0] + "\n"
        assert judge("python_tests", head + body, **loaded.tests[case.id]).detail == "assertion"


def test_task_names_judges_and_stop_rules_agree_with_the_evaluator():
    assert {name: task.name for name, task in TASKS.items()} == {name: name for name in TASKS}
    assert {name: task.judge for name, task in TASKS.items()} == JUDGE_OF_TASK
    assert all(t.judge in JUDGES and t.stop in STOPS for t in TASKS.values())


# --- prompts, targets, rephrasings --------------------------------------------------------------------------


def test_conala_prompt_target_and_original_title():
    rows = [
        row("a", "sort list `l`", "l.sort()", orig_intent="How to sort?", rewritten=True),
        row("b", "How to add?", "a + b", orig_intent="How to add?", rewritten=False),
        row("c", "same", "x", orig_intent="same", rewritten=True),
    ]
    a, b, c = TASKS["conala"].cases(rows).cases
    assert a == Case("a", "# sort list `l`\n", "l.sort()\n", ("# How to sort?\n",), (), "conala")
    assert b.rephrasings == () and c.rephrasings == ()


def test_same_command_gives_rephrasings_from_the_file_and_the_pool(tmp_path):
    rows = [row("a", "count lines", "wc -l x"), row("b", "how many lines", "wc -l x"), row("c", "list", "ls")]
    write_split(tmp_path, "nl2bash", rows)
    write_split(tmp_path, "nl2bash", [row("d", "line count", "wc -l x"), "broken"], "train")
    task = TASKS["nl2bash"]
    assert [c.rephrasings for c in task.load(tmp_path).cases] == [
        ("# how many lines\n",),
        ("# count lines\n",),
        (),
    ]
    pooled = task.load(tmp_path, pool=("train",))
    assert pooled.cases[0].rephrasings == ("# how many lines\n", "# line count\n")
    assert len(pooled.cases) == 3
    assert task.load(tmp_path, pool=("train",), max_rephrasings=1).cases[0].rephrasings == (
        "# how many lines\n",
    )


def test_shellcode_uses_the_comment_mark_of_nasm_and_single_instructions():
    rows = [row("a", "clear eax", "xor eax, eax"), row("b", "two", "push eax \\n push ebx")]
    loaded = TASKS["shellcode_ia32"].cases(rows)
    assert loaded.cases == [Case("a", "; clear eax\n", "xor eax, eax\n", (), (), "shellcode_ia32")]
    assert "several instructions" in loaded.skipped[0].reason
    assert [c.target for c in SEVERAL.cases(rows).cases] == ["xor eax, eax\n", "push eax \\n push ebx\n"]


def test_tldr_takes_the_benchmark_wording():
    rows = [
        row("a", "List X", "ls {{x}}", intent_normalized="show x"),
        row("b", "y", "ls", intent_normalized="Y."),
    ]
    a, b = TASKS["tldr"].cases(rows).cases
    assert (a.prompt, a.target, a.rephrasings, b.rephrasings) == (
        "# List X\n",
        "ls {{x}}\n",
        ("# show x\n",),
        (),
    )


def test_humaneval_prompt_is_verbatim():
    prompt = '\n\ndef f(x):\n    """ Doc """\n'
    found = row("a", prompt, "    return x", entry_point="f", test="def check(c):\n    assert c(1) == 1\n")
    loaded = TASKS["humaneval"].cases([found])
    assert (loaded.cases[0].prompt, loaded.cases[0].target) == (prompt, "    return x\n")
    assert loaded.tests["a"]["after"].endswith("check(f)\n")


def test_mbpp_prompt_shows_the_first_test_and_setup_code_runs():
    found = row(
        "a", "Add.", "def f(x):\n    return x + K", test_list=["assert f(1) == 3", "assert f(0) == 2"]
    )
    loaded = TASKS["mbpp"].cases([found | {"test_setup_code": "K = 2"}])
    assert loaded.cases[0].prompt == '"""\nAdd.\nassert f(1) == 3\n"""\n'
    assert judge("python_tests", loaded.cases[0].target, **loaded.tests["a"]).ok


def test_more_than_one_function_is_skipped():
    two = row("a", "x", "def f():\n    return 1\ndef g():\n    return 2", test_list=["assert f()"])
    none = row("b", "x", "f = abs", test_list=["assert f(1)"])
    good = row("c", "x", "def f():\n    return 1", test_list=["assert f()"])
    loaded = TASKS["mbpp"].cases([two, none, good])
    assert [c.id for c in loaded.cases] == ["c"]
    assert "goes on behind" in loaded.skipped[0].reason and "no indented block" in loaded.skipped[1].reason


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"id": "x", "intent": "y"}, "no target"),
        ({"id": "x", "intent": "y", "target": None}, "no target"),
        ({"id": "x", "intent": "y", "target": "  "}, "target is empty"),
        ({"id": "x", "intent": "y", "target": 3}, "target must be text, found int"),
        ({"id": 7, "intent": "y", "target": "z"}, "id must be text, found int"),
        ({"id": "x", "target": "z"}, "no intent"),
        ({"id": "good", "intent": "y", "target": "z"}, "id 'good' was used at"),
        ({"id": "x", "intent": "y", "target": "z" * 401}, "target has 401 characters, at most 400"),
        ({"id": "x", "intent": "y", "target": "a\nb"}, "several lines"),
        ({"id": "x", "intent": "y\ud800", "target": "b"}, "lone surrogate"),
        ([1], "expected a JSON object, found list"),
        ("{not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_each_bad_row_is_one_clear_line_and_nothing_is_lost(tmp_path, bad, reason):
    path = write_split(tmp_path, "conala", [row("good", "a", "b"), bad, row("last", "c", "d")])
    loaded = TASKS["conala"].load(tmp_path)
    assert [c.id for c in loaded.cases] == ["good", "last"]
    assert len(loaded.skipped) == 1 and reason in loaded.skipped[0].reason
    assert str(loaded.skipped[0]).startswith(f"{path}:2: ") and "\n" not in str(loaded.skipped[0])


def test_rows_without_a_field_the_task_needs_are_skipped():
    good = row("b", "x", "    return 1", entry_point="f", test="t")
    loaded = TASKS["humaneval"].cases([row("a", "x", "    return 1", entry_point="f"), good])
    assert [str(s) for s in loaded.skipped] == ["row 1: no test; this task needs it"]
    bad = row("a", "x", "def f():\n    pass", test_list=[])
    assert (
        "at least one test"
        in TASKS["mbpp"].cases([bad, bad | {"id": "b", "test_list": ["assert 1"]}]).skipped[0].reason
    )


def test_limit_on_characters_is_a_parameter():
    rows = [row("a", "x", "abcdef"), row("b", "y", "abc")]
    assert [c.id for c in TASKS["conala"].cases(rows, max_target_chars=3).cases] == ["b"]


def test_missing_folder_file_and_split_are_one_line_each(tmp_path):
    task = TASKS["conala"]
    with pytest.raises(CaseError, match="no such folder; give the folder that holds conala/test.jsonl"):
        task.load(tmp_path / "none")
    with pytest.raises(CaseError, match="no such folder, found no folders"):
        task.load(tmp_path)
    write_split(tmp_path, "conala", [row("a", "x", "y")], "train")
    with pytest.raises(CaseError, match="no such file; splits found there: train"):
        task.load(tmp_path, "test")


def test_no_usable_row_and_not_utf8_are_one_line(tmp_path):
    path = write_split(tmp_path, "conala", ["{"])
    with pytest.raises(CaseError, match="no usable row among 1; the first: "):
        TASKS["conala"].load(tmp_path)
    path.write_bytes(b'{"id": "\xff"}')
    with pytest.raises(CaseError, match="not UTF-8 at byte 9"):
        TASKS["conala"].load(tmp_path)
    with pytest.raises(CaseError, match="no usable row among 0"):
        TASKS["conala"].cases([])


# --- draws ------------------------------------------------------------------------------------------------


def test_draw_is_seeded_and_in_order():
    loaded = TASKS["mbpp"].load_sample()
    drawn = loaded.sample(5, seed=1)
    ids = [c.id for c in drawn.cases]
    assert ids == sorted(ids) and len(ids) == 5 and set(drawn.tests) == set(ids)
    assert drawn == loaded.sample(5, seed=1) and ids != [c.id for c in loaded.sample(5, seed=2).cases]
    assert loaded.sample(None, 0) is loaded


# --- the hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_home(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_rows_come_through_datasets(hub_home):
    raw = [
        {"intent": "How to sort?", "rewritten_intent": "sort `l`", "snippet": "l.sort()"},
        {"intent": "How to add?", "rewritten_intent": None, "snippet": "a + b"},
        {"intent": "How to add?", "rewritten_intent": None, "snippet": "a + b"},
    ]
    write_split(hub_home, "hubset", raw, "train")
    loaded = TASKS["conala"].load_hub("train", str(hub_home / "hubset"))
    assert [c.prompt for c in loaded.cases] == ["# sort `l`\n", "# How to add?\n"]
    assert loaded.cases[0].rephrasings == ("# How to sort?\n",)
    assert "ids must be unique" in loaded.skipped[0].reason and loaded.skipped[0].where.endswith(
        "/train row 3"
    )


def test_hub_faults_are_one_line(hub_home):
    write_split(hub_home, "hubset", [{"other": "x"}], "train")
    with pytest.raises(CaseError, match="no field 'nl'; this data set has another layout"):
        TASKS["nl2bash"].load_hub("train", str(hub_home / "hubset"))
    with pytest.raises(CaseError, match="split 'nope': cannot be loaded") as caught:
        TASKS["nl2bash"].load_hub("nope", str(hub_home / "hubset"))
    assert "\n" not in str(caught.value)


def test_hub_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MintError, match=r"needs datasets, .* pip install 'mint-repair\[evaluate\]'"):
        rows_of_hub("x/y", "test", dict)


HUB_ROWS = {
    "conala": {"intent": "i", "rewritten_intent": "r", "snippet": "x"},
    "shellcode_ia32": {"intent": "i", "snippet": "nop"},
    "nl2bash": {"nl": "i", "bash": "ls"},
    "tldr": {"nl": "i", "cmd": "ls"},
    "humaneval": {
        "task_id": "HumanEval/0",
        "prompt": "def f():\n",
        "canonical_solution": "    return 1\n",
        "test": "t",
        "entry_point": "f",
    },
    "mbpp": {"task_id": 1, "text": "i", "code": "def f():\r\n    return 1", "test_list": ["assert f()"]},
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_its_hub_layout(name):
    converted = {"id": "x", **TASKS[name].from_hub(HUB_ROWS[name])}
    assert len(TASKS[name].cases([converted]).cases) == 1


# --- the command --------------------------------------------------------------------------------------------


def test_command_writes_cases_tests_and_skipped_rows(tmp_path):
    good = row("a", "Add.", "def f(x):\n    return x", test_list=["assert f(1) == 1"])
    write_split(tmp_path, "mbpp", [good, {"id": "b", "intent": "x"}])
    out = tmp_path / "cases.jsonl"
    done = CliRunner().invoke(main, ["mbpp", "--data", str(tmp_path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout == "" and done.stderr.startswith("1 cases of 1, 1 rows skipped\nfirst skipped: ")
    assert [c.id for c in load_cases(out)] == ["a"]
    assert load_tests(tmp_path / "cases.tests.jsonl")["a"]["after"] == "\nassert f(1) == 1\n"
    skipped = [json.loads(line) for line in (tmp_path / "cases.skipped.jsonl").read_text().splitlines()]
    assert skipped[0]["reason"].startswith("no target") and skipped[0]["where"].endswith("test.jsonl:2")


def test_command_prints_a_seeded_sample():
    arguments = ["conala", "--sample", "--limit", "3", "--seed", "2"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 3
    assert done.stdout == CliRunner().invoke(main, arguments).stdout
    assert json.loads(done.stdout.splitlines()[0])["task"] == "conala"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["conala"], 2, "exactly one of --data DIR, --hub ID, --sample"),
        (["conala", "--sample", "--several"], 2, "--several is for shellcode_ia32"),
        (["cobol", "--sample"], 2, "is not one of"),
        (["conala", "--data", "/nowhere"], 1, "no such folder"),
        (["conala", "--sample", "--out", "/nowhere/x.jsonl"], 1, "cannot be written"),
    ],
)
def test_command_faults_are_one_line_with_the_right_exit_code(arguments, code, message):
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == code and message in done.stderr and done.stdout == ""


@pytest.mark.parametrize("other", ["List Files.", "list files .", "LIST  FILES", "list files"])
def test_what_differs_in_case_and_full_stop_only_is_no_rephrasing(other):
    row = {"id": "a", "intent": "List files", "target": "ls", "intent_normalized": other}
    assert TASKS["tldr"].cases([row]).cases[0].rephrasings == ()
    row["intent_normalized"] = "show files."
    assert TASKS["tldr"].cases([row]).cases[0].rephrasings == ("# show files.\n",)
