"""Code judges: is a text valid in its language, and is it the same program as the expected text?

Nothing is executed except by the judge `python_tests`, which runs in `mint.measure.sandbox`. Judges know
nothing about models or cases; `JUDGES` below is the whole list.
"""

import ast
import difflib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mint.case import read_jsonl
from mint.errors import CaseError, MintError
from mint.extras import need
from mint.measure.sandbox import run_python


@dataclass(frozen=True)
class Judgement:
    """What a judge found."""

    ok: bool
    """The text parses, assembles, or passes its tests, whichever the judge says it checks."""
    detail: str
    """One line; `parses`, `assembles (8 bytes)`, `passed`, or why not."""
    matches_expected: bool | None = None
    """Same syntax tree (python, bash) or bytes (ia32) as the expected text; None without a usable one."""


def judge(name: str, text: str, expected: str | None = None, **options) -> Judgement:
    """Judge `text` with the judge called `name` (a key of `JUDGES`), against `expected` if there is one.

    `options` go to the judge: `python_tests` needs `before` and `after` and takes `seconds`, `memory_bytes`.
    Raises `MintError` for an unknown name, or when a judge's own tool is missing. Never raises for what
    `text` holds.
    """
    if name not in JUDGES:
        near = difflib.get_close_matches(name, JUDGES, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise MintError(f"unknown judge '{name}'; known are {', '.join(JUDGES)}{hint}")
    return JUDGES[name](text, expected, **options)


def check_tool(name: str) -> None:
    """Raise `MintError` where the tool that a judge works with is not installed."""
    if name == "bash":
        _bash_parser()
    elif name == "ia32":
        assembler()


# --- python -------------------------------------------------------------------------------------------------


def _python_tree(text: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like are the text's own affair
        return ast.dump(ast.parse(text))


_NO_STATEMENT = ast.dump(ast.parse(""))


def judge_python(text: str, expected: str | None = None) -> Judgement:
    """`ok` if `text` parses as Python with at least one statement; a match has the same tree, in any layout.

    Parsed, not compiled: a line such as `return x` is judged without the function around it.
    """
    try:
        tree = _python_tree(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Judgement(False, f"syntax: {_one_line(error)}", None if expected is None else False)
    if tree == _NO_STATEMENT:
        return Judgement(False, "syntax: no statement", None if expected is None else False)
    if expected is None:
        return Judgement(True, "parses")
    try:
        return Judgement(True, "parses", tree == _python_tree(expected))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Judgement(True, "parses; the expected text does not", None)


def judge_python_tests(
    text: str,
    expected: str | None = None,
    *,
    before: str = "",
    after: str,
    seconds: float = 10.0,
    memory_bytes: int = 512 << 20,
) -> Judgement:
    """Run `before + text + after` under limits; `ok` if it ends without an exception (pass@1 of one sample).

    HumanEval (Chen et al. 2021, section 2.1): `before` is the prompt, `after` the tests and the call of
    `check`. `seconds` is wall-clock time; `expected` is only compared as a syntax tree, behind `before`.
    """
    result = run_python(before + text + after, seconds=seconds, memory_bytes=memory_bytes)
    matches = None
    if expected is not None:
        matches = judge_python(before + text, before + expected).matches_expected
    return Judgement(result.passed, result.detail, matches)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200]


# --- bash ---------------------------------------------------------------------------------------------------

_PLACEHOLDER = re.compile(r"\{\{.*?\}\}")


@cache
def _bash_parser():
    need("the bash judge", "tree_sitter", "tree_sitter_bash")
    import tree_sitter
    import tree_sitter_bash

    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_bash.language()))


def _bash_tree(text: str):
    # `{{path/to/file}}` of tldr stands for one word; as bash it would be two nested groups or brace text. Its
    # name stays part of the word, so that different placeholders stay different.
    plain = _PLACEHOLDER.sub(lambda m: "P" + re.sub(r"\W", lambda c: f"_{ord(c[0]):x}_", m[0]), text)
    return _bash_parser().parse((plain.rstrip("\n") + "\n").encode("utf-8", "replace")).root_node


def _bash_words(node) -> list[str]:
    """Names of all nodes in order, with the text of the leaves: equal for equal programs, whatever the
    spacing.
    """
    out, stack = [], [node]
    while stack:
        here = stack.pop()
        out.append(here.type)
        if here.child_count == 0 or here.type in ("raw_string", "string", "heredoc_body", "word"):
            out.append(here.text.decode("utf-8", "replace"))
        stack.extend(reversed(here.children))
    return out


def _first_fault(root) -> str:
    stack = [root]
    while stack:
        node = stack.pop()
        line, column = node.start_point[0] + 1, node.start_point[1] + 1
        if node.is_missing:
            return f"syntax: missing {node.type} at {line}:{column}"
        if node.is_error:
            found = _one_line(node.text.decode("utf-8", "replace"))[:40]
            return f"syntax: unexpected {found!r} at {line}:{column}"
        stack.extend(reversed([c for c in node.children if c.has_error or c.is_missing or c.is_error]))
    return "syntax"


def judge_bash(text: str, expected: str | None = None) -> Judgement:
    """`ok` if tree-sitter's bash grammar parses `text` with no error or missing node, and it holds a
    statement.

    `{{placeholders}}` of tldr pages count as words. Commands are not looked up: `fnid .` parses. A match has
    the same tree and words; spacing between words and comments' place aside.
    """
    root = _bash_tree(text)
    no_match = None if expected is None else False
    if root.has_error:
        return Judgement(False, _first_fault(root), no_match)
    if not [c for c in root.named_children if c.type != "comment"]:
        return Judgement(False, "syntax: no command", no_match)
    if expected is None:
        return Judgement(True, "parses")
    wanted = _bash_tree(expected)
    if wanted.has_error:
        return Judgement(True, "parses; the expected text does not", None)
    return Judgement(True, "parses", _bash_words(root) == _bash_words(wanted))


# --- ia32 ---------------------------------------------------------------------------------------------------

_UNDEFINED = re.compile(r"symbol `([^']+)' not defined")
# Directives that read other files, or make the assembler do unbounded work.
_REFUSED = re.compile(
    r"^\s*%|\bincbin\b|\b(?:times|res[bwdqtoyz])\b(?!\s+\w{1,6}\b)", re.IGNORECASE | re.MULTILINE
)
_END = "mint_end_of_text"


@dataclass(frozen=True)
class _Assembled:
    code: bytes | None
    detail: str
    undefined: frozenset[str] = frozenset()


def _asm_lines(text: str) -> str:
    """Shellcode_IA32 divides instructions on one line by the two characters backslash and n."""
    return re.sub(r"\s*\\n\s*", "\n", text)


def assembler() -> str:
    """`nasm` where the program is installed, else `keystone`. Raises `MintError` if neither is there."""
    if shutil.which("nasm"):
        return "nasm"
    need("the ia32 judge, without the program nasm,", "keystone")
    return "keystone"


def _nasm(text: str, labels: frozenset[str]) -> _Assembled:
    # A label that the text does not define gets a place just behind it, so that short jumps reach it; the
    # place depends on the sorted names only, so the same label is the same address in both texts.
    places = "".join(f"{name} equ {_END}+{i}\n" for i, name in enumerate(sorted(labels)))
    source = f"bits 32\n{_asm_lines(text)}\n" + (f"{_END}:\n{places}" if labels else "")
    limited = [
        "/bin/sh",
        "-c",
        'ulimit -t 5; ulimit -f 2048; ulimit -v 1048576; exec "$0" "$@"',
        shutil.which("nasm"),
    ]
    with tempfile.TemporaryDirectory(prefix="mint-asm-") as folder:
        (Path(folder) / "in.asm").write_bytes(source.encode("utf-8", "replace"))
        try:
            done = subprocess.run(
                [*limited, "-w+error=label-orphan", "-f", "bin", "-o", "out", "in.asm"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                cwd=folder,
                timeout=10,
            )
        except subprocess.TimeoutExpired:
            return _Assembled(None, "timeout")
        errors = done.stderr.decode("utf-8", "replace")
        if done.returncode == 0:
            return _Assembled((Path(folder) / "out").read_bytes(), "")
    message = next(
        (line for line in errors.splitlines() if "error" in line or "fatal" in line), "did not assemble"
    )
    return _Assembled(None, _one_line(message.split("error:")[-1]), frozenset(_UNDEFINED.findall(errors)))


_KEYSTONE = r"""
import json, keystone, sys, zlib
lines = sys.stdin.read()
def place(name, value):
    value[0] = zlib.crc32(name) % 96 + 16
    return True
engine = keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_32)
engine.syntax = keystone.KS_OPT_SYNTAX_NASM
engine.sym_resolver = place
try:
    code, count = engine.asm(lines)
    print(json.dumps([bytes(code or []).hex(), ""]))
except keystone.KsError as error:
    print(json.dumps([None, str(error)]))
"""
_NUMBER = re.compile(
    r"(?<![\w.$'\"])(?:0x([0-9a-f]+)|([0-9][0-9a-f]*)h|([0-7]+)[oq]|([01]+)b|([0-9]+))\b", re.IGNORECASE
)


_STRING = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"")
_DATA = re.compile(r"(?:^|[\s:])(d[bwdq])\s", re.IGNORECASE)
_DATA_BYTES = {"db": 1, "dw": 2, "dd": 4, "dq": 8}


def _strings_as_numbers(line: str) -> str:
    """Quoted text of one line as numbers: items of the data directive (db 'ab' is two), else one little-endian number."""
    directive = _DATA.search(line.split("'")[0].split('"')[0])

    def numbers(found: re.Match) -> str:
        raw = found.group()[1:-1].encode()
        size = _DATA_BYTES[directive.group(1).lower()] if directive else max(len(raw), 1)
        parts = [raw[i : i + size] for i in range(0, len(raw), size)]
        return ", ".join(hex(int.from_bytes(part, "little")) for part in parts) or "0"

    return _STRING.sub(numbers, line)


def _keystone_dialect(text: str) -> str:
    """Rewrite what keystone 0.9.2 misreads in NASM text: it takes 10 for 0x10, and trips on 80h, sizes and strings."""

    def number(found: re.Match) -> str:
        digits, base = next(
            (g, b) for g, b in zip(found.groups(), (16, 16, 8, 2, 10), strict=True) if g is not None
        )
        return hex(int(digits, base))

    text = _NUMBER.sub(number, "\n".join(map(_strings_as_numbers, _asm_lines(text).split("\n"))))
    text = re.sub(r"\bshort\b", "", text, flags=re.IGNORECASE)
    return re.sub(r"\bpush\s+(?:byte|dword)\s+(?!\[)[+]?", "push ", text, flags=re.IGNORECASE)


def _keystone(text: str) -> _Assembled:
    # In a child process: the native library has crashed and hung on odd input.
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _KEYSTONE],
            input=_keystone_dialect(text),
            capture_output=True,
            text=True,
            timeout=20,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return _Assembled(None, "timeout")
    if done.returncode != 0:
        return _Assembled(None, f"the assembler stopped (status {done.returncode})")
    code, message = json.loads(done.stdout)
    if code == "" and not re.fullmatch(r"(?:\s*[\w.$]+:\s*|\s*global\s+[\w.$]+\s*)+", text):
        return _Assembled(
            None, "keystone found no instruction"
        )  # it passes over some operands without an error
    return _Assembled(None if code is None else bytes.fromhex(code), _one_line(message))


def _assemble_both(text: str, expected: str | None, tool: str) -> tuple[_Assembled, _Assembled | None]:
    if tool == "keystone":
        return _keystone(text), None if expected is None else _keystone(expected)
    one = _nasm(text, frozenset())
    two = None if expected is None else _nasm(expected, frozenset())
    labels = one.undefined | (two.undefined if two else frozenset())
    if one.undefined:
        one = _nasm(text, labels)
    if two and two.undefined:
        two = _nasm(expected or "", labels)
    return one, two


def judge_ia32(text: str, expected: str | None = None, *, tool: str | None = None) -> Judgement:
    """`ok` if `text` assembles as 32-bit x86 in NASM syntax; a match has the same bytes as the expected text.

    Labels that the text only uses are given a place, so one line of a program can be judged. Texts without
    bytes (`section .text`, `len equ 5`) match if they read the same but for spaces and case. `tool` is `nasm`
    or `keystone`; by default `assembler()` chooses. nasm is the measure: keystone's NASM mode is worked
    around, not mended.
    """
    no_match = None if expected is None else False
    if not text.strip():
        return Judgement(False, "empty", no_match)
    refused = _REFUSED.search(_asm_lines(text))
    if refused:
        return Judgement(False, f"refused: {refused.group().strip()!r} is not assembled here", no_match)
    if expected is not None and _REFUSED.search(_asm_lines(expected)):
        expected = None
    found, wanted = _assemble_both(text, expected, tool or assembler())
    if found.code is None:
        return Judgement(False, f"does not assemble: {found.detail}", no_match)
    detail = f"assembles ({len(found.code)} bytes)"
    if wanted is None:
        return Judgement(True, detail)
    if wanted.code is None:
        return Judgement(True, detail + "; the expected text does not", None)
    same = found.code == wanted.code and (bool(found.code) or _reading(text) == _reading(expected or ""))
    return Judgement(True, detail, same)


def _reading(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", _asm_lines(text).lower())


# --- which judge, which tests -------------------------------------------------------------------------------

JUDGES: dict[str, Callable[..., Judgement]] = {
    "python": judge_python,
    "python_tests": judge_python_tests,
    "bash": judge_bash,
    "ia32": judge_ia32,
}

JUDGE_OF_TASK = {
    "conala": "python",
    "shellcode_ia32": "ia32",
    "nl2bash": "bash",
    "tldr": "bash",
    "humaneval": "python_tests",
    "mbpp": "python_tests",
}
"""For cases read from a file, whose `task` is all that is known; the tasks' own files say the same."""


def load_tests_beside(cases: Path) -> dict[str, dict[str, str]] | None:
    """The tests that were written with a file of cases, F.tests.jsonl beside F.jsonl; None if there are none."""
    path = cases.with_name(f"{cases.stem}.tests.jsonl")
    return load_tests(path) if path.exists() else None


def load_tests(path: str | Path) -> dict[str, dict[str, str]]:
    """Read a file of tests, one object {id, before, after} a line: options of `judge_python_tests`.

    Raises `CaseError` for a line without these three texts or with an id seen before.
    """
    tests: dict[str, dict[str, str]] = {}
    for number, record in read_jsonl(path):
        where = f"{path}:{number}"
        if not isinstance(record, dict) or not all(
            isinstance(record.get(k), str) for k in ("id", "before", "after")
        ):
            raise CaseError(
                f"{where}: expected an object with the texts id, before and after; write it with the cases"
            )
        if record["id"] in tests:
            raise CaseError(f"{where}: id '{record['id']}' was used before; ids must be unique")
        tests[record["id"]] = {"before": record["before"], "after": record["after"]}
    return tests
