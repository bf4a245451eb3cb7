"""The patch file: old ones load for ever, damaged ones are refused in one line and cost no more than their size."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mint import __version__
from mint import patch as P
from mint.errors import PatchError
from tests.conftest import same_bits, tiny_lm, weights_of
from tests.mutations import mutated

STORED = Path(__file__).parent / "data" / "patches"
FIRST = sorted(STORED.glob("v1-*.safetensors"))


@pytest.mark.parametrize("path", FIRST, ids=lambda p: p.stem)
def test_files_of_the_first_format_load_and_apply_for_ever(path):
    _, family, dtype = path.stem.split("-")
    patch = P.load(path)
    lm = tiny_lm(family, dtype=getattr(torch, dtype))
    clean = weights_of(lm)
    if patch.base["fingerprint"] == lm.fingerprint:  # random weights of another torch may differ
        with P.applied(lm, patch):
            assert not same_bits(clean, weights_of(lm))
        assert same_bits(clean, weights_of(lm))
    assert patch.info["cases"][0]["target"] == "l.sort()\n"
    again = P.from_bytes(P.to_bytes(patch))
    assert [e.index for e in again.edits] == [e.index for e in patch.edits]


def test_there_are_stored_files():
    assert len(FIRST) == 3


def test_a_file_says_which_mint_wrote_it(lm):
    patch = P.load(FIRST[0])
    assert f'\\"mint\\": \\"{__version__}\\"'.encode() in P.to_bytes(patch)
    assert P.versions()["mint"] == __version__


@given(seed=st.integers(0, 10**9))
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_refused_in_one_line(seed):
    good = FIRST[seed % len(FIRST)].read_bytes()
    try:
        P.from_bytes(mutated(good, seed))
    except PatchError as error:
        assert "\n" not in str(error)
