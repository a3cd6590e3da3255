"""Types of options: each reads one text, or raises an error that says what is wrong with it."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from math import isfinite

from fluxfire.text import read_bytes

HIGHEST_PSNR = 100.0
"""What the PSNR of equal pictures counts as, in dB."""
_LARGEST_SEED = 2**63 - 1
_LARGEST_PORT = 65535
_LONGEST_SIDE = 4096


def words(text: str) -> str:
    """Read words in valid UTF-8, or none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError(f"{text!r} is not valid UTF-8") from None
    return text


def prompt(text: str) -> str:
    """Read a prompt: some words in valid UTF-8."""
    if not words(text).strip():
        raise ArgumentTypeError("the prompt is empty")
    return text


def memory(text: str) -> str:
    """Read an amount of memory, or `auto`."""
    if text != "auto":
        try:
            read_bytes(text)
        except ValueError as error:
            raise ArgumentTypeError(f"{error}, or auto") from None
    return text


def whole_number(text: str) -> int:
    """Read a whole number that is not negative."""
    try:
        number = int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 0:
        raise ArgumentTypeError(f"{text} is negative")
    return number


def positive_number(text: str) -> int:
    """Read a whole number above 0."""
    number = whole_number(text)
    if number == 0:
        raise ArgumentTypeError("0 is not positive")
    return number


def positive_decimal(text: str) -> float:
    """Read a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None
    if not (isfinite(number) and number > 0):
        raise ArgumentTypeError(f"{text} is not a finite number above 0")
    return number


def positive_numbers(text: str) -> list[int]:
    """Read whole numbers above 0, separated by commas; each once."""
    return list(dict.fromkeys(positive_number(part) for part in text.split(",")))


def seed(text: str) -> int:
    """Read a number that can seed a generator."""
    number = whole_number(text)
    if number > _LARGEST_SEED:
        raise ArgumentTypeError(f"{text} is more than {_LARGEST_SEED}")
    return number


def port(text: str) -> int:
    """Read a port; 0 means any that is free."""
    number = whole_number(text)
    if number > _LARGEST_PORT:
        raise ArgumentTypeError(f"{text} is more than {_LARGEST_PORT}")
    return number


def size(text: str) -> tuple[int, int]:
    """Read the width and height of a picture that can be generated."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 1024x1024")
    width, height = int(match[1]), int(match[2])
    if any(n == 0 or n % 16 for n in (width, height)):
        raise ArgumentTypeError(f"{text}: both sides must be positive multiples of 16")
    if max(width, height) > _LONGEST_SIDE:
        raise ArgumentTypeError(f"{text}: no side can be longer than {_LONGEST_SIDE}")
    return width, height


def psnr(text: str) -> float:
    """Read a PSNR in dB."""
    return _between_zero_and(HIGHEST_PSNR, text)


def fraction(text: str) -> float:
    """Read a number from 0 to 1."""
    return _between_zero_and(1.0, text)


def prices(text: str) -> dict[str, float]:
    """Read seconds by kind of step: `computed=0.27,reused=0.14,hit=0.01,around=0.2`."""
    kinds = ("computed", "reused", "hit", "around")
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        if sorted(name for name, *_ in pairs) == sorted(kinds):
            found = {name: float(number) for name, _, number in pairs}
            if all(isfinite(seconds) and seconds > 0 for seconds in found.values()):
                return found
    except ValueError:
        pass
    form = ",".join(f"{name}=SECONDS" for name in kinds)
    raise ArgumentTypeError(f"{text!r} is not {form}, all above 0")


def _between_zero_and(highest: float, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= number <= highest:
        raise ArgumentTypeError(f"{text} is not between 0 and {highest:g}")
    return number
