"""fluxfire's own passes, one file each."""

from __future__ import annotations

from fluxfire.passes.article.inductor_patch import InductorPatch
from fluxfire.passes.article.memory_layout import MemoryLayout
from fluxfire.passes.article.para_attention import ParaAttention
from fluxfire.passes.article.qkv_fusion import QKVFusion
from fluxfire.passes.attention import Attention
from fluxfire.passes.compile import Compile
from fluxfire.passes.contrib.context_parallel import ContextParallel
from fluxfire.passes.contrib.folded_lora import FoldedLora
from fluxfire.passes.contrib.int8 import Int8
from fluxfire.passes.contrib.int8_text_encoder import Int8TextEncoder
from fluxfire.passes.contrib.placement import Placement
from fluxfire.passes.encoding_cache import EncodingCache
from fluxfire.passes.first_block_cache import FirstBlockCache
from fluxfire.passes.float8 import Float8
from fluxfire.passes.fused_blocks import FusedBlocks
from fluxfire.passes.mega_cache import MegaCache
from fluxfire.passes.modulation_table import ModulationTable
from fluxfire.passes.reference_cache import ReferenceCache
from fluxfire.passes.shared.schedule import Schedule

__all__ = [
    "Attention",
    "Compile",
    "ContextParallel",
    "EncodingCache",
    "FirstBlockCache",
    "Float8",
    "FoldedLora",
    "FusedBlocks",
    "InductorPatch",
    "Int8",
    "Int8TextEncoder",
    "MegaCache",
    "MemoryLayout",
    "ModulationTable",
    "ParaAttention",
    "Placement",
    "QKVFusion",
    "ReferenceCache",
    "Schedule",
]
