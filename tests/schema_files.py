"""schemas/, and what they take."""

from __future__ import annotations

import json

import jsonschema

from caches import ROOT


def schema(name: str) -> dict:
    return json.loads((ROOT / "schemas" / f"{name}.schema.json").read_text())


def valid(name: str, values: object) -> bool:
    return jsonschema.Draft202012Validator(schema(name)).is_valid(values)
