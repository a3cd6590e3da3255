"""Spark's words and their tokens."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from fluxfire.kontext.tokenizers import clip_tokenizer, t5_tokenizer
from fluxfire.spark import language
from fluxfire.spark.captions import CAPTIONS, IN_LOOKS, draw_captioned
from fluxfire.spark.edits import KEEP, KINDS, LOCAL, LOOK_WORDINGS, SIDES, WHERE, WHOLE
from fluxfire.spark.grounds import GROUNDS
from fluxfire.spark.rendering import render
from fluxfire.spark.scenes import LOOKS, Dice
from fluxfire.spark.things import NAMES, TINTS

CLIP_LONGEST = 40


@pytest.fixture(scope="module")
def tokenizers():
    words = language.words()
    return clip_tokenizer(words), t5_tokenizer(words, lower=True)


def test_every_word_is_one_token_of_its_own(tokenizers):
    clip, t5 = tokenizers
    seen = set()
    for word in language.words():
        ids = clip(word).input_ids
        assert len(ids) == 3, word  # begin, the word, end
        assert len(t5(word).input_ids) == 2, word
        assert t5(word.upper()).input_ids == t5(word.capitalize()).input_ids == t5(word).input_ids
        assert clip(word.upper()).input_ids == ids
        seen.add((ids[1], t5(word).input_ids[0]))
    assert len(seen) == len(language.words())


def test_other_words_still_get_tokens(tokenizers):
    for tokenizer in tokenizers:
        assert len(tokenizer("a xylophone").input_ids) > len(tokenizer("a red").input_ids)


def test_the_words_are_sorted_and_hold_all_names():
    words = language.words()
    assert list(words) == sorted(set(words))
    named = " ".join([*NAMES, *TINTS, *SIDES, *itertools.chain(*WHERE.values()), *KEEP])
    assert set(named.split()) <= set(words)
    assert {"a", "an", "and", "please", "color", "colour", "gray", "grey"} <= set(words)


def test_unknown_words_are_named_once_and_in_order():
    assert language.unknown("Make the RED dog's colour blue, please!") == ("s",)
    assert language.unknown("a xylophone and a sofa and a xylophone") == ("xylophone", "sofa")
    assert language.unknown("turn 1 dog into 2 cats") == ("1", "2", "cats")
    assert language.unknown("") == ()


def test_phrases_vary_and_keep_their_words():
    plain = "change the colour of the dog to grey"
    said = {language.phrase(plain, Dice("phrase", i)) for i in range(300)}
    assert len(said) >= 12
    assert plain in said
    for text in said:
        assert language.unknown(text) == ()
        british = text.lower().replace("color", "colour").replace("gray", "grey")
        assert british.replace("please", "").strip(" .") == plain
    assert any("color" in text for text in said)
    assert any(text[0].isupper() for text in said)
    assert any(text.endswith(".") for text in said)


def longest(wordings, fields, tokens):
    """The wording that takes the most tokens when every field does."""
    filled = []
    for wording in wordings:
        text = re.sub(r"\{(\w+)\}", lambda m: max(fields[m[1]], key=tokens), wording)
        filled.append(text)
    return max(filled, key=tokens)


def test_the_longest_instruction_fits(tokenizers):
    """Two instructions in one, each with the names of most words."""
    for tokenizer, room in zip(tokenizers, (CLIP_LONGEST, language.LONGEST), strict=True):

        def tokens(text, tokenizer=tokenizer):
            return len(tokenizer(text).input_ids)

        news = [f"an {tint} {name}" for tint in TINTS for name in NAMES if " " in name]
        fields = {
            "it": NAMES, "new": news, "colour": list(TINTS), "place": SIDES,
            "to": ("to the left", "to the bottom"),
            "where": [where for where, _ in WHERE.values()],
            "what": [what for _, what in WHERE.values()],
        }  # fmt: skip
        looks = [w for pair in LOOK_WORDINGS.values() for some in pair for w in some]
        one = longest(
            [w for k in LOCAL for w in (*KINDS[k].known, *KINDS[k].novel)], fields, tokens
        )
        grounds = [*KINDS["ground"].known, *KINDS["ground"].novel]
        assert set(WHOLE) == {"ground", "look"}
        two = max(longest(grounds, fields, tokens), max(looks, key=tokens), key=tokens)
        said = f"Please {one} and {two}."
        assert tokens(said) <= room, said
        assert tokens(said) > 15  # or nothing was filled in


def test_every_wording_fills_in():
    fields = dict.fromkeys(("it", "new", "colour", "place", "to", "where", "what"), "x")
    fields |= {f"known{i}": "x" for i in range(5)} | {f"novel{i}": "x" for i in range(2)}
    for edit in KINDS.values():
        for wording in (*edit.known, *edit.novel):
            assert "{" not in wording.format(**fields)
    for known, novel in LOOK_WORDINGS.values():
        assert (len(known), len(novel)) == (5, 2)
    assert set(LOOK_WORDINGS) == set(LOOKS[1:])
    assert set(WHERE) == set(GROUNDS)
    assert set(IN_LOOKS) == set(LOOKS)


def test_places_are_told_apart():
    places = [*itertools.chain(*WHERE.values())]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("extent", [(1.0, 1.0), (160 / 96, 1.0)])
def test_captions_fit_and_say_all_there_is(tokenizers, extent):
    scenes, captions = draw_captioned(96, extent, Dice(1))
    assert len(captions) == len(scenes) == 96
    assert scenes.orderly().all()
    assert len(set(captions)) > 90
    wheres, said_looks = (
        [where for where, _ in WHERE.values()],
        [s.strip() for s in IN_LOOKS.values()],
    )
    for row, caption in enumerate(captions):
        assert language.unknown(caption) == ()
        assert len(tokenizers[1](f"Please {caption}.").input_ids) <= language.LONGEST
        assert len(tokenizers[0](f"Please {caption}.").input_ids) <= CLIP_LONGEST
        assert not re.search(r"\ba [aeio]|\ban [^aeiou]|  ", caption)
        here = [s for s in range(4) if scenes.present[row, s]]
        for s in here:
            tint = int(scenes.tint[row, s])
            colour = f"{list(TINTS)[tint - 1]} " if tint else ""
            assert f" {colour}{NAMES[int(scenes.thing[row, s])]}" in caption
        assert wheres[int(scenes.ground[row])] in caption
        assert caption.endswith(said_looks[int(scenes.look[row])])
    assert {c.count(" and a") for c in captions} >= {0, 1, 2}
    assert torch.isfinite(render(scenes.take(slice(4)), 32)).all()


def test_captions_come_in_every_wording():
    _, captions = draw_captioned(60, (1.0, 1.0), Dice(2))
    for caption in CAPTIONS:
        begin = caption.split("{")[0]
        assert any(c.startswith(begin) for c in captions)
