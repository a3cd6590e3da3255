"""Spark's pipeline: diffusers' FluxKontextPipeline with defaults for Spark's size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxKontextPipeline
from PIL import Image

from fluxfire import modules
from fluxfire.pictures import flatten_to_rgb
from fluxfire.spark import language, model, weights
from fluxfire.text import with_article

_SIDE = 128
_GUIDANCE = 5.0
"""Held-out edits right: 85% at 5 (of 480), 83% at 4 and 82% at 2.5 (of 240): no clear difference.

It learned 1 to 5.
"""
_AREA = _SIDE * _SIDE
_MULTIPLE = 16
_BATCHED = 4  # dimensions of a tensor or array with a batch of pictures
_LARGEST = 1.3  # no resizing up to this ratio to the usual area


class SparkPipeline(FluxKontextPipeline):  # type: ignore[misc]
    """A `FluxKontextPipeline` with other defaults for a call.

    Kontext's defaults rescale every picture to a megapixel, which Spark was not trained on. Here a
    reference keeps its size if the size suits Spark (multiples of 16, an area of about 128 × 128
    pixels), and is rescaled to such a size otherwise. The result has the reference's size. Prompts
    are padded to 32 tokens, and the guidance is 5. A call's own arguments override all defaults.
    """

    def __call__(self, image: Any = None, prompt: Any = None, *args: Any, **call: Any) -> Any:
        """Generate a picture or edit `image`, like `FluxKontextPipeline.__call__`."""
        width = height = _SIDE
        if image is not None and not self._holds_latents(image):
            image = (
                [_check_and_convert(i) for i in image]
                if isinstance(image, list)
                else _check_and_convert(image)
            )
            first = image[0] if isinstance(image, list) else image
            high, wide = self.image_processor.get_default_height_width(first)
            width, height = self.reference_size(wide, high)
            if "_auto_resize" not in call:
                call["_auto_resize"] = False
                image = self._resize(image, height, width)
        call["width"], call["height"] = call.get("width") or width, call.get("height") or height
        call.setdefault("max_area", call["width"] * call["height"])
        call.setdefault("max_sequence_length", language.LONGEST)
        call.setdefault("guidance_scale", _GUIDANCE)
        return super().__call__(image, prompt, *args, **call)

    def _resize(self, image: Any, height: int, width: int) -> Any:
        """Resize a picture, or each picture of a list (diffusers does not resize lists)."""
        if isinstance(image, list):
            return [self.image_processor.resize(one, height, width) for one in image]
        return self.image_processor.resize(image, height, width)

    @staticmethod
    def reference_size(width: int, height: int) -> tuple[int, int]:
        """Return the size at which Spark edits a picture of the given size (both in pixels)."""
        aligned = width % _MULTIPLE == 0 and height % _MULTIPLE == 0
        if aligned and _AREA / _LARGEST <= width * height <= _AREA * _LARGEST:
            return width, height
        scale = (_AREA / (width * height)) ** 0.5
        wide, high = (max(1, round(s * scale / _MULTIPLE)) * _MULTIPLE for s in (width, height))
        return wide, high

    def _holds_latents(self, image: Any) -> bool:
        return isinstance(image, torch.Tensor) and image.size(1) == self.latent_channels


def _check_and_convert(picture: Any) -> Any:
    """Refuse pictures on which diffusers would fail with a worse error; convert Pillow's to RGB."""
    if isinstance(picture, Image.Image):
        if min(picture.size) < _MULTIPLE:
            raise ValueError(
                f"a picture of {picture.width}x{picture.height} is too small for Spark: each side "
                f"needs {_MULTIPLE} pixels or more"
            )
        return flatten_to_rgb(picture)
    if getattr(picture, "ndim", None) != _BATCHED:
        raise ValueError(
            f"Spark cannot edit {with_article(type(picture).__name__)}; give it Pillow pictures, "
            f"or a tensor of (batch, 3, height, width) or an array of (batch, height, width, 3) in "
            f"[0, 1]"
        )
    return picture


def load(
    *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> SparkPipeline:
    """Load Spark. It downloads nothing.

    On a CPU shared with other programs, set the environment variable `OMP_WAIT_POLICY` to `passive`
    before torch is loaded, in the shell or in a script's first lines: threads that spin while
    they wait make Spark up to ten times slower. The command `fluxfire` does so itself.

    Args:
        device: `"cuda"` by default where there is one, else `"cpu"`.
        dtype: bfloat16 by default on CUDA, else float32; the file has float16 weights.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    parts = model.parts()
    weights.restore(parts, weights.SHIPPED)
    pipe = SparkPipeline(**parts)
    modules.move_and_cast(pipe, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
