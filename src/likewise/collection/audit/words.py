"""Captions as words: one spelling for counting, and whether a caption says anything of its image."""

import re
import unicodedata
from hashlib import blake2b

NO_LETTERS = "no letters"
WEB_ADDRESS = "web address only"
FILE_NAME = "file name only"
FILLER_ONLY = "filler words only"

_LETTERS = re.compile(r"[^\W\d_]+")
_PLAIN = re.compile(r"[a-z0-9]+")
_DIGITS = re.compile(r"\d+")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_MARKUP = re.compile(r"</?[a-z][^<>]*>|&(?:[a-z]{2,8}|#\d{2,6}|#x[0-9a-f]{2,6});", re.IGNORECASE)
_SUFFIX = re.compile(r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic|svg)$", re.IGNORECASE)
_CAMERA = re.compile(
    r"(?:img|dsc[nf]?|pict|pxl|mvimg|gopr|imag|cimg|screenshot|image|photo|picture|p)[ _-]?\d{3,}[\w -]*",
    re.IGNORECASE,
)
# English words that tell nothing of what is to be seen: function words, and what people write of any photo.
_FILLER = """
    a an the this that these those it its i my me mine we our ours you your yours he his she her hers they
    their theirs one ones and or but of in on at by for from to with as is am are was were be been being do
    does did done has have had not no so too very just only really quite more most some any all both each
    here there now then today yesterday again still also another other what which who when where how why
    s t d ll m re ve
    favourite favorite favourites favorites best better good great nice cool awesome amazing lovely pretty
    beautiful perfect new latest first last thing things stuff something anything lol omg oc itap took taken
    take shot shots pic pics photo photos photograph photographs picture pictures image images img snapshot
    untitled unknown unnamed none null nan na undefined missing empty blank test caption captions title
    description alt text tbd todo example
    dsc dscn dscf pict pxl mvimg gopr imag cimg screenshot p jpg jpeg png gif webp
"""
FILLER = frozenset(_FILLER.split())


def normalised(caption: str) -> str:
    """Return a caption in one spelling: NFKC, case folded, letters, marks and digits set apart by spaces."""
    folded = unicodedata.normalize("NFKC", caption).casefold()
    if folded.isascii():
        return " ".join(_PLAIN.findall(folded))
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in folded)
    return " ".join("".join(kept).split())


def template_of(text: str) -> str:
    """Return a normalised caption with every number replaced by `#`."""
    return _DIGITS.sub("#", text)


def hash_of(text: str) -> int:
    """Return 64 bits of BLAKE2b of a text."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def length_of(caption: str) -> int:
    """Return the number of words, which are what spaces set apart and hold a letter or digit."""
    return sum(any(c.isalnum() for c in word) for word in caption.split())


def has_address(caption: str) -> bool:
    """Whether a caption holds a web address."""
    return _ADDRESS.search(caption) is not None


def has_markup(caption: str) -> bool:
    """Whether a caption holds tags or entities of HTML."""
    return _MARKUP.search(caption) is not None


def is_file_name(caption: str) -> bool:
    """Whether a caption is the name of an image file, or what cameras and phones call one."""
    stem, named = _SUFFIX.subn("", caption.strip())
    return bool(named and " " not in stem) or _CAMERA.fullmatch(stem) is not None


def emptiness_of(caption: str) -> str | None:
    """Return why a caption says nothing of its image, or None where it says something.

    A symbol such as an emoji says something. Filler words are known in English only.
    """
    rest, addresses = _ADDRESS.subn(" ", caption)
    words = set(_LETTERS.findall(unicodedata.normalize("NFKC", _SUFFIX.sub("", rest.strip())).casefold()))
    if words - FILLER or any(unicodedata.category(c) == "So" for c in rest):
        return None
    if addresses:
        return WEB_ADDRESS
    if is_file_name(caption):
        return FILE_NAME
    return FILLER_ONLY if words else NO_LETTERS
