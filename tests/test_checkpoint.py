"""Saved models: a patch goes in and out byte for byte, whatever the format, and failures leave every file as it was."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mint import journal
from mint import patch as P
from mint.cli import main
from mint.errors import ModelError, PatchError
from mint.model.loading import load_lm
from mint.patch import checkpoint as C
from mint.patch.names import describe
from tests.conftest import byte_tokenizer, same_bits, tiny_lm, tiny_model, weights_of
from tests.test_patch import random_patch as nameless_patch
from tests.test_situations import gemma3, in_two

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_patch(lm, *args, **kwargs):
    """Random edits that say where their weights live, as `mint repair` writes them."""
    patch = nameless_patch(lm, *args, **kwargs)
    return replace(patch, base=patch.base | {"layout": describe(lm)})


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


def patched_weights(folder, patch, dtype="auto"):
    lm = load_lm(str(folder), dtype=dtype)
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


CALLS = "open write pwrite fsync replace rename unlink chmod mkdir close".split()


def interrupting(at: int, act, monkeypatch) -> dict:
    """Every call that changes the disk counts; at number `at`, before it and half way through it, `act` is called."""
    seen = {"n": 0}

    def counted(name, real):
        def call(*args, **kwargs):
            seen["n"] += 1
            if seen["n"] == at:
                if name == "pwrite" and len(args[1]) > 1:
                    real(args[0], args[1][: len(args[1]) // 2], args[2])
                act()
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    return seen


def killed_at(at: int, function) -> bool:
    """Run in a child that is killed at call number `at`; whether it was."""
    child = os.fork()
    if not child:
        with pytest.MonkeyPatch.context() as patching, open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
            interrupting(at, lambda: os.kill(os.getpid(), signal.SIGKILL), patching)
            try:
                function()
            finally:
                os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("verb", "copy"), [("apply", False), ("revert", False), ("apply", True)])
def test_a_kill_at_any_call_is_finished_or_rolled_back(tmp_path, verb, copy):
    """The process is killed at each system call that changes the disk; the next command leaves one of two states."""
    model = saved(tmp_path / "m", shards=True)
    patch = random_patch(load_lm(str(model)))
    if verb == "revert":
        C.apply(model, patch)
    before, pristine = (
        hashes(tmp_path),
        shutil.copytree(model, tmp_path.with_name(tmp_path.name + "-pristine")),
    )
    out = tmp_path / "out" if copy else None
    getattr(C, verb)(model, patch, out=out)
    after = weight_hashes(tmp_path)
    states = set()
    for at in range(1, 1000):
        shutil.rmtree(out or model, ignore_errors=True)
        if not copy:
            shutil.copytree(pristine, model)
        if not killed_at(at, lambda: getattr(C, verb)(model, patch, out=out)):
            break
        dirty = {n for n in hashes(tmp_path) if ".mint-" in n and "-lock" not in n}
        for lock in tmp_path.rglob(".*-lock"):
            os.utime(lock, (0, 0))
        said = journal.recover(out or model)
        found = weight_hashes(tmp_path)
        assert found in (weight_hashes_of(before), after), f"killed at call {at}"
        assert said or not dirty, f"killed at call {at}: nothing was said"
        states.add(found == after)
        left = {n for n in hashes(tmp_path) if ".mint-" in n and "-lock" not in n}
        assert not left, f"killed at call {at}"
    assert states == {False, True} and at > 10


def weight_hashes_of(found: dict) -> dict:
    return {n: h for n, h in found.items() if n.endswith(".safetensors")}


def weight_hashes(folder: Path) -> dict:
    return weight_hashes_of(hashes(folder))


@pytest.mark.parametrize(
    ("verb", "error"), [("apply", OSError(28, "No space left on device")), ("revert", KeyboardInterrupt())]
)
def test_a_failure_at_any_call_leaves_every_file(tmp_path, verb, error):
    """Each call that changes the disk fails in turn, once: afterwards the folder holds the very files it held."""
    model = saved(tmp_path / "m", shards=True)
    patch = random_patch(load_lm(str(model)))
    if verb == "revert":
        C.apply(model, patch)
    before, pristine = (
        hashes(tmp_path),
        shutil.copytree(model, tmp_path.with_name(tmp_path.name + "-pristine")),
    )
    failures = 0

    def fail():
        raise error

    for at in range(1, 1000):
        failed = False
        with pytest.MonkeyPatch.context() as patching:
            seen = interrupting(at, fail, patching)
            try:
                getattr(C, verb)(model, patch)
            except (PatchError, ModelError, KeyboardInterrupt):
                failed = True
        if failed:
            failures += 1
            left = {n: h for n, h in hashes(tmp_path).items() if "-lock" not in n}
            if any(
                ".mint-journal" in n for n in left
            ):  # what failed was the last clearing up: finished next time
                journal.recover(model)
            elif weight_hashes_of(left) == weight_hashes_of(before):
                assert left == before, f"failure at call {at}"
        if seen["n"] < at:
            break
        shutil.rmtree(model)
        shutil.copytree(pristine, model)
    assert failures > 10


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
        with journal.uninterrupted():
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
    assert entry.pop("applied").endswith("Z")
    assert entry == {
        "sha256": C.patch_id(patch),
        "neurons": [{"layer": 1, "index": 7, "kind": "value"}],
        "cases": [{"id": "a"}],
    }


# ---------------------------------------------------------------------- models as people find them


def rewritten(model: Path, change) -> Path:
    """The same model with other tensors in its file."""
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(model / "model.safetensors")), model / "model.safetensors", {"format": "pt"})
    return model


def says(model: Path, dtype: str) -> Path:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    return model


def test_a_bf16_patch_goes_into_a_f32_file_of_the_same_values_and_back(tmp_path):
    model = saved(tmp_path / "m", dtype=torch.bfloat16)
    rewritten(model, lambda t: {k: v.float() for k, v in t.items()})
    clean, lm = weight_hashes(model), load_lm(str(model), dtype="bfloat16")
    patch = random_patch(lm)
    wanted = patched_weights(model, patch, "bfloat16")
    C.apply(model, patch)
    assert same_bits(weights_of(load_lm(str(model), dtype="bfloat16")), wanted)
    C.revert(model, patch)
    assert weight_hashes(model) == clean


def test_files_that_hold_more_than_the_patch_name_the_dtype_that_works(tmp_path):
    model = says(saved(tmp_path / "m"), "bfloat16")
    patch = random_patch(load_lm(str(model), dtype="bfloat16"))
    unchanged(tmp_path, lambda: C.apply(model, patch), match="repair again with --dtype float32")
    C.apply(model, random_patch(load_lm(str(model))))


def test_a_file_that_cannot_hold_the_patch_names_the_dtype_that_works(tmp_path):
    model = says(saved(tmp_path / "m", dtype=torch.bfloat16), "float32")
    patch = random_patch(load_lm(str(model), dtype="float32"))
    unchanged(
        tmp_path, lambda: C.apply(model, patch), match="cannot hold .* repair again with --dtype bfloat16"
    )
    C.apply(model, random_patch(load_lm(str(model))))


def test_eight_bit_files_are_refused(tmp_path):
    model = saved(tmp_path / "m", dtype=torch.bfloat16)
    patch = random_patch(load_lm(str(model)))
    rewritten(model, lambda t: {k: v.to(torch.float8_e4m3fn) if "mlp" in k else v for k, v in t.items()})
    unchanged(tmp_path, lambda: C.apply(model, patch), match="as F8_E4M3, which mint cannot edit")


def test_a_copy_of_a_read_only_store_is_writable(tmp_path):
    model = saved(tmp_path / "m")
    patch = random_patch(load_lm(str(model)))
    for path in [*model.iterdir(), model]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    out = C.apply(model, patch, out=tmp_path / "fixed")
    assert all(p.stat().st_mode & 0o200 for p in [out, *out.iterdir()])
    assert {p.name for p in tmp_path.iterdir() if p.name != "cache"} == {"m", "fixed"}


def test_every_copy_of_a_weight_is_changed(tmp_path):
    from safetensors.torch import load_file, save_file

    model = saved(tmp_path / "m")
    patch = random_patch(load_lm(str(model)))
    tensors = {k: v.clone() for k, v in load_file(model / "model.safetensors").items()}
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    mlp = [k for k in tensors if "mlp" in k]
    save_file({k: tensors[k] for k in mlp}, model / first, {"format": "pt"})
    (model / "model.safetensors").rename(model / second)
    weights = {k: first if k in mlp else second for k in tensors}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    C.apply(model, patch)
    one, two = load_file(model / first), load_file(model / second)
    assert all(torch.equal(one[k], two[k]) for k in mlp)
    assert sum(not torch.equal(one[k], tensors[k]) for k in mlp) == 4
    save_file(tensors, model / second, {"format": "pt"})
    unchanged(tmp_path, lambda: C.revert(model, patch), match="differ from the patch's 'after'")


def behind_an_eye(folder: Path) -> Path:
    """A saved wrapper with a vision tower."""
    import transformers as T

    text = T.Qwen3_5TextConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, head_dim=8, layer_types=["full_attention"] * 3, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    eye = dict(
        hidden_size=32, depth=2, num_heads=2, intermediate_size=64, out_hidden_size=32, patch_size=4,
        spatial_merge_size=2, num_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    config = T.Qwen3_5Config(text_config=text.to_dict(), vision_config=eye)
    T.Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("wrapper", [behind_an_eye, gemma3])
def test_a_model_behind_an_eye_keeps_its_eye(tmp_path, wrapper):
    """Names in the file and in the module differ; what the text model does not use is copied all the same."""
    model = wrapper(tmp_path / "m")
    clean = hashes(model)
    lm = load_lm(str(model))
    patch = random_patch(lm)
    out = C.apply(model, patch, out=tmp_path / "fixed")
    assert {n for n, h in hashes(out).items() if clean.get(n) != h} == {
        "model.safetensors",
        C.PROVENANCE,
        "README.md",
    }
    before, after = (load_file(folder / "model.safetensors") for folder in (model, out))
    moved = {
        n: int((before[n] != after[n]).any(-1).sum()) for n in before if not torch.equal(before[n], after[n])
    }
    assert len(moved) == 4 and not any("vis" in name for name in moved)
    wanted = patched_weights(model, patch)
    C.apply(model, patch)
    assert same_bits(weights_of(load_lm(str(model))), wanted)
    C.revert(model, patch)
    assert hashes(model) == clean


def test_a_gguf_model_in_parts_is_patched_into_a_directory(tmp_path, capsys):
    """No GGUF is written: the copy holds the weights as the patch was made on them. In place is refused."""
    first, _ = in_two(tmp_path)
    lm = load_lm(str(first))
    patch = random_patch(lm)
    file = P.save(patch, tmp_path / "fix.safetensors")
    parts = {p.name: p.read_bytes() for p in tmp_path.glob("*.gguf")}
    assert main(["apply", str(file), "-m", str(first), "--out", str(tmp_path / "fixed")]) == 0
    with P.applied(lm, patch):
        assert same_bits(weights_of(load_lm(str(tmp_path / "fixed"))), weights_of(lm))
    assert main(["apply", str(file), "-m", str(first), "--in-place"]) == 1
    assert "give --out DIR for a copy" in capsys.readouterr().err
    assert main(["apply", str(file), "-m", str(first), "--out", str(tmp_path / "fixed.gguf")]) == 1
    assert "no GGUF file is written" in capsys.readouterr().err
    assert parts == {p.name: p.read_bytes() for p in tmp_path.glob("*.gguf")}


def test_nothing_is_written_through_links(tmp_path):
    cache = saved(tmp_path / "cache-of-others")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in cache.iterdir():
        (snapshot / path.name).symlink_to(path)
    patch = random_patch(load_lm(str(cache)))
    unchanged(
        tmp_path, lambda: C.apply(snapshot, patch), match="a cache that other programs share; give --out"
    )
    clean = hashes(cache)
    out = C.apply(snapshot, patch, out=tmp_path / "fixed")
    assert hashes(cache) == clean and not any(p.is_symlink() for p in out.iterdir())
    os.link(cache / "model.safetensors", tmp_path / "other-name")
    unchanged(tmp_path, lambda: C.apply(cache, patch), match="hard links")


def test_weights_in_a_second_format_are_not_left_behind(tmp_path):
    model = saved(tmp_path / "m")
    lm = load_lm(str(model))
    torch.save(lm.model.state_dict(), model / "pytorch_model.bin")
    patch = random_patch(lm)
    unchanged(tmp_path, lambda: C.apply(model, patch), match="also holds pytorch_model.bin")


def test_exports_beside_the_weights_are_named_and_stay(tmp_path, caplog):
    model = saved(tmp_path / "m")
    patch = random_patch(load_lm(str(model)))
    (model / "onnx").mkdir()
    for name in ("onnx/model.onnx", "m-q4.gguf"):
        (model / name).write_bytes(b"old")
    C.apply(model, patch)
    assert "also holds m-q4.gguf and 1 more, which stays as it is; export it anew" in caplog.text
    assert {(model / name).read_bytes() for name in ("onnx/model.onnx", "m-q4.gguf")} == {b"old"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda c: c | {"is_encoder_decoder": True}, "encoder-decoder"),
        ("adapter_config.json", lambda c: {"peft_type": "LORA"}, "merge them first"),
    ],
)
def test_what_is_not_the_model_in_use_is_refused(tmp_path, name, change, message):
    model = saved(tmp_path / "m")
    patch = random_patch(load_lm(str(model)))
    (model / name).write_text(json.dumps(change(json.loads((model / "config.json").read_text()))))
    unchanged(tmp_path, lambda: C.apply(model, patch), ModelError, match=message)


def test_a_second_writer_is_told_who_is_at_work(tmp_path):
    model = saved(tmp_path / "m")
    patch = random_patch(load_lm(str(model)))
    said: list[str] = []
    with journal.locked(model):
        with pytest.raises(PatchError, match=f"changed by process {os.getpid()} on"):
            with journal.locked(model, said.append, patience=0.2):
                pass
    assert said == [f"waiting for process {os.getpid()} on {os.uname().nodename}"]
    C.apply(model, patch)


def test_the_model_card_says_what_was_done_and_forgets_it_again(tmp_path):
    model = saved(tmp_path / "m")
    (model / "README.md").write_text("# My model\n")
    clean = hashes(model)
    case = {"id": "a", "prompt": "# sort\n", "target": "l.sort()\n"}
    patch = random_patch(load_lm(str(model)), info={"cases": [case]})
    out = C.apply(model, patch, out=tmp_path / "fixed")
    card = (out / "README.md").read_text()
    assert card.startswith("# My model\n") and C.patch_id(patch)[:16] in card and r"`l.sort()\n`" in card
    C.revert(out, patch)
    assert hashes(out) == clean


def test_a_crafted_journal_writes_nothing_elsewhere(tmp_path):
    model = saved(tmp_path / "m")
    (tmp_path / "victim").write_bytes(b"0" * 8)
    for name in ("../victim", "..", "/etc/hostname"):
        entry = {"format": 1, "what": "x", "texts": {}, "modes": {name: 0o644}, "writes": [
            {"file": name, "start": 0, "step": 1, "run": 1, "old": "MA==", "new": "MQ=="}]}  # fmt: skip
        body = json.dumps(entry).encode()
        (model / journal.JOURNAL).write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        unchanged(tmp_path, lambda: journal.recover(model), match="names files elsewhere")


def test_a_model_saved_anew_keeps_its_other_files(tmp_path):
    """A .bin is loaded and saved as safetensors; tokenizer and settings stay as they were, byte for byte."""
    folder = saved(tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.1}')
    patch = tmp_path / "fix.safetensors"
    P.save(random_patch(load_lm(str(folder))), patch)
    assert main(["apply", str(patch), "-m", str(folder), "--out", str(tmp_path / "fixed")]) == 0
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "fixed" / file).read_bytes() == (folder / file).read_bytes()
    assert not (tmp_path / "fixed" / "pytorch_model.bin").exists()
