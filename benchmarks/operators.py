"""Each operator of ours beside what torch does in its place: milliseconds, bytes, errors.

python benchmarks/operators.py --out benchmarks/results/operators.json    # needs a GPU
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor

from fluxfire import kernels
from fluxfire.bench import save_result, stamp
from fluxfire.kernels import float8
from fluxfire.kernels.heads import Stream
from fluxfire.text import table

Event: Any = torch.cuda.Event  # torch leaves it untyped
TEXT, IMAGE, WIDTH, HEADS = 512, 8192, 3072, 24  # an edit to 1024²
HEAD = WIDTH // HEADS


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        name: what.
        run: does it.
        moved: bytes that it must read and write, or 0.
        flop: operations of its products, or 0.
        exact: the same in float64, or None.
    """

    name: str
    run: Callable[[], Any]
    moved: int = 0
    flop: float = 0.0
    exact: Callable[[], Any] | None = None


def cases() -> Iterator[Case]:
    """Iterate over our operators and what they stand for."""
    torch.manual_seed(0)

    def make(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    tokens = TEXT + IMAGE
    text, image, joint = make(1, TEXT, WIDTH), make(1, IMAGE, WIDTH), make(1, tokens, WIDTH)
    wide = make(1, tokens, 4 * WIDTH)
    shift, scale, gate = make(1, 3 * WIDTH).chunk(3, dim=1)
    row = tokens * WIDTH * 2

    def norm(x: Tensor) -> Any:
        return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def norm64() -> Any:
        x = F.layer_norm(joint.double(), (WIDTH,), eps=1e-6)
        return x * (1 + scale[:, None].double()) + shift[:, None].double()

    compiled = torch.compile(norm, dynamic=False)
    yield Case("norm, inductor", lambda: compiled(joint), 2 * row, exact=norm64)
    yield Case(
        "norm, ours",
        lambda: kernels.modulated_norm(joint, None, shift, scale, 1e-6),
        2 * row,
        exact=norm64,
    )
    yield Case(
        "norm of both streams, ours",
        lambda: kernels.modulated_norm(image, text, shift, scale, 1e-6),
        2 * row,
    )
    yield Case(
        "norm to float8, ours",
        lambda: float8.modulated_norm_float8(joint, None, shift, scale, 1e-6),
        row + row // 2,
    )
    yield Case("gated residual, ours", lambda: kernels.gated_add(image, text, gate, joint), 3 * row)

    qkv, added = make(1, IMAGE, 3 * WIDTH), make(1, TEXT, 3 * WIDTH)
    all_qkv = make(1, tokens, 3 * WIDTH)
    weight = make(HEAD)
    angles = torch.randn(tokens, HEAD // 2, device="cuda").repeat_interleave(2, 1)
    cos, sin = angles.cos(), angles.sin()
    weights = (weight, weight)
    alone, of_text, of_image = (Stream(x.chunk(3, dim=-1), weights) for x in (all_qkv, added, qkv))
    yield Case(
        "rotated heads, ours",
        lambda: kernels.joint_heads([alone], (cos, sin), 1e-6),
        4 * row,
    )
    yield Case(
        "joined heads, ours",
        lambda: kernels.joint_heads([of_text, of_image], (cos, sin), 1e-6),
        6 * row,
    )

    w_in, b_in = make(4 * WIDTH, WIDTH) / WIDTH**0.5, make(4 * WIDTH)
    flop = 2.0 * tokens * WIDTH * 4 * WIDTH
    yield Case("product alone", lambda: F.linear(joint, w_in, b_in), flop=flop)
    yield Case(
        "product, then GELU",
        lambda: F.gelu(F.linear(joint, w_in, b_in), approximate="tanh"),
        flop=flop,
    )
    yield Case(
        "product with GELU in its epilogue",
        lambda: kernels.linear_gelu(joint, w_in, b_in),
        flop=flop,
    )
    w_out, b_out = make(WIDTH, 5 * WIDTH) / (5 * WIDTH) ** 0.5, make(WIDTH)
    flop = 2.0 * tokens * WIDTH * 5 * WIDTH
    beside = torch.cat([joint, wide], dim=-1)
    yield Case("long product alone", lambda: F.linear(beside, w_out, b_out), flop=flop)
    yield Case(
        "long product after a concatenation",
        lambda: F.linear(torch.cat([joint, wide], dim=-1), w_out, b_out),
        flop=flop,
    )
    yield Case("two products", lambda: kernels.two_products(joint, wide, w_out, b_out), flop=flop)
    w_qkv = make(3 * WIDTH, WIDTH)
    yield Case(
        "query, key and value in one",
        lambda: F.linear(joint, w_qkv),
        flop=2.0 * tokens * WIDTH * 3 * WIDTH,
    )

    yield Case("GELU to float8, ours", lambda: float8.gelu_float8(joint, wide), 15 * row // 2)
    yield Case("rows to float8, ours", lambda: float8.quantize_rows(joint), row + row // 2)
    for n, k_ in ((3, 1), (4, 1), (1, 1), (1, 4), (1, 5)):
        rows = float8.QuantizedRows(*float8.quantize_rows(make(1, tokens, k_ * WIDTH)))
        w8, s8 = float8.quantize_weight(make(n * WIDTH, k_ * WIDTH))
        b8 = make(n * WIDTH)
        yield Case(
            f"float8 product {k_ * WIDTH} to {n * WIDTH}",
            lambda rows=rows, w8=w8, s8=s8, b8=b8: float8.float8_linear(  # type: ignore[misc]
                rows, w8, s8, b8, torch.bfloat16
            ),
            flop=2.0 * tokens * n * k_ * WIDTH**2,
        )
    one, two, three = (make(1, tokens, HEADS, HEAD).transpose(1, 2) for _ in range(3))
    yield Case(
        "attention",
        lambda: F.scaled_dot_product_attention(one, two, three),
        flop=4.0 * tokens**2 * WIDTH,
    )


def milliseconds(run: Callable[[], Any]) -> list[float]:
    """Time a piece of work, each turn by itself."""
    for _ in range(5):
        run()
    spent = []
    for _ in range(25):
        start, end = (Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)  # type: ignore[no-untyped-call] # noqa: SLF001 - hides launching
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        spent.append(start.elapsed_time(end))
    return spent


def main() -> None:
    """Measure each case; a case that raises says so."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for case in cases():
            row = {k: v for k, v in asdict(case).items() if k in ("name", "moved", "flop")}
            try:
                spent = milliseconds(case.run)
                row |= {"ms": median(spent), "least": min(spent), "most": max(spent)}
                if case.exact is not None:
                    exact = case.exact()
                    row["error"] = float((case.run().double() - exact).norm() / exact.norm())
            except Exception as error:  # noqa: BLE001 - the others go on
                row["raised"] = f"{type(error).__name__}: {error}"[:200]
            rows.append(row)
    save_result({"benchmark": "operators", **stamp(), "rows": rows}, arguments.out)
    lines = [
        (
            r["name"],
            r.get("raised") or f"{r['ms']:.3f}",
            f"{r['moved'] / r['ms'] / 1e9:.2f} TB/s" if r["moved"] and "ms" in r else "",
            f"{r['flop'] / r['ms'] / 1e9:.0f} TFLOP/s" if r["flop"] and "ms" in r else "",
            f"{r['error']:.1e}" if "error" in r else "",
        )
        for r in rows
    ]
    print(table(("", "ms", "", "", "error from float64"), lines))


if __name__ == "__main__":
    main()
