"""cachekd: offline logit caching for Switch-KD distillation of vision-language models.

>>> from cachekd import LogitCache
>>> targets = LogitCache("runs/cache")["sample-000017"]
>>> targets.gather(ids)  # [N, k] token ids -> [N, k] teacher logprobs
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachekd.cache import LogitCache, LogitCacheWriter
    from cachekd.errors import CachekdError
    from cachekd.export.torch_dataset import CachedLogits
    from cachekd.losses import dbild_loss, kneedle_k
    from cachekd.losses.targets import DenseTargets, TeacherTargets
    from cachekd.train import SwitchKDTrainer


__version__ = "0.1.0"
__all__ = [
    "CachedLogits",
    "CachekdError",
    "DenseTargets",
    "LogitCache",
    "LogitCacheWriter",
    "SwitchKDTrainer",
    "TeacherTargets",
    "dbild_loss",
    "kneedle_k",
]

# Imported on first use, so that `import cachekd` (and `cachekd --help`) does not wait for torch.
_HOME = {
    "CachedLogits": "cachekd.export.torch_dataset",
    "CachekdError": "cachekd.errors",
    "DenseTargets": "cachekd.losses.targets",
    "LogitCache": "cachekd.cache",
    "LogitCacheWriter": "cachekd.cache",
    "SwitchKDTrainer": "cachekd.train.trainer",
    "TeacherTargets": "cachekd.losses.targets",
    "dbild_loss": "cachekd.losses",
    "kneedle_k": "cachekd.losses",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cachekd' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
