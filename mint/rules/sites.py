"""Call sites of two texts in source files, with the lines before them, and places nearby that look like one.

Python is searched token by token, so that nothing inside a string or a comment counts and layout does not matter;
every other language is searched as text, by whole words. In Python a pattern may hold `$NAME`: any one argument or
expression, written again in the other text. Knows nothing about models.
"""

import io
import os
import re
import tokenize
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from mint.errors import CaseError
from mint.rules.rule import check_texts

MOST_BYTES = 1 << 20
"""A larger file is generated, or data: passed over."""
MOST_CONTEXT = 4000
"""Characters before a site; more in a dozen lines means minified code or data."""
MOST_IN_A_FILE = 6
"""Sites of each kind that are taken from one file, spread over it: one file must not make the rule."""
_FOLLOWS = 80
_PYTHON = (".py", ".pyi", ".pyw")
_NOT_SOURCE = {
    *(".md", ".rst", ".txt", ".json", ".jsonl", ".csv", ".tsv", ".lock", ".html", ".xml", ".svg", ".log"),
    *(".po", ".pot", ".map", ".ipynb", ".diff", ".patch", ".toml", ".ini", ".cfg"),
}
_NEVER = {"__pycache__", ".git", ".hg", ".svn", "node_modules"}
_VARIABLE = re.compile(r"\$([A-Z][A-Z0-9_]*)")
_PLACEHOLDER = "mint_any_{}_"
_OPEN, _CLOSE = {"(", "[", "{"}, {")", "]", "}"}


@dataclass(frozen=True)
class Site:
    """One place in a file where `wrong` could stand."""

    kind: str
    """`wrong` or `right`: the file has that text here; `other`: the same opening goes on otherwise."""
    source: str
    line: int
    """Line in the file, from 1."""
    before: str
    """The text before the place, from the beginning of a line."""
    wrong: str
    right: str
    """What stands for right here; at an `other` place, what the file itself has."""


@dataclass(frozen=True)
class Token:
    """A word of source text; `kind` is `name`, `number`, `string`, `newline`, `blank`, `any` (a `$NAME`) or `sign`."""

    kind: str
    text: str
    start: int
    end: int


class Skipped(Exception):
    """A file that is passed over; its text is the reason, for counting."""


# ---------------------------------------------------------------------- files


def files_in(folders: Sequence[Path], exclude: Sequence[str] = ()) -> Iterator[tuple[str, Path]]:
    """(name for the rule file, path) of every file below the folders, sorted.

    exclude: globs against the path below the folder, its name, and each folder on the way. Raises `CaseError` for a
    folder that is not there.
    """
    for folder in folders:
        if folder.is_file():
            yield folder.name, folder
            continue
        if not folder.is_dir():
            raise CaseError(f"{folder}: no such folder; give a folder of source files as --from")
        for here, below, names in os.walk(folder):
            relative = Path(here).relative_to(folder)
            below[:] = sorted(d for d in below if d not in _NEVER and not _excluded(relative / d, exclude))
            for name in sorted(names):
                if not _excluded(relative / name, exclude) and Path(here, name).is_file():
                    yield f"{folder.resolve().name}/{(relative / name).as_posix()}", Path(here, name)


def _excluded(relative: Path, globs: Sequence[str]) -> bool:
    return any(fnmatch(relative.as_posix(), glob) or fnmatch(relative.name, glob) for glob in globs)


def read_source(path: Path) -> str:
    """The text of a source file, its line ends as newlines. Raises `Skipped`."""
    if path.suffix.lower() in _NOT_SOURCE:
        raise Skipped("no source code")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise Skipped("enormous")
        raw = path.read_bytes()
    except OSError:
        raise Skipped("unreadable") from None
    if b"\0" in raw[:8192]:
        raise Skipped("binary")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Skipped("undecodable") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_python(source: str) -> bool:
    return source.lower().endswith(_PYTHON)


# ---------------------------------------------------------------------- words


def words(text: str, python: bool) -> list[Token]:
    """Source text word by word; of Python without comments and layout. Raises `Skipped` where it is no Python."""
    return _python_words(text) if python else _plain_words(text)


_WORD = re.compile(r"(?P<name>[^\W\d]\w*)|(?P<number>\d\w*)|(?P<newline>\n)|(?P<blank>[^\S\n]+)|(?P<sign>.)")


def _plain_words(text: str) -> list[Token]:
    return [Token(m.lastgroup or "sign", m.group(), *m.span()) for m in _WORD.finditer(text)]


_KINDS = {
    tokenize.NAME: "name",
    tokenize.NUMBER: "number",
    tokenize.STRING: "string",
    tokenize.NEWLINE: "newline",
}
_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


def _python_words(text: str, fragment: bool = False) -> list[Token]:
    starts = [0]
    for line in io.StringIO(text):
        starts.append(starts[-1] + len(line))
    found = []
    try:
        for word in tokenize.generate_tokens(io.StringIO(text).readline):
            if word.type not in _LAYOUT and not (fragment and word.type == tokenize.NEWLINE):
                start = starts[word.start[0] - 1] + word.start[1]
                found.append(
                    Token(_KINDS.get(word.type, "sign"), word.string, start, start + len(word.string))
                )
    except (tokenize.TokenError, SyntaxError, IndentationError):
        if not fragment:  # a pattern may well end inside a bracket
            raise Skipped("not Python that parses") from None
    return [t for t in found if t.text]


# ---------------------------------------------------------------------- the pattern


@dataclass(frozen=True)
class Pattern:
    """Two texts, word by word, and what they have in common."""

    wrong: tuple[Token, ...]
    right: tuple[Token, ...]
    right_text: str
    wrong_text: str
    opening: tuple[Token, ...]
    """Words that lead up to where the texts part and that hold a name, e.g. `time.`; empty where there are none."""
    shared: int
    """How many words the texts share at their start."""
    glance: re.Pattern
    """Matches text that may hold the opening or one of the texts; what it does not match need not be split into words."""


def pattern_of(wrong: str, right: str, python: bool) -> Pattern:
    """Raises `CaseError` where the texts make no rule: equal, one begins the other, a `$NAME` with nothing to hold it."""
    if not wrong.strip() or not right.strip():
        raise CaseError(
            "the wrong and the right text must not be empty; give the text of a call, e.g. 'time.time()'"
        )
    if python:
        first = _VARIABLE.match(wrong)
        if first and right.startswith(first.group()):
            wrong, right = wrong[first.end() :].lstrip(), right[first.end() :].lstrip()
        for name, text in (("wrong", wrong), ("right", right)):
            at_end = list(_VARIABLE.finditer(text))
            if at_end and (at_end[0].start() == 0 or at_end[-1].end() == len(text)):
                raise CaseError(
                    f"the {name} text has {at_end[0].group()} at its edge; add the text around it, e.g. the closing bracket"
                )
        unknown = sorted(set(_VARIABLE.findall(right)) - set(_VARIABLE.findall(wrong)))
        if unknown:
            raise CaseError(
                f"the right text has ${unknown[0]}, the wrong text does not; use the same names in both"
            )
    check_texts(wrong, right)
    a, b = _pattern_words(wrong, python), _pattern_words(right, python)
    shared = 0
    while shared < min(len(a), len(b)) and _same(a[shared], b[shared]):
        shared += 1
    opening = a[:shared]
    if not any(t.kind == "name" for t in opening):
        last = max((i for i, t in enumerate(a) if t.kind == "name"), default=0)
        opening = a[:last] if any(t.kind == "name" for t in a[:last]) else ()
    opening = tuple(_until_any(opening))

    starts = [t for t in (opening, tuple(_until_any(a)), tuple(_until_any(b))) if t]
    glance = re.compile(
        "|".join(r"\s*".join(re.escape(t.text) for t in one if t.text.strip()) for one in starts)
    )
    return Pattern(a, b, right, wrong, opening, shared, glance)


def _until_any(tokens: Sequence[Token]) -> Iterator[Token]:
    for token in tokens:
        if token.kind == "any":
            return
        yield token


def _pattern_words(text: str, python: bool) -> tuple[Token, ...]:
    if not python:
        return tuple(_plain_words(text))
    names = {_PLACEHOLDER.format(n.lower()): n for n in _VARIABLE.findall(text)}
    plain = _VARIABLE.sub(lambda m: _PLACEHOLDER.format(m.group(1).lower()), text)
    return tuple(
        Token("any", names[t.text], 0, 0) if t.text in names else t
        for t in _python_words(plain, fragment=True)
    )


def _same(a: Token, b: Token) -> bool:
    return (a.kind == "any") == (b.kind == "any") and a.text == b.text


@dataclass(frozen=True)
class _Match:
    count: int
    """Pattern words that fit."""
    end: int
    """Index of the first word of the file behind them."""
    held: dict[str, str]


def _match(pattern: Sequence[Token], file: Sequence[Token], at: int, text: str) -> _Match:
    """How far the pattern fits the file's words from `at` on."""
    held: dict[str, str] = {}
    position = at
    for n, want in enumerate(pattern):
        if position >= len(file):
            return _Match(n, position, held)
        if want.kind != "any":
            if file[position].text != want.text:
                return _Match(n, position, held)
            position += 1
            continue
        end = _argument(file, position, pattern[n + 1].text)
        if end is None:
            return _Match(n, position, held)
        content = text[file[position].start : file[end - 1].end]
        if held.setdefault(want.text, content) != content:
            return _Match(n, position, held)
        position = end
    return _Match(len(pattern), position, held)


def _argument(file: Sequence[Token], start: int, stop: str) -> int | None:
    """Index behind the one argument that begins at `start` and ends before the word `stop` or a comma."""
    depth = 0
    for i in range(start, min(len(file), start + 200)):
        word = file[i]
        if depth == 0 and i > start and (word.text == stop or word.text == ","):
            return i
        if word.text in _OPEN:
            depth += 1
        elif word.text in _CLOSE:
            depth -= 1
        if depth < 0 or (depth == 0 and (word.kind == "newline" or word.text == ",")):
            return None
    return None


def _filled(text: str, held: dict[str, str], python: bool) -> str:
    return _VARIABLE.sub(lambda m: held.get(m.group(1), "x"), text) if python else text


# ---------------------------------------------------------------------- the search


def find_sites(text: str, source: str, wrong: str, right: str, lines: int = 12) -> tuple[list[Site], int]:
    """(sites of a file's text, how many more of the two texts it has than are taken).

    lines: whole lines before the site's own that come along (default 12). Raises `Skipped` where the file cannot be
    split into words, `CaseError` for texts that make no rule.
    """
    python = is_python(source)
    pattern = pattern_of(wrong, right, python)
    if not pattern.glance.search(text):
        return [], 0
    file = words(text, python)
    found: dict[str, list[tuple[int, str, str]]] = {"wrong": [], "right": [], "other": []}
    taken: list[tuple[int, int]] = []
    hits = list(_hits(pattern, file, text, python))
    for kind, i, match in _not_inside(hits):
        here = text[file[i].start : file[match.end - 1].end]
        other = _filled(pattern.right_text if kind == "wrong" else pattern.wrong_text, match.held, python)
        found[kind].append((i, here, other) if kind == "wrong" else (i, other, here))
        taken.append((i, match.end))
    befores = {file[i - 1].text if i else "\n" for i, _ in taken}
    for i, match in _others(pattern, file, text, python, taken, befores):
        start = file[i].start
        follows = text[start : start + _FOLLOWS].split("\n")[0]
        found["other"].append((i, _filled(pattern.wrong_text, match.held, python), follows))
    begins = _line_starts(text)
    sites = []
    for kind, places in found.items():
        for i, w, r in _spread(places, MOST_IN_A_FILE):
            offset = file[i].start
            line = bisect_right(begins, offset) - 1
            before = text[begins[max(0, line - lines)] : offset]
            sites.append(Site(kind, source, line + 1, before, w, r))
    beyond = sum(max(0, len(found[kind]) - MOST_IN_A_FILE) for kind in ("wrong", "right"))
    return sites, beyond


def _line_starts(text: str) -> list[int]:
    return [0, *(m.end() for m in re.finditer("\n", text))]


def _spread(items: Sequence, most: int) -> Sequence:
    """At most so many items, evenly over the whole."""
    if len(items) <= most:
        return items
    return [items[i * len(items) // most] for i in range(most)]


def _stands_alone(pattern: Sequence[Token], file: Sequence[Token], i: int, python: bool) -> bool:
    """Whether a match that begins with a name at `i` is that name, not an attribute of another or a definition."""
    if pattern[0].kind != "name" or i == 0:
        return True
    previous = file[i - 1].text
    return previous != "." and not (python and previous in ("def", "class"))


def _hits(
    pattern: Pattern, file: Sequence[Token], text: str, python: bool
) -> Iterator[tuple[str, int, _Match]]:
    """(kind, index, match) of both texts; of the right one only where what `$NAME` holds is known for both."""
    both = set(_VARIABLE.findall(pattern.wrong_text)) == set(_VARIABLE.findall(pattern.right_text))
    for kind, want in (("wrong", pattern.wrong), ("right", pattern.right)):
        if kind == "right" and python and not both:
            continue
        for i, word in enumerate(file):
            if word.text == want[0].text and _stands_alone(want, file, i, python):
                match = _match(want, file, i, text)
                if match.count == len(want):
                    yield kind, i, match


def _not_inside(hits: Sequence[tuple[str, int, _Match]]) -> list[tuple[str, int, _Match]]:
    """Without hits that lie inside a longer hit of the other text (`go(` inside `await go(`)."""

    def inside(one, other) -> bool:
        (kind, i, m), (other_kind, j, n) = one, other
        return kind != other_kind and j <= i and m.end <= n.end and (i, m.end) != (j, n.end)

    return [a for a in hits if not any(inside(a, b) for b in hits if abs(a[1] - b[1]) < 400)]


def _others(
    pattern: Pattern,
    file: Sequence[Token],
    text: str,
    python: bool,
    taken: Sequence[tuple[int, int]],
    befores: set[str],
) -> Iterator[tuple[int, _Match]]:
    """Places that begin like the texts and go on otherwise.

    With an opening that holds a name (`time.`), every place of it; else, in files that have the texts, places behind
    the same word as they (`logger` before `.warn(`, the beginning of a statement before `print(`).
    """
    covered = {i for start, end in taken for i in range(start, end)}
    for i, word in enumerate(file):
        if i in covered or word.kind in ("newline", "blank"):
            continue
        if pattern.opening:
            if word.text != pattern.opening[0].text or not _stands_alone(pattern.opening, file, i, python):
                continue
            match = _match(pattern.wrong, file, i, text)
            if match.count >= len(pattern.opening):
                yield i, match
        elif (file[i - 1].text if i else "\n") in befores and word.kind == pattern.wrong[0].kind:
            match = _match(pattern.wrong, file, i, text)
            if match.count >= pattern.shared:
                yield i, match
