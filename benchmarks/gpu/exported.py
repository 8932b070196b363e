"""Whether the exports of a run agree, on a CPU and on the device, and so do evaluations on both.

python benchmarks/gpu/exported.py FOLDER DEVICE    # FOLDER holds timm, onnx, pt2, DEVICE (an evaluation) and cpu
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
from PIL import Image
from torch.export.passes import move_to_device_pass

folder, device = Path(sys.argv[1]), sys.argv[2]
failures = 0


def say(name, difference, limit):
    global failures
    failures += not difference <= limit
    print(f"{'ok ' if difference <= limit else 'BAD'} {name:<40} {difference:.1e}")


# Evaluations run under the run's own precision, bfloat16 where the device has it: a few images may fall either way.
scored = [json.loads((folder / where / "evaluation.json").read_text()) for where in (device, "cpu")]
say("evaluated: percent of images apart", abs(scored[0]["accuracy"] - scored[1]["accuracy"]), 2)

model = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
side = model.pretrained_cfg["input_size"][-1]
raw = np.random.default_rng(0).integers(0, 256, (7, side // 8, side // 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
pixels = torch.from_numpy(raw).permute(0, 3, 1, 2).contiguous()
ready = torch.stack([transform(Image.fromarray(image)) for image in raw])
program = torch.export.load(folder / "pt2" / "model.pt2")
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
with torch.no_grad():
    want = model.double()(ready.double()).softmax(-1)
    model.float()
    for where in dict.fromkeys(("cpu", device)):
        got = model.to(where)(ready.to(where)).softmax(-1)
        say(f"timm on {where}", (got.cpu() - want).abs().max().item(), 1e-4)
        moved = program if where == "cpu" else move_to_device_pass(program, where)
        got = moved.module()(pixels.to(where))
        say(f"pt2 on {where}", (got.cpu() - want).abs().max().item(), 1e-4)
session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
got = session.run(["scores"], {"images": pixels.numpy()})[0]
say("onnx", np.abs(got - want.numpy()).max(), 1e-4)
print(f"exported: {failures} bad")
sys.exit(failures > 0)
