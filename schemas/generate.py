"""Write the JSON Schemas of what cachekd puts on disk, from the pydantic models.

python schemas/generate.py
"""

from __future__ import annotations

import json
from pathlib import Path

from cachekd.cache import Manifest
from cachekd.config import TrainConfig
from cachekd.pipeline import PipelineConfig

SCHEMAS = {"manifest": Manifest, "train": TrainConfig, "pipeline": PipelineConfig}


def schema_text(name: str) -> str:
    """The schema's file content."""
    return json.dumps(SCHEMAS[name].model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    for name in SCHEMAS:
        path = Path(__file__).parent / f"{name}.schema.json"
        path.write_text(schema_text(name))
        print(f"wrote {path}")
