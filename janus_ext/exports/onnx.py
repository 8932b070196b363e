"""ONNX: one file from images to scores, opset 18, float32, any batch size.

Input ``images``: uint8 [batch, 3, s, s], RGB from 0 to 255. Output ``scores``: float32 [batch, C], softmax. The names
of the classes are in the file's metadata, a JSON list under "class_names".
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from janus_ext.backbone.files import first_line
from janus_ext.classifier import unfuse_attention
from janus_ext.errors import ArgumentError
from janus_ext.exports import card, usage
from janus_ext.exports.contents import Contents
from janus_ext.exports.folder import check_same, new_folder, random_images, require
from janus_ext.exports.plain import program_of, scorer
from janus_ext.runs.checkpoint import to_json

OPSET = 18
TOLERANCE = 1e-4  # of the largest score
LARGEST = 2**31 - 2**20  # bytes of weights in one file; what is larger gets a file of weights beside it
FILE = "model.onnx"


def export(contents: Contents, folder: Path) -> None:
    """Writes model.onnx (above 2 GB with model.onnx.data beside it) and README.md; ``folder`` is new or empty.

    Raises:
        ArgumentError: a package is missing, the network has no linear classifier, or torch cannot translate it.
        CheckpointError: the folder cannot be written, or ONNX Runtime computes other scores.
    """
    require("onnx", "onnx", "onnxscript", "onnxruntime")
    module, images = scorer(contents), random_images(contents.model.input_size)
    unfuse_attention(module)  # ONNX has no fused one before opset 23, and torch's translation fails for some networks
    graph = _graph(program_of(module, images[:2]))
    graph.model.metadata_props["class_names"] = to_json(contents.class_names)
    size = sum(tensor.nbytes for tensor in module.state_dict().values())  # of a head the weights are buffers
    with new_folder(folder) as made:
        graph.save(str(made / FILE), external_data=size > LARGEST)
        for batch in (images, images[:1]):
            with torch.no_grad():
                check_same("ONNX Runtime computes otherwise", _scores(made / FILE, batch), module(batch), TOLERANCE)
        card.write(made, contents, usage.onnx(contents))


def _graph(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        names = {"input_names": ["images"], "output_names": ["scores"]}
        try:
            return torch.onnx.export(program, **names, opset_version=OPSET, dynamo=True, verbose=False)
        except torch.onnx.OnnxExporterError as error:  # a page, and the reason beneath it
            reason = first_line(error.__cause__ or error)
            raise ArgumentError(f"torch cannot translate this network to ONNX: {reason}") from error


def _scores(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [scores] = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(scores)
