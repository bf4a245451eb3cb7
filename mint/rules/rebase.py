"""Carry the patch of a rule over to another version of its model: the rule is solved again, in the old layers first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mint.console import Say
from mint.errors import PatchError
from mint.model.lm import LM
from mint.patch import Patch
from mint.rebase import moved_between
from mint.rules import solve as rule_solver
from mint.rules.repair import RulesOutcome, RuleWishes, SolveRule, repair_rules
from mint.rules.rule import Rule


@dataclass(frozen=True)
class RulesRebased:
    """What became of a patch of rules on another model."""

    outcome: RulesOutcome
    moved: dict
    """Neurons before and after, those that stayed, the cosines of their columns."""


def wishes_of(patch: Patch) -> RuleWishes:
    """What a patch's rules were made with, as far as it says so: as many faults to learn from, the same share to accept."""
    records = [r for r in patch.info.get("rules") or [] if isinstance(r, dict)]
    learn = [len(r["learn"]) for r in records if isinstance(r.get("learn"), list)]
    accept = [float(r["accept"]) for r in records if isinstance(r.get("accept"), int | float)]
    usual = RuleWishes()
    return RuleWishes(learn=max(learn, default=usual.learn), accept=min(accept, default=usual.accept))


def rebase_rules(
    lm: LM,
    patch: Patch,
    rules: Sequence[Rule],
    wishes: RuleWishes | None = None,
    *,
    solve: SolveRule | None = None,
    say: Say = lambda _: None,
) -> RulesRebased:
    """Repair the rules of a patch on another model and prove them there; the model is as before afterwards.

    The layers that the patch edits are tried first; only where no acceptable repair is found there, the others. wishes:
    default `wishes_of(patch)`. solve, and
    what is raised: see `repair_rules`; `PatchError` unless the rules are those that the patch records.
    """
    wishes = wishes or wishes_of(patch)
    recorded = [str(r.get("name")) for r in patch.info.get("rules") or [] if isinstance(r, dict)]
    given = [rule.name for rule in rules]
    if sorted(recorded) != sorted(given):
        raise PatchError(
            f"the patch records the rules {', '.join(recorded) or 'none'}, given are {', '.join(given) or 'none'}; give the file"
            " of each with --rule"
        )
    chosen = solve or rule_solver.solve_rule

    def there(model, learn, keep, settings, **more):
        return chosen(model, learn, keep, replace(settings, layers=layers), **more)

    layers = tuple(sorted({e.layer for e in patch.edits} & set(lm.layout.repairable)))
    outcome = repair_rules(lm, rules, wishes, solve=there, say=say) if layers else None
    if outcome is None or not outcome.success:
        say("the old layers do not carry it; looking in others")
        outcome = repair_rules(lm, rules, wishes, solve=chosen, say=say)
    return RulesRebased(outcome, moved_between(patch.edits, outcome.patch.edits if outcome.patch else ()))
