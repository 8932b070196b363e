"""Rebuild the embedded emoji benchmark from the published art packages.

    python benchmarks/emoji/build_images.py --packages CACHE [--pretraining CACHE/pretraining.npz]

Writes ``janus_ext/assets/emoji.zip`` (200 concepts x 8 styles, 64 x 64 RGB PNG on white) and ``emoji.json`` (class
table and split); with ``--pretraining`` also the uint8 images of all concepts outside the 200. A package missing in
CACHE is fetched with ``npm pack``. The same packages and library versions give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageOps

sys.path.append(str(Path(__file__).resolve().parents[1]))
from npm_package import Package  # noqa: E402 - lies in the folder above

SIZE = 64
SEED = 2026
CONCEPTS = 200
PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "openmoji": "openmoji@17.0.0",
    "openmoji-black": "openmoji@17.0.0",
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "emojione-v1": "@iconify-json/emojione-v1@1.2.3",
}
STYLES = list(PACKAGES)
FAMILIES = [["openmoji", "openmoji-black"], ["fluent-3d", "fluent-flat"]]
SINGLES = [style for style in STYLES if not any(style in family for family in FAMILIES)]
UNUSED = ("/sheets", "/src/")  # sprite sheets and sources
ASSETS = Path(__file__).resolve().parents[2] / "janus_ext" / "assets"

SKIN_TONES = {f"1f3f{digit}" for digit in "bcdef"}
SKIN_WORDS = {"light": "1f3fb", "medium-light": "1f3fc", "medium": "1f3fd", "medium-dark": "1f3fe", "dark": "1f3ff"}
# Code points that modify or join others and so do not name a concept: joiner, keycap, gender signs, skin, hair.
MODIFIERS = SKIN_TONES | {"200d", "20e3", "2640", "2642"} | {f"1f9b{digit}" for digit in "0123"}
EXCLUDED_CATEGORIES = {"Flags", "Symbols", "Component"}
CLOCK_DIALS = {f"{point:x}" for point in range(0x1F550, 0x1F568)}  # 24 dials alike but for the hands: glyphs too
# People drawn once per gender under separate code points: a variant could not be told by its base code point.
GENDERED = {"person", "person-role", "person-fantasy", "family"}
GENDERED_NAME = re.compile(r"\b(m[ae]n|wom[ae]n|boy|girl|couple|bride|person)\b")


def normal_code(code: str) -> str:
    """Lower-case hyphenated code points without the presentation selector FE0F."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def strip_skin(code: str) -> str:
    """The code of the concept of which ``code`` is a skin-tone variant (or ``code`` itself)."""
    return "-".join(part for part in code.split("-") if part not in SKIN_TONES)


def slug(name: str) -> str:
    """Icon-set spelling of a name: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['’]", "", name.lower())).strip("-")


@dataclass
class Concept:
    """One concept: its code, its names in order of authority, and its place in the category table."""

    code: str
    name: str
    category: str
    subcategory: str
    aliases: list[str] = field(default_factory=list)

    def base_points(self) -> set[str]:
        """The code points that make up the concept, modifiers left out."""
        return set(self.code.split("-")) - MODIFIERS


def decode_image(data: bytes) -> Image.Image:
    """A bitmap file as a SIZE x SIZE RGB image on white, aspect ratio kept."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return ImageOps.pad(canvas.convert("RGB"), (SIZE, SIZE), Image.Resampling.LANCZOS, color="white")


def render_svg(svg: str) -> Image.Image:
    """An SVG document as a SIZE x SIZE RGB image on white; no fonts of the machine are used."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True)
    return decode_image(bytes(png))


Drawings = dict[str, Callable[[], Image.Image]]


def read_concepts(table: list[dict], openmoji: list[dict]) -> list[Concept]:
    """Concepts of the category table, with the shared short name of the OpenMoji table first among the aliases."""
    common = {normal_code(row["hexcode"]): row["annotation"] for row in openmoji}
    concepts = []
    for row in table:
        code = normal_code(row["unified"])
        names = [common.get(code, row["name"]), row["name"], *row["short_names"]]
        concepts.append(Concept(code, names[0], row["category"], row["subcategory"], [slug(n) for n in names]))
    return concepts


def read_extras(openmoji: list[dict]) -> list[Concept]:
    """OpenMoji's own drawings that are not in the standard: used for pretraining only."""
    rows = [row for row in openmoji if row["group"].startswith("extras")]
    return [Concept(normal_code(r["hexcode"]), r["annotation"], r["group"], r["subgroups"]) for r in rows]


def bitmap_style(package: Package, folder: str, allowed: set[str]) -> Drawings:
    """Drawings of a folder of bitmaps named by code; codes outside ``allowed`` may be another vendor's art."""
    files = {normal_code(stem): data for stem, data in package.folder(folder)}
    return {code: (lambda d=data: decode_image(d)) for code, data in files.items() if code in allowed}


def vendor_codes(table: list[dict], vendor: str) -> set[str]:
    """Codes, with skin variants, for which the table says that ``vendor`` itself has a drawing."""
    rows = [row for base in table for row in (base, *base.get("skin_variations", {}).values())]
    return {normal_code(row["unified"]) for row in rows if row[f"has_img_{vendor}"]}


def svg_style(package: Package, folder: str) -> Drawings:
    """Drawings of a folder of SVG files named by code."""
    return {normal_code(stem): (lambda d=data: render_svg(d.decode())) for stem, data in package.folder(folder)}


def icon_body(icons: dict, name: str) -> Callable[[], Image.Image]:
    """Drawing of the icon ``name`` of an icon set, following aliases (of which some are mirrored)."""
    alias = icons["aliases"].get(name)
    if alias:
        parent = icon_body(icons, alias["parent"])
        return (lambda: ImageOps.mirror(parent())) if alias.get("hFlip") else parent
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return lambda: render_svg(f'{head} viewBox="0 0 {width} {height}">{icon["body"]}</svg>')


def coded_icon_style(package: Package) -> Drawings:
    """Drawings of an icon set that has a table from codes to icon names."""
    icons = package.json("icons.json")
    return {normal_code(code): icon_body(icons, name) for code, name in package.json("chars.json").items()}


def named_icon_style(package: Package, concepts: list[Concept], fluent: dict[str, str]) -> Drawings:
    """Drawings of an icon set without codes: matched by name, in the order of authority of the names.

    A name once given to a concept is not given to another, so that an older meaning of a word never wins.
    """
    icons = package.json("icons.json")
    known = set(icons["icons"]) | set(icons["aliases"])
    primary = {concept.aliases[0]: concept.code for concept in concepts}
    found: dict[str, str] = {}
    for rank in range(max(len(c.aliases) for c in concepts) + 1):
        for concept in concepts:
            names = [*concept.aliases[:2], fluent.get(concept.code, ""), *concept.aliases[2:]]
            name = names[rank] if rank < len(names) else ""
            mine = primary.get(name, concept.code) == concept.code
            if name in known and mine and concept.code not in found and name not in found.values():
                found[concept.code] = name
    return {code: icon_body(icons, n) for code, n in (*found.items(), *skin_names(found, known))}


def skin_names(found: dict[str, str], known: set[str]) -> Iterator[tuple[str, str]]:
    """(code, icon name) of the skin-tone variants of the named concepts of one code point."""
    for code, name in found.items():
        head, _, tail = code.partition("-")
        for word, tone in SKIN_WORDS.items():
            if f"{name}-{word}-skin-tone" in known:
                yield "-".join(filter(None, (head, tone, tail))), f"{name}-{word}-skin-tone"


def read_styles(cache: Path) -> tuple[list[Concept], list[Concept], dict[str, Drawings]]:
    """All concepts, the extra concepts, and per style the drawings by code (rendered only when called)."""
    packages = {spec: Package(spec, cache, UNUSED) for spec in dict.fromkeys(PACKAGES.values())}
    of = {style: packages[spec] for style, spec in PACKAGES.items()}
    table = of["noto"].json("emoji.json")
    openmoji = of["openmoji"].json("data/openmoji.json")
    concepts = read_concepts(table, openmoji)
    fluent = {normal_code(code): name for code, name in of["fluent-flat"].json("chars.json").items()}
    styles = {
        "noto": bitmap_style(of["noto"], "img/google/64", vendor_codes(table, "google")),
        "twemoji": bitmap_style(of["twemoji"], "img/twitter/64", vendor_codes(table, "twitter")),
        "openmoji": svg_style(of["openmoji"], "color/svg"),
        "openmoji-black": svg_style(of["openmoji-black"], "black/svg"),
        "fluent-3d": bitmap_style(of["fluent-3d"], "assets", set(fluent)),
        "fluent-flat": coded_icon_style(of["fluent-flat"]),
        "noto-v1": named_icon_style(of["noto-v1"], concepts, fluent),
        "emojione-v1": named_icon_style(of["emojione-v1"], concepts, fluent),
    }
    return concepts, read_extras(openmoji), styles


def draw(seed: int, *words: str) -> float:
    """A number in [0, 1) that depends on the seed and the words only, not on a library's generator."""
    digest = hashlib.sha256("/".join((str(seed), *words)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def choose_concepts(concepts: list[Concept], styles: dict[str, Drawings]) -> list[Concept]:
    """The benchmark's concepts, sorted by code: single code points, in all styles, by seed."""
    pool = [c for c in concepts if all(c.code in drawings for drawings in styles.values()) and is_candidate(c)]
    chosen = sorted(pool, key=lambda c: draw(SEED, "concept", c.code))[:CONCEPTS]
    return sorted(chosen, key=lambda c: c.code)


def is_candidate(concept: Concept) -> bool:
    """True when no flag, symbol or dial, and every variant can be told by the concept's own code point."""
    if "-" in concept.code or concept.code in CLOCK_DIALS or concept.category in EXCLUDED_CATEGORIES:
        return False
    gendered = concept.subcategory in GENDERED or GENDERED_NAME.search(concept.name.lower())
    return not gendered


def choose_test_styles(code: str) -> list[str]:
    """Two test styles of a concept: a whole family or two single styles, each style with probability 1/4."""
    lot = draw(SEED, "family", code)
    if lot < 0.5:
        return FAMILIES[int(lot * 2 * len(FAMILIES))]
    pair = sorted(SINGLES, key=lambda style: draw(SEED, "style", code, style))[:2]
    return sorted(pair, key=STYLES.index)


def encode_png(image: Image.Image) -> bytes:
    """``image`` as an optimised RGB PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_zip(path: Path, chosen: list[Concept], styles: dict[str, Drawings]) -> None:
    """Stored zip of ``<style>/<code>.png`` in sorted order with fixed time stamps and modes."""
    names = sorted((style, concept.code) for style in STYLES for concept in chosen)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for style, code in names:
            info = zipfile.ZipInfo(f"{style}/{code}.png", (2026, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, encode_png(styles[style][code]()))


def write_table(path: Path, chosen: list[Concept]) -> None:
    """Class table and split as JSON, one concept a line."""
    keys = ("code", "name", "category", "subcategory")
    rows = [{**{k: getattr(c, k) for k in keys}, "test_styles": choose_test_styles(c.code)} for c in chosen]
    head = json.dumps({"styles": STYLES, "families": FAMILIES, "seed": SEED}, ensure_ascii=False)[:-1]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f'{head},\n"concepts": [\n{lines}\n]}}\n', encoding="utf-8")


def pretraining_concepts(concepts: list[Concept], extras: list[Concept], chosen: list[Concept]) -> list[Concept]:
    """Concepts that share no base code point with the benchmark, and extras that do not repeat one's name."""
    points = set().union(*(concept.base_points() for concept in chosen))
    named = re.compile(r"\b(" + "|".join(re.escape(c.name.lower()) for c in chosen) + r")s?\b")
    free = [c for c in (*concepts, *extras) if c.base_points() and not c.base_points() & points]
    return [c for c in free if not (c.category.startswith("extras") and named.search(c.name.lower()))]


def pretraining_rows(concepts: list[Concept], styles: dict[str, Drawings]) -> Iterator[tuple[int, int, Image.Image]]:
    """(concept index, style index, image) of every drawing, skin-tone variants under their base concept."""
    index = {concept.code: i for i, concept in enumerate(concepts)}
    for s, style in enumerate(STYLES):
        for code in sorted(styles[style]):
            base = strip_skin(code)
            variant_of_line_art = style == "openmoji-black" and code != base
            if base in index and not variant_of_line_art:
                yield index[base], s, styles[style][code]()


def write_pretraining(path: Path, concepts: list[Concept], styles: dict[str, Drawings]) -> None:
    """``images`` uint8 [N, 64, 64, 3], ``concept`` and ``style`` int16 [N], and the concept and style tables."""
    rows = list(pretraining_rows(concepts, styles))
    groups = sorted({f"{c.category}/{c.subcategory}" for c in concepts})
    np.savez(
        path,
        images=np.stack([np.asarray(image) for _, _, image in rows]),
        concept=np.array([concept for concept, _, _ in rows], np.int16),
        style=np.array([style for _, style, _ in rows], np.int16),
        codes=np.array([concept.code for concept in concepts]),
        group=np.array([groups.index(f"{c.category}/{c.subcategory}") for c in concepts], np.int16),
        groups=np.array(groups),
        styles=np.array(STYLES),
    )
    print(f"{path}: {len(rows)} images of {len(concepts)} concepts, {path.stat().st_size / 1e6:.0f} MB")


def parse_arguments(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, metavar="DIR", help="folder of the npm tarballs")
    parser.add_argument("--assets", type=Path, default=ASSETS, metavar="DIR", help="folder written to")
    parser.add_argument("--pretraining", type=Path, metavar="FILE.npz", help="also write the pretraining images")
    return parser.parse_args(arguments)


def main() -> None:
    """Build the images, the table and, on request, the pretraining set."""
    options = parse_arguments()
    concepts, extras, styles = read_styles(options.packages)
    chosen = choose_concepts(concepts, styles)
    options.assets.mkdir(parents=True, exist_ok=True)
    archive = options.assets / "emoji.zip"
    write_zip(archive, chosen, styles)
    write_table(options.assets / "emoji.json", chosen)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    print(f"{archive}: {len(chosen)} concepts, {archive.stat().st_size / 1e6:.2f} MB, sha256 {digest}")
    if options.pretraining:
        write_pretraining(options.pretraining, pretraining_concepts(concepts, extras, chosen), styles)


if __name__ == "__main__":
    main()
