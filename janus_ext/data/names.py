"""Names of files: which ones are images, which are clutter, and names that are no valid text.

On Linux a name is a string of bytes. Python reads those that are no UTF-8 with surrogates in their place; here they
are written back as the bytes they were, so a name of any bytes has a fingerprint and a place in the order.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable

from PIL import features

from janus_ext.errors import on_one_line

AVIF = "avif" in features.modules and features.check("avif")  # not in every build of Pillow
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),  # torchvision's
    *(".jpe", ".jfif", ".gif", ".apng", ".dib", ".pbm", ".pnm", ".jp2", ".j2k", ".tga"),
    *((".avif",) if AVIF else ()),
)
FORMATS = (  # of Pillow's, by their contents, whatever the ending: none that calls another program, as EPS would
    *("JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", "WEBP", "TIFF", "JPEG2000", *(("AVIF",) if AVIF else ()), "TGA"),
)
OTHER_SUFFIXES = (
    *(".avif", ".heic", ".heif", ".hif", ".jxl", ".svg", ".psd", ".ico", ".eps", ".exr", ".hdr"),
    *(".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
ENDINGS = "Endings that count as images: " + " ".join(IMAGE_SUFFIXES) + " (of an animation, the first picture)"
CLUTTER = {  # what other systems leave behind, in lower case; beside these, all that begins with a dot
    *("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini"),
}


def is_image(name: str) -> bool:
    """True for the file names that count as images."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_other_image(name: str) -> bool:
    """True for the file names of images that are not read here."""
    return name.lower().endswith(OTHER_SUFFIXES) and not is_image(name)


def is_clutter(name: str) -> bool:
    """True for files and folders that never count: hidden ones, and what Windows, macOS and storage boxes leave."""
    return name.startswith(".") or name.lower() in CLUTTER


def to_bytes(name: str) -> bytes:
    """The bytes of a name as the disk has them; UnicodeEncodeError for text that can be no name."""
    return name.encode("utf-8", "surrogateescape")


def is_possible(name: str) -> bool:
    """False for what a list may hold but no disk can: a zero byte, half a character."""
    try:
        return b"\0" not in to_bytes(name)
    except UnicodeEncodeError:
        return False


def printable(name: str) -> str:
    """``name`` as valid text, bytes that are none written as escapes."""
    return to_bytes(name).decode("utf-8", "backslashreplace")


def similar(name: str, names: Iterable[str]) -> str:
    """The end of a message about a name that is none of ``names``: those it may have meant, or nothing."""
    close = difflib.get_close_matches(name, names)
    return f" (similar: {', '.join(map(on_one_line, close))})" if close else ""


def _log_valid_text(record: logging.LogRecord) -> bool:
    """Escapes what is no text in a message of ours, so that every handler can write or send it: in one line."""
    message = on_one_line(record.getMessage())
    record.msg, record.args = message.encode("utf-8", "backslashreplace").decode(), ()
    return True


logging.getLogger("janus_ext").addFilter(_log_valid_text)
