"""What a caller has set in PyTorch stays as it is, and changes nothing of what a learner computes."""

from contextlib import nullcontext

import pytest
import torch
from learners import FIRST, SECOND, assert_same, learner_of, state_of

from janus_ext import ContinualLearner, ops
from janus_ext.data.collect import unlabelled
from janus_ext.reference import full_float32


def test_the_callers_random_numbers_and_switches_are_his_own(weights, photos, tmp_path):
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    learner = learner_of(weights)
    learner.learn(photos, FIRST)
    learner.save(tmp_path / "saved")
    ContinualLearner.load(tmp_path / "saved").learn(photos, SECOND)
    answers = learner.classify(unlabelled(photos, learner.view))
    next(answers)
    assert torch.backends.cudnn.benchmark
    assert torch.equal(torch.rand(3), wanted)
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize("settings", [{"head": "linear"}, {"head": "lda", "head_width": 40}], ids=lambda s: s["head"])
def test_the_callers_default_dtype_changes_nothing(weights, photos, tmp_path, settings):
    wanted, found = learner_of(weights, **settings), None
    wanted.learn(photos, FIRST)
    torch.set_default_dtype(torch.float64)
    try:
        found = learner_of(weights, **settings)
        found.learn(photos, FIRST)
        found.save(tmp_path / "saved")
        found = ContinualLearner.load(tmp_path / "saved")
        assert found.predict(photos) == wanted.predict(photos)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(state_of(found), state_of(wanted))


@pytest.mark.parametrize("settings", [{"head": "linear"}, {"head": "lda", "head_width": 40}], ids=lambda s: s["head"])
def test_the_callers_autocast_changes_nothing(weights, photos, tmp_path, settings):
    wanted, found = learner_of(weights, **settings), learner_of(weights, **settings)
    wanted.learn(photos, FIRST)
    with torch.autocast("cpu", torch.bfloat16):
        found.learn(photos, FIRST)
        found.save(tmp_path / "saved")
        said, measured = found.predict(photos), found.evaluate(labelled_photos(photos, FIRST))
        found = ContinualLearner.load(tmp_path / "saved")
        assert found.predict(photos) == said
        if settings["head"] == "linear":
            plain = found.model()
    assert_same(state_of(found), state_of(wanted))
    assert said == wanted.predict(photos)
    assert measured.confusion.equal(wanted.evaluate(labelled_photos(photos, FIRST)).confusion)
    if settings["head"] == "linear":
        assert_same(plain.state_dict(), wanted.model().state_dict())


@pytest.mark.parametrize("settings", [{"head": "linear"}, {"head": "aligned"}, {"head_width": 40}], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_without_gradients_changes_nothing(weights, photos, tmp_path, mode, settings):
    wanted = learner_of(weights, **settings)
    wanted.learn(photos, FIRST)
    wanted.save(tmp_path / "saved")
    wanted.learn(photos, SECOND)
    with mode():
        found = ContinualLearner.load(tmp_path / "saved")
        said, measured = (
            found.predict(photos),
            found.evaluate(labelled_photos(photos, FIRST)),
        )  # aligned are trained now
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode) and not torch.is_grad_enabled()
    assert ContinualLearner.load(tmp_path / "saved").predict(photos) == said
    assert measured.images == len(labelled_photos(photos, FIRST))
    with mode():
        made = learner_of(weights, **settings)
        made.observe(photos)
        found.learn(photos, SECOND)
    made.learn(photos, FIRST)
    assert_same(state_of(found), state_of(wanted))
    assert found.predict(photos) == wanted.predict(photos)


def labelled_photos(photos, names):
    return [(path, name) for name in names for path in sorted((photos / name).iterdir())]


def within_an_op():
    return nullcontext(ops.extend_basis(torch.eye(3, 1), torch.eye(3), 0.9, 2))


@pytest.mark.parametrize("inside", [full_float32, within_an_op])
@pytest.mark.parametrize(
    ("parent", "reduced"), [(torch.backends, "tf32"), (torch.backends.mkldnn, "bf16"), (torch.backends.cudnn, "tf32")]
)
def test_a_precision_that_is_set_for_all_operations_still_reaches_products(inside, parent, reduced):
    """What only seems to be set for products is not set for them in passing."""
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    kept = parent.fp32_precision
    try:
        parent.fp32_precision = reduced
        before = [product.fp32_precision for product in products]
        assert reduced in before
        with inside():
            pass
        assert [product.fp32_precision for product in products] == before
        parent.fp32_precision = "ieee"
        assert reduced not in [product.fp32_precision for product in products]
    finally:
        parent.fp32_precision = kept


def test_movement_is_measured_in_float32_whatever_products_are_to_be(weights, photos):
    """Products of bfloat16 would look like movement: on a processor that multiplies it, where the caller allows it."""
    kept, moved = torch.get_float32_matmul_precision(), {}
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            learner = learner_of(weights, lr=1e-6)
            learner.learn(photos, FIRST)
            with learner._core.model.in_float32():
                inside = torch.backends.mkldnn.matmul.fp32_precision
            assert inside == "ieee" and torch.get_float32_matmul_precision() == precision
            moved[precision] = learner.learn(photos, SECOND).movement
    finally:
        torch.set_float32_matmul_precision(kept)
    assert max(moved.values()) < 1e-4, moved
