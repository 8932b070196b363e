"""Which backbones of timm work: what `inject` does with every family that has attention, on models of random weights.

python benchmarks/families.py [--only FAMILY ...] [--json FILE]
python benchmarks/families.py --table FILE

How many layers are adapted is counted on the model as timm has it, without memory for its weights. What is adapted is
tried on a smaller one: every adapted map is called; its protected inputs keep their outputs whatever B is; the model
without adapters computes what the one with them did; and an attention layer whose v is zero does not see its tokens.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from run import new_file, write
from torch import Tensor, nn

import janus_ext.torchvision_shim  # noqa: F401 - before timm
from janus_ext import ArgumentError, LoRALinear, LoRAQKV, inject, uninject
from janus_ext.backbone.families import attention_layers, computing, mlp_layers
from janus_ext.backbone.places import places, projections_of
from janus_ext.versions import installed

SMALL, STAGES = {"depth": 1}, {"depths": (1, 1, 1, 1)}
THIN = {"depth": 1, "embed_dim": 64, "num_heads": 4}
# By family (module of timm) models by name, and the options of the smaller one.
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "beit": {"beit_base_patch16_224": SMALL},
    "byoanet": {"botnet26t_256": {}},
    "byobnet": {"resnet50_clip": {}},
    "cait": {"cait_xxs24_224": SMALL},
    "coat": {"coat_tiny": {}},
    "convit": {"convit_tiny": {"depth": 2, "local_up_to_layer": 1}},
    "crossvit": {"crossvit_tiny_240": {}},
    "csatv2": {"csatv2": {}},
    "davit": {"davit_tiny": STAGES},
    "deepseek_vit": {"deepseek_vit_412m_enc": SMALL},
    "deit": {"deit_tiny_patch16_224": SMALL},
    "edgenext": {"edgenext_xx_small": {}},
    "efficientformer": {"efficientformer_l1": {}},
    "efficientformer_v2": {"efficientformerv2_s0": {}},
    "efficientvit_mit": {"efficientvit_b0": {}},
    "efficientvit_msra": {"efficientvit_m0": {}},
    "eva": {
        "vit_small_patch16_dinov3": SMALL,
        "vit_small_plus_patch16_dinov3": SMALL,
        "eva02_tiny_patch14_224": SMALL,
        "eva02_base_patch14_224": THIN,
        "vit_base_patch16_sapiens2": THIN | {"num_kv_heads": 2, "img_size": 64},
        "vit_pe_core_tiny_patch16_384": SMALL,
    },
    "fastvit": {"fastvit_sa12": {}},
    "gcvit": {"gcvit_xxtiny": {}},
    "gemma4_vit": {"gemma4_vit_167m_enc": {}},
    "hiera": {"hiera_tiny_224": {"stages": (1, 1, 1, 1)}},
    "hieradet_sam2": {"sam2_hiera_tiny": {"stages": (1, 1, 1, 1)}},
    "iformer": {"iformer_t": {}},
    "levit": {"levit_128s": {}},
    "maxxvit": {"maxvit_tiny_tf_224": {}, "maxvit_nano_rw_256": {}, "coatnet_0_224": {}},
    "metaformer": {"caformer_s18": {}},
    "mobilenetv3": {"mobilenetv4_hybrid_medium_075": {}},
    "mobilenetv5": {"mobilenetv5_base": {}},
    "mobilevit": {"mobilevit_xxs": {}, "mobilevitv2_050": {}},
    "mvitv2": {"mvitv2_tiny": {}},
    "naflexvit": {"naflexvit_base_patch16_gap": SMALL},
    "nest": {"nest_tiny": {}},
    "nextvit": {"nextvit_small": {"depths": (1, 2, 5, 2)}},
    "pit": {"pit_ti_224": {}},
    "pvt_v2": {"pvt_v2_b0": {}},
    "qwen3_vit": {"qwen3_vit_88m_enc": SMALL},
    "shvit": {"shvit_s1": {}},
    "swin_transformer": {"swin_tiny_patch4_window7_224": STAGES},
    "swin_transformer_v2": {"swinv2_tiny_window8_256": STAGES},
    "swin_transformer_v2_cr": {"swinv2_cr_tiny_ns_224": STAGES},
    "tiny_vit": {"tiny_vit_5m_224": {}},
    "tnt": {"tnt_s_patch16_224": SMALL},
    "twins": {"twins_svt_small": STAGES, "twins_pcpvt_small": STAGES},
    "visformer": {"visformer_tiny": {}},
    "vision_transformer": {
        "vit_small_patch16_224": SMALL,
        "vit_small_patch14_dinov2": SMALL,
        "vit_base_patch16_siglip_224": SMALL,
        "vit_dwee_patch16_reg1_gap_256": SMALL,
        "vit_large_patch14_xp_224": {},
    },
    "vision_transformer_hybrid": {"vit_tiny_r_s16_p8_224": SMALL},
    "vision_transformer_relpos": {"vit_relpos_small_patch16_224": SMALL},
    "vision_transformer_sam": {"samvit_base_patch16_224": SMALL},
    "vitamin": {"vitamin_small_224": {}},
    "volo": {"volo_d1_224": {}},
    "xcit": {"xcit_nano_12_p16_224": SMALL},
}
# Families without attention.
WITHOUT = tuple(
    "convmixer convnext cpubone cspnet cspnext densenet dla dpn efficientnet efficientvim fasternet focalnet ghostnet "
    "hardcorenas hgnet hrnet inception_next inception_resnet_v2 inception_v3 inception_v4 lcnetv2 lowformer mambaout "
    "mlp_mixer nasnet nfnet pnasnet rdnet regnet repghost repvit res2net resnest resnet resnetv2 rexnet selecsls senet "
    "sequencer sknet starnet swiftformer tresnet vgg vovnet xception xception_aligned".split()
)
GROUPS = {"q, k, v": ("q", "k", "v"), "proj": ("proj",), "fc1, fc2": ("fc1", "fc2")}  # columns of the table
TOLERANCE = 1e-4  # relative; float32 through a whole model
Call = tuple[tuple[Any, ...], dict[str, Any]]


def make(name: str, options: dict[str, Any], device: str = "cpu") -> nn.Module:
    """A model of timm's without classifier and with random weights, in evaluation mode."""
    import timm

    torch.manual_seed(0)
    with torch.device(device):
        return timm.create_model(name, num_classes=0, **options).eval()


def reason(error: ArgumentError) -> str:
    """Why a model was refused, without the names of its layers and the way to declare a class of one's own."""
    text = str(error).partition("; if ")[0]
    if misfit := re.search(r"at \S+ \((\w+)\): (.*)", text):
        return f"{misfit[1]}: {misfit[2]}"
    if others := re.search(r"\S+ \((\w+)\) has (.*)", text):
        return f"{others[1]}: it has {others[2]}"
    return "no MLP with `fc1` beside its attention" if "MLP" in text else "no attention"


def examine(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """A row of the table, of which everything that is adapted has passed its trials."""
    row = counted(name)
    works = [target for group, targets in GROUPS.items() if not isinstance(row[group], str) for target in targets]
    if works:
        try_maps(make(name, options), works)
    if "v" in works:
        try_values(make(name, options))
    return row


def counted(name: str) -> dict[str, Any]:
    """Of timm's model by group of targets [adapted, all] attention layers or MLPs, or why not; and what is passed over.

    That is kinds of attention that stay as they are, each with its projections.
    """
    model = make(name, {}, "meta")
    attention, mlps = attention_layers(model), mlp_layers(model)
    row: dict[str, Any] = {"passed over": []}
    for group, targets in GROUPS.items():
        layers = mlps if "fc1" in targets else attention
        try:
            owners = {place.owner_name for place in places(model, targets).values()}
        except ArgumentError as error:
            row[group] = reason(error)
            continue
        row[group] = [len(owners), len(layers)]
        if "v" in targets:
            others = [layer for name, layer in attention.items() if name not in owners]
            row["passed over"] = sorted({f"{type(x).__name__} with {projections_of(x)}" for x in others})
    return row


@torch.no_grad()
def try_maps(model: nn.Module, targets: list[str]) -> None:
    """AssertionError unless every adapted map is called, leaves protected inputs alone, and can be merged."""
    for parameter in model.parameters():  # layer scales of 1e-5 would hide everything
        parameter.add_(0.1 * torch.randn_like(parameter))
    pixels = image_of(model)
    layers = inject(model, 2, targets)
    calls = {name: calls_of(layer) for name, layer in layers.items()}
    before = model.forward_features(pixels)
    for name, layer in layers.items():
        assert calls[name], f"{name} is not called"
        check_protected(name, layer, calls[name][-1][0][0])
    after = model.forward_features(pixels)
    assert difference(after, before) > TOLERANCE, "the update moves no feature"
    merged = uninject(model).forward_features(pixels)
    assert difference(merged, after) <= TOLERANCE, "the plain model computes something else"


@torch.no_grad()
def check_protected(name: str, layer: LoRALinear | LoRAQKV, x: Tensor) -> None:
    """Protects some of the inputs x [..., n], one in two at most, takes any B, and compares with the frozen map."""
    rows = x.reshape(-1, layer.in_features)
    some = rows[: max(1, min(len(rows), layer.in_features - layer.rank) // 2)]
    layer.protect(torch.linalg.qr(some.double().mT).Q.float())
    nn.init.normal_(layer.B)
    assert difference(layer(some), layer.linear(some)) <= TOLERANCE, f"{name} does not leave protected inputs alone"


@torch.no_grad()
def try_values(model: nn.Module) -> None:
    """AssertionError unless attention whose v is zero does not see its tokens; one layer of each adapted class."""
    owners = {computing(place.owner): place.owner for place in places(model, ("v",)).values()}
    for kind, layer in owners.items():
        assert sees_only_by_values(model, layer), f"{kind.__name__} sees its tokens without its v"


@torch.no_grad()
def sees_only_by_values(model: nn.Module, layer: nn.Module) -> bool:
    """Whether an attention layer sees its tokens, and does no longer once its v is zero; that stays zero."""
    layer.residual_pooling = False  # MViTv2 adds its pooled q to what attention gives
    for part in getattr(layer, "crpe", nn.Identity()).parameters():  # CoaT, of q times a convolution of v with a bias
        nn.init.zeros_(part)
    calls = calls_of(layer)
    model.forward_features(image_of(model))
    saw = sees_its_tokens(layer, *calls[-1])
    zero_values(layer)
    return saw and not sees_its_tokens(layer, *calls[-1])


@torch.no_grad()
def sees_its_tokens(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the layer's output depends on its tokens by more than rounding."""
    x, *rest = args
    outputs = [layer(torch.randn_like(x) * scale, *rest, **kwargs) for scale in (1.0, 3.0)]
    one, other = (y[0] if isinstance(y, tuple) else y for y in outputs)
    return float((one - other).norm()) > 1e-6 * float(one.norm() + other.norm())


@torch.no_grad()
def zero_values(layer: nn.Module) -> None:
    """The last third of a fused qkv, or the separate projection to v, becomes zero."""
    separate = getattr(layer, "v_proj", getattr(layer, "v", None))
    linear, start = (layer.qkv, layer.qkv.out_features // 3 * 2) if separate is None else (separate, 0)
    linear.weight[start:] = 0
    if linear.bias is not None:
        linear.bias[start:] = 0


def calls_of(layer: nn.Module) -> list[Call]:
    """The arguments of every call of the layer from now on."""
    calls: list[Call] = []
    layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    return calls


def image_of(model: nn.Module) -> Tensor:
    """One image of noise as large as the model takes it."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.default_cfg["input_size"][1:]
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))


def difference(got: Any, want: Any) -> float:
    """|got - want| / |want|; of several outputs the first, of a dictionary its features."""
    first = [y["patches"] if isinstance(y, dict) else y[0] if isinstance(y, (tuple, list)) else y for y in (got, want)]
    return float((first[0] - first[1]).norm() / first[1].norm())


def table(path: Path) -> str:
    """The documents' table of a JSON file."""
    stored = json.loads(path.read_text())
    lines = [f"| family | model | {' | '.join(GROUPS)} | why not |", "|---" * (3 + len(GROUPS)) + "|"]
    for case in stored["cases"]:
        cells = [f"{case[group][0]} of {case[group][1]}" if isinstance(case[group], list) else "–" for group in GROUPS]
        lines.append(f"| {case['family']} | `{case['model']}` | {' | '.join(cells)} | {_why_not(case)} |")
    return "\n".join([*lines, "", f"timm {stored['timm']}. Families without attention: {', '.join(WITHOUT)}."])


def _why_not(case: dict[str, Any]) -> str:
    groups: dict[str, list[str]] = {}
    for group in GROUPS:
        if isinstance(case[group], str):
            groups.setdefault(case[group], []).append(group)
    reasons = [f"{', '.join(found)}: {why}" for why, found in groups.items()]
    others = [f"passed over: {', '.join(case['passed over'])}"] if case["passed over"] else []
    return "; ".join(reasons + others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=new_file)
    parser.add_argument("--only", nargs="+", choices=tuple(FAMILIES), default=tuple(FAMILIES))
    parser.add_argument("--table", type=Path, help="print a JSON file as Markdown")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table))
        return
    result: dict[str, Any] = {"timm": installed("timm"), "cases": []}
    for family in arguments.only:
        for name, options in FAMILIES[family].items():
            result["cases"].append({"family": family, "model": name} | examine(name, options))
            print(result["cases"][-1], flush=True)
            if arguments.json is not None:
                write(arguments.json, result)


if __name__ == "__main__":
    main()
