"""Images without labels in every form, and those of a command line."""

import os

import pytest
import torch
from collected import Listed, bits, pixels, plain
from PIL import Image
from trees import drawing, save_jpeg

from janus_ext.data.collect import find_images, labelled, readable, require_readable, unlabelled
from janus_ext.data.images import View
from janus_ext.errors import DataError


def test_every_form_without_labels(tree, monkeypatch):
    monkeypatch.chdir(tree)
    folder_bits = bits(unlabelled(tree / "cat", view=View(32)))[0]
    assert len(folder_bits) == 5
    paths = sorted((tree / "cat").glob("*.jpg"))
    forms = ["cat", "cat/*.jpg", "**/cat/*", paths, list(map(str, paths)), [plain(path, 0)[0] for path in paths]]
    lazy = [Image.open(path) for path in paths]  # nothing read yet
    for images in (*forms, Listed([plain(path, 0)[0] for path in paths]), Listed([(p, "x") for p in paths]), lazy):
        split = unlabelled(images, view=View(32), workers=2 if images is lazy else 0)
        require_readable(split)
        assert torch.equal(bits(split)[0], folder_bits) and split.labels.tolist() == [-1] * 5
    assert unlabelled("cat").samples[0] == "cat/cat_0.jpg" and unlabelled(lazy).samples[4] == "images[4]"
    one = bits(unlabelled(paths[0], view=View(32)))[0]
    assert torch.equal(one[0], folder_bits[0])
    assert torch.equal(bits(unlabelled(Image.open(paths[0]), view=View(32)))[0], one)
    stack = torch.stack([pixels(0), pixels(1)])
    assert torch.equal(bits(unlabelled(stack, view=View(32)))[0], bits(unlabelled(list(stack), view=View(32)))[0])
    assert torch.equal(bits(unlabelled(stack[1], view=View(32)))[0], bits(unlabelled(stack, view=View(32)))[0][1:])


def test_workers_do_not_read_one_open_file_at_once(tmp_path):
    """Pillow reads a file when its pixels are first asked for; two processes would move each other's place in it."""
    noise = torch.randint(256, (1000, 1000, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(tmp_path / "noise.png")
    with Image.open(tmp_path / "noise.png") as image:
        split = unlabelled([image] * 64, view=View(32), workers=2)
        assert (bits(split)[0] == bits(unlabelled(tmp_path / "noise.png", view=View(32)))[0]).all()
    with Image.open(tmp_path / "noise.png") as image:
        split = labelled([(image, "noise")] * 64, view=View(32), workers=2).split
        assert (bits(split)[0] == bits(unlabelled(tmp_path / "noise.png", view=View(32)))[0]).all()


def test_a_list_of_paths_is_taken_one_by_one(tree):
    """A folder or pattern within it is no image: answers stand where the paths stand."""
    split = unlabelled([tree / "cat" / "cat_0.jpg", tree / "cat"])
    with pytest.raises(DataError, match=r"^images: .*cat is unreadable: it is no file$"):
        require_readable(split)


def test_images_of_a_command_line(tree, monkeypatch):
    monkeypatch.chdir(tree)
    (tree / "eel" / "bad.png").write_bytes(b"no image")
    os.symlink("nowhere", tree / "eel" / "lost.jpg")
    places = ["cat/cat_1.jpg", "cat", "[e]*", "cat/notes.txt", "eel/*.png", "none.jpg", "*.nothing"]
    found = find_images(places)
    assert found[:4] == ["cat/cat_1.jpg", "cat/cat_0.jpg", "cat/cat_2.jpg", "cat/cat_3.jpg"]
    assert len(found) == len(set(found)) == 5 + 7 + 3
    good, problems = readable(found)
    assert good == [name for name in found if name not in {problem.where for problem in problems}]
    assert [(problem.where, problem.kind) for problem in problems] == [
        ("eel/bad.png", "unreadable"),
        ("eel/lost.jpg", "missing"),
        ("cat/notes.txt", "unreadable"),
        ("none.jpg", "missing"),
        ("*.nothing", "missing"),
    ]
    assert len(unlabelled(good)) == 10
    (tree / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no image. Endings that count as images"):
        find_images(["cat", "empty"])
    with pytest.raises(DataError, match="empty holds no image"):
        unlabelled("empty")


def test_a_name_that_looks_like_a_pattern_is_a_name_first(tmp_path):
    save_jpeg(tmp_path / "a[1].jpg", drawing(0, 0))
    save_jpeg(tmp_path / "a1.jpg", drawing(0, 0))
    assert find_images([tmp_path / "a[1].jpg"]) == [str(tmp_path / "a[1].jpg")]


def test_looking_for_what_can_be_read_leaves_no_trace(tree):
    readable(find_images([tree]))
    require_readable(unlabelled(tree))
    assert not os.listdir(os.environ["XDG_CACHE_HOME"])
