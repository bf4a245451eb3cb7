"""How a text ends: what is put behind a target so that the model learns to stop, where generation halts, what counts.

The only place that knows stop rules. Knows token ids and text through the `LM` it is given; nothing about edits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import StoppingCriteria

from mint.case import STOPS, Case
from mint.errors import MintError, ModelError

if TYPE_CHECKING:
    from mint.model.lm import LM

SPARE_TOKENS = 8
"""Tokens generated beyond the length of a target, to see what the model writes instead of stopping."""
BLOCK_TOKENS = 256
"""Tokens generated beyond the length of a target that is a block: the whole block is judged, whatever its length."""
DEDENT_TOKENS = 8
"""Tokens behind a block within which the model must have left it."""
UNENDED = "…"
"""Stands behind a text that equals the target but did not end there within the tokens allowed."""


def rule_of(case: Case, asked: str = "auto", chat: bool = False) -> str:
    """The stop rule of a case: `asked`, unless that is `auto`; then the case's own; else `eos` in a chat, `line` if not.

    Raises `MintError` for a rule that does not exist.
    """
    rule = asked if asked != "auto" else case.stop or ("eos" if chat else "line")
    if rule not in STOPS:
        raise MintError(f"unknown stop rule '{rule}'; known are auto, {', '.join(STOPS)}")
    return rule


@dataclass(frozen=True)
class Stop:
    """One way to end a text. `Stop.of` makes the one that fits a target."""

    rule: str
    """`line`: at a newline. `block`: where an indented block is left: before the first line with anything in column 0,
    once a line was indented; blank lines at the end are dropped. `eos`: at an end-of-sequence token, nowhere else.
    `none`: not at all; a target is compared as far as it goes."""
    lines: int = 1
    """Of `line`: how many newlines end the text."""
    newline: bool = True
    """Of `line` and `block`: whether the last newline belongs to the text."""
    length: int = 0
    """Of `none`: how many characters are compared."""

    @classmethod
    def of(cls, rule: str, target: str) -> "Stop":
        """The stop of a text that should read `target`."""
        newline = target.endswith("\n")
        return cls(rule, target.count("\n") + (not newline), newline, len(target))

    # ------------------------------------------------------------------ what the model should write

    def encode(self, lm: "LM", ids: Sequence[int], target: str) -> list[int]:
        """The tokens that end the text behind `ids` (prompt and target): what the model must write to stop.

        Where the model as it is already stops there, its own tokens. Raises `ModelError` where the rule needs an
        end-of-sequence token and the model has none.
        """
        if self.rule == "none" or ids[-1] in lm.stop_ids():
            return []
        if self.rule == "eos":
            return [end_of_sequence(lm)]
        if self.rule == "line":
            return [] if target.endswith("\n") else [_line_end(lm, ids)]
        behind = (
            lm.generate([ids], min(DEDENT_TOKENS, lm.context - len(ids)))[0] if lm.context > len(ids) else []
        )
        for n, token in enumerate(behind, start=1):
            text = target + lm.continuation(ids, behind[:n])
            if token in lm.stop_ids() or ("\ufffd" not in text and self.halt(text)):
                return behind[:n]
        return [end_of_sequence(lm)]

    # ------------------------------------------------------------------ what it did write

    def budget(self, tokens: int) -> int:
        """Most tokens to generate for a target of so many."""
        return tokens + (BLOCK_TOKENS if self.rule == "block" else SPARE_TOKENS)

    def halt(self, text: str) -> bool:
        """Whether a continuation that began with `text` is over, whatever follows (end-of-sequence tokens aside)."""
        if self.rule == "line":
            return text.count("\n") >= self.lines
        if self.rule == "block":
            return _block(text) is not None
        return self.rule == "none" and 0 < self.length <= len(text.removesuffix("\ufffd"))

    def cut(self, text: str, ended: bool = False) -> tuple[str, bool]:
        """The part of a continuation that counts, and whether its end was reached.

        ended: whether the model wrote an end-of-sequence token behind `text`.
        """
        if self.rule == "line":
            parts = text.split("\n")
            if len(parts) <= self.lines:
                return text, ended
            return "\n".join(parts[: self.lines]) + ("\n" if self.newline else ""), True
        if self.rule == "block":
            end = _block(text)
            if end is None and not (ended and text.strip()):
                return text, ended
            return text[:end].rstrip() + ("\n" if self.newline else ""), True
        if self.rule == "none":
            return (text[: self.length] if self.length else text), True
        return text, ended


class Halt(StoppingCriteria):
    """Ends each row of a `generate` call where its stop says so."""

    def __init__(self, lm: "LM", prompts: Sequence[Sequence[int]], start: int, stops: Sequence[Stop | None]):
        self.lm, self.start, self.stops = lm, start, stops
        # A few tokens of the prompt, since a tokenizer may drop the blank of a lone first token.
        self.before = [list(p[-4:]) for p in prompts]

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> torch.BoolTensor:
        """[batch] bool: which rows are done."""
        done = [
            stop is not None and stop.halt(self.lm.continuation(before, row[self.start :].tolist()))
            for row, before, stop in zip(input_ids, self.before, self.stops, strict=True)
        ]
        # torch's constructor has no type for bools, of which the library's signature wants one.
        return cast(torch.BoolTensor, torch.tensor(done, device=input_ids.device))


def _block(text: str) -> int | None:
    """Where an indented block ends in `text`: the offset of the first later line in column 0; None if it does not."""
    offset, indented = 0, False
    for line in text.split("\n"):
        if line.strip():
            if not line[0].isspace() and indented:
                return offset
            indented = indented or line[0].isspace()
        offset += len(line) + 1
    return None


def _line_end(lm: "LM", ids: Sequence[int]) -> int:
    """A token that ends the line behind `ids`: the model's own if it ends it, else a newline, else end of sequence."""
    best = int(lm.logits([ids], [[len(ids) - 1]])[0].argmax())
    if best in lm.stop_ids() or lm.continuation(ids, [best]).startswith("\n"):
        return best
    newline = lm.tokenizer("\n", add_special_tokens=False).input_ids
    if newline and lm.continuation(ids, newline[-1:]).startswith("\n"):
        return newline[-1]
    return end_of_sequence(lm)


def end_of_sequence(lm: "LM") -> int:
    """The tokenizer's end-of-sequence token, else one that the model stops at. Raises `ModelError` without any."""
    own = lm.tokenizer.eos_token_id
    if isinstance(own, int):
        return own
    ids = lm.stop_ids()
    if not ids:
        raise ModelError(
            f"{lm.name} has no end-of-sequence token; use --stop none or a target ending in a newline"
        )
    return min(ids)
