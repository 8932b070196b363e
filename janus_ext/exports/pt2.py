"""pt2: a program of torch.export from images to scores, which needs neither this package nor timm to run.

It takes uint8 [batch, 3, s, s], RGB from 0 to 255, any batch size, and gives float32 [batch, C], softmax. The names of
the classes are a JSON list in its extra file "class_names.json".
"""

from __future__ import annotations

import io
from pathlib import Path

import torch

from janus_ext.exports import card, usage
from janus_ext.exports.contents import Contents
from janus_ext.exports.folder import check_same, new_folder, random_images
from janus_ext.exports.plain import program_of, scorer
from janus_ext.runs.checkpoint import to_json

FILE = "model.pt2"


def export(contents: Contents, folder: Path) -> None:
    """Writes model.pt2 and README.md; ``folder`` is new or empty.

    Raises:
        ArgumentError: the network has no linear classifier, or torch.export cannot follow it.
        CheckpointError: the folder cannot be written, or the program that is read back computes other scores.
    """
    module, images = scorer(contents), random_images(contents.model.input_size)
    program = program_of(module, images[:2])
    with new_folder(folder) as made, torch.no_grad():
        names = {"class_names.json": to_json(contents.class_names)}
        buffer = io.BytesIO()  # on a full disk PyTorch's own writer ends the process
        torch.export.save(program, buffer, extra_files=names)
        (made / FILE).write_bytes(buffer.getbuffer())
        again = torch.export.load(made / FILE).module()
        for batch in (images, images[:1]):
            check_same("the exported program computes otherwise", again(batch), module(batch), 1e-5)
        card.write(made, contents, usage.pt2(contents))
