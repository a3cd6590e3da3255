"""check_pass: our own passes keep every promise, and each broken promise is found."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch._inductor import config as inductor_config

from doubles import Bare, HalfTheTokens, Listen, ScaleTemb, SkipBlock
from fluxfire import Change, Finding, api
from fluxfire.errors import FluxfireWarning
from fluxfire.passes import (
    Attention,
    Compile,
    EncodingCache,
    FirstBlockCache,
    FusedBlocks,
    MemoryLayout,
    ModulationTable,
    QKVFusion,
    ReferenceCache,
)
from fluxfire.runtime.generation import Listener, Live
from fluxfire.testing import ConformanceError, check_pass, edit, forward_errors, tiny_kontext
from own_passes import own_passes
from thinned import exhaustive, half

OURS = own_passes()
DOUBLES = [Listen(), ScaleTemb(), SkipBlock(), HalfTheTokens()]


@pytest.mark.parametrize("pass_", [*OURS, *DOUBLES], ids=lambda p: p.name)
def test_passes_conform(pass_):
    check_pass(pass_)


@pytest.mark.parametrize(
    "pass_",
    [FusedBlocks(), EncodingCache(), FirstBlockCache(schedule=[1]), ReferenceCache(2.0)],
    ids=lambda p: p.name,
)
def test_passes_conform_where_a_part_is_painted(pass_):
    check_pass(pass_, functools.partial(tiny_kontext, "inpaint"))


@pytest.mark.parametrize(
    "pass_",
    [QKVFusion(), MemoryLayout(), Attention(), FusedBlocks(), ModulationTable()],
    ids=lambda p: p.name,
)
def test_passes_conform_in_bfloat16(pass_):
    check_pass(pass_, functools.partial(tiny_kontext, dtype=torch.bfloat16))


@exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    "pass_", half([Compile(), Compile(region="transformer", fullgraph=False)], 0)
)
def test_compile_conforms(pass_):
    check_pass(pass_, functools.partial(tiny_kontext, double_blocks=1, single_blocks=1))


class Broken(Bare):
    """Conforms, until a test breaks one promise."""


def test_the_double_conforms_unbroken():
    check_pass(Broken())


@dataclass(kw_only=True)
class NotFrozen:
    setting: int = 1
    name, stage, slot, exactness = "broken", "weights", None, "bitwise"
    check, apply = Bare.check, Bare.apply


@dataclass(frozen=True, kw_only=True, repr=False)
class BadRepr(Broken):
    setting: int = 1

    def __repr__(self):
        return "BadRepr(setting=2)"


@dataclass(frozen=True)
class TwoPositional(Broken):
    one: int = 1
    two: int = 2


class CountsNothing(Broken):
    def apply(self, tx):
        return Change(7, "things")


class CountsTooLittle(Broken):
    def apply(self, tx):
        tx.setattr(tx.pipe.vae, "new", 1)
        return Change(0, "things")


class LeaksAfterWarmup(Broken):
    def after_warmup(self, tx):
        tx.pipe.vae.leaked = True


class CheckTouches(Broken):
    def check(self, target):
        target.pipe.transformer.touched = True
        return ()


class CheckSaysNonsense(Broken):
    def check(self, target):
        return ["fine"]


class Refuses(Broken):
    def check(self, target):
        yield Finding("error", "I won't", "don't ask")


class PatchesBehindTheBack(Broken):
    def apply(self, tx):
        tx.pipe.transformer.proj_out.bias.data = tx.pipe.transformer.proj_out.bias.data.clone() + 1
        return Change(1, "biases")


class LeavesAnAttribute(Broken):
    def apply(self, tx):
        tx.pipe.vae.left_behind = True
        return Change(1, "attributes")


class LeavesAFlag(Broken):
    def apply(self, tx):
        inductor_config.epilogue_fusion = not inductor_config.epilogue_fusion
        return Change(1, "flags")


class LeavesASchedulerChanged(Broken):
    def apply(self, tx):
        tx.pipe.scheduler.left_behind = True
        return Change(1, "attributes")


class LeavesTheEnvironmentChanged(Broken):
    def apply(self, tx):
        os.environ["FLUXFIRE_LEFT_BEHIND"] = "1"
        return Change(1, "variables")


class LeavesTorchPatched(Broken):
    def apply(self, tx):
        plain = torch.nn.functional.silu
        torch.nn.functional.silu = functools.wraps(plain)(lambda *a, **k: plain(*a, **k))  # noqa: PLW0108
        return Change(1, "functions")


class LeavesGradientsOff(Broken):
    def apply(self, tx):
        tx.pipe.transformer.requires_grad_(False)
        return Change(1, "models")


class ShiftsTheVAE(Broken):
    exactness = "close"

    def apply(self, tx):
        bias = tx.pipe.vae.decoder.conv_out.bias
        old = bias.data
        tx.on_undo(lambda: setattr(bias, "data", old))
        bias.data = old + 0.3
        return Change(1, "biases")


class LiesAboutBytes(Broken):
    def apply(self, tx):
        return Change(1, "things", bytes=-1000)


class PatchesTheClass(Broken):
    def apply(self, tx):
        cls = type(tx.pipe.transformer)
        plain = cls.forward
        tx.on_undo(lambda: setattr(cls, "forward", plain))
        cls.forward = functools.wraps(plain)(lambda *a, **k: plain(*a, **k))  # noqa: PLW0108
        return Change(1, "classes")


class Wrapping(Broken):
    provides = frozenset({"wraps-blocks"})


class WrapsUndeclared(Broken):
    exactness = "lossy"

    def apply(self, tx):
        return SkipBlock().apply(tx)


class WrapsWrongly(Wrapping):
    def apply(self, tx):
        tx.wrap_blocks(lambda run, streams: run(streams))
        return Change(1, "runs")


class NotBitwise(Wrapping):
    def apply(self, tx):
        return SkipBlock().apply(tx)


class NotClose(Wrapping):
    exactness = "close"

    def apply(self, tx):
        return SkipBlock().apply(tx)


class RecordsTooLate(Broken):
    def apply(self, tx):
        module = tx.pipe.transformer
        module.first, module.second = 1, 2
        tx.on_undo(lambda: delattr(module, "first"))
        tx.on_undo(lambda: delattr(module, "second"))
        return Change(2, "attributes")


class KeepsState(Wrapping):
    exactness = "lossy"

    def apply(self, tx):
        class Counting(Listener):
            calls = 0

            def on_step(self, call):
                type(self).calls += 1
                return super().on_step(call)

        counting = Counting()
        tx.listen(counting)

        def drift(run, streams, blocks, call):
            out = run(streams, blocks)
            return type(out)(out.image + counting.calls, out.text, *list_rest(out))

        tx.wrap_blocks(drift)
        return Change(1, "runs")


class Prepared(Broken):
    """Multiplies with weights as they were when it was applied."""

    def apply(self, tx):
        out = tx.pipe.transformer.proj_out
        weight, bias = out.weight.detach().clone(), out.bias.detach().clone()
        tx.set_call(out, lambda x: torch.nn.functional.linear(x, weight, bias))
        return Change(1, "products")


class CopiesKeepIt(Broken):
    exactness = "lossy"

    def apply(self, tx):
        bias = tx.pipe.transformer.proj_out.bias
        _Doubled.biases.append((bias, bias.data))
        tx.on_undo(_Doubled.undo)
        bias.data = bias.data * 2
        return Change(1, "biases")


class _Doubled:
    """Knows what to undo from elsewhere, so that a copy's undoing reaches the original."""

    biases: ClassVar[list] = []

    @classmethod
    def undo(cls):
        bias, data = cls.biases.pop() if cls.biases else (None, None)
        if bias is not None:
            bias.data = data


class Slower(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * self.factor


class KeptForward(Broken):
    exactness = "lossy"

    def apply(self, tx):
        tx.setattr(tx.pipe.transformer.proj_out, "factor", 1.01)
        tx.set_class(tx.pipe.transformer.proj_out, Slower)
        return Change(2, "things of the last layer")


class PutsBackWhatWas(Broken):
    """Undoes to the numbers that were, whatever became of them since."""

    exactness = "lossy"

    def apply(self, tx):
        weight = tx.pipe.transformer.single_transformer_blocks[0].proj_out.weight
        tx.on_undo(functools.partial(setattr, weight, "data", weight.data))
        weight.data = weight.data + 0.01
        return Change(1, "weights")


class UndoesOnce(Broken):
    exactness = "lossy"

    def apply(self, tx):
        bias = tx.pipe.transformer.proj_out.bias
        old = [bias.data]
        tx.on_undo(lambda: setattr(bias, "data", old.pop()))
        bias.data = bias.data * 2
        return Change(1, "biases")


class FailsUnderAutocast(Broken):
    def apply(self, tx):
        out = tx.pipe.transformer.proj_out
        plain = out.forward

        def call(x):
            return torch.ops.aten.addmm(out.bias, x.flatten(0, 1), out.weight.t()).view(
                *x.shape[:2], -1
            )

        tx.set_call(out, lambda x: call(x) if x.dtype is out.weight.dtype else plain(x) * 2)
        return Change(1, "products")


class CutsGradients(Broken):
    def apply(self, tx):
        block = tx.pipe.transformer.single_transformer_blocks[0]
        plain = block._call_impl

        def call(*args, **kwargs):
            with torch.no_grad():
                return plain(*args, **kwargs)

        tx.set_call(block, call)
        return Change(1, "blocks")


class Hoards(Broken):
    kept: ClassVar[list] = []

    def apply(self, tx):
        self.kept.append(torch.zeros(1000))
        tx.setattr(tx.pipe.transformer, "hoarded", len(self.kept))
        return Change(1, "attributes")


@dataclass(frozen=True, kw_only=True)
class Tuned(Wrapping):
    """Adds to what the blocks make; `amount` can change while it is applied."""

    amount: float = 0.1
    times: int = 1

    exactness = "lossy"
    tunable = frozenset({"amount"})

    def off(self):
        return replace(self, amount=0.0)

    def apply(self, tx):
        live = tx.live(self)
        tx.wrap_blocks(functools.partial(self._add, live))
        return Change(1, "runs")

    @staticmethod
    def _add(live, run, streams, blocks, call):
        out, settings = run(streams, blocks), live.settings
        # A constant would be lost in the last norm.
        return replace(out, image=out.image + settings.amount * settings.times * out.image.flip(-1))


class TunedWithoutOff(Tuned):
    off = property()  # it has none


class TunedRounds(Tuned):
    """With the settings of its `off` it is close."""

    @property
    def exactness(self):
        return "lossy" if self.amount else "close"

    @staticmethod
    def _add(live, run, streams, blocks, call):
        out = run(streams, blocks)
        return replace(out, image=out.image + (1e-7 + live.settings.amount) * out.image.flip(-1))


class FindsNothing(Tuned):
    """On another pipeline it would wrap the blocks."""

    exactness = "bitwise"

    def apply(self, tx):
        return Change(0, "runs")


class ProvidesAList(Tuned):
    provides = ("wraps-blocks",)


class Quantizes(Broken):
    """Keeps the plain weight as the parameter, and computes with another."""

    exactness = "lossy"
    provides = frozenset({"quantized"})

    def apply(self, tx):
        out, narrow = tx.pipe.transformer.proj_out, torch.nn.Module()
        weight = (out.weight.detach() * 100).to(torch.int8)
        narrow.register_buffer("weight", weight, persistent=False)
        tx.setattr(out, "narrow", narrow)

        def call(x):
            return torch.nn.functional.linear(x, (out.weight * 100).to(torch.int8) / 100, out.bias)

        tx.set_call(out, call)
        return Change(1, "layers", bytes=weight.nbytes)


class ProvidesWraps(Broken):
    provides = frozenset({"wraps-blocks"})

    def apply(self, tx):
        tx.setattr(tx.pipe.vae, "new", 1)
        return Change(1, "attributes")


class ProvidesQuantized(ProvidesWraps):
    provides = frozenset({"quantized"})


class ProvidesLora(Tuned):
    provides = frozenset({"wraps-blocks", "lora"})


class ProvidesNoTrait(Broken):
    provides = frozenset({"wrap-blocks"})


class TunesNoField(Tuned):
    tunable = frozenset({"amounts"})


class TunesUnknown(Tuned):
    """Never asks for settings that can change."""

    def apply(self, tx):
        tx.wrap_blocks(functools.partial(self._add, Live(self)))
        return Change(1, "runs")


class TunedOnce(Tuned):
    """Reads the settings when it is applied, and not again."""

    def apply(self, tx):
        tx.wrap_blocks(functools.partial(self._add, Live(tx.live(self).settings)))
        return Change(1, "runs")


class TunedForGood(Tuned):
    """Once off, it stays off."""

    @staticmethod
    def _add(live, run, streams, blocks, call):
        if not live.settings.amount:
            vars(live)["gone"] = True
        if "gone" in vars(live):
            return run(streams, blocks)
        return Tuned._add(live, run, streams, blocks, call)


class OffButNotTunable(Tuned):
    tunable = frozenset()


class OffIsOfAnotherClass(Tuned):
    def off(self):
        return Tuned(amount=0.0)


class OffIsNone(Tuned):
    def off(self):
        return None


class OffChangesAFixedField(Tuned):
    def off(self):
        return replace(self, times=0)


class OffIsNotOff(Tuned):
    def off(self):
        return replace(self, amount=0.01)


class OffIsNotClose(TunedRounds):
    @staticmethod
    def _add(live, run, streams, blocks, call):
        out = run(streams, blocks)
        return replace(out, image=out.image + (1e-4 + live.settings.amount) * out.image.flip(-1))


class OffNeedsArguments(Tuned):
    def off(self, how):
        return replace(self, amount=how)


class AfterWarmupNeedsMore(Broken):
    def after_warmup(self, tx, pipe):
        """Do nothing."""


class NamesAndName(Tuned):
    """`names` is no misspelt `name`, since that is there, too."""

    name, names = "tuned", ("a", "b")


class SpeltProvide(Broken):
    provide = frozenset({"quantized"})


class SpeltTuneable(Broken):
    tuneable = frozenset()


class SpeltAfterWarmUp(Broken):
    def after_warm_up(self, tx):
        """Do nothing."""


class SpeltExactnes(Broken):
    exactnes = "lossy"


def list_rest(streams):
    return streams.temb, streams.rotary, streams.attention_kwargs


@pytest.fixture(autouse=True)
def _flags_back():
    before = inductor_config.epilogue_fusion, torch.nn.functional.silu
    yield
    inductor_config.epilogue_fusion, torch.nn.functional.silu = before
    os.environ.pop("FLUXFIRE_LEFT_BEHIND", None)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (NotFrozen(), "its configuration is frozen"),
        (BadRepr(), "its repr rebuilds it"),
        (TwoPositional(), "its fields are keyword-only"),
        (CountsNothing(), "Change.count is 0 exactly when nothing was changed"),
        (CountsTooLittle(), "Change.count is 0 exactly when nothing was changed"),
        (LeaksAfterWarmup(), "restore gives the structure back"),
        (CheckTouches(), "check changes nothing"),
        (CheckSaysNonsense(), "check yields Findings"),
        (Refuses(), "it can be applied to the pipeline of make_pipe"),
        (PatchesBehindTheBack(), "restore gives the output back bit for bit"),
        (LeavesAnAttribute(), "restore gives the structure back"),
        (LeavesAFlag(), "restore gives the structure back"),
        (LeavesASchedulerChanged(), "restore gives the structure back"),
        (LeavesTheEnvironmentChanged(), "restore gives the structure back"),
        (LeavesTorchPatched(), "restore gives the structure back"),
        (LeavesGradientsOff(), "restore gives the structure back"),
        (ShiftsTheVAE(), "it is close"),
        (LiesAboutBytes(), "Change.bytes is what weights and buffers grew by"),
        (PatchesTheClass(), "a second pipeline is left alone"),
        (WrapsUndeclared(), "what it provides is declared"),
        (WrapsWrongly(), "it raises nothing. It raised TypeError"),
        (NotBitwise(), "it is bitwise"),
        (NotClose(), "it is close"),
        (RecordsTooLate(), "a failure at edit"),
        (KeepsState(), "nothing is kept from one generation to the next"),
        (Broken, "it has the members of fluxfire.Pass"),
        (Prepared(), "weights that change after optimize"),
        (CopiesKeepIt(), r"copies are plain \(deepcopy\)"),
        (KeptForward(), "it raises nothing. It raised TypeError: super"),
        (PutsBackWhatWas(), "restore leaves what others did since"),
        (UndoesOnce(), "it raises nothing. It raised RestoreError: .*pop from empty list"),
        (FailsUnderAutocast(), "it is right under autocast"),
        (CutsGradients(), "gradients through the transformer are true"),
        (Hoards(), "nothing grows from one optimize to the next"),
        (ProvidesWraps(), "what it provides is true. it provides wraps-blocks"),
        (ProvidesQuantized(), "what it provides is true. it provides quantized"),
        (ProvidesLora(), "what it provides is true. it provides lora"),
        (ProvidesNoTrait(), "it has the members of fluxfire.Pass. .*'wrap-blocks', which is no"),
        (TunesNoField(), "it has the members of fluxfire.Pass. .*'amounts', which is no field"),
        (TunesUnknown(), "what is tunable can change. apply must call tx.live"),
        (TunedOnce(), r"with the settings of off\(\) it does nothing. a pixel differs"),
        (TunedForGood(), r"after using\(\) the settings are those from before"),
        (OffButNotTunable(), r"a pass with off\(\) is tunable"),
        (OffIsOfAnotherClass(), r"off\(\) returns the pass with other settings. .*Tuned\(amount"),
        (OffIsNone(), r"off\(\) returns the pass with other settings. it returned None"),
        (OffChangesAFixedField(), r"off\(\) changes tunable fields only. times changed too"),
        (OffIsNotOff(), r"with the settings of off\(\) it does nothing. a pixel differs"),
        (OffIsNotClose(), r"with the settings of off\(\) it does nothing: at most twice"),
        (OffNeedsArguments(), "it has the members of fluxfire.Pass. .* off that cannot be called"),
        (AfterWarmupNeedsMore(), "it has the members of fluxfire.Pass. .* one argument, tx"),
        (SpeltProvide(), "the names of the protocol. did you mean `provides`. You wrote `provide`"),
        (
            SpeltTuneable(),
            "the names of the protocol. did you mean `tunable`. You wrote `tuneable`",
        ),
        (
            SpeltAfterWarmUp(),
            "the protocol. did you mean `after_warmup`. You wrote `after_warm_up`",
        ),
        (
            SpeltExactnes(),
            "the names of the protocol. did you mean `exactness`. You wrote `exactnes`",
        ),
    ],
)
def test_each_broken_promise_is_found(broken, promise):
    with pytest.raises(ConformanceError, match=promise):
        check_pass(broken)


@pytest.mark.parametrize(
    "pass_",
    [
        Tuned(),
        TunedWithoutOff(),
        TunedRounds(),
        FindsNothing(),
        ProvidesAList(),
        Quantizes(),
        NamesAndName(),
    ],
    ids=repr,
)
def test_what_is_not_broken_conforms(pass_):
    check_pass(pass_)


class LossyByName(Broken):
    exactness = "lossy"


def test_a_lossy_pass_that_does_nothing_gets_a_warning():
    with pytest.warns(FluxfireWarning, match="LossyByName.* changes nothing.* or declare") as seen:
        check_pass(LossyByName())
    assert seen[0].filename == __file__


LOSSY = {pass_.name for pass_ in OURS if pass_.exactness == "lossy"}


@pytest.mark.parametrize("name", sorted(LOSSY))
def test_with_some_settings_no_lossy_pass_does_nothing(name):
    """Else `check_pass` would test nothing of it; see SETTINGS in tests/own_passes.py."""
    plain = edit(tiny_kontext())
    tried = [pass_ for pass_ in OURS if pass_.name == name]
    assert any((edit(api.optimize(tiny_kontext(), [p])) != plain).any() for p in tried)


def test_a_pass_defined_in_a_function_conforms():
    @dataclass(frozen=True, kw_only=True)
    class Local(Broken):
        setting: int = 3

    check_pass(Local())


def test_the_float64_oracle_is_far_more_exact_than_what_it_judges():
    plain = tiny_kontext(dtype=torch.bfloat16)
    ours, eager = forward_errors(plain, tiny_kontext(dtype=torch.bfloat16), edit)
    assert ours == eager
    assert 1e-4 < eager < 0.1
    ours, eager = forward_errors(tiny_kontext(), tiny_kontext(), edit)
    assert ours == eager
    assert 1e-8 < eager < 1e-5
