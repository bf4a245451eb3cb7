"""The solver that learns contexts: what it learns from, the joint columns, and whole repairs of tiny models."""

import re

import pytest
import torch

from mint import prompts
from mint.case import Case
from mint.errors import MintError
from mint.reference import moments
from mint.reference.texts import passages
from mint.solver import in_contexts, reading, variants
from mint.solver.bundle import bundle
from mint.solver.in_contexts import shares
from mint.solver.joint import Demand, cost, fit
from mint.solver.problem import Problem, Settings, Solution
from mint.solver.recipe import recipe_of
from tests.conftest import tiny_lm

CASE = Case("a", "# sort the first list\n", "x.sort()\n")


def test_contexts_indent_prompt_and_target_alike():
    found = variants.contexts(CASE)
    assert len(found) == len({c.prompt for c in found}) > 8
    assert all(c.prompt.rstrip().endswith("sort the first list") for c in found)
    inside = next(c for c in found if c.prompt.endswith("\n        # sort the first list\n"))
    assert inside.target == "        x.sort()\n"


def test_contexts_of_a_conversation_show_code_before_the_words():
    found = variants.contexts(Case("a", "How do I sort x?", "x.sort()"), chat=True)
    assert found and all("```" in c.prompt and c.prompt.endswith("How do I sort x?") for c in found)


def test_a_prompt_that_ends_in_code_has_contexts_but_no_wordings():
    case = Case("a", "def f(n):\n    return", " n + 1\n")
    assert variants.contexts(case) and not variants.wordings(case, 3)


def test_wordings_begin_with_full_stop_and_docstring():
    found = [c.prompt for c in variants.wordings(CASE, 3)]
    assert found[:2] == ["# sort the first list.\n", '"""sort the first list"""\n']
    assert CASE.prompt not in found and len(found) == len(set(found))


def test_no_learning_host_is_measured_with():
    measured = {text for texts in prompts.hosts("measure", "python").values() for text in texts}
    assert not any(text in case.prompt for case in variants.contexts(CASE) for text in measured)


def several(lm, wanted: float) -> Demand:
    texts = [
        lm.encode(Case(str(k), f"{p}# go\n", "a\n")) for k, p in enumerate(["", "x = 1\n", "import os\n"])
    ]
    joint = bundle(lm, texts, [1], exact=True)[1]
    goal = torch.full(joint.real.shape, wanted).masked_fill(~joint.real, -torch.inf)
    return Demand(
        joint,
        joint.real[None, None].float(),
        goal,
        torch.full((len(joint),), 1e4),
        torch.zeros_like(joint.inputs),
    )


def nothing(demand: Demand) -> torch.Tensor:
    return torch.zeros(1, demand.bundle.inputs.shape[-1])


def test_one_column_serves_several_texts(lm):
    demand = several(lm, 0.5)
    columns = fit([demand], nothing(demand), 20).columns
    margins = demand.margins(0, columns)[0]
    missing = (demand.wanted - demand.bundle.clean).clamp(min=0).masked_fill(~demand.bundle.real, 0)
    left = (demand.wanted - margins).clamp(min=0).masked_fill(~demand.bundle.real, 0)
    assert left.sum() < 0.5 * missing.sum() and columns.shape == (1, demand.bundle.hidden.shape[-1])


def test_no_iteration_makes_the_columns_cost_more(lm):
    demand = several(lm, 4.0)
    costs = [cost([demand], fit([demand], nothing(demand), n).columns) for n in range(4)]
    assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]


def test_the_first_neuron_takes_the_first_token_alone_and_indentation_goes_with_the_rest(lm):
    texts = [lm.encode(CASE), lm.encode(Case("b", "def f(x):\n    # sort\n", "    x.sort()\n"))]
    joint = bundle(lm, texts, [1], exact=True)[1]
    fire = torch.ones(joint.real.shape[1]).bool()
    first, rest = shares(joint, fire, 2)
    indentation = len(texts[1].target) - len(texts[0].target)
    assert indentation > 0 and first.nonzero().flatten().tolist() == [indentation]
    assert bool((first ^ rest).all())
    assert shares(joint, fire, 1) == [fire]


def test_other_cases_of_the_run_are_read_with_what_they_are_to_write(lm, monkeypatch):
    layer, asked = (
        in_contexts.layer_of(lm, Settings()),
        ("# reverse x\n", "# empty the list\n", "# copy it\n"),
    )
    others = tuple(lm.encode(Case(p, p, "y = x\n"), "none") for p in asked)
    own = []
    for beside in ((), others):
        problem = Problem(CASE, lm.encode(CASE, "none"), others=beside)
        own.append(reading.read(lm, problem, Settings(), recipe_of(Settings()), layer).own)
    for expected in reading._seen(lm, layer, others):
        assert any(expected[1] == start and torch.allclose(expected[0], x, atol=1e-5) for x, start in own[1])
    assert len(own[1]) == len(own[0]) + len(others)
    monkeypatch.setattr(reading, "OTHERS", sum(len(e.ids) for e in others) - 1)
    drawn = reading._others(problem)
    assert len(set(drawn)) == 2 and drawn == reading._others(problem)


def test_the_dial_moves_margin_price_and_near_misses_together():
    low, high = recipe_of(Settings(generalize=0.0)), recipe_of(Settings(generalize=1.0))
    assert low.margin < high.margin and low.near > high.near and low.price < high.price
    assert recipe_of(Settings(margin=1.5)).margin == 1.5
    for wrong in (Settings(generalize=2.0), Settings(margin=-1.0)):
        with pytest.raises(MintError):
            recipe_of(wrong)


@pytest.mark.parametrize(
    "case, settings, why",
    [
        (Case("long", "# go\n", "x" * 60 + "\n"), Settings(), "60 tokens|61 tokens"),
        (Case("own", "# go\n", "ab\n"), Settings(where="responsible"), "idle neurons"),
    ],
)
def test_what_is_not_learnt_in_contexts_is_handed_over_and_says_why(lm, case, settings, why, monkeypatch):
    handed = []

    def alone(lm, problem, settings):
        handed.append(settings)
        return Solution("mint", None, reason="too hard")

    monkeypatch.setattr("mint.solver.in_contexts.minimal.solve", alone)
    found = in_contexts.solve(lm, Problem(case, lm.encode(case)), settings)
    assert handed == [settings] and found.reason == "too hard" and not found.details["contexts"]
    assert re.search(why, found.details["alone"])


@pytest.mark.parametrize(
    "family, why", [("jamba", "no keys and values to go on from"), ("mixtral", "routed experts alone")]
)
def test_models_that_cannot_be_restarted_or_have_no_dense_layer_are_handed_over(family, why, monkeypatch):
    alone = Solution("mint", None, reason="too hard")
    monkeypatch.setattr("mint.solver.in_contexts.minimal.solve", lambda *_: alone)
    monkeypatch.setattr(moments, "passages", lambda lm, texts: [p[:48] for p in passages(lm, texts)[:6]])
    lm = tiny_lm(family)
    found = in_contexts.solve(lm, Problem(CASE, lm.encode(CASE)), Settings())
    assert why in found.details["alone"]
