"""Exported adapters give the logits of the patched model; what cannot be exported is refused in one line."""

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from mint import patch as P
from mint.case import Case
from mint.errors import PatchError
from mint.patch.export import low_rank_changes, to_gguf_lora, to_mlx, to_peft
from mint.patch.names import block_of, describe
from mint.rules.solve import solve_rule
from mint.solver import in_contexts
from mint.solver.problem import Problem, Settings
from mint.solver.solve import solve
from tests.conftest import FAMILIES, tiny_lm
from tests.test_rule_solver import QUICK, rule

IDS = [5, 40, 77, 12, 200, 9]
PLACES = ((1, 7, "rewrite"), (1, 9, "value"), (2, 3, "value"))


def exportable(lm, places=PLACES):
    """Random edits that leave biases alone, with the layout that `mint repair` writes into a patch."""
    torch.manual_seed(3)
    edits = []
    for layer, index, kind in places:
        now = P.read_neuron(lm, layer, index)
        roles = ("out",) if kind == "value" else tuple(now)
        after = {r: now[r] if r.endswith("bias") else torch.randn(now[r].shape) for r in roles}
        edits.append(P.make_edit(lm, layer, index, after))
    return P.Patch(tuple(edits), P.identity(lm) | {"layout": describe(lm)}, {})


def test_the_layout_survives_its_description(any_lm):
    described = json.loads(json.dumps(describe(any_lm)))
    assert len(described["blocks"]) == 1
    for block in any_lm.layout.blocks:
        assert block_of(described, block.layer) == block


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_low_rank_change_is_the_change(family):
    lm = tiny_lm(family)
    patch = exportable(lm)
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    with P.applied(lm, patch):
        after = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    changes = low_rank_changes(patch)
    for module, change in changes.items():
        delta = after[f"{module}.weight"] - before[f"{module}.weight"]
        delta = delta.T if change.transposed else delta
        torch.testing.assert_close(change.b @ change.a, delta, atol=0, rtol=0)
    moved = {n.removesuffix(".weight") for n in before if not torch.equal(before[n], after[n])}
    assert moved == set(changes)


def solved(lm):
    """A rewrite that the solver makes, and its case."""
    case = Case("c", "# sort the list of names in place\n", "ok\n")
    problem = Problem(case, lm.encode(case))
    solution = solve(lm, problem, Settings(where="idle"))
    assert solution.change is not None, solution.reason
    patch = solution.change
    assert any(e.kind == "rewrite" for e in patch.edits)
    return replace(patch, base=patch.base | {"layout": describe(lm)}), problem


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_the_solver_makes_is_exported_for_every_family(family, tmp_path):
    """Biases stay, so the adapter holds all of it: the same logits in peft, also merged, and the target written."""
    lm = tiny_lm(family)
    patch, problem = solved(lm)
    with P.applied(lm, patch):
        wanted = lm.logits([problem.encoded.ids], [problem.encoded.positions])
    to_peft(patch, tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(lm.model, tmp_path / "adapter")
    ids, places = torch.tensor([problem.encoded.ids]), problem.encoded.positions
    scale = float(wanted.abs().max())
    with torch.no_grad():
        found = adapted(ids).logits[0, places]
        torch.testing.assert_close(found, wanted, atol=1e-4 * scale, rtol=1e-4)
        assert found.argmax(1).tolist() == list(problem.encoded.target)
        merged = adapted.merge_and_unload()(ids).logits[0, places]
        torch.testing.assert_close(merged, wanted, atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "gemma2", "gpt2", "starcoder2"])
def test_the_patch_of_a_rule_is_exported(family, tmp_path):
    """A rule's patch in peft, also merged: the logits of the patched model."""
    lm = tiny_lm(family, 1)
    learn, keep = rule(lm, 8)
    patch = solve_rule(lm, learn, keep, QUICK).change
    assert patch is not None and any(e.kind == "rewrite" for e in patch.edits)
    same_in_peft(lm, patch, learn[0].ids, tmp_path / "adapter")


@pytest.mark.parametrize("family", ["llama", "gpt2", "starcoder2"])
def test_the_patch_of_a_case_learnt_in_contexts_is_exported(family, tmp_path):
    lm = tiny_lm(family, 1)
    case = Case("c", "# sort the list\n", "xy")
    problem = Problem(case, lm.encode(case, "none"))
    found = in_contexts.solve(lm, problem, Settings(generalize=1.0))
    assert found.details["contexts"] and found.change is not None
    same_in_peft(lm, found.change, problem.encoded.ids, tmp_path / "adapter")


def same_in_peft(lm, patch, ids, folder):
    """The adapter gives the logits of the patched model, also merged. The model holds it afterwards."""
    patch = replace(patch, base=patch.base | {"layout": describe(lm)})
    sequence = torch.tensor([ids])
    with torch.no_grad():
        with P.applied(lm, patch):
            wanted = lm.model(sequence).logits
        to_peft(patch, folder)
        adapted = PeftModel.from_pretrained(lm.model, folder)
        scale = float(wanted.abs().max())
        close = {"atol": 1e-4 * scale, "rtol": 1e-4}
        torch.testing.assert_close(adapted(sequence).logits, wanted, **close)
        torch.testing.assert_close(adapted.merge_and_unload()(sequence).logits, wanted, **close)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "qwen2", "starcoder2"])
def test_peft_loads_it_and_writes_the_same_logits(family, tmp_path):
    lm = tiny_lm(family)
    patch = exportable(lm)
    with torch.no_grad():
        with P.applied(lm, patch):
            wanted = lm.model(torch.tensor([IDS])).logits
        clean = lm.model(torch.tensor([IDS])).logits
        to_peft(patch, tmp_path / "adapter")
        adapted = PeftModel.from_pretrained(lm.model, tmp_path / "adapter")
        found = adapted(torch.tensor([IDS])).logits
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
        assert (clean - wanted).abs().max() > 0.1
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(torch.tensor([IDS])).logits, wanted, atol=2e-4, rtol=1e-4)


def test_a_changed_bias_cannot_be_exported(tmp_path, plain_lm):
    now = P.read_neuron(plain_lm, 0, 0)
    edit = P.make_edit(plain_lm, 0, 0, now | {"gate_bias": torch.tensor(9.0)})
    patch = P.Patch((edit,), P.identity(plain_lm) | {"layout": describe(plain_lm)}, {})
    for write in (to_peft, to_gguf_lora):
        with pytest.raises(PatchError, match="changes a bias, which a LoRA adapter cannot hold"):
            write(patch, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_patch_without_names_asks_for_the_model(tmp_path, lm):
    patch = exportable(lm)
    bare = replace(patch, base=P.identity(lm))
    for bad in (bare, replace(patch, base=bare.base | {"layout": {"layers": 3, "blocks": [{"gate": 3}]}})):
        with pytest.raises(PatchError, match="give --model"):
            to_peft(bad, tmp_path / "x")
    to_peft(bare, tmp_path / "x", layout=describe(lm))


def test_a_patch_that_changes_nothing_is_refused(tmp_path, lm):
    with pytest.raises(PatchError, match="nothing to export"):
        to_peft(P.scale(exportable(lm), 0), tmp_path / "x")


def test_existing_output_is_kept_without_force(tmp_path, lm):
    patch = exportable(lm)
    out = to_peft(patch, tmp_path / "adapter")
    with pytest.raises(PatchError, match="--force"):
        to_peft(patch, out)
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    to_peft(patch, out, force=True)
    assert first == {p.name: p.read_bytes() for p in out.iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(PatchError, match="holds something else"):
        to_peft(patch, tmp_path / "mine", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "mine"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen2", "mistral", "gpt_neox"])
def test_gguf_adapters_read_back(family, tmp_path):
    lm = tiny_lm(family)
    patch = exportable(lm)
    path = to_gguf_lora(patch, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(path)

    def value(key):
        return reader.fields[key].contents()

    assert value("general.type") == "adapter" and value("adapter.type") == "lora"
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    rank = next(iter(tensors.values())).shape[0]
    assert value("adapter.lora.alpha") == rank
    products = {
        n.removesuffix(".lora_a"): tensors[n.removesuffix("a") + "b"] @ tensors[n]
        for n in tensors
        if n.endswith(".lora_a")
    }
    assert len(products) * 2 == len(tensors)
    changes = low_rank_changes(patch)
    wanted = sorted(((c.b @ c.a).numpy() for c in changes.values()), key=lambda m: (m.shape, m.sum()))
    found = sorted(products.values(), key=lambda m: (m.shape, m.sum()))
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert "blk.2.ffn_down.weight" in products


def test_gguf_refuses_what_llama_cpp_does_not_know(tmp_path):
    lm = tiny_lm("codegen")
    with pytest.raises(PatchError, match="no architecture for model type 'codegen'"):
        to_gguf_lora(exportable(lm), tmp_path / "a.gguf")


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "gemma2"])
def test_mlx_adapters_hold_the_same_numbers(family, tmp_path):
    """mlx-lm adds scale * (x @ lora_a) @ lora_b to a layer's output, counting adapted layers from the last."""
    lm = tiny_lm(family)
    patch = exportable(lm)
    out = to_mlx(patch, tmp_path / "mlx")
    config = json.loads((out / "adapter_config.json").read_text())
    tensors = load_file(out / "adapters.safetensors")
    rank = config["lora_parameters"]["rank"]
    assert config["fine_tune_type"] == "lora" and config["lora_parameters"]["scale"] == 1.0
    assert config["num_layers"] == 2  # layers 1 and 2 of 3
    assert {n.rpartition(".")[0] for n in tensors} == set(low_rank_changes(patch))
    for module, change in low_rank_changes(patch).items():
        a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
        assert a.shape[1] == b.shape[0] == rank
        assert any(module.endswith("." + key) for key in config["lora_parameters"]["keys"])
        torch.testing.assert_close((a @ b).T, change.b @ change.a, atol=0, rtol=0)


def test_a_trigger_goes_into_the_gguf_adapter(tmp_path, lm):
    path = to_gguf_lora(exportable(lm), tmp_path / "a.gguf", trigger=[5, 6])
    assert gguf.GGUFReader(path).fields["adapter.alora.invocation_tokens"].contents() == [5, 6]


@pytest.mark.parametrize(("needed", "scale", "code"), [(1.0, 1.0, 0), (1.4, 1.5, 0), (9.0, 1.0, 3)])
def test_the_margin_is_raised_as_far_as_a_quantised_file_needs(
    tmp_path, lm, monkeypatch, capsys, needed, scale, code
):
    """A stand-in for llama.cpp that wants the patch at a larger scale."""
    from mint.cli import main
    from mint.patch import consumer
    from mint.patch.record import Answer

    def ask(model, adapter, patch):
        case = Case("c", "p", "t\n")
        return [Answer(case, "t\n" if patch.info.get("scaled", 1.0) >= needed else "no\n")]

    monkeypatch.setattr(consumer, "check_library", lambda: None)
    monkeypatch.setattr(consumer, "ask_llama_cpp", ask)
    patch = exportable(lm)
    file, out = P.save(patch, tmp_path / "fix.safetensors"), tmp_path / "fix.gguf"
    options = ["--format", "gguf-lora", "--out", str(out), "--verify-gguf", "model.gguf", "--json"]
    assert main(["export", str(file), *options]) == code
    said = capsys.readouterr()
    assert json.loads(said.out)["scale"] == scale
    assert code == 0 or "even at scale 2" in said.err
    wanted = to_gguf_lora(P.scale(patch, scale), tmp_path / "wanted.gguf")
    assert out.read_bytes() == wanted.read_bytes()


@pytest.mark.real
@pytest.mark.llamacpp
def test_llama_cpp_writes_the_target_with_the_adapter(tmp_path, real_lm, capsys):
    """The built-in model's own GGUF file (four bits), the exported adapter, and llama.cpp itself."""
    pytest.importorskip("llama_cpp")
    from mint.cli import main
    from mint.model.loading import fetch_builtin

    case = Case("c", "# sort list l in descending order\n", "l.sort(reverse=True)\n")
    solution = solve(real_lm, Problem(case, real_lm.encode(case)), Settings())
    record = {"id": "c", "prompt": case.prompt, "target": case.target}
    patch = replace(
        solution.change, base=solution.change.base | {"layout": describe(real_lm)}, info={"cases": [record]}
    )
    file = P.save(patch, tmp_path / "fix.safetensors")
    model = fetch_builtin(tmp_path)
    out = ["--out", str(tmp_path / "fix.gguf"), "--verify-gguf", str(model), "--json"]
    assert main(["export", str(file), "--format", "gguf-lora", *out]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["cases"]
    assert answer["written"] == case.target
    nothing = replace(
        patch,
        edits=tuple(replace(e, after=e.before | {"out": e.before["out"] * 1.0001}) for e in patch.edits),
    )
    file = P.save(nothing, tmp_path / "nothing.safetensors")
    out = ["--out", str(tmp_path / "nothing.gguf"), "--verify-gguf", str(model)]
    assert main(["export", str(file), "--format", "gguf-lora", *out]) == 3
    assert "llama.cpp writes" in capsys.readouterr().err
