"""Runs a command in several processes, each with a GPU, that share its edit."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from fluxfire.diffusers_types import DiffusersPipeline
from fluxfire.errors import FluxfireError
from fluxfire.kernels.exchange import Exchange
from fluxfire.passes import ContextParallel
from fluxfire.planning.resolve import order
from fluxfire.protocol import Pass

Work = Callable[[argparse.Namespace, Sequence[Pass]], None]

_MEET = timedelta(minutes=10)
"""How long the processes wait for each other at the start: one may load its weights more slowly."""


def run_together(work: Work, arguments: argparse.Namespace, passes: Sequence[Pass]) -> None:
    """Run a function in several processes.

    Args:
        work: a function of a module. It gets the arguments and the passes. In all processes but the
            first, `arguments.output` is None, and nothing is printed.
        arguments: the parsed arguments, with `gpus` and `device`.
        passes: the passes.

    Raises:
        FluxfireError: there are not so many GPUs, or a process failed.
    """
    count = arguments.gpus
    on_cpu = arguments.device == "cpu"
    if not on_cpu and torch.cuda.device_count() < count:
        found = torch.cuda.device_count()
        raise FluxfireError(
            f"--gpus {count} needs {count} GPUs, and torch finds {found}; --device cpu tries it on "
            f"the CPU"
        )
    # The parser's own entries are functions, which another process cannot get.
    own = {n: v for n, v in vars(arguments).items() if n not in ("checks", "command")}
    with tempfile.TemporaryDirectory() as folder, _quiet_end():
        try:
            start_processes(  # type: ignore[no-untyped-call]
                _run_one,
                args=(work, argparse.Namespace(**own), list(passes), folder),
                nprocs=count,
                daemon=True,
                start_method="spawn",
            )
        except (ProcessRaisedException, ProcessExitedException) as error:
            told = sorted(Path(folder).glob("*.error"), key=lambda file: file.stat().st_mtime_ns)
            if not told:
                raise FluxfireError(f"a process of --gpus {count} failed: {error}") from error
            raise FluxfireError(told[0].read_text("utf-8")) from None


def share(passes: Sequence[Pass], pipe: DiffusersPipeline) -> list[Pass]:
    """Add `ContextParallel` to a list without it, of the kind that fits the pipeline's heads."""
    if any(one.name == ContextParallel.name for one in passes):
        return list(passes)
    heads: int = pipe.transformer.config.num_attention_heads
    kind: Exchange = "ring" if heads % dist.get_world_size() else "ulysses"
    return order([*passes, ContextParallel(kind)])


@contextmanager
def _quiet_end() -> Iterator[None]:
    """Let torch not log which processes it ends after one failed: that one's error says enough."""
    logger = logging.getLogger("torch.multiprocessing.spawn")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _run_one(
    rank: int, work: Work, arguments: argparse.Namespace, passes: Sequence[Pass], folder: str
) -> None:
    """Run the function in one of the processes.

    Args:
        rank: the number of this process.
        work: the function.
        arguments: the parsed arguments.
        passes: the passes.
        folder: where the processes meet, and tell their errors.
    """
    count, on_cpu = arguments.gpus, arguments.device == "cpu"
    with ExitStack() as stack:
        if rank:
            arguments.output = None
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        if on_cpu:
            torch.set_num_threads(max(1, torch.get_num_threads() // count))
        else:
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "gloo" if on_cpu else "cpu:gloo,cuda:nccl",
            init_method=(Path(folder) / "meeting").as_uri(),
            rank=rank,
            world_size=count,
            timeout=_MEET,
        )
        try:
            work(arguments, passes)
        except FluxfireError as error:
            # The first to fail tells why; the others tell only that it left them.
            Path(folder, f"{rank}.error").write_text(str(error), "utf-8")
            raise SystemExit(1) from error
        finally:
            dist.destroy_process_group()
