"""The output head: found, proven, and applied to hidden states."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cachekd.cache.tail.encoder import OutputHead
from cachekd.cache.tail.sketch import capped
from cachekd.errors import CachekdError
from cachekd.models.placement import is_placed, output_device
from cachekd.models.split import hidden_and_logits_at, in_eval_mode, rounding_tolerance

log = logging.getLogger(__name__)

# Share of the logits' deviation by which a head may miss them: what rounding in the dtype explains.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
# What the language model needs when no image is there.
_TOKENS = ("input_ids", "attention_mask", "token_type_ids")


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
    weight = _matrix(layer, hidden)[:vocab_size]
    bias = None if getattr(layer, "bias", None) is None else layer.bias.detach()[:vocab_size]
    target = logits[:, :vocab_size].float()

    def head(scale: float, softcap: float | None) -> OutputHead:
        scaled = weight if scale == 1 else (weight.float() * scale).to(weight.dtype)
        return OutputHead(scaled, bias if bias is None or scale == 1 else bias.float() * scale, softcap)

    miss, scale, softcap = _measured(model, target, lambda *found: head(*found).logits(hidden))
    if not miss <= _TOLERANCE.get(weight.dtype, 8e-2):
        raise CachekdError(
            "the teacher's logits do not follow from its final hidden state by a matrix, a scale and a cap",
            where=f"{model.config.model_type}, {type(layer).__name__}",
            expected=f"within {_TOLERANCE.get(weight.dtype, 8e-2):.1%} of their deviation",
            found=f"off by {miss:.1%}",
            fix=instead,
        )
    return head(scale, softcap)


class DeferredHead:
    """What makes logits of a model's final hidden states, apart from the model's forward.

    Wrappers scale and cap logits in their own ways, so what this one does is measured once and compared with
    the wrapper's own logits. Where they differ, the wrapper's logits themselves are the states: nothing is
    wrong then, only the logits of a whole batch exist at once.

    Attributes:
        vocab_size: V, the columns that `logits` gives.
        reason: why the head is not put off; None if it is.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], positions: Tensor) -> None:
        """Measure the head.

        Args:
            model: the wrapper; under LoRA the model inside.
            inputs: any batch; only its tokens are looked at, and only those of one sample.
            positions: [B, S] bool, some places in it.
        """
        self.module: nn.Module = model.get_output_embeddings()
        self._device = output_device(model) if is_placed(model) else None
        self.reason: str | None = None
        with in_eval_mode(model), torch.no_grad():
            row = positions.any(-1).int().argmax()[None]
            tokens = {name: inputs[name][row] for name in _TOKENS if name in inputs}
            hidden, logits = hidden_and_logits_at(model, tokens, positions[row])
            self._measure(model, hidden, logits)
        self.vocab_size = logits.shape[-1]

    def _measure(self, model: PreTrainedModel, hidden: Tensor, logits: Tensor) -> None:
        target = logits.float()
        miss, self.scale, self.softcap = _measured(model, target, lambda *by: self._applied(hidden, *by))
        if not miss <= rounding_tolerance(logits.dtype):
            self.reason = f"its logits do not follow from its final hidden states (off by {miss:.1%})"
            log.warning(
                "%s: %s; the logits of a whole batch will be held at once",
                model.config.name_or_path or type(model).__name__,
                self.reason,
            )

    @contextmanager
    def put_off(self) -> Iterator[list[Tensor]]:
        """Within, the model's own forward keeps what its head would read and runs the head on no rows.

        The forward stays the wrapper's, and the (empty) logits still hang on the head's weights, so what
        wraps the model (DDP) sees every parameter used.
        """
        states: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states.append(args[0].flatten(0, -2))
            return (args[0][..., :0, :], *args[1:])

        handle = self.module.register_forward_pre_hook(keep)
        try:
            yield states
        finally:
            handle.remove()

    def states(self, forward: Callable[[], Any]) -> Tensor:
        """What `logits` takes, [N, d], from a forward of the model that returns its [N, V] logits."""
        if self.reason is not None:
            return forward()
        with self.put_off() as states:
            forward()
        return states[-1]

    def logits(self, states: Tensor) -> Tensor:
        """[n, V], the wrapper's logits, from n rows of `states` and on their device."""
        if self.reason is not None:
            return states
        return self._applied(states, self.scale, self.softcap).to(states.device)

    def _applied(self, states: Tensor, scale: float, softcap: float | None) -> Tensor:
        logits = self.module(states if self._device is None else states.to(self._device))
        return capped(logits if scale == 1 else logits * scale, softcap)


def vocabulary_of(model: PreTrainedModel, tokenizer: Any) -> int:
    """Tokens that the tokenizer can name; rows that pad the embedding beyond them mean nothing."""
    head = model.get_output_embeddings()
    # A quantised head's weights may be packed, with another number of rows.
    rows = head.out_features if isinstance(head, nn.Linear) else head.weight.shape[0]
    return min(len(tokenizer), rows)


def _matrix(head: Any, hidden: Tensor) -> Tensor:
    """A head's weights, [V, d]; of one whose weights are packed, by what it makes of unit vectors.

    Args:
        hidden: [N, d], what the head read.
    """
    weight = head.weight.detach()
    if weight.shape[-1] == hidden.shape[-1] and weight.is_floating_point():
        return weight
    rows = head(torch.eye(hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)).detach()
    return (rows if head.bias is None else rows - head.bias.detach()).T.contiguous()


def _measured(
    model: PreTrainedModel, target: Tensor, logits: Callable[[float, float | None], Tensor]
) -> tuple[float, float, float | None]:
    """Find the scale and the cap by which a head's logits are those of the model.

    Args:
        target: the model's, float32.
        logits: the head's, for a scale and a cap.

    Returns:
        by what share of their deviation the nearest ones miss; their scale, and their cap.
    """
    plain, found = logits(1.0, None).float(), []
    for softcap in {None, getattr(model.config.get_text_config(), "final_logit_softcapping", None)}:
        scale = scale_between(plain, target, softcap)
        miss = float((logits(scale, softcap).float() - target).abs().max() / target.std())
        found.append((miss, scale, softcap))
    return min(found, key=lambda one: one[0])


def scale_between(plain: Tensor, target: Tensor, softcap: float | None) -> float:
    """The factor from logits `plain` to `target` before its cap, by least squares; 1 where it is nearly 1."""
    if softcap is not None:
        steep = target.abs() < 0.9 * softcap  # where the cap can be undone
        plain, target = plain[steep], (target[steep] / softcap).atanh() * softcap
    scale = float((target * plain).sum() / plain.square().sum().clamp(min=1e-12))
    return 1.0 if abs(scale - 1) < 0.01 else scale
