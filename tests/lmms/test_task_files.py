"""Tasks of lmms-eval by their files: what stands for what, and which of them cannot be scored here."""

from __future__ import annotations

import sys
from textwrap import dedent

import pytest
from typer.testing import CliRunner

from cachekd.errors import CachekdError
from cachekd.lmms.obstacles import fetches_in_code, obstacle, require_scorable
from cachekd.lmms.run import OWN_TASKS
from cachekd.lmms.task_files import Function, TaskFiles
from cachekd_cli.main import app

UTILS = """
import requests
from .judge import Judge
judge = Judge()

def plain(doc, results):
    return {"accuracy": float(results[0] == doc["answer"])}

def indirect(results):
    return _score(results)

def _score(results):
    return judge.mark(results)

def pictures(dataset):
    return load_dataset("org/pictures", token=True)

def public(dataset):
    return load_dataset("org/pictures", token=None)
"""
JUDGE = """
class Judge:
    def mark(self, results):
        return self._ask(results)

    def _ask(self, results):
        return requests.post("https://example.org", json=results)
"""
PLAIN = "output_type: generate_until\nprocess_results: !function utils.plain\n"
METRIC = "metric_list:\n- metric: accuracy\n  aggregation: mean\n"
FILES = {
    "_default_yaml": "dataset_path: org/questions\noutput_type: generate_until\ntest_split: test\n",
    "plain.yaml": f"task: plain\ntag: [easy, all]\n{PLAIN}{METRIC}",
    "including.yaml": f"include: _default_yaml\ntask: including\ntag: easy\ntest_split: val\n{METRIC}",
    "group.yaml": "group: both\ntask:\n- plain\n- task: including\n",
    "nested.yaml": "group: more\ntask: [both, choice]\n",
    "choice.yaml": "task: choice\noutput_type: multiple_choice\n",
    "rounds.yaml": "task: rounds\noutput_type: generate_until_multi_round\n",
    "other.yaml": "task: other\noutput_type: something_new\n",
    "video.yaml": f"task: video\ndataset_kwargs: {{video: true}}\n{METRIC}",
    "server.yaml": "task: server\nmetric_list:\n- metric: submission\n",
    "judged.yaml": "task: judged\nmetric_list:\n"
    "- metric: accuracy\n  aggregation: !function utils.indirect\n",
    "named.yaml": "task: named\nmetric_list:\n- metric: gpt_eval_score\n",
    "login.yaml": f"task: login\nprocess_docs: !function utils.pictures\n{METRIC}",
    "public.yaml": f"task: public\nprocess_docs: !function utils.public\n{METRIC}",
    "python.yaml": "task: python\nclass: !function utils.plain\n",
}
WHY = {
    "choice": "probabilities of given answers",
    "rounds": "several rounds",
    "other": "another kind, something_new",
    "video": "videos",
    "server": "answers are not public",
    "judged": "another model judges",
    "named": "another model judges",
    "login": "with a login",
    "python": "Python class",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tasks")
    for name, text in FILES.items():
        (made / name).write_text(dedent(text))
    (made / "utils.py").write_text(UTILS)
    (made / "judge.py").write_text(JUDGE)
    return made


def names(files, *asked):
    return [task.name for task in files.tasks(asked)]


def test_tasks_groups_and_tags(folder):
    files = TaskFiles([folder])
    assert names(files, "plain") == ["plain"]
    assert names(files, "both", "plain") == ["plain", "including"]
    assert names(files, "more") == ["plain", "including", "choice"]
    assert names(files, "easy") == ["including", "plain"]
    [including] = files.tasks(["including"])
    assert including.config["dataset_path"] == "org/questions"
    assert including.config["test_split"] == "val"
    [plain] = files.tasks(["plain"])
    assert plain.config["process_results"] == Function("plain", folder / "utils.py")


def test_the_first_folders_task_counts(folder, tmp_path):
    (tmp_path / "mine.yaml").write_text("task: plain\ntest_split: mine\n")
    [plain] = TaskFiles([tmp_path, folder]).tasks(["plain"])
    assert plain.config["test_split"] == "mine"


def test_an_unknown_task_is_named_with_the_nearest(folder):
    with pytest.raises(CachekdError, match=r"no such benchmark(.|\n)*did you mean plain\?"):
        TaskFiles([folder]).tasks(["plainx"])


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("task: x\n  y: [")
    with pytest.raises(CachekdError, match=r"a task file cannot be read(.|\n)*bad\.yaml"):
        TaskFiles([tmp_path]).tasks(["x"])
    (tmp_path / "bad.yaml").write_text("task: x\ninclude: nowhere\n")
    with pytest.raises(CachekdError, match=r"a task file cannot be read(.|\n)*nowhere"):
        TaskFiles([tmp_path]).tasks(["x"])


def test_a_file_that_includes_itself_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("task: x\ninclude: _part\n")
    (tmp_path / "_part").write_text("include: a.yaml\n")
    with pytest.raises(CachekdError, match=r"a task file cannot be read(.|\n)*includes itself"):
        TaskFiles([tmp_path]).tasks(["x"])


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "gone.yaml").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CachekdError, match=r"a task file cannot be read(.|\n)*gone\.yaml"):
        TaskFiles([tmp_path]).tasks(["x"])


@pytest.mark.parametrize("code", [b"def broken(:\n", b"x = '\xff'\n", b"\0"])
def test_code_that_is_no_python_is_named(tmp_path, code):
    (tmp_path / "x.yaml").write_text("task: x\nprocess_results: !function mine.score\n")
    (tmp_path / "mine.py").write_bytes(code)
    tasks = TaskFiles([tmp_path]).tasks(["x"])
    with pytest.raises(CachekdError, match=r"the code of a task cannot be read(.|\n)*mine\.py"):
        require_scorable(tasks, logged_in=False, own_data=[])


def test_what_cannot_be_scored_is_known_from_the_files(folder):
    files = TaskFiles([folder])
    for task in files.by_name.values():
        if task.members:
            continue
        why = obstacle(task, logged_in=False)
        if task.name in WHY:
            assert WHY[task.name] in why
        else:
            assert why is None, task.name


def test_a_login_or_data_of_ones_own_takes_the_place_of_the_other(folder):
    [task] = TaskFiles([folder]).tasks(["login"])
    assert obstacle(task, logged_in=True) is None
    assert obstacle(task, logged_in=False, own_data=True) is None
    assert fetches_in_code(task)
    assert not fetches_in_code(TaskFiles([folder]).tasks(["plain"])[0])


def test_all_that_cannot_be_scored_are_refused_together(folder):
    files = TaskFiles([folder])
    tasks = files.tasks(["plain", "choice", "login"])
    with pytest.raises(CachekdError) as caught:
        require_scorable(tasks, logged_in=False, own_data=[])
    told = str(caught.value)
    assert all(f"\n  {name}: " in told and WHY[name] in told for name in ("choice", "login"))
    assert "`hf auth login`, or --benchmark-data login=FOLDER" in told
    assert "--benchmarks plain" in told
    require_scorable(files.tasks(["plain", "login"]), logged_in=False, own_data=["login"])


def test_our_own_tasks_can_be_scored():
    files = TaskFiles([OWN_TASKS])
    assert files.by_name
    assert all(obstacle(task, logged_in=False) is None for task in files.by_name.values())


def test_without_lmms_eval_the_commands_are_told_that_make_the_environment(student_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)  # as if it were not installed
    monkeypatch.setattr("cachekd.lmms.environment.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["eval", str(student_path), "--benchmarks", "pope"])
    assert isinstance(result.exception, CachekdError)
    told = str(result.exception)
    assert "python3 -m venv" in told
    assert "pip install 'cachekd[benchmarks]'" in told
    assert "pip uninstall -y torchvision" in told


def test_another_version_of_lmms_eval_is_refused(monkeypatch, tmp_path):
    from importlib.machinery import ModuleSpec

    from cachekd.lmms import environment

    found = ModuleSpec("lmms_eval", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(environment, "find_spec", lambda name: found)
    monkeypatch.setattr(environment, "version", lambda name: "0.8.0")
    with pytest.raises(CachekdError, match=r"another version of lmms-eval(.|\n)*lmms-eval==0\.7\.3"):
        environment.require_lmms_eval()
    monkeypatch.setattr(environment, "version", lambda name: environment.LMMS_EVAL)
    assert environment.require_lmms_eval() == tmp_path / "tasks"
