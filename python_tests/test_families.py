"""Which attention layers of timm's models can be adapted: the table of `families` against what the layers compute."""

import copy
import pickle
import types

import pytest
import torch
from conftest import assert_close
from torch import nn

from janus_ext import ArgumentError, inject
from janus_ext.backbone import prepare_torchvision
from janus_ext.backbone.families import LAYOUTS, attention_layers, declare_stacked, freeze, fused_attention

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
    "timm.models.swin_transformer.WindowAttention": ("swin_tiny_patch4_window7_224", STAGES),
    "timm.models.swin_transformer_v2.WindowAttention": ("swinv2_tiny_window8_256", STAGES),
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": ("swinv2_cr_tiny_ns_224", STAGES),
    "timm.models.twins.LocallyGroupedAttn": ("twins_svt_small", STAGES),
    "timm.models.vision_transformer_relpos.RelPosAttention": ("test_vit_relpos", {}),
    "timm.models.vision_transformer_sam.Attention": ("samvit_base_patch16_224", SMALL),
    "timm.models.volo.Attention": ("volo_d1_224", {}),
    "timm.models.xcit.XCA": ("xcit_nano_12_p16_224", SMALL),
}


def make(name: str, options: dict[str, object]) -> nn.Module:
    prepare_torchvision()
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **options).eval()


def first_of(model: nn.Module, kind: str) -> nn.Module:
    found = [m for m in model.modules() if f"{type(m).__module__}.{type(m).__qualname__}" == kind]
    assert found, f"{kind} is not in {type(model).__name__}"
    return found[-1]


@torch.no_grad()
def call_of(model: nn.Module, layer: nn.Module) -> tuple[tuple, dict]:
    """The arguments of the layer when the model sees an image."""
    calls = []
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    size = model.default_cfg["input_size"][-1] if hasattr(model, "default_cfg") else 224
    model.forward_features(torch.randn(1, 3, size, size))
    handle.remove()
    return calls[-1]


@torch.no_grad()
def reads_its_tokens(layer: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether the layer's output depends on its tokens by more than rounding."""
    x, *rest = args
    outputs = [layer(torch.randn_like(x) * scale, *rest, **kwargs) for scale in (1.0, 3.0)]
    one, other = (y[0] if isinstance(y, tuple) else y for y in outputs)
    return float((one - other).norm()) > 1e-6 * float(one.norm() + other.norm())


@torch.no_grad()
def zero_last_third(layer: nn.Module) -> None:
    width = layer.qkv.out_features // 3
    layer.qkv.weight[2 * width :] = 0
    if layer.qkv.bias is not None:
        layer.qkv.bias[2 * width :] = 0


@pytest.mark.parametrize("kind", MODELS)
def test_without_its_v_slice_a_stacked_layer_does_not_see_its_tokens(kind: str) -> None:
    model = make(*MODELS[kind])
    layer = first_of(model, kind)
    assert LAYOUTS[kind](layer) == ""
    layer.residual_pooling = False  # MViTv2 adds its pooled q to what attention gives
    for part in getattr(layer, "crpe", nn.Identity()).parameters():  # CoaT, of q times a convolution of v with a bias
        nn.init.zeros_(part)
    args, kwargs = call_of(model, layer)
    assert reads_its_tokens(layer, args, kwargs)
    zero_last_third(layer)
    assert not reads_its_tokens(layer, args, kwargs)


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
def test_a_refused_layer_sees_its_tokens_without_its_last_third(kind: str, name: str, options: dict) -> None:
    model = make(name, options)
    layer = first_of(model, kind)
    args, kwargs = call_of(model, layer)
    zero_last_third(layer)
    assert reads_its_tokens(layer, args, kwargs)
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
            "eva02_base_patch14_224",
            r"its 12 attention layers have others, blocks.0.attn \(EvaAttention\) has q_proj",
        ),
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
    assert ("not adapted, for they have no fused qkv: " in layers.summary()) == bool(left)
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
def test_a_bias_beside_qkv_is_folded_in(name: str, options: dict) -> None:
    model = make(name, options)
    attention = list(fused_attention(model).values())[-1]
    for part in ("q_bias", "v_bias"):
        if getattr(attention, part, None) is not None:
            nn.init.normal_(getattr(attention, part))
    args, kwargs = call_of(model, attention)
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
