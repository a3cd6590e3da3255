"""Intervals beside scipy's bootstrap; what counts as clearly better."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxfire.bench import Interval, bootstrap
from fluxfire.bench.intervals import MIN_EXAMPLES, expanded_tail, share_interval
from fluxfire.bench.quality import Quality, Similarity


@pytest.mark.parametrize("n", [8, 40])
def test_the_interval_is_that_of_scipy(n):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(n).normal(3, 2, n)
    found = bootstrap(values)
    tail = stats.norm.cdf(-stats.t.ppf(0.975, n - 1) * np.sqrt(n / (n - 1)))
    theirs = stats.bootstrap(
        (values,),
        np.mean,
        method="percentile",
        n_resamples=40_000,
        random_state=1,
        confidence_level=1 - 2 * tail,
    ).confidence_interval
    assert expanded_tail(n) == pytest.approx(tail, rel=0.05)
    spread = values.std() / np.sqrt(n)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(theirs.low, abs=0.15 * spread)
    assert found.high == pytest.approx(theirs.high, abs=0.15 * spread)


@pytest.mark.parametrize("n", [5, 30])
def test_it_covers_the_truth_about_as_often_as_it_says(n):
    """A plain percentile interval of 5 values covers 85%."""
    rng = np.random.default_rng(0)
    found = [bootstrap(rng.normal(1, 1, n)) for _ in range(400)]
    covered = np.mean([one.low <= 1 <= one.high for one in found])
    assert 0.91 < covered < 0.99


@pytest.mark.parametrize(("right", "n"), [(5, 5), (0, 7), (3, 8), (23, 24)])
def test_the_interval_of_a_share_is_that_of_scipy(right, n):
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert share_interval([True] * right + [False] * (n - right)) == pytest.approx(
        (theirs.low, theirs.high)
    )
    assert share_interval([]) is None


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_it_lies_within_the_values_and_is_the_same_again(values):
    found = bootstrap(values)
    assert min(values) - 1e-9 <= found.low <= found.mean + 1e-9
    assert found.mean - 1e-9 <= found.high <= max(values) + 1e-9
    assert found == bootstrap(values)


def test_one_value_has_no_interval():
    assert bootstrap([]) is bootstrap([3.0]) is None


@pytest.mark.parametrize(
    ("interval", "verdict", "above"),
    [
        (Interval(1, 0.5, 1.5, 9), "better", True),
        (Interval(-1, -1.5, -0.5, 9), "worse", False),
        (Interval(1, -0.5, 1.5, 9), "no difference shown", False),
        (Interval(1, 0.0, 1.5, 9), "no difference shown", False),
        (Interval(1, 0.5, 1.5, MIN_EXAMPLES), "better", True),
        (Interval(1, 0.5, 1.5, MIN_EXAMPLES - 1), "4 examples are too few to tell", False),
    ],
)
def test_what_a_difference_shows(interval, verdict, above):
    assert interval.verdict == verdict
    assert interval.above_zero == above


def quality(*psnr):
    return Quality(
        tuple(Similarity(p, edited=None if p > 90 else p - 5) for p in psnr), (None,) * 6
    )


def test_differences_are_paired():
    """All examples differ by the same 1 dB: there is no doubt, however much they spread."""
    one, other = quality(21, 31, 41, 51, 61, 71), quality(20, 30, 40, 50, 60, 70)
    assert one.minus(other) == Interval(1, 1, 1, 6)
    assert other.minus(one) == Interval(-1, -1, -1, 6)
    assert one.minus(quality(20, 30, 40, 50, 95, 96), "edited").n == 4
    assert quality(20, *[99] * 5).minus(quality(20, *[99] * 5), "edited") is None
