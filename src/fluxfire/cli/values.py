"""Types of arguments: each reads a text, or says what is wrong with it."""

from __future__ import annotations

import argparse
import re
from math import isfinite

_LARGEST_SEED = 2**63 - 1


def words(text: str) -> str:
    """Read an argument of words: any text that is valid UTF-8.

    Args:
        text: the argument.

    Returns:
        The same text.

    Raises:
        argparse.ArgumentTypeError: if it is not valid UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid UTF-8") from None
    return text


def whole(text: str) -> int:
    """Read a whole number.

    Args:
        text: the argument.

    Returns:
        The number.

    Raises:
        argparse.ArgumentTypeError: if it is none.
    """
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def positive(text: str) -> int:
    """Read a whole number above zero.

    Args:
        text: the argument.

    Returns:
        The number.

    Raises:
        argparse.ArgumentTypeError: if it is none.
    """
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def counts(text: str) -> list[int]:
    """Read whole numbers above zero, separated by commas.

    Args:
        text: the argument.

    Returns:
        The numbers, each once.

    Raises:
        argparse.ArgumentTypeError: if one of them is none.
    """
    return list(dict.fromkeys(positive(part) for part in text.split(",")))


def seed(text: str) -> int:
    """Read a number that seeds a generator.

    Args:
        text: the argument.

    Returns:
        The number.

    Raises:
        argparse.ArgumentTypeError: if it is none, negative, or too large for a generator.
    """
    number = whole(text)
    if not 0 <= number <= _LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {_LARGEST_SEED}")
    return number


def size(text: str) -> tuple[int, int]:
    """Read a size such as 1024x1024.

    Args:
        text: the argument.

    Returns:
        Width and height.

    Raises:
        argparse.ArgumentTypeError: if it is not WIDTHxHEIGHT.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 1024x1024")
    return int(match[1]), int(match[2])


def prices(text: str) -> dict[str, float]:
    """Read what steps cost: `computed=0.27,reused=0.14,hit=0.01,around=0.2`.

    Args:
        text: the argument.

    Returns:
        Seconds by kind of step, and of the rest of an edit.

    Raises:
        argparse.ArgumentTypeError: if it is not four such numbers.
    """
    wanted = ("computed", "reused", "hit", "around")
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        if sorted(name for name, *_ in pairs) == sorted(wanted):
            found = {name: float(number) for name, _, number in pairs}
            if all(map(isfinite, found.values())):
                return found
    except ValueError:
        pass
    said = ",".join(f"{name}=SECONDS" for name in wanted)
    raise argparse.ArgumentTypeError(f"{text!r} is not {said}")
