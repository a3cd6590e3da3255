"""Attentions whose query, key and value a pass computes in one product."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from fluxfire.edits.stand_in import StandIn, own_class
from fluxfire.runtime.transaction import Transaction

_FLAG = "fused_projections"
_OURS = 1  # as good as True for diffusers, and not the True that it sets itself


class FusedAttention(StandIn):
    """An attention of the transformer while a pass has its products there.

    The user may fuse it by diffusers' own means, too. Then the pass's products make room, and what
    the user made is there after `restore`, as on a plain pipeline. Taking apart what the user never
    fused does nothing, as there.
    """

    def fuse_projections(self) -> None:
        """Make room for the user's own fusion."""
        modules: dict[str, nn.Module] = vars(self)["_modules"]
        for name in ("to_qkv", "to_added_qkv"):
            modules.pop(name, None)
        vars(self).pop(_FLAG, None)
        self.__class__ = own_class(self)
        self.fuse_projections()

    def unfuse_projections(self) -> None:
        """Leave the pass's products alone."""


def put_products(tx: Transaction, attention: Any, products: Mapping[str, nn.Module]) -> None:
    """Have an attention of the transformer run a pass's products.

    Args:
        tx: records it.
        attention: the module.
        products: `to_qkv`, and `to_added_qkv` where the text has projections of its own.
    """
    for name, product in products.items():
        tx.setattr(attention, name, product)
    cls: Any = type(attention)
    tx.set_class(attention, _fused(cls))
    tx.setattr(attention, _FLAG, _OURS)  # last: with it set, the products are called


@cache
def _fused(cls: type) -> type:
    return type(f"Fused{cls.__name__}", (FusedAttention, cls), {})
