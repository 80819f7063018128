"""Processes that read samples: signals to a whole job are the main process's; they end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from caches import ROOT
from workers import Slow, alive, loader, processes_of, wait_until_gone

STARTS = ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)]


@pytest.mark.parametrize("start", STARTS)
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


@pytest.mark.parametrize("start", STARTS)
def test_workers_end_with_the_main_process(tmp_path, start):
    """However it dies, and though each has more to say than fits into a pipe that nobody reads."""
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from workers import Slow, loader
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
