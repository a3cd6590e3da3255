"""Makes the examples of the service's page: Spark edits held-out scenes in all its steps.

python docs/make_page_examples.py

`examples.json` in the page's folder says which. The edited file is the one that the page sends, so
who presses "Edit" on an example gets the same picture.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

# As the command line sets it: threads that spin while they wait slow a shared CPU down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
from PIL import Image

import fluxfire
from fluxfire import spark
from fluxfire.bench import held_out
from fluxfire.serve import decoding
from fluxfire.serve.pipeline_editor import PipelineEditor
from fluxfire.serve.quality_levels import default_passes
from fluxfire.serve.wire import STEPS, PipelineRequest, RawPicture

PAGE = Path(fluxfire.__file__).parent / "serve" / "page"
_QUALITY = 90


def main() -> None:
    """Write two WebP files for each example."""
    pipe = spark.load()
    passes = default_passes("cpu")
    fluxfire.optimize(pipe, passes)
    editor = PipelineEditor(pipe, passes, "spark")
    examples = json.loads((PAGE / "examples.json").read_text())
    scenes = held_out(1 + max(example["scene"] for example in examples))
    for example in examples:
        before = _file(scenes[example["scene"]].picture)
        picture = RawPicture.of(decoding.decode(before, max_pixels=10**6))
        request = PipelineRequest(
            prompt=example["words"], picture=picture, seeds=(example["seed"],), steps=STEPS
        )
        result = editor.edit({1: request}, 1, _ignore_step)[1]
        after = _file(result.pictures[0].picture())
        for name, data in (("before", before), ("after", after)):
            (PAGE / f"{example['name']}-{name}.webp").write_bytes(data)


def _ignore_step(_step: int, _steps: int) -> None:
    pass


def _file(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "WEBP", quality=_QUALITY, method=6)
    return file.getvalue()


if __name__ == "__main__":
    main()
