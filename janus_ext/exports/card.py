"""The model card beside an export: what was learned of which data, how well, and the lines that load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_ext.exports.contents import Contents
from janus_ext.runs.checkpoint import replace_file
from janus_ext.versions import installed

PRIVATE = {  # settings that say where things lie or how a machine is used, not what the model is
    "data_dir",
    "split_files",
    "class_list",
    "class_names",
    "output",
    "resume",
    "plots",
    "tensorboard",
    "workers",
    "cache_images",
    "check_data",
    "device",
}
PILLOW = """from PIL import Image, ImageOps

image = Image.open("image.png").convert("RGB")
image = ImageOps.fit(image, ({size}, {size}), Image.BILINEAR, bleed={bleed:g})
"""
SHOW = """for index in scores.argsort()[::-1][:5]:
    print(f"{scores[index]:.3f}  {names[index]}")
"""


def write(folder: Path, contents: Contents, loading: str) -> None:
    """Writes README.md; ``loading`` is the section that says how to load the files beside it."""
    parts = (_head(contents), loading, _classes(contents), _accuracy(contents.results), _settings(contents.settings))
    text = "\n".join(part for part in parts if part)
    replace_file(folder / "README.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))


# how to load it ------------------------------------------------------------------------------------------------------
def timm() -> str:
    return _section(
        "In a Python that has timm; or give `timm.create_model` the architecture, `num_classes` and `model_args` of "
        '`config.json`, and `checkpoint_path="model.safetensors"`.',
        """import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()  # the folder of this file
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
names = model.pretrained_cfg["label_names"]
image = Image.open("image.png").convert("RGB")
with torch.no_grad():
    scores = model(transform(image)[None]).softmax(-1)[0].numpy()
"""
        + SHOW,
    )


def onnx(contents: Contents) -> str:
    return _section(
        "In any runtime of ONNX (opset 18). Input `images`: uint8 [batch, 3, s, s], RGB from 0 to 255; output "
        "`scores`: float32 [batch, classes], softmax. The names are in the metadata.",
        "import json\n\nimport numpy as np\nimport onnxruntime\n"
        + _pillow(contents)
        + """pixels = np.asarray(image).transpose(2, 0, 1)[None]
session = onnxruntime.InferenceSession("model.onnx")
names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
scores = session.run(None, {"images": pixels})[0][0]
"""
        + SHOW,
    )


def pt2(contents: Contents) -> str:
    return _section(
        "In a Python that has PyTorch. Input: uint8 [batch, 3, s, s], RGB from 0 to 255; output: float32 "
        "[batch, classes], softmax.",
        "import json\n\nimport numpy as np\nimport torch\n"
        + _pillow(contents)
        + """pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
extra = {"class_names.json": ""}
model = torch.export.load("model.pt2", extra_files=extra).module()
names = json.loads(extra["class_names.json"])
with torch.no_grad():
    scores = model(pixels)[0].numpy()
"""
        + SHOW,
    )


def peft(contents: Contents) -> str:
    settings = contents.settings
    weights = Path(settings["weights"]).name
    given = [repr(settings["backbone"])] + ([repr(weights)] if weights != "pretrained" else [])
    given += [f"image_size={settings['image_size']}"] if settings.get("image_size") else []
    names = [f"task-{index}" for index in range(len(contents.updates))]
    return _section(
        f"An adapter for every task, over the pretrained backbone `{settings['backbone']}` of timm's kind without its "
        f"classifier ({'its own weights' if weights == 'pretrained' else f'weights `{weights}`'}). All of them "
        "together are the model; images are normalised as the backbone wants them.",
        f"""import json

import numpy as np
import torch
from janus_ext.backbone import load_backbone
from peft import PeftModel
from safetensors import safe_open

base = load_backbone({", ".join(given)}).eval()
tasks = {names}
model = PeftModel.from_pretrained(base, tasks[0], adapter_name=tasks[0])
for task in tasks[1:]:
    model.load_adapter(task, adapter_name=task)
backbone = model.merge_and_unload(adapter_names=tasks)
with safe_open("classifier.safetensors", "pt") as file:
    weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
    names = json.loads(file.metadata()["class_names"])
"""
        + _pillow(contents)
        + f"""pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
mean, std = torch.tensor({_colours(contents.model.mean)}), torch.tensor({_colours(contents.model.std)})
with torch.no_grad():
    features = backbone((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    scores = (features @ weight.T + bias).softmax(-1)[0].numpy()
"""
        + SHOW,
    )


def _section(how: str, code: str) -> str:
    return f"## Use\n\n{how}\n\n```python\n{code}```\n"


def _pillow(contents: Contents) -> str:
    return PILLOW.format(size=contents.model.input_size, bleed=(1 - contents.crop) / 2)


def _colours(pixels: Any) -> list[float]:
    return [round(float(value) / 255, 6) for value in pixels.flatten()]


# what it is ----------------------------------------------------------------------------------------------------------
def _head(contents: Contents) -> str:
    settings, count = contents.settings, len(contents.class_names)
    tasks = f", learned in {len(contents.updates)} tasks one after another" if contents.updates else ""
    scores = (
        "Scores are the softmax of cosines to class means times the length of the feature."
        if settings.get("head") == "ncm"
        else "Scores are the softmax over all classes."
    )
    made = ", ".join(f"{name} {installed(name)}" for name in ("janus-ext", "timm", "torch"))
    return (
        f"# An image classifier of {count} classes\n\n"
        f"{settings['backbone']} with the classes below{tasks}, by `{settings['method']}` of janus_ext, on "
        f"{settings.get('benchmark', 'images of its own')}. Updates are merged, weights are float32. {scores} Images "
        f"are {contents.model.input_size} x {contents.model.input_size} pixels. Made with {made}.\n"
    )


def _classes(contents: Contents) -> str:
    groups = [update.class_names for update in contents.updates] or [contents.class_names]
    lines = [f"{index}. {', '.join(map(_cell, names))}" for index, names in enumerate(groups, 1)]
    kind = "Classes, task by task" if contents.updates else "Classes"
    return f"## {kind}\n\n" + "\n".join(lines) + "\n"


def _accuracy(results: Mapping[str, Any] | None) -> str:
    """The accuracy matrix, in per cent."""
    matrix: Sequence[Sequence[float]] = (results or {}).get("accuracy_matrix", ())
    if not matrix:
        return ""
    tasks = range(1, len(matrix) + 1)
    head = f"| after task | {' | '.join(f'on {t}' for t in tasks)} | mean |\n|{'---|' * (len(matrix) + 2)}\n"
    rows = []
    for task, row in enumerate(matrix, 1):
        cells = [f"{value:.2f}" for value in row] + [""] * (len(matrix) - len(row))
        rows.append(f"| {task} | {' | '.join(cells)} | {sum(row) / len(row):.2f} |")
    return (
        "## Accuracy\n\nIn per cent, on test images, among all classes seen so far.\n\n" + head + "\n".join(rows) + "\n"
    )


def _settings(settings: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in settings.items() if key not in PRIVATE and value not in (None, [], ())}
    if "weights" in shown:
        shown["weights"] = Path(shown["weights"]).name
    rows = [f"| {key} | {_cell(str(value))} |" for key, value in shown.items()]
    return "## Settings\n\n| setting | value |\n|---|---|\n" + "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    """Text that stands for itself in a table or a list of Markdown, on one line."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
