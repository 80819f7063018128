"""What people's data sets are like: ids that repeat or are missing, odd names, files that are no data.

And one set of options for all commands.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cachekd.config import DataOptions
from cachekd.data import open_samples
from cachekd.data.sample import unique_keys
from cachekd.errors import BadSample, CachekdError
from cachekd_cli.main import app
from tiny import noise_image, png_bytes, write_tar

TURNS = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]


def turns(answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": "what?"}, {"from": "gpt", "value": answer}]


def write_json(path: Path, records: list[dict], *, lines: bool = False, bom: bool = False) -> Path:
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8-sig" if bom else "utf-8")
    return path


def answers(samples) -> list[str]:
    return [samples[index].questions[0][1] for index in range(len(samples))]


def by_hand(ids: list[str | None]) -> list[str]:
    """The rule, word by word: the n-th of equal ones is `id#n`, past what the data themselves write so."""
    written = {str(index).zfill(8) if key is None else key for index, key in enumerate(ids)}
    keys: list[str] = []
    for index, key in enumerate(ids):
        name = str(index).zfill(8) if key is None else key
        if name not in keys:
            keys.append(name)
            continue
        number = 2
        while f"{name}#{number}" in written or f"{name}#{number}" in keys:
            number += 1
        keys.append(f"{name}#{number}")
    return keys


@given(st.lists(st.one_of(st.none(), st.sampled_from(["a", "b", "a#2", "a#2#2", "00000001"])), max_size=12))
def test_every_sample_has_a_key_of_its_own_by_a_rule_that_can_be_said(ids):
    keys, repeated = unique_keys(ids, "here")
    assert keys == by_hand(ids)
    assert len(set(keys)) == len(ids)
    assert repeated == len(ids) - len({str(i).zfill(8) if key is None else key for i, key in enumerate(ids)})


def records(ids: list[object]) -> list[dict]:
    return [
        {**({} if key is None else {"id": key}), "conversations": turns(f"answer {index}")}
        for index, key in enumerate(ids)
    ]


def test_repeated_and_missing_ids_in_every_form(tmp_path):
    ids = ["a", "b", "a", None, "a"]
    expected = ["a", "b", "a#2", "00000003", "a#3"]
    file = write_json(tmp_path / "d.json", records(ids))
    table = tmp_path / "d.parquet"
    Dataset.from_list(records(ids)).to_parquet(table)
    for data in (file, table):
        samples = open_samples(data)
        assert samples.keys == expected
        assert samples.notes.repeated_keys == 2
        assert answers(samples) == [f"answer {index}" for index in range(5)]
        assert open_samples(data, limit=3).keys == expected[:3]
        assert sorted(open_samples(data, shuffle_seed=1).keys) == sorted(expected)


def test_repeated_names_in_tars(tmp_path):
    def member(name: str, answer: str) -> list[tuple[str, bytes]]:
        text = json.dumps({"conversations": turns(answer)}).encode()
        return [(f"{name}.png", png_bytes(noise_image(len(answer)))), (f"{name}.json", text)]

    write_tar(tmp_path / "d" / "0.tar", [*member("a", "1"), *member("b", "22"), *member("a", "333")])
    write_tar(tmp_path / "d" / "1.tar", [*member("b", "4444"), *member("c", "55555")])
    samples = open_samples(tmp_path / "d")
    assert samples.keys == ["a", "b", "a#2", "b#2", "c"]
    assert answers(samples) == ["1", "22", "333", "4444", "55555"]
    for index in range(5):  # each with its own picture
        assert samples[index].images[0].tobytes() == noise_image(index + 1).tobytes()
    assert samples.notes.repeated_keys == 2


def test_another_field_is_the_key_or_the_rows_number(tmp_path):
    rows = [{"id": "x", "meta": {"uid": 7 - index}, "conversations": turns(str(index))} for index in range(3)]
    file = write_json(tmp_path / "d.jsonl", rows, lines=True)
    table = tmp_path / "d.parquet"
    Dataset.from_list(rows).to_parquet(table)
    tar = write_tar(
        tmp_path / "d.tar", [(f"m{number}.json", json.dumps(row).encode()) for number, row in enumerate(rows)]
    )
    for data in (file, table, tar):
        assert open_samples(data, key="meta.uid").keys == ["7", "6", "5"]
        assert open_samples(data, key="index").keys == ["00000000", "00000001", "00000002"]
        with pytest.raises(CachekdError, match=r"no record has the field 'meta\.udi'"):
            open_samples(data, key="meta.udi")
        with pytest.raises(CachekdError, match=r"no record has the field 'id\.x'"):
            open_samples(data, key="id.x")
    assert open_samples(file).keys == ["x", "x#2", "x#3"]
    assert open_samples(tar).keys == ["m0", "m1", "m2"]


MAP = """
def named(record):
    return {"id": "my-" + str(record["number"]), "conversations": record["turns"]}

def unnamed(record):
    return {"conversations": record["turns"]}

def uid(record):
    return {"uid": "u" + str(record["number"]), "conversations": record["turns"]}
"""


def test_keys_are_taken_after_the_map(tmp_path, monkeypatch):
    (tmp_path / "keys_after_map.py").write_text(MAP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    rows = [{"number": number, "turns": turns(str(number))} for number in (4, 5)]
    file = write_json(tmp_path / "d.json", rows)
    assert open_samples(file, map="keys_after_map:named").keys == ["my-4", "my-5"]
    assert open_samples(file, map="keys_after_map:unnamed").keys == ["00000000", "00000001"]
    assert open_samples(file, map="keys_after_map:uid", key="uid").keys == ["u4", "u5"]
    with_ids = write_json(tmp_path / "e.json", [{"id": f"raw-{row['number']}", **row} for row in rows])
    assert open_samples(with_ids, map="keys_after_map:unnamed").keys == ["raw-4", "raw-5"]
    table = tmp_path / "d.parquet"
    Dataset.from_list(rows).to_parquet(table)
    assert open_samples(table, map="keys_after_map:uid", key="uid").keys == ["u4", "u5"]


@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("lines", [False, True])
def test_json_is_read_by_what_it_holds(tmp_path, bom, suffix, lines):
    path = write_json(tmp_path / f"d{suffix}", records(["a", "b"]), lines=lines, bom=bom)
    samples = open_samples(path)
    assert samples.keys == ["a", "b"]
    assert answers(samples) == ["answer 0", "answer 1"]


def test_one_record_over_several_lines_is_a_record(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps(records(["a"])[0], indent=2))
    assert answers(open_samples(tmp_path / "d.json")) == ["answer 0"]


def test_an_empty_id_and_no_number_are_no_ids():
    assert unique_keys(["", float("nan"), "", "a", 0], "here").keys == [
        "00000000",
        "00000001",
        "00000002",
        "a",
        "0",
    ]


def test_a_folder_of_one_json_is_that_file(tmp_path):
    noise_image(3).save(tmp_path / "0.png")
    write_json(tmp_path / "train.json", [{"id": 1, "image": "0.png", "conversations": TURNS}])
    (tmp_path / "._train.json").write_text("a Mac's")
    samples = open_samples(tmp_path)
    assert samples[0].images[0].tobytes() == noise_image(3).tobytes()
    write_json(tmp_path / "val.json", records(["a"]))
    with pytest.raises(CachekdError, match="several data files") as caught:
        open_samples(tmp_path)
    assert "train.json, val.json" in str(caught.value)


def test_relative_pictures_start_at_the_image_root(tmp_path):
    (tmp_path / "pictures").mkdir()
    noise_image(5).save(tmp_path / "pictures" / "0.png")
    rows = [{"id": "a", "image": "0.png", "conversations": TURNS}]
    file = write_json(tmp_path / "texts" / "d.json", rows)
    table = tmp_path / "texts" / "d.parquet"
    Dataset.from_list(rows).to_parquet(table)
    for data in (file, table):
        with pytest.raises(CachekdError, match=r"missing|no such file"):
            open_samples(data)[0]
        read = open_samples(data, image_root=tmp_path / "pictures")[0]
        assert read.images[0].tobytes() == noise_image(5).tobytes()
    with pytest.raises(CachekdError, match="image root is no folder"):
        open_samples(file, image_root=tmp_path / "nowhere")


def test_pictures_of_other_fields_in_every_form(tmp_path):
    red, green = noise_image(1), noise_image(2)
    for name, image in (("red.png", red), ("green.png", green)):
        image.save(tmp_path / name)
    rows = [
        {"id": "two", "view": {"left": "red.png"}, "right": ["green.png"], "conversations": TURNS},
        {"id": "none", "view": None, "right": None, "conversations": TURNS},
    ]
    file = write_json(tmp_path / "d.json", rows)
    table = tmp_path / "d.parquet"
    Dataset.from_list(rows).to_parquet(table)
    text = json.dumps({"conversations": TURNS}).encode()
    members = [("two.left.png", png_bytes(red)), ("two.right.png", png_bytes(green)), ("two.json", text)]
    tar = write_tar(tmp_path / "d.tar", [*members, ("none.json", text)])
    for data, fields in ((file, ("view.left", "right")), (table, ("view.left", "right"))):
        samples = open_samples(data, image_field=fields)
        assert [image.tobytes() for image in samples[0].images] == [red.tobytes(), green.tobytes()]
        assert [samples.preview(index).images for index in range(2)] == [2, 0]
        assert samples[1].images == ()
        assert [image.tobytes() for image in open_samples(data, image_field="right")[0].images] == [
            green.tobytes()
        ]
        with pytest.raises(BadSample, match="image under another name"):
            open_samples(data)[0]
    samples = open_samples(tar, image_field=["right.png", "left.png"])
    assert [image.tobytes() for image in samples[0].images] == [green.tobytes(), red.tobytes()]
    assert [samples.preview(index).images for index in range(2)] == [2, 0]
    for data, message in ((file, "no record has the field 'rihgt'"), (table, "lacks columns")):
        with pytest.raises(CachekdError, match=message):
            open_samples(data, image_field="rihgt")


def test_a_field_that_is_mistyped_makes_no_texts(tmp_path):
    """Whatever the form, and however deep the name."""
    red, text = noise_image(1), json.dumps({"conversations": TURNS}).encode()
    red.save(tmp_path / "red.png")
    half = [
        {"id": "a", "picture": "red.png", "meta": {"pic": "red.png"}, "conversations": TURNS},
        {"id": "b", "image": "red.png", "conversations": TURNS},
    ]
    file = write_json(tmp_path / "half.json", half)
    samples = open_samples(file, image_field="picture")
    assert len(samples[0].images) == 1
    with pytest.raises(BadSample, match="image under another name") as caught:
        samples[1]
    assert "--image-field picture --image-field image" in str(caught.value)
    assert len(open_samples(file, image_field=["picture", "image"])[1].images) == 1
    tar = write_tar(
        tmp_path / "d.tar",
        [
            ("x.png", png_bytes(red)),
            ("x.json", text),
            ("y.Left.png", png_bytes(red)),
            ("y.json", text),
        ],
    )
    for field, texts in (("pgn", (0, 1)), ("left.png", (0,)), ("Left.PNG", (0,)), ("png", (1,))):
        samples = open_samples(tar, image_field=field)
        for index in range(2):
            if index in texts:
                with pytest.raises(BadSample, match="image under another name"):
                    samples[index]
            else:
                assert len(samples[index].images) == 1
    table = tmp_path / "d.parquet"
    Dataset.from_list(half[:1]).to_parquet(table)
    assert len(open_samples(table, image_field="meta.pic")[0].images) == 1
    with pytest.raises(CachekdError, match="lacks columns"):
        open_samples(table, image_field="meta.pics")


def test_a_second_picture_of_a_tars_sample_is_not_dropped(tmp_path):
    text = json.dumps({"conversations": TURNS}).encode()
    picture, mask = png_bytes(noise_image(1)), png_bytes(noise_image(2))
    tar = write_tar(tmp_path / "d.tar", [("a.png", picture), ("a.mask.png", mask), ("a.json", text)])
    with pytest.raises(BadSample, match="image under another name") as caught:
        open_samples(tar)[0]
    assert caught.value.found == "a.mask.png"
    assert len(open_samples(tar, image_field="png")[0].images) == 1
    assert len(open_samples(tar, image_field=["png", "mask.png"])[0].images) == 2


def test_pictures_that_a_tars_json_names_start_at_the_image_root(tmp_path):
    noise_image(5).save(tmp_path / "0.png")
    text = json.dumps({"image": "0.png", "conversations": TURNS}).encode()
    tar = write_tar(tmp_path / "d.tar", [("a.json", text)])
    with pytest.raises(BadSample, match="has no image"):
        open_samples(tar)[0]
    (image,) = open_samples(tar, image_root=tmp_path)[0].images
    assert image.tobytes() == noise_image(5).tobytes()


def test_files_that_are_no_data_are_left_out_of_tars_and_counted(tmp_path):
    text = json.dumps({"conversations": TURNS}).encode()
    junk = ["._a.json", "sub/._a.png", ".DS_Store", "LICENSE", "README.md", "sub/NOTICE.txt", "Thumbs.db"]
    members = [(junk[0], b"\0"), ("a.json", text), *((name, b"\0") for name in junk[1:])]
    tar = write_tar(tmp_path / "d.tar", members)
    samples = open_samples(tar)
    assert samples.keys == ["a"]
    assert samples.notes.other_files == tuple(f"{name} in {tar}" for name in junk)
    with pytest.raises(CachekdError, match="data set is empty") as caught:
        open_samples(write_tar(tmp_path / "e.tar", [("._a.json", b"")]))
    assert "1 files that are no data, such as ._a.json" in str(caught.value)
    with pytest.raises(CachekdError, match="no extension"):
        open_samples(write_tar(tmp_path / "f.tar", [("a.json", text), ("0001", b"a picture, perhaps")]))


DATA_COMMANDS = ("check", "dump", "train", "eval", "verify", "peek", "bind", "export")


@pytest.mark.parametrize("name", DATA_COMMANDS)
def test_every_command_that_reads_data_takes_all_options_of_data(name):
    parameters = typer.main.get_command(app).commands[name].params
    options = [option for parameter in parameters for option in parameter.opts]
    for field in DataOptions.model_fields:
        assert options.count(f"--{field.replace('_', '-')}") == 1


@pytest.mark.parametrize("name", ["train", "eval"])
def test_an_address_is_no_path(name, student_path, tmp_path):
    """Of which `http://` would become `http:/`."""
    url = "http://127.0.0.1:9/d.tar"  # where nobody answers
    out = ["--out", str(tmp_path / "run"), "--lambda-align", "0", "--lambda-vsd", "0"]
    own = ["--student", str(student_path), *out] if name == "train" else [str(student_path)]
    done = CliRunner().invoke(app, [name, *own, "--data", url])
    assert isinstance(done.exception, CachekdError)
    assert done.exception.where == url
