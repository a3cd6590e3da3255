"""Every pass with a LoRA, loaded before the pass is applied and after: kept, or refused.

python benchmarks/lora.py --out benchmarks/results/lora.json  # a minute on a CPU

On the tiny pipeline, whose picture the LoRA changes: its effect is kept if the picture is nearer
to that of the plain pipeline with the LoRA than to that without.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

import fluxfire
from each_pass import added
from fluxfire import presets
from fluxfire.bench import save_result, stamp
from fluxfire.errors import FluxfireError
from fluxfire.protocol import Pass
from fluxfire.testing import edit, tiny_kontext

STEPS = 8
TARGETS = ["to_q", "to_k", "to_v", "add_k_proj", "proj_mlp", "norm.linear"]
"""Layers of each kind that passes replace: projections, MLPs and modulations."""


def load_lora(pipe: Any) -> None:
    """Load a LoRA of random weights, the same each time."""
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=TARGETS)
    pipe.transformer.add_adapter(config, "style")


def before(pass_: Pass) -> Any:
    """Edit with a LoRA that was there when the pass was applied."""
    pipe = tiny_kontext()
    load_lora(pipe)
    return edit(fluxfire.optimize(pipe, [pass_]), steps=STEPS)


def after(pass_: Pass) -> Any:
    """Edit, then with a LoRA that is loaded onto a pipeline that has the pass and has run."""
    pipe = fluxfire.optimize(tiny_kontext(), [pass_])
    edit(pipe, steps=STEPS)
    load_lora(pipe)
    return edit(pipe, steps=STEPS)


def outcome(picture: Callable[[], Any], plain: Any, expected: Any) -> dict[str, Any]:
    """Say what became of a LoRA.

    Args:
        picture: edits with a pass and the LoRA.
        plain: the picture without either.
        expected: the picture with the LoRA alone.
    """
    try:
        made = picture()
    except FluxfireError as error:
        return {"outcome": "refused", "error": str(error).splitlines()[0]}
    lost, kept = (float(np.abs(made - other).mean()) for other in (expected, plain))
    said = "kept" if lost < kept else "lost"
    return {"outcome": said, "from_expected": lost, "from_plain": kept}


def main() -> None:
    """Try every pass; the result is saved after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    plain = edit(tiny_kontext(), steps=STEPS)
    with_lora = tiny_kontext()
    load_lora(with_lora)
    expected = edit(with_lora, steps=STEPS)
    rows: list[dict[str, Any]] = []
    result = {"benchmark": "lora", **stamp(), "steps": STEPS, "targets": TARGETS, "rows": rows}
    result["effect"] = float(np.abs(expected - plain).mean())
    with tempfile.TemporaryDirectory() as folder:
        tried = {**{p.name: p for p in presets.faithful}, **added(Path(folder))}
        for name, pass_ in tried.items():
            row: dict[str, Any] = {"name": name}
            for how in (before, after):
                row[how.__name__] = outcome(partial(how, pass_), plain, expected)
            rows.append(row)
            save_result(result, arguments.out)
            print(name, row["before"]["outcome"], row["after"]["outcome"])


if __name__ == "__main__":
    main()
