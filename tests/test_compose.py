"""Patches made without knowing of each other: idle neurons move, real conflicts are told, all repairs hold together."""

import threading
from dataclasses import replace

import pytest
import torch

from mint import patch as P
from mint.errors import PatchError
from mint.patch.record import ask, cases_of, contradictions, encoded
from mint.patch.relocate import collisions, relocate
from tests.conftest import same_bits, tiny_lm, weights_of
from tests.test_patch import random_patch

SPARE = {"spare": [[1, 7], [1, 20], [1, 21]]}


def logits(lm):
    return lm.logits([[5, 40, 77, 12]], [[0, 1, 2, 3]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "starcoder2"])
def test_a_rewrite_that_collides_moves_and_does_the_same(family):
    lm = tiny_lm(family)
    first = random_patch(lm, [(1, 7, "rewrite")], seed=1)
    case = {"id": "a", "prompt": "p", "target": "t", "neurons": [{"layer": 1, "index": 7, "kind": "rewrite"}]}
    second = random_patch(lm, [(1, 7, "rewrite")], seed=2, info=SPARE | {"cases": [case]})
    with pytest.raises(PatchError, match="layer 1, neuron 7 is edited by two patches"):
        P.compose([first, second])
    (moved_first, moved), (move,) = relocate(lm, [first, second])
    assert moved_first is first and (move.patch, move.index, move.to) == (1, 7, 20)
    assert moved.info["cases"][0]["neurons"][0]["index"] == 20
    with torch.no_grad():
        for places in ((1, 7), (1, 20)):  # without both neurons the moved edit does what the old one did
            lm.columns(places[0])[places[1]].zero_()
    silent = tiny_lm(family)
    silent.model.load_state_dict(lm.model.state_dict())
    for model, patch in ((lm, second), (silent, moved)):
        for edit in patch.edits:
            view = P.make_edit(model, edit.layer, edit.index, edit.after)
            P.apply(model, P.Patch((view,)))
    torch.testing.assert_close(logits(lm), logits(silent), atol=1e-4, rtol=1e-4)
    clean = weights_of(tiny_lm(family))
    fresh = tiny_lm(family)
    with P.applied(fresh, P.compose([moved_first, moved])):
        pass
    assert same_bits(clean, weights_of(fresh))


def test_repairs_made_in_a_row_do_not_collide(lm):
    first = random_patch(lm, [(1, 7, "rewrite")], seed=1)
    with P.applied(lm, first):
        second = random_patch(lm, [(1, 7, "rewrite")], seed=2)
    assert collisions([first, second]) == []
    P.compose([first, second])


def test_value_edits_of_one_neuron_are_a_real_conflict(lm):
    pair = [random_patch(lm, [(1, 7, "value")], seed=s, info=SPARE) for s in (1, 2)]
    with pytest.raises(PatchError, match="cannot move to another neuron"):
        relocate(lm, pair)


def test_without_a_free_neuron_the_way_out_is_named(lm):
    pair = [random_patch(lm, [(1, 7, "rewrite")], seed=s) for s in (1, 2)]
    with pytest.raises(PatchError, match="no other neuron is known for patch 2 .*mint repair --patch"):
        relocate(lm, pair)


def test_a_patch_that_names_no_neuron_moves_to_an_idle_one(lm):
    pair = [random_patch(lm, [(1, 7, "rewrite")], seed=s) for s in (1, 2)]
    asked = []
    _, (move,) = relocate(lm, pair, lambda layer: asked.append(layer) or [7, 30])
    assert asked == [1] and move.to == 30


def test_more_patches_than_idle_neurons_still_go_together(lm):
    """Where the nearly free ones of a layer are taken, the next quietest are offered."""
    from mint.reference.idle import IDLE, SPARE, nearly_free

    energy = torch.arange(960.0).flip(0)
    assert nearly_free(energy) == list(range(959, 949, -1)) and len(nearly_free(energy)) == 960 // IDLE
    more = nearly_free(energy, share=SPARE)
    assert more[:10] == nearly_free(energy) and len(more) == 60


def test_contradicting_cases_are_found(lm):
    def with_target(text):
        case = {"id": text, "prompt": "# sort\n", "target": text}
        return replace(random_patch(lm), info={"cases": [case, {"id": "broken"}]})

    ((one, other),) = contradictions([with_target("a\n"), with_target("b\n"), with_target("a\n")])
    assert (one.target, other.target) == ("a\n", "b\n")
    assert [c.id for c in cases_of(with_target("a\n"))] == ["a\n"]


def test_a_recorded_case_is_asked_by_generating(lm):
    patch = replace(random_patch(lm), info={"cases": [{"id": "x", "prompt": "ab", "target": "never this\n"}]})
    (answer,) = ask(lm, cases_of(patch))
    assert not answer.holds and answer.to_json()["written"] == answer.written


def test_threads_never_see_half_a_patch(lm):
    """Four threads apply and revert two patches of one model; each sees its own inside, and all bits are back."""
    clean, patches = weights_of(lm), [random_patch(lm, [(1, n, "rewrite")], seed=n) for n in (3, 3, 4, 5)]
    failures = []

    def work(patch):
        try:
            for _ in range(20):
                with P.applied(lm, patch):
                    P.check(lm, patch, "after")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(p,)) for p in patches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert same_bits(clean, weights_of(lm))


def test_a_patch_made_in_a_chat_is_asked_in_a_chat():
    lm = tiny_lm("llama")
    lm.tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    case = {"id": "c", "prompt": "sort", "target": "x"}
    plain = P.Patch((), {}, {"cases": [case]})
    (bare,), (dressed,) = encoded(lm, plain), encoded(lm, replace(plain, info=plain.info | {"chat": True}))
    assert "<sort>" in lm.decode(dressed.prompt) and "<" not in lm.decode(bare.prompt)
    assert lm.template is None
