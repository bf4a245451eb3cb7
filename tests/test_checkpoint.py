"""Saved models: a patch goes in and out byte for byte, whatever the format, and failures leave every file as it was."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mint import patch as P
from mint.errors import ModelError, PatchError
from mint.model.loading import load_lm
from mint.patch import checkpoint as C
from tests.conftest import byte_tokenizer, same_bits, tiny_lm, tiny_model, weights_of
from tests.test_patch import random_patch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def saved(folder: Path, family="llama", dtype=torch.float32, shards=False) -> Path:
    tiny_model(family, dtype=dtype).save_pretrained(folder, **({"max_shard_size": "20KB"} if shards else {}))
    byte_tokenizer().save_pretrained(folder)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a folder, hidden ones included, and its bytes."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def patched_weights(folder, patch):
    lm = load_lm(str(folder))
    with P.applied(lm, patch):
        return weights_of(lm)


@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "shards"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_in_place_and_back_is_byte_identical(tmp_path, family, dtype, shards):
    model = saved(tmp_path / "m", family, dtype, shards)
    assert (len(list(model.glob("*.safetensors"))) > 1) is shards
    clean = hashes(model)
    patch = random_patch(load_lm(str(model)))
    wanted = patched_weights(model, patch)
    assert C.apply(model, patch) == model
    assert same_bits(weights_of(load_lm(str(model))), wanted)
    touched = {n for n, h in hashes(model).items() if clean.get(n) != h}
    assert C.PROVENANCE in touched and all(n == C.PROVENANCE or n.endswith(".safetensors") for n in touched)
    assert set(hashes(model)) == set(clean) | {C.PROVENANCE}
    C.revert(model, patch)
    assert hashes(model) == clean


@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "shards"])
def test_a_copy_gets_the_patch_and_the_original_stays(tmp_path, shards):
    model = saved(tmp_path / "m", shards=shards)
    clean = hashes(model)
    patch = random_patch(load_lm(str(model)))
    C.apply(model, patch, out=tmp_path / "fixed")
    assert hashes(model) == clean
    assert same_bits(weights_of(load_lm(str(tmp_path / "fixed"))), patched_weights(model, patch))
    C.revert(tmp_path / "fixed", patch, out=tmp_path / "back")
    assert hashes(tmp_path / "back") == clean
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "fixed", "m"]


def test_names_saved_with_another_prefix_are_found(tmp_path):
    """GPT-2 checkpoints come as `h.0...` and as `transformer.h.0...`."""
    from safetensors.torch import load_file, save_file

    model = saved(tmp_path / "m", "gpt2")
    tensors = load_file(model / "model.safetensors")
    bare = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    assert set(bare) != set(tensors)
    save_file(bare, model / "model.safetensors", {"format": "pt"})
    clean = hashes(model)
    patch = random_patch(load_lm(str(model)))
    wanted = patched_weights(model, patch)
    C.apply(model, patch)
    assert same_bits(weights_of(load_lm(str(model))), wanted)
    C.revert(model, patch)
    assert hashes(model) == clean


def test_a_model_without_safetensors_is_saved_anew(tmp_path):
    model = saved(tmp_path / "m")
    state = load_lm(str(model)).model.state_dict()
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin")
    clean = hashes(model)
    patch = random_patch(load_lm(str(model)))
    with pytest.raises(PatchError, match="no safetensors file .* give --out"):
        C.apply(model, patch)
    C.apply(model, patch, out=tmp_path / "fixed")
    assert hashes(model) == clean
    assert same_bits(weights_of(load_lm(str(tmp_path / "fixed"))), patched_weights(model, patch))


def test_two_patches_come_off_in_any_order(tmp_path):
    model = saved(tmp_path / "m")
    clean = hashes(model)
    lm = load_lm(str(model))
    first, second = random_patch(lm, [(0, 1, "value")]), random_patch(lm, [(1, 2, "rewrite")])
    for order in ([first, second], [second, first]):
        C.apply(model, first)
        C.apply(model, second)
        assert [p["sha256"] for p in C.applied_patches(model)] == [C.patch_id(first), C.patch_id(second)]
        for patch in order:
            C.revert(model, patch)
        assert hashes(model) == clean


def unchanged(folder, function, error=PatchError, match=None):
    before = hashes(folder)
    with pytest.raises(error, match=match) as caught:
        function()
    assert hashes(folder) == before
    assert "\n" not in str(caught.value)


def test_twice_and_never(tmp_path):
    model = saved(tmp_path / "m")
    patch = random_patch(load_lm(str(model)))
    unchanged(tmp_path, lambda: C.revert(model, patch), match="nothing to revert")
    C.apply(model, patch)
    unchanged(tmp_path, lambda: C.apply(model, patch), match="already applied")
    unchanged(tmp_path, lambda: C.apply(model, patch, out=tmp_path / "x"), match="already applied")


def test_the_wrong_model_and_dtype(tmp_path):
    model = saved(tmp_path / "m", dtype=torch.bfloat16)
    patch = random_patch(tiny_lm("llama"))
    unchanged(tmp_path, lambda: C.apply(model, patch), match="made in float32, the model is in bfloat16")
    other = random_patch(tiny_lm("llama", seed=4, dtype=torch.bfloat16))
    unchanged(tmp_path, lambda: C.apply(model, other), match="another model")


def test_outputs_that_cannot_be(tmp_path):
    model = saved(tmp_path / "m")
    patch = random_patch(load_lm(str(model)))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for out, force, message in [
        (mine, False, "--force"),
        (mine, True, "no saved model"),
        (model, True, "own directory"),
        (model / "inside", False, "own directory"),
        (tmp_path / "no" / "where", False, "no directory"),
    ]:
        unchanged(tmp_path, lambda o=out, f=force: C.apply(model, patch, out=o, force=f), match=message)
    unchanged(tmp_path, lambda: C.apply("smollm2-135m", patch), match="cannot be changed in place")
    C.apply(model, patch, out=tmp_path / "fixed")
    unchanged(tmp_path, lambda: C.apply(model, patch, out=tmp_path / "fixed"), match="--force")
    C.apply(model, patch, out=tmp_path / "fixed", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fixed", "m", "mine"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_or_truncated_model(tmp_path, name):
    model = saved(tmp_path / "m")
    patch = random_patch(load_lm(str(model)))
    data = (model / name).read_bytes()
    (model / name).write_bytes(data[: len(data) // 2])
    unchanged(tmp_path, lambda: C.apply(model, patch), ModelError)
    (model / name).unlink()
    unchanged(tmp_path, lambda: C.apply(model, patch), ModelError)


def test_a_damaged_list_of_patches_is_named(tmp_path):
    model = saved(tmp_path / "m")
    patch = random_patch(load_lm(str(model)))
    (model / C.PROVENANCE).write_text("[]")
    unchanged(tmp_path, lambda: C.apply(model, patch), match=C.PROVENANCE)


@pytest.mark.parametrize("verb", ["apply", "revert"])
@pytest.mark.parametrize("copy", [False, True], ids=["in-place", "copy"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_a_failure_at_any_call_leaves_every_file(tmp_path, monkeypatch, verb, copy, error):
    """Each call that changes the disk fails in turn; afterwards the folder holds the very files it held."""
    model = saved(tmp_path / "m", shards=True)
    patch = random_patch(load_lm(str(model)))
    if verb == "revert":
        C.apply(model, patch)
    lm = load_lm(str(model))
    monkeypatch.setattr(C, "load_lm", lambda *_, **__: lm)
    before, out = hashes(tmp_path), (tmp_path / "out" if copy else None)
    pristine = shutil.copytree(model, tmp_path.with_name(tmp_path.name + "-pristine"))
    calls = {"n": 0, "fail": 0}

    def failing(real):
        def call(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == calls["fail"]:
                raise error
            return real(*args, **kwargs)

        return call

    for where in ("os.pwrite", "os.fsync", "os.replace", "os.link", "shutil.copyfile", "shutil.copytree"):
        module, name = where.split(".")
        monkeypatch.setattr(getattr(C, module), name, failing(getattr(getattr(C, module), name)))
    failures = 0
    for fail in range(1, 400):
        calls.update(n=0, fail=fail)
        try:
            getattr(C, verb)(model, patch, out=out)
        except (PatchError, KeyboardInterrupt):
            failures += 1
            assert hashes(tmp_path) == before, f"failure at call {fail}"
            continue
        finally:
            calls.update(fail=0)
        if calls["n"] < fail:
            break
        # The call that failed was one that may (a link becomes a copy): start afresh, and go on with the next.
        shutil.rmtree(out or model)
        if not copy:
            shutil.copytree(pristine, model)
    assert failures >= 3 and calls["n"] < fail


def test_a_real_write_limit_leaves_every_file(tmp_path):
    """The kernel refuses to let files grow (as on a full disk) in a real process."""
    model = saved(tmp_path / "m")
    patch_file = P.save(random_patch(load_lm(str(model))), tmp_path / "p.safetensors")
    before = hashes(tmp_path)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    code = f"from mint import patch; from mint.patch import checkpoint; checkpoint.apply({str(model)!r}, patch.load({str(patch_file)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )  # fmt: skip
    assert done.returncode == 1 and "nothing was changed there" in done.stderr
    assert hashes(tmp_path) == before


def test_signals_wait_for_the_last_rename():
    with pytest.raises(KeyboardInterrupt):
        with C.uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            finished = True
    assert finished and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_file_modes_survive(tmp_path):
    model = saved(tmp_path / "m")
    (model / "model.safetensors").chmod(0o440)
    patch = random_patch(load_lm(str(model)))
    C.apply(model, patch)
    assert (model / "model.safetensors").stat().st_mode & 0o777 == 0o440


def test_the_list_of_patches_says_what_was_done(tmp_path):
    model = saved(tmp_path / "m")
    patch = random_patch(load_lm(str(model)), [(1, 7, "value")], info={"cases": [{"id": "a"}]})
    C.apply(model, patch)
    (entry,) = json.loads((model / C.PROVENANCE).read_text())["patches"]
    assert entry == {
        "sha256": C.patch_id(patch),
        "neurons": [{"layer": 1, "index": 7, "kind": "value"}],
        "cases": ["a"],
    }
