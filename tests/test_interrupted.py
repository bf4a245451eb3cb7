"""Whatever command comes next on a model directory, it finishes an edit that was killed, and says so."""

import shutil
from pathlib import Path

import pytest

from mint import journal
from mint import patch as P
from mint.case import Case
from mint.cli import main
from mint.errors import ModelError, PatchError
from mint.model import loading
from mint.model.loading import load_lm
from mint.patch import checkpoint
from tests.test_bank import repaired
from tests.test_checkpoint import saved

ROOT = Path(__file__).parents[1]
CASE = Case("one", "# sort the list\n", "ok\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A saved model, a patch of it as a file and in a bank, a file of cases."""
    home = tmp_path_factory.mktemp("interrupted")
    model = saved(home / "m")
    patch = repaired(load_lm(str(model)), CASE)
    P.save(patch, home / "fix.safetensors")
    assert main(["bank", "add", str(home / "bank"), str(home / "fix.safetensors")]) == 0
    (home / "sources").mkdir()
    (home / "sources" / "a.py").write_text("x = ab\n")
    (home / "cases.jsonl").write_text('{"id": "one", "prompt": "# a\\n", "target": "ok\\n"}\n')
    return home


def kill_halfway(model, patch, monkeypatch):
    """What a kill behind the first changed byte leaves."""

    def dies(*_):
        raise OSError(5, "killed")

    with monkeypatch.context() as patched:
        patched.setattr(journal, "_play", dies)
        with pytest.raises(PatchError):
            checkpoint.apply(model, patch)
    assert (model / journal.JOURNAL).exists()


def enough(*_):
    """Models are recovered before anything of them is read; what a command does with one is no question here."""
    raise ModelError("enough")


COMMANDS = {
    "repair": "repair -m M -p x -t ok --out OUT",
    "attribute": "attribute -m M -p x -t ok --top 1",
    "generate": "generate -m M -p x --max-new-tokens 1",
    "doctor": "doctor -m M",
    "merge": "merge -m M --adapter nowhere --out OUT",
    "apply": "apply FIX -m M --in-place",
    "revert": "revert FIX -m M --in-place",
    "copy": "apply FIX -m M --out OUT",
    "compose": "compose FIX -m M --out OUT",
    "scale": "scale FIX 0.5 -m M --plot OUT.svg --out OUT",
    "export": "export FIX -m M --out OUT",
    "diff-models": "diff-models M M --out OUT",
    "log": "log M",
    "rebase": "rebase FIX -m M --out OUT",
    "evaluate": "evaluate -m M --cases CASES --limit 1 --out OUT",
    "bank add": "bank add BANK2 FIX -m M",
    "bank check": "bank check BANK -m M",
    "bank apply": "bank apply BANK -m M --in-place",
    "bank revert": "bank revert BANK -m M --in-place",
    "rule check": "rule check RULE -m M",
    "rule mine": "rule mine -m M --wrong ab --right cd --from SOURCES --out OUT",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_next_command_finishes_it_and_says_so(home, tmp_path, command, monkeypatch, capsys):
    model = tmp_path / "m"
    shutil.copytree(home / "m", model)
    patch = P.load(home / "fix.safetensors")
    kill_halfway(model, patch, monkeypatch)
    places = {
        "M": model,
        "FIX": home / "fix.safetensors",
        "OUT": tmp_path / "out",
        "OUT.svg": tmp_path / "out.svg",
        "CASES": home / "cases.jsonl",
        "SOURCES": home / "sources",
        "RULE": ROOT / "examples" / "clock.jsonl",
        "BANK": home / "bank",
        "BANK2": tmp_path / "bank2",
    }
    monkeypatch.setattr(loading, "read_saved", enough)
    args = [str(places.get(word, word)) for word in COMMANDS[command].split()]
    capsys.readouterr()
    main(args)
    said = capsys.readouterr().err
    assert "was interrupted; it has been finished now" in said, said
    assert not (model / journal.JOURNAL).exists()
