"""Decodes one large picture in a process of its own.

A picture of 50 megapixels can need more than a gigabyte, and an allocator keeps much of it. This
process gives all of it back, and where memory runs out the system ends it instead of the server.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from fluxfire.serve import decoding
from fluxfire.serve.decoding import PictureRefusedError
from fluxfire.serve.wire import RawPicture


async def decode_apart(file: bytes, max_pixels: int) -> RawPicture:
    """Decode a picture in a new process, and scale it down. Cancelling kills the process.

    Args:
        file: the picture's file.
        max_pixels: the most pixels that it may have.

    Raises:
        PictureRefusedError: the picture cannot be used, or needs too much memory.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__,
        str(max_pixels),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # A script may have added folders to its path.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        answer, _ = await process.communicate(file)
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        raise PictureRefusedError(
            "the picture could not be decoded, as happens where it needs more memory than the "
            "server has left; send a smaller one",
            status=413,
            code="image-too-large",
        )
    head, _, pixels = answer.partition(b"\n")
    facts = json.loads(head)
    if "message" in facts:
        raise PictureRefusedError(**facts)
    return RawPicture(facts["width"], facts["height"], pixels)


def main() -> None:
    """Read a file from standard input, and write a line of JSON and the pixels."""
    file = sys.stdin.buffer.read()
    try:
        picture = decoding.scale_down(decoding.decode(file, max_pixels=int(sys.argv[1])))
    except PictureRefusedError as refusal:
        facts = {"message": str(refusal), "status": refusal.status, "code": refusal.code}
        sys.stdout.buffer.write(json.dumps(facts).encode())
        return
    size = {"width": picture.width, "height": picture.height}
    sys.stdout.buffer.write(json.dumps(size).encode() + b"\n" + picture.tobytes())


if __name__ == "__main__":
    main()
