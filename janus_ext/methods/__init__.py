"""Continual-learning methods by name."""

from __future__ import annotations

from janus_ext.methods.base import Method
from janus_ext.methods.bilora import BiLoRA
from janus_ext.methods.inflora import InfLoRA
from janus_ext.methods.janus import Janus
from janus_ext.methods.joint import Joint
from janus_ext.methods.lora import SequentialLoRA
from janus_ext.methods.lora_drs import LoRADRS
from janus_ext.methods.lora_gpm import LoRAGPM

METHODS: dict[str, type[Method]] = {
    "janus": Janus,
    "lora": SequentialLoRA,
    "lora-gpm": LoRAGPM,
    "inflora": InfLoRA,
    "lora-drs": LoRADRS,
    "bilora": BiLoRA,
    "joint": Joint,
}
