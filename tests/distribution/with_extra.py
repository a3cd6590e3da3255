"""The installed package with one of its extras alone: `python -I with_extra.py EXTRA`."""

from __future__ import annotations

import importlib
import sys

# What each extra brings, and what of fluxfire works with it.
MODULES = {
    "cli": ["accelerate", "dotenv", "google.protobuf", "sentencepiece", "fluxfire.cli"],
    "para-attn": ["para_attn.first_block_cache.utils", "fluxfire.passes.article.para_attention"],
    "bench": ["flip_evaluator", "matplotlib", "pynvml", "skimage.metrics", "fluxfire.bench.plots"],
    "serve": ["uvicorn", "fluxfire.serve.app", "fluxfire.serve.worker"],
    "s3": ["boto3", "fluxfire.serve.storage"],
}


def check_para_attn() -> None:
    """The pass applies."""
    import fluxfire
    from fluxfire.testing import tiny_kontext

    planned = fluxfire.plan(tiny_kontext(), [fluxfire.passes.ParaAttention()])
    assert planned.ok, str(planned)


def check_bench() -> None:
    """Every measure can be taken."""
    from fluxfire.bench import quality

    assert quality.missing() == []


def check_serve() -> None:
    """The service is made."""
    from fluxfire.serve import Settings, create_app

    assert "/inference" in create_app(Settings()).openapi()["paths"]


def check_s3() -> None:
    """A bucket is opened; it is not asked."""
    from fluxfire.serve.storage import open_storage

    open_storage("s3://b-u?region=auto", secret=b"", retention_seconds=9, link_seconds=9)


if __name__ == "__main__":
    extra = sys.argv[1]
    for module in MODULES[extra]:
        importlib.import_module(module)
    if check := globals().get(f"check_{extra.replace('-', '_')}"):
        check()
