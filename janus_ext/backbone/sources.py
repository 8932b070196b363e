"""What ``--backbone`` may name: a network of timm's, a repository of the hub, a folder; and what else may be meant."""

from __future__ import annotations

import difflib
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from janus_ext.backbone.files import WeightFile, first_line, misfit
from janus_ext.backbone.torchvision_guard import prepare_torchvision
from janus_ext.errors import ArgumentError, CheckpointError
from janus_ext.runs.checkpoint import read_json

HUB = ("hf-hub", "hf_hub")  # schemes of its names
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # as timm saves them beside config.json
LOCATIONS = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}
LOADING = {  # arguments of timm.create_model that make it read or fetch something, or say how
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "pretrained_strict"),
    *("pretrained_filter_fn", "pretrained_model_args"),
}
SIZES = {"ti": "tiny", "t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant"}
SPELLING = re.compile(
    r"(vit|deit|dinov\d)[-_ ]?(tiny|small|base|large|huge|giant|ti|[tsblhg])(?:[-_/ ]?(?:patch)?(\d+))?(?!\w)"
)


@dataclass(frozen=True)
class Source:
    """A network as timm can make it: the user's name for it, timm's, and what a config.json says of it.

    That file may be a stranger's. So its options describe a network and nothing else: earlier versions of timm would
    unpickle a file that they name.

    Raises:
        CheckpointError: they name a file or an address, or the architecture is none of timm's.
    """

    name: str
    architecture: str  # with the tag of its weights where timm has them
    cfg: dict[str, Any] | None = None  # of the weights, where it is not timm's
    options: dict[str, Any] = field(default_factory=dict)
    file: Callable[[tuple[str, ...]], Path] | None = None  # finds the first of some files; None: timm knows where

    def __post_init__(self) -> None:
        import timm

        if not isinstance(self.architecture, str) or ":" in self.architecture or not timm.is_model(self.architecture):
            raise CheckpointError(f"--backbone {self.name}: timm has no network {self.architecture!r:.80}")
        named = sorted((self.options.keys() & LOADING) | ((self.cfg or {}).keys() & LOCATIONS))
        if named:
            raise CheckpointError(
                f"--backbone {self.name}: its description names what is to be loaded ({', '.join(named)}); a network's "
                "alone is taken"
            )

    def create(self, **options: Any) -> nn.Module:
        """timm's module without a classifier, with weights where the options say so."""
        import timm

        cfg = {} if self.cfg is None else {"pretrained_cfg": self.cfg}
        return timm.create_model(self.architecture, **(self.options | cfg | options | {"num_classes": 0}))

    def create_random(self, **options: Any) -> nn.Module:
        """The same with random weights; CheckpointError where a config.json describes what timm cannot make."""
        try:
            return self.create(**options)
        except Exception as error:  # in any way
            if self.cfg is None or options:
                raise
            reason = f"timm cannot make the network that its config.json describes ({first_line(error)})"
            raise CheckpointError(f"--backbone {self.name}: {reason}") from error

    def weight_file(self) -> WeightFile:
        """The weights of a repository (fetched) or a folder; CheckpointError where it has none."""
        return WeightFile(f"--backbone {self.name}:", str(self.file(WEIGHT_FILES)))


def is_fetched(name: str) -> bool:
    """Whether the name is one of the hub's; a folder may begin with the same letters."""
    return name.partition(":")[0].lower() in HUB


def find_source(name: str) -> Source:
    """The source that ``name`` stands for; timm's old names are known, too.

    Raises:
        ArgumentError: it is none, with similar names.
        CheckpointError: the hub or the folder holds no network of timm's, or cannot be read.
    """
    prepare_torchvision()
    import timm

    scheme, _, place = name.partition(":")
    scheme = scheme.lower()
    if scheme in (*HUB, "local-dir") and not place:
        raise ArgumentError(f"--backbone {name} names nothing: wanted hf-hub:owner/name or local-dir:FOLDER")
    if is_fetched(name):
        return _described(name, lambda names: _fetch(name, place, names))
    if scheme == "local-dir":
        return _described(name, lambda names: _first_of(name, Path(place), names))
    if os.path.isdir(name) and ("/" in name or not timm.is_model(name)):
        return _described(name, lambda names: _first_of(name, Path(name), names))
    current = timm.models.get_deprecated_models().get(name, name)
    if current is None or not timm.is_model(current):
        raise _unknown(name, removed=current is None)
    try:
        timm.get_pretrained_cfg(current)
    except RuntimeError as error:  # the part after the dot
        known = ", ".join(timm.list_pretrained(f"{current.partition('.')[0]}.*"))
        raise ArgumentError(
            f"--backbone {name}: timm {timm.__version__} has no such weights; it has {known}"
        ) from error
    return Source(name, current)


# folders and the hub -------------------------------------------------------------------------------------------------
def _described(name: str, file: Callable[[tuple[str, ...]], Path]) -> Source:
    """The source whose config.json is in timm's layout."""
    import timm

    path = file(("config.json",))
    try:
        config = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"--backbone {name}: {error}") from error
    architecture = config.get("architecture")
    named = isinstance(architecture, str)
    current = timm.models.get_deprecated_models().get(architecture, architecture) if named else None
    if current is None or not timm.is_model(current):
        raise CheckpointError(
            f'--backbone {name}: {path} is no description of timm\'s: its "architecture" is {architecture!r}, and '
            f"timm {timm.__version__} has no such model"
        )
    known = {item.name for item in fields(timm.models.PretrainedCfg)} - LOCATIONS
    cfg, options = config.get("pretrained_cfg", config), config.get("model_args", {})
    if not isinstance(cfg, dict) or not isinstance(options, dict):
        raise CheckpointError(f'--backbone {name}: "pretrained_cfg" and "model_args" in {path} must be objects')
    parts = cfg.get("classifier")
    if not isinstance(parts, (str, type(None))) and not (
        isinstance(parts, list) and all(isinstance(part, str) for part in parts)
    ):
        raise CheckpointError(f'--backbone {name}: "classifier" in {path} must be a name or a list of names')
    kept = {key: value for key, value in cfg.items() if key in known}
    return Source(name, current.partition(".")[0], kept, options, file)


def _first_of(name: str, folder: Path, names: tuple[str, ...]) -> Path:
    found = [folder / wanted for wanted in names if (folder / wanted).is_file()]
    if not found:
        raise CheckpointError(f"--backbone {name}: {folder} is no folder with a {' or '.join(names)}")
    return found[0]


def _fetch(name: str, repository: str, names: tuple[str, ...]) -> Path:
    """The first of some files that a repository ("owner/name", or "owner/name@revision") has, in the hub's cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    repo, _, revision = repository.partition("@")
    with hub(f"--backbone {name}", repository, "--backbone local-dir:FOLDER takes a copy on this machine"):
        for wanted in names:
            try:
                return Path(hf_hub_download(repo, wanted, revision=revision or None))
            except EntryNotFoundError as error:  # the next one may be there
                missing = error
        if isinstance(missing, LocalEntryNotFoundError):
            raise missing
    raise CheckpointError(f"--backbone {name}: {repository} has no {' or '.join(names)}") from missing


@contextmanager
def hub(what: str, wanted: str, hint: str) -> Iterator[None]:
    """Makes one line of whatever the hub's client raises; where nobody answers it looks into its cache at once."""
    from huggingface_hub import constants
    from huggingface_hub.utils import LocalEntryNotFoundError, RepositoryNotFoundError

    before = constants.HF_HUB_OFFLINE
    try:
        # The client retries for a minute, unless it is told that there is no network.
        constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
        yield
    except LocalEntryNotFoundError as error:
        reason, cause = f"{wanted} is neither in the local cache nor to be had from {constants.ENDPOINT}", error
    except RepositoryNotFoundError as error:
        reason, cause = f"{constants.ENDPOINT} has no {wanted}, or not for you", error
    except Exception as error:  # whatever the client, its transport and the file's reader raise
        reason, cause = f"{wanted} gave nothing ({misfit(error, ()) or first_line(error)})", error
    else:
        return
    finally:
        constants.HF_HUB_OFFLINE = before
    raise CheckpointError(f"{what}: {reason}; {hint}") from cause


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


# names that are not timm's -------------------------------------------------------------------------------------------
def _unknown(name: str, removed: bool) -> ArgumentError:
    import timm

    similar = similar_names(name)
    hint = f"; similar: {', '.join(similar)}" if similar else ""
    if re.fullmatch(r"[^/]+/[^/]*[a-zA-Z][^/]*", name):
        hint += f"; a repository of the hub is hf-hub:{name}, a folder local-dir:{name}"
    reason = "has removed that model" if removed else "has no such model"
    return ArgumentError(f"--backbone {name}: timm {timm.__version__} {reason}{hint}")


def similar_names(name: str) -> list[str]:
    """At most five of timm's names that may be meant: in the field's spelling ("ViT-B/16"), in part, or with a slip."""
    import timm

    text = name.lower()
    if spelled := SPELLING.search(text):
        family, size, patch = spelled[1], SIZES.get(spelled[2], spelled[2]), spelled[3] or "*"
        rest = [family, *re.findall(r"[a-z]+\d*|\d+", text.replace(spelled[0], " "))]
        pattern = f"{'deit' if family == 'deit' else 'vit'}*_{size}_patch{patch}*"
        known = {*timm.list_models(pattern), *timm.list_models(pattern, include_tags=True)}
        if known:
            return sorted(known, key=lambda model: (sum(word not in model for word in rest), len(model), model))[:5]
    text = text.rpartition("/")[2].replace("-", "_").replace(" ", "_")
    if part := timm.list_models(f"*{text}*"):
        return part[:5]
    old = {key: new for key, new in timm.models.get_deprecated_models().items() if new}
    close = difflib.get_close_matches(text.partition(".")[0], ["emoji", *timm.list_models(), *old], n=5, cutoff=0.75)
    return list(dict.fromkeys(old.get(model, model) for model in close))
