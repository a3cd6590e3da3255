"""One step: pass by pass, flag by flag, kernel by kernel; and what surrounds the loop."""

from __future__ import annotations

from statistics import median

from regions.results import load, markdown, ratio, spread, where


def steps() -> str:
    """A step with each pass, beside eager, compilation alone and another library."""
    result = load("steps.json")
    rows = [row for row in result["rows"] if not row["error"]]
    table = [
        (
            row["contender"],
            spread(row["step"]),
            ratio(rows, row, "step"),
            f"{row['first_seconds'][0]:.1f}",
            f"{row['apply_gib']:+.1f}",
            f"{row['peak_gib']:.1f}",
        )
        for row in rows
    ]
    head = (
        "", "step, ms: median (spread)", "× eager", "first run, s", "GiB on the GPU, by applying",
        "GiB peak of the edit",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{rows[0]['workload']['name']}. {where(result)}."


def flags() -> str:
    """What each of the article's compiler flags does to a step."""
    result = load("flags.json")
    table = [
        (
            row["contender"],
            f"{row['step']['median'] * 1e3:.1f}",
            ratio(result["rows"], row, "step"),
            f"{row['phases']['decoding']['median'] * 1e3:.0f}",
        )
        for row in result["rows"]
        if not row["error"]
    ]
    head = ("compiled with", "a step, ms", "× eager", "decoding, ms")
    return f"{markdown(head, table)}\n\n{where(result)}."


def operators() -> str:
    """Each operator beside what it stands for."""
    result = load("operators.json")
    table = [
        (
            row["name"],
            f"{row['ms']:.3f}",
            f"{row['moved'] / row['ms'] / 1e9:.2f}" if row["moved"] else "",
            f"{row['flop'] / row['ms'] / 1e9:.0f}" if row["flop"] else "",
            f"{row['error']:.1e}" if "error" in row else "",
        )
        for row in result["rows"]
        if "ms" in row
    ]
    head = ("", "ms", "TB/s of what it must move", "TFLOP/s", "error from float64")
    return f"{markdown(head, table)}\n\n8704 tokens, width 3072, bfloat16. {where(result)}."


def profile(name: str = "profile.json") -> str:
    """Where a compiled step goes, by kind of kernel."""
    result = load(name)
    kinds = {
        "matrix products": ("nvjet", "gemm", "cublas"),
        "attention": (
            "cudnn_generated_fort_native_sdpa",
            "flash",
            "fmha",
            "void cutlass::device_kernel<flash",
        ),
        "norms, modulation": ("norm_rows",),
        "norms and rotation of heads": ("rotate_heads",),
        "gated residuals": ("add_gated",),
        "GELU and rounding to float8": ("rows_float8",),
        "inductor's elementwise kernels": ("triton",),
    }
    spent: dict[str, float] = {}
    for kernel in result["kernels"]:
        name = kernel["name"].lower()
        kind = next((k for k, marks in kinds.items() if name.startswith(marks)), "the rest")
        spent[kind] = spent.get(kind, 0.0) + kernel["ms"]
    rows = [(kind, f"{ms:.0f} ms") for kind, ms in sorted(spent.items(), key=lambda i: -i[1])]
    passes = ", ".join(f"`{p}`" for p in result["passes"])
    return f"{markdown(('kernels', 'of one step'), rows)}\n\nWith {passes}. {where(result)}."


def freshness() -> str:
    """What a look costs, and which writes past torch's counter it sees."""
    result = load("freshness.json")
    costs = [
        (name, f"{took['median']:.1f}", f"{took['least']:.1f} to {took['most']:.1f}")
        for name, took in result["milliseconds"].items()
    ]
    saw = [(name, "yes" if found else "no") for name, found in result["seen"].items()]
    plain, known = (result["encoding"][name]["median"] for name in ("plain", "known"))
    grown = [name for name, of in result["allocated"].items() if max(of[2:]) > min(of[2:])]
    memory = "more in: " + ", ".join(grown) if grown else "the same, in all of them"
    said = (
        f"Encoding a prompt and a picture: {plain:.0f} ms; when `EncodingCache` knows both, "
        f"{known:.1f} ms. Quantizing all of `Float8`'s weights anew: "
        f"{result['requantize_seconds']:.2f} s. GPU memory after 50 rounds of optimize, edit and "
        f"restore, after 50 edits, and after 20 pipelines one after another, for each pass, beside "
        f"that after the first few: {memory}."
    )
    return "\n\n".join(
        (
            markdown(("a look", "median, ms", "least to most"), costs),
            markdown(("a write through `.data`", "seen"), saw),
            said,
            f"{where(result)}.",
        )
    )


def around() -> str:
    """What surrounds the loop, from the second prompt on."""
    result = load("around.json")
    names = ("text encoding", "reference encoding", "decoding", "the rest")
    table = []
    for row in result["rows"]:
        if row["error"]:
            continue
        phases = {name: told["seconds"][1:] for name, told in row["phases"].items()}
        outside = map(sum, zip(*(phases[name] for name in names if name in phases), strict=True))
        spent = [f"{median(phases[n]) * 1e3:.0f}" if n in phases else "" for n in names]
        table.append((row["contender"], f"{median(outside) * 1e3:.0f}", *spent))
    head = ("", "outside the loop, ms", *names)
    return f"{markdown(head, table)}\n\n{where(result)}."
