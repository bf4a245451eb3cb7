"""Guards: what is kept is what the model writes now, looked at in batches, by generation where it is not beyond doubt."""

from dataclasses import replace

import pytest
import torch

from mint import guards
from mint import patch as P
from mint.case import Case, Keep
from mint.errors import CaseError
from mint.model.foretell import clear_margin
from mint.model.lm import Encoded
from mint.model.margins import all_margins
from mint.session import Hooks, Refused, Session, Wishes, repair
from mint.solver.problem import Solution, changed
from tests.conftest import same_bits, tiny_lm, weights_of
from tests.test_pipeline import PLACES, WISHES, damage, planted, undoing, written


@pytest.fixture
def lm():
    return tiny_lm("llama")


def outputs(lm, words, tokens=2):
    """Guards of the model's own first tokens behind many prompts."""
    found = guards.collect(lm, [Keep(f"{a} ") for a in words])
    return [replace(g, encoded=replace(g.encoded, target=g.encoded.target[:tokens])) for g in found]


def moved_by(lm, patch, words="abcdefghijklmnopqrstuvwxyz"):
    """Prompts behind which the model writes something else with the patch."""
    prompts = [lm.encode_prompt(f"{a} ") for a in words]
    before = lm.generate(prompts, 3)
    with P.applied(lm, patch):
        after = lm.generate(prompts, 3)
    return [Keep(f"{a} ") for a, x, y in zip(words, before, after, strict=True) if x != y]


def test_a_models_own_output_is_kept_up_to_its_second_line(lm):
    (guard,) = guards.collect(lm, [Keep("some words")])
    assert guard.holds and guard.text is None and len(guard.encoded.target) <= guards.KEEP_TOKENS
    assert lm.decode(guard.encoded.target).count("\n") <= guards.KEEP_LINES
    assert guards.still_hold(lm, [guard]) == [True] and guards.wanted(lm, guard) == guards.written(lm, guard)


def test_a_target_that_does_not_hold_is_marked(lm):
    prompt, text = next((p, t) for p, t in written(lm, 3).items() if t)
    asked = [Keep(lm.decode(prompt), text), Keep(lm.decode(prompt), "~~~")]
    assert [g.holds for g in guards.collect(lm, asked, "none")] == [True, False]


def test_many_guards_in_batches_give_what_single_ones_give(lm):
    kept = outputs(lm, "abcdefghijklmnopqrstuvwxyz")
    assert len(kept) > guards.BATCH
    assert guards.still_hold(lm, kept) == guards.still_hold(lm, kept, quick=True) == [True] * len(kept)
    damage(lm, PLACES[:1])
    single = [guards.still_hold(lm, [g])[0] for g in kept]
    assert not all(single) and any(single)
    assert guards.still_hold(lm, kept) == guards.still_hold(lm, kept, quick=True) == single
    clear = [g for g, m in zip(kept, all_margins(lm, [g.encoded for g in kept]), strict=True) if m.min() > 0]
    assert guards.first_broken(lm, [g.encoded for g in clear]) is None
    broken = guards.first_broken(lm, [g.encoded for g in kept])
    assert broken is not None and not single[broken]


def test_what_leads_clearly_is_not_generated_again(lm, monkeypatch):
    kept = outputs(lm, "abcdef")
    clear = [m.min() > clear_margin(lm) for m in all_margins(lm, [g.encoded for g in kept])]
    asked = []
    generate = lm.generate
    monkeypatch.setattr(lm, "generate", lambda p, *a: asked.extend(p) or generate(p, *a))
    assert all(guards.still_hold(lm, kept, quick=True))
    assert len(asked) == clear.count(False) < len(kept)
    guards.still_hold(lm, kept)
    assert len(asked) == clear.count(False) + len(kept)


def test_a_text_written_with_other_tokens_is_protected_with_those(lm):
    """The tokenizer's own tokens for the text are not what the model writes: a solver could never keep them."""
    (own,) = guards.collect(lm, [Keep("some words")])
    text = guards.wanted(lm, own)
    strange = Encoded(own.encoded.prompt, (*own.encoded.target[:-1], (own.encoded.target[-1] + 1) % 257))
    lm.encode = lambda case, stop="auto": strange
    lm.write = lambda encoded, case: text
    (guard,) = guards.collect(lm, [Keep("some words", text)])
    assert guard.holds and guard.encoded.target == own.encoded.target


def test_records_of_patches_that_cannot_be_used_are_passed_over(lm):
    prompt, text = next((p, t) for p, t in written(lm, 3).items() if t)
    good = {"prompt": lm.decode(prompt), "target": text, "neurons": []}
    records = [good, good | {"target": "~~~"}, {"prompt": "x"}, "text", None, good | {"target": 3}]
    (found,) = guards.of_records(lm, records, "none")
    assert found.text == text and found.why == guards.EARLIER


# ---------------------------------------------------------------------- in a session


def test_a_cases_keep_protects_every_repair_of_the_file(lm):
    """The keep of one case holds for the other, whichever comes first."""
    (case,), undo = planted(lm)
    patch = repair(lm, [case], WISHES, undoing(undo)).patch
    (moved, *_) = moved_by(lm, patch)
    prompt, text = next((p, t) for p, t in written(lm, 3).items() if t)
    other = Case("other", lm.decode(prompt), text, keep=(moved,))
    for order in ([other, case], [case, other]):
        clean = weights_of(lm)
        outcome = repair(lm, order, WISHES, undoing(undo))
        assert same_bits(clean, weights_of(lm))
        refused = next(r for r in outcome.repairs if r.case is case)
        assert refused.reason is not None and refused.reason.startswith("the edit breaks keep")


def test_a_keep_that_is_a_case_of_the_file_need_not_hold_before(lm):
    (case,), undo = planted(lm)
    prompt, text = next((p, t) for p, t in written(lm, 3).items() if t)
    later = Case("later", lm.decode(prompt), text, keep=(Keep(case.prompt, case.target),))
    assert repair(lm, [case, later], WISHES, undoing(undo)).repairs[0].success


def test_to_keep_what_is_to_change_is_a_contradiction(lm):
    (case,), undo = planted(lm)
    with pytest.raises(CaseError, match="contradict each other: one wants what the model writes now"):
        repair(lm, [replace(case, keep=(Keep(case.prompt),))], WISHES, undoing(undo))


def test_a_session_gives_every_bit_back_and_keeps_what_was_proven_meanwhile(lm):
    (case,), undo = planted(lm)
    clean = weights_of(lm)
    with Session(lm, WISHES, undoing(undo)) as session:
        assert session.repair(case).success and not same_bits(clean, weights_of(lm))
        assert lm.write(lm.encode(case, "none"), case) == case.target
        assert session.protected.earlier == (lm.encode(case, "none"),) and session.lost() == ()
        assert session.repair(replace(case, id="again")).note is not None
        patch = session.patch(session.effects())
    assert same_bits(clean, weights_of(lm)) and patch is not None
    with changed(lm, patch):
        assert lm.write(lm.encode(case, "none"), case) == case.target


class Damage:
    """A job that is no case: break a neuron; proven if the neuron is broken."""

    kind = "rules"

    def __init__(self, place, provable=True):
        self.place, self.provable, self.seen = place, provable, None

    def solve(self, lm, protected):
        self.seen = protected
        layer, index = self.place
        edit = P.make_edit(lm, layer, index, {"out": torch.full((32,), 0.01)})
        return Solution("damage", P.Patch((edit,), P.identity(lm)))

    def prove(self, lm):
        if not self.provable:
            raise Refused("cannot be proven")
        assert float(lm.columns(self.place[0])[self.place[1]].sum()) == pytest.approx(0.32)

    def explain(self, lm, change):
        assert float(lm.columns(self.place[0])[self.place[1]].sum()) != pytest.approx(0.32)

    def guards(self):
        return []

    def record(self, change):
        return {"rule": "damage", "neurons": len(change.edits)}


def test_any_job_goes_through_the_same_loop(lm):
    clean = weights_of(lm)
    said = []
    with Session(lm, Wishes(stop="none"), lambda *_: None, Hooks(say=said.append)) as session:
        one, two, three = Damage(PLACES[0]), Damage((0, 0), provable=False), Damage(PLACES[1])
        assert session.attempt(one).reason is None
        before = weights_of(lm)
        refused = session.attempt(two)
        assert (
            refused.reason == "cannot be proven"
            and refused.change is None
            and same_bits(before, weights_of(lm))
        )
        assert session.attempt(three).reason is None
        assert three.seen.used == {PLACES[0]}
        patch = session.patch()
        assert session.effects() is not None
    assert same_bits(clean, weights_of(lm))
    assert patch.info["rules"] == [{"rule": "damage", "neurons": 1}] * 2 and "cases" not in patch.info
    assert said.count("measuring the model before the repair") == 1


def test_the_keep_of_the_wishes_guards_other_jobs_too(lm):
    job = Damage(PLACES[0])
    with Session(lm, Wishes(), lambda *_: None) as session:
        patch = session.attempt(job).change
    moved = moved_by(lm, patch)
    if not moved:
        pytest.skip("this edit changes none of the prompts")
    with Session(lm, Wishes(keep=(moved[0],)), lambda *_: None) as session:
        assert session.attempt(Damage(PLACES[0])).reason.startswith("the edit breaks keep")


def test_a_session_knows_which_cases_want_another_text(lm):
    cases = [Case(str(k), f"# {k}\n", target) for k, target in enumerate(("a\n", "b\n", "a\n"))]
    asked = []
    with Session(
        lm, Wishes(stop="none", protect=False), lambda _, p, __: asked.append(p) or Solution("none", None)
    ) as session:
        session.admit(cases)
        for case in cases:
            session.repair(case)
    assert [p.others for p in asked] == [
        tuple(lm.encode(cases[k], "none") for k in ks) for ks in ([1], [0, 2], [1])
    ]
