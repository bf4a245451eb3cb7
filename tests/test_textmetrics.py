"""Scores against independent calculations, intervals against the normal approximation."""

import math

import numpy as np
import pytest

from mint.errors import MintError
from mint.measure import textmetrics as tm


def test_edit_similarity_is_one_minus_distance_over_longer_length():
    assert tm.edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert tm.edit_similarity("", "") == 1.0
    assert tm.edit_similarity("", "abc") == 0.0


def test_bleu_agrees_with_the_formula_by_hand():
    # Precisions 4/5, 3/4, 2/3, 1/2, equal lengths: no brevity penalty.
    expected = math.exp(sum(map(math.log, (4 / 5, 3 / 4, 2 / 3, 1 / 2))) / 4)
    assert tm.bleu("a b c d x", "a b c d e") == pytest.approx(expected, rel=1e-6)


def test_bleu_and_chrf_are_shares_and_order_texts_sensibly():
    wanted = "l.sort(reverse=True)"
    for score in (tm.bleu, tm.chrf):
        assert score(wanted, wanted) == pytest.approx(1.0)
        assert 0.0 < score("l.sort(reverse=False)", wanted) < 1.0
        assert score("", wanted) == 0.0
    assert tm.bleu("x", "x") == pytest.approx(1.0)  # shorter than a 4-gram


def test_interval_agrees_with_the_normal_approximation():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    found = tm.bootstrap_interval(values, n=4000)
    half = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert found.n == 400


def test_interval_is_the_same_for_the_same_seed_only():
    values = [0.0, 1.0, 1.0, 0.0, 0.7, 0.3, 0.9]
    first = tm.bootstrap_interval(values, seed=3)
    assert first == tm.bootstrap_interval(values, seed=3)
    assert first != tm.bootstrap_interval(values, seed=4)


def test_interval_takes_another_statistic():
    found = tm.bootstrap_interval([1.0, 2.0, 3.0, 100.0, 2.5], statistic=np.median)
    assert found.value == 2.5 and found.low <= 2.5 <= found.high


def test_interval_of_one_value_or_equal_values_has_no_width():
    assert tm.bootstrap_interval([0.5]) == tm.Interval(0.5, 0.5, 0.5, 0.95, 1)
    assert tm.bootstrap_interval([1.0] * 9) == tm.Interval(1.0, 1.0, 1.0, 0.95, 9)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "at least one value"),
        ([1.0, float("nan")], {}, "finite values"),
        ([1.0, 2.0], {"level": 95}, "between 0 and 1, found 95"),
    ],
)
def test_interval_refuses_bad_input_in_one_line(values, options, message):
    with pytest.raises(MintError, match=message):
        tm.bootstrap_interval(values, **options)
