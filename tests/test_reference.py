"""Statistics on reference text: numbers against plain code, how much runs, and what goes to the cache."""

import pytest
import torch

from mint.model import precision
from mint.model.hooks import record
from mint.model.loading import cache_dir
from mint.patch import Patch, apply, identity, make_edit, revert
from mint.reference import moments, reference_lines, reference_texts, sample_layers, statistics
from mint.reference.texts import passages
from tests.conftest import tiny_lm


@pytest.fixture(autouse=True)
def _little_text(monkeypatch):
    monkeypatch.setattr(moments, "PASSAGE_TOKENS", 700)
    monkeypatch.setattr(moments, "LINE_TOKENS", 300)
    monkeypatch.setattr(precision, "in_hardware", lambda: False)


def files():
    return sorted(
        str(p.relative_to(cache_dir())) for p in (cache_dir() / "statistics").rglob("*.safetensors")
    )


@torch.no_grad()
def plain(lm, layer, sequences):
    """Block inputs and activations [tokens, ...] of a layer, one sequence at a time, without padding or early ends."""
    inputs, neurons = [], []
    for ids in sequences:
        seen = []
        handle = lm.module(lm.block(layer).gate.module).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        with record(lm, [layer]) as found:
            lm.model(input_ids=torch.tensor([ids]))
        handle.remove()
        inputs.append(seen[0].reshape(len(ids), -1))
        neurons.append(found[layer][0])
    return inputs, neurons


def test_the_moments_are_those_of_plain_forwards(any_lm):
    lm, layer = any_lm, 1
    stats = statistics(lm)
    sequences = moments._chosen(lm, reference_texts(), len(reference_texts()))
    inputs, neurons = plain(lm, layer, sequences)
    x, n = torch.cat(inputs), torch.cat(neurons)
    inner = torch.cat([part[1:] for part in neurons])
    close = {"atol": 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(stats.inputs_second[layer], x.T @ x / len(x), **close)
    torch.testing.assert_close(stats.inputs_mean[layer], x.mean(0), **close)
    torch.testing.assert_close(stats.neurons_mean[layer], inner.mean(0), **close)
    torch.testing.assert_close(stats.neurons_square[layer], inner.square().mean(0), **close)
    torch.testing.assert_close(stats.neurons_energy[layer], n.square().mean(0), **close)
    assert stats.tokens == len(x)
    assert len(stats.neurons_mean) == len(list(stats.neurons_mean)) == lm.n_layers


def test_single_inputs_are_those_of_passages_and_lines(lm):
    rows = statistics(lm).sample[1].float()
    lines = moments._spread(passages(lm, reference_lines()), 300)
    wanted, _ = plain(lm, 1, [lines[0], lines[-1]])
    for row in torch.cat(wanted):
        assert float((rows - row).abs().amax(1).min()) < 1e-2
    assert len(rows) == statistics(lm).tokens + sum(map(len, lines))


def test_what_lies_beyond_is_the_rest_of_the_text_and_measured_when_it_is_read(lm):
    stats = statistics(lm)
    stats.measure([1], [])
    assert not any("beyond" in name for name in files())
    rest = moments._left_out(lm, reference_texts())
    wanted, _ = plain(lm, 1, rest)
    found = stats.beyond[1].float()
    assert len(found) == sum(map(len, rest)) == len(torch.cat(wanted))
    for row in (wanted[0][-1], wanted[-1][-1]):
        assert float((found - row).abs().amax(1).min()) < 1e-2
    every = {tuple(ids) for ids in (*passages(lm, reference_texts()), *passages(lm, reference_lines()))}
    taken = moments._chosen(lm, reference_texts(), len(reference_texts())) + moments._lines(lm)
    assert {tuple(ids) for ids in taken} | set(rest) == every
    assert not {tuple(ids) for ids in taken} & set(rest)
    assert f"statistics/{stats.key}/beyond-1.safetensors" in files()


def test_nothing_above_the_topmost_layer_runs_and_no_unembedding(lm):
    def never(*_):
        raise AssertionError("ran a module that nobody asked for")

    for name in (f"{lm.layout.layers}.2", lm.layout.unembedding):
        lm.module(name).register_forward_pre_hook(never)
    stats = statistics(lm, cache=False)
    stats.measure([0, 1], [1])
    assert stats.sample[1].shape[1] == stats.inputs_mean[1].shape[0] == 32
    assert stats.neurons_mean[1].shape == (64,)


def test_a_layer_is_measured_when_it_is_read_and_only_then(lm):
    stats = statistics(lm)
    stats.measure([1], [1])
    key = stats.key
    assert files() == [f"statistics/{key}/inputs-1.safetensors", f"statistics/{key}/neurons-1.safetensors"]
    assert stats.sample.get(0) is not None and 0 in stats.sample and 9 not in stats.sample
    assert f"statistics/{key}/inputs-0.safetensors" in files()
    with pytest.raises(IndexError, match="layers 0 to 2"):
        stats.inputs_mean[3]


def test_a_second_process_reads_the_cache(monkeypatch):
    wanted = statistics(tiny_lm())
    one = [wanted.inputs_second[1], wanted.neurons_energy[1], wanted.sample[1]]
    monkeypatch.setattr(moments, "_measure", None)
    again = statistics(tiny_lm())
    two = [again.inputs_second[1], again.neurons_energy[1], again.sample[1]]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_damaged_cache_is_measured_anew(lm):
    wanted = statistics(lm).inputs_mean[1]
    for name in files():
        (cache_dir() / name).write_bytes(b"damaged")
    assert torch.equal(statistics(tiny_lm()).inputs_mean[1], wanted)


def test_a_patched_model_never_fills_the_cache_of_the_clean_one(lm):
    clean = statistics(tiny_lm(), cache=False).inputs_mean[2]
    stats = statistics(lm)
    stats.measure([0], [])
    patch = Patch((make_edit(lm, 0, 3, {"out": torch.full((32,), 5.0)}),), identity(lm))
    apply(lm, patch)
    assert not torch.allclose(stats.inputs_mean[2], clean, atol=1e-3)
    assert files() == [f"statistics/{stats.key}/inputs-0.safetensors"]
    revert(lm, patch)
    assert torch.equal(statistics(tiny_lm()).inputs_mean[2], clean)


def test_a_model_that_was_patched_before_has_a_key_of_its_own(lm):
    key = statistics(tiny_lm()).key
    apply(lm, Patch((make_edit(lm, 0, 3, {"out": torch.full((32,), 5.0)}),), identity(lm)))
    assert statistics(lm).key != key


def test_text_is_bounded_and_spread(lm, tmp_path):
    own = tmp_path / "own.py"
    own.write_text("x = 1\n" * 2000)
    shipped, with_own = statistics(lm).tokens, statistics(lm, [own]).tokens
    assert 400 < shipped <= 900 and 400 < with_own - shipped <= 900
    chosen = moments._spread([[i] * 10 for i in range(100)], 200)
    assert [ids[0] for ids in chosen][:3] == [2, 7, 12] and len(chosen) == 20
    assert moments._spread([[1, 2]], 200) == [[1, 2]] and moments._spread([], 200) == []


def test_progress_is_told_in_tokens(lm):
    class Say:
        told = []

        def __call__(self, text):
            raise AssertionError(text)

        def progress(self, text, done, total):
            self.told.append((done, total))

    statistics(lm, (), Say(), cache=False).measure(sample_layers(lm), None)
    done, total = zip(*Say.told, strict=True)
    assert done[0] == 0 and done[-1] == total[-1] and list(done) == sorted(done)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_have_float32_statistics(dtype):
    half, whole = statistics(tiny_lm(dtype=dtype)), statistics(tiny_lm())
    assert half.inputs_second[1].dtype == torch.float32 and half.key != whole.key
    scale = whole.neurons_square[1].sqrt().mean()
    assert float((half.neurons_mean[1] - whole.neurons_mean[1]).abs().mean()) < 0.1 * scale


def test_a_cpu_with_bfloat16_instructions_uses_them_for_averages(any_lm, monkeypatch):
    exact = statistics(any_lm, cache=False)
    wanted = [exact.inputs_second[1], exact.neurons_mean[1], exact.neurons_energy[1], exact.inputs_mean[1]]
    monkeypatch.setattr(precision, "in_hardware", lambda: True)
    moments._MEMO.pop(any_lm.model)
    coarse = statistics(any_lm, cache=False)
    found = [coarse.inputs_second[1], coarse.neurons_mean[1], coarse.neurons_energy[1], coarse.inputs_mean[1]]
    assert coarse.key != exact.key
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm()) < 0.03 * float(b.norm())
    assert not any("forward" in module.__dict__ for module in any_lm.model.modules())
