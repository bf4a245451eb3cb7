"""The command line: the contract's keys and exit codes, one line for everything that goes wrong, nothing half done.

Commands run on a tiny damaged model saved to disk; a stand-in solver undoes the damage (see test_pipeline).
"""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mint import patch as P
from mint.cli import main
from mint.model.loading import load_lm
from tests.conftest import byte_tokenizer, tiny_lm
from tests.test_checkpoint import hashes
from tests.test_patch import crafted, random_patch
from tests.test_pipeline import planted, undoing, written


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """(model directory, case, solver) of a model with a planted fault."""
    lm = tiny_lm("llama")
    (case,), undo = planted(lm)
    folder = tmp_path_factory.mktemp("broken") / "model"
    lm.model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder, case, undo


@pytest.fixture
def fault(broken, monkeypatch, tmp_path):
    """The planted fault, with its solver in place and the working directory empty."""
    folder, case, undo = broken
    solver = undoing(undo)
    monkeypatch.setattr("mint.solver.named", lambda name: solver)
    monkeypatch.setattr("mint.cli.parts.quick_attribution", lambda wishes: None)
    monkeypatch.setattr("mint.cli.parts.cause_or_carrier", lambda: None)
    monkeypatch.setattr("mint.cli.parts.preparation", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    return folder, case


def repair_args(folder, case, *more):
    return [
        "repair",
        "-m",
        str(folder),
        "-p",
        case.prompt,
        "-t",
        case.target,
        "--stop",
        "none",
        *map(str, more),
    ]


def run(capsys, *argv):
    """(exit code, stdout, stderr) of one command."""
    capsys.readouterr()
    code = main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def fails(capsys, code, match, *argv):
    """The command ends with this code and one line on stderr that matches, and changes no file here."""
    before = hashes(Path.cwd())
    found, out, err = run(capsys, *argv)
    assert (found, out) == (code, ""), err
    assert err.count("\n") == 1 and err.startswith("mint: ") and re.search(match, err), err
    assert hashes(Path.cwd()) == before
    return err


# ---------------------------------------------------------------------- the main job


def test_repair_generate_apply_revert(fault, capsys, tmp_path):
    folder, case = fault
    clean = hashes(folder)
    code, out, err = run(capsys, *repair_args(folder, case, "--out", "fix.safetensors", "--json"))
    assert code == 0 and err == ""
    result = json.loads(out)
    keys = {"success", "generated_before", "generated_after", "target", "neurons", "margin_min", "seconds"}
    assert keys | {"specificity", "patch", "reason"} <= set(result)
    assert result["success"] is True and result["reason"] is None and result["patch"] == "fix.safetensors"
    assert result["generated_after"] == case.target != result["generated_before"]
    assert all(set(n) == {"layer", "index", "kind"} for n in result["neurons"])
    assert {"argmax_unchanged", "kl_mean"} <= set(result["specificity"])
    assert hashes(folder) == clean

    asked = ["generate", "-m", folder, "-p", case.prompt, "--max-new-tokens", len(case.target), "--json"]
    before = json.loads(run(capsys, *asked)[1])
    after = json.loads(run(capsys, *asked, "--patch", "fix.safetensors")[1])
    assert before["text"] == result["generated_before"] and after["text"] == case.target

    code, out, _ = run(capsys, "apply", "fix.safetensors", "--model", folder, "--out", tmp_path / "fixed")
    assert code == 0 and out == f"{tmp_path / 'fixed'}\n" and hashes(folder) == clean
    applied = json.loads(run(capsys, *asked[:2], tmp_path / "fixed", *asked[3:])[1])
    assert applied["text"] == case.target
    code, out, _ = run(
        capsys, "revert", "fix.safetensors", "--model", tmp_path / "fixed", "--in-place", "--json"
    )
    assert code == 0 and json.loads(out)["applied"] == []
    assert hashes(tmp_path / "fixed") == clean


def test_people_get_tables_on_stderr_and_the_path_on_stdout(fault, capsys):
    folder, case = fault
    code, out, err = run(capsys, *repair_args(folder, case))
    assert code == 0 and out == "fix.safetensors\n"
    assert "writes now" in err and "neurons changed" in err and "what else changed" in err
    assert "\x1b" not in err
    code, out, _ = run(capsys, *repair_args(folder, case))
    assert out == "fix-2.safetensors\n"


def test_a_target_already_written_is_success_without_a_patch(broken, capsys, tmp_path, monkeypatch):
    folder, _, _ = broken
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mint.solver.named", lambda name: None)
    lm = load_lm(str(folder))
    ids, target = next((p, t) for p, t in written(lm, 3).items() if t)
    asked = ["-p", lm.decode(ids), "-t", target, "--stop", "none", "--json"]
    code, out, err = run(capsys, "repair", "-m", folder, *asked)
    result = json.loads(out)
    assert code == 0 and err == "" and result["success"] is True
    assert result["patch"] is None and result["neurons"] == [] and result["reason"] is None
    assert "no patch is needed" in result["note"]
    assert list(tmp_path.glob("*.safetensors")) == []


def test_no_acceptable_repair_is_exit_3_and_no_file(fault, capsys, monkeypatch):
    from mint.solver.problem import Solution

    folder, case = fault
    monkeypatch.setattr("mint.solver.named", lambda n: lambda *_: Solution("x", None, reason="too hard"))
    code, out, err = run(capsys, *repair_args(folder, case, "--json", "--out", "fix.safetensors"))
    result = json.loads(out)
    assert code == 3 and result["success"] is False and result["reason"] == "too hard"
    assert result["patch"] is None and err == "mint: no acceptable repair: too hard\n"
    assert list(Path.cwd().iterdir()) == []


def test_several_cases_make_one_patch(fault, capsys, tmp_path):
    folder, case = fault
    rows = [{"id": i, "prompt": case.prompt, "target": case.target} for i in ("a", "b")]
    Path("cases.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, out, _ = run(
        capsys,
        "repair",
        "-m",
        folder,
        "--cases",
        "cases.jsonl",
        "--stop",
        "none",
        "--json",
        "--out",
        "all.safetensors",
    )
    result = json.loads(out)
    assert code == 0 and [c["id"] for c in result["cases"]] == ["a", "b"]
    assert result["cases"][1]["note"] and result["patch"] == "all.safetensors"
    assert [c["id"] for c in P.load("all.safetensors").info["cases"]] == ["a"]


def test_a_refused_case_of_several_writes_nothing_unless_partial(fault, capsys):
    folder, case = fault
    rows = [
        {"id": "a", "prompt": case.prompt, "target": case.target},
        {"id": "b", "prompt": "q", "target": "~~~"},
    ]
    Path("cases.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    args = [
        "repair",
        "-m",
        folder,
        "--cases",
        "cases.jsonl",
        "--stop",
        "none",
        "--json",
        "--out",
        "all.safetensors",
    ]
    code, out, err = run(capsys, *args)
    assert code == 3 and "case 'b'" in err and json.loads(out)["patch"] is None
    assert not Path("all.safetensors").exists()
    code, out, err = run(capsys, *args, "--partial")
    assert code == 0 and json.loads(out)["patch"] == "all.safetensors" and json.loads(out)["success"] is False
    assert "written without what was refused: case 'b'" in " ".join(err.split())


def test_repair_on_a_patched_model_starts_there(fault, capsys, monkeypatch):
    folder, case = fault
    assert run(capsys, *repair_args(folder, case, "--out", "a.safetensors"))[0] == 0
    code, out, _ = run(capsys, *repair_args(folder, case, "--patch", "a.safetensors", "--json"))
    assert code == 0 and "no patch is needed" in json.loads(out)["note"]


def test_a_report_is_written(fault, capsys):
    folder, case = fault
    assert run(capsys, *repair_args(folder, case, "--report", "page.html"))[0] == 0
    page = Path("page.html").read_text()
    assert page.startswith("<!") and "Repaired" in page
    fails(capsys, 1, "page.html exists", *repair_args(folder, case, "--report", "page.html"))


def test_repair_explains_itself_to_people(broken, capsys, tmp_path, monkeypatch):
    folder, case, undo = broken
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mint.solver.SOLVERS", {"contexts": undoing(undo)})
    code, _, err = run(capsys, *repair_args(folder, case, "--report", "page.html"))
    assert code == 0 and "neurons behind" in err and "the edited neurons: " in err
    assert "<svg" in Path("page.html").read_text()


def test_prompts_from_files_are_taken_as_they_are(fault, capsys):
    folder, case = fault
    Path("p.txt").write_bytes(case.prompt.encode())
    Path("t.txt").write_bytes(case.target.encode())
    code, out, _ = run(
        capsys, "repair", "-m", folder, "--prompt-file", "p.txt", "--target-file", "t.txt", "--stop", "none", "--json"
    )  # fmt: skip
    assert code == 0 and json.loads(out)["target"] == case.target


# ---------------------------------------------------------------------- bad input


BAD_REPAIRS = [
    (["-p", "a", "-t", ""], 1, "'target' is empty"),
    (["-p", "", "-t", "x"], 1, "'prompt' is empty"),
    (["-p", "a" * 3000, "-t", "x"], 1, "the prompt has 3000 tokens, the context .* shorten"),
    (["-p", "a\udcff", "-t", "x"], 1, "lone surrogate"),
    (["-p", "a"], 2, "give one of --target and --target-file, found none"),
    (["-p", "a", "--prompt-file", "x", "-t", "b"], 2, "found both"),
    (["-p", "a", "-t", "b", "--cases", "c"], 2, "not both"),
    (["--prompt-file", "none.txt", "-t", "b"], 1, "none.txt: cannot be read"),
    (["--cases", "none.jsonl"], 1, "none.jsonl: no such file"),
    (["-p", "a", "-t", "b", "--keep", "none.jsonl"], 1, "none.jsonl: no such file"),
    (["-p", "a", "-t", "b", "--stop", "never"], 2, "unknown stop rule 'never'"),
    (["-p", "a", "-t", "b", "--where", "there"], 2, "unknown --where 'there'"),
    (["-p", "a", "-t", "b", "--max-neurons", "3"], 2, "max-neurons"),
    (["-p", "a", "-t", "b", "--generalize", "2"], 2, "generalize"),
    (["-p", "a", "-t", "b", "--dtype", "int3"], 1, "unknown dtype 'int3'"),
    (["-p", "a", "-t", "b", "--device", "nonsense"], 1, "cannot use device 'nonsense'"),
    (["-p", "a", "-t", "b", "--system", "x"], 1, "add --chat"),
    (["-p", "a", "-t", "b", "--chat"], 1, "has no chat template"),
    (["-p", "a", "-t", "b", "--reference", "none.txt"], 1, "none.txt: no such file"),
    (["-p", "a", "-t", "b", "--out", "no/where/fix.safetensors"], 1, "is no directory"),
    (["-p", "a", "-t", "b", "--out", "."], 1, "is a directory"),
    (["-p", "a", "-t", "b", "--patch", "none.safetensors"], 1, "none.safetensors: cannot be read"),
    (["-p", "a", "-t", "b", "--verify-dtype", "int3"], 1, "unknown dtype 'int3'"),
    (["-p", "a", "-t", "b", "--nonsense"], 2, "No such option"),
]


@pytest.mark.parametrize(("options", "code", "match"), BAD_REPAIRS, ids=[m for _, _, m in BAD_REPAIRS])
def test_bad_repairs(fault, capsys, options, code, match):
    fails(capsys, code, match, "repair", "-m", fault[0], *options)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b'{"id": "a", "prompt": "p", "target": "\xff"}\n', r"cases.jsonl:1:\d+: not UTF-8"),
        (b'{"id": "a", "prompt": "p", "target": "t"}\n{"id" 3}\n', r"cases.jsonl:2:7: not JSON"),
        (b'{"id": "a", "prompt": "p", "target": "t", "tagret": "x"}\n', "unknown key 'tagret'"),
        (b'{"id": "a", "prompt": "p", "target": "t"}\n' * 2, "ids must be unique"),
        (b"", "no cases"),
        (
            b'{"id": "a", "prompt": "p", "target": "t"}\n{"id": "b", "prompt": "p", "target": "u"}\n',
            "case 'a' and case 'b' contradict each other",
        ),
    ],
    ids=["utf-8", "json", "key", "twice", "empty", "contradiction"],
)
def test_bad_case_files(fault, capsys, data, match):
    Path("cases.jsonl").write_bytes(data)
    fails(capsys, 1, match, "repair", "-m", fault[0], "--cases", "cases.jsonl")


def test_output_that_exists_needs_force(fault, capsys):
    folder, case = fault
    Path("fix.safetensors").write_text("mine")
    fails(
        capsys, 1, "fix.safetensors exists.*--force", *repair_args(folder, case, "--out", "fix.safetensors")
    )
    assert run(capsys, *repair_args(folder, case, "--out", "fix.safetensors", "--force"))[0] == 0
    P.load("fix.safetensors")


def test_missing_and_truncated_models(fault, capsys, tmp_path):
    fails(capsys, 1, "no/such/model", "generate", "-m", "./no/such/model", "-p", "x")
    (tmp_path / "empty").mkdir()
    fails(capsys, 1, "config.json is missing", "generate", "-m", "empty", "-p", "x")
    tiny = tmp_path / "cut"
    tiny_lm("llama").model.save_pretrained(tiny)
    byte_tokenizer().save_pretrained(tiny)
    data = (tiny / "model.safetensors").read_bytes()
    (tiny / "model.safetensors").write_bytes(data[: len(data) // 2])
    fails(capsys, 1, "copy or download the file again", "generate", "-m", "cut", "-p", "x")
    Path("not.gguf").write_bytes(b"nonsense")
    fails(capsys, 1, "not a GGUF file", "generate", "-m", "not.gguf", "-p", "x")
    fails(capsys, 1, "none.gguf: no such file", "generate", "-m", "none.gguf", "-p", "x")


def test_an_unknown_solver_names_the_known_ones(broken, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mint.solver.SOLVERS", {"mint": None, "star": None}, raising=False)
    fails(capsys, 1, "unknown solver 'mnt'; known are mint, star; did you mean 'mint'", *repair_args(
        broken[0], broken[1], "--solver", "mnt"
    ))  # fmt: skip


def test_wrong_patches(fault, capsys, tmp_path):
    folder, case = fault
    lm = load_lm(str(folder))
    good = random_patch(lm)
    P.save(good, "good.safetensors")
    P.save(random_patch(tiny_lm("llama", seed=5)), "other.safetensors")
    P.save(random_patch(tiny_lm("llama", dtype=torch.bfloat16)), "half.safetensors")
    Path("bad.safetensors").write_bytes(crafted(format=7))
    Path("cut.safetensors").write_bytes(Path("good.safetensors").read_bytes()[:-9])
    bad = {"other": "another model", "half": "made in bfloat16", "bad": "format version 7", "cut": "damaged"}
    for name, match in bad.items():
        fails(capsys, 1, match, "generate", "-m", folder, "-p", "x", "--patch", f"{name}.safetensors")
        # On disk a patch fits wherever the saved values are the patch's own, whatever their format.
        match = "differ from the patch's 'before'" if name == "half" else match
        fails(capsys, 1, match, "apply", f"{name}.safetensors", "-m", folder, "--out", "x")
    twice = ["--patch", "good.safetensors"] * 2
    fails(capsys, 1, "already applied", "generate", "-m", folder, "-p", "x", *twice)
    fails(capsys, 1, "nothing to revert", "revert", "good.safetensors", "-m", folder, "--in-place")
    for name in ("bad", "cut"):
        fails(capsys, 1, bad[name], "show", f"{name}.safetensors")
        fails(capsys, 1, bad[name], "export", f"{name}.safetensors", "--out", "x")
        fails(capsys, 1, bad[name], "scale", f"{name}.safetensors", "2", "--out", "x")
        fails(capsys, 1, bad[name], "compose", "good.safetensors", f"{name}.safetensors", "--out", "x")
    fails(capsys, 2, "give one of --out DIR and --in-place", "apply", "good.safetensors", "-m", folder)
    fails(capsys, 2, "unknown format", "export", "good.safetensors", "--format", "onnx", "--out", "x")
    fails(capsys, 1, "give --model", "export", "good.safetensors", "--out", "x")
    fails(capsys, 1, "finite number", "scale", "good.safetensors", "nan", "--out", "x")
    fails(capsys, 1, "good.safetensors exists", "scale", "good.safetensors", "2", "--out", "good.safetensors")


# ---------------------------------------------------------------------- patches from patches


def test_show_compose_scale_export(fault, capsys):
    folder, case = fault
    lm = load_lm(str(folder))
    P.save(random_patch(lm, [(0, 1, "value")]), "a.safetensors")
    P.save(random_patch(lm, [(1, 2, "rewrite")]), "b.safetensors")
    assert run(capsys, "compose", "a.safetensors", "b.safetensors", "--out", "c.safetensors")[0] == 0
    code, out, _ = run(capsys, "show", "c.safetensors", "--json")
    shown = json.loads(out)
    assert [(e["layer"], e["index"], e["kind"]) for e in shown["edits"]] == [
        (0, 1, "value"),
        (1, 2, "rewrite"),
    ]
    assert run(capsys, "scale", "a.safetensors", "-0.5", "--out", "d.safetensors")[0] == 0
    assert P.load("d.safetensors").info["scaled"] == -0.5
    code, out, _ = run(capsys, "show", "a.safetensors")
    assert code == 0 and "layer 0, neuron 1: value" in out
    assert run(capsys, "export", "c.safetensors", "-m", folder, "--out", "lora")[0] == 0
    assert sorted(p.name for p in Path("lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    code, out, _ = run(
        capsys, "export", "c.safetensors", "-m", folder, "--format", "gguf-lora", "--out", "l.gguf", "--json"
    )
    assert code == 0 and json.loads(out) == {"out": "l.gguf", "format": "gguf-lora"}


def test_a_repaired_patch_exports_without_the_model(fault, capsys):
    folder, case = fault
    assert run(capsys, *repair_args(folder, case))[0] == 0
    assert run(capsys, "export", "fix.safetensors", "--out", "lora")[0] == 0


def test_text_in_a_patch_cannot_forge_the_terminal(lm, capsys, tmp_path):
    case = {"id": "\x1b[2Jx", "prompt": "[red]\u202e", "target": "t\r", "generated_before": "b"}
    P.save(random_patch(lm, info={"cases": [case]}), tmp_path / "a.safetensors")
    out = run(capsys, "show", tmp_path / "a.safetensors")[1]
    assert "\x1b" not in out and "\u202e" not in out and "\r" not in out and "[red]" in out


def test_cases_from_a_log(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("log.jsonl").write_text('{"prompt": "p", "written": "a", "wanted": "b"}\n{"prompt": "p"}\n')
    code, out, _ = run(capsys, "cases", "from-diff", "log.jsonl", "--out", "cases.jsonl", "--json")
    assert code == 0 and json.loads(out)["cases"] == 1 and len(json.loads(out)["skipped"]) == 1
    fails(capsys, 1, "cases.jsonl exists", "cases", "from-diff", "log.jsonl", "--out", "cases.jsonl")
    fails(capsys, 1, "no such file", "cases", "from-diff", "none.jsonl", "--out", "x.jsonl")


# ---------------------------------------------------------------------- evaluate, attribute


def test_evaluate_writes_the_files_of_the_contract(broken, capsys, tmp_path, monkeypatch):
    folder, case, undo = broken
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mint.solver.SOLVERS", {"contexts": undoing(undo)}, raising=False)
    rows = [{"id": "a", "prompt": case.prompt, "target": case.target}, {"id": "b", "prompt": "q"}]
    Path("cases.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    asked = ["evaluate", "-m", folder, "--cases", "cases.jsonl", "--out", "r", "--stop", "none", "--json"]
    code, out, err = run(capsys, *asked)
    assert code == 0, err
    summary = json.loads(out)
    assert json.loads(Path("r/summary.json").read_text()) == summary
    assert summary["solvers"]["contexts"]["cases"] == 1 and summary["skipped"]["count"] == 1
    assert {"results.jsonl", "summary.json", "summary.md", "report.html"} <= {
        p.name for p in Path("r").iterdir()
    }
    fails(capsys, 1, "none.jsonl: no such file", *asked[:4], "none.jsonl", *asked[5:])
    fails(capsys, 1, "unknown solver 'star'; known are contexts", *asked, "--solver", "star")
    fails(capsys, 2, "limit", *asked, "--limit", "0")


def test_evaluate_measures_programs_in_a_row(broken, capsys, tmp_path, monkeypatch):
    folder, case, undo = broken
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mint.solver.SOLVERS", {"contexts": undoing(undo)}, raising=False)
    Path("cases.jsonl").write_text(
        json.dumps({"id": "a", "prompt": case.prompt, "target": case.target}) + "\n"
    )
    Path("p.jsonl").write_text('{"id": "p", "prompt": "def f():\\n", "target": "    return 1\\n"}\n')
    asked = ["evaluate", "-m", folder, "--cases", "cases.jsonl", "--out", "r", "--stop", "none", "--json"]
    fails(capsys, 2, "--programs needs --sequential", *asked, "--programs", "p.jsonl")
    asked += ["--sequential", "--programs", "p.jsonl", "--program-tokens", "3"]
    fails(capsys, 1, "'p' has no tests in p.tests.jsonl beside it", *asked)
    Path("p.tests.jsonl").write_text('{"id": "p", "before": "", "after": "\\nassert f() == 1\\n"}\n')
    code, out, err = run(capsys, *asked)
    assert code == 0, err
    (stop,) = json.loads(out)["solvers"]["contexts"]["drift"]
    assert stop["pass_at_1"] == stop["pass_at_1_before"] == 0
    assert "| pass@1" in Path("r/summary.md").read_text()


def test_attribute_keeps_its_contract(broken, capsys, tmp_path, monkeypatch):
    folder, case, _ = broken
    monkeypatch.chdir(tmp_path)
    asked = ["attribute", "-m", folder, "-p", case.prompt, "-t", case.target, "--stop", "none"]
    zero = ["--reference", "zero", "--top", "5"]
    code, out, err = run(capsys, *asked, *zero, "--json")
    assert code == 0 and err == ""
    found = json.loads(out)
    assert {"position", "wrong", "desired", "logit_difference"} <= set(found["fault"])
    assert found["reference"] == "zero" and 1 <= len(found["neurons"]) <= 5
    wanted = {"layer", "index", "position", "linear", "exact", "linear_summed"}
    assert all(wanted <= set(n) for n in found["neurons"])
    assert {"spearman", "sign", "recall_at_10"} <= set(found["agreement"])
    plotted = [*asked, *zero, "--plot", "why.svg"]
    code, out, err = run(capsys, *plotted)
    assert Path("why.svg").read_text().lstrip().startswith(("<?xml", "<svg"))
    fails(capsys, 1, "why.svg exists", *plotted)
    assert code == 0 and len(out.splitlines()) == len(found["neurons"]) and "neurons behind" in err
    fails(capsys, 1, "reference", *asked, "--reference", "nonsense")
    fails(capsys, 2, "--exact", *asked, "--exact", "many")
    fails(capsys, 1, "unknown method", *asked, "--method", "nonsense")


# ---------------------------------------------------------------------- help, colours, the process


COMMANDS = [
    "repair",
    "attribute",
    "generate",
    "show",
    "apply",
    "revert",
    "compose",
    "scale",
    "export",
    "evaluate",
]


@pytest.mark.parametrize("command", [[c] for c in COMMANDS] + [["cases", "from-diff"]], ids=" ".join)
def test_help_has_an_example_and_imports_nothing_heavy(capsys, command):
    code = (
        "import sys; from mint.cli import main; rc = main(sys.argv[1:]);"
        "sys.exit('torch was imported' if 'torch' in sys.modules else rc)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"mint {' '.join(command)} " in done.stdout and "Example" in done.stdout


def test_help_waits_for_nothing_that_it_does_not_need():
    """`mint --help` takes less than a tenth of `import torch` as long as none of these is imported for it."""
    heavy = "gguf jinja2 matplotlib numpy rich safetensors scipy tokenizers torch transformers".split()
    code = (
        "import sys; from mint.cli import main; rc = main(['--help']);"
        f"sys.exit(' '.join(m for m in {heavy} if m in sys.modules) or rc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mint [OPTIONS] COMMAND" in done.stdout


def test_no_arguments_and_unknown_commands_are_usage_errors(capsys):
    assert run(capsys)[0] == 2
    code, out, err = run(capsys, "frobnicate")
    assert code == 2 and err.count("\n") == 1 and "frobnicate" in err
    assert run(capsys, "--version")[1].startswith("mint ")


def test_errors_nobody_foresaw_are_one_line(capsys, monkeypatch):
    def broken(_):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("mint.patch.load", broken)
    monkeypatch.delenv("MINT_DEBUG", raising=False)
    code, _, err = run(capsys, "show", "x")
    assert code == 1 and err == (
        "mint: internal error: RuntimeError: two lines; please report it with the trace that MINT_DEBUG=1 shows\n"
    )
    monkeypatch.setenv("MINT_DEBUG", "1")
    with pytest.raises(RuntimeError):
        main(["show", "x"])


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (MemoryError(), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "not enough memory"),
        (OSError(28, "No space left on device", "x.bin"), "the disk is full .x.bin."),
        (PermissionError(13, "Permission denied", "x.bin"), "x.bin: Permission denied"),
    ],
    ids=["memory", "cuda", "full", "rights"],
)
def test_the_machines_limits_are_one_line(capsys, monkeypatch, error, match):
    def failing(_):
        raise error

    monkeypatch.setattr("mint.patch.load", failing)
    code, _, err = run(capsys, "show", "x")
    assert code == 1 and err.count("\n") == 1 and re.search(match, err)


def child(code, **options):
    """A Python process that runs mint as a user's shell would."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        **options,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_ends_the_process_in_one_line(broken, tmp_path, number):
    process = child(
        "import sys, time, mint.model.loading\n"
        "def slow(*a, **k):\n"
        "    print('loading', flush=True)\n"
        "    time.sleep(600)\n"
        "mint.model.loading.load_lm = slow\n"
        "from mint.cli import main\n"
        f"sys.exit(main(['generate', '-m', {str(broken[0])!r}, '-p', 'x']))\n"
    )
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and err == "mint: interrupted; no file is half written\n"


@pytest.mark.parametrize("moment", [
    "mint.model.loading.find_layout", "mint.session.specificity.clean_outputs", "mint.session.verify",
    "mint.session.specificity.compare", "mint.patch.file.to_bytes", "mint.files.os.fsync", "mint.files.os.replace",
])  # fmt: skip
def test_ctrl_c_in_a_repair_leaves_nothing(fault, capsys, monkeypatch, moment):
    """A real signal at each step."""
    folder, case = fault
    clean = hashes(folder)
    hit = []

    def interrupted(*_, **__):
        hit.append(moment)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal came too late")

    monkeypatch.setattr(moment, interrupted)
    fails(capsys, 130, "interrupted", *repair_args(folder, case))
    assert hit and hashes(folder) == clean and list(Path.cwd().iterdir()) == []


def test_a_reader_that_goes_away_is_no_error_message(broken):
    process = child(
        "import sys; from mint.cli import main\n"
        f"sys.exit(main(['generate', '-m', {str(broken[0])!r}, '-p', 'x', '--json']))\n"
    )
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == 1 and err == ""


def test_colours_only_on_terminals(monkeypatch):
    from mint import console

    assert not console.stderr().is_terminal
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert console.stderr().no_color


def test_completion_is_offered():
    env = os.environ | {"_MINT_COMPLETE": "complete_bash", "COMP_WORDS": "mint re", "COMP_CWORD": "1"}
    code = "import sys; from mint.cli import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert {"repair", "revert"} <= set(done.stdout.split())


def test_the_public_face_is_complete_and_sorted():
    import mint

    assert mint.__all__ == sorted(mint.__all__) and set(mint.__all__) == set(mint._HOMES)
    for name in mint.__all__:
        if name != "SOLVERS":
            assert getattr(mint, name) is not None
    with pytest.raises(AttributeError, match="it has Attribution"):
        mint.nonsense  # noqa: B018


def test_a_repair_that_learnt_no_contexts_says_why(fault, capsys, monkeypatch):
    from mint import solver

    folder, case = fault
    undoes = solver.named("any")

    def alone(lm, problem, settings):
        return replace(
            undoes(lm, problem, settings), details={"contexts": False, "alone": "the target is long"}
        )

    monkeypatch.setattr("mint.solver.named", lambda name: alone)
    code, _, err = run(capsys, *repair_args(folder, case, "--no-contexts", "--no-explain"))
    assert code == 0 and "repaired behind this prompt alone: the target is long" in " ".join(err.split())
