"""The settings of a data set, the same in every command: which samples there are, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer

from cachekd.config.base import Config, read_config
from cachekd.config.fields import TooLong
from cachekd.paths import LocalPath, PathOrName, is_hub_data, is_url

OnError = Literal["stop", "skip"]
ROW_NUMBERS = "index"  # --key index
WHICH_SAMPLES = frozenset({"data", "image_root", "limit", "shuffle_seed"})  # what other data do not inherit


def _fields(given: object) -> object:
    return (given,) if isinstance(given, str) else given


class DataOptions(Config):
    """A data set, and how its records become samples."""

    data: PathOrName = Field(
        description="LLaVA .json/.jsonl; WebDataset tars: a folder, 'train-*.tar', 'train-{000..009}.tar', "
        "s3://...; a `datasets` folder, .parquet or hub name, with '?split=train'"
    )
    map: str | None = Field(
        None, description="your own function, module:function, that turns your format into a record"
    )
    key: str | None = Field(
        None,
        min_length=1,
        description="the field (dotted) with a sample's key, or `index` for the row's number; by default id",
    )
    image_field: Annotated[tuple[str, ...], BeforeValidator(_fields)] = Field(
        (),
        description="a field (dotted) with pictures; repeat the option for several. By default image, else "
        "images",
    )
    image_root: LocalPath | None = Field(
        None, description="the folder where relative paths of pictures start; by default the data's folder"
    )
    limit: int | None = Field(None, ge=1, description="use only the first N samples")
    shuffle_seed: int | None = Field(None, ge=0, description="shuffle the samples first")
    on_error: OnError = Field(
        "stop", description="a bad sample stops the command, or is left out, counted and named"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="the most tokens that a sample may have; by default the models' context"
    )
    too_long: TooLong = Field(
        "error",
        description="what to do with a longer sample: treat it as bad, leave it out, or cut the end of its "
        "answers (never a picture)",
    )

    @classmethod
    def of(cls, data: Data, **options: Any) -> DataOptions:
        """Return options that are given as they are, or make them for a data set that is only named.

        Raises:
            CachekdError: an option is unknown or out of range.
        """
        return data if isinstance(data, DataOptions) else read_config(None, cls, {"data": data, **options})

    @property
    def is_local(self) -> bool:
        """Whether the data are on this disk, or ought to be; others have to be fetched."""
        return not (is_url(self.data) or is_hub_data(self.data))

    def inheriting_from(self, other: DataOptions) -> Self:
        """Fill what is left open with what `other` says: how records are read, and what is done with bad and
        long samples. Which samples there are is not inherited."""
        said = other.model_fields_set - self.model_fields_set - WHICH_SAMPLES
        shared = said & DataOptions.model_fields.keys()
        return self.model_copy(update={name: getattr(other, name) for name in shared})


Data = str | Path | DataOptions


def _named(given: object) -> object:
    """Make options of a data set's name; leave what is none as it is."""
    return {"data": given} if isinstance(given, str | Path) else given


def _as_it_was_said(value: DataOptions) -> str | dict[str, Any]:
    """Serialize what is set; the rest is in the options of the data that these stand beside."""
    said = value.model_dump(mode="json", exclude_unset=True)
    return str(value.data) if said.keys() == {"data"} else said


# As another data set is said beside a command's own: by its name, or with options of its own.
NamedData = Annotated[
    DataOptions,
    BeforeValidator(_named, json_schema_input_type=str | DataOptions),
    PlainSerializer(_as_it_was_said),
]
