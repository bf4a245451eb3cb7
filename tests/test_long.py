"""Prompts longer than an attention window, and long ones: a restart at a layer equals the plain forward, repairs hold."""

import pytest
import torch

from mint import session
from mint.attribution.exact import exact_scores, record_run
from mint.attribution.faults import find_faults
from mint.case import Case
from mint.measure import specificity
from mint.model.lm import LM, Encoded
from mint.reference import moments
from mint.reference.texts import passages
from mint.solver.inputs import inputs_behind
from mint.solver.problem import Settings
from mint.solver.solve import solve
from mint.solver.tail import run_clean
from tests.conftest import same_bits, tiny_lm, weights_of

WINDOW = 6
WINDOWED = {
    "mistral": {},
    "starcoder2": {},
    "phi3": {},
    "gemma2": {},  # every other layer
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},  # all but the first
    "gpt_oss": {},
}
PROMPT, TARGET = tuple(range(9, 39)), tuple(range(60, 72))


@pytest.fixture(params=sorted(WINDOWED))
def windowed(request) -> LM:
    return tiny_lm(request.param, sliding_window=WINDOW, **WINDOWED[request.param])


@pytest.fixture(autouse=True)
def short_reference(monkeypatch):
    monkeypatch.setattr(moments, "passages", lambda lm, texts: [p[:48] for p in passages(lm, texts)[:6]])
    monkeypatch.setattr(moments, "reference_lines", lambda: ["x = 1\n", "def f():\n"])


def narrowed(lm: LM, encoded: Encoded) -> LM:
    from mint.model.experts import focused_for

    return focused_for(lm, encoded.ids[:-1], encoded.positions)


def test_the_window_is_in_force(windowed):
    """What stands before the window of every layer together has no part in the last logits."""
    seen = WINDOW * windowed.n_layers
    ids = [*PROMPT, *PROMPT]
    other = [200, *ids[1:]]
    one, two = (windowed.logits([x], [[len(ids) - 1]]) for x in (ids, other))
    full = "gemma2" in windowed.name or "qwen2" in windowed.name or "gpt_oss" in windowed.name
    assert seen < len(ids) and torch.allclose(one, two, atol=1e-6) != full


def test_a_trial_behind_a_prompt_longer_than_the_window_equals_the_edited_model(windowed):
    encoded = Encoded(PROMPT, TARGET)
    lm = narrowed(windowed, encoded)
    for layer in lm.layout.repairable:
        tail = run_clean(lm, encoded, [layer]).tails[layer]
        torch.manual_seed(layer)
        write, at = torch.randn(len(TARGET), 32), torch.arange(len(TARGET))
        with torch.no_grad():
            tried = tail.logits(write[None], torch.zeros_like(at), at)

        def add(_module, _args, output, write=write):
            moved = output.clone().reshape(1, -1, 32)
            moved[0, encoded.positions] += write
            return moved.reshape(output.shape)

        handle = lm.module(lm.block(layer).out).register_forward_hook(add)
        wanted = lm.logits([encoded.ids], [encoded.positions])
        handle.remove()
        torch.testing.assert_close(tried, wanted, atol=1e-3, rtol=1e-3)


def test_prompts_that_begin_alike_share_their_beginning_inside_the_window(windowed):
    encoded = Encoded(PROMPT, TARGET)
    lm = narrowed(windowed, encoded)
    layer = lm.layout.repairable[-1]
    tail = run_clean(lm, encoded, [layer]).tails[layer]
    prompts = [[*PROMPT[:27], 40, 41], [*PROMPT[:20], 50, 51, 52]]
    shared = inputs_behind(lm, layer, prompts, TARGET, (PROMPT, tail.prefix))
    torch.testing.assert_close(shared, inputs_behind(lm, layer, prompts, TARGET), atol=1e-3, rtol=1e-3)


def test_side_effects_and_exact_patching_restart_inside_the_window(windowed):
    lm = windowed
    clean = specificity.clean_outputs(lm, [specificity.of_ids([*PROMPT, *TARGET])], states=[1, 2])
    assert specificity.compare(lm, clean, since=2).kl_max < 1e-9
    encoded = Encoded(PROMPT, TARGET)
    view = narrowed(lm, encoded)
    fault = find_faults(view, encoded)[0]
    run = record_run(view, encoded.ids[: fault.position + 1], fault)
    assert run.no_op_error < 1e-3
    layer = view.layout.repairable[0]
    assert exact_scores(view, run, [(layer, 1), (layer, 2)], None).isfinite().all()


def test_a_line_behind_a_prompt_longer_than_the_window_is_repaired(windowed):
    before = weights_of(windowed)
    case = Case(
        "long", "abcdefgh ijklmnop qrstuvwx", "zq" if "gpt_oss" not in windowed.name else "z", stop="none"
    )
    wishes = session.Wishes(settings=Settings(generalize=0.0), contexts=False)
    outcome = session.repair(windowed, [case], wishes, solve)
    assert outcome.success, outcome.reason
    assert outcome.repairs[0].generated_after == case.target
    assert same_bits(before, weights_of(windowed))
