"""The lines of a model card that load an export and name the classes of "image.png", run in its folder."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from janus_ext.exports.contents import Contents

SHIM = (
    'If an import ends with "operator torchvision::nms does not exist", the first line must be `import '
    "janus_ext.torchvision_shim`."
)
UPRIGHT = 'image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")  # as the camera was held'
SHOW = """for index in scores.argsort()[::-1][:5]:
    print(f"{scores[index]:.3f}  {names[index]}")
"""


def timm() -> str:
    """For what `exports.timm` writes."""
    how = (
        "With timm; elsewhere than in this folder its path takes the place of the dot. `timm.create_model` also takes "
        'the architecture, `num_classes` and `model_args` of `config.json`, and `checkpoint_path="model.safetensors"`. '
    )
    return _section(
        how + SHIM,
        f"""import timm
import torch
from PIL import Image, ImageOps

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
names = model.pretrained_cfg["label_names"]
{UPRIGHT}
with torch.no_grad():
    scores = model(transform(image)[None]).softmax(-1)[0].numpy()
""",
    )


def onnx(contents: Contents) -> str:
    """For what `exports.onnx` writes."""
    return _section(
        f"With any runtime of ONNX (opset 18). Input `images`: {_input(contents)}; output "
        "`scores`: float32 [batch, classes], softmax. The names are in the file's metadata.",
        f"""import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx")
names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
{_image(contents)}
pixels = np.asarray(image).transpose(2, 0, 1)[None]
scores = session.run(["scores"], {{"images": pixels}})[0][0]
""",
    )


def pt2(contents: Contents) -> str:
    """For what `exports.pt2` writes."""
    return _section(
        f"With PyTorch alone. Input: {_input(contents)}; output: float32 [batch, classes], softmax.",
        f"""import json

import numpy as np
import torch
from PIL import Image, ImageOps

extra = {{"class_names.json": ""}}
model = torch.export.load("model.pt2", extra_files=extra).module()
names = json.loads(extra["class_names.json"])
{_image(contents)}
pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
with torch.no_grad():
    scores = model(pixels)[0].numpy()
""",
    )


def peft(contents: Contents) -> str:
    """For what `exports.peft` writes."""
    mean, std = _colours(contents.model.mean), _colours(contents.model.std)
    tasks = json.dumps(list(contents.adapters))
    return _section(
        f"With PEFT and janus_ext: an adapter for every task, over {_base(contents)} without its classifier. All "
        "adapters together are the model; of a task in which the backbone did not learn there is none.",
        f"""import json

import janus_ext.torchvision_shim
import numpy as np
import torch
from janus_ext.backbone import load_backbone
from peft import PeftModel
from PIL import Image, ImageOps
from safetensors import safe_open

tasks = {tasks}
model = PeftModel.from_pretrained({_loading(contents)}, tasks[0], adapter_name=tasks[0])
for task in tasks[1:]:
    model.load_adapter(task, adapter_name=task)
backbone = model.merge_and_unload(adapter_names=tasks).eval()
with safe_open("classifier.safetensors", "pt") as file:
    weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
    names = json.loads(file.metadata()["class_names"])
{_image(contents)}
pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
mean, std = torch.tensor({mean}).view(3, 1, 1), torch.tensor({std}).view(3, 1, 1)
with torch.no_grad():
    scores = (backbone((pixels - mean) / std) @ weight.T + bias).softmax(-1)[0].numpy()
""",
    )


def _section(how: str, code: str) -> str:
    return f"## Use\n\n{how}\n\n```python\n{code}{SHOW}```\n"


def _image(contents: Contents) -> str:
    size, view = contents.model.input_size, contents.view
    kind, border = view.interpolation.upper(), (view.side - size) // 2
    shown = f"ImageOps.fit(image, ({size}, {size}), Image.{kind}, bleed={(1 - view.crop_pct) / 2:g})"
    if view.crop_mode == "squash":
        shown = f"image.resize(({view.side}, {view.side}), Image.{kind})"
        shown += f".crop(({border}, {border}, {border + size}, {border + size}))" if border else ""
    return f"{UPRIGHT}\nimage = {shown}"


def _input(contents: Contents) -> str:
    size = contents.model.input_size
    return f"uint8 [batch, 3, {size}, {size}], RGB from 0 to 255"


def _base(contents: Contents) -> str:
    """The pretrained backbone in words."""
    settings = contents.settings
    of_a_file = "" if settings["weights"] == "pretrained" else f" with the weights `{Path(settings['weights']).name}`"
    return f"the pretrained backbone `{settings['backbone']}`{of_a_file}"


def _loading(contents: Contents) -> str:
    """The call that loads it; of a file of weights the name alone, for the card is for other machines, too."""
    settings = contents.settings
    given = [json.dumps(settings["backbone"])]
    if settings["weights"] != "pretrained":
        given.append(json.dumps(Path(settings["weights"]).name))
    if settings.get("image_size"):
        given.append(f"image_size={settings['image_size']}")
    return f"load_backbone({', '.join(given)})"


def _colours(pixels: Tensor) -> list[float]:
    """Of 0 to 255 as of 0 to 1."""
    return [round(float(value) / 255, 6) for value in pixels.flatten()]
