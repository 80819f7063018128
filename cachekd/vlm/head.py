"""How a model's logits follow from its final hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachekd.cache.tail.encoder import OutputHead
from cachekd.errors import CachekdError

# Share of the logits' deviation by which a head may miss them: what rounding in the dtype explains.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def output_head(
    model: PreTrainedModel,
    hidden: Tensor,
    logits: Tensor,
    vocab_size: int,
    *,
    instead: str = "use --tail none",
) -> OutputHead:
    """The head as a matrix, a scale and a cap, found on states where the logits are known.

    Configurations name scale and cap in many ways, and wrappers do not always heed them; so what the model
    really does is measured.

    Args:
        hidden: [N, d], what the head read.
        logits: [N, V], what the model made of it.
        vocab_size: rows of the head that are tokens.
        instead: what to advise where there is no such head.

    Raises:
        CachekdError: no scale and cap explain the logits.
    """
    layer = model.get_output_embeddings()
    weight = layer.weight.detach()[:vocab_size]
    bias = None if getattr(layer, "bias", None) is None else layer.bias.detach()[:vocab_size]
    target = logits[:, :vocab_size].float()
    plain = OutputHead(weight, bias).logits(hidden)
    misses = {}
    for softcap in {None, getattr(model.config.get_text_config(), "final_logit_softcapping", None)}:
        scale = scale_between(plain, target, softcap)
        scaled = weight if scale == 1 else (weight.float() * scale).to(weight.dtype)
        shifted = bias if bias is None or scale == 1 else bias.float() * scale
        head = OutputHead(scaled, shifted, softcap)
        misses[float((head.logits(hidden) - target).abs().max() / target.std())] = head
    miss = min(misses)
    if not miss <= _TOLERANCE.get(weight.dtype, 8e-2):
        raise CachekdError(
            "the teacher's logits do not follow from its final hidden state by a matrix, a scale and a cap",
            where=f"{model.config.model_type}, {type(layer).__name__}",
            expected=f"within {_TOLERANCE.get(weight.dtype, 8e-2):.1%} of their deviation",
            found=f"off by {miss:.1%}",
            fix=instead,
        )
    return misses[miss]


def vocabulary_of(model: PreTrainedModel, tokenizer: Any) -> int:
    """Tokens that the tokenizer can name; rows that pad the embedding beyond them mean nothing."""
    return min(len(tokenizer), model.get_output_embeddings().weight.shape[0])


def scale_between(plain: Tensor, target: Tensor, softcap: float | None) -> float:
    """The factor from logits `plain` to `target` before its cap, by least squares; 1 where it is nearly 1."""
    if softcap is not None:
        steep = target.abs() < 0.9 * softcap  # where the cap can be undone
        plain, target = plain[steep], (target[steep] / softcap).atanh() * softcap
    scale = float((target * plain).sum() / plain.square().sum().clamp(min=1e-12))
    return 1.0 if abs(scale - 1) < 0.01 else scale
