"""Heads by name: what classifies the features that a method has learned."""

from __future__ import annotations

from janus_ext.heads import aligned, lda, linear, ncm, ridge
from janus_ext.heads.base import Head

HEADS: dict[str, Head] = {
    "linear": linear.fit,
    "ncm": ncm.fit,
    "lda": lda.fit,
    "ridge": ridge.fit,
    "aligned": aligned.fit,
}
