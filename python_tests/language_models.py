"""A small language model with random weights, adapted by the installed PEFT; modules that import this need both."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from janus_ext import GradientRectifier
from janus_ext.backbone import prepare_torchvision

prepare_torchvision()
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def language_model(**options: Any) -> nn.Module:
    """A Llama of two layers with random weights; 20 texts of it have 40 positions."""
    torch.manual_seed(0)
    size = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=2, max_position_embeddings=64, **size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own
        return transformers.LlamaForCausalLM(config).to(**options)


def adapted(model: nn.Module | None = None, targets: Any = ALL, **options: Any) -> nn.Module:
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(targets)} | options)
    return peft.get_peft_model(language_model() if model is None else model, config)


def texts(first: int, last: int) -> Tensor:
    return torch.randint(first, last, (2, 12), generator=torch.Generator().manual_seed(first))


OLD, NEW = texts(0, 20), texts(20, 40)


def train(model: nn.Module, rectifier: GradientRectifier | None, ids: Tensor, steps: int = 20) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    if rectifier is not None:
        rectifier.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@torch.no_grad()
def hidden(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids, output_hidden_states=True).hidden_states[-1]


def observed(model: nn.Module, rectifier: GradientRectifier, ids: Tensor = OLD) -> None:
    with rectifier.observe():
        hidden(model, ids)
