"""How much of its first task a language model forgets by a second one: PEFT's LoRA, alone and with GradientRectifier.

    python benchmarks/peft_forgetting.py     # five seeds, two minutes a core; needs pip install '.[peft]'

The languages are made up: 64 words, each of which has two followers, likely and less likely. A Llama of two layers with
random weights is pretrained on four of them. Then a LoRA adapter on all linear layers learns a fifth (the first task)
and, merged into the weights, a new adapter a sixth (the second). The first word of a text says its language. Accuracy
is the share of words that are the likely follower of the one before and are predicted, in texts not seen.
"""

import argparse
import copy
import statistics
from collections.abc import Iterable
from contextlib import nullcontext

import janus_ext.torchvision_shim  # noqa: F401  before transformers

# isort: split
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from janus_ext import GradientRectifier

WORDS, LANGUAGES, LENGTH, BATCH = 64, 6, 32, 32
LIKELY = 0.9
LORA = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
ENERGIES = (0.9, 0.99, 0.999)


def languages() -> Tensor:
    """[languages, words, 2]: the likely and the less likely follower of every word."""
    return torch.stack([torch.stack([torch.randperm(WORDS) for _ in range(2)], 1) for _ in range(LANGUAGES)])


def texts(followers: Tensor, language: int, count: int) -> Tensor:
    """[count, length] words of a language, its name before them."""
    words = [torch.full((count,), WORDS + language), torch.randint(WORDS, (count,))]
    while len(words) < LENGTH:
        unlikely = (torch.rand(count) > LIKELY).long()
        words.append(followers[language, words[-1], unlikely])
    return torch.stack(words, 1)


def train(model: nn.Module, batches: Iterable[Tensor], lr: float, rectifier: GradientRectifier | None = None) -> None:
    """One step a batch; the rectifier observes all of them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    if rectifier is not None:
        rectifier.attach(optimizer)
    model.train()
    with rectifier.observe() if rectifier is not None else nullcontext():
        for ids in batches:
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, followers: Tensor, language: int) -> float:
    """Percent of the words with a likely follower for which that one is predicted."""
    model.eval()
    ids = texts(followers, language, 256)
    predicted, before = model(input_ids=ids).logits[:, 1:-1].argmax(-1), ids[:, 1:-1]
    likely = followers[language, before, 0] == ids[:, 2:]
    return 100 * float((predicted == ids[:, 2:])[likely].float().mean())


def pretrained(followers: Tensor, steps: int) -> nn.Module:
    """The model that knows the first four languages."""
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS + LANGUAGES, max_position_embeddings=LENGTH, **size))
    known = LANGUAGES - 2
    train(model, (texts(followers, step % known, BATCH) for step in range(steps)), lr=2e-3)
    return model


def run(base: nn.Module, followers: Tensor, energy: float | None, steps: int, lr: float) -> tuple[float, ...]:
    """Accuracy on the first task after it, and on both after the second; `energy` None is LoRA alone."""
    model = get_peft_model(copy.deepcopy(base), LORA)
    rectifier = None if energy is None else GradientRectifier(model, energy=energy)
    first, second = LANGUAGES - 2, LANGUAGES - 1
    train(model, (texts(followers, first, BATCH) for _ in range(steps)), lr, rectifier)
    learned = accuracy(model, followers, first)
    model = get_peft_model(model.merge_and_unload(), LORA)
    if rectifier is not None:
        rectifier.commit(layers=model)
    train(model, (texts(followers, second, BATCH) for _ in range(steps)), lr, rectifier)
    return learned, accuracy(model, followers, first), accuracy(model, followers, second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of each task; pretraining takes four times as many")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the adapters")
    arguments = parser.parse_args()
    runs: dict[float | None, list[tuple[float, ...]]] = {energy: [] for energy in (None, *ENERGIES)}
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        followers = languages()
        base = pretrained(followers, 4 * arguments.steps)
        for energy in runs:
            torch.manual_seed(seed)
            runs[energy].append(run(base, followers, energy, arguments.steps, arguments.lr))
    print("| adapter | first task, learned | first task, after the second | forgotten | second task |")
    print("|---|---|---|---|---|")
    for energy, found in runs.items():
        learned, kept, second = zip(*found, strict=True)
        columns = [learned, kept, [a - b for a, b in zip(learned, kept, strict=True)], second]
        cells = [f"{statistics.fmean(c):.1f} ± {statistics.stdev(c) if len(c) > 1 else 0:.1f}" for c in columns]
        name = "LoRA alone" if energy is None else f"with GradientRectifier, energy {energy:g}"
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
