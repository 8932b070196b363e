"""The glyphs benchmark is built from packages of fonts: here with a font that matplotlib ships, and no network."""

import importlib
import io
import json
import tarfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from janus_ext.config import TrainConfig
from janus_ext.data import folder

ROOT = Path(__file__).resolve().parents[1]
DEJAVU = Path(matplotlib.get_data_path(), "fonts", "ttf")
# Drawn alike by many fonts but for size, height, slant or a hair's breadth.
ALIKE = [
    "Cc",
    "Oo0°º",
    "Il1|¦",
    "Ss",
    "Uu",
    "Vv",
    "Ww",
    "Xx×",
    "Zz",
    "Pp",
    "i¡",
    "DÐ",
    ",'‘’‚`",
    '"“”„',
    ".·•",
    "-–—_¯",
]


@pytest.fixture
def build(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("glyphs.build")


@pytest.fixture
def font(build):
    return build.Font("dejavu", (DEJAVU / "DejaVuSans.ttf").read_bytes())


def ink(image) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is not white: first and last column and row."""
    rows, columns = np.nonzero(np.asarray(image.convert("L")) < 255)
    return columns.min(), rows.min(), columns.max(), rows.max()


# drawing -------------------------------------------------------------------------------------------------------------
def test_glyphs_are_dark_on_white_whole_and_in_the_middle(build, font):
    images = build.draw_all(font)
    assert list(images) == list(build.CHARACTERS)
    for character, image in images.items():
        assert (image.mode, image.size) == ("RGB", (64, 64))
        left, top, right, bottom = ink(image)
        assert abs(left + right - 63) <= 1 and abs(top + bottom - 63) <= 1, character
        assert min(left, top, 63 - right, 63 - bottom) >= build.MARGIN, character
        assert np.asarray(image).min() < 128, character


@pytest.mark.parametrize("file", ["DejaVuSans.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Oblique.ttf"])
def test_capitals_have_one_height_in_every_font(build, file):
    font = build.Font(file, (DEJAVU / file).read_bytes())
    _, top, _, bottom = ink(build.draw(font.at(build.CAPITAL * build.SCALE), "H"))
    assert abs(bottom - top + 1 - build.CAPITAL) <= 1


def test_what_a_font_cannot_show_fails_with_its_name(build, font):
    with pytest.raises(ValueError, match="dejavu lacks 漢字"):
        build.draw_all(font, "A漢字")
    with pytest.raises(ValueError, match="dejavu draws A and А alike"):  # the second is Cyrillic
        build.draw_all(font, "ABА")
    with pytest.raises(ValueError, match="dejavu:   is drawn empty"):
        build.draw_all(font, "A ")
    with pytest.raises(ValueError, match=r"W is [\d.]+ x [\d.]+ pixels, the room is 60"):
        build.draw(font.at(50 * build.SCALE), "W")


def test_the_digest_is_of_paths_and_pixels(build, font):
    images = dict(build.draw_side("train", [font], "AB"))
    assert list(images) == ["train/u0041/dejavu.png", "train/u0042/dejavu.png"]
    digest = build.digest(images)
    assert digest == build.digest(dict(build.draw_side("train", [font], "BA"))), "their order does not matter"
    first, second = images
    assert digest != build.digest({first: images[second], second: images[first]})
    assert digest != build.digest({first: images[first], "test/u0042/dejavu.png": images[second]})


# the choice ----------------------------------------------------------------------------------------------------------
def test_classes_are_characters_that_are_told_apart(build):
    assert len(set(build.CHARACTERS)) == len(build.CHARACTERS) == 120
    assert all(len(set(group) & set(build.CHARACTERS)) <= 1 for group in ALIKE)


def test_families_are_kept_on_one_side(build):
    assert [sum(map(len, side.values())) for side in (build.TRAIN, build.TEST)] == [30, 28]
    first_words = [{family.partition("-")[0] for family in side} for side in (build.TRAIN, build.TEST)]
    assert not first_words[0] & first_words[1], "Roboto and Roboto Mono would be one design"


# the whole script ----------------------------------------------------------------------------------------------------
def pack(cache: Path, family: str, licence: str, files: dict[str, str]) -> None:
    """A package as npm packs it: fonts of matplotlib under the names that fontsource gives."""
    contents = {f"files/{family}-latin-{style}.woff": (DEJAVU / file).read_bytes() for style, file in files.items()}
    contents["metadata.json"] = json.dumps({"license": {"type": licence}}).encode()
    cache.mkdir(exist_ok=True)
    with tarfile.open(cache / f"fontsource-{family}-5.3.0.tgz", "w:gz") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def cache(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "TRAIN", {"plain": ["400-normal"]})
    monkeypatch.setattr(build, "TEST", {"serif": ["400-normal", "700-normal"]})
    pack(tmp_path / "cache", "plain", "OFL-1.1", {"400-normal": "DejaVuSans.ttf"})
    serifs = {"400-normal": "DejaVuSerif.ttf", "700-normal": "DejaVuSerif-Bold.ttf"}
    pack(tmp_path / "cache", "serif", "Apache-2.0", serifs)
    return tmp_path / "cache"


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_script_writes_class_folders_twice_the_same(build, cache, tmp_path, capsys):
    for name in ("a", "b"):
        build.main(["--packages", str(cache), "--output", str(tmp_path / name)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "train: 120 classes, 1 fonts of 1 families, 120 images"
    assert printed[1] == "test: 120 classes, 2 fonts of 1 families, 240 images"
    assert printed[2].partition(": ")[2] == printed[5].partition(": ")[2] != ""
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

    text = (tmp_path / "a" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "| serif-700-normal | `@fontsource/serif@5.3.0` | Apache-2.0 | Copyright (c) 2003 by Bitstream" in text
    data = folder.load(TrainConfig(benchmark="folder", data_dir=tmp_path / "a", workers=0).resolved())
    assert data.class_names[:2] == ("u0021", "u0022") and len(data.class_names) == 120


def test_another_licence_or_an_old_folder_stops_the_script(build, cache, tmp_path, capsys):
    options = ["--packages", str(cache), "--output", str(tmp_path / "out")]
    pack(cache, "serif", "Proprietary", {})
    with pytest.raises(ValueError, match="serif is under Proprietary, which is none of Apache-2.0, OFL-1.1"):
        build.main(options)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        build.main(options)
    assert "out is there already" in capsys.readouterr().err
