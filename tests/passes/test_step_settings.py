"""The caches validate and interpret the same settings in the same way."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fluxfire.passes import EncodingCache, FirstBlockCache, ParaAttention, ReferenceCache
from fluxfire.passes.shared.distance import mean_abs, relative_distance
from fluxfire.passes.shared.step_settings import sorted_steps, step_window

CACHES = [FirstBlockCache, ReferenceCache, ParaAttention]
NOT_COUNTS = [True, False, 1.5, 2.0, -1, "2"]


@pytest.mark.parametrize("value", NOT_COUNTS)
@pytest.mark.parametrize("cache", CACHES)
def test_all_caches_refuse_the_same_warmup_steps(cache, value):
    with pytest.raises(ValueError, match=f"warmup_steps={value!r}; it must be a whole number, 0 o"):
        cache(warmup_steps=value)
    assert cache(warmup_steps=3).warmup_steps == 3


@pytest.mark.parametrize("value", NOT_COUNTS)
def test_every_other_setting_that_counts_is_a_whole_number_too(value):
    for cache, name in (
        (FirstBlockCache, "tail_steps"),
        (FirstBlockCache, "of_steps"),
        (FirstBlockCache, "max_consecutive_hits"),
        (ReferenceCache, "tail_steps"),
        (ParaAttention, "downsample_factor"),
        (ParaAttention, "derivatives"),
        (EncodingCache, "prompts"),
        (EncodingCache, "pictures"),
    ):
        with pytest.raises(ValueError, match=f"{name}={value!r}; it must be a whole number"):
            cache(**{name: value})


@pytest.mark.parametrize("step", [True, 1.5, 2.0, "2"])
@pytest.mark.parametrize("cache", [FirstBlockCache, ReferenceCache])
def test_steps_of_a_schedule_are_whole_numbers(cache, step):
    with pytest.raises(ValueError, match=f"schedule contains {step!r}; every step must be a whol"):
        cache(schedule=[0, 4, step])


def test_a_schedule_is_sorted_and_has_each_step_once():
    assert sorted_steps("schedule", iter([5, 1, 5, 3])) == (1, 3, 5)


def test_the_window_leaves_out_the_first_and_the_last_steps():
    for steps, warmup, tail in product(range(9), range(5), range(5)):
        expected = [s for s in range(1, steps) if warmup <= s < steps - tail]
        assert list(step_window(steps, warmup=warmup, tail=tail)) == expected


def test_the_distance_is_relative_and_of_each_sample():
    cached = torch.tensor([[[1.0, -1.0]], [[4.0, 4.0]]])
    new = torch.tensor([[[1.5, -1.0]], [[4.0, 2.0]]])
    assert relative_distance(new, cached).tolist() == [0.25, 0.25]
    assert relative_distance(new, cached, mean_abs(cached)).tolist() == [0.25, 0.25]
    assert mean_abs(cached.bfloat16()).dtype is torch.float32
