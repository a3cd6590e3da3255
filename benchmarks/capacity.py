"""How many GPUs a load needs, how long its requests wait, and what an image costs.

Two models of a service that edits one picture at a time on each GPU, first come, first served.
Requests arrive at random (a Poisson process); service times are measured ones.

`queue` is an M/G/c queue, the GPUs always on. Erlang's C formula (A. K. Erlang, 1917) says how
often a request would wait if service times were exponential. Allen and Cunneen's approximation
(A. O. Allen, *Probability, Statistics, and Queueing Theory*, 1978) takes that as the probability
of waiting, and scales the mean wait by the mean of two squared coefficients of variation: that of
the time between arrivals, which is 1 here, and that of the service times. It is exact for
exponential service times (M/M/c), and for one GPU whatever these are (Pollaczek and Khinchine).
Those who wait are taken to wait exponentially, which is exact for M/M/c; a request's latency is
its wait and one of the measured service times, drawn apart from each other. For constant service
times on one GPU, the p95 of the latency so found is within 11% of the exact one.

`scaled_to_zero` is a single container that is switched off when nothing came for a while; what it
says is exact. A cycle begins with the request that ends an idle time. Idle times are exponential
with mean 1/λ, since arrivals have no memory, so with probability p = exp(-λw) one outlasts the
window w: w of it is paid, then the container goes, and the next request pays a cold start of s
seconds, in which λs more come on average. Of an idle time (1 - p)/λ are paid on average. Whoever
starts a busy period brings 1/(1 - u) requests, itself among them, when a share u of the time is
busy: while it is served others come, and while these are served, others. So a cycle has
(1 + pλs)/(1 - u) requests, and a request is paid with its own service time b and with its share of
idling and starting:

    b + ((1 - p)/λ + p s) (1 - u) / (1 + p λ s)

Without a window this is b and cold starts; without an end to it, 1/λ: always on. The share of
requests that start the container, or come while it starts, is p (1 + λs) (1 - u) / (1 + pλs). The
mean wait is that of an M/G/1 queue and, for the starts, p (2s + λs²) / (2 (1 + pλs)) (P. D. Welch,
1964).

What neither knows: bursts, batches, requests that give up or are refused by a full queue.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fluxfire.errors import FluxfireError
from fluxfire.text import human_seconds
from fluxfire.text import table as laid_out

RATES = (1, 10, 50, 100)
"""Requests a minute that `table` tells of."""
_MINUTE, _HOUR = 60.0, 3600.0
_LATE = 0.05  # the share of requests that a p95 leaves out
_HALVINGS = 100  # to the last bit of a float, and a few more


class QueueingError(FluxfireError):
    """A load or a goal that makes no sense, or that no number of GPUs can meet."""


@dataclass(frozen=True)
class ServiceTimes:
    """Measured service times: what one request keeps a GPU busy.

    Attributes:
        samples: seconds, one or more. A single one stands for times that are always the same.

    Raises:
        QueueingError: when made: there are no samples, or some are not above 0.
    """

    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise QueueingError("there are no service times; measure one edit or more")
        for seconds in self.samples:
            _check("a service time", seconds, "seconds")

    @property
    def mean(self) -> float:
        """The mean, in seconds."""
        return math.fsum(self.samples) / len(self.samples)

    @property
    def variability(self) -> float:
        """The squared coefficient of variation: 0 if all are the same, 1 if exponential."""
        mean = self.mean
        return math.fsum((s - mean) ** 2 for s in self.samples) / len(self.samples) / mean**2


@dataclass(frozen=True)
class Queue:
    """What a load does to GPUs that are always on.

    Attributes:
        rate: requests a minute.
        gpus: how many serve them, one picture at a time each.
        utilisation: the share of its time that a GPU is busy; 1 or more is more than it can do,
            and waits grow without bound.
        waiting: the probability that a request waits.
        mean_wait: seconds that a request waits on average.
        p95_wait: seconds that 95 of 100 requests wait at most.
        p95_latency: the same of waiting and being served.
    """

    rate: float
    gpus: int
    utilisation: float
    waiting: float
    mean_wait: float
    p95_wait: float
    p95_latency: float

    @property
    def paid_seconds(self) -> float:
        """GPU seconds paid for each image, always on.

        However the same number of containers is scaled, it is no more than this, and no less
        than the mean service time.
        """
        return self.gpus * _MINUTE / self.rate


@dataclass(frozen=True)
class ScaledToZero:
    """What a load does to a single container that is switched off when idle.

    Attributes:
        paid_seconds: container seconds paid for each image.
        cold: the share of requests that start the container, or come while it starts.
        mean_wait: seconds that a request waits on average, for the start or for others.
    """

    paid_seconds: float
    cold: float
    mean_wait: float


def queue(rate: float, service: ServiceTimes, gpus: int = 1) -> Queue:
    """Say how a load is served by GPUs that are always on.

    Args:
        rate: requests a minute, on average.
        service: measured service times.
        gpus: how many there are.

    Raises:
        QueueingError: the rate is not above 0, or there is no GPU.
    """
    _check("the rate", rate, "requests a minute")
    if gpus < 1:
        raise QueueingError(f"gpus={gpus}; it takes 1 or more to serve anything")
    load = rate / _MINUTE * service.mean
    utilisation = load / gpus
    if utilisation >= 1:
        return Queue(rate, gpus, utilisation, 1.0, math.inf, math.inf, math.inf)
    waiting = erlang_c(load, gpus)
    # What those wait on average who wait at all.
    delay = service.mean / (gpus - load) * (1 + service.variability) / 2

    def later(seconds: float) -> float:
        """Return the probability of a wait above so many seconds."""
        return 1.0 if seconds < 0 else waiting * math.exp(-seconds / delay)

    p95_wait = delay * math.log(waiting / _LATE) if waiting > _LATE else 0.0
    p95_latency = _p95(
        lambda seconds: (
            math.fsum(later(seconds - s) for s in service.samples) / len(service.samples)
        ),
        p95_wait + max(service.samples),
    )
    return Queue(rate, gpus, utilisation, waiting, waiting * delay, p95_wait, p95_latency)


def smallest(rate: float, service: ServiceTimes, p95_latency: float, *, most: int = 1000) -> Queue:
    """Find the fewest GPUs that keep 95 of 100 requests within a latency.

    Args:
        rate: requests a minute, on average.
        service: measured service times.
        p95_latency: seconds of waiting and being served.
        most: GPUs to try at most.

    Raises:
        QueueingError: no number of GPUs up to `most` is enough.
    """
    _check("the latency", p95_latency, "seconds")
    _check("the rate", rate, "requests a minute")
    enough = math.floor(rate / _MINUTE * service.mean) + 1
    for gpus in range(enough, most + 1):
        found = queue(rate, service, gpus)
        if found.p95_latency <= p95_latency:
            return found
    raise QueueingError(
        f"{most} GPUs do not keep 95 of 100 requests within {human_seconds(p95_latency)} at "
        f"{rate:g} requests a minute; an edit alone takes {human_seconds(service.mean)} on "
        f"average and {human_seconds(max(service.samples))} at most"
    )


def scaled_to_zero(
    rate: float, service: ServiceTimes, *, window: float, cold_start: float
) -> ScaledToZero:
    """Say what a single container costs that is switched off when idle.

    Args:
        rate: requests a minute, on average.
        service: measured service times.
        window: seconds without a request after which the container is switched off.
        cold_start: seconds from a request that finds none until a container serves it, all paid.

    Raises:
        QueueingError: the rate is not above 0, a time is negative, or one container cannot
            serve as many requests.
    """
    _check("the rate", rate, "requests a minute")
    for name, seconds in (("window", window), ("cold_start", cold_start)):
        if not seconds >= 0:
            raise QueueingError(f"{name}={seconds!r}; it must be 0 seconds or more")
    arrivals = rate / _MINUTE
    idle = 1 - arrivals * service.mean
    if idle <= 0:
        raise QueueingError(
            f"one container cannot serve {rate:g} requests a minute of "
            f"{human_seconds(service.mean)} each; it takes {math.floor(1 - idle) + 1} or more"
        )
    off = math.exp(-arrivals * window)
    started = 1 + off * arrivals * cold_start  # requests that come before the first is served
    beside = -math.expm1(-arrivals * window) / arrivals + off * cold_start
    second_moment = service.mean**2 * (1 + service.variability)
    return ScaledToZero(
        paid_seconds=service.mean + beside * idle / started,
        cold=off * (1 + arrivals * cold_start) * idle / started,
        mean_wait=arrivals * second_moment / (2 * idle)
        + off * (2 * cold_start + arrivals * cold_start**2) / (2 * started),
    )


def price(paid_seconds: float, price_an_hour: float) -> float:
    """Say what an image costs.

    Args:
        paid_seconds: container seconds paid for it.
        price_an_hour: of one container, with all that is billed: GPU, cores, memory.

    Returns:
        The price, in the same currency.
    """
    return paid_seconds * price_an_hour / _HOUR


def erlang_c(load: float, gpus: int) -> float:
    """Return the probability of waiting in an M/M/c queue, by Erlang's C formula.

    Args:
        load: arrivals during one mean service time; less than `gpus`.
        gpus: how many serve.
    """
    blocked = 1.0  # Erlang's B, server by server, which no factorial overflows
    for servers in range(1, gpus + 1):
        blocked = load * blocked / (servers + load * blocked)
    return blocked / (1 - load / gpus * (1 - blocked))


def sizes(service: ServiceTimes, p95_latency: float) -> tuple[Queue, ...]:
    """Size a deployment for several loads, `RATES`.

    Args:
        service: measured service times.
        p95_latency: seconds within which 95 of 100 requests shall be answered.

    Returns:
        For each rate, the fewest GPUs that do it.

    Raises:
        QueueingError: no number of GPUs is enough.
    """
    return tuple(smallest(rate, service, p95_latency) for rate in RATES)


def table(
    service: ServiceTimes,
    *,
    p95_latency: float,
    window: float,
    cold_start: float,
    price_an_hour: float,
) -> str:
    """Lay out what several loads need and cost.

    Args:
        service: measured service times.
        p95_latency: seconds within which 95 of 100 requests shall be answered.
        window: seconds without a request after which a container is switched off.
        cold_start: seconds that starting one takes.
        price_an_hour: of one container.

    Returns:
        A table, a line for each rate. "Scaled to zero" is for what one container can serve: its
        requests do wait for cold starts, which the columns before leave out.

    Raises:
        QueueingError: no number of GPUs is enough.
    """
    rows = []
    for found in sizes(service, p95_latency):
        off = ("", "")
        if found.gpus == 1:
            zero = scaled_to_zero(found.rate, service, window=window, cold_start=cold_start)
            off = (f"{price(zero.paid_seconds, price_an_hour):.4f}", f"{zero.cold:.0%}")
        rows.append(
            (
                f"{found.rate:g}",
                found.gpus,
                f"{found.utilisation:.0%}",
                f"{found.waiting:.0%}",
                human_seconds(found.mean_wait),
                human_seconds(found.p95_latency),
                f"{price(found.paid_seconds, price_an_hour):.4f}",
                *off,
            )
        )
    head = (
        "requests a minute", "GPUs", "busy", "wait", "mean wait", "p95 latency",
        "an image, always on", "scaled to zero", "cold",
    )  # fmt: skip
    return laid_out(head, rows)


def _p95(later: Callable[[float], float], most: float) -> float:
    """Find the least time that is exceeded in no more than 5 of 100 cases, by halving."""
    least = 0.0
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        if later(middle) > _LATE:
            least = middle
        else:
            most = middle
    return most


def _check(what: str, value: float, unit: str) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise QueueingError(f"{what} is {value!r}; it must be above 0, in {unit}")
