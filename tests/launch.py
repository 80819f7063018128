"""`cachekd train` in two processes on a CPU, through `accelerate launch`."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path


def launch_command(recipe: Path) -> list[str]:
    """At a port that nobody else has: tests run side by side."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", str(port)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch]
    return [*command, "-m", "cachekd_cli.main", "train", "--config", str(recipe)]


def train_in_two_processes(recipe: Path) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(launch_command(recipe), capture_output=True, text=True, check=False, timeout=300)
