"""Spark's vocabulary: the words of its instructions, and a check for unknown words."""

from __future__ import annotations

import re
from functools import cache

from fluxfire.spark.captions import CAPTIONS, IN_LOOKS
from fluxfire.spark.edits import KEEP, KINDS, LOOK_WORDINGS, SIDES, WHERE, EditKind, Split
from fluxfire.spark.scenes import Dice
from fluxfire.spark.things import NAMES, TINTS

LONGEST = 32
"""Number of T5 tokens that the transformer sees; the longest instruction fits."""
_AMERICAN = {"colour": "color", "grey": "gray"}
_POLITE = ("{}", "{}", "{}", "{}.", "please {}", "{} please", "please {}.")


@cache
def words() -> tuple[str, ...]:
    """Return every word of Spark's vocabulary, in lower case, in a fixed order."""
    wordings = [w for e in KINDS.values() for w in (*e.known, *e.novel)]
    looks = [w for known, novel in LOOK_WORDINGS.values() for w in (*known, *novel)]
    fixed = re.sub(r"\{.*?\}", " ", " ".join([*wordings, *looks, *KEEP, *CAPTIONS, *_POLITE]))
    places = [p for pair in WHERE.values() for p in pair]
    named = " ".join([*NAMES, *TINTS, *places, *SIDES, *IN_LOOKS.values(), *_AMERICAN.values()])
    return tuple(sorted(set(re.findall(r"[a-z]+", f"{fixed} {named} a an to and"))))


def unknown(prompt: str) -> tuple[str, ...]:
    """Return a prompt's words outside Spark's vocabulary, in order, without repetitions."""
    found = re.findall(r"[^\W_]+", prompt.lower())
    return tuple(dict.fromkeys(w for w in found if w not in words()))


def wordings(edit: EditKind, split: Split) -> tuple[str, ...]:
    """Return the wordings that a split uses for a kind of edit."""
    return edit.known if split == "train" else edit.novel


def phrase(text: str, dice: Dice) -> str:
    """Vary an instruction: British or American spelling, "please", full stop, capital letter."""
    phrased = _POLITE[int(dice.below(len(_POLITE), 1))].format(text)
    if int(dice.below(3, 1)) == 0:
        phrased = " ".join(_AMERICAN.get(word, word) for word in phrased.split(" "))
    return phrased.capitalize() if int(dice.below(3, 1)) == 0 else phrased
