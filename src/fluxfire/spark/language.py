"""Spark's English: every word of its instructions, and what lies outside."""

from __future__ import annotations

import re
from functools import cache

from fluxfire.spark.captions import CAPTIONS
from fluxfire.spark.edits import KEEP, KINDS, PLACES, WAYS, Edit, Split
from fluxfire.spark.scenes import COLOURS, GROUNDS, SHAPES, Dice

LONGEST = 32
"""Tokens of T5 that the transformer sees; the longest caption fits."""
_AMERICAN = {"colour": "color", "grey": "gray", "centre": "center", "recolour": "recolor"}
_POLITE = ("{}", "{}", "{}", "{}.", "please {}", "{} please", "please {}.")


@cache
def words() -> tuple[str, ...]:
    """Every word of Spark's language, in lower case, in a fixed order."""
    wordings = [w for e in (*KINDS.values(), KEEP) for w in (*e.known, *e.novel)]
    fixed = re.sub(r"\{.*?\}", " ", " ".join([*wordings, *CAPTIONS, *_POLITE]))
    named = " ".join(
        [*SHAPES, *COLOURS, *GROUNDS, *PLACES, *WAYS, "a an to and shape", *_AMERICAN.values()]
    )
    return tuple(sorted(set(re.findall(r"[a-z]+", f"{fixed} {named}"))))


def unknown(prompt: str) -> tuple[str, ...]:
    """Return the words of a prompt that Spark never learned, in order, each once."""
    found = re.findall(r"[^\W_]+", prompt.lower())
    return tuple(dict.fromkeys(w for w in found if w not in words()))


def wordings(edit: Edit, split: Split) -> tuple[str, ...]:
    """Return the wordings of an edit that a split uses."""
    return edit.known if split == "train" else edit.novel


def phrase(text: str, dice: Dice) -> str:
    """Say it as people do: British or American, with or without please, stop, capital."""
    said = _POLITE[int(dice.below(len(_POLITE), 1))].format(text)
    if int(dice.below(3, 1)) == 0:
        said = " ".join(_AMERICAN.get(word, word) for word in said.split(" "))
    return said.capitalize() if int(dice.below(3, 1)) == 0 else said
