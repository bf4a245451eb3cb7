"""A rule's repair is proved by generation on prompts nobody learnt from, refuses in one line, and leaves the model as it was.

The solver here is plain gradient descent on one neuron (tests/habits.py), so the loop is tested apart from any solver's skill.
"""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from mint import bank
from mint import patch as P
from mint.case import Keep
from mint.errors import CaseError, PatchError
from mint.model.precision import in_dtype
from mint.patch.compare import split
from mint.patch.record import ask_patch, promised
from mint.rules import repair as repairing
from mint.rules.check import NOT_NEEDED, check_rule
from mint.rules.cut import NO_ROUND_TRIP
from mint.rules.figures import prepared, write_all
from mint.rules.mine import Search, mine
from mint.rules.rebase import rebase_rules
from mint.rules.repair import ALREADY_RIGHT, RuleWishes, outcome_as_dict, recorded, repair_rules
from mint.rules.rule import Row, Rule
from mint.solver.problem import Settings, Solution
from tests.conftest import same_bits, weights_of
from tests.habits import RIGHT, WRONG, by_descent, write_files
from tests.test_rules_cut import with_tokenizer

WISHES = RuleWishes(learn=12, accept=0.5)


@pytest.fixture(scope="session")
def rule(habit_lm, tmp_path_factory) -> Rule:
    source = write_files(tmp_path_factory.mktemp("habit") / "src", n=14, seed=5)
    return mine(habit_lm, Search(WRONG, RIGHT, (str(source),), name="clock", limit=30)).rule


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """A handful of reference lines is enough here."""
    monkeypatch.setattr(
        "mint.session.measured_sequences", lambda lm: [(list(range(5, 15)), list(range(9)), None)]
    )
    monkeypatch.setattr(repairing, "preparation", lambda *_: lambda _lm: None)
    monkeypatch.setattr(repairing, "_settings", lambda wishes: Settings(max_neurons=wishes.max_neurons))


@pytest.fixture(scope="session")
def edit(habit_lm, rule):
    """One good edit, found once: what a solver would give."""
    picked = {}

    def remember(lm, learn, keep, settings, **more):
        picked["solution"] = by_descent(lm, learn, keep, settings, **more)
        return picked["solution"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mint.session.measured_sequences", lambda lm: [(list(range(5, 15)), list(range(9)), None)]
        )
        patch.setattr(repairing, "preparation", lambda *_: lambda _lm: None)
        patch.setattr(repairing, "_settings", lambda wishes: Settings())
        repair_rules(habit_lm, [rule], WISHES, solve=remember)
    return picked["solution"]


def giving(solution):
    return lambda *_, **__: solution


def test_a_rule_is_learnt_and_proved_on_unseen_prompts(habit_lm, rule, edit):
    before = weights_of(habit_lm)
    outcome = repair_rules(habit_lm, [rule], WISHES, solve=giving(edit))
    assert same_bits(weights_of(habit_lm), before)
    (one,) = outcome.repairs
    assert outcome.success and outcome.patch is not None and one.learnt
    figures = one.figures
    assert figures["learn"] == figures["learn"] | {"cases": len(one.learnt), "right_before": 0}
    assert figures["learn"]["right_after"] == figures["learn"]["cases"] <= 12
    assert figures["unseen"]["cases"] == len(rule.unseen)
    low, high = figures["unseen"]["interval"]
    assert low < figures["unseen"]["right_after"] / figures["unseen"]["cases"] <= high
    assert figures["near"]["cases"] == len(rule.near) and figures["healthy"]["cases"] == len(rule.healthy)
    with P.applied(habit_lm, outcome.patch):  # the figures are what the patched model really writes
        for line in one.lines[:12]:
            ids = habit_lm.encode_prompt(line.row.prompt)
            assert habit_lm.continuation(ids, habit_lm.generate([ids], 16)[0]).startswith(line.after[:4])


def test_the_solver_sees_only_the_learn_side(habit_lm, rule, edit):
    seen = {}

    def look(lm, learn, keep, settings, **more):
        seen.update(more, learn=learn, keep=keep)
        return edit

    repair_rules(habit_lm, [rule], WISHES, solve=look)
    unseen = {tuple(habit_lm.encode_prompt(r.prompt)) for r in rule.rows if r.split == "unseen"}
    assert seen["keep"] and not unseen & {e.prompt for e in [*seen["learn"], *seen["keep"]]}
    assert len(seen["wrong"]) == len(seen["learn"]) == 12
    for one, wrong in zip(seen["learn"], seen["wrong"], strict=True):
        assert habit_lm.continuation(one.prompt, one.target).startswith("perf()")
        assert habit_lm.continuation(one.prompt, wrong) == "time()"
    assert seen["used"] == frozenset() and seen["earlier"] == ()


def test_learn_prompts_are_spread_over_files(habit_lm, rule, edit):
    (one,) = repair_rules(habit_lm, [rule], replace(WISHES, learn=4), solve=giving(edit)).repairs
    sources = {line.row.source for line in one.part("fault", "learn")}
    assert len(sources) == min(4, len({r.source for r in rule.learn}))


@pytest.mark.parametrize(
    "solution, wishes, match",
    [
        (Solution("s", None, "the program has no solution"), WISHES, "the program has no solution"),
        ("edit", replace(WISHES, accept=1.01), r"unseen prompts come out right .*less than the 101% of --accept"),
        ("useless", WISHES, r"12 of 12 learn prompts fail; first '\w+': behind .*instead of 'perf\(\)'"),
    ],
)  # fmt: skip
def test_a_refused_rule_changes_nothing_and_says_why(habit_lm, rule, edit, solution, wishes, match):
    before = weights_of(habit_lm)
    if solution == "useless":
        change = P.make_edit(habit_lm, 0, 3, {"out": habit_lm.columns(0)[3] * 0.5})
        solution = Solution("s", P.Patch((change,), P.identity(habit_lm)))
    outcome = repair_rules(habit_lm, [rule], wishes, solve=giving(edit if solution == "edit" else solution))
    assert not outcome.success and outcome.patch is None
    assert outcome.reason.startswith("rule 'clock': ")
    import re

    assert re.search(match, outcome.reason) and "\n" not in outcome.reason
    assert same_bits(weights_of(habit_lm), before)


def test_a_rule_is_proved_in_the_dtype_that_servers_load_too(habit_lm, rule, edit, monkeypatch):
    """Files of float32 whose config.json says bfloat16: what is written there counts as well."""
    asked = []

    @contextmanager
    def there(lm, dtype):
        with in_dtype(lm, dtype):
            asked.append(dtype)
            yield

    def writing(lm, rows):
        texts, ids = write_all(lm, rows)
        return (["nothing"] * len(texts) if asked else texts), ids

    monkeypatch.setattr(repairing, "in_dtype", there)
    monkeypatch.setattr(repairing, "write_all", writing)
    served = replace(habit_lm, served="bfloat16")
    outcome = repair_rules(served, [rule], WISHES, solve=giving(edit))
    assert asked == [torch.bfloat16] and not outcome.success
    assert "the edited model in bfloat16, as servers load it, writes 'nothing'" in outcome.reason


def test_a_kept_prompt_that_breaks_refuses_the_rule(habit_lm, rule, edit):
    fault = rule.unseen[0]
    wishes = replace(WISHES, keep=(Keep(fault.prompt, "time()"),))
    outcome = repair_rules(habit_lm, [rule], wishes, solve=giving(edit))
    assert not outcome.success and "the edit breaks keep" in outcome.reason


def test_the_model_that_is_right_already_needs_no_patch(habit_lm, rule, edit):
    with P.applied(habit_lm, edit.change):
        held = [r for r in rule.rows if r.role == "fault"]
        lines = check_rule(habit_lm, replace(rule, rows=tuple(held))).lines
        right = tuple(x.row for x in lines if x.right_after)
        outcome = repair_rules(habit_lm, [replace(rule, rows=right)], WISHES, solve=None or giving(edit))
    assert outcome.success and outcome.patch is None and outcome.repairs[0].note == ALREADY_RIGHT


def test_rules_in_a_row_protect_those_before(habit_lm, rule, edit):
    other = Rule("other", tuple(replace(r, rule="other", id=f"o{r.id}") for r in _sleep_rule(rule).rows))
    seen = []

    def look(lm, learn, keep, settings, *, earlier, used, **more):
        seen.append((len(earlier), used))
        return edit if not seen[1:] else Solution("s", None, "nothing found")

    outcome = repair_rules(habit_lm, [rule, other], WISHES, solve=look)
    place = (edit.change.edits[0].layer, edit.change.edits[0].index)
    assert seen == [(0, frozenset()), (12, frozenset({place}))]
    assert not outcome.success and outcome.reason == "rule 'other': nothing found"
    assert len(outcome_as_dict(outcome, None)["rules"]) == 2


def _sleep_rule(rule):
    rows = [
        Row("s", "fault", r.prompt, "rest(", "sleep(", r.source, r.split, r.id)
        for r in rule.near
        if r.target.startswith("sleep(")
    ]
    return Rule("s", tuple(rows))


def test_a_patch_says_what_it_is_and_protects_its_rule(habit_lm, rule, edit, tmp_path):
    outcome = repair_rules(habit_lm, [rule], WISHES, solve=giving(edit))
    path = P.save(outcome.patch, tmp_path / "fix.safetensors")
    read = P.load(path)
    (record,) = read.info["rules"]
    assert record["name"] == "clock" and len(record["learn"]) == 12
    assert record["figures"]["unseen"]["cases"] == len(rule.unseen)
    text = json.dumps(read.info)
    assert not any(json.dumps(r.prompt)[1:-1] in text for r in rule.unseen if len(r.prompt) > 80), (
        "no corpus inside"
    )
    assert recorded(habit_lm, [read]) == [], "the model does not hold it"
    with P.applied(habit_lm, read):
        assert len(recorded(habit_lm, [read])) == 12


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda r: [replace(r, rows=r.learn[:3])], "rule 'clock': the model writes the wrong text at only 3 .*mint repair --prompt"),
        (lambda r: [replace(r, rows=r.near)], "rule 'clock' has no row of role fault"),
        (lambda r: [r, r], "two rules are called 'clock'"),
        (lambda r: [r, _turned(r)], "rules 'clock' and 'turned' contradict each other"),
        (lambda r: [r, _elsewhere(r)], "rules 'clock' and 'elsewhere' contradict each other: behind"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be_used_are_one_line(habit_lm, rule, edit, change, match):
    with pytest.raises(CaseError, match=match) as error:
        repair_rules(habit_lm, change(rule), WISHES, solve=giving(edit))
    assert "\n" not in str(error.value)


def _turned(rule):
    rows = [
        replace(r, rule="turned", prompt="q" + r.prompt, target=r.wrong, wrong=r.target) for r in rule.learn
    ]
    return Rule("turned", tuple(rows))


def _elsewhere(rule):
    return Rule("elsewhere", tuple(replace(r, rule="elsewhere", target="rest()") for r in rule.learn))


def test_a_rule_of_another_tokenizer_is_one_line():
    lm = with_tokenizer("sentencepiece")
    rows = [Row("r", "fault", "▁" * n, "▁x", "▁y", id=str(n)) for n in range(1, 6)]
    with pytest.raises(
        CaseError, match="none of its 5 faults can be used with the tokenizer of .*mine it anew"
    ):
        prepared(lm, Rule("r", tuple(rows)))
    usable = Row("r", "fault", "x = time.", "perf()", "time()", id="9")
    found, unusable = prepared(lm, Rule("r", (*rows, usable)))
    assert [p.row.id for p in found] == ["9"] and unusable == {NO_ROUND_TRIP: 5}


def test_the_record_names_the_neurons_so_that_a_patch_of_rules_can_be_taken_apart(habit_lm, rule, edit):
    patch = repair_rules(habit_lm, [rule], WISHES, solve=giving(edit)).patch
    (record,) = patch.info["rules"]
    assert record["neurons"] == [e.named() for e in patch.edits]
    (part,) = split(patch)
    assert part.info["rules"] == [record] and [e.place for e in part.edits] == [e.place for e in patch.edits]


def test_only_unseen_faults_of_another_file_prove_anything(habit_lm, rule, edit):
    rows = tuple(replace(r, split="learn") for r in rule.rows)
    outcome = repair_rules(habit_lm, [replace(rule, rows=rows)], WISHES, solve=giving(edit))
    assert not outcome.success and "no unseen fault to prove the repair on" in outcome.reason


# ---------------------------------------------------------------------- check


def test_check_gives_the_same_figures_for_a_patch_and_restores_the_model(habit_lm, rule, edit):
    before = weights_of(habit_lm)
    found = check_rule(habit_lm, rule, [edit.change], accept=0.5).as_dict()
    assert same_bits(weights_of(habit_lm), before)
    repaired = outcome_as_dict(repair_rules(habit_lm, [rule], WISHES, solve=giving(edit)), None)
    assert found["unseen"] == repaired["unseen"] and found["near"]["kept"] == repaired["near"]["kept"]
    assert found["holds"] and found["needed"] and found["note"] is None and found["reason"] is None


def test_check_of_the_bare_model_fails_and_says_how_far(habit_lm, rule):
    found = check_rule(habit_lm, rule).as_dict()
    assert not found["holds"] and "less than the 70% of --accept" in found["reason"]
    assert found["near"]["as_recorded"] == found["near"]["cases"]


def test_check_says_when_a_rule_is_no_longer_needed(habit_lm, rule, edit):
    with P.applied(habit_lm, edit.change):  # an upgrade that has lost the habit
        found = check_rule(habit_lm, rule, accept=0.5).as_dict()
    assert found["holds"] and not found["needed"] and found["note"] == NOT_NEEDED


def test_judges_are_counted_beside(habit_lm, rule, edit):
    judges = (r"regex:^perf\(", "cmd:grep -q perf")
    found = check_rule(habit_lm, rule, [edit.change], accept=0.5, judges=judges).as_dict()["unseen"]
    assert found["judges"][judges[0]]["passed_after"] == found["right_after"]
    assert found["judges"][judges[0]]["passed_before"] == 0


def test_a_rules_patch_is_a_regression_test_of_its_learn_prompts(habit_lm, rule, edit):
    patch = repair_rules(habit_lm, [rule], WISHES, solve=giving(edit)).patch
    (learnt,) = [r["learn"] for r in patch.info["rules"]]
    asked = promised(patch)
    assert [c.prompt for c in asked] == [row["prompt"] for row in learnt]
    assert not any(a.holds for a in ask_patch(habit_lm, patch))
    with P.applied(habit_lm, patch):
        assert all(a.holds for a in ask_patch(habit_lm, patch))
    checked = bank.check(habit_lm, {"clock": patch})
    assert len(checked.answers["clock"]) == len(learnt) and checked.broken == []
    hollow = replace(patch, edits=P.scale(patch, 0).edits)
    assert len(bank.check(habit_lm, {"clock": hollow}).broken) == len(learnt)


def test_a_rules_patch_is_solved_again_on_a_newer_model(habit_lm, rule, edit):
    """The old layer first; only where that fails, the others. What moved is told."""
    outcome = repair_rules(habit_lm, [rule], WISHES, solve=giving(edit))
    asked = []

    def solver(lm, learn, keep, settings, **more):
        asked.append(settings.layers)
        if settings.layers is not None and len(asked) == 1:
            return Solution("no", None, "nothing there")
        return edit

    before = weights_of(habit_lm)
    done = rebase_rules(habit_lm, outcome.patch, [rule], WISHES, solve=solver)
    layer = outcome.patch.edits[0].layer
    assert asked == [(layer,), None] and done.outcome.success and same_bits(weights_of(habit_lm), before)
    assert done.moved["stayed"] == done.moved["before"] == [e.named() for e in outcome.patch.edits]
    assert done.moved["cosine"] == [1.0]
    with pytest.raises(PatchError, match="records the rules clock, given are none; give the file"):
        rebase_rules(habit_lm, outcome.patch, [], WISHES)
