"""Schedules found on Spark: as many hits as there, where most of them are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxfire.bench import Contender
from fluxfire.bench.schedules import most_frequent_steps, schedule_contender, schedule_passes
from fluxfire.passes import FirstBlockCache, QKVFusion, ReferenceCache, Schedule

EVERYTHING = FirstBlockCache(1e9, warmup_steps=0, tail_steps=0, max_consecutive_hits=None)


@given(st.lists(st.floats(0, 1), max_size=50))
def test_the_steps_that_hit_most_are_chosen(shares):
    chosen = most_frequent_steps(shares)
    assert len(chosen) == round(sum(shares))
    assert chosen == sorted(set(chosen))
    rest = [s for i, s in enumerate(shares) if i not in chosen]
    assert min((shares[i] for i in chosen), default=1) >= max(rest, default=0)


def test_a_cache_gets_spark_s_schedule():
    """Below no threshold nothing hits but the first; at one far too high, everything after it."""
    (every,) = schedule_passes([EVERYTHING], 3)
    assert every.schedule == (1, 2)
    cache = replace(EVERYTHING, threshold=0.3)
    (found,) = schedule_passes([cache], 8)
    assert 1 <= len(found.schedule) < 7
    assert replace(found, schedule=None) == cache


@pytest.mark.slow
def test_two_caches_are_tried_together():
    exact = QKVFusion()
    given, hits, refreshes = schedule_passes([exact, FirstBlockCache(0.3), ReferenceCache(0.3)], 8)
    assert given is exact
    assert hits.schedule
    assert refreshes.schedule[0] == 0
    assert 1 < len(refreshes.schedule) < 6


def test_limits_do_not_overrule_a_schedule_that_is_timed():
    cache = replace(EVERYTHING, schedule=[Schedule(28, {9: 0.1, 11: 0.2}), Schedule(3, {2: 0.1})])
    (found,) = schedule_passes([cache], 28)
    assert found.limits(28) == {9: None, 11: None}
    (found,) = schedule_passes([cache], 3)
    assert found.limits(3) == {2: None}
    (found,) = schedule_passes([cache], 4)  # Spark decides, by the threshold
    assert found.schedule == (1, 2, 3)


def test_what_decides_nothing_is_left_alone():
    fixed = FirstBlockCache(schedule=[2])
    never = FirstBlockCache(0), ReferenceCache(0)
    assert schedule_passes([fixed, *never], 3) == (fixed, *never)
    exact = Contender("exact", (QKVFusion(),))
    assert schedule_contender(exact, 3) == exact
    assert not exact.scheduled
    lossy = schedule_contender(Contender("lossy", (QKVFusion(), EVERYTHING)), 3)
    assert lossy.scheduled
    assert lossy.passes[1].schedule == (1, 2)
