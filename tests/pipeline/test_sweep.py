"""A pipeline that varies is run: each step once, whatever comes between; what fails stops nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from typer.testing import CliRunner

from cachekd.errors import CachekdError
from cachekd.lock import LOCK_FILE
from cachekd.models import model_files
from cachekd.pipeline import Sweep, checks, expand, read_pipeline
from cachekd.pipeline.forecast import Left, left
from cachekd.pipeline.select import choose, labels_of
from cachekd.pipeline.sweep import Board, SomeFailed, ready, run_sweep
from cachekd_cli.jobs import OUTPUT_FILE, _Crew, share_of, visible_gpus
from cachekd_cli.main import app
from cachekd_cli.run import runners
from caches import times_of
from launch import KILLS, Command

CE = {"lambda_align": 0, "lambda_vsd": 0}
ALIGN = {"lambda_vsd": 0}


@pytest.fixture
def values(tmp_path, teacher_path, student_path, data_path) -> dict[str, Any]:
    """Two methods and two seeds; the second method is the file as it stands."""
    return {
        "out": str(tmp_path / "pipe"),
        "defaults": {
            "teacher": str(teacher_path),
            "student": str(student_path),
            "data": str(data_path),
            "train": {"batch_size": 6, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 1},
        },
        "steps": [
            {"step": "dump", "name": "cache", "batch_size": 4},
            {"step": "train", "name": "student", **ALIGN},
        ],
        "seeds": 2,
        "vary": {"method": {"ce": {"student": CE}, "align": {}}},
    }


def read(values: dict[str, Any], tmp_path: Path) -> Sweep:
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return expand(read_pipeline(path))


def run(sweep: Sweep, only: tuple[str, ...] = (), **others: Any) -> list[str]:
    """Runs it; returns the folders of the steps that really ran, in the pipeline's."""
    ran: list[str] = []
    run_sweep(
        sweep,
        runners(quiet=True) | others,
        lambda begun: ran.append(begun.step.out.relative_to(sweep.pipeline.out).as_posix()),
        labels=labels_of(choose(sweep, only)),
    )
    return ran


def states(sweep: Sweep) -> dict[str, str]:
    found = Board(sweep).look()
    return {f"{label}/{one.name}".lstrip("/"): one.state for label in found for one in found[label]}


def contents(out: Path) -> dict[str, str]:
    """What the steps made that is the same whenever they make it: weights, shards and answers."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.suffix == ".safetensors" or "/shards/" in name:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "scores.json":
            scores = json.loads(path.read_text())
            found[name] = str([model["correct"] for model in scores["models"]])
    return found


def test_each_step_is_done_once_and_what_comes_later_is_all_that_is_done_then(values, tmp_path):
    sweep = read(values, tmp_path)
    out = Path(values["out"])
    assert run(sweep, ("seed-0",)) == ["cache", "ce/seed-0/student", "seed-0/student"]
    found = Board(sweep).look()
    seconds = {label: found[label][-1].seconds for label in ("ce/seed-0", "seed-0")}
    still = left(sweep, found, found)  # as long as the same methods took with the other seed
    assert (still.steps, still.unknown) == (2, 0)
    assert still.seconds == pytest.approx(sum(seconds.values()))
    before = times_of(out)
    assert run(sweep) == ["ce/seed-1/student", "seed-1/student"]
    assert run(sweep) == []
    values["seeds"] = 3
    values["vary"]["method"]["warm"] = {"student": {"temperature": 2}}
    more = read(values, tmp_path)
    assert sum(state == "done" for state in states(more).values()) == 5
    assert run(more) == [
        "warm/seed-0/student",
        "warm/seed-1/student",
        "ce/seed-2/student",
        "seed-2/student",
        "warm/seed-2/student",
    ]
    after = times_of(out)
    assert {name: after[name] for name in before} == before
    weights = contents(out)
    assert len(set(weights.values())) == len(weights)  # every point made a student of its own
    assert json.loads((out / "ce/seed-1/student/cachekd_run.json").read_text())["config"]["seed"] == 1


def test_what_a_shared_step_read_changes_all_that_take_it(values, tmp_path):
    values["seeds"] = 1
    sweep = read(values, tmp_path)
    run(sweep)
    values["steps"][0]["tail"] = "none"
    changed = read(values, tmp_path)
    assert states(changed) == {"cache": "changed", "ce/seed-0/student": "done", "seed-0/student": "changed"}
    assert run(changed) == ["cache", "seed-0/student"]
    assert (Path(values["out"]) / "seed-0" / "student.old-1").is_dir()


def test_a_run_that_fails_stops_only_what_needs_it(values, tmp_path):
    values["seeds"] = 1
    values["steps"].append({"step": "train", "name": "after", "student": "student", **CE})
    sweep = read(values, tmp_path)

    def fails(config: Any) -> None:
        if config.lambda_align == 0 and config.out.name == "student":
            raise CachekdError("out of memory", where="here")
        runners(quiet=True)["train"](config)

    told: list[str] = []
    with pytest.raises(SomeFailed) as caught:
        run_sweep(sweep, runners(quiet=True) | {"train": fails}, tell=told.append)
    said = "1 of 3 runs is not done:\n  ce/seed-0: step 'student': here: out of memory"
    assert caught.value.problem == said
    assert [line.split(",")[0] for line in told if line.startswith("run ")] == [
        "run 1 of 3: what all runs share",
        "run 2 of 3: ce/seed-0",
        "run 3 of 3: seed-0",
    ]
    assert states(sweep) == {
        "cache": "done",
        "ce/seed-0/student": "failed",
        "ce/seed-0/after": "waiting",
        "seed-0/student": "done",
        "seed-0/after": "done",
    }
    assert run(sweep) == ["ce/seed-0/student", "ce/seed-0/after"]


@pytest.mark.parametrize("error", [CachekdError("no room"), ZeroDivisionError("of ours")])
def test_what_needs_a_run_that_failed_is_not_begun_and_said(values, tmp_path, error):
    sweep = read(values, tmp_path)

    def fails(config: Any) -> None:
        raise error

    told: list[str] = []
    with pytest.raises(SomeFailed) as caught:
        run_sweep(sweep, runners(quiet=True) | {"dump": fails}, tell=told.append)
    lines = caught.value.problem.splitlines()
    assert lines[0] == "3 of 5 runs are not done:"
    assert str(error) in lines[1]
    needs = "not begun: it needs step 'cache', which is not done"
    assert lines[2:] == [f"  seed-0: {needs}", f"  seed-1: {needs}"]
    assert states(sweep)["ce/seed-1/student"] == "done"  # which takes no cache
    assert ("Traceback" in "\n".join(told)) == isinstance(error, ZeroDivisionError)


def test_what_the_last_point_would_be_refused_for_is_said_before_the_first_step(values, tmp_path):
    values["vary"]["method"]["bad"] = {"student": {"training": {"optm": "adamw_torch"}}}
    sweep = read(values, tmp_path)
    with pytest.raises(CachekdError, match="cannot be set") as caught:
        run(sweep)
    assert caught.value.where.startswith("bad/seed-0: step 'student': setting 'training.optm'")
    assert not Path(values["out"]).exists()


def test_models_and_data_are_opened_once_for_the_checks_of_all_points(
    values, tmp_path, data_path, monkeypatch
):
    grid(values, data_path)
    sweep = read(values, tmp_path)
    opened: list[str] = []

    def counts(name: str, function: Any) -> Any:
        return lambda *given: opened.append(name) or function(*given)

    for module, name in ((model_files, "processor_of"), (checks, "open_samples")):
        monkeypatch.setattr(module, name, counts(name, getattr(module, name)))
    waiting = [one for found in ready(Board(sweep)).values() for one in found]
    assert len(waiting) == 1 + 24 + 24
    assert opened.count("processor_of") == 2  # teacher and student
    assert opened.count("open_samples") == 3  # limits of 6 and 12, and none


def test_a_group_that_another_process_runs_is_waited_for(values, tmp_path):
    sweep = read(values, tmp_path)
    out = Path(values["out"])
    out.mkdir()
    lock = FileLock(out / LOCK_FILE, thread_local=False)
    lock.acquire()
    (out / LOCK_FILE).write_text(json.dumps({"process": 7, "host": "there", "since": "noon"}))
    threading.Timer(2, lock.release).start()
    told: list[str] = []
    run_sweep(sweep, runners(quiet=True), tell=told.append, labels={""})
    waits = [line for line in told if line.startswith("waits")]
    assert waits == [f"waits for process 7 on there, since noon, which is at {out}"]
    assert states(sweep)["cache"] == "done"


def test_the_command(values, tmp_path):
    values["seeds"] = 1
    read(values, tmp_path)
    command = ["run", str(tmp_path / "pipeline.yaml")]
    shown = CliRunner().invoke(app, [*command, "--status"])
    assert "3 steps are left: time left not known yet" in shown.stdout
    done = CliRunner().invoke(app, [*command, "--only", "ce"])
    assert done.exit_code == 0, done.output
    assert "run 1 of 2: what all runs share, time left not known yet" in done.stderr
    found = json.loads(CliRunner().invoke(app, [*command, "--status", "--json"]).stdout)
    points = {point["name"]: point for point in found["points"]}
    assert points["align/seed-0"]["variant"] == {"method": "align"}
    assert points["align/seed-0"]["seed"] == 0
    assert [[step["state"] for step in points[name]["steps"]] for name in ("ce/seed-0", "align/seed-0")] == [
        ["done", "done"],
        ["done", "waiting"],
    ]
    assert (found["left"]["steps"], found["left"]["unknown"]) == (1, 0)
    assert "1 step is left: some " in CliRunner().invoke(app, [*command, "--status"]).stdout
    refused = CliRunner().invoke(app, [*command, "--only", "nope"])
    assert "no run of this file" in str(refused.exception)
    refused = CliRunner().invoke(app, [*command, "--only", "ce/seed0"])
    assert refused.exception.fix == "did you mean ce/seed-0?"
    refused = CliRunner().invoke(app, [*command, "--group", "nope"])
    assert "no step of this file is done there" in str(refused.exception)
    nothing = CliRunner().invoke(app, [*command, "--status", "--variant", "2/9"])
    assert (nothing.exit_code, "none of the runs is in this share" in nothing.stdout) == (0, True)
    assert "left as they are" not in nothing.stdout
    values["vary"]["method"]["plain"] = values["vary"]["method"].pop("ce")
    read(values, tmp_path)
    shown = CliRunner().invoke(app, [*command, "--status"])
    assert "no run of this file has these folders: ce/seed-0" in shown.stdout
    found = json.loads(CliRunner().invoke(app, [*command, "--status", "--json"]).stdout)
    assert found["left_behind"] == ["ce/seed-0"]
    del values["seeds"], values["vary"]
    read(values, tmp_path)
    for option in (["--only", "ce"], ["--variant", "0/2"], ["--jobs", "2"]):
        refused = CliRunner().invoke(app, [*command, *option])
        assert "nothing varies in this file" in str(refused.exception)


@pytest.mark.parametrize(
    ("still", "text"),
    [
        (Left(3, 0.0, 3), "time left not known yet"),
        (Left(3, 2100.0, 0), "some 35 minutes left"),
        (Left(3, 2100.0, 1), "at least 35 minutes left"),
    ],
)
def test_what_is_left_in_words(still, text):
    assert still.text() == text


def test_gpus_and_cores_are_shared_out(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5,GPU-8a")
    monkeypatch.setattr("cachekd.train.callbacks.usable_cores", lambda: 9)
    assert visible_gpus() == ["3", "5", "GPU-8a"]
    shares = [share_of(slot, 4, visible_gpus()) for slot in range(4)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["3", "5", "GPU-8a", "3"]
    assert {share["OMP_NUM_THREADS"] for share in shares} == {"2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert share_of(0, 4, visible_gpus()) == {"OMP_NUM_THREADS": "7"}


# ---- processes


def grid(values: dict[str, Any], data_path: Path) -> None:
    """Eight variants and three seeds, each evaluated."""
    values["steps"].append(
        {"step": "eval", "name": "scores", "data": str(data_path), "teacher": None, "blind": False}
    )
    values["seeds"] = 3
    values["vary"]["method"] |= {
        "both": {"student": {"lambda_vsd": 1}},
        "ce2": {"student": CE | {"epochs": 2}},
    }
    values["vary"]["student.limit"] = [6, 12]


@pytest.mark.slow
def test_a_grid_of_8_by_3_goes_on_after_kill_9_at_any_moment(values, tmp_path, data_path):
    grid(values, data_path)
    undisturbed = read(values | {"out": str(tmp_path / "undisturbed")}, tmp_path)
    assert len(undisturbed.points) == 24
    began = time.monotonic()
    assert len(run(undisturbed)) == 1 + 24 + 24
    takes = time.monotonic() - began
    sweep = read(values, tmp_path)
    out = Path(values["out"])
    moments = random.Random(0)
    done: dict[str, int] = {}
    for _ in range(KILLS):
        process = Command("run", tmp_path / "pipeline.yaml")
        time.sleep(moments.uniform(0.05, 0.3) * takes)
        process.kill()
        process.wait(60)
        finished = [name for name, state in states(sweep).items() if state == "done"]
        now = {name: when for step in finished for name, when in under(out, step).items()}
        assert {name: now.get(name) for name in done} == done
        done = now
    run(sweep)
    assert set(states(sweep).values()) == {"done"}
    after = times_of(out)
    assert {name: after[name] for name in done} == done
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert not list(out.rglob("*.old-*"))


def under(out: Path, step: str) -> dict[str, int]:
    """The times of what a finished step left, but for what an evaluation adds."""
    return {f"{step}/{name}": when for name, when in times_of(out / step).items() if "/" not in name}


@pytest.mark.slow
def test_several_at_a_time_and_one_that_is_killed(values, tmp_path):
    sweep = read(values, tmp_path)
    out = Path(values["out"])
    killed: list[str] = []

    def kill_the_first_ce() -> None:
        while not killed:
            for process in children():
                if "ce/seed-0" in process[1]:
                    os.kill(process[0], signal.SIGKILL)
                    killed.append(process[1])
                    return
            time.sleep(0.05)

    threading.Thread(target=kill_the_first_ce, daemon=True).start()
    command = ["run", str(tmp_path / "pipeline.yaml"), "--jobs", "2"]
    shown = CliRunner().invoke(app, command)
    assert isinstance(shown.exception, SomeFailed)
    assert killed
    assert "ce/seed-0: its process was ended by SIGKILL" in shown.exception.problem
    assert f"its output: {out / 'ce/seed-1' / OUTPUT_FILE}" in shown.stderr
    assert "dump" in (out / OUTPUT_FILE).read_text()
    found = states(sweep)
    assert found.pop("ce/seed-0/student") != "done"
    assert set(found.values()) == {"done"}
    before = times_of(out)
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert set(states(sweep).values()) == {"done"}
    now = times_of(out)
    assert {name: now[name] for name in before if "ce/seed-0" not in name} == {
        name: when for name, when in before.items() if "ce/seed-0" not in name
    }


def test_a_folder_that_cannot_be_made_is_said_once_and_before_the_first_step(values, tmp_path):
    sweep = read(values, tmp_path)
    Path(values["out"]).write_text("mine")
    with pytest.raises(CachekdError, match="cannot be written") as caught:
        run(sweep)
    assert not isinstance(caught.value, SomeFailed)


def test_a_file_in_the_way_of_one_process_stops_no_other(values, tmp_path):
    sweep = read(values, tmp_path)
    out = Path(values["out"])
    (out / "ce/seed-1" / OUTPUT_FILE).mkdir(parents=True)
    (out / "ce/seed-0").write_text("mine")
    board = Board(sweep)
    crew = _Crew(board, board.look(), ["ce/seed-0", "ce/seed-1"], tmp_path, 2, print)
    crew.look()
    assert not crew.waiting
    assert not crew.running
    assert "File exists" in crew.failed["ce/seed-0"]
    assert "Is a directory" in crew.failed["ce/seed-1"]


def children() -> list[tuple[int, str]]:
    """The processes that this one started, and how."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for number in (task / "children").read_text().split():
            line = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            found.append((int(number), line))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_waited_for(values, tmp_path, sent):
    values["steps"] = [{"step": "train", "name": "student", **CE, "epochs": 4000}]
    del values["vary"]
    sweep = read(values, tmp_path)
    out = Path(values["out"])
    command = [sys.executable, "-m", "cachekd_cli", "run", tmp_path / "pipeline.yaml", "--jobs", "2"]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 300
    while any(not list(out.rglob(f"seed-{seed}/**/trainer_state.json")) for seed in (0, 1)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(sent)
    assert process.wait(120) == 128 + sent
    # Running, if one of them were still at it.
    assert states(sweep) == {"seed-0/student": "interrupted", "seed-1/student": "interrupted"}


@pytest.mark.slow
def test_two_shares_at_the_same_time_do_all_of_it_once(values, tmp_path):
    sweep = read(values, tmp_path)
    out = Path(values["out"])
    command = ["run", tmp_path / "pipeline.yaml", "--variant"]
    both = [Command(*command, f"{share}/2") for share in range(2)]
    for process in both:
        assert process.wait(300) == 0
    assert set(states(sweep).values()) == {"done"}
    assert not list(out.rglob("*.old-*"))
