"""Build the glyphs benchmark: characters are the classes, free fonts their styles.

    python benchmarks/glyphs/build.py --packages CACHE --output DATA/glyphs
    janus_ext.train --benchmark folder --data-dir DATA/glyphs --backbone emoji

Writes ``train/<class>/<font>.png`` and ``test/<class>/<font>.png``, 64 x 64 RGB, black on white: 120 characters in 30
training and 28 test fonts, no family of fonts on both sides. A class is named by its code point, such as u0041.
``ATTRIBUTION.md`` beside them names the fonts. Packages (fontsource's, under free licences) missing in CACHE are
fetched with ``npm pack``. The same packages and library versions give the same bytes; the digest printed is of all
paths and pixels. fontTools comes with matplotlib.

A glyph's ink stands in the middle of the image, so nothing but shape and size tells it. Hence the rule for
``CHARACTERS``: of characters that many fonts draw alike but for size, height, slant or a hair's breadth, one is kept at
most, as C of C c, O of O o 0, comma of comma and apostrophe, i of i and inverted !, D of D and eth, 1 of 1 l I |.
Every font has all of them, and no two are the same pixels in any font: where that does not hold, or a glyph is empty or
too large, the build fails with the names.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.append(str(Path(__file__).resolve().parents[1]))
from npm_package import Package  # noqa: E402 - lies in the folder above

CHARACTERS = (
    "ABCDEFGHJKLMNOPQRSTUVWXYZ"
    "abdefghijkmnqrty"
    "123456789"
    '!"#$%&()*+,-./:;<=>?@[\\]^{}~'
    "¿£¥€¢§¶©®™¤«»±÷¬¨…ßæÆŒØÞð¼½¾"
    "ÃÅÇÊÑÖÛÝäéîñõÿ"
)
VERSION = "5.3.0"  # of every package
LICENCES = {"OFL-1.1", "Apache-2.0"}
# Family, as fontsource names it: weights and styles.
TRAIN = {
    "anonymous-pro": ["400-normal"],
    "architects-daughter": ["400-normal"],
    "bitter": ["400-normal"],
    "cabin": ["400-italic"],
    "caveat": ["700-normal"],
    "comic-neue": ["400-normal"],
    "courier-prime": ["400-normal"],
    "dosis": ["400-normal"],
    "eb-garamond": ["400-normal"],
    "fredoka": ["400-normal"],
    "inconsolata": ["700-normal"],
    "josefin-sans": ["400-normal"],
    "kalam": ["400-normal"],
    "lato": ["400-normal"],
    "libre-baskerville": ["400-normal"],
    "lobster": ["400-normal"],
    "lora": ["400-italic"],
    "merriweather": ["700-normal"],
    "montserrat": ["400-normal"],
    "oswald": ["400-normal"],
    "patrick-hand": ["400-normal"],
    "playfair-display": ["400-normal"],
    "quicksand": ["700-normal"],
    "raleway": ["400-normal"],
    "righteous": ["400-normal"],
    "roboto": ["400-normal"],
    "space-mono": ["400-normal"],
    "special-elite": ["400-normal"],
    "vollkorn": ["400-normal"],
    "zilla-slab": ["700-normal"],
}
TEST = {
    "alegreya": ["400-normal", "400-italic"],
    "balsamiq-sans": ["400-normal", "700-italic"],
    "chakra-petch": ["400-normal", "700-normal"],
    "comfortaa": ["400-normal", "700-normal"],
    "courgette": ["400-normal"],
    "grandstander": ["400-normal"],
    "ibm-plex-serif": ["400-normal", "400-italic"],
    "jetbrains-mono": ["400-normal", "700-normal"],
    "open-sans": ["400-italic", "700-normal"],
    "overpass-mono": ["400-normal", "700-normal"],
    "pt-serif": ["400-normal", "700-italic"],
    "rokkitt": ["400-normal", "700-normal"],
    "saira-condensed": ["400-normal"],
    "source-sans-3": ["400-normal", "700-normal"],
    "spectral": ["400-normal", "700-italic"],
    "sriracha": ["400-normal"],
}
SIZE = 64  # pixels, of an image's side
CAPITAL = 30  # pixels: how high every font's H is drawn
MARGIN = 2  # pixels that stay white on every side
SCALE = 4  # drawn so much larger and averaged: hinting to whole pixels would bend the shapes


@dataclass(frozen=True)
class Font:
    """One font file: ``name`` such as lato-400-normal, ``data`` in any format that FreeType reads."""

    name: str
    data: bytes
    package: str = ""
    licence: str = ""

    def missing(self, characters: str) -> str:
        """Those of ``characters`` that the font does not have."""
        known = self._tables().getBestCmap()
        return "".join(c for c in characters if ord(c) not in known)

    def copyright(self) -> str:
        """What the font file itself says."""
        return self._tables()["name"].getDebugName(0)

    def at(self, capital: int) -> ImageFont.FreeTypeFont:
        """The font in the size in which its H is ``capital`` pixels high."""
        top, bottom = self._open(1000).getbbox("H", anchor="ls")[1::2]
        return self._open(1000 * capital / (bottom - top))

    def _tables(self) -> TTFont:
        return TTFont(io.BytesIO(self.data), lazy=True)

    def _open(self, size: float) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(io.BytesIO(self.data), size, layout_engine=ImageFont.Layout.BASIC)


def draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """``character`` as a SIZE x SIZE RGB image, black on white, the box of its ink in the middle.

    ``font`` is SCALE times as large as in the image. ValueError where there is no ink or where it does not fit.
    """
    side, room = SIZE * SCALE, (SIZE - 2 * MARGIN) * SCALE
    sheet = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(sheet).text((2 * side, 2 * side), character, fill=255, font=font, anchor="ls")
    box = sheet.getbbox()
    if box is None:
        raise ValueError(f"{character} is drawn empty")
    ink = sheet.crop(box)
    if max(ink.size) > room:
        raise ValueError(
            f"{character} is {ink.width / SCALE:g} x {ink.height / SCALE:g} pixels, the room is {room / SCALE:g}"
        )
    image = Image.new("L", (side, side))
    image.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return ImageOps.invert(image.reduce(SCALE)).convert("RGB")


def draw_all(font: Font, characters: str = CHARACTERS) -> dict[str, Image.Image]:
    """The image of every character. ValueError where the font lacks one or draws two alike."""
    if missing := font.missing(characters):
        raise ValueError(f"{font.name} lacks {missing}")
    opened, images, seen = font.at(CAPITAL * SCALE), {}, {}
    for character in characters:
        try:
            images[character] = draw(opened, character)
        except ValueError as error:
            raise ValueError(f"{font.name}: {error}") from None
        twin = seen.setdefault(images[character].tobytes(), character)
        if twin != character:
            raise ValueError(f"{font.name} draws {twin} and {character} alike")
    return images


def class_name(character: str) -> str:
    """The folder of a character: its code point, such as u0041."""
    return f"u{ord(character):04x}"


def draw_side(side: str, fonts: Iterable[Font], characters: str = CHARACTERS) -> Iterator[tuple[str, Image.Image]]:
    """(path, image) of every character in every font: ``<side>/<class>/<font>.png``."""
    for font in fonts:
        for character, image in draw_all(font, characters).items():
            yield f"{side}/{class_name(character)}/{font.name}.png", image


def digest(images: dict[str, Image.Image]) -> str:
    """SHA-256 of all paths and pixels, in the order of the paths."""
    sha = hashlib.sha256()
    for path in sorted(images):
        sha.update(path.encode() + b"\0" + images[path].tobytes())
    return sha.hexdigest()


def read_fonts(families: dict[str, list[str]], cache: Path) -> Iterator[Font]:
    """The fonts of those families, Latin subset; packages missing in ``cache`` are fetched."""
    for family, styles in families.items():
        spec = f"@fontsource/{family}@{VERSION}"
        package = Package(spec, cache)
        licence = package.json("metadata.json")["license"]["type"]
        if licence not in LICENCES:
            raise ValueError(f"{family} is under {licence}, which is none of {', '.join(sorted(LICENCES))}")
        for style in styles:
            yield Font(f"{family}-{style}", package.read(f"files/{family}-latin-{style}.woff"), spec, licence)


def attribution(fonts: Iterable[Font]) -> str:
    """Package with its version, licence and copyright of every font, as a Markdown table."""
    lines = ["# The fonts of these images", "", "| font | package | licence | copyright |", "|---|---|---|---|"]
    for font in fonts:
        holder = font.copyright().replace("|", "\\|")
        lines.append(f"| {font.name} | `{font.package}` | {font.licence} | {holder} |")
    return "\n".join(lines) + "\n"


def write(output: Path, images: dict[str, Image.Image], text: str) -> None:
    """The images and ATTRIBUTION.md as a new folder, which appears only when all is there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        folder = Path(temporary, "glyphs")
        for path, image in images.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / path, optimize=True)
        (folder / "ATTRIBUTION.md").write_text(text, encoding="utf-8")
        folder.rename(output)


def main(arguments: list[str] | None = None) -> None:
    """Draw both sides, write them, say how many images there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, metavar="DIR", help="folder of the npm tarballs")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder that is made")
    options = parser.parse_args(arguments)
    if options.output.exists():
        parser.error(f"--output {options.output} is there already")
    fonts, images = [], {}
    for side, families in (("train", TRAIN), ("test", TEST)):
        read = list(read_fonts(families, options.packages))
        drawn = dict(draw_side(side, read))
        print(f"{side}: {len(CHARACTERS)} classes, {len(read)} fonts of {len(families)} families, {len(drawn)} images")
        fonts += read
        images |= drawn
    write(options.output, images, attribution(fonts))
    print(f"{options.output}: sha256 {digest(images)}")


if __name__ == "__main__":
    main()
