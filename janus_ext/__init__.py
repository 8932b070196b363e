"""janus_ext: Janus-LoRA, continual learning of Vision Transformers without keeping old images.

Online Estimation, Gradient Rectification and Decoupled Margin Loss as PyTorch ops (`janus_ext.ops`), as modules
(below), and in a trainer (`python -m janus_ext.train`).
"""

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
from janus_ext.injection import Injection, inject, uninject
from janus_ext.lora import LoRALinear, LoRAQKV
from janus_ext.margin import ClassPrototypes, DecoupledMarginLoss
from janus_ext.pairs import LoRAPair
from janus_ext.rectifier import GradientRectifier

__version__ = "0.1.0"
__all__ = [
    "ArgumentError",
    "CheckpointError",
    "ClassPrototypes",
    "DataError",
    "DecoupledMarginLoss",
    "GradientRectifier",
    "Injection",
    "JanusError",
    "LoRALinear",
    "LoRAPair",
    "LoRAQKV",
    "NativeError",
    "OnlineEstimator",
    "StatisticsError",
    "TaskBoundaryError",
    "TrainingError",
    "inject",
    "observing",
    "ops",
    "uninject",
]
