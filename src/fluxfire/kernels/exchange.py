"""Attention over tokens that several processes share: each process has a part of the tokens.

These functions exchange queries, keys and values between the processes. They use torch's functional
collectives, which a compiled graph can contain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fluxfire.kernels.float8 import E4M3

Exchange = Literal["ulysses", "ring"]

_ops = torch.ops._c10d_functional  # noqa: SLF001 - the public wrappers' names change with torch


@dataclass(frozen=True, eq=False)
class Shards:
    """Says how the processes share the tokens of one run through the blocks.

    Every process has equally many tokens. Where the tokens do not divide, the last process repeats
    its last token. Such a copy is a harmless query. As a key it would count twice, so attention
    leaves the copies out.

    Attributes:
        kind: `"ulysses"` or `"ring"`.
        group: the name of the process group that exchanges tensors.
        rank: this process's number.
        count: the number of processes.
        padding: how many of the last process's last tokens are copies.
    """

    kind: Exchange
    group: str
    rank: int
    count: int
    padding: int = 0

    def heads(self, heads: int) -> slice:
        """Return the heads for which this process computes attention."""
        if self.kind == "ring":
            return slice(0, heads)
        own = heads // self.count
        return slice(self.rank * own, (self.rank + 1) * own)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Compute this process's queries' attention to the keys of all processes.

        `"ulysses"` gives each process all tokens of some heads, and takes the result apart again.
        `"ring"` gives each process all keys and values. Its queries stay where they are.

        Args:
            query: (batch, own tokens, heads, head width).
            key: as `query`.
            value: as `query`.
            kernel: computes attention: (batch, tokens, heads, head width), on the heads of `heads`.

        Returns:
            As `query`.
        """
        if self.kind == "ring":
            return kernel(query, *self._all_tokens(key, value))
        query, *pair = self._own_heads(query, key, value)
        return self._own_tokens(kernel(query, *map(self._drop_copies, pair)))

    def largest(self, x: Tensor) -> Tensor:
        """Return the largest number among the processes, for each element."""
        return _ops.wait_tensor(_ops.all_reduce(x, "max", self.group))  # type: ignore[no-any-return]

    def _own_heads(self, *tensors: Tensor) -> list[Tensor]:
        """Exchange (batch, own tokens, heads, width) for (batch, tokens, own heads, width)."""
        batch, tokens, heads, width = tensors[0].shape
        n = self.count
        parts = [x.view(batch, tokens, n, heads // n, width) for x in map(_as_bytes, tensors)]
        # A message each: one for all would need a copy of what came, to take the three apart.
        sent = [self._send(x.permute(2, 0, 1, 3, 4).contiguous()) for x in parts]
        came = [_ops.wait_tensor(x) for x in sent]  # (sender, batch, own tokens, own heads, width)
        joint = [x.transpose(0, 1).reshape(batch, n * tokens, heads // n, width) for x in came]
        return [x.view(like.dtype) for x, like in zip(joint, tensors, strict=True)]

    def _own_tokens(self, x: Tensor) -> Tensor:
        """Exchange (batch, tokens, own heads, width) for (batch, own tokens, heads, width)."""
        batch, tokens, heads, width = x.shape
        n = self.count
        parts = x.reshape(batch, n, tokens // n, heads, width)
        came = _ops.wait_tensor(self._send(parts.transpose(0, 1).contiguous()))
        # (sender, batch, own tokens, the sender's heads, width)
        return came.permute(1, 2, 0, 3, 4).reshape(batch, tokens // n, n * heads, width)  # type: ignore[no-any-return]

    def gather(self, x: Tensor) -> Tensor:
        """Gather (batch, own tokens, ...) to (batch, processes, own tokens, ...)."""
        return _ops.wait_tensor(self._gathering(x)).transpose(0, 1)  # type: ignore[no-any-return]

    def _all_tokens(self, *tensors: Tensor) -> list[Tensor]:
        """Gather (batch, own tokens, heads, width) to (batch, tokens, heads, width)."""
        came = [self._gathering(x) for x in map(_as_bytes, tensors)]
        joint = [_ops.wait_tensor(x).transpose(0, 1).flatten(1, 2) for x in came]
        pairs = zip(joint, tensors, strict=True)
        return [self._drop_copies(x.view(like.dtype)) for x, like in pairs]

    def _gathering(self, x: Tensor) -> Tensor:
        """Begin to gather: (process, batch, own tokens, ...)."""
        own = x[None].contiguous()
        return _ops.all_gather_into_tensor(own, self.count, self.group)  # type: ignore[no-any-return]

    def _send(self, parts: Tensor) -> Tensor:
        """Send each process its part of the first dimension, and begin to receive."""
        ones = [1] * self.count
        return _ops.all_to_all_single(parts, ones, ones, self.group)  # type: ignore[no-any-return]

    def _drop_copies(self, x: Tensor) -> Tensor:
        return x[:, : x.shape[1] - self.padding] if self.padding else x


def _as_bytes(x: Tensor) -> Tensor:
    """View float8 as bytes, which every backend of torch.distributed can send."""
    return x.view(torch.uint8) if x.dtype == E4M3 else x
