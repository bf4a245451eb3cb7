"""Scores between texts, and bootstrap intervals.

BLEU and chrF come from sacrebleu, edit similarity from rapidfuzz, intervals from scipy; shares are 0 to 1
throughout, so sacrebleu's 0 to 100 is divided by 100.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mint.errors import MintError


def edit_similarity(found: str, wanted: str) -> float:
    """1 - Levenshtein distance / length of the longer text, 0 to 1; two empty texts give 1."""
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(found, wanted))


def bleu(found: str, wanted: str) -> float:
    """Sentence BLEU, 0 to 1: 4-grams, sacrebleu's `13a` tokens, exponential smoothing, effective order.

    Effective order leaves out n-grams longer than the text, without which short code lines score near 0.
    """
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True).sentence_score(found, [wanted]).score / 100


def chrf(found: str, wanted: str) -> float:
    """Sentence chrF (character 6-grams, beta 2), 0 to 1, as sacrebleu's default."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF().sentence_score(found, [wanted]).score / 100


@dataclass(frozen=True)
class Interval:
    """A statistic of a sample with its bootstrap interval."""

    value: float
    low: float
    high: float
    level: float
    n: int


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[..., np.ndarray] = np.mean,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of `statistic` over `values` [cases] (Efron & Tibshirani 1993, chapter
    13).

    `n` resamples, `level` the confidence (0 to 1). `statistic` takes an array and `axis`, as numpy's do. One
    value, or all equal, gives an interval of width 0: nothing is known about the spread. Raises `MintError`
    for no values, one that is not finite, or a level outside (0, 1).
    """
    from scipy.stats import bootstrap

    sample = np.asarray(list(values), dtype=float)
    if sample.size == 0:
        raise MintError("expected at least one value for an interval, found none; measure a case first")
    if not np.isfinite(sample).all():
        raise MintError(
            "expected finite values for an interval, found nan or inf; leave those cases out and count them"
        )
    if not 0 < level < 1:
        raise MintError(f"expected a confidence level between 0 and 1, found {level}; 0.95 is usual")
    value = float(statistic(sample, axis=-1))
    if np.all(sample == sample[0]):
        return Interval(value, value, value, level, sample.size)
    result = bootstrap(
        (sample,),
        statistic,
        n_resamples=n,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Interval(
        value,
        float(result.confidence_interval.low),
        float(result.confidence_interval.high),
        level,
        sample.size,
    )
