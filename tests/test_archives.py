"""Tars: links, samples of WebDataset, and archives that are damaged, compressed or lie about sizes."""

import io
import os
import resource
import tarfile

import pytest
from PIL import Image

from tokengame.data.datasets import label_images, open_images
from tokengame.data.decode import decoded
from tokengame.errors import TokenGameError


def picture(shade=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade,) * 3).save(file, "PNG")
    return file.getvalue()


def add(archive, name, data=b"", **changes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


def tar(path, *members):
    """Members are (name, bytes) or (name, kind of link, target)."""
    with tarfile.open(path, "w") as archive:
        for name, what, *target in members:
            if target:
                add(archive, name, type=what, linkname=target[0])
            else:
                add(archive, name, what)
    return str(path)


def labelled(location, classes=5):
    source = open_images(location)
    how = label_images(source, None, classes)
    return dict(zip(source.names, source.labels or [None] * len(source.names), strict=True)), how


HARD, SOFT = tarfile.LNKTYPE, tarfile.SYMTYPE


def test_links_inside_a_tar_are_what_they_lead_to(tmp_path):
    location = tar(
        tmp_path / "t.tar", ("a/1.png", picture(40)), ("b/1.png", HARD, "a/1.png"), ("c/1.png", SOFT, "../a/1.png"),
        ("d/1.png", SOFT, "../c/1.png"), ("e/2.png", SOFT, "../.store/x"), (".store/x", picture(90)),
    )  # fmt: skip
    source = open_images(location)
    assert source.names == ["a/1.png", "b/1.png", "c/1.png", "d/1.png", "e/2.png"]
    shades = [source.open(i).getpixel((0, 0))[0] for i in range(5)]
    assert shades == [40, 40, 40, 40, 90]
    with tarfile.open(location) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = open_images(str(tmp_path / "unpacked"))
    assert unpacked.names == source.names
    assert [unpacked.open(i).getpixel((0, 0))[0] for i in range(5)] == shades


def test_links_that_lead_out_of_a_tar_or_nowhere_are_left_out_and_said(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture())
    found, how = labelled(
        tar(
            tmp_path / "t.tar", ("a/1.png", picture()), ("a/2.png", SOFT, "../../secret.png"),
            ("a/3.png", SOFT, str(tmp_path / "secret.png")), ("a/4.png", SOFT, "5.png"), ("a/5.png", SOFT, "4.png"),
            ("a/6.png", HARD, "../secret.png"), ("b", SOFT, "a"), ("a/notes", SOFT, "nowhere"),
        )
    )  # fmt: skip
    assert list(found) == ["a/1.png"]
    assert "6 x link that leads to no file in the tar left out, the first is a/2.png" in how


def test_hidden_members_are_left_out(tmp_path):
    members = ["./a/1.png", "./a/._1.png", "__MACOSX/a/._1.png", ".git/x.png", "a/.thumbs/1.png", "@eaDir/1.png"]
    found, _ = labelled(tar(tmp_path / "t.tar", *((name, picture()) for name in members)), 1)
    assert found == {"a/1.png": 0}


def test_a_mask_is_no_photo(tmp_path):
    for others in (("000.cls", b"3"), ("000.json", b"{}"), ("000.txt", b"a cat")), (("000.cls", b"3"),), ():
        location = tar(tmp_path / "t.tar", ("000.jpg", picture()), ("000.seg.png", picture()), *others)
        found, how = labelled(location)
        assert found == {"000.jpg": 3 if others else None}
        assert "1 x image left out that belongs to the sample of another, the first is 000.seg.png" in how
    found, _ = labelled(tar(tmp_path / "t.tar", ("0.png", picture()), ("0.jpg", picture()), ("0.cls", b"1")))
    assert found == {"0.jpg": 1}, "a mask may be a .png beside the .jpg"


def test_dots_in_names_of_class_folders_are_no_samples(tmp_path):
    names = ["a/cat.jpg", "a/cat.1.jpg", "a/cat.png", "b/x.2.jpg", "b/x.3.jpg", "b/2007.01.jpg"]
    members = [(name, picture()) for name in (*names, "b/2007.01.xml", "README.txt")]
    assert sorted(labelled(tar(tmp_path / "t.tar", *members), 2)[0]) == sorted(names)


def test_a_sample_without_a_class_drops_the_labels_and_is_named(tmp_path):
    members = [("000.jpg", picture()), ("000.cls", b"3"), ("001.jpg", picture())]
    found, how = labelled(tar(tmp_path / "t.tar", *members))
    assert found == {"000.jpg": None, "001.jpg": None}
    assert how == "2 images unlabelled: 1 of them have no label, the first is 001.jpg"
    found, how = labelled(tar(tmp_path / "u.tar", ("a.0.jpg", picture()), ("a.0.cls", b"1")))
    assert found == {"a.0.jpg": None}
    assert ".cls member left out that has another dot in its name, the first is a.0.cls" in how


def test_the_same_key_in_two_shards_is_two_samples(tmp_path):
    for shard in "01":
        tar(tmp_path / f"s{shard}.tar", ("000.png", picture()), ("000.cls", b" 1\n" if shard == "0" else b"4"))
    source = open_images(str(tmp_path / "s{0..1}.tar"))
    label_images(source, None, 5)
    assert source.labels == [1, 4]


@pytest.mark.parametrize("text", [b"", b"cat", b"1.5", b"1_0", b"0x1", b"\xff\xfe", b"1 2", b"9" * 100])
def test_a_damaged_class_is_named(text, tmp_path):
    with pytest.raises(TokenGameError, match=r"7.cls in .*t.tar holds no class index|not class indices below 5"):
        labelled(tar(tmp_path / "t.tar", ("7.png", picture()), ("7.cls", text)))


@pytest.mark.parametrize("text", [b"-1", b"5"])
def test_a_class_the_model_does_not_have_is_named(text, tmp_path):
    with pytest.raises(TokenGameError, match=rf"not class indices below 5: that of 7.png is {text.decode()}"):
        labelled(tar(tmp_path / "t.tar", ("7.png", picture()), ("7.cls", text)))


def test_later_members_replace_earlier_ones_as_in_unpacking(tmp_path):
    source = open_images(tar(tmp_path / "t.tar", ("a/1.png", picture(1)), ("a/1.png", picture(2))))
    assert source.names == ["a/1.png"]
    assert source.open(0).getpixel((0, 0))[0] == 2


def three(tmp_path):
    path = tmp_path / "t.tar"
    tar(path, *((f"a/{i}.png", picture()) for i in "123"))
    return path, bytearray(path.read_bytes())


@pytest.mark.parametrize("length", [0, 100, 700, 1100, 2500])
def test_a_tar_that_is_cut_short_is_refused(length, tmp_path):
    path, content = three(tmp_path)
    path.write_bytes(content[:length])
    with pytest.raises(TokenGameError, match="is not a readable uncompressed tar file"):
        open_images(str(path))


def test_a_tar_cut_between_members_is_said(tmp_path):
    path, content = three(tmp_path)
    path.write_bytes(content[:2048])
    found, how = labelled(str(path))
    assert len(found) == 2
    assert "tar without a mark of its end, perhaps cut short, the first is t.tar" in how


def test_a_damaged_header_in_the_middle_loses_no_images_silently(tmp_path):
    path, content = three(tmp_path)
    content[1024 + 150] ^= 1
    path.write_bytes(content)
    with pytest.raises(TokenGameError, match="there is more behind byte 1,024"):
        open_images(str(path))


def test_joined_tars_lose_no_images_silently(tmp_path):
    path, content = three(tmp_path)
    path.write_bytes(content + content)
    with pytest.raises(TokenGameError, match="another tar was appended"):
        open_images(str(path))


@pytest.mark.parametrize("size", [2**40, 2**62, 2**80, -512])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_sizes_that_headers_claim_are_not_believed(size, kind, tmp_path):
    info = tarfile.TarInfo("a/1.png")
    info.size, info.type = size, kind
    path = tmp_path / "t.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + picture().ljust(512, b"\0") + bytes(10240))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TokenGameError, match=r"t.tar is not a readable|no image in"):
        open_images(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_a_sparse_member_is_refused(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        pax = {"GNU.sparse.map": "0,4", "GNU.sparse.size": "100", "GNU.sparse.name": "a/1.png"}
        add(archive, "a/1.png", b"abcd", pax_headers=pax)
    with pytest.raises(TokenGameError, match="sparse"):
        open_images(str(path))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_archive_is_named_with_what_to_do(kind, tmp_path):
    path = tmp_path / f"t.tar.{kind}"
    with tarfile.open(path, f"w:{kind}") as archive:
        add(archive, "1.png", picture())
    for name in (path, path.with_name("renamed.tar")):
        name.write_bytes(path.read_bytes())
        with pytest.raises(TokenGameError, match=r"is compressed \(.*unpack it, or pack it as a plain .tar"):
            open_images(str(name))


def test_names_of_any_bytes_are_printable(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        add(archive, "a/bad\udcff\n.png", picture(7))
    source = open_images(str(tmp_path / "t.tar"))
    assert source.names == ["a/bad\\udcff\\n.png"]
    assert source.open(0).getpixel((0, 0))[0] == 7


def test_a_gigantic_member_is_not_read(tmp_path):
    path = tmp_path / "t.tar"
    info = tarfile.TarInfo("a/1.png")
    info.size = 2**33
    path.write_bytes(info.tobuf())
    os.truncate(path, 512 + 2**33 + 1024)  # sparse: it takes no room on the disk
    reason = decoded(lambda: open_images(str(path)).open(0))
    assert reason == "the file has 268,435,457 bytes, more than 268,435,456"
