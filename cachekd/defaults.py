"""Defaults of a dump's settings that the writer of a cache has too."""

DEFAULT_TAIL = "bytes=64"
CALIBRATION_TOKENS = 16_384
