"""Continual-learning methods by name."""

from __future__ import annotations

from janus_ext.methods.base import Method
from janus_ext.methods.janus import Janus
from janus_ext.methods.lora import SequentialLoRA

METHODS: dict[str, type[Method]] = {
    "janus": Janus,
    "lora": SequentialLoRA,
}
