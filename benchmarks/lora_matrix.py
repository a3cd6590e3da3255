"""What people do with a LoRA, under every pass: right, or refused with a reason.

python benchmarks/lora_matrix.py           # rewrite the table, a minute on a CPU
python benchmarks/lora_matrix.py --check   # status 1 if the table is not up to date

A plain pipeline, to which the same is done, is the oracle. The table is in
`docs/pages/how-to/lora-and-friends.md`, between two marks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model

import fluxfire
from fluxfire.errors import FluxfireError
from fluxfire.passes import (
    Compile,
    EncodingCache,
    FirstBlockCache,
    Float8,
    FoldedLora,
    FusedBlocks,
    MegaCache,
    ModulationTable,
    QKVFusion,
    ReferenceCache,
)
from fluxfire.planning import recipes
from fluxfire.protocol import Pass
from fluxfire.testing import edit, tiny_kontext
from regions.results import markdown

PAGE = Path(__file__).parent.parent / "docs" / "pages" / "how-to" / "lora-and-friends.md"
BEGIN, END = "<!-- table: lora matrix -->\n", "\n<!-- /table -->"
CLOSE, LOSS = 1e-4, 0.015
"""What a pixel may differ by where a pass only rounds, and where it computes in 8 bits."""
LAYERS = ("to_q", "to_v", "proj_mlp", "net.2", "to_add_out", "norm.linear", "norm1.linear")
"""Projections, MLPs, outputs and modulations of the blocks."""

Do = Callable[[Any], object]
Call = dict[str, Any]


def small() -> Any:
    """Build a pipeline with one block of each kind."""
    return tiny_kontext(double_blocks=1, single_blocks=1)


@cache
def lora_file(seed: int) -> dict[str, torch.Tensor]:
    """Make the file of a LoRA of rank 2 for the transformer: random numbers."""
    made: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for path, layer in small().transformer.named_modules():
        if path.endswith(LAYERS):
            wide, width = layer.weight.shape
            for side, shape in {"A": (2, width), "B": (wide, 2)}.items():
                numbers = torch.randn(shape, generator=generator) * 0.3
                made[f"transformer.{path}.lora_{side}.weight"] = numbers
    return made


def load(name: str, seed: int, *, hotswap: bool = False) -> Do:
    """Return a function that loads a LoRA into the transformer, and one into CLIP."""

    def do(pipe: Any) -> None:
        state = {key: value.clone() for key, value in lora_file(seed).items()}
        if hasattr(pipe.transformer, "_hf_hook"):
            # `load_lora_weights` takes offloading off, and can put it on again only on a GPU.
            pipe.transformer.load_lora_adapter(state, adapter_name=name, hotswap=hotswap)
        else:
            pipe.load_lora_weights(state, adapter_name=name, hotswap=hotswap)
        if hotswap:  # diffusers hot-swaps no text encoder
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
            inject_adapter_in_model(config, pipe.text_encoder, adapter_name=name)

    return do


def load_dora(pipe: Any) -> None:
    """Load an adapter that is no plain LoRA."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = LoraConfig(
            r=2, use_dora=True, init_lora_weights=False, target_modules=list(LAYERS)
        )
        pipe.transformer.add_adapter(config, adapter_name="dora")


def several(pipe: Any) -> None:
    """Load a second LoRA, and use both with a weight each; a negative weight counts, too."""
    load("other", 2)(pipe)
    pipe.set_adapters(["style", "other"], [0.7, -0.6])


def exchange(pipe: Any) -> None:
    """Take all LoRAs off, and load another."""
    pipe.unload_lora_weights()
    load("third", 3)(pipe)


PARTS = {"components": ["transformer", "text_encoder"]}
EVENTS: dict[str, tuple[Do, Call]] = {
    "loaded after `optimize`": (load("style", 1), {}),
    "`set_adapters` with another weight": (lambda p: p.set_adapters(["style"], [0.4]), {}),
    "a call with `scale`": (lambda _: None, {"joint_attention_kwargs": {"scale": 1.5}}),
    "several at once": (several, {}),
    "`disable_lora`": (lambda p: p.disable_lora(), {}),
    "`enable_lora`": (lambda p: p.enable_lora(), {}),
    "one of them deleted": (lambda p: p.delete_adapters("style"), {}),
    "`fuse_lora`": (lambda p: p.fuse_lora(**PARTS), {}),
    "`unfuse_lora`": (lambda p: p.unfuse_lora(**PARTS), {}),
    "exchanged": (exchange, {}),
    "hot-swapped": (load("third", 4, hotswap=True), {}),
    "`unload_lora_weights`": (lambda p: p.unload_lora_weights(), {}),
    "a DoRA, loaded after `optimize`": (load_dora, {}),
}
"""What is done to one pipeline, one after the other, and the arguments of the edit after it."""
BEFORE: dict[str, Do] = {
    "loaded before `optimize`": load("style", 1),
    "a DoRA, loaded before `optimize`": load_dora,
}
ROWS = (*BEFORE, *EVENTS)


def picture(pipe: Any, **call: Any) -> Any:
    """Edit with two steps."""
    return edit(pipe, steps=2, **call)


def files(pipe: Any, **_: Any) -> Any:
    """Return the bytes of all files of weights that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        paths = sorted(Path(folder).rglob("*.safetensors"))
        return np.frombuffer(b"".join(path.read_bytes() for path in paths), dtype=np.uint8)


def from_another_pipeline(pipe: Any, **call: Any) -> Any:
    """Edit with a plain pipeline over the same models."""
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return picture(other, **call)


@dataclass(frozen=True)
class Column:
    """One list of passes, or one way to use them.

    Attributes:
        name: the head of the column.
        passes: what is applied, in a folder for files.
        look: what is compared with that of the plain pipeline.
        first: what is done before `optimize`.
        bound: what a number may differ by.
        slow: whether it compiles.
    """

    name: str
    passes: Callable[[Path], Iterable[Pass] | Path]
    look: Callable[..., Any] = picture
    first: Do = lambda _: None
    bound: float = CLOSE
    slow: bool = False


def recipe(folder: Path) -> Path:
    """Save a list of passes, to apply the file."""
    recipes.write([FoldedLora(), FusedBlocks()], folder / "mine.json")
    return folder / "mine.json"


COLUMNS = (
    Column("`FusedBlocks`", lambda _: [FusedBlocks()]),
    Column("`FoldedLora`", lambda _: [FoldedLora(), FusedBlocks()]),
    Column("`Float8`", lambda _: [Float8(), FusedBlocks()], bound=LOSS),
    Column('`Float8(originals="drop")`', lambda _: [Float8(originals="drop")], bound=LOSS),
    Column("`QKVFusion`", lambda _: [FoldedLora(), QKVFusion()]),
    Column("`FirstBlockCache`", lambda _: [FoldedLora(), FirstBlockCache(0)]),
    Column("`ReferenceCache`", lambda _: [FoldedLora(), ReferenceCache(0)]),
    Column("`EncodingCache`", lambda _: [EncodingCache()]),
    Column("`ModulationTable`", lambda _: [FoldedLora(), ModulationTable(host=True)]),
    Column("`Compile`", lambda _: [FoldedLora(), FusedBlocks(), Compile()], slow=True),
    Column(
        "`MegaCache`", lambda folder: [FoldedLora(), MegaCache(folder / "saved"), Compile()],
        slow=True,
    ),
    Column(
        "model offloading", lambda _: [FoldedLora()],  # FusedBlocks would ask for triton
        first=lambda p: accelerate.cpu_offload_with_hook(p.transformer, torch.device("cpu")),
    ),
    Column("files of `save_pretrained`", lambda _: [FoldedLora(), FusedBlocks()], files, bound=0),
    Column("a recipe", recipe),
    Column("a second pipeline over the models", lambda _: [FoldedLora()], from_another_pipeline),
)  # fmt: skip


@cache
def expected(look: Callable[..., Any]) -> dict[str, Any]:
    """Return what a plain pipeline gives in every state."""
    pipe, found = small(), {}
    for name, (do, call) in EVENTS.items():
        do(pipe)
        found[name] = look(pipe, **call)
    for name, do in BEFORE.items():
        do(one := small())
        found[name] = look(one)
    return found


def cell(made: Any, wanted: Any, bound: float) -> str:
    """Say whether something is what the plain pipeline gives."""
    if made.shape != wanted.shape:
        return "wrong: other sizes"
    apart = float(np.abs(made.astype(np.float64) - wanted).max())
    return "right" if apart <= bound else f"wrong by {apart:.2g}"


def in_one_line(error: FluxfireError) -> str:
    """Return what a refusal says, in one line."""
    return " ".join(str(error).split())


def column(of: Column) -> Iterator[tuple[str, str]]:
    """Yield the row and the cell of everything that is done."""
    with tempfile.TemporaryDirectory() as made_folder:
        folder = Path(made_folder)

        def optimized(*done: Do) -> Any:
            pipe = small()
            for do in (*done, of.first):
                do(pipe)
            passes = of.passes(folder)
            return fluxfire.optimize(pipe, str(passes) if isinstance(passes, Path) else passes)

        wanted, doing = expected(of.look), [do for do, _ in EVENTS.values()]
        for name, do in BEFORE.items():
            try:
                yield name, cell(of.look(optimized(do)), wanted[name], of.bound)
            except FluxfireError as error:
                yield name, f"refused: {in_one_line(error)}"
        pipe = optimized()
        of.look(pipe)
        for index, (name, (do, call)) in enumerate(EVENTS.items()):
            try:
                do(pipe)
                said = cell(of.look(pipe, **call), wanted[name], of.bound)
            except FluxfireError as error:
                said = f"refused: {in_one_line(error)}"
                pipe = optimized(*doing[: index + 1])
            yield name, said


def table(columns: dict[str, dict[str, str]]) -> str:
    """Lay the cells out, with a note for each reason of a refusal."""
    notes: list[str] = []

    def short(said: str) -> str:
        kind, _, why = said.partition(": ")
        if kind != "refused":
            return said
        if why not in notes:
            notes.append(why)
        return f"refused ({notes.index(why) + 1})"

    head = ["a LoRA is …", *columns]
    lines = [[row, *(short(cells[row]) for cells in columns.values())] for row in ROWS]
    said = [f"{number}. {why}" for number, why in enumerate(notes, start=1)]
    return "\n".join([markdown(head, lines), *(["", *said] if said else [])])


def committed() -> str:
    """Return the table as the page has it."""
    _, _, rest = PAGE.read_text().partition(BEGIN)
    return rest.partition(END)[0]


def main() -> int:
    """Rewrite the page, or check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    made = table({of.name: dict(column(of)) for of in COLUMNS})
    if made == committed():
        return 0
    if arguments.check:
        print(f"stale: {PAGE.name}")
        return 1
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{made}{END}{rest.partition(END)[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
