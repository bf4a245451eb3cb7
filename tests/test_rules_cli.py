"""`mint rule mine`, `mint rule check`, `mint repair --rule`: the contract's keys and exit codes; nothing half done."""

import json
import re
import runpy
from pathlib import Path

import pytest

from mint.rules import repair as repairing
from mint.rules.rule import load_rule
from mint.solver.problem import Settings, Solution
from tests.habits import RIGHT, WRONG, by_descent, write_files
from tests.test_cli import fails, run


@pytest.fixture(scope="module")
def model(habit_lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("habit") / "model"
    habit_lm.model.save_pretrained(folder)
    habit_lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("source") / "src", n=14, seed=5)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [(list(range(5, 15)), list(range(9)), None)]
    monkeypatch.setattr("mint.session.measured_sequences", lambda lm: lines)
    monkeypatch.setattr(repairing, "preparation", lambda *_: lambda _lm: None)
    monkeypatch.setattr(repairing, "_settings", lambda wishes: Settings(max_neurons=wishes.max_neurons))
    monkeypatch.setattr("mint.rules.solve.solve_rule", by_descent)


def mine_args(model, source, *more):
    return ["rule", "mine", "-m", model, "--wrong", WRONG, "--right", RIGHT, "--from", source, *more]


def repair_args(model, *more):
    return ["repair", "-m", model, "--rule", "clock.jsonl", *more]


def test_mine_repair_and_check_keep_the_contract(capsys, model, source, tmp_path, monkeypatch):
    code, out, err = run(
        capsys, *mine_args(model, source, "--limit", 30, "--name", "clock", "--out", "clock.jsonl", "--json")
    )
    mined = json.loads(out)
    assert code == 0 and {"sites", "fault", "near", "healthy", "skipped", "seconds"} <= set(mined)
    rule = load_rule("clock.jsonl")
    assert (len(rule.part("fault")), len(rule.near)) == (mined["fault"], mined["near"])
    assert not list(tmp_path.glob("*.journal"))

    repair = repair_args(model, "--learn", 12, "--accept", 0.5, "--out", "fix.st", "--json")
    code, out, err = run(capsys, *repair)
    result = json.loads(out)
    assert code == 0 and result["success"] and result["patch"] == "fix.st" and result["reason"] is None
    keys = {
        "generated_before",
        "generated_after",
        "target",
        "neurons",
        "margin_min",
        "seconds",
        "specificity",
    }
    assert keys <= set(result)
    for part in ("learn", "unseen"):
        assert {"cases", "right_before", "right_after"} <= set(result[part])
    assert len(result["unseen"]["interval"]) == 2
    for part in ("near", "healthy"):
        assert {"cases", "kept"} <= set(result[part])
    assert result["neurons"][0].keys() == {"layer", "index", "kind"}
    assert result["generated_before"].startswith("time()") and result["generated_after"].startswith("perf()")

    code, out, err = run(capsys, "show", "fix.st")
    shown = (
        f"rule clock: learnt from {result['learn']['cases']} prompts, {result['unseen']['right_after']} of"
    )
    assert code == 0 and shown in out

    again = ["rebase", "fix.st", "--rule", "clock.jsonl", "-m", model]
    code, out, err = run(capsys, *again, "--out", "newer.st", "--json")
    moved = json.loads(out)
    assert code == 0 and moved["patch"] == "newer.st" and moved["moved"]["stayed"] == moved["moved"]["before"]
    assert moved["unseen"] == result["unseen"]
    fails(
        capsys, 1, "with --rule where it was made from one", "rebase", "fix.st", "-m", model, "--out", "x.st"
    )

    check = ["rule", "check", "clock.jsonl", "-m", model, "--accept", 0.5, "--json"]
    code, out, err = run(capsys, *check, "--patch", "fix.st")
    assert code == 0 and json.loads(out)["unseen"] == result["unseen"]
    code, out, err = run(capsys, *check)
    assert code == 3 and not json.loads(out)["holds"] and "mint: rule 'clock' does not hold" in err

    code, out, err = run(capsys, *check[:-1], "--patch", "fix.st")
    assert (code, out) == (0, "holds: clock\n") and "unseen" in err and "95 %" in err
    fails(capsys, 1, "fix.st exists; give another name", *repair[:-1])
    monkeypatch.setattr(
        "mint.rules.solve.solve_rule", lambda *_, **__: Solution("none", None, "nothing found")
    )
    refused = [*repair[:-3], "--out", "other.st", "--json"]
    code, out, err = run(capsys, *refused)
    assert code == 3 and not json.loads(out)["success"] and json.loads(out)["patch"] is None
    assert "rule 'clock': nothing found" in err and not (tmp_path / "other.st").exists()


def test_the_page_shows_how_many_prompts_a_rule_has_to_learn_from(capsys, model, source):
    run(capsys, *mine_args(model, source, "--limit", 30, "--name", "clock", "--out", "clock.jsonl"))
    repair = repair_args(model, "--accept", 0.0, "--json", "--report", "page.html")
    code, out, _ = run(capsys, *repair, "--out", "fix.st", "--curve")
    page, unseen = Path("page.html").read_text(), json.loads(out)["unseen"]
    assert code == 0 and json.loads(out)["learn"]["cases"] == 8
    table = page[page.index("How many prompts it has to learn from") :]
    counts = [int(n) for n in re.findall(r"<tr><td>(\d+)</td><td>\d+ of", table)]
    assert counts[:4] == [1, 2, 4, 8] and set(counts[4:]) <= {16}
    assert f"<tr><td>8</td><td>{unseen['right_after']} of {unseen['cases']}</td>" in table
    assert "<svg" in table and "prompts learnt from" in table
    code, out, _ = run(capsys, *repair, "--out", "plain.st", "--force")
    assert code == 0 and "How many prompts" not in Path("page.html").read_text()
    assert Path("plain.st").read_bytes() == Path("fix.st").read_bytes(), "the curve is no part of the repair"
    fails(capsys, 2, "name one", *repair[:-3], "--out", "other.st", "--curve")
    single = ["repair", "-m", model, "-p", "a", "-t", "b", "--out", "other.st", "--curve"]
    fails(capsys, 2, "--curve goes with --rule", *single)


def test_mine_prints_what_it_found(capsys, model, source):
    code, out, err = run(capsys, *mine_args(model, source, "--limit", 4, "--out", "r.jsonl"))
    assert code == 0 and out.startswith("r.jsonl: 4 faults (") and "sites" in err


@pytest.mark.parametrize(
    "more, code, match",
    [
        (["--out", "r.jsonl", "--exclude", "*"], 1, "no call site of"),
        (["--out", "nowhere/r.jsonl"], 1, "is no directory"),
        (["--out", "r.jsonl", "--right", WRONG], 1, "are the same text"),
        (["--out", "r.jsonl", "--from", "nowhere"], 1, "nowhere: no such folder"),
        (["--out", "r.jsonl", "--limit", 0], 2, "limit"),
    ],
)
def test_mining_that_cannot_work_is_one_line(capsys, model, source, more, code, match):
    import pathlib

    run(capsys, *mine_args(model, source, *more))
    for journal in pathlib.Path().glob("*.journal"):
        journal.unlink()
    found, out, err = run(capsys, *mine_args(model, source, *more))
    assert (found, out) == (code, "") and err.count("\n") == 1
    import re

    assert re.search(match, err), err


@pytest.mark.parametrize(
    "more, code, match",
    [
        (["--rule", "none.jsonl"], 1, "none.jsonl: no such file; write a rule file with `mint rule mine`"),
        (["--rule", "bad.jsonl"], 1, "bad.jsonl:1: unknown key 'colour'"),
        (["--rule", "few.jsonl"], 1, "at only 1 of the prompts; a rule needs 4"),
        (["--rule", "few.jsonl", "--prompt", "x"], 2, "--prompt goes with --prompt or --cases, not with --rule|--prompt"),
        (["--rule", "few.jsonl", "--judge", "x:y"], 1, "unknown judge 'x:y'"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_repaired_is_one_line(capsys, model, tmp_path, more, code, match):
    row = {"rule": "r", "role": "fault", "prompt": "x = t.", "target": "perf()", "wrong": "time()"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row | {"colour": "red"}) + "\n")
    (tmp_path / "few.jsonl").write_text(json.dumps(row) + "\n")
    fails(capsys, code, match, "repair", "-m", model, "--out", "fix.st", *more)


def test_rules_in_a_row_are_measured_as_they_are_repaired(capsys, model, source, tmp_path, monkeypatch):
    run(capsys, *mine_args(model, source, "--limit", 30, "--name", "clock", "--out", "clock.jsonl"))
    again = load_rule("clock.jsonl")
    (tmp_path / "p.jsonl").write_text('{"id": "p", "prompt": "x", "target": "y"}\n')
    (tmp_path / "p.tests.jsonl").write_text(
        '{"id": "p", "before": "\'\'\'", "after": "\'\'\'"}\n'
    )  # anything passes
    monkeypatch.setattr("sys.argv", [
        "bench_rules.py", "row", "clock.jsonl", "none.jsonl", "--model", str(model), "--out", "row.jsonl",
        "--limit", "1", "--learn", "12", "--accept", "0.5", "--programs", "p.jsonl", "--controls", "1",
    ])  # fmt: skip
    runpy.run_path(str(Path(__file__).parents[1] / "scripts/bench_rules.py"), run_name="__main__")
    start, row, control = [json.loads(line) for line in (tmp_path / "row.jsonl").read_text().splitlines()]
    assert (start["key"], start["scores"], row["pass@1"]) == ("pass@1 at first", [1], [1])
    assert control == {"key": "random direction 0", "pass@1": [1]}
    now, first, of = row["right now, at first, of"]["clock"]
    unseen = [r for r in again.part("fault") if r.split == "unseen"]
    assert (row["key"], row["rules"], row["refused"], of) == ("row 1", 1, {}, len(unseen))
    assert now == first >= 0.5 * of and 0 <= row["broken"] <= row["changed"] <= 1
