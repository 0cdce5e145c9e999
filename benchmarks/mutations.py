"""Seeded mutations of files: of bytes, of the blocks of a format, and of the structure of texts."""

import random
import re
from collections.abc import Callable

Files = dict[str, bytes]
Mutation = Callable[[bytes, random.Random], bytes]

_INTERESTING_BYTES = (0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x2C)
_MAX_INSERTED = 64
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
_VALUE = re.compile(rb'"(?:[^"\\\n]|\\.)*"|-?\d+(?:\.\d+)?')
_ODD_NUMBERS = (
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1", b"-0.0", b"0", b"1.5", b"2147483648"),
    *(
        b"9223372036854775808",
        b"1" * 400,
        b"1" * 5000,
        "²".encode(),
        "٣".encode(),
        b"0x10",
        b"1_000",
        b"true",
    ),
)
_ODD_VALUES = (
    *(b"null", b"true", b"{}", b"[]", b"[[]]", b'""', b'"\\ud800"', b'"\\u0000"', b'{"a": {"b": []}}'),
    *(b'"' + b"x" * 300 + b'"', b'"../' * 1 + b"../" * 20 + b'etc"', b'"http://a/b.jpg"', b"[1, null, {}]"),
    *(b"[" * 900 + b"]" * 900, b"[" * 100_000, b"{" + b'"a":{' * 990, b'"\\\\"', *_ODD_NUMBERS),
)
_ODD_TEXTS = (
    *(
        b'"',
        b'""',
        b"'",
        b"\0",
        b"\r",
        b"\n",
        b"\r\n",
        b"\n\n",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\x85",
    ),
    *(
        b",",
        b"\t",
        b";",
        b"|",
        b"#0\t",
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b"&a;",
        b"<",
        b"<!--",
        b"]]>",
        b"%00",
    ),
    *(
        "\u2028".encode(),
        "\u202e".encode(),
        "e\u0301".encode(),
        b"\xed\xa0\x80",
        b"../",
        b"/",
        b"~",
        b"*",
        b"- ",
    ),
    *(
        b"a" * 300,
        b"[" * 2000,
        b"<a>" * 2000,
        b"- " * 2000,
        b"x" * 5000 + b".jpg",
        b"sep=;\n",
        b"? ",
        b"&x [*x]",
    ),
)


def _range(data: bytes, rng: random.Random, max_length: int = 256) -> tuple[int, int]:
    """Return the ends of a random part, which may be empty."""
    start = rng.randint(0, len(data))
    return start, min(len(data), start + rng.randint(0, max_length))


def flip_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change a few bits, or set a few bytes to random or interesting values."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16)) if changed else 0):
        index = rng.randrange(len(changed))
        values = (changed[index] ^ 1 << rng.randrange(8), rng.randrange(256), rng.choice(_INTERESTING_BYTES))
        changed[index] = rng.choice(values)
    return bytes(changed)


def flip_header_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change bytes of the first 64, where the sizes are."""
    return flip_bytes(data[:64], rng) + data[64:]


def truncate(data: bytes, rng: random.Random) -> bytes:
    """Cut off the end."""
    return data[: rng.randint(0, len(data))]


def remove_part(data: bytes, rng: random.Random) -> bytes:
    """Remove some bytes."""
    start, stop = _range(data, rng)
    return data[:start] + data[stop:]


def insert_bytes(data: bytes, rng: random.Random) -> bytes:
    """Insert random bytes."""
    start, _ = _range(data, rng)
    return data[:start] + rng.randbytes(rng.randint(1, _MAX_INSERTED)) + data[start:]


def duplicate_part(data: bytes, rng: random.Random) -> bytes:
    """Repeat some bytes, a few times."""
    start, stop = _range(data, rng)
    return data[:stop] + data[start:stop] * rng.choice((1, 1, 2, 50)) + data[stop:]


def swap_parts(data: bytes, rng: random.Random) -> bytes:
    """Exchange two adjacent parts."""
    a, b, c = sorted(rng.randint(0, len(data)) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def zero_part(data: bytes, rng: random.Random) -> bytes:
    """Overwrite some bytes with one value."""
    start, stop = _range(data, rng)
    return data[:start] + bytes([rng.choice(_INTERESTING_BYTES)]) * (stop - start) + data[stop:]


def set_integer(data: bytes, rng: random.Random) -> bytes:
    """Overwrite 2, 4 or 8 aligned bytes with an extreme integer in either byte order."""
    width = rng.choice((2, 4, 8))
    start = rng.randrange(max(1, len(data) - width + 1)) // 2 * 2
    bits = 8 * width
    value = rng.choice((0, 1, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1, 2 ** (bits // 2), 65_535))
    encoded = value.to_bytes(width, "big")
    encoded = encoded[::-1] if rng.random() < 0.5 else encoded
    return data[:start] + encoded + data[start + width :]


def replace_number(data: bytes, rng: random.Random) -> bytes:
    """Replace a number of a text by a huge, negative, infinite or odd one."""
    return _replace_match(_NUMBER, data, rng, _ODD_NUMBERS)


def replace_value(data: bytes, rng: random.Random) -> bytes:
    """Replace a JSON value by one of another type, deep nesting, or a lone surrogate."""
    return _replace_match(_VALUE, data, rng, _ODD_VALUES)


def _replace_match(
    pattern: re.Pattern[bytes], data: bytes, rng: random.Random, values: tuple[bytes, ...]
) -> bytes:
    matches = list(pattern.finditer(data))
    if not matches:
        return insert_text(data, rng)
    match = rng.choice(matches)
    return data[: match.start()] + rng.choice(values) + data[match.end() :]


def insert_text(data: bytes, rng: random.Random) -> bytes:
    """Insert a quote, a delimiter, NUL, a line end, a byte order mark or the like."""
    start, _ = _range(data, rng)
    return data[:start] + rng.choice(_ODD_TEXTS) + data[start:]


def swap_lines(data: bytes, rng: random.Random) -> bytes:
    """Exchange, repeat or remove lines."""
    lines = data.splitlines(keepends=True)
    if not lines:
        return data
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(3):
        case 0:
            lines[first], lines[second] = lines[second], lines[first]
        case 1:
            lines.insert(first, lines[second])
        case _:
            del lines[first]
    return b"".join(lines)


def encode_text(data: bytes, rng: random.Random) -> bytes:
    """Encode a text otherwise, with or without a byte order mark."""
    encoding = rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp037"))
    return data.decode("utf-8", "replace").encode(encoding, "replace")


BYTE_MUTATIONS: tuple[Mutation, ...] = (
    *(flip_bytes, flip_bytes, flip_header_bytes, truncate, remove_part, insert_bytes),
    *(duplicate_part, swap_parts, zero_part, set_integer),
)
TEXT_MUTATIONS: tuple[Mutation, ...] = (
    *(replace_number, replace_value, replace_value, insert_text, insert_text, insert_text),
    *(swap_lines, duplicate_part, encode_text),
)


def mutate(data: bytes, rng: random.Random, *, is_text: bool) -> bytes:
    """Apply one to four mutations; those of texts mostly to texts."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        mutations = TEXT_MUTATIONS if is_text and rng.random() < 0.8 else BYTE_MUTATIONS
        data = rng.choice(mutations)(data, rng)
    return data
