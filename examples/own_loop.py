"""Janus-LoRA in a training loop of your own: two tasks of the embedded images, any optimizer, nothing from the trainer.

python examples/own_loop.py
"""

import torch
from torch import nn
from torch.nn import functional as F

from janus_ext import ClassPrototypes, DecoupledMarginLoss, OnlineEstimator, inject, observing
from janus_ext.backbone import load_backbone
from janus_ext.classifier import ContinualClassifier
from janus_ext.config import TrainConfig
from janus_ext.data import BENCHMARKS

torch.manual_seed(0)
benchmark = BENCHMARKS["emoji"](TrainConfig(tasks=20))
model = ContinualClassifier(load_backbone())  # or any timm ViT
layers = inject(model.backbone, rank=8)  # freezes the rest; .grad of A and B comes rectified
estimators = {name: OnlineEstimator(layer.in_features, name=name) for name, layer in layers.items()}
prototypes, push = ClassPrototypes(model.feature_dim), DecoupledMarginLoss(margin=0.2, temperature=16, weight=0.5)

for classes in benchmark.tasks[:2]:
    rows = benchmark.train.of_classes(classes)
    images, labels = benchmark.train.images[rows], benchmark.positions[benchmark.train.labels[rows]]
    model.add_task(len(classes))
    factors = [p for layer in layers.values() for p in (layer.A, layer.B)]
    optimizer = torch.optim.AdamW([*factors, *model.heads[-1].parameters()], lr=1e-3)  # fresh for every task

    for epoch in range(3):
        with observing(layers, estimators if epoch == 2 else {}):  # Online Estimation looks at the last epoch's inputs
            for batch in torch.randperm(len(rows)).split(32):
                features = model.features(images[batch])
                loss = F.cross_entropy(model.heads[-1](features), labels[batch] - labels.min())
                loss = loss + push(features, prototypes)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(factors, 1.0)
                optimizer.step()

    for name, layer in layers.items():
        print(f"{name}: |dW V| / |dW| = {layer.violation():.1e}, {layer.basis.shape[1]} directions protected")
        layer.merge()
        layer.protect(estimators[name].commit(energy=0.999, max_rank=layer.in_features - layer.rank))
    with torch.no_grad():
        prototypes.add(model.features(images), labels)
