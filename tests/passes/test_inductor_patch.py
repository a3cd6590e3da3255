"""InductorPatch, on a torch that needs it: the test puts the unguarded function back."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._inductor.fx_passes import post_grad

import fluxfire
from fluxfire.passes import InductorPatch
from fluxfire.passes.article.inductor_patch import guarded, needed
from fluxfire.testing import edit


class Node:
    def __init__(self, value):
        self.meta = {"val": value}


@pytest.fixture
def unguarded(monkeypatch):
    """Bring back the function of torch 2.7 to 2.12, which calls `.size()` on anything."""

    def same_meta(node1, node2):
        one, two = node1.meta["val"], node2.meta["val"]
        return one.size() == two.size() and one.dtype == two.dtype

    monkeypatch.setattr(post_grad, "same_meta", same_meta)
    return same_meta


def test_need_is_found_by_trying(unguarded):
    assert needed()


def test_a_guarded_torch_needs_nothing(pipe, monkeypatch):
    def same_meta(node1, node2):
        return all(isinstance(n.meta["val"], torch.Tensor) for n in (node1, node2))

    monkeypatch.setattr(post_grad, "same_meta", same_meta)
    assert not needed()
    fluxfire.optimize(pipe, [InductorPatch()])
    facts = fluxfire.report(pipe).passes[0]
    assert facts.change.count == 0
    assert "not needed on torch" in facts.findings[0].message


def test_the_guard_answers_for_numbers_and_asks_for_tensors(unguarded):
    tensor, other = torch.zeros(3), torch.zeros(4)
    with guarded():
        for pair in ((0.5, 0.5), (tensor, 0.5), (2, tensor), (None, None)):
            assert not post_grad.same_meta(*map(Node, pair))
        assert post_grad.same_meta(Node(tensor), Node(tensor))
        assert not post_grad.same_meta(Node(tensor), Node(other))
        assert needed()
    assert post_grad.same_meta is unguarded


def test_it_is_live_only_while_this_pipeline_generates(pipe, unguarded):
    fluxfire.optimize(pipe, [InductorPatch()])
    seen = []

    def look(_pipe, _step, _time, tensors):
        seen.append(post_grad.same_meta)
        return tensors

    assert post_grad.same_meta is unguarded
    edit(pipe, steps=1, callback_on_step_end=look)
    assert seen[0] is not unguarded
    assert post_grad.same_meta is unguarded

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        edit(pipe, callback_on_step_end=fail)
    assert post_grad.same_meta is unguarded


def test_overlapping_uses_in_two_threads_leave_nothing(unguarded):
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def second():
        assert first_in.wait(600)
        with guarded():
            second_in.set()
            assert first_out.wait(600)
            seen.append(post_grad.same_meta)

    thread = threading.Thread(target=second)
    thread.start()
    with guarded():
        first_in.set()
        assert second_in.wait(600)
    first_out.set()
    thread.join()
    assert seen[0] is not unguarded
    assert post_grad.same_meta is unguarded
