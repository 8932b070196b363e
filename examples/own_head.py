"""A head of one's own: deep streaming LDA (Hayes & Kanan, 2020), whose covariance is shrunk by a constant.

python examples/own_head.py
"""

import torch

from janus_ext.train import main

SHRINKAGE = 1e-4


def slda(known) -> tuple[torch.Tensor, torch.Tensor]:
    """W = mu S^-1 and b = -mu S^-1 mu / 2, S = (1 - 1e-4) covariance + 1e-4 I, float64: scores are W f + b."""
    means, covariance = known.statistics.means(), known.statistics.covariance()
    S = torch.lerp(covariance, torch.eye(len(covariance)).to(covariance), SHRINKAGE)
    W = torch.linalg.solve(S, means.mT).mT
    return W, -(W * means).sum(1) / 2


if __name__ == "__main__":  # the same as `janus_ext.train --head own_head:slda ...` in this folder
    main("--head own_head:slda --learn none --tasks 5 --output runs/slda".split())
