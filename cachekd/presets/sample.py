"""A sample that is made up: a grey picture and so many tokens of text, as a model would read them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from cachekd.check.fake import Live, fill
from cachekd.data import Encoded
from cachekd.models import empty_model
from cachekd.models.split import image_inputs


@dataclass(frozen=True)
class Assumed:
    """What a sample is taken to be.

    Attributes:
        width, height: of its one picture, in pixels.
        text: tokens beside the picture's, answers among them.
        answers: of these, the answer tokens: what a cache keeps.
        samples: how many there are.
    """

    width: int = 640
    height: int = 480
    text: int = 250
    answers: int = 100
    samples: int = 100_000


@dataclass(frozen=True)
class Read:
    """A sample as one model reads it.

    Attributes:
        encoded: its inputs; token ids are zeros, and the answers come last.
        image_tokens: places of the picture in the text.
        patches: that the vision encoder looks at, tiles and all.
    """

    encoded: Encoded
    image_tokens: int
    patches: int


def read_by(config: Any, image_processor: Any | None, assumed: Assumed) -> Read:
    """Have a model's image processor read a grey picture, and count the tokens that the model makes of it.

    The model has no weights: its own code runs on tensors without memory.

    Args:
        config: the model's.
        image_processor: transformers'; None for a language model.
    """
    inputs: dict[str, Any] = {}
    tokens = patches = 0
    if image_processor is not None:
        picture = Image.new("RGB", (assumed.width, assumed.height), "grey")
        inputs = dict(image_processor([picture], return_tensors="pt"))
        tokens, patches = _image_tokens(config, inputs), _patches(config, inputs)
    length = tokens + assumed.text
    supervised = torch.zeros(length, dtype=torch.bool)
    supervised[length - assumed.answers :] = True
    inputs["input_ids"] = torch.zeros(length, dtype=torch.long)
    encoded = Encoded("made up", bytes(16), inputs, supervised, images=int(tokens > 0))
    return Read(encoded, tokens, patches)


def _image_tokens(config: Any, inputs: dict[str, Any]) -> int:
    """Rows of the model's own image features."""
    model = empty_model(config)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        fill(model)
        made = {n: fake.from_tensor(x) if x.is_floating_point() else x for n, x in inputs.items()}
        with Live(model), torch.no_grad():
            found = model.get_image_features(**image_inputs(model, made), return_dict=True).pooler_output
    parts = found if isinstance(found, list | tuple) else [found]
    return sum(prod(part.shape[:-1]) for part in parts)


def _patches(config: Any, inputs: dict[str, Any]) -> int:
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:  # a row for each patch
        return len(pixels)
    size = getattr(config.vision_config, "patch_size", None) or 1
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    *pictures, _, height, width = pixels.shape
    return prod(pictures) * (height // high) * (width // wide)
