"""`load_backbone`: a network from any source, with weights from any file, at any image size that suits it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from janus_ext.arguments import WIDEST, called, check_integer, check_text, shown
from janus_ext.backbone.files import (
    WeightFile,
    as_timm_takes_it,
    check_kinds,
    check_named_tensors,
    check_tensors,
    find_network,
    first_line,
    misfit,
    read_checkpoint,
    sizes_of_npz,
)
from janus_ext.backbone.network import DROP_RATES, attach, make_vision_transformer
from janus_ext.backbone.sources import Source, find_source, hub, is_fetched
from janus_ext.backbone.torchvision_guard import prepare_torchvision
from janus_ext.errors import ArgumentError, CheckpointError
from janus_ext.runs.checkpoint import read_tensors

TIMMS_OWN = "vit_tiny_patch16_224"  # a VisionTransformer of timm's that takes every argument of the embedded one
EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "backbone.safetensors"


@called
def load_backbone(name: str = "emoji", weights: str = "pretrained", image_size: int | None = None) -> nn.Module:
    """A vision transformer without classifier: "emoji" (embedded), or whatever timm can make.

    ``name`` is "emoji", a model of timm's (its old names, too), "hf-hub:owner/name" (a repository in timm's layout), or
    "local-dir:FOLDER" or the path alone (of a folder with config.json and model.safetensors or pytorch_model.bin).

    ``weights`` is "pretrained" (the name's own: embedded, of timm's hub or the local cache, or of the folder), "none"
    (random, drawn from torch's global generator) or a local file. For "emoji" that is safetensors with the keys
    "architecture" and "normalize" in its metadata. For the others it is, by its ending,

    - ``.safetensors``, or else what ``torch.save`` wrote (``.pth``, ``.pt``, ``.bin``; tensors only, no code is run):
      names and tensors, in timm's names or others that timm converts, bare or inside a training program's checkpoint:
      under "state_dict", "model", "model_state_dict" or other keys, and with "module.", "model.", "backbone." or
      another prefix before all names. Of averaged weights ("ema", "teacher") and others the averaged are taken; or
    - ``.npz``: a JAX checkpoint of Google's (augreg, big_vision).

    A classifier in the file is left out, and so is what lies outside that prefix; position embeddings of another
    resolution are resized, and the rest has to fit name by name and shape by shape (of an .npz: width, heads, blocks,
    and all that timm reads) and to be finite.

    ``image_size`` is the side of the images in pixels, by default what the weights were trained with.
    Dropout and stochastic depth are off, whatever the network's default.
    The result carries ``input_mean``, ``input_std`` (3 numbers each), ``input_size`` (pixels), and ``description``,
    from which `rebuild` makes the same network with random weights, whatever has become of the name's source.

    Raises:
        ArgumentError: there is no such name, or the image size does not suit the network.
        CheckpointError: a file is missing, damaged or does not fit, or the hub cannot be reached.
    """
    check_text("name", name, "a name")
    if not isinstance(weights, (str, os.PathLike)):
        raise ArgumentError(f"weights must be pretrained, none or a file, got {shown(weights)}")
    if image_size is not None:
        check_integer("image_size", image_size, lambda s: 1 <= s <= WIDEST, f"from 1 to {WIDEST} pixels")
    weights = os.fsdecode(weights)
    if weights not in ("pretrained", "none") and not os.path.isfile(weights):
        found = "it is no regular file" if os.path.exists(weights) else "no such file, nor pretrained or none"
        raise CheckpointError(f"--weights {weights}: {found}")
    prepare_torchvision()
    if name == "emoji":
        return _load_embedded(weights, image_size)
    return _load_timm(find_source(name), weights, image_size)


def weight_file(name: str, weights: str) -> Path | None:
    """The local file that `load_backbone` reads the weights from; None for timm's own, the hub's and random ones."""
    if weights != "pretrained":
        return Path(weights) if os.path.isfile(weights) else None
    if name == "emoji":
        return EMBEDDED
    source = find_source(name)
    in_folder = source.file is not None and not is_fetched(name)
    return Path(source.weight_file().path) if in_folder else None


def _load_embedded(weights: str, image_size: int | None) -> nn.Module:
    """timm's VisionTransformer as the metadata of the weight file describes it; no dropout of any kind."""
    path = EMBEDDED if weights in ("pretrained", "none") else Path(weights)
    try:
        tensors, metadata = read_tensors(path)
    except CheckpointError as error:
        raise CheckpointError(f"--backbone emoji takes its weights as .safetensors: {error}") from error
    check_tensors(str(path), tensors.items())
    what = f"{path} holds no vision transformer of this program"
    try:
        options = json.loads(metadata["architecture"])
        normalize = json.loads(metadata["normalize"])
        model = make_vision_transformer(options)
        check_kinds(str(path), tensors, model)
        if weights != "none":
            model.load_state_dict({key: value.float() for key, value in tensors.items()})
        made_by = {key: value for key, value in options.items() if key not in (*DROP_RATES, "num_classes")}
        size = _first(options.get("img_size", 224))
        attach(model, normalize["mean"], normalize["std"], size, {"name": TIMMS_OWN, "options": made_by, "cfg": None})
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{what}: no {error} in its metadata") from error
    except Exception as error:  # timm's model refuses in any way what describes none
        raise CheckpointError(f"{what}: {misfit(error, tensors) or first_line(error)}") from error
    if image_size is not None:
        _check_patches(model, image_size, "emoji")
        model.set_input_size(img_size=(image_size, image_size))
        model.description["options"]["img_size"] = model.description["size"] = model.input_size = image_size
    return model


def _load_timm(source: Source, weights: str, image_size: int | None) -> nn.Module:
    """A model that timm makes, with weights from anywhere."""
    if image_size is not None:
        _check_image_size(source, image_size)
    options = {} if image_size is None else {"img_size": image_size}
    if weights == "none":
        model = source.create_random(**options)
    elif weights == "pretrained" and source.file is None:
        model = _download(source, options)
    elif weights.lower().endswith(".npz"):
        model = _load_npz(source, WeightFile("--weights", weights), options)
    else:
        file = source.weight_file() if weights == "pretrained" else WeightFile("--weights", weights)
        model = _load_tensors(source, file, options)
    cfg = model.pretrained_cfg
    size = image_size or _first(source.options.get("img_size", cfg["input_size"][-1]))
    network = {"name": source.architecture, "options": source.options | options, "cfg": source.cfg}
    try:
        return attach(model, cfg["mean"], cfg["std"], size, network)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"--backbone {source.name}: {first_line(error)}") from error


def _check_image_size(source: Source, size: int) -> None:
    """ArgumentError where the network does not take images of that size; tried with random weights and one image."""
    unfit = f"--image-size {size} does not suit --backbone {source.name}"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            model = source.create(img_size=size).eval()
            _check_patches(model, size, source.name)
            model.forward_features(torch.zeros(1, 3, size, size))
        except ArgumentError:
            raise
        except Exception as error:  # the models of timm refuse in any way
            unknown = isinstance(error, TypeError) and "img_size" in str(error)
            reason = "this network takes no other size than its own" if unknown else first_line(error)
            raise ArgumentError(f"{unfit}: {reason}") from error


def _check_patches(model: nn.Module, size: int, name: str) -> None:
    """ArgumentError where whole patches do not fill the image: most of timm's networks would ignore the rest of it."""
    embedding = getattr(model, "patch_embed", None)
    patch = embedding.feat_ratio() if hasattr(embedding, "feat_ratio") else 1
    if size < patch or size % patch:
        near = max(1, round(size / patch)) * patch
        raise ArgumentError(
            f"--image-size {size} does not suit --backbone {name}: it must be a multiple of its patches' "
            f"{patch} pixels, such as {near}"
        )


def _download(source: Source, options: dict[str, Any]) -> nn.Module:
    """A timm model with the weights of timm's hub or of its local cache."""
    import timm

    cfg = timm.get_pretrained_cfg(source.architecture)
    wanted = (cfg and (cfg.hf_hub_id or cfg.url)) or "timm"
    what = f"--backbone {source.name} --weights pretrained"
    remedy = "--weights FILE takes a local file (.safetensors, .pth, .npz), --backbone emoji is embedded"
    with hub(what, wanted, remedy):
        model = source.create(pretrained=True, **options)
    check_tensors(f"{what}: {wanted}", model.named_parameters())
    return model


def _load_tensors(source: Source, file: WeightFile, options: dict[str, Any]) -> nn.Module:
    """A model with the tensors of a file: as timm finds them there, or else wherever in the file its names are."""
    checkpoint = read_checkpoint(file)
    tensors = as_timm_takes_it(checkpoint)
    try:
        return _fill(source, file, tensors, options)
    except CheckpointError:
        with torch.random.fork_rng(devices=[]):
            names = set(source.create_random(**options).state_dict())
        network = find_network(file, checkpoint, names)
        if network is None or network.keys() == tensors.keys():
            raise
    return _fill(source, file, network, options)


def _fill(source: Source, file: WeightFile, tensors: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """A model with these tensors, which take the way of timm's own downloads."""
    import timm

    cfg = timm.get_pretrained_cfg(source.architecture)
    if source.cfg is not None:
        cfg = timm.models.PretrainedCfg(**source.cfg)
    classifier = (cfg and cfg.classifier) or ()
    layers = (classifier,) if isinstance(classifier, str) else classifier
    left_out = {f"{layer}.{parameter}" for layer in layers for parameter in ("weight", "bias")}
    tensors = {key: value for key, value in tensors.items() if key not in left_out}
    if not tensors:  # timm would ask its hub
        raise CheckpointError(f"{file} holds no tensor beside a classifier's")
    check_named_tensors(file, tensors)
    # timm loads strictly only what has as many classes as the model: none, since the classifier is gone.
    overlay = {"state_dict": tensors, "num_classes": 0, "label_offset": 0, "custom_load": False}
    try:
        model = source.create(pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # timm's conversions of a file of another model fail in any way
        reason = misfit(error, tensors) or f"timm cannot convert it ({first_line(error)})"
        raise CheckpointError(f"{file} does not fit --backbone {source.name}: {reason}") from error
    del model.pretrained_cfg["state_dict"]
    check_kinds(str(file), tensors, model)
    return model


def _load_npz(source: Source, file: WeightFile, options: dict[str, Any]) -> nn.Module:
    """A model with the weights of a JAX checkpoint, read by the model's own loader."""
    model = source.create_random(**options)
    unfit = f"{file} does not fit --backbone {source.name}"
    found = sizes_of_npz(file)
    try:
        wanted = (len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads)
        if found == wanted:
            model.load_pretrained(file.path)
    except Exception as error:  # the loader checks little and fails in any way; a model of another kind has none
        raise CheckpointError(f"{unfit}: timm cannot convert it ({first_line(error)})") from error
    if found != wanted:
        raise CheckpointError(f"{unfit}: blocks, width and heads must be {wanted}, found {found or 'no encoder'}")
    return model


def _first(size: int | list[int] | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else size[0]
