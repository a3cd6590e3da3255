"""Options that commands share: the model, the passes, the examples, and the files to write.

Each `add_` function also adds the checks of its options. `main` runs them before the command, so
they come before torch is imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fluxfire.cli import catalog
from fluxfire.cli.console import UsageError, note, usage_errors
from fluxfire.cli.files import check_output, check_picture_format, free_path
from fluxfire.cli.values import (
    memory,
    positive_decimal,
    positive_number,
    prompt,
    seed,
    size,
    words,
)
from fluxfire.loading import KONTEXT, RANDOM, SPARK, model_folder
from fluxfire.planning import recipes
from fluxfire.protocol import Pass

if TYPE_CHECKING:  # so that the command line answers before torch is loaded
    from PIL import Image

    from fluxfire.bench import Example, Workload
    from fluxfire.diffusers_types import DiffusersPipeline

MAX_EXAMPLES = 5000

# What `add_subparsers` returns; argparse has no public name for it.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001
Command: TypeAlias = Callable[[argparse.Namespace], int]


def add_command(
    commands: Commands, name: str, command: Command, summary: str, *, example: str
) -> argparse.ArgumentParser:
    """Add a command to the parser.

    Args:
        commands: the commands so far.
        name: what the user types.
        command: the function to run; it returns the exit status.
        summary: one line of help.
        example: a command line to copy.

    Returns:
        The command's parser, for its options.
    """
    parser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example: {example}",
    )  # fmt: skip
    parser.set_defaults(command=command, checks=[])
    return parser


def add_check(parser: argparse.ArgumentParser, check: Callable[[argparse.Namespace], None]) -> None:
    """Add a check of a command's options; it raises `UsageError`, and must not import torch."""
    parser.get_default("checks").append(check)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `--model`."""
    option = parser.add_argument(
        "--model", default=SPARK,
        help=f"{SPARK} (a tiny model for pictures of emoji), a folder, a hub id such as {KONTEXT}, "
        f"{' or '.join(RANDOM)} (default: %(default)s)",
    )  # fmt: skip
    option.completer = lambda **_: [SPARK, *RANDOM, KONTEXT]  # type: ignore[attr-defined]
    add_check(parser, _check_model)


def add_passes(
    parser: argparse.ArgumentParser, default: str = "faithful, without compile on a CPU"
) -> None:
    """Add `--preset` and `--passes`, which exclude each other.

    Args:
        parser: the command's.
        default: what the help says about the default.
    """
    group = parser.add_mutually_exclusive_group()
    preset = group.add_argument(
        "--preset",
        help="faithful (nothing lossy), balanced or fast (both skip steps: lossy), article, or a "
        f"file from fluxfire tune or calibrate (default: {default})",
    )
    passes = group.add_argument("--passes", help="names in order, separated by commas, or none")
    preset.completer = lambda **_: catalog.presets()  # type: ignore[attr-defined]
    passes.completer = _complete_passes  # type: ignore[attr-defined]
    add_check(parser, _check_passes)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add `--seed` and `--steps`."""
    parser.add_argument(
        "--seed", type=seed, default=0, help="seed of the noise (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=positive_number, default=28, help="denoising steps (default: %(default)s)"
    )


def add_guidance(parser: argparse.ArgumentParser) -> None:
    """Add `--guidance`, and `--true-cfg` with `--negative-prompt`."""
    parser.add_argument(
        "--guidance", type=positive_decimal, metavar="SCALE",
        help="guidance scale (default: the model's; 5 for Spark, 3.5 for Kontext)",
    )  # fmt: skip
    parser.add_argument(
        "--true-cfg", type=positive_decimal, metavar="SCALE",
        help="scale of true CFG, above 1; each step then runs twice. Needs --negative-prompt",
    )  # fmt: skip
    parser.add_argument(
        "--negative-prompt", type=words, metavar="TEXT", help="what true CFG leads away from"
    )
    add_check(parser, _check_guidance)


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add `--size`."""
    parser.add_argument(
        "--size", type=size, metavar="WIDTHxHEIGHT",
        help="size of the result (default: the picture's shape)",
    )  # fmt: skip


def add_picture(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add `--image` and `--prompt`; the check reads the picture into `arguments.picture`."""
    parser.add_argument("--image", required=required, metavar="FILE", help="the picture to edit")
    _add_prompt(parser, required=required)


def add_examples(parser: argparse.ArgumentParser, n: int) -> None:
    """Add what to edit: `-n`, `--examples`, or `--image` with `--prompt`.

    Args:
        parser: the command's.
        n: the default number of Spark's held-out edits.
    """
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "-n", type=positive_number, default=n,
        help="number of Spark's held-out edits (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--examples", type=Path, metavar="FILE",
        help='your own edits, one JSON object a line: {"image": "cat.jpg", "prompt": "…"}',
    )  # fmt: skip
    group.add_argument("--image", metavar="FILE", help="one picture of your own")
    _add_prompt(parser, required=False)
    add_check(parser, _check_examples)


def add_output(
    parser: argparse.ArgumentParser, default: str, content: str, *, picture: bool = False
) -> None:
    """Add `--output` and `--overwrite`; the check puts a path into `arguments.output`.

    Args:
        parser: the command's.
        default: the file's name; a number is added if it exists.
        content: what the file holds.
        picture: whether its suffix must be a picture format.
    """
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help=f"{content} (default: {default}; if that exists, the first free number is added)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")

    def check(arguments: argparse.Namespace) -> None:
        if arguments.output is None:
            arguments.output = free_path(default)
        check_outputs(arguments, arguments.output)
        if picture:
            check_picture_format(arguments.output)

    add_check(parser, check)


def check_outputs(arguments: argparse.Namespace, *paths: Path | None) -> None:
    """Check that files can be written, and that none of them is an input.

    Raises:
        UsageError: one cannot be written.
    """
    inputs = [getattr(arguments, name, None) for name in ("image", "examples", "preset")]
    for path in paths:
        if path is not None:
            check_output(path, inputs=inputs, overwrite=arguments.overwrite)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def selected_examples(arguments: argparse.Namespace) -> list[Example]:
    """Return the examples that a parser with `add_examples` asks for.

    Raises:
        UsageError: the file of examples cannot be used.
    """
    from fluxfire.bench import Example, held_out, read_examples

    if arguments.image is not None:
        return [Example(arguments.prompt, arguments.picture)]
    if arguments.examples is None:
        return held_out(arguments.n)
    with usage_errors():
        examples = read_examples(arguments.examples)
    for number, example in enumerate(examples, 1):
        if not example.instruction.strip():
            raise UsageError(f"{arguments.examples}: the prompt of example {number} is empty")
    return examples


def selected_passes(arguments: argparse.Namespace, *, dry_run: bool = False) -> list[Pass]:
    """Return the passes that a parser with `add_passes` asks for.

    Args:
        arguments: the parsed arguments.
        dry_run: whether the command compiles nothing, so that no remark on compiling is due.

    Raises:
        UsageError: a file of passes cannot be used.
    """
    import torch

    from fluxfire.planning.resolve import passes_from_options

    with usage_errors():
        passes = passes_from_options(arguments.preset, arguments.passes)
    if torch.cuda.is_available() or all(p.stage != "compile" for p in passes):
        return passes
    if arguments.preset is None and arguments.passes is None:
        note(
            "note: there is no GPU, so the default leaves out compile: on a CPU it takes minutes. "
            "--preset faithful includes it"
        )
        return [p for p in passes if p.stage != "compile"]
    if arguments.preset is not None and not dry_run:  # whoever writes --passes has named compile
        note(
            f"note: there is no GPU, and {arguments.preset} includes compile: on a CPU it takes "
            f"minutes. To leave it out, name the other passes with --passes"
        )
    return passes


def selected_workload(arguments: argparse.Namespace, pipe: DiffusersPipeline) -> Workload:
    """Return the workload that `add_sampling`, `add_guidance` and `add_size` ask for."""
    from fluxfire.bench import Workload

    asked = {
        "guidance_scale": arguments.guidance,
        "true_cfg_scale": arguments.true_cfg,
        "negative_prompt": arguments.negative_prompt,
    }
    return Workload.for_pipeline(
        pipe,
        steps=arguments.steps,
        size=arguments.size,
        call={name: value for name, value in asked.items() if value is not None},
    )


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Add `--memory`."""
    parser.add_argument(
        "--memory", type=memory, metavar="SIZE",
        help="fit into this much GPU memory, such as 16GiB, or auto: adds the passes for it",
    )  # fmt: skip


def load_model(model: str, *, device: str | None = None, placed: bool = False) -> DiffusersPipeline:
    """Load the pipeline that `--model` names.

    Args:
        model: the name.
        device: where to compute; by default on the GPU, if there is one.
        placed: whether a pass will place it: then it stays in host memory.
    """
    from fluxfire import loading

    if model in RANDOM:
        note(
            f"note: {model} has random weights. The result is noise, and only shows that all parts "
            f"work"
        )
    if not placed:
        return loading.load(model, device=device)
    from fluxfire.passes.contrib.placement import default_device

    return loading.load(model, device="cpu", dtype=loading.default_dtype(default_device().type))


def needs_placing(arguments: argparse.Namespace, passes: Iterable[Pass]) -> bool:
    """Whether `--memory` or a pass of the list places the pipeline."""
    return arguments.memory is not None or any(p.name == "placement" for p in passes)


def note_spark_limits(instruction: str, picture: Image.Image) -> None:
    """Print what Spark cannot do with this instruction and picture."""
    from fluxfire import spark

    width, height = spark.SparkPipeline.reference_size(*picture.size)
    resized = "" if (width, height) == picture.size else f"; yours becomes {width}x{height}"
    note(
        f"note: Spark is a tiny model. It edits pictures of emoji at about 128x128{resized}. "
        f"For photographs use --model {KONTEXT}"
    )
    if foreign := spark.unknown(instruction):
        note(
            f"note: Spark never learned {', '.join(map(repr, foreign))}, so the result means "
            f'little. Spark knows instructions such as "replace the cat with a red apple"'
        )


def _add_prompt(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--prompt", type=prompt, required=required, metavar="TEXT",
        help='the instruction, such as "make it night"',
    )  # fmt: skip
    add_check(parser, _check_picture)


def _check_picture(arguments: argparse.Namespace) -> None:
    """Check `--image` and `--prompt`, and read the picture."""
    if (arguments.image is None) != (arguments.prompt is None):
        raise UsageError("--image and --prompt go together: give both, or neither")
    if arguments.image is not None:
        from fluxfire.pictures import read_picture

        with usage_errors():
            arguments.picture = read_picture(arguments.image)


def _check_examples(arguments: argparse.Namespace) -> None:
    if arguments.n > MAX_EXAMPLES:
        raise UsageError(f"-n {arguments.n} is more than {MAX_EXAMPLES}, the number of scenes")
    if arguments.examples is not None:
        try:
            arguments.examples.open("rb").close()
        except OSError as error:
            raise UsageError(
                f"cannot read examples from {arguments.examples}: {error.strerror}"
            ) from None


def _check_guidance(arguments: argparse.Namespace) -> None:
    if (arguments.true_cfg is None) != (arguments.negative_prompt is None):
        raise UsageError("--true-cfg and --negative-prompt go together: give both, or neither")
    if arguments.true_cfg is not None and arguments.true_cfg <= 1:
        raise UsageError(
            f"--true-cfg {arguments.true_cfg:g} changes nothing: give a scale above 1, or leave it "
            f"out"
        )


def _check_model(arguments: argparse.Namespace) -> None:
    """Check that the name means a model."""
    with usage_errors():
        model_folder(arguments.model)


def _check_passes(arguments: argparse.Namespace) -> None:
    preset = arguments.preset
    if preset is None:
        if arguments.passes is not None:
            catalog.check_passes(arguments.passes)
    elif not preset.endswith(".json"):
        catalog.check_preset(preset)
    else:
        with usage_errors():
            recipes.read_entries(Path(preset))


def _complete_passes(prefix: str, **_: object) -> list[str]:
    """Complete the last name of a list."""
    head, comma, _last = prefix.rpartition(",")
    return [f"{head}{comma}{name}" for name in catalog.pass_names()]
