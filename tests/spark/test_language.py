"""Spark's words and their tokens."""

from __future__ import annotations

import pytest
import torch

from fluxfire.kontext.tokenizers import clip_tokenizer, t5_tokenizer
from fluxfire.spark import language
from fluxfire.spark.captions import draw_captioned
from fluxfire.spark.rendering import render
from fluxfire.spark.scenes import Dice


@pytest.fixture(scope="module")
def tokenizers():
    words = language.words()
    return (
        clip_tokenizer(words),
        t5_tokenizer(words, lower=True),
    )


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
        assert len(tokenizer("a giraffe").input_ids) > len(tokenizer("a red").input_ids)


def test_unknown_words_are_named_once_and_in_order():
    assert language.unknown("Make the RED circle's colour blue, please!") == ("s",)
    assert language.unknown("a dog and a cat and a dog") == ("dog", "cat")
    assert language.unknown("") == ()


def test_captions_fit_and_say_all_there_is(tokenizers):
    scenes, captions = draw_captioned(64, (1.0, 1.0), Dice(1))
    assert len(set(captions)) > 60
    for caption in captions:
        assert language.unknown(caption) == ()
        assert len(tokenizers[1](caption).input_ids) <= language.LONGEST
        assert " a orange" not in caption
    assert (scenes.present.sum(1) == 2).all()
    assert torch.isfinite(render(scenes, 32)).all()
