"""The three stages of this family's recipe, as settings: which parts train, and which terms are on.

LLaVA-KD (arXiv 2410.16236, abstract) names them: Distilled Pre-Training strengthens the alignment of vision
and language, Supervised Fine-Tuning gives the student its multimodal understanding, Distilled Fine-Tuning
refines what it knows. Which of V_S, P_S and L_S train in each is ours, and said in docs/pipelines.md.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from cachekd.errors import CachekdError

Stage = Literal["dpt", "sft", "dft"]
StudentPart = Literal["vision_encoder", "projector", "language_model"]
PARTS: tuple[StudentPart, ...] = get_args(StudentPart)  # V_S, P_S, L_S, as data flows

# L_VSD reaches V_S alone: where a stage leaves V_S frozen, its weight is 0.
STAGES: dict[Stage, dict[str, Any]] = {
    "dpt": {"trainable": ("projector",), "lambda_align": 1.0, "lambda_vsd": 0.0},
    "sft": {"trainable": ("projector", "language_model"), "lambda_align": 0.0, "lambda_vsd": 0.0},
    "dft": {"trainable": PARTS, "lambda_align": 1.0, "lambda_vsd": 1.0},
}


def with_stage(values: dict[str, Any]) -> dict[str, Any]:
    """Settings with those of their stage beneath them; a name that is no stage is left for the caller."""
    stage = values.get("stage")
    return {**STAGES[stage], **values} if stage in STAGES else values


def parts_of(value: Any) -> Any:
    """Names of parts from a list, or from a text as in "projector,language_model", or from several."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return value
    return tuple(name.strip() for text in texts for name in text.split(","))


def in_order(parts: tuple[StudentPart, ...]) -> tuple[StudentPart, ...]:
    """The parts as data flows, so that their order in a file says nothing.

    Raises:
        ValueError: none, or one twice.
    """
    if not parts or len(set(parts)) < len(parts):
        raise ValueError(f"name at least one of {', '.join(PARTS)}, each once")
    return tuple(part for part in PARTS if part in parts)


def require_vision_encoder(trainable: tuple[StudentPart, ...], lambda_vsd: float) -> None:
    """Refuse L_VSD where nothing that it reaches is trained.

    Raises:
        CachekdError: `lambda_vsd` is above 0, and V_S is frozen.
    """
    if lambda_vsd == 0 or "vision_encoder" in trainable:
        return
    raise CachekdError(
        "L_VSD would have no gradient: the switched path runs through the student's vision encoder, which is "
        "frozen here, and then through the teacher, which always is",
        where="settings 'trainable' and 'lambda_vsd'",
        expected="vision_encoder among the parts that train",
        found=f"trainable {', '.join(trainable)}; lambda_vsd {lambda_vsd:g}",
        fix=f"--trainable vision_encoder,{','.join(trainable)} to train it too, or --lambda-vsd 0",
    )
