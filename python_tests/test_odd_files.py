"""Files of every odd kind in a data set: decoded rightly, or named before any training, in one line."""

import io
import os
import re
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import trees
from PIL import Image

from janus_ext.config import TrainConfig
from janus_ext.data import domainnet, folder
from janus_ext.data.images import read_image
from janus_ext.data.lists import read_lines, read_yaml
from janus_ext.errors import DataError

GREY = 128
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def encoded(mode: str = "RGB", kind: str = "PNG", size: tuple[int, int] = (40, 30), **options) -> bytes:
    """A grey image; its file's bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (GREY,) * 3).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    """The head of a PNG, whatever comes behind it."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks)


def animated(kind: str) -> bytes:
    buffer = io.BytesIO()
    first, second = (Image.new("RGB", (40, 30), (level,) * 3) for level in (GREY, 0))
    first.save(buffer, kind, save_all=True, append_images=[second])
    return buffer.getvalue()


def of_array(values: np.ndarray, kind: str = "TIFF") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


def broken_crc(data: bytes) -> bytes:
    where = data.index(b"IDAT") + 6
    return data[:where] + bytes([data[where] ^ 255]) + data[where + 1 :]


SOUND = {  # shown grey
    "png under another name.jpg": encoded(),
    "gif under another name.png": encoded(kind="GIF"),
    "jpeg under another name.webp": encoded(kind="JPEG", quality=95),
    "cmyk.jpg": encoded("CMYK", "JPEG", quality=95),
    "ycbcr.jpg": encoded("YCbCr", "JPEG", quality=95),
    "grey.gif": encoded("L", "GIF"),
    "grey.bmp": encoded("L", "BMP"),
    "sixteen bits, big.tif": of_array(np.full((30, 40), GREY * 257, ">u2")),
    "two pages.tif": animated("TIFF"),
    "animated.gif": animated("GIF"),
    "animated.webp": animated("WEBP"),
    "animated.png": animated("PNG"),
    "one pixel.gif": encoded("L", "GIF", (1, 1)),
    "one column.png": encoded(size=(1, 3000)),
    "one row.png": encoded(size=(60000, 1)),
    "progressive.jpg": encoded(kind="JPEG", quality=95, progressive=True),
    "more behind its end.jpg": encoded(kind="JPEG", quality=95) + b"\0" * 1000,
    "a b c.PNG": encoded(),
    "new\nline.png": encoded(),
    "esc\x1b[31m.png": encoded(),
    "\u00e9\U0001f600.png": encoded(),
    "caf\udce9.png": encoded(),
    "%s {x} 'q\".png": encoded(),
    f"{'n' * 251}.png": encoded(),
}
BROKEN = {  # contents, and the end of what is said
    "empty.jpg": (b"", "empty: 0 bytes"),
    "cut.jpg": (encoded(kind="JPEG", size=(200, 200))[:700], "unreadable: .*truncated"),
    "cut.png": (encoded()[:60], "unreadable: .*"),
    "cut.webp": (encoded(kind="WEBP")[:20], "unreadable: .*"),
    "cut.tif": (encoded(kind="TIFF")[:100], "unreadable: .*"),
    "text.jpg": (b"<html>404</html>", "unreadable: cannot identify image file"),
    "postscript.jpg": (EPS, "unreadable: cannot identify image file"),
    "postscript.png": (EPS, "unreadable: cannot identify image file"),
    "bomb.png": (
        png_of(60000, 60000, png_chunk(b"IDAT", zlib.compress(b"0"))),
        r"unreadable: Image size \(3600000000 pixels\) exceeds limit",
    ),
    "bomb.bmp": (
        b"BM" + struct.pack("<IIIIiiHH", 0, 0, 54, 40, 60000, 60000, 1, 24) + bytes(24),
        "unreadable: .*limit",
    ),
    "bomb of text.png": (
        png_of(8, 8, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))) + encoded()[33:],
        "unreadable: .*too large",
    ),
    "crc.png": (broken_crc(encoded()), "unreadable: .*"),
    "float.tif": (of_array(np.ones((4, 4), np.float32)), "unreadable: pixels are floating point"),
    "wide.tif": (of_array(np.full((4, 4), 1 << 20, np.int32)), "unreadable: grey values lie in 1048576"),
    "dark, or eight bits.tif": (
        of_array(np.full((4, 4), 200, np.int32)),
        "unreadable: grey values of 32 bits lie in 200",
    ),
    "zero.png": (png_of(0, 8), "unreadable: .*"),
    "new\nline\x1b[2J.jpg": (b"", r"new\\nline\\x1b\[2J.jpg is empty: 0 bytes"),
    "caf\udce9.jpg": (b"x", "unreadable: cannot identify"),
}


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two classes of three images; what is odd comes to the first."""
    trees.folders(tmp_path / "tree", 2, 3, ("a", "b").__getitem__)
    return tmp_path / "tree"


def load(tree: Path):
    return folder.load(TrainConfig(benchmark="folder", data_dir=tree, workers=0, tasks=1).resolved())


def refused(tree: Path) -> str:
    with pytest.raises(DataError) as caught:
        load(tree)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    return str(caught.value)


def test_what_is_odd_and_sound_is_decoded(tree):
    for name, data in SOUND.items():
        (tree / "a" / name).write_bytes(data)
    benchmark = load(tree)
    assert len(benchmark.train) + len(benchmark.test) == 6 + len(SOUND)
    for name in SOUND:
        pixels = np.asarray(read_image(tree / "a" / name, upright=True)).astype(int)
        assert pixels.ndim == 3 and np.abs(pixels - GREY).max() <= 3, name


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_before_training(tree, tmp_path, monkeypatch, name):
    """And no other program is called for it."""
    called = tmp_path / "called"
    for program in ("gs", "gswin64c"):
        (tmp_path / program).write_text(f"#!/bin/sh\ntouch {called}\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    data, said = BROKEN[name]
    (tree / "a" / name).write_bytes(data)
    message = refused(tree)
    assert message.startswith("--data-dir: a/") and re.search(said, message), message
    assert not called.exists()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def nothing(path: Path) -> None:
    path.symlink_to("nowhere.jpg")


def two_links(path: Path) -> None:
    path.symlink_to("other.jpg")
    path.with_name("other.jpg").symlink_to(path.name)


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # as /dev/zero
    except PermissionError:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (loop, "is missing: Too many levels of symbolic links"),
        (two_links, "is missing: Too many levels of symbolic links"),
        (nothing, "is missing: No such file or directory"),
        (os.mkfifo, "is unreadable: it is no file"),
        (device, "is unreadable: it is no file"),
    ],
)
def test_what_is_no_file_is_named(tree, make, said):
    make(tree / "a" / "x.jpg")
    assert said in refused(tree)


@pytest.mark.parametrize("make", [os.mkfifo, device, Path.mkdir])
def test_nobody_waits_for_what_is_no_file(tmp_path, make):
    make(tmp_path / "x.jpg")
    with pytest.raises(DataError, match=r"x.jpg cannot be read: it is no file$"):
        read_image(tmp_path / "x.jpg")


def test_a_folder_with_the_name_of_an_image_is_a_folder(tree):
    (tree / "a" / "empty.jpg").mkdir()
    trees.save_jpeg(tree / "a" / "x.jpg" / "y.jpg", trees.drawing(0, 0))
    benchmark = load(tree)
    assert "a/x.jpg/y.jpg" in (*benchmark.train.samples, *benchmark.test.samples)
    assert len(benchmark.train) + len(benchmark.test) == 7


def test_an_image_that_nobody_may_read_is_named(tree, monkeypatch):
    """The super-user may read all: the system's answer stands for itself."""
    read = PIL.Image.open

    def refusing(path, *args, **kwargs):
        if str(path).endswith("a_0.jpg"):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(PIL.Image, "open", refusing)
    assert "a/a_0.jpg is unreadable: Permission denied" in refused(tree)


# lists ----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def lists(tmp_path) -> Path:
    """DomainNet's lists of one domain; there are no images."""
    for part in ("train", "test"):
        lines = [f"real/thing_{c:03d}/real_{c:03d}_{part}.jpg {c}\n" for c in range(345)]
        (tmp_path / f"real_{part}.txt").write_text("".join(lines))
    return tmp_path


def read(lists: Path):
    return domainnet.read(TrainConfig(benchmark="domainnet", data_dir=lists, domains=("real",)).resolved())


def append(path: Path, *lines: bytes) -> None:
    path.write_bytes(path.read_bytes() + b"\n".join(lines) + b"\n")


LINES = {
    b"real/thing_003/a\0b.jpg 3": "real_train.txt:346 .*wanted real/<class>/<file>",
    b"\0": "real_train.txt:346 .*wanted",
    b"real/thing_003/x.jpg 345": r"real_train.txt:346 .*0\.\.344, got 345",
    b"real/thing_003/x.jpg -1": "real_train.txt:346 .*wanted",
    b"real/thing_003/x.jpg 3.0": "real_train.txt:346 .*wanted",
    b"real/thing_003/x.jpg " + b"9" * 5000: "real_train.txt:346 .*",
    b"real/thing_003/x.jpg \xd9\xa3": "real_train.txt:346 .*",  # a digit, but not of ours
    b"real/thing_003/real_003_train.jpg 3": "real_train.txt:346 .*is listed in real_train.txt:4 already",
    b"real/../../etc/passwd 3": "real_train.txt:346 .*wanted",
    b"real/thing_003/\x1b[2J.png 4": r"class 4 is thing_004 in earlier entries|thing_003 is class 3",
    b"x" * 100_000: "real_train.txt:346 .*wanted",
}


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_bad_line_is_named_by_its_number(lists, line):
    append(lists / "real_train.txt", line)
    listing = read(lists)
    [problem] = listing.problems
    assert re.search(LINES[line], str(problem)) and len(str(problem)) < 400, str(problem)[:500]
    assert "\n" not in str(problem) and "\x1b" not in str(problem) and "\0" not in str(problem)


def test_line_ends_and_marks_are_no_matter(lists):
    wanted = read(lists)
    for start, end in ((b"\xef\xbb\xbf", b"\r\n"), (b"", b"\r"), (b"\xef\xbb\xbf", b"\n\n")):
        for path in lists.glob("*.txt"):
            path.write_bytes(
                start + path.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\n", end)
            )
        found = read(lists)
        assert (found.train, found.test, found.problems) == (wanted.train, wanted.test, ())
        for path in lists.glob("*.txt"):
            path.write_bytes(b"\n".join(line for line in path.read_bytes().splitlines() if line) + b"\n")


def test_a_pipe_in_the_place_of_a_list_is_named(tmp_path):
    os.mkfifo(tmp_path / "x.txt")
    with pytest.raises(DataError, match="^--task-list .*x.txt cannot be read: it is a pipe, and no file$"):
        read_lines(tmp_path / "x.txt", "--task-list")
    with pytest.raises(DataError, match="x.txt cannot be read: it is a pipe"):
        list(read_yaml(tmp_path / "x.txt"))


def test_a_pipe_of_the_shell_is_read():
    reading, writing = os.pipe()
    os.write(writing, b"a\nb\n")
    os.close(writing)
    assert read_lines(Path(f"/dev/fd/{reading}"), "--task-list") == ["a", "b", ""]
    os.close(reading)


LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" if n else "a0: &a0 [x]\n" for n in range(9))
YAML = {
    "a date that is none": "data: [2001-13-45]\ntargets: [0]\n",
    "a number too long": f"data: [{'9' * 5000}]\ntargets: [0]\n",
    "no number": "data: !!int x\ntargets: [0]\n",
    "too deep": "[" * 100_000,
    "a list in itself": "data: &d [*d]\ntargets: [0]\n",
    "laughs": LAUGHS + "data: [*a8]\ntargets: [0]\n",
    "laughs as a class id": LAUGHS + "data: [real/a/b.jpg]\ntargets: [*a8]\n",
    "a long number in other digits": f"data: [real/a/b.jpg]\ntargets: [0x{'f' * 5000}]\n",
    "code": "data: !!python/object/apply:os.system [touch called]\ntargets: [0]\n",
    "a name": "data: [!!python/name:os.system '']\ntargets: [0]\n",
    "nothing": "",
    "bytes": "\0\1\2",
    "a number": "7",
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
def test_bad_yaml_is_named_in_a_short_line(lists, text, monkeypatch):
    monkeypatch.chdir(lists)
    for part in ("train", "test"):
        (lists / f"{part}.yaml").write_text(text)
    files = (lists / "train.yaml", lists / "test.yaml")
    config = TrainConfig(benchmark="domainnet", data_dir=lists, domains=("real",), split="coda", split_files=files)
    try:
        message = str(domainnet.read(config.resolved()).problems[0])
    except DataError as error:
        message = str(error)
    assert "train.yaml" in message and "\n" not in message and len(message) < 600
    assert not (lists / "called").exists()
