"""How a learner is put together: from settings that somebody gives, or from those that a run has stored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from janus_ext import plugins
from janus_ext.arguments import nearest
from janus_ext.backbone import load_backbone, prepare_torchvision
from janus_ext.backbone.network import adopted, attach, probe, rebuild, recompute_blocks
from janus_ext.classifier import ContinualClassifier
from janus_ext.config import LearnConfig, presets
from janus_ext.config.checks import check_learning, default
from janus_ext.config.foreign import HEAD, find_head, find_method, loaded_method, own_settings
from janus_ext.data.images import CROP_MODES, INTERPOLATIONS, View
from janus_ext.devices import AMP_DTYPES, pick_amp, pick_device
from janus_ext.errors import ArgumentError, CheckpointError
from janus_ext.heads import HEADS
from janus_ext.heads.elsewhere import OwnHead
from janus_ext.methods import method_class, method_name
from janus_ext.methods.base import Method
from janus_ext.training.loop import Learner, derive_seed

FIELDS = tuple(field.name for field in fields(LearnConfig))
SHARED = tuple(name for name in FIELDS if name != "own")
OF_NAMES = ("weights", "image_size")  # settings of a backbone that is loaded by its name
# Settings that runs of earlier versions lack, and that do nothing where they are left out.
LATER = ("learn", "merge_scale", "drift_budget", "drift", "head_width", "own", "targets", "checkpointing")


def make_learner(config: LearnConfig, seed: int, planned: int, backbone: nn.Module | None = None) -> Learner:
    """The backbone (by default the configuration's), the model and the method, whose first factors follow the seed.

    ``config`` is resolved, its device and autocast chosen.

    Raises:
        ArgumentError: the method does not fit the backbone, whose name stands before the reason.
    """
    torch.manual_seed(derive_seed(seed, -1, -1, "backbone and first factors"))
    if backbone is None:
        backbone = load_backbone(config.backbone, config.weights, config.image_size)
    model = ContinualClassifier(backbone.to(config.device), AMP_DTYPES[config.amp], config.normalize)
    try:
        method = method_class(config.method)(model, config)
        if config.checkpointing:
            recompute_blocks(model.backbone)
    except ArgumentError as error:
        raise ArgumentError(f"--backbone {config.backbone}: {error}") from error
    return Learner(config, model, method, seed, planned)


def resolve(settings: Mapping[str, Any], own_backbone: bool = False) -> LearnConfig:
    """The checked configuration of a learner, with its device and autocast chosen; ArgumentError names a setting."""
    unread = dict.fromkeys(OF_NAMES if own_backbone else (), "was given a model") | {"cache_images": "keeps no images"}
    for name, reason in unread.items():
        if settings.get(name, default(LearnConfig, name)) != default(LearnConfig, name):
            raise ArgumentError(f"{name} would do nothing here: the learner {reason}")
    names = {"method": method_name(settings["method"]), "head": plugins.name_of(HEAD, settings["head"], HEADS)}
    settings = {**settings, **names}
    found = find_method(settings["method"])
    known = [] if found is None or found.Own is None else [field.name for field in fields(found.Own)]
    for name in settings:
        if name not in (*SHARED, *known):
            raise ArgumentError(f"a learner has no setting {name!r}{nearest(name, (*SHARED, *known))}")
    own = {name: value for name, value in settings.items() if name in known}
    shared = {name: value for name, value in settings.items() if name not in known}
    config = LearnConfig(**shared, own=own or None).resolved()
    config.require_incremental()
    device = pick_device(config.device)
    return replace(config, device=str(device), amp=pick_amp(config.amp, device))


def stored_config(
    settings: Mapping[str, Any],
    device: str | None = None,
    head: str | OwnHead | None = None,
    method: str | type[Method] | None = None,
) -> LearnConfig:
    """The configuration in a run's ``config.json``, on ``device``, or where it was if that is there, or else anywhere.

    Another kind of device chooses its own autocast. ``head`` takes the place of the run's own. ``method`` is the run's
    own, said by whoever lets its code be imported.

    Raises:
        ArgumentError: ``method`` is another one, ``head`` is none.
        CheckpointError: a setting is missing or none of a learner's; the run's method has not been imported, its head
            is a function that nobody has named.
    """
    _consent(method, settings.get("method"))
    missing = [name for name in FIELDS if name not in (*settings, *LATER)]
    if missing:
        raise CheckpointError(f"config.json lacks {', '.join(missing[:3])}: another version of this program wrote it")
    try:
        config = LearnConfig(**{name: settings[name] for name in FIELDS if name in settings})
    except (ArgumentError, TypeError) as error:
        raise CheckpointError(f"config.json holds what cannot be: {error}") from error
    try:
        found = loaded_method(config.method)
    except ArgumentError as error:
        raise CheckpointError(f"config.json names a method that is not here: {error}") from error
    try:
        config = replace(config, own=own_settings(config.method, found, config.own))
        check_learning(config)
    except (ArgumentError, TypeError) as error:
        raise CheckpointError(f"config.json holds what cannot be: {error}") from error
    own = config.device if _is_there(config.device) else "auto"
    chosen = pick_device(own if device is None else device)
    config = _with_head(config, head, settings.get("preset"))
    amp = config.amp if chosen.type == torch.device(config.device).type else pick_amp("auto", chosen)
    return replace(config, device=str(chosen), amp=amp)


def _with_head(config: LearnConfig, head: str | OwnHead | None, preset: Any) -> LearnConfig:
    """With another head than the run's, without random features and with the guard that belongs to it.

    A guard that the head before it had by default goes with that one; what the user said stays.
    A function that is the run's own is said again so that it may be called, and changes nothing.
    """
    if head is None:
        try:
            plugins.require_installed(HEAD, config.head)
            find_head(config.head)
        except ArgumentError as error:
            raise CheckpointError(f"config.json names a head that is not here: {error}") from error
        return config
    name = plugins.name_of(HEAD, head, HEADS)
    find_head(name)
    if name == config.head and name not in HEADS:
        return config
    guard = config.drift_budget
    if guard is None and name != "linear" and preset != "paper":
        guard = presets.GUARD["drift_budget"]
    elif name == "linear" != config.head and guard == presets.GUARD["drift_budget"]:
        guard = None
    return replace(config, head=name, head_width=None, drift_budget=guard)


def _consent(method: str | type[Method] | None, own: Any) -> None:
    if method is None:
        return
    name = method_name(method)
    if name != own:
        raise ArgumentError(f"--method {name} is not that of the run, which is {own}: it cannot be changed")
    find_method(name)


def network_of(settings: Mapping[str, Any], backbone: nn.Module | None = None) -> nn.Module:
    """The network of a run with random weights, as ``config.json`` describes it; ``backbone`` where it does not."""
    network = settings.get("network")
    wanted = {"name", "options", "cfg", "mean", "std", "size"}
    if network is not None and not (isinstance(network, dict) and wanted <= network.keys()):
        raise CheckpointError(f"config.json must describe the network by {', '.join(sorted(wanted))}")
    if network is not None and backbone is not None:
        made = adopted("backbone", backbone)
        kept = {key: network[key] for key in ("name", "options", "cfg")}
        return attach(made, network["mean"], network["std"], network["size"], kept)
    if network is not None and network["name"] is not None:
        return rebuild(network)
    if network is not None:
        raise ArgumentError(
            f"backbone must be a model of the same architecture, got None: this learner was made of a "
            f"{settings['backbone']} that timm does not make by a name"
        )
    weights = settings["weights"]  # of a run before networks were described
    return load_backbone(settings["backbone"], "none" if weights == "pretrained" else weights, settings["image_size"])


def take_classifier(core: Learner, model: nn.Module, names: tuple[str, ...]) -> None:
    """Makes the classifier of ``model``, a copy of which is the learner's backbone, the head of the first task.

    Raises:
        ArgumentError: the names do not fit it, or it is no linear map of the backbone's features.
    """
    linear = model.get_classifier()
    if not isinstance(linear, nn.Linear) or linear.out_features != len(names) or len(set(names)) != len(names):
        found = f"{linear.out_features} outputs" if isinstance(linear, nn.Linear) else f"a {type(linear).__name__}"
        raise ArgumentError(f"class_names must name the model's outputs, each once: {len(names)} names, {found}")
    head = core.model.add_task(len(names))
    bias = torch.zeros(len(names)) if linear.bias is None else linear.bias
    head.load_state_dict({"weight": linear.weight, "bias": bias})
    _check_same(core, model)


@torch.no_grad()
def _check_same(core: Learner, model: nn.Module) -> None:
    """ArgumentError unless the first head on the backbone's features is what ``model`` computes."""
    size = core.model.input_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        want = copy.deepcopy(model).float().eval()(pixels.to(next(model.parameters()).device)).cpu()
    got = core.model.eval().heads[0](core.model.embed(pixels.to(core.device))).cpu()
    if not float((got - want).norm()) <= 1e-3 * float(want.norm()):
        kind = type(model).__name__
        raise ArgumentError(f"model must be a linear classifier behind forward_head(pre_logits=True), {kind} is not")


def stored_numbers(settings: Mapping[str, Any]) -> tuple[int, int]:
    """(seed, planned tasks) of a run's ``config.json``; CheckpointError where they are none."""
    seeds, tasks = settings.get("seed"), settings.get("tasks")
    fits = isinstance(seeds, list) and len(seeds) == 1 and isinstance(tasks, int) and tasks >= 1
    if not fits or not isinstance(seeds[0], int) or seeds[0] < 0:
        raise CheckpointError(
            f"config.json must have one seed and a number of tasks, got {seeds!r:.80} and {tasks!r:.80}"
        )
    return seeds[0], tasks


def view_of(model: nn.Module) -> View:
    """How a model of timm's wants to be shown its images, but for their size; ArgumentError if no `View` is that."""
    prepare_torchvision()
    from timm.data import resolve_model_data_config

    said = resolve_model_data_config(model)
    for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if said[name] not in known:
            raise ArgumentError(
                f"model must take images with the {name} {' or '.join(known)}, its pretrained_cfg has {said[name]!r}"
            )
    return View(margin=1 / said["crop_pct"], interpolation=said["interpolation"], crop_mode=said["crop_mode"])


def check_network(core: Learner, wanted: list[float] | None, folder: Path) -> None:
    """CheckpointError unless the network computes what it did when it was saved: names and shapes do not tell that."""
    if wanted is None:  # a training run, whose network has a name
        return
    found = torch.tensor(network_probe(core))
    if not isinstance(wanted, list) or not all(isinstance(number, float) for number in wanted):
        raise CheckpointError(f"{folder / 'config.json'} must have numbers as probe")
    if len(wanted) != len(found) or not float((found - torch.tensor(wanted)).norm()) <= 1e-2 * float(found.norm()):
        raise CheckpointError(f"the network that {folder} was saved with computed something else than this one")


def network_probe(core: Learner) -> list[float]:
    """A few features of two images of noise, to know the network by."""
    return probe(core.model.backbone)[:, :8].flatten().tolist()


def _is_there(device: str) -> bool:
    kind, _, index = device.partition(":")
    return kind == "cpu" or (kind == "cuda" and int(index or 0) < torch.cuda.device_count())
