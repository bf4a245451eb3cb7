"""The loop accepts only what generation proves, refuses in one line, and never leaves the model changed.

Faults are planted: neurons of a random model are damaged, the targets are what the undamaged model writes, and a
stand-in solver proposes to undo the damage. So the loop is tested without depending on any solver's skill.
"""

import itertools
import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from mint import patch as P
from mint.case import Case, Keep
from mint.errors import CaseError, MintError
from mint.evaluation.outcome import outcome_as_dict
from mint.measure.specificity import Specificity
from mint.model.margins import margins
from mint.patch import edit
from mint.session import Wishes, check_contradictions, repair
from mint.solver.problem import Settings, Solution, TensorChange, changed
from tests.conftest import same_bits, tiny_lm, weights_of

WISHES = Wishes(stop="none")
PLACES = ((1, 7), (2, 3))


def ascii_text(lm, ids):
    text = lm.decode(ids)
    return text if text and all(" " <= c <= "~" for c in text) else None


def written(lm, tokens):
    """What the model writes behind many prompts; None where it is no plain text."""
    prompts = [lm.encode_prompt(f"{a}{b} = ") for a, b in itertools.product("abcdefgh", "klmnopqrst")]
    return {tuple(p): ascii_text(lm, g) for p, g in zip(prompts, lm.generate(prompts, tokens), strict=True)}


def damage(lm, places=PLACES):
    """Break neurons of the model; returns the patches that undo it, one a neuron."""
    undo = []
    for layer, index in places:
        healthy = P.read_neuron(lm, layer, index)
        torch.manual_seed(layer)
        edit = P.make_edit(lm, layer, index, {r: 3 * torch.randn(v.shape) for r, v in healthy.items()})
        P.apply(lm, P.Patch((edit,), P.identity(lm)))
        undo.append(P.Patch((P.make_edit(lm, layer, index, healthy),), P.identity(lm)))
    return undo


def planted(lm, n=1, tokens=3):
    """Damage the model; returns n cases that only the undamaged one writes, and the patches that undo the damage."""
    healthy = written(lm, tokens)
    undo = damage(lm)
    found = []
    for prompt, text in healthy.items():
        if text is None:
            continue
        case = Case(f"case-{len(found)}", lm.decode(prompt), text)
        if lm.write(lm.encode(case, "none"), case) != text:
            found.append(case)
        if len(found) == n:
            return found, undo
    raise AssertionError("too few planted faults; choose another seed")


def undoing(patches):
    """A solver that tries each patch, then all of them together."""

    def solve(lm, problem, settings):
        present = [p for p in patches if all(edit._is_at(lm, e, "before") for e in p.edits)]
        whole = [P.Patch(tuple(e for p in present for e in p.edits), P.identity(lm))] if present else []
        for patch in [*present, *whole]:
            with changed(lm, patch):
                least = float(margins(lm, problem.encoded).min())
            if least > 0:
                return Solution("undo", patch, margin_min=least, details={"why": "planted"})
        return Solution("undo", None, reason="nothing to undo")

    return solve


@pytest.fixture
def fault(lm):
    (case,), undo = planted(lm)
    return lm, case, undo


def test_a_repair_is_accepted_and_the_model_keeps_every_bit(fault):
    lm, case, undo = fault
    clean = weights_of(lm)
    outcome = repair(lm, [case], WISHES, undoing(undo))
    assert outcome.success and outcome.reason is None
    (one,) = outcome.repairs
    assert one.generated_before != case.target == one.generated_after
    assert one.margin_min > 0 and one.seconds > 0 and set(one.timing) == {"generate", "solve", "verify"}
    assert same_bits(clean, weights_of(lm))
    assert isinstance(outcome.specificity, Specificity) and outcome.specificity.argmax_unchanged < 1


def test_the_patch_does_what_was_promised(fault):
    lm, case, undo = fault
    patch = P.from_bytes(P.to_bytes(repair(lm, [case], WISHES, undoing(undo)).patch))
    with P.applied(lm, patch):
        assert lm.write(lm.encode(case, "none"), case) == case.target
    (recorded,) = patch.info["cases"]
    assert recorded["prompt"] == case.prompt and recorded["target"] == case.target
    assert patch.info["measured"]["tokens"] > 0 and patch.info["solver"] == "contexts"
    assert patch.base["layout"]["layers"] == 3


def test_a_target_already_written_needs_no_patch(lm):
    prompt, text = next((p, t) for p, t in written(lm, 3).items() if t)
    case = Case("a", lm.decode(prompt), text)

    def never(*_):
        raise AssertionError("nothing to solve")

    outcome = repair(lm, [case], WISHES, never)
    assert outcome.success and outcome.patch is None and outcome.specificity is None
    assert "no patch is needed" in outcome.repairs[0].note


def refused(lm, case, solve, wishes=WISHES):
    clean = weights_of(lm)
    outcome = repair(lm, [case], wishes, solve)
    assert same_bits(clean, weights_of(lm))
    assert not outcome.success and outcome.patch is None and "\n" not in outcome.reason
    assert outcome.repairs[0].generated_after == outcome.repairs[0].generated_before
    return outcome.reason


def test_no_solution_is_refused_with_the_solvers_reason(fault):
    lm, case, _ = fault
    assert refused(lm, case, lambda *_: Solution("x", None, reason="too hard")) == "too hard"


def test_a_solution_that_does_not_generate_the_target_is_refused(fault):
    """Whatever a solver claims, generation decides."""
    lm, case, _ = fault
    edit = P.make_edit(lm, 0, 0, {"out": torch.zeros(32)})
    liar = Solution("liar", P.Patch((edit,), P.identity(lm)), margin_min=99.0)
    assert "instead of" in refused(lm, case, lambda *_: liar)


def test_too_many_neurons_are_refused(fault):
    lm, case, _ = fault
    edits = tuple(P.make_edit(lm, 0, i, {"out": torch.zeros(32)}) for i in range(3))
    greedy = Solution("greedy", P.Patch(edits, P.identity(lm)))
    assert "needs 3 neurons, more than the 2 allowed" in refused(lm, case, lambda *_: greedy)


def test_changes_of_whole_matrices_are_refused(fault):
    lm, case, _ = fault
    reason = refused(lm, case, lambda *_: Solution("lora", TensorChange({}, {})))
    assert "no patch file can hold" in reason


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_exception_in_the_solver_leaves_the_model_as_it_was(fault, error):
    lm, case, _ = fault
    clean = weights_of(lm)

    def failing(*_):
        raise error

    with pytest.raises(error):
        repair(lm, [case], WISHES, failing)
    assert same_bits(clean, weights_of(lm))


@pytest.mark.parametrize("where", ["mint.session.verify", "mint.session.specificity.compare"])
def test_an_interrupt_while_the_edit_is_in_takes_it_out(fault, monkeypatch, where):
    lm, case, undo = fault
    clean, solve = weights_of(lm), undoing(undo)

    def interrupted(*_, **__):
        assert not same_bits(clean, weights_of(lm))
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        repair(lm, [case], WISHES, solve)
    assert same_bits(clean, weights_of(lm))


def test_several_cases_become_one_patch_that_does_all():
    lm = tiny_lm("llama")
    cases, undo = planted(lm, n=4)
    clean = weights_of(lm)
    outcome = repair(lm, cases, WISHES, undoing(undo))
    assert same_bits(clean, weights_of(lm))
    done = [r.case for r in outcome.repairs if r.success]
    assert done
    with P.applied(lm, outcome.patch):
        for case in done:
            assert lm.write(lm.encode(case, "none"), case) == case.target
    shown = outcome_as_dict(outcome, "x")
    assert [c["id"] for c in shown["cases"]] == [c.id for c in cases]
    assert shown["success"] is all(c["success"] for c in shown["cases"])


def test_a_repair_that_breaks_an_earlier_one_is_refused():
    lm = tiny_lm("llama")
    cases, undo = planted(lm, n=2)
    solve, calls = undoing(undo), []

    def hostile(model, problem, settings):
        calls.append(problem)
        if len(calls) == 1:
            return solve(model, problem, settings)
        best = solve(model, problem, settings)
        edits = best.change.edits if best.change else ()
        # Undo the first repair on the way.
        back = tuple(
            P.NeuronEdit(e.layer, e.index, e.kind, dict(e.after), dict(e.before)) for e in first.edits
        )
        return Solution("hostile", P.Patch((*edits, *back), P.identity(model)))

    first = repair(lm, cases[:1], WISHES, solve).patch
    other = replace(cases[1], target="~~~")
    outcome = repair(lm, [cases[0], other], WISHES, hostile)
    assert outcome.repairs[0].success and not outcome.repairs[1].success
    assert calls[1].earlier == (lm.encode(cases[0], "none"),)
    assert calls[1].used == {(e.layer, e.index) for e in first.edits}
    assert f"case '{other.id}'" in outcome.reason


def test_what_is_kept_is_verified(fault):
    lm, case, undo = fault
    kept = [Keep(f"{a} ") for a in "abcdefghijklmnopqrstuvwxyz"]
    prompts = [lm.encode_prompt(k.prompt) for k in kept]
    before = lm.generate(prompts, 3)
    with P.applied(lm, repair(lm, [case], WISHES, undoing(undo)).patch):
        after = lm.generate(prompts, 3)
    moved = [k for k, a, b in zip(kept, before, after, strict=True) if a != b]
    assert moved, "the planted repair changes nothing else; choose another seed"
    reason = refused(lm, replace(case, keep=(moved[0],)), undoing(undo))
    assert reason.startswith("the edit breaks keep")
    assert "breaks keep" in refused(lm, case, undoing(undo), replace(WISHES, keep=(moved[0],)))


def test_a_kept_target_that_does_not_hold_is_an_error(fault):
    lm, case, undo = fault
    with pytest.raises(CaseError, match="only what holds now can be kept"):
        repair(lm, [replace(case, keep=(Keep("ab = ", "~~~"),))], WISHES, undoing(undo))


def test_contradictions_are_found_before_solving(lm):
    def check(cases, wishes=WISHES):
        check_contradictions(lm, cases, [lm.encode(c, wishes.stop) for c in cases], wishes)

    a = Case("a", "p ", "one")
    with pytest.raises(CaseError, match="case 'a' and case 'b' contradict each other"):
        check([a, Case("b", "p ", "two")])
    with pytest.raises(CaseError, match="contradict each other"):
        check([a, Case("b", "p on", "x")])  # the same text, reached with more of it in the prompt
    with pytest.raises(CaseError, match="contradict"):
        check([replace(a, keep=(Keep("p ", "two"),))])
    with pytest.raises(CaseError, match="contradict"):
        check([a], replace(WISHES, keep=(Keep("p ", "two"),)))
    check([a, Case("b", "p ", "one more")])
    check([a, Case("b", "p on", "e more")])
    check([a, Case("b", "q ", "two")])


def test_bad_cases_are_found_before_anything_is_solved(lm):
    def never(*_):
        raise AssertionError("nothing should be solved")

    for bad, message in [
        (Case("b", "p", ""), "target is empty"),
        (Case("b", "p" * 5000, "x"), "context"),
        (Case("b", "p", "x" * 5000), "context"),
    ]:
        with pytest.raises(CaseError, match=message):
            repair(lm, [Case("a", "p", "q\n"), bad], WISHES, never)


def test_the_repair_is_verified_in_other_dtypes(fault):
    lm, case, undo = fault
    clean = weights_of(lm)
    outcome = repair(lm, [case], replace(WISHES, verify_dtypes=("float32",)), undoing(undo))
    assert outcome.success
    with pytest.raises(MintError, match="unknown dtype 'int3'"):
        repair(lm, [case], replace(WISHES, verify_dtypes=("int3",)), undoing(undo))
    assert same_bits(clean, weights_of(lm)) and lm.dtype == torch.float32


def test_a_repair_that_fails_in_another_dtype_is_refused(fault, monkeypatch):
    lm, case, undo = fault

    @contextmanager
    def other(model, dtype):
        assert dtype == torch.bfloat16
        model.write = lambda *_, **__: "something else"
        yield
        del model.write

    monkeypatch.setattr("mint.session.in_dtype", other)
    reason = refused(lm, case, undoing(undo), replace(WISHES, verify_dtypes=("bfloat16",)))
    assert "holds in float32, but in bfloat16" in reason


def test_the_json_keys_of_the_contract(fault):
    lm, case, undo = fault
    shown = json.loads(json.dumps(outcome_as_dict(repair(lm, [case], WISHES, undoing(undo)), "fix.st")))
    assert shown["success"] is True and shown["reason"] is None and shown["patch"] == "fix.st"
    assert shown["generated_after"] == shown["target"] == case.target != shown["generated_before"]
    assert shown["neurons"] == [
        {"layer": n["layer"], "index": n["index"], "kind": "rewrite"} for n in shown["neurons"]
    ]
    assert 1 <= len(shown["neurons"]) <= 2
    assert shown["margin_min"] > 0 and shown["seconds"] > 0
    assert 0 <= shown["specificity"]["argmax_unchanged"] <= 1 and shown["specificity"]["kl_mean"] >= 0
    steps = [shown["timing"][s] for s in ("generate", "solve", "verify")]
    assert sum(steps) == pytest.approx(shown["seconds"], abs=1e-3)


def test_explanations_are_carried_along_and_not_timed_as_repair(fault):
    lm, case, undo = fault
    clean, seen = weights_of(lm), []

    def attribute(model, problem):
        seen.append(problem.case)
        return "blame"

    def judge(model, problem, patch):
        assert same_bits(clean, weights_of(model)), "the patch is judged while it is not applied"
        seen.append(patch)
        return "carrier"

    (one,) = repair(lm, [case], WISHES, undoing(undo), attribute=attribute, verdict=judge).repairs
    assert seen == [case, one.patch] and (one.attribution, one.verdict) == ("blame", "carrier")
    assert list(one.timing) == ["generate", "attribute", "solve", "verify", "verdict"]
    assert one.seconds == sum(one.timing[s] for s in ("generate", "solve", "verify"))


def test_what_is_cached_per_model_is_prepared_once_and_not_timed_as_repair():
    lm = tiny_lm("llama")
    cases, undo = planted(lm, n=3)
    calls = []
    repairs = repair(lm, cases, WISHES, undoing(undo), prepare=calls.append).repairs
    assert calls == [lm] and ["statistics" in r.timing for r in repairs] == [True, False, False]
    assert repairs[0].seconds == sum(t for s, t in repairs[0].timing.items() if s != "statistics")


def test_settings_reach_the_solver(fault):
    lm, case, _ = fault
    seen = []

    def solve(model, problem, settings):
        seen.append(settings)
        return Solution("x", None, reason="no")

    wishes = replace(WISHES, settings=Settings(max_neurons=1, margin=2.5, seed=7))
    repair(lm, [case], wishes, solve)
    assert seen == [wishes.settings]


def test_a_repair_reports_contexts_wordings_and_near_misses():
    lm = tiny_lm("llama")
    cases, patches = planted(lm)
    outcome = repair(
        lm, cases, replace(WISHES, contexts=True), lambda *_: Solution("fake", P.compose(patches))
    )
    found = outcome_as_dict(outcome, None)
    assert found["success"] and found["contexts"]["imports"]["cases"] == 1
    assert set(found["near_misses"]) == {"cases", "became_target", "changed"}
    assert found["cases"][0]["contexts"] == found["contexts"]
    without = outcome_as_dict(
        repair(lm, cases, WISHES, lambda *_: Solution("fake", P.compose(patches))), None
    )
    assert without["contexts"] is None and without["near_misses"] is None


def test_reference_text_is_not_measured_on_and_not_copied_into_the_patch(fault, tmp_path):
    lm, case, undo = fault
    own = tmp_path / "private" / "own.txt"
    own.parent.mkdir()
    own.write_text("ghp_secret = 'a word that stands nowhere else'\n" * 3)
    plain = repair(lm, [case], WISHES, undoing(undo))
    outcome = repair(lm, [case], replace(WISHES, settings=Settings(reference=(str(own),))), undoing(undo))
    assert outcome.specificity.tokens == plain.specificity.tokens
    raw = P.to_bytes(outcome.patch)
    assert b"secret" not in raw and b"nowhere else" not in raw and str(tmp_path).encode() not in raw
    (recorded,) = outcome.patch.info["settings"]["reference"]
    assert recorded["name"] == "own.txt" and len(recorded["sha256"]) == 64


def test_a_patch_names_mint_and_the_reference_text(fault, tmp_path):
    import mint

    lm, case, undo = fault
    own = tmp_path / "own.txt"
    own.write_text("def f(): return 1\n")
    one = repair(lm, [case], WISHES, undoing(undo)).patch
    assert one.info["versions"]["mint"] == mint.__version__ and len(one.info["reference"]) == 64
    other = repair(lm, [case], replace(WISHES, settings=Settings(reference=(str(own),))), undoing(undo)).patch
    assert other.info["reference"] != one.info["reference"]
