"""What `inject` adapts of a model: maps by the names of targets, which of them share an input, what learns there."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import KeepingTrainer, assert_close, assert_protected_inputs_are_left_alone, make_trainer
from learners import FIRST, SECOND, assert_same, learner_of, state_of
from test_families import MODELS, SEPARATE, SMALL, families, make  # noqa: F401 - a fixture
from torch import Tensor, nn

from janus_ext import ArgumentError, ContinualLearner, GradientRectifier, LoRALinear, LoRAQKV, inject, uninject
from janus_ext.assembly import make_learner, stored_config
from janus_ext.backbone import adopt, load_backbone
from janus_ext.backbone.families import MLPS, declare_mlp, declare_separate
from janus_ext.backbone.places import TARGETS
from janus_ext.config import TrainConfig
from janus_ext.runs.run import Run
from janus_ext.runs.settings import CONTENTS, check_same_settings
from janus_ext.training.trainer import Trainer

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 28}
EVA02 = ("eva02_base_patch14_224", TINY)  # separate q, k and v; fc1_g and fc1_x
WITH_MLP = {  # per class of the table of MLPs a small model of timm
    "timm.layers.mlp.GluMlp": ("eva02_tiny_patch14_224", SMALL),
    "timm.layers.mlp.Mlp": ("test_vit", SMALL),
    "timm.layers.mlp.SwiGLU": EVA02,
    "timm.models.pvt_v2.MlpWithDepthwiseConv": ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}),
    "timm.models.tiny_vit.NormMlp": ("tiny_vit_5m_224", {"depths": (1, 1, 1, 1)}),
}


# which maps ----------------------------------------------------------------------------------------------------------
def test_targets_are_the_maps_of_their_names_in_the_model_s_order() -> None:
    layers = inject(make("test_vit", {"depth": 2}), 2, ("fc2", "proj", "v", "fc1", "k", "q"))
    assert list(layers) == [f"blocks.{b}.{m}" for b in (0, 1) for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert [type(layer) for layer in layers.values()] == 2 * [LoRAQKV, LoRALinear, LoRALinear, LoRALinear]
    assert layers["blocks.0.attn.qkv"].targets == ("v", "k", "q")
    assert layers.inputs == {name: name for name in layers}
    where = "fc2, proj, v, fc1, k, q of 2 of 2 attention layers and 2 MLPs"
    assert layers.summary().startswith(f"LoRA on {where}, {layers.parameters:,} parameters beside ")
    assert "LoRA on fc2 of 2 MLPs, " in inject(make("test_vit", {"depth": 2}), 2, ["fc2"]).summary()


def test_separate_projections_are_layers_of_one_input() -> None:
    layers = inject(make(*EVA02), 2, TARGETS)
    of_a_block = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"]
    assert list(layers) == [f"blocks.{block}.{name}" for block in (0, 1) for name in of_a_block]
    first = {"attn.k_proj": "attn.q_proj", "attn.v_proj": "attn.q_proj", "mlp.fc1_x": "mlp.fc1_g"}
    assert layers.inputs == {
        f"blocks.{block}.{name}": f"blocks.{block}.{first.get(name, name)}" for block in (0, 1) for name in of_a_block
    }
    assert inject(make(*EVA02), 2).inputs == {
        f"blocks.{block}.attn.{name}": f"blocks.{block}.attn.k_proj"
        for block in (0, 1)
        for name in ("k_proj", "v_proj")
    }


@pytest.mark.parametrize("case", [*SEPARATE.values(), *WITH_MLP.values()], ids=[*SEPARATE, *WITH_MLP])
@torch.no_grad()
def test_layers_of_one_input_get_the_same(families: ModuleType, case: tuple[str, dict]) -> None:  # noqa: F811
    model = make(*case)
    targets = [t for t in TARGETS if (t in "qkv") == (case in SEPARATE.values())]
    layers = inject(model, 2, [t for t in targets if t != "proj"])
    calls = {name: families.calls_of(layer) for name, layer in layers.items()}
    model.forward_features(families.image_of(model))
    seen = {name: [args[0] for args, _ in calls[name]] for name in layers}
    assert all(seen.values())
    for name, source in layers.inputs.items():
        assert len(seen[name]) == len(seen[source])
        assert all(torch.equal(x, y) for x, y in zip(seen[name], seen[source], strict=True))


def test_pooled_keys_have_an_input_of_their_own() -> None:
    layers = inject(make(*SEPARATE["timm.models.nextvit.EfficientAttention"]), 2, ("q", "k", "v"))
    named = {(name.rpartition(".")[2], source.rpartition(".")[2]) for name, source in layers.inputs.items()}
    assert named == {("q", "q"), ("k", "k"), ("v", "k")}


@pytest.mark.parametrize("kind", WITH_MLP)
def test_every_class_of_mlps_is_called_protected_and_merged(families: ModuleType, kind: str) -> None:  # noqa: F811
    model = make(*WITH_MLP[kind])
    assert kind in {f"{type(m).__module__}.{type(m).__qualname__}" for m in model.modules()}
    families.try_maps(model, ["fc1", "fc2"])
    assert set(WITH_MLP) == {name for name in MLPS if name.startswith("timm.")}


@pytest.mark.parametrize("case", [("test_vit", {"depth": 2}), EVA02], ids=["fused", "separate"])
@torch.no_grad()
def test_the_adapted_model_is_the_one_with_the_sum_of_the_weights(families: ModuleType, case: tuple) -> None:  # noqa: F811
    """In float64, each update added by hand."""
    model, plain = make(*case).double(), make(*case).double()
    layers = inject(model, 3, TARGETS, scale=0.7)
    for name, layer in layers.items():
        nn.init.normal_(layer.B)
        updates = 0.7 * layer.B @ layer.A
        plain.get_submodule(name).weight.add_(updates.flatten(0, -2))  # q, k and v are all of a fused qkv
    pixels = families.image_of(model).double()
    wanted = plain.forward_features(pixels)
    assert_close(model.forward_features(pixels), wanted, torch.float64)
    assert_close(uninject(model).forward_features(pixels), wanted, torch.float64)


def test_the_default_is_one_fused_layer_a_block_with_the_factors_of_old() -> None:
    """Factors are drawn in the order of the blocks, and nothing else is drawn."""
    model = make("test_vit", {})
    plain = [block.attn.qkv for block in make("test_vit", {}).blocks]
    torch.manual_seed(1)
    found = [layer.A for layer in inject(model, 4).values()]
    after = torch.rand(())
    torch.manual_seed(1)
    wanted = [LoRAQKV(linear, 4).A for linear in plain]
    assert torch.equal(after, torch.rand(()))
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_master_weights_of_all_maps_become_half_precision_again() -> None:
    model = make(*EVA02).bfloat16()
    before = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    for layer in inject(model, 2, TARGETS).values():
        layer.merge(master=True)
    assert {p.dtype for p in uninject(model).parameters()} == {torch.bfloat16}
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == before


def test_the_rectifier_takes_layers_of_all_kinds() -> None:
    model = make(*EVA02)
    layers = inject(model, 2, TARGETS, rectify_in="step")
    rectifier = GradientRectifier(layers, energy=0.5)
    with rectifier.observe():
        model(torch.randn(2, 3, 28, 28))
    rectifier.commit()
    model(torch.randn(2, 3, 28, 28)).square().sum().backward()
    for layer in layers.values():
        nn.init.normal_(layer.B)
    rectifier.rectify()
    for layer in layers.values():
        assert layer.basis.shape[1] and (layer.A.grad @ layer.basis).norm() <= 1e-5 * layer.A.grad.norm()


@torch.no_grad()
def test_a_dinov3_checkpoint_as_meta_names_it_is_taken(tmp_path) -> None:
    plain = make("vit_small_patch16_dinov3", {"img_size": 64})
    names = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    tensors = {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}
    for name, tensor in plain.state_dict().items():
        tensors[next((name.replace(ours, meta) for ours, meta in names.items() if ours in name), name)] = tensor
    for block in range(12):
        tensors |= {f"blocks.{block}.attn.qkv.{part}": torch.zeros(3 * 384) for part in ("bias", "bias_mask")}
    torch.save(tensors, tmp_path / "dinov3_vits16_pretrain.pth")
    loaded = load_backbone("vit_small_patch16_dinov3", str(tmp_path / "dinov3_vits16_pretrain.pth"), 64).eval()
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(pixels), plain(pixels))
    assert list(inject(loaded, 2)) == [f"blocks.{block}.attn.qkv" for block in range(12)]


# refusals ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("targets", [(), "kv", 3, ("k", "w"), ("k", "k"), ("k", 1), ["k", torch.ones(2, 3)], None])
def test_targets_are_one_or_more_distinct_names(targets: object) -> None:
    model = make("test_vit", SMALL)
    with pytest.raises(
        ArgumentError, match="targets must be one or more distinct names of q, k, v, proj, fc1, fc2, got .*$"
    ) as caught:
        inject(model, 2, targets)
    assert "tensor([" not in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("fastvit_sa12", ("k", "fc1"), r"\(ConvMlp\): its fc1 is a Conv2d, only an nn.Linear can be adapted"),
        ("levit_128s", ("proj",), r"\(Attention\): its proj is a Sequential, only an nn.Linear can be adapted"),
        ("vitamin_small_224", ("k", "fc2"), "must have an MLP with `fc1` and `fc2` beside its attention, got VisionTr"),
        (
            "pvt_v2_b0",
            ("proj",),
            r"with a projection `proj` of its output, got \w+: its 8 attention layers have others",
        ),
        ("mixer_s32_224", ("fc1",), "must have an MLP with .* got MlpMixer: it has none"),
    ],
)
def test_a_target_that_a_model_lacks_is_refused(name: str, targets: tuple[str, ...], message: str) -> None:
    with torch.device("meta"):
        model = make(name, {})
    with pytest.raises(ArgumentError, match=message):
        inject(model, 2, targets)
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapted_model_is_refused_whatever_the_target_is() -> None:
    model = make("test_vit", SMALL)
    inject(model, 2)
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ArgumentError, match="must be a plain one, got an adapter at blocks.0.attn.qkv: uninject"):
        inject(model, 2, ("fc1",))
    assert [p.requires_grad for p in model.parameters()] == trained


class Own(nn.Module):
    """A block of somebody's own, whose projections and MLP have common names."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = OwnAttention(), OwnMlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x + self.attn(x))


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.softmax(self.to_q(x) @ self.to_k(x).mT, -1) @ self.to_v(x))


class OwnMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


def test_own_classes_are_refused_until_they_are_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in ("LAYOUTS", "MLPS"):
        module = "janus_ext.backbone.families"
        monkeypatch.setattr(f"{module}.{table}", {})
    with pytest.raises(ArgumentError, match=r"attn \(OwnAttention\) has to_q, to_k, to_v; .*declare_separate\(OwnAtt"):
        inject(Own(), 2)
    with pytest.raises(
        ArgumentError, match=r"at mlp \(OwnMlp\): it is not known to call its fc1; .*declare_mlp\(OwnMlp"
    ):
        inject(Own(), 2, ("fc1",))
    assert declare_separate(OwnAttention) is OwnAttention and declare_mlp(OwnMlp) is OwnMlp
    names = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert list(inject(Own(), 2, TARGETS)) == names
    shared = Own()
    shared.attn.to_v.weight = shared.attn.to_k.weight
    with pytest.raises(ArgumentError, match="at attn: attn.to_k and attn.to_v share one weight"):
        inject(shared, 2)


# what learns there ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [{}, {"estimator": "isvd", "estimator_rank": 100}], ids=["gram", "isvd"])
def test_protected_inputs_of_every_map_are_left_alone(patterns, weights, tmp_path, settings) -> None:
    """docs/method.md, property 2; fc2 is 128 wide, the others 32: less than the rank that is asked for."""
    trainer = make_trainer(patterns, weights, tmp_path, KeepingTrainer, targets=TARGETS, energy_power=1, **settings)
    results = trainer.run()
    assert max(results["violation"][1:]) <= 1e-5
    assert set(results["violation_per_layer"][1]) == set(trainer.learner.method.layers)
    assert_protected_inputs_are_left_alone(trainer, 3)


def separate_trainer(benchmark, folder: Path, **changes: object) -> Trainer:
    """On a tiny EVA-02."""
    settings = {"rank": 4, "epochs": 2, "batch_size": 8, "lr": 1e-2, "energy_start": 0.6, "energy_end": 0.6}
    changes = {"energy_power": 1, "targets": TARGETS} | changes
    config = TrainConfig(device="cpu", amp="off", **(settings | changes)).resolved()
    backbone = adopt(make(EVA02[0], TINY | {"img_size": 32, "patch_size": 8}))
    learner = make_learner(config, 0, len(benchmark.tasks), backbone)
    return Trainer(config, benchmark, learner, Run(folder))


@pytest.mark.parametrize("method", ["janus", "lora-gpm", "inflora", "lora-drs"])
def test_layers_of_one_input_are_protected_by_one_basis(patterns, tmp_path, method: str) -> None:
    changes = {"energy_power": 2} if method == "inflora" else {}
    exact = {"rectify": "exact"} if method in ("lora-gpm", "lora-drs") else {}
    trainer = separate_trainer(patterns, tmp_path, method=method, **changes, **exact)
    results = trainer.run()
    assert max(results["violation"][1:]) <= 1e-5
    learned = trainer.learner.method
    inputs = learned.layers.inputs
    assert len(set(inputs.values())) == 8 and len(inputs) == 14
    for name, source in inputs.items():
        assert learned.guarded(name).shape[1] > 0
        assert torch.equal(learned.guarded(name), learned.guarded(source))
        assert trainer.reports[-1].basis_rank[name] == trainer.reports[-1].basis_rank[source]
    kept = getattr(learned, "estimators", getattr(learned, "memories", None))
    assert kept is None or list(kept) == list(dict.fromkeys(inputs.values()))


def test_frequencies_need_one_fused_qkv() -> None:
    config = TrainConfig(method="bilora", device="cpu", amp="off").resolved()
    with pytest.raises(
        ArgumentError, match="bilora must have K and V in one fused qkv, got blocks.0.attn.k_proj apart"
    ):
        make_learner(config, 0, 3, adopt(make(*EVA02)))


def test_a_run_without_targets_was_one_of_k_and_v(tmp_path) -> None:
    """As versions before wrote it; and they are a list in its JSON."""
    asked = dict.fromkeys(CONTENTS) | TrainConfig(device="cpu", amp="off").resolved().to_json()
    stored = {name: value for name, value in asked.items() if name != "targets"}
    check_same_settings(asked, stored, tmp_path)
    with pytest.raises(ArgumentError, match=r"--targets .* \(asked: k v fc1\)"):
        check_same_settings(asked | {"targets": ["k", "v", "fc1"]}, stored, tmp_path)
    assert stored_config(stored).targets == ("k", "v")


def test_a_learner_of_all_targets_is_saved_and_goes_on_with_the_same_bits(photos, weights, tmp_path) -> None:
    whole = learner_of(weights, targets=list(TARGETS))
    whole.learn(photos, FIRST)
    whole.save(tmp_path / "saved")
    again = ContinualLearner.load(tmp_path / "saved", device="cpu")
    assert again.config.targets == TARGETS
    for learner in (whole, again):
        learner.learn(photos, SECOND)
    assert_same(state_of(again), state_of(whole))
    image = next((photos / FIRST[0]).iterdir())
    assert again.predict(image) == whole.predict(image)
