"""scripts/habit_neurons.py on a tiny model: the neurons behind a habit, against replacing them by hand."""

import importlib.util
from pathlib import Path

import torch

from mint.model.hooks import override
from mint.rules.rule import Row, Rule
from tests.conftest import tiny_lm

SCRIPT = Path(__file__).parents[1] / "scripts" / "habit_neurons.py"


def script():
    spec = importlib.util.spec_from_file_location("habit_neurons", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rule(lm):
    prompts = [f"import time\nx{i} = time." for i in range(4)]
    rows = [
        Row("clock", "fault", p, "perf", "time", f"{i}.py", "learn", f"r{i}") for i, p in enumerate(prompts)
    ]
    return Rule("clock", tuple(rows))


def test_the_listed_effects_are_those_of_replacing_the_neuron():
    lm, s = tiny_lm(), script()
    reference = s.Reference(lm, 200)
    found = s.ranked(lm, rule(lm), reference, limit=3, top=4)
    assert found["prompts"] == 3 and len(found["neurons"]) == 4
    places = s.faults_of(lm, rule(lm), 3)
    for n in found["neurons"]:
        layer, index, changes = n["layer"], n["index"], []
        for encoded, fault in places:
            ids = encoded.ids[: fault.position + 1]

            def replaced(x, layer=layer, index=index):
                x = x.clone()
                x[:, -1, index] = reference.mean[layer][index]
                return x

            def lead(fault=fault, ids=ids):
                logits = lm.logits([ids], [[len(ids) - 1]])[0]
                return float(logits[fault.wrong] - logits[fault.desired])

            with torch.no_grad():
                before = lead()
                with override(lm, {layer: replaced}):
                    changes.append(lead() - before)
        assert abs(sum(changes) / len(changes) - n["exact"]) < 2e-3
        assert len(n["fires"]) >= 1 and len(n["promotes"]) == len(n["suppresses"]) == 5
    assert found["neurons"][0]["linear"] == min(n["linear"] for n in found["neurons"]) < 0


def test_tables_survive_what_a_model_writes():
    s = script()
    n = {"layer": 1, "index": 2, "linear": -0.5, "exact": -0.4, "among_ten": 3, "selectivity": 9.0}
    n |= {"promotes": ["a|b", "\n"], "suppresses": ["`"], "fires": [{"text": ["x\n", "|", " y"]}]}
    found = {"model": "m", "rules": [{"wrong": "a(", "right": "b(", "prompts": 4, "difference": 2.0, "together": -1.0, "neurons": [n]}]}  # fmt: skip
    row = next(line for line in s.tables(found).splitlines() if line.startswith("| 1.2"))
    assert row.count("|") == 7 and "`a¦b` `⏎`" in row
    assert "`x⏎` **`¦`** ` y`" in s.tables(found)
