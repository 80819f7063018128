"""The V | P | L split of vision-language models, and the switch."""

from cachekd.vlm.bridge import BridgePlan, SwitchBridge, plan_bridge
from cachekd.vlm.compat import check_switch, check_tokenizers, tokenizer_difference
from cachekd.vlm.deferred import DeferredHead
from cachekd.vlm.families import family_of, language_model, projectors_in_tower, vision_tower
from cachekd.vlm.generation import generation_stops, save_processor
from cachekd.vlm.head import output_head, vocabulary_of
from cachekd.vlm.limits import limits_of
from cachekd.vlm.live import LiveTeacher
from cachekd.vlm.load import default_device, default_dtype, dtype_of, empty_model, load_config, load_model
from cachekd.vlm.model_files import ModelFiles
from cachekd.vlm.parts import check_adapters, modules_outside, parameters_by_part, reach_by_text, train_only
from cachekd.vlm.processors import load_processor
from cachekd.vlm.proof import prove_split
from cachekd.vlm.split import capture_vision, decode, encode, hidden_and_logits_at, logits_at, project
from cachekd.vlm.switch import SwitchedTeacher
from cachekd.vlm.weights import model_content, weights_files

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
    "family_of",
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
    "projectors_in_tower",
    "prove_split",
    "reach_by_text",
    "save_processor",
    "tokenizer_difference",
    "train_only",
    "vision_tower",
    "vocabulary_of",
    "weights_files",
]
