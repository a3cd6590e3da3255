"""One of the processes that share edits, for the tests of ContextParallel.

    python processes_edit.py FOLDER RANK COUNT

It tries the cases in order, as every other process does, and writes what came of each to
FOLDER/RANK.pt: a picture, or a text.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import PIL.Image
import torch
import torch.distributed as dist

import fluxfire
from fluxfire.errors import FluxfireError, FluxfireWarning
from fluxfire.passes import (
    Attention,
    ContextParallel,
    EncodingCache,
    FirstBlockCache,
    Float8,
    FusedBlocks,
    MegaCache,
    ModulationTable,
    QKVFusion,
)
from fluxfire.passes.mega_cache import fingerprint as mega_cache_fingerprint
from fluxfire.protocol import configured
from fluxfire.testing import check_pass, differences, edit, fingerprint, tiny_kontext
from fluxfire.testing.promises import SIZE

ODD = (36, 36)  # 81 tokens, and as many of the reference
SECONDS = 60.0  # a busy machine may need some of them; no case waits for all
PASSES = {
    "nothing": [],
    "fused": [FusedBlocks()],
    "float8": [Float8(), FusedBlocks()],
    "attention": [Attention("_native_math")],
    "float8 attention": [Attention("fa3-fp8")],
    "float8 attention, fused": [Attention("fa3-fp8"), FusedBlocks()],
    "qkv": [QKVFusion()],
    "tables": [ModulationTable(), EncodingCache()],
    "hits": [FirstBlockCache(9.0, warmup_steps=0, tail_steps=0)],
    "some hits": [FirstBlockCache(0.5, warmup_steps=0, tail_steps=0), FusedBlocks()],
    "schedule": [FirstBlockCache(schedule=[1, 2])],
    "linear": [FirstBlockCache(9.0, warmup_steps=1, tail_steps=0, predict="damped")],
}
CALLS = {
    "plain": {},
    "other size": {"size": (48, 32)},
    "odd size": {"size": ODD},
    "callback": {"callback_on_step_end": lambda *_: {}},
    "two pictures": {"num_images_per_prompt": 2},
    "true CFG": {"negative_prompt": "a boat", "true_cfg_scale": 2.0},
}


def add_lora(pipe):
    from peft import LoraConfig

    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "proj_mlp"]))
    for name, weight in pipe.transformer.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)


def pipeline():
    return tiny_kontext(heads=4)


def share(pipe, passes, kind="ulysses"):
    passes = [*passes, ContextParallel(kind, timeout_seconds=SECONDS)]
    fluxfire.optimize(pipe, fluxfire.order(passes))
    return pipe


def run(pipe, *, size=SIZE, num_inference_steps=4, **call):
    return edit(pipe, size, steps=num_inference_steps, **call)


def one_and_shared(name, passes, kind, call, prepare=lambda pipe: None):
    """Yield the picture of one process, and that of all."""
    one, pipe = pipeline(), pipeline()
    for each in (one, pipe):
        prepare(each)
    fluxfire.optimize(one, fluxfire.order(passes))
    yield f"{name}, alone", run(one, **call)
    yield name, run(share(pipe, passes, kind), **call)
    fluxfire.restore(pipe)


def pictures():
    for name, passes in PASSES.items():
        yield from one_and_shared(f"passes: {name}", passes, "ulysses", {})
    for name, call in CALLS.items():
        for kind in ("ulysses", "ring"):
            yield from one_and_shared(f"calls: {name}, {kind}", [FusedBlocks()], kind, call)
    yield from one_and_shared("watched hits", PASSES["some hits"], "ulysses", CALLS["callback"])
    yield from one_and_shared("calls: odd size, unfused", [], "ulysses", CALLS["odd size"])
    yield from one_and_shared("calls: two pictures, unfused", [], "ring", CALLS["two pictures"])
    yield from one_and_shared("lora", [FusedBlocks()], "ulysses", {}, add_lora)


def some_pictures():
    for name in ("float8 attention, fused", "some hits"):
        yield from one_and_shared(f"passes: {name}", PASSES[name], "ulysses", CALLS["odd size"])
    yield from one_and_shared("calls: odd size, ring", [], "ring", CALLS["odd size"])


def inpainting():
    one, pipe = (tiny_kontext("inpaint", heads=4) for _ in range(2))
    yield "inpaint, alone", run(one)
    yield "inpaint", run(share(pipe, [FusedBlocks()]))


def the_page():
    """Run the script of the documentation, with a tiny pipeline in place of the real one."""
    import diffusers

    page = Path(__file__).parent.parent / "docs" / "pages" / "how-to" / "several-gpus.md"
    script = page.read_text("utf-8").split("```py\n")[1].split("```")[0]

    class Tiny:
        def __init__(self, pipe):
            self.pipe = pipe

        def to(self, _):
            plain = type(self.pipe)
            sizes = {"height": 32, "width": 32, "max_area": 1024, "_auto_resize": False}
            short = {"num_inference_steps": 2, "max_sequence_length": 24}

            class Short(plain):
                def __call__(self, **call):
                    return super().__call__(**call, **sizes, **short)

            self.pipe.__class__ = Short
            return self.pipe

    faithful = [p for p in fluxfire.presets.faithful if p.stage not in ("compile", "artifacts")]
    picture = PIL.Image.new("RGB", (32, 32), "navy")
    real = mock.Mock(from_pretrained=lambda *_, **__: Tiny(pipeline()))
    with ExitStack() as stack:
        for target, name, value in (
            (diffusers, "FluxKontextPipeline", real),
            (diffusers.utils, "load_image", lambda _: picture),
            (fluxfire.presets, "faithful", tuple(faithful)),
            (dist, "init_process_group", lambda _: None),
            (dist, "destroy_process_group", lambda *_: None),
            (torch.cuda, "set_device", lambda _: None),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.dict(os.environ, LOCAL_RANK=str(dist.get_rank())))
        stack.enter_context(contextlib.chdir(sys.argv[1]))
        made = {}
        exec(compile(script, "several-gpus.md", "exec"), made)
    yield "page", str(Path(sys.argv[1], "night.png").is_file() if dist.get_rank() == 0 else "")
    yield "page, report", str(fluxfire.report(made["pipe"]))
    fluxfire.restore(made["pipe"])


def the_report():
    pipe = pipeline()
    run(pipe)  # the first edit gives a plain pipeline attributes, too
    before = fingerprint(pipe)
    run(share(pipe, []))
    (of_pass,) = fluxfire.report(pipe).passes
    yield "report", str(of_pass)
    yield "facts", str(dict(of_pass.facts))
    yield "copy", run(copy.deepcopy(pipe))  # a plain pipeline, which each process runs alone
    yield "plain", run(pipeline())
    transformer = pipe.transformer
    yield "mega-cache", str(mega_cache_fingerprint(pipe, [configured(MegaCache())])["device"])
    try:
        transformer.enable_parallelism(config=transformer._parallel_config)
    except (RuntimeError, AttributeError) as error:
        yield "enabled twice", str(error)
    fluxfire.restore(pipe)
    yield "restored", str(differences(before, fingerprint(pipe)))


def promises():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_pass(ContextParallel(timeout_seconds=SECONDS), pipeline)
    yield "check_pass", "kept"


def told(pipe, **call):
    """Return the error of an edit, and whether it came soon."""
    began = time.perf_counter()
    try:
        run(pipe, **call)
    except (FluxfireError, ZeroDivisionError, ValueError) as error:
        soon = "soon" if time.perf_counter() - began < SECONDS else "late"
        return f"{soon}: {type(error).__name__}: {error}"
    return "no error"


def fail_at(step, *, here, what="raise"):
    """Return a callback that does something at the end of a step in one process."""

    def callback(pipe, now, _, tensors):
        if now == step and dist.get_rank() == here:
            if what == "raise":
                raise ZeroDivisionError("of the callback")
            if what == "die":
                os._exit(3)
            pipe._interrupt = True
        return tensors

    return callback


def disagreements():
    rank = dist.get_rank()
    pipe = share(pipeline(), [FusedBlocks()])
    for name, call in {
        "prompt": {"prompt": ["a cat", "a dog"][rank > 0]},
        "size": {"size": [SIZE, (48, 32)][rank > 0]},
        "seed": {"generator": torch.Generator().manual_seed(rank)},
        "guidance": {"guidance_scale": 3.0 + rank},
        "true CFG": {"negative_prompt": "a boat", "true_cfg_scale": 1.0 + rank},
        "steps": {"num_inference_steps": 4 + rank},
        "text": {"max_sequence_length": 23},
        "raises": {"callback_on_step_end": fail_at(1, here=1)},
        "raises after the last step": {"callback_on_step_end": fail_at(3, here=1)},
        "interrupts": {"callback_on_step_end": fail_at(1, here=1, what="interrupt")},
        "raises before the first step": {"prompt": 7 if rank else "a cat"},
        "all interrupt": {"callback_on_step_end": fail_at(1, here=rank, what="interrupt")},
        "kwargs": {"joint_attention_kwargs": {"attention_mask": 1}},
    }.items():
        yield f"differ: {name}", told(pipe, **call)
    fluxfire.restore(pipe)
    share(pipe, [ModulationTable()] if rank else [FusedBlocks()])
    yield "differ: passes", told(pipe)
    yield "differ: afterwards", run(share_again(pipe))


def share_again(pipe):
    fluxfire.restore(pipe)
    return share(pipe, [FusedBlocks()])


def middle_of_a_step():
    pipe = share(pipeline(), [])
    block = pipe.transformer.single_transformer_blocks[1]

    def fail(*_):
        raise ZeroDivisionError("of the block")

    hook = block.register_forward_pre_hook(fail) if dist.get_rank() == 1 else None
    yield "middle", told(pipe)
    if hook is not None:
        hook.remove()
    yield "middle, then", told(pipe)
    yield "middle, processor", type(block.attn.processor).__name__
    yield "middle, again", run(share_again(pipe))


def a_process_is_stuck():
    """One of them sleeps for longer than the others wait: between two steps, and in a step."""
    for name in ("between", "within"):
        pipe = pipeline()
        fluxfire.optimize(pipe, [ContextParallel(timeout_seconds=8.0)])

        def sleep(*_):
            time.sleep(12)

        call = {}
        if dist.get_rank() == 1 and name == "between":
            call["callback_on_step_end"] = lambda *_: sleep() or {}
        elif dist.get_rank() == 1:
            pipe.transformer.transformer_blocks[1].register_forward_pre_hook(sleep)
        yield f"stuck: {name}", told(pipe, **call)
        dist.barrier()


def a_process_dies():
    pipe = share(pipeline(), [])
    callback = fail_at(1, here=dist.get_world_size() - 1, what="die")
    yield "dies", told(pipe, callback_on_step_end=callback)


def compiled():
    from fluxfire.passes import Compile

    one, pipe = (tiny_kontext(heads=4, double_blocks=1, single_blocks=1) for _ in range(2))
    yield "compiled, alone", run(one)
    yield "compiled", run(share(pipe, [FusedBlocks(), Compile()]))


def main():
    folder, rank, count, *names = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(dir=folder)
    warnings.simplefilter("ignore", FluxfireWarning)
    where = Path(folder, "meeting")
    dist.init_process_group(
        "gloo", init_method=f"file://{where}", rank=int(rank), world_size=int(count)
    )
    results = {}
    for name in names:
        began = time.perf_counter()
        results.update(globals()[name]())
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)  # noqa: T201
    torch.save(results, Path(folder, f"{rank}.pt"))
    os._exit(0)  # the group's own end would wait for the process that died


if __name__ == "__main__":
    main()
