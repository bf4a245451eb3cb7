"""`evaluate`: rows that are right, a run that survives everything, the same summary whoever computes it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from mint.case import Case, Keep
from mint.errors import CaseError, MintError
from mint.evaluation import controls, measuring, parallel
from mint.evaluation.drift import Drift
from mint.evaluation.ledger import Ledger, latest, read_rows
from mint.evaluation.measuring import Options, Skipped
from mint.evaluation.plan import Request
from mint.evaluation.run import evaluate
from mint.evaluation.summary import without_time
from mint.patch import applied, load
from mint.solver.problem import Settings
from tests.conftest import same_bits, tiny_lm, weights_of
from tests.fakes import REGISTRY

WORDS = ["ab", "cd", "xy", "q", "zz", "0", "up", "in"]
CASES = [
    Case(f"case{i}", f"# {w} {i}\n", f"{w}\n", (f"# say {w}\n", f"; {w}?\n"), (), "conala")
    for i, w in enumerate(WORDS)
]
CODE = ["def f(x):\n    return x\n", "a = [1, 2]\nprint(a)\n"]
OPTIONS = Options(neighbours=4, outputs=2, ordinary_tokens=30)
# Without `random-neuron`, which runs the main solver: these tests are of the evaluator.
CONTROLS = {"no-edit": controls.no_edit, "random-direction": controls.random_direction}
ARGUMENTS = {
    "controls": CONTROLS,
    "options": OPTIONS,
    "registry": REGISTRY,
    "heldout": CODE,
    "others": CASES[6:],
    "page": False,
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def run(out, cases=CASES[:4], solvers=("column",), lm=None, say=lambda _: None, **more):
    request = Request(solvers=solvers, **(ARGUMENTS | more))
    return evaluate(lm or tiny_lm("llama"), cases, out, request, say=say)


BARE = [Case(c.id, c.prompt, c.target) for c in CASES]
QUICK = {
    "heat_maps": 0,
    "options": Options(neighbours=2, outputs=0, ordinary_tokens=12),
    "solvers": ("useless",),
}


def quick(out, cases=BARE[:3], **more):
    """As little measuring as there can be."""
    return run(out, cases, **(QUICK | more))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run that several tests read: its folder, its summary, the weights before, the model after."""
    torch.set_num_threads(1)
    out, lm = tmp_path_factory.mktemp("finished"), tiny_lm("llama")
    before = weights_of(lm)
    solvers = ("column", "matrix", "nothing", "useless")
    return out, run(out, solvers=solvers, lm=lm, drift=Drift()), before, lm


# ---------------------------------------------------------------------- the contract


def test_summary_keeps_the_contract(finished):
    out, found, _, _ = finished
    entry = found["solvers"]["column"]
    assert list(found["solvers"]) == ["column", "matrix", "nothing", "useless"]
    assert entry["cases"] == 4
    assert {
        "exact_match_generated",
        "exact_match_forced",
        "token_accuracy_before",
        "token_accuracy_after",
    } <= set(entry["efficacy"])
    assert {"cases", "token_accuracy_before", "token_accuracy_after", "exact_match_generated"} <= set(
        entry["generalization"]
    )
    assert {"argmax_unchanged", "argmax_broken", "kl_mean", "kl_max"} <= set(entry["specificity"])
    assert {"neurons_median", "neurons_max"} <= set(entry["edit"])
    assert set(entry["time"]) == {"seconds_median", "seconds_p90"}
    assert entry["efficacy"]["exact_match_generated"] == 1
    assert entry["efficacy"]["token_accuracy_before"] < 1 == entry["efficacy"]["token_accuracy_after"]
    assert (entry["edit"]["neurons_median"], entry["edit"]["neurons_max"]) == (4, 4)
    for stop in entry["drift"]:
        assert {"repairs", "retained_exact_match", "argmax_unchanged", "argmax_broken", "kl_mean"} <= set(
            stop
        )
        assert "perplexity_ratio" in stop
    assert entry["time"] == {"seconds_median": 0.5, "seconds_p90": 0.5}
    assert json.loads((out / "summary.json").read_text()) == found
    assert "| column | 4 | 100.0 % |" in (out / "summary.md").read_text()


def test_rows_can_be_recomputed_from_their_patches(finished):
    """What a row says holds for anybody who applies its patch and generates."""
    out, _, _, lm = finished
    clean = tiny_lm("llama")
    rows = [r for r in read_rows(out / "results.jsonl") if r["solver"] == "column"]
    assert len(rows) == 4
    by_id = {c.id: c for c in CASES}
    for row in rows:
        case = by_id[row["case"]]
        prompt = lm.encode_prompt(case.prompt)
        target = lm.encode_target(prompt, case.target)
        positions = range(len(prompt) - 1, len(prompt) + len(target) - 1)
        with applied(lm, load(out / row["edit"]["patch"])):
            argmax = lm.model(torch.tensor([[*prompt, *target]])).logits[0].argmax(-1)
            right = [int(argmax[p]) == t for p, t in zip(positions, target, strict=True)]
            written = lm.generate([prompt], len(target))[0]
            others, total = 0, 0
            for name in row["neighbours"]:
                other = by_id[name]
                p = lm.encode_prompt(other.prompt)
                ids = [*p, *lm.encode_target(p, other.target)]
                where = range(len(p) - 1, len(ids) - 1)
                new = lm.model(torch.tensor([ids])).logits[0].argmax(-1)
                old = clean.model(torch.tensor([ids])).logits[0].argmax(-1)
                others += sum(int(old[i]) == int(new[i]) for i in where)
                total += len(where)
        assert row["efficacy"]["token_accuracy_after"] == sum(right) / len(right) == 1
        assert (
            row["efficacy"]["exact_match_generated"]
            is (lm.continuation(prompt, written) == case.target)
            is True
        )
        assert row["specificity"]["same_task"]["tokens"] == total
        assert row["specificity"]["same_task"]["argmax_unchanged"] == pytest.approx(others / total)
        assert row["written_before"] != row["written_after"] == case.target
        assert case.id not in row["neighbours"]


def test_model_is_left_bit_for_bit(finished):
    _, _, before, lm = finished
    assert same_bits(before, weights_of(lm))


def test_plain_models_too(tmp_path):
    lm = tiny_lm("gpt2")
    before = weights_of(lm)
    found = quick(tmp_path, solvers=("column", "matrix"), lm=lm)
    assert same_bits(before, weights_of(lm))
    assert found["solvers"]["column"]["efficacy"]["exact_match_generated"] == 1


def test_controls_are_always_there(finished):
    found = finished[1]
    assert {"no-edit", "random-direction"} <= set(found["controls"])
    nothing, turned = found["controls"]["no-edit"], found["controls"]["random-direction"]
    assert nothing["specificity"]["argmax_unchanged"] == 1
    assert nothing["specificity"]["kl_max"] < 1e-9
    assert nothing["efficacy"]["exact_match_generated"] == 0
    assert turned["edit"]["neurons_max"] == 4
    assert turned["edit"]["norm_median"] == pytest.approx(
        found["solvers"]["column"]["edit"]["norm_median"], rel=1e-4
    )
    assert turned["efficacy"]["exact_match_generated"] < 1
    assert found["controls_missing"] == ["random-neuron"]


def test_all_three_controls_are_run_by_default(tmp_path):
    found = quick(tmp_path, BARE[:2], solvers=("column",), controls=None)
    assert list(found["controls"]) == ["no-edit", "random-neuron", "random-direction"]
    assert found["controls_missing"] == []
    assert found["controls"]["random-neuron"]["errors"] == 0
    edited = {
        r["solver"]: r["edit"]["places"]
        for r in read_rows(tmp_path / "results.jsonl")
        if r["case"] == "case0"
    }
    own = {(p["layer"], p["index"]) for p in edited["column"]}
    assert edited["random-neuron"] == [] or not own & {
        (p["layer"], p["index"]) for p in edited["random-neuron"]
    }


def test_several_solvers_in_one_run(finished):
    found = finished[1]
    assert found["solvers"]["matrix"]["edit"]["neurons_median"] is None
    assert found["solvers"]["matrix"]["efficacy"]["exact_match_generated"] == 1
    assert found["solvers"]["nothing"]["no_repair"] == 4
    assert found["solvers"]["nothing"]["specificity"]["argmax_unchanged"] == 1
    assert found["solvers"]["useless"]["efficacy"]["exact_match_generated"] == 0
    assert found["solvers"]["useless"]["specificity"]["argmax_unchanged"] < 1


def test_intervals_hold_the_mean(finished):
    entry = finished[1]["solvers"]["column"]
    low, high = entry["intervals"]["argmax_unchanged"]
    assert low <= entry["specificity"]["argmax_unchanged"] <= high


def test_keep_is_rechecked_by_generating(tmp_path):
    lm = tiny_lm("llama")
    own = Keep("def g(")
    never = Keep("# nobody\n", "knows\n")
    case = Case("k1", "# ab 0\n", "ab\n", (), (own, never))
    found = quick(tmp_path, [case, *BARE[1:3]], lm=lm)
    rows = {r["case"]: r for r in read_rows(tmp_path / "results.jsonl") if r["solver"] == "useless"}
    assert rows["k1"]["keep"]["asked"] == 2
    assert rows["k1"]["keep"]["right_before"] == 1
    assert rows["k1"]["keep"]["kept"] == 1 - rows["k1"]["keep"]["broken"]
    assert found["solvers"]["useless"]["keep"]["asked"] == 2
    silent = quick(tmp_path / "2", [case, *BARE[1:3]], solvers=("nothing",), lm=lm)
    assert silent["solvers"]["nothing"]["keep"] == {"asked": 2, "right_before": 1, "kept": 1, "broken": 0}


def test_judge_and_text_scores_stand_beside_exact_match(finished):
    entry = finished[1]["solvers"]["column"]
    assert entry["judge"]["judge"] == ["python"]
    assert entry["judge"]["matches_after"] == 1
    assert entry["efficacy"]["edit_similarity_after"] == 1 > entry["efficacy"]["edit_similarity_before"]


# ---------------------------------------------------------------------- choosing cases


def test_limit_draws_with_the_seed_and_keeps_neighbours_from_the_whole_file(tmp_path):
    assert [c.id for c in measuring.draw(BARE, 2, 1)] == [c.id for c in measuring.draw(BARE, 2, 1)]
    assert len({tuple(c.id for c in measuring.draw(BARE, 2, seed)) for seed in range(9)}) > 1
    found = quick(tmp_path, BARE, limit=2, seed=1)
    rows = read_rows(tmp_path / "results.jsonl")
    assert found["cases"] == 2 and found["cases_found"] == 8
    assert {r["case"] for r in rows} == {c.id for c in measuring.draw(BARE, 2, 1)}
    near = measuring.neighbours(BARE, next(c for c in BARE if c.id == rows[0]["case"]), 2, 1)
    assert rows[0]["neighbours"] == [c.id for c in near]


def test_neighbours_are_other_cases_and_always_the_same():
    cases = [Case(str(i), f"# p{i}\n", f"t{i}\n") for i in range(30)]
    case = cases[4]
    twins = [Case("twin", "# q\n", case.target), Case("again", case.prompt, "t\n")]
    first = measuring.neighbours([*cases, *twins], case, 8, seed=0)
    assert first == measuring.neighbours([*cases, *twins], case, 8, seed=0)
    assert first != measuring.neighbours([*cases, *twins], case, 8, seed=1)
    assert len({c.id for c in first}) == 8
    everything = measuring.neighbours([*cases, *twins], case, 99, seed=0)
    assert {c.id for c in everything} == {c.id for c in cases} - {"4"}
    assert measuring.neighbours(cases, case, 0, seed=0) == []


def test_neighbours_never_share_target_prompt_or_rephrasing():
    case = Case("a", "p", "t\n", ("r",))
    pool = [
        case,
        Case("b", "p2", "t\n"),
        Case("c", "r", "u\n"),
        Case("d", "p", "v\n"),
        Case("e", "p3", "w\n"),
    ]
    assert [c.id for c in measuring.neighbours(pool, case, 9, 0)] == ["e"]


def test_raising_the_limit_reuses_rows(tmp_path):
    quick(tmp_path, BARE[:4], limit=2)
    first = (tmp_path / "results.jsonl").read_bytes()
    quick(tmp_path, BARE[:4])
    assert (tmp_path / "results.jsonl").read_bytes().startswith(first)
    keys = [r["key"] for r in read_rows(tmp_path / "results.jsonl")]
    assert len(keys) == len(set(keys))


def test_other_settings_are_other_rows(tmp_path):
    quick(tmp_path, BARE[:2])
    n = len(read_rows(tmp_path / "results.jsonl"))
    quick(tmp_path, BARE[:2], settings=Settings(margin=2.0))
    quick(tmp_path, BARE[:2], seed=5)
    assert len(read_rows(tmp_path / "results.jsonl")) == 3 * n


# ---------------------------------------------------------------------- trouble


def test_one_failing_case_never_ends_the_run(tmp_path):
    said = []
    found = quick(tmp_path, BARE[:4], solvers=("broken",), say=said.append)
    entry = found["solvers"]["broken"]
    assert (entry["cases"], entry["errors"]) == (4, 2)
    assert entry["efficacy"]["exact_match_generated"] == 0.5
    assert sum("out of luck" in s for s in said) == 2 and all("\n" not in s for s in said)
    assert {e["case"] for e in found["errors"] if e["solver"] == "broken"} == {"case1", "case3"}
    again = quick(tmp_path, BARE[:4], solvers=("broken",))
    assert without_time(again) == without_time(found)


def test_errors_are_tried_again_when_asked(tmp_path):
    luck = {"calls": 0}

    def unlucky(lm, problem, settings):
        luck["calls"] += 1
        if luck["calls"] == 1:
            raise RuntimeError("once")
        return REGISTRY["column"](lm, problem, settings)

    more = {"solvers": ("unlucky",), "registry": {"unlucky": unlucky}}
    assert quick(tmp_path, BARE[:1], **more)["solvers"]["unlucky"]["errors"] == 1
    assert quick(tmp_path, BARE[:1], retry_errors=True, **more)["solvers"]["unlucky"]["errors"] == 0
    assert quick(tmp_path, BARE[:1], **more)["solvers"]["unlucky"]["errors"] == 0


def test_a_solver_that_leaves_the_model_changed_ends_the_run(tmp_path):
    with pytest.raises(MintError, match="left the model changed on case 'case0'"):
        quick(tmp_path, solvers=("dirty",))
    assert not [r for r in read_rows(tmp_path / "results.jsonl") if r["solver"] == "dirty"]


def test_unknown_solver_names_the_known_ones(tmp_path):
    with pytest.raises(MintError, match="unknown solver 'colum'; known are column, matrix"):
        run(tmp_path, solvers=("colum",))


@pytest.mark.parametrize(
    "cases, limit, line", [([], None, "found none"), (CASES, 0, "limit must be at least 1")]
)
def test_nothing_to_do_is_an_error(tmp_path, cases, limit, line):
    with pytest.raises(MintError, match=line):
        run(tmp_path, cases, limit=limit)


def test_out_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(MintError, match="cannot be made"):
        run(tmp_path / "x")


def test_bad_rows_are_listed_and_nothing_is_lost(tmp_path):
    file = tmp_path / "cases.jsonl"
    lines = [
        {"id": "a", "prompt": "# a\n", "target": "b\n"},
        {"id": "b", "prompt": "# b\n"},
        {"id": "a", "prompt": "# c\n", "target": "d\n"},
        {"id": "d", "prompt": "# d\n", "target": ""},
        {"id": "e", "prompt": "# e\n", "target": "e" * 40 + "\n"},
        {"id": "f", "prompt": "# f\n", "target": "f\n", "extra": 1},
    ]
    text = "\n".join(json.dumps(x) for x in lines) + "\nnot json\n"
    file.write_bytes(text.encode() + b"\xff\xfe\n" + b'{"id": "g", "prompt": "# g\\n", "target": "hh\\n"}\n')
    cases, skipped = measuring.read_cases(file)
    assert [c.id for c in cases] == ["a", "e", "g"]
    said = []
    options = Options(neighbours=4, outputs=1, ordinary_tokens=30, max_target_tokens=20)
    found = run(
        tmp_path / "out", cases, solvers=("nothing",), skipped=skipped, options=options, say=said.append
    )
    assert found["skipped"]["count"] == 7
    assert found["cases"] + found["skipped"]["count"] == 9
    reasons = {r["where"]: r["reason"] for r in found["skipped"]["rows"]}
    assert reasons["cases.jsonl:2"] == "no key 'target'; a case needs id, prompt and target"
    assert reasons["cases.jsonl:3"] == "id 'a' was used on line 1; ids must be unique"
    assert "empty" in reasons["cases.jsonl:4"]
    assert "unknown key 'extra'" in reasons["cases.jsonl:6"]
    assert "not JSON" in reasons["cases.jsonl:7"]
    assert "not UTF-8" in reasons["cases.jsonl:8"]
    assert reasons["e"] == "target: 41 tokens, at most 20 are measured"
    assert len([s for s in said if s.startswith("skipped ")]) == 7
    assert "## Skipped: 7" in (tmp_path / "out" / "summary.md").read_text()


def test_a_file_without_any_case_is_an_error(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(CaseError, match="no usable case among 1 lines; the first: x.jsonl:1"):
        measuring.read_cases(tmp_path / "x.jsonl")
    with pytest.raises(CaseError, match="no such file"):
        measuring.read_cases(tmp_path / "y.jsonl")


def test_too_long_for_the_context_is_skipped_in_one_line():
    lm = tiny_lm("gpt2")  # a context of 1024 tokens
    _, skipped = measuring.usable(lm, [Case("long", "x" * 1100, "y\n"), Case("ok", "x", "y\n")], Options())
    assert skipped == [Skipped("long", skipped[0].reason)] and "shorten the prompt" in skipped[0].reason


# ---------------------------------------------------------------------- resuming


def test_second_run_does_nothing_and_says_the_same(tmp_path):
    first = quick(tmp_path, solvers=("column",), drift=Drift())
    rows = (tmp_path / "results.jsonl").read_bytes()

    def never(*_):
        raise AssertionError("a finished case was solved again")

    again = quick(tmp_path, drift=Drift(), solvers=("column",), registry={"column": never})
    assert without_time(again) == without_time(first)
    assert (tmp_path / "results.jsonl").read_bytes() == rows


@pytest.mark.parametrize("cut", [1, 7, 400])
def test_a_line_cut_by_a_kill_is_made_again(tmp_path, cut):
    first = quick(tmp_path)
    file = tmp_path / "results.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    assert without_time(quick(tmp_path)) == without_time(first)
    keys = [r["key"] for r in read_rows(file)]
    assert len(keys) == len(set(keys)) == 3 * (1 + len(CONTROLS))


def test_a_missing_control_is_made_again(tmp_path):
    first = quick(tmp_path)
    file = tmp_path / "results.jsonl"
    lines = [x for x in file.read_text().splitlines() if json.loads(x)["solver"] != "random-direction"]
    file.write_text("\n".join(lines))  # no newline at the end either
    assert without_time(quick(tmp_path)) == without_time(first)


def test_ledger_writes_a_key_once_and_mends_the_last_line(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text('{"key": "a"}\n{"key": "b", "x"')
    ledger = Ledger(file)
    assert "a" in ledger and "b" not in ledger
    for _ in range(2):
        ledger.append({"key": "b", "x": 1})
    ledger.append({"key": "a"})
    assert read_rows(file) == [{"key": "a"}, {"key": "b", "x": 1}]


SCRIPT = """
import atexit, sys, torch
from pathlib import Path
atexit.register(lambda: print("still joined:", torch.distributed.is_initialized()))  # runs after what registers later
torch.set_num_threads(1)
from tests.test_evaluate import ARGUMENTS, BARE, QUICK
from mint.evaluation.drift import Drift
from mint.evaluation.plan import Request
from mint.evaluation.run import evaluate
from mint.model.loading import load_lm
lm = load_lm(sys.argv[2]) if len(sys.argv) > 2 else __import__("tests.conftest").conftest.tiny_lm("llama")
lm.name = "tiny"
arguments = ARGUMENTS | QUICK | {"solvers": ("column", "useless")}
evaluate(lm, BARE[:5], sys.argv[1], Request(drift=Drift(), **arguments), say=lambda s: print(s, file=sys.stderr))
"""
ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "TOKENIZERS_PARALLELISM": "false",
}


def size_of(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*.jsonl"))


def test_killed_again_and_again_gives_the_same_summary(tmp_path):
    """kill -9 whenever something new was written, until the run gets through; then compare with an undisturbed run."""
    whole = quick(tmp_path / "whole", BARE[:5], solvers=("column", "useless"), drift=Drift())
    out, kills = tmp_path / "killed", 0
    out.mkdir()
    while True:
        size = size_of(out)
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(out)], env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE
        )
        while process.poll() is None and (kills >= 3 or size_of(out) < size + 9000):
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        stderr = process.communicate()[1].decode()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, stderr
    assert kills >= 1
    found = json.loads((out / "summary.json").read_text())
    whole["model"]["name"] = found["model"]["name"]
    assert without_time(found) == without_time(json.loads(json.dumps(whole)))


# ---------------------------------------------------------------------- several processes


def test_two_processes_give_the_summary_of_one(tmp_path):
    lm = tiny_lm("llama")
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    script = tmp_path / "go.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    for out, prefix in (("one", [sys.executable]), ("two", launch)):
        done = subprocess.run(
            [*prefix, str(script), str(tmp_path / out), str(tmp_path / "model")],
            env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        # Whoever exits as a member may be aborted by a thread of gloo's, after everything is done.
        assert set(re.findall(r"still joined: (\w+)", done.stdout)) == {"False"}, done.stdout
    one, two = (json.loads((tmp_path / x / "summary.json").read_text()) for x in ("one", "two"))
    assert without_time(one) == without_time(two)
    parts = [read_rows(tmp_path / "two" / f"results.{i}.jsonl") for i in (0, 1)]
    assert all(parts), "each process must have done something"
    keys = [{r["key"] for r in part} for part in parts]
    assert not keys[0] & keys[1]
    assert keys[0] | keys[1] == {r["key"] for r in read_rows(tmp_path / "two" / "results.jsonl")}


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_every_launcher_that_accelerate_knows_is_noticed(monkeypatch, name):
    """Processes that take themselves for alone would all write the same files."""
    assert not parallel.launched() and parallel.team() == parallel.Team()
    monkeypatch.setenv(name, "2")
    assert parallel.launched()


def test_shares_are_everything_once():
    items = list(range(7))
    shares = [parallel.Team(i, 3).share(items) for i in range(3)]
    assert sorted(x for s in shares for x in s) == items
    assert parallel.Team().share(items) == items


def test_device_of_a_launched_process():
    """Of its place on its own machine, which every launcher tells in its own way, not of its number among all."""
    assert parallel.Team().device("cuda") == "cuda"
    second = parallel.Team(3, 4, local=1)
    assert (second.device("cuda"), second.device("cpu")) == ("cuda:1", "cpu")


def test_options_are_part_of_the_summary(tmp_path):
    found = quick(tmp_path, BARE[:1])
    assert found["options"] == asdict(QUICK["options"])


def test_the_page_shows_heat_maps_of_the_first_cases(tmp_path):
    quick(tmp_path, BARE, heat_maps=1, page=True)
    text = (tmp_path / "report.html").read_text()
    assert text.count('<div class="heat">') == 1
    assert "Effect of each feed-forward block" in text


def test_an_old_error_never_wins_over_a_later_success(tmp_path):
    """Whatever the order in which files are read: a success in one process's part stands before an error in another's."""
    good, bad = {"key": "k", "status": "measured"}, {"key": "k", "status": "error"}
    assert latest([good, bad]) == latest([bad, good]) == {"k": good}
    assert latest([bad, bad | {"n": 2}]) == {"k": bad | {"n": 2}}
    (tmp_path / "results.jsonl").write_text(json.dumps(good) + "\n")
    own = tmp_path / "results.0.jsonl"
    own.write_text(json.dumps(bad) + "\n")
    assert Ledger(own, [tmp_path / "results.jsonl"]).rows["k"] == good


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.setattr("mint.patch.edit.__version__", "0.0.0"),
        lambda m: m.setattr("mint.evaluation.plan.reference_digest", lambda extra: "other text"),
    ],
)
def test_another_mint_or_other_reference_text_is_measured_anew(tmp_path, monkeypatch, change):
    quick(tmp_path, BARE[:1])
    before = len(read_rows(tmp_path / "results.jsonl"))
    quick(tmp_path, BARE[:1])
    assert len(read_rows(tmp_path / "results.jsonl")) == before
    change(monkeypatch)
    quick(tmp_path, BARE[:1])
    assert len(read_rows(tmp_path / "results.jsonl")) == 2 * before


def test_the_same_reference_text_in_another_place_is_the_same(tmp_path):
    rows = []
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("def f(): return 1\n")
        quick(tmp_path, BARE[:1], settings=Settings(reference=(str(tmp_path / name),)))
        rows.append(len(read_rows(tmp_path / "results.jsonl")))
    assert rows[0] == rows[1]
