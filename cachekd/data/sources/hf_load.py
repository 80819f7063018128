"""Load one split of a Hugging Face data set, wherever it lies."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import datasets
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from cachekd.errors import CachekdError
from cachekd.paths import DATASET_DICT

OPTIONS = ("name", "split", "revision")
_HUB_SECONDS = 10


@dataclass(frozen=True)
class HfSpec:
    """`path?name=...&split=...&revision=...`, taken apart.

    Attributes:
        path: a `save_to_disk` folder, a `.parquet` or `.arrow` file or glob, a folder of parquet files, or
            `org/name` on the hub.
        name: the configuration.
        split: as `datasets` takes it.
        revision: of a hub data set.
    """

    path: str
    name: str | None = None
    split: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, path: str, query: str) -> HfSpec:
        """Read the options.

        Raises:
            CachekdError: an option is unknown, given twice, or has no value.
        """
        pairs = parse_qsl(query, keep_blank_values=True)
        options = dict(pairs)
        if len(options) < len(pairs) or not options.keys() <= set(OPTIONS) or not all(options.values()):
            raise CachekdError(
                "the options of the data set cannot be read",
                where=f"{path}?{query}",
                expected=f"each of {', '.join(OPTIONS)} at most once, as in {path}?split=train",
                found=query,
            )
        return cls(path, **options)


def load_split(spec: HfSpec) -> datasets.Dataset:
    """Load the split that is asked for, or the only one.

    Raises:
        CachekdError: it does not exist, cannot be read or reached, or one of several splits must be chosen.
    """
    try:
        return _only_split(_load(spec), spec)
    except (CachekdError, MemoryError):
        raise
    except Exception as error:
        # `datasets` raises ValueError for an unknown split or configuration (and lists the known ones),
        # pyarrow's errors for broken files, the hub client's for everything else.
        raise CachekdError(
            "the data set cannot be loaded", where=spec.path, found=f"{type(error).__name__}: {error}"
        ) from error


def is_saved_to_disk(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any(os.path.isfile(folder / name) for name in (DATASET_DICT, "state.json"))


def _load(spec: HfSpec) -> Any:
    path = Path(spec.path)
    if is_saved_to_disk(path):
        _refuse(spec, "name", "revision")
        return datasets.load_from_disk(spec.path)
    if path.suffix in (".parquet", ".arrow"):
        _refuse(spec, "name", "revision")
        files = [spec.path] if os.path.isfile(path) else sorted(glob.glob(spec.path, recursive=True))
        if not files:
            raise CachekdError("the data set does not exist", where=spec.path, found="no such file")
        return datasets.load_dataset(path.suffix[1:], data_files=files, split=spec.split or "train")
    if os.path.isdir(path):
        _refuse(spec, "revision")
    else:
        require_on_hub(spec)
    split = spec.split
    if split is None and not huggingface_hub.constants.HF_HUB_OFFLINE:
        # Asked first, so that choosing does not need a download of all of them.
        split = _choose(datasets.get_dataset_split_names(spec.path, spec.name, revision=spec.revision), spec)
    return datasets.load_dataset(spec.path, spec.name, split=split, revision=spec.revision)


def _only_split(loaded: Any, spec: HfSpec) -> datasets.Dataset:
    if isinstance(loaded, datasets.DatasetDict):
        return loaded[_choose(list(loaded), spec)]
    if is_saved_to_disk(Path(spec.path)) and spec.split not in (None, str(loaded.split)):
        raise _unknown_split(spec, [] if loaded.split is None else [str(loaded.split)])
    return loaded


def _choose(splits: list[str], spec: HfSpec) -> str:
    if spec.split is None and len(splits) == 1:
        return splits[0]
    if spec.split in splits:
        return str(spec.split)
    raise _unknown_split(spec, splits)


def _unknown_split(spec: HfSpec, splits: list[str]) -> CachekdError:
    return CachekdError(
        "the data set has several splits" if spec.split is None else f"no split {spec.split!r}",
        where=spec.path,
        expected=f"one of {', '.join(splits)}" if splits else "no split to be chosen: there is only one",
        fix=f"name it, as in {spec.path}?split={splits[0]}" if splits else f"leave ?split={spec.split} out",
    )


def _refuse(spec: HfSpec, *options: str) -> None:
    given = [option for option in options if getattr(spec, option) is not None]
    if given:
        raise CachekdError(
            f"{' and '.join(given)} cannot be chosen here", where=spec.path, expected="?split=... or nothing"
        )


def require_on_hub(spec: HfSpec) -> None:
    """Ask the hub once: `datasets` itself retries for half a minute before it says that there is no network.

    Raises:
        CachekdError: there is no such data set, it is not given out, or the hub cannot be reached.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return  # then `datasets` looks into its cache only, and fails at once
    try:
        huggingface_hub.HfApi().dataset_info(spec.path, revision=spec.revision, timeout=_HUB_SECONDS)
    except RepositoryNotFoundError:
        raise CachekdError(
            "the data set does not exist",
            where=spec.path,
            found="no such file or folder here, and no such data set on the hub that you may see",
            fix="check the path or the name; `hf auth login` for a private data set",
        ) from None
    except HfHubHTTPError as error:  # a revision that is not there, a gated data set, a busy server
        raise CachekdError("the hub refuses the data set", where=spec.path, found=str(error)) from None
    except Exception as error:
        raise CachekdError(
            "the data set is not here, and the hub cannot be reached",
            where=spec.path,
            found=f"{type(error).__name__}: {error}",
            fix="check the path and the network; HF_HUB_OFFLINE=1 uses what was downloaded before",
        ) from None
