"""The installed package with one of its extras alone: `python -I with_extra.py EXTRA`."""

from __future__ import annotations

import importlib
import os
import sys

# What each extra brings, and what of fluxfire works with it.
MODULES = {
    "cli": ["accelerate", "dotenv", "google.protobuf", "sentencepiece", "fluxfire.cli"],
    "para-attn": ["para_attn.first_block_cache.utils", "fluxfire.passes.article.para_attention"],
    "bench": ["flip_evaluator", "matplotlib", "pynvml", "skimage.metrics", "fluxfire.bench.plots"],
    "serve": ["uvicorn", "fluxfire.serve.app", "fluxfire.serve.worker"],
    "s3": ["boto3", "fluxfire.serve.stores"],
    "otel": ["opentelemetry.sdk.trace", "fluxfire.serve.tracing"],
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
    from fluxfire.serve.stores import open_storage

    open_storage("s3://b-u?region=auto", secret=b"", retention_seconds=9, link_seconds=9)


def check_otel() -> None:
    """A provider of spans is made for the collector that the environment names."""
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    from fluxfire.serve import tracing

    tracing.configure()
    assert isinstance(trace.get_tracer_provider(), TracerProvider)


if __name__ == "__main__":
    extra = sys.argv[1]
    for module in MODULES[extra]:
        importlib.import_module(module)
    if check := globals().get(f"check_{extra.replace('-', '_')}"):
        check()
