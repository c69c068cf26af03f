"""Labels: the order of class folders, class maps, labels that come with images, and the sentence that says which."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_dataset
from timm.utils.misc import natural_key as natural_key_of_timm

from tokengame.cli.main import main
from tokengame.data.class_map import class_index
from tokengame.data.datasets import label_images, open_images
from tokengame.data.labels import natural_key
from tokengame.errors import TokenGameError


def folders(root, *names, files=("1.png",)):
    for name in names:
        (root / name).mkdir(parents=True)
        for file in files:
            Image.new("RGB", (30, 30)).save(root / name / file)
    return root


def labelled(where, classes, class_map=None):
    source = open_images(str(where))
    how = label_images(source, None if class_map is None else str(class_map), classes)
    return dict(zip(source.names, source.labels or [None] * len(source.names), strict=True)), how


def text(path, content, encoding="utf-8"):
    path.write_bytes(content.encode(encoding))
    return path


@pytest.mark.parametrize(
    "names",
    [
        [str(i) for i in range(12)],
        ["class-10", "class-9", "Class-11", "class-09b"],
        ["n02", "n1", "N3", "n10", "zebra", "Apple", "a b", "10", "9x"],
        ["n01440764", "n01443537", "n15075141"],
    ],
)
def test_class_folders_have_timms_order(names, tmp_path):
    folders(tmp_path / "set", *names)
    timms = create_dataset("", str(tmp_path / "set")).reader.class_to_idx
    found, how = labelled(tmp_path / "set", len(names))
    assert found == {f"{name}/1.png": timms[name] for name in names}
    assert ("torchvision sorts otherwise" in how) == (sorted(names) != sorted(names, key=natural_key))


@given(st.lists(st.text("aB10 _-²٣", max_size=6), unique_by=str.lower))
def test_the_natural_order_is_timms(names):
    plain = [name for name in names if not set(name) & set("²٣")]
    expected = sorted(plain, key=lambda name: (natural_key_of_timm(name), name))
    assert sorted(plain, key=natural_key) == expected
    assert sorted(sorted(names, key=natural_key)) == sorted(names), "digits that are no numbers do not fail"


def test_hidden_folders_and_files_are_no_classes(tmp_path):
    root = folders(tmp_path / "set", "a", "b", "c", ".ipynb_checkpoints", "__MACOSX/a", "a/.thumbs", "@eaDir")
    for name in "abc":
        (root / name / "._1.png").write_bytes(b"\0\5\26\7")
    expected = {"a/1.png": 0, "b/1.png": 1, "c/1.png": 2}
    found, how = labelled(root, 3)
    assert found == expected
    assert how == "3 images in 3 class folders, labelled by folder in timm's natural order"
    found, how = labelled(root, 4)
    assert set(found.values()) == {None}
    assert how.endswith("unlabelled: the model has 4 classes; --class-map FILE says which these are")
    inside = (tmp_path / "set").rename(tmp_path / ".hidden")
    assert labelled(inside, 3)[0] == expected, "only what lies below the folder given counts"


def test_a_stray_image_is_no_class_of_its_own(tmp_path):
    root = folders(tmp_path / "set", "a", "b", "c")
    Image.new("RGB", (30, 30)).save(root / "logo.png")
    found, _ = labelled(root, 4)
    assert found == dict.fromkeys(("a/1.png", "b/1.png", "c/1.png", "logo.png"))
    found, how = labelled(root, 3)
    assert found == {"a/1.png": 0, "b/1.png": 1, "c/1.png": 2}
    assert how.startswith("3 images in 3 class folders, labelled")
    assert how.endswith("; 1 image beside the class folders left out, the first is logo.png")


def test_a_class_folder_inside_another_drops_the_labels(tmp_path):
    root = folders(tmp_path / "set", "cat", "cat/extra", "dog")
    found, how = labelled(root, 3)
    assert set(found.values()) == {None}
    assert "unlabelled: cat/extra lies in another class folder" in how


def test_images_in_no_folder_are_said_to_be_unlabelled(tmp_path):
    root = folders(tmp_path, "set", files=("1.png", "2.png"))
    assert labelled(root / "set", 2)[1] == "2 images in no class folder, unlabelled"
    assert labelled(folders(tmp_path / "other", "a"), 0)[1].endswith("the model has no classes")
    with pytest.raises(TokenGameError, match="--class-map needs class folders"):
        labelled(root / "set", 2, text(tmp_path / "map.txt", "a\nb\n"))


@pytest.mark.parametrize(
    "content",
    [
        "dog\nTürkei\ncat\n",
        "dog\r\nTürkei\r\ncat",
        "\ufeffdog\nTürkei\ncat\n\n\n",
        " dog \n\tTürkei\ncat ",
        "dog\rTürkei\rcat",
    ],
)
def test_class_maps_of_every_system(content, tmp_path):
    root = folders(tmp_path / "set", "cat", unicodedata.normalize("NFD", "Türkei"))
    assert sorted(labelled(root, 3, text(tmp_path / "map.txt", content))[0].values()) == [1, 2]


def test_names_in_folders_may_be_escaped(tmp_path):
    root = folders(tmp_path / "set", "hot%20dog", "caf%C3%A9")
    found, how = labelled(root, 2, text(tmp_path / "map.txt", "hot dog\ncafé\n"))
    assert found == {"hot%20dog/1.png": 0, "caf%C3%A9/1.png": 1}
    assert how == f"2 images in 2 class folders, labelled by {tmp_path}/map.txt"


def test_lines_may_go_on_after_the_name(tmp_path):
    root = folders(tmp_path / "set", "n02", "n01")
    assert list(
        labelled(root, 3, text(tmp_path / "map.txt", "n02 tench, Tinca\nn03\tray\nn01, hen\n"))[0].values()
    ) == [2, 0]
    (root / "n01").rename(root / "great")
    with pytest.raises(TokenGameError, match="'great'"):
        labelled(root, 3, text(tmp_path / "map.txt", "n02\ngreat owl\ngreat shark\n"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a\nb\na\n", "'a' twice, in lines 1 and 3"),
        ("caf\u00e9\ncafe\u0301\n".encode(), "twice, in lines 1 and 2"),
        (b"a\n\nb\n", "line 2 of .* is blank"),
        (b"\na\nb\n", "line 1 of .* is blank"),
        (b"a\nb\n", "names 2 classes but the model has 3"),
        (b"a\nb\nc\nd\n", "names 4 classes but the model has 3"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        ("a\nb\nc\n".encode("utf-16"), "no UTF-8 text"),
        ("a\nb\n\u00fc".encode("latin-1"), "no UTF-8 text"),
        (b"b\nc\nd\n", "1 class folders are not in .*, among them 'a'"),
    ],
)
def test_a_class_map_that_does_not_fit_is_refused(content, reason, tmp_path):
    root = folders(tmp_path / "set", "a", "b")
    (tmp_path / "map.txt").write_bytes(content)
    with pytest.raises(TokenGameError, match=reason):
        labelled(root, 3, tmp_path / "map.txt")


@pytest.mark.parametrize("location", ["fashion", "set", "flat"])
def test_a_class_map_that_is_not_there_is_never_ignored(location, tmp_path):
    folders(tmp_path, "set/a", "flat")
    where = location if location == "fashion" else tmp_path / location
    for path in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(TokenGameError, match="no class map at"):
            labelled(where, 10, path)


def test_a_class_map_reorders_the_embedded_scenes(tmp_path):
    names = ["shirt", "bag", "dress", "coat", "ankle boot", "t-shirt", "trouser", "pullover", "sandal", "sneaker"]
    plain, _ = labelled("fashion", 10)
    mapped, how = labelled("fashion", 10, text(tmp_path / "map.txt", "\n".join(names)))
    assert {plain[i]: mapped[i] for i in plain}[8] == names.index("bag")
    assert how == f"1,000 images of 10 classes, labelled by what they show and {tmp_path}/map.txt"
    found, how = labelled("fashion", 1000)
    assert set(found.values()) == {None}
    assert "unlabelled: the data set has 10 classes but the model has 1,000 classes" in how


@pytest.mark.parametrize("label", [-1, 5, 2.0, "cat", None, True, np.bool_(True), np.float32(1), [1], 2**70])
def test_what_is_no_class_of_the_model_is_refused(label):
    with pytest.raises(TokenGameError, match=r"not class indices below 5: that of photo 7 is"):
        class_index(label, "photo 7", 5)


@pytest.mark.parametrize("label", [0, 4, np.int64(3), np.uint8(2)])
def test_what_is_a_class_of_the_model_is_a_plain_number(label):
    assert type(class_index(label, "photo", 5)) is int
    assert class_index(label, "photo", 5) == label


def test_commands_say_how_images_are_labelled_and_refuse_unreadable_ones(capsys, tmp_path):
    bad = folders(tmp_path, "a", files=[f"{i}.png" for i in range(20)])
    for i in range(3):
        (bad / "a" / f"bad{i}.png").write_bytes(b"no image")
    output = str(tmp_path / "policy.safetensors")
    assert main(["train", "--backbone", "fashion", "--images", str(bad), "--output", output]) == 2
    errors = capsys.readouterr().err
    assert "23 images in 1 class folder, unlabelled: the model has 10 classes" in errors
    assert "3 of 23 images tried cannot be read (more than 5 %), the first is a/bad" in errors
    assert not (tmp_path / "policy_log").exists()
