"""Samples of a tar archive: which image and caption files belong together by their names and their order."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from likewise.data.images import is_image_name
from likewise.data.readers.folder import image_ids
from likewise.data.readers.sidecars import first_of_each_kind, pair_sidecars, split_suffix, unused_reason
from likewise.data.readers.tar_members import TarMember

SEVERAL_IMAGES = "several images of one sample share a caption file; set `image_column`"
SEVERAL_CAPTION_FILES = "several caption files of one sample fit the image"
UNCLEAR_REPETITION = "key is repeated, and its caption files fit several images"
_CAPTION_PARTS = frozenset({"caption", "captions", "text", "txt"})  # as in `0.caption.txt`

Unused = list[tuple[TarMember, str]]
"""Members that no sample uses, with the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TarSample:
    """One image of an archive with its caption files."""

    key: str
    """Unique in the archive."""
    image: TarMember
    sidecars: tuple[TarMember, ...] = ()
    error: str | None = None
    """Why the sample cannot be used, or None."""
    is_repeated: bool = False
    """Whether an earlier sample has the same key."""


@dataclass(slots=True)
class _Group:
    """Members with one key, in the order of the archive."""

    key: str
    members: list[TarMember] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    """Number of the uninterrupted run of this key that each member belongs to."""


def group_members(members: Iterable[TarMember], image_column: str | None) -> tuple[list[TarSample], Unused]:
    """Group images and caption files into samples.

    As in WebDataset, the key of a member is its name up to the first dot after the last slash. Members of one
    key form a sample even if others are between them, with these rules:

    - If a member name is repeated, or a key returns with another image and caption file, each uninterrupted
      run of the key is a sample, as in WebDataset. Where a run has no image, the first occurrences of all
      names form a sample, the second ones the next, if every name occurs equally often.
    - Caption files belong to the image with the same name up to the last dot (`v2.0.jpg` and `v2.0.txt`).
    - The only image of a key without such a file owns the remaining ones (`0.image.jpg` and `0.caption.txt`).
    - Beside an image named by the key alone (`0.jpg`), images with further parts (`0.mask.png`) that have no
      caption file of their own are ignored.
    - Other images of one key are samples of their own, unless a remaining caption file fits several of them:
      then `image_column` selects the image.

    Args:
        members: Images and caption files of one archive.
        image_column: Part of the name between the first dot and the suffix of the images to use, or None.

    Returns:
        The samples in the order of their images, and the members that no sample uses.
    """
    members = list(members)
    groups: dict[str, _Group] = {}
    last_key, run = None, 0
    for member in members:
        key = _key(member.name)
        run += key != last_key
        last_key = key
        group = groups.setdefault(key, _Group(key))
        group.members.append(member)
        group.runs.append(run)
    samples: list[TarSample] = []
    unused: Unused = []
    for group in groups.values():
        _add_samples(group, image_column, samples, unused)
    positions = {id(member): position for position, member in enumerate(members)}
    return sorted(samples, key=lambda sample: positions[id(sample.image)]), unused


def _key(name: str) -> str:
    folder, separator, base = name.rpartition("/")
    return folder + separator + base.partition(".")[0]


def _add_samples(group: _Group, image_column: str | None, samples: list[TarSample], unused: Unused) -> None:
    parts, error = _split_repeated(group)
    num_samples: Counter[str] = Counter()
    for part in parts:
        for sample in _pair(group.key, part, image_column, unused):
            num_samples[sample.key] += 1
            number = num_samples[sample.key]
            samples.append(
                replace(
                    sample,
                    key=sample.key if number == 1 else f"{sample.key}#{number}",
                    sidecars=() if error else sample.sidecars,
                    error=error or sample.error,
                    is_repeated=number > 1,
                )
            )


def _split_repeated(group: _Group) -> tuple[list[list[TarMember]], str | None]:
    """Split the members of a key into samples without repeated names, or return an error."""
    by_run: dict[int, list[TarMember]] = {}
    for member, run in zip(group.members, group.runs, strict=True):
        by_run.setdefault(run, []).append(member)
    counts = Counter(member.name for member in group.members)
    is_repeated = max(counts.values()) > 1
    num_captioned = sum(
        _has_image(run) and not all(is_image_name(m.name) for m in run) for run in by_run.values()
    )
    if (is_repeated or num_captioned > 1) and all(_is_complete(run) for run in by_run.values()):
        return list(by_run.values()), None
    if not is_repeated:
        return [group.members], None
    by_repetition: list[list[TarMember]] = [[] for _ in range(max(counts.values()))]
    seen: Counter[str] = Counter()
    for member in group.members:
        by_repetition[seen[member.name]].append(member)
        seen[member.name] += 1
    is_even = len(set(counts.values())) == 1
    return by_repetition, None if is_even else UNCLEAR_REPETITION


def _has_image(members: list[TarMember]) -> bool:
    return any(is_image_name(member.name) for member in members)


def _is_complete(members: list[TarMember]) -> bool:
    """Return whether a run is a sample by itself: it has an image, and no repeated name."""
    return _has_image(members) and len({member.name for member in members}) == len(members)


def _pair(key: str, members: list[TarMember], image_column: str | None, unused: Unused) -> list[TarSample]:
    """Return the samples of the members of one key, whose names are distinct."""
    by_name = {member.name: member for member in members}
    images = [name for name in by_name if is_image_name(name)]
    assigned, remaining = pair_sidecars(images, [name for name in by_name if name not in images])
    selected = _select_images(key, images, assigned, image_column)
    reasons = {name: "another image of a sample" for name in images if name not in selected}
    used = {sidecar for name in selected for sidecar in assigned[name]}
    reasons |= {
        sidecar: "caption file of another image"
        for name in reasons
        for sidecar in assigned[name]
        if sidecar not in used
    }
    errors: dict[str, str] = {}
    ids = image_ids(selected)
    without_sidecar = [name for name in selected if not assigned[name]]
    candidates = [name for name in remaining if _part(key, name) in _CAPTION_PARTS] or remaining
    if len(without_sidecar) == 1 and remaining:
        (image,) = without_sidecar
        assigned[image] = first_of_each_kind(candidates)
        if len(assigned[image]) < len(candidates):
            errors[image] = SEVERAL_CAPTION_FILES
        ids[image] = key if key not in ids.values() else ids[image]
        used.update(candidates)
    elif without_sidecar and remaining:
        errors = dict.fromkeys(without_sidecar, SEVERAL_IMAGES)
        used.update(remaining)
    reasons |= {name: unused_reason(name, images) for name in remaining if name not in used}
    unused += [(by_name[name], reason) for name, reason in reasons.items()]
    return [
        TarSample(
            key=ids[name],
            image=by_name[name],
            sidecars=tuple(by_name[sidecar] for sidecar in assigned[name]),
            error=errors.get(name),
        )
        for name in selected
    ]


def _select_images(
    key: str, images: list[str], assigned: dict[str, list[str]], image_column: str | None
) -> list[str]:
    """Return the images of a key that are samples."""
    if image_column is not None:
        return [name for name in images if image_column in {_part(key, name), name[len(key) + 1 :]}]
    if not any(split_suffix(name)[0] == key for name in images):
        return images
    return [name for name in images if split_suffix(name)[0] == key or assigned[name]]


def _part(key: str, name: str) -> str:
    """Return the part of a member name between the key and the suffix."""
    return split_suffix(name)[0][len(key) + 1 :]
