"""Write files whole or not at all. Knows nothing about what is in them."""

import math
import os
import tempfile
from pathlib import Path

from mint.errors import PatchError


def write_file(path: str | Path, data: bytes | str, *, force: bool = False) -> Path:
    """Write a file whole or not at all: temporary file beside it, fsync, rename.

    Raises `PatchError` if it exists (without `force`), or cannot be written (disk full, no such folder).
    """
    path = Path(path)
    if path.exists() and not force:
        raise PatchError(f"{path} exists; give another name, or --force to replace it")
    raw = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise PatchError(f"cannot write {path} ({error.strerror}); nothing was written there") from None
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
    return path


def jsonable(value: object) -> object:
    """The same as JSON values: tuples and sets become lists, numbers that are none and whatever else is there, text."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int | bool) else str(value)[:200]
