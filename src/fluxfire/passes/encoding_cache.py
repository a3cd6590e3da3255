"""EncodingCache: prompts and pictures that were encoded before are not encoded again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.shadow import Shadow

if TYPE_CHECKING:
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
    left out, and pictures are bitwise the same.

    Attributes:
        prompts: how many results of a text encoder to keep; each prompt has one of CLIP and one
            of T5 (4 MiB for FLUX at 512 tokens in bfloat16).
        pictures: how many pictures to keep, with their latents (7 MiB for one of a megapixel).
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
        pipe = tx.pipe
        kept = {"prompts": _Kept(self.prompts), "pictures": _Kept(self.pictures)}
        shadows: dict[str, Callable[..., Any]] = {}
        if self.prompts:
            for method, part in (("_get_clip_prompt_embeds", ""), ("_get_t5_prompt_embeds", "_2")):
                encode = partial(_prompt, pipe, part, kept["prompts"], getattr(pipe, method))
                shadows[method] = encode
        if self.pictures:
            method = "_encode_vae_image"
            shadows[method] = partial(_picture, pipe, kept["pictures"], getattr(pipe, method))
        for method, call in shadows.items():
            tx.setattr(pipe, method, Shadow(pipe, method, call))
        tx.tell(lambda: {f"{k}_{n}": v for k, of in kept.items() for n, v in of.facts().items()})
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


def _prompt(
    pipe: Any, part: str, kept: _Kept, encode: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Tensor:
    """Encode a prompt by one of the text encoders, unless that was done before."""
    stamp = _stamp(getattr(pipe, f"text_encoder{part}"))
    tokenizer = getattr(pipe, f"tokenizer{part}")
    asked = _hashable((args, sorted(kwargs.items())))
    if stamp is None or asked is None or tokenizer is None:
        return encode(*args, **kwargs)
    key = (part, stamp, id(tokenizer), len(tokenizer), asked)
    if key in kept.entries:
        return kept.take(key)
    made = encode(*args, **kwargs)
    kept.put(key, None, made)
    return made


def _picture(
    pipe: Any, kept: _Kept, encode: Callable[..., Tensor], image: Tensor, generator: Any
) -> Tensor:
    """Encode a picture, unless the very same was encoded before."""
    vae = pipe.vae
    stamp = _stamp(vae)
    if stamp is None:
        return encode(image=image, generator=generator)
    ways = tuple(getattr(vae, f"use_{way}", False) for way in ("tiling", "slicing"))
    alike = (stamp, ways, isinstance(generator, list), image.shape, image.dtype, image.device)
    for key, (asked, _) in kept.entries.items():
        if asked is None or not isinstance(key, tuple) or key[0] != alike:
            continue
        if torch.equal(asked, image):
            return kept.take(key)
    made = encode(image=image, generator=generator)
    kept.put((alike, object()), image, made)
    return made


def _stamp(module: nn.Module | None) -> Hashable | None:
    """Tell one state of a module from another: by its parts, and eight numbers of each weight.

    Returns:
        None if nothing can be said: there is no module, its weights are elsewhere, or it
        carries a LoRA.
    """
    if module is None or any(hasattr(part, "lora_A") for part in module.modules()):
        return None
    weights = list(module.parameters())
    if any(weight.is_meta for weight in weights):
        return None
    samples: dict[torch.dtype, list[Tensor]] = {}
    with torch.no_grad():
        for weight in weights:
            every = max(1, weight.numel() // _SAMPLED)
            samples.setdefault(weight.dtype, []).append(weight.flatten()[::every][:_SAMPLED])
        numbers = tuple(tuple(torch.cat(of).float().tolist()) for of in samples.values())
    return (id(module), tuple(map(id, weights)), tuple(samples), numbers)


def _hashable(value: Any) -> Hashable | None:
    """Make lists tuples; None for what cannot be a key."""
    if isinstance(value, list | tuple):
        parts = tuple(_hashable(part) for part in value)
        plain = all(
            made is not None or part is None for made, part in zip(parts, value, strict=True)
        )
        return parts if plain else None
    return value if isinstance(value, str | int | float | torch.device | torch.dtype) else None
