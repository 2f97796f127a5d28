"""Where labelled images are: folders by class and tables of paths, in one order and with one hash on every machine."""

import errno
import json
import os
from pathlib import Path

import pytest

from qlora.data import image, image_files
from qlora.recipe import Source
from qlora.system.errors import InputError

from .images import folder_of_classes, picture


def opened(path, **settings):
    return image_files.open_source(Source(path=str(path), **settings), None)


def rows_of(path):
    [file] = opened(path)
    return [(row.line, row.value["image"], row.value["label"]) for row in file.rows()]


def test_a_folder_by_class_is_a_data_file(tmp_path):
    root = folder_of_classes(tmp_path / "train", 2)
    assert rows_of(root) == [
        (1, "blue/0.png", "blue"),
        (2, "blue/1.png", "blue"),
        (3, "green/0.png", "green"),
        (4, "green/1.png", "green"),
        (5, "red/0.png", "red"),
        (6, "red/1.png", "red"),
    ]


def test_the_order_is_that_of_names_whatever_the_system_lists_first(tmp_path, monkeypatch):
    root = folder_of_classes(tmp_path / "train", 2, {"10": (9, 9, 9), "9": (0, 0, 0), "Zebra": (1, 1, 1)})
    there = rows_of(root)
    listed, walked = os.listdir, os.walk
    monkeypatch.setattr(os, "listdir", lambda path: listed(path)[::-1])
    monkeypatch.setattr(
        os, "walk", lambda path, **more: [(a, b[::-1], c[::-1]) for a, b, c in reversed(list(walked(path)))]
    )
    assert rows_of(root) == there
    assert [label for *_, label in there] == ["10", "10", "9", "9", "Zebra", "Zebra"]


def test_folders_within_a_class_and_litter(tmp_path):
    root = folder_of_classes(tmp_path / "train", 1)
    (root / "blue" / "2021" / "may").mkdir(parents=True)
    picture().save(root / "blue" / "2021" / "may" / "0.png")
    for litter in (".DS_Store", "blue/.DS_Store", "blue/._0.png", "red/Thumbs.db", "desktop.ini"):
        (root / litter).write_bytes(b"x")
    (root / ".git").mkdir()
    assert [name for _, name, _ in rows_of(root)] == ["blue/0.png", "blue/2021/may/0.png", "green/0.png", "red/0.png"]


def test_a_file_of_another_kind_is_a_row_so_that_it_is_not_passed_over(tmp_path):
    root = folder_of_classes(tmp_path / "train", 1)
    (root / "blue" / "notes.txt").write_text("hello")
    assert (2, "blue/notes.txt", "blue") in rows_of(root)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: None, "has no folders in it"),
        (lambda root: (root / "lonely.png").write_bytes(b"x"), "has no folders in it"),
        (lambda root: [folder_of_classes(root, 1), (root / "x.png").write_bytes(b"x")], "such as x.png"),
        (lambda root: [folder_of_classes(root, 1), (root / "cow").mkdir()], "no images of cow"),
        (lambda root: [folder_of_classes(root / split, 1) for split in ("train", "test")], "data.train=.*train"),
        (lambda root: [folder_of_classes(root / name, 1) for name in ("train", "val", "model")], "train, val, which"),
    ],
    ids=["empty", "no_folders", "file_beside", "empty_class", "splits", "splits_and_more"],
)
def test_a_folder_that_is_none_by_class_is_refused(tmp_path, make, said):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(InputError, match=said):
        rows_of(root)


@pytest.mark.parametrize("leads_to", ["other", "data"])
def test_a_link_to_a_folder_within_a_class_is_not_passed_over(tmp_path, leads_to):
    """Its images would be missing without a word; one that leads back would be read for ever."""
    root = folder_of_classes(tmp_path / "data", 1)
    folder_of_classes(tmp_path / "other", 1)
    (root / "red" / "more").symlink_to(tmp_path / leads_to)
    with pytest.raises(
        InputError, match=r"data/red has a link to a folder, more, which is not followed; put the images"
    ):
        rows_of(root)
    (root / "red" / "more").unlink()
    (root / "pink").symlink_to(tmp_path / "other" / "red")  # a class may be elsewhere
    assert (3, "pink/0.png", "pink") in rows_of(root)


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    root, listed = folder_of_classes(tmp_path / "data", 1), os.scandir
    (root / "red" / "closed").mkdir()

    def refused(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refused)  # root may read everything
    with pytest.raises(InputError, match=r"cannot read the folder .*data: Permission denied"):
        rows_of(root)


def test_a_pipe_or_a_device_among_the_images_is_not_waited_for(tmp_path):
    root = folder_of_classes(tmp_path / "data", 1)
    [file] = opened(root)
    whole = file.digest()
    os.mkfifo(root / "red" / "pipe.png")
    (root / "red" / "zero.png").symlink_to("/dev/zero")
    [file] = opened(root)
    assert file.digest() != whole
    with pytest.raises(ValueError, match=r"cannot read the image .*pipe\.png: it is a pipe or device"):
        image.read(root / "red" / "pipe.png")


def test_classes_may_be_called_train_and_test(tmp_path):
    root = folder_of_classes(tmp_path / "data", 1, {"test": (0, 0, 0), "train": (255, 255, 255)})
    assert [label for *_, label in rows_of(root)] == ["test", "train"]


def test_what_lies_beside_the_classes_and_is_no_image_is_said(tmp_path):
    root = folder_of_classes(tmp_path / "train", 1)
    for name in ("README.md", "labels.txt", "dataset_info.json", ".DS_Store"):
        (root / name).write_text("x")
    assert len(rows_of(root)) == 3
    said = sorted(Path(path).name for path in image_files.not_read(Source(path=str(root))))
    assert said == ["README.md", "dataset_info.json", "labels.txt"]


def test_several_folders_and_a_folder_of_tables(tmp_path):
    for name in ("a", "b"):
        folder_of_classes(tmp_path / name, 1)
    assert [file.path for file in opened(tmp_path / "?")] == [str(tmp_path / "a"), str(tmp_path / "b")]
    (tmp_path / "c").write_text('{"image": "a/blue/0.png", "label": "blue"}\n')
    assert [type(file).__name__ for file in opened(tmp_path / "?")] == ["ImageFolder", "ImageFolder", "ImageTable"]
    (tmp_path / "a" / "list.csv").write_text("image,label\nblue/0.png,blue\n")
    [table] = opened(tmp_path / "a")
    assert table.folder == str(tmp_path / "a")
    assert [row.value for row in table.rows()] == [{"image": "blue/0.png", "label": "blue"}]


def test_the_hash_is_that_of_the_contents(tmp_path):
    root = folder_of_classes(tmp_path / "train", 2)
    table = tmp_path / "list.jsonl"
    table.write_text("".join(json.dumps({"image": f"train/red/{n}.png", "label": "red"}) + "\n" for n in (0, 1, 9)))

    def digests():
        return [opened(path)[0].digest() for path in (root, table)]

    before = digests()
    moved = tmp_path / "moved"
    root.rename(moved)
    assert opened(moved)[0].digest() == before[0]
    moved.rename(root)
    for path in root.rglob("*.png"):
        os.utime(path, (1, 1))
    assert digests() == before
    picture(seed=7).save(root / "red" / "1.png")
    after = digests()
    assert all(one != other for one, other in zip(before, after, strict=True))
    picture(seed=8).save(root / "red" / "9.png")  # of the table it was missing
    assert all(one != other for one, other in zip(after, digests(), strict=True))


def test_a_stamp_changes_while_images_are_written(tmp_path):
    root = folder_of_classes(tmp_path / "train", 1)
    [file] = opened(root)
    before = file.stamp()
    assert file.stamp() == before
    picture(seed=7).save(root / "red" / "1.png")
    assert file.stamp() != before


def test_what_is_no_place_of_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="images of a data set on the hub are not read"):
        image_files.open_source(Source(name="beans"), None)
    with pytest.raises(InputError, match="a template"):
        image_files.open_source(Source(path="x.csv"), {"image": "images/{{ id }}.png"})
    picture().save(tmp_path / "one.png")
    with pytest.raises(InputError, match=r"one\.png is one image; give the folder"):
        opened(tmp_path / "one.png")
    [file] = opened(Path("no-such-folder"))
    with pytest.raises(InputError, match="no data file at no-such-folder"):
        list(file.rows())
