"""The pairs that have a name: one entry each. Adding one is an entry here and a file in `configs/` for each
model that is new; `tests/presets/test_pairs.py` compares both with what cachekd itself finds of the pair.

No torch here: `cachekd init --list` shows this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cachekd.errors import CachekdError, did_you_mean, nearest, some_of

# How the student's visual features go into the teacher: as they are, as in the paper; through the trained
# bridge (`--switch-bridge linear`, beyond the paper); or not at all, and L_VSD is off.
Switch = Literal["paper", "linear", "none"]


@dataclass(frozen=True)
class Pair:
    """A teacher and a student that people want to distil.

    Attributes:
        name: of the preset.
        teacher, student: files of `configs/`, without their ending.
        switch: how L_VSD fits.
        why: what makes it so, for people.
        pictures: what is worth knowing of pictures and data.
        tokenizers: whether both read text alike. Else L_Align is computed over cells.
        prepare: what has to be done before the pipeline can run, line by line.
        folders: where the two models are after that; by default their names on the hub.
        stages: whether the student begins from its parts, and is trained in stages.
    """

    name: str
    teacher: str
    student: str
    switch: Switch
    why: str
    pictures: str
    tokenizers: Literal["one", "two"] = "one"
    prepare: tuple[str, ...] = ()
    folders: tuple[str, str] | None = None
    stages: bool = False


# Of all of them: no checkpoint of these was ever loaded by cachekd's tests, which know the shapes alone.
NOT_RUN = (
    "not run: the published shapes were tested, no published checkpoint was loaded and nothing was trained"
)

_TILES = "a picture alone in its sample is cut into tiles of 384 pixels (up to 9, and the whole), several in "
_SMOL = (
    "both cut a picture into the same tiles, 27 x 27 patches of width 1,152 each for the teacher and 32 x 32 "
    "of "
    "768 for the student: the bridge resamples tile by tile"
)
_SMOL_TILES = (
    "up to 16 tiles and the whole, however small the picture is: 81 tokens each for the teacher, 64 here"
)

_SMOL_FIRST = ("pip install num2words  # SmolVLM's processor asks for it",)

PAIRS: dict[str, Pair] = {
    pair.name: pair
    for pair in (
        Pair(
            "llava-onevision-7b-0.5b",
            "llava-onevision-7b",
            "llava-onevision-0.5b",
            switch="paper",
            why="both have SigLIP-so400m at 384 pixels, and the same tiles",
            pictures=f"{_TILES}one sample are not: two pictures cost less than one",
        ),
        Pair(
            "qwen2.5-vl-7b-3b",
            "qwen2.5-vl-7b",
            "qwen2.5-vl-3b",
            switch="paper",
            why="both have the same vision encoder, of width 1,280",
            pictures="a picture has a token for each 28 x 28 pixels: make large ones smaller first",
        ),
        Pair(
            "qwen3-vl-8b-2b",
            "qwen3-vl-8b",
            "qwen3-vl-2b",
            switch="none",
            why="the vision encoders have 27 layers of width 1,152 and 24 of width 1,024, and there is no "
            "bridge for Qwen's. With the 4B as the teacher it is on: preset qwen3-vl-4b-2b",
            pictures="a picture has a token for each 32 x 32 pixels: make large ones smaller first",
        ),
        Pair(
            "qwen3-vl-4b-2b",
            "qwen3-vl-4b",
            "qwen3-vl-2b",
            switch="paper",
            why="both have the smaller vision encoder of Qwen3-VL, of width 1,024, tapped at three layers",
            pictures="a picture has a token for each 32 x 32 pixels: make large ones smaller first",
        ),
        Pair(
            "smolvlm2-2.2b-500m",
            "smolvlm2-2.2b",
            "smolvlm2-500m",
            switch="linear",
            why=_SMOL,
            pictures=_SMOL_TILES,
            prepare=_SMOL_FIRST,
        ),
        Pair(
            "smolvlm2-2.2b-256m",
            "smolvlm2-2.2b",
            "smolvlm2-256m",
            switch="linear",
            why=_SMOL,
            pictures=_SMOL_TILES,
            prepare=_SMOL_FIRST,
        ),
        Pair(
            "internvl3-8b-1b",
            "internvl3-8b",
            "internvl3-1b",
            switch="paper",
            why="both have InternViT-300M at 448 pixels",
            pictures="up to 12 tiles and the whole, 256 tokens each, even of a small picture: fewer tiles "
            "(max_patches in both models' processor_config.json) are what saves most here",
        ),
        Pair(
            "gemma-3-12b-4b",
            "gemma-3-12b",
            "gemma-3-4b",
            switch="paper",
            why="both have SigLIP-so400m at 896 pixels, pooled to 256 tokens",
            pictures="every picture is 256 tokens, whatever its size",
            prepare=("hf auth login  # and accept Gemma's licence on the pages of both models",),
        ),
        Pair(
            "tinyllava-3b-0.5b",
            "tinyllava-3b",
            "tinyllava-0.5b",
            switch="paper",
            why="both have SigLIP-so400m at 384 pixels",
            pictures="every picture is 728 tokens, whatever its size. The paper trains on LLaVA's data: "
            "558 k captions for dpt, the mix of 665 k for the rest",
            prepare=(
                "hf download Zhang199/TinyLLaVA-Qwen2.5-3B-SigLIP --local-dir models/tinyllava-original",
                "cachekd convert models/tinyllava-original -o models/tinyllava-3b",
                "and put the student together from Qwen2.5-0.5B and SigLIP: docs/how-to/paper-pair.md",
            ),
            folders=("models/tinyllava-3b", "models/tinyllava-0.5b"),
            stages=True,
        ),
        Pair(
            "qwen2.5-vl-7b-smolvlm2-500m",
            "qwen2.5-vl-7b",
            "smolvlm2-500m",
            switch="none",
            why="two families, whose vision sides have nothing in common",
            pictures="the teacher sees a token for each 28 x 28 pixels, the student up to 16 tiles of 64 "
            "tokens and the whole; a student with less detail than its teacher is told what it cannot see",
            tokenizers="two",
            prepare=_SMOL_FIRST,
        ),
    )
}


def pair_of(name: str) -> Pair:
    """The pair of that name.

    Raises:
        CachekdError: there is none.
    """
    if name in PAIRS:
        return PAIRS[name]
    raise CachekdError(
        "there is no such preset",
        where="PAIR",
        expected=some_of(list(PAIRS), most=len(PAIRS)),
        found=name,
        fix=did_you_mean(nearest(name, PAIRS))
        or "`cachekd init --teacher A --student B FOLDER` takes any two models",
    )
