"""Time and memory of both stages at TinyLLaVA's sizes, on the GPU that there is; one command, some minutes.

    python benchmarks/gpu.py --minutes 5 --json gpu.json
    python benchmarks/gpu.py --size tiny                     # all of it on a CPU, in seconds

SigLIP-so400m, Qwen2.5-3B and 0.5B with random weights, made on the device; 729 picture tokens and 250 of
text, of which 120 are the answer's. The code is cachekd's own from end to end. What matters most comes first,
what there is no time for is left out and said so, and what fails is noted, and the next one goes on. The JSON
file is written after every measurement, and beside it the profile of a step.

A bare forward is the teacher's with its inputs on the device and logits at the answers alone. MFU: the FLOPs
that are counted (masked attention in whole), of those that the maker promises in dense bfloat16.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()  # importing torch is part of the time

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import gpu_lab  # noqa: E402
import gpu_steps  # noqa: E402
from gpu_lab import Found, Lab  # noqa: E402
from real_size import SIZES  # noqa: E402
from transformers.utils import logging  # noqa: E402

from cachekd.models.device import default_device, free_memory  # noqa: E402

# Which value, what of it, and whether it is to be at most or at least that.
AIMS: list[tuple[str, Callable[[dict[str, Found]], float], float, bool]] = [
    ("dump: MFU", lambda of: of["dump"]["mfu"], 0.45, False),
    (
        "dump / bare forward",
        lambda of: of["forward"]["tokens_per_s"] / of["dump"]["tokens_per_s"],
        1.05,
        True,
    ),
    (
        "cached / naive, beside the ratio of their FLOPs",
        lambda of: (of["cached"]["ms"] / of["naive"]["ms"]) / (of["cached"]["tflop"] / of["naive"]["tflop"]),
        1.05,
        True,
    ),
    ("cached without L_VSD / CE", lambda of: of["cached_no_vsd"]["ms"] / of["ce"]["ms"], 1.10, True),
    ("share of the time in which cached steps wait", lambda of: of["cached"]["wait_share"], 0.01, True),
    ("peak GB with checkpointing", lambda of: of["recomputed"]["peak_gb"], 22, True),
    ("peak GB, student in bfloat16", lambda of: of["half_student"]["peak_gb"], 22, True),
]


@dataclass
class Session:
    """The measurements so far, on the screen and in a file."""

    lab: Lab
    ends: float
    path: Path | None
    measured: dict[str, Found] = field(default_factory=dict)

    def measure(self, name: str, function: Callable[[Lab], Found], needed: float) -> None:
        """Measure one thing, if there are `needed` seconds for it."""
        started, left = time.monotonic(), self.ends - time.monotonic()
        if left < needed:
            found: Found = {"left_out": f"{left:.0f} s are left, it takes {needed:.0f}"}
        else:
            try:
                found = function(self.lab)
            except Exception as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            free_memory()
        self.measured[name] = found | {"took_s": time.monotonic() - started}
        print(f"{name}: {shown(self.measured[name])}", flush=True)
        self.write()

    def write(self) -> None:
        """All of it, as far as it is there."""
        if self.path is not None:
            content = {"measured": self.measured, "aims": self.aims()}
            self.path.write_text(json.dumps(content, indent=1))

    def aims(self) -> list[dict[str, Any]]:
        """Those whose values are there."""
        rows = []
        for name, value, aim, at_most in AIMS:
            try:
                found = value(self.measured)
            except (KeyError, ZeroDivisionError):
                continue
            met = found <= aim if at_most else found >= aim
            rows.append({"name": name, "value": found, "aim": aim, "at_most": at_most, "met": met})
        return rows


def shown(found: Found) -> str:
    """One line."""
    return ", ".join(
        f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in found.items()
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="what does not fit is left out")
    parser.add_argument("--size", choices=list(SIZES), default="tinyllava")
    parser.add_argument("--workers", type=int, default=8, help="processes that read the dump's samples")
    parser.add_argument("--json", type=Path, help="a file, written after every measurement")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(options.size, default_device(), options.workers, Path(folder))
        run(Session(lab, STARTED + 60 * options.minutes, options.json), real=options.size == "tinyllava")


def run(session: Session, *, real: bool) -> None:
    """Everything, by importance; the seconds are those of an H200, generously."""
    profile = Path("gpu.profile.txt") if session.path is None else session.path.with_suffix(".profile.txt")
    steps = {name: partial(gpu_steps.step, name=name) for name in gpu_steps.STEP_WEIGHTS}
    for name, function, needed in (
        ("device", gpu_lab.device, 5),
        ("forward", gpu_lab.forward, 15),
        ("dump", gpu_lab.dump, 40),
        ("cached", steps["cached"], 20),
        ("naive", gpu_steps.naive, 10),
        ("ce", steps["ce"], 8),
        ("cached_no_vsd", steps["cached_no_vsd"], 8),
        ("profiled", partial(gpu_steps.profiled, path=profile), 15),
        ("live", steps["live"], 10),
        ("recomputed", gpu_steps.recomputed, 12),
        ("half_student", gpu_steps.half_student, 10),
        ("look_up", gpu_lab.look_up, 5),
        ("losses", gpu_lab.losses, 5),
    ):
        session.measure(name, function, needed if real else 0)
    for row in session.aims():
        sign, verdict = "<=" if row["at_most"] else ">=", "met" if row["met"] else "MISSED"
        print(f"{row['name']:<50} {row['value']:8.3f}  {sign} {row['aim']:<6} {verdict}", flush=True)
    failed = [name for name, found in session.measured.items() if "error" in found]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
