"""Repair rules on one model: pick what to learn from, solve, and prove by generation on prompts nobody learnt from.

Transactional like a single repair: the model that was handed in keeps every bit, and a patch comes out only if every
prompt that was learnt from holds and enough of the unseen ones do. Knows nothing about files or the command line.
"""

import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mint.case import Keep
from mint.errors import CaseError, MintError
from mint.measure import specificity
from mint.measure.efficacy import Kept, encode_keep, still_kept
from mint.measure.specificity import Specificity
from mint.model.lm import LM, Encoded
from mint.patch import Patch, compose, versions
from mint.patch.export import describe
from mint.reference import statistics
from mint.rules.cut import encode_row, settle
from mint.rules.figures import Line, Prompted, count_faults, count_kept, prepared, write_all
from mint.rules.judge import judge_named
from mint.rules.mine import FEW, too_few
from mint.rules.rule import Row, Rule
from mint.session import Wishes, measured_sequences
from mint.solver.problem import Settings, Solution, changed

Say = Callable[[str], None]
SolveRule = Callable[..., Solution]
"""`mint.rules.solve.solve_rule`, or what takes its place."""


@dataclass(frozen=True)
class RuleWishes:
    """What the user asks of the repair of a rule."""

    learn: int = 8
    """How many faults to learn from."""
    accept: float = 0.7
    """Least share of unseen faults that must come out right."""
    max_neurons: int = 2
    """Most neurons that may change; 1 or 2."""
    margin: float | None = None
    """Logits by which every target token must lead at the learn prompts; None: the solver's own."""
    reference: tuple[str, ...] = ()
    """The user's own text files that must stay as they are, beside the text that ships."""
    seed: int = 0
    keep: tuple[Keep, ...] = ()
    """Outputs that must survive, besides the rules' own near and healthy rows."""
    judges: tuple[str, ...] = ()
    """Judges by name, e.g. `ruff:S324`; counted, not demanded."""
    applied: tuple[Patch, ...] = ()
    """Patches that the model holds already: their repairs are protected, their neurons not used again."""


@dataclass(frozen=True)
class RuleRepair:
    """What became of one rule. Accepted if `reason` is None; `patch` is None where none was needed or found."""

    rule: Rule
    lines: tuple[Line, ...] = ()
    """Every row that was tested, with what the model writes before and after; rows that were learnt from first."""
    learnt: frozenset[str] = frozenset()
    """Ids of the rows that were learnt from."""
    patch: Patch | None = None
    reason: str | None = None
    note: str | None = None
    solution: Solution | None = None
    unusable: Mapping[str, int] = field(default_factory=dict)
    """Rows that this model's tokenizer cannot use, by reason."""
    timing: Mapping[str, float] = field(default_factory=dict)
    """Seconds by step: write (before), solve, prove (after)."""
    judges: tuple[str, ...] = ()
    retained: dict | None = None
    """Several rules: figures of the unseen faults once all rules are in."""

    @property
    def success(self) -> bool:
        return self.reason is None

    @property
    def seconds(self) -> float:
        return sum(self.timing.values())

    def part(self, role: str, split: str | None = None) -> list[Line]:
        """Lines of a role; of the faults, `learn` are those that were learnt from."""
        if role == "fault" and split == "learn":
            return [x for x in self.lines if x.row.id in self.learnt]
        return [x for x in self.lines if x.row.role == role and split in (None, x.row.split)]

    @property
    def figures(self) -> dict:
        """The contract's figures: learn, unseen, near, healthy."""
        judges = {name: judge_named(name) for name in self.judges}
        return {
            "learn": count_faults(self.part("fault", "learn"), {}),
            "unseen": count_faults(self.part("fault", "unseen"), judges),
            "near": count_kept(self.part("near")),
            "healthy": count_kept(self.part("healthy")),
        }


@dataclass(frozen=True)
class RulesOutcome:
    """Repairs of one or more rules on one model, in order."""

    repairs: tuple[RuleRepair, ...]
    patch: Patch | None
    """All accepted rules as one patch; None if none was needed or found."""
    specificity: Specificity | None
    """Side effects of that patch on the reference set that ships; None without a patch."""

    @property
    def success(self) -> bool:
        return all(r.success for r in self.repairs)

    @property
    def reason(self) -> str | None:
        """The first refusal."""
        failed = next((r for r in self.repairs if not r.success), None)
        return None if failed is None else f"rule '{failed.rule.name}': {failed.reason}"


class _Refused(Exception):
    """Ends one rule; its text is the reason."""


# ---------------------------------------------------------------------- the loop


def repair_rules(
    lm: LM,
    rules: Sequence[Rule],
    wishes: RuleWishes = RuleWishes(),
    *,
    solve: SolveRule | None = None,
    say: Say = lambda _: None,
) -> RulesOutcome:
    """Repair rules one after another on one model; every rule protects the ones before it.

    The model is bit-identical afterwards. solve: default `mint.rules.solve.solve_rule`. Raises `CaseError` for rules
    that cannot be used, before anything is solved: too few faults, rules that contradict each other, a rule made for
    another tokenizer.
    """
    if solve is None:
        from mint.rules.solve import solve_rule

        solve = solve_rule
    judges = {name: judge_named(name) for name in wishes.judges}
    check_rules(lm, rules)
    rows = [prepared(lm, rule) for rule in rules]
    for rule, (found, _) in zip(rules, rows, strict=True):
        faults = sum(p.row.role == "fault" for p in found)
        if faults < FEW:
            raise CaseError(f"rule '{rule.name}': {too_few(faults)}")
    kept = encode_keep(lm, wishes.keep, "none")
    say("measuring reference text")
    statistics(lm, wishes.reference, say)  # of the model as it is handed in; cached for the solver
    session = Wishes(settings=Settings(reference=wishes.reference))
    protected = [*recorded(lm, wishes.applied)]
    taken = {(e.layer, e.index) for p in wishes.applied for e in p.edits}
    clean = None
    repairs: list[RuleRepair] = []
    with ExitStack() as edits:
        for number, (rule, (found, unusable)) in enumerate(zip(rules, rows, strict=True), start=1):
            here = f"rule {rule.name}" + (f" ({number} of {len(rules)})" if len(rules) > 1 else "")
            say(f"{here}: what the model writes now")
            started = time.perf_counter()
            before, ids = write_all(lm, found)
            task = _Task(lm, rule, found, before, ids, unusable, wishes, kept, here, say)
            timing = {"write": time.perf_counter() - started}
            if clean is None:
                say("measuring the model before the repair")
                clean = specificity.baseline(
                    lm, measured_sequences(lm, session), states=specificity.late_layers(lm)
                )
            done = task.run(solve, protected, frozenset(taken), timing)
            repairs.append(replace(done, judges=tuple(judges)))
            if done.patch is not None:
                edits.enter_context(changed(lm, done.patch))
                taken |= {(e.layer, e.index) for e in done.patch.edits}
            if done.success:
                protected += task.protects
        patches = [r.patch for r in repairs if r.patch is not None]
        effects = None
        if patches and clean is not None:
            say("measuring what else changed")
            effects = specificity.compare(lm, clean, since=min(e.layer for p in patches for e in p.edits))
        if len(patches) > 1:
            repairs = [_retested(lm, one, found, say) for one, (found, _) in zip(repairs, rows, strict=True)]
    patch = None
    if patches:
        whole = compose(patches) if len(patches) > 1 else patches[0]
        patch = _signed(lm, whole, repairs, wishes, effects)
    return RulesOutcome(tuple(repairs), patch, effects)


def repair_rule(
    lm: LM,
    rule: Rule,
    wishes: RuleWishes = RuleWishes(),
    *,
    solve: SolveRule | None = None,
    say: Say = lambda _: None,
) -> RulesOutcome:
    """`repair_rules` for one rule."""
    return repair_rules(lm, [rule], wishes, solve=solve, say=say)


ALREADY_RIGHT = (
    "the model already writes the right text at every prompt; this rule is not needed, nothing to repair"
)


@dataclass
class _Task:
    """One rule on its way; the model is as before when `run` returns or raises."""

    lm: LM
    rule: Rule
    rows: list[Prompted]
    before: list[str]
    ids: list[list[int]]
    unusable: Mapping[str, int]
    wishes: RuleWishes
    kept: list[Kept]
    here: str
    say: Say
    learnt: list[int] = field(default_factory=list)

    @property
    def protects(self) -> list["_Protected"]:
        """What later rules must leave alone: the prompts that this one learnt from."""
        return [_Protected(self.rows[i].row, self.rows[i].cut.encoded) for i in self.learnt]

    def run(
        self, solve: SolveRule, earlier: Sequence["_Protected"], used: frozenset, timing: dict[str, float]
    ) -> RuleRepair:
        unchanged = self._lines(self.before)
        faults = [x for x in unchanged if x.row.role == "fault"]
        if all(x.right_before for x in faults):
            return self._repair(unchanged, timing, note=ALREADY_RIGHT)
        self.learnt = self._picked()
        try:
            self._check_sides()
            self.say(f"{self.here}: solving")
            started = time.perf_counter()
            solution = self._solved(solve, earlier, used)
            timing["solve"] = time.perf_counter() - started
            if solution.change is None:
                return self._repair(
                    unchanged, timing, solution=solution, reason=solution.reason or "no edit was found"
                )
            patch = self._patch(solution)
            self.say(f"{self.here}: generating with the repair")
            started = time.perf_counter()
            with changed(self.lm, patch):
                after, _ = write_all(self.lm, self.rows)
                broken = self._broken(earlier)
            timing["prove"] = time.perf_counter() - started
            lines = self._lines(after)
            reason = self._verdict(lines) or broken
            return self._repair(
                lines, timing, solution=solution, reason=reason, patch=None if reason else patch
            )
        except _Refused as refusal:
            return self._repair(unchanged, timing, reason=str(refusal))

    def _lines(self, after: Sequence[str]) -> tuple[Line, ...]:
        return tuple(Line(p.row, b, a) for p, b, a in zip(self.rows, self.before, after, strict=True))

    def _repair(self, lines: tuple[Line, ...], timing: dict[str, float], **more: Any) -> RuleRepair:
        learnt = frozenset(self.rows[i].row.id for i in self.learnt)
        return RuleRepair(self.rule, lines, learnt, unusable=self.unusable, timing=timing, **more)

    def _picked(self) -> list[int]:
        """Faults of the learn side that are wrong now, one of each source before a second of any; `wrong` ones first."""
        open_ = [i for i in self._side("learn") if not self._right(i)]
        says_wrong = {i: self.before[i].startswith(self.rows[i].row.wrong or "\0") for i in open_}
        draw = random.Random(self.wishes.seed)
        draw.shuffle(open_)
        turn: dict[str, int] = {}
        order = []
        for i in open_:
            source = self.rows[i].row.source or self.rows[i].row.id
            turn[source] = turn.get(source, -1) + 1
            order.append((not says_wrong[i], turn[source], len(order), i))
        return [i for *_, i in sorted(order)][: self.wishes.learn]

    def _side(self, split: str) -> list[int]:
        return [i for i, p in enumerate(self.rows) if p.row.role == "fault" and p.row.split == split]

    def _right(self, i: int) -> bool:
        return self.before[i].startswith(self.rows[i].row.target or "\0")

    def _check_sides(self) -> None:
        if not self.learnt:
            raise _Refused("no fault to learn from: the model is right at all rows of the learn side")
        if not self._side("unseen"):
            raise _Refused(
                "no unseen fault to prove the repair on: all are from one source, or marked learn; add prompts of"
                " other files"
            )

    def _solved(self, solve: SolveRule, earlier: Sequence["_Protected"], used: frozenset) -> Solution:
        learn = settle(self.lm, [self.rows[i].cut for i in self.learnt])
        keep = [
            Encoded(self.rows[i].cut.encoded.prompt, tuple(self.ids[i]))
            for i, p in enumerate(self.rows)
            if p.row.role != "fault" and p.row.split == "learn" and self.ids[i]
        ]
        keep += [k.encoded for k in self.kept if k.right]
        return solve(
            self.lm,
            learn,
            keep,
            _settings(self.wishes),
            wrong=[self.rows[i].cut.wrong_ids for i in self.learnt],
            earlier=[e.encoded for e in earlier],
            used=used,
            say=lambda text: self.say(f"{self.here}: {text}"),
        )

    def _patch(self, solution: Solution) -> Patch:
        patch, most = solution.change, self.wishes.max_neurons
        if not isinstance(patch, Patch):
            raise _Refused(f"solver '{solution.solver}' changes whole matrices, which no patch file can hold")
        if len(patch.edits) > most:
            raise _Refused(
                f"the edit needs {len(patch.edits)} neurons, more than the {most} allowed; raise --max-neurons"
            )
        return patch

    def _broken(self, earlier: Sequence["_Protected"]) -> str | None:
        """Why the edit may not stay, as to what else must hold; asked while it is in."""
        for one in self.kept:
            if one.right and not still_kept(self.lm, one):
                return f"the edit breaks a kept prompt ({_short(one.case.prompt[-60:])})"
        rows = [Prompted(e.row, _cut_of(e)) for e in earlier]
        texts, _ = write_all(self.lm, rows) if rows else ([], [])
        for one, text in zip(earlier, texts, strict=True):
            if not text.startswith(one.row.target or ""):
                return (
                    f"the edit breaks an earlier repair ({one.row.rule}: behind {_short(one.row.prompt[-40:])} it writes"
                    f" {_short(text)})"
                )
        return None

    def _verdict(self, lines: Sequence[Line]) -> str | None:
        """Why the rule is refused, from what was generated; None where it is accepted."""
        failed = [i for i in self.learnt if not lines[i].right_after]
        if failed:
            first = lines[failed[0]]
            return (
                f"{len(failed)} of {len(self.learnt)} learn prompts fail; first '{first.row.id}': behind"
                f" {_short(first.row.prompt[-40:])} the edited model writes {_short(first.after)} instead of"
                f" {_short(first.row.target or '')}; drop it, or ask for fewer with --learn"
            )
        unseen = [lines[i] for i in self._side("unseen")]
        right = sum(x.right_after for x in unseen)
        if right < self.wishes.accept * len(unseen):
            return (
                f"{right} of {len(unseen)} unseen prompts come out right ({right / len(unseen):.0%}), less than the"
                f" {self.wishes.accept:.0%} of --accept; mine more faults, raise --learn, or lower --accept"
            )
        return None


def _settings(wishes: RuleWishes) -> Any:
    from mint.rules.solve import RuleSettings

    return RuleSettings(
        max_neurons=wishes.max_neurons, margin=wishes.margin, reference=wishes.reference, seed=wishes.seed
    )


def _retested(lm: LM, one: RuleRepair, rows: list[Prompted], say: Say) -> RuleRepair:
    """With all rules in: the unseen faults of this one again."""
    unseen = [p for p in rows if p.row.role == "fault" and p.row.split == "unseen"]
    if not one.success or not unseen:
        return one
    say(f"rule {one.rule.name}: once more, with all rules in")
    now, _ = write_all(lm, unseen)
    before = {x.row.id: x.before for x in one.lines}
    lines = [Line(p.row, before[p.row.id], text) for p, text in zip(unseen, now, strict=True)]
    return replace(one, retained=count_faults(lines, {}))


# ---------------------------------------------------------------------- what must hold


@dataclass(frozen=True)
class _Protected:
    """A repaired prompt that must go on holding."""

    row: Row
    encoded: Encoded


def _cut_of(one: _Protected):
    from mint.rules.cut import Cut

    return Cut(one.row.prompt, one.row.target or "", None, one.encoded)


def recorded(lm: LM, patches: Sequence[Patch]) -> Iterator[_Protected]:
    """The repaired prompts recorded in patches that the model holds, rules' and single cases', as far as they hold."""
    found: list[Prompted] = []
    for number, record in enumerate(_records(patches)):
        try:
            row = Row("earlier", "fault", record["prompt"], record["target"], None, id=f"earlier {number}")
            found.append(Prompted(*encode_row(lm, row)))
        except (MintError, KeyError, TypeError, AttributeError):
            continue  # the record is for people; a patch without a usable one still applies
    texts, _ = write_all(lm, found) if found else ([], [])
    for one, text in zip(found, texts, strict=True):
        if text.startswith(one.row.target or ""):
            yield _Protected(one.row, one.cut.encoded)


def _records(patches: Sequence[Patch]) -> Iterator[Any]:
    for patch in patches:
        yield from patch.info.get("cases") or []
        for rule in patch.info.get("rules") or []:
            yield from rule.get("learn") or []


_STEM = re.compile(r"[\w.]*$")


def _whole(row: Row, text: str | None) -> str:
    """A continuation with the name that the prompt ends in: the same for every tokenizer's cut."""
    return _STEM.search(row.prompt[-80:]).group() + (text or "")


def check_rules(lm: LM, rules: Sequence[Rule]) -> None:
    """Raise `CaseError` where rules contradict each other, or a dressed prompt would be dressed again."""
    names = [rule.name for rule in rules]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise CaseError(f"two rules are called '{twice}'; give each its own name, and each file once")
    wanted: dict[str, tuple[Rule, Row]] = {}
    for rule in rules:
        for row in rule.rows:
            if row.target is None or row.role == "near":
                continue
            other_rule, other = wanted.setdefault(row.prompt, (rule, row))
            if not (row.target.startswith(other.target) or other.target.startswith(row.target)):
                raise CaseError(
                    f"rules '{other_rule.name}' and '{rule.name}' contradict each other: behind"
                    f" {_short(row.prompt[-40:])} one wants {_short(other.target)}, the other {_short(row.target)}; drop"
                    " one of them"
                )
    forbidden = [(rule, {_whole(r, r.wrong) for r in rule.part("fault")}) for rule in rules]
    for rule in rules:
        for written in sorted({_whole(r, r.target) for r in rule.part("fault")}):
            for other, texts in forbidden:
                clash = next(
                    (t for t in sorted(texts) if other is not rule and t and written.startswith(t)), None
                )
                if clash is not None:
                    raise CaseError(
                        f"rules '{rule.name}' and '{other.name}' contradict each other: one writes {_short(written)}, the"
                        f" other forbids {_short(clash)}; drop one of them"
                    )
    special = tuple(t for t in lm.tokenizer.all_special_tokens if t)
    if lm.template is not None and special:
        dressed = next((r for rule in rules for r in rule.rows if r.prompt.startswith(special)), None)
        if dressed is not None:
            raise CaseError(
                f"rule '{dressed.rule}': its prompts stand in a chat template already; leave out --chat"
            )


# ---------------------------------------------------------------------- the record


def _signed(
    lm: LM,
    patch: Patch,
    repairs: Sequence[RuleRepair],
    wishes: RuleWishes,
    effects: Specificity | None,
) -> Patch:
    """The patch with its provenance: the rules by name, what was learnt from, what was measured."""
    info = {
        "rules": [
            {
                "name": r.rule.name,
                "learn": [
                    {"id": x.row.id, "prompt": x.row.prompt, "target": x.row.target, "wrong": x.row.wrong}
                    for x in r.part("fault", "learn")
                ],
                "figures": r.figures,
                "solver": r.solution.solver if r.solution else None,
            }
            for r in repairs
            if r.patch is not None
        ],
        "cases": [],
        "chat": lm.template is not None,
        "accept": wishes.accept,
        "settings": _jsonable(asdict(_settings(wishes))),
        "measured": None if effects is None else _jsonable(effects.as_dict()),
        "versions": versions(),
    }
    return replace(patch, base=patch.base | {"layout": describe(lm)}, info=info)


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _short(text: str, longest: int = 60) -> str:
    shown = repr(text)
    return shown if len(shown) <= longest else shown[: longest - 2] + "…" + shown[0]


# ---------------------------------------------------------------------- as JSON


def repair_as_dict(one: RuleRepair) -> dict:
    """JSON values of one rule's repair."""
    edits = one.patch.edits if one.patch else ()
    learn = next(iter(one.part("fault", "learn")), None)
    return {
        "rule": one.rule.name,
        "success": one.success,
        "generated_before": learn.before if learn else None,
        "generated_after": learn.after if learn else None,
        "target": learn.row.target if learn else None,
        "neurons": [{"layer": e.layer, "index": e.index, "kind": e.kind} for e in edits],
        "margin_min": one.solution.margin_min if one.solution else None,
        "seconds": round(one.seconds, 4),
        "timing": {step: round(seconds, 4) for step, seconds in one.timing.items()},
        **one.figures,
        "retained": one.retained,
        "skipped": dict(one.unusable),
        "reason": one.reason,
        "note": one.note,
        "details": _jsonable(one.solution.details) if one.solution else {},
    }


def outcome_as_dict(outcome: RulesOutcome, patch_path: str | None) -> dict:
    """The object that `mint repair --rule --json` prints. With several rules their figures stand in `rules` only."""
    rules = [repair_as_dict(r) for r in outcome.repairs]
    single = rules[0] if len(rules) == 1 else {}
    margins = [r["margin_min"] for r in rules if r["margin_min"] is not None]
    shared = ("generated_before", "generated_after", "target", "learn", "unseen", "near", "healthy", "note")
    return {
        "success": outcome.success,
        **{key: single.get(key) for key in shared},
        "neurons": [n for r in rules for n in r["neurons"]],
        "margin_min": min(margins, default=None),
        "seconds": round(sum(r["seconds"] for r in rules), 4),
        "specificity": outcome.specificity.as_dict() if outcome.specificity else None,
        "patch": patch_path,
        "reason": outcome.reason,
        "rules": rules,
    }
