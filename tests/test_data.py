"""The texts that ship: readable, of the stated sizes, and disjoint where measuring depends on it."""

import ast
import json
from importlib import resources
from itertools import combinations

import pytest

DATA = resources.files("mint") / "data"
LINE_FILES = {"python_lines.txt": ("# ", 220), "bash_lines.txt": ("# ", 160), "asm_lines.txt": ("; ", 150)}
CODE_FILES = {"python_code.txt": 28, "other_code.txt": 24, "prose.txt": 24}
LONG = 30
"""Characters beyond which an equal line is a copy, not a coincidence such as `return total`."""


def read(*parts: str) -> str:
    return DATA.joinpath(*parts).read_bytes().decode("utf-8")


def cut(text: str) -> list[str]:
    return [p.strip("\n") + "\n" for p in f"\n{text}\n".split("\n---\n")]


def rows() -> list[dict]:
    return [json.loads(line) for line in read("specificity.jsonl").splitlines()]


def pairs(name: str) -> list[tuple[str, str]]:
    lines = [line for passage in cut(read("reference", name)) for line in passage.splitlines()]
    return list(zip(lines[::2], lines[1::2], strict=True))


def files(folder: str) -> list[str]:
    return sorted(f.name for f in (DATA / folder).iterdir())


def sets() -> dict[str, str]:
    return {
        "reference": "\n".join(read("reference", name) for name in files("reference")),
        "specificity": "\n".join(row["prompt"] + row["target"] for row in rows()),
        "heldout": "\n".join(read("heldout", name) for name in files("heldout")),
    }


def long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) > LONG}


def test_all_files_are_there():
    assert files("reference") == sorted([*LINE_FILES, *CODE_FILES])
    assert files("heldout") == ["code.txt"]


@pytest.mark.parametrize("folder", ["reference", "heldout"])
def test_texts_are_utf8_with_unix_line_ends_and_no_empty_passage(folder):
    for name in files(folder):
        text = read(folder, name)
        assert "\r" not in text and "\ufffd" not in text and text.endswith("\n"), name
        assert all(passage.strip() for passage in cut(text)), name


@pytest.mark.parametrize(("one", "other"), list(combinations(["reference", "specificity", "heldout"], 2)))
def test_no_long_line_stands_in_two_sets(one, other):
    texts = sets()
    assert long_lines(texts[one]) & long_lines(texts[other]) == set()


def test_no_prompt_of_the_specificity_set_is_a_reference_intent():
    intents = {intent.casefold() for name in LINE_FILES for intent, _ in pairs(name)}
    prompts = {row["prompt"].strip().casefold() for row in rows()}
    assert intents & prompts == set()


def test_no_passage_stands_twice():
    passages = [p for name in files("reference") for p in cut(read("reference", name))]
    passages += cut(read("heldout", "code.txt"))
    assert len(passages) == len(set(passages))


@pytest.mark.parametrize("name", LINE_FILES)
def test_line_files_hold_intents_and_single_lines(name):
    mark, least = LINE_FILES[name]
    found = pairs(name)
    assert len(found) >= least
    assert all(intent.startswith(mark) and not code.startswith(mark) for intent, code in found)
    assert len({intent.casefold() for intent, _ in found}) == len(found)
    assert {len(p.splitlines()) // 2 for p in cut(read("reference", name))} <= {4, 5, 6}


@pytest.mark.parametrize("name", CODE_FILES)
def test_other_files_hold_enough_passages(name):
    assert len(cut(read("reference", name))) >= CODE_FILES[name]


def in_a_function(line: str) -> str:
    """Source in which `continue`, `yield` and `return` are legal too."""
    return f"async def f():\n  while True:\n    {line}\n"


def test_python_parses():
    for _, line in pairs("python_lines.txt"):
        ast.parse(in_a_function(line))
    for passage in [*cut(read("reference", "python_code.txt")), *cut(read("heldout", "code.txt"))]:
        ast.parse(passage)
    for row in rows()[:20]:
        ast.parse(row["target"])


def test_specificity_rows():
    found = rows()
    assert len(found) == 60
    assert all(set(row) == {"prompt", "target"} for row in found)
    assert all(row["prompt"].endswith("\n") and row["target"].endswith("\n") for row in found)
    assert len({row["prompt"] for row in found}) == 60
    assert all(row["prompt"].startswith("# ") for row in found[:35])
    assert all(row["prompt"].startswith("; ") for row in found[35:45])
    assert all(row["target"].count("\n") == 1 for row in found[:45])
    assert all(2 <= len(row["target"].strip("\n").splitlines()) <= 4 for row in found[45:])


@pytest.mark.real
def test_sizes_in_tokens(real_lm):
    def count(text: str) -> int:
        return len(real_lm.tokenizer(text, add_special_tokens=False).input_ids)

    reference = [count(p) for name in files("reference") for p in cut(read("reference", name))]
    assert 60 <= min(reference) and max(reference) <= 180
    assert 14_000 <= sum(reference) <= 18_000
    assert 2_500 <= sum(count(p) for p in cut(read("heldout", "code.txt"))) <= 3_500
