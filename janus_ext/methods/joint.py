"""Joint training: all classes at once, the upper bound that methods for one task after another are held against."""

from __future__ import annotations

from janus_ext.methods.lora import SequentialLoRA


class Joint(SequentialLoRA):
    """Plain LoRA on the benchmark as a single task, for as many epochs: what the tasks would give if none were old."""

    like = "joint"
