"""A method of one's own: LoRA, and the answers to old inputs are held, softly.

H is the mean of x x^T over a layer's inputs in an old task, summed over the tasks. Each step adds
strength * tr(dW H dW^T) to the loss: the mean square by which the update changes what the layer answers to old inputs.

python examples/own_method.py
"""

from dataclasses import dataclass

from janus_ext.config import Settings
from janus_ext.methods.lora import SequentialLoRA
from janus_ext.train import main


class Soft(SequentialLoRA):
    """LoRA whose update is small where old inputs are."""

    @dataclass(frozen=True)
    class Own(Settings):
        """The settings that no other method has."""

        strength: float = 1.0
        """How much a change of the answers to old inputs costs."""

    defaults = {"estimator": "gram"}  # of what all methods share, where the user says nothing
    limits = {"estimator": ("gram",), "rectify": ("none",), "margin_weight": (0.0,)}  # and what else it takes

    def __init__(self, model, config):
        super().__init__(model, config)
        self.moments = {}  # H of each layer, once there are old inputs

    def penalty(self, features, targets):
        costs = []
        for name, source in self.layers.inputs.items():  # source: the layer that stands for all with this input
            if source in self.moments:
                update = self.layers[name].scale * self.layers[name].B @ self.layers[name].A
                costs.append((update @ self.moments[source] * update).sum())
        return self.own.strength * sum(costs)

    def close_task(self, task):
        for name, H in self.second_moments(task).items():  # over one more pass
            mean = (H * self.layers[name].in_features / H.trace()).float()  # of inputs with a mean square of 1
            self.moments[name] = mean if name not in self.moments else self.moments[name] + mean
        return super().close_task(task)

    def state_dict(self):  # what it keeps from task to task: a run goes on from it with the same bits
        return super().state_dict() | {f"moments.{name}": H for name, H in self.moments.items()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        kept = {name: H for name, H in state.items() if name.startswith("moments.")}
        self.moments = {name.removeprefix("moments."): H.to(self.model.mean.device) for name, H in kept.items()}


if __name__ == "__main__":  # the same as `janus_ext.train --method own_method:Soft ...` in this folder
    main("--method own_method:Soft --strength 1 --tasks 4 --limit-per-class 1 --epochs 2".split())
