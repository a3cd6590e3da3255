"""Placement: what lies on the GPU, and what in host memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.errors import FluxfireError
from fluxfire.passes.shared.adapters import base_of, move_adapters_to_weights
from fluxfire.passes.shared.host_weights import kept_in_host_memory
from fluxfire.passes.shared.streaming import (
    OWNER,
    StreamedLinear,
    is_owned_by_another,
    place,
    streamed,
)
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target, Trait
from fluxfire.runtime.generation import Listener
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of
from fluxfire.text import human_bytes, read_bytes
from fluxfire.weights import StoredLinear

DECODING = 2600
"""Bytes that the VAE needs for each pixel that it decodes or encodes at once, in bfloat16."""
ROOM = DECODING * 2**20
"""Bytes to leave free: for decoding one megapixel, or for a step, which needs less."""
_MOVERS = (
    "to",
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_group_offload",
)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Puts the parts of a pipeline on the GPU as far as they fit, and leaves the rest on the host.

    Load the pipeline as diffusers does, without `.to("cuda")`, and let this pass place it. It never
    moves weights that another pass keeps in host memory: `Float8` moves only its float8 weights to
    the GPU, and `ModulationTable(host=True)` only what it computes with. So a transformer whose
    bfloat16 weights take 22 GiB needs 8.2 GiB, and at no time more.

    Everything else of the transformer, the VAE and CLIP lies on the GPU. T5's layers follow as long
    as `memory` has room for them. The other layers of T5 stay in pinned host memory, and each call
    copies their weights to the GPU. That costs time once for each new prompt, and changes no bit.
    `Int8TextEncoder` halves it, and `EncodingCache` saves it for a known prompt.

    Where the VAE would not fit beside all that, it decodes and encodes in tiles, as diffusers'
    `vae.enable_tiling()`. Tiles change the picture a little. `tiling=False` forbids them.

    It takes the place of `pipe.to("cuda")` and of diffusers' offloading. Calling one of these on
    the optimized pipeline raises an error. `restore` moves everything back to where it was.

    Not measured yet.

    Attributes:
        device: where the pipeline computes; by default `"cuda"` if there is a CUDA device, else
            `"cpu"`.
        memory: how much of the device's memory to use: bytes, or text such as `"16GiB"`. By default
            all that torch may use and other processes leave.
        tiling: whether the VAE works in tiles: None means only where it would not fit otherwise.

    Raises:
        ValueError: `memory` is no amount of memory, or `device` is no device.
    """

    device: str | None = None
    memory: str | int | None = None
    tiling: bool | None = None

    name: ClassVar[str] = "placement"
    stage: ClassVar[Stage] = "environment"
    slot: ClassVar[str | None] = "placement"

    def __post_init__(self) -> None:
        if self.memory is not None:
            read_bytes(self.memory)
        if self.device is not None:
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError):
                raise ValueError(f"device={self.device!r} is no device of torch's") from None

    @property
    def exactness(self) -> Exactness:
        """Tiles change the picture; where weights lie does not."""
        return "bitwise" if self.tiling is False else "lossy"

    @property
    def provides(self) -> frozenset[Trait]:
        """Say that the later passes find the pipeline on a GPU."""
        on_gpu = default_device(self.device).type == "cuda"
        return frozenset({"on-gpu"}) if on_gpu else frozenset()

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse a pipeline that something else places, and a device that does not exist."""
        for name, component in modules.components(target.pipe):
            if modules.is_moved(component):
                yield Finding(
                    "error",
                    f"the {name} has hooks that place it (offloading was enabled?)",
                    "load the pipeline without offloading: Placement does the same",
                )
            if is_owned_by_another(component, target.pipe):
                yield Finding(
                    "error",
                    f"a pass on another pipeline that shares the {name} decides where it lies",
                    "restore that pipeline first",
                )
        if default_device(self.device).type == "cuda" and not torch.cuda.is_available():
            yield Finding("error", f"there is no device {self.device}", "leave device out")

    def apply(self, tx: Transaction) -> Change:
        """Move all but the large layers; the first generation places these."""
        pipe, device = tx.pipe, default_device(self.device)
        model = model_of(pipe)
        encoder = max(model.text_encoders(pipe), key=_size, default=None)
        later = list(_streamable(encoder))
        blocks = model.blocks(pipe.transformer)
        large = [base_of(getattr(*at)) for block in blocks for at in model.linears(block)]
        large += [base_of(norm.linear) for b in blocks for norm in model.modulated_norms(b)]  # type: ignore[arg-type]
        waiting = {id(layer.weight) for layer in (*large, *later)}
        waiting |= {id(t) for layer in (*large, *later) for t in streamed(layer)}
        parts = [component for _, component in modules.components(pipe)]
        # One for each model, since a copy of one model undoes only what was done to that.
        moves = {part: _Moves(device, part) for part in parts}
        keeper = _Keeper(tx, self, device, moves, list(dict.fromkeys(large)), later, encoder)
        for part in parts:
            tx.on_undo(moves[part].take_back)
            tx.setattr(part, OWNER, weakref.ref(pipe))
            for module in part.modules():
                moves[part].move(t for t in _tensors(module) if id(t) not in waiting)
        for linear in later:
            if type(linear) is nn.Linear:
                tx.set_class(linear, StreamedLinear)
        for name in _MOVERS:
            if hasattr(pipe, name):
                tx.override(pipe, name, _Refusal(name, device))
        if pipe.vae is not None:
            # Inside `encode` and `decode`, so that `EncodingCache` finds these untouched.
            for name in ("_encode", "_decode"):
                tx.override(pipe.vae, name, keeper.run_vae)
        tx.listen(keeper)
        tx.report_facts(keeper.facts)
        what = f"parts placed on {device} and in host memory"
        return Change(len(parts), what, sum(of_one.gained for of_one in moves.values()))


def default_device(name: str | None = None) -> torch.device:
    """Return a device by name; by default a CUDA device if there is one, else the CPU."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _size(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield a module's own parameters and buffers."""
    yield from (p for p in vars(module)["_parameters"].values() if p is not None)
    yield from (b for b in vars(module)["_buffers"].values() if b is not None)


def _streamable(encoder: nn.Module | None) -> Iterator[nn.Linear]:
    """Yield plain linear layers, and those that a checkpoint has in float8."""
    for module in encoder.modules() if encoder is not None else ():
        if type(module) in (nn.Linear, StoredLinear) and not modules.is_hooked(module):
            yield cast("nn.Linear", module)


class _Move(NamedTuple):
    """A tensor that moved, where it came from, and whether it was pinned there."""

    tensor: Tensor
    home: torch.device
    pinned: bool


@dataclass(eq=False)
class _Moves:
    """Moves tensors of a model, and brings them back.

    Attributes:
        device: where the pipeline computes.
        part: the model, which may get adapters at any time.
        done: what moved.
    """

    device: torch.device
    part: nn.Module
    done: list[_Move] = field(default_factory=list)

    @property
    def gained(self) -> int:
        """How many bytes moved to the device."""
        return sum(move.tensor.nbytes for move in self.done if move.tensor.device == self.device)

    def move(self, tensors: Iterable[Tensor]) -> None:
        """Move tensors to the device, and remember where they came from."""
        for tensor in tensors:
            if tensor.device != self.device and not tensor.is_meta:
                self._remember(tensor)
                place(tensor, self.device)

    def keep_on_host(self, tensors: Iterable[Tensor]) -> None:
        """Put tensors into pinned host memory, and remember where they came from."""
        for tensor in tensors:
            self._remember(tensor)
            place(tensor, torch.device("cpu"), pin=self.device.type == "cuda")

    def _remember(self, tensor: Tensor) -> None:
        pinned = tensor.device.type == "cpu" and tensor.is_pinned()
        self.done.append(_Move(tensor, tensor.device, pinned))

    def take_back(self) -> None:
        """Move everything back to where it came from, with the adapters that came since."""
        while self.done:
            tensor, home, pinned = self.done[-1]
            if not tensor.is_meta:
                place(tensor, home)
                if home.type == "cpu" and not pinned and tensor.is_pinned():
                    tensor.data = tensor.data.clone()
            self.done.pop()
        move_adapters_to_weights(self.part)


@dataclass(eq=False)
class _Keeper(Listener):
    """Places the large layers once all passes are applied.

    Attributes:
        tx: the transaction of the pass.
        settings: the pass.
        device: where the pipeline computes.
        moves: what moved, by the model.
        large: the linear layers of the blocks, which other passes may keep in host memory.
        streamed: the linear layers of the largest text encoder.
        encoder: that text encoder; None if there is none.
        placed: whether the large layers have their places.
        tiled: how often the VAE worked in tiles.
    """

    tx: Transaction
    settings: Placement
    device: torch.device
    moves: dict[nn.Module, _Moves]
    large: list[nn.Module]
    streamed: list[nn.Linear]
    encoder: nn.Module | None
    placed: bool = False
    tiled: int = 0

    @override
    def prepare(self) -> None:
        """Place the large layers that no other pass keeps in host memory."""
        if self.placed:
            self._place_adapters()
            return
        kept = kept_in_host_memory(self.tx)
        large = [layer for layer in self.large if layer not in kept]
        transformer = cast("nn.Module", self.tx.pipe.transformer)
        tensors = (t for layer in large for t in (*_tensors(layer), *streamed(layer)))
        self.moves[transformer].move(tensors)
        move_adapters_to_weights(transformer)
        room = self._room()
        for layer in self.streamed:
            assert self.encoder is not None  # noqa: S101 - it has these layers
            own = [t for t in streamed(layer) if not t.is_meta]
            room -= sum(t.nbytes for t in own if t.device != self.device)
            if room >= 0:
                self.moves[self.encoder].move(own)
            elif self.device.type != "cpu":
                self.moves[self.encoder].keep_on_host(own)
        self._place_adapters()
        self.placed = True

    def _place_adapters(self) -> None:
        """Move adapters of streamed layers to the device: PEFT creates them beside the weight."""
        for component in model_of(self.tx.pipe).text_encoders(self.tx.pipe):
            for layer in filter(modules.has_adapter, modules.submodules(component)):
                below = {id(weight) for weight in base_of(layer).parameters()}
                own = [p for p in layer.parameters() if id(p) not in below]
                for tensor in own:
                    if tensor.device != self.device:
                        place(tensor, self.device)

    def _capacity(self) -> float:
        """Return how many bytes of the device the pipeline may use, with what it uses now."""
        memory = self.settings.memory
        asked = float("inf") if memory is None else read_bytes(memory)
        return min(asked, modules.usable_bytes(self.device))

    def _on_device(self) -> int:
        """Count the bytes of the pipeline's weights and buffers on the device."""
        tensors = {
            id(tensor): tensor.nbytes
            for _, component in modules.components(self.tx.pipe)
            for module in component.modules()
            for tensor in _tensors(module)
            if tensor.device == self.device and not tensor.is_meta
        }
        return sum(tensors.values())

    def _room(self) -> float:
        return self._capacity() - self._on_device() - ROOM

    def run_vae(self, plain: Callable[..., Any], picture: Tensor, *rest: Any, **named: Any) -> Any:
        """Encode or decode, in tiles if the memory would not do otherwise."""
        vae: Any = self.tx.pipe.vae
        was = vae.use_tiling
        if was or not self._should_tile(picture):
            return plain(picture, *rest, **named)
        self.tiled += 1
        vae.use_tiling = True
        try:
            return plain(picture, *rest, **named)
        finally:
            vae.use_tiling = was

    def _should_tile(self, picture: Tensor) -> bool:
        if self.settings.tiling is not None:
            return self.settings.tiling
        vae: Any = self.tx.pipe.vae
        factor = 1 if picture.shape[1] == vae.config.in_channels else _scale(vae)
        at_once = 1 if vae.use_slicing else len(picture)
        pixels = at_once * picture.shape[-1] * picture.shape[-2] * factor**2
        needed = pixels * DECODING * picture.element_size() / 2
        return needed > self._capacity() - self._on_device()

    def facts(self) -> dict[str, object]:
        """Report where the weights lie."""
        tensors = [streamed(layer)[0] for layer in self.streamed if streamed(layer)]
        on_host = [t for t in tensors if t.device != self.device]
        return {
            "device": str(self.device),
            "on_device": human_bytes(self._on_device()).lstrip("+"),
            "streamed_layers": len(on_host),
            "streamed": human_bytes(sum(t.nbytes for t in on_host)).lstrip("+"),
            "tiled": self.tiled,
        }


def _scale(vae: Any) -> int:
    """Return how many pixels a side of a latent stands for."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


@dataclass(frozen=True)
class _Refusal:
    """Stands in the place of a method that would move what `Placement` placed."""

    name: str
    device: torch.device

    def __call__(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let a change of the dtype pass.

        Raises:
            FluxfireError: the call would move the pipeline.
        """
        if self.name == "to":
            given = (*args, *kwargs.values())
            numbers = [x for x in given if not isinstance(x, bool)]
            places = [x for x in numbers if isinstance(x, str | torch.device | int)]
            if not places:
                return plain(*args, **kwargs)
        raise FluxfireError(
            f"Placement has put this pipeline's parts on {self.device} and in host memory, and "
            f"{self.name}() would move them; leave the call out, or restore(pipe) first"
        )
