"""Pipelines for other libraries' caches, and observation of the caches from outside."""

from __future__ import annotations

from diffusers import FluxKontextPipeline

from fluxfire.testing import edit, tiny_kontext

STEPS = 12
THRESHOLDS = [0.2, 0.28, 0.33, 0.4, 1e9]


def own_class():
    """A tiny pipeline of a class that no other test shares."""

    class FluxOwnPipeline(FluxKontextPipeline):  # cache-dit looks at the class's name
        pass

    pipe = FluxOwnPipeline(**tiny_kontext().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe, **call):
    """Edit, and see in which steps the last block did not run."""
    ran = []
    last = pipe.transformer.single_transformer_blocks[-1].attn
    last.register_forward_hook(lambda *_: ran.append(step[0]))
    step = [0]

    def ended(_, index, *__):
        step[0] = index + 1
        return {}

    made = edit(pipe, steps=STEPS, callback_on_step_end=ended, **call)
    return made, [i for i in range(STEPS) if i not in ran]
