"""The compilation that crashes inductor before torch 2.13, without and with InductorPatch.

python benchmarks/symfloat.py --out benchmarks/results/symfloat.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch._inductor import config as inductor

from fluxfire.bench import save_result, stamp
from fluxfire.passes.article import inductor_patch


def main() -> None:
    """Compile a function of a symbolic size and a number, twice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    outcome = {"needed": inductor_patch.needed(), "without": _attempt()}
    with inductor_patch.guarded():
        outcome["with"] = _attempt()
    save_result({"benchmark": "symfloat", **stamp(), **outcome}, arguments.out)
    print(outcome)


def _attempt() -> str:
    torch.compiler.reset()
    function = torch.compile(lambda x, s: torch.pow(x.shape[0] * 0.5, x.abs()) * s, dynamic=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # A graph from the cache on disk would skip the code that crashes.
        with inductor.patch(force_disable_caches=True):
            function(torch.randn(8, device=device), 0.3)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the outcome
        return " ".join(str(error).split("\n\n")[0].split())
    return "compiles"


if __name__ == "__main__":
    main()
