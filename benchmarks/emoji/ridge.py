"""Measure the embedded backbone's frozen features against raw pixels on the embedded benchmark.

    python benchmarks/emoji/ridge.py

All 200 concepts jointly, 6 train and 2 test styles per concept as in ``emoji.json``. Two classifiers: ridge
regression on one-hot targets, and nearest class mean by cosine. Features are standardised with the mean and deviation
of the training part; the ridge strength is chosen on the training part by leaving out one family of styles at a time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from janus_ext.backbone import EMBEDDED, load_backbone
from janus_ext.classifier import ContinualClassifier
from janus_ext.data import emoji

LAMBDAS = torch.logspace(-3, 5, 33, dtype=torch.float64)


def load_benchmark() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images uint8 [N, 3, 64, 64], labels and style families int64 [N], and the test mask bool [N]."""
    table, drawings = emoji.read_table(emoji.ASSETS / "emoji.json"), emoji.read_images(emoji.ASSETS / "emoji.zip")
    styles = table["styles"]
    group = {style: index for index, family in enumerate(table["families"]) for style in family}
    images, rows = [], []
    for label, concept in enumerate(table["concepts"]):
        for s, style in enumerate(styles):
            images.append(drawings[f"{style}/{concept['code']}"])
            rows.append((label, group.get(style, len(styles) + s), style in concept["test_styles"]))
    labels, families, test = (torch.tensor(column) for column in zip(*rows, strict=True))
    return torch.stack(images), labels, families, test


def raw_pixels(images: Tensor) -> Tensor:
    """Images uint8 [N, 3, 64, 64] averaged to 16 x 16 as float64 [N, 768]."""
    return F.avg_pool2d(images.double() / 255, 4).flatten(1)


@torch.no_grad()
def backbone_features(path: Path, images: Tensor) -> Tensor:
    """Final-norm CLS features float64 [N, D] of images uint8 [N, 3, 64, 64] under the weights in ``path``."""
    model = ContinualClassifier(load_backbone("emoji", str(path))).eval()
    return torch.cat([model.features(batch).double() for batch in images.split(200)])


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
    parser.add_argument("--backbone", type=Path, default=EMBEDDED, metavar="FILE")
    path = parser.parse_args().backbone
    images, labels, families, test = load_benchmark()
    print(f"{int((~test).sum())} train and {int(test.sum())} test images of {int(labels.max()) + 1} concepts")
    print("| features | dimension | ridge | lambda | nearest class mean |\n|---|---|---|---|---|")
    accuracy = {}
    for name, x in (("raw 16 x 16", raw_pixels(images)), ("backbone", backbone_features(path, images))):
        accuracy[name], lam = ridge_accuracy(x, labels, families, test)
        ncm = mean_accuracy(x, labels, test)
        print(f"| {name} | {x.shape[1]} | {100 * accuracy[name]:.2f} % | {lam:.3g} | {100 * ncm:.2f} % |")
    margin = 100 * (accuracy["backbone"] - accuracy["raw 16 x 16"])
    print(f"The backbone is {margin:+.2f} points from raw pixels (bar: +8).")
    return int(margin < 8)


if __name__ == "__main__":
    sys.exit(main())
