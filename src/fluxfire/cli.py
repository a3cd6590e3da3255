"""The command `fluxfire`."""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fluxfire import __version__
from fluxfire.errors import FluxfireError
from fluxfire.protocol import Pass
from fluxfire.text import human_seconds, table

_DEFAULT_MODEL = "spark"
_RANDOM_NOTE = (
    "note: {} has random weights: the result is noise, and only shows that all parts work"
)
_TINY_SIZE = (128, 128)
_LONGEST_SIDE = 4096
_LARGEST_SEED = 2**63 - 1
_READ_ONLY = {"BUFR", "GRIB", "HDF5", "WMF"}  # Pillow announces writers that always fail


class UsageError(FluxfireError):
    """The command line asks for something impossible."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        0, or 1 after an error (printed as `error: …`); argparse itself exits with 2.
    """
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of what nobody uses
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except FluxfireError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - this is a command line
        return 1
    except BrokenPipeError:  # as when piped into head; nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fluxfire", description="Faster FLUX.1 Kontext pipelines.")
    parser.add_argument("--version", action="version", version=f"fluxfire {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], help_: str) -> Any:
        sub = commands.add_parser(name, help=help_, description=help_)
        sub.set_defaults(command=command)
        return sub

    add("passes", _passes, "list the passes, fluxfire's own and installed plugins'")

    plan = add("plan", _plan, "say what optimizing would do, and change nothing")
    _add_model(plan)
    _add_passes(plan)

    doctor = add("doctor", _doctor, "print versions, the GPU, and which passes apply")
    _add_model(doctor)

    run = add("run", _run, "edit a picture with an optimized pipeline, and report")
    _add_model(run)
    _add_passes(run)
    run.add_argument("--image", required=True, help="the picture to edit")
    run.add_argument("--prompt", type=_words, required=True, help="the instruction")
    run.add_argument("-o", "--output", default="out.png", help="where to write (default: out.png)")
    _add_sampling(run)
    run.add_argument("--size", type=_size, help="WIDTHxHEIGHT (default: the picture's shape)")
    run.add_argument("--report", choices=("table", "json"), default="table")

    bisect = add("bisect", _bisect, "find the first pass of a list that breaks a picture")
    _add_model(bisect)
    _add_passes(bisect)
    bisect.add_argument(
        "--image", help="the picture to edit (default: a held-out scene of Spark's)"
    )
    bisect.add_argument("--prompt", type=_words, help="the instruction for it")
    bisect.add_argument(
        "--example", type=_seed, default=0, help="which held-out scene (default: %(default)s)"
    )
    bisect.add_argument(
        "--min-psnr", type=float, default=30.0, metavar="DB",
        help="broken below this PSNR to the plain picture (default: %(default)s)",
    )  # fmt: skip
    _add_sampling(bisect)

    mega = add("megacache", _megacache, "look at a file of compiled artifacts")
    mega.add_argument("action", choices=("inspect", "verify"))
    mega.add_argument("path", type=Path)

    demo = add("demo", _demo, "edit pictures with Spark, plain and with passes, and compare")
    _add_passes(demo)
    demo.set_defaults(passes="first-block-cache")  # its gain shows on any machine
    demo.add_argument("--image", help="a picture of your own (default: held-out scenes)")
    demo.add_argument("--prompt", type=_words, help="the instruction for it, in Spark's language")
    demo.add_argument("-n", type=_positive, default=8, help="scenes (default: %(default)s)")
    demo.add_argument("-o", "--output", default="demo.png", help="default: %(default)s")
    _add_sampling(demo)
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=_positive, default=28, help="denoising steps (default: %(default)s)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=_DEFAULT_MODEL,
        help="spark, a folder, a hub id, random-tiny or random-full (default: %(default)s)",
    )


def _add_passes(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--preset", help="faithful or article (default: faithful; of demo: first-block-cache alone)"
    )
    which.add_argument("--passes", help="names in order, separated by commas, or none")


def _wanted(arguments: argparse.Namespace) -> list[Pass]:
    """Find the passes asked for; names are checked before any model is loaded."""
    from fluxfire import plugins, presets

    if arguments.preset is not None or arguments.passes is None:
        return list(presets.named(arguments.preset or "faithful"))
    if arguments.passes == "none":
        return []
    names = [name.strip() for name in arguments.passes.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--passes {arguments.passes!r} names no pass; write none for none")
    return [plugins.make(name) for name in names]


def _words(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid UTF-8") from None
    return text


def _positive(text: str) -> int:
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _seed(text: str) -> int:
    number = _whole(text)
    if not 0 <= number <= _LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {_LARGEST_SEED}")
    return number


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 1024x1024")
    return int(match[1]), int(match[2])


def _say(text: object = "") -> None:
    print(text)  # noqa: T201 - this is a command line


def _note(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201 - this is a command line


def _passes(_: argparse.Namespace) -> int:
    from fluxfire import plugins

    rows: list[tuple[str, ...]] = []
    for name, cls in plugins.own().items():
        story = (cls.__doc__ or "").strip().splitlines()[0]
        rows.append((name, cls.stage, cls.slot or "-", cls().exactness, story))
    for name, entry in plugins.announced().items():
        rows.append((name, "?", "?", "?", f"announced by a plugin: {entry.value}"))
    _say(table(("pass", "stage", "slot", "exactness", "what it does"), rows))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from fluxfire import api

    wanted = _wanted(arguments)
    planned = api.plan(_load(arguments.model), wanted)
    _say(planned)
    return 0 if planned.ok else 1


def _doctor(arguments: argparse.Namespace) -> int:
    from fluxfire import api, plugins
    from fluxfire.environment import environment

    env = environment()
    rows = [("python", env.python)]
    rows += [(name, version or "not installed") for name, version in env.packages.items()]
    rows += [("CUDA", env.cuda or "none"), ("GPU", env.gpu or "none")]
    _say(table(("what", "found"), rows))
    _say()
    pipe = _load(arguments.model)
    verdicts = []
    for name, cls in plugins.own().items():
        planned = api.plan(pipe, [cls()])
        findings = [str(f) for step in planned.steps for f in step.findings]
        verdict = "applies" if planned.ok else "does not apply"
        verdicts.append((name, verdict, "; ".join([*planned.problems, *findings])))
    _say(table(("pass", f"on {arguments.model}", "why"), verdicts))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    picture = _open(arguments.image)
    output = _writable(arguments.output)
    if arguments.size is not None:
        _check_size(*arguments.size)
    wanted = _wanted(arguments)
    if arguments.model == "spark":
        _note_foreign_words(arguments.prompt)
    import torch

    from fluxfire import api
    from fluxfire.environment import environment

    pipe = _load(arguments.model)
    api.optimize(pipe, wanted)
    pipe.set_progress_bar_config(disable=False)
    began = time.perf_counter()
    try:
        result = pipe(
            prompt=arguments.prompt,
            num_inference_steps=arguments.steps,
            generator=torch.Generator().manual_seed(arguments.seed),
            **_sizes(pipe, arguments.size, picture),
        ).images[0]
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"{first} Try a smaller --size, or a GPU with more memory") from None
    seconds = time.perf_counter() - began
    try:
        result.save(output)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {output}: {error}") from None
    _note(f"{output}: {result.width}x{result.height} in {human_seconds(seconds)}")
    report = api.report(pipe)
    if arguments.report == "json":
        facts = {"environment": environment().to_dict(), **report.to_dict()}
        _say(json.dumps(facts, indent=2))
    else:
        _say(report)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    if (arguments.image is None) != (arguments.prompt is None):
        raise UsageError("--image and --prompt go together: give both, or neither")
    output = _writable(arguments.output)
    wanted = _wanted(arguments)
    from fluxfire import api, demo, spark

    if arguments.image is None:
        tasks = demo.held_out(arguments.n)
    else:
        tasks = [demo.Task(_open(arguments.image), arguments.prompt)]
        _note_foreign_words(arguments.prompt)
    pipe = spark.load()
    planned = api.plan(pipe, wanted)
    if not planned.ok and planned.suggestion:
        wanted = list(planned.suggestion)
        _note("note: left out what does not apply here: " + "; ".join(planned.complaints()))
    _note(f"editing {len(tasks)} pictures plain, then with passes, on {pipe.device} …")
    done = demo.run(pipe, wanted, tasks, steps=arguments.steps, seed=arguments.seed)
    _say(done)
    done.grid().save(output)
    _note(f"the pictures are in {output.resolve()}")
    return 0


def _bisect(arguments: argparse.Namespace) -> int:
    if (arguments.image is None) != (arguments.prompt is None):
        raise UsageError("--image and --prompt go together: give both, or neither")
    wanted = _wanted(arguments)
    import torch

    from fluxfire import spark
    from fluxfire.bench import bisect
    from fluxfire.spark import checking
    from fluxfire.spark.scoring import psnr

    example = None
    if arguments.image is None:
        example = spark.examples(n=arguments.example + 1)[-1]
        picture, prompt = example.source, example.instruction
    else:
        picture, prompt = _open(arguments.image), arguments.prompt
    pipe = _load(arguments.model)

    def edit() -> Any:
        return pipe(
            prompt=prompt,
            num_inference_steps=arguments.steps,
            generator=torch.Generator().manual_seed(arguments.seed),
            **_sizes(pipe, None, picture),
        ).images[0]

    plain = edit()
    was_right = example is not None and example.check(plain)

    def judge(_: Any) -> tuple[bool, str]:
        image = edit()
        value = psnr(checking.as_tensor(image), checking.as_tensor(plain))
        undone = example is not None and was_right and not example.check(image)
        note = f"PSNR to plain {value:.1f} dB" + (", edit no longer right" if undone else "")
        return undone or value < arguments.min_psnr, note

    found = bisect(pipe, wanted, judge)
    _say(found)
    return 0 if found.first is None else 1


def _note_foreign_words(prompt: str) -> None:
    from fluxfire import spark

    if foreign := spark.unknown(prompt):
        _note(
            f"note: Spark never learned {', '.join(map(repr, foreign))}, so its answer means "
            f'little; it knows requests such as "make the red circle blue" (shapes on plain '
            f"grounds), not photographs"
        )


def _megacache(arguments: argparse.Namespace) -> int:
    from fluxfire import archive
    from fluxfire.passes.mega_cache import machine

    path: Path = arguments.path
    try:
        if arguments.action == "inspect":  # also of a file that would not be used
            for number, payload in enumerate(archive.peek(path)):
                _say(table((f"payload {number}", ""), _facts(payload).items()) + "\n")
        payloads = archive.read(path, archive.signing_key())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except MemoryError:
        raise UsageError(f"cannot read {path}: it is larger than memory") from None
    except archive.DisbelievedError as error:
        raise UsageError(f"{path} would not be used: {error}") from None
    here = machine()
    fitting = sum(here.items() <= p.fingerprint.items() for p in payloads)
    signed = "signed" if archive.signing_key() else "nobody else can write it"
    _say(f"{path} is intact, and {signed}; {fitting} of {len(payloads)} payloads fit this machine")
    return 0 if fitting or arguments.action == "inspect" else 1


def _facts(payload: Any) -> dict[str, object]:
    return {
        "made": payload.made,
        "bytes": len(payload.blob),
        "artifacts": len(payload.keys),
        "compiled in": human_seconds(payload.seconds),
        "tokens (noise+reference+text)": ", ".join(payload.sizes),
        **payload.fingerprint,
    }


def _load(model: str) -> Any:
    from fluxfire import loading

    if model in loading.RANDOM:
        _note(_RANDOM_NOTE.format(model))
    return loading.load(model)


def _check_size(width: int, height: int) -> None:
    if any(n == 0 or n % 16 for n in (width, height)):
        raise UsageError(f"size {width}x{height}: both sides must be positive multiples of 16")
    if max(width, height) > _LONGEST_SIDE:
        raise UsageError(f"size {width}x{height}: no side can be longer than {_LONGEST_SIDE}")


def _sizes(pipe: Any, size: tuple[int, int] | None, picture: Any) -> dict[str, Any]:
    """Say at which size to generate, and give the picture."""
    from fluxfire import kontext

    extra: dict[str, Any] = {}
    if kontext.is_tiny(pipe):  # a megapixel of its small patches would take minutes
        width, height = size or _TINY_SIZE
        picture = picture.resize((width, height))
        extra["_auto_resize"] = False
    else:
        width, height = size or kontext.reference_size(pipe, *picture.size)
    return {
        "image": picture,
        "width": width,
        "height": height,
        "max_area": width * height,
        **extra,
    }


def _open(name: str) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(name) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except UnidentifiedImageError:
        raise UsageError(f"{name} is not a picture that can be read") from None
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot read {name}: {reason}") from None


def _writable(name: str) -> Path:
    from PIL import Image

    path = Path(name)
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {name}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"cannot write {name}: it is a folder")
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE or kind in _READ_ONLY:
        raise UsageError(f"cannot write {name}: {path.suffix or 'no suffix'} is no picture format")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"cannot write {name}: permission denied")
    return path
