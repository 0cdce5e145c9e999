"""Orientation, deep values and formats of images, against Pillow, numpy, pydicom and tifffile."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from likewise.data import image_formats
from likewise.data.config import BandSelection, ImportOptions
from likewise.data.dataset import CaptionDataset
from likewise.data.image_cache import build_image_cache
from likewise.data.images import (
    UnreadableImageError,
    convert_image,
    decode_image,
    is_image_file,
    is_image_name,
    orient_pixels,
    read_image_size,
    read_orientation,
)
from likewise.data.importing import import_dataset
from likewise.data.pixels import scale_to_uint8
from likewise.errors import InvalidInputError

RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)
BANDS = BandSelection(bands=(4, 3, 2), percentiles=(2.0, 98.0))


def blocks() -> Image.Image:
    colors = np.random.default_rng(0).integers(0, 255, (6, 9, 3)).astype(np.uint8)
    return Image.fromarray(colors.repeat(16, axis=0).repeat(16, axis=1))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encode_oriented(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encode(blocks(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def encode_tiff(values: np.ndarray, **options: object) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_decoded_as_displayed(kind: str, orientation: int, tmp_path: Path) -> None:
    data = encode_oriented(orientation, kind)
    (tmp_path / "image").write_bytes(data)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
    assert abs(decode_image(data) - expected).max() <= 4
    assert abs(convert_image(Image.open(io.BytesIO(data))) - expected).max() <= 4
    assert decode_image(data, 48).shape[0] * expected.shape[1] == decode_image(data, 48).shape[1] * len(
        expected
    )
    for source in (data, tmp_path / "image", str(tmp_path / "image")):
        assert read_image_size(source) == expected.shape[1::-1]
        assert read_orientation(source) == orientation
    stored = np.asarray(blocks())
    assert abs(orient_pixels(stored, orientation) - expected).mean() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_files_opened_by_path_are_oriented(orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(encode_oriented(orientation, "TIFF"))
    with Image.open(path) as image:
        np.testing.assert_array_equal(convert_image(image), decode_image(path.read_bytes()))


def test_reduced_jpegs_are_oriented() -> None:
    big = encode(blocks().resize((576, 384)), "JPEG", exif=ImageExif(6))
    small = decode_image(big, 48)
    expected = Image.fromarray(decode_image(big)).resize(small.shape[1::-1], Image.Resampling.BOX)
    assert small.shape[0] > small.shape[1]
    assert abs(small.astype(int) - np.asarray(expected)).mean() < 3


def ImageExif(orientation: object) -> Image.Exif:  # noqa: N802
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def test_orientation_behind_the_pixels_and_in_damaged_metadata() -> None:
    import struct
    import zlib

    png, exif = encode(blocks(), "PNG"), ImageExif(6).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    late = png[:-12] + chunk + png[-12:]
    assert read_image_size(late) == (96, 144)
    np.testing.assert_array_equal(
        decode_image(late), np.asarray(blocks().transpose(Image.Transpose.ROTATE_270))
    )
    jpeg = encode_oriented(6, "JPEG")
    start = jpeg.index(b"Exif\0\0") + 6
    assert decode_image(jpeg[:start] + b"\xff" * 12 + jpeg[start + 12 :]).shape == (96, 144, 3)
    assert decode_image(encode(blocks(), "JPEG", exif=ImageExif(9))).shape == (96, 144, 3)


def test_the_dataset_and_the_cache_hold_images_as_displayed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(encode_oriented(6, "JPEG"))
    dataset = import_dataset(tmp_path / "in", tmp_path / "out")
    assert (dataset[0].width, dataset[0].height) == (96, 144)
    assert build_image_cache(dataset, 64).shapes(np.array([0])).tolist() == [[96, 64]]


def pgm(max_value: int) -> bytes:
    values = np.rint(RAMP * max_value).astype(">u2" if max_value > 255 else "u1")
    return b"P5 64 48 %d\n" % max_value + values.tobytes()


DEEP: dict[str, Callable[[], bytes]] = {
    "16-bit PNG": lambda: encode(Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16)), "PNG"),
    "12 bits in 16-bit PNG": lambda: encode(Image.fromarray(np.rint(RAMP * 4095).astype(np.uint16)), "PNG"),
    "8 bits in 16-bit PNG": lambda: encode(Image.fromarray(np.rint(RAMP * 255).astype(np.uint16)), "PNG"),
    "16-bit JPEG 2000": lambda: encode(Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16)), "JPEG2000"),
    "PGM 65535": lambda: pgm(65535),
    "PGM 4095": lambda: pgm(4095),
    "PGM 300": lambda: pgm(300),
    "int32": lambda: encode(Image.fromarray(np.rint(RAMP * 90_000).astype(np.int32)), "TIFF"),
    "negative int32": lambda: encode(Image.fromarray(np.rint(RAMP * 900 - 500).astype(np.int32)), "TIFF"),
    "float in [0, 1]": lambda: encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "float": lambda: encode(Image.fromarray((RAMP * 1e6 - 7).astype(np.float32)), "TIFF"),
    "int16": lambda: encode_tiff(np.rint(RAMP * 900 - 500).astype(np.int16)),
    "uint32": lambda: encode_tiff(np.rint(RAMP * (2**32 - 1)).astype(np.uint32)),
    "float64": lambda: encode_tiff(RAMP * 1e9),
    "white is 0": lambda: encode_tiff(
        65535 - np.rint(RAMP * 65535).astype(np.uint16), photometric="miniswhite"
    ),
    "big-endian": lambda: encode_tiff(np.rint(RAMP * 65535).astype(np.uint16), byteorder=">"),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_gray_values_are_scaled(name: str) -> None:
    gray = decode_image(DEEP[name]())
    assert abs(gray.astype(int) - np.rint(RAMP * 255).astype(int)[:, :, None]).max() <= 1


def test_values_are_scaled_within_the_declared_or_used_bits() -> None:
    dark = b"P5 64 48 4095\n" + np.rint(RAMP * 400).astype(">u2").tobytes()
    assert decode_image(dark).max() == round(400 * 255 / 4095)
    half = decode_image(encode(Image.fromarray((RAMP / 2).astype(np.float32)), "TIFF"))
    assert half.max() == 128
    for value in (np.nan, np.inf):
        values = RAMP.astype(np.float32)
        values[3, 4] = value
        with pytest.raises(UnreadableImageError, match="NaN or infinite"):
            decode_image(encode(Image.fromarray(values), "TIFF"))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 65535), min_size=2, max_size=30),
    st.sampled_from([np.uint16, np.int32, np.float32]),
)
def test_scaling_keeps_the_order_of_values(values: list[int], dtype: type) -> None:
    scaled = scale_to_uint8(np.array(values, dtype))
    order = np.argsort(values)
    assert (np.diff(scaled[order].astype(int)) >= 0).all()
    if len(set(values)) > 1:
        assert len(np.unique(scaled)) > 1 or max(values) - min(values) < max(values) / 100


@pytest.mark.parametrize("bits", [8, 12, 14, 16])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_deep_color_is_scaled(bits: int, kind: str) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    values = np.rint(np.stack([RAMP, RAMP[::-1], RAMP / 2], 2) * (2**bits - 1)).astype(np.uint16)
    data = imagecodecs.png_encode(values) if kind == "png" else encode_tiff(values, photometric="rgb")
    expected = np.rint(values * (255 / (2**bits - 1)))
    assert abs(decode_image(data) - expected).max() <= 1


@pytest.mark.parametrize(
    "kind", ["AVIF", "JPEG2000", "PPM", "TGA", "PCX", "SGI", "QOI", "BMP", "GIF", "ICO", "DDS"]
)
def test_formats_of_pillow_are_read_by_content(kind: str, tmp_path: Path) -> None:
    data = encode(blocks(), kind)
    (tmp_path / "no_suffix").write_bytes(data)
    assert abs(decode_image(data).astype(int).mean() - np.asarray(blocks()).mean()) < 8
    names = [suffix for suffix, name in Image.registered_extensions().items() if name == kind]
    assert names
    assert all(is_image_name(f"a{suffix.upper()}") for suffix in names)
    assert is_image_file(tmp_path / "no_suffix") == (kind in image_formats._SIGNED_FORMATS)


def test_programs_drawings_and_texts_are_no_images(tmp_path: Path) -> None:
    for data in (
        encode(blocks(), "EPS"),
        encode(blocks(), "PDF"),
        b"<svg/>" * 40,
        b"a text " * 40,
        b"PK\3\4" + bytes(200),
    ):
        with pytest.raises(UnreadableImageError, match="not an image"):
            decode_image(data)
        (tmp_path / "file").write_bytes(data)
        assert not is_image_file(tmp_path / "file")
    assert not any(map(is_image_name, ("a.eps", "a.pdf", "a.svg", "a.h5", "a.mpg", "a.txt", ".png", "png")))
    assert all(map(is_image_name, ("a.jfif", "a.jpe", "a.PNM", "a.heic", "a.DCM", "b.c.avif")))


def test_long_texts_in_png_files_do_not_matter() -> None:
    info = PngInfo()
    info.add_text("comment", "x" * 3_000_000, zip=True)
    data = encode(blocks(), "PNG", pnginfo=info)
    np.testing.assert_array_equal(decode_image(data), np.asarray(blocks()))
    assert read_image_size(data) == blocks().size


def test_libraries_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    data = bytearray(encode_tiff(noise, compression="zlib", photometric="rgb"))
    data[1000:1200] = bytes(200)
    filters = list(warnings.filters)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        for damaged in (bytes(data), bytes(data[:-3000]), encode_oriented(6, "JPEG")[:300]):
            with pytest.raises(UnreadableImageError, match="damaged|truncated|not an image"):
                decode_image(damaged)
    assert not recorded
    assert capfd.readouterr() == ("", "")
    assert list(warnings.filters) == filters


def test_lazy_pillow_images_that_are_damaged_have_a_reason() -> None:
    with pytest.raises(UnreadableImageError, match="truncated"):
        convert_image(Image.open(io.BytesIO(encode(blocks(), "PNG")[:300])))


@pytest.mark.parametrize("layout", ["contiguous", "planar", "pages"])
def test_selected_bands_are_scaled_between_percentiles(layout: str) -> None:
    values = np.random.default_rng(1).integers(0, 9000, (40, 50, 6)).astype(np.uint16)
    planes = np.ascontiguousarray(values.transpose(2, 0, 1))
    data = {
        "contiguous": lambda: encode_tiff(values, photometric="minisblack", planarconfig="contig"),
        "planar": lambda: encode_tiff(planes, photometric="minisblack", planarconfig="separate"),
        "pages": lambda: encode_tiff(planes),
    }[layout]()
    selected = values[:, :, [3, 2, 1]].astype(float)
    low, high = np.percentile(selected, (2, 98), axis=(0, 1))
    expected = np.rint(((selected - low) / (high - low)).clip(0, 1) * 255)
    assert abs(decode_image(data, bands=BANDS) - expected).max() <= 1
    if layout != "pages":
        with pytest.raises(
            UnreadableImageError, match="has bands 1 to 6; choose one or three of them by `bands`"
        ):
            decode_image(data)
    with pytest.raises(UnreadableImageError, match="has bands 1 to 6; `bands` asks for 7"):
        decode_image(data, bands=BandSelection(bands=(7,), percentiles=(2.0, 98.0)))
    jpeg = encode(blocks(), "JPEG")
    np.testing.assert_array_equal(decode_image(jpeg, bands=BANDS), decode_image(jpeg))


def test_bands_are_recorded_with_the_dataset(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        values = np.random.default_rng(i).integers(0, 900, (40, 50, 6)).astype(np.uint16)
        data = encode_tiff(values, photometric="minisblack", planarconfig="contig")
        (tmp_path / "in" / f"{i}.tif").write_bytes(data)
    with pytest.raises(InvalidInputError, match="has bands 1 to 6"):
        import_dataset(tmp_path / "in", tmp_path / "none")
    dataset = import_dataset(tmp_path / "in", tmp_path / "out", ImportOptions(bands=(4, 3, 2)))
    assert CaptionDataset(tmp_path / "out").bands == BANDS
    assert dataset[0].image.bands == BANDS
    cache = build_image_cache(dataset, 64)
    assert cache.bands == BANDS
    np.testing.assert_array_equal(
        cache.pixels(0), decode_image((tmp_path / "in" / "0.tif").read_bytes(), bands=BANDS)
    )


def test_invalid_bands_name_their_field() -> None:
    for bands, percentiles, field in (
        ((1, 2), (2.0, 98.0), "bands"),
        ((0,), (2.0, 98.0), "bands"),
        ((1,), (98.0, 2.0), "band_percentiles"),
        ((), (1.0, 99.0), "band_percentiles"),
    ):
        with pytest.raises(InvalidInputError) as error:
            ImportOptions(bands=bands, band_percentiles=percentiles)
        assert error.value.field == field


def test_heif_is_read_as_displayed() -> None:
    pytest.importorskip("pillow_heif")
    assert image_formats.register_heif()
    data = encode(blocks(), "HEIF")
    assert abs(decode_image(data).astype(int) - np.asarray(blocks())).mean() < 3
    turned = blocks()
    turned.getexif()[274] = 6
    data = encode(turned, "HEIF")
    expected = np.asarray(blocks().transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert abs(decode_image(data) - expected).mean() < 3
    assert read_image_size(data) == (96, 144)


def dicom_file(**elements: object) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(Path(pydicom.__file__).parent / "data" / "test_files" / "CT_small.dcm")
    for name, value in elements.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def test_dicom_window_and_inversion() -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    data = dicom_file(WindowCenter=40, WindowWidth=400)
    dataset = pydicom.dcmread(io.BytesIO(data))
    windowed = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    # The window cuts values on both sides, so that its output range is that of the image.
    expected = np.rint((windowed - windowed.min()) * (255 / np.ptp(windowed)))
    assert abs(decode_image(data)[:, :, 0] - expected).max() <= 1
    assert read_image_size(data) == (128, 128)
    inverted = dicom_file(WindowCenter=40, WindowWidth=400, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(decode_image(inverted), 255 - decode_image(data))
    with pytest.raises(UnreadableImageError, match="several frames"):
        decode_image(dicom_file(NumberOfFrames=2))
    with pytest.raises(UnreadableImageError, match="damaged"):
        decode_image(data[: len(data) // 2])


def test_dicom_files_are_read_or_have_a_reason() -> None:
    pydicom = pytest.importorskip("pydicom")
    files = sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm"))
    num_read = 0
    for file in files:
        try:
            pixels = decode_image(file.read_bytes())
        except UnreadableImageError as error:
            assert str(error)
        else:
            num_read += 1
            assert read_image_size(file) == pixels.shape[1::-1]
    assert num_read > 30


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"heif": b"\0\0\0\x1cftypheic" + bytes(120), "dicom": bytes(128) + b"DICM" + bytes(40)}
    files["tiff"] = encode_tiff(RAMP)
    for module in ("image_formats", "dicom", "tiff_bands"):
        monkeypatch.setattr(f"likewise.data.{module}.has_package", lambda _: False)
    monkeypatch.setattr("likewise.data.images.register_heif", lambda: False)
    for extra, data in files.items():
        with pytest.raises(UnreadableImageError, match=rf"likewise\[{extra}\]"):
            decode_image(data)
        with pytest.raises(UnreadableImageError, match=rf"likewise\[{extra}\]"):
            read_image_size(data)
