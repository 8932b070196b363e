"""Continual-learning methods by name."""

from __future__ import annotations

from janus_ext import plugins
from janus_ext.config.foreign import METHOD, loaded_method
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


def method_class(name: str) -> type[Method]:
    """The class of a method's name; nothing is imported for it, see `janus_ext.plugins.loaded`."""
    return METHODS.get(name) or loaded_method(name)


def method_name(method: str | type[Method]) -> str:
    """The name by which a class is found again, and a name as it is; ArgumentError where there is none."""
    return plugins.name_of(METHOD, method, METHODS)
