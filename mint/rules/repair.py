"""Repair rules on one model: pick what to learn from, solve, and prove by generation on prompts nobody learnt from.

Transactional like a single repair: the model that was handed in keeps every bit, and a patch comes out only if every
prompt that was learnt from holds and enough of the unseen ones do. Knows nothing about files or the command line.
"""

import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mint.case import Keep
from mint.console import Say, quoted
from mint.errors import CaseError, MintError
from mint.files import jsonable
from mint.guards import EARLIER, Guard
from mint.measure.specificity import Specificity
from mint.model.lm import LM, Encoded
from mint.model.loading import DTYPES
from mint.model.precision import in_dtype
from mint.patch import Patch
from mint.reference import statistics
from mint.rules import solve as rule_solver
from mint.rules.cut import encode_row, settle
from mint.rules.figures import Line, Prompted, count_faults, count_kept, lines_of, prepared, write_all
from mint.rules.judge import judge_named
from mint.rules.mine import FEW, too_few
from mint.rules.rule import Row, Rule
from mint.session import Attempt, Hooks, Prepare, Protected, Refused, Session, Wishes
from mint.solver.problem import Change, Settings, Solution

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
    """Seconds by step: generate (before), statistics (once per model), solve, verify (after)."""
    judges: tuple[str, ...] = ()
    retained: dict | None = None
    """Several rules: figures of the unseen faults once all rules are in."""

    @property
    def success(self) -> bool:
        return self.reason is None

    @property
    def seconds(self) -> float:
        """What the repair took: generate, solve, verify; not the statistics, which are measured once and cached."""
        return sum(t for step, t in self.timing.items() if step != "statistics")

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


# ---------------------------------------------------------------------- the loop


def repair_rules(
    lm: LM,
    rules: Sequence[Rule],
    wishes: RuleWishes | None = None,
    *,
    solve: SolveRule | None = None,
    after: Callable[[Session, RuleRepair], None] = lambda *_: None,
    say: Say = lambda _: None,
) -> RulesOutcome:
    """Repair rules one after another on one model; every rule protects the ones before it.

    The model is bit-identical afterwards. solve: default `mint.rules.solve.solve_rule`. after: called after each rule,
    while all that was kept so far is in the model. Raises `CaseError` for rules that cannot be used, before anything is
    solved: too few faults, rules that contradict each other, a rule made for another tokenizer.
    """
    wishes = wishes or RuleWishes()
    solve = solve or rule_solver.solve_rule
    for name in wishes.judges:
        judge_named(name)
    check_rules(lm, rules)
    rows = [prepared(lm, rule) for rule in rules]
    for rule, (found, _) in zip(rules, rows, strict=True):
        faults = sum(p.row.role == "fault" for p in found)
        if faults < FEW:
            raise CaseError(f"rule '{rule.name}': {too_few(faults)}")
    asked = Wishes(
        settings=Settings(max_neurons=wishes.max_neurons, margin=wishes.margin, reference=wishes.reference),
        solver="rule",
        stop="none",
        keep=wishes.keep,
        applied=wishes.applied,
    )

    repairs = []
    with Session(lm, asked, _no_case, Hooks(prepare=preparation(wishes, say), say=say)) as session:
        session.keep(recorded(lm, wishes.applied))
        for number, (rule, (found, unusable)) in enumerate(zip(rules, rows, strict=True), start=1):
            name = f"rule {rule.name}" + (f" ({number} of {len(rules)})" if len(rules) > 1 else "")
            job = _RuleJob(session, rule, found, unusable, wishes, solve, name)
            repairs.append(job.repaired())
            after(session, repairs[-1])
        effects = session.effects()
        if len(session.stack.patches) > 1:
            repairs = [_retested(lm, one, found, say) for one, (found, _) in zip(repairs, rows, strict=True)]
        return RulesOutcome(tuple(repairs), session.patch(effects), effects)


def _no_case(*_: object) -> Solution:
    raise MintError("a session of rules repairs no cases; use mint.repair for those")


ALREADY_RIGHT = (
    "the model already writes the right text at every prompt; this rule is not needed, nothing to repair"
)


class _RuleJob:
    """One rule as a job of its session."""

    kind = "rules"

    def __init__(
        self,
        session: Session,
        rule: Rule,
        rows: list[Prompted],
        unusable: Mapping[str, int],
        wishes: RuleWishes,
        solver: SolveRule,
        name: str,
    ):
        self.session, self.rule, self.rows, self.unusable = session, rule, rows, unusable
        self.wishes, self.solver, self.name = wishes, solver, name
        self.learnt: list[int] = []
        self.targets: list[Encoded] = []
        started = time.perf_counter()
        session.hooks.say(f"{name}: what the model writes now")
        self.before, self.ids = write_all(session.lm, rows)
        self.after = self.before
        self.seconds = time.perf_counter() - started
        self.solution: Solution | None = None

    def repaired(self) -> RuleRepair:
        """Attempt the rule, and say what became of it."""
        if all(self._right(i) for i, p in enumerate(self.rows) if p.row.role == "fault"):
            return self._result(Attempt(None, None, None, {}), ALREADY_RIGHT)
        self.learnt = self._picked()
        return self._result(self.session.attempt(self))

    def _result(self, attempt: Attempt, note: str | None = None) -> RuleRepair:
        return RuleRepair(
            self.rule,
            self._lines(),
            frozenset(self.rows[i].row.id for i in self.learnt),
            attempt.change if isinstance(attempt.change, Patch) else None,
            attempt.reason,
            note,
            attempt.solution,
            self.unusable,
            {"generate": self.seconds} | attempt.timing,
            self.wishes.judges,
        )

    def _lines(self) -> tuple[Line, ...]:
        return lines_of(self.rows, self.before, self.after)

    # ------------------------------------------------------------------ what a session calls

    def solve(self, lm: LM, protected: Protected) -> Solution:
        if not self.learnt:
            raise Refused("no fault to learn from: the model is right at all rows of the learn side")
        if not self._side("unseen"):
            raise Refused(
                "no unseen fault to prove the repair on: all are from one source, or marked learn; add prompts of"
                " other files"
            )
        say = self.session.hooks.say
        say(f"{self.name}: solving")
        self.targets = settle(lm, [self.rows[i].cut for i in self.learnt])
        own = [
            Encoded(self.rows[i].cut.encoded.prompt, tuple(self.ids[i]))
            for i, p in enumerate(self.rows)
            if p.row.role != "fault" and p.row.split == "learn" and self.ids[i]
        ]
        return self.solver(
            lm,
            self.targets,
            [*own, *protected.keep],
            _settings(self.wishes),
            wrong=[self.rows[i].cut.wrong_ids for i in self.learnt],
            earlier=protected.earlier,
            used=protected.used,
            say=lambda text: say(f"{self.name}: {text}"),
        )

    def prove(self, lm: LM) -> None:
        self.session.hooks.say(f"{self.name}: generating with the repair")
        self.after, _ = write_all(lm, self.rows)
        self._acceptable(self._lines(), "")
        if lm.served is not None:
            # Files that hold another dtype than servers load: figures are of the files', and the other must be no worse.
            with in_dtype(lm, DTYPES[lm.served]):
                there, _ = write_all(lm, self.rows)
            self._acceptable(lines_of(self.rows, self.before, there), f" in {lm.served}, as servers load it,")

    def _acceptable(self, lines: Sequence[Line], where: str) -> None:
        """Raise `Refused` where a learn prompt fails, or too few unseen ones come out right. where: for the message."""
        failed = [i for i in self.learnt if not lines[i].right_after]
        if failed:
            first = lines[failed[0]]
            raise Refused(
                f"{len(failed)} of {len(self.learnt)} learn prompts fail; first '{first.row.id}': behind"
                f" {quoted(first.row.prompt[-40:])} the edited model{where} writes {quoted(first.after)} instead of"
                f" {quoted(first.row.target or '')}; drop it, or ask for fewer with --learn"
            )
        unseen = [lines[i] for i in self._side("unseen")]
        right = sum(x.right_after for x in unseen)
        if right < self.wishes.accept * len(unseen):
            raise Refused(
                f"{right} of {len(unseen)} unseen prompts{where} come out right ({right / len(unseen):.0%}), less than the"
                f" {self.wishes.accept:.0%} of --accept; mine more faults, raise --learn, or lower --accept"
            )

    def explain(self, lm: LM, change: Change) -> None:
        pass  # the report page looks at the patch itself

    def guards(self) -> list[Guard]:
        return [
            Guard(encoded, f"{EARLIER} (rule {self.rule.name})", self.rows[i].row.id, self.rows[i].row.target)
            for i, encoded in zip(self.learnt, self.targets, strict=True)
        ]

    def record(self, change: Change) -> dict:
        learnt = [self.rows[i].row for i in self.learnt]
        return {
            "name": self.rule.name,
            "learn": [{"id": r.id, "prompt": r.prompt, "target": r.target, "wrong": r.wrong} for r in learnt],
            "accept": self.wishes.accept,
            "neurons": [e.named() for e in change.edits] if isinstance(change, Patch) else [],
            "figures": jsonable(self._result(Attempt(None, None, None, {})).figures),
        }

    # ------------------------------------------------------------------ which rows

    def _picked(self) -> list[int]:
        """Faults of the learn side that are wrong now, one of each source before a second of any; `wrong` ones first."""
        open_ = [i for i in self._side("learn") if not self._right(i)]
        random.Random(self.wishes.seed).shuffle(open_)
        turns: dict[str, int] = {}
        order = []
        for i in open_:
            row = self.rows[i].row
            source = row.source or row.id
            turns[source] = turns.get(source, -1) + 1
            says_wrong = row.wrong is not None and self.before[i].startswith(row.wrong)
            order.append((not says_wrong, turns[source], len(order), i))
        return [i for *_, i in sorted(order)][: self.wishes.learn]

    def _side(self, split: str) -> list[int]:
        return [i for i, p in enumerate(self.rows) if p.row.role == "fault" and p.row.split == split]

    def _right(self, i: int) -> bool:
        target = self.rows[i].row.target
        return target is not None and self.before[i].startswith(target)


def _settings(wishes: RuleWishes) -> rule_solver.RuleSettings:
    return rule_solver.RuleSettings(
        max_neurons=wishes.max_neurons, margin=wishes.margin, reference=wishes.reference, seed=wishes.seed
    )


def preparation(wishes: RuleWishes, say: Say) -> Prepare:
    """Statistics of the layers that rules are solved in: measured before any edit, and no part of a repair's time."""

    def prepare(lm: LM) -> None:
        layers = rule_solver.layers_of(lm, _settings(wishes))
        statistics(lm, wishes.reference, say).measure(layers, layers)

    return prepare


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


def recorded(lm: LM, patches: Sequence[Patch]) -> list[Guard]:
    """The prompts that rules' patches were made from and that the model, which holds them, still writes right."""
    found: list[Prompted] = []
    for number, record in enumerate(_records(patches)):
        try:
            row = Row("earlier", "fault", record["prompt"], record["target"], None, id=f"earlier {number}")
            found.append(Prompted(*encode_row(lm, row)))
        except (MintError, KeyError, TypeError, AttributeError):
            continue  # the record is for people; a patch without a usable one still applies
    texts, _ = write_all(lm, found) if found else ([], [])
    targets = settle(lm, [p.cut for p in found]) if found else []
    return [
        Guard(encoded, EARLIER, one.row.id, one.row.target)
        for one, text, encoded in zip(found, texts, targets, strict=True)
        if text.startswith(one.row.target or "")
    ]


def _records(patches: Sequence[Patch]) -> Iterator[Any]:
    for patch in patches:
        for rule in patch.info.get("rules") or []:
            yield from rule.get("learn") or []


_STEM = re.compile(r"[\w.]*$")


def _whole(row: Row, text: str | None) -> str:
    """A continuation with the name that the prompt ends in: the same for every tokenizer's cut."""
    return _STEM.findall(row.prompt[-80:])[0] + (text or "")


def check_rules(lm: LM, rules: Sequence[Rule]) -> None:
    """Raise `CaseError` where rules contradict each other, or a dressed prompt would be dressed again."""
    names = [rule.name for rule in rules]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise CaseError(f"two rules are called '{twice}'; give each its own name, and each file once")
    wanted: dict[str, tuple[Rule, str]] = {}
    for rule in rules:
        for row in rule.rows:
            if row.target is None or row.role == "near":
                continue
            other_rule, other = wanted.setdefault(row.prompt, (rule, row.target))
            if not (row.target.startswith(other) or other.startswith(row.target)):
                raise CaseError(
                    f"rules '{other_rule.name}' and '{rule.name}' contradict each other: behind"
                    f" {quoted(row.prompt[-40:])} one wants {quoted(other)}, the other {quoted(row.target)}; drop"
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
                        f"rules '{rule.name}' and '{other.name}' contradict each other: one writes {quoted(written)}, the"
                        f" other forbids {quoted(clash)}; drop one of them"
                    )
    special = tuple(t for t in lm.tokenizer.all_special_tokens if t)
    if lm.template is not None and special:
        dressed = next((r for rule in rules for r in rule.rows if r.prompt.startswith(special)), None)
        if dressed is not None:
            raise CaseError(
                f"rule '{dressed.rule}': its prompts stand in a chat template already; leave out --chat"
            )


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
        "neurons": [e.named() for e in edits],
        "margin_min": one.solution.margin_min if one.solution else None,
        "seconds": round(one.seconds, 4),
        "timing": {step: round(seconds, 4) for step, seconds in one.timing.items()},
        **one.figures,
        "retained": one.retained,
        "skipped": dict(one.unusable),
        "reason": one.reason,
        "note": one.note,
        "details": jsonable(one.solution.details) if one.solution else {},
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
