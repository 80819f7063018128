"""A model's files, each opened once."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel

from cachekd.cache import Fingerprints
from cachekd.cache.quantization import QuantizationInfo
from cachekd.data import Limits, SampleEncoder
from cachekd.data.limits import NO_LIMITS
from cachekd.data.processor import Processor
from cachekd.models.attention import require_attention
from cachekd.models.device_map import AUTO, by_file
from cachekd.models.families import TEXT_ONLY, family_of
from cachekd.models.fingerprint import (
    config_fingerprint,
    encoding_fingerprint,
    image_processor_fingerprint,
    image_reading,
    reads_otherwise,
    template_fingerprint,
    tokenizer_fingerprint,
)
from cachekd.models.loading import LoadSettings, auto_class, empty_model, load_config, load_model
from cachekd.models.processors import processor_of
from cachekd.models.quantization import Setting, describe, in_checkpoint, require_plain
from cachekd.models.weights import hash_files, model_content, weights_files
from cachekd.vocabulary import TokenBytes


class ModelFiles:
    """A model before its weights are in memory: what is read of its folder, each part when it is first asked
    for, and once. Whoever needs a model's files is given this, not its path.

    Args:
        path: a folder, a GGUF file, or a name on the hub.
        limits: what the models that are to read the same samples allow of one.
    """

    def __init__(self, path: str | Path, limits: Limits = NO_LIMITS) -> None:
        self.path, self.limits = str(path), limits

    def within(self, limits: Limits) -> ModelFiles:
        """Read samples within other limits, by the same model and what is opened of it."""
        processor = self.processor  # opened here, and so once for both
        other = copy.copy(self)
        other.limits, other.processor = limits, processor
        vars(other).pop("encoder", None)
        return other

    @cached_property
    def config(self) -> Any:
        """The configuration, as `load_config` reads it.

        Raises:
            CachekdError: there is no such model, or its family is not supported.
        """
        return load_config(self.path)

    @cached_property
    def processor(self) -> Processor:
        """Tokenizer, image processor and chat template, as `load_processor` reads them.

        Raises:
            CachekdError: there is none, or it has no tokenizer.
        """
        return processor_of(self.path, self.config)

    @cached_property
    def encoder(self) -> SampleEncoder:
        """What turns samples into the model's inputs, within the limits.

        Raises:
            CachekdError: the processor has no usable chat template or tokenizer.
        """
        return SampleEncoder(self.processor, self.limits)

    @property
    def image_token_id(self) -> int | None:
        """The placeholder's; None for a language model."""
        return None if family_of(self.config) is TEXT_ONLY else int(self.config.image_token_id)

    @cached_property
    def weights(self) -> str:
        """Which weights these are: sha256 over a local folder's, or hub:commit.

        Raises:
            CachekdError: a local folder has none.
        """
        files = weights_files(self.path)
        return hash_files(files) if files else self._commit

    @cached_property
    def content(self) -> str:
        """Which model this is: sha256 over all files that are read of a local folder, or hub:commit."""
        return model_content(self.path) or self._commit

    @property
    def _commit(self) -> str:
        return f"hub:{getattr(self.config, '_commit_hash', None)}"

    @cached_property
    def config_sha256(self) -> str:
        """See `config_fingerprint`."""
        return config_fingerprint(self.config)

    @cached_property
    def image_processing(self) -> str:
        """See `image_processor_fingerprint`."""
        return image_processor_fingerprint(self.processor)

    @cached_property
    def fingerprints(self) -> Fingerprints:
        """The fingerprints of what turns samples into the model's inputs."""
        return Fingerprints(
            tokenizer=tokenizer_fingerprint(self.processor.tokenizer),
            chat_template=template_fingerprint(self.encoder.template),
            image_processor=self.image_processing,
            image_token=self.processor.image_token or "",
            encoding=encoding_fingerprint(self.encoder),
            image_reading=image_reading(self.processor),
        )

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """What each token id stands for.

        Raises:
            CachekdError: the tokenizer does not say it.
        """
        return TokenBytes.of(self.processor.tokenizer, self.encoder.end_of_turn)

    def reads_otherwise(self, student: ModelFiles) -> bool:
        """Whether a text may have other tokens for the student; see `cachekd.models.fingerprint`."""
        return reads_otherwise(self.fingerprints, student.fingerprints)

    def require_attention(self, implementation: str | None) -> None:
        """See `cachekd.models.attention.require_attention`."""
        require_attention(auto_class(self.config), self.config, implementation)

    def require_device_map(self, device_map: str | None) -> None:
        """Refuse a file that does not say where each of the model's modules lies. No weights are read.

        Raises:
            CachekdError: as `cachekd.models.device_map.placed` has it.
        """
        if device_map not in (None, AUTO):
            by_file(empty_model(self.config), Path(device_map))

    def quantization(self, setting: Setting | None, dtype: torch.dtype) -> QuantizationInfo | None:
        """How the weights are quantised once they are loaded so; None: they are not. None is read for it.

        Raises:
            CachekdError: no such quantisation, its package is not installed, or the checkpoint is quantised
                already.
        """
        require_plain(self.config, setting)
        if setting is None and in_checkpoint(self.config) is None:
            return None
        return describe(setting, self.config, empty_model(self.config), dtype)

    def load(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        tower: bool = True,
        **settings: Unpack[LoadSettings],
    ) -> PreTrainedModel:
        """See `load_model`."""
        return load_model(self.path, dtype=dtype, device=device, tower=tower, config=self.config, **settings)
