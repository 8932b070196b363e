"""Does the device wait for images? Images a second of the loader by its workers, against what training can take.

python benchmarks/loader.py [--device cuda] [--json FILE]
python benchmarks/loader.py --table FILE

The loader decodes JPEG files of 500 x 375 pixels (the mean size of ImageNet's) and crops them at random to 224 x 224,
as in training. The model trains with Janus-LoRA on images in memory: a ViT-S/16 in float32 with batches of 16 on a CPU,
a ViT-B/16 in bfloat16 with batches of 128 on a GPU, with random weights.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from program import Stepper
from run import about, new_file, write

from janus_ext.data.images import Files, ImageSplit, available_cores

IMAGES, SIZE, BATCH = 512, (500, 375), 128
MODELS = {"cpu": ("vit_small_patch16_224", 16, "off"), "cuda": ("vit_base_patch16_224", 128, "bf16")}


def write_images(folder: Path) -> list[str]:
    """JPEG files as a photograph compresses: smooth colours with a little noise, about 60 kB each."""
    rng = np.random.default_rng(0)
    names = []
    for i in range(64):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            SIZE, Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse, dtype=np.int16) + rng.integers(-20, 21, (*SIZE[::-1], 3))
        names.append(f"{i}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / names[-1], quality=90)
    return names


def loader_rate(folder: Path, names: list[str], workers: int) -> float:
    """Images a second in the second pass of a split; the first one starts the workers."""
    keys = [names[i % len(names)] for i in range(IMAGES)]
    split = ImageSplit(Files(folder), keys, torch.zeros(IMAGES, dtype=torch.int64), keys, workers=workers)
    for _ in range(2):
        started = time.perf_counter()
        for _ in split.stream(torch.arange(IMAGES).split(BATCH), torch.Generator().manual_seed(0)):
            pass
    return IMAGES / (time.perf_counter() - started)


def training_rate(device: str) -> float:
    """Images a second that training takes when it waits for none."""
    backbone, batch, amp = MODELS[device]
    stepper = Stepper(device, backbone, batch, method="janus", amp=amp)
    stepper.step()
    started, steps = time.perf_counter(), 0
    while steps < 3 or time.perf_counter() - started < 5:
        stepper.step()
        steps += 1
    stepper.wait()
    return batch * steps / (time.perf_counter() - started)


def table(path: Path) -> str:
    """The documents' table of a JSON file."""
    stored = json.loads(path.read_text())
    lines = ["| | images/s |", "|---|---|"]
    lines += [
        f"| loader, {row['workers']} worker{'s' * (row['workers'] > 1)} | {row['rate']:.0f} |"
        for row in stored["loader"]
    ]
    model, batch, amp = MODELS["cuda" if stored["on"] == "cuda" else "cpu"]
    return "\n".join([*lines, f"| training takes: {model}, batch {batch}, amp {amp} | {stored['training']:.0f} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(MODELS), default="cpu")
    parser.add_argument("--json", type=new_file)
    parser.add_argument("--table", type=Path, help="print a JSON file as Markdown")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table))
        return
    result: dict[str, Any] = {"about": about(arguments.device), "on": arguments.device, "loader": []}
    result["training"] = training_rate(arguments.device)
    print(f"training takes {result['training']:.0f} images/s")
    with tempfile.TemporaryDirectory() as folder:
        names = write_images(Path(folder))
        for workers in sorted({1, 2, available_cores()}):
            result["loader"].append({"workers": workers, "rate": loader_rate(Path(folder), names, workers)})
            print(f"loader, {workers} workers: {result['loader'][-1]['rate']:.0f} images/s", flush=True)
            if arguments.json is not None:
                write(arguments.json, result)


if __name__ == "__main__":
    main()
