"""Weights that stay in host memory while a pass computes with a substitute on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.errors import FluxfireError
from fluxfire.kernels.checksum import read_lightly
from fluxfire.passes.shared.adapters import move_adapters_to_weights
from fluxfire.passes.shared.streaming import place
from fluxfire.runtime.generation import Listener
from fluxfire.runtime.transaction import Transaction
from fluxfire.weights import DroppedWeight, LayerWithoutWeight, class_without_weight

MOVED_ELSEWHERE = (
    "weights that fluxfire keeps in host memory are moved by something else, too "
    "(offloading was enabled?); disable that, or restore(pipe) before you enable it"
)
_IS_ON_CPU = attrgetter("is_cpu")


@dataclass(eq=False)
class HostWeights(Listener):
    """Keeps the weights of some layers in host memory.

    The parameters stay in the model, so state dicts still contain them. A weight that comes from a
    GPU is pinned. A weight on the CPU stays as it is: in a pipeline on the CPU, and where
    `Placement` left it in host memory. PEFT's adapters are always on the device of the weight that
    they add to.

    Attributes:
        model: the model. Somebody may put adapters into it at any time.
        pin: whether to pin weights that lay in host memory already, because a pass copies them to
            the GPU again and again.
        linears: the layers whose weights are in host memory.
        stay: the layers of `linears` whose weights lay in host memory before.
        device: the device from which the weights came; None if no weight was moved.
    """

    model: nn.Module
    pin: bool = False
    linears: list[nn.Linear] = field(default_factory=list)
    stay: set[nn.Linear] = field(default_factory=set)
    device: torch.device | None = None

    @classmethod
    def of(
        cls, tx: Transaction, model: nn.Module | None = None, *, pin: bool = False
    ) -> HostWeights:
        """Create the keeper of a model's weights; undo brings all weights back.

        Args:
            tx: the transaction of the pass.
            model: by default the transformer.
            pin: see the attribute.
        """
        host = cls(model or cast("nn.Module", tx.pipe.transformer), pin)
        tx.on_undo(host.bring_back)
        # These move adapters, and leave weights in host memory.
        tx.override(host.model, "_apply", host._then_move_adapters)  # of `.to()`
        tx.override(tx.pipe, "set_lora_device", host._then_move_adapters)
        return host

    def _then_move_adapters(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = plain(*args, **kwargs)
        move_adapters_to_weights(self.model)
        return made

    def offload(self, linear: nn.Linear) -> int:
        """Move one more layer's weight to host memory.

        After the last one, call `move_adapters_to_weights`.

        Returns:
            The number of bytes freed on the device.
        """
        self.linears.append(linear)
        device = computing_device(linear, self.model)
        if linear.weight.is_cpu and device.type != "cpu":
            self.stay.add(linear)
            read_lightly(linear.weight, True)
            if self.pin and device.type == "cuda":
                place(linear.weight, linear.weight.device, pin=True)
            return 0
        return self._move_to_host(linear)

    @override
    def prepare(self) -> None:
        """Move weights back to the host if `.to(device)` moved them to the device.

        Raises:
            FluxfireError: layer-by-layer offloading moves these weights too; or a weight is no
                parameter any more.
        """
        weights = [modules.parameter(linear, "weight") for linear in self.linears]
        if not all(map(_is_own_weight, self.linears, weights)):
            raise FluxfireError(
                "a layer whose weight fluxfire keeps in host memory has no parameter `weight` any "
                "more (it was pruned or parametrized?); restore(pipe), and prune before optimize()"
            )
        if not all(map(_IS_ON_CPU, weights)) or self._lost_pins(weights):
            for linear in self.linears:
                self._move_to_host(linear)
            move_adapters_to_weights(self.model)

    def _lost_pins(self, weights: Sequence[Tensor | None]) -> bool:
        """Whether some weights are no longer pinned, after a cast or an assignment."""
        if self.device is None or self.device.type != "cuda":
            return False
        return not all(weight.is_pinned() for weight in weights if type(weight) is nn.Parameter)

    def bring_back(self) -> None:
        """Move all weights to the device of their layer's bias, with the same bits.

        Without a bias, a weight goes back to the device that it came from. A weight that lay in
        host memory before stays there.
        """
        for linear in self.linears:
            self._bring_back(linear)
        move_adapters_to_weights(self.model)

    def release(self, linear: nn.Linear) -> None:
        """Bring one layer's weight back, and keep it in host memory no longer.

        After the last one, call `move_adapters_to_weights`.
        """
        self._bring_back(linear)
        self.linears = [one for one in self.linears if one is not linear]

    def _bring_back(self, linear: nn.Linear) -> None:
        if linear in self.stay:
            read_lightly(linear.weight, False)
            return
        device = self.device if linear.bias is None else linear.bias.device
        for weight in linear.parameters():  # its own, or those it was pruned to
            if device is not None and weight.device != device and not weight.is_meta:
                with modules.matching_inference_mode(weight):
                    weight.data = weight.data.to(device)

    def drop(self) -> None:
        """Free all weights. A `DroppedWeight` with the shape and dtype takes the place of each."""
        for linear in self.linears:
            if not isinstance(linear.weight, DroppedWeight):
                linear.weight = DroppedWeight.like(linear.weight, linear)
            if not isinstance(linear, LayerWithoutWeight):
                cls: Any = type(linear)
                linear.__class__ = class_without_weight(cls)

    def _move_to_host(self, linear: nn.Linear) -> int:
        weight = linear.weight
        if isinstance(linear, LayerWithoutWeight) or not isinstance(weight, nn.Parameter):
            return 0  # dropped, or lent by `torch.func.functional_call` for this call
        if weight.is_meta:
            raise FluxfireError(MOVED_ELSEWHERE)
        if weight.device.type == "cpu":
            if self._lost_pins([weight]):
                with modules.matching_inference_mode(weight):
                    weight.data = weight.data.pin_memory()
            return 0
        self.device = weight.device
        with modules.matching_inference_mode(weight):
            weight.data = weight.data.cpu().pin_memory()
        return int(weight.nbytes)


def computing_device(linear: nn.Linear, model: nn.Module) -> torch.device:
    """Return the device on which a layer computes, wherever its weight lies.

    That is its bias's device. A layer without a bias computes where the model's first parameter is.
    """
    like = linear.bias if linear.bias is not None else next(model.parameters())
    return like.device


def kept_in_host_memory(tx: Transaction) -> set[nn.Linear]:
    """Return the layers whose weights any pass keeps in host memory.

    The keeper is a listener of the pipeline, or the attribute `host` of one.
    """
    keepers = (getattr(one, "host", one) for one in tx.find_listeners(Listener))
    return {x for keeper in keepers if isinstance(keeper, HostWeights) for x in keeper.linears}


def _is_own_weight(linear: nn.Linear, weight: Tensor | None) -> bool:
    """Whether a weight is the layer's parameter, its adapter's base, or lent for one call.

    Pruning and parametrizing put a computed tensor in the weight's place, which is not registered.
    """
    return isinstance(weight, nn.Parameter) or "weight" in vars(linear)["_parameters"]
