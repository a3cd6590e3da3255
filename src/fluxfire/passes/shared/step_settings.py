"""Settings that count denoising steps: one validation and one meaning for all caches."""

from __future__ import annotations

from collections.abc import Iterable


def is_whole_number(value: object, least: int) -> bool:
    """Whether a value is an int of at least `least`; bools and floats are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_whole_number(name: str, value: object, least: int, *, none_means: str = "") -> None:
    """Validate a setting that counts something.

    Args:
        name: the setting's name, for the message.
        value: the setting's value.
        least: the smallest allowed value.
        none_means: what None means ("no limit"); empty if None is not allowed.

    Raises:
        ValueError: the value is a bool, not an int, or too small.
    """
    if is_whole_number(value, least) or (value is None and none_means):
        return
    otherwise = f", or None for {none_means}" if none_means else ""
    raise ValueError(f"{name}={value!r}; it must be a whole number, {least} or more{otherwise}")


def sorted_steps(name: str, steps: Iterable[object]) -> tuple[int, ...]:
    """Return the steps of a schedule in order, each once.

    Args:
        name: the setting's name, for the message.
        steps: the steps, counted from 0. The caller must check that none is negative.

    Raises:
        ValueError: a step is a bool or not an int.
    """
    whole: set[int] = set()
    for step in steps:
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(  # noqa: TRY004 - counts raise a ValueError for any wrong value
                f"{name} contains {step!r}; every step must be a whole number"
            )
        whole.add(step)
    return tuple(sorted(whole))


def step_window(steps: int, *, warmup: int, tail: int) -> range:
    """Return the steps at which a cache decides; it computes all others in full.

    Step 0 is never in the window, since nothing is cached before it.

    Args:
        steps: number of steps of the generation.
        warmup: number of first steps that are always computed.
        tail: number of last steps that are always computed.

    Example: 10 steps with `warmup=3` and `tail=2` give steps 3 to 7.
    """
    first = max(1, warmup)
    return range(first, max(first, steps - tail))
