"""Mining: rows are sorted by what the model really writes, nothing is lost on Ctrl-C, every skipped site has a reason."""

from dataclasses import replace

import pytest

from mint.errors import CaseError
from mint.model.lm import Template
from mint.rules import mine as mining
from mint.rules.cut import encode_row
from mint.rules.mine import Search, mine
from mint.rules.rule import dump_rule, load_rule
from tests.habits import RIGHT, WRONG, write_files


@pytest.fixture
def source(tmp_path):
    return write_files(tmp_path / "src", n=12, seed=5)


def search(source, **more):
    return Search(WRONG, RIGHT, (str(source),), **({"limit": 12} | more))


def written(lm, row, tokens=16):
    ids = lm.encode_prompt(row.prompt)
    return lm.continuation(ids, lm.generate([ids], tokens)[0])


def test_rows_say_what_the_model_really_writes(habit_lm, source):
    mined = mine(habit_lm, search(source))
    rule = mined.rule
    assert len(rule.part("fault")) == 12 and rule.near and rule.healthy
    assert mined.sites > 20 and mined.files == 12
    for row in rule.part("fault"):
        assert written(habit_lm, row).startswith(row.wrong) and row.target == "perf()"
    for row in rule.healthy:
        assert written(habit_lm, row).startswith(row.target)
    for row in rule.near:
        assert written(habit_lm, row).startswith(row.target) and not row.target.startswith(row.wrong)
    assert len(rule.near) >= len(rule.part("fault"))


def test_the_split_is_by_file_and_the_result_is_the_same_every_time(habit_lm, source):
    rule = mine(habit_lm, search(source)).rule
    side = {}
    for row in rule.rows:
        assert side.setdefault(row.source, row.split) == row.split
    assert set(side.values()) == {"learn", "unseen"}
    assert mine(habit_lm, search(source)).rule == rule
    assert mine(habit_lm, search(source, seed=1)).rule != rule


def test_a_mined_rule_reads_back_and_its_rows_can_be_used_as_they_are(habit_lm, source, tmp_path):
    rule = mine(habit_lm, search(source)).rule
    path = tmp_path / "rule.jsonl"
    path.write_text(dump_rule(rule))
    assert load_rule(path) == rule
    for row in rule.part("fault"):
        assert encode_row(habit_lm, row)[0] == row


def test_an_interrupted_search_goes_on_where_it_stopped(habit_lm, source, tmp_path, monkeypatch):
    journal = tmp_path / "rule.jsonl.journal"
    whole = mine(habit_lm, search(source)).rule
    asked = []
    real = mining.write

    def interrupted(lm, asks, *more):
        if asked:
            raise KeyboardInterrupt
        asked.append(len(asks))
        return real(lm, asks, *more)

    monkeypatch.setattr(mining, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mine(habit_lm, search(source), journal=journal)
    again = []

    def counted(lm, asks, *more):
        again.append(len(asks))
        return real(lm, asks, *more)

    monkeypatch.setattr(mining, "write", counted)
    monkeypatch.setattr(mining, "read_source", None)  # no file is read twice
    found = mine(habit_lm, search(source), journal=journal)
    assert found.rule == whole and sum(again) == found.asked - sum(asked)
    with pytest.raises(CaseError, match="journal of another search; delete it"):
        mine(habit_lm, search(source, seed=3), journal=journal)


def test_what_is_passed_over_is_counted_by_reason(habit_lm, source):
    (source / "bad.py").write_bytes(b"x = 't.time()'\xff\n")
    (source / "data.py").write_bytes(b"t.time()\0\n")
    (source / "copy.py").write_text((source / "f0.py").read_text())
    (source / "wide.py").write_text("x = 1; " * 2000 + "y = t.time()\n")
    skipped = mine(habit_lm, search(source, limit=60)).skipped
    assert skipped["file: undecodable"] == skipped["file: binary"] == skipped["long lines"] == 1
    assert skipped["duplicate"] >= 1


def test_excluded_files_are_not_read(habit_lm, source):
    with pytest.raises(CaseError, match="no call site"):
        mine(habit_lm, search(source, exclude=("f*.py",)))


@pytest.mark.parametrize(
    "change, match",
    [
        ({"wrong": "q.time()", "right": "q.perf()"}, r"no call site of 'q.time\(\)' or 'q.perf\(\)' in 12 files"),
        ({"right": WRONG}, "are the same text"),
        ({"right": "t.time().x"}, "begins with"),
        ({"wrong": RIGHT, "right": WRONG, "limit": 60}, None),
        ({"wrong": "t.perf(1)", "right": "t.perf()"}, "the model already writes|at none of"),
        ({"folders": ("nowhere",)}, "nowhere: no such folder"),
    ],
)  # fmt: skip
def test_a_search_that_finds_no_habit_says_why(habit_lm, source, change, match):
    wanted = replace(search(source), **change)
    if match is None:
        assert mine(habit_lm, wanted).rule.part("fault"), "the other way round is a habit too, at `stop`"
        return
    with pytest.raises(CaseError, match=match) as error:
        mine(habit_lm, wanted)
    assert "\n" not in str(error.value)


def test_the_model_that_is_right_already_needs_no_rule(habit_lm, tmp_path):
    folder = write_files(tmp_path / "src", n=6, seed=2)
    for path in folder.iterdir():
        path.write_text("\n".join(x for x in path.read_text().split("\n") if WRONG not in x))
    with pytest.raises(CaseError, match="the model already writes 't.perf\\(\\)'.*nothing to repair"):
        mine(habit_lm, Search("t.old()", RIGHT, (str(folder),)))


def test_few_faults_are_told_with_the_way_out(habit_lm, tmp_path):
    folder = write_files(tmp_path / "src", n=1, seed=5)
    (folder / "f1.py").write_text("import t\nnow = t.time()\n")
    mined = mine(habit_lm, Search(WRONG, RIGHT, (str(folder),), limit=3))
    assert "only 3" in mined.as_dict()["note"] and "mint repair --prompt" in mined.as_dict()["note"]


def test_in_a_chat_the_code_stands_in_the_models_own_answer(habit_lm, source):
    tokenizer = habit_lm.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n{% endfor %}<assistant>\n"
    )
    try:
        chat = replace(habit_lm, template=Template())
        rows = mine(chat, search(source, limit=24)).rule.rows
        assert rows and all(r.prompt.startswith("<user>\nWrite the file src/f") for r in rows)
        assert all("<assistant>```python" in r.prompt for r in rows), "a template loses its last newline"
        assert all(written(habit_lm, r).startswith(r.wrong) for r in rows if r.role == "fault")
    finally:
        tokenizer.chat_template = None
