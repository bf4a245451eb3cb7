"""scripts/demo.py shows commands that can be typed as they stand."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

from mint.errors import MintError

SCRIPT = Path(__file__).parents[1] / "scripts" / "demo.py"


@pytest.fixture
def demo():
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_command_that_is_shown_is_the_command_that_is_run(demo):
    argv = ["repair", "-p", demo.FIBONACCI, "-t", demo.FIXED, "--wrong", "it's $x \\n", "-x", "a\n'b' \\t c"]
    typed = demo.shown(argv).removeprefix("$ mint ")
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {typed}"], capture_output=True, text=True)
    assert done.stdout.split("\0")[:-1] == argv


def test_the_demo_ends_at_the_first_thing_that_does_not_hold(demo, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(demo, "mint", lambda argv: asked.append(argv[0]) or 3)
    with pytest.raises(MintError, match="`mint rule` ended with exit code 3"):
        demo.run("rule", "mine")
    monkeypatch.setattr(demo, "mint", lambda _: 130)
    with pytest.raises(KeyboardInterrupt):
        demo.run("repair")
    assert asked == ["rule"] and "$ mint rule mine" in capsys.readouterr().out
