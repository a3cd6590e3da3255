"""`check_pass` checks that a pass keeps every promise of the protocol."""

from __future__ import annotations

import functools
import sys
import warnings
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import numpy as np
import torch

from fluxfire import api, modules
from fluxfire.applying import apply_passes, finish_warmup
from fluxfire.diffusers_types import DiffusersPipeline, Pipeline
from fluxfire.environment import environment
from fluxfire.errors import FluxfireWarning, PassError
from fluxfire.kontext.random_weights import tiny_kontext
from fluxfire.planning.rules import misspelt_members, why_not_a_pass
from fluxfire.protocol import Change, Finding, Pass, Target, configured, provided_traits
from fluxfire.runtime.conductor import Conductor, conductor_of
from fluxfire.runtime.transaction import Transaction
from fluxfire.testing import interactions
from fluxfire.testing.fingerprints import fingerprint
from fluxfire.testing.oracle import decoding_errors, forward_errors
from fluxfire.testing.promises import (
    OTHER_SIZE,
    ROUNDING,
    SIZE,
    ConformanceError,
    Image,
    InjectedFailureError,
    MakePipe,
    RunEdit,
    check_same_structure,
    edit,
    fail,
    max_difference,
)


def check_pass(pass_: Pass, make_pipe: MakePipe = tiny_kontext, *, run: RunEdit = edit) -> None:
    """Check that a pass keeps every promise of the protocol.

    It checks the pass itself: a frozen configuration, and a repr that rebuilds it; a `check` that
    changes nothing; a correct `Change`; the declared exactness; `restore` of output and structure;
    a rollback after a failure at each recorded edit; no effect on a second pipeline; and no state
    across generations, sizes and exceptions. Of the optional members it checks that they are spelt
    right, that the traits in `provides` hold, that `using` can change what is `tunable`, and that
    with the settings of `off()` the pass does nothing.

    It also checks the pass together with other code: weights that change between generations; deep,
    shallow and pickled copies; hooks and layerwise casting between `optimize` and `restore`; an
    interrupted `restore`; autocast and gradients; and memory after repeated applying. There a pass
    may raise a `FluxfireError` instead.

    A lossy pass that leaves the picture as it was gets a `FluxfireWarning`, because then most of
    these checks show nothing. It is no broken promise: a cache may skip nothing in so few steps.

    Args:
        pass_: the configured pass.
        make_pipe: builds a new pipeline, each time with the same weights.
        run: generates with a pipeline at a size, like `edit`.

    Raises:
        ConformanceError: the pass breaks a promise; the check stops at the first one.
    """
    _check_configuration(pass_)
    _check_spelling(pass_)
    plain = make_pipe()
    reference = run(plain)
    before = fingerprint(plain)
    try:
        _check_is_pure(pass_, plain, before)
        _check_change_and_restore(pass_, plain, before, reference, run)
        _check_rollback(pass_, plain, before, reference, run)
        _check_exactness(pass_, make_pipe, reference, run)
        _check_no_state(pass_, make_pipe, run)
        _check_tunable(pass_, make_pipe, reference, run)
        _check_neighbour(pass_, make_pipe, run)
        interactions.check_changed_weights(pass_, make_pipe, run)
        interactions.check_copies(pass_, make_pipe, reference, run)
        interactions.check_later_hooks(pass_, make_pipe, reference, run)
        interactions.check_interrupts(pass_, plain, before, reference, run)
        interactions.check_modes(pass_, make_pipe, reference, run)
        interactions.check_memory(pass_, plain, run)
    except ConformanceError:
        raise
    except Exception as error:  # noqa: BLE001 - third-party code; the message names the error
        fail(pass_, "it raises nothing", f"It raised {type(error).__name__}: {error}", error)


def _check_configuration(pass_: Pass) -> None:
    if (why := why_not_a_pass(pass_)) is not None:
        fail(pass_, "it has the members of fluxfire.Pass", why)
    if not is_dataclass(pass_):
        fail(pass_, "its configuration is a frozen dataclass", f"{type(pass_)} is no dataclass")
    for field in fields(pass_):
        try:
            setattr(pass_, field.name, getattr(pass_, field.name))
        except FrozenInstanceError:
            continue
        fail(pass_, "its configuration is frozen", f"field {field.name!r} could be set")
    cls = type(pass_)
    known = vars(sys.modules[cls.__module__]) | {cls.__name__: cls}
    try:
        rebuilt = eval(repr(pass_).removeprefix(_outer(cls)), known)  # noqa: S307 - its own repr
    except Exception as error:  # noqa: BLE001 - the repr caused any error
        fail(pass_, "its repr rebuilds it", f"{pass_!r} raised {type(error).__name__}: {error}")
    if rebuilt != pass_:
        fail(pass_, "its repr rebuilds it", f"{pass_!r} gave {rebuilt!r}")
    _check_keywords(pass_)


def _outer(cls: type) -> str:
    """Return the prefix in a dataclass's repr for a class that is defined in another scope."""
    return cls.__qualname__.removesuffix(cls.__name__)


def _check_keywords(pass_: Any) -> None:
    positional = [f.name for f in fields(pass_) if f.init and not f.kw_only]
    if len(positional) > 1:
        fail(
            pass_,
            "its fields are keyword-only, but for at most one leading field",
            f"{', '.join(positional)} can be given by position",
        )


def _check_spelling(pass_: Pass) -> None:
    for attribute, member in misspelt_members(pass_).items():
        fail(
            pass_,
            "its members have the names of the protocol",
            f"did you mean `{member}`? You wrote `{attribute}`. If it is no misspelling, rename "
            f"`{attribute}`, or define `{member}` in the same class",
        )


def _check_is_pure(pass_: Pass, pipe: Pipeline, before: dict[str, Any]) -> None:
    target = Target(pipe, environment(), (configured(pass_),), modules.traits(pipe))
    findings = list(pass_.check(target))
    if others := [f for f in findings if not isinstance(f, Finding)]:
        fail(pass_, "check yields Findings", f"it gave {others[0]!r}")
    if errors := [f for f in findings if f.level == "error"]:
        fail(pass_, "it can be applied to the pipeline of make_pipe", str(errors[0]))
    check_same_structure(pass_, "check changes nothing", before, pipe)


def _check_change_and_restore(
    pass_: Pass, pipe: Pipeline, before: dict[str, Any], reference: Image, run: RunEdit
) -> None:
    bytes_before = modules.storage_bytes(pipe)
    api.optimize(pipe, [pass_])
    change = api.report(pipe).passes[0].change
    grown = modules.storage_bytes(pipe) - bytes_before
    if change.bytes + change.host_bytes != grown:
        fail(
            pass_,
            "Change.bytes is what weights and buffers grew by",
            f"it says {change.bytes}, but they grew by {grown}",
        )
    _check_provides(pass_, change, _traits(pipe))
    run(pipe)
    finish_warmup(pipe)
    run(pipe)
    api.restore(pipe)
    check_same_structure(pass_, "restore gives the structure back", before, pipe)
    if not np.array_equal(run(pipe), reference):
        fail(pass_, "restore gives the output back bit for bit", "the picture changed")


def _check_provides(pass_: Pass, change: Change, found: set[str]) -> None:
    provided = provided_traits(pass_)
    if "wraps-blocks" in found - provided:
        fail(
            pass_,
            "what it provides is declared",
            'it wraps the blocks: say provides = frozenset({"wraps-blocks"})',
        )
    # A pass that found nothing to change has given the pipeline no trait.
    if change.count and (missing := provided - found):
        fail(
            pass_,
            "what it provides is true",
            f"it provides {', '.join(sorted(missing))}, which is not found on the pipeline once it "
            f"is applied, neither by fluxfire.modules.traits nor in wrapped blocks nor in buffers "
            f"of 8 bits or fewer",
        )


def _traits(pipe: Pipeline) -> set[str]:
    """Return the traits of a pipeline, those included that its passes gave it."""
    found: set[str] = set(modules.traits(pipe))
    conductor = conductor_of(pipe)
    if conductor is not None and (conductor.stack.wrappers or conductor.stack.innermost):
        found.add("wraps-blocks")
    # A pass may compute with quantized copies, and keep the plain parameters for `restore`.
    for _, component in modules.optimizable_components(pipe):
        if any(map(_holds_few_bits, (*component.parameters(), *component.buffers()))):
            found.add("quantized")
    return found


def _holds_few_bits(tensor: torch.Tensor) -> bool:
    return tensor.dtype is not torch.bool and tensor.element_size() == 1


def _check_rollback(
    pass_: Pass, pipe: Pipeline, before: dict[str, Any], reference: Image, run: RunEdit
) -> None:
    edits, (change,) = _try_out([pass_], pipe)
    own = edits - _try_out([], pipe)[0]
    if (change.count > 0) != (own > 0):
        fail(
            pass_,
            "Change.count is 0 exactly when nothing was changed",
            f"it says {change.count}, and {own} edits were recorded",
        )
    for fail_at in range(edits):
        transaction = functools.partial(FaultyTransaction, fail_at=fail_at)
        try:
            apply_passes(pipe, [pass_], transaction)
        except PassError as error:
            if not isinstance(error.__cause__, InjectedFailureError):
                fail(pass_, "it can be applied twice", str(error))
        else:
            fail(pass_, "a failure is not swallowed", f"the one at edit {fail_at} was")
        check_same_structure(
            pass_, f"a failure at edit {fail_at} of {edits} rolls back", before, pipe
        )
    if not np.array_equal(run(pipe), reference):
        fail(pass_, "a failure rolls back bit for bit", "the picture changed")


def _check_exactness(pass_: Pass, make_pipe: MakePipe, reference: Image, run: RunEdit) -> None:
    optimized = api.optimize(make_pipe(), [pass_])
    if pass_.exactness == "bitwise":
        off = max_difference(run(optimized), reference)
        if off != 0:
            fail(pass_, "it is bitwise", f"a pixel differs by {off:.3g}")
    elif pass_.exactness == "close":
        _check_is_close(pass_, "it is close", make_pipe, optimized, run)
    elif np.array_equal(run(optimized), reference):
        warnings.warn(
            f"{pass_!r} is lossy, but changes nothing in this pipeline's picture, so check_pass "
            f"hardly tests it; try settings that act on the tiny pipeline, or declare it bitwise",
            FluxfireWarning,
            stacklevel=3,  # the caller of check_pass
        )


def _check_is_close(
    pass_: Pass, promise: str, make_pipe: MakePipe, optimized: DiffusersPipeline, run: RunEdit
) -> None:
    for what, (ours, eager) in (
        ("the transformer's", forward_errors(make_pipe(), optimized, run)),
        ("the VAE's", decoding_errors(make_pipe(), optimized)),
    ):
        if not ours <= 2 * eager:
            fail(
                pass_,
                f"{promise}: at most twice plain eager's error against float64",
                f"{what} error is {ours:.3g}, eager's {eager:.3g}",
            )


def _check_no_state(pass_: Pass, make_pipe: MakePipe, run: RunEdit) -> None:
    fresh = {size: run(api.optimize(make_pipe(), [pass_]), size) for size in (SIZE, OTHER_SIZE)}
    used = api.optimize(make_pipe(), [pass_])
    for size in (SIZE, OTHER_SIZE, SIZE):
        off = max_difference(run(used, size), fresh[size])
        if off > (ROUNDING if pass_.exactness == "close" else 0):
            fail(
                pass_,
                "nothing is kept from one generation to the next",
                f"at {size} a pixel differs by {off:.3g} from a fresh pipeline's",
            )
        try:
            run(used, size, callback_on_step_end=_raise)
        except InjectedFailureError:
            continue
        fail(pass_, "exceptions of a generation reach the caller", "one was swallowed")


def _check_tunable(pass_: Pass, make_pipe: MakePipe, reference: Image, run: RunEdit) -> None:
    off = _off(pass_)
    if not configured(pass_).tunable:
        return
    pipe = api.optimize(make_pipe(), [pass_])
    conductor = conductor_of(pipe)
    if conductor is None or all(live.settings.name != pass_.name for live in conductor.live):
        if api.report(pipe).passes[0].change.count:
            fail(pass_, "what is tunable can change", "apply must call tx.live(self)")
        return  # it found nothing to change, so there is nothing to tune
    if off is None:
        return
    made, promise = run(pipe), "with the settings of off() it does nothing"
    with api.using(pipe, off):
        difference = max_difference(run(pipe), reference)
        if off.exactness == "close":
            _check_is_close(pass_, promise, make_pipe, pipe, run)
        elif difference != 0:
            fail(pass_, promise, f"a pixel differs by {difference:.3g} from the plain pipeline's")
    difference = max_difference(run(pipe), made)
    if difference > (ROUNDING if pass_.exactness == "close" else 0):
        fail(
            pass_,
            "after using() the settings are those from before",
            f"a pixel differs by {difference:.3g}",
        )


def _off(pass_: Pass) -> Pass | None:
    """Return the pass with settings by which it does nothing; None if it has no `off`."""
    if not hasattr(pass_, "off"):
        return None
    now = configured(pass_)
    if not now.tunable:
        fail(
            pass_,
            "a pass with off() is tunable",
            "name the fields that off() changes: tunable = frozenset({...})",
        )
    promise, off = "off() returns the pass with other settings", pass_.off()
    if type(off) is not type(pass_):
        fail(pass_, promise, f"it returned {off!r}")
    then = configured(off).settings
    if changed := [name for name, value in now.fixed.items() if then[name] != value]:
        fail(
            pass_,
            "off() changes tunable fields only",
            f"{', '.join(changed)} changed too; tunable are {', '.join(sorted(now.tunable))}",
        )
    return off


def _check_neighbour(pass_: Pass, make_pipe: MakePipe, run: RunEdit) -> None:
    neighbour, pipe = make_pipe(), make_pipe()
    reference = run(neighbour)
    before = fingerprint(neighbour)
    api.optimize(pipe, [pass_])
    run(pipe)
    check_same_structure(pass_, "a second pipeline is left alone", before, neighbour)
    if not np.array_equal(run(neighbour), reference):
        fail(pass_, "a second pipeline is left alone", "its picture changed")
    api.restore(pipe)


def _try_out(passes: list[Pass], pipe: Pipeline) -> tuple[int, list[Change]]:
    """Apply passes and restore; return the number of recorded edits, and each pass's Change."""
    counted: list[FaultyTransaction] = []

    def transaction(pipe: Pipeline, conductor: Conductor) -> FaultyTransaction:
        counted.append(FaultyTransaction(pipe, conductor))
        return counted[0]

    apply_passes(pipe, passes, transaction)
    changes = [p.change for p in api.report(pipe).passes]
    api.restore(pipe)
    return counted[0].edits, changes


class FaultyTransaction(Transaction):
    """A transaction that fails right after it recorded its n-th edit.

    Attributes:
        edits: number of recorded edits.
    """

    def __init__(self, pipe: Pipeline, conductor: Conductor, fail_at: int | None = None) -> None:
        super().__init__(pipe, conductor)
        self.edits = 0
        self._fail_at = fail_at

    def after_edit(self, label: str) -> None:
        """Count the edit, and fail at the chosen one."""
        self.edits += 1
        if self.edits - 1 == self._fail_at:
            raise InjectedFailureError(f"injected after: {label}")


def _raise(*_: object) -> Change:
    raise InjectedFailureError("injected into a generation")
