"""The queueing model against exact results, and simulations that share no formula with it."""

from __future__ import annotations

import heapq
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capacity import (
    QueueingError,
    ServiceTimes,
    erlang_c,
    price,
    queue,
    scaled_to_zero,
    sizes,
    smallest,
    table,
)

SECONDS = st.floats(0.01, 100)
SERVICES = st.lists(SECONDS, min_size=1, max_size=8).map(lambda s: ServiceTimes(tuple(s)))
# Quantiles of an exponential distribution, so that the sample's moments are nearly its own.
EXPONENTIAL = ServiceTimes(tuple(-math.log1p(-(i + 0.5) / 4000) for i in range(4000)))


def simulate(*, arrivals, draw, gpus, requests, seed):
    """First come, first served: returns waits and latencies, without the first tenth."""
    chance = random.Random(seed)
    free = [0.0] * gpus
    now, waits, latencies = 0.0, [], []
    for _ in range(requests):
        now += chance.expovariate(arrivals)
        begins = max(now, heapq.heappop(free))
        service = draw(chance)
        heapq.heappush(free, begins + service)
        waits.append(begins - now)
        latencies.append(begins - now + service)
    return waits[requests // 10 :], latencies[requests // 10 :]


def simulate_container(*, arrivals, draw, window, cold_start, requests, seed):
    """One container that goes down when idle: returns paid seconds, cold share and mean wait."""
    chance = random.Random(seed)
    now = paid = waited = 0.0
    cold = 0
    ready = free = -math.inf  # when it was started last, and when it has served all so far
    for _ in range(requests):
        now += chance.expovariate(arrivals)
        if now >= free + window:  # it is down
            paid += window if free > -math.inf else 0.0
            paid += cold_start
            ready = free = now + cold_start
        elif now > free:  # it idles
            paid += now - free
            free = now
        cold += now < ready
        service = draw(chance)
        waited += free - now
        free += service
        paid += service
    return paid / requests, cold / requests, waited / requests


def p95(values):
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def erlang_c_by_its_sum(load, gpus):
    last = load**gpus / math.factorial(gpus) * gpus / (gpus - load)
    return last / (sum(load**k / math.factorial(k) for k in range(gpus)) + last)


@given(st.floats(0.01, 0.99), st.integers(1, 30))
def test_erlang_c_is_its_sum(utilisation, gpus):
    load = utilisation * gpus
    assert erlang_c(load, gpus) == pytest.approx(erlang_c_by_its_sum(load, gpus))


def test_erlang_c_of_thousands_does_not_overflow():
    assert 0.5 < erlang_c(4990, 5000) < 1


@pytest.mark.parametrize("gpus", [1, 2, 5])
@pytest.mark.parametrize("utilisation", [0.3, 0.8, 0.95])
def test_exponential_service_is_the_exact_mmc(gpus, utilisation):
    rate = 60 * utilisation * gpus / EXPONENTIAL.mean
    got = queue(rate, EXPONENTIAL, gpus)
    waiting = erlang_c_by_its_sum(utilisation * gpus, gpus)
    delay = EXPONENTIAL.mean / (gpus - utilisation * gpus)
    assert got.utilisation == pytest.approx(utilisation)
    assert got.waiting == pytest.approx(waiting)
    assert got.mean_wait == pytest.approx(waiting * delay, rel=2e-3)
    assert got.p95_wait == pytest.approx(max(0, delay * math.log(waiting / 0.05)), rel=2e-3)


@pytest.mark.parametrize("utilisation", [0.3, 0.8, 0.95])
def test_one_gpu_always_busy_with_exponential_service_has_an_exponential_latency(utilisation):
    got = queue(60 * utilisation / EXPONENTIAL.mean, EXPONENTIAL)
    exact = EXPONENTIAL.mean / (1 - utilisation) * math.log(20)
    assert got.p95_latency == pytest.approx(exact, rel=5e-3)


def waits_no_longer(seconds, utilisation):
    """Erlang's distribution of the wait in an M/D/1 queue with service times of 1."""
    return (1 - utilisation) * math.fsum(
        (utilisation * (k - seconds)) ** k
        / math.factorial(k)
        * math.exp(utilisation * (seconds - k))
        for k in range(math.floor(seconds) + 1)
    )


@pytest.mark.parametrize("utilisation", [0.1, 0.3, 0.5, 0.8, 0.9])
def test_constant_service_on_one_gpu_has_the_exact_mean_and_nearly_the_p95(utilisation):
    got = queue(60 * utilisation, ServiceTimes((1.0,)))
    assert got.mean_wait == pytest.approx(utilisation / (2 * (1 - utilisation)))
    assert got.waiting == pytest.approx(utilisation)
    exact = next(s / 1000 for s in range(20000) if waits_no_longer(s / 1000, utilisation) >= 0.95)
    assert got.p95_latency == pytest.approx(exact + 1, rel=0.11)
    if utilisation >= 0.8:
        assert got.p95_wait == pytest.approx(exact, rel=0.05)
    assert got.p95_latency == pytest.approx(got.p95_wait + 1)


MEASURED = ServiceTimes((0.8, 0.9, 1.0, 1.1, 2.2))


@pytest.mark.parametrize(("gpus", "utilisation"), [(1, 0.7), (2, 0.8), (4, 0.9)])
def test_measured_service_is_near_a_simulation(gpus, utilisation):
    arrivals = utilisation * gpus / MEASURED.mean
    got = queue(60 * arrivals, MEASURED, gpus)
    waits, latencies = simulate(
        arrivals=arrivals,
        draw=lambda chance: chance.choice(MEASURED.samples),
        gpus=gpus,
        requests=150_000,
        seed=7,
    )
    assert got.mean_wait == pytest.approx(sum(waits) / len(waits), rel=0.1)
    assert got.waiting == pytest.approx(sum(w > 0 for w in waits) / len(waits), rel=0.1)
    assert got.p95_wait == pytest.approx(p95(waits), rel=0.1)
    assert got.p95_latency == pytest.approx(p95(latencies), rel=0.1)


@pytest.mark.parametrize("rate", [0.5, 5.0, 30.0])
@pytest.mark.parametrize(("window", "cold_start"), [(20.0, 10.0), (0.0, 3.0), (5.0, 0.0)])
def test_scaling_to_zero_is_what_a_simulation_pays(rate, window, cold_start):
    got = scaled_to_zero(rate, MEASURED, window=window, cold_start=cold_start)
    paid, cold, wait = simulate_container(
        arrivals=rate / 60,
        draw=lambda chance: chance.choice(MEASURED.samples),
        window=window,
        cold_start=cold_start,
        requests=100_000,
        seed=11,
    )
    assert got.paid_seconds == pytest.approx(paid, rel=0.02)
    assert got.mean_wait == pytest.approx(wait, rel=0.04, abs=0.005)
    if cold_start:
        assert got.cold == pytest.approx(cold, abs=0.01)


def test_the_ends_of_scaling_to_zero():
    always = scaled_to_zero(10, MEASURED, window=1e9, cold_start=40)
    assert always.paid_seconds == pytest.approx(6)
    assert always.cold == 0
    assert always.mean_wait == pytest.approx(queue(10, MEASURED).mean_wait)
    rare = scaled_to_zero(1e-6, MEASURED, window=60, cold_start=40)
    assert rare.paid_seconds == pytest.approx(MEASURED.mean + 60 + 40, rel=1e-4)
    assert rare.cold == pytest.approx(1, rel=1e-4)


@given(SERVICES, st.floats(0.01, 0.99), st.floats(0, 500), st.floats(0, 200))
def test_scaling_to_zero_pays_between_the_service_and_always_on(service, busy, window, cold):
    rate = 60 * busy / service.mean
    got = scaled_to_zero(rate, service, window=window, cold_start=cold)
    always = queue(rate, service)
    assert service.mean * (1 - 1e-9) <= got.paid_seconds <= always.paid_seconds * (1 + 1e-9)
    assert 0 <= got.cold <= 1
    assert got.mean_wait >= always.mean_wait * (1 - 1e-9)


@given(SERVICES, st.floats(0.1, 5), st.integers(1, 5))
def test_more_gpus_never_make_it_slower(service, load, more):
    rate = 60 * load / service.mean
    few, many = (
        queue(rate, service, n) for n in (math.floor(load) + 1, math.floor(load) + 1 + more)
    )
    for name in ("utilisation", "waiting", "mean_wait", "p95_wait", "p95_latency"):
        assert getattr(many, name) <= getattr(few, name) * (1 + 1e-9)
    assert few.p95_latency >= few.p95_wait


def test_too_much_for_the_gpus_is_not_stable():
    got = queue(61, ServiceTimes((1.0,)))
    assert got.utilisation > 1
    assert got.mean_wait == got.p95_latency == math.inf
    assert queue(59, ServiceTimes((1.0,))).utilisation < 1


@given(SERVICES, st.floats(0.1, 10), st.floats(1.05, 5))
def test_the_smallest_reaches_the_goal_and_one_less_does_not(service, load, patience):
    rate, goal = 60 * load / service.mean, max(service.samples) * patience
    got = smallest(rate, service, goal)
    assert got.utilisation < 1
    assert got.p95_latency <= goal
    if got.gpus > 1:
        assert queue(rate, service, got.gpus - 1).p95_latency > goal


def test_a_goal_below_the_service_itself_is_refused():
    with pytest.raises(
        QueueingError, match="100 GPUs do not keep 95 of 100 requests within 500 ms"
    ):
        smallest(10, ServiceTimes((1.0,)), 0.5, most=100)


def test_samples_give_mean_and_variability():
    assert ServiceTimes((2.0,)).variability == 0
    assert ServiceTimes((1.0, 3.0)).mean == 2
    assert ServiceTimes((1.0, 3.0)).variability == pytest.approx(0.25)
    assert EXPONENTIAL.variability == pytest.approx(1, rel=5e-3)


def test_a_price_is_one_of_seconds():
    assert price(2.5, 3600) == pytest.approx(2.5)
    assert price(queue(60, ServiceTimes((0.5,))).paid_seconds, 7.2) == pytest.approx(0.002)
    assert price(queue(60, ServiceTimes((1.5,)), 2).paid_seconds, 7.2) == pytest.approx(0.004)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ServiceTimes(()), "no service times"),
        (lambda: ServiceTimes((1.0, 0.0)), "a service time is 0.0; it must be above 0, in seconds"),
        (lambda: ServiceTimes((math.nan,)), "a service time is nan"),
        (lambda: queue(0, MEASURED), "the rate is 0; it must be above 0, in requests a minute"),
        (lambda: queue(1, MEASURED, 0), "gpus=0"),
        (lambda: smallest(1, MEASURED, -1), "the latency is -1"),
        (lambda: scaled_to_zero(1, MEASURED, window=-1, cold_start=1), "window=-1; it must be 0"),
        (lambda: scaled_to_zero(1, MEASURED, window=1, cold_start=math.nan), "cold_start=nan"),
        (lambda: scaled_to_zero(100, MEASURED, window=1, cold_start=1), "it takes 3 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(call, words):
    with pytest.raises(QueueingError, match=words):
        call()


def test_the_table_has_a_line_for_each_rate():
    service = ServiceTimes((0.95,))
    text = table(service, p95_latency=5, window=60, cold_start=40, price_an_hour=3.6)
    lines = text.splitlines()
    found = sizes(service, 5)
    assert [line.split()[0] for line in lines[2:]] == ["1", "10", "50", "100"]
    assert [int(line.split()[1]) for line in lines[2:]] == [q.gpus for q in found]
    zero = scaled_to_zero(1, service, window=60, cold_start=40)
    assert f"{price(60, 3.6):.4f}" in lines[2]
    assert lines[2].split()[-2:] == [f"{price(zero.paid_seconds, 3.6):.4f}", f"{zero.cold:.0%}"]
    assert found[-1].gpus > 1
    assert lines[-1].endswith(f"{price(found[-1].paid_seconds, 3.6):.4f}")
