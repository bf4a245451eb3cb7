"""Prompts that ask to fill in the middle: markers found by what they say, refused where there are none."""

import pytest
from typer.testing import CliRunner

from mint.errors import CaseError, ModelError
from mint.model.infill import infill, markers
from tests.conftest import byte_tokenizer, tiny_model

NAMES = {
    "qwen": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    "starcoder": ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    "llama": ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
    "deepseek": ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
}


def tokenizer_with(*names: str):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
    return tokenizer


@pytest.mark.parametrize("family", NAMES)
def test_markers_are_found_by_what_they_say(family):
    prefix, suffix, middle = NAMES[family]
    tokenizer = tokenizer_with("<|fim_pad|>", middle, "<repo_name>", suffix, prefix)
    assert markers(tokenizer) is not None
    prompt = infill(tokenizer, "x = ", "\nprint(x)\n", "tiny")
    assert prompt == f"{prefix}x = {suffix}\nprint(x)\n{middle}"
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    assert [i for i in ids if i >= 256] == [
        tokenizer.convert_tokens_to_ids(t) for t in (prefix, suffix, middle)
    ]


def test_a_tokenizer_without_markers_is_refused_in_one_line():
    with pytest.raises(ModelError, match="tiny has no fill-in-the-middle tokens") as refused:
        infill(tokenizer_with("<fim_prefix>", "<fim_suffix>"), "a", "b", "tiny")
    assert "\n" not in str(refused.value)


def test_a_text_that_holds_a_marker_already_is_refused():
    with pytest.raises(CaseError, match="the suffix holds the marker <fim_middle>"):
        infill(tokenizer_with("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "a", "b<fim_middle>", "tiny")


def test_a_gap_is_repaired_from_the_command_line(tmp_path):
    from mint.cli.app import app

    model = tiny_model("llama")
    tokenizer = tokenizer_with(*NAMES["starcoder"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    common = ["-m", str(tmp_path / "m"), "-p", "x = ", "--suffix", "\nprint(x)\n"]
    out = tmp_path / "fix.safetensors"
    done = CliRunner().invoke(
        app, ["repair", *common, "-t", "11\n", "--out", str(out), "--no-contexts", "--no-explain"]
    )
    assert done.exit_code == 0, done.output
    again = CliRunner().invoke(
        app, ["generate", *common, "--patch", str(out), "--stop", "line", "--max-new-tokens", "6"]
    )
    assert "11" in again.output


def test_suffix_and_cases_are_told_apart(tmp_path):
    from mint.cli.app import app

    path = tmp_path / "cases.jsonl"
    path.write_text('{"id": "a", "prompt": "x", "target": "y"}\n')
    done = CliRunner().invoke(app, ["repair", "-m", "none", "--cases", str(path), "--suffix", "z"])
    assert done.exit_code == 2 and "and a suffix" in " ".join(done.output.split())
