"""Processes that read samples: signals to a whole job are the main process's; they end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachekd.data.loader import WorkerLoader

SLOW_STARTS = [pytest.param(start, marks=pytest.mark.slow) for start in ("spawn", "forkserver")]


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


@pytest.mark.parametrize("start", ["fork", *SLOW_STARTS])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_workers_is_no_matter(tmp_path, start, number):
    batches: Iterator[bytes] = iter(loader(Slow(tmp_path, 40, 0.01), start))
    assert next(batches) == b"\0"
    # Sent by another process, as `kill`, terminals and batch systems do.
    subprocess.run(["kill", f"-{number}", *map(str, processes_of(tmp_path))], check=True)
    assert list(batches) == [bytes([index]) for index in range(1, 40)]
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, ())  # of this process
    assert not held_back & {signal.SIGINT, signal.SIGTERM}


def test_a_worker_that_does_not_end_by_itself_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds of patience
    batches: Any = iter(loader(Slow(tmp_path, 4, 3600.0), "fork"))
    workers = processes_of(tmp_path, 2)
    batches._shutdown_workers()
    wait_until_gone(workers, 5)


@pytest.mark.parametrize("start", ["fork", *SLOW_STARTS])
def test_workers_end_with_the_main_process(tmp_path, start):
    """However it dies, and though each has more to say than fits into a pipe that nobody reads."""
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from test_signals_of_workers import Slow, loader
if __name__ == "__main__":
    batches = iter(loader(Slow(Path({str(tmp_path)!r}), 40, size=10_000_000), {start!r}))
    time.sleep(3600)
"""
    file = tmp_path.with_suffix(".py")
    file.write_text(program)
    with subprocess.Popen([sys.executable, str(file)], start_new_session=True) as main:
        workers = processes_of(tmp_path, 2)
        assert all(map(alive, workers))
        os.killpg(main.pid, signal.SIGTERM) if start != "fork" else main.kill()
    wait_until_gone(workers)
