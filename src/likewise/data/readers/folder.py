"""Reader of image folders with caption files beside the images, as written by img2dataset and kohya."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final

from likewise.data.dataset import ImageRef
from likewise.data.images import is_image_name
from likewise.data.readers.base import (
    ImportOptions,
    SkippedSample,
    reject_table_options,
)
from likewise.data.readers.files import Folder, IgnoredFiles, file_type_reason, walk_folders
from likewise.data.readers.sidecars import (
    MAX_SIDECAR_BYTES,
    ImageFile,
    Sidecar,
    SidecarError,
    SidecarReader,
    is_sidecar,
    pair_sidecars,
    split_suffix,
    unused_reason,
)
from likewise.hashing import hash_files


def image_ids(names: list[str]) -> dict[str, str]:
    """Return the id of each image of one folder: its stem, or its name where the stem is not unique."""
    num_images = Counter(split_suffix(name)[0] for name in names)
    distinct_names, ids = set(names), {}
    for name in names:
        stem = split_suffix(name)[0]
        # The stem of `a.jpg.png` is the name of `a.jpg`.
        is_unique = num_images[stem] == 1 and stem not in distinct_names
        ids[name] = stem if is_unique else name
    return ids


@final
@dataclass(frozen=True, kw_only=True)
class FolderReader(SidecarReader):
    """Reader of the images below a folder; the top-level subfolder is the group."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.root.name

    def count(self) -> int:
        """Return the number of images."""
        return self._scan[0]

    def fingerprint(self) -> str:
        """Hash the names and the content of all images and their caption files."""
        return self._scan[1]

    def iter_image_files(
        self, ignored: IgnoredFiles, counts: Counter[str]
    ) -> Iterator[ImageFile | SkippedSample]:
        """Yield the images, folder by folder, sorted by name; links to nothing are skipped images."""
        for folder in walk_folders(self.root, ignored):
            images = [name for name in folder.files if is_image_name(name)]
            sidecars = [name for name in folder.files if is_sidecar(name)]
            assigned, unused = pair_sidecars(images, sidecars)
            counts["caption_files"] += len(sidecars) - len(unused)
            for name in unused:
                ignored.add(unused_reason(name, images), folder.prefix + name)
            for name in folder.files:
                if name not in assigned and not is_sidecar(name):
                    ignored.add(file_type_reason(name), folder.prefix + name)
            yield from _skip_broken_links(folder, ignored)
            ids = image_ids(images)
            top_folder = folder.prefix.partition("/")[0]
            for name in images:
                path = folder.prefix + name
                yield ImageFile(
                    id=folder.prefix + ids[name],
                    location=path,
                    image=ImageRef(path=path),
                    group=top_folder or None,
                    sidecars=tuple(
                        Sidecar(folder.prefix + sidecar, split_suffix(sidecar)[1])
                        for sidecar in assigned[name]
                    ),
                )

    def read_sidecar(self, sidecar: Sidecar) -> bytes:
        """Return the content of a caption file.

        Raises:
            SidecarError: if it cannot be read or is too large.
        """
        path = self.root / sidecar.path
        try:
            if path.stat().st_size > MAX_SIDECAR_BYTES:
                raise SidecarError("caption file is too large")
            return path.read_bytes()
        except OSError as error:
            raise SidecarError("caption file cannot be read") from error

    @cached_property
    def _scan(self) -> tuple[int, str]:
        count = 0

        def iter_names() -> Iterator[str]:
            nonlocal count
            for image_file in self.iter_image_files(IgnoredFiles(), Counter()):
                count += 1
                paths = [image_file.location]
                if isinstance(image_file, ImageFile):
                    paths += [sidecar.path for sidecar in image_file.sidecars]
                yield from paths

        fingerprint = hash_files(self.root, iter_names())
        return count, fingerprint


def _skip_broken_links(folder: Folder, ignored: IgnoredFiles) -> Iterator[SkippedSample]:
    for name in folder.broken:
        path = folder.prefix + name
        if is_image_name(name):
            yield SkippedSample(id=path, location=path, reason="broken link or special file")
        else:
            ignored.add("broken link or special file", path)


def open_image_folder(path: Path, options: ImportOptions) -> FolderReader:
    """Return the reader of an image folder.

    Raises:
        InvalidInputError: if an option requires a table.
    """
    reject_table_options(options, f"{path} is an image folder without a table")
    return FolderReader(root=Path(os.path.realpath(path)), options=options)
