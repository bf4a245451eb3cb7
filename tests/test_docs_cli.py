"""docs/cli.md is the command line's own help."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STARTS = ("mint", "accelerate", "")


def _pinned(name: str) -> str:
    """The version of a package that constraints.txt names."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.partition("==")[0] == name)


@pytest.mark.skipif(
    version("typer") != _pinned("typer"), reason="each version of typer lays the page out anew"
)
def test_the_page_of_the_command_line_is_fresh():
    done = subprocess.run(
        [sys.executable, "scripts/docs_cli.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_command_has_its_section():
    from typer.main import get_command

    from mint.cli.app import app

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [name for name in get_command(app).commands if f"## `mint {name}`" not in text] == []


def test_every_example_in_a_help_text_is_one_line_that_can_be_typed():
    from typer.main import get_command

    from mint.cli.app import app

    left = dict(get_command(app).commands)
    broken, seen = [], 0
    while left:
        name, command = left.popitem()
        left |= {f"{name} {sub}": c for sub, c in getattr(command, "commands", {}).items()}
        lines = (command.help or "").partition("Examples:\n")[2].splitlines()
        seen += len(lines)
        broken += [f"{name}: {line}" for line in lines if line.strip(" \b").split(" ")[0] not in STARTS]
    assert seen > 20 and broken == []
