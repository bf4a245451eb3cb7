"""Messages that users meet when something cannot be used or done: what was found, and a next step."""

import ast
from pathlib import Path

import pytest

import mint

FAMILY = {"MintError", "CaseError", "ModelError", "LayoutError", "PatchError", "NoRepair"}
FILES = sorted(Path(mint.__file__).parent.rglob("*.py"))


def messages(path: Path) -> list[tuple[int, str]]:
    """(line, text with {} for what is filled in) of every error of the family that a module raises."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        if ast.unparse(node.exc.func) not in FAMILY:
            continue
        text = node.exc.args[0]
        if isinstance(text, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in text.values]
            found.append((node.lineno, "".join(map(str, parts))))
        elif isinstance(text, ast.Constant):
            found.append((node.lineno, str(text.value)))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_refusal_is_one_line_with_a_next_step(path):
    for line, text in messages(path):
        where = f"{path.name}:{line}: {text}"
        assert "\n" not in text and not text.rstrip().endswith("."), where
        # Where the end is filled in, what fills it brings the next step along; a list of what is known is one itself.
        listed = "must be one of" in text and "found" in text
        assert ";" in text or text.endswith("{}") or ", or " in text or listed, where
