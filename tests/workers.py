"""Processes that read samples, and whether they are still there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from cachekd.data.loader import WorkerLoader


class Slow:
    """Of numbers, each of which takes a moment; the process that reads it is noted."""

    def __init__(self, folder: Path, numbers: int, seconds: float = 0.0, size: int = 1) -> None:
        self.folder, self.numbers, self.seconds, self.size = folder, numbers, seconds, size

    def __len__(self) -> int:
        return self.numbers

    def __getitem__(self, index: int) -> bytes:
        (self.folder / str(os.getpid())).touch()
        time.sleep(self.seconds)
        return bytes([index]) * self.size


def processes_of(folder: Path, number: int = 1) -> list[int]:
    """Those that have read something, once there are so many."""
    while len(found := [int(path.name) for path in folder.iterdir()]) < number:
        time.sleep(0.01)
    return found


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until_gone(processes: list[int], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while any(map(alive, processes)):
        assert time.monotonic() < end, "a worker stays"
        time.sleep(0.05)


def loader(data: Any, start: str, **settings: Any) -> WorkerLoader:
    # Bytes, which go through a pipe, not through shared memory.
    return WorkerLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context=start, collate_fn=bytes, **settings
    )
