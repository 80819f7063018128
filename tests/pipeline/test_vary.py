"""What varies in a pipeline: its points have the settings that the file says, and each step is done once."""

from __future__ import annotations

import itertools
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cachekd.config.losses import DBiLD
from cachekd.errors import CachekdError
from cachekd.pipeline import PipelineConfig, Sweep, expand, plan_steps, read_pipeline
from cachekd.pipeline.axes import text_of
from cachekd.pipeline.select import choose, labels_of

CE = {"lambda_align": 0, "lambda_vsd": 0}


def pipeline(**others: Any) -> dict[str, Any]:
    return {
        "out": "runs/p",
        "defaults": {"teacher": "m/teacher", "student": "m/student", "data": "d/train"},
        "steps": [
            {"step": "dump", "name": "cache"},
            {"step": "train", "name": "student"},
            {"step": "eval", "name": "scores", "data": "d/test"},
        ],
    } | others


def expanded(**others: Any) -> Sweep:
    return expand(PipelineConfig(**pipeline(**others)))


def folders(sweep: Sweep) -> dict[str, dict[str, str]]:
    """By each point's name, the folder of each of its steps in the pipeline's."""
    return {
        point.name: {
            name: step.out.relative_to("runs/p").parent.as_posix() for name, step in point.steps.items()
        }
        for point in sweep.points
    }


def test_a_file_that_varies_in_nothing_is_one_point_as_planned():
    config = PipelineConfig(**pipeline())
    sweep = expand(config)
    [point], [group] = sweep.points, sweep.groups.values()
    assert (sweep.varies, point.name, group.label, group.out) == (False, "", "", Path("runs/p"))
    assert list(group.steps.values()) == plan_steps(config)
    assert point.steps == group.steps


def test_each_step_is_in_the_folder_of_the_values_that_reach_it():
    sweep = expanded(
        seeds=[0, 7],
        vary={
            "method": {"ce": {"student": CE}, "align": {"student": {"lambda_vsd": 0}}, "switch-kd": {}},
            "student.limit": [250, 1000],
        },
    )
    found = folders(sweep)
    assert list(found)[:7] == [
        "ce,limit=250/seed-0",
        "ce,limit=1000/seed-0",
        "align,limit=250/seed-0",
        "align,limit=1000/seed-0",
        "switch-kd,limit=250/seed-0",
        "switch-kd,limit=1000/seed-0",
        "ce,limit=250/seed-7",
    ]
    own = "align,limit=250/seed-7"
    assert found[own] == {"cache": ".", "student": own, "scores": own}
    # The file as it stands: no value of `method` reaches its steps.
    plain = "limit=250/seed-0"
    assert found["switch-kd,limit=250/seed-0"] == {"cache": ".", "student": plain, "scores": plain}
    point = next(one for one in sweep.points if one.name == own)
    assert point.variant == {"method": "align", "student.limit": "limit=250"}
    student, scores = point.steps["student"].config, point.steps["scores"].config
    assert (student.seed, student.limit, student.lambda_align, student.lambda_vsd) == (7, 250, 1.0, 0.0)
    assert (student.cache, student.teacher) == ("runs/p/cache", None)
    assert scores.models == [f"runs/p/{own}/student"]
    assert sweep.groups[own].needs == {""}
    assert list(sweep.groups[own].steps) == ["student", "scores"]


def test_a_dump_is_done_once_for_each_teacher_and_a_run_without_one_for_all():
    sweep = expanded(
        vary={
            "method": {"ce": {"student": CE}, "full": {}},
            "teacher": {"small": {"defaults": {"teacher": "m/s"}}, "large": {"defaults": {"teacher": "m/l"}}},
        }
    )
    assert folders(sweep) == {
        "ce,small": {"cache": "small", "student": "ce", "scores": "ce,small"},
        "ce,large": {"cache": "large", "student": "ce", "scores": "ce,large"},
        "full,small": {"cache": "small", "student": "small", "scores": "small"},
        "full,large": {"cache": "large", "student": "large", "scores": "large"},
    }
    assert {label: group.needs for label, group in sweep.groups.items()} == {
        "small": set(),
        "ce": set(),
        "ce,small": {"ce"},
        "large": set(),
        "ce,large": {"ce"},
    }


def test_a_loss_and_its_settings_reach_no_run_whose_term_is_off():
    methods = {
        "ce": {"student": CE},
        "align": {"student": {"lambda_vsd": 0}},
        "vsd": {"student": {"lambda_align": 0}},
    }
    sweep = expanded(
        vary={
            "method": methods,
            "student.align": ["jsd", {"loss": "mse"}],
            "student.vsd_every": [1, 2],
            "defaults.train.temperature": [1, 3],
        }
    )
    found = {name: steps["student"] for name, steps in folders(sweep).items()}
    assert len(found) == 24
    assert {folder for name, folder in found.items() if name.startswith("ce,")} == {"ce"}
    assert {folder for name, folder in found.items() if name.startswith("align,")} == {
        "align,align=jsd,temperature=1",
        "align,align=jsd,temperature=3",
        "align,align=mse",  # which has no temperature
    }
    assert {folder for name, folder in found.items() if name.startswith("vsd,")} == {
        f"vsd,vsd_every={every},temperature={temperature}" for every in (1, 2) for temperature in (1, 3)
    }
    ce = sweep.points[0].steps["student"].config
    assert (ce.align, ce.temperature, ce.vsd_every) == (DBiLD(), 3.0, 1)
    with pytest.raises(CachekdError, match="changes no step"):
        expanded(vary={"method": {"ce": {"student": CE}}, "student.vsd": ["jsd", "mse"]})


def test_what_a_value_of_defaults_does_not_reach_is_shared():
    """A step's own setting and its stage come before `defaults`."""
    said = pipeline()
    said["steps"][1:2] = [
        {"step": "train", "name": "student", "stage": "sft"},
        {"step": "train", "name": "own", "student": "m/student", "epochs": 9, "lambda_vsd": 0},
        {"step": "train", "name": "next", "stage": "dft"},
    ]
    said["steps"].pop()
    train = {"defaults": {"train": {"lambda_align": 0.5}}}
    sweep = expanded(steps=said["steps"], vary={"weight": {"half": train}, "defaults.train.epochs": [1, 2]})
    assert folders(sweep)["half,epochs=2"] == {
        "cache": ".",
        "student": "epochs=2",  # whose lambda_align is that of its stage
        "own": "half",  # whose epochs are its own
        "next": "half,epochs=2",  # `half` reaches it through `own`, whose student it goes on with
    }
    following = sweep.points[-1].steps["next"]
    assert (following.continues, following.config.student) == ("own", "runs/p/half/own")


def test_values_in_defaults_train_are_merged_with_the_files():
    said = pipeline()
    said["defaults"]["train"] = {"epochs": 5, "batch_size": 7}
    sweep = expanded(**said | {"vary": {"a": {"long": {"defaults": {"train": {"epochs": 50}}}}}})
    config = sweep.points[0].steps["student"].config
    assert (config.epochs, config.batch_size) == (50, 7)


def test_a_path_that_varies_is_expanded_as_any_other(monkeypatch):
    monkeypatch.setenv("MODELS", "/m")
    sweep = expanded(vary={"defaults.teacher": ["$MODELS/a", "$MODELS/b"]})
    assert [point.steps["cache"].config.teacher for point in sweep.points] == ["/m/a", "/m/b"]
    assert sweep.groups.keys() == {"teacher=a", "teacher=b"}


def test_a_seed_in_a_text_is_replaced():
    said = pipeline(seeds=[3, 4])
    said["steps"][0]["data"] = "d/train-{seed}.json"
    said["steps"][2]["data"] = "d/{notseed}.json"
    sweep = expanded(**said)
    assert [point.steps["cache"].config.data for point in sweep.points] == [
        "d/train-3.json",
        "d/train-4.json",
    ]
    assert sweep.groups.keys() == {"seed-3", "seed-4"}
    assert sweep.points[0].steps["scores"].config.data == "d/{notseed}.json"
    assert [point.steps["student"].config.seed for point in sweep.points] == [3, 4]


def test_a_later_value_axis_or_seed_leaves_every_folder_where_it_is():
    method = {"ce": {"student": CE}, "full": {}}
    before = folders(expanded(seeds=2, vary={"method": method, "student.limit": [5]}))
    tailless = {"cache": {"tail": "none"}}  # a value that reaches a step which no other of its axis does
    after = folders(expanded(seeds=3, vary={"method": method | {"none": tailless}, "student.limit": [5, 9]}))
    assert {name: after[name] for name in before} == before
    assert after["none,limit=5/seed-0"]["cache"] == "none"
    another = {"as-before": {}, "long": {"student": {"epochs": 9}}}
    wider = folders(expanded(seeds=2, vary={"method": method, "student.limit": [5], "length": another}))
    for name, steps in before.items():
        values, _, seed = name.partition("/")
        assert wider[f"{values},as-before/{seed}"] == steps


def test_a_file_as_it_stands_shares_the_dumps_folder_and_comes_with_it():
    """Whatever place it has among the values: no value reaches its steps."""
    ce, plain = {"student": CE}, {}
    for method in ({"ce": ce, "full": plain}, {"full": plain, "ce": ce}):
        sweep = expanded(
            vary={"method": method, "teacher": {"t": {"defaults": {"teacher": "m/t"}}, "same": {}}}
        )
        assert {label: list(group.steps) for label, group in sweep.groups.items()} == {
            "": ["cache", "student", "scores"],
            "t": ["cache", "student", "scores"],
            "ce": ["student", "scores"],
            "ce,t": ["scores"],
        }
        assert sweep.groups["ce"].needs == set()
        assert sweep.groups["ce,t"].needs == {"ce"}


def test_null_in_defaults_is_a_value():
    said = pipeline(vary={"size": {"all": {"defaults": {"limit": None}}, "some": {}}})
    said["defaults"]["limit"] = 100
    sweep = expanded(**said)
    assert {label: group.steps["student"].config.limit for label, group in sweep.groups.items()} == {
        "": 100,
        "all": None,
    }


def test_no_one_means_a_million_runs_or_folders_without_an_end():
    values = [round(1 + index / 100, 2) for index in range(100)]
    axes = {f"student.{name}": values for name in ("epochs", "temperature", "learning_rate")}
    with pytest.raises(CachekdError, match="more runs") as caught:
        expanded(vary=axes)
    assert caught.value.found.startswith("1,000,000: ")
    long = {f"a{number}": {f"{number}" * 50: {"student": {name: 2}}} for number, name in enumerate(VALUES)}
    with pytest.raises(CachekdError, match="too long"):
        expanded(vary=long)


# ---- against settings that a test works out by itself


VALUES = {
    "epochs": [1.0, 2.0],
    "limit": [3, 4, None],
    "lambda_vsd": [0.0, 1.0],
    "lambda_align": [0.0, 1.0],
    "temperature": [2.0],
}
TARGETS = ["one", "two", "defaults.train", "defaults"]


@st.composite
def said_files(draw: st.DrawFn) -> dict[str, Any]:
    """A file of two train steps, and axes that share no setting."""
    free = [
        (target, name)
        for target in TARGETS
        for name in VALUES
        if target != "defaults" or name == "limit"
        if target != "defaults.train" or name != "limit"
    ]
    axes: dict[str, Any] = {}
    for number in range(draw(st.integers(0, 3))):
        paths = [free.pop(draw(st.integers(0, len(free) - 1))) for _ in range(draw(st.integers(1, 2)))]
        if len(paths) == 1 and draw(st.booleans()):
            (target, name), values = paths[0], VALUES[paths[0][1]]
            axes[f"{target}.{name}"] = draw(st.lists(st.sampled_from(values), min_size=1, unique=True))
            continue
        empty = draw(st.integers(0, 3))
        axes[f"axis{number}"] = {
            f"v{number}-{index}": {} if index == empty else _variant(draw, paths)
            for index in range(draw(st.integers(2, 3)))
        }
    said = pipeline(vary=axes)
    said["steps"][1:2] = [
        {"step": "train", "name": "one", "epochs": 3},
        {"step": "train", "name": "two", "student": draw(st.sampled_from(["one", "m/other"]))},
    ]
    if draw(st.booleans()):
        said["seeds"] = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))
    return said


def _variant(draw: st.DrawFn, paths: list[tuple[str, str]]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for target, name in paths:
        inner = said
        for part in target.split("."):
            inner = inner.setdefault(part, {})
        inner[name] = draw(st.sampled_from(VALUES[name]))
    return said


def by_hand(said: dict[str, Any], values: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """A file that says of itself what some values and a seed make of it."""
    made = {name: deepcopy(said[name]) for name in ("out", "defaults", "steps")}
    for axis, (_, value) in values.items():
        parts = value
        if isinstance(said["vary"][axis], list):
            target, _, name = axis.rpartition(".")
            first, *rest = target.split(".")
            parts = {first: {rest[0]: {name: value}} if rest else {name: value}}
        for target, sets in parts.items():
            if target == "defaults":
                train = made["defaults"].get("train", {}) | sets.get("train", {})
                made["defaults"] |= sets | ({"train": train} if train else {})
            else:
                next(step for step in made["steps"] if step["name"] == target).update(sets)
    for step in made["steps"]:
        if step["step"] == "train" and seed is not None:
            step["seed"] = seed
    return made


@settings(max_examples=60, deadline=None)
@given(said=said_files())
def test_every_point_has_the_settings_that_the_file_says(said):
    try:
        sweep = expand(PipelineConfig(**said))
    except CachekdError as error:
        assert "changes no step" in error.problem or "are the same" in error.problem  # noqa: PT017
        return
    choices = [
        [(axis, (name, values[name] if isinstance(values, dict) else name)) for name in values]
        for axis, values in said["vary"].items()
    ]
    expected = [
        by_hand(said, dict(values), seed)
        for seed in said.get("seeds", [None])
        for values in itertools.product(*choices)
    ]
    assert len(expected) == len(sweep.points)
    for alone, point in zip(expected, sweep.points, strict=True):
        steps = plan_steps(PipelineConfig(**alone), without_idle=bool(said["vary"]))
        planned = {step.name: step for step in steps}
        assert planned.keys() == point.steps.keys()
        for name, step in planned.items():
            # Another folder is all that differs, of the step and of those that it takes.
            text = json.dumps(step.config.model_dump(mode="json"))
            for other, one in point.steps.items():
                text = text.replace(f'"runs/p/{other}"', json.dumps(str(one.out)))
            assert json.loads(text) == point.steps[name].config.model_dump(mode="json")
            assert step.upstream == point.steps[name].upstream
    # Each step in one group, in one folder; what a group takes is in a group before it.
    owners: dict[Path, str] = {}
    before: set[str] = set()
    for label, group in sweep.groups.items():
        assert group.needs <= before
        before.add(label)
        for step in group.steps.values():
            assert owners.setdefault(step.out, label) == label
            assert step.out.parent == group.out
    for point in sweep.points:
        for name, step in point.steps.items():
            assert owners[step.out] == point.groups[name]
            assert sweep.groups[point.groups[name]].steps[name] == step
    assert {step.out for point in sweep.points for step in point.steps.values()} == owners.keys()


# ---- what is refused


def refused(tmp_path: Path, vary: dict[str, Any], **others: Any) -> tuple[str, list[str]]:
    """The error, and the file's lines that it names."""
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(pipeline(**others, vary=vary), sort_keys=False))
    with pytest.raises(CachekdError) as caught:
        expand(read_pipeline(path))
    text, lines = str(caught.value), path.read_text().splitlines()
    numbers = [int(part.split(",")[0].split("\n")[0]) for part in text.split("p.yaml, line ")[1:]]
    return text, [lines[number - 1].strip() for number in numbers]


@pytest.mark.parametrize(
    ("vary", "message", "line"),
    [
        ({"a": {"x": {"studnet": {"epochs": 2}}}}, r"no step 'studnet' (did you mean student?)", "studnet:"),
        ({"a": {"x": {"studnet": {}, "student": {"epochs": 2}}}}, "no step 'studnet'", "studnet: {}"),
        ({"a": {"seed-3": {"student": {"epochs": 2}}}}, "the folders of seeds", "seed-3:"),
        ({"a": {"x": {"student": {"windw": 2}}}}, "'windw' (did you mean 'window'?)", "windw: 2"),
        ({"a": {"x": {"defaults": {"train": {"windw": 2}}}}}, "(did you mean 'window'?)", "windw: 2"),
        ({"a": {"x": {"student": {"epochs": -1}}}}, "greater than 0", "epochs: -1"),
        ({"a": {"x": {"student": {"name": "y"}}}}, "what a step is does not vary", "name: y"),
        ({"student.windw": [1, 2]}, "'windw' (did you mean 'window'?)", "student.windw:"),
        ({"studnet.epochs": [1, 2]}, "no step 'studnet'", "studnet.epochs:"),
        ({"student.epochs": [1, -2]}, "greater than 0", "- -2"),
        ({"student.epochs": [1, 1]}, "two values have this name", "- 1"),
        ({"student.training": [{"a": 1}, {"b": 1}]}, "to name it", "- b: 1"),
        ({"epochs": [1, 2]}, "STEP.SETTING: [..]", "epochs:"),
        ({"a": {}}, "at least one value", "a: {}"),
        ({"a": {"x/y": {"student": {"epochs": 2}}}}, "made of letters", "x/y:"),
        ({"a": {"student": {"student": {"epochs": 2}}}}, "a step has this name too", "student:"),
        ({"a": {"x": {"student": {"epochs": 2}}}, "student.epochs": [1]}, "axis 'a' sets it too", "- 1"),
        ({"a": 3}, "a mapping is needed", "a: 3"),
        ({"a": {"x": None, "y": {"student": CE}}}, "one of nothing is {}", "x: null"),
        ({"student": {"epochs": [1, 2]}}, "a mapping is needed", "epochs:"),
        (
            {"switch": {False: {"student": CE}, "on": {}}},
            "'vary.switch': a name is a text: write it in",
            "switch:",
        ),
        (
            {"student.align.temperature": [1, 2]},
            "within student.align varies with all of it",
            "student.align.",
        ),
        ({"a": {"x": {}}}, "value 'x' of axis 'a' changes no step", "x: {}"),
        ({"a": {"x": {}, "y": {"defaults": {"workers": 1}}}}, "'x' and 'y' of axis 'a' are the same", "y:"),
        (
            {"a": {"x": {"student": {"epochs": 2}}, "y": {"student": {"epochs": 2}}}},
            "'x' and 'y' of axis 'a' are the same",
            "y:",
        ),
        ({"a": {"x": {"student": {"seed": 2}}}}, "`seeds` sets it", "seed: 2"),
    ],
)
def test_what_is_wrong_with_an_axis_is_said_with_its_line(tmp_path, vary, message, line):
    text, lines = refused(tmp_path, vary, seeds=2)
    assert message in text
    assert [found.startswith(line) for found in lines] == [True]


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    text, lines = refused(
        tmp_path,
        {
            "a": {"x": {"studnet": {"epochs": 2}}, "cache": {"student": {"epochs": 0}}},
            "student.windw": [1, 2],
        },
        seeds=[1, 1],
    )
    assert text.startswith("5 settings are wrong:")
    assert sorted(lines) == ["cache:", "epochs: 0", "seeds:", "student.windw:", "studnet:"]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"seeds": 0}, "from 1 to 1,000 seeds"),
        ({"seeds": 10**9}, "from 1 to 1,000 seeds"),
        ({"seeds": []}, "at least 1 item"),
        ({"seeds": [0, 0]}, "named twice"),
        ({"seeds": "5"}, "how many, such as 5, or a list of them"),
        ({"seeds": 1, "baseline": "cee"}, "no axis has such a value (did you mean ce?): they have ce"),
    ],
)
def test_seeds_and_a_baseline_are_such(tmp_path, others, message):
    text, _ = refused(tmp_path, {"a": {"ce": {"student": CE}}}, **others)
    assert message in text


def test_a_seed_beside_seeds_is_refused(tmp_path):
    said = pipeline(seeds=2)
    said["steps"][1]["seed"] = 3
    text, _ = refused(tmp_path, {}, seeds=2, steps=said["steps"])
    assert "step 'student' has a seed of its own" in text
    defaults = said["defaults"] | {"train": {"seed": 1}}
    text, _ = refused(tmp_path, {}, seeds=2, defaults=defaults)
    assert "`defaults.train` has a seed of its own" in text
    said["steps"][1] = {"step": "train", "name": "seed-1"}
    text, _ = refused(tmp_path, {}, seeds=2, steps=said["steps"])
    assert "called as the folder of a seed" in text


def test_settings_that_do_not_go_together_at_a_point_are_said_with_it(tmp_path):
    text, _ = refused(tmp_path, {"parts": {"frozen": {"student": {"trainable": ["projector"]}}}})
    assert "variant 'frozen': step 'student'" in text
    assert "L_VSD would have no gradient" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (["projector", "language_model"], "projector-language_model"),
        ("bytes=64", "bytes-64"),
        ("~/models/llava 7b/", "llava-7b"),
        (1e-05, "1e-05"),
        ("", ""),
    ],
)
def test_a_value_in_the_name_of_a_folder(value, text):
    assert text_of(value) == text


# ---- which points


def test_points_are_chosen_by_value_and_seed_and_shared_out():
    sweep = expanded(
        seeds=3,
        vary={"method": {"ce": {"student": CE}, "full": {}}, "student.limit": [5, 10]},
    )
    names = [point.name for point in sweep.points]

    def chosen(*only: str, part: str | None = None) -> list[str]:
        return [point.name for point in choose(sweep, only, part)]

    assert chosen() == names
    assert chosen("ce") == [name for name in names if name.startswith("ce,")]
    assert chosen("limit=1?", "*/seed-2") == [n for n in names if "limit=10" in n or "seed-2" in n]
    assert chosen("full,limit=5") == [f"full,limit=5/seed-{seed}" for seed in range(3)]
    assert chosen("full,limit=5/seed-1") == ["full,limit=5/seed-1"]
    assert chosen("seed-1") == [name for name in names if name.endswith("seed-1")]
    shares = [chosen(part=f"{index}/5") for index in range(5)]
    assert sorted(itertools.chain(*shares)) == sorted(names)
    assert labels_of(choose(sweep, ["ce,limit=5/seed-1"])) == {"", "ce,limit=5/seed-1"}
    for wrong in ("5/5", "1", "-1/2", "a/b", "0/0"):
        with pytest.raises(CachekdError, match="no share"):
            chosen(part=wrong)
    with pytest.raises(CachekdError, match="no run of this file") as caught:
        chosen("ce", "cee")
    assert caught.value.found == "cee"


# ---- a file that extends another


def written(folder: Path, **files: dict[str, Any]) -> Path:
    for name, values in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder / "ours.yaml"


def test_a_file_has_what_it_does_not_say_from_the_one_that_it_extends(tmp_path):
    theirs = pipeline(seeds=2, vary={"student.limit": [1, 2]})
    ours = {"extends": "theirs.yaml", "out": "runs/ours", "vary": {"student.epochs": [3.0]}}
    found = read_pipeline(written(tmp_path, theirs=theirs, ours=ours))
    whole = theirs | ours
    del whole["extends"]
    assert found.model_dump(exclude={"extends"}) == PipelineConfig(**whole).model_dump(exclude={"extends"})


def test_a_file_with_axes_of_its_own_has_not_the_others_baseline(tmp_path):
    theirs = pipeline(seeds=2, vary={"student.limit": [1, 2]}, baseline="limit=2")
    ours = {"extends": "theirs.yaml", "out": "runs/ours"}
    assert read_pipeline(written(tmp_path, theirs=theirs, ours=ours)).baseline == "limit=2"
    ours["vary"] = {"student.epochs": [3.0]}
    assert read_pipeline(written(tmp_path, theirs=theirs, ours=ours)).baseline is None


def test_a_mistake_is_told_with_its_own_file(tmp_path):
    theirs = pipeline(vary={"student.limit": [1, 2]})
    theirs["steps"][1]["epoch"] = 3
    ours = {"extends": "theirs.yaml", "out": "runs/ours", "vary": {"student.limits": [3]}}
    with pytest.raises(CachekdError) as error:
        read_pipeline(written(tmp_path, theirs=theirs, ours=ours))
    line = (tmp_path / "theirs.yaml").read_text().splitlines().index("  epoch: 3") + 1
    assert f"theirs.yaml, line {line}, step 'student'" in str(error.value)
    del theirs["steps"][1]["epoch"]
    with pytest.raises(CachekdError, match=r"ours.yaml, line 4"):
        read_pipeline(written(tmp_path, theirs=theirs, ours=ours))


@pytest.mark.parametrize(
    ("theirs", "ours", "problem"),
    [
        ({}, {}, "it needs an `out` of its own"),
        ({}, {"out": "runs/p/"}, "it needs an `out` of its own"),
        ({"extends": "ours.yaml"}, {"out": "runs/ours"}, "extends another file itself"),
        (None, {"out": "runs/ours"}, "cannot be read"),
    ],
)
def test_what_cannot_be_extended_is_refused(tmp_path, theirs, ours, problem):
    files = {} if theirs is None else {"theirs": pipeline(**theirs)}
    with pytest.raises(CachekdError, match=problem):
        read_pipeline(written(tmp_path, **files, ours={"extends": "theirs.yaml", **ours}))


def test_a_variable_in_the_path_that_is_not_set_is_told(tmp_path):
    with pytest.raises(CachekdError, match=r"setting 'extends'.*NOWHERE"):
        read_pipeline(written(tmp_path, ours={"extends": "$NOWHERE/theirs.yaml", "out": "runs/ours"}))


@pytest.mark.parametrize("path", sorted(Path("examples").glob("*/*.yaml")), ids=str)
def test_every_example_is_a_pipeline_whose_settings_go_together(path):
    if path.name != "recipe.yaml":
        assert expand(read_pipeline(path)).points
