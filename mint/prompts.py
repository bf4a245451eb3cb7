"""A prompt as text: its words, the frame around them, files it may stand in, and prompts that ask for something else.

Deterministic for a seed; knows nothing about models or tokens. Texts come in two sets that share nothing: `learn` for
solvers, `measure` for what is reported (data/contexts/).
"""

import ast
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

from mint.case import Case

SETS = ("learn", "measure")
LANGUAGES = ("python", "shell", "asm", "c")
STYLES = {
    "#": ("## {}", '"""{}"""', "// {}", "#{}"),
    "//": ("/// {}", "/* {} */", "# {}", "//{}"),
    ";": (";; {}", "# {}", "// {}", ";{}"),
    "--": ("# {}", "// {}", "/* {} */", "--{}"),
    '"""': ("# {}", "'''{}'''", "// {}", "## {}"),
}
"""Other ways to write a comment, by the mark that it has."""

_MARKERS = re.compile(r"<\|[^|<>\n]{1,40}\|>|\[/?INST\]|<(?:start|end)_of_turn>|</?s>")
_FILL = re.compile(
    r"\A(?P<open>[^\w\n]*<[^<>\n]*(?:fim|pre)[^<>\n]*>)(?P<prefix>.*?)"
    r"(?P<suffix><[^<>\n]*(?:fim|suf)[^<>\n]*>.*)(?P<close><[^<>\n]*(?:fim|mid)[^<>\n]*>)\Z",
    re.DOTALL | re.IGNORECASE,
)
"""A prompt that asks to fill in the middle: marker, prefix, marker, suffix, marker (mint/model/infill.py)."""
_LINE = re.compile(
    r"(?P<indent>[ \t]*)(?P<mark>\"\"\"|'''|/\*+|#+|//+|--+|;+|)(?P<gap>[ \t]*)(?P<words>.*?)"
    r"(?P<close>[ \t]*(?:\"\"\"|'''|\*/)?[ \t]*)\Z"
)
_QUOTES = re.compile(r"(\"\"\"|''')\s*(?P<words>[^\n]*?\w[^\n]*?)\s*(?=\n|\"\"\"|''')")
_WORD = re.compile(r"[A-Za-z]+(?:'s)?")
_CHAT_HOSTS = {
    "imports": "I have a file that starts like this:\n\n```\n{}\n```\n\n",
    "function": "Here is a function of mine:\n\n```\n{}\n```\n\n",
    "pair": "These lines work:\n\n```\n{}\n```\n\nNow something else. ",
}


@dataclass(frozen=True)
class Frame:
    """A prompt taken apart: lead + words + tail is the prompt."""

    lead: str
    words: str
    """What is asked for, in words; empty where the prompt ends in code."""
    tail: str
    mark: str = ""
    """The comment mark in front of the words, without its repeats: `#`, `//`, `;`, `--`, `\"\"\"`; empty: none."""
    indent: str = ""
    """Blanks at the start of the line that holds the words."""
    chat: bool = False
    """Whether the prompt is a turn of a conversation rather than part of a file."""

    def saying(self, words: str) -> str:
        """The prompt with other words."""
        return self.lead + words + self.tail


def frame(prompt: str, *, chat: bool = False) -> Frame:
    """Take a prompt apart. chat: the prompt will be dressed in a chat template, so all of it is words."""
    if not chat and (fill := _FILL.match(prompt)):
        inner = frame(fill["prefix"])
        return replace(
            inner, lead=fill["open"] + inner.lead, tail=inner.tail + fill["suffix"] + fill["close"]
        )
    if chat or _MARKERS.search(prompt):
        return _turn(prompt)
    body = prompt.rstrip()
    start = body.rfind("\n") + 1
    found = _LINE.match(body[start:])
    assert found is not None  # every part of the pattern may be empty
    mark, words = found["mark"], found["words"]
    if not mark and body[start:].strip() in ('"""', "'''", "") or mark in ('"""', "'''") and not words:
        return _docstring(prompt)
    if not mark:
        return Frame(prompt, "", "", indent=found["indent"])
    begin = start + found.start("words")
    kept = words.rstrip()
    short = '"""' if mark == "'''" else "//" if mark.startswith("/") else mark[:2] if mark[0] == "-" else mark
    short = short if short in STYLES else mark[0]
    return Frame(prompt[:begin], kept, prompt[begin + len(kept) :], short, found["indent"])


def _turn(prompt: str) -> Frame:
    """The last stretch of words between the markers of a conversation; all of the text where there are none."""
    ends = [(m.start(), m.end()) for m in _MARKERS.finditer(prompt)]
    starts = [0, *(e for _, e in ends)]
    stops = [*(s for s, _ in ends), len(prompt)]
    for begin, end in reversed(list(zip(starts, stops, strict=True))):
        part = prompt[begin:end]
        role = re.match(r"\s*(?:user|assistant|system|model)\b\s*", part) if ends else None
        offset = role.end() if role else len(part) - len(part.lstrip())
        words = part[offset:].rstrip()
        if words:
            last = words.rfind("\n") + 1
            begin += offset + last
            return Frame(prompt[:begin], words[last:], prompt[begin + len(words[last:]) :], chat=True)
    return Frame(prompt, "", "", chat=True)


def _docstring(prompt: str) -> Frame:
    """A prompt that ends behind a docstring: the words are its first line."""
    found = list(_QUOTES.finditer(prompt))
    if not found:
        return Frame(prompt, "", "")
    last = found[-1]
    words = last["words"]
    return Frame(prompt[: last.start("words")], words, prompt[last.start("words") + len(words) :])


# ---------------------------------------------------------------------- the same request in other words


def capitals(words: str) -> str:
    """The words with their first letter in the other case."""
    return words[:1].swapcase() + words[1:]


def full_stop(words: str) -> str:
    """The words with a full stop added, or without the one they have."""
    return words[:-1] if words.endswith(".") else words + "."


def styles(found: Frame) -> list[str]:
    """The prompt with its comment written in other ways; none where the words are no comment of one line."""
    if not found.mark or not found.words:
        return []
    before = found.lead.rstrip(" \t").rstrip("\"'/*#-;")
    rest = found.tail.lstrip(" \t\"'*/")
    return [before + style.format(found.words) + rest for style in STYLES[found.mark]]


# ---------------------------------------------------------------------- files it may stand in


def language(found: Frame, target: str) -> str:
    """One of `LANGUAGES`, from the comment mark and from whether the target parses as Python. A guess, for hosts."""
    if found.mark in (";", "//"):
        return {";": "asm", "//": "c"}[found.mark]
    if "{\n" in found.lead or target.rstrip().endswith((";", "{")):
        return "c"
    if (
        found.mark == '"""'
        or found.chat
        or re.search(r"^\s*(def|class|import|from) ", found.lead, re.MULTILINE)
    ):
        return "python"
    if re.match(r"[\w./]+ +-{1,2}\w", target.lstrip()) or "$(" in target or " | " in target:
        return "shell"
    try:
        ast.parse(target.strip())
        return "python"
    except (SyntaxError, ValueError):
        whole = found.lead + found.words + found.tail + target
        return (
            "shell" if re.match(r"[a-z]\w* +[\w./\"'~*-]", target.lstrip()) and "=" not in whole else "python"
        )


@cache
def hosts(which: str, speech: str) -> dict[str, tuple[str, ...]]:
    """Texts that a prompt may stand behind, by kind: imports, function, pair, in function, in class, filler."""
    if which not in SETS or speech not in LANGUAGES:
        raise ValueError(f"no hosts '{which}' for '{speech}'; known are {SETS} and {LANGUAGES}")
    found: dict[str, list[str]] = {}
    text = _read(f"{which}_{speech}.txt")
    for part in text.split("== ")[1:]:
        kind, _, body = part.partition("\n")
        found.setdefault(kind.strip().replace(" ", "_"), []).append(body.rstrip("\n"))
    return {kind: tuple(texts) for kind, texts in found.items()}


def behind(case: Case, host: str, *, gap: str = "\n\n", indent: str = "") -> Case:
    """The case in a file: behind a host text, all its lines indented by `indent`.

    Where the prompt ends a line, the target's first line is indented too; else only its further ones. Where a prompt asks
    to fill in, the host stands behind its first marker, and a line ends where the prefix does.
    """
    fill = _FILL.match(case.prompt)
    first, body, suffix, last = fill.groups() if fill else ("", case.prompt, "", "")
    prompt = _indented(body, indent) + _indented(suffix, indent).removeprefix(indent) + last
    ends_line = body.endswith("\n")
    target = _indented(case.target, indent)
    if not ends_line:
        target = target.removeprefix(indent)
    return replace(case, prompt=first + (host + gap if host else "") + prompt, target=target)


def inner_indent(host: str) -> str:
    """The blanks with which the next line in an open block starts: those of the host's last line."""
    last = host.rstrip("\n").rsplit("\n", 1)[-1]
    return last[: len(last) - len(last.lstrip())]


def with_tabs(case: Case) -> Case:
    """The case with every four blanks at the start of a line written as a tab."""

    def tabs(text: str) -> str:
        return re.sub(r"(?m)^(?: {4})+", lambda m: "\t" * (len(m.group()) // 4), text)

    joined = tabs(case.prompt + case.target)
    cut = len(tabs(case.prompt))
    return replace(case, prompt=joined[:cut], target=joined[cut:])


def with_crlf(case: Case) -> Case:
    """The case with the line ends of Windows."""
    return replace(case, prompt=case.prompt.replace("\n", "\r\n"), target=case.target.replace("\n", "\r\n"))


def in_conversation(case: Case, kind: str, host: str) -> Case:
    """A turn of a conversation with code shown before the words."""
    found = frame(case.prompt, chat=True)
    return replace(case, prompt=found.lead + _CHAT_HOSTS[kind].format(host) + found.words + found.tail)


def _indented(text: str, indent: str) -> str:
    return re.sub(r"(?m)^(?=[^\r\n])", indent, text) if indent else text


# ---------------------------------------------------------------------- requests for something else


@cache
def _exchanges() -> dict[str, tuple[str, ...]]:
    lines = [line.split() for line in _read("exchanges.txt").splitlines() if line.strip()]
    found: dict[str, list[str]] = {}
    for word, *others in lines:
        found.setdefault(word, []).extend(o for o in others if o not in found.get(word, ()))
    return {word: tuple(others) for word, others in found.items()}


def exchanged(words: str, which: str) -> list[str]:
    """The words with one content word exchanged for another or its opposite, from the list that ships.

    Of the exchanges of a word the first, third, ... are for learning, the others for measuring. Where no word is in the
    list, none.
    """
    offset = SETS.index(which)
    found = []
    for match in _WORD.finditer(words):
        word = match.group()
        for other in _exchanges().get(word.lower(), ())[offset::2]:
            other = other.capitalize() if word[:1].isupper() else other
            found.append(words[: match.start()] + other + words[match.end() :])
    return found


def other_intents(which: str, speech: str) -> list[str]:
    """Requests for something else, in words: `learn` from the reference text, `measure` from a list of their own."""
    if which == "measure":
        parts = {
            p.partition("\n")[0].strip(): p.partition("\n")[2]
            for p in _read("measure_intents.txt").split("== ")
        }
        return parts[speech].strip().split("\n")
    folder = resources.files("mint") / "data" / "reference"
    names = {"asm": ("asm_lines.txt",), "shell": ("bash_lines.txt",)}.get(speech, ("python_lines.txt",))
    lines = [line for name in names for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return [line.lstrip("#; ").rstrip() for line in lines if line[:2] in ("# ", "; ")]


def near_misses(
    case: Case, which: str, *, exchanges: int, intents: int, chat: bool = False, seed: int = 0
) -> list[str]:
    """Prompts of the same frame that differ in one content word, then some that ask for something else.

    At most so many of either kind, drawn with the seed; none of them is the prompt or one of the rephrasings.
    """
    found = frame(case.prompt, chat=chat)
    if not found.words:
        return _other_code(case, which, exchanges)
    own = {case.prompt, *case.rephrasings}
    draw = random.Random(f"near:{which}:{seed}:{case.prompt}")
    swapped = list(
        dict.fromkeys(p for w in exchanged(found.words, which) if (p := found.saying(w)) not in own)
    )
    near = draw.sample(swapped, min(exchanges, len(swapped)))
    others = [
        w for w in other_intents(which, language(found, case.target)) if w.lower() != found.words.lower()
    ]
    return near + [found.saying(w) for w in draw.sample(others, min(intents, len(others)))]


def _other_code(case: Case, which: str, count: int) -> list[str]:
    """For a prompt that ends in code: exchanges within its last line."""
    start = case.prompt.rstrip("\n").rfind("\n") + 1
    swapped = [case.prompt[:start] + line for line in exchanged(case.prompt[start:], which)]
    return random.Random(f"near:{which}:{case.prompt}").sample(swapped, min(count, len(swapped)))


def drawn(texts: Sequence[str], seed: object) -> str:
    """One of the texts."""
    return random.Random(str(seed)).choice(list(texts))


def _read(name: str) -> str:
    return (resources.files("mint") / "data" / "contexts" / name).read_text(encoding="utf-8")
