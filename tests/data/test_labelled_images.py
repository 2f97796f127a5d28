"""Rows of an image and a label -> examples, through the cache, and what is wrong with a row."""

import json

import numpy as np
import pytest

from qlora import data
from qlora.recipe import Data
from qlora.system.errors import InputError

from .images import encoded, folder_of_classes, picture


def load(section):
    classes = data.labels.found(section.train, section, data.LabelledImages.open_source)
    section = section.model_copy(update={"labels": classes})
    return data.load(section.train, None, section, 0, data.LabelledImages)


def rows_of(**section):
    return data.Rows(load(Data(**section)))


@pytest.fixture
def root(tmp_path):
    return folder_of_classes(tmp_path / "train", 3)


def test_an_example_is_the_image_and_its_class(root):
    rows = rows_of(train=str(root))
    assert [rows[n].label for n in range(len(rows))] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    example = rows[4]
    assert (example.path, example.size) == (str(root / "green" / "1.png"), (40, 32))
    assert np.array_equal(np.array(example.pixels()), np.array(picture((40, 200, 60), 1001)))
    assert rows.where(4) == f"{root} image 5 ({example.path})"
    assert rows.lengths.tolist() == [1] * 9
    assert data.image_sizes(rows) == {
        "width": {"min": 40, "p50": 40, "max": 40},
        "height": {"min": 32, "p50": 32, "max": 32},
    }


def test_they_are_decoded_once_however_the_folder_is_called(root, monkeypatch):
    rows_of(train=str(root))
    moved = root.with_name("moved")
    root.rename(moved)
    monkeypatch.setattr(data.image, "opened", lambda *_: pytest.fail("decoded again"))
    assert rows_of(train=str(moved))[0].path == str(moved / "blue" / "0.png")


def test_an_image_that_changed_is_decoded_again_and_one_that_changes_later_is_refused(root):
    rows = rows_of(train=str(root))
    path = root / "red" / "2.png"
    picture(seed=99).save(path)
    with pytest.raises(InputError, match=r"2\.png: changed since the data was read; restore it, or start a new run"):
        rows[8].pixels()
    assert np.array_equal(np.array(rows_of(train=str(root))[8].pixels()), np.array(picture(seed=99)))


def test_what_is_wrong_is_said_of_all_images_together(root):
    (root / "red" / "cut.png").write_bytes(encoded(picture())[:300])
    (root / "blue" / "notes.txt").write_text("hello")
    with pytest.raises(InputError) as caught:
        rows_of(train=str(root))
    said = str(caught.value)
    assert "image 4  'blue/notes.txt' is not an image that can be read" in said
    assert "image 11  'red/cut.png' is cut off or broken" in said
    assert "data.on_bad_row=skip" in said
    [part] = load(Data(train=str(root), on_bad_row="skip"))
    assert (part.summary["rows_read"], part.summary["rows_kept"]) == (11, 9)
    assert [row["row"] for row in part.summary["dropped_rows"]] == ["image 4", "image 11"]


def test_what_was_done_to_images_is_counted(root):
    picture().convert("L").save(root / "red" / "grey.png")
    picture().convert("RGBA").save(root / "red" / "alpha.png")
    turned = picture().getexif()
    turned[0x0112] = 3
    (root / "red" / "turned.jpg").write_bytes(encoded(picture(), "JPEG", exif=turned))
    [part] = load(Data(train=str(root)))
    counts = {name: part.summary[name] for name in data.LabelledImages.COUNTS}
    assert counts == {"images_rotated": 1, "images_converted": 1, "images_transparent": 1, "rows_by_place": 0}


def test_copies_are_those_of_the_pixels_and_stay_together(root):
    (root / "red" / "copy.bmp").write_bytes(encoded(picture(seed=2000), "BMP"))
    (root / "blue" / "wrong.tiff").write_bytes(encoded(picture(seed=2001), "TIFF"))
    rows = rows_of(train=str(root))
    assert data.copies(rows, rows[:0])["duplicates"] == 2
    assert data.labels.balance(rows, rows[:0], ["blue", "green", "red"])["contradictory"] == 2
    for seed in range(20):
        kept, held = data.hold_out(rows, 0.4, seed)
        assert not set(kept.keys.tolist()) & set(held.keys.tolist())


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_a_table_names_images_from_its_own_folder(root, kind, tmp_path):
    rows = [{"file_name": f"train/{name}/0.png", "breed": name, "id": 7} for name in ("red", "blue", "green")]
    table = tmp_path / f"list.{kind}"
    if kind == "csv":
        table.write_text("file_name,breed,id\n" + "".join(f"{row['file_name']},{row['breed']},7\n" for row in rows))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    else:
        table.write_text("\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows))
    [part] = load(Data(train=str(table), columns={"image": "file_name", "label": "breed"}))
    found = data.Rows([part])
    assert [found[n].label for n in range(3)] == [2, 0, 1]
    assert found[0].path == str(root / "red" / "0.png")
    assert part.summary["unused"] == {"id": 3}


BAD = {
    '{"image": "train/red/9.png", "label": "red"}': "no file at '",
    '{"image": "https://x.org/a.png", "label": "red"}': "is an address; download it",
    '{"image": "", "label": "red"}': "image is empty",
    '{"image": 7, "label": "red"}': "not the path of a file",
    '{"image": {"bytes": "x", "path": null}, "label": "red"}': "save it as a file",
    '{"image": "train/red", "label": "red"}': "it is a folder",
    '{"image": "train/red/0.png", "label": null}': "label is empty",
    '{"image": "train/red/0.png", "label": ["red"]}': "a row has one class",
    '{"picture": "train/red/0.png", "label": "red"}': "has no column 'image'",
    '["train/red/0.png", "red"]': "is an object with image and label, not a list",
}


def test_bad_rows_of_a_table(root, tmp_path):
    table = tmp_path / "list.jsonl"
    good = [f'{{"image": "train/{name}/0.png", "label": "{name}"}}' for name in ("red", "blue")]
    table.write_text("\n".join([*good, *BAD]) + "\n")
    with pytest.raises(InputError) as caught:
        rows_of(train=str(table))
    for number, said in enumerate(BAD.values(), start=3):
        [line] = [line for line in str(caught.value).splitlines() if line.strip().startswith(f"line {number} ")]
        assert said in line


def test_a_class_that_the_training_lacks_is_refused_with_its_place(root, tmp_path):
    held_out = folder_of_classes(tmp_path / "eval", 1, {"red": (220, 50, 40), "purple": (120, 0, 120)})
    section = Data(train=str(root), labels=["blue", "green", "red"])
    with pytest.raises(
        InputError, match=r"image 1 .*'purple' is not one of the classes of the training: blue, green, red"
    ):
        data.load(Data(train=str(held_out)).train, None, section, 0, data.LabelledImages)


def test_a_held_out_folder_that_lacks_a_class_keeps_the_numbers_of_the_others(root, tmp_path):
    held_out = folder_of_classes(tmp_path / "eval", 1, {"red": (220, 50, 40), "green": (40, 200, 60)})
    section = Data(train=str(root), labels=["blue", "green", "red"])
    rows = data.Rows(data.load(Data(train=str(held_out)).train, None, section, 0, data.LabelledImages))
    assert [rows[n].label for n in range(2)] == [1, 2]


def test_a_folder_goes_with_the_columns_of_a_table(root, tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("file,breed\ntrain/red/0.png,red\n")
    rows = rows_of(train=[str(table), str(root)], columns={"image": "file", "label": "breed"})
    assert [rows[n].label for n in range(len(rows))] == [2, 0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_columns_that_images_do_not_have_are_refused(root):
    with pytest.raises(InputError, match="rows of images have image, label, not text"):
        rows_of(train=str(root), columns={"text": "words", "label": "label"})
    table = root.parent / "list.csv"
    table.write_text("file,class\ntrain/red/0.png,red\n")
    with pytest.raises(InputError, match=r"data\.columns=\{image: file, label: class\}"):
        data.load(Data(train=str(table)).train, None, Data(train="x", labels=["a", "b"]), 0, data.LabelledImages)


def test_a_small_copy_is_kept_without_its_file(root):
    example = rows_of(train=str(root))[0]
    kept = data.KeptImage(**json.loads(json.dumps(vars(data.KeptImage.of(example)))))
    assert (kept.label, kept.pixels().size) == (0, (40, 32))
    assert np.abs(np.array(kept.pixels(), int) - np.array(example.pixels(), int)).mean() < 12
