"""Ctrl-C at any instruction leaves what one more `restore` finishes."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import fluxfire
from fluxfire.applying import _one_at_a_time, apply_passes
from fluxfire.errors import FluxfireError, PlanError
from fluxfire.passes import FirstBlockCache
from fluxfire.reporting import compile_counts
from fluxfire.reporting.report import Report
from fluxfire.runtime.transaction import Transaction
from fluxfire.runtime.turns import Turns
from fluxfire.testing import differences, edit, fingerprint, tiny_kontext
from test_undo import PASSES
from thinned import half

OURS = str(Path(fluxfire.__file__).parent)
FEW = int(os.environ.get("FLUXFIRE_TEST_INTERRUPTS", "2"))  # instructions tried of each kind


def each_pass(which):
    passes = [*PASSES, FirstBlockCache(10.0)]
    return pytest.mark.parametrize("pass_", half(passes, which), ids=repr)


class Interrupter:
    """Raises KeyboardInterrupt before given instructions of fluxfire's own code, and hears it.

    Python looks for Ctrl-C between instructions. They are counted from 0. contextlib's count, too,
    since a `with` statement runs through it. What counts compilations does not: an interrupt in
    its clean-up can leave a function in dynamo's list that hears and does nothing.

    Attributes:
        seen: how many there were.
        left: at which to interrupt, in order.
        began: the number of the first instruction of each function.
    """

    def __init__(self, *at):
        self.seen, self.left, self.began = 0, sorted(at), {}

    def __enter__(self):
        self._before = sys.gettrace()
        self.arm()
        return self

    def __exit__(self, kind, *_):
        sys.settrace(self._before)
        self.left.clear()
        return kind is KeyboardInterrupt

    def arm(self):
        """Go on after an interrupt: an exception in it switches tracing off."""
        sys.settrace(self._trace)

    def _trace(self, frame, event, _):
        file = frame.f_code.co_filename
        if not file.startswith((OURS, contextlib.__file__)) or file == compile_counts.__file__:
            return None
        self.began.setdefault(frame.f_code.co_name, self.seen)
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame, event, _):
        if event == "opcode":
            self.seen += 1
            if self.left and self.seen > self.left[0]:
                del self.left[0]
                raise KeyboardInterrupt
        return self._step


class Shop:
    """One pipeline for many examples, and what it is to be after each."""

    def __init__(self):
        self.pipe = tiny_kontext()
        self.plain = edit(self.pipe, steps=1)
        self.before = fingerprint(self.pipe)
        self.pictures, self.lengths = {}, {}

    def learn(self, pass_):
        """Optimize, generate and restore; say how many instructions each has.

        Of an optimization, also from which on it changes something: most of it is checks.
        """
        if pass_ not in self.lengths:
            with Interrupter() as optimizing:
                fluxfire.optimize(self.pipe, [pass_])
            with Interrupter() as generating:
                self.pictures[pass_] = edit(self.pipe, steps=1)
            with Interrupter() as restoring:
                fluxfire.restore(self.pipe)
            self.lengths[pass_] = (
                optimizing.seen, optimizing.began["_apply_plan"], generating.seen, restoring.seen,
            )  # fmt: skip
        return self.lengths[pass_]

    def look(self, pass_):
        """See what an interrupt left: whole, plain, or half changed and saying so."""
        assert _one_at_a_time.holder is None
        try:
            picture = edit(self.pipe, steps=1)
        except FluxfireError as error:
            assert "call restore(pipe), which finishes" in str(error)
            with pytest.raises(PlanError, match="was interrupted and left the pipeline half"):
                fluxfire.optimize(self.pipe, [pass_])
            return "half changed"
        passes = fluxfire.report(self.pipe).passes
        expected = self.pictures[pass_] if passes else self.plain
        assert np.array_equal(picture, expected)
        assert passes or differences(self.before, fingerprint(self.pipe)) == []
        return "whole" if passes else "plain"

    def check(self, pass_):
        """Finish, and see that all is as it was, and works again."""
        fluxfire.restore(self.pipe)
        assert differences(self.before, fingerprint(self.pipe)) == []
        assert np.array_equal(edit(self.pipe, steps=1), self.plain)
        assert fluxfire.report(self.pipe) == Report()
        fluxfire.optimize(self.pipe, [pass_])
        assert np.array_equal(edit(self.pipe, steps=1), self.pictures[pass_])
        fluxfire.restore(self.pipe)
        assert differences(self.before, fingerprint(self.pipe)) == []


@pytest.fixture(scope="module")
def shop():
    return Shop()


def samples(seed, *ranges):
    """Choose some instructions of each range, the same ones every time."""
    dice = random.Random(repr(seed))
    return [n for few, low, high in ranges for n in dice.sample(range(low, high), few)]


@each_pass(0)
def test_an_interrupted_optimize(shop, pass_):
    length, changes_from, *_ = shop.learn(pass_)
    at = samples(pass_, (2, 0, changes_from), (FEW, changes_from, length))
    for number in [*at, length - 1]:
        with Interrupter(number):
            fluxfire.optimize(shop.pipe, [pass_])
        shop.look(pass_)
        shop.check(pass_)


@each_pass(1)
def test_an_interrupted_restore(shop, pass_):
    *_, length = shop.learn(pass_)
    for number in [0, *samples(pass_, (FEW, 0, length)), length - 1]:
        fluxfire.optimize(shop.pipe, [pass_])
        with Interrupter(number):
            fluxfire.restore(shop.pipe)
        shop.look(pass_)
        shop.check(pass_)


@each_pass(0)
def test_a_restore_that_is_interrupted_again_and_again(shop, pass_):
    *_, length = shop.learn(pass_)
    dice = random.Random(repr(pass_))
    for _ in range(max(1, FEW // 2)):
        fluxfire.optimize(shop.pipe, [pass_])
        for _ in range(4):
            with Interrupter(dice.randrange(length)):
                fluxfire.restore(shop.pipe)
            shop.look(pass_)
        shop.check(pass_)


@each_pass(1)
def test_a_roll_back_that_is_interrupted(shop, pass_):
    """Two interrupts in a row: one while optimizing, one while that is rolled back."""
    length, changes_from, *_ = shop.learn(pass_)
    dice = random.Random(repr(pass_))

    class Going(Transaction):
        def rollback(self):
            if ctrl_c.left:  # the second one
                ctrl_c.arm()
            return super().rollback()

    seen = set()
    for _ in range(FEW):
        first = dice.randrange(changes_from, length)
        second = first + dice.randrange(1, max(2, (first - changes_from) // 3))
        with Interrupter(first, second) as ctrl_c:
            apply_passes(shop.pipe, [pass_], Going)
        seen.add(shop.look(pass_))
        shop.check(pass_)


@each_pass(0)
def test_an_interrupted_generation(shop, pass_):
    *_, length, _ = shop.learn(pass_)
    fluxfire.optimize(shop.pipe, [pass_])
    for number in [0, *samples(pass_, (FEW, 0, length)), length - 1]:
        with Interrupter(number):
            edit(shop.pipe, steps=1)
        assert np.array_equal(edit(shop.pipe, steps=1), shop.pictures[pass_])
    for number in samples(pass_, (max(1, FEW // 2), 0, length)):
        with Interrupter(number):
            edit(shop.pipe, steps=1)
        fluxfire.restore(shop.pipe)
        edit(shop.pipe, steps=1)  # diffusers' own traces of a generation that was cut short
        shop.check(pass_)
        fluxfire.optimize(shop.pipe, [pass_])
    fluxfire.restore(shop.pipe)


def change(pipe):
    """Change what passes prepared from: numbers past torch's counter, a hook, which is toggled."""
    models = (pipe.transformer, pipe.text_encoder_2, pipe.vae)
    for weight in (weight for model in models for weight in model.parameters()):
        weight.data.mul_(1.02)
    for block in pipe.transformer.single_transformer_blocks:
        if hooks := block.act_mlp._forward_hooks:
            hooks.clear()
        else:
            block.act_mlp.register_forward_hook(lambda module, inputs, output: output * 1.5)


@each_pass(1)
def test_a_change_and_then_an_interrupted_generation(pass_):
    """What a pass does about the change is cut short, and must be done in the next generation."""
    pipe, twin = (fluxfire.optimize(tiny_kontext(), [pass_]) for _ in range(2))
    for each in (pipe, twin):
        edit(each, steps=1)
        change(each)
    edit(twin, steps=1)
    with Interrupter() as heard:
        edit(pipe, steps=1)
    looks = heard.began["prepare"], heard.began["on_generation"]
    for number in samples(pass_, (FEW, *looks), (1, 0, heard.seen)):
        for each in (pipe, twin):
            change(each)
        with Interrupter(number):
            edit(pipe, steps=1)
        assert np.array_equal(edit(pipe, steps=1), edit(twin, steps=1))


def test_turns_are_one_after_the_other():
    turns, inside, most = Turns(), [], []

    def work():
        for _ in range(50):
            with turns.wait():
                inside.append(1)
                most.append(len(inside))
                time.sleep(0)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 200


def test_a_turn_within_a_turn_and_one_whose_holder_is_gone():
    turns = Turns()
    with turns.wait():
        outer = turns.holder
        with turns.wait():
            assert turns.holder is outer
        assert turns.holder is outer
    assert turns.holder is None
    one, other = Holder(), Holder()
    assert turns.take(one) is one
    assert turns.take(other) is one
    turns.leave(other)  # has none to end
    assert turns.holder is one
    del one  # as the end of its frame does
    assert turns.take(other) is other
    turns.leave(other)
    assert turns.holder is None


class Holder:
    """Anything that a weak reference can be made to."""


@each_pass(0)
def test_what_an_interrupt_left_open_and_python_closes_in_the_next_call(pass_):
    """An exception holds the frames that it cut short; they end when somebody lets go of it."""
    passes = [pass_, FirstBlockCache(0)] if pass_.slot != "block-cache" else [pass_]
    pipe, twin = (fluxfire.optimize(tiny_kontext(), passes) for _ in range(2))
    kept = []

    def let_go(*_):
        kept.clear()

    for each in (pipe, twin):
        each.transformer.context_embedder.register_forward_hook(let_go)
        edit(each, steps=2)
    with Interrupter() as heard:
        edit(pipe, steps=2)
    for number in samples(pass_, (FEW, heard.began["mount"], heard.seen)):
        try:
            with Interrupter(number) as interrupter:
                try:
                    edit(pipe, steps=2)
                except KeyboardInterrupt as error:
                    kept.append(error)
        finally:
            assert not interrupter.left
        assert np.array_equal(edit(pipe, steps=2), edit(twin, steps=2))


def test_a_turn_does_not_pass_to_a_forked_process():
    """The child has none of the threads that held one."""
    turns, holder = Turns(), threading.Thread()
    assert turns.take(holder) is holder
    if (child := os.fork()) == 0:
        os._exit(0 if turns.holder is None and turns.take(turns) is turns else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert turns.holder is holder


def test_a_turn_ends_with_its_frame():
    """Also if an exception that somebody keeps holds the frame, and so the holder."""
    turns = Turns()

    def interrupted():
        holder = threading.Thread()
        assert turns.take(holder, sys._getframe(0)) is holder
        assert turns.take(turns) is holder
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        interrupted()
    assert turns.holder is None
    assert turns.take(turns) is turns
    assert kept.tb
