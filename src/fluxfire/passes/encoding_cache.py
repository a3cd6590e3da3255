"""EncodingCache: prompts and pictures that were encoded before are not encoded again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.toolkit.method_override import Shadow
from fluxfire.transaction import Transaction

_SAMPLED = 8


@dataclass(frozen=True, kw_only=True)
class EncodingCache:
    """Keeps embeddings of prompts and latents of reference pictures from earlier calls.

    Editing means one picture and many prompts, or one prompt and many pictures. A prompt is known
    by its text and all else that an encoder is asked with; a picture by its every pixel, as the
    VAE gets it. The least recently used go first.

    What was encoded by other weights does not count: each time the encoder is looked at, which
    modules and parameters it has, and eight numbers of each of these, so a component put in its
    place, a cast, or a LoRA merged into it are noticed, whichever way they came. With a LoRA's
    layers in an encoder nothing of it is kept, since their scales change from call to call.

    Kontext takes the mode of what the VAE says of a picture, not a sample, so nothing random is
    left out, and pictures are bitwise the same. Measured on an H100 (docs, "Passes"): encoding a
    known prompt and picture 113 → 5 ms.

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
                "warning",
                "sequential offloading leaves no weights to look at, so nothing will be kept",
                "use enable_model_cpu_offload() or none",
            )

    def apply(self, tx: Transaction) -> Change:
        """Shadow what encodes, on this pipeline alone."""
        pipe, prompts, pictures = tx.pipe, _Kept(self.prompts), _Kept(self.pictures)
        encoders = _Encoders(pipe, prompts, pictures)
        shadows: dict[str, Callable[..., Any]] = {}
        if self.prompts:
            shadows["_get_clip_prompt_embeds"] = partial(encoders.prompt, "")
            shadows["_get_t5_prompt_embeds"] = partial(encoders.prompt, "_2")
        if self.pictures:
            shadows["_encode_vae_image"] = encoders.picture
        for method, call in shadows.items():
            shadow = Shadow(pipe, method, partial(call, getattr(pipe, method)))
            tx.setattr(pipe, method, shadow)
        kept = {"prompts": prompts, "pictures": pictures}
        tx.report_facts(
            lambda: {f"{k}_{n}": v for k, of in kept.items() for n, v in of.facts().items()}
        )
        return Change(len(shadows), "encoders asked only for what is new")


@dataclass(eq=False)
class _Kept:
    """Results by key, the least recently used first.

    Attributes:
        room: how many to keep.
        entries: by key: what was asked with, if it must be compared, and the result.
    """

    room: int
    hits: int = 0
    misses: int = 0
    entries: OrderedDict[Hashable, tuple[Tensor | None, Tensor]] = field(
        default_factory=OrderedDict
    )

    def take(self, key: Hashable) -> Tensor:
        """Hand out a copy, so that nobody can spoil what is kept."""
        self.hits += 1
        self.entries.move_to_end(key)
        return self.entries[key][1].clone()

    def put(self, key: Hashable, asked: Tensor | None, made: Tensor) -> None:
        """Keep a copy of a result, and make room for it."""
        self.misses += 1
        self.entries[key] = (None if asked is None else asked.clone(), made.clone())
        while len(self.entries) > self.room:
            self.entries.popitem(last=False)

    def facts(self) -> dict[str, int]:
        """Say what the report wants to know."""
        tensors = [t for pair in self.entries.values() for t in pair if t is not None]
        size = sum(t.nbytes for t in tensors)
        return {"hits": self.hits, "misses": self.misses, "kept": len(self.entries), "bytes": size}


@dataclass(eq=False)
class _Stamps:
    """Tells one state of a module from another: by its parts, and eight numbers of each weight.

    Taking the numbers' places afresh at each call cost 27 ms for both text encoders, on an H100's
    host, nearly as much as encoding does; so that is done only where weights have moved.
    """

    _places: dict[int, tuple[Hashable, list[Tensor]]] = field(default_factory=dict)

    def of(self, module: nn.Module | None) -> Hashable | None:
        """Return a stamp; None if nothing can be said.

        That is where there is no module, its weights are elsewhere, it carries a LoRA, or
        gradients are on, which go with a result.
        """
        if module is None or torch.is_grad_enabled():
            return None
        if any(hasattr(part, "lora_A") for part in module.modules()):
            return None
        weights = list(module.parameters())
        if any(weight.is_meta for weight in weights):
            return None
        parts = (*map(id, weights), *(weight.data_ptr() for weight in weights))
        known, places = self._places.get(id(module), (None, []))
        if known != parts:
            places = [_sampled(weight.detach()) for weight in weights]
            self._places[id(module)] = parts, places
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for place in places:
            by_dtype.setdefault(place.dtype, []).append(place)
        numbers = tuple(tuple(torch.cat(of).float().tolist()) for of in by_dtype.values())
        rounding = (torch.is_autocast_enabled("cuda"), torch.get_float32_matmul_precision())
        return (id(module), tuple(map(id, weights)), tuple(by_dtype), numbers, rounding)


def _sampled(weight: Tensor) -> Tensor:
    """View eight numbers of a weight, far from each other."""
    return weight.flatten()[:: max(1, weight.numel() // _SAMPLED)][:_SAMPLED]


@dataclass(eq=False)
class _Encoders:
    """What encodes for one pipeline, and what is kept of it."""

    pipe: Any
    prompts: _Kept
    pictures: _Kept
    stamps: _Stamps = field(default_factory=_Stamps)

    def prompt(self, part: str, encode: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Encode a prompt by one of the text encoders, unless that was done before."""
        stamp = self.stamps.of(getattr(self.pipe, f"text_encoder{part}"))
        tokenizer = getattr(self.pipe, f"tokenizer{part}")
        asked = _hashable((args, sorted(kwargs.items())))
        if stamp is None or asked is None or tokenizer is None:
            return encode(*args, **kwargs)
        key = (part, stamp, id(tokenizer), len(tokenizer), asked)
        if key in self.prompts.entries:
            return self.prompts.take(key)
        made = encode(*args, **kwargs)
        self.prompts.put(key, None, made)
        return made

    def picture(self, encode: Callable[..., Tensor], image: Tensor, generator: Any) -> Tensor:
        """Encode a picture, unless the very same was encoded before."""
        vae = self.pipe.vae
        stamp = self.stamps.of(vae)
        if stamp is None:
            return encode(image=image, generator=generator)
        ways = tuple(getattr(vae, f"use_{way}", False) for way in ("tiling", "slicing"))
        drawn = isinstance(generator, list)  # picture by picture, which may round otherwise
        alike = (stamp, ways, drawn, image.shape, image.dtype, image.device)
        for key, (asked, _) in self.pictures.entries.items():
            if asked is None or not isinstance(key, tuple) or key[0] != alike:
                continue
            if torch.equal(asked, image):
                return self.pictures.take(key)
        made = encode(image=image, generator=generator)
        self.pictures.put((alike, object()), image, made)
        return made


def _hashable(value: Any) -> Hashable | None:
    """Make lists tuples; None for what cannot be a key."""
    if isinstance(value, list | tuple):
        parts = tuple(_hashable(part) for part in value)
        plain = all(
            made is not None or part is None for made, part in zip(parts, value, strict=True)
        )
        return parts if plain else None
    return value if isinstance(value, str | int | float | torch.device | torch.dtype) else None
