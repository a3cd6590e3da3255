"""The reference, once in a while; and quality against speed."""

from __future__ import annotations

from regions.results import find, load, markdown, ratio, where


def reference(name: str, *workloads: str) -> str:
    """Steps that compute, reuse and hit, and whole edits, with Spark's schedules."""
    result = load(name)
    rows = [row for row in result["rows"] if row["workload"]["name"] in workloads]
    table = []
    for row in rows:
        whole = find(rows, "eager", row["workload"]["name"])["step"]["median"]
        cells = [
            f"{row[kind]['median'] * 1e3:.0f} ({whole / row[kind]['median']:.2f}×)"
            if row[kind]
            else ""
            for kind in ("step", "reuse_step", "hit_step")
        ]
        left = f"{row['reuses']:.0f} + {row['hits']:.0f}" if row["scheduled"] else ""
        edit = f"{row['edit']['median']:.2f} ({ratio(rows, row, 'edit')})"
        if row["compiles"]:
            edit = "compiled meanwhile"
        name = row["workload"]["name"]
        table.append((row["contender"], name, *cells, left, edit, f"{row['peak_gib']:.1f}"))
    head = (
        "", "workload", "computed step, ms (× eager's)", "reuse step", "hit",
        "reuses + hits", "edit, s", "GiB peak",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{where(result)}."


def reference_on_spark() -> str:
    """What ways to reuse the reference do to Spark's edits."""
    result = load("reference_on_spark.json")
    table = [
        (
            row["way"],
            f"{row['refreshes']:.1f}" if "spacing=" in "".join(row["passes"]) else "",
            f"{row['success']:.1%}",
            *(
                ("same",) * 2
                if row["way"] == "plain"
                else (
                    f"{row['psnr']['mean']:.1f} ({row['psnr']['worst']:.1f})",
                    f"{row['psnr']['fifth']:.1f}",
                )
            ),
            f"{row['psnr_to_target']:.2f}",
        )
        for row in result["rows"]
    ]
    head = (
        "", f"refreshes, of {result['steps']} steps", "edits done",
        "PSNR to plain, dB: mean (worst)", "reached by 95 of 100", "PSNR to the exact target",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{result['examples']} held-out edits. {where(result)}."


def frontier() -> str:
    """Quality against speed: ours, and others'."""
    result = load("frontier.json")
    table = [
        (
            row["contender"],
            f"{row['speed']:.2f}×",
            " + ".join(f"{row['steps'].get(k, 0):.1f}" for k in ("computed", "reused", "hit")),
            *(
                ("same",) * 2
                if row["family"] == "plain"
                else (
                    f"{row['psnr']['mean']:.1f} ({row['psnr']['worst']:.1f})",
                    f"{row['ssim']['mean']:.4f} ({row['ssim']['worst']:.4f})",
                )
            ),
            f"{row['success']:.1%}",
        )
        for row in result["rows"]
    ]
    head = (
        "", "× compiled", "steps computed + reusing + hit", "PSNR to plain, dB: mean (worst)",
        "SSIM", "edits done",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{result['examples']} held-out edits. {where(result)}."
