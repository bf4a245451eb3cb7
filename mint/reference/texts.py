"""The reference text: what ships, what the user adds, and its cut into passages. Knows nothing about statistics."""

import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from mint.errors import MintError
from mint.model.lm import LM

WINDOW = 192
"""Tokens of one reference passage; longer texts are cut into passages."""
_COMMENTS = ("# ", "; ")


def reference_texts(extra: Sequence[str | Path] = ()) -> list[str]:
    """The passages that ship, in a fixed order, and the user's own files after them.

    A file is cut into passages at lines that hold only `---`. Raises `MintError` for a file that cannot be read.
    """
    folder = resources.files("mint") / "data" / "reference"
    texts = [
        f.read_text(encoding="utf-8") for f in sorted(folder.iterdir(), key=lambda f: f.name) if f.is_file()
    ]
    for path in extra:
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise MintError(
                f"{path}: cannot be read as reference text ({error}); give a UTF-8 text file"
            ) from None
    passages = [p.strip("\n") + "\n" for text in texts for p in ("\n" + text + "\n").split("\n---\n")]
    return [p for p in passages if p.strip()]


def reference_digest(extra: Sequence[str | Path] = ()) -> str:
    """SHA-256 of the reference text, what ships and the user's own files: other text, other repairs."""
    return hashlib.sha256("\0".join(reference_texts(extra)).encode()).hexdigest()


def reference_lines() -> list[str]:
    """Each line of code that ships with a comment above it, both together, as a text of its own.

    A model answers a short prompt otherwise than the same words within a passage.
    """
    folder = resources.files("mint") / "data" / "reference"
    found = []
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith("_lines.txt"):
            lines = file.read_text(encoding="utf-8").splitlines()
            found += [
                f"{comment}\n{code}\n"
                for comment, code in zip(lines, lines[1:], strict=False)
                if comment.startswith(_COMMENTS) and code and not code.startswith((*_COMMENTS, "---"))
            ]
    return found


def passages(lm: LM, texts: Sequence[str]) -> list[list[int]]:
    """Texts as ids, cut into windows of at most `WINDOW` tokens."""
    template, lm.template = lm.template, None
    try:
        window = min(WINDOW, lm.context - 1)
        out = []
        for text in texts:
            ids = lm.tokenizer(text, add_special_tokens=True).input_ids
            out += [ids[i : i + window] for i in range(0, len(ids), window)]
    finally:
        lm.template = template
    return [p for p in out if len(p) > 1]
