"""A cache in forms that other trainers read."""

from cachekd.export.parquet import export_parquet
from cachekd.export.webdataset import export_webdataset

__all__ = ["export_parquet", "export_webdataset"]
