"""Write the JSON Schemas of what cachekd reads and writes, from the pydantic models.

python schemas/generate.py
"""

from __future__ import annotations

from pathlib import Path

from cachekd.schemas import SCHEMAS, schema_text

if __name__ == "__main__":
    for name in SCHEMAS:
        path = Path(__file__).parent / f"{name}.schema.json"
        path.write_text(schema_text(name))
        print(f"wrote {path}")
