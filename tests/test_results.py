"""How a repair ends on the command line, for cases and rules alike."""

from types import SimpleNamespace

import pytest

from mint.cli import results
from mint.errors import NoRepair
from mint.patch import load
from tests.conftest import tiny_lm
from tests.test_patch import random_patch


def outcome(success: bool):
    return SimpleNamespace(
        patch=random_patch(tiny_lm("llama")),
        success=success,
        reason=None if success else "rule 'b': too hard",
    )


def ended(one, tmp_path, partial):
    out = tmp_path / "fix.st"
    written = results.store(one, out, page="<p>", report=tmp_path / "page.html", partial=partial, force=False)
    assert (written is not None) == out.exists() and (tmp_path / "page.html").read_text() == "<p>"
    return results.conclude(one, written)


def test_what_was_accepted_is_written(tmp_path):
    assert ended(outcome(True), tmp_path, partial=False) == 0
    assert len(load(tmp_path / "fix.st").edits) == len(outcome(True).patch.edits)


def test_a_partial_patch_is_written_told_and_no_failure(tmp_path, capsys):
    assert ended(outcome(False), tmp_path, partial=True) == 0
    assert "written without what was refused: rule 'b': too hard" in capsys.readouterr().err


def test_a_refusal_writes_nothing(tmp_path):
    with pytest.raises(NoRepair, match="no acceptable repair: rule 'b': too hard"):
        ended(outcome(False), tmp_path, partial=False)
    assert not (tmp_path / "fix.st").exists()
