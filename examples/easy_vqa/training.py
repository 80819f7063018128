"""What `train_teacher.py` and `train_base.py` share: batches, augmentation, the tower's stage."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from data import COLORS, SHAPES  # isort: skip
import models  # noqa: F401  # isort: skip  # which finds what the examples share
from small_llava import IGNORE, VISION_WIDTH, optimise  # isort: skip


def augment(pixels: Tensor, *, channels: bool) -> tuple[Tensor, Tensor]:
    """Flip, scale, stretch and shift; with `channels`, exchange colour channels in 40 % of the images.

    Returns:
        the images, and [B] bool: whose colours no longer hold.
    """
    count = len(pixels)
    scale = torch.empty(count, 2).uniform_(0.75, 1.35) * torch.empty(count, 1).uniform_(0.85, 1.2)
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = ((torch.rand(count) < 0.5) * 2 - 1) / scale[:, 0]
    affine[:, 1, 1] = 1 / scale[:, 1]
    affine[:, :, 2] = torch.empty(count, 2).uniform_(-0.25, 0.25)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    exchanged = (torch.rand(count) < 0.4) & channels
    orders = torch.tensor([[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    order = orders[torch.randint(0, len(orders), (count,))][:, :, None, None].expand_as(pixels)
    return torch.where(exchanged[:, None, None, None], pixels.gather(1, order), pixels), exchanged


def shuffled(count: int, batch_size: int) -> Iterator[Tensor]:
    """Batches of indices, epoch after epoch."""
    while True:
        order = torch.randperm(count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def train_tower(
    model: LlavaForConditionalGeneration, pixels: Tensor, shapes: Tensor, colors: Tensor, steps: int
) -> None:
    """The vision tower names shape and colour ([N] int, or IGNORE) from its mean patch feature."""
    tower = model.model.vision_tower
    head = nn.Sequential(nn.LayerNorm(VISION_WIDTH), nn.Linear(VISION_WIDTH, len(SHAPES) + len(COLORS)))

    def loss_of(batch: Tensor) -> Tensor:
        images, exchanged = augment(pixels[batch], channels=True)
        features = tower(pixel_values=images, output_hidden_states=True).hidden_states[-1][:, 1:]
        logits = head(features.mean(1))
        color = colors[batch].masked_fill(exchanged, IGNORE)
        shape_loss = F.cross_entropy(logits[:, : len(SHAPES)], shapes[batch])
        return shape_loss + F.cross_entropy(logits[:, len(SHAPES) :], color)

    optimise(nn.ModuleList([tower, head]), shuffled(len(pixels), 64), loss_of, steps, 1e-3, "tower")
