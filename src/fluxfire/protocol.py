"""The contract between fluxfire and a pass. No torch in here.

A pass is any object with the members of `Pass`; nothing needs to be inherited. By
convention it is a frozen, keyword-only dataclass whose fields are its configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from fluxfire.configured import TRAITS, Configured, Stage, Trait, Traits
from fluxfire.diffusers_types import Pipeline

if TYPE_CHECKING:  # so that this file loads no torch
    from fluxfire.environment import Environment
    from fluxfire.runtime.transaction import Transaction

__all__ = [
    "BOUNDARIES",
    "EXACTNESS",
    "OPTIONAL",
    "STAGES",
    "TRAITS",
    "Change",
    "Configured",
    "Exactness",
    "Finding",
    "Level",
    "Pass",
    "Stage",
    "Target",
    "Trait",
    "configured",
    "provided_traits",
]

Exactness = Literal["bitwise", "close", "lossy"]
Level = Literal["error", "warning", "info"]

OPTIONAL = ("provides", "tunable", "off", "after_warmup")
"""Members of a pass that it may have. `fluxfire.testing.check_pass` looks at them, too."""
STAGES: tuple[Stage, ...] = ("environment", "weights", "blocks", "caching", "artifacts", "compile")
EXACTNESS: tuple[Exactness, ...] = ("bitwise", "close", "lossy")

BOUNDARIES: Mapping[Stage, str] = {
    "environment": "what it sets up must be in place before any other pass relies on it",
    "weights": "blocks, caches and graphs take the weights as they find them",
    "blocks": "caches skip, and graphs hold, the blocks as they will really run",
    "caching": "caches decide which graphs there are to save and to compile",
    "artifacts": "saved artifacts must be loaded before the first compilation",
    "compile": "a compiled graph freezes what it saw; a later change costs a second compilation",
}
"""For each stage, why it must come before the stages that follow it (for the last: why
nothing may follow). This is the sentence that an ordering error prints."""


@dataclass(frozen=True)
class Finding:
    """Something that `Pass.check` noticed.

    Attributes:
        level: `"error"` stops the plan. `optimize` issues a `"warning"` as a `FluxfireWarning`. The
            report shows an `"info"`.
        message: what the check found, with the values.
        remedy: what the user can do about it.
        instead: for an error, a pass that could take this one's place.
        trait: for an error, the trait that stands in the way. A list without the pass that provides
            it would work.

    A plan builds its suggestion from `instead` and `trait`.
    """

    level: Level
    message: str
    remedy: str = ""
    instead: Pass | None = None
    trait: Trait | None = None

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


@dataclass(frozen=True)
class Change:
    """What a pass did.

    Attributes:
        count: how many things the pass changed; it may be 0.
        what: what these things are, as a plural phrase ("attention projections fused").
        bytes: bytes of weights and buffers gained (positive) or freed (negative).
        host_bytes: how many of the freed bytes are in host memory now.
    """

    count: int
    what: str
    bytes: int = 0
    host_bytes: int = 0


@dataclass(frozen=True)
class Target:
    """What `Pass.check` looks at.

    Attributes:
        pipe: the pipeline. Read it, and never change it.
        environment: versions and device facts.
        passes: the whole list in order, including passes that are already applied.
        traits: the traits that hold when `apply` of this pass begins: traits of the pipeline
            itself (`modules.traits`), and traits that earlier passes provide (`provides`). A pass
            refuses a pipeline because of a trait, never because of another pass's name.
    """

    pipe: Pipeline
    environment: Environment
    passes: tuple[Configured, ...] = ()
    traits: frozenset[Trait] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        """Make a misspelt trait raise an error; a plain set would only answer False."""
        object.__setattr__(self, "traits", Traits(self.traits))

    @property
    def on_gpu(self) -> bool:
        """Whether the transformer will compute on a CUDA device when this pass is applied.

        It may lie in host memory now: model offloading or an earlier pass moves it.
        """
        moved = self.traits & {"on-gpu", "model-offload"}
        return self.pipe.transformer.device.type == "cuda" or bool(moved)


@runtime_checkable
class Pass(Protocol):
    """One reversible optimization.

    Four members are optional, so a type checker does not ask for them (see `OPTIONAL`):

    - `provides: frozenset[Trait]`: traits that hold once the pass is applied.
    - `tunable: frozenset[str]`: fields that `fluxfire.using` may change while the pass is applied
      (see `Transaction.live`).
    - `off() -> Pass`: for a tunable pass, a copy whose settings make it do nothing. A service uses
      the copy to switch the pass off for one request.
    - `after_warmup(tx)`: called once `fluxfire.warmup` has run the pipeline.
    """

    name: ClassVar[str]
    """Short kebab-case name, unique among the applied passes."""
    stage: ClassVar[Stage]
    """Its place in the order of `STAGES`."""
    slot: ClassVar[str | None]
    """A name that only one pass of a list may fill (such as `"block-cache"`), or None."""

    @property
    def exactness(self) -> Exactness:
        """What the pass does to the picture, given its configuration.

        `"bitwise"`: the same bits. `"close"`: rounding only; one transformer forward in
        the deployed dtype errs from a float64 forward at most twice as much as plain
        eager does. `"lossy"`: anything else.
        """
        ...

    def check(self, target: Target) -> Iterable[Finding]:
        """Look at the pipeline, and yield everything that stands in the way. Changes nothing."""
        ...

    def apply(self, tx: Transaction) -> Change:
        """Change the pipeline, through `tx` alone, so that every edit can be undone."""
        ...


def configured(pass_: Pass) -> Configured:
    """Return what the other passes may know of this one."""
    settings: dict[str, Any] = {}
    if is_dataclass(pass_):
        settings = {f.name: getattr(pass_, f.name) for f in fields(pass_)}
    tunable = frozenset(getattr(pass_, "tunable", ()))
    return Configured(pass_.name, pass_.stage, settings, tunable)


def provided_traits(pass_: Pass) -> frozenset[Trait]:
    """Return the traits that hold once a pass is applied."""
    return frozenset(getattr(pass_, "provides", ()))
