"""GGUF files: their parts found and read together, dequantised once into a model directory in the cache.

The directory is named by the content of the file, so that a file that moves is not converted again and one that changes
is. Knows nothing about what is done with the model.
"""

import contextlib
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from mint.errors import ModelError
from mint.model.saved import refuse_pointer

# Raised when the way of converting changes, so that directories made by an older one are not used.
_VERSION = 1
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.gguf)", re.IGNORECASE)
_FIELDS = (
    "split.no", "split.count", "split.tensors.count", "general.type", "general.architecture", "tokenizer.ggml.model",
)  # fmt: skip


def parts(path: Path) -> list[Path]:
    """All files of the model that a GGUF file belongs to, in order: itself, or the parts beside it.

    Raises `ModelError` for a file that is missing or is no GGUF file.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give a GGUF file, a directory or a hub id")
    found = _PART.fullmatch(path.name)
    if found is None or int(found["count"]) < 2:
        files = [path]
    else:
        count = int(found["count"])
        names = [f"{found['stem']}-{n:05d}-of-{count:05d}{found['ending']}" for n in range(1, count + 1)]
        files = [path.with_name(n) for n in names]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise ModelError(
                f"{path} is one of {count} parts, and {len(missing)} are missing beside it (first: {missing[0]}); put all"
                " parts into one folder"
            )
    for file in files:
        refuse_pointer(file)
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ModelError(
                    f"{file} is not a GGUF file (its first bytes are not GGUF); give a model file or directory"
                )
    return files


def converted(path: Path, cache: Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """The model of a GGUF file (all its parts) as a directory in `cache`, in float32; made once, then found again.

    Raises `ModelError` where the file cannot be read, lacks weights, or the cache has no room.
    """
    files = parts(path)
    home = cache / "gguf" / f"{_identity(files, cache)}-v{_VERSION}"
    if (home / "config.json").exists():
        return home
    _check_room(files, cache)
    with making(home) as folder:
        say(f"converting {path.name} (once)")
        convert(files, folder)
    return home


@contextlib.contextmanager
def making(home: Path):
    """Within: a temporary directory to fill; afterwards it is `home`. A failure leaves nothing behind."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"cannot write the cache {home.parent} ({error.strerror}); set MINT_CACHE to a folder"
        ) from None
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".making-") as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        yield folder
        try:
            os.rename(folder, home)
        except OSError:
            # Another process finished first; its copy is as good as ours.
            if not (home / "config.json").exists():
                shutil.rmtree(home, ignore_errors=True)
                os.rename(folder, home)


def convert(files: Sequence[Path], folder: Path) -> None:
    """Write the model of one GGUF file, or of its parts in order, into a directory, dequantised to float32.

    Raises `ModelError` for a file that cannot be read as a model, is cut off, or lacks weights.
    """
    whole = files[0]
    _check_kind(whole, _checked(files))
    merged = None
    try:
        if len(files) > 1:
            merged = folder / "merged.gguf"
            _merge(files, merged)
            whole = merged
        where = {"pretrained_model_name_or_path": str(whole.parent), "gguf_file": whole.name}
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            tokenizer = AutoTokenizer.from_pretrained(**where)
            read = AutoModelForCausalLM.from_pretrained(
                **where, dtype=torch.float32, output_loading_info=True
            )
            # As output_loading_info has it; a model that was read so has attributes of its quantiser besides.
            model, info = cast(tuple[Any, dict], read)
    except Exception as error:  # the readers of GGUF raise whatever they stumble over
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"{files[0]} cannot be read as a GGUF model ({said[:200]}); give the directory or hub id that it was converted from"
        ) from error
    finally:
        if merged is not None:
            merged.unlink(missing_ok=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{files[0]} lacks {len(missing)} weights (first: {missing[0]}); is the file complete?"
        )
    # The weights are plain floats now; left in place, the quantiser's state makes save_pretrained refuse the model.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # What a GGUF file says about generation is its end tokens; the rest are defaults.
    ends = {k: getattr(model.config, k, None) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**{k: v for k, v in ends.items() if v is not None})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_kind(file: Path, values: dict) -> None:
    """Raise `ModelError` for a file that is no language model, or none that transformers can read."""
    kind, architecture = values.get("general.type", "model"), str(values.get("general.architecture"))
    if kind in ("adapter", "mmproj") or architecture == "clip":
        what = "a LoRA adapter" if kind == "adapter" else "a vision tower"
        raise ModelError(f"{file} holds {what}, no model; give the model's own GGUF file")
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES or architecture in ("general", "tokenizer"):
        raise ModelError(
            f"{file} holds a model of the architecture '{architecture}', which transformers does not read from GGUF; give the"
            " directory or hub id that the file was converted from"
        )
    if "tokenizer.ggml.model" not in values:
        raise ModelError(
            f"{file} holds no tokenizer (tokenizer.ggml.model is missing); convert the model again with its tokenizer files"
            " beside it, or give the directory that it was converted from"
        )


def _unread(file: Path, error: Exception) -> ModelError:
    """What to say of a file at which the reader of GGUF stumbled: it checks no length, and ends in numpy's errors."""
    said = " ".join(str(error).split()) or type(error).__name__
    if "version" in said:
        with file.open("rb") as stream:
            version = stream.read(8)[4:]
        return ModelError(
            f"{file} is of GGUF version {int.from_bytes(version, 'little')}, which is not read (2 and 3 are); convert the model"
            " again with a current llama.cpp"
        )
    return ModelError(
        f"{file} is cut off or damaged: its header does not fit its {file.stat().st_size:,} bytes ({said[:120]}); download or"
        " copy the file again"
    )


def _checked(files: Sequence[Path]) -> dict:
    """Entries of the first file's header (`_FIELDS`); raises `ModelError` unless the parts are one whole."""
    import gguf

    held, wanted, first, numbers = 0, None, {}, []
    for file in files:
        try:
            reader = gguf.GGUFReader(file)
            value = {k: f.contents() for k in _FIELDS if (f := reader.fields.get(k)) is not None}
        except Exception as error:
            raise _unread(file, error) from error
        count = int(value.get("split.count") or 1)
        if max(count, 1) != len(files) and count > 1:
            raise ModelError(
                f"{file} is part {int(value.get('split.no', 0)) + 1} of {count}, and the others are not known by its name;"
                f" name the parts …-00001-of-{count:05d}.gguf and so on, or merge them (llama-gguf-split --merge)"
            )
        held += len(reader.tensors)
        numbers.append(value.get("split.no"))
        wanted = value.get("split.tensors.count", wanted)
        first = first or value
    known = [n for n in numbers if n is not None]
    if len(files) > 1 and known and known != list(range(len(files))):
        raise ModelError(
            f"the parts of {files[0].name} are numbered {', '.join(str(n + 1) for n in known)} inside; give each file the"
            " name of its part"
        )
    if wanted is not None and len(files) > 1 and int(wanted) not in (held, 0) and int(wanted) > held:
        raise ModelError(f"{files[0]} and its parts hold {held} of {wanted} tensors; are the files complete?")
    return first


def _merge(files: Sequence[Path], out: Path) -> None:
    """Write the parts of a model as one file: the metadata of the first, the tensors of all, untouched."""
    import gguf

    readers = [gguf.GGUFReader(file) for file in files]
    architecture = readers[0].fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, value in readers[0].fields.items():
        if name.startswith(("GGUF.", "split.")) or name == "general.architecture":
            continue
        inner = value.types[-1] if value.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value.contents(), value.types[0], sub_type=inner)
    for reader in readers:
        for tensor in reader.tensors:
            writer.add_tensor_info(
                tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for reader in readers:
        for tensor in reader.tensors:
            writer.write_tensor_data(tensor.data)
    writer.close()


def _identity(files: Sequence[Path], cache: Path) -> str:
    """SHA-256 of the files' content; remembered by their state on disk, so that big files are read once."""
    state = [
        (str(f.resolve()), (s := f.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for f in files
    ]
    memo = cache / "gguf" / "known" / hashlib.sha256(repr(state).encode()).hexdigest()
    try:
        return memo.read_text().strip()
    except OSError:
        pass
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    found = digest.hexdigest()[:40]
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        memo.write_text(found + "\n")
    return found


def _check_room(files: Sequence[Path], cache: Path) -> None:
    import gguf

    try:
        values = sum(int(t.n_elements) for f in files for t in gguf.GGUFReader(f).tensors)
    except Exception:  # told better when it is converted
        return
    there = cache
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    # Parts are merged beside the result first.
    needed = 4 * values + (sum(f.stat().st_size for f in files) if len(files) > 1 else 0)
    if free < needed:
        raise ModelError(
            f"converting {files[0].name} needs {needed / 1e9:.1f} GB in {there}, found {free / 1e9:.1f} GB free; make room,"
            " or set MINT_CACHE to a folder on a larger disk"
        )
