"""Check a rule on any model, with or without patches: a regression test after the model, or the library, moved on."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from mint.model.lm import LM
from mint.patch import Patch
from mint.rules.figures import Line, count_faults, count_kept, lines_of, prepared, write_all
from mint.rules.judge import judge_named
from mint.rules.repair import check_rules
from mint.rules.rule import Rule
from mint.solver.problem import changed

NOT_NEEDED = "this rule is no longer needed: the model writes the right text without a patch"


@dataclass(frozen=True)
class Checked:
    """A rule's figures on a model."""

    rule: Rule
    lines: tuple[Line, ...]
    """Every row: what the bare model writes, and what it writes with the patches in (without patches, the same)."""
    accept: float
    patched: bool
    judges: tuple[str, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)

    def _part(self, role: str, split: str | None = None) -> list[Line]:
        return [x for x in self.lines if x.row.role == role and split in (None, x.row.split)]

    def _enough(self, right: Callable[[Line], bool]) -> bool:
        """Whether enough faults are right: of the unseen ones, or of all where there are no unseen ones."""
        lines = self._part("fault", "unseen") or self._part("fault")
        return sum(map(right, lines)) >= self.accept * len(lines)

    @property
    def holds(self) -> bool:
        """Whether enough unseen faults come out right."""
        return self._enough(lambda x: x.right_after)

    @property
    def needed(self) -> bool:
        """Whether the bare model still has the habit."""
        return not self._enough(lambda x: x.right_before)

    def as_dict(self) -> dict:
        """JSON values."""
        judges = {name: judge_named(name) for name in self.judges}
        near, healthy = self._part("near"), self._part("healthy")
        figures = {
            "learn": count_faults(self._part("fault", "learn"), judges),
            "unseen": count_faults(self._part("fault", "unseen"), judges),
            "near": count_kept(near) | {"as_recorded": sum(_as_recorded(x) for x in near)},
            "healthy": count_kept(healthy) | {"right": sum(x.right_after for x in healthy)},
        }
        reason = None if self.holds else self._why()
        return {
            "rule": self.rule.name,
            "holds": self.holds,
            "needed": self.needed,
            **figures,
            "skipped": self.skipped,
            "reason": reason,
            "note": None if self.needed else NOT_NEEDED,
        }

    def _why(self) -> str:
        lines = self._part("fault", "unseen") or self._part("fault")
        right = sum(x.right_after for x in lines)
        return f"{right} of {len(lines)} unseen prompts come out right, less than the {self.accept:.0%} of --accept"


def _as_recorded(line: Line) -> bool:
    return line.row.target is None or line.after.startswith(line.row.target)


def check_rule(
    lm: LM,
    rule: Rule,
    patches: Sequence[Patch] = (),
    *,
    accept: float = 0.7,
    judges: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Checked:
    """Write behind every prompt of the rule with the bare model and, with the patches in, once more.

    The model is bit-identical afterwards. accept: least share of unseen faults that must be right (default 0.7).
    """
    for name in judges:
        judge_named(name)
    check_rules(lm, [rule])
    rows, skipped = prepared(lm, rule)
    say("what the model writes")
    before, _ = write_all(lm, rows)
    after = before
    if patches:
        say("what it writes with the patch")
        with ExitStack() as edits:
            for patch in patches:
                edits.enter_context(changed(lm, patch))
            after, _ = write_all(lm, rows)
    lines = lines_of(rows, before, after)
    return Checked(rule, lines, accept, bool(patches), tuple(judges), skipped)
