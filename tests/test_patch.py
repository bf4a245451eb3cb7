"""Patches: applied and reverted bit for bit, refused before anything is written, safe against damaged files."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors

from mint import patch as P
from mint.errors import PatchError
from mint.patch import edit
from tests.conftest import FAMILIES, same_bits, tiny_lm, weights_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_patch(lm, places=((1, 7, "rewrite"), (2, 3, "value")), seed=0, info=None):
    """Random finite edits at (layer, index, kind)."""
    generator = torch.Generator().manual_seed(seed)
    edits = []
    for layer, index, kind in places:
        now = P.read_neuron(lm, layer, index, ("out",) if kind == "value" else None)
        after = {r: torch.randn(v.shape, generator=generator) for r, v in now.items()}
        edits.append(P.make_edit(lm, layer, index, after))
    return P.Patch(tuple(edits), P.identity(lm), info or {})


def equal(a: P.Patch, b: P.Patch) -> bool:
    return P.to_bytes(a) == P.to_bytes(b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_revert_restores_every_bit(family, dtype):
    lm = tiny_lm(family, dtype=dtype)
    clean = weights_of(lm)
    patch = random_patch(lm)
    P.apply(lm, patch)
    assert not same_bits(clean, weights_of(lm))
    P.revert(lm, patch)
    assert same_bits(clean, weights_of(lm))


def test_only_the_named_neurons_change(lm):
    clean = weights_of(lm)
    patch = random_patch(lm, [(1, 7, "value")])
    with P.applied(lm, patch):
        changed = weights_of(lm)
    name = f"{lm.block(1).out}.weight"
    assert [n for n in clean if not torch.equal(clean[n], changed[n])] == [name]
    columns = (clean[name] != changed[name]).any(0).nonzero().flatten().tolist()
    assert columns == [7]


def test_an_exception_inside_leaves_no_edit(lm):
    clean = weights_of(lm)
    with pytest.raises(KeyboardInterrupt), P.applied(lm, random_patch(lm)):
        raise KeyboardInterrupt
    assert same_bits(clean, weights_of(lm))


def test_a_failure_half_way_takes_everything_back(lm, monkeypatch):
    clean, patch, real, calls = weights_of(lm), random_patch(lm), edit._view, []

    def failing(model, where):
        calls.append(where)
        if len(calls) == failing.at:
            raise KeyboardInterrupt
        return real(model, where)

    failing.at = 0
    monkeypatch.setattr(edit, "_view", failing)
    P.apply(lm, patch)
    total = len(calls)
    P.revert(lm, patch)
    for at in range(1, total + 1):
        calls.clear()
        failing.at = at
        with pytest.raises(KeyboardInterrupt):
            P.apply(lm, patch)
        assert same_bits(clean, weights_of(lm)), f"interrupted at write {at}"


def test_applying_twice_and_reverting_nothing_are_refused(lm):
    patch = random_patch(lm)
    with pytest.raises(PatchError, match="nothing to revert"):
        P.revert(lm, patch)
    P.apply(lm, patch)
    patched = weights_of(lm)
    with pytest.raises(PatchError, match="already applied"):
        P.apply(lm, patch)
    assert same_bits(patched, weights_of(lm))


def test_weights_that_moved_are_refused_and_left_alone(lm):
    patch = random_patch(lm)
    with torch.no_grad():
        lm.columns(2)[3, 0] += 1.0
    clean = weights_of(lm)
    with pytest.raises(PatchError, match="layer 2, neuron 3: the present weights differ"):
        P.apply(lm, patch)
    assert same_bits(clean, weights_of(lm))


def test_negative_zero_is_not_zero(lm):
    """Bits are compared, not values."""
    with torch.no_grad():
        lm.columns(0)[0].zero_()
    patch = random_patch(lm, [(0, 0, "value")])
    with torch.no_grad():
        lm.columns(0)[0, 0] = -0.0
    with pytest.raises(PatchError, match="differ"):
        P.apply(lm, patch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_lm("llama", seed=1), "made on another model"),
        (lambda: tiny_lm("mistral"), "made on another model"),
        (lambda: tiny_lm("llama", dtype=torch.bfloat16), "made in float32, the model is in bfloat16"),
    ],
)
def test_patches_of_other_models_are_refused(lm, make, message):
    other = make()
    clean = weights_of(other)
    with pytest.raises(PatchError, match=message):
        P.apply(other, random_patch(lm))
    assert same_bits(clean, weights_of(other))


def test_another_tokenizer_is_refused(lm):
    patch = random_patch(lm)
    lm.tokenizer.add_tokens(["<new>"])
    lm.__dict__.pop("tokenizer_hash", None)
    with pytest.raises(PatchError, match="another tokenizer"):
        P.apply(lm, patch)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: replace(e, layer=3), "layers 0 to 2"),
        (lambda e: replace(e, index=64), "neurons 0 to 63"),
        (lambda e: replace(e, before={"out": torch.zeros(31)}, after={"out": torch.zeros(31)}), "shape"),
        (
            lambda e: replace(
                e,
                before=e.before | {"up_bias": torch.tensor(0.0)},
                after=e.after | {"up_bias": torch.tensor(0.0)},
            ),
            "has no 'up_bias'",
        ),
    ],
)
def test_edits_that_do_not_fit_are_refused_before_any_write(lm, edit, message):
    patch = random_patch(lm, [(0, 0, "value"), (1, 7, "value")])
    bad = replace(patch, edits=(patch.edits[0], edit(patch.edits[1])))
    clean = weights_of(lm)
    with pytest.raises(PatchError, match=message):
        P.apply(lm, bad)
    assert same_bits(clean, weights_of(lm))


# ---------------------------------------------------------------------- algebra


def test_composing_equals_applying_in_order(lm):
    first = random_patch(lm, [(1, 7, "rewrite"), (0, 2, "value")], seed=1)
    clean = weights_of(lm)
    P.apply(lm, first)
    second = random_patch(lm, [(1, 7, "value"), (2, 5, "rewrite")], seed=2)
    P.apply(lm, second)
    both = weights_of(lm)
    P.revert(lm, second)
    P.revert(lm, first)
    composed = P.compose([first, second])
    assert [(e.layer, e.index, e.kind) for e in composed.edits] == [
        (0, 2, "value"),
        (1, 7, "rewrite"),
        (2, 5, "rewrite"),
    ]
    P.apply(lm, composed)
    assert same_bits(both, weights_of(lm))
    P.revert(lm, composed)
    assert same_bits(clean, weights_of(lm))


def test_composing_clashing_patches_is_refused(lm):
    with pytest.raises(PatchError, match="does not start where the earlier ends"):
        P.compose([random_patch(lm, seed=1), random_patch(lm, seed=2)])
    other = tiny_lm("llama", seed=1)
    with pytest.raises(PatchError, match="another model than patch 1"):
        P.compose([random_patch(lm), random_patch(other)])


def test_composing_one_patch_changes_nothing(lm):
    patch = random_patch(lm)
    assert P.to_bytes(replace(P.compose([patch]), info={})) == P.to_bytes(patch)


def test_scaling(lm):
    patch = random_patch(lm)
    clean = weights_of(lm)
    assert equal(replace(P.scale(patch, 1), info={}), patch)
    with P.applied(lm, P.scale(patch, 0)):
        assert same_bits(clean, weights_of(lm))
    half = P.scale(patch, 0.5)
    rewrite, value = half.edits
    old, new = patch.edits[1].before["out"], patch.edits[1].after["out"]
    torch.testing.assert_close(value.after["out"], (old + new) / 2)
    torch.testing.assert_close(rewrite.after["out"], patch.edits[0].after["out"] / 2)
    assert torch.equal(rewrite.after["gate"], patch.edits[0].after["gate"])
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(PatchError, match="finite"):
            P.scale(patch, bad)
    with pytest.raises(PatchError, match="overflows"):
        P.scale(patch, 3e38)


# ---------------------------------------------------------------------- file


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_patch_survives_its_file(tmp_path, dtype):
    lm = tiny_lm("gpt2", dtype=dtype)
    patch = random_patch(lm, info={"note": "ünïcode \n", "n": [1, 2.5, None]})
    P.save(patch, tmp_path / "a.safetensors")
    back = P.load(tmp_path / "a.safetensors")
    assert equal(back, patch) and back.info == patch.info and back.base == patch.base
    assert back.dtype == dtype
    assert (tmp_path / "a.safetensors").stat().st_size < 10_000


def test_the_same_patch_gives_the_same_bytes(lm):
    assert P.to_bytes(random_patch(lm)) == P.to_bytes(random_patch(lm))


def test_an_existing_file_is_kept_without_force(tmp_path, lm):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(PatchError, match="--force"):
        P.save(random_patch(lm), path)
    assert path.read_bytes() == b"mine"
    P.save(random_patch(lm), path, force=True)
    assert equal(P.load(path), random_patch(lm))


def test_a_full_disk_leaves_nothing(tmp_path, lm, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.safetensors"
    path.write_bytes(b"mine")
    monkeypatch.setattr("mint.files.os.fsync", full)
    with pytest.raises(PatchError, match="No space left on device"):
        P.save(random_patch(lm), path, force=True)
    assert path.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path, lm):
    with pytest.raises(PatchError, match="cannot write .*none/a.safetensors"):
        P.save(random_patch(lm), tmp_path / "none" / "a.safetensors")
    with pytest.raises(PatchError, match="cannot be read"):
        P.load(tmp_path / "none")


GOOD_VALUE = {"0.1.before.out": torch.zeros(4), "0.1.after.out": torch.ones(4)}
VALUE = [{"layer": 0, "index": 1, "kind": "value"}]


def crafted(tensors=None, header=None, **changes):
    full = {"format": 1, "edits": VALUE, "base": {}, "info": {}} | changes if header is None else header
    return save_tensors(GOOD_VALUE if tensors is None else tensors, {"mint": json.dumps(full)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short"),
        (b"\xff" * 40, "cut short"),
        (crafted()[:-3], "damaged"),
        (crafted() + b"tail", "damaged"),
        (save_tensors(GOOD_VALUE), "no readable 'mint' header"),
        (save_tensors(GOOD_VALUE, {"mint": "[" * 100_000}), "no readable 'mint' header"),
        (crafted(header=[1]), "format version None"),
        (crafted(format=99), "format version 99"),
        (crafted(edits=[]), "lists no edits"),
        (crafted(edits={}), "lists no edits"),
        (crafted(edits=["x"]), "an edit needs layer"),
        (crafted(edits=[{"layer": -1, "index": 1, "kind": "value"}]), "an edit needs layer"),
        (crafted(edits=[{"layer": True, "index": 1, "kind": "value"}]), "an edit needs layer"),
        (crafted(edits=[{"layer": 0.0, "index": 1, "kind": "value"}]), "an edit needs layer"),
        (crafted(edits=[{"layer": 0, "index": 1, "kind": "magic"}]), "an edit needs layer"),
        (crafted(edits=[{"layer": 0, "index": 1, "kind": []}]), "an edit needs layer"),
        (crafted(edits=VALUE * 2), "listed twice"),
        (crafted(GOOD_VALUE | {"9.9.after.out": torch.ones(4)}), "belongs to no listed edit"),
        (crafted({"0.1.before.out": torch.zeros(4)}), "must hold the same weights"),
        (crafted(GOOD_VALUE | {"0.1.after.out": torch.ones(5)}), "shape"),
        (crafted({k: v[None] for k, v in GOOD_VALUE.items()}), "shape"),
        (crafted(GOOD_VALUE | {"0.1.after.out": torch.tensor([1.0, 2.0, 3.0, float("nan")])}), "finite"),
        (crafted(GOOD_VALUE | {"0.1.after.out": torch.tensor([1.0, 2.0, 3.0, float("inf")])}), "finite"),
        (crafted({k: v.long() for k, v in GOOD_VALUE.items()}), "finite"),
        (crafted({k: v.double() for k, v in GOOD_VALUE.items()}), "must share one of"),
        (crafted(GOOD_VALUE | {"0.1.after.out": torch.ones(4).half()}), "must share one of"),
        (crafted(base=3), "'base' and 'info'"),
        (crafted(info=None), "'base' and 'info'"),
        (crafted(edits=[{"layer": 0, "index": 1, "kind": "rewrite"}]), "a value edit holds 'out' alone"),
    ],
)
def test_a_crafted_file_is_refused_in_one_line(tmp_path, data, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(PatchError, match=message) as caught:
        P.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(PatchError, match="is no patch of a few neurons"):
        P.load(path)


SHARED = tiny_lm("llama")
GOOD = P.to_bytes(random_patch(SHARED))
CLEAN = weights_of(SHARED)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, len(GOOD)),
)
def test_random_corruption_never_crashes_nor_half_applies(changes, cut):
    """A damaged file either gives one PatchError, or is a well-formed patch that goes in and out bit for bit."""
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    for damaged in (bytes(data), bytes(data[:cut])):
        try:
            patch = P.from_bytes(damaged)
            P.apply(SHARED, patch)
        except PatchError as error:
            assert "\n" not in str(error)
        else:
            P.revert(SHARED, patch)
        assert same_bits(CLEAN, weights_of(SHARED))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["format", "edits", "base", "info", "layer", "index", "kind", "dtype", "fingerprint"]), inner, max_size=4),
    max_leaves=12,
))  # fmt: skip
def test_random_headers_never_crash(header):
    header = {"format": 1, "edits": VALUE, "base": {}, "info": {}} | (
        header if isinstance(header, dict) else {}
    )
    try:
        patch = P.from_bytes(save_tensors(GOOD_VALUE, {"mint": json.dumps(header)}))
        P.apply(SHARED, patch)
    except PatchError as error:
        assert "\n" not in str(error)
    assert same_bits(CLEAN, weights_of(SHARED))


finite = st.floats(-6e4, 6e4, width=16)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 63)), min_size=1, max_size=3, unique=True),
    st.lists(finite, min_size=32, max_size=32),
)
def test_any_finite_patch_survives_the_file(dtype, places, numbers):
    column = torch.tensor(numbers).to(dtype)
    edits = tuple(P.NeuronEdit(la, i, "value", {"out": column}, {"out": column.flip(0)}) for la, i in places)
    patch = P.Patch(edits, {"dtype": "x"}, {"a": 1})
    assert equal(P.from_bytes(P.to_bytes(patch)), patch)
