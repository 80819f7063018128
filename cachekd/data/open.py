"""Open a data set by its name, of whatever kind it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cachekd.config import Data, DataOptions
from cachekd.data.records import RecordReader
from cachekd.data.sample import Samples, Subset
from cachekd.data.sources.llava_json import ReadFile, RecordFileSamples, read_llava_json
from cachekd.data.sources.tars import find_tars, is_tar
from cachekd.data.sources.webdataset import WebDatasetSamples
from cachekd.errors import BadSample, CachekdError, did_you_mean
from cachekd.paths import DATASET_DICT, is_hub_data, is_url, split_query, what_is_there

# What reads the records of a single file, by how its name ends.
FILES: dict[str, ReadFile] = {
    ".json": read_llava_json,
    ".jsonl": read_llava_json,
}
_KINDS = (*FILES, ".tar", ".parquet")
_DEPTH = ("*", "*/*", "*/*/*")
_MOST = 1_000  # entries of a folder that are looked at
FORMS = (
    f"a {' or '.join(FILES)} file in LLaVA's form, or a folder of one; a .tar, a folder of them, or a "
    "pattern as in 'train-{000..009}.tar' or 's3://bucket/*.tar'; a save_to_disk folder; a .parquet file, a "
    "folder of them, or a pattern; a data set of the hub as in 'org/name?split=train'"
)
_TABLES = (".parquet", ".arrow")


def data_in(path: Path) -> Path | None:
    """A data set somewhere in a folder that is none itself; None if there is none."""
    for pattern in _DEPTH if path.is_dir() else ():
        found = [file for file in islice(path.glob(pattern), _MOST) if file.suffix in _KINDS]
        if found:
            best = likeliest(found, path.name)
            return best if best.suffix in FILES else best.parent
    return None


def likeliest(files: Sequence[Path], name: str) -> Path:
    """The one that is called as the folder is, or train; else the first."""
    return min(files, key=lambda file: (file.stem != name, file.stem != "train", str(file)))


def open_samples(data: Data, **options: Any) -> Samples:
    """Open a data set: LLaVA JSON, WebDataset tars or Hugging Face `datasets`.

    Args:
        data: a `.json` or `.jsonl` file, or a folder of one; a `.tar`, a folder of them, a glob or brace
            pattern, or a URL or pattern of URLs that fsspec reads; a `save_to_disk` folder, parquet file,
            folder or glob, or `org/name` of the hub, with `?name=`, `split=` and `revision=` joined by `&`.
            Or all that can be said about a data set.
        options: otherwise, what else `DataOptions` has, such as `map`, `limit` and `shuffle_seed`. A map
            function is called with each raw record (a JSON entry; a row, images undecoded; a tar's
            `{"__key__", extension: bytes}`) and returns what `sample_from_record` takes.

    Raises:
        CachekdError: it does not exist, is none of these, is empty or inconsistent, or an option is bad.
    """
    said = DataOptions.of(data, **options)
    samples = _open(str(said.data), RecordReader.of(said))
    if len(samples) == 0:
        left = samples.notes.other_files
        raise CachekdError(
            "the data set is empty",
            where=said.data,
            expected="at least one sample",
            found=f"0, and {len(left)} files that are no data, such as {left[0]}" if left else 0,
        )
    if said.limit is None and said.shuffle_seed is None:
        return samples
    return Subset(samples, limit=said.limit, shuffle_seed=said.shuffle_seed)


def require_there(data: DataOptions) -> None:
    """Refuse data that cannot be reached, and a map function that is not there. Nothing is fetched, and data
    on this disk are not looked at: to open them takes no longer.

    Raises:
        CachekdError: what is missing.
    """
    import huggingface_hub
    from fsspec.core import url_to_fs

    from cachekd.data.map_function import load_map
    from cachekd.data.sources.hf_load import HfSpec, require_on_hub
    from cachekd.data.sources.tars import named_errors

    if data.map is not None:
        load_map(data.map)
    if is_url(data.data):
        first = find_tars(data.data if is_tar(data.data) else data.data.rstrip("/") + "/*.tar")[0]
        with named_errors(first, "the data cannot be reached"):
            fs, path = url_to_fs(first)
            fs.info(path)
    elif not data.is_local:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            open_samples(data)  # what was downloaded before
        else:
            require_on_hub(HfSpec.parse(*split_query(data.data)))


def _open(spec: str, reader: RecordReader) -> Samples:
    if is_url(spec):
        return WebDatasetSamples(find_tars(spec if is_tar(spec) else spec.rstrip("/") + "/*.tar"), reader)
    name, query = split_query(spec)
    path, exists = Path(name), os.path.exists(name)  # unlike Path's, this takes a name that is too long
    tars = sorted(str(tar) for tar in path.glob("*.tar")) if exists and path.is_dir() else []
    if _has_tables(path, tars) if exists else name.endswith(_TABLES) or is_hub_data(name):
        return _open_hugging_face(name, query, reader)
    if query:
        raise CachekdError(
            "options are for Hugging Face data sets only", where=name, expected=FORMS, found=f"?{query}"
        )
    if exists and not tars and (file := _record_file(path)) is not None:
        return RecordFileSamples(file, FILES[file.suffix], reader.beside(file.parent))
    if tars or (is_tar(name) and (exists or _is_pattern(name))):
        return WebDatasetSamples(tars or find_tars(name), reader)
    if exists:
        raise CachekdError("no data found", where=name, expected=FORMS, fix=did_you_mean(data_in(path)))
    found, fix = what_is_there(name)
    raise CachekdError("the data set does not exist", where=name, expected=FORMS, found=found, fix=fix)


def _record_file(path: Path) -> Path | None:
    """The file, or the only one of a folder; None where there is none.

    Raises:
        CachekdError: the folder has several.
    """
    if not path.is_dir():
        return path if path.suffix in FILES else None
    here = sorted(file for file in path.iterdir() if file.suffix in FILES and not file.name.startswith("."))
    if len(here) > 1:
        raise CachekdError(
            "the folder holds several data files",
            where=str(path),
            expected="one data set",
            found=", ".join(file.name for file in here[:5]),
            fix=f"name the one that is meant, as in {likeliest(here, path.name)}",
        )
    return here[0] if here else None


def _has_tables(path: Path, tars: list[str]) -> bool:
    """Whether this file or folder is for `datasets`."""
    if not path.is_dir():
        return path.suffix in _TABLES
    here = [file for suffix in _TABLES for file in path.glob(f"*{suffix}")]
    if here and tars:
        raise CachekdError(
            "the folder holds both tars and tables",
            where=str(path),
            expected="one data set",
            found=f"{Path(tars[0]).name} and {here[0].name}",
            fix=f"name the files that are meant, as in '{path}/*.tar'",
        )
    if here or tars:
        return bool(here)
    saved = any((path / name).is_file() for name in (DATASET_DICT, "state.json"))
    return saved or next(path.rglob("*.parquet"), None) is not None


def _open_hugging_face(name: str, query: str, reader: RecordReader) -> Samples:
    # Here, because importing `datasets` takes seconds that the other forms need not wait for.
    from cachekd.data.sources.hf_datasets import HfDatasetSamples
    from cachekd.data.sources.hf_load import HfSpec

    return HfDatasetSamples(HfSpec.parse(name, query), reader)


def _is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[{")


def content_hash(samples: Samples) -> str:
    """sha256 over the content of up to 32 samples, evenly spread: whether these are the same data under the
    same keys. (The cache has a hash of every sample; this is what can be known at once.)

    Raises:
        CachekdError: the data set cannot be read.
    """
    digest = hashlib.sha256()
    count = min(32, len(samples))
    for place in range(count):
        try:
            digest.update(samples[place * len(samples) // count].content_hash)
        except BadSample as error:
            digest.update(error.problem.encode())
    return digest.hexdigest()


def keys_hash(samples: Samples) -> str:
    """sha256 over the keys in order: which samples a data set holds, not what is in them."""
    return hashlib.sha256("\n".join(samples.keys).encode()).hexdigest()
