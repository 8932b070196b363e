"""A language model with a PEFT adapter learns two tasks with transformers' Trainer, and keeps the first.

pip install '.[peft]' && python examples/peft_trainer.py
"""

import tempfile
from contextlib import ExitStack

import janus_ext.torchvision_shim  # noqa: F401  before transformers

# isort: split
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from janus_ext import GradientRectifier


class Rectification(TrainerCallback):
    """Rectifies before each step of a Trainer, and observes the inputs of its last epoch."""

    def __init__(self, rectifier: GradientRectifier) -> None:
        self.rectifier, self.observed = rectifier, ExitStack()

    def on_train_begin(self, args, state, control, optimizer, **_) -> None:
        self.rectifier.attach(optimizer)

    def on_epoch_begin(self, args, state, control, **_) -> None:
        if state.epoch >= args.num_train_epochs - 1:
            self.observed.enter_context(self.rectifier.observe())

    def on_epoch_end(self, args, state, control, **_) -> None:
        self.observed.close()


def texts(first: int, last: int) -> list[dict[str, torch.Tensor]]:
    """Yours; here 16 texts, each of which counts from a word on, round and round."""
    rows = [first + (torch.arange(20) + start) % (last - first) for start in range(16)]
    return [{"input_ids": row, "labels": row} for row in rows]


def loss_on(model: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> float:
    batch = {key: torch.stack([item[key] for item in data]) for key in data[0]}
    with torch.no_grad():
        return float(model.eval()(**batch).loss)


torch.manual_seed(0)
size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=40, **size))  # yours: AutoModelForCausalLM.from_pretrained(...)
config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
model = get_peft_model(base, config)
rectifier = GradientRectifier(model, energy=0.99)  # finds the adapter's layers; q, k and v share an estimator
tasks = [texts(0, 20), texts(20, 40)]

for data in tasks:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=40, per_device_train_batch_size=8, learning_rate=2e-2, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data, callbacks=[Rectification(rectifier)]).train()
    print("loss on each task:", [round(loss_on(model, known), 3) for known in tasks])  # the first stays: 2.7 without
    model = get_peft_model(model.merge_and_unload(), config)  # model.save_pretrained(...) first keeps the adapter
    rectifier.commit(layers=model)
