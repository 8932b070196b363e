"""Images as somebody hands them over, and what makes two splits of them the same."""

import torch
from PIL import Image
from torch.utils.data import Dataset
from trees import drawing

from janus_ext.backbone import prepare_torchvision

NAMES = ("cat", "dog, small", "eel")


class Listed(Dataset):
    """A data set of (whatever, label) with or without names of its own."""

    def __init__(self, items, classes=None):
        self.items = items
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def pixels(label, style=0):
    return torch.from_numpy(drawing(label, style).copy()).permute(2, 0, 1)


def image_folder(root):
    prepare_torchvision()
    from torchvision.datasets import ImageFolder

    return ImageFolder(str(root))


def bits(split, seed=None):
    """What a pass over the split gives: two batches, augmented if there is a seed."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = list(split.stream(torch.arange(len(split)).split(7), generator))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def assert_same(one, other):
    for seed in (None, 3):
        for a, b in zip(bits(one, seed), bits(other, seed), strict=True):
            assert torch.equal(a, b)


def plain(path, label):
    """As somebody reads an image who does not look at what the camera noted."""
    with Image.open(path) as image:
        return image.copy(), label
