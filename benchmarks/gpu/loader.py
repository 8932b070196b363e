"""The way of photographs: JPEG files, workers, pinned batches, a ViT-B/16 in bfloat16; seconds of each epoch.

python benchmarks/gpu/loader.py DEVICE FOLDER    # writes its photographs to FOLDER
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

device, folder = sys.argv[1], Path(sys.argv[2])
classes, each, side = (40, 96, (375, 500)) if device == "cuda" else (4, 6, (60, 80))


def write(c):
    from PIL import Image

    random = np.random.default_rng(c)
    for split, count in (("train", each), ("test", 8)):
        place = folder / split / f"class{c:03}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        for i in range(count):
            noisy = np.clip(coarse + random.normal(0, 20, coarse.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).resize(side[::-1], Image.BICUBIC).save(place / f"{i}.jpg", quality=90)


if __name__ == "__main__":
    begun = time.perf_counter()
    with ProcessPoolExecutor() as pool:
        list(pool.map(write, range(classes)))
    print(
        f"{classes * (each + 8)} photographs of {side[1]} x {side[0]} written in {time.perf_counter() - begun:.0f} s",
        flush=True,
    )
    from janus_ext import train

    model = ["--backbone", "vit_base_patch16_224"] if device == "cuda" else ["--backbone", "vit_tiny_patch16_224"]
    for name, flags in {"workers": [], "cached": ["--cache-images"], "compiled": ["--compile"]}.items():
        begun = time.perf_counter()
        code = train.main(
            [
                "--benchmark",
                "folder",
                "--data-dir",
                str(folder),
                "--weights",
                "none",
                *model,
                "--tasks",
                "2",
                "--epochs",
                "2",
                "--device",
                device,
                "--output",
                str(folder.parent / f"loader-{name}"),
                "--no-plots",
                *flags,
            ]
        )
        lines = (folder.parent / f"loader-{name}" / "metrics.jsonl").read_text().splitlines() if code == 0 else []
        print(
            f"{name}: status {code}, {time.perf_counter() - begun:.0f} s; seconds of the epochs "
            + ", ".join(line.split('"seconds": ')[1].rstrip("}")[:5] for line in lines)
            + f"; {classes // 2 * each} images each",
            flush=True,
        )
