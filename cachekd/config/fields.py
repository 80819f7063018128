"""Fields, defaults and limits that several models share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cachekd.paths import PathOrName

EXACT = 2**53  # what every JSON reader holds exactly
COUNT = 2**32 - 1  # of whole numbers in settings: numpy's largest seed, and far beyond any count
KEPT = 2**16 - 1  # logprobs of a token, whose number a shard keeps in 16 bits
TooLong = Literal["error", "skip", "cut"]  # what becomes of a sample that is too long

DEFAULT_TAIL = "bytes=64"
CALIBRATION_TOKENS = 16_384
SAVE_STEPS = 500
STORE_TIMEOUT = 60.0  # seconds without a byte
ENTROPY_TOKENS = 1_024  # whose distributions are rebuilt: with 152 k ids, some 7 ms each on one core
ALTERNATIVES = 5  # to an answer token
PAGE_ALTERNATIVES = 10  # on a page, where they are folded
PAGE_SAMPLES = 100


Dtype = Literal["auto", "float32", "bfloat16", "float16"]
History = Literal["none", "full"]
Order = Literal["first", "surprising"]  # of samples to look at
# Settings that several stages have, each said once.
ModelName = Annotated[PathOrName, Field(description="model folder or hub name")]
CacheName = Annotated[
    PathOrName | None,
    Field(
        description="what `cachekd dump` wrote, or the address of a published cache, such as "
        "hf://datasets/org/name"
    ),
]
SwitchBridge = Annotated[
    Literal["linear"] | None,
    Field(
        description="beyond the paper: a trained linear map, with resampled patches, from the student's "
        "vision encoder to the teacher's projector where their widths or grids differ"
    ),
]
Workers = Annotated[int, Field(ge=0, description="processes that read and encode samples; 0: a thread")]
