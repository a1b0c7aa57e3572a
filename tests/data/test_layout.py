"""Which pictures of a folder are training images, which are test images, and of which class, whoever has arranged them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path, PurePosixPath

import pytest

from genzoo.data import DataError, decoding, folder
from genzoo.data.layout import arrange, hash_split, split_of, unit_hash
from tests.data.test_images import fill, refused


def some(where: str, n: int) -> list[str]:
    return [f"{where}/{where.replace('/', '-')}-{i}.png".lstrip("/") for i in range(n)]


def touch(root: Path, *names: str) -> Path:
    """Make files that need not be read to be arranged."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def sides(root: Path, fraction: float = 0.1, test_root: Path | None = None) -> tuple[Counter, Counter, str]:
    """Count the pictures of each folder on both sides, and join the notes."""
    layout = arrange(root, fraction, test_root)
    where = [Counter(os.path.relpath(path.parent, root) for path in side) for side in (layout.train, layout.test)]
    for path, label in layout.labels.items():
        assert label in layout.classes and label in path.parts
    return where[0], where[1], " | ".join(layout.notes)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[(name, "train") for name in ("train", "Training", "TRAIN", "train_set", "training-data", "trainA", "train2017")],
        *[(name, "test") for name in ("test", "Testing", "TEST", "test_set", "test1", "testB", "test images")],
        *[(name, "val") for name in ("val", "valid", "Validation", "val2017", "validation_set")],
        *[(name, None) for name in ("trains", "tester", "value", "cat", "contest", "train station", "pretrain", "1test", "")],
    ],
)  # fmt: skip
def test_names_of_splits_are_known_in_any_case(name, split):
    assert split_of(name) == split


LAYOUTS = {  # folders with their numbers of pictures; where the training and the test images are; classes; what is said
    "splits": (
        {"train/cat": 12, "train/dog": 12, "test/cat": 10, "test/dog": 10},
        {"train/cat", "train/dog"}, {"test/cat", "test/dog"}, ("cat", "dog"), "24 training and 20 test images",
    ),
    "any case, and validation images": (
        {"Train/a": 5, "Train/b": 5, "TEST/a": 2, "TEST/b": 2, "Valid/a": 3},
        {"Train/a", "Train/b"}, {"TEST/a", "TEST/b"}, ("a", "b"), "3 validation images from the folder val",
    ),
    "validation images are for a test where there is no other": (
        {"training": 9, "validation": 4}, {"training"}, {"validation"}, (), "test split from the folder val",
    ),
    "wrapped": (
        {"x/y/training_set/training_set/a": 5, "x/y/training_set/training_set/b": 5, "x/y/test_set/test_set/b": 2},
        {"x/y/training_set/training_set/a", "x/y/training_set/training_set/b"}, {"x/y/test_set/test_set/b"}, ("a", "b"),
        "2 classes (a, b)",
    ),
    "classes first": (
        {"cat/train": 5, "cat/test": 2, "dog/train": 5, "dog/test": 2},
        {"cat/train", "dog/train"}, {"cat/test", "dog/test"}, ("cat", "dog"), "10 training and 4 test images",
    ),
    "a test split beside the classes": (
        {"a": 5, "b": 5, "test/a": 2, "test/b": 2}, {"a", "b"}, {"test/a", "test/b"}, ("a", "b"), "the folder test",
    ),
    "a test split beside loose pictures": ({"": 9, "test": 3}, {"."}, {"test"}, (), "the folder test"),
    "what is of no split": (
        {"train": 5, "test": 5, "extra": 3, "": 2}, {"train"}, {"test"}, (), "3 images of extra left out",
    ),
    "test images without classes": (
        {"train/a": 5, "train/b": 5, "test": 3}, {"train/a", "train/b"}, {"test"}, (), "no classes, since images in",
    ),
    "a class without training images": (
        {"train/a": 5, "train/b": 5, "test/a": 2, "test/z": 3},
        {"train/a", "train/b"}, {"test/a"}, ("a", "b"),
        "3 images of z in the folder test left out: a class without training images",
    ),
    "domains": ({"trainA": 4, "trainB": 4, "testA": 2, "testB": 2}, {"trainA", "trainB"}, {"testA", "testB"}, (), "no classes"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_test_image_is_a_training_image(tmp_path, name):
    folders, train, test, classes, said = LAYOUTS[name]
    touch(tmp_path, *(file for where, n in folders.items() for file in some(where, n)))
    for fraction in (0.1, 0.0, 0.5):  # where folders are splits nothing is drawn
        of_train, of_test, notes = sides(tmp_path, fraction)
        assert (set(of_train), set(of_test)) == (train, test)
        assert all(of_train[where] == folders["" if where == "." else where] for where in train)
        assert said in notes
    assert arrange(tmp_path, 0.1).classes == classes


def test_a_folder_named_like_a_split_is_a_class_where_no_other_is_one(tmp_path):
    touch(tmp_path, *some("train", 30), *some("bus", 30), *some("plane", 30))
    of_train, of_test, notes = sides(tmp_path)
    assert set(of_train) == {"train", "bus", "plane"} and 0 < of_test.total() < 30
    assert arrange(tmp_path, 0.1).classes == ("bus", "plane", "train") and "train read like other folders" in notes


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ({"test": 5, "val": 5}, ("no training images", "test, val")),
        ({"cat/train": 5, "cat/test": 5, "dog": 5}, ("cat has split folders", "dog has none")),
        ({"train/a": 5, "train/b": 5, "test/y": 5, "test/z": 5}, ("no image has a class", "(a, b)")),
    ],
)
def test_folders_that_contradict_each_other_are_named(tmp_path, folders, words):
    touch(tmp_path, *(file for where, n in folders.items() for file in some(where, n)))
    refused(lambda: arrange(tmp_path, 0.1), str(tmp_path) if "a class" not in words[0] else "the folder test", *words)


def test_wrappers_change_neither_classes_nor_split(tmp_path):
    names = [*some("a", 40), *some("b", 40)]
    bare = arrange(touch(tmp_path / "bare", *names), 0.1)
    wrapped = arrange(
        touch(tmp_path / "w", *(f"one/two/{name}" for name in names), "notes.txt", "__MACOSX/._x.png"), 0.1
    )
    assert bare.classes == wrapped.classes == ("a", "b") and 0 < len(bare.test) < 20
    assert [path.name for path in bare.test] == [path.name for path in wrapped.test]
    assert "2 files skipped: 1 .txt, 1 hidden" in wrapped.notes[0]


def test_another_folder_can_be_the_test_split(tmp_path):
    root = touch(tmp_path / "root", *some("a", 9), *some("b", 9), *some("held/a", 3), *some("held/b", 3))
    of_train, of_test, notes = sides(root, test_root=root / "held")
    assert of_train == {"a": 9, "b": 9} and of_test == {"held/a": 3, "held/b": 3} and str(root / "held") in notes
    other = touch(tmp_path / "other", *some("b", 4))  # one class is no wrapper
    layout = arrange(
        touch(tmp_path / "split", *some("train/a", 5), *some("train/b", 5), *some("test/a", 5)), 0.1, other
    )
    assert [path.parent.name for path in layout.test] == ["b"] * 4 and layout.classes == ("a", "b")
    assert len(layout.train) == 10 and any("5 images of the folder test" in note for note in layout.notes)
    refused(lambda: arrange(root / "a", 0.1, root), "data.test_root", "would be trained on")
    refused(lambda: arrange(root, 0.1, root), "data.test_root", "would be trained on")
    refused(lambda: arrange(root, 0.1, tmp_path / "nowhere"), "nowhere", "not a folder", "data.test_root")


def test_without_a_fraction_all_is_kept_together(tmp_path):
    of_train, of_test, notes = sides(touch(tmp_path, *some("a", 9), *some("b", 9)), 0.0)
    assert of_train == {"a": 9, "b": 9} and not of_test and "18 images, 2 classes (a, b); no test split" in notes


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9, 0.99999])
def test_every_class_is_learned_and_tested_as_far_as_it_goes(fraction):
    counts = {"one": 1, "two": 2, "three": 3, "ten": 10, "twenty": 20, "many": 400}
    labels = [label for label, n in counts.items() for _ in range(n)]
    places = [PurePosixPath(label, f"{i}.png") for i, label in enumerate(labels)]
    is_test = hash_split(places, labels, fraction)
    tested = Counter(label for label, side in zip(labels, is_test, strict=True) if side)
    for label, n in counts.items():
        assert tested[label] < n and (tested[label] > 0 or n * fraction < 1 or n == 1)
    if fraction < 0.99:
        assert abs(tested["many"] - 400 * fraction) < 4 * (400 * fraction * (1 - fraction)) ** 0.5
    # The order of the files changes nothing, nor do those of other classes, nor what is added to a large one.
    flipped = hash_split(places[::-1], labels[::-1], fraction)[::-1]
    assert flipped == is_test == hash_split(places, ["x" if label == "ten" else label for label in labels], fraction)
    large = hash_split([*places, PurePosixPath("many/new.png")], [*labels, "many"], fraction)
    assert fraction > 0.99 or large[: len(places)] == is_test
    assert all(side == (unit_hash(place) < fraction) for place, side in zip(places[-400:], is_test[-400:], strict=True)) or (
        fraction > 0.99
    )  # fmt: skip


# Links and other files


def test_linked_folders_are_read_once_and_never_upwards(tmp_path):
    pool = touch(tmp_path / "pool", *some("cat", 5), *some("dog", 5), *some("dog/puppies", 2))
    root = tmp_path / "root"
    root.mkdir()
    for name in ("cat", "dog"):
        (root / name).symlink_to(pool / name)
    (root / "again").symlink_to(pool / "cat")
    (root / "up").symlink_to(tmp_path)
    (root / "everything").symlink_to("/")
    (root / "lost").symlink_to(tmp_path / "nowhere")
    (pool / "dog/puppies/round").symlink_to(pool / "dog")
    listing = decoding.list_pictures(root)
    assert Counter(name.parts[0] for name in listing.names) == {"again": 5, "dog": 7}
    assert {"link to a folder that was read already (cat)", "link to a folder above (up)"} <= set(listing.skipped)
    assert {"link to a folder above (everything)", "broken link (lost)"} <= set(listing.skipped)
    (root / "again").unlink()
    layout = arrange(root, 0.2)
    assert layout.classes == ("cat", "dog") and len(layout.train) + len(layout.test) == 12
    assert sum("broken link (lost)" in note for note in layout.notes) == 1


def test_a_folder_proper_is_preferred_to_links_to_it(tmp_path):
    root = touch(tmp_path / "root", *some("z", 5))
    (root / "a").symlink_to(root / "z")
    assert {name.parts[0] for name in decoding.list_pictures(root).names} == {"z"}


def test_what_is_passed_over_is_counted_by_kind(tmp_path):
    fill(tmp_path, [f"{i}.png" for i in range(20)])
    touch(tmp_path, "a.txt", "b.TXT", "c.heic", "LICENSE", ".DS_Store", "deep/x.csv", "odd.\x1b[31m")
    data = folder(tmp_path, size=8)
    assert "7 files skipped: 2 .txt, 1 '.\\x1b[31m', 1 .csv, 1 .heic, 1 hidden, 1 without a suffix" in data.notes[0]
    touch(tmp_path / "others", *(f"{i}.heic" for i in range(70)))
    with pytest.raises(DataError, match=r"contains no images \(70 files skipped: 70 \.heic\)"):
        folder(tmp_path / "others", size=8)
