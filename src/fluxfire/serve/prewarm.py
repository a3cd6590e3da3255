"""What is made once for all containers: compiled artifacts, and the passes that find them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

ARTIFACTS = "kontext.megacache"
SIZES = ((1024, 1024), (1024, 768), (768, 1024))


def recipe(folder: Path, preset: str | None) -> Path:
    """Return the file that has the passes of a preset, with the artifacts' own.

    Args:
        folder: where `warm` saves.
        preset: a preset's name, or a file that `fluxfire tune` wrote; None for a server's default.
    """
    return folder / (f"passes-{Path(preset).stem}.json" if preset else "passes.json")


def warm(
    folder: Path,
    model: str,
    preset: str | None,
    *,
    sizes: Iterable[tuple[int, int]] = SIZES,
    **call: Any,
) -> str:
    """Load a model, optimize it, warm it up, and save what a container can take over.

    In the folder are then the compiled artifacts (`kontext.megacache`) and, in `recipe`'s file,
    the passes with which they are found.

    Args:
        folder: where to save.
        model: what `fluxfire.loading.load` takes.
        preset: a preset's name, or a file that `fluxfire tune` wrote; None for a server's default.
        sizes: output sizes to compile for.
        **call: further arguments of the pipeline's call, as for `fluxfire.warmup`.

    Returns:
        The report.
    """
    import fluxfire
    from fluxfire import loading
    from fluxfire.passes import MegaCache
    from fluxfire.planning import recipes
    from fluxfire.planning.resolve import preset_or_file
    from fluxfire.serve.levels import usual

    folder.mkdir(parents=True, exist_ok=True)
    named = preset_or_file(preset) if preset else ()  # a wrong name, before a model is loaded
    pipe = loading.load(model)
    wanted = named if preset else usual(pipe.device.type)
    others = [p for p in wanted if p.name != MegaCache.name]
    passes = fluxfire.order([*others, MegaCache(folder / ARTIFACTS)])
    fluxfire.optimize(pipe, passes)
    fluxfire.warmup(pipe, sizes=list(sizes), **call)
    recipes.write(passes, recipe(folder, preset))
    return str(fluxfire.report(pipe))
