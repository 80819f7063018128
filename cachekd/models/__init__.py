"""The V | P | L split of vision-language models, and the switch."""

from cachekd.models.bridge import BridgePlan, SwitchBridge, plan_bridge
from cachekd.models.compat import check_switch, check_tokenizers, limits_of, tokenizer_difference
from cachekd.models.device import default_device, default_dtype, dtype_of
from cachekd.models.families import language_model
from cachekd.models.head import DeferredHead, output_head, vocabulary_of
from cachekd.models.loading import empty_model, load_config, load_model
from cachekd.models.model_files import ModelFiles
from cachekd.models.parts import (
    check_adapters,
    modules_outside,
    parameters_by_part,
    reach_by_text,
    train_only,
)
from cachekd.models.processors import generation_stops, load_processor, save_processor
from cachekd.models.split import (
    capture_vision,
    decode,
    encode,
    hidden_and_logits_at,
    logits_at,
    project,
    prove_split,
)
from cachekd.models.switch import LiveTeacher, SwitchedTeacher
from cachekd.models.weights import model_content

__all__ = [
    "BridgePlan",
    "DeferredHead",
    "LiveTeacher",
    "ModelFiles",
    "SwitchBridge",
    "SwitchedTeacher",
    "capture_vision",
    "check_adapters",
    "check_switch",
    "check_tokenizers",
    "decode",
    "default_device",
    "default_dtype",
    "dtype_of",
    "empty_model",
    "encode",
    "generation_stops",
    "hidden_and_logits_at",
    "language_model",
    "limits_of",
    "load_config",
    "load_model",
    "load_processor",
    "logits_at",
    "model_content",
    "modules_outside",
    "output_head",
    "parameters_by_part",
    "plan_bridge",
    "project",
    "prove_split",
    "reach_by_text",
    "save_processor",
    "tokenizer_difference",
    "train_only",
    "vocabulary_of",
]
