"""Processors of models: loaded, of text alone, saved beside a student.

Without torchvision, or from a folder that was saved without it, a processor is loaded without its video part,
which no image needs.
"""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, BatchEncoding, GenerationConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import GENERATION_CONFIG_NAME, is_torchvision_available

from cachekd.atomic import commit
from cachekd.data import SampleEncoder
from cachekd.data.processor import Processor
from cachekd.errors import CachekdError, first_line
from cachekd.models.families import TEXT_ONLY, family_of
from cachekd.models.loading import load_config
from cachekd.models.weights import is_gguf, source, template_beside

log = logging.getLogger(__name__)


class TextProcessor:
    """Tokenises what a chat template wrote; there are no images.

    Args:
        tokenizer: transformers'.

    Attributes:
        image_token: None: no text stands for an image.
        image_processor: None.
    """

    image_token: str | None = None
    image_processor: Any = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def chat_template(self) -> Any:
        """The tokenizer's."""
        return self.tokenizer.chat_template

    def __call__(
        self,
        *,
        text: list[str],
        images: Any = None,
        return_text_replacement_offsets: bool = False,
        add_special_tokens: bool = False,
        **options: Any,
    ) -> BatchEncoding:
        """Tokenise as `apply_chat_template(tokenize=True)` does: special tokens are the template's."""
        return self.tokenizer(text, add_special_tokens=add_special_tokens, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


def load_processor(path: str) -> Processor:
    """A VLM's processor: image processor, tokenizer and chat template. A language model's tokenizer.

    Raises:
        CachekdError: there is none at `path`, or it has no tokenizer.
    """
    return processor_of(path, load_config(path))


def processor_of(path: str, config: Any) -> Processor:
    """Do as `load_processor` does, where the config was read before."""
    if family_of(config) is TEXT_ONLY:
        return TextProcessor(_load_tokenizer(path))
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        processor = load_without_video(path, type(config))
        if processor is None:
            raise CachekdError(
                "no processor can be loaded",
                where=str(path),
                expected="processor_config.json and tokenizer files beside the model",
                found=first_line(error),
            ) from None
    if not hasattr(processor, "tokenizer"):
        raise CachekdError(
            "the processor has no tokenizer and image processor",
            where=str(path),
            found=type(processor).__name__,
            fix="save the model's AutoProcessor into its folder",
        )
    return processor


def _load_tokenizer(path: str) -> Any:
    folder, options = source(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError) as error:
        raise CachekdError(
            "no tokenizer can be loaded",
            where=str(path),
            expected="tokenizer.json beside the model",
            found=first_line(error),
        ) from None
    template = template_beside(path)
    if template is not None and not tokenizer.chat_template:  # transformers looks into the GGUF file alone
        tokenizer.chat_template = template.read_text()
    return tokenizer


def load_without_video(path: str, config_class: type) -> Any | None:
    """A model's processor for images and text, where only the part for videos cannot be loaded: torchvision
    is missing, or was where the model was saved.

    Returns:
        None where that is not what is missing.
    """
    processor_class = PROCESSOR_MAPPING.get(config_class, None)
    if processor_class is None or "video_processor" not in processor_class.get_attributes():
        return None
    try:
        processor = without_video(processor_class).from_pretrained(path)
    except (OSError, ValueError, ImportError):
        return None
    _say_once(path)
    return processor


@cache
def _say_once(path: str) -> None:
    why = "its folder lacks" if is_torchvision_available() else "needs torchvision"
    log.warning("%s: its processor is loaded without its video part, which %s", path, why)


@cache
def without_video(processor_class: Any) -> Any:
    """A processor's class that neither takes, loads nor saves a video processor; its name stays.

    Images and text are processed by the class's own code.
    """

    class ImagesOnly(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor_class.get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: list[Any], *others: Any, **kwargs: Any) -> Any:
            # The classes take image processor, tokenizer, video processor; SmolVLM's has no default.
            return super().from_args_and_dict([*args, None], *others, **kwargs)

        def __reduce__(self) -> Any:  # for worker processes: pickle would look for the class by its name
            return _empty, (processor_class,), self.__dict__

    ImagesOnly.__name__, ImagesOnly.__module__ = processor_class.__name__, processor_class.__module__
    return ImagesOnly


def _empty(processor_class: Any) -> Any:
    images_only = without_video(processor_class)
    return images_only.__new__(images_only)


def generation_stops(path: str, config: Any) -> list[int]:
    """The tokens at which a model's `generate` stops, by its generation_config.json or else its config.

    Args:
        path: folder or hub name.
        config: of `load_config`.
    """
    try:
        found = GenerationConfig.from_model_config(config) if is_gguf(path) else None
        found = found or GenerationConfig.from_pretrained(path)
    except OSError:
        found = GenerationConfig.from_model_config(config)
    return _as_list(found.eos_token_id)


def save_processor(encoder: SampleEncoder, folder: Path) -> None:
    """Write the processor beside a saved student, and let the student's generation stop where its chat
    template ends a turn, beside where it stopped before.

    Args:
        encoder: that the student was trained with.
        folder: with a model, or with adapters alone.
    """
    encoder.processor.save_pretrained(folder)
    file, token = folder / GENERATION_CONFIG_NAME, encoder.end_of_turn
    if token is None or not file.exists():
        return
    settings = json.loads(file.read_text())
    stops = _as_list(settings.get("eos_token_id"))
    if token not in stops:
        settings["eos_token_id"] = [*stops, token] if stops else token
        commit(file, json.dumps(settings, indent=2).encode() + b"\n")


def _as_list(token_ids: int | list[int] | None) -> list[int]:
    if token_ids is None:
        return []
    return [token_ids] if isinstance(token_ids, int) else list(token_ids)
