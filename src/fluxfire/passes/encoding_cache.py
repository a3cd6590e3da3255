"""EncodingCache: reuse the encodings of repeated prompts and reference pictures."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from fluxfire import modules
from fluxfire.edits.override import CALL_SLOT
from fluxfire.modules import has_global_hooks
from fluxfire.passes.shared.step_settings import check_whole_number
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.runtime.freshness import Watch, has_foreign_hooks, numeric_settings
from fluxfire.runtime.transaction import Transaction


@dataclass(frozen=True, kw_only=True)
class EncodingCache:
    """Caches the text encoders' results for prompts, and the VAE's for reference pictures.

    Editing often means one picture and many prompts, or one prompt and many pictures. If an encoder
    gets the same tokens or the same pixels again, its result comes from the cache. Everything
    around it runs as before: tokenizers, the scaling of latents, random sampling. A full cache
    drops its least recently used result.

    The results of an encoder are dropped when anything about it changes: its weights, its layers,
    its settings (such as tiling), or torch's rounding settings (such as autocast).
    `runtime/freshness.py` checks this at every call. The encoder always runs if a forward hook
    observes it, if it has a LoRA (whose scale may change from call to call), in training mode
    (where dropout is random), and while gradients are on. The cache holds no strong reference to an
    encoder or its weights.

    Pictures are bitwise the same. Measured on an H100 (docs, "Passes"): encoding a known prompt and
    picture 91 → 14 ms. Most of these 14 ms go to the tokenizers, and to the check whether the
    encoders changed.

    Attributes:
        prompts: how many results of text encoders to keep; a prompt has two, CLIP's and T5's (4 MiB
            for FLUX at 512 tokens in bfloat16).
        pictures: how many pictures to keep, with their latents (7 MiB for one megapixel).

    Raises:
        ValueError: a number is not a whole number or is below 0, or both are 0.
    """

    prompts: int = 32
    pictures: int = 8

    name: ClassVar[str] = "encoding-cache"
    stage: ClassVar[Stage] = "caching"
    slot: ClassVar[str | None] = "encoding-cache"
    exactness: ClassVar[Exactness] = "bitwise"

    def __post_init__(self) -> None:
        for name in ("prompts", "pictures"):
            check_whole_number(name, getattr(self, name), 0)
        if not (self.prompts or self.pictures):
            raise ValueError("EncodingCache(prompts=0, pictures=0) has nothing to keep")

    def check(self, target: Target) -> Iterator[Finding]:
        """Remark if the encoders' weights cannot be checked for changes."""
        if "sequential-offload" in target.traits:
            yield Finding(
                "info",
                "fluxfire cannot check weights that are offloaded layer by layer, so it does not "
                "cache the results of these encoders",
            )

    def apply(self, tx: Transaction) -> Change:
        """Override the encoders' calls."""
        pipe, prompts, pictures = tx.pipe, _ResultCache(self.prompts), _ResultCache(self.pictures)
        places: list[tuple[nn.Module, str, _ResultCache]] = []
        if self.prompts:
            encoders = (pipe.text_encoder, pipe.text_encoder_2)
            places += [(one, CALL_SLOT, prompts) for one in encoders if one is not None]
        if self.pictures and pipe.vae is not None:
            places.append((cast("nn.Module", pipe.vae), "encode", pictures))
        for encoder, name, cache in places:
            tx.override(encoder, name, _CachedEncoder(encoder, name, cache).encode)
        caches = {"prompts": prompts, "pictures": pictures}
        tx.report_facts(
            lambda: {
                f"{kind}_{name}": value
                for kind, cache in caches.items()
                for name, value in cache.facts().items()
            }
        )
        return Change(len(places), "encoders run only for new inputs")


class _Found(NamedTuple):
    result: Any


@dataclass(eq=False)
class _ResultCache:
    """An LRU cache of encoder results; the first entry is the least recently used.

    Several threads may use it: pipelines may share an encoder, and `fluxfire.report` reads it. So
    no method iterates over the dictionary itself.

    Attributes:
        room: how many results to keep.
        entries: by key: the input tensors, and the result. A key is (signature, unique object);
            several entries may have the same signature, and differ in the inputs' numbers.
    """

    room: int
    hits: int = 0
    misses: int = 0
    entries: OrderedDict[Hashable, tuple[list[Tensor], Any]] = field(default_factory=OrderedDict)

    def find(self, signature: Hashable, inputs: list[Tensor]) -> _Found | None:
        """Return a copy of the result for this signature and equal inputs, or None.

        A copy, so that the caller cannot change the cached result.
        """
        for key, (cached_inputs, result) in reversed(list(self.entries.items())):
            same = isinstance(key, tuple) and key[0] == signature
            if same and all(map(torch.equal, cached_inputs, inputs)):
                self.hits += 1
                with suppress(KeyError):  # another thread may have dropped it
                    self.entries.move_to_end(key)
                return _Found(_copy_result(result))
        return None

    def put(self, signature: Hashable, inputs: list[Tensor], result: Any) -> None:
        """Add a copy of a result; if the cache is full, drop the least recently used result."""
        self.misses += 1
        self.entries[signature, object()] = [x.clone() for x in inputs], _copy_result(result)
        while len(self.entries) > self.room:
            with suppress(KeyError):
                self.entries.popitem(last=False)

    def drop(self, encoder: int) -> None:
        """Drop all results of one encoder."""
        for key in list(self.entries):
            if key[0][0] == encoder:  # type: ignore[index]
                self.entries.pop(key, None)

    def facts(self) -> dict[str, int]:
        """Return counts and bytes for the report."""
        tensors = [x for entry in list(self.entries.values()) for x in _tensors(entry)]
        size = sum(x.nbytes for x in tensors)
        return {"hits": self.hits, "misses": self.misses, "kept": len(self.entries), "bytes": size}


class _CachedEncoder:
    """Answers an encoder's calls from a cache where the result can only be the same."""

    def __init__(self, encoder: nn.Module, name: str, cache: _ResultCache) -> None:
        number = id(self)
        self._encoder = weakref.ref(encoder, lambda _: cache.drop(number))
        self._cache, self._name = cache, name
        self._watch = Watch([encoder], apart_from=(name, "decode"))
        self._cacheable: bool | None = None  # None: to be determined again

    def encode(self, plain_encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the cached result, or run the encoder."""
        encoder = self._encoder()
        inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if encoder is None or not inputs or not self._can_cache(encoder, plain_encode):
            return plain_encode(*args, **kwargs)
        signature = id(self), numeric_settings(inputs[0].device), *_describe((args, kwargs))
        if (found := self._cache.find(signature, inputs)) is not None:
            return found.result
        result = plain_encode(*args, **kwargs)
        self._cache.put(signature, inputs, result)
        return result

    def _can_cache(self, encoder: nn.Module, plain_encode: Callable[..., Any]) -> bool:
        """Whether a result depends on inputs, weights and settings alone, and nobody observes it.

        A function that wraps this override still sees every call. A function that this override
        wraps would not see the calls that the cache answers, so then nothing is cached.
        """
        if modules.computes_derivatives() or torch.compiler.is_compiling() or has_global_hooks():
            return False
        if self._name == "encode" and getattr(plain_encode, "__self__", None) is not encoder:
            return False
        if self._watch.changed() or self._cacheable is None:
            self._cache.drop(id(self))
            parts = modules.submodules(encoder)
            observed = has_foreign_hooks(encoder, apart_from=(self._name, "decode"))
            varies = any(part.training or modules.has_adapter(part) for part in parts)
            offloaded = any(weight.is_meta for weight in encoder.parameters())
            self._cacheable = not (observed or varies or offloaded)
            self._watch.accept()
        return self._cacheable


def _describe(arguments: Any) -> tuple[Hashable, ...]:
    """Describe arguments completely, except for the numbers in their tensors."""
    leaves, tree = tree_flatten(arguments)
    return str(tree), *(
        (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else repr(x)
        for x in leaves
    )


def _copy_result(result: Any) -> Any:
    """Copy a result with its tensors.

    The VAE returns a distribution, whose tensors torch's tree functions do not find.
    """

    def copy(x: Any) -> Any:
        if isinstance(x, DiagonalGaussianDistribution):
            return DiagonalGaussianDistribution(x.parameters.clone(), x.deterministic)
        return x.clone() if isinstance(x, Tensor) else x

    return tree_map(copy, result)


def _tensors(entry: tuple[list[Tensor], Any]) -> list[Tensor]:
    leaves = (getattr(x, "parameters", x) for x in tree_flatten(entry)[0])
    return [x for x in leaves if isinstance(x, Tensor)]
