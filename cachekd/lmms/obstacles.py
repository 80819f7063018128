"""Which benchmarks cannot be scored here, and why: known from their task files, before anything is loaded."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from cachekd.errors import CachekdError, first_line
from cachekd.lmms.task_files import Function, TaskFile, functions_in

GENERATION = "generate_until"  # the only kind of request that a student answers here
_OTHER_REQUESTS = {
    "multiple_choice": "it compares the probabilities of given answers, and students are asked to write one",
    "loglikelihood": "it compares the probabilities of given answers, and students are asked to write one",
    "generate_until_multi_round": "it asks in several rounds, each with the answer before it",
    "generate_until_agentic": "it asks in several rounds, and runs what the model calls",
    "generate_visual_cot": "it has the model draw a picture",
}
# By these names a scoring function asks another model, over the network.
_JUDGES = {
    "AzureOpenAI",
    "OpenAI",
    "VerificationPipeline",
    "evaluate_binary",
    "evaluate_comparative",
    "get_chat_response",
    "get_eval",
    "get_server",
    "openai",
    "post",  # of requests
}
_CALLED_FOR_JUDGES = ("gpt", "judge")  # metrics
# Their metric is called for a judge, and the same code can ask one, but as these use it none is asked.
_WITHOUT_A_JUDGE = {"mmbench_en_dev_static", "mmbench_cn_dev_static"}
_SCORING = ("process_results", "metric_list")
_LOADING = ("process_docs",)


def obstacle(task: TaskFile, *, logged_in: bool, own_data: bool = False) -> str | None:
    """Why a benchmark cannot be scored here; None if nothing is known against it.

    Args:
        logged_in: whether the hub knows who asks.
        own_data: whether its data are in a folder of the user's.
    """
    config = task.config
    kind = config.get("output_type", GENERATION)
    data = config.get("dataset_kwargs") or {}
    metrics = _metrics(task)
    if "class" in config:
        return "it is a Python class of its own, of which a task file says nothing"
    if kind != GENERATION:
        return _OTHER_REQUESTS.get(kind, f"its requests are of another kind, {kind}")
    if data.get("video") or "From_YouTube" in data:
        return "it asks about videos"
    if metrics and all("submission" in metric for metric in metrics):
        return "its answers are not public: it only writes a file for a server"
    if asks_a_judge(task):
        return "another model judges its answers, over the network"
    if not (logged_in or own_data) and asks_for_a_login(task):
        return "its code fetches data with a login, and there is none"
    return None


def require_scorable(tasks: Sequence[TaskFile], *, logged_in: bool, own_data: Iterable[str]) -> None:
    """Refuse benchmarks that cannot be scored here, all of them at once.

    Args:
        own_data: the benchmarks whose data are in a folder of the user's.

    Raises:
        CachekdError: there are some; each is named with its reason.
    """
    mine = set(own_data)
    found = {
        task.name: why
        for task in tasks
        if (why := obstacle(task, logged_in=logged_in, own_data=task.name in mine)) is not None
    }
    if not found:
        return
    left = [task.name for task in tasks if task.name not in found]
    private = [name for name in found if "login" in found[name]]
    folders = " ".join(f"--benchmark-data {name}=FOLDER" for name in private)
    login = f"`hf auth login`, or {folders}; or " if private else ""
    fix = f"--benchmarks {','.join(left)}" if left else "choose other benchmarks"
    static = [f"{name}_static" for name in found if f"{name}_static" in _WITHOUT_A_JUDGE]
    fix += f"; {', '.join(static)} asks no judge" if static else ""
    raise CachekdError(
        "these benchmarks cannot be scored here:" + "".join(f"\n  {n}: {why}" for n, why in found.items()),
        where="setting 'benchmarks'",
        fix=login + fix,
    )


def asks_a_judge(task: TaskFile) -> bool:
    """Whether what scores its answers leads to a call of another model, or a metric is called for one."""
    if task.name in _WITHOUT_A_JUDGE:
        return False
    if any(word in metric for metric in _metrics(task) for word in _CALLED_FOR_JUDGES):
        return True
    return any(_JUDGES & _names_behind(function) for function in _functions(task, _SCORING))


def asks_for_a_login(task: TaskFile) -> bool:
    """Whether its code, not only its file, fetches data with a login."""
    return any("token=" in _names_behind(function) for function in _functions(task, _LOADING))


def fetches_in_code(task: TaskFile) -> bool:
    """Whether its code fetches data of its own, such as pictures that its questions name."""
    return any("load_dataset" in _names_behind(function) for function in _functions(task, _LOADING))


def _metrics(task: TaskFile) -> list[str]:
    listed = task.config.get("metric_list") or []
    return [str(one.get("metric")) for one in listed if isinstance(one, dict)]


def _functions(task: TaskFile, settings: Sequence[str]) -> Iterator[Function]:
    for setting in settings:
        yield from functions_in(task.config.get(setting))


def _names_behind(function: Function) -> set[str]:
    """The names in a function and in all those of the same folder's files that it leads to.

    What leads where is told by names alone: a method counts as called where its name stands. An argument that
    asks for a login is the name "token=".
    """
    known = _definitions(function.file)
    reached: set[str] = set()
    names: set[str] = set()
    ahead = [function.name]
    while ahead:
        name = ahead.pop()
        if name in reached or name not in known:
            continue
        reached.add(name)
        names |= known[name]
        ahead += known[name]
    return names


def _definitions(file: Path) -> dict[str, set[str]]:
    """By its name, the names in each function of a file, and of the files beside it that it imports.

    Raises:
        CachekdError: one of them is no Python.
    """
    found: dict[str, set[str]] = {}
    seen: set[Path] = set()
    ahead = [file]
    while ahead:
        one = ahead.pop()
        if one in seen or not one.is_file():
            continue
        seen.add(one)
        tree = _tree(one)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                ahead.append(one.with_name(node.module.rpartition(".")[2] + ".py"))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.setdefault(node.name, set()).update(_names_in(node))
    return found


@cache
def _tree(file: Path) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in others' code
            return ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError) as error:
        raise CachekdError(
            "the code of a task cannot be read", where=str(file), found=first_line(error), fix="mend it"
        ) from None


def _names_in(function: ast.AST) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call):
            logins = (one for one in node.keywords if one.arg == "token")
            yield from ("token=" for one in logins if isinstance(one.value, ast.Constant) and one.value.value)
