"""One batch's loss and gradients as a CUDA graph: launched once instead of five thousand times.

Spark is so small that Python launches its kernels more slowly than a GPU runs them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spark_training.data import Pool

Backward = Callable[[Pool, Tensor, Tensor], Tensor]
"""Adds the gradients of a batch's loss: from a pool, its rows and a share to keep; the loss."""
_WARM_UPS = 3  # before a capture: lazy set-up, and compilation if asked for


class Replay:
    """Captures a backward pass for one pool, and replays it for other rows of it."""

    def __init__(
        self,
        backward: Backward,
        parameters: list[nn.Parameter],
        pool: Pool,
        batch: int,
        *,
        beside: Replay | None = None,
    ) -> None:
        """Capture.

        Args:
            backward: what to capture.
            parameters: whose gradients it adds.
            pool: the data.
            batch: rows at once.
            beside: another replay, never at the same time, whose memory this one may share.
        """
        device = pool.target.device
        self._parameters = parameters
        self._row = torch.zeros(batch, dtype=torch.int64, device=device)
        self._keeping = torch.zeros((), device=device)
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._forget()
                backward(pool, self._row, self._keeping)
        torch.cuda.current_stream(device).wait_stream(side)
        self._forget()
        self._graph = torch.cuda.CUDAGraph()
        memory = beside._graph.pool() if beside else None  # noqa: SLF001
        # NCCL's own thread may query events during a capture: not this thread's business.
        with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
            self._loss = backward(pool, self._row, self._keeping)
        self._gradients = [p.grad for p in parameters]

    def __call__(self, row: Tensor, keeping: float) -> Tensor:
        """Set the parameters' gradients to those of some rows' loss, and return the loss."""
        self._row.copy_(row)
        self._keeping.fill_(keeping)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
