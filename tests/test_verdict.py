"""The verdict on circuits whose truth is known: a cause removed, a dormant path pressed into service, a rewrite."""

import json

import pytest
import torch

from mint.attribution import verdict
from mint.attribution.faults import Fault
from mint.attribution.verdict import _label
from mint.case import Case
from mint.errors import CaseError, PatchError
from mint.model.lm import Encoded
from mint.patch import NeuronEdit, Patch, apply, make_edit, read_neuron
from tests.conftest import same_bits, tiny_lm, weights_of
from tests.test_attribution import flat_statistics
from tests.test_attribution_exact import (
    DESIRED,
    IDS,
    WRONG,
    blank_lm,
    orthogonal,
    plant,
    token,
    towards_wrong,
)

CASE = Case("a", "hello w", "orld!")
ENCODED = Encoded(tuple(IDS), (DESIRED,))
FAULTS = [Fault(2, WRONG, DESIRED, 0.0)]


@pytest.fixture(autouse=True)
def _few_passages(monkeypatch):
    monkeypatch.setattr("mint.attribution.references.PASSAGES", 3)


def guilty_lm():
    """Neuron (1, 7) fires at the last token and writes the wrong one; the rest of its layer is silent but not dead."""
    lm = blank_lm()
    plant(lm, 1, 7, token(lm), token(lm), 0.03 * towards_wrong(lm))
    others = orthogonal(lm, 20)
    for index, direction in enumerate(others, start=10):
        plant(lm, 1, index, token(lm) + direction, token(lm), 0.0005 * direction)
    return lm


def judged(lm, patch, **options):
    stats = flat_statistics(lm)
    zero = [torch.zeros_like(m) for m in stats.neurons_mean]
    stats = type(stats)(**{**stats.__dict__, "neurons_mean": zero})
    return verdict(lm, CASE, patch, encoded=ENCODED, faults=FAULTS, stats=stats, **options)


def test_silencing_the_guilty_neuron_removes_the_cause():
    lm = guilty_lm()
    patch = Patch((make_edit(lm, 1, 7, {"out": torch.zeros(32)}),))
    found = judged(lm, patch)
    assert found.gain > 1.0
    assert found.cause["ratio"] == pytest.approx(1.0, abs=1e-3)
    assert found.layer["ratio"] > 0.5 and found.two_way["agree"]
    assert found.control["own_share"] == pytest.approx(1.0, abs=1e-3)
    assert found.readout["share"] > 0.5


def test_a_dormant_neuron_that_carries_the_repair_is_no_cause():
    """Makelov et al.: the neuron is active and can be made to act, but it had no part in the fault."""
    lm = guilty_lm()
    push = -0.03 * towards_wrong(lm) + read_neuron(lm, 1, 10)["out"]
    found = judged(lm, Patch((make_edit(lm, 1, 10, {"out": push}),)))
    assert found.gain > 1.0
    assert found.label == "carrier"
    assert abs(found.cause["ratio"]) < 0.05
    # Any neuron as active as this one would have done.
    assert found.control["median_share"] > 0.5
    assert any("ablating the edited neurons wins" in reason for reason in found.reasons)


def test_a_layer_that_cancels_the_edited_neuron_is_warned_of():
    lm = guilty_lm()
    plant(lm, 1, 40, token(lm), token(lm), -0.035 * towards_wrong(lm))  # outweighs the guilty one
    patch = Patch((make_edit(lm, 1, 7, {"out": torch.zeros(32)}),))
    found = judged(lm, patch)
    assert found.layer["ratio"] < 0.2
    assert found.label == "mixed" and any("cancel" in reason for reason in found.reasons)


def test_a_rewritten_idle_neuron_is_a_carrier_and_its_control_says_any_would_do():
    lm = guilty_lm()
    fire = token(lm).clone()
    after = {"gate": fire, "up": fire, "out": -0.03 * towards_wrong(lm)}
    found = judged(lm, Patch((make_edit(lm, 1, 50, after),)))
    assert found.label == "carrier"
    assert found.control["median_share"] == pytest.approx(1.0, abs=0.05)
    assert found.dormancy[0]["kind"] == "rewrite"


def test_a_patch_that_wins_nothing_says_so():
    lm = guilty_lm()
    patch = Patch((make_edit(lm, 1, 7, {"out": 0.04 * towards_wrong(lm)}),))
    found = judged(lm, patch)
    assert found.label == "no effect" and found.gain < 0


def test_two_edits_in_two_layers_are_judged_together():
    lm = guilty_lm()
    plant(lm, 2, 5, token(lm), token(lm), 0.03 * towards_wrong(lm))
    edits = (make_edit(lm, 1, 7, {"out": torch.zeros(32)}), make_edit(lm, 2, 5, {"out": torch.zeros(32)}))
    found = judged(lm, Patch(edits))
    assert found.cause["ratio"] == pytest.approx(1.0, abs=1e-3)
    assert len(found.dormancy) == 2 and found.control["own_share"] == pytest.approx(1.0, abs=1e-2)


def test_every_family_gets_a_verdict_and_its_model_back(any_lm):
    before = weights_of(any_lm)
    encoded = any_lm.encode(CASE)
    edit = make_edit(any_lm, 1, 5, {"out": read_neuron(any_lm, 1, 5)["out"] + 0.3})
    found = verdict(any_lm, CASE, Patch((edit,)), encoded=encoded, stats=flat_statistics(any_lm))
    assert same_bits(before, weights_of(any_lm))
    assert found.control["own_share"] is None or found.control["own_share"] == pytest.approx(1.0, abs=1e-2)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["thresholds"]["cause"] == 0.5


def test_the_control_reproduces_a_rewrite_in_every_family(any_lm):
    generator = torch.Generator().manual_seed(1)
    now = read_neuron(any_lm, 1, 5)
    after = {role: w + 0.3 * torch.randn(w.shape, generator=generator) for role, w in now.items()}
    found = verdict(any_lm, CASE, Patch((make_edit(any_lm, 1, 5, after),)), stats=flat_statistics(any_lm))
    assert abs(found.gain) > 1e-4
    assert found.control["own_share"] == pytest.approx(1.0, abs=1e-2)


def test_bf16_gets_a_verdict():
    lm = tiny_lm("llama", dtype=torch.bfloat16)
    edit = make_edit(lm, 1, 5, {"out": read_neuron(lm, 1, 5)["out"] + 0.3})
    assert verdict(lm, CASE, Patch((edit,)), stats=flat_statistics(lm)).faults > 0


def test_an_applied_patch_and_a_case_without_fault_are_refused():
    lm = guilty_lm()
    patch = Patch((make_edit(lm, 1, 7, {"out": torch.zeros(32)}),))
    right = int(lm.logits([IDS], [[2]])[0].argmax())
    with pytest.raises(CaseError, match="unpatched model writes the target"):
        verdict(lm, CASE, patch, encoded=Encoded(tuple(IDS), (right,)), stats=flat_statistics(lm))
    apply(lm, patch)
    with pytest.raises(PatchError, match="already applied"):
        judged(lm, patch)


def figures(cause=1.0, layer=1.0, agree=True, control=0.0, direction=1.0):
    return {
        "cause": {"ratio": cause},
        "layer": {"ratio": layer},
        "two_way": {"agree": agree},
        "control": {"median_share": control},
        "dormancy": [{"layer": 1, "direction_share": direction}],
    }


@pytest.mark.parametrize(
    ("label", "change"),
    [
        ("cause", {}),
        ("carrier", {"cause": 0.1}),
        ("carrier", {"cause": -0.5}),
        ("mixed", {"cause": 0.3}),
        ("mixed", {"agree": False}),
        ("mixed", {"layer": -0.1}),
        ("mixed", {"control": 0.9}),
        ("mixed", {"direction": 0.01}),
    ],
)
def test_the_label_follows_from_the_figures(label, change):
    found, reasons = _label(2.0, figures(**change))
    assert found == label and reasons


def test_edit_kinds_are_what_the_verdict_expects():
    lm = guilty_lm()
    edit = make_edit(lm, 1, 7, {"out": torch.zeros(32)})
    assert isinstance(edit, NeuronEdit) and edit.kind == "value"
