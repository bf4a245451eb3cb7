"""What a saved model says about itself, read before a weight is: its config, its files, what lies beside them.

Refuses in one line what would load as something else than what is saved. Reads JSON and headers of safetensors files;
knows nothing about modules or prompts.
"""

import difflib
import json
import re
import struct
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils.hub import cached_file

from mint.errors import ModelError
from mint.extras import need

ADAPTER = "adapter_config.json"
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Formats of saved weights in which a solved neuron can be written, and the dtypes they are."""
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
# In the order in which transformers looks for them; the first found is read, the others are not.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# How a file begins that git keeps elsewhere.
_POINTER = b"version https://git-lfs"
# Ends of saved names that only quantised weights have.
_PACKED = (
    ".qweight",
    ".absmax",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
    ".scales",
    ".SCB",
    "_blocks",
)
# Methods whose weights transformers turns into plain ones while it reads them, and the class that asks for it. By itself it does
# so on machines that cannot multiply such weights only.
_DEQUANTISED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
# A copy of the weights in another precision beside, or instead of, the ones that are read by default.
_VARIANT = re.compile(r"(model|pytorch_model)\.(?P<variant>\w+?)(-\d+-of-\d+)?\.(safetensors|bin)")
# Ends of class names that generate text token by token, left to right.
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "DoubleHeadsModel", "Model")


@dataclass(frozen=True)
class Saved:
    """A model directory or hub id, as its own files describe it."""

    name: str
    """What the user asked for."""
    folder: Path | None
    """The directory; None for a hub id."""
    config: dict
    """config.json."""
    generation: dict
    """generation_config.json, else what config.json says about generation; empty if neither can be read."""
    adapter: dict | None = None
    """adapter_config.json, where one lies beside the model."""
    weights: tuple[str, ...] = ()
    """Files that hold the weights that are read; empty for a hub id."""
    unread: tuple[str, ...] = ()
    """Files beside them that hold weights too, and are not read."""
    notes: list[str] = field(default_factory=list)
    """What the user should know, one line each; grows as the model is read."""
    unused: list[str] = field(default_factory=list)
    """Saved weights that the loaded model does not use; filled as it is read."""
    ignored: list[str] = field(default_factory=list)
    """Saved weights of parts that its text model does not have (a vision tower); filled as it is read."""

    @property
    def family(self) -> str:
        return str(self.config.get("model_type"))

    @property
    def classes(self) -> list[str]:
        """Classes that config.json names."""
        found = self.config.get("architectures") or []
        return [str(c) for c in found] if isinstance(found, list) else [str(found)]

    @property
    def causal(self) -> bool:
        """Whether the family has a text-only causal language model of its own."""
        return self.family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def headers(self) -> dict[str, dict]:
        """The tensors that are read, as the headers of the safetensors files name and describe them."""
        found: dict[str, dict] = {}
        for file in self.weights:
            if self.folder is not None and file.endswith(".safetensors"):
                found |= safetensors_header(self.folder / file)[0]
        return found

    def stored(self) -> str | None:
        """The dtype of most saved weights (`float32`, ...); None where it is none of `FLOATS`, or cannot be seen."""
        counts: Counter[str] = Counter()
        for tensor in self.headers().values():
            counts[tensor["dtype"]] += prod(tensor["shape"])
        return FLOATS.get(counts.most_common(1)[0][0]) if counts else None

    def asked(self) -> str | None:
        """The dtype in which config.json wants the model to be loaded; None where it says nothing."""
        text = self.config.get("text_config")
        places = [self.config, text if isinstance(text, dict) else {}]
        found = next((p[k] for p in places for k in ("dtype", "torch_dtype") if p.get(k)), None)
        name = str(found).removeprefix("torch.")
        return None if found is None else {"half": "float16", "float": "float32"}.get(name, name)

    def size(self) -> int | None:
        """How many weights the files hold, at most; None for a hub id."""
        if self.folder is None:
            return None
        pickled = sum(
            (self.folder / f).stat().st_size for f in self.weights if not f.endswith(".safetensors")
        )
        return pickled // 2 + sum(prod(t["shape"]) for t in self.headers().values())


def read_saved(
    source: str, revision: str | None = None, adapter: bool = False, name: str | None = None
) -> Saved:
    """Look at a saved model, and refuse what mint cannot repair.

    source: directory or hub id. adapter: one that lies beside the model is wanted. name: what the user calls it. Raises `ModelError` with the reason that the files give.
    """
    folder = _folder(source)
    name = name or source
    saved = _read_hub(source, revision) if folder is None else _read_folder(name, folder)
    _refuse_code(saved)
    _refuse_family(saved)
    if folder is not None:
        _check_tokenizer_files(saved, folder)
    if saved.adapter is not None and not adapter:
        raise ModelError(
            f"{name} holds an adapter ({ADAPTER}) beside the model, and users of peft run both; merge them first"
            f" (mint merge --model {name} --adapter {name} --out MERGED), or move the adapter away to repair the base alone"
        )
    return saved


# ---------------------------------------------------------------------- where it lies


def _folder(name: str) -> Path | None:
    """The directory that `name` means; None where it can only be a hub id. Raises `ModelError` for a path that is none."""
    path = Path(name).expanduser()
    if not name.strip():
        raise ModelError("the name of the model is empty; give a directory, a .gguf file or a hub id")
    if "://" in name:
        raise ModelError(
            f"{name} is an address; give the hub id ({'/'.join(name.split('/')[3:5])}), or a directory"
        )
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(
            f"{name} is a file, and no .gguf file; give the directory it lies in ({path.parent})"
        )
    parts = name.split("/")
    spelled = name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or len(parts) > 2
    if spelled or (len(parts) == 2 and path.parent.is_dir()):
        raise ModelError(f"{name}: no such directory; {_nearest(path)}")
    return None


def _nearest(path: Path) -> str:
    """What the user may have meant instead of a path that does not exist."""
    missing = path
    while not missing.parent.is_dir() and missing != missing.parent:
        missing = missing.parent
    known = missing.parent
    if not known.is_dir():
        return "check the path"
    there = sorted(p.name for p in known.iterdir() if p.is_dir() or p.suffix == ".gguf")
    near = difflib.get_close_matches(missing.name, there, 1)
    if near:
        return f"did you mean {known / near[0]}?"
    return f"{known} holds no '{missing.name}'; check the path"


def _json(path: Path) -> dict:
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read as JSON ({' '.join(str(error).split())}); mend it, or copy it from the model again"
        ) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object; mend it, or copy it from the model again")
    return value


def refuse_pointer(path: Path) -> None:
    """Raise `ModelError` for the few lines that git leaves in place of a large file."""
    try:
        with path.open("rb") as stream:
            pointer = stream.read(len(_POINTER)) == _POINTER
    except OSError:
        return
    if pointer:
        raise ModelError(
            f"{path} is a git-lfs pointer, and not the file itself; run 'git lfs pull' in {path.parent}, or download the"
            " model again"
        )


def _generation(read, config: dict) -> tuple[dict, list[str]]:
    """The generation settings, from the file if it can be read, and what to say if it cannot."""
    try:
        found = read()
    except ModelError as error:
        return {}, [f"generation settings are ignored: {error}"]
    return (config if found is None else found), []


def _read_folder(name: str, folder: Path) -> Saved:
    adapter = folder / ADAPTER
    for file in ("config.json", *_WEIGHTS):
        if (folder / file).is_symlink() and not (folder / file).exists():
            raise ModelError(
                f"{folder / file} is a link to nothing ({(folder / file).readlink()}); download the model again"
            )
    if not (folder / "config.json").is_file():
        if adapter.is_file():
            base = _json(adapter).get("base_model_name_or_path") or "BASE"
            raise ModelError(
                f"{name} holds an adapter of {base}, and no model (config.json is missing); merge them first (mint merge"
                f" --model {base} --adapter {name} --out MERGED)"
            )
        ggufs = sorted(folder.glob("*.gguf"))
        if ggufs:
            raise ModelError(f"{name} holds no config.json, but {ggufs[0].name}; give --model {ggufs[0]}")
        inner = sorted(p.parent for at in ("*", "snapshots/*") for p in folder.glob(f"{at}/config.json"))
        hint = f"; give --model {inner[0]}" if inner else "; give the directory of a saved model"
        raise ModelError(f"{name} holds no model: config.json is missing{hint}")
    config = _json(folder / "config.json")
    generation = folder / "generation_config.json"
    settings, notes = _generation(lambda: _json(generation) if generation.is_file() else None, config)
    _refuse_dequantised(name, config)
    weights, unread = _weight_files(name, folder)
    if unread:
        notes.append(
            f"read: {', '.join(_short(weights))}; not read: {', '.join(_short(unread))}, which a patch would have to change, too"
        )
    beside = _json(adapter) if adapter.is_file() else None
    return Saved(name, folder, config, settings, beside, weights, unread, notes)


def _short(names: tuple[str, ...]) -> list[str]:
    return list(names) if len(names) <= 3 else [names[0], "…", names[-1]]


def _read_hub(name: str, revision: str | None) -> Saved:
    def fetch(filename: str, needed: bool = False) -> dict | None:
        try:
            path = cached_file(
                name,
                filename,
                revision=revision,
                _raise_exceptions_for_missing_entries=needed,
                _raise_exceptions_for_connection_errors=needed,
            )
        except Exception as error:  # the hub's client raises many kinds
            if not needed:
                return None
            said = " ".join(str(error).split())[:160]
            raise ModelError(
                f"'{name}' is no directory here, and no hub model of that name can be read ({said}); check the path, or"
                " give a directory, a .gguf file or a hub id"
            ) from None
        return None if path is None else _json(Path(path))

    config = fetch("config.json", needed=True)
    if config is None:
        raise ModelError(f"'{name}' on the hub has no config.json; give a causal language model")
    settings, notes = _generation(lambda: fetch("generation_config.json"), config)
    return Saved(name, None, config, settings, fetch(ADAPTER), notes=notes)


# ---------------------------------------------------------------------- files


def safetensors_header(path: Path) -> tuple[dict, int]:
    """(header without metadata, offset of the data). Raises `ModelError` for a file that is none, or is cut off."""
    refuse_pointer(path)
    try:
        size = path.stat().st_size
        if size < 8:
            raise ValueError(f"it has {size} bytes")
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError(f"its header should have {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        wanted = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(
            f"{path} cannot be read as safetensors ({' '.join(str(error).split())}); copy or download the file again"
        ) from None
    if size < wanted:
        raise ModelError(f"{path} is cut off: {size} of {wanted} bytes; copy or download the file again")
    if size > wanted:
        raise ModelError(
            f"{path} has {size} bytes, and its tensors end after {wanted}; copy or download the file again"
        )
    return header, 8 + length


def _weight_files(name: str, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files that are read, complete, and others with weights that are not."""
    chosen = next((w for w in _WEIGHTS if (folder / w).is_file()), None)
    there = sorted(
        p.name
        for pattern in ("*.safetensors", "pytorch_model*.bin", "consolidated*.pth", "*.gguf")
        for p in folder.glob(pattern)
        if not (p.name.startswith("adapter_model") and (folder / ADAPTER).is_file())
    )
    if chosen is None:
        if there:
            hint = _hint(folder, there[0])
        else:
            other = sorted(
                p.name for p in folder.iterdir() if p.suffix in (".h5", ".msgpack", ".onnx", ".ckpt", ".pt")
            )
            hint = f"it holds {other[0]}, which mint does not read: " if other else ""
            hint += "copy the model's weight files into it"
        raise ModelError(f"{name} holds no weights (no {' or '.join(_WEIGHTS[:3:2])}); {hint}")
    read = (chosen,) if not chosen.endswith(".json") else _shards(folder, chosen)
    for shard in read:
        if shard.endswith(".safetensors"):
            _refuse_packed(name, safetensors_header(folder / shard)[0])
        else:
            _check_pickle(folder / shard)
    return read, tuple(f for f in there if f not in read)


def _hint(folder: Path, file: str) -> str:
    """What to do with a file of weights that has not the name under which it would be read."""
    if file.endswith(".gguf"):
        return f"give --model {folder / file}"
    variant = _VARIANT.fullmatch(file)
    if variant is not None:
        kind = variant["variant"]
        return f"it holds the variant '{kind}' ({file}); save it as a model of its own: " + save_command(
            str(folder), kind, variant=kind, dtype="auto"
        )
    ending = ".safetensors" if file.endswith(".safetensors") else ".bin"
    wanted = next(w for w in _WEIGHTS if w.endswith(ending))
    return (
        f"it holds {file}, which transformers does not look for: rename it to {wanted}, or restore the index"
    )


def save_command(
    name: str, kind: str, causal: bool = True, dequantise: str | None = None, **options: str
) -> str:
    """A shell command that saves a model as the directory NAME-KIND, here, with plain weights.

    causal: in the class for text alone, not in that for images and text. dequantise: transformers' class of the quantisation
    that is to be undone. options: of `from_pretrained`.
    """
    given = "".join(f", {k}='{v}'" for k, v in options.items())
    more = "" if dequantise is None else f", {dequantise} as Q"
    given += "" if dequantise is None else ", quantization_config=Q(dequantize=True)"
    auto = "AutoModelForCausalLM" if causal else "AutoModelForImageTextToText"
    to = f"{Path(name).name}-{kind}"
    return (
        f'python -c "from transformers import {auto} as M, AutoTokenizer as T{more};'
        f" M.from_pretrained('{name}'{given}).save_pretrained('{to}', save_original_format=False);"
        f" T.from_pretrained('{name}').save_pretrained('{to}')\""
    )


def _quantised(config: dict) -> dict | None:
    """What config.json says about quantised weights, of the model or of its text; None where it says nothing."""
    places = (config, config.get("text_config"))
    return next(
        (
            p[k]
            for p in places
            if isinstance(p, dict)
            for k in ("quantization_config", "compression_config")
            if isinstance(p.get(k), dict)
        ),
        None,
    )


def _refuse_dequantised(name: str, config: dict) -> None:
    """Raise `ModelError` for quantised weights of which transformers itself can save a plain copy, and say how."""
    method = (_quantised(config) or {}).get("quant_method")
    if method in _DEQUANTISED:
        causal = config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        command = save_command(name, "bfloat16", causal, _DEQUANTISED[method], dtype="bfloat16")
        raise ModelError(
            f"{name} is quantised ({method}), and no patch can be written into such weights; save a copy in bfloat16 and use"
            f" that: {command}"
        )


def _refuse_quantised(name: str, config: dict) -> None:
    """Raise `ModelError` where config.json says that the weights are quantised, or does not say how."""
    found = _quantised(config)
    if found is None:
        return
    method = found.get("quant_method")
    off = not found.get("load_in_4bit") and not found.get("load_in_8bit")
    if method == "bitsandbytes" and off:
        return  # transformers loads the weights as they are, and so they were saved
    if method is None and off:
        raise ModelError(
            f"the quantization_config in the config.json of {name} names no quant_method, so that transformers does not load"
            " the model; its saved weights are not quantised: take quantization_config out of config.json"
        )
    raise ModelError(
        f"{name} is quantised ({method or 'quantization_config'}); load the unquantised model, or a GGUF file, which mint"
        " dequantises"
    )


def _refuse_packed(name: str, header: dict) -> None:
    packed = next(
        (
            k
            for k, t in header.items()
            if k.endswith(_PACKED)
            or (k.endswith(".weight") and len(t["shape"]) > 1 and t["dtype"].startswith(("I", "U")))
        ),
        None,
    )
    if packed is not None:
        raise ModelError(
            f"{name} is quantised (it holds {packed}); load the unquantised model, or a GGUF file, which mint dequantises"
        )


def _check_pickle(path: Path) -> None:
    """Raise `ModelError` for a file of PyTorch that is none, or is cut off."""
    refuse_pointer(path)
    with path.open("rb") as stream:
        start = stream.read(2)
    if start != b"\x80\x02" and not (
        start == b"PK" and zipfile.is_zipfile(path)
    ):  # before PyTorch 1.6, and since
        raise ModelError(f"{path} is no file of PyTorch, or is cut off; copy or download the file again")


def _shards(folder: Path, index: str) -> tuple[str, ...]:
    """The files that an index names, all present."""
    found = _json(folder / index)
    places = found.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise ModelError(f"{folder / index} has no 'weight_map'; copy or download the file again")
    if "metadata" not in found:
        raise ModelError(
            f"{folder / index} has no 'metadata' entry, which transformers needs; add \"metadata\": {{}} to it"
        )
    shards = tuple(sorted(set(places.values())))
    missing = [s for s in shards if not (folder / s).is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(shards)} weight files (first: {missing[0]}); copy or download what is"
            " missing"
        )
    return shards


def _check_tokenizer_files(saved: Saved, folder: Path) -> None:
    there = {p.name for p in folder.iterdir()}
    models = {n for n in there if n.endswith((".model", ".tiktoken"))}
    if not models and not there.intersection(_TOKENIZER_FILES):
        raise ModelError(
            f"{saved.name} holds no tokenizer (none of {', '.join(_TOKENIZER_FILES[:4])}); copy the tokenizer files of the"
            " model it was trained from into it"
        )
    for file in there.intersection(_TOKENIZER_FILES):
        refuse_pointer(folder / file)
    if "tokenizer.json" in there or not models:
        return
    which = f"the tokenizer of {saved.name}, a SentencePiece model ({sorted(models)[0]}) without a tokenizer.json,"
    need(which, "sentencepiece", "google.protobuf")


# ---------------------------------------------------------------------- what it is


def _refuse_code(saved: Saved) -> None:
    """Models that only their own Python files can build: mint never runs them."""
    family, code = saved.family, saved.config.get("auto_map")
    if family in CONFIG_MAPPING:
        return
    if code:
        known = code.values() if isinstance(code, dict) else [code]
        files = sorted({str(v).split("--")[-1].split(".")[0] + ".py" for v in known if v})
        raise ModelError(
            f"{saved.name} needs Python code of its own ({', '.join(files)}), which mint never runs; use a version of it"
            " that transformers itself can load"
        )
    if not isinstance(saved.config.get("model_type"), str):
        raise ModelError(
            f"the config.json of {saved.name} names no model_type; give the directory of a saved causal language model"
        )
    near = difflib.get_close_matches(family, list(CONFIG_MAPPING), 1)
    hint = f" (nearest: '{near[0]}')" if near else ""
    raise ModelError(
        f"{saved.name} is of the family '{family}', which this transformers does not know{hint}; upgrade transformers, or"
        " use a version of the model that it can load"
    )


def _refuse_family(saved: Saved) -> None:
    """Models that are something else than a decoder, whatever class could be made of their weights."""
    name, config = saved.name, saved.config
    what = saved.classes[0] if saved.classes else saved.family
    encoder_decoder = config.get("is_encoder_decoder")
    if encoder_decoder is None:
        encoder_decoder = _class_default(saved, "is_encoder_decoder")
    if encoder_decoder:
        raise ModelError(
            f"{name} is an encoder-decoder model ({what}); mint repairs decoder-only causal language models"
        )
    known = _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | _names(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    wrong = [c for c in saved.classes if c not in known and not _may_generate(c)]
    if saved.classes and len(wrong) == len(saved.classes):
        raise ModelError(
            f"{name} is a {wrong[0]}, no language model that writes text from left to right; mint repairs decoder-only"
            " causal language models"
        )
    if not saved.causal and saved.family not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ModelError(
            f"{name} is of the family '{saved.family}' ({what}), of which transformers has no causal language model; mint"
            " repairs decoder-only causal language models"
        )
    _refuse_dequantised(name, config)
    _refuse_quantised(name, config)


def _class_default(saved: Saved, key: str) -> object:
    try:
        return getattr(AutoConfig.for_model(saved.family), key, None)
    except Exception:  # a family whose config needs arguments says nothing
        return None


def _names(mapping: dict) -> set[str]:
    return {n for value in mapping.values() for n in ((value,) if isinstance(value, str) else value)}


def _may_generate(name: str) -> bool:
    return name.endswith(_GENERATES) or not re.search(r"For[A-Z]\w*$", name)
