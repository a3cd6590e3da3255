"""Compile: torch.compile for the blocks or the whole transformer."""

from __future__ import annotations

import builtins
import importlib.util
import inspect
import shutil
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.diffusers_types import Pipeline, Vae
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.runtime.freshness import Structure
from fluxfire.runtime.generation import Generation, Listener
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of

Option = bool | int | float | str | None
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
Region = Literal["blocks", "transformer"]

# dynamo's own limit is 8 graphs for a function. With ReferenceCache a block has a graph for
# refresh, mixed, reuse and no reference; each for one sample and for more, for fixed and for
# dynamic sizes, and for inputs from either kind of block.
_MAX_GRAPHS = 64
_GRAPH_BREAKING = modules.SWAPPED | {"native-cache"}


@dataclass(frozen=True)
class Compile:
    """Compiles the transformer, and on request the VAE and the text encoders.

    With `region="blocks"` the 57 blocks share three graphs. They compile in half a minute, where
    the whole model takes minutes. Passes that wrap the blocks run between the graphs.

    The pass expands a mode into inductor options, so you can give both `mode` and `options`. The
    options apply to this compilation only. Each application compiles its own copy of a function, so
    its graphs and recompilations do not count against the limits of other compiled models in the
    process.

    Measured on an H100 (docs, "Passes"): a step alone, by blocks, 379 → 293 ms; behind
    `FusedBlocks`, which leaves little to fuse, 277 → 274 ms. Inductor's autotuning gained nothing
    beyond noise (docs, "What the figures say").

    A block with a hook that breaks its graph, or with a DoRA, runs without the graph.

    Needs triton on a GPU, a C++ compiler and Python's headers on a CPU.

    Attributes:
        region: `"blocks"` or `"transformer"`.
        vae: also compile the VAE's encoder and decoder.
        text_encoders: also compile the text encoders layer by layer; the layers share graphs.
        mode: a mode of `torch.compile`, or None for its default.
        dynamic: True compiles for dynamic sizes from the start, False for fixed sizes only. None
            compiles for dynamic sizes when the second size comes.
        fullgraph: raise an error at a graph break.
        options: inductor options by name; they override the mode's options. Stored as sorted pairs.

    Raises:
        ValueError: `region` is neither `"blocks"` nor `"transformer"`.
        TypeError: a setting has the wrong type.
    """

    region: Region = "blocks"
    _: KW_ONLY
    vae: bool = False
    text_encoders: bool = False
    mode: Mode | None = None
    dynamic: bool | None = None
    fullgraph: bool = True
    options: Mapping[str, Option] | Iterable[tuple[str, Option]] | None = ()

    name: ClassVar[str] = "compile"
    stage: ClassVar[Stage] = "compile"
    slot: ClassVar[str | None] = "compile"
    exactness: ClassVar[Exactness] = "close"

    def __post_init__(self) -> None:
        regions = ("blocks", "transformer")
        if self.region not in regions:
            raise ValueError(f"region={self.region!r}; it must be one of {', '.join(regions)}")
        for name in ("vae", "text_encoders", "fullgraph", "dynamic"):
            kinds = bool | None if name == "dynamic" else bool
            if not isinstance(getattr(self, name), kinds):
                allowed = "True, False or None" if name == "dynamic" else "True or False"
                raise TypeError(f"{name}={getattr(self, name)!r}; it must be {allowed}")
        object.__setattr__(self, "options", tuple(sorted(dict(self.options or ()).items())))

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse pipelines that cannot be compiled, and options that inductor does not know."""
        if "compiled" in target.traits:
            yield Finding(
                "error",
                "the pipeline is compiled already, outside fluxfire",
                "leave out this pass, or that compile()",
            )
        if self.region == "transformer" and "wraps-blocks" in target.traits:
            yield Finding(
                "error",
                "an earlier pass decides between the blocks, and one graph of the whole "
                "transformer cannot contain such a decision",
                'use Compile(region="blocks")',
                instead=replace(self, region="blocks"),
            )
        hooked = target.traits & _GRAPH_BREAKING
        if self.region == "transformer":
            hooked |= target.traits & {"model-offload"}
        if hooked and self.fullgraph:
            yield Finding(
                "error",
                f"the hooks of {', '.join(sorted(hooked))} break the graph",
                "remove them, or use Compile(fullgraph=False)",
            )
        if self.fullgraph and _has_variant(cast("nn.Module", target.pipe.transformer)):
            yield Finding(
                "info",
                "torch cannot compile an adapter that is a variant of a LoRA, such as a DoRA: what "
                "has one runs without its graph",
            )
        if self.vae and target.pipe.vae is None:
            yield Finding(
                "error",
                "the pipeline has no VAE",
                "use Compile(vae=False)",
                instead=replace(self, vae=False),
            )
        if self.text_encoders and not _text_encoders(target.pipe):
            yield Finding(
                "error",
                "the pipeline has no text encoder",
                "use Compile(text_encoders=False)",
                instead=replace(self, text_encoders=False),
            )
        yield from self._check_options()
        yield from _check_compiler(target)

    def apply(self, tx: Transaction) -> Change:
        """Compile lazily: each module at its first call."""
        settings = {
            "fullgraph": self.fullgraph,
            "dynamic": self.dynamic,
            "options": self._inductor_options() or None,
        }
        if not _compile_takes_recompile_limit():
            tx.listen(_RecompileLimit())
        groups = self._groups(tx.pipe)
        compiled: list[_CompiledCall] = []
        for group in groups:
            call = tx.enter(_private_copy(_call_module))
            compiled += _compile_group(group, call, settings, clone=self._cuda_graphs())
        for one in compiled:
            tx.set_call(one.module, one)
        if self.fullgraph:
            tx.listen(_HookChecker(tx.pipe, compiled))
        where = "blocks" if self.region == "blocks" else "whole models"
        return Change(sum(map(len, groups)), f"{where} set to compile at their first call")

    def _groups(self, pipe: Pipeline) -> list[list[nn.Module]]:
        """Return the modules to compile, in groups that share their graphs."""
        groups: list[list[nn.Module]] = []
        if self.region == "blocks":
            by_class: dict[type, list[nn.Module]] = {}
            for block in model_of(pipe).blocks(pipe.transformer):
                by_class.setdefault(type(block), []).append(block)
            groups += by_class.values()
        else:
            groups.append([cast("nn.Module", pipe.transformer)])
        if self.vae:
            vae = cast("Vae", pipe.vae)  # `check` refuses a pipeline without one
            groups += [[part] for part in (vae.encoder, vae.decoder)]
        if self.text_encoders:
            groups += map(_layers, _text_encoders(pipe))
        return groups

    def _inductor_options(self) -> dict[str, Option]:
        from torch._inductor import list_mode_options

        expanded = list_mode_options(self.mode) if self.mode else {}
        return {**expanded, **dict(self.options or ())}

    def _cuda_graphs(self) -> bool:
        return bool(self._inductor_options().get("triton.cudagraphs"))

    def _check_options(self) -> Iterator[Finding]:
        from torch._inductor import list_mode_options, list_options

        if self.mode is not None and self.mode not in list_mode_options():
            known = ", ".join(list_mode_options())
            yield Finding("error", f"torch.compile has no mode {self.mode!r}", f"it has {known}")
            return
        unknown = [name for name in dict(self.options or ()) if name not in list_options()]
        if unknown:
            yield Finding(
                "error",
                f"inductor has no option {', '.join(unknown)}",
                "torch._inductor.list_options() lists them",
            )
        else:
            try:  # validates the options only; torch compiles nothing before the first call
                torch.compile(_call_module, options=self._inductor_options() or None)  # type: ignore[arg-type]
            except RuntimeError as error:
                yield Finding("error", f"torch.compile refuses the options: {error}")
        if (self.region == "blocks" or self.text_encoders) and self._cuda_graphs():
            yield Finding(
                "error",
                "CUDA graphs of the blocks overwrite each other's outputs "
                '(torch: "accessing tensor output of CUDAGraphs that has been overwritten")',
                'use mode="max-autotune-no-cudagraphs", or region="transformer" alone',
            )


def _text_encoders(pipe: Pipeline) -> list[nn.Module]:
    return model_of(pipe).text_encoders(pipe)


def _layers(encoder: nn.Module) -> list[nn.Module]:
    """Return a text encoder's repeated layers: its longest list of modules."""
    from torch import nn

    lists = [list(part) for part in encoder.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=len)


def _check_compiler(target: Target) -> Iterator[Finding]:
    """Check for the tools that inductor needs to generate code for the pipeline's device."""
    if target.on_gpu and importlib.util.find_spec("triton") is None:
        yield Finding("error", "compiling for CUDA needs triton", "pip install triton")
    if target.on_gpu:
        return
    if not any(map(shutil.which, ("g++", "clang++", "cl"))):
        yield Finding(
            "error", "compiling for the CPU needs a C++ compiler", "install g++ or clang++"
        )
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        yield Finding(
            "error",
            f"compiling for the CPU needs Python's headers, and {headers} has no Python.h",
            "install them (Debian: python3-dev)",
        )


class _RecompileLimit(Listener):
    """Raises dynamo's recompile limit during generations.

    Only for torch versions whose `torch.compile` has no parameter `recompile_limit`.
    """

    @override
    def on_generation(self, generation: Generation) -> AbstractContextManager[object]:
        """Raise dynamo's own limit, a setting of the process, while the generation runs."""
        from torch._dynamo import config

        patched: AbstractContextManager[object] = config.patch(recompile_limit=_MAX_GRAPHS)
        return patched


def _compile_takes_recompile_limit() -> bool:
    return "recompile_limit" in inspect.signature(torch.compile).parameters


class _CompiledCall:
    """Replaces a module's call: runs the module's graph, or with `bypass` the module itself."""

    def __init__(self, module: nn.Module, graph: Callable[..., Any]) -> None:
        self.module, self.graph, self.bypass = module, graph, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run: Any = self.module._call_impl if self.bypass else self.graph  # noqa: SLF001
        return run(*args, **kwargs)


class _HookChecker(Listener):
    """Bypasses graphs that hooks or adapters would break, which may come at any time."""

    def __init__(self, pipe: Pipeline, compiled: list[_CompiledCall]) -> None:
        self._pipe, self._compiled = pipe, compiled
        self._structure = Structure(one.module for one in compiled)
        self._cached = False

    @override
    def prepare(self) -> None:
        """Run modules with such hooks or adapters without their graphs."""
        cached = not _GRAPH_BREAKING.isdisjoint(modules.cache_traits(self._pipe.transformer))
        if self._structure.changed() or cached != self._cached:
            for one in self._compiled:
                hooked = bool(modules.swapping_traits(one.module))
                one.bypass = cached or hooked or _has_variant(one.module)
            self._cached = cached
            self._structure.accept()


def _has_variant(module: nn.Module) -> bool:
    """Whether PEFT computes a variant of a LoRA in a module; that of a DoRA breaks the graph."""
    return any(vars(part).get("lora_variant") for part in modules.submodules(module))


def _compile_group(
    modules: list[nn.Module], call: Callable[..., Any], settings: dict[str, Any], *, clone: bool
) -> Iterator[_CompiledCall]:
    """Compile modules of one class.

    Args:
        modules: the modules. They share graphs, because all are called through `call`.
        call: a private copy of `_call_module`.
        settings: arguments of `torch.compile`.
        clone: whether to clone the outputs, for CUDA graphs.
    """
    if _compile_takes_recompile_limit():
        settings = {**settings, "recompile_limit": _MAX_GRAPHS}
    for module in modules:
        graph = torch.compile(types.MethodType(call, module), **settings)
        yield _CompiledCall(module, _clone_outputs(graph) if clone else graph)


def _call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    call: Any = module._call_impl  # noqa: SLF001 - Module.compile compiles the same method
    return call(*args, **kwargs)


def _clone_outputs(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Clone the outputs, since a CUDA graph's next replay (true CFG has one) overwrites them."""
    from torch import Tensor
    from torch.utils._pytree import tree_map_only

    def call(*args: Any, **kwargs: Any) -> Any:
        return tree_map_only(Tensor, Tensor.clone, compiled(*args, **kwargs))

    return call


@contextmanager
def _private_copy(function: types.FunctionType | Any) -> Iterator[Any]:
    """Copy a function with its code object; at the end of the block, free the copy's graphs.

    Dynamo stores graphs per code object, and allows eight recompilations for each. With one shared
    code object, the eighth optimize-and-restore would raise an error, and the user's own compiled
    FLUX would use up the same limit.

    Dynamo also stores each graph in the function's globals, for the lifetime of the process. So the
    copy has its own globals, and dynamo's entries for its code are reset at the end.
    """
    from torch._C._dynamo.eval_frame import reset_code

    known = {"__name__": __name__, "__builtins__": builtins}
    code = function.__code__.replace()
    try:
        yield types.FunctionType(code, known, function.__name__)
    finally:  # also at the end of a process that does not restore, where nothing can be imported
        reset_code(code)
