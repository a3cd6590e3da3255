"""EncodingCache: prompts and pictures that were encoded before are not encoded again."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from fluxfire import modules
from fluxfire.edits.override import CALL_SLOT
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.runtime.freshness import Watch, anybody_hears, heard_by_others, rounding
from fluxfire.runtime.transaction import Transaction


@dataclass(frozen=True, kw_only=True)
class EncodingCache:
    """Keeps what the text encoders made of prompts, and the VAE of reference pictures.

    Editing means one picture and many prompts, or one prompt and many pictures. An encoder that is
    asked again with the same tokens, or the same pixels, answers from memory. All around it runs as
    ever: tokenizers, the scaling of latents, the drawing of samples. The least recently used goes
    first.

    The answers of an encoder go as soon as anything about it changed: its weights, whichever way
    they were changed, its layers, its settings (such as tiling), torch's ways of rounding (autocast
    among them). `runtime/freshness.py` looks each time. An encoder answers itself where somebody
    hears of what it computes (a forward hook), where it carries a LoRA, whose scale changes from
    call to call, in training mode, where dropout draws anew, and while gradients are on. It is not
    kept alive by this, nor are its weights.

    Pictures are bitwise the same. Measured on an H100 (docs, "Passes"): encoding a known prompt and
    picture 115 → 26 ms, most of it tokenizers and looking whether the encoders changed.

    Attributes:
        prompts: how many results of a text encoder to keep; each prompt has one of CLIP and one
            of T5 (4 MiB for FLUX at 512 tokens in bfloat16).
        pictures: how many pictures to keep, with their latents (7 MiB for one of a megapixel).

    Raises:
        ValueError: a number is below 0 or not whole, or both are 0.
    """

    prompts: int = 32
    pictures: int = 8

    name: ClassVar[str] = "encoding-cache"
    stage: ClassVar[Stage] = "caching"
    slot: ClassVar[str | None] = "encoding-cache"
    exactness: ClassVar[Exactness] = "bitwise"

    def __post_init__(self) -> None:
        for name in ("prompts", "pictures"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}={value!r}; it must be a whole number from 0 on")
        if not (self.prompts or self.pictures):
            raise ValueError("EncodingCache(prompts=0, pictures=0) has nothing to keep")

    def check(self, target: Target) -> Iterator[Finding]:
        """Say where weights cannot be looked at."""
        if "sequential-offload" in target.traits:
            yield Finding(
                "info",
                "weights that are offloaded layer by layer cannot be looked at; what they encode "
                "is not kept",
            )

    def apply(self, tx: Transaction) -> Change:
        """Stand in the place of the encoders' calls."""
        pipe, prompts, pictures = tx.pipe, _Kept(self.prompts), _Kept(self.pictures)
        places: list[tuple[nn.Module, str, _Kept]] = []
        if self.prompts:
            encoders = (pipe.text_encoder, pipe.text_encoder_2)
            places += [(one, CALL_SLOT, prompts) for one in encoders if one is not None]
        if self.pictures and pipe.vae is not None:
            places.append((pipe.vae, "encode", pictures))
        for encoder, name, kept in places:
            tx.override(encoder, name, _Encoder(encoder, name, kept).ask)
        kinds = {"prompts": prompts, "pictures": pictures}
        tx.report_facts(
            lambda: {f"{k}_{n}": v for k, of in kinds.items() for n, v in of.facts().items()}
        )
        return Change(len(places), "encoders asked only for what is new")


@dataclass(eq=False)
class _Kept:
    """Answers by key, the least recently used first.

    Attributes:
        room: how many to keep.
        entries: by key: the tensors that were asked with, and the answer.
    """

    room: int
    hits: int = 0
    misses: int = 0
    entries: OrderedDict[Hashable, tuple[list[Tensor], Any]] = field(default_factory=OrderedDict)

    def find(self, alike: Hashable, asked: list[Tensor]) -> Hashable | None:
        """Return the key under which the answer to this is kept, or None."""
        for key, (before, _) in reversed(self.entries.items()):
            same = isinstance(key, tuple) and key[0] == alike
            if same and all(map(torch.equal, before, asked)):
                return key
        return None

    def take(self, key: Hashable) -> Any:
        """Hand out a copy, so that nobody can spoil what is kept."""
        self.hits += 1
        self.entries.move_to_end(key)
        return _copy(self.entries[key][1])

    def put(self, alike: Hashable, asked: list[Tensor], answer: Any) -> None:
        """Keep a copy of an answer, and make room for it."""
        self.misses += 1
        self.entries[alike, object()] = [x.clone() for x in asked], _copy(answer)
        while len(self.entries) > self.room:
            self.entries.popitem(last=False)

    def drop(self, encoder: int) -> None:
        """Let go of one encoder's answers."""
        for key in [key for key in self.entries if key[0][0] == encoder]:  # type: ignore[index]
            del self.entries[key]

    def facts(self) -> dict[str, int]:
        """Say what the report wants to know."""
        kept = [x for of in self.entries.values() for x in _tensors(of)]
        size = sum(x.nbytes for x in kept)
        return {"hits": self.hits, "misses": self.misses, "kept": len(self.entries), "bytes": size}


class _Encoder:
    """One encoder, as far as its answers may stand for it."""

    def __init__(self, encoder: nn.Module, name: str, kept: _Kept) -> None:
        number = id(self)
        self._encoder = weakref.ref(encoder, lambda _: kept.drop(number))
        self._kept, self._name = kept, name
        self._watch = Watch([encoder], apart_from=(name, "decode"))
        self._keepable: bool | None = None  # worked out anew where the encoder changed

    def ask(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer from memory, or have the encoder answer."""
        encoder = self._encoder()
        asked = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if encoder is None or not asked or not self._answers_alone(encoder, encode):
            return encode(*args, **kwargs)
        alike = id(self), rounding(asked[0].device), *_shape_of((args, kwargs))
        if (key := self._kept.find(alike, asked)) is not None:
            return self._kept.take(key)
        answer = encode(*args, **kwargs)
        self._kept.put(alike, asked, answer)
        return answer

    def _answers_alone(self, encoder: nn.Module, encode: Callable[..., Any]) -> bool:
        """Whether an answer depends on the encoder's weights and settings alone, and can be kept.

        Whoever stands around this hears of every call; whoever this stands around would not.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or anybody_hears():
            return False
        if self._name == "encode" and getattr(encode, "__self__", None) is not encoder:
            return False
        if self._watch.changed() or self._keepable is None:
            self._kept.drop(id(self))
            parts = modules.parts(encoder)
            heard = heard_by_others(encoder, apart_from=(self._name, "decode"))
            varies = any(part.training or hasattr(part, "lora_A") for part in parts)
            elsewhere = any(weight.is_meta for weight in encoder.parameters())
            self._keepable = not (heard or varies or elsewhere)
        return self._keepable


def _shape_of(asked: Any) -> tuple[Hashable, ...]:
    """Describe arguments but for the numbers in their tensors."""
    leaves, tree = tree_flatten(asked)
    return str(tree), *(
        (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else repr(x)
        for x in leaves
    )


def _copy(answer: Any) -> Any:
    """Copy an answer with its tensors. The VAE's is a distribution, which torch does not open."""

    def fresh(x: Any) -> Any:
        if isinstance(x, DiagonalGaussianDistribution):
            return DiagonalGaussianDistribution(x.parameters.clone(), x.deterministic)
        return x.clone() if isinstance(x, Tensor) else x

    return tree_map(fresh, answer)


def _tensors(kept: tuple[list[Tensor], Any]) -> list[Tensor]:
    leaves = (getattr(x, "parameters", x) for x in tree_flatten(kept)[0])
    return [x for x in leaves if isinstance(x, Tensor)]
