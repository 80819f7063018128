"""`cachekd run --jobs N`: several groups at a time, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cachekd_cli.signals import Terminated

if TYPE_CHECKING:
    from cachekd.pipeline import Group, StepState, Sweep

OUTPUT_FILE = "run.log"  # in a group's folder
_LOOK_AGAIN = 0.2  # seconds


@dataclass
class _Job:
    label: str
    process: subprocess.Popen[bytes]
    slot: int
    began: float


def run_jobs(
    sweep: Sweep, file: Path, jobs: int, tell: Callable[[str], None], labels: Collection[str] | None = None
) -> None:
    """Do whatever is not done, as `run_sweep` does, in up to `jobs` processes.

    GPUs are shared out by turns, and cores in equal parts, unless OMP_NUM_THREADS is set.

    Raises:
        CachekdError: bad input, found before any step begins; or groups failed, of which all are named.
        KeyboardInterrupt: it was stopped, and so were the processes.
    """
    from cachekd.pipeline.forecast import left
    from cachekd.pipeline.sweep import Board, failure, is_over, not_begun, ready

    board = Board(sweep)
    states = ready(board, labels)
    waiting = [label for label, found in states.items() if not is_over(sweep.groups[label], found)]
    runs, begun = len(waiting), 0
    running: list[_Job] = []
    failed: dict[str, str] = {}
    gpus = visible_gpus()

    def begin(label: str) -> None:
        nonlocal begun
        begun += 1
        slot = min(set(range(jobs)) - {job.slot for job in running})
        group = sweep.groups[label]
        still = left(sweep, states, [*waiting, label, *(job.label for job in running)])
        output = group.out / OUTPUT_FILE
        running.append(_Job(label, _started(group, file, output, slot, jobs, gpus), slot, time.monotonic()))
        tell(f"run {begun:,} of {runs:,}: {group.title}, {still.text(jobs)}; its output: {output}")

    def end(job: _Job) -> None:
        running.remove(job)
        group = sweep.groups[job.label]
        states[job.label] = board.of(group)
        if job.process.returncode == 0:
            tell(f"{group.title} is done, after {time.monotonic() - job.began:,.0f} s")
            return
        failed[job.label] = _why(job, states[job.label])
        tell(f"{group.title} failed: {failed[job.label]}; its output: {group.out / OUTPUT_FILE}")

    try:
        while waiting or running:
            for label in list(waiting):
                group = sweep.groups[label]
                if lacking := not_begun(sweep, group, failed):
                    failed[label] = lacking
                    waiting.remove(label)
                    tell(f"{group.title}: {lacking}")
                elif len(running) < jobs and group.needs.isdisjoint([*waiting, *(j.label for j in running)]):
                    waiting.remove(label)
                    begin(label)
            for job in [job for job in running if job.process.poll() is not None]:
                end(job)
            time.sleep(_LOOK_AGAIN)
    except BaseException as stop:
        by_hand = isinstance(stop, KeyboardInterrupt) and not isinstance(stop, Terminated)
        _stop(running, signal.SIGINT if by_hand else signal.SIGTERM)
        raise
    if failed:
        raise failure(sweep, failed, runs)


def visible_gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def share_of(slot: int, jobs: int, gpus: list[str]) -> dict[str, str]:
    """The variables that give a process its share of the machine."""
    from cachekd.train.callbacks import usable_cores

    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // jobs))
    share = {"OMP_NUM_THREADS": threads}
    return share | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {})


def _started(
    group: Group, file: Path, output: Path, slot: int, jobs: int, gpus: list[str]
) -> subprocess.Popen[bytes]:
    from cachekd.atomic import make_folder

    make_folder(output.parent)
    command = [sys.executable, "-m", "cachekd_cli", "run", str(file), "--group", group.label]
    with output.open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | share_of(slot, jobs, gpus),
            start_new_session=True,  # the terminal's Ctrl-C comes once, from here
        )


def _stop(running: list[_Job], number: int) -> None:
    """Pass a signal on, and wait until all have ended in order; again at each further signal."""
    for job in running:
        job.process.send_signal(number)
    for job in running:
        try:
            job.process.wait()
        except KeyboardInterrupt:
            _stop([job for job in running if job.process.poll() is None], number)


def _why(job: _Job, states: list[StepState]) -> str:
    """Why a process did not do all of its group."""
    code = job.process.returncode
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    told = [f"step {one.name!r}: {one.why}" for one in states if one.state == "failed"]
    return "; ".join(told) or f"its process ended with exit code {code}"
