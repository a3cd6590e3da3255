"""A pass of a list as plain data: what one pass may know of another."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal, get_args

Stage = Literal["environment", "weights", "blocks", "caching", "artifacts", "compile"]

Trait = Literal[
    "quantized",
    "lora",
    "ip-adapter",
    "compiled",
    "fused-qkv",
    "native-cache",
    "foreign-cache",
    "model-offload",
    "sequential-offload",
    "group-offload",
    "layerwise-casting",
    "context-parallel",
    "wraps-blocks",
]
"""Something that is true of a pipeline, or that a pass makes true (`Pass.provides`)."""
TRAITS: frozenset[str] = frozenset(get_args(Trait))


class Traits(frozenset[Trait]):
    """A set of traits that refuses names that are none: a misspelt one would never be found.

    Raises:
        ValueError: by every operation, naming what is no trait.
    """

    def __contains__(self, trait: object) -> bool:
        return super().__contains__(known_trait(trait))

    def __and__(self, others: AbstractSet[object]) -> Traits:
        return Traits(super().__and__(frozenset(map(known_trait, others))))

    __rand__ = __and__

    def __sub__(self, others: AbstractSet[object]) -> Traits:
        return Traits(super().__sub__(frozenset(map(known_trait, others))))


def known_trait(trait: object) -> object:
    """Return a trait.

    Raises:
        ValueError: it is none.
    """
    if trait not in TRAITS:
        raise ValueError(f"{trait!r} is no trait; there are {', '.join(sorted(TRAITS))}")
    return trait


@dataclass(frozen=True)
class Configured:
    """A pass of the list as data: what another pass may know of it.

    Attributes:
        name: the pass's `name`.
        stage: its stage.
        settings: its fields by name.
        tunable: those of them that `fluxfire.using` may change.
    """

    name: str
    stage: Stage
    settings: Mapping[str, Any]
    tunable: frozenset[str] = frozenset()

    @property
    def fixed(self) -> dict[str, Any]:
        """Those of the settings that stay as they are while the pass is applied."""
        return {name: value for name, value in self.settings.items() if name not in self.tunable}
