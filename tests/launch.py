"""`cachekd` in processes of their own, forked from one that has imported what `conftest.py` names.

From the entry point on it is the real command: its
arguments, environment, signals, output and exit code. What libraries read from the environment when they are
imported needs `subprocess`. Scripts are run the same way.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

KILLS = int(os.environ.get("CACHEKD_KILLS", "8"))  # at random moments
LAUNCHER = "accelerate.commands.launch"
FORKS = multiprocessing.get_context("forkserver")


class Command:
    """What `subprocess.Popen` would be, text and pipes included.

    Args:
        arguments: of `cachekd`.
        environment: what differs from this process's.
        new_session: it and what it starts are a group.
        script: what is run in the place of `cachekd`, a file or a module.
    """

    def __init__(
        self,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        new_session: bool = False,
        script: Path | str | None = None,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp())
        self.args = list(map(str, arguments))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        run = (self.args, environment, new_session, script, self._folder)
        self._process = FORKS.Process(target=_cachekd, args=run)
        self._process.start()
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = 300) -> tuple[str, str]:
        """Standard output and standard error, once it has ended."""
        self.wait(timeout)
        said = (self._folder / "out").read_text(), (self._folder / "err").read_text()
        shutil.rmtree(self._folder)
        return said


def _cachekd(
    arguments: list[str],
    environment: dict[str, str],
    new_session: bool,
    script: Path | str | None,
    folder: Path,
) -> None:
    if new_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of its workers, as anywhere else
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    import torch

    from cachekd_cli.main import main

    torch.set_num_threads(1)  # of OMP_NUM_THREADS, which was read when torch was imported
    sys.argv = [str(script or "cachekd"), *arguments]
    if script is None:
        main()
    elif isinstance(script, Path):
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def cachekd(
    *arguments: object, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = Command(*arguments, environment=environment)
    out, err = command.communicate()
    assert command.returncode is not None
    return subprocess.CompletedProcess(command.args, command.returncode, out, err)


def output_of(script: Path | str, *arguments: object) -> str:
    """What `python script arguments` prints."""
    command = Command(*arguments, script=script)
    out, err = command.communicate(timeout=600)
    assert command.returncode == 0, out + err
    return out


def free_port() -> int:
    """One that nobody else has: tests run side by side."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launched(recipe: Path) -> Command:
    """`cachekd train` in two processes on a CPU, as users start it; both import all anew."""
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    command = [*launch, "-m", "cachekd_cli.main", "train", "--config", recipe]
    return Command(*command, new_session=True, script=LAUNCHER)


def train_in_two_processes(recipe: Path) -> subprocess.CompletedProcess[str]:
    """The same to its end, without the launcher: in the environment that it gives its processes."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}
    ranks = [
        Command("train", "--config", recipe, environment=common | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    outs, errs = zip(*(rank.communicate() for rank in ranks), strict=True)
    code = next((rank.returncode for rank in ranks if rank.returncode), 0)
    return subprocess.CompletedProcess(ranks[0].args, code, "".join(outs), "".join(errs))
