"""How many picture sizes two sizes of SmolVLM's tiles cut differently: 2.2B's of 384 pixels, 256M's of 512.

    python benchmarks/same_tiles.py

Sizes alone are computed, as SmolVLM's image processor of transformers computes them; no picture is made.
"""

from __future__ import annotations

import argparse
import math

from transformers.models.smolvlm.image_processing_pil_smolvlm import _resize_output_size_rescale_to_max_len

TILES = (384, 512)  # pixels


def tiles(width: int, height: int, tile: int) -> tuple[int, int]:
    """Rows and columns of tiles: the longest side becomes four of them, the other one whole ones."""
    height, width = _resize_output_size_rescale_to_max_len(height, width, max_len=4 * tile)
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / tile)
        return math.ceil(int(columns * tile / ratio) / tile), columns
    rows = math.ceil(height / tile)
    return rows, math.ceil(int(rows * tile * ratio) / tile)


def differing(least: int, most: int) -> list[tuple[int, int]]:
    """The (width, height) that are cut differently, of all with sides from `least` to `most` pixels."""
    sides = range(least, most + 1)
    small, large = TILES
    return [(w, h) for w in sides for h in sides if tiles(w, h, small) != tiles(w, h, large)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--least", type=int, default=100, help="pixels of the shortest side")
    parser.add_argument("--most", type=int, default=1000, help="pixels of the longest side")
    options = parser.parse_args()
    count, found = (options.most - options.least + 1) ** 2, differing(options.least, options.most)
    print(f"{len(found):,} of {count:,} sizes are cut differently: {len(found) / count:.3%}")
    print("for example", ", ".join(f"{width} x {height}" for width, height in found[:5]))


if __name__ == "__main__":
    main()
