"""Is a split one? Asked of every student before its first switched step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachekd.errors import CachekdError
from cachekd.vlm.families import FAMILIES
from cachekd.vlm.split import capture_vision, decode, logits_at, project, rounding
from cachekd.vlm.steady import in_eval_mode


@torch.no_grad()
def prove_split(model: PreTrainedModel, inputs: Mapping[str, Tensor], positions: Tensor) -> float:
    """Take a model apart on one batch and compare with its whole forward.

    Args:
        model: a VLM with its vision encoder; under LoRA the model inside.
        inputs: a batch with images.
        positions: [B, S] bool, where logits are compared.

    Returns:
        by how much they differ at most, as a share of the logits' deviation; mostly 0.

    Raises:
        CachekdError: V, P and L, one after the other, do not give the model's own logits.
    """
    try:
        with in_eval_mode(model):
            with capture_vision(model) as vision:
                whole = logits_at(model, inputs, positions)
            if vision.output is None:
                raise _refusal(model, "its vision encoder does not run in its forward")
            split = decode(model, project(model, vision.output, inputs), inputs, positions)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise _refusal(model, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    miss = float((split - whole).abs().max() / whole.float().std())
    if not miss <= rounding(whole.dtype):
        raise _refusal(model, f"logits off by {miss:.1%} of their deviation")
    return miss


def _refusal(model: PreTrainedModel, found: str) -> CachekdError:
    return CachekdError(
        "the model cannot be split into vision encoder, projector and language model",
        where=f"{model.config.name_or_path or type(model).__name__}, model_type {model.config.model_type}",
        expected=f"the logits of its whole forward; supported families: {', '.join(FAMILIES)}",
        found=found,
        fix="train without the switched path: --lambda-vsd 0",
    )
