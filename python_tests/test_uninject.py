"""`uninject`: the plain model back, with what was learned in its weights."""

import copy
import pickle

import pytest
import torch
from conftest import TOLERANCE, assert_close, make_trainer, relative_error
from test_families import MODELS, SMALL, make
from torch import Tensor, nn

from janus_ext import ArgumentError, LoRALinear, inject, uninject
from janus_ext.backbone.families import declare_stacked
from janus_ext.methods.bilora import SpectralQKV

BESIDE = {  # networks that keep the bias of qkv beside it
    "beit": ("beit_base_patch16_224", {"depth": 1}),
    "eva": ("eva_giant_patch14_224", {"depth": 1, "embed_dim": 64, "num_heads": 4}),
    "swin v2": ("swinv2_tiny_window8_256", {"depths": (1, 1, 1, 1)}),
}


def pixels_of(model: nn.Module) -> Tensor:
    size = model.default_cfg["input_size"][-1] if hasattr(model, "default_cfg") else 224
    return torch.randn(1, 3, size, size)


def scatter(model: nn.Module) -> nn.Module:
    """Every parameter a bit elsewhere, biases that start as zeros, too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def trained(model: nn.Module) -> nn.Module:
    """Injected, with an update in the factors that is large enough to be seen."""
    for layer in inject(model, rank=2).values():
        nn.init.normal_(layer.B, std=2.0)
    return model


def structure(model: nn.Module) -> dict[str, tuple]:
    """Types of the modules; names, kinds, shapes and dtypes of parameters and of buffers, in their order."""
    return {
        "modules": tuple((name, type(module)) for name, module in model.named_modules()),
        "parameters": tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()),
        "buffers": tuple((name, b.shape, b.dtype) for name, b in model.named_buffers()),
        "state": tuple(model.state_dict()),
        "training": tuple(module.training for module in model.modules()),
    }


@pytest.mark.parametrize("kind", [kind for kind in MODELS if "davit" not in kind])  # of which one layer is refused
@torch.no_grad()
def test_the_plain_model_of_every_family_comes_back(kind: str) -> None:
    model = scatter(make(*MODELS[kind]))
    pixels = pixels_of(model)
    plain, before = model(pixels), structure(model)  # in this order: ConViT makes a buffer as large as its images
    learned = trained(model)(pixels)
    assert relative_error(learned, plain) > 10 * TOLERANCE[torch.float32]
    assert uninject(model) is model and structure(model) == before
    assert_close(model(pixels), learned, torch.float32)
    fresh = make(*MODELS[kind])
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(pixels), model(pixels))


@pytest.mark.parametrize("name", BESIDE)
@torch.no_grad()
def test_a_folded_bias_goes_back_where_it_was(name: str) -> None:
    model = scatter(make(*BESIDE[name]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = structure(model)
    pixels = pixels_of(model)
    learned = trained(model)(pixels)
    uninject(model)
    assert structure(model) == kinds and any(key.endswith("q_bias") for key in before)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != key.endswith("qkv.weight"), key
    assert_close(model(pixels), learned, torch.float32)


@declare_stacked
class Both(nn.Module):
    """Attention whose qkv has a bias, and parts of one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.register_buffer("k_bias", torch.zeros(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        y = y if self.q_bias is None else y + torch.cat([self.q_bias, self.k_bias, self.v_bias])
        q, k, v = y.chunk(3, -1)
        return torch.softmax(q @ k.mT, -1) @ v


@torch.no_grad()
def test_a_qkv_with_both_biases_has_both_again() -> None:
    model, x = nn.Sequential(Both()), torch.randn(4, 6)
    before = structure(model)
    learned = trained(model)(x)
    assert structure(uninject(model)) == before
    assert_close(model(x), learned, torch.float32)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("case", [("xcit_nano_12_p16_224", SMALL), BESIDE["beit"]], ids=["BatchNorm", "bias beside"])
@torch.no_grad()
def test_a_copy_comes_back_and_the_other_stays(case: tuple, copied) -> None:
    model = make(*case)
    before, pixels = structure(model), pixels_of(model)
    learned = trained(model)(pixels)
    twin = uninject(copied(model))
    assert structure(twin) == before
    assert_close(twin(pixels), learned, torch.float32)
    assert torch.equal(model(pixels), learned) and structure(model) != before


@torch.no_grad()
def test_injected_again_it_comes_back_again() -> None:
    model = make("test_vit", {})
    before, pixels = structure(model), pixels_of(model)
    for _ in range(2):
        learned = trained(model)(pixels)
        assert structure(uninject(model)) == before
        assert_close(model(pixels), learned, torch.float32)


@pytest.mark.parametrize("mode", [True, False])
def test_the_whole_model_trains_again_and_its_normalisation_moves(mode: bool) -> None:
    model = trained(make("xcit_nano_12_p16_224", SMALL)).train(mode)
    uninject(model)
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training == mode for module in model.modules())
    norms = [m for m in model.modules() if type(m) is nn.BatchNorm2d]
    before = [norm.running_mean.clone() for norm in norms]
    model.train()(torch.randn(2, 3, 224, 224)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert norms and not any(torch.equal(n.running_mean, b) for n, b in zip(norms, before, strict=True))


def test_the_update_is_added_in_float64_and_rounded_once() -> None:
    model = trained(make("test_vit", {}))
    layer = model.blocks[2].attn.qkv
    wanted = layer.linear.weight.double()
    wanted[64:] += layer.scale * (layer.B.double() @ layer.A.double()).flatten(0, 1)
    uninject(model)
    assert torch.equal(model.blocks[2].attn.qkv.weight, wanted.float())


@torch.no_grad()
def test_master_weights_are_rounded_to_the_model_s_dtype() -> None:
    model = make("test_vit", {}).bfloat16()
    before, pixels = structure(model), pixels_of(model).bfloat16()
    for layer in inject(model, rank=2).values():
        nn.init.normal_(layer.B, std=0.1)
        layer.merge(master=True)
    learned = model(pixels)
    assert structure(uninject(model)) == before
    assert_close(model(pixels), learned, torch.bfloat16, factor=2)


@torch.no_grad()
def test_layers_put_in_place_by_hand_are_undone() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 6)
    before = structure(model)
    model[0], model[2] = LoRALinear(model[0], 2), LoRALinear(model[2], 2)
    nn.init.normal_(model[0].B)
    learned = model(x)
    assert structure(uninject(model)) == before
    assert_close(model(x), learned, torch.float32)


@pytest.mark.parametrize("method", ["janus", "bilora"])
@torch.no_grad()
def test_the_model_of_a_run_comes_back_whatever_the_method(patterns, weights, tmp_path, method: str) -> None:
    trainer = make_trainer(
        patterns, weights, tmp_path, method=method, **({"frequencies": 100} if method == "bilora" else {})
    )
    model, images = trainer.learner.model.eval(), patterns.test.images[:4]
    for layer in trainer.learner.method.layers.values():
        nn.init.normal_(layer.coefficients if isinstance(layer, SpectralQKV) else layer.B)
    learned = model.features(images)
    uninject(model)
    assert not any("linear" in name or "positions" in name for name in model.state_dict())
    assert_close(model.features(images), learned, torch.float32)


def test_what_holds_no_adapter_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"uninject: model must hold LoRA layers, .* got Sequential$"):
        uninject(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ArgumentError, match="uninject: model must be an nn.Module, got dict"):
        uninject({})


def test_a_weight_that_is_computed_by_now_is_refused_before_anything_is_changed() -> None:
    model = trained(make("test_vit", {}))
    nn.utils.parametrizations.weight_norm(model.blocks[5].attn.qkv.linear)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ArgumentError, match="uninject: .*qkv: linear must be a plain nn.Linear, got .* from other param"
    ):
        uninject(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
