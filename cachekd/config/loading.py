"""How a model's weights come into memory, besides their dtype: the same in every command that loads one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter, ValidationError

from cachekd.config.base import Config
from cachekd.config.fields import LATER, Attention, Quantization
from cachekd.paths import PathOrName

_BYTES = TypeAdapter(ByteSize)


def memory_by_device(text: str) -> dict[str, int]:
    """Bytes by device, of "0=20GB,cpu=60GB".

    Raises:
        ValueError: it is no such text.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        device, equals, size = (piece.strip() for piece in part.partition("="))
        try:
            found[device] = int(_BYTES.validate_python(size))
        except ValidationError:
            equals = ""
        if not device or not equals:
            raise ValueError("expected DEVICE=SIZE, several with commas, such as 0=20GB,cpu=60GB")
    return found


def _as_text(value: Any) -> Any:
    """A mapping, as YAML may have it, is the same as its text; which is checked."""
    text = ",".join(f"{key}={size}" for key, size in value.items()) if isinstance(value, dict) else value
    if isinstance(text, str):
        memory_by_device(text)
    return text


MaxMemory = Annotated[
    str | None,
    BeforeValidator(_as_text, json_schema_input_type=str | dict[str | int, str | int] | None),
    Field(
        description="the most memory for weights on each device, such as 0=20GB,cpu=60GB, where 0 is the "
        "first GPU; implies device map auto. By default 90 % of the free memory"
    ),
]
_MAP = "auto, or a YAML or JSON file of modules and their devices (0, 1, cpu, disk)"
DeviceMap = PathOrName | None


class LoadOptions(Config):
    """What `cachekd dump` and `cachekd eval` say of loading a model."""

    quantization: Quantization = Field(
        None,
        description="quantise the teacher's weights while they are loaded, except head and vision encoder; "
        "or a mapping of a backend's own settings, {quant_method: ..., ...}",
    )
    device_map: DeviceMap = Field(
        None, description=f"where the model's layers are placed, if it does not fit one device: {_MAP}"
    )
    max_memory: MaxMemory = None
    attn_implementation: Attention = None

    @property
    def load_settings(self) -> Any:
        """The same as `cachekd.models.loading.LoadSettings`, which imports torch."""
        return _settings(self.quantization, self.device_map, self.max_memory, self.attn_implementation)


class TrainLoadOptions(Config):
    """The same of `cachekd train`: of the teacher, and of the student what it can have too."""

    teacher_quantization: Quantization = Field(
        None,
        description="quantise the teacher's weights while they are loaded, except the head; or a mapping of "
        "a backend's own settings, {quant_method: ..., ...}",
    )
    teacher_mismatch: Literal["error", "accept"] = Field(
        "error",
        description="whether to refuse or accept the cache of a quantised teacher, if the teacher that runs "
        "is quantised differently or not at all",
    )
    student_quantization: Quantization = Field(
        None, description="the same for the student; with `lora` this is QLoRA"
    )
    teacher_device_map: DeviceMap = Field(
        None,
        description=f"where the teacher's layers are placed, if it does not fit beside the student: {_MAP}",
    )
    teacher_max_memory: MaxMemory = None
    student_dtype: Annotated[Literal["float32", "bfloat16"], LATER] = Field(
        "float32",
        description="precision of the student's weights and gradients. bfloat16 takes half of the memory; "
        "each step is then rounded at random, so that small ones are not lost. Adapters are always in "
        "float32, but not the modules that `lora` trains whole (modules_to_save, bias)",
    )
    teacher_attn_implementation: Attention = None
    student_attn_implementation: Attention = None

    @property
    def teacher_load_settings(self) -> Any:
        """The same as `cachekd.models.loading.LoadSettings`."""
        return _settings(
            self.teacher_quantization,
            self.teacher_device_map,
            self.teacher_max_memory,
            self.teacher_attn_implementation,
        )


def _settings(
    quantization: Any, device_map: str | None, max_memory: str | None, attention: str | None
) -> dict[str, Any]:
    settings = {"quantization": quantization, "device_map": device_map, "attn_implementation": attention}
    if max_memory is None:
        return settings
    return settings | {"device_map": device_map or "auto", "max_memory": memory_by_device(max_memory)}
