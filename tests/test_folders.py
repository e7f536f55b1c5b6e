"""pytest -q tests/test_folders.py      Other people's folders: what is a class, a split, a picture."""
import io
import json
import tarfile
import unicodedata

import pytest
from PIL import Image

import data
from data import FolderData, find_file, load_data
from runs import InputError


def draw(path, count=1):
    """`count` pictures in a folder, or one of the given name."""
    for file in [path] if path.suffix else [path / f"{i}.png" for i in range(count)]:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(file, "png")


def archive(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def png():
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "png")
    return file.getvalue()


def found(root, split="train", captioned=False):
    """The data set, its classes, its number of pictures, and the line that is printed about it."""
    pictures = load_data(root, split, 16, captioned=captioned)
    return pictures, pictures.class_names, len(pictures), str(pictures)


# 1. Archives

@pytest.mark.parametrize("place", [".", "train", "val", "train/cat"])
def test_archives_beside_class_folders_are_left_where_they_are_and_told(tmp_path, place, capsys):
    for split in ("train", "val"):
        draw(tmp_path / split / "cat", 5)
        draw(tmp_path / split / "dog", 5)
    archive(tmp_path / place / "ILSVRC2012_img_val.tar", {"1.png": png()})
    for split in ("train", "test"):
        _, classes, count, line = found(tmp_path, split)
        assert (classes, count) == (["cat", "dog"], 10)
        if place.startswith({"train": "train", "test": "val"}[split]):
            assert line.endswith("; not used: 1 ILSVRC2012_img_val.tar")
            assert line in capsys.readouterr().err


@pytest.mark.parametrize("captioned", [False, True])
def test_pictures_loose_beside_archives_are_asked_about(tmp_path, captioned):
    draw(tmp_path / "preview.png")
    archive(tmp_path / "0.tar", {"1.png": png(), "1.txt": b"one"})
    with pytest.raises(InputError, match="1 pictures beside 1 .tar archives: which are meant"):
        found(tmp_path, captioned=captioned)


@pytest.mark.parametrize("place", [".", "shards", "train", "train/part0"])
@pytest.mark.parametrize("ending", [".tar", ".TAR"])
def test_archives_are_found_in_capitals_and_one_level_down(tmp_path, place, ending):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for i in range(2):
        archive(tmp_path / place / f"{i}{ending}", {"1.png": png(), "1.txt": b"one", "1.cls": b"1"})
    pictures, classes, count, _ = found(tmp_path, captioned=True)
    assert count == 1 and pictures.found == 2 and classes == ["0", "1"]


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.zip"])
def test_what_has_to_be_unpacked_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x1f\x8b...")
    with pytest.raises(InputError, match=f"holds no pictures. Found: 1 {data.Path(name).suffix}"):
        found(tmp_path)
    with pytest.raises(InputError, match="unpack it first"):
        found(tmp_path / name)


# 2, 29. Splits

def test_a_class_called_train_is_a_class(tmp_path):
    for name in ("boat", "car", "train"):
        draw(tmp_path / "transport" / name, 2)
    _, classes, count, line = found(tmp_path / "transport")
    assert classes == ["boat", "car", "train"] and count == 5
    assert line == f"5 of 6 pictures of 3 classes (boat, car, train) in {tmp_path / 'transport'}"


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training"])
@pytest.mark.parametrize("test", ["val", "valid", "Validation", "test", "Testing"])
def test_splits_are_known_by_all_their_usual_names(tmp_path, train, test):
    draw(tmp_path / train / "cat", 3)
    draw(tmp_path / test / "cat", 2)
    draw(tmp_path / "docs", 1)                                   # and whatever else lies there
    assert found(tmp_path)[1:3] == (["cat"], 3)
    assert found(tmp_path, "test")[1:3] == (["cat"], 2)


def test_train_alone_is_the_data_set_and_a_part_of_it_is_held_out(tmp_path):
    for name in ("cat", "dog"):
        draw(tmp_path / "train" / name, 2)
    assert found(tmp_path)[1:3] == (["cat", "dog"], 3) and found(tmp_path, "test")[2] == 1


# 3. Pictures beside sub-folders

@pytest.mark.parametrize("loose, inside, count", [(40, 3, 38), (40, 0, 38), (3, 40, 38), (0, 3, 2)])
def test_the_larger_part_decides_whether_sub_folders_are_classes(tmp_path, loose, inside, count):
    root = tmp_path / "set"
    (root / "thumbs").mkdir(parents=True)
    draw(root, loose)
    draw(root / "thumbs", inside)
    pictures, names, number, line = found(root)
    assert names == (["set"] if loose > inside else ["thumbs"]) and number == count
    assert ("3 pictures in no class folder" in line) == (min(loose, inside) == 3 and max(loose, inside) == 40)


# 4. Hidden files

def test_what_a_mac_adds_to_a_zip_is_no_class_and_no_picture(tmp_path):
    draw(tmp_path / "cat", 3)
    draw(tmp_path / "__MACOSX" / "cat" / "._0.png")
    draw(tmp_path / "cat" / "._0.png")
    draw(tmp_path / ".ipynb_checkpoints" / "0.png")
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"")
    for split, count in (("train", 2), ("test", 1)):
        pictures, classes, number, line = found(tmp_path, split)
        assert (classes, number) == (["cat"], count) and "not used" not in line
        assert not any("._" in str(file) for file, _ in pictures.files)


# 5, 14. Links

def test_links_are_followed_wherever_they_stand(tmp_path):
    draw(tmp_path / "elsewhere" / "cats", 2)
    draw(tmp_path / "elsewhere" / "dogs", 2)
    root = tmp_path / "set"
    (root / "dog").mkdir(parents=True)
    (root / "cat").symlink_to(tmp_path / "elsewhere" / "cats")
    (root / "dog" / "more").symlink_to(tmp_path / "elsewhere" / "dogs")
    assert found(root)[1:3] == (["cat", "dog"], 3)
    assert len(data.Listing(root).pictures) == 4                 # what fid.py reads


def test_a_link_back_up_ends_and_one_that_leads_nowhere_is_counted(tmp_path):
    draw(tmp_path / "cat", 3)
    (tmp_path / "cat" / "all").symlink_to(tmp_path)
    (tmp_path / "cat" / "7.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "gone").symlink_to(tmp_path / "missing")
    pictures, classes, count, line = found(tmp_path)
    assert (classes, count) == (["cat"], 2) and "2 links that lead nowhere" in line
    pictures.fingerprint()                                       # train_gpt.py and extract ask for it


# 6. Classes

@pytest.mark.parametrize("train, val", [("dog", "Dog"), ("Dog", "dog"),
                                        ("caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9"))])
def test_a_class_may_be_written_in_two_ways(tmp_path, train, val):
    draw(tmp_path / "train" / "cat", 2)
    draw(tmp_path / "train" / train, 2)
    draw(tmp_path / "val" / val, 3)
    pictures, classes, count, line = found(tmp_path, "test")
    assert count == 3 and set(pictures.labels.tolist()) == {classes.index(train)} and "not used" not in line


def test_two_classes_that_differ_by_a_capital_stay_two(tmp_path):
    for split in ("train", "val"):
        draw(tmp_path / split / "dog", 2)
        draw(tmp_path / split / "Dog", 2)
    assert found(tmp_path, "test")[0].labels.tolist() == [0, 0, 1, 1]


def test_classes_that_only_val_has_are_told_with_their_number(tmp_path):
    for split, name in (("train", "cat"), ("val", "cat"), ("val", "wolf")):
        draw(tmp_path / split / name, 3)
    _, classes, count, line = found(tmp_path, "test")
    assert (classes, count) == (["cat"], 3)
    stranger = tmp_path / "val" / "wolf" / "0.png"
    assert f"not used: 3 pictures in no class folder of {tmp_path / 'train'}, as {stranger}" in line


def test_an_empty_folder_is_no_class(tmp_path):
    draw(tmp_path / "cat", 2)
    draw(tmp_path / "dog", 2)
    (tmp_path / "bird").mkdir()
    (tmp_path / "cow").mkdir()
    (tmp_path / "cow" / "notes.txt").write_text("no picture")
    _, classes, _, line = found(tmp_path)
    assert classes == ["cat", "dog"] and "2 empty class folders" in line and "1 .txt" in line


def test_the_only_picture_of_a_class_is_never_held_out(tmp_path):
    draw(tmp_path / "a", 1)
    draw(tmp_path / "b", 40)
    train, test = (found(tmp_path, split)[0] for split in ("train", "test"))
    assert train.labels.tolist().count(0) == 1 and test.labels.tolist() == [1, 1]


def test_classes_without_a_picture_in_this_part_are_counted(tmp_path):
    for name in "abcd":
        draw(tmp_path / name, 10)
    line = str(FolderData(tmp_path, "train", 16, n=2))
    assert line == f"2 of 40 pictures of 2 of 4 classes (a, b, c, d) in {tmp_path}"


# 25. Other files

def test_files_that_pillow_cannot_open_are_counted_by_their_ending(tmp_path, capsys):
    draw(tmp_path / "cat", 3)
    for i in range(50):
        (tmp_path / "cat" / f"{i}.HEIC").write_bytes(b"...")
    for name in ("features.h5", "labels.csv", "README"):
        (tmp_path / name).write_bytes(b"...")
    assert found(tmp_path)[2] == 2
    line = capsys.readouterr().err
    assert "not used: 50 .HEIC, " in line and all(f"1 {what}" in line for what in (".h5", ".csv", "README"))


# 26. Hugging Face's table

@pytest.mark.parametrize("place", [".", "train"])
def test_the_table_of_hugging_face_names_pictures_and_captions(tmp_path, place):
    draw(tmp_path / place / "a.png")
    draw(tmp_path / place / "b.png")
    table = [{"image": name, "text": text} for name, text in (("a.png", "one"), ("b.png", "two"))]
    (tmp_path / place / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    assert found(tmp_path, captioned=True)[0].captions == [["two"]]
    assert found(tmp_path, "test", captioned=True)[0].captions == [["one"]]


# 29. MNIST as others keep it

@pytest.mark.parametrize("name, place", [
    ("fashion_mnist", "FashionMNIST/raw/train-images-idx3-ubyte.gz"),
    ("mnist", "MNIST/raw/train-images-idx3-ubyte"), ("mnist", "raw/train-images-idx3-ubyte"),
    ("mnist", "train-images.idx3-ubyte"),
    ("mnist", "mnist/train-images.idx3-ubyte.gz")])
def test_mnist_is_found_where_torchvision_and_kaggle_put_it(tmp_path, monkeypatch, name, place):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(data, "download", lambda *file: pytest.fail("it was not found"))
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes(b"...")
    assert find_file(name, "train-images-idx3-ubyte.gz", tmp_path) == tmp_path / place


# Found by trying other cases of the same kinds

def test_a_shard_without_class_ids_among_others_is_no_class_0(tmp_path):
    archive(tmp_path / "0.tar", {"1.png": png(), "1.cls": b"3", "2.png": png(), "2.cls": b"2"})
    archive(tmp_path / "1.tar", {f"{i}.png": png() for i in range(5)})
    assert "5 without a class id" in found(tmp_path)[3]


def test_no_class_loses_all_its_pictures_to_the_held_out_part(tmp_path):
    members = {f"{i:03}.png": png() for i in range(41)}
    members |= {f"{i:03}.cls": b"1" if i in (0, 20) else b"0" for i in range(41)}
    archive(tmp_path / "a.tar", members)
    assert set(found(tmp_path / "a.tar")[0].labels.tolist()) == {0, 1}


def test_a_lone_train_beside_pictures_is_a_sub_folder(tmp_path):
    draw(tmp_path, 40)
    draw(tmp_path / "train", 3)
    assert found(tmp_path)[2] == 38 and "3 pictures in no class folder" in found(tmp_path)[3]


def test_what_lies_beside_the_splits_is_told(tmp_path):
    for name in ("reading", "training", "testing", "walking"):
        draw(tmp_path / name, 4)
    line = found(tmp_path)[3]
    assert "4 pictures of 1 class (training)" in line and "reading/" in line and "walking/" in line


@pytest.mark.parametrize("wrong", [dict(split="val"), dict(size=0), dict(size=16.5), dict(n=0), dict(n=-1),
                                   dict(ranges=[float("nan")]), dict(ranges=[1e6])])
def test_arguments_that_make_no_sense_are_refused_at_the_door(tmp_path, wrong):
    draw(tmp_path / "cat", 3)
    with pytest.raises(InputError):
        load_data(tmp_path, **{"split": "train", **wrong})


def test_pictures_that_a_table_does_not_name_and_a_table_that_is_not_used_are_told(tmp_path):
    draw(tmp_path, 4)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "one"}))
    assert "3 pictures that the table does not name" in found(tmp_path, captioned=True)[3]
    assert "1 metadata.jsonl" in found(tmp_path)[3]


def test_thumbnails_of_a_disk_station_are_no_class(tmp_path):
    draw(tmp_path / "@eaDir" / "x.jpg" / "SYNOPHOTO_THUMB_M.jpg")
    draw(tmp_path / "a", 2)
    draw(tmp_path / "a" / "@eaDir" / "0.png")
    assert found(tmp_path)[1] == ["a"] and found(tmp_path)[0].found == 2


def test_the_line_stays_one_line_of_readable_length_whatever_files_are_called(tmp_path):
    draw(tmp_path / "cat", 3)
    for i in range(300):
        (tmp_path / f"img.php?id={i}").write_bytes(b"")
    (tmp_path / "x.b\nc\x1b[31m").write_bytes(b"")
    line = found(tmp_path)[3]
    assert len(line) < 600 and line.isprintable() and "293 others" in line


def test_the_same_pictures_are_the_same_from_wherever_their_table_is_named(tmp_path, monkeypatch):
    draw(tmp_path / "p", 3)
    table = [{"image": f"p/{i}.png", "text": "x"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, table)))
    monkeypatch.chdir(tmp_path)
    assert load_data("a.jsonl", "train").identity() == load_data(tmp_path / "a.jsonl", "train").identity()
