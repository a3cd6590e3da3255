"""Checks of a pass together with other code: weights, copies, hooks, interrupts, modes, memory."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxfire import api, modules
from fluxfire.applying import apply_passes
from fluxfire.diffusers_types import DiffusersPipeline, Pipeline, Transformer
from fluxfire.errors import FluxfireError
from fluxfire.protocol import Pass
from fluxfire.runtime.conductor import Conductor, conductor_of
from fluxfire.runtime.transaction import Transaction
from fluxfire.testing.fingerprints import fingerprint
from fluxfire.testing.oracle import first_call
from fluxfire.testing.promises import (
    ROUNDING,
    Image,
    MakePipe,
    RunEdit,
    check_same_structure,
    fail,
    max_difference,
)

_INTERRUPTS = 6
_CYCLES = 3
_LITTLE = 1024  # bytes per round that count as no leak
_ALIGNED = (
    0.3  # least cosine between a lossy pass's gradient and the plain one; rounding alone gives 0.98
)
_WRONG = 1e-3  # largest relative error of any other pass's gradient


def check_changed_weights(pass_: Pass, make_pipe: MakePipe, run: RunEdit) -> None:
    """After a change of weights the next generation uses them, or raises a FluxfireError.

    A pass that edits the weights' values is exempt, because the order of both edits matters.
    """
    used, twin = api.optimize(make_pipe(), [pass_]), make_pipe()
    run(used)
    if not _alike(used, twin):
        return
    for how, change in _CHANGES.items():
        for pipe in (used, twin):
            _each_model(pipe, change)
        fresh = make_pipe()
        for name, component in modules.components(twin):
            fresh.components[name].load_state_dict(component.state_dict())
        promise = "weights that change after optimize() reach the next generation"
        try:
            off = max_difference(run(used), run(api.optimize(fresh, [pass_])))
        except FluxfireError:
            return
        if off > _tolerance(pass_):
            detail = f"a pixel differs by {off:.3g} from a fresh pipeline's with the same weights"
            fail(pass_, promise, f"After {how}, {detail}")


def check_copies(pass_: Pass, make_pipe: MakePipe, reference: Image, run: RunEdit) -> None:
    """Deep copies and pickles are plain; a pipeline that shares the models reports no passes."""
    pipe = api.optimize(make_pipe(), [pass_])
    run(pipe)
    for what, make in (("deepcopy", copy.deepcopy), ("pickle", _pickled)):
        made = make(pipe)
        promise = f"copies are plain ({what})"
        if left := _leftovers(made):
            fail(pass_, promise, f"it still has fluxfire's {', '.join(left[:5])}")
        if not np.array_equal(run(made), reference):
            fail(pass_, promise, "its picture is not the plain one's")
    for what, sharing in (
        ("copy.copy", copy.copy(pipe)),
        ("type(pipe)(**pipe.components)", type(pipe)(**pipe.components)),
    ):
        if conductor_of(sharing) is not None or api.report(sharing).passes:
            promise = "a pipeline that shares the models reports no passes"
            fail(pass_, promise, f"the result of {what} reports some")
        run(sharing)
        api.restore(sharing)
    api.restore(pipe)
    if not np.array_equal(run(pipe), reference):
        promise = "restore gives the output back bit for bit"
        fail(pass_, promise, "after the pipeline was copied, it does not")


def check_later_hooks(pass_: Pass, make_pipe: MakePipe, reference: Image, run: RunEdit) -> None:
    """Hooks that were added after `optimize` stay and work after `restore`."""
    pipe = make_pipe()
    run(pipe)
    before = fingerprint(pipe)
    api.optimize(pipe, [pass_])
    wrapped = [part for _, component in modules.components(pipe) for part in component.modules()]
    for part in wrapped:
        part.forward = functools.partial(_through, part.forward)
    _generates(pipe, run)
    api.restore(pipe)
    promise = "a forward that a hook kept works after restore"
    if not np.array_equal(run(pipe), reference):
        fail(pass_, promise, "the picture changed")
    for part in wrapped:
        vars(part).pop("forward", None)
    check_same_structure(pass_, promise, before, pipe)

    pipe, twin = make_pipe(), make_pipe()
    api.optimize(pipe, [pass_])
    for one in (pipe, twin):
        _cast_by_layer(one.transformer)
    _generates(pipe, run)
    api.restore(pipe)
    if not np.array_equal(run(pipe), run(twin)):
        promise = "restore leaves what others did since"
        fail(pass_, promise, "with layerwise casting enabled in between, the picture differs")


def check_interrupts(
    pass_: Pass, pipe: Pipeline, before: dict[str, Any], reference: Image, run: RunEdit
) -> None:
    """After an interrupted `restore`, the next `restore` finishes it."""
    counted: list[_Interrupted] = []
    _apply(pipe, pass_, lambda *args: counted.append(_Interrupted(*args)) or counted[0])  # type: ignore[func-returns-value]
    api.restore(pipe)
    undone = counted[0].undone_edits
    for at in sorted({round(i * (undone - 1) / (_INTERRUPTS - 1)) for i in range(_INTERRUPTS)}):
        _apply(pipe, pass_, functools.partial(_Interrupted, interrupt_at=at))
        with contextlib.suppress(KeyboardInterrupt):
            api.restore(pipe)
        promise = f"an interrupt at edit {at} of {undone} leaves restore something to finish"
        if conductor_of(pipe) is not None and _generates(pipe, run):
            fail(pass_, promise, "the half-restored pipeline still generated")
        api.restore(pipe)
        check_same_structure(pass_, promise, before, pipe)
    if not np.array_equal(run(pipe), reference):
        fail(pass_, "an interrupted restore can be finished", "the picture changed")


def check_modes(pass_: Pass, make_pipe: MakePipe, reference: Image, run: RunEdit) -> None:
    """Under autocast and with gradients a pass is right, or raises a FluxfireError."""
    plain, optimized = make_pipe(), api.optimize(make_pipe(), [pass_])
    device = plain.transformer.device.type
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = run(plain)
        try:
            made = run(optimized)
        except FluxfireError:
            made = cast
    moved = max(
        max_difference(cast, reference), max_difference(run(optimized), reference)
    )  # by rounding
    allowed = {"bitwise": 0.0, "close": 2 * moved + ROUNDING, "lossy": np.inf}
    off = max_difference(made, cast)
    if not (np.isfinite(made).all() and off <= allowed[pass_.exactness]):
        fail(
            pass_, "it is right under autocast", f"a pixel differs by {off:.3g} from the plain one"
        )

    inputs, _ = first_call(plain, run)
    true = _gradient(plain.transformer, inputs)
    if not torch.isfinite(true).all():  # seen on an H100, from cuDNN's backward of attention
        with sdpa_kernel(SDPBackend.MATH):
            true = _gradient(plain.transformer, inputs)
    try:
        ours = _gradient(optimized.transformer, inputs)
    except FluxfireError:
        return
    cosine = float(torch.cosine_similarity(ours.flatten(), true.flatten(), dim=0))
    wrong = float((ours - true).norm() / true.norm())
    if cosine < _ALIGNED or (pass_.exactness != "lossy" and wrong > _WRONG):
        detail = f"cosine {cosine:.3f} to the plain transformer's, relative error {wrong:.3g}"
        fail(pass_, "gradients through the transformer are true", detail)


def check_memory(pass_: Pass, pipe: Pipeline, run: RunEdit) -> None:
    """Repeated applying and restoring leaks no tensors and no modules."""
    alive = []
    for _ in range(_CYCLES):
        api.optimize(pipe, [pass_])
        run(pipe)
        api.restore(pipe)
        alive.append(_alive())
    (modules, size), (modules_then, size_then) = alive[0], alive[-1]
    if modules_then > modules or size_then > size + _CYCLES * _LITTLE:
        detail = f"modules, and bytes of tensors, after each of {_CYCLES} rounds: {alive}"
        fail(pass_, "nothing grows from one optimize to the next", detail)


def _alive() -> tuple[int, int]:
    """Count the modules, and the bytes of tensors, that are alive in this process."""
    gc.collect()
    modules, sizes = 0, {}
    for of in gc.get_objects():
        # Uses the type: some objects of torch warn when their `__class__` is read.
        if issubclass(type(of), nn.Module):
            modules += 1
        elif type(of) in (torch.Tensor, nn.Parameter) and not of.is_meta and not of.is_sparse:
            storage = of.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return modules, sum(sizes.values())


class _Interrupted(Transaction):
    """A transaction that raises KeyboardInterrupt once, right after undoing its n-th edit."""

    def __init__(
        self, pipe: Pipeline, conductor: Conductor, interrupt_at: int | None = None
    ) -> None:
        super().__init__(pipe, conductor)
        self.undone_edits = 0
        self._interrupt_at = interrupt_at

    def after_undo(self, label: str) -> None:  # noqa: ARG002 - the base's signature
        """Count the edit, and interrupt at the chosen one."""
        self.undone_edits += 1
        if self.undone_edits - 1 == self._interrupt_at:
            raise KeyboardInterrupt


def _apply(pipe: Pipeline, pass_: Pass, transaction: Callable[..., Transaction]) -> None:
    apply_passes(pipe, [pass_], transaction)


def _tolerance(pass_: Pass) -> float:
    return ROUNDING if pass_.exactness == "close" else 0.0


def _generates(pipe: Pipeline, run: RunEdit) -> bool:
    """Run, and return whether it raised no FluxfireError."""
    try:
        run(pipe)
    except FluxfireError:
        return False
    return True


def _each_model(pipe: Pipeline, change: Callable[[nn.Module], None]) -> None:
    for _, component in modules.components(pipe):
        with torch.no_grad():
            change(component)


def _alike(pipe: Pipeline, other: Pipeline) -> bool:
    """Whether two pipelines' weights have equal values."""
    for name, component in modules.components(pipe):
        state, others = component.state_dict(), other.components[name].state_dict()
        if not all(torch.equal(value, others[key].to(value)) for key, value in state.items()):
            return False
    return True


def _weights(model: nn.Module) -> Iterator[nn.Parameter]:
    for weight in model.parameters():
        if weight.is_floating_point() and not weight.is_meta:
            yield weight


def _in_place(model: nn.Module) -> None:
    for weight in _weights(model):
        if not weight.is_inference():
            weight.mul_(1.02)


def _past_the_counter(model: nn.Module) -> None:
    for weight in _weights(model):
        weight.data *= 0.97


def _loaded(model: nn.Module) -> None:
    state = model.state_dict()
    model.load_state_dict({k: v * 1.03 if v.is_floating_point() else v for k, v in state.items()})


_CHANGES = {
    "an edit of every weight in place": _in_place,
    "a write through .data, as PEFT merges a LoRA": _past_the_counter,
    "load_state_dict()": _loaded,
}


def _pickled(pipe: DiffusersPipeline) -> DiffusersPipeline:
    return pickle.loads(pickle.dumps(pipe))  # noqa: S301 - just made


def _leftovers(pipe: Pipeline) -> list[str]:
    """Return the names of fluxfire's classes and attributes in a copy."""
    own = [f"class {type(pipe).__name__}"] if conductor_of(pipe) is not None else []
    for name, component in modules.components(pipe):
        for path, part in component.named_modules():
            where = f"{name}.{path}".rstrip(".")
            values = (part, *vars(part).values())
            own += [
                f"{where}: {type(of).__qualname__}"
                for of in values
                if type(of).__module__.startswith("fluxfire.passes")
                or type(of).__module__ in ("fluxfire.edits.override", "fluxfire.toolkit")
            ]
            own += [f"{where}.{key}" for key in vars(part) if key.startswith("_fluxfire")]
    return own


def _through(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def _cast_by_layer(transformer: Transformer) -> None:
    transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer.dtype
    )


def _gradient(transformer: Transformer, inputs: dict[str, Any]) -> torch.Tensor:
    x = inputs["hidden_states"].detach().clone().requires_grad_()
    with torch.enable_grad():
        out = transformer(**{**inputs, "hidden_states": x})[0]
        if not out.requires_grad:
            return torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient.detach()
