"""Mine a rule: find call sites of two texts, cut them, ask the model, sort them into faults, near misses and healthy.

A long search can be interrupted: what was read and asked stands in a journal, and the same search goes on from there.
"""

import hashlib
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mint.errors import CaseError
from mint.evaluation.ledger import Ledger
from mint.model.lm import LM
from mint.rules.cut import NO_PROMPT, Cut, Uncuttable, cut
from mint.rules.judge import NEAR_TOKENS, Ask, text_of, verdict, write
from mint.rules.rule import Row, Rule, with_split
from mint.rules.sites import (
    MOST_CONTEXT,
    Site,
    Skipped,
    files_in,
    find_sites,
    is_python,
    pattern_of,
    read_source,
)

FEW = 4
"""Fewer faults than this make no rule: nothing is left to prove it on."""
_FILES_A_ROW = 100
_ASK_AT_ONCE = 32
NEAR_MISSES = 2
"""Near misses collected for each fault asked for: they decide what an edit leaves alone."""
_ASK_MOST = 8
"""Sites asked for each row that is wanted, before the search gives up."""
_ANSWER_ROOM = 24
_IDENTITY = 12

Progress = Callable[[str, int, int], None]
"""(what, done, of): told as the search goes on."""


@dataclass(frozen=True)
class Search:
    """What to look for, and where."""

    wrong: str
    """Text that the model should stop writing, e.g. `time.time()`; in Python, `$NAME` stands for any one argument."""
    right: str
    """Text that it should write instead."""
    folders: tuple[str, ...]
    """Folders (or files) of source code."""
    name: str | None = None
    """Name of the rule; None: made from the wrong text."""
    limit: int = 60
    """Most faults and most healthy rows; near misses twice as many."""
    lines: int = 12
    """Lines before the site's own line that make the prompt."""
    seed: int = 0
    exclude: tuple[str, ...] = ()
    """Globs of files and folders to leave out."""

    @property
    def rule_name(self) -> str:
        return self.name or re.sub(r"\W+", "-", self.wrong).strip("-").lower() or "rule"


@dataclass(frozen=True)
class Mined:
    """A rule, and how it came about."""

    rule: Rule
    sites: int
    """Call sites of the two texts that were found."""
    files: int
    asked: int
    """Sites at which the model was asked."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Sites and files that were passed over, by reason."""
    seconds: float = 0.0

    def as_dict(self) -> dict:
        """JSON values: the contract's keys."""
        rule = self.rule
        few = len(rule.part("fault"))
        return {
            "rule": rule.name,
            "sites": self.sites,
            "files": self.files,
            "asked": self.asked,
            "fault": few,
            "near": len(rule.near),
            "healthy": len(rule.healthy),
            "learn": len(rule.learn),
            "unseen": len(rule.unseen),
            "skipped": self.skipped,
            "seconds": round(self.seconds, 3),
            "note": too_few(few) if few < FEW else None,
        }


def check_search(search: Search) -> None:
    """Raise `CaseError` for texts that make no rule, or a folder that is not there; before a model is loaded."""
    pattern_of(search.wrong, search.right, python=True)
    for folder in search.folders:
        if not Path(folder).exists():
            raise CaseError(f"{folder}: no such folder; give a folder of source files as --from")


def too_few(faults: int) -> str:
    """What to say of a rule with fewer than `FEW` faults."""
    return (
        f"the model writes the wrong text at only {faults} of the prompts; a rule needs {FEW} faults to learn from and be"
        " proved on: mine more source with --from, or repair one prompt with mint repair --prompt P --target T"
    )


def mine(
    lm: LM,
    search: Search,
    *,
    journal: str | Path | None = None,
    progress: Progress = lambda _what, _done, _of: None,
) -> Mined:
    """Look for the texts in source files and ask the model at every place found, until there are enough rows.

    journal: a file beside the result; with the same search and model, what it holds is not done again. With a chat
    template, prompts are the dressed conversation, the code begun in the model's own answer. Raises `CaseError` where
    nothing is found, or the model nowhere writes the wrong text.
    """
    started = time.perf_counter()
    check_search(search)
    ledger = _opened(journal, lm, search)
    skipped: Counter[str] = Counter()
    sites, files = _scanned(search, ledger, skipped, progress)
    n_sites = sum(s.kind != "other" for s in sites)
    if not n_sites:
        raise CaseError(
            f"no call site of {search.wrong!r} or {search.right!r} in {files} files; give other folders with --from, or"
            " shorter texts (a call's name and its opening bracket)"
        )
    asking = _Asking(lm, search, ledger, skipped, progress)
    rows = asking.rows(sites)
    if not any(r.role == "fault" for r in rows):
        raise CaseError(_nothing_wrong(search, n_sites, asking.own))
    rule = with_split(Rule(search.rule_name, tuple(rows)), search.seed)
    reasons = dict(sorted(skipped.items()))
    return Mined(rule, n_sites, files, asking.asked, reasons, time.perf_counter() - started)


def _nothing_wrong(search: Search, sites: int, found: Counter) -> str:
    if found["healthy"] and found["healthy"] >= found["near"]:
        return (
            f"the model already writes {search.right!r}: at {found['healthy']} places the right text, at none"
            f" {search.wrong!r}; there is nothing to repair"
        )
    return (
        f"the model writes {search.wrong!r} at none of {sites} call sites (the right text at {found['healthy']}, something"
        f" else at {found['near']}); there is no habit to repair: give other texts or other source with --from"
    )


# ---------------------------------------------------------------------- the journal


def _opened(journal: str | Path | None, lm: LM, search: Search) -> Ledger | None:
    if journal is None:
        return None
    ledger = Ledger(journal)
    template = None if lm.template is None else asdict(lm.template)
    same = {"search": asdict(search) | {"folders": [str(Path(f).resolve()) for f in search.folders]}}
    same |= {"model": lm.fingerprint, "tokenizer": lm.tokenizer_hash, "template": template}
    token = hashlib.sha256(repr(sorted(same.items())).encode()).hexdigest()
    if "search" not in ledger:
        ledger.append({"key": "search", "token": token})
    elif ledger.rows["search"]["token"] != token:
        raise CaseError(
            f"{journal} is the journal of another search; delete it, or give another --out, to begin anew"
        )
    return ledger


def _remembered(ledger: Ledger | None, key: str, work: Callable[[], dict]) -> dict:
    """What the journal holds under a key; else the work is done, and written down."""
    if ledger is not None and key in ledger:
        return ledger.rows[key]
    row = {"key": key} | work()
    if ledger is not None:
        ledger.append(row)
    return row


# ---------------------------------------------------------------------- reading


def _scanned(
    search: Search, ledger: Ledger | None, skipped: Counter, progress: Progress
) -> tuple[list[Site], int]:
    """All sites, and how many files were looked at."""
    paths = list(files_in([Path(f) for f in search.folders], search.exclude))
    sites: list[Site] = []
    for start in range(0, len(paths), _FILES_A_ROW):
        part = paths[start : start + _FILES_A_ROW]
        names = hashlib.sha256(
            "\0".join(str(p) for _, p in part).encode("utf-8", "surrogateescape")
        ).hexdigest()
        row = _remembered(ledger, f"files {names}", lambda part=part: _read(part, search))
        sites += [Site(**s) for s in row["sites"]]
        skipped.update(row["skipped"])
        progress("reading files", min(start + _FILES_A_ROW, len(paths)), len(paths))
    return sites, len(paths)


def _read(part: Sequence[tuple[str, Path]], search: Search) -> dict:
    sites, skipped = [], Counter()
    for name, path in part:
        try:
            found, beyond = find_sites(read_source(path), name, search.wrong, search.right, search.lines)
        except Skipped as reason:
            skipped[f"file: {reason}"] += 1
            continue
        sites += [asdict(site) for site in found]
        if beyond:
            skipped["more of one file"] += beyond
    return {"sites": sites, "skipped": dict(skipped)}


def _mixed(sites: Sequence[Site], seed: int) -> list[Site]:
    """The first site of every file before any second, in an order drawn by the seed."""
    draw = random.Random(seed)
    by_source: dict[str, list[Site]] = {}
    for site in sites:
        by_source.setdefault(site.source, []).append(site)
    sources = sorted(by_source)
    draw.shuffle(sources)
    for source in sources:
        draw.shuffle(by_source[source])
    most = max(map(len, by_source.values()), default=0)
    return [by_source[s][n] for n in range(most) for s in sources if n < len(by_source[s])]


# ---------------------------------------------------------------------- asking


@dataclass
class _Asking:
    """Asks the model site by site until there are enough rows of every role."""

    lm: LM
    search: Search
    ledger: Ledger | None
    skipped: Counter
    progress: Progress
    asked: int = 0
    own: Counter = field(default_factory=Counter)
    """Rows by role at the call sites of the texts themselves."""
    _seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._plain = replace(self.lm, template=None)

    def rows(self, sites: Sequence[Site]) -> list[Row]:
        """Rows: faults and healthy from the sites of the texts, near misses from there and from other places."""
        limit, seed = self.search.limit, self.search.seed
        own = _mixed([s for s in sites if s.kind != "other"], seed)
        found: dict[str, list[Row]] = {"fault": [], "healthy": [], "near": []}
        for row in self._sorted(own, "sites", lambda: len(found["fault"]) < limit):
            found[row.role].append(row)
            self.own[row.role] += 1
        same_place, found["near"] = found["near"], []
        # Places with another text come first: they are the neighbours that an edit endangers. A third stays for places
        # of the texts themselves where the model writes neither.
        near = NEAR_MISSES * limit
        most = near - min(len(same_place), near // 3)
        others = _mixed([s for s in sites if s.kind == "other"], seed)
        for row in self._sorted(others, "near places", lambda: len(found["near"]) < most):
            if row.role == "fault":
                self.skipped["the wrong text where the file has neither"] += 1
            else:
                found[row.role].append(row)
        found["near"] = [*found["near"][:most], *same_place]
        return [*found["fault"][:limit], *found["healthy"][:limit], *found["near"][:near]]

    def _sorted(self, sites: Sequence[Site], what: str, more: Callable[[], bool]) -> Iterator[Row]:
        budget = _ASK_MOST * self.search.limit
        waiting: list[tuple[Site, Cut]] = []
        for done, site in enumerate(sites, start=1):
            if not more() or done > budget:
                waiting = []
                break
            one = self._cut(site)
            if one is not None:
                waiting.append((site, one))
            if len(waiting) == min(_ASK_AT_ONCE, self.search.limit):
                yield from self._ask(waiting)
                waiting = []
                self.progress(f"asking the model at {what}", done, len(sites))
        yield from self._ask(waiting)
        self.progress(f"asking the model at {what}", len(sites), len(sites))

    def _cut(self, site: Site) -> Cut | None:
        if len(site.before) > MOST_CONTEXT:
            self.skipped["long lines"] += 1
            return None
        before = site.before if self.lm.template is None else dressed(self.lm, site)
        try:
            one = cut(self._plain, before, site.wrong, site.right)
        except Uncuttable as reason:
            self.skipped[f"cut: {reason.why}"] += 1
            return None
        if len(one.prompt) < len(before) - len(site.before):
            self.skipped[f"cut: {NO_PROMPT}"] += 1  # it would lie inside the conversation, before the code
            return None
        if len(one.encoded.ids) + _ANSWER_ROOM > self.lm.context:
            self.skipped["cut: longer than the context"] += 1
            return None
        if one.prompt in self._seen:
            self.skipped["duplicate"] += 1
            return None
        self._seen.add(one.prompt)
        return one

    def _ask(self, waiting: Sequence[tuple[Site, Cut]]) -> list[Row]:
        if not waiting:
            return []
        ids = [
            hashlib.sha256(c.prompt.encode("utf-8", "surrogatepass")).hexdigest()[:_IDENTITY]
            for _, c in waiting
        ]
        key = "ask " + hashlib.sha256(" ".join(ids).encode()).hexdigest()
        row = _remembered(self.ledger, key, lambda: {"texts": self._texts([c for _, c in waiting])})
        self.asked += len(waiting)
        return [
            self._row(site, one, text, identity)
            for (site, one), text, identity in zip(waiting, row["texts"], ids, strict=True)
        ]

    def _texts(self, cuts: Sequence[Cut]) -> list[str]:
        longest = max(max(len(c.encoded.target) if c.target else 0, len(c.wrong_ids)) for c in cuts)
        tokens = min(
            max(NEAR_TOKENS, min(longest, _ANSWER_ROOM)),
            self.lm.context - max(len(c.encoded.prompt) for c in cuts),
        )
        asks = [Ask(c.encoded.prompt, tokens) for c in cuts]
        return [
            text_of(self._plain, a.prompt, ids) for a, ids in zip(asks, write(self._plain, asks), strict=True)
        ]

    def _row(self, site: Site, one: Cut, text: str, identity: str) -> Row:
        name = self.search.rule_name
        said = verdict(text, one.target, one.wrong)
        if site.kind == "other":
            # What the file has is no wish; the model's own text is what must stay.
            said = "wrong" if one.wrong and text.startswith(one.wrong) else "avoided"
        if said == "wrong":
            return Row(name, "fault", one.prompt, one.target, one.wrong, site.source, None, identity)
        if said == "adopted":
            return Row(name, "healthy", one.prompt, one.target, one.wrong, site.source, None, identity)
        return Row(name, "near", one.prompt, text or None, one.wrong, site.source, None, identity)


def dressed(lm: LM, site: Site) -> str:
    """The conversation in which the model has written the lines before a site into its answer, as text.

    The user asks for the file, the answer opens a block of code. Prompts of this kind are complete: they are encoded as
    they are, without a template around them.
    """
    said = lm.dressed(f"Write the file {site.source}.")
    return f"{said}```{'python' if is_python(site.source) else ''}\n{site.before}"
