"""Vision transformers of timm: the embedded one, timm's by name, the hub's, a folder's; weights from any file."""

from janus_ext.backbone.loading import EMBEDDED, load_backbone, weight_file
from janus_ext.backbone.network import adopt, attach, probe, rebuild, recompute_blocks
from janus_ext.backbone.torchvision_guard import prepare_torchvision

__all__ = [
    "EMBEDDED",
    "adopt",
    "attach",
    "load_backbone",
    "prepare_torchvision",
    "probe",
    "rebuild",
    "recompute_blocks",
    "weight_file",
]
