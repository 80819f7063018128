"""The kernels that attention runs by, as transformers names them."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from cachekd.errors import CachekdError, first_line


def require_attention(model_class: Any, config: Any, implementation: str | None) -> None:
    """Refuse what `attn_implementation` cannot be of a model; no weights are read.

    Args:
        model_class: an auto class of transformers.
        implementation: by its name; None: transformers' choice.

    Raises:
        CachekdError: there is no such implementation, its package is not installed, or the model has none;
            or it would ignore a part of the model's mask.
    """
    if implementation is None:
        return
    where = str(config.name_or_path)
    if implementation.startswith("paged|"):
        raise CachekdError(
            "a paged attention reads the cache of a server, and there is no server here",
            where=where,
            found=implementation,
            fix=f"name it without paged|: {implementation.removeprefix('paged|')}",
        )
    try:
        with torch.device("meta"):
            model = model_class.from_config(copy.deepcopy(config), attn_implementation=implementation)
    except (ValueError, ImportError, AttributeError, OSError) as error:
        raise CachekdError(
            "the model's attention cannot run in this way",
            where=where,
            expected="sdpa, eager, or another name of transformers' whose package is installed",
            found=f"{implementation}: {first_line(error)}",
            fix="leave it out: transformers then takes sdpa where the model can",
        ) from None
    if "flash" in implementation and _sees_images_both_ways(model):
        raise CachekdError(
            "flash attention has only the causal mask: a token of a picture would not see the later ones "
            f"of its picture, as it must in {config.model_type}",
            where=where,
            expected="sdpa or eager",
            found=implementation,
        )


def _sees_images_both_ways(model: PreTrainedModel) -> bool:
    """Whether the family's mask follows from token types: PaliGemma's prefix, Gemma 3's pictures."""
    return "token_type_ids" in inspect.signature(model.forward).parameters
