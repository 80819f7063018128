"""Defaults that more than one module has to know."""

DEFAULT_TAIL = "bytes=64"
CALIBRATION_TOKENS = 16_384
SAVE_STEPS = 500
STORE_TIMEOUT = 60.0  # seconds without a byte
