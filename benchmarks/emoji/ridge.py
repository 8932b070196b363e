"""Measure the embedded backbone's frozen features against raw pixels on the embedded benchmark.

    python benchmarks/emoji/ridge.py

All 200 concepts jointly, 6 train and 2 test styles per concept as in ``emoji.json``. Two classifiers: ridge
regression on one-hot targets, and nearest class mean by cosine. Features are standardised with the mean and deviation
of the training part; the ridge strength is chosen on the training part by leaving out one family of styles at a time.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

ASSETS = Path(__file__).resolve().parents[2] / "janus_ext" / "assets"
LAMBDAS = torch.logspace(-3, 5, 33, dtype=torch.float64)


def declare_torchvision_ops() -> None:
    """Let timm be imported beside a CPU-only torch when torchvision is a CUDA build.

    That build's compiled library cannot be loaded then, and ``import torchvision`` fails on registering the fake of an
    operator that does not exist (pytorch #157648). Declaring the two schemas first avoids it; neither is called.
    """
    if torch.version.cuda is not None or hasattr(declare_torchvision_ops, "library"):
        return
    try:
        torch._C._get_schema("torchvision::nms", "")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declare_torchvision_ops.library = library  # the declarations live as long as this object


def load_backbone(path: Path) -> tuple[nn.Module, dict[str, list[float]]]:
    """The timm model in evaluation mode (float32) and its normalisation from a backbone file."""
    declare_torchvision_ops()
    from timm.models.vision_transformer import VisionTransformer

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name).float() for name in file.keys()}
    model = VisionTransformer(**json.loads(metadata["architecture"]))
    model.load_state_dict(weights)
    return model.eval(), json.loads(metadata["normalize"])


def load_benchmark(assets: Path) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Images uint8 [N, 3, 64, 64], labels, styles and style families int64 [N], and the test mask bool [N]."""
    table = json.loads((assets / "emoji.json").read_text(encoding="utf-8"))
    styles = table["styles"]
    group = {style: index for index, family in enumerate(table["families"]) for style in family}
    images, rows = [], []
    with zipfile.ZipFile(assets / "emoji.zip") as archive:
        for label, concept in enumerate(table["concepts"]):
            for s, style in enumerate(styles):
                data = archive.read(f"{style}/{concept['code']}.png")
                images.append(np.asarray(Image.open(io.BytesIO(data))))
                rows.append((label, s, group.get(style, len(styles) + s), style in concept["test_styles"]))
    labels, style_ids, families, test = (torch.tensor(column) for column in zip(*rows, strict=True))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), labels, style_ids, families, test


def raw_pixels(images: Tensor) -> Tensor:
    """Images uint8 [N, 3, 64, 64] averaged to 16 x 16 as float64 [N, 768]."""
    return F.avg_pool2d(images.double() / 255, 4).flatten(1)


@torch.no_grad()
def backbone_features(model: nn.Module, images: Tensor, normalize: dict[str, list[float]]) -> Tensor:
    """Final-norm CLS features float64 [N, D] of images uint8 [N, 3, 64, 64]."""
    mean, std = (torch.tensor(normalize[key]).view(3, 1, 1) for key in ("mean", "std"))
    batches = ((batch.float() / 255 - mean) / std for batch in images.split(200))
    return torch.cat([model.forward_features(batch)[:, 0].double() for batch in batches])


def standardise(features: Tensor, train: Tensor) -> Tensor:
    """Features [N, D] centred and scaled with the statistics of the rows in ``train``."""
    spread = features[train].std(0).clamp_min(1e-6)
    return (features - features[train].mean(0)) / spread


def ridge_path(x: Tensor, y: Tensor, x_test: Tensor) -> Tensor:
    """Ridge scores [len(LAMBDAS), M, C] on ``x_test`` [M, D], fitted on x [N, D] and one-hot y [N, C]."""
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    left, right = x_test @ vt.T, u.T @ (y - y.mean(0))
    return torch.stack([(left * (s / (s * s + lam))) @ right for lam in LAMBDAS])


def ridge_hits(features: Tensor, labels: Tensor, train: Tensor, test: Tensor) -> Tensor:
    """Number of right answers on ``test`` per entry of LAMBDAS, fitted on ``train`` (masks [N])."""
    x = standardise(features, train)
    scores = ridge_path(x[train], F.one_hot(labels[train], int(labels.max()) + 1).double(), x[test])
    return (scores.argmax(-1) == labels[test]).sum(-1)


def ridge_accuracy(features: Tensor, labels: Tensor, families: Tensor, test: Tensor) -> tuple[float, float]:
    """Test accuracy and the lambda chosen on the training part by leave-one-family-out."""
    hits = sum(
        ridge_hits(features, labels, ~test & (families != family), ~test & (families == family))
        for family in families.unique()
    )
    best = int(hits.argmax())
    return float(ridge_hits(features, labels, ~test, test)[best] / test.sum()), float(LAMBDAS[best])


def mean_accuracy(features: Tensor, labels: Tensor, test: Tensor) -> float:
    """Nearest class mean by cosine on centred features."""
    x = F.normalize(features - features[~test].mean(0), dim=1)
    sums = torch.zeros(int(labels.max()) + 1, x.shape[1], dtype=x.dtype).index_add_(0, labels[~test], x[~test])
    return float(((x[test] @ F.normalize(sums, dim=1).T).argmax(1) == labels[test]).double().mean())


def main() -> int:
    """Print the table; exit status 1 when the backbone is less than 8 points above raw pixels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, default=ASSETS / "backbone.safetensors", metavar="FILE")
    model, normalize = load_backbone(parser.parse_args().backbone)
    images, labels, _, families, test = load_benchmark(ASSETS)
    print(f"{int((~test).sum())} train and {int(test.sum())} test images of {int(labels.max()) + 1} concepts")
    print("| features | dimension | ridge | lambda | nearest class mean |\n|---|---|---|---|---|")
    accuracy = {}
    for name, x in (("raw 16 x 16", raw_pixels(images)), ("backbone", backbone_features(model, images, normalize))):
        accuracy[name], lam = ridge_accuracy(x, labels, families, test)
        ncm = mean_accuracy(x, labels, test)
        print(f"| {name} | {x.shape[1]} | {100 * accuracy[name]:.2f} % | {lam:.3g} | {100 * ncm:.2f} % |")
    margin = 100 * (accuracy["backbone"] - accuracy["raw 16 x 16"])
    print(f"The backbone is {margin:+.2f} points from raw pixels (bar: +8).")
    return int(margin < 8)


if __name__ == "__main__":
    sys.exit(main())
