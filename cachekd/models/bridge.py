"""A trained bridge between the student's vision encoder and the teacher's projector. Beyond the paper.

The paper's switch feeds V_S's output to P_T as it is, so V_S must have the width and the grid of V_T. Where
it has not, a bridge brings each image's patches to the teacher's grid and width. It trains by L_VSD alone and
is no part of the student: what is used in the end needs it as little as it needs the teacher.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.optim import Optimizer
from transformers.utils import ModelOutput

from cachekd.atomic import commit
from cachekd.errors import CachekdError
from cachekd.losses.terms import WITHOUT_SWITCH
from cachekd.models.compat import OTHER_TOWER, check_switch, switch_differences, width_setting
from cachekd.models.families import GRID, family_of
from cachekd.paths import BRIDGE_FILE

# An image is one square of patches, whose number is a matter of the vision encoder alone.
_ONE_SQUARE = ("llava", "paligemma", "gemma3")
# An image is rows and columns of tiles, each of one grid: how many follows from its shape, not from the grid,
# and stands in the text. So each tile is bridged by itself, where both sides cut a sample alike.
_TILE_BY_TILE = ("idefics3", "smolvlm")
_SHUFFLE = "scale_factor"  # patches along a side that become one token
# Images are tiles, and how many depends on the size of one: V_S's tiles need not be those of V_T. Only the
# width may differ.
_TILED = ("llava_next", "llava_onevision", "internvl")
# Tokens before the patches, by the vision encoder's model_type.
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
_STRATEGY = "vision_feature_select_strategy"


@dataclass(frozen=True)
class BridgePlan:
    """What a bridge brings to what; of each pair the student's, then the teacher's.

    Attributes:
        width: of V's output.
        layer: the index of the hidden states that the projector reads; None: the last hidden state.
        grid: patches along a side; None where the tokens stay as they are and only the width changes.
        class_tokens: tokens before the patches.
        other_text: whether an image has another number of places in the teacher's text than in the student's.
        tiles: whether both cut an image into tiles, each by its own processor: a sample must have the same
            ones on both sides (`cachekd.check.tiles`). The grid is that of a tile.
    """

    width: tuple[int, int]
    layer: int | None = None
    grid: tuple[int, int] | None = None
    class_tokens: tuple[int, int] = (0, 0)
    other_text: bool = False
    tiles: bool = False

    def __str__(self) -> str:
        text = f"width {self.width[0]:,} to {self.width[1]:,}"
        if self.grid is not None and self.grid[0] != self.grid[1]:
            text += ", {0} x {0} patches to {1} x {1}".format(*self.grid) + " in each tile" * self.tiles
        return text


def plan_bridge(teacher: Any, student: Any, *, own_text: bool = False) -> BridgePlan:
    """What stands between a student's vision encoder and a teacher's projector, if a bridge can mend it.

    Args:
        teacher, student: configs.
        own_text: the teacher reads the sample's text by its own tokenizer (`switch_differences`).

    Raises:
        CachekdError: there is nothing to mend; a bridge is not sound in this family; something else differs
            too, which no bridge mends.
    """
    differences = switch_differences(teacher, student, own_text=own_text)
    tiles = {teacher.model_type, student.model_type} <= {*_TILE_BY_TILE}
    same_tower = tiles or _tower(teacher) == _tower(student)
    if not differences and same_tower:
        raise _refused(
            "the bridge has nothing to do: the student's features have the shape that the teacher takes",
            student,
            fix="leave --switch-bridge out",
        )
    bridged = {width_setting(teacher)}
    settings = {difference.setting for difference in differences}
    tokens_stay = same_tower and settings <= bridged
    if not tokens_stay and tiles:
        bridged |= {*GRID, _SHUFFLE}
    elif not tokens_stay and _is_one_square(teacher) and _is_one_square(student):
        bridged |= {*GRID, _STRATEGY}
    elif teacher.model_type == student.model_type and teacher.model_type in _TILED and settings & {*GRID}:
        raise _refused(
            "no bridge is sound here: with tiles of another size an image has another number of them",
            student,
            expected="the teacher's vision_config.image_size and patch_size; the width may differ",
            found=", ".join(f"{one.setting} {one.student}, not {one.teacher}" for one in differences),
            fix=f"{OTHER_TOWER}, or {WITHOUT_SWITCH}",
        )
    check_switch(teacher, student, bridged=frozenset(bridged), own_text=own_text)
    layer = getattr(teacher, "vision_feature_layer", None)
    sound = (*_ONE_SQUARE, *_TILE_BY_TILE, *_TILED)
    if teacher.model_type not in sound or isinstance(layer, list | tuple):
        raise _refused(
            "no bridge is sound here: V's output is not one tensor of patches [images, patches, width]",
            student,
            expected=f"model_type {', '.join(sound)}, and one vision_feature_layer",
            found=f"{teacher.model_type}, layer {layer}",
            fix=f"{OTHER_TOWER}, or {WITHOUT_SWITCH}",
        )
    width = (_width(student), _width(teacher))
    if tokens_stay:
        return BridgePlan(width, layer, tiles=tiles)
    plan = BridgePlan(
        width,
        layer,
        grid=(_side(student), _side(teacher)),
        class_tokens=(_class_tokens(student), _class_tokens(teacher)),
        other_text=_tokens_read(student) != _tokens_read(teacher),
        tiles=tiles,
    )
    if plan.class_tokens[0] < plan.class_tokens[1] and getattr(teacher, _STRATEGY, None) != "default":
        raise _refused(
            "the teacher's projector reads a class token, and the student's vision encoder has none",
            student,
            expected=f"a {_tower(teacher)}",
            found=f"a {_tower(student)}",
        )
    return plan


class SwitchBridge(nn.Module):
    """Brings V_S's output to the shape of V_T's: patches resampled, then one linear layer. Beyond the paper.

    What V_S gives of a picture, or of each tile of one, is bridged by itself.

    Patches are resampled bilinearly as a picture is (with antialiasing where they become fewer); class
    tokens are kept apart, and one that the teacher drops anyway is zeros where the student has none. The
    linear layer begins as the identity, or, between two widths, as a random map that keeps angles and lengths
    (or, into a smaller width, a projection).

    Args:
        plan: from `plan_bridge`.
        seed: of the linear layer.
    """

    def __init__(self, plan: BridgePlan, seed: int = 0) -> None:
        super().__init__()
        self.plan = plan
        self.linear = nn.Linear(*plan.width)
        with torch.no_grad():
            self.linear.bias.zero_()
            if plan.width[0] == plan.width[1]:
                nn.init.eye_(self.linear.weight)
            else:  # a generator of its own, on the CPU: the same in every process
                nn.init.orthogonal_(self.linear.weight, generator=torch.Generator().manual_seed(seed))

    def forward(self, output: ModelOutput) -> ModelOutput:
        """V_S's raw output with what the teacher's projector reads of it bridged.

        Args:
            output: with `last_hidden_state`, and `hidden_states` if the projector reads one of them, [B, T,
                width].

        Returns:
            a shallow copy; those two are [B, T', width'] in the bridge's dtype. Hidden states that no
            projector reads stay as they are.

        Raises:
            CachekdError: there are more or fewer tokens than the student's config says.
        """
        bridged, layer = copy.copy(output), self.plan.layer
        if layer is None or layer == -1:  # some families read the one, some the other for the last layer
            bridged["last_hidden_state"] = self._tokens(output["last_hidden_state"])
        if layer is not None and output.get("hidden_states") is not None:
            states = list(output["hidden_states"])
            states[layer] = self._tokens(states[layer])
            bridged["hidden_states"] = tuple(states)
        return bridged

    def _tokens(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.linear.weight.dtype)
        if self.plan.grid is None:
            return self.linear(tokens)
        (ours, theirs), (side, other) = self.plan.class_tokens, self.plan.grid
        if tokens.shape[1] != ours + side * side:
            raise CachekdError(
                "the student's vision encoder gives another number of tokens than its config says",
                where="the switch bridge",
                expected=f"{ours} + {side} x {side}",
                found=tokens.shape[1],
                fix="the student's image processor and vision_config.image_size must agree",
            )
        leading, patches = tokens[:, :ours], tokens[:, ours:]
        missing = leading.new_zeros(len(tokens), max(0, theirs - ours), tokens.shape[2])
        leading = torch.cat([missing, leading[:, :theirs]], dim=1)
        return torch.cat([self.linear(leading), self.linear(resampled(patches, side, other))], dim=1)

    def summary(self) -> dict[str, Any]:
        """What a run's JSON says of it."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return {
            "kind": "linear",
            "beyond_the_paper": True,
            "file": BRIDGE_FILE,
            "parameters": parameters,
            **asdict(self.plan),
        }

    def save(self, folder: Path) -> None:
        """Write `switch_bridge.safetensors`, with what it is in its metadata."""
        weights = {name: weight.detach().cpu() for name, weight in self.state_dict().items()}
        commit(folder / BRIDGE_FILE, save(weights, metadata={"switch_bridge": json.dumps(self.summary())}))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            CachekdError: it is not there.
        """
        path = folder / BRIDGE_FILE
        if not path.exists():
            raise CachekdError(
                "the checkpoint lacks the switch bridge", where=str(folder), expected=BRIDGE_FILE
            )
        self.load_state_dict(load_file(path))


def resampled(patches: Tensor, side: int, other: int) -> Tensor:
    """[B, side * side, D] patches as [B, other * other, D], row by row, bilinear with antialiasing."""
    if side == other:
        return patches
    picture = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [B, D, side, side]
    picture = interpolate(picture, size=(other, other), mode="bilinear", antialias=True)
    return picture.flatten(2).transpose(1, 2)


def _tower(config: Any) -> str:
    return str(getattr(getattr(config, "vision_config", None), "model_type", None))


def _width(config: Any) -> int:
    return int(getattr(config.vision_config, family_of(config).width))


def _side(config: Any) -> int:
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def _is_one_square(config: Any) -> bool:
    return config.model_type in _ONE_SQUARE and _tower(config) in _CLASS_TOKENS


def _class_tokens(config: Any) -> int:
    return 0 if config.model_type in _TILE_BY_TILE else _CLASS_TOKENS[_tower(config)]


def _tokens_read(config: Any) -> int:
    """Places of an image in the text, or of a tile of one, but for what a projector makes of all alike."""
    if config.model_type in _TILE_BY_TILE:
        return (_side(config) // int(config.scale_factor)) ** 2
    dropped = getattr(config, _STRATEGY, None) == "default"
    return _class_tokens(config) + _side(config) ** 2 - dropped


def _refused(problem: str, student: Any, **details: str) -> CachekdError:
    return CachekdError(problem, where=f"setting 'switch_bridge' and {student.name_or_path}", **details)


def no_sharding() -> CachekdError:
    """What to say under FSDP or DeepSpeed."""
    return CachekdError(
        "the switch bridge cannot be trained under FSDP or DeepSpeed: they train the student alone",
        where="setting 'switch_bridge'",
        fix="train with DDP (accelerate launch --multi_gpu), or leave --switch-bridge out",
    )


def add_to_optimizer(optimizer: Optimizer, bridge: SwitchBridge, weight_decay: float) -> None:
    """Add it as the Trainer adds the student's layers: a bias has no weight decay."""
    optimizer.add_param_group({"params": [bridge.linear.weight], "weight_decay": weight_decay})
    optimizer.add_param_group({"params": [bridge.linear.bias], "weight_decay": 0.0})


def mean_gradients(bridge: SwitchBridge, accelerator: Accelerator) -> None:
    """Take the mean over all processes. Not by DDP: it would wait for a process whose batch has no image."""
    for parameter in bridge.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = accelerator.reduce(gradient, reduction="mean")
