"""What somebody does to an optimized pipeline stays his: as on one that never met fluxfire.

Each thing is done to a plain twin, too. While passes are applied, a generation gives the twin's
picture, or a FluxfireError. After `restore` the pipeline is the twin, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn

import fluxfire
from fluxfire.errors import FluxfireError, PlanError
from fluxfire.passes import (
    Attention,
    Compile,
    EncodingCache,
    FirstBlockCache,
    Float8,
    FoldedLora,
    FusedBlocks,
    InductorPatch,
    MemoryLayout,
    ModulationTable,
    QKVFusion,
    ReferenceCache,
)
from fluxfire.testing import edit, fingerprint, tiny_kontext
from passes.other_caches import own_class
from passes.test_compile import with_ip_adapter
from thinned import ALL, thinned

CPU = torch.device("cpu")
ROUNDING = 1e-4
LOSS = 0.02  # what eight bits and old references change of these pictures, at the most
HALF = 0.05  # what kernels may round otherwise in sixteen bits

Do = Callable[[Any], object]


@pytest.fixture(autouse=True)
def _attention_backend_stays(monkeypatch):
    """`set_attention_backend` sets that of the whole process, too, and nothing resets it."""
    active, _ = _AttentionBackendRegistry.get_active_backend()
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", active)


@dataclass(frozen=True)
class Thing:
    """Something that people do to pipelines.

    Attributes:
        do: does it.
        off: takes it off again, if that can be.
        rounds: what its pictures may differ by.
    """

    do: Do
    off: Do | None = None
    rounds: float = ROUNDING


LAYERS = ["to_q", "to_k", "to_v", "proj_mlp", "proj_out", "linear"]


def lora(rank: int = 2, name: str = "default", layers: list[str] = LAYERS) -> Do:
    def do(pipe):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, init_lora_weights=False)
        pipe.transformer.add_adapter(config, adapter_name=name)
        generator = torch.Generator().manual_seed(rank)
        for where, weight in pipe.transformer.named_parameters():
            if "lora_" in where and f".{name}." in where:
                weight.data = torch.randn(weight.shape, generator=generator) * 0.2

    return do


def in_turn(*parts: Do | str) -> Do:
    """Do several things, some of them by the name of the pipeline's method."""

    def do(pipe):
        for part in parts:
            getattr(pipe, part)() if isinstance(part, str) else part(pipe)

    return do


def of(component: str, method: str, *args: Any, **kwargs: Any) -> Do:
    """Call a method of a component."""
    return lambda pipe: getattr(getattr(pipe, component), method)(*args, **kwargs)


def casting(component: str) -> Do:
    kinds = {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32}
    return of(component, "enable_layerwise_casting", **kinds)


def offload(*components: str) -> Do:
    def do(pipe):
        for name in components:
            accelerate.cpu_offload(getattr(pipe, name), CPU)

    return do


def without_hooks(component: str) -> Do:
    return lambda pipe: remove_hook_from_module(getattr(pipe, component), recurse=True)


def group_offload(component: str, kind: str) -> Do:
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}

    def do(pipe):
        try:
            apply_group_offloading(
                getattr(pipe, component), onload_device=CPU, offload_device=CPU,
                offload_type=kind, **groups,
            )  # fmt: skip
        except AttributeError:
            pytest.skip("this diffusers offloads groups only where there is an accelerator")

    return do


def without_groups(component: str) -> Do:
    def off(pipe):
        for module in getattr(pipe, component).modules():
            registry = vars(module).get("_diffusers_hook")
            for name in list(registry.hooks) if registry else ():
                registry.remove_hook(name, recurse=False)

    return off


def without_ip_adapter(pipe: Any) -> None:
    transformer = pipe.transformer
    transformer.encoder_hid_proj = None
    transformer.config.encoder_hid_dim_type = None
    transformer.set_attn_processor({n: FluxAttnProcessor() for n in transformer.attn_processors})


class Louder(FluxAttnProcessor):
    def __call__(self, *args, **kwargs):
        return larger(super().__call__(*args, **kwargs))


def larger(made: Any) -> Any:
    return tuple(x * 1.5 for x in made) if isinstance(made, tuple) else made * 1.5


class Hooks:
    """Hooks of somebody's on one module of the transformer, by pipeline."""

    def __init__(self, where: str, *, before: bool = False) -> None:
        self.where, self.before = where, before
        self.handles: dict[int, Any] = {}

    def do(self, pipe):
        module = pipe.transformer.get_submodule(self.where)
        if self.before:
            handle = module.register_forward_pre_hook(self.louder, with_kwargs=True)
        else:
            handle = module.register_forward_hook(lambda *call: larger(call[-1]))
        self.handles[id(pipe)] = handle

    def off(self, pipe):
        self.handles.pop(id(pipe)).remove()

    @staticmethod
    def louder(_, args, kwargs):
        def more(x):
            return x * 1.5 if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        return tuple(map(more, args)), {name: more(x) for name, x in kwargs.items()}


def hooks(where: str, *, before: bool = False) -> Thing:
    one = Hooks(where, before=before)
    return Thing(one.do, one.off)


def patched(where: str) -> Thing:
    """Put a function in the place of one module's `forward`."""

    def do(pipe):
        module = pipe.transformer.get_submodule(where)
        found = module.forward
        module.forward = lambda *args, **kwargs: larger(found(*args, **kwargs))

    def off(pipe):
        del pipe.transformer.get_submodule(where).forward

    return Thing(do, off)


def reorder(pipe: Any) -> None:
    first, second, *rest = pipe.transformer.single_transformer_blocks
    pipe.transformer.single_transformer_blocks = nn.ModuleList([second, first, *rest])


def replace_layer(pipe: Any) -> None:
    attention = pipe.transformer.single_transformer_blocks[0].attn
    old = attention.to_q
    attention.to_q = nn.Linear(old.in_features, old.out_features)
    attention.to_q.weight.data = old.weight.data * 1.5
    attention.to_q.bias.data = old.bias.data * 1.5


def replace_parameters(pipe: Any) -> None:
    for block in pipe.transformer.transformer_blocks:
        block.attn.to_k.weight = nn.Parameter(block.attn.to_k.weight.detach() * 1.5)


def load_weights(*, assign: bool) -> Do:
    def do(pipe):
        state = {name: weight * 1.3 for name, weight in pipe.transformer.state_dict().items()}
        pipe.transformer.load_state_dict(state, assign=assign)

    return do


def write_through_data(pipe: Any) -> None:
    for block in pipe.transformer.single_transformer_blocks:
        block.attn.to_v.weight.data.mul_(1.5)


SINGLE, DOUBLE = "single_transformer_blocks.0", "transformer_blocks.0"
unload = in_turn("unload_lora_weights")


def plainly(pipe: Any) -> None:
    pipe.transformer.set_attn_processor(FluxAttnProcessor())


THINGS = {
    "layerwise casting": Thing(casting("transformer"), rounds=HALF),
    "layerwise casting of the VAE": Thing(casting("vae"), rounds=HALF),
    "sequential offloading": Thing(offload("transformer"), without_hooks("transformer")),
    "sequential offloading of the VAE": Thing(offload("vae"), without_hooks("vae")),
    "sequential offloading of all": Thing(
        offload("transformer", "vae", "text_encoder", "text_encoder_2"),
        in_turn("remove_all_hooks"),
    ),
    "group offloading by blocks": Thing(
        group_offload("transformer", "block_level"), without_groups("transformer")
    ),
    "group offloading by layers": Thing(
        group_offload("transformer", "leaf_level"), without_groups("transformer")
    ),
    "group offloading of the VAE": Thing(group_offload("vae", "leaf_level"), without_groups("vae")),
    "model offloading": Thing(
        lambda pipe: accelerate.cpu_offload_with_hook(pipe.transformer, CPU),
        without_hooks("transformer"),
    ),
    "IP-Adapter": Thing(with_ip_adapter, without_ip_adapter),
    "plain processors": Thing(plainly),
    "other processors": Thing(lambda pipe: pipe.transformer.set_attn_processor(Louder()), plainly),
    "attention backend": Thing(
        of("transformer", "set_attention_backend", "_native_math"),
        of("transformer", "reset_attention_backend"),
    ),
    "fused projections": Thing(
        of("transformer", "fuse_qkv_projections"), of("transformer", "unfuse_qkv_projections")
    ),
    "projections taken apart": Thing(of("transformer", "unfuse_qkv_projections")),
    "fused projections of the VAE": Thing(
        of("vae", "fuse_qkv_projections"), of("vae", "unfuse_qkv_projections")
    ),
    "default processors of the VAE": Thing(of("vae", "set_default_attn_processor")),
    "diffusers' cache": Thing(
        lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9)),
        of("transformer", "disable_cache"),
    ),
    "a block taken out": Thing(lambda pipe: pipe.transformer.transformer_blocks.pop(0)),
    "a block twice": Thing(
        lambda pipe: pipe.transformer.single_transformer_blocks.append(
            pipe.transformer.single_transformer_blocks[0]
        )
    ),
    "blocks in another order": Thing(reorder),
    "hooks on a block": hooks(DOUBLE),
    "hooks before a block": hooks(DOUBLE, before=True),
    "hooks on a single block": hooks(SINGLE),
    "hooks before a single block": hooks(SINGLE, before=True),
    "hooks on a projection": hooks(f"{DOUBLE}.attn.to_q"),
    "hooks on an attention": hooks(f"{SINGLE}.attn"),
    "hooks on a norm": hooks(f"{DOUBLE}.norm1"),
    "hooks in a norm": hooks(f"{SINGLE}.norm.linear"),
    "hooks on the embedding": hooks("time_text_embed"),
    "hooks before the embedding": hooks("time_text_embed", before=True),
    "hooks on the transformer": hooks(""),
    "a patched block": patched(SINGLE),
    "a patched projection": patched(f"{DOUBLE}.attn.to_q"),
    "a patched MLP": patched(f"{SINGLE}.proj_mlp"),
    "a patched norm": patched(f"{SINGLE}.norm"),
    "a patched embedding": patched("time_text_embed"),
    "LoRA": Thing(lora(), unload),
    "LoRA on one projection": Thing(lora(layers=["to_q"]), unload),
    "LoRA switched off": Thing(in_turn(lora(), "disable_lora"), unload),
    "LoRA fused": Thing(in_turn(lora(), "fuse_lora"), in_turn("unfuse_lora", unload)),
    "LoRA baked in": Thing(in_turn(lora(), "fuse_lora", unload)),
    "two LoRAs": Thing(
        in_turn(
            lora(), lora(3, "other"), lambda pipe: pipe.set_adapters(["default", "other"], [0.5, 1])
        ),
        unload,
    ),
    "LoRA deleted": Thing(
        in_turn(lora(), lora(3, "other"), lambda pipe: pipe.delete_adapters("default")), unload
    ),
    "sixteen bits": Thing(
        lambda pipe: pipe.to(torch.bfloat16), lambda pipe: pipe.to(torch.float32), HALF
    ),
    "moved": Thing(lambda pipe: pipe.to("cpu")),
    "in training": Thing(of("transformer", "train"), of("transformer", "eval")),
    "frozen": Thing(
        of("transformer", "requires_grad_", False), of("transformer", "requires_grad_", True)
    ),
    "gradient checkpointing": Thing(
        of("transformer", "enable_gradient_checkpointing"),
        of("transformer", "disable_gradient_checkpointing"),
    ),
    "another layer": Thing(replace_layer),
    "other parameters": Thing(replace_parameters),
    "weights loaded": Thing(load_weights(assign=False)),
    "weights assigned": Thing(load_weights(assign=True)),
    "weights written": Thing(write_through_data),
}


def lists() -> dict[str, list[Any]]:
    """Return the lists that every thing is tried with: each pass is in one of the quick ones."""
    return {
        "exact": [
            InductorPatch(), FoldedLora(), QKVFusion(), MemoryLayout(), FusedBlocks(),
            ModulationTable(), EncodingCache(),
        ],
        "exact caches": [
            QKVFusion(vae=False), Attention("_native_math"), ReferenceCache(0), FirstBlockCache(0)
        ],
        "lossy": [
            Float8(), FusedBlocks(), ModulationTable(host=True), Attention("fa3-fp8"),
            ReferenceCache(),
        ],
    }  # fmt: skip


ALONE = [
    QKVFusion(),
    Float8(),
    Attention("fa3-fp8"),
    FusedBlocks(),
    ModulationTable(),
    ReferenceCache(),
]


def picture(pipe: Any, steps: int = 1) -> Any:
    """Edit; within a cache's context, where one is on, as diffusers asks for."""
    transformer, call = pipe.transformer, {}
    if getattr(transformer, "encoder_hid_proj", None) is not None:
        call["ip_adapter_image_embeds"] = [torch.ones(1, 1, 12)]
        call["negative_ip_adapter_image_embeds"] = [torch.zeros(1, 1, 12)]
    cached = transformer.is_cache_enabled
    with transformer.cache_context("cond") if cached else contextlib.nullcontext():
        return edit(pipe, steps=steps, **call)


def structure(pipe: Any) -> dict[str, Any]:
    """Describe a pipeline by what two that were treated alike have in common."""
    found = {}
    for name, value in fingerprint(pipe).items():
        if name.startswith(("class ", "if loaded", "environment", "pipe: ")):
            continue  # pipelines note how they were called last
        of_two = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)
        plain_kind = of_two and value[0] in {"list", "tuple", "dict", "set", "OrderedDict"}
        found[name] = value[0] if of_two and not plain_kind else value
    return found


def apart(one: Any, other: Any) -> float:
    return float(np.abs(one - other).max())


def is_exact(passes: list[Any]) -> bool:
    return all(p.exactness != "lossy" for p in passes)


def same_as_plain(pipe: Any, plain: Any, *, exact: bool, rounds: float, steps: int = 1) -> None:
    """Generate: the twin's picture, as far as the passes promise it, or a refusal."""
    try:
        made = picture(pipe, steps)
    except FluxfireError as error:
        remedies = ("restore(pipe)", "take it off", "disable_cache()")
        assert any(remedy in str(error) for remedy in remedies), error
    else:
        assert apart(made, picture(plain, steps)) < (rounds if exact else max(rounds, LOSS))


def given_back(pipe: Any, plain: Any) -> None:
    """Restore: the twin."""
    fluxfire.restore(pipe)
    assert structure(pipe) == structure(plain)
    assert np.array_equal(picture(pipe), picture(plain))


def try_later(passes: list[Any], thing: Thing, *, take_off: bool) -> None:
    plain, pipe = tiny_kontext(), tiny_kontext()
    picture(plain)
    picture(fluxfire.optimize(pipe, passes))
    exact = is_exact(passes)
    facts = {"exact": exact, "rounds": thing.rounds, "steps": 1 if exact else 2}
    thing.do(plain)
    thing.do(pipe)
    same_as_plain(pipe, plain, **facts)
    if take_off:
        thing.off(plain)
        thing.off(pipe)
        same_as_plain(pipe, plain, **facts)
    if any(p == Float8("drop") for p in passes):
        with pytest.raises(FluxfireError, match="let go of the original weights"):
            fluxfire.restore(pipe)
    else:
        given_back(pipe, plain)


# All lists with all things, and all passes one by one, take half an hour.
LISTS = list(lists()) if ALL else ["exact"]


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("passes", LISTS)
def test_a_thing_done_later(passes, thing):
    try_later(lists()[passes], THINGS[thing], take_off=False)


@pytest.mark.parametrize("thing", [name for name, thing in THINGS.items() if thing.off])
@pytest.mark.parametrize("passes", ["lossy", "exact"] if ALL else ["lossy"])
def test_a_thing_done_later_and_undone(passes, thing):
    try_later(lists()[passes], THINGS[thing], take_off=True)


@pytest.mark.slow
@pytest.mark.parametrize(("pass_", "thing"), thinned(ALONE, [*THINGS], 7), ids=repr)
def test_a_thing_done_later_with_one_pass(pass_, thing):
    for take_off in (False, True)[: 1 + (THINGS[thing].off is not None)]:
        try_later([pass_], THINGS[thing], take_off=take_off)


STEPS = st.one_of(
    st.just(("generate", "")),
    st.tuples(st.sampled_from(["do", "off"]), st.sampled_from(list(THINGS))),
)


@settings(max_examples=25)
@given(
    passes=st.sampled_from([*lists().values(), *([p] for p in ALONE if p != Float8("drop"))]),
    before=st.lists(st.sampled_from(list(THINGS)), max_size=1),
    steps=st.lists(STEPS, min_size=2, max_size=7),
)
def test_many_things_in_any_order(passes, before, steps):
    """What a plain pipeline refuses is not tried, nor what came before and `optimize` refuses."""
    plain, pipe, done = tiny_kontext(), tiny_kontext(), {}
    picture(plain)
    picture(pipe)
    for name in before:
        THINGS[name].do(plain)
        THINGS[name].do(pipe)
        done[name] = THINGS[name]
    try:
        fluxfire.optimize(pipe, passes)
    except FluxfireError:
        fluxfire.restore(pipe)
    for what, name in [*steps, ("generate", "")]:
        thing = THINGS.get(name)
        if what == "generate":
            facts = {"exact": is_exact(passes), "steps": 1 if is_exact(passes) else 2}
            rounds = max([ROUNDING, *(one.rounds for one in done.values())])
            if not works(plain):
                return
            same_as_plain(pipe, plain, rounds=rounds, **facts)
            continue
        if (what == "do") == (name in done) or (what == "off" and thing.off is None):
            continue
        try:
            (thing.do if what == "do" else thing.off)(plain)
        except Exception:  # noqa: BLE001 - these two things do not go together
            return
        (thing.do if what == "do" else thing.off)(pipe)
        done[name] = thing
        if what == "off" and thing.rounds == ROUNDING:
            del done[name]
    given_back(pipe, plain)


def works(plain: Any) -> bool:
    """Whether a plain pipeline generates at all."""
    try:
        return bool(np.isfinite(picture(plain)).all())
    except Exception:  # noqa: BLE001 - whatever things that do not go together raise
        return False


def adapter(transformer: Any, rank: int) -> dict[str, torch.Tensor]:
    """Make the file of a LoRA on every query."""
    generator, state = torch.Generator().manual_seed(rank), {}
    for index, block in enumerate(transformer.single_transformer_blocks):
        where = f"transformer.single_transformer_blocks.{index}.attn.to_q"
        wide, width = block.attn.to_q.weight.shape
        state[f"{where}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        state[f"{where}.lora_B.weight"] = torch.randn(wide, rank, generator=generator)
    return state


@pytest.mark.parametrize("passes", [[QKVFusion()], [FusedBlocks(), ModulationTable()]], ids=str)
def test_loras_of_several_ranks_swapped_in_place(passes):
    plain, pipe = tiny_kontext(), tiny_kontext()
    picture(plain)
    picture(fluxfire.optimize(pipe, passes))
    pictures = []
    for one in (plain, pipe):
        one.transformer.enable_lora_hotswap(target_rank=4)
    for swap, rank in ((False, 2), (True, 4), (True, 3)):
        for one in (plain, pipe):
            one.transformer.load_lora_adapter(
                adapter(one.transformer, rank), adapter_name="default", hotswap=swap
            )
        same_as_plain(pipe, plain, exact=True, rounds=ROUNDING)
        pictures.append(picture(plain))
    assert apart(pictures[0], pictures[1]) > ROUNDING
    given_back(pipe, plain)


class Rounded(torch.Tensor):
    """A weight as quantizers make them: a subclass, without a storage that torch could show."""

    @staticmethod
    def __new__(cls, numbers):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype)

    def __init__(self, numbers):
        self.numbers = numbers.bfloat16()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        whole = [a.numbers.float() if isinstance(a, cls) else a for a in args]
        made = func(*whole, **(kwargs or {}))
        return cls(made) if func is torch.ops.aten.detach.default else made


def quantize(pipe: Any) -> None:
    for module in [*pipe.transformer.modules()]:
        if type(module) is nn.Linear or isinstance(module, nn.Linear):
            rounded = Rounded(module.weight.detach())
            module.weight = nn.Parameter(rounded, requires_grad=False)


@pytest.mark.parametrize("passes", [[QKVFusion()], [FusedBlocks()], [ModulationTable()]], ids=str)
def test_weights_quantized_later(passes):
    plain, pipe = tiny_kontext(), tiny_kontext()
    before = picture(plain)
    picture(fluxfire.optimize(pipe, passes))
    quantize(plain)
    quantize(pipe)
    assert apart(picture(plain), before) > ROUNDING
    same_as_plain(pipe, plain, exact=True, rounds=ROUNDING)
    fluxfire.restore(pipe)
    assert np.array_equal(picture(pipe), picture(plain))


CACHED = {
    "in the place of its blocks": [ModulationTable()],
    "two caches cannot work together": [FirstBlockCache(0)],
    None: [FusedBlocks()],
}


@pytest.mark.parametrize("refused", CACHED)
def test_cache_dit_later(refused):
    cache_dit = pytest.importorskip("cache_dit")
    plain, pipe = own_class(), own_class()
    before = picture(plain)
    picture(fluxfire.optimize(pipe, CACHED[refused]))
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1))
    if refused is None:
        assert apart(picture(pipe), before) < ROUNDING
    else:
        with pytest.raises(FluxfireError, match=rf"{refused}.*cache_dit.disable_cache\(pipe\)"):
            picture(pipe)
    cache_dit.disable_cache(pipe)
    assert apart(picture(pipe), before) < ROUNDING
    fluxfire.restore(pipe)
    assert np.array_equal(picture(pipe), before)
    assert (
        "__call__" not in vars(type(pipe)) or vars(type(pipe))["__call__"] is type(plain).__call__
    )


def test_cache_dit_before_is_refused_by_every_pass_and_goes_without_a_trace():
    cache_dit = pytest.importorskip("cache_dit")
    pipe = own_class()
    before = picture(pipe)
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1))
    for passes in (*lists().values(), *([p] for p in ALONE), []):
        with pytest.raises(PlanError, match=r"cache_dit.disable_cache\(pipe\)"):
            fluxfire.optimize(pipe, passes)
    cache_dit.disable_cache(pipe)
    with fluxfire.optimized(pipe, lists()["exact"]):
        assert apart(picture(pipe), before) < ROUNDING
    assert np.array_equal(picture(pipe), before)


@pytest.mark.parametrize("pass_", [ModulationTable(), FirstBlockCache(0), ReferenceCache()])
def test_what_decides_between_blocks_is_refused_where_the_user_compiled_them_all(pass_):
    pipe = tiny_kontext()
    pipe.transformer.compile(fullgraph=True)
    with pytest.raises(PlanError, match="the whole transformer is compiled, outside fluxfire"):
        fluxfire.optimize(pipe, [pass_])
    fluxfire.optimize(pipe, [MemoryLayout()])
    with pytest.raises(PlanError, match="the whole transformer is compiled, outside fluxfire"):
        fluxfire.optimize(pipe, [pass_])


@pytest.fixture
def traced(monkeypatch):
    """Have `torch.compile` trace, and run what it traced: the graphs, without an inductor."""
    graphs: list[torch.fx.GraphModule] = []

    def run(graph, _):
        graphs.append(graph)
        return graph.forward

    plain = torch.compile

    def compiled(function=None, *, options=None, **settings):
        return plain(function, backend=run, **settings)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", compiled)
    return graphs


def files(graphs: list[torch.fx.GraphModule]) -> set[str]:
    """Return the Python files whose lines are in the graphs."""
    stacks = [node.stack_trace or "" for graph in graphs for node in graph.graph.nodes]
    return {line.split('"')[1].rsplit("/", 1)[-1] for s in stacks for line in s.split("\n")
            if '"' in line and "File" in line}  # fmt: skip


def smallest() -> Any:
    return tiny_kontext(double_blocks=1, single_blocks=1)


def test_the_compiler_sees_what_stands_in(traced):
    """Its classes show themselves as the plain ones, and yet it is their code that is traced."""
    plain = picture(smallest())
    passes = [QKVFusion(), FusedBlocks(), ModulationTable(), Compile()]
    pipe = fluxfire.optimize(smallest(), passes)
    assert apart(picture(pipe), plain) < ROUNDING
    assert {"fused_blocks.py", "qkv_fusion.py", "attention.py", "modulation.py"} <= files(traced)
    assert "transformer_flux.py" not in files(traced)


# Compiled, each takes ten seconds: two of them where not all cases are wanted.
TO_COMPILED = [
    "diffusers' cache", "hooks on a projection", "layerwise casting", "sequential offloading",
    "group offloading by blocks", "IP-Adapter",
]  # fmt: skip


@pytest.mark.parametrize("thing", TO_COMPILED if ALL else TO_COMPILED[:2])
@pytest.mark.slow
def test_a_thing_done_to_compiled_blocks(traced, thing):
    for passes in ([Compile()], [QKVFusion(), FusedBlocks(), ModulationTable(), Compile()]):
        try_later(passes, THINGS[thing], take_off=THINGS[thing].off is not None)
    assert traced


def _own_loop(  # noqa: PLR0917 - as diffusers has them
    self,
    hidden_states,
    encoder_hidden_states,
    pooled_projections,
    timestep,
    img_ids,
    txt_ids,
    guidance,
    **_,
):
    """A forward of somebody else's, which does something between two blocks."""
    x, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
    temb = self.time_text_embed(timestep * 1000, guidance * 1000, pooled_projections)
    rotary = self.pos_embed(torch.cat((txt_ids, img_ids)))
    for block in (*self.transformer_blocks, *self.single_transformer_blocks):
        text, x = block(
            hidden_states=x, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary
        )
        x = x * 1.1
    return (self.proj_out(self.norm_out(x, temb)),)


@pytest.mark.parametrize(
    "pass_", [ModulationTable(), FirstBlockCache(0), ReferenceCache()], ids=repr
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_with_its_own_loop_is_refused_by_wrapping_passes(pass_, when):
    pipe = tiny_kontext()
    if when == "after":
        fluxfire.optimize(pipe, [pass_])
    pipe.transformer.forward = _own_loop.__get__(pipe.transformer)
    if when == "before":
        fluxfire.optimize(pipe, [pass_])
    with pytest.raises(FluxfireError, match="a forward of its own"):
        edit(pipe)
    plain = tiny_kontext()
    plain.transformer.forward = _own_loop.__get__(plain.transformer)
    fluxfire.restore(pipe)
    assert np.array_equal(edit(pipe), edit(plain))


@pytest.mark.parametrize("pass_", [ModulationTable(), FirstBlockCache(0)], ids=repr)
def test_a_forward_around_diffusers_own_is_right(pass_, reference):
    pipe = tiny_kontext()
    fluxfire.optimize(pipe, [pass_])
    forward = pipe.transformer.forward

    def around(*args, **kwargs):
        return forward(*args, **kwargs)

    pipe.transformer.forward = around
    assert np.abs(edit(pipe) - reference).max() < 1e-5


@pytest.mark.parametrize("pass_", [ModulationTable(), FirstBlockCache(0)], ids=repr)
def test_a_forward_compiled_afterwards_is_refused_by_name(pass_):
    pipe = tiny_kontext()
    fluxfire.optimize(pipe, [pass_])
    pipe.transformer.forward = torch.compile(pipe.transformer.forward, backend="eager")
    with pytest.raises(FluxfireError, match="compiled after optimize"):
        edit(pipe)
