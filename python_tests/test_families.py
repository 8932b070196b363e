"""Which attention layers of timm's models can be adapted: the table of `families` against what the layers compute."""

import copy
import json
import pickle
import types
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import assert_close
from torch import nn

from janus_ext import ArgumentError, inject
from janus_ext.backbone import prepare_torchvision
from janus_ext.backbone.families import LAYOUTS, attention_layers, declare_stacked
from janus_ext.backbone.freezing import freeze
from janus_ext.backbone.places import places

SMALL = {"depth": 1}
STAGES = {"depths": (1, 1, 1, 1)}
MODELS = {  # per class of the table a small model of timm that uses it, and what keeps it small
    "timm.layers.attention.Attention": ("test_vit", SMALL),
    "timm.layers.attention.AttentionRope": ("vit_small_patch16_rope_224", SMALL),
    "timm.layers.diff_attention.DiffAttention": ("vit_dwee_patch16_reg1_gap_256", SMALL),
    "timm.models.beit.Attention": ("beit_base_patch16_224", SMALL),
    "timm.models.cait.TalkingHeadAttn": ("cait_xxs24_224", SMALL),
    "timm.models.coat.FactorAttnConvRelPosEnc": ("coat_tiny", {}),
    "timm.models.convit.MHSA": ("convit_tiny", {"depth": 2, "local_up_to_layer": 1}),
    "timm.models.davit.WindowAttention": ("davit_tiny", STAGES),
    "timm.models.edgenext.CrossCovarianceAttn": ("edgenext_xx_small", {}),
    "timm.models.eva.EvaAttention": ("vit_small_patch16_dinov3", SMALL),
    "timm.models.fastvit.Attention": ("fastvit_sa12", {}),
    "timm.models.hiera.MaskUnitAttention": ("hiera_tiny_224", {"stages": (1, 1, 1, 1)}),
    "timm.models.hieradet_sam2.MultiScaleAttention": ("sam2_hiera_tiny", {"stages": (1, 1, 1, 1)}),
    "timm.models.maxxvit.AttentionCl": ("maxvit_tiny_tf_224", {}),
    "timm.models.metaformer.Attention": ("caformer_s18", {}),
    "timm.models.mvitv2.MultiScaleAttention": ("mvitv2_tiny", {}),
    "timm.models.nest.Attention": ("nest_tiny", {}),
    "timm.models.nextvit.EfficientAttention": ("nextvit_small", {"depths": (1, 2, 5, 2)}),
    "timm.models.swin_transformer.WindowAttention": ("swin_tiny_patch4_window7_224", STAGES),
    "timm.models.swin_transformer_v2.WindowAttention": ("swinv2_tiny_window8_256", STAGES),
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": ("swinv2_cr_tiny_ns_224", STAGES),
    "timm.models.twins.LocallyGroupedAttn": ("twins_svt_small", STAGES),
    "timm.models.vision_transformer_relpos.RelPosAttention": ("test_vit_relpos", {}),
    "timm.models.vision_transformer_sam.Attention": ("samvit_base_patch16_224", SMALL),
    "timm.models.volo.Attention": ("volo_d1_224", {}),
    "timm.models.xcit.XCA": ("xcit_nano_12_p16_224", SMALL),
}


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/families.py, which tries what the tables say."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import families

    return families


def make(name: str, options: dict[str, object]) -> nn.Module:
    prepare_torchvision()
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **options).eval()


def first_of(model: nn.Module, kind: str) -> nn.Module:
    found = [m for m in model.modules() if f"{type(m).__module__}.{type(m).__qualname__}" == kind]
    assert found, f"{kind} is not in {type(model).__name__}"
    return found[-1]


def call_of(families: ModuleType, model: nn.Module, layer: nn.Module) -> tuple[tuple, dict]:
    """The arguments of the layer when the model sees an image."""
    calls = families.calls_of(layer)
    with torch.no_grad():
        model.forward_features(families.image_of(model))
    return calls[-1]


GROUPED = {"depth": 1, "embed_dim": 64, "num_heads": 4, "num_kv_heads": 2, "img_size": 64}  # two queries a key
SEPARATE = {  # classes that have separate projections in some models
    "timm.layers.attention.AttentionRope": ("vit_base_patch16_sapiens2", GROUPED),
    "timm.models.eva.EvaAttention": ("eva02_base_patch14_224", {"depth": 1, "embed_dim": 64, "num_heads": 4}),
    "timm.models.nextvit.EfficientAttention": MODELS["timm.models.nextvit.EfficientAttention"],
}


@pytest.mark.parametrize(
    ("kind", "model"), [*MODELS.items(), *SEPARATE.items()], ids=[*MODELS, *(f"{kind}, separate" for kind in SEPARATE)]
)
def test_without_its_values_a_layer_does_not_see_its_tokens(families, kind: str, model: tuple[str, dict]) -> None:
    layer = first_of(model := make(*model), kind)
    assert LAYOUTS[kind](layer) == ""
    assert families.sees_only_by_values(model, layer)


def test_every_class_of_the_table_is_tried() -> None:
    elsewhere = {"timm.models.vision_transformer.Attention"}  # a name of older timm for layers.attention
    refused = {kind for kind, test in LAYOUTS.items() if test(types.SimpleNamespace(head_first=True, use_global=True))}
    timms = {kind for kind in LAYOUTS if kind.startswith("timm.")}
    assert timms - refused - elsewhere | {"timm.models.maxxvit.AttentionCl"} == set(MODELS)


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("timm.models.maxxvit.AttentionCl", "test_maxvit", {}),
        ("timm.models.efficientformer.Attention", "efficientformer_l1", {}),
        ("timm.models.tiny_vit.Attention", "tiny_vit_5m_224", {}),
        ("timm.models.davit.ChannelAttention", "davit_tiny", STAGES),
    ],
    ids=lambda v: str(v).rpartition(".")[2],
)
def test_a_refused_layer_sees_its_tokens_without_its_last_third(families, kind: str, name: str, options: dict) -> None:
    model = make(name, options)
    layer = first_of(model, kind)
    args, kwargs = call_of(families, model, layer)
    families.zero_values(layer)
    assert families.sees_its_tokens(layer, args, kwargs)
    with pytest.raises(ArgumentError, match=rf"cannot be adapted at \S+ \({kind.rpartition('.')[2]}\): it"):
        inject(model, rank=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_maxvit", r"AttentionCl\): its qkv rows are ordered by head"),
        ("levit_128s", r"Attention\): its qkv rows are ordered by head"),
        ("visformer_tiny", r"Attention\): its qkv is a Conv2d, only an nn.Linear can be adapted"),
        ("test_coatnet", r"Attention2d\): its qkv is a Conv2d, only an nn.Linear"),
        ("gcvit_xxtiny", r"WindowAttentionGlobal\): its qkv holds k and v only"),
        (
            "gemma4_vit_167m",
            r"Gemma4Attention\) has q_proj, k_proj, v_proj, and a Gemma4ClippableLinear is no nn.Linear",
        ),
        ("tnt_s_patch16_224", r"attention layers have others, blocks.0.attn_in \(Attention\) has qk, v$"),
        ("pvt_v2_b0", r"attention layers have others, stages.0.blocks.0.attn \(Attention\) has q, kv"),
        ("resnet18", r"got ResNet: it has no attention layer at all"),
    ],
)
def test_the_reason_of_a_refusal(name: str, message: str) -> None:
    with torch.device("meta"):
        model = make(name, {})
    with pytest.raises(ArgumentError, match=message):
        inject(model, rank=2)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "adapted", "left"),
    [
        ("convit_tiny", {}, "2 of 12", {"GPSA"}),
        ("twins_svt_small", {}, "9 of 18", {"GlobalSubSampleAttn"}),
        ("test_vit3", {}, "9 of 10", {"AttentionPoolLatent"}),
        ("test_vit", {}, "6 of 6", set()),
    ],
)
def test_what_was_adapted_of_how_much_is_said(name: str, options: dict, adapted: str, left: set[str]) -> None:
    model = make(name, options)
    size = sum(p.numel() for p in model.parameters())
    layers = inject(model, rank=2)
    factors = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert layers.parameters == factors and layers.model_parameters == size
    assert layers.summary().startswith(
        f"LoRA on k, v of {adapted} attention layers, {factors:,} parameters beside {size:,}"
    )
    assert ("; not adapted: " in layers.summary()) == bool(left)
    assert all(f" ({kind})" in layers.summary() for kind in left)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch16_dinov3", SMALL),
        ("beit_base_patch16_224", SMALL),
        ("eva_giant_patch14_224", {"depth": 1, "embed_dim": 64, "num_heads": 4}),
        ("swinv2_tiny_window8_256", STAGES),
    ],
)
def test_a_bias_beside_qkv_is_folded_in(families, name: str, options: dict) -> None:
    model = make(name, options)
    attention = list(places(model, ("k", "v")).values())[-1].owner
    for part in ("q_bias", "v_bias"):
        if getattr(attention, part, None) is not None:
            nn.init.normal_(getattr(attention, part))
    args, kwargs = call_of(families, model, attention)
    with torch.no_grad():
        before = attention(*args, **kwargs)
        layer = list(inject(model, rank=2).values())[-1]
        assert_close(attention(*args, **kwargs), before, torch.float32)
        nn.init.normal_(layer.B)
        during = attention(*args, **kwargs)
        assert (during - before).norm() > 1e-2 * before.norm(), "the adapted layer is called"
        layer.merge()
        assert_close(attention(*args, **kwargs), during, torch.float32)


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(q @ k.mT, -1) @ v


class Heir(Mine):
    pass


class Rebel(Mine):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qkv(x)[..., ::3]


def test_unknown_attention_is_refused_until_it_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("janus_ext.backbone.families.LAYOUTS", dict(LAYOUTS))
    with pytest.raises(ArgumentError, match=r"at 0 \(Mine\): the rows of its qkv are not known .*stacked\(Mine"):
        inject(nn.Sequential(Mine()), rank=2)
    assert declare_stacked(Mine) is Mine
    assert list(inject(nn.Sequential(Mine(), Heir()), rank=2)) == ["0.qkv", "1.qkv"]
    with pytest.raises(ArgumentError, match=r"at 0 \(Rebel\): the rows of its qkv are not known"):
        inject(nn.Sequential(Rebel()), rank=2)
    one = Mine()
    two = Mine()
    two.qkv.weight = one.qkv.weight
    with pytest.raises(ArgumentError, match=r"at 0: 0.qkv and 1.qkv share one weight"):
        inject(nn.Sequential(one, two), rank=2)


def test_attention_that_torch_computes_counts_as_left_out() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert list(attention_layers(model)) == ["0"]


# ------------------------------------------------------------------------------------------- the table of the documents


def stored() -> dict[str, object]:
    return json.loads((Path(__file__).parent.parent / "benchmarks" / "results" / "families.json").read_text())


def same_timm() -> None:
    import timm

    if timm.__version__ != stored()["timm"]:
        pytest.skip(f"the table is of timm {stored()['timm']}")


def test_the_table_has_every_family_of_timm(families) -> None:
    same_timm()
    from timm.models import list_modules

    models = {(family, name) for family, named in families.FAMILIES.items() for name in named}
    assert models == {(case["family"], case["model"]) for case in stored()["cases"]}
    assert set(list_modules()) == set(families.FAMILIES) | set(families.WITHOUT)
    assert not set(families.FAMILIES) & set(families.WITHOUT)


@pytest.mark.parametrize("case", stored()["cases"], ids=lambda case: case["model"])
def test_the_table_says_what_inject_does(families, case: dict[str, object]) -> None:
    same_timm()
    assert families.counted(case["model"]) == {k: v for k, v in case.items() if k not in ("family", "model")}


class Deaf(Mine):
    """Has a qkv, calls something else."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6, 18)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(x)[..., 6:12]


class Net(nn.Sequential):
    default_cfg = types.MappingProxyType({"input_size": (3, 4, 6)})

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self(x.flatten(1, 2))


@pytest.mark.parametrize(("kind", "passes"), [(Mine, True), (Rebel, False), (Deaf, False)])
def test_the_trials_can_fail(families, kind: type[nn.Module], passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("janus_ext.backbone.families.LAYOUTS", dict(LAYOUTS))
    declare_stacked(kind)
    if passes:
        families.try_maps(Net(kind()), ["q", "k", "v"])
        families.try_values(Net(kind()))
        return
    with pytest.raises(AssertionError, match="is not called" if kind is Deaf else "sees its tokens without its v"):
        families.try_maps(Net(kind()), ["q", "k", "v"])
        families.try_values(Net(kind()))


# ------------------------------------------------------------------------------------------------------------- freezing


def test_running_statistics_of_a_frozen_model_stay() -> None:
    model = make("xcit_nano_12_p16_224", SMALL)
    image = torch.randn(2, 3, 224, 224)
    inject(model, rank=2)
    before, state = model(image), {name: b.clone() for name, b in model.named_buffers()}
    model.train()
    model(image)
    assert all(torch.equal(b, state[name]) for name, b in model.named_buffers())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)
    assert model.training and torch.equal(model.eval()(image), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_frozen_normalisation_is_frozen(copied) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True), nn.Dropout())
    freeze(model)
    freeze(model)  # twice is once
    twin = copied(model).train()
    assert [m.training for m in twin] == [False, False, True]
    assert isinstance(twin[0], nn.BatchNorm2d) and type(twin[0]) is type(model[0])
    assert list(twin.state_dict()) == list(model.state_dict())
