"""Vision transformers of timm with local weights.

timm needs torchvision to import, and the torchvision of the package index is a CUDA build whose library cannot load
beside a CPU-only PyTorch ("operator torchvision::nms does not exist"). Declaring the two operators it registers fake
kernels for is enough for transforms, data sets and models (pytorch #157648, vision #9077).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from janus_ext.checkpoint import read_tensors
from janus_ext.errors import ArgumentError, CheckpointError

EMBEDDED = Path(__file__).resolve().parent / "assets" / "backbone.safetensors"
DROP_RATES = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
_torchvision_stub: torch.library.Library | None = None


def prepare_torchvision() -> None:
    """Makes ``import torchvision`` (and timm) possible beside a CPU-only PyTorch; call it before importing either.

    Nothing is declared where torchvision's own library loads: it declares the operators itself, and twice is an abort.
    """
    global _torchvision_stub
    if torch.version.cuda is not None or _torchvision_stub is not None or _torchvision_library_loads():
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_stub = library  # the declarations live as long as this object


def _torchvision_library_loads() -> bool:
    """Whether torchvision's compiled library can be loaded into this process; afterwards it is."""
    spec = importlib.util.find_spec("torchvision")
    folders = spec.submodule_search_locations if spec is not None else None
    libraries = [path for folder in folders or () for path in sorted(Path(folder).glob("_C*.so"))]
    try:
        for path in libraries:
            torch.ops.load_library(path)
    except OSError:  # a CUDA build beside a CPU torch: what it links is not there
        return False
    return bool(libraries)


def load_backbone(name: str = "emoji", weights: str = "pretrained") -> nn.Module:
    """A vision transformer without classifier: "emoji" (embedded) or any timm model name.

    ``weights`` is "pretrained" (timm's, from its hub or the local cache), "none" (random, drawn from torch's global
    generator) or a local file. For "emoji" that is safetensors with the keys "architecture" and "normalize" in its
    metadata. For timm's names it is, by its ending,

    - ``.safetensors``, or else what ``torch.save`` wrote (``.pth``, ``.pt``, ``.bin``; tensors only, no code is run):
      names and tensors, also under "state_dict" or "model" (averaged weights beside them are preferred, as timm does)
      and with "module." before the names, in timm's names or others that timm converts; or
    - ``.npz``: a JAX checkpoint of Google's (augreg, big_vision).

    A classifier in the file is left out, position embeddings of another resolution are resized, and the rest has to
    fit name by name and shape by shape (of an .npz: width, heads, blocks, and all that timm reads).
    The result carries ``input_mean``, ``input_std`` (3 numbers each) and ``input_size`` (pixels).

    Raises:
        ArgumentError: timm has no such name.
        CheckpointError: the file is missing, damaged or does not fit, or the hub cannot be reached.
    """
    if weights not in ("pretrained", "none") and not os.path.isfile(weights):
        raise CheckpointError(f"--weights {weights}: no such file (or one of: pretrained, none)")
    return _load_embedded(weights) if name == "emoji" else _load_timm(name, weights)


def _load_embedded(weights: str) -> nn.Module:
    """timm's VisionTransformer as the metadata of the weight file describes it; no dropout of any kind."""
    prepare_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    path = EMBEDDED if weights in ("pretrained", "none") else Path(weights)
    tensors, metadata = read_tensors(path)
    what = f"{path} holds no vision transformer of this program"
    try:
        architecture = json.loads(metadata["architecture"])
        normalize = json.loads(metadata["normalize"])
        model = VisionTransformer(**(architecture | dict.fromkeys(DROP_RATES, 0.0) | {"num_classes": 0}))
        if weights != "none":
            model.load_state_dict({key: value.float() for key, value in tensors.items()})
        return _describe(model, normalize["mean"], normalize["std"], _first(architecture.get("img_size", 224)))
    except KeyError as error:
        raise CheckpointError(f"{what}: no {error} in its metadata") from error
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{what}: {_misfit(error, len(tensors)) or _first_line(error)}") from error


def _load_timm(name: str, weights: str) -> nn.Module:
    """A timm model by name without its classifier."""
    prepare_torchvision()
    import timm

    _check_name(name)
    if weights == "none":
        model = timm.create_model(name, num_classes=0)
    elif weights == "pretrained":
        model = _download(name)
    elif weights.lower().endswith(".npz"):
        model = _load_npz(name, weights)
    else:
        model = _load_tensors(name, weights)
    cfg = model.pretrained_cfg
    return _describe(model, cfg["mean"], cfg["std"], cfg["input_size"][-1])


def _check_name(name: str) -> None:
    """ArgumentError with similar names where timm has no model, or no set of weights, of that name."""
    import timm

    if not timm.is_model(name):
        similar = timm.list_models(f"*{name}*")[:5]
        hint = f"; similar: {', '.join(similar)}" if similar else ""
        raise ArgumentError(f"--backbone {name}: timm {timm.__version__} has no such model{hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the part after the dot
        known = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*"))
        raise ArgumentError(
            f"--backbone {name}: timm {timm.__version__} has no such weights; it has {known}"
        ) from error


def _download(name: str) -> nn.Module:
    """A timm model with the weights of timm's hub or of its local cache."""
    import timm
    from huggingface_hub import constants
    from huggingface_hub.utils import LocalEntryNotFoundError

    cfg = timm.get_pretrained_cfg(name)
    source = (cfg.hf_hub_id or cfg.url) if cfg else None
    before = constants.HF_HUB_OFFLINE
    try:
        # The hub's client retries for a minute. Where nobody answers it is told so, and looks into its cache at once.
        constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
        return timm.create_model(name, pretrained=True, num_classes=0)
    except LocalEntryNotFoundError as error:
        reason, cause = f"{source} is neither in the local cache nor to be had from {constants.ENDPOINT}", error
    except Exception as error:  # whatever the hub's client, its transport and the file's reader raise
        reason, cause = f"{source or 'timm'} gave no weights ({_first_line(error)})", error
    finally:
        constants.HF_HUB_OFFLINE = before
    hint = "--weights FILE takes a local file (.safetensors, .pth, .npz)"
    raise CheckpointError(f"--backbone {name} --weights pretrained: {reason}; {hint}") from cause


def _answers(url: str) -> bool:
    """Whether a server answers there within 5 seconds, through the proxies of the environment, be it with an error."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the hub's client may know other certificates
    except OSError:
        return False
    return True


def _load_tensors(name: str, path: str) -> nn.Module:
    """A timm model with the tensors of a file, which take the way of timm's own downloads."""
    import timm

    tensors = _read_tensors(path)
    cfg = timm.get_pretrained_cfg(name)
    classifier = (cfg and cfg.classifier) or ()
    for layer in (classifier,) if isinstance(classifier, str) else classifier:
        for parameter in ("weight", "bias"):
            tensors.pop(f"{layer}.{parameter}", None)
    if not tensors:  # timm would ask its hub
        raise CheckpointError(f"--weights {path} holds no tensor beside a classifier's")
    # timm loads strictly only what has as many classes as the model: none, since the classifier is gone.
    overlay = {"state_dict": tensors, "num_classes": 0, "label_offset": 0, "custom_load": False}
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except Exception as error:  # timm's conversions of a file of another model fail in any way
        reason = _misfit(error, len(tensors)) or f"timm cannot convert it ({_first_line(error)})"
        raise CheckpointError(f"--weights {path} does not fit --backbone {name}: {reason}") from error
    del model.pretrained_cfg["state_dict"]
    return model


def _read_tensors(path: str) -> dict[str, Tensor]:
    """Names and tensors of a safetensors file or of what ``torch.save`` wrote."""
    from timm.models import load_state_dict

    try:
        tensors = load_state_dict(path, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"--weights {path} cannot be read: {error}") from error
    except Exception as error:  # a damaged pickle fails in any way
        if "GLOBAL" in str(error.__cause__ or error):  # as PyTorch calls the function or class that a pickle names
            reason = "needs code to be loaded and is refused: it must hold tensors only, convert it to safetensors"
            raise CheckpointError(f"--weights {path} {reason}") from error
        kind = "safetensors" if path.endswith(".safetensors") else "a PyTorch checkpoint, and not .safetensors or .npz"
        raise CheckpointError(f"--weights {path} is truncated or not {kind}") from error
    strangers = [str(key) for key, value in tensors.items() if not isinstance(value, Tensor)]
    if strangers:
        raise CheckpointError(f"--weights {path} must hold named tensors only, but others are {_some(strangers)}")
    return tensors


def _load_npz(name: str, path: str) -> nn.Module:
    """A timm model with the weights of a JAX checkpoint, read by the model's own loader."""
    import timm

    model = timm.create_model(name, num_classes=0)
    unfit = f"--weights {path} does not fit --backbone {name}"
    try:
        found = _sizes_of_npz(path)
    except Exception as error:  # of the file system, NumPy, zipfile or zlib
        raise CheckpointError(f"--weights {path} cannot be read as .npz: {_first_line(error)}") from error
    try:
        wanted = (len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads)
        if found == wanted:
            model.load_pretrained(path)
    except Exception as error:  # the loader checks little and fails in any way; a model of another kind has none
        raise CheckpointError(f"{unfit}: timm cannot convert it ({_first_line(error)})") from error
    if found != wanted:
        raise CheckpointError(f"{unfit}: blocks, width and heads must be {wanted}, found {found or 'no encoder'}")
    return model


def _sizes_of_npz(path: str) -> tuple[int, ...] | None:
    """(blocks, width, heads) of the image encoder in a JAX checkpoint, None where there is none; reads every array."""
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
        shapes = {key: file[key].shape for key in file.files}  # all of it: the model's loader would stop half way
    queries = [shapes[key] for key in shapes if re.search(r"Transformer/encoderblock.*/query/kernel$", key)]
    if not queries:
        return None
    *stacked, width, heads, _ = queries[0]
    return (*(stacked or [len(queries)]), width, heads)


def _misfit(error: Exception, given: int) -> str:
    """In one line what PyTorch says in a page: why ``given`` named tensors do not fit a module; "" of other errors."""
    text = str(error)
    shapes = re.findall(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", text)
    lines = {kind: re.search(rf"{kind} key\(s\) in state_dict: (.*)", text) for kind in ("Missing", "Unexpected")}
    keys = {kind: re.findall(r'"(.*?)"', line[1]) if line else [] for kind, line in lines.items()}
    if given and len(keys["Unexpected"]) == given:
        return f"not one of its {given} tensors belongs there, it is of another architecture"
    parts = {
        "wrong shapes": [f"{key} wanted {wanted} found {found}" for key, found, wanted in shapes],
        "missing": keys["Missing"],
        "unexpected": keys["Unexpected"],
    }
    return "; ".join(f"{kind}: {_some(names)}" for kind, names in parts.items() if names)


def _some(names: list[str]) -> str:
    """At most three names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    """What an error says, without the rest of its page."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _describe(model: nn.Module, mean: Any, std: Any, size: int) -> nn.Module:
    """Attaches what images must look like: colour statistics and side length."""
    model.input_mean, model.input_std, model.input_size = tuple(mean), tuple(std), int(size)
    return model


def _first(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]
