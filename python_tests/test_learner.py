"""ContinualLearner: the trainer's loop behind four verbs; saved, loaded and undone to the bit; a classifier in use."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from learners import FIRST, SECOND, SETTINGS, THIRD, assert_same, learner_of, squares, state_of
from PIL import Image
from torch import nn

from janus_ext import ContinualLearner, predict, train
from janus_ext.calibration import fit_temperature
from janus_ext.data.collect import unlabelled
from janus_ext.errors import ArgumentError, DataError, JanusError
from janus_ext.heads import HEADS
from janus_ext.runs import checkpoint


# learning ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["janus", "inflora", "bilora"])
def test_it_learns_what_the_trainer_learns_to_the_bit(weights, photos, tmp_path, method):
    settings = SETTINGS | {"energy_power": 2 if method == "inflora" else 1, "workers": 0}
    if method == "bilora":
        settings = {k: v for k, v in settings.items() if not k.startswith("energy") and k != "rank"}
        settings["frequencies"] = 50
    for name in FIRST + SECOND + THIRD:
        (tmp_path / "parts" / "test").mkdir(parents=True, exist_ok=True)
        shutil.copytree(photos / name, tmp_path / "parts" / "test" / name)
    shutil.copytree(photos, tmp_path / "parts" / "train")
    flags = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    run = tmp_path / "run"
    call = f"--benchmark folder --data-dir {tmp_path}/parts --backbone emoji --weights {weights} --tasks 3 --no-plots"
    assert train.main([*call.split(), "--method", method, "--output", str(run), *flags]) == 0
    learner = ContinualLearner("emoji", method, weights=str(weights), planned_tasks=3, **settings)
    for names in (FIRST, SECOND, THIRD):
        learner.learn(photos, names)
    model, _ = checkpoint.read_tensors(run / "checkpoints" / "model.safetensors")
    assert_same({k: v for k, v in state_of(learner).items() if not k.startswith("method.")}, model)
    assert learner.tasks == (tuple(FIRST), tuple(SECOND), tuple(THIRD))
    assert_same(state_of(ContinualLearner.load(run)), state_of(learner))


@pytest.mark.parametrize("settings", [{}, {"drift": "ridge", "merge_scale": 0.5}], ids=["default", "half, moved along"])
def test_learning_on_in_another_process_gives_the_same_bits(weights, photos, tmp_path, settings):
    learner = learner_of(weights, **settings)
    learner.learn(photos, FIRST)
    learner.save(tmp_path / "saved")
    program = (
        f"from janus_ext import ContinualLearner; l = ContinualLearner.load({str(tmp_path / 'saved')!r}); "
        f"l.learn({str(photos)!r}, {SECOND!r}); l.save({str(tmp_path / 'later')!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    learner.learn(photos, SECOND)
    later = ContinualLearner.load(tmp_path / "later")
    assert later.classes == learner.classes == tuple(FIRST + SECOND)
    assert_same(state_of(later), state_of(learner))


def test_three_forms_of_images_teach_the_same(weights, photos):
    pairs = [(path, path.parent.name) for name in FIRST for path in sorted((photos / name).iterdir())]
    dataset = [(Image.open(path), FIRST.index(label)) for path, label in pairs]
    states = []
    for images, classes in ((photos, FIRST), (pairs, FIRST), (dataset, FIRST)):
        learner = learner_of(weights)
        learner.learn(images, classes)
        states.append(state_of(learner))
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])


@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_ends_in_an_error_never_was(weights, photos, monkeypatch, error, after):
    learner, untouched = learner_of(weights), learner_of(weights)
    for one in (learner, untouched):
        one.learn(photos, FIRST)
    before, steps, step = state_of(learner), [], learner._core._step

    def failing(*args):
        steps.append(None)
        if len(steps) == after:  # the fourth is in the last epoch, which is observed
            raise error
        return step(*args)

    with monkeypatch.context() as patched:
        patched.setattr(learner._core, "_step", failing)
        with pytest.raises(error):
            learner.learn(photos, SECOND)
    assert_same(state_of(learner), before)
    assert learner.tasks == (tuple(FIRST),)
    for one in (learner, untouched):
        one.learn(photos, SECOND)
    assert_same(state_of(learner), state_of(untouched))


def broken(photos: Path) -> Path:
    (photos / SECOND[0] / "x.jpg").write_bytes(b"no image")
    return photos


def features_of(learner: ContinualLearner, photos: Path, name: str) -> torch.Tensor:
    with torch.no_grad():
        split = unlabelled(photos / name, learner.view)
        return learner._core.model.eval().features(torch.stack([split[i][0] for i in range(len(split))]))


@pytest.mark.parametrize("known", [[FIRST], []], ids=["behind others", "first of all"])
@pytest.mark.parametrize(("method", "head"), [("janus", "lda"), ("janus", "aligned"), ("lora-drs", "ncm")])
def test_one_class_is_learned_by_the_head_alone(weights, photos, method, head, known):
    """Whatever a method adds to its cross entropy of 0, the backbone keeps its bits."""
    learner = learner_of(weights, method=method, head=head)
    for names in known:
        learner.learn(photos, names)
    before = features_of(learner, photos, SECOND[0])
    with pytest.warns(UserWarning, match=f"a task of one class teaches the head alone, here {head}"):
        report = learner.learn(photos, SECOND[:1])
    assert torch.equal(features_of(learner, photos, SECOND[0]), before)
    assert report.merged is None and report.factors == {}
    learner.learn(photos, THIRD)
    assert not torch.equal(features_of(learner, photos, SECOND[0]), before)
    assert learner.classes == (*sum(known, []), SECOND[0], *THIRD)
    assert learner.predict(photos / SECOND[0], top=1)[0][0][0] in learner.classes


@pytest.mark.filterwarnings("ignore:a task of one class")
def test_linear_heads_of_one_class_are_never_trained_whatever_the_head(weights, photos, tmp_path):
    """So they are refused alone, and aligned heads begin at them as they are, of whichever run they come."""
    learners = {head: learner_of(weights, head=head) for head in ("lda", "aligned")}
    for head, learner in learners.items():
        learner.learn(photos, FIRST)
        learner.learn(photos, SECOND[:1])
        assert learner._core.method.known.untrained == [1]
        learner.save(tmp_path / head)
        with pytest.raises(ArgumentError, match="those of 1 of 2 tasks were never trained: of one class"):
            ContinualLearner.load(tmp_path / head, head="linear")
    loaded = ContinualLearner.load(tmp_path / "lda", head="aligned")
    assert loaded.predict(photos, top=3) == learners["aligned"].predict(photos, top=3)


@pytest.mark.filterwarnings("ignore:a task of one class")
def test_the_inputs_of_one_class_are_protected_like_others(weights, photos):
    """So that later tasks leave it alone, although none learned from it: a basis of 0.9 of their energy."""
    learner = learner_of(weights, energy_start=0.9, energy_end=0.9)
    learner.learn(photos, FIRST)
    before = protected_share(learner, photos, SECOND[0])
    learner.learn(photos, SECOND[:1])
    after = protected_share(learner, photos, SECOND[0])
    assert 0.85 < after <= 1 and after > before + 0.05, (before, after)


def protected_share(learner: ContinualLearner, photos: Path, name: str) -> float:
    """Of the energy of a class's inputs, as its images are, what lies in the basis; of the layer with the least."""
    shares = []

    def measure(layer, inputs):
        x = inputs[0].double().flatten(0, -2)
        shares.append(float((x @ layer.basis.double()).square().sum() / x.square().sum()))

    hooks = [layer.register_forward_pre_hook(measure) for layer in learner._core.method.layers.values()]
    features_of(learner, photos, name)
    for hook in hooks:
        hook.remove()
    return min(shares)


@pytest.mark.parametrize(
    ("images", "classes", "message"),
    [
        (lambda photos: photos, [FIRST[0], SECOND[0]], f"classes must be new, got {FIRST[0]}"),
        (lambda photos: photos, [SECOND[0]], "a task needs two classes .*, or take another head, such as lda$"),
        (broken, SECOND, "x.jpg"),
        (lambda photos: photos, ["unheard of", SECOND[0]], "unheard of"),
        (lambda photos: [(photos / SECOND[0] / f"{SECOND[0]}_0.jpg", 7)], SECOND, "7"),
        (lambda photos: [], SECOND, "empty"),
        (lambda photos: 5, SECOND, "images must be"),
        (lambda photos: photos / "nowhere", None, "nowhere"),
    ],
)
def test_mistakes_are_one_clear_error_and_change_nothing(weights, photos, images, classes, message):
    learner = learner_of(weights, head="linear")
    learner.learn(photos, FIRST)
    before = state_of(learner)
    with pytest.raises(JanusError, match=message) as caught:
        learner.learn(images(photos), classes)
    assert "\n" not in str(caught.value)
    assert_same(state_of(learner), before)
    assert learner.classes == tuple(FIRST)


def test_an_empty_class_and_one_image_a_class(weights, photos):
    learner = learner_of(weights)
    (photos / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing"):
        learner.learn(photos, [*FIRST, "nothing"])
    single = [(photos / name / f"{name}_0.jpg", name) for name in FIRST]
    learner.learn(single)
    assert learner.classes == tuple(FIRST)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.1}, "no setting 'learning_rate'"),
        ({"method": "joint"}, "joint learns all classes at once"),
        ({"lr": -1.0}, "--lr must be a positive number"),
        ({"method": "lora", "margin": 0.3}, "--margin would do nothing here"),
        ({"backbone": nn.Linear(2, 2)}, "backbone must be a name or a model of timm's"),
        ({"backbone": "vit_of_nobody"}, "has no such model"),
        ({"cache_images": True}, "cache_images would do nothing here: the learner keeps no images"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ArgumentError, match=message):
        ContinualLearner(**({"backbone": "emoji", "device": "cpu"} | settings))


# using ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def learned(weights, tmp_path_factory) -> tuple[ContinualLearner, Path]:
    """A learner of six classes, and their photographs."""
    photos = tmp_path_factory.mktemp("learned") / "photos"
    trees.folders(photos, 6, 5)
    learner = learner_of(weights, epochs=8)
    for names in (FIRST, SECOND, THIRD):
        learner.learn(photos, names)
    return learner, photos


@pytest.mark.parametrize("head", HEADS)
def test_scores_are_the_softmax_of_what_the_method_says(weights, photos, head):
    learner = learner_of(weights, head=head)
    learner.learn(photos, FIRST)
    paths = sorted((photos / FIRST[0]).iterdir())
    predicted = learner.predict(paths, top=9)
    assert [len(classes) for classes in predicted] == [2] * len(paths)
    images = torch.stack([torch.from_numpy(pixels) for pixels in map(squares(32), paths)])
    with torch.no_grad():
        scores = learner._core.method.scores(images).double()
    for classes, want in zip(predicted, scores.softmax(-1), strict=True):
        assert [name for name, _ in classes] == [FIRST[i] for i in want.argsort(descending=True)]
        assert [score for _, score in classes] == pytest.approx(want.sort(descending=True).values.tolist(), abs=1e-6)


def test_one_image_in_every_form(learned):
    learner, photos = learned
    path = photos / FIRST[0] / f"{FIRST[0]}_1.jpg"
    image = Image.open(path)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    wanted = learner.predict(path, top=2)
    assert len(wanted) == 1 and len(wanted[0]) == 2
    for form in (str(path), [path], image, [image], pixels, [pixels]):
        assert learner.predict(form, top=2) == wanted
    assert len(learner.predict(photos)) == 30 and len(learner.predict(str(photos / "*" / "*_0.jpg"))) == 6


def test_calibration_finds_the_temperature_of_the_largest_likelihood(learned):
    learner, photos = learned
    found = learner.temperature(photos)
    batches = [*learner._core.scores(_selection(learner, photos))]
    logits, labels = (torch.cat(parts).double() for parts in zip(*batches, strict=True))
    temperatures = (found, found * 1.01, found / 1.01)
    smoothing = 1 / (len(labels) + 2)  # Platt's
    losses = [
        float(nn.functional.cross_entropy(logits / t, labels.long(), label_smoothing=smoothing)) for t in temperatures
    ]
    assert min(losses) == losses[0]
    plain, honest = learner.predict(photos), learner.predict(photos, calibrate=photos)
    assert [image[0][0] for image in plain] == [image[0][0] for image in honest]
    assert plain[0][0][1] != honest[0][0][1]


def _selection(learner, photos):
    from janus_ext.data.benchmark import Selection
    from janus_ext.data.collect import labelled_as

    return Selection.all_of(labelled_as(photos, learner.classes, learner.view), range(len(learner.classes)))


def test_evaluation_counts_what_predict_says(learned):
    learner, photos = learned
    evaluation = learner.evaluate(photos)
    paths = sorted(photos.glob("*/*.jpg"))
    right = [classes[0][0] == path.parent.name for path, classes in zip(paths, learner.predict(paths, 1), strict=True)]
    assert evaluation.images == 30 and evaluation.right == sum(right)
    assert evaluation.accuracy == pytest.approx(100 * sum(right) / 30)
    with pytest.raises(DataError, match="strange"):
        learner.evaluate([(paths[0], "strange")])


def test_a_command_names_no_function_of_python(tmp_path, capsys):
    assert predict.main([str(tmp_path), "photo.jpg"]) == 2
    assert capsys.readouterr().err.startswith(f"janus_ext.predict: folder {tmp_path} holds no run of this program;")


def test_before_anything_was_learned(weights, photos, tmp_path):
    learner = learner_of(weights)
    for call, argument in ((learner.predict, photos), (learner.evaluate, photos), (learner.save, tmp_path / "x")):
        with pytest.raises(ArgumentError, match="nothing was learned yet"):
            call(argument)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": -1}, "seed"), ({"seed": "a"}, "seed"), ({"planned_tasks": 0}, "planned_tasks")],
)
def test_numbers_that_cannot_be_are_named(weights, change, message):
    with pytest.raises(ArgumentError, match=message):
        learner_of(weights, **change)


@pytest.mark.parametrize("images", [0, -3, 2.5, "8", True, None])
def test_images_at_once_is_a_positive_integer(learned, images):
    learner, _ = learned
    before = learner.images_at_once
    with pytest.raises(ArgumentError, match="images_at_once must be"):
        learner.images_at_once = images
    assert learner.images_at_once == before


def test_order_is_that_of_the_logits_however_sure_the_scores_are(learned):
    learner, photos = learned
    sure = list(learner.classify(unlabelled(photos, learner.view), 6, temperature=1e-3))
    plain = list(learner.classify(unlabelled(photos, learner.view), 6))
    assert [[name for name, _ in image] for image in sure] == [[name for name, _ in image] for image in plain]
    for top in (0, -1, "3", None):
        with pytest.raises(ArgumentError, match="top"):
            learner.predict(photos, top=top)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda learner, photos: learner.learn(5), "learn: images must be a folder of class folders"),
        (lambda learner, photos: learner.predict(photos, top="8"), "predict: top must be an integer"),
        (lambda learner, photos: learner.predict(photos, calibrate=5), "predict: calibrate: images must be a folder"),
        (lambda learner, photos: learner.evaluate(photos / "nowhere"), "evaluate: images: .*nowhere does not exist"),
        (lambda learner, photos: learner.evaluate_split(unlabelled(photos), [5]), "evaluate_split: class_names must"),
        (lambda learner, photos: learner.classify(unlabelled(photos), 1, 0), "classify: temperature must be positive"),
        (lambda learner, photos: learner.load(photos), "load: folder .* holds no run of this program"),
        (lambda learner, photos: learner.workers(-1), "workers: asked must be from 0 to 1024"),
    ],
)
def test_a_wrong_call_names_method_and_argument(learned, call, message):
    with pytest.raises(JanusError, match=rf"^ContinualLearner\.{message}"):
        call(*learned)


def test_a_class_that_cannot_be_is_not_calibrated_on():
    logits = torch.tensor([[1.0, -float("inf")], [0.0, -float("inf")]])
    with pytest.raises(ArgumentError, match="finite scores"):
        fit_temperature(logits, torch.tensor([0, 1]))
    assert 1e-3 < fit_temperature(torch.tensor([[5.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 1])) < 1e3, "all right"


def test_whole_images_are_shown_whole(weights, tmp_path):
    """The benchmark emoji shows all of an image, `folder` the middle; who loads such a run does the same."""
    call = f"--weights {weights} --output {tmp_path}/r --tasks 2 --limit-per-class 1 --epochs 1 --batch-size 200"
    assert train.main([*call.split(), "--no-plots", "--energy-start", "0.5", "--energy-end", "0.5"]) == 0
    assert ContinualLearner.load(tmp_path / "r").view.margin == 1
    assert learner_of(weights).view.margin == 256 / 224


def test_the_import_of_the_package_does_not_bring_it_along():
    unwanted = {"timm", "tyro", "PIL", "matplotlib", "torchvision"}
    program = f"import sys, janus_ext; print(sorted({unwanted} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"
