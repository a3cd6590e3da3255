"""What fluxfire reads of diffusers' objects, as types.

diffusers declares neither the components of a pipeline nor most members of a component. mypy sees
its pipelines as empty placeholder classes. So this module declares the types that fluxfire relies
on. They are protocols: diffusers' objects have these members, and no class derives from them.

Importing this module loads neither torch nor diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

if TYPE_CHECKING:  # so that this file loads no torch
    import torch
    from PIL import Image
    from torch import nn

__all__ = [
    "AttentionModule",
    "DiffusersPipeline",
    "ImageProcessor",
    "Output",
    "Pipeline",
    "Scheduler",
    "Transformer",
    "Vae",
]

DiffusersPipeline: TypeAlias = Any
"""A pipeline as the user holds it.

A user may call anything that diffusers' class has. `Pipeline` lists only what fluxfire uses, and a
type checker could not compare diffusers' class with it. So this type is not checked.
"""


class Pipeline(Protocol):
    """A pipeline of diffusers, as fluxfire sees it.

    A pass that needs more of its pipeline writes `pipe: Any = tx.pipe`.

    Attributes:
        transformer: the model that removes noise.
        vae: the model between pictures and latents, or None.
        text_encoder: the first text encoder, or None.
        text_encoder_2: the second text encoder, or None.
        scheduler: the object that holds the time steps of a generation.
        image_processor: the object that converts and resizes pictures.
        vae_scale_factor: pixels per latent, in each direction.
    """

    transformer: Transformer
    vae: Vae | None
    text_encoder: nn.Module | None
    text_encoder_2: nn.Module | None
    scheduler: Scheduler
    image_processor: ImageProcessor
    vae_scale_factor: int
    _progress_bar_config: dict[str, Any]

    @property
    def components(self) -> dict[str, Any]:
        """All components by name: models, tokenizers, the scheduler; None for a missing one."""
        ...

    @property
    def device(self) -> torch.device:
        """The device that the weights are on."""
        ...

    @property
    def _execution_device(self) -> torch.device:
        """The device that the pipeline computes on, even while its weights are offloaded."""
        ...

    @property
    def current_timestep(self) -> torch.Tensor:
        """The time step of the current step: a new object for each step."""
        ...

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the current generation."""
        ...

    def progress_bar(self, *, total: int) -> Any:
        """Create a progress bar of tqdm."""
        ...

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Set the arguments of all progress bars."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Output:
        """Generate pictures."""
        ...


class Output(Protocol):
    """What a call of a pipeline returns.

    Attributes:
        images: a list of Pillow pictures; for `output_type="np"` an array.
    """

    images: Any


class Transformer(Protocol):
    """The model that removes noise. It is a torch module.

    Attributes:
        config: the settings that the model was built with; diffusers gives each as an attribute.
        transformer_blocks: the double blocks of FLUX.
        single_transformer_blocks: the single blocks of FLUX.
        time_text_embed: the module that embeds time step, guidance and pooled text.
        is_cache_enabled: whether diffusers' own cache is enabled.
    """

    config: Any
    transformer_blocks: nn.ModuleList
    single_transformer_blocks: nn.ModuleList
    time_text_embed: nn.Module
    is_cache_enabled: bool

    @property
    def device(self) -> torch.device:
        """The device that the weights are on."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the weights."""
        ...

    def buffers(self) -> Iterator[torch.Tensor]:
        """Iterate over the buffers."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over the model and all its submodules."""
        ...

    def double(self) -> Self:
        """Cast the weights to float64."""
        ...

    def enable_cache(self, config: object) -> None:
        """Enable one of diffusers' own caches."""
        ...

    def disable_cache(self) -> None:
        """Disable diffusers' own cache."""
        ...

    def enable_layerwise_casting(
        self, *, storage_dtype: torch.dtype, compute_dtype: torch.dtype
    ) -> None:
        """Store each layer's weights in one dtype, and cast them to another to compute."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Predict how to remove noise."""
        ...


class Vae(Protocol):
    """The model between pictures and latents. It is a torch module.

    Attributes:
        config: the settings that the model was built with; diffusers gives each as an attribute.
        encoder: the part that runs for `encode`.
        decoder: the part that runs for `decode`.
    """

    config: Any
    encoder: nn.Module
    decoder: nn.Module

    @property
    def device(self) -> torch.device:
        """The device that the weights are on."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over the model and all its submodules."""
        ...

    def double(self) -> Self:
        """Cast the weights to float64."""
        ...

    def decode(self, latents: torch.Tensor) -> Any:
        """Decode latents; the result has the picture in `sample`."""
        ...


class Scheduler(Protocol):
    """The object that holds the time steps of a generation.

    Attributes:
        timesteps: (steps,): the time steps in the order in which they run.
    """

    timesteps: torch.Tensor


class ImageProcessor(Protocol):
    """The object that converts and resizes pictures."""

    def resize(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """Resize a picture."""
        ...


class AttentionModule(Protocol):
    """The attention of a block. It is a torch module.

    Attributes:
        processor: the object that computes the attention.
        heads: the number of heads.
        head_dim: the width of a head.
    """

    processor: Any
    heads: int
    head_dim: int
