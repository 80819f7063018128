"""Fields, defaults and limits that several models share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from cachekd.paths import PathOrName

LATER = "later"  # marks a field, in Annotated, that came after what earlier versions wrote
EXACT = 2**53  # what every JSON reader holds exactly
COUNT = 2**32 - 1  # of whole numbers in settings: numpy's largest seed, and far beyond any count
KEPT = 2**16 - 1  # logprobs of a token, whose number a shard keeps in 16 bits
StudentPart = Literal["vision_encoder", "projector", "language_model"]
PARTS: tuple[StudentPart, ...] = get_args(StudentPart)  # V_S, P_S, L_S, as data flows
TooLong = Literal["error", "skip", "cut"]  # what becomes of a sample that is too long

# `--tail`, each by its name, as it is written; what it does: `TAILS` in `cachekd.cache.tail.setting`.
TAIL_FORMS = {
    "none": "none",
    "exact": "exact",
    "bytes": "bytes=64 (per answer token)",
    "step": "step=0.1 (nats)",
}
DEFAULT_TAIL = "bytes=64"
CALIBRATION_TOKENS = 16_384
SAVE_STEPS = 500
STORE_TIMEOUT = 60.0  # seconds without a byte
ENTROPY_TOKENS = 1_024  # whose distributions are rebuilt: with 152 k ids, some 7 ms each on one core
ALTERNATIVES = 5  # to an answer token
PAGE_ALTERNATIVES = 10  # on a page, where they are folded
PAGE_SAMPLES = 100


def split_tail(text: str) -> tuple[str, float]:
    """The name and the number of a tail, as in "bytes=64"; 0 where the name takes none.

    Raises:
        ValueError: it is no tail of `TAIL_FORMS`, or its number is none above 0.
    """
    name, equals, number = text.partition("=")
    form = TAIL_FORMS.get(name)
    if form is not None and bool(equals) == ("=" in form):
        if not equals:
            return name, 0.0
        if re.fullmatch(r"\d+(?:\.\d*)?|\.\d+", number) and float(number) > 0:
            return name, float(number)
    raise ValueError(f"unknown tail {text!r}, expected {', '.join(TAIL_FORMS.values())}")


def _is_a_tail(text: str) -> str:
    split_tail(text)
    return text


def _split_parts(value: Any) -> Any:
    """Split names of parts, as in "projector,language_model"; a list may hold such texts too."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return value
    return tuple(name.strip() for text in texts for name in text.split(","))


def _each_once(value: tuple[StudentPart, ...]) -> tuple[StudentPart, ...]:
    """The parts as data flows, so that their order in a file says nothing."""
    if not value or len(set(value)) < len(value):
        raise ValueError(f"name at least one of {', '.join(PARTS)}, each once")
    return tuple(part for part in PARTS if part in value)


def from_text(value: Any) -> Any:
    """A mapping that is written as a text, as on the command line; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    return found if isinstance(found, dict) else value


def _preset_or_mapping(value: Any) -> Any:
    """A mapping may be a text, as on the command line."""
    found = from_text(value)
    if value is None or value in QUANTIZATIONS or isinstance(found, dict):
        return found
    presets = ", ".join(map(repr, QUANTIZATIONS))
    raise ValueError(f"expected {presets} or a mapping, such as {{load_in_4bit: true}}")


def require_room_for_each(batch_size: int | None, info: ValidationInfo) -> int | None:
    """Refuse a batch of more samples than it may have tokens: one of the two would mean nothing."""
    tokens = info.data.get("batch_tokens")
    if batch_size is not None and tokens is not None and batch_size > tokens:
        raise ValueError(f"more than batch_tokens, {tokens:,}, and no sample is empty: leave one of them out")
    return batch_size


Dtype = Literal["auto", "float32", "bfloat16", "float16"]
History = Literal["none", "full"]
Order = Literal["first", "surprising"]  # of samples to look at
Parts = Annotated[tuple[StudentPart, ...], BeforeValidator(_split_parts), AfterValidator(_each_once)]
Tail = Annotated[str, AfterValidator(_is_a_tail)]
Preset = Literal["4bit", "8bit"]
QUANTIZATIONS: tuple[Preset, ...] = get_args(Preset)
# What each preset stands for, and what a mapping may say: `cachekd.models.quantization`.
Quantization = Annotated[Preset | dict[str, Any] | None, BeforeValidator(_preset_or_mapping)]
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
        description="beyond the paper: put a trained linear map between the student's vision encoder and the "
        "teacher's projector if their widths or grids differ; patches are resampled"
    ),
]
Attention = Annotated[
    str | None,
    LATER,
    Field(
        description="the kernels of attention, by their name in transformers: sdpa, eager, "
        "flash_attention_2, ...; by default sdpa if the model can"
    ),
]
Workers = Annotated[int, Field(ge=0, description="processes that read and encode samples; 0: a thread")]
