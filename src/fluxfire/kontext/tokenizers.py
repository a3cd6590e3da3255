"""CLIP and T5 tokenizers built from vocabularies in memory, for transformers 4 and 5."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer, T5Tokenizer

CLIP_LENGTH = 77
_LETTER, _WORD = -10.0, -2.0  # log-probabilities: a word is more likely than its letters


def clip_tokenizer(words: Sequence[str] = ()) -> CLIPTokenizer:
    """Build a CLIP tokenizer that knows all bytes, and some words as one token each.

    Args:
        words: the words, in lower case.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = _merges(words)
    entries = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    try:
        return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)
    except TypeError:  # transformers 4 reads its vocabulary from files
        with tempfile.TemporaryDirectory() as folder:
            vocabulary_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
            vocabulary_file.write_text(json.dumps(vocabulary))
            lines = "".join(f"{left} {right}\n" for left, right in merges)
            merges_file.write_text(f"#version: 0.2\n{lines}\n")
            return CLIPTokenizer(
                str(vocabulary_file), str(merges_file), model_max_length=CLIP_LENGTH
            )


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, by rank, that turn each word into one token.

    A merge for a later word ranks below all merges before it, so it cannot change the tokens of an
    earlier word.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            known = [pair for pair in pairs if pair in ranks]
            best = min(known, key=lambda pair: ranks[pair]) if known else pairs[0]
            ranks.setdefault(best, len(ranks))
            parts = _merged(parts, best)
    return list(ranks)


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def t5_tokenizer(words: Sequence[str] = (), *, lower: bool = False) -> T5Tokenizer:
    """Build a T5 tokenizer that knows printable ASCII, and some words as one token each.

    Args:
        words: the words, in the case in which prompts contain them.
        lower: convert all text to lower case, as the CLIP tokenizer does.
    """
    from tokenizers import normalizers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", _WORD)]
    pieces += [(chr(code), _LETTER) for code in range(33, 127)]
    pieces += [(f"\u2581{word}", _WORD) for word in words]
    tokenizer = _t5_from_pieces(pieces)
    if lower:
        raw = tokenizer.backend_tokenizer
        before = [raw.normalizer] if raw.normalizer is not None else []
        raw.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
    return tokenizer


def _t5_from_pieces(pieces: list[tuple[str, float]]) -> T5Tokenizer:
    try:
        return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    except TypeError:  # transformers 4 builds a fast tokenizer from a tokenizers object
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import T5TokenizerFast

        raw = Tokenizer(models.Unigram(pieces, unk_id=2))
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        raw.decoder = decoders.Metaspace()
        raw.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
        return T5TokenizerFast(tokenizer_object=raw, extra_ids=0, model_max_length=512)
