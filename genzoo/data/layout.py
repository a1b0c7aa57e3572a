"""Assignment of the images of a folder to splits and classes: by conventional folder names, else by a hash.

    root/*.png                         no classes
    root/CLASS/**.png                  a class for each sub-folder
    root/{train,test}/CLASS/**.png     splits by name
    root/CLASS/{train,test}/**.png     the same, nested the other way round
    root/WRAPPER/...                   single sub-folders that contain all images are ignored

The names of splits are train, training, test, testing, val, valid and validation, in any case and with endings as in
``test_set``, ``val2017`` or ``trainA``. A folder of validation images is the validation split, or the test split if there is no
other.

Without a test folder, an image is a test image if the hash of its path below the wrappers is below ``test_fraction``,
independently of other files, except that each class (or the set, without classes) has at least one training image, and at
least one test image if the expected number is at least one. The split is a function of the file names.

Images with captions (``genzoo.data.caption_files``) are one set without classes; images without a caption are omitted.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from genzoo.data.caption_files import read_captions
from genzoo.data.dataset import DataError
from genzoo.data.decoding import SUFFIXES, list_pictures, shown

ACCEPTED = ", ".join(SUFFIXES)
CaptionMode = Literal["auto", "required", "none"]
NAMED = 10  # classes or folders listed in a message

_SPLIT = re.compile(
    r"(train|test|val)(?:ing|id|idation)?[ _.-]*(?:set|split|data|images?|imgs?)?[ _.-]*(?:\d*|(?-i:[A-Z]))", re.I
)


class Picture(NamedTuple):
    """An image file, and its path relative to the folder of its split."""

    path: Path
    place: PurePosixPath


class Layout(NamedTuple):
    """The image files of a folder by split, sorted by name.

    Attributes:
        train: training images, or all images without a test split.
        test: test images.
        validation: images of a folder of validation images beside a test split.
        classes: sorted class names; empty if unlabelled.
        labels: class of each image, by path.
        captions: caption of each image, by path; empty for data without captions.
        notes: summary of files read and skipped, one line each.
    """

    train: list[Path]
    test: list[Path]
    validation: list[Path]
    classes: tuple[str, ...]
    labels: dict[Path, str]
    captions: dict[Path, str]
    notes: list[str]


def split_of(name: str) -> str | None:
    """Parse the name of a split folder: "train", "test", "val", or None for any other name."""
    found = _SPLIT.fullmatch(name)
    return found[1].lower() if found else None


def arrange(root: Path, test_fraction: float, test_root: Path | None = None, captions: CaptionMode = "none") -> Layout:
    """Assign the images of a folder to splits, and to classes or captions.

    Args:
        root: the folder.
        test_fraction: expected fraction of test images of a split by hash; 0 for no such split.
        test_root: another folder, used as the test split and excluded from training.
        captions: "auto" to read captions where at least half of the images have one, "required" or "none". Images without a
            caption are then omitted, and classes ignored.

    Raises:
        DataError: if a split would be empty, folders contradict each other, or captions are damaged or missing.
    """
    notes: list[str] = []
    found = _pictures(root, "data.root", notes, captions, without=test_root)
    texts = found.captions
    splits = _by_name(root, found.pictures, notes)
    train = _strip_wrappers(splits["train"])
    classes, labels = ((), {}) if texts else _classes(train)
    if not train:
        beside = _names(splits) or str(test_root)
        raise DataError(f"{root} has no training images beside {beside}: put some into a folder named train")
    test, validation, source = splits["test"], splits["val"], "the folder test"
    if test_root is not None:
        theirs_notes: list[str] = []
        other = _pictures(test_root, "data.test_root", theirs_notes, "required" if texts else "none", keep=classes)
        texts = texts | other.captions
        notes += [f"{test_root}: {_count(other.pictures, 'image')}; {other.others}", *theirs_notes]
        theirs = _by_name(test_root, other.pictures, notes)
        chosen = next(name for name in ("test", "val", "train") if theirs[name])
        test, source = theirs[chosen], str(test_root)
        left = [(root, "test", splits["test"])]
        left += [(test_root, name, theirs[name]) for name in theirs if name != chosen]
        notes += [
            f"{_count(some, 'image')} of the folder {name} of {where} left out" for where, name, some in left if some
        ]
    elif validation and not test:
        test, validation, source = validation, [], "the folder val"
    split = f"test split from {source}"
    if test:
        test, classes = _match_classes(test, classes, labels, source, notes)
        if validation:
            validation, classes = _match_classes(validation, classes, labels, "the folder val", notes)
            split += f", {_count(validation, 'validation image')} from the folder val"
    elif test_fraction == 0:
        split = "no test split"
    else:
        is_test = hash_split([p.place for p in train], [labels.get(p.path) for p in train], test_fraction)
        held_out = {picture.path for picture, is_so in zip(train, is_test, strict=True) if is_so}
        train, test = ([p for p in train if (p.path in held_out) is side] for side in (False, True))
        split = f"test split from a hash of each name (test_fraction={test_fraction:g})"
        if not test:
            raise DataError(
                f"{root} has {_count(found.pictures, 'image')}, of which the split by hash selects no test image: "
                f"add images or change test_fraction={test_fraction:g}"
            )
    sizes = f"{len(train)} training and {_count(test, 'test image')}" if test else _count(train, "image")
    summary = f"{root}: {sizes}, {'captions' if texts else _listed(classes)}; {split}; {found.others}"
    labels = labels if classes else {}
    of_train, of_test, of_validation = ([picture.path for picture in part] for part in (train, test, validation))
    return Layout(of_train, of_test, of_validation, classes, labels, texts, [summary, *notes])


def hash_split(places: Sequence[PurePosixPath], labels: Sequence[str | None], fraction: float) -> list[bool]:
    """Select test images by the hash of their path, with at least one training image per class.

    Args:
        places: relative paths of the images.
        labels: their classes.
        fraction: of test images, in [0, 1).
    """
    classes = defaultdict(list)
    for i, (place, label) in enumerate(zip(places, labels, strict=True)):
        classes[label].append((unit_hash(place), i))
    is_test = [False] * len(places)
    for members in classes.values():
        members.sort()
        count = sum(value < fraction for value, _ in members)
        least = len(members) > 1 and fraction * len(members) > 1 - 1e-9
        count = min(max(count, int(least)), len(members) - 1)
        for _, i in members[:count]:
            is_test[i] = True
    return is_test


def unit_hash(name: PurePosixPath) -> float:
    """Hash a path to [0, 1), reproducibly on every machine."""
    digest = hashlib.blake2b(os.fsencode(name.as_posix()), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


class _Found(NamedTuple):
    pictures: list[Picture]
    others: str
    captions: dict[Path, str]


def _pictures(
    root: Path,
    key: str,
    notes: list[str],
    mode: CaptionMode,
    without: Path | None = None,
    keep: Sequence[str] = (),
) -> _Found:
    """List the images of a folder, with paths relative to its wrappers, and their captions.

    Args:
        root: the folder.
        key: its configuration key, for messages.
        notes: list to which decisions are appended.
        mode: whether captions are read; if so, images without one are omitted.
        without: folder whose images are excluded.
        keep: names of folders that are not wrappers.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: set {key} to a folder of {ACCEPTED} files")
    if without is not None:
        if not without.is_dir():
            raise DataError(f"{without} is not a folder: set data.test_root to a folder of {ACCEPTED} files")
        if _within(root, without):
            raise DataError(f"data.test_root={without} contains {key}={root}: test images would be trained on")
    listing = list_pictures(root)
    if not listing.names:
        raise DataError(
            f"{root} contains no images ({listing.others}): put {ACCEPTED} files in it or in its sub-folders"
        )
    pictures = [Picture(root / name, name) for name in listing.names]
    texts = [root / name for name in listing.texts]
    if without is not None:
        inside: dict[Path, bool] = {}  # by folder
        for path in (*(picture.path for picture in pictures), *texts):
            inside.setdefault(path.parent, _within(path.parent, without))
        pictures = [picture for picture in pictures if not inside[picture.path.parent]]
        texts = [path for path in texts if not inside[path.parent]]
    captions: dict[Path, str] = {}
    if mode != "none":
        captions, sources = _captions(root, [picture.path for picture in pictures], texts, mode, notes)
        listing.used(sources)
    if captions:
        pictures = [picture for picture in pictures if picture.path in captions]
    return _Found(_strip_wrappers(pictures, keep), listing.others, captions)


def _captions(
    root: Path, images: list[Path], texts: list[Path], mode: CaptionMode, notes: list[str]
) -> tuple[dict[Path, str], list[Path]]:
    """Read the captions of images, and list the files that hold them; none if too few images have one."""
    found = read_captions(images, texts)
    of, lacking = len(found.of), len(images) - len(found.of)
    if mode == "required" and not of:
        raise DataError(
            f"{root}: no image has a caption: write captions.jsonl with lines "
            '{"file": "a.png", "caption": "..."}, captions.csv, or a.txt beside a.png, or omit data.captions=required'
        )
    if mode == "auto" and of < lacking:
        if of:
            notes.append(
                f"captions of {of} of {_count(images, 'image')} not used, fewer than half: data.captions=required trains "
                "on these alone"
            )
        return {}, []
    notes += found.notes
    if lacking:
        notes.append(f"{lacking} image{'s' * (lacking > 1)} without a caption left out")
    return found.of, found.sources


def _within(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _strip_wrappers(pictures: Iterable[Picture], keep: Iterable[str] = ()) -> list[Picture]:
    """Remove leading folders common to all images, up to one named in ``keep``."""
    pictures = list(pictures)
    while pictures and all(len(picture.place.parts) > 1 for picture in pictures):
        tops = {picture.place.parts[0] for picture in pictures}
        if len(tops) > 1 or tops <= set(keep):
            break
        pictures = [_below(picture) for picture in pictures]
    return pictures


def _below(picture: Picture) -> Picture:
    return Picture(picture.path, PurePosixPath(*picture.place.parts[1:]))


def _by_name(root: Path, pictures: list[Picture], notes: list[str]) -> dict[str, list[Picture]]:
    """Group images by split folders; without any, all are training images."""
    parted = _parted(pictures, notes)
    if parted is not None:
        return parted
    by_class = defaultdict(list)
    for picture in pictures:
        by_class[picture.place.parts[0] if len(picture.place.parts) > 1 else ""].append(picture)
    nested_notes: list[str] = []
    within = {
        top: _parted([_below(p) for p in members], nested_notes, wrapped=True)
        for top, members in by_class.items()
        if top
    }
    parted_classes = [top for top, found in within.items() if found is not None]
    if not parted_classes:
        return {"train": pictures, "test": [], "val": []}
    whole = [top or "itself" for top in by_class if within.get(top) is None]
    if whole:
        raise DataError(
            f"{root}: {shown(parted_classes[0])} has split folders, {shown(whole[0])} has none: use one layout for all"
        )
    notes += nested_notes
    splits: dict[str, list[Picture]] = {"train": [], "test": [], "val": []}
    for top, found in within.items():
        for name, members in (found or {}).items():
            splits[name] += [Picture(p.path, PurePosixPath(top, *p.place.parts)) for p in members]
    return {name: sorted(members) for name, members in splits.items()}


def _parted(pictures: list[Picture], notes: list[str], wrapped: bool = False) -> dict[str, list[Picture]] | None:
    """Group images by their top-level folders, if these are splits.

    A single folder named after a split is a class, such as "train" beside "bus" and "plane", unless it contains the same
    classes as its siblings. Images outside of all splits are omitted with a note, or are the training images if there are no
    others.

    Args:
        pictures: the images.
        notes: list to which decisions are appended.
        wrapped: whether to accept unambiguous splits alone.
    """
    tops: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        tops[picture.place.parts[0] if len(picture.place.parts) > 1 else ""].append(_below(picture))
    loose = tops.pop("", [])
    roles = {top: split_of(top) for top in tops}
    others = [top for top, role in roles.items() if role is None]
    held = [top for top, role in roles.items() if role in ("test", "val")]
    learned = [top for top, role in roles.items() if role == "train"]
    children = {top: {p.place.parts[0] for p in tops[top] if len(p.place.parts) > 1} for top in tops}
    splits: dict[str, list[Picture]] = {"train": [], "test": [], "val": []}
    if not (held or learned):
        return None
    if learned and held:
        beside = [(top, tops[top]) for top in others] + ([("the folder itself", loose)] if loose else [])
        notes += [f"{_count(members, 'image')} of {shown(top)} left out: of no split" for top, members in beside]
    elif held and not others:
        splits["train"] += [picture for picture in pictures if len(picture.place.parts) == 1]
    elif held and not wrapped and all(children[top] and children[top] <= set(others) for top in held):
        splits["train"] += [picture for picture in pictures if picture.place.parts[0] in others]
        notes += [f"{_count(loose, 'image')} of the folder itself left out: of no class"] if loose else []
    elif learned and not wrapped and not loose and any(children[top] for top in learned) and others:
        notes += [f"{_count(tops[top], 'image')} of {shown(top)} left out: of no split" for top in others]
    else:
        if not wrapped:
            named = ", ".join(map(shown, [*learned, *held]))
            notes.append(f"{named} read like other folders: a split needs folders for training and for test images")
        return None
    for top, role in roles.items():
        if role is not None:
            splits[role] += tops[top]
    return splits


def _classes(pictures: list[Picture]) -> tuple[tuple[str, ...], dict[Path, str]]:
    """Classes from the top-level folders; none if an image is outside of them."""
    tops = {picture.path: picture.place.parts[0] for picture in pictures if len(picture.place.parts) > 1}
    if len(tops) < len(pictures):
        return (), {}
    return tuple(sorted(set(tops.values()))), tops


def _match_classes(
    test: list[Picture], classes: tuple[str, ...], labels: dict[Path, str], source: str, notes: list[str]
) -> tuple[list[Picture], tuple[str, ...]]:
    """Label held-out images with the classes of the training images; images of other classes are omitted with a note.

    Raises:
        DataError: if no image remains.
    """
    if not classes:
        return test, ()
    test = _strip_wrappers(test, keep=classes)
    if any(len(picture.place.parts) == 1 for picture in test):
        notes.append(f"no classes, since images in {source} have none")
        return test, ()
    unknown = Counter(picture.place.parts[0] for picture in test if picture.place.parts[0] not in classes)
    for name in sorted(unknown)[:NAMED]:
        notes.append(f"{unknown[name]} image{'s' * (unknown[name] > 1)} of {shown(name)} in {source} left out: "
                     "a class without training images")  # fmt: skip
    if len(unknown) > NAMED:
        notes.append(f"{len(unknown) - NAMED} more classes without training images left out")
    test = [picture for picture in test if picture.place.parts[0] in classes]
    if not test:
        raise DataError(
            f"{source}: no image has a class with training images, {_listed(classes)}: use the same folder names"
        )
    labels |= {picture.path: picture.place.parts[0] for picture in test}
    return test, classes


def _count(things: Sequence[object], what: str) -> str:
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"


def _listed(classes: Sequence[str]) -> str:
    if not classes:
        return "no classes"
    more = ", ..." if len(classes) > NAMED else ""
    return f"{len(classes)} class{'es' * (len(classes) > 1)} ({', '.join(map(shown, classes[:NAMED]))}{more})"


def _names(splits: dict[str, list[Picture]]) -> str:
    return ", ".join(name for name, pictures in splits.items() if pictures)
