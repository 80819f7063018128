"""The environment that benchmarks need: whether this is one, and how to make it."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from cachekd.errors import CachekdError

LMMS_EVAL = "0.7.3"  # exactly: another version may ask or score the same benchmark otherwise
_HOW = """make an environment of its own, which takes minutes and 2.5 GB or more:
    python3 -m venv benchmarks-env
    benchmarks-env/bin/pip install 'cachekd[benchmarks]'
    benchmarks-env/bin/pip uninstall -y torchvision
    benchmarks-env/bin/cachekd eval ...
  (from a clone or a wheel the second line is another: docs/how-to/benchmarks.md)"""


def require_lmms_eval() -> Path:
    """Where lmms-eval's own tasks are. Nothing of it is imported.

    Raises:
        CachekdError: lmms-eval is not in this environment, or in another version.
    """
    spec = find_spec("lmms_eval")
    if spec is None or spec.origin is None:
        raise CachekdError(
            "public benchmarks need lmms-eval, which is not in this environment",
            where=sys.prefix,
            expected=f"lmms-eval {LMMS_EVAL}",
            fix=_HOW,
        )
    if (found := version("lmms-eval")) != LMMS_EVAL:
        raise CachekdError(
            "this is another version of lmms-eval than was tested: it may ask or score otherwise",
            where=sys.prefix,
            expected=LMMS_EVAL,
            found=found,
            fix=f"pip install lmms-eval=={LMMS_EVAL}",
        )
    return Path(spec.origin).parent / "tasks"


def versions() -> dict[str, str]:
    """Those that decide a score."""
    found = {}
    for name in ("lmms-eval", "cachekd", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout that is only on the path
            found[name] = "unknown"
    return found
