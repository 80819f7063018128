"""All settings, as closed models without torch; the command line is made from them."""

from cachekd.config.base import Config, read_config, refusal
from cachekd.config.check import CheckConfig
from cachekd.config.data import Data, DataOptions, NamedData
from cachekd.config.dump import DumpConfig
from cachekd.config.evaluate import EvalConfig
from cachekd.config.report import ReportConfig
from cachekd.config.train import TrainConfig

__all__ = [
    "CheckConfig",
    "Config",
    "Data",
    "DataOptions",
    "DumpConfig",
    "EvalConfig",
    "NamedData",
    "ReportConfig",
    "TrainConfig",
    "read_config",
    "refusal",
]
