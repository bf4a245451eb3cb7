"""The solver that learns contexts: what it learns from, the joint columns, and whole repairs of tiny models."""

import pytest
import torch

from mint import prompts
from mint.case import Case
from mint.errors import MintError
from mint.solver import variants
from mint.solver.bundle import bundle
from mint.solver.in_contexts import fit_columns, recipe_of
from mint.solver.problem import Settings

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


def test_own_leads_are_exact_and_their_gradients_are_right_at_the_last_layer(lm):
    texts = [lm.encode(CASE), lm.encode(Case("b", "y = 1\n# sort\n", "x.sort()\n"))]
    layer = lm.n_layers - 1  # nothing reads keys above it, so leaving them out changes nothing
    joint = bundle(lm, texts, [layer], exact=True)[layer]
    writes = 0.1 * torch.randn(*joint.real.shape, joint.hidden.shape[-1])
    margins, rivals, gradients = joint.own_leads(writes)
    i, p = 1, 3
    direction = torch.randn(gradients.shape[-1])
    moved = []
    for sign in (1, -1):
        other = writes.clone()
        other[i, p] += sign * 1e-2 * direction
        rows, columns = joint.real.nonzero().T
        logits = joint.logits(other)[int(((rows == i) & (columns == p)).nonzero())]
        moved.append(float(logits[joint.target[i, p]] - logits[rivals[i, p]]))
    assert (moved[0] - moved[1]) / 2e-2 == pytest.approx(
        float(gradients[i, p] @ direction), rel=0.05, abs=1e-3
    )
    clean, _, _ = joint.own_leads(torch.zeros_like(writes))
    assert torch.allclose(clean, joint.clean, atol=1e-3)


def test_one_column_serves_several_texts(lm):
    texts = [
        lm.encode(Case(str(k), f"{p}# go\n", "a\n")) for k, p in enumerate(["", "x = 1\n", "import os\n"])
    ]
    joint = bundle(lm, texts, [1], exact=True)[1]
    levels = joint.real[None].float()
    wanted = torch.full(joint.real.shape, 0.5).masked_fill(~joint.real, -torch.inf)
    columns, margins, _ = fit_columns(joint, levels, wanted, torch.full((len(joint),), 1e4), 20)
    before = (wanted - joint.clean).clamp(min=0).masked_fill(~joint.real, 0).sum()
    after = (wanted - margins).clamp(min=0).masked_fill(~joint.real, 0).sum()
    assert after < 0.5 * before and columns.shape == (1, joint.hidden.shape[-1])


def test_the_dial_moves_margin_and_ridge_together():
    low, high = recipe_of(Settings(generalize=0.0)), recipe_of(Settings(generalize=1.0))
    assert low.margin < high.margin and low.ridge < high.ridge and low.price < high.price
    assert recipe_of(Settings(margin=1.5)).margin == 1.5
    for wrong in (Settings(generalize=2.0), Settings(margin=-1.0)):
        with pytest.raises(MintError):
            recipe_of(wrong)
