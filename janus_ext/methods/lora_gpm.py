"""LoRA-GPM: gradient projection memory (Saha et al., 2021) for LoRA factors trained in sequence.

After every task, one pass over its images: V <- V and the leading directions of the rest of the inputs, until a share
of their energy is reached. While training, g_A <- g_A - g_A V V^T; g_B is free.

The Janus-LoRA paper compares with a LoRA-GPM of which no code is public: this is our reading. GPM's own code counts
cumulated shares below the threshold and so takes one direction fewer than its paper; here the threshold is reached.
"""

from __future__ import annotations

from janus_ext.methods.base import Task, TaskReport
from janus_ext.methods.protected import ProtectedLoRA


class LoRAGPM(ProtectedLoRA):
    """g_A is projected (rectify "project"); with "tangent" or "exact" this is gradient rectification over GPM."""

    def close_task(self, task: Task) -> TaskReport:
        self.watch(task, self.estimators)
        return super().close_task(task)
