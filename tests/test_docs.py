"""The pages: every link leads somewhere, every page is in the site, and what they list is what there is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mint

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]


def read(path):
    return path.read_text(encoding="utf-8")


def anchors(text):
    """The ids that headings get: GitHub and mkdocs agree on letters, digits and single hyphens."""
    titles = re.findall(r"(?m)^#+ +(.+)$", re.sub(r"(?ms)^```.*?^```", "", text))
    words = [re.sub(r"[^\w\s-]", "", t.replace("`", "")).strip().lower() for t in titles]
    return {re.sub(r"[\s-]+", "-", w) for w in words}


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: p.name)
def test_every_relative_link_leads_somewhere(page):
    text = re.sub(r"(?ms)^```.*?^```|`[^`\n]*`", "", read(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"{page.name}: {target} leads nowhere"
        if page.parent.name == "docs":
            assert found.parent == page.parent, f"{page.name}: {target} leaves docs/, which the site cannot"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(read(found)), f"{page.name}: {target} has no such heading"


def test_every_page_is_in_the_site_and_can_be_found_from_its_start():
    listed = re.findall(r": (\w+\.md)$", read(ROOT / "mkdocs.yml"), re.MULTILINE)
    assert sorted(listed) == [p.name for p in PAGES]


def test_the_python_page_has_every_public_name():
    text = read(ROOT / "docs" / "api.md")
    missing = [n for n in mint.__all__ if not re.search(rf"\b{n}\b", text)]
    assert missing == []


def test_the_page_of_json_names_every_key_of_a_repair():
    from mint.evaluation.outcome import outcome_as_dict as cases_as_dict
    from mint.rules.repair import RulesOutcome
    from mint.rules.repair import outcome_as_dict as rules_as_dict
    from mint.session import Outcome

    text = read(ROOT / "docs" / "json.md")
    keys = set(cases_as_dict(Outcome((), None, None), None)) | set(
        rules_as_dict(RulesOutcome((), None, None), None)
    )
    assert [k for k in sorted(keys) if f"`{k}`" not in text] == []


def test_the_site_is_built_without_a_broken_reference(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "load_lm" in read(tmp_path / "api.html")


def test_a_page_is_run_and_compared_word_by_word(tmp_path):
    page = tmp_path / "page.md"

    def run(*options):
        command = [sys.executable, "scripts/run_page.py", str(page), *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    text = "Say it:\n\n```console\n$ WORD=ab && \\\necho $WORD 12 > x\n$ cat x; false\n{}```\n"
    page.write_text(text.format("ab 34\nexit code 1\n"))
    assert run().returncode == 0  # numbers may differ
    page.write_text(text.format("abc 12\nexit code 1\n"))
    done = run()
    assert done.returncode == 1 and "ab 12" in done.stdout
    assert run("--write").returncode == 0
    assert page.read_text() == text.format("ab 12\nexit code 1\n")


@pytest.mark.real
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_the_commands_of_a_page_print_what_it_says(page):
    done = subprocess.run(
        [sys.executable, "scripts/run_page.py", page], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
