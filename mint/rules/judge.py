"""What a model writes at a rule's prompts, and what that is worth: the right text, the wrong one, or neither.

Text is always free greedy generation. A share comes with its Wilson interval. Knows nothing about edits or files.
"""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from mint.batches import alike
from mint.errors import MintError
from mint.extras import install_command
from mint.measure.judges import judge_bash
from mint.model.lm import LM
from mint.model.stop import Stop
from mint.rules.rule import Row

STATEMENT_TOKENS = 40
"""Tokens written at a fault, to its line's end, so that the whole statement can be judged."""
NEAR_TOKENS = 16
"""Tokens that must stay the same behind a near prompt."""
_BATCH, _BATCH_TOKENS = 16, 4096
_LINES_BACK = 12

Judge = Callable[[Row, str], bool]
"""(row, text written behind its prompt) -> whether it passes."""


# ---------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Ask:
    """One prompt (ids) to write behind: at most so many tokens, or up to a newline."""

    prompt: tuple[int, ...]
    tokens: int
    lines: int | None = None
    """Stop at newline number so many; None: do not stop at newlines."""


def write(lm: LM, asks: Sequence[Ask], progress: Callable[[int], None] = lambda _: None) -> list[list[int]]:
    """Plain greedy ids behind each prompt, without the token that ended the text.

    Batches depend on nothing but what is asked, so that two models are asked in the same way. progress: told how many
    more are done.
    """
    written: list[list[int]] = [[] for _ in asks]
    ends = lm.stop_ids()
    # Prompts that ask for as many tokens go together: a batch writes as long as the longest of them.
    together = [[i for i, a in enumerate(asks) if a.tokens == n] for n in sorted({a.tokens for a in asks})]
    batches = [
        [same[k] for k in batch]
        for same in together
        for batch in alike([len(asks[i].prompt) for i in same], _BATCH_TOKENS, _BATCH)
    ]
    for batch in batches:
        asked = [asks[i] for i in batch]
        stops = [None if a.lines is None else Stop("line", a.lines) for a in asked]
        room = lm.context - max(len(a.prompt) for a in asked)
        tokens = max(1, min(asked[0].tokens, room))
        for i, ids in zip(batch, lm.generate([a.prompt for a in asked], tokens, stops), strict=True):
            written[i] = ids[:-1] if ids and ids[-1] in ends else ids
        progress(len(batch))
    return written


def text_of(lm: LM, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that ids stand for behind a prompt, without half a character at its end."""
    return lm.continuation(prompt, ids).rstrip("\ufffd") if ids else ""


# ---------------------------------------------------------------------- judging


def verdict(text: str, target: str, wrong: str | None) -> str:
    """`adopted`: the text starts with the target; `wrong`: with the wrong text; `avoided`: with neither."""
    if text.startswith(target):
        return "adopted"
    return "wrong" if wrong and text.startswith(wrong) else "avoided"


@dataclass(frozen=True)
class Share:
    """k of n, with its 95 % Wilson interval (Wilson 1927; Brown, Cai & DasGupta 2001, section 3.1.1)."""

    right: int
    of: int

    @property
    def value(self) -> float | None:
        return self.right / self.of if self.of else None

    @property
    def interval(self) -> tuple[float, float] | None:
        if not self.of:
            return None
        found = binomtest(self.right, self.of).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)


def well_formed(row: Row, text: str) -> bool | None:
    """Whether the statement that the text completes is one, in the language of the row's source.

    Python by its own parser, bash by tree-sitter's grammar; None for other languages, and where no line was ended.
    """
    kind = _language(row)
    if kind is None or "\n" not in text:
        return None
    if kind == "python":
        return python_statement(row.prompt, text) is not None
    try:
        return any(judge_bash(piece).ok for piece in _pieces(row.prompt, text))
    except MintError:
        return None  # the grammar is not installed


def _language(row: Row) -> str | None:
    name = (row.source or "").lower()
    if name.endswith((".py", ".pyi", ".pyw")):
        return "python"
    return "bash" if name.endswith((".sh", ".bash")) else None


def _pieces(prompt: str, text: str) -> Iterator[str]:
    """The last lines of prompt + text, from the shortest: 1 line of the prompt and 1 of the text, then more."""
    lines = prompt.split("\n")[-_LINES_BACK:]
    ended = text.split("\n")[:-1]
    for back in range(1, len(lines) + 1):
        for ahead in range(1, len(ended) + 1):
            yield textwrap.dedent("\n".join(lines[-back:]) + "\n".join(ended[:ahead])) + "\n"


_FRAMES = ("{}", "{}    pass\n", "if x:\n    pass\n{}", "if x:\n    pass\n{}    pass\n", "try:\n    pass\n{}    pass\n",
           "{}def f():\n    pass\n", "match x:\n{}        pass\n")  # fmt: skip
"""A line may open a block, go on with one, or decorate one: with such a frame around it, it parses."""


def python_statement(prompt: str, text: str) -> str | None:
    """The statement that ends with the first lines of `text`, as source that parses; None if there is none."""
    for piece in _pieces(prompt, text):
        for frame in _FRAMES:
            whole = frame.format(textwrap.indent(piece, "    ") if frame.startswith("match") else piece)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tree = ast.parse(whole)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            if tree.body:
                return whole
    return None


# ---------------------------------------------------------------------- judges that a user may ask for


def judge_named(asked: str) -> Judge:
    """A judge from its text: `ruff:CODE`, `regex:PATTERN` or `cmd:COMMAND`. Raises `MintError`."""
    kind, _, rest = asked.partition(":")
    if kind not in JUDGES or not rest:
        raise MintError(f"unknown judge '{asked}'; write ruff:CODE, regex:PATTERN or cmd:COMMAND")
    return JUDGES[kind](rest)


def _regex(pattern: str) -> Judge:
    """Passes where the pattern is found in what was written."""
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise MintError(f"--judge regex:{pattern}: not a regular expression ({error}); mend it") from None
    return lambda _row, text: found.search(text) is not None


_COMMAND_SECONDS = 30


def _command(command: str) -> Judge:
    """Passes where the command, given prompt + text on its standard input, ends with exit code 0."""
    words = shlex.split(command)
    if not words or shutil.which(words[0]) is None:
        raise MintError(f"--judge cmd:{command}: no such command; give one that can be run")

    def judged(row: Row, text: str) -> bool:
        try:
            done = subprocess.run(
                words, input=(row.prompt + text).encode(), capture_output=True, timeout=_COMMAND_SECONDS
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    return judged


_USUAL = {"np": "import numpy as np", "pd": "import pandas as pd", "tf": "import tensorflow as tf"}


def _ruff(code: str) -> Judge:
    """Passes where ruff does not report the rule in the statement written; names of modules count as imported."""
    ruff = _ruff_command()
    known = subprocess.run([*ruff, "rule", code], capture_output=True)
    if known.returncode:
        raise MintError(f"--judge ruff:{code}: ruff has no rule '{code}'; see `ruff rule --all`")

    def judged(row: Row, text: str) -> bool:
        statement = python_statement(row.prompt, text)
        if statement is None:
            return False
        source = "".join(f"{line}\n" for line in _imports(statement)) + statement
        done = subprocess.run(
            [*ruff, "check", "--isolated", "--preview", "--select", code, "--output-format", "json", "-"],
            input=source.encode(),
            capture_output=True,
        )
        try:
            reported = json.loads(done.stdout or b"[]")
        except ValueError:
            return False
        return not any(r.get("code") == code for r in reported)

    return judged


def _ruff_command() -> list[str]:
    for words in ([sys.executable, "-m", "ruff"], ["ruff"]):
        try:
            if subprocess.run([*words, "--version"], capture_output=True).returncode == 0:
                return words
        except OSError:
            continue
    raise MintError(f"--judge ruff needs the program ruff, which is not installed; {install_command('ruff')}")


def _imports(statement: str) -> list[str]:
    """Imports of the names whose attributes the statement uses: a dozen lines rarely hold the file's own."""
    bases = {
        node.value.id
        for node in ast.walk(ast.parse(statement))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    return [_USUAL.get(name, f"import {name}") for name in sorted(bases - {"self", "cls"})]


JUDGES: dict[str, Callable[[str], Judge]] = {"ruff": _ruff, "regex": _regex, "cmd": _command}
