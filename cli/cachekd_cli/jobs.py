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

from cachekd.errors import CachekdError, writing
from cachekd_cli.signals import Terminated

if TYPE_CHECKING:
    from cachekd.pipeline import Group, StepState, Sweep
    from cachekd.pipeline.sweep import Board

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
        SomeFailed: groups failed, of which all are named.
        CachekdError: bad input, found before any step begins.
        KeyboardInterrupt: it was stopped, and so were the processes.
    """
    from cachekd.pipeline.sweep import Board, failure, is_over, ready

    board = Board(sweep)
    states = ready(board, labels)
    waiting = [label for label, found in states.items() if not is_over(sweep.groups[label], found)]
    runs = len(waiting)
    crew = _Crew(board, states, waiting, file, jobs, tell)
    try:
        while crew.waiting or crew.running:
            crew.look()
            time.sleep(_LOOK_AGAIN)
    except BaseException as stop:
        by_hand = isinstance(stop, KeyboardInterrupt) and not isinstance(stop, Terminated)
        _stop(crew.running, signal.SIGINT if by_hand else signal.SIGTERM)
        raise
    if crew.failed:
        raise failure(sweep, crew.failed, runs)


class _Crew:
    """The processes, and what they are still to do.

    Attributes:
        waiting: labels of the groups that are not begun.
        running: processes.
        failed: by label, why.
    """

    def __init__(
        self,
        board: Board,
        states: dict[str, list[StepState]],
        waiting: list[str],
        file: Path,
        jobs: int,
        tell: Callable[[str], None],
    ) -> None:
        self.board, self.states, self.waiting = board, states, waiting
        self.file, self.jobs, self.tell = file, jobs, tell
        self.running: list[_Job] = []
        self.failed: dict[str, str] = {}
        self.runs, self.gpus = len(waiting), visible_gpus()

    def look(self) -> None:
        """See which processes have ended, and begin others in their place."""
        for job in [job for job in self.running if job.process.poll() is not None]:
            self._end(job)
        for label in list(self.waiting):
            unfinished = {*self.waiting, *(job.label for job in self.running)}
            group = self.board.sweep.groups[label]
            if len(self.running) < self.jobs and group.needs.isdisjoint(unfinished):
                self._begin(group)

    def _begin(self, group: Group) -> None:
        from cachekd.pipeline.forecast import left
        from cachekd.pipeline.sweep import not_begun

        still = left(self.board.sweep, self.states, [*self.waiting, *(job.label for job in self.running)])
        number = self.runs - len(self.waiting) + 1
        self.waiting.remove(group.label)
        if lacking := not_begun(self.board, group):
            self._fail(group, lacking)
            return
        slot = min(set(range(self.jobs)) - {job.slot for job in self.running})
        output = group.out / OUTPUT_FILE
        try:
            process = _started(group, self.file, output, share_of(slot, self.jobs, self.gpus))
        except CachekdError as error:  # the others go on
            self._fail(group, f"{error.problem}: {error.where}: {error.found}")
            return
        self.running.append(_Job(group.label, process, slot, time.monotonic()))
        self.tell(
            f"run {number:,} of {self.runs:,}: {group.title}, {still.text(self.jobs)}; its output: {output}"
        )

    def _end(self, job: _Job) -> None:
        self.running.remove(job)
        group = self.board.sweep.groups[job.label]
        try:
            self.states[job.label] = self.board.of(group)
        except CachekdError as error:  # what it reads has gone meanwhile
            self._fail(group, f"{error.where}: {error.problem}")
            return
        if job.process.returncode == 0:
            self.tell(f"{group.title} is done, after {time.monotonic() - job.began:,.0f} s")
        else:
            self._fail(group, _why(job, self.states[job.label]))

    def _fail(self, group: Group, why: str) -> None:
        self.failed[group.label] = why
        output = group.out / OUTPUT_FILE
        self.tell(f"{group.title} failed: {why}" + (f"; its output: {output}" if output.exists() else ""))


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


def _started(group: Group, file: Path, output: Path, share: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process that does a group.

    Raises:
        CachekdError: its folder or the file for its output cannot be made.
    """
    from cachekd.atomic import make_folder

    make_folder(output.parent)
    command = [sys.executable, "-m", "cachekd_cli", "run", str(file), "--group", group.label]
    with writing(output), output.open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | share,
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
