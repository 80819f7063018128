"""Training runs: stopped, and looked at."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainerCallback

from cachekd.paths import RUN_FILE


def losses(out: Path) -> list[tuple[float, ...]]:
    """Of each step, as the run's file has them."""
    log = json.loads((out / RUN_FILE).read_text())["log"]
    return [tuple(entry[n] for n in ("loss", "ce", "align", "vsd")) for entry in log if "ce" in entry]


class CutShort(TrainerCallback):
    """Pulls the plug in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt
