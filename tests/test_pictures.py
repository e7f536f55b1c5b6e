"""pytest -q tests/test_pictures.py     Pictures, captions and archives as other people have them."""
import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import files
import sample
from conftest import ROOT
from data import center_crop, fixed_crops, load_data, random_crop, read_image
from runs import InputError


def png(value=0, side=16):
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value, 0, 0)).save(file, "png")
    return file.getvalue()


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def archive(*members, **how):
    """The bytes of a .tar of (name, content) or of what `member` makes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **how) as tar:
        for name, content in members:
            info, content = (name, content) if isinstance(name, tarfile.TarInfo) else member(name, content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def pairs(*numbers):
    return [(f"{i}.{kind}", content) for i in numbers
            for kind, content in (("png", png(i)), ("txt", b"picture %d" % i))]


def captioned(path):
    """{caption: red of its picture} of all that a data set has, for training and held out."""
    found = {}
    for split in ("train", "test"):
        pictures = load_data(path, split, 16, captioned=True)
        for i, captions in enumerate(pictures.captions):
            pixels = pictures.read(i, center_crop)
            found[" | ".join(captions)] = None if pixels is None else int(pixels[0, 0, 0])
    return found


# texts

TEXTS = {
    "UTF-8": "ein Stern\n".encode(), "UTF-8 with a mark": b"\xef\xbb\xbfein Stern",
    "marks where files were joined": b"\xef\xbb\xbf\n\xef\xbb\xbfein Stern",
    "UTF-16 LE": b"\xff\xfe" + "ein Stern\r\n".encode("utf-16-le"),
    "UTF-16 BE": b"\xfe\xff" + "ein Stern".encode("utf-16-be"), "UTF-32": "ein Stern".encode("utf-32"),
    "line separator": "ein\u2028Stern".encode(), "next line": "ein\x85Stern".encode(),
    "vertical tab": b"ein\x0bStern", "form feed": b"ein\x0cStern", "old Mac": b"\rein Stern\r",
}
GARBLED = {
    "Windows-1252": "ein schöner Stern".encode("cp1252"), "Shift-JIS": "星".encode("shift-jis"),
    "UTF-16 without a mark": "ein Stern".encode("utf-16-le"), "cut UTF-16": b"\xff\xfee\0i",
    "cut UTF-8": "Stern ★".encode()[:-1],
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_every_encoding_give_the_same_caption(tmp_path, kind):
    members = [("a.png", png(7)), ("a.txt", TEXTS[kind])]
    for name, content in members:
        (tmp_path / name).write_bytes(content)
    assert load_data(tmp_path, "train", 16, captioned=True).captions == [["ein Stern"]]
    (tmp_path / "a.tar").write_bytes(archive(*members))
    assert load_data(tmp_path / "a.tar", "train", 16, captioned=True).captions == [["ein Stern"]]
    (tmp_path / "prompts").write_bytes(TEXTS[kind])
    args = sample.get_args(["--prompts-file", str(tmp_path / "prompts")])
    assert sample.read_prompts(args) == ["ein Stern"]


@pytest.mark.parametrize("kind", GARBLED)
def test_what_is_not_utf_8_is_not_trained_on_but_counted(tmp_path, kind, capsys):
    members = [("a.png", png(7)), ("a.txt", GARBLED[kind]), ("b.png", png(8)), ("b.txt", b"Mond")]
    for name, content in members:
        (tmp_path / name).write_bytes(content)
    assert captioned(tmp_path) == {"Mond": 8}
    told = capsys.readouterr().err
    assert "not used: 1 without a caption, 1 of these in another encoding" in told
    assert load_data(tmp_path, "train", 16).found == 2           # as pictures, both
    capsys.readouterr()
    (tmp_path / "set.tar").write_bytes(archive(*members))
    assert captioned(tmp_path / "set.tar") == {"Mond": 8}
    assert "1 of these in another encoding" in capsys.readouterr().err
    with pytest.raises(InputError, match="prompts-file .* cannot be read .*: it has to be text in UTF-8"):
        sample.read_prompts(sample.get_args(["--prompts-file", str(tmp_path / "a.txt")]))


def test_several_lines_are_several_captions_with_every_line_end(tmp_path):
    (tmp_path / "a.png").write_bytes(png(7))
    (tmp_path / "a.txt").write_bytes("eins\r\nzwei\rdrei\n\n vier\x85 \u2028".encode())
    assert load_data(tmp_path, "train", 16, captioned=True).captions == [["eins", "zwei", "drei", "vier"]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_jsonl_may_have_any_encoding_and_hugging_faces_names(tmp_path, encoding):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    lines = [{"image": "0.png", "text": "ein\u2028Stern"}, {"file_name": "1.png", "text": "★"},
             {"file_name": "2.png", "caption": "Mond"}, {"image": "3.png", "text": "", "caption": ["x", "y"]}]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "metadata.jsonl").write_bytes(text.encode(encoding))
    assert captioned(tmp_path / "metadata.jsonl") == {"ein\u2028Stern": 0, "★": 1, "Mond": 2, "x | y": 3}


HOSTILE = ["x" * 304 + ".png", "data:image/png;base64," + "A" * 9000, "a\0.png", "", ".", "..", "sub", "/",
           "/a.png", "https://x.org/a.png", "\ud800.png", 7, None, ["a.png"], {"path": "a.png"}, "x/" * 3000]


def test_a_line_whose_picture_is_no_file_costs_only_itself(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(png(7))
    lines = [json.dumps({"image": name, "text": "lost"}) for name in HOSTILE] + ["[" * 100_000, "\0", "{}"]
    good = [json.dumps({"image": name, "text": text}) for name, text in
            (("a.png", "one"), (str(tmp_path / "a.png"), "two"))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines + good))
    assert captioned(tmp_path / "a.jsonl") == {"one": 7, "two": 7}
    told = capsys.readouterr().err
    assert f"not used: {len(lines)} without a picture" in told
    assert max(map(len, told.replace(str(tmp_path), "").splitlines())) < 200


def test_a_json_beside_a_picture_is_read_where_the_txt_says_nothing(tmp_path):
    for i, (text, record) in enumerate([(b" \n", {"caption": "zero"}), (b"one", {"text": "not this"}),
                                        (None, {"text": ["two", 2]}), (b"\xff", {"text": "three"})]):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        (tmp_path / f"{i}.json").write_text(json.dumps(record))
        if text is not None:
            (tmp_path / f"{i}.{'TXT' if i else 'txt'}").write_bytes(text)
    expected = {"zero": 0, "one": 1, "two": 2, "three": 3}
    assert captioned(tmp_path) == expected
    members = [(path.name, path.read_bytes()) for path in tmp_path.iterdir()]
    (tmp_path / "all.tar").write_bytes(archive(*members))
    assert captioned(tmp_path / "all.tar") == expected


# archives

def test_joined_archives_are_read_to_the_end(tmp_path, capsys):
    path = tmp_path / "c.tar"
    more = archive(*pairs(4), format=tarfile.PAX_FORMAT)
    path.write_bytes(archive(*pairs(1, 2)) + archive(*pairs(3)) + more)
    assert captioned(path) == {f"picture {i}": i for i in (1, 2, 3, 4)}
    # both count from 1, as shards do: no picture takes the place of another
    other = archive(("1.png", png(101)), ("1.txt", b"another 1"))
    for joined in (archive(*pairs(1)) + other, archive(*pairs(1), *reversed(tarfile_members(other)))):
        path.write_bytes(joined)
        capsys.readouterr()
        assert captioned(path) == {"picture 1": 1, "another 1": 101}


def tarfile_members(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]


def test_a_damaged_archive_is_told_and_the_rest_of_it_is_used(tmp_path, capsys):
    whole, path = archive(*pairs(1, 2, 3)), tmp_path / "a.tar"
    ends = [whole.index(name.encode() + b"\0") for name in ("2.png", "2.txt", "3.png")]
    mark = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path.write_bytes(whole[:ends[0]] + b"?" * 40 + whole[ends[0] + 40:])         # one header is damaged
    assert captioned(path) == {"picture 1": 1, "picture 3": 3}
    assert "not used: 1 without a picture" in capsys.readouterr().err
    for content, left in ((whole[:ends[2]], {"picture 1": 1, "picture 2": 2}),   # cut between two members
                          (whole[:ends[2] + 99], {"picture 1": 1, "picture 2": 2}),      # in a header
                          (whole[:mark - 510], {"picture 1": 1, "picture 2": 2}),        # within a caption
                          (whole + b"junk" * 999, {f"picture {i}": i for i in (1, 2, 3)})):
        path.write_bytes(content)
        assert captioned(path) == left
        assert "a.tar ends early (" in capsys.readouterr().err
    path.write_bytes(whole)
    assert len(captioned(path)) == 3 and "ends early" not in capsys.readouterr().err


def test_links_in_an_archive_lead_to_what_they_name(tmp_path, capsys):
    links = dict(type=tarfile.LNKTYPE, linkname="real/1.png"), dict(type=tarfile.SYMTYPE, linkname="1.png")
    path = tmp_path / "a.tar"
    path.write_bytes(archive(
        member("real/9.png", **links[1]), ("real/9.txt", b"before it"),
        ("real/1.png", png(7)), ("real/1.txt", b"itself"),
        member("./2.png", **links[0]), ("2.txt", b"hard"),
        member("3.png", type=tarfile.SYMTYPE, linkname="./2.png"), ("3.txt", b"link to a link"),
        member("b/4.png", type=tarfile.SYMTYPE, linkname="../real/1.png"), ("b/4.txt", b"from below"),
        member("5.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), ("5.txt", b"outside"),
        member("6.png", type=tarfile.SYMTYPE, linkname="6.png"), ("6.txt", b"circle")))
    found = ("before it", "itself", "hard", "link to a link", "from below")
    assert captioned(path) == dict.fromkeys(found, 7)
    assert "not used: 2 without a picture" in capsys.readouterr().err


def test_what_other_programs_add_to_an_archive_is_no_entry(tmp_path, capsys):
    path = tmp_path / "a.tar"
    path.write_bytes(archive(
        member("a", type=tarfile.DIRTYPE), ("./a/x.JPG", png(7)), ("a/x.Txt", b"one"), ("a/._x.JPG", b"mac"),
        ("__MACOSX/a/x.jpg", b"mac"), (".DS_Store", b""), ("PaxHeaders.7/x.jpg", b"18 atime=1\n"),
        ("../up.jpeg", png(8)), ("../up.txt", b"two"), ("/root.jpeg", png(9)), ("/root.txt", b"three"),
        ("ä" * 200 + ".png", png(10)), ("ä" * 200 + ".txt", b"four"),
        format=tarfile.PAX_FORMAT, pax_headers={"comment": "made by git"}))
    assert captioned(path) == {"one": 7, "two": 8, "three": 9, "four": 10}
    assert "not used" not in capsys.readouterr().err


def test_a_name_that_has_two_pictures_uses_the_first_and_says_so(tmp_path, capsys):
    path = tmp_path / "a.tar"
    path.write_bytes(archive(("1.jpeg", png(7)), ("1.png", png(8)), ("1.txt", b"one"), ("1.seg.png", png(9))))
    assert captioned(path) == {"one": 7}
    assert "not used: 1 second pictures of one name" in capsys.readouterr().err


def test_a_sparse_member_is_counted_and_not_read_as_something_else(tmp_path, capsys):
    with open(tmp_path / "1.png", "wb") as file:
        file.write(png(7))
        file.truncate(1 << 20)
    for name, content in pairs(2, 3):
        (tmp_path / name).write_bytes(content)
    names = ["2.png", "1.png", "3.png"]
    subprocess.run(["tar", "-S", "--format=gnu", "-cf", "a.tar", *names], cwd=tmp_path, check=True)
    pictures = load_data(tmp_path / "a.tar", "train", 16)
    (images, _), = pictures.passes(4)
    assert images[:, 0, 0, 0, 0].tolist() == [3]
    assert "1 of 2 pictures" in (told := capsys.readouterr().err) and "1 without a picture" in told


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "a.tar.xz", "a.zip", "a.jsonl.gz"])
def test_compressed_files_are_told_to_be_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x1f\x8b" + bytes(range(256)) * 9)
    with pytest.raises(InputError, match="unpack it") as error:
        load_data(tmp_path / name, "train", 16)
    assert "\n" not in str(error.value)


def test_a_class_id_that_is_none_is_counted_and_is_not_class_0(tmp_path, capsys):
    ids = [b"12\n", b"\xef\xbb\xbf3", b"007",
           b"12.0", b"-1", b"cat", b"", b"1000000", "²".encode(), b"\xff", b"9" * 5000]
    members = [(f"{i}.{kind}", content) for i, text in enumerate(ids)
               for kind, content in (("png", png(i)), ("txt", b"%d" % i), ("cls", text))]
    path = tmp_path / "a.tar"
    path.write_bytes(archive(*members, ("none.png", png())))
    labels = sorted(sum((load_data(path, split, 16).labels.tolist() for split in ("train", "test")), []))
    assert labels == [3, 7, 12]
    assert "not used: 9 without a class id" in capsys.readouterr().err
    assert len(captioned(path)) == 11                    # a caption is enough for text
    capsys.readouterr()
    path.write_bytes(archive(*pairs(1, 2)))              # no .cls at all: one class
    assert load_data(path, "train", 16).labels.tolist() == [0] and "not used" not in capsys.readouterr().err


def test_a_text_or_archive_that_vanishes_after_it_was_listed_ends_nothing(tmp_path, capsys):
    for name, content in pairs(1, 2, 3):
        (tmp_path / name).write_bytes(content)
    pictures = load_data(tmp_path, "train", 16)
    before = pictures.fingerprint()
    pictures.files[0][0].unlink()
    assert pictures.fingerprint() != before
    assert len(torch.cat([labels for _, labels in pictures.passes(4)])) == len(pictures) - 1
    assert "skipped 1 of" in capsys.readouterr().err
    entry = files.TarMember(tmp_path / "none.tar", "1.txt", 0, 9, 0)
    assert files.captions_of({".txt": entry}) is None


# pictures

def reference_square(image, size, target, place):
    """As ADM does it: the whole picture is resized, then cut."""
    while min(image.size) >= 2 * target:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = target / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top = place(len(pixels) - size)
    left = place(pixels.shape[1] - size)
    return pixels[top:top + size, left:left + size]


def noise(width, height):
    pixels = np.random.default_rng(width).integers(256, size=(height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("width, height", [(32, 32), (500, 375), (375, 501), (33, 900), (9, 5), (1000, 40)])
def test_pictures_of_usual_shapes_are_cropped_as_adm_does_to_the_byte(width, height):
    image, middle = noise(width, height), lambda spare: spare // 2
    assert np.array_equal(center_crop(image, 32), reference_square(image, 32, 32, middle))
    larger = reference_square(image, 40, 40, middle)
    assert np.array_equal(fixed_crops(image, 32, False, (1.25,))[4], larger[4:36, 4:36])
    for seed in range(5):
        rng, again = np.random.default_rng(seed), np.random.default_rng(seed)
        target = int(again.integers(32, 41))
        expected = reference_square(image, 32, target, lambda spare: again.integers(spare + 1))
        assert np.array_equal(random_crop(image, 32, rng), expected)


@pytest.mark.parametrize("width, height", [(1600, 1), (1, 1600), (3, 2000), (2000, 20)])
def test_the_crop_of_a_strip_is_what_the_whole_strip_would_give(width, height):
    # Of less than full contrast: Pillow enlarges the axes in either order, and clips at 0 and 255 between.
    image = noise(width, height).point(lambda value: 64 + value // 2)
    expected = reference_square(image, 32, 32, lambda spare: spare // 2).astype(int)
    assert abs(center_crop(image, 32) - expected).max() <= 2
    rng, again = np.random.default_rng(1), np.random.default_rng(1)
    target = int(again.integers(32, 41))
    expected = reference_square(image, 32, target, lambda spare: again.integers(spare + 1)).astype(int)
    assert abs(random_crop(image, 32, rng) - expected).max() <= 2
    assert fixed_crops(image, 32, True, (1.1, 1.05)).shape == (20, 32, 32, 3)


def test_a_strip_of_16000_pixels_takes_little_memory():
    code = ("import resource, numpy as np, data; from PIL import Image\n"
            "size = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
            "before = size()\n"
            "for shape in ((16000, 1), (1, 16000)):\n"
            "    image = Image.new('RGB', shape)\n"
            "    data.center_crop(image, 256)\n"
            "    data.random_crop(image, 256, np.random.default_rng(0))\n"
            "    data.fixed_crops(image, 256, True, (1.1,))\n"
            "print((size() - before) // 1024)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0 and int(result.stdout) < 100, result.stdout + result.stderr[-500:]


PIXELS = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(0, 11))
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path, orientation, kind):
    image = Image.fromarray(np.kron(PIXELS, np.ones((16, 16), np.uint8))).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{kind}", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / f"a.{kind}")).convert("RGB")
    assert np.array_equal(read_image(tmp_path / f"a.{kind}"), expected)


def exif_block(kind, tag, count=1, value=b"\x06\0\0\0", orientation=b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"):
    entry = tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + count.to_bytes(4, "little") + value
    return b"Exif\0\0II*\0\x08\0\0\0\x02\0" + orientation + entry + bytes(4)


def test_an_odd_exif_tag_does_not_cost_the_picture_nor_its_orientation(tmp_path):
    upright = np.kron(PIXELS, np.ones((16, 16), np.uint8))
    image = Image.fromarray(upright).convert("RGB")
    for kind in range(14):
        for tag in (0x010f, 0x0100, 0x0132, 0x011a, 0x8769, 0x8825, 0xa005, 0x9286, 0x02bc):
            image.save(tmp_path / "a.jpg", exif=exif_block(kind, tag))
            assert read_image(tmp_path / "a.jpg").size == (32, 48), (kind, tag)
    for block in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"junk", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
                  exif_block(2, 0x0112, 5, b"\x99\0\0\0", b"\x12\x01\x02\0\x05\0\0\0\x99\0\0\0"),
                  exif_block(5, 0x0112, 1, b"\x99\0\0\0", b"\x12\x01\x05\0\x01\0\0\0\x99\0\0\0")):
        image.save(tmp_path / "a.jpg", exif=block)
        assert read_image(tmp_path / "a.jpg").size == (48, 32)


def grey(array, tmp_path, **how):
    path = tmp_path / "a.tif"
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **how)
    return np.asarray(read_image(path))[..., 0].ravel().tolist()


def test_float_pictures_are_scaled_by_what_their_values_can_mean(tmp_path):
    steps, floats = list(range(256)), np.arange(256, dtype=np.float32)[None]
    assert grey(floats / 255, tmp_path) == steps                         # 0 .. 1
    assert grey(floats, tmp_path) == steps                               # 0 .. 255
    assert grey(floats * 257, tmp_path) == steps                         # 0 .. 65535
    assert grey(floats / 255 * 1e9, tmp_path) == pytest.approx(steps, abs=1)
    nan, inf = np.nan, np.inf
    odd = np.float32([[0, 0.5, 1, nan, inf, -inf, -1, 1.04]])
    assert grey(odd, tmp_path) == [0, 127, 255, 0, 255, 0, 0, 255]
    assert grey(np.float32([[nan, nan]]), tmp_path) == grey(np.float32([[0, 0]]), tmp_path) == [0, 0]


def test_integers_of_16_and_32_bits_are_scaled(tmp_path):
    words = np.arange(65536, dtype=np.uint16)[None]
    assert grey(words, tmp_path) == (words // 257).ravel().tolist()
    assert grey(words.astype(np.int32), tmp_path) == (words // 257).ravel().tolist()
    assert grey(np.int32([[0, 1 << 30, (1 << 31) - 1, -5]]), tmp_path) == [0, 127, 255, 0]
    assert grey(np.uint16([[0, 255, 200]]), tmp_path) == [0, 0, 0]       # white is 65,535, however dark it is


def test_transparent_16_bit_grey_becomes_white(tmp_path):
    Image.fromarray(np.uint16([[0, 25700, 65535]])).save(tmp_path / "a.png", transparency=0)
    assert np.asarray(read_image(tmp_path / "a.png"))[0].tolist() == [[255] * 3, [100] * 3, [255] * 3]


def test_every_other_mode_and_the_first_of_several_frames_is_read(tmp_path):
    red = Image.new("RGB", (20, 20), (250, 10, 10))
    blue = Image.new("RGB", (20, 20), (10, 10, 250))
    for name, image in {"a.gif": red, "b.webp": red, "c.png": red, "d.tif": red}.items():
        image.save(tmp_path / name, save_all=True, append_images=[blue])
    for mode, name in (("CMYK", "e.jpg"), ("CMYK", "f.tif"), ("YCbCr", "g.tif"), ("YCbCr", "g.jpg")):
        red.convert(mode).save(tmp_path / name)
    lab = [Image.new("L", (20, 20), value) for value in (136, 207, 187)]
    Image.merge("LAB", lab).save(tmp_path / "h.tif")
    red.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "i.png")
    for path in tmp_path.iterdir():
        assert abs(np.asarray(read_image(path))[9, 9].astype(int) - (250, 10, 10)).max() < 25, path.name
    Image.new("1", (20, 20), 1).save(tmp_path / "j.png")
    clear = Image.new("P", (20, 20), 3)
    clear.putpalette(bytes(12))
    clear.save(tmp_path / "k.png", transparency=bytes([9, 9, 9, 0]))
    clear.save(tmp_path / "l.gif", transparency=3)
    for name in ("j.png", "k.png", "l.gif"):
        assert np.asarray(read_image(tmp_path / name)).min() == 255, name


def test_200_megapixels_are_a_picture_and_what_takes_more_than_a_gigabyte_is_not(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    path = tmp_path / "a.png"
    for width, height, reason in ((16320, 12240, OSError), (16400, 16400, Image.DecompressionBombError)):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
        with pytest.raises(reason):                  # OSError: it is read, but its pixels are missing
            read_image(path)


def test_what_is_no_picture_is_told_without_an_address_in_memory(tmp_path):
    for name, content in (("a.png", b""), ("b.png", b"junk"), ("c.ppm", b"P6 0 5 255\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError, match=f"cannot identify image file '{tmp_path / name}'"):
            read_image(tmp_path / name)
