"""Fill in the middle: a prefix and a suffix dressed in the model's own marker tokens, as one prompt.

The markers are found among the tokenizer's added tokens by what their names say, never by the model's name: Bavarian et
al. 2022, arXiv 2207.14255, name the order prefix, suffix, middle ("PSM"), which is the one built here. Knows nothing about
targets or weights.
"""

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mint.errors import CaseError, ModelError

_ROLES = {
    "prefix": re.compile(r"fim.?(prefix|begin)|(?<![a-z])pre(?![a-z])"),
    "suffix": re.compile(r"fim.?(suffix|hole)|(?<![a-z])suf(?![a-z])"),
    "middle": re.compile(r"fim.?(middle|end)|(?<![a-z])mid(?![a-z])"),
}
"""What the names of the three markers say, in lower case: `<|fim_prefix|>`, `<fim_prefix>`, `<PRE>`; DeepSeek's are called
begin, hole and end."""


@dataclass(frozen=True)
class Markers:
    """A tokenizer's three marker tokens, as text."""

    prefix: str
    suffix: str
    middle: str


def markers(tokenizer: PreTrainedTokenizerBase) -> Markers | None:
    """The tokenizer's own markers; None where it lacks one of the three."""
    names = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    found = {}
    for role, pattern in _ROLES.items():
        fitting = [name for name in names if pattern.search(name.lower())]
        if not fitting:
            return None
        found[role] = fitting[0]
    return Markers(**found)


def infill(tokenizer: PreTrainedTokenizerBase, prefix: str, suffix: str, name: str) -> str:
    """The prompt that asks for what stands between `prefix` and `suffix`.

    name: the model's, for messages. Raises `ModelError` where the tokenizer has no such markers, `CaseError` where one of
    the texts holds one already.
    """
    marks = markers(tokenizer)
    if marks is None:
        raise ModelError(
            f"--suffix: the tokenizer of {name} has no fill-in-the-middle tokens (prefix, suffix, middle); leave out"
            " --suffix, or take a model that was trained to fill in"
        )
    for given, text in (("prompt", prefix), ("suffix", suffix)):
        held = next((m for m in (marks.prefix, marks.suffix, marks.middle) if m in text), None)
        if held is not None:
            raise CaseError(
                f"--suffix: the {given} holds the marker {held} already; give the plain texts, or all of it as --prompt"
                " without --suffix"
            )
    return f"{marks.prefix}{prefix}{marks.suffix}{suffix}{marks.middle}"
