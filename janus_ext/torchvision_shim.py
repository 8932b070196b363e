"""``import janus_ext.torchvision_shim`` before torchvision, timm or transformers: they may die beside a CPU-only torch.

For programs that you cannot edit, the same line as a start-up file of Python's, which then imports torch every time::

    python -c 'import sysconfig; print("import janus_ext.torchvision_shim",
        file=open(sysconfig.get_path("purelib") + "/janus_ext_torchvision.pth", "w"))'

See :func:`janus_ext.backbone.prepare_torchvision` for what it declares, and where it does nothing.
"""

from janus_ext.backbone import prepare_torchvision

prepare_torchvision()
