"""janus_ext: Janus-LoRA, continual learning of Vision Transformers without keeping old images.

Online Estimation, Gradient Rectification and Decoupled Margin Loss as PyTorch ops (`janus_ext.ops`), as modules
(below), and in a trainer (`python -m janus_ext.train`).
"""

from typing import Any

from janus_ext import ops
from janus_ext.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    JanusError,
    NativeError,
    StatisticsError,
    TaskBoundaryError,
    TrainingError,
)
from janus_ext.estimator import OnlineEstimator, observing
from janus_ext.heads.statistics import FeatureStatistics
from janus_ext.injection import Injection, inject, uninject
from janus_ext.lora import LoRALinear, LoRAQKV
from janus_ext.margin import ClassPrototypes, DecoupledMarginLoss
from janus_ext.pairs import LoRAPair
from janus_ext.rectification import Rectification
from janus_ext.rectifier import GradientRectifier

__version__ = "0.1.0"
__all__ = [
    "ArgumentError",
    "CheckpointError",
    "ClassPrototypes",
    "ContinualLearner",
    "DataError",
    "DecoupledMarginLoss",
    "FeatureStatistics",
    "GradientRectifier",
    "Injection",
    "JanusError",
    "LoRALinear",
    "LoRAPair",
    "LoRAQKV",
    "NativeError",
    "OnlineEstimator",
    "Rectification",
    "StatisticsError",
    "TaskBoundaryError",
    "TrainingError",
    "inject",
    "observing",
    "ops",
    "uninject",
]


def __getattr__(name: str) -> Any:
    """`ContinualLearner` is imported when it is asked for: what it is made of takes a second to import."""
    if name == "ContinualLearner":
        from janus_ext.learner import ContinualLearner

        return ContinualLearner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
