"""JSON Schemas of what cachekd reads and writes, made from the models that check it."""

from __future__ import annotations

import json

from pydantic import BaseModel

from cachekd.cache.manifest import Manifest
from cachekd.cache.plan import FinishedShard, Plan, Skipped
from cachekd.config import CheckConfig, DumpConfig, EvalConfig, ReportConfig, TrainConfig
from cachekd.data.record_form import SampleRecord
from cachekd.pipeline import PipelineConfig

SCHEMAS: dict[str, type[BaseModel]] = {
    "manifest": Manifest,  # manifest.json
    "plan": Plan,  # dump/plan.json
    "record": FinishedShard,  # dump/00000.json
    "skipped": Skipped,  # a line of skipped.jsonl
    "check": CheckConfig,  # these five: --config FILE
    "dump": DumpConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "report": ReportConfig,
    "pipeline": PipelineConfig,  # `cachekd run`'s file
    "sample": SampleRecord,  # a record of the data
}
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_text(name: str) -> str:
    """A schema as it stands in its file."""
    return json.dumps({"$schema": _DIALECT, **SCHEMAS[name].model_json_schema()}, indent=2) + "\n"
