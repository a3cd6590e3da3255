"""Attention modules whose query, key and value a pass computes in one matrix product."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from fluxfire.diffusers_types import AttentionModule
from fluxfire.edits.stand_in import StandIn, own_class
from fluxfire.runtime.transaction import Transaction

_FLAG = "fused_projections"
_PRODUCTS = ("to_qkv", "to_added_qkv")
_OURS = 1  # true for diffusers, and distinguishable from the True that diffusers sets itself


class FusedAttention(StandIn):
    """An attention of the transformer while it runs a pass's fused products.

    The user may call diffusers' `fuse_projections` on it. Then the pass's products are removed, and
    the user's fused projections stay after `restore`, as on a plain pipeline. `unfuse_projections`
    does nothing if the user never fused, as on a plain pipeline.
    """

    of_ours = (*_PRODUCTS, _FLAG)

    def fuse_projections(self) -> None:
        """Remove the pass's products, then fuse as diffusers does."""
        modules: dict[str, nn.Module] = vars(self)["_modules"]
        for name in _PRODUCTS:
            modules.pop(name, None)
        vars(self).pop(_FLAG, None)
        self.__class__ = own_class(self)
        self.fuse_projections()

    def unfuse_projections(self) -> None:
        """Do nothing: the pass's products are not the user's to remove."""


def install_products(
    tx: Transaction, attention: AttentionModule, products: Mapping[str, nn.Module]
) -> None:
    """Make an attention of the transformer run a pass's fused products.

    Args:
        tx: the transaction that records the change.
        attention: the attention module.
        products: `to_qkv`, and `to_added_qkv` if the text has its own projections.
    """
    for name, product in products.items():
        tx.setattr(attention, name, product)
    cls: Any = type(attention)
    tx.set_class(attention, _fused(cls))
    tx.setattr(attention, _FLAG, _OURS)  # last, since diffusers calls the products once it is set


@cache
def _fused(cls: type) -> type:
    return type(f"Fused{cls.__name__}", (FusedAttention, cls), {})
