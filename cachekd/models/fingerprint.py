"""Fingerprints: what a cache depends on, as sha256 over canonical JSON.

A cache is stale as soon as one of these changes, so each covers what changes the numbers and nothing else
(not the folder a tokenizer was loaded from, not its padding side).

The parts can be unchanged and give other token ids all the same: the caller decides whether the tokenizer
adds a BOS token that the template leaves out. So a fixed text is encoded as well.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

from PIL import Image
from torch import Tensor

from cachekd.cache.manifest import Fingerprints
from cachekd.data.encode import SampleEncoder
from cachekd.data.images import READING
from cachekd.data.processor import Processor
from cachekd.data.render import Messages
from cachekd.data.sample import Sample
from cachekd.data.supervision import is_paligemma
from cachekd.errors import CachekdError

# Never to be changed: caches hold a fingerprint of what became of it.
CONVERSATION: Messages = tuple(
    {"role": role, "content": [{"type": "text", "text": text}]}
    for role, text in (
        ("user", "What is the color of the shape? Answer in one word."),
        ("assistant", "Red"),
        ("user", "How many are there,\nand is one of them (say) 3.5 times as large?"),
        ("assistant", "There are 12; no, it is not."),
    )
)
_VERSIONS = ("cachekd", "torch", "transformers", "tokenizers", "pillow", "zarr", "numcodecs")
# Of a family's own processor, not of its image processor: how many tokens an image has in the text.
_IMAGE_TOKENS = (
    "image_seq_length",  # InternVL, Gemma 3
    "image_seq_len",  # Idefics3, SmolVLM
    "num_image_tokens",  # LLaVA-OneVision
    "vision_aspect_ratio",
    "spatial_merge_size",  # Mistral 3
)
# Where a model was loaded from, by what, and how it computes: no part of what it is.
_NOT_THE_MODEL = {"_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype"}


def encode_conversation(encoder: SampleEncoder) -> tuple[Tensor, Tensor] | None:
    """Encode the conversation without images; of one that needs them, the first question with a black one.

    Returns:
        [L] int64 token ids and [L] bool what is supervised, image placeholders left out; None where the
        chat template or the processor refuses the conversation.
    """
    encoder = encoder.without_limits()  # which are no part of how text becomes tokens
    if is_paligemma(encoder.processor):
        sample = Sample("probe", (Image.new("RGB", (8, 8)),), tuple(CONVERSATION[:2]), "a probe text")
    else:
        sample = Sample("probe", (), tuple(CONVERSATION), "a probe text")
    try:
        encoded = encoder(sample)
    except CachekdError:
        return None
    ids = encoded.inputs["input_ids"]
    if not sample.images:
        return ids, encoded.supervised
    is_text = ids != encoder.image_token_id
    return ids[is_text], encoded.supervised[is_text]


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Vocabulary, merges, splitting rules and added tokens; padding and truncation state left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer, written in Python
        return _sha256([type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map])
    state = json.loads(backend.to_str())
    state["padding"] = state["truncation"] = None
    return _sha256(state)


def template_fingerprint(template: str) -> str:
    """Hash the chat template's text."""
    return _sha256(template)


def encoding_fingerprint(encoder: SampleEncoder) -> str | None:
    """The token ids of a fixed conversation, and which are supervised; None where it cannot be encoded.

    The parts' own fingerprints do not say how they are put together, such as who writes BOS.
    """
    found = encode_conversation(encoder)
    return None if found is None else _sha256([values.tolist() for values in found])


def image_processor_fingerprint(processor: Processor) -> str:
    """The image processor's settings and real class, and how many tokens the processor makes of an image.

    A language model's is that of nothing.
    """
    images = processor.image_processor
    if images is None:
        return _sha256(None)
    settings = {key: value for key, value in images.to_dict().items() if not key.startswith("_")}
    grid = {name: getattr(processor, name, None) for name in ("patch_size", "num_additional_image_tokens")}
    strategy = getattr(processor, "vision_feature_select_strategy", None)
    counts = {name: getattr(processor, name, None) for name in _IMAGE_TOKENS if name not in settings}
    has = {name: value for name, value in counts.items() if value is not None}
    return _sha256([type(images).__name__, settings, grid, strategy, *([has] if has else [])])


def image_reading(processor: Processor) -> int | None:
    """The version of how images become the pixels that an image processor is given; None of a language model.

    It is no reason to refuse a whole cache: most images are the same in every version, and those that are not
    have another content hash.
    """
    return None if processor.image_processor is None else READING


def reads_images_otherwise(stored: Fingerprints) -> bool:
    """Whether a cache may be of images that were read in another way than today's."""
    return stored.image_token != "" and stored.image_reading != READING


def reads_otherwise(theirs: Fingerprints, ours: Fingerprints) -> bool:
    """Whether the same text may become other tokens: tokenizer, chat template or encoding differ. An encoding
    that is not known, as of a model that takes no text alone, is no difference."""
    known = None not in (theirs.encoding, ours.encoding)
    names = ("tokenizer", "chat_template", *(["encoding"] if known else []))
    return any(getattr(theirs, name) != getattr(ours, name) for name in names)


def config_fingerprint(config: Any) -> str:
    """The model's configuration; its dtype is apart."""

    def stripped(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: stripped(part) for name, part in value.items() if name not in _NOT_THE_MODEL}

    return _sha256(stripped(config.to_dict()))


def library_versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    return {name: version(name) for name in _VERSIONS}
