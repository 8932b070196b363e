"""Vision transformers of timm: the embedded one, timm's by name, the hub's, a folder's; weights from any file."""

from janus_ext.backbone.loading import EMBEDDED, load_backbone
from janus_ext.backbone.network import adopt
from janus_ext.backbone.torchvision_guard import prepare_torchvision

__all__ = ["EMBEDDED", "adopt", "load_backbone", "prepare_torchvision"]
