"""A step's memory, reckoned from configurations, against what can be counted by hand and in a real step."""

from __future__ import annotations

import pytest
import torch
from tiny import save_vlm, tiny_processor, tiny_vlm
from tiny_families import FAMILY_BUILDERS

from cachekd.check.memory import step_memory
