"""Make the picture of all things from Debian's fonts-noto-color-emoji.

The font is in Debian's package fonts-noto-color-emoji; `dpkg -x` unpacks it. fonttools reads it.

    PYTHONPATH=benchmarks python -m spark_training.things NotoColorEmoji.ttf
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image

from fluxfire.spark.things import COLUMNS, FILE, SIDE, THINGS


def main() -> None:
    """Write the file."""
    from fontTools.ttLib import TTFont

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("font", type=Path, help="NotoColorEmoji.ttf")
    parser.add_argument("--out", type=Path, default=FILE)
    arguments = parser.parse_args()
    font = TTFont(arguments.font)
    glyphs, bitmaps = font.getBestCmap(), font["CBDT"].strikeData[0]
    rows = -(-len(THINGS) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * SIDE, rows * SIDE))
    for i, code in enumerate(THINGS.values()):
        picture = Image.open(io.BytesIO(bitmaps[glyphs[code]].imageData)).convert("RGBA")
        picture = picture.crop(picture.getchannel("A").getbbox())
        picture.thumbnail((SIDE - 2, SIDE - 2), Image.Resampling.LANCZOS)
        left = i % COLUMNS * SIDE + (SIDE - picture.width) // 2
        top = i // COLUMNS * SIDE + (SIDE - picture.height) // 2
        sheet.paste(picture, (left, top))
    sheet.save(arguments.out, optimize=True)
    print(f"{len(THINGS)} things, {arguments.out.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
