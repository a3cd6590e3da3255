"""Lists the private names of other packages that fluxfire uses.

A new version of torch or diffusers may rename or remove them without notice. So look here first
when you raise a version. The code uses the names directly; this file only lists them.

`tests/test_private_names.py` scans the source. It fails if a private name is missing here, if a
name is not in the installed version, or if nothing uses an entry. `fluxfire doctor` shows the names
that the installed versions lack.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
import sys
from dataclasses import dataclass
from importlib.metadata import version


@dataclass(frozen=True)
class PrivateName:
    """A private name of another package, or a name in a private module of it.

    Attributes:
        owner: the dotted name of the module, class or function that has the name. A function has it
            if it takes a parameter of that name, or sets an attribute of that name on an object.
        name: the name.
        use: what fluxfire does with it.
        instead: what fluxfire could use if a new version lacks the name.
        since: the first version of the library that has it, if fluxfire also runs on older ones.
    """

    owner: str
    name: str
    use: str
    instead: str
    since: tuple[int, int] = (0, 0)

    @property
    def library(self) -> str:
        """The package that has the name, as it is imported."""
        return self.owner.partition(".")[0]

    @property
    def dotted(self) -> str:
        """The whole name."""
        return f"{self.owner}.{self.name}"

    def is_there(self) -> bool:
        """Whether the installed library has the name. Imports the library."""
        if self.since > (0, 0) and _version(self.library) < self.since:
            return True
        try:
            owner = pkgutil.resolve_name(self.owner)
        except (ImportError, AttributeError, RuntimeError):  # the last by diffusers
            return False
        if hasattr(owner, self.name):
            return True
        try:
            if inspect.ismodule(owner):
                return pkgutil.resolve_name(self.dotted) is not None  # a module in a package
            return re.search(rf"\b{self.name}\b", inspect.getsource(owner)) is not None
        except (ImportError, AttributeError, OSError, TypeError):  # or the source is not there
            return False


def missing() -> list[str]:
    """List the private names that the loaded libraries lack. Imports no further library."""
    loaded = (entry for entry in PRIVATE_NAMES if entry.library in sys.modules)
    return [entry.dotted for entry in loaded if not entry.is_there()]


def _version(library: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version(library))[:2])


_HANDLER = "torch._dynamo.callback.callback_handler"
_BACKENDS = "diffusers.models.attention_dispatch.AttentionBackendName"

PRIVATE_NAMES: tuple[PrivateName, ...] = (
    # torch: operators.
    PrivateName(
        "torch", "_scaled_mm",
        "Multiplies float8 matrices (kernels/float8.py).",
        "torch.nn.functional.scaled_mm.",
    ),
    PrivateName(
        "torch", "_int_mm",
        "Multiplies int8 matrices (kernels/int8.py).",
        "A Triton kernel, or a public name of torch.",
    ),
    PrivateName(
        "torch", "_addmm_activation",
        "Computes a linear layer and its GELU in one cuBLASLt kernel (kernels/products.py).",
        "torch.nn.functional.linear and gelu, which are slower.",
    ),
    PrivateName(
        "torch.ops", "_c10d_functional",
        "Exchanges tensors between processes, also in a compiled graph (kernels/exchange.py).",
        "torch.distributed._functional_collectives, whose functions change their names.",
    ),
    # torch: tensors.
    PrivateName(
        "torch.Tensor", "_version",
        "Reads how often a tensor was changed in place, to see that cached values are stale.",
        "Nothing public; then only the checksums of kernels/checksum.py.",
    ),
    PrivateName(
        "torch.Tensor", "_make_subclass",
        "Makes the placeholder of a weight that was dropped (passes/shared/host_weights.py).",
        "Tensor.as_subclass.",
    ),
    # torch: modules.
    PrivateName(
        "torch.nn.Module", "_parameters",
        "Reads and replaces a layer's own parameters, and restores their order.",
        "named_parameters(recurse=False) to read; setattr to replace.",
    ),
    PrivateName(
        "torch.nn.Module", "_buffers",
        "Reads a layer's own buffers, and restores their order.",
        "named_buffers(recurse=False) to read; setattr to replace.",
    ),
    PrivateName(
        "torch.nn.Module", "_modules",
        "Walks through submodules quickly, and restores their order.",
        "named_children() to read; setattr and delattr to change.",
    ),
    PrivateName(
        "torch.nn.Module", "_forward_hooks",
        "Reads whether a user set hooks on a module.",
        "There is no public reader; ask for one, or refuse modules that may have hooks.",
    ),
    PrivateName(
        "torch.nn.Module", "_forward_pre_hooks",
        "Reads whether a user set hooks on a module.",
        "There is no public reader; ask for one, or refuse modules that may have hooks.",
    ),
    PrivateName(
        "torch.nn.modules.module", "_global_forward_hooks",
        "Reads whether a user set hooks for all modules.",
        "There is no public reader; ask for one.",
    ),
    PrivateName(
        "torch.nn.modules.module", "_global_forward_pre_hooks",
        "Reads whether a user set hooks for all modules.",
        "There is no public reader; ask for one.",
    ),
    PrivateName(
        "torch.nn.Module", "_call_impl",
        "Calls a module with its hooks, but without its compiled call.",
        "Module.__call__ with the compiled call removed.",
    ),
    PrivateName(
        "torch.nn.Module", "_compiled_call_impl",
        "Replaces the call of one module; Module.compile() sets the same attribute.",
        "The forward of the instance, which runs inside the hooks.",
    ),
    PrivateName(
        "torch.nn.Module", "_apply",
        "Overrides it, so that .to() keeps float8 weights and dropped weights correct.",
        "An override of Module.to.",
    ),
    PrivateName(
        "torch.nn.Module", "_save_to_state_dict",
        "Overrides it, to refuse to save a weight that was dropped.",
        "Module.register_state_dict_pre_hook.",
    ),
    PrivateName(
        "torch.nn.Module", "_load_from_state_dict",
        "Overrides it, to replace a dropped weight by a loaded one.",
        "Module.register_load_state_dict_pre_hook.",
    ),
    # torch: modes and trees.
    PrivateName(
        "torch.overrides", "_get_current_function_mode_stack",
        "Lists the modes that intercept torch's functions, to see that cached values are stale.",
        "There is no public reader; ask for one.",
    ),
    PrivateName(
        "torch.utils._python_dispatch", "_get_current_dispatch_mode_stack",
        "Lists the modes that intercept torch's operators, to see that cached values are stale.",
        "There is no public reader; ask for one.",
    ),
    PrivateName(
        "torch.autograd.forward_ad", "_current_level",
        "Sees whether torch.func.jvp runs, and then uses no kernels and no caches.",
        "There is no public reader; ask for one.",
    ),
    PrivateName(
        "torch._C", "_DisableFuncTorch",
        "Keeps a pass's preparations out of the caller's torch.func transforms.",
        "A separate thread for the preparations, since a transform holds for one thread.",
    ),
    PrivateName(
        "torch.utils._pytree", "tree_flatten",
        "Lists the tensors among an encoder's arguments (passes/encoding_cache.py).",
        "The package optree, or a loop over tuples and dictionaries.",
    ),
    PrivateName(
        "torch.utils._pytree", "tree_map",
        "Clones the tensors in an encoder's result (passes/encoding_cache.py).",
        "The package optree, or a loop over tuples and dictionaries.",
    ),
    PrivateName(
        "torch.utils._pytree", "tree_map_only",
        "Clones the tensors in a graph's result (passes/compile.py).",
        "The package optree, or a loop over tuples and dictionaries.",
    ),
    # torch: what torch.compile does, and its settings.
    PrivateName(
        "torch", "_dynamo",
        "Sees in sys.modules whether torch can have compiled; the progress bar imports it.",
        "Always watch, which imports the compiler.",
    ),
    PrivateName(
        _HANDLER, "register_start_callback",
        "Hears of each compilation when it begins.",
        "torch.compile(backend=...) with a backend of our own, or no progress and no counts.",
    ),
    PrivateName(
        _HANDLER, "register_end_callback",
        "Hears of each compilation when it ends.",
        "torch.compile(backend=...) with a backend of our own, or no progress and no counts.",
    ),
    PrivateName(
        _HANDLER, "remove_start_callback",
        "Stops hearing of compilations.",
        "As for register_start_callback.",
    ),
    PrivateName(
        _HANDLER, "remove_end_callback",
        "Stops hearing of compilations.",
        "As for register_end_callback.",
    ),
    PrivateName(
        "torch._dynamo.utils", "counters",
        "Counts graphs, graph breaks and cache hits.",
        "torch.compiler's logs, or no such counts in the report.",
    ),
    PrivateName(
        "torch._dynamo.utils", "compilation_time_metrics",
        "Reads the seconds of tracing and compiling, by the names that dynamo gives its phases.",
        "torch._dynamo.utils.compile_times, or no such seconds in the report.",
    ),
    PrivateName(
        "torch._dynamo.config", "patch",
        "Raises the recompile limit, on a torch whose torch.compile has no such parameter.",
        "The parameter recompile_limit of torch.compile.",
    ),
    PrivateName(
        "torch._dynamo.convert_frame", "compile_lock",
        "Stops compilations in other threads while artifacts are read.",
        "A copy of the list of artifacts in one call.",
    ),
    PrivateName(
        "torch._dynamo.eval_frame._TorchDynamoContext.__call__", "_torchdynamo_orig_callable",
        "Sees that a user compiled a module.",
        "The file of the function's code, which is one of dynamo's.",
    ),
    PrivateName(
        "torch._dynamo.eval_frame.OptimizedModule", "_orig_mod",
        "Sees that a user wrapped the transformer by torch.compile, for the error message.",
        "isinstance(transformer, torch._dynamo.OptimizedModule).",
    ),
    PrivateName(
        "torch._C._dynamo.eval_frame", "reset_code",
        "Frees the graphs of one function (passes/compile.py).",
        "torch.compiler.reset, which frees the user's graphs too.",
    ),
    PrivateName(
        "torch._guards.TracingContext", "try_get",
        "Sees whether torch's compiler is asking for the class of an object.",
        "The callbacks of compilations, which tell when one begins and ends.",
    ),
    PrivateName(
        "torch._inductor", "list_mode_options",
        "Checks the mode of Compile, and reads whether it uses CUDA graphs.",
        "torch.compile's own error; CUDA graphs only if the options name them.",
    ),
    PrivateName(
        "torch._inductor", "list_options",
        "Checks the options of Compile.",
        "torch.compile's own error.",
    ),
    PrivateName(
        "torch._inductor.config", "save_config_portable",
        "Puts inductor's settings into the key of MegaCache.",
        "repr of the settings that the pass itself sets.",
    ),
    PrivateName(
        "torch._inductor.fx_passes.post_grad", "same_meta",
        "Guards it against numbers, on a torch that lacks the guard (InductorPatch).",
        "Nothing: InductorPatch does nothing where the function is gone.",
    ),
    PrivateName(
        "torch._inductor.codecache.CppPythonBindingsCodeCache._load_library_inner",
        "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
        "Leaves this environment variable out of a fingerprint: inductor sets it.",
        "The new name of the variable.",
    ),
    # torch: compiled code on the disk.
    PrivateName(
        "torch.compiler._cache.CacheArtifactManager", "with_fresh_cache",
        "Records only what is compiled inside a block (passes/shared/artifact_recorder.py).",
        "torch.compiler.save_cache_artifacts, which has all that the process compiled.",
    ),
    PrivateName(
        "torch.compiler._cache.CacheArtifactManager", "_seen_artifacts",
        "Lists the artifacts recorded so far.",
        "torch.compiler.save_cache_artifacts.",
    ),
    PrivateName(
        "torch.compiler._cache", "_serialize_single_cache",
        "Writes artifacts in torch's format.",
        "torch.compiler.save_cache_artifacts.",
    ),
    PrivateName(
        "torch.utils._appending_byte_serializer", "AppendingByteSerializer",
        "Writes artifacts in torch's format.",
        "torch.compiler.save_cache_artifacts.",
    ),
    # torch: what `fluxfire.testing` compares before and after a pass.
    PrivateName(
        "torch._inductor", "config",
        "Compares all settings of inductor.",
        "A list of the settings that passes change.",
    ),
    PrivateName(
        "torch._dynamo", "config",
        "Compares all settings of dynamo.",
        "A list of the settings that passes change.",
    ),
    PrivateName(
        "torch._functorch", "config",
        "Compares all settings of AOTAutograd.",
        "A list of the settings that passes change.",
    ),
    PrivateName(
        "torch._inductor.fx_passes", "post_grad",
        "Compares the functions of the module that InductorPatch changes.",
        "Nothing, once InductorPatch is gone.",
    ),
    PrivateName(
        "torch._dynamo", "callback",
        "Compares the number of callbacks.",
        "Nothing, once fluxfire registers no callbacks.",
    ),
    # diffusers.
    PrivateName(
        "diffusers.DiffusionPipeline", "_execution_device",
        "Reads on which device an offloaded pipeline computes.",
        "The execution_device of accelerate's hooks; without hooks, pipe.device.",
    ),
    PrivateName(
        "diffusers.DiffusionPipeline.set_progress_bar_config", "_progress_bar_config",
        "Reads the user's settings of the progress bar, to restore them after warmup.",
        "The settings of the bar that pipe.progress_bar() returns.",
    ),
    PrivateName(
        "diffusers.FluxKontextPipeline.__call__", "_auto_resize",
        "Turns off the resizing of the reference picture.",
        "Pictures that have one of Kontext's preferred sizes.",
    ),
    PrivateName(
        "diffusers.ModelMixin", "_parallel_config",
        "Sees that a user split the transformer over several GPUs, and lets diffusers see that "
        "ContextParallel did.",
        "Nothing public; ask for a property.",
        since=(0, 36),
    ),
    PrivateName(
        "diffusers.models.transformers.transformer_flux.FluxAttnProcessor", "_attention_backend",
        "Reads and sets the attention kernel of one processor.",
        "transformer.set_attention_backend, which sets all processors.",
    ),
    PrivateName(
        "diffusers.models.attention_dispatch", "_check_attention_backend_requirements",
        "Asks whether an attention kernel can run here, and why not.",
        "A call of transformer.set_attention_backend on a tiny transformer.",
    ),
    PrivateName(
        _BACKENDS, "_native_cudnn",
        "Measures this attention kernel, and may choose it.",
        "The new name of the backend in diffusers' table of backends.",
    ),
    PrivateName(
        _BACKENDS, "_native_flash",
        "Measures this attention kernel, and may choose it.",
        "The new name of the backend in diffusers' table of backends.",
    ),
    PrivateName(
        _BACKENDS, "_flash_3",
        "Measures this attention kernel, and may choose it.",
        "The new name of the backend in diffusers' table of backends.",
    ),
    PrivateName(
        "diffusers.hooks.HookRegistry.check_if_exists_or_initialize", "_diffusers_hook",
        "Sees that a user turned on group offloading or layerwise casting.",
        "Nothing public; ask for a property.",
    ),
    PrivateName(
        "diffusers.AutoencoderKL", "_encode",
        "Turns tiles on inside `encode` where the memory needs it.",
        "`AutoencoderKL.encode`; `EncodingCache` must then cache beneath it.",
    ),
    PrivateName(
        "diffusers.AutoencoderKL", "_decode",
        "Turns tiles on inside `decode` where the memory needs it.",
        "`AutoencoderKL.decode`.",
    ),
    # Other packages.
    PrivateName(
        "transformers.T5EncoderModel", "_keep_in_fp32_modules",
        "Keeps T5's `wo` in float32 in an int8 checkpoint that is read in float16.",
        "The name `wo` itself.",
    ),
    PrivateName(
        "accelerate.hooks.add_hook_to_module", "_hf_hook",
        "Sees that a user turned on offloading, and finds the weights that it moved.",
        "Nothing public; ask accelerate for a reader.",
    ),
    PrivateName(
        "para_attn.first_block_cache.diffusers_adapters.flux.apply_cache_on_transformer",
        "_is_cached",
        "Sees that a user put ParaAttention's cache on the transformer; cache-dit sets it too.",
        "The module in which the transformer's forward is defined.",
    ),
    PrivateName(
        "fa3_fwd", "_C",
        "Imports it to register the operator of FlashAttention-3.",
        "The package's Python function, which costs the host 0.15 ms more for each call.",
    ),
    PrivateName(
        "argcomplete.CompletionFinder.__call__", "_ARGCOMPLETE",
        "Sees that the shell is completing a line, to import argcomplete only then.",
        "Call argcomplete.autocomplete always.",
    ),
)  # fmt: skip
