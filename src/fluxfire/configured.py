"""A pass as plain data, which is all that one pass may know about another; and traits."""

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
    "on-gpu",
]
"""A fact about a pipeline. Passes add facts, too (`Pass.provides`).

`on-gpu` is such a fact: a pass moved the parts that compute to a CUDA device, though the pipeline
lay in host memory when the list was checked.
"""
TRAITS: frozenset[str] = frozenset(get_args(Trait))


class Traits(frozenset[Trait]):
    """A set of traits whose operations raise ValueError for a name that is no trait.

    A plain set would only answer False for a misspelt trait.
    """

    def __contains__(self, trait: object) -> bool:
        return super().__contains__(known_trait(trait))

    def __and__(self, others: AbstractSet[object]) -> Traits:
        return Traits(super().__and__(frozenset(map(known_trait, others))))

    __rand__ = __and__

    def __sub__(self, others: AbstractSet[object]) -> Traits:
        return Traits(super().__sub__(frozenset(map(known_trait, others))))


def known_trait(trait: object) -> object:
    """Return a trait unchanged.

    Raises:
        ValueError: there is no such trait.
    """
    if trait not in TRAITS:
        raise ValueError(f"{trait!r} is no trait; there are {', '.join(sorted(TRAITS))}")
    return trait


@dataclass(frozen=True)
class Configured:
    """A pass of the list as plain data, for other passes.

    Attributes:
        name: the pass's name.
        stage: the pass's stage.
        settings: the values of the pass's fields, by name.
        tunable: the names of the fields that `fluxfire.using` may change.
    """

    name: str
    stage: Stage
    settings: Mapping[str, Any]
    tunable: frozenset[str] = frozenset()

    @property
    def fixed(self) -> dict[str, Any]:
        """The settings that cannot change while the pass is applied."""
        return {name: value for name, value in self.settings.items() if name not in self.tunable}
