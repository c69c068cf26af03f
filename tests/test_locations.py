"""Where images are: folders with links, patterns, single files, and names that lead nowhere."""

import os

import pytest
from PIL import Image

from tokengame.data import hub
from tokengame.data.datasets import label_images, open_images
from tokengame.errors import TokenGameError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder: photos/{cat,dog}/{1,2}.png."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in "12":
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def labelled(location, classes=2):
    source = open_images(location)
    how = label_images(source, None, classes)
    return dict(zip(source.names, source.labels or [None] * len(source.names), strict=True)), how


ALL = {"cat/1.png": 0, "cat/2.png": 0, "dog/1.png": 1, "dog/2.png": 1}


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("photos", ALL),
        ("photos/*", ALL),
        ("photos/[cd]*", ALL),
        ("photos/{dog,cat,dog}", ALL),
        ("photos/*/*.png", ALL),
        ("photos/*/1.png", {"cat/1.png": 0, "dog/1.png": 1}),
        ("photos/dog/?.png", {"1.png": None, "2.png": None}),
        ("photos/dog/{1..2}.png", {"1.png": None, "2.png": None}),
        ("photos/dog/2.png", {"2.png": None}),
        ("photos/{dog,cat/1.png}", {"cat/1.png": 0, "dog/1.png": 1, "dog/2.png": 1}),
    ],
)
def test_folders_patterns_and_single_files(location, expected, place):
    assert labelled(location)[0] == expected
    assert labelled(str(place / location))[0] == expected


def test_home_is_expanded(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    assert labelled("~/photos")[0] == ALL


def test_links_are_followed_and_loops_end(place):
    (place / "elsewhere").mkdir()
    (place / "photos").rename(place / "elsewhere" / "photos")
    os.symlink("elsewhere/photos", "photos")
    os.symlink("../cat", "photos/dog/up")
    os.symlink("../../..", "photos/cat/root")
    os.symlink("self", "photos/cat/self")
    os.symlink("nowhere.png", "photos/cat/3.png")
    os.symlink("1.png", "photos/cat/4.png")
    source = open_images("photos")
    assert source.names == ["cat/1.png", "cat/2.png", "cat/4.png", "dog/1.png", "dog/2.png",
                            "dog/up/1.png", "dog/up/2.png", "dog/up/4.png"]  # fmt: skip
    assert "4 links not followed, the first is photos/cat/3.png" in label_images(source, None, 2)


def test_folders_that_link_to_each_other_end(tmp_path):
    """Twelve folders with links to all others: 12! ways through them."""
    for name in map(str, range(12)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
        for other in map(str, range(12)):
            os.symlink(f"../{other}", tmp_path / name / other)
    assert "links not followed" in labelled(str(tmp_path))[1]


@pytest.mark.usefixtures("place")
def test_a_folder_that_may_not_be_read_is_named(monkeypatch):
    original = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(TokenGameError, match=r"cannot read photos/dog \(Permission denied\)"):
        open_images("photos")


@pytest.mark.usefixtures("place")
def test_a_pipe_or_device_is_no_image():
    os.mkfifo("photos/cat/pipe.png")
    assert len(open_images("photos").names) == 4


@pytest.mark.usefixtures("place")
def test_file_names_of_any_bytes_are_opened_and_printable():
    with open(os.fsencode("photos/cat/") + b"\xff\n.png", "wb") as file:
        Image.new("RGB", (8, 8), "red").save(file, "PNG")
    source = open_images("photos")
    index = source.names.index("cat/\\udcff\\n.png")
    assert source.open(index).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("", "--images is empty"),
        ("./photo", r"no folder or tar file at ./photo \(did you mean ./photos\?\)"),
        ("photos/cats/1.png", "no folder or tar file at photos/cats/1.png"),
        ("photos/cat/3.png", r"did you mean photos/cat/\d.png"),
        ("a" * 5000, "cannot be the name of a Hugging Face data set"),
        ("my photos", r"no folder or tar file at my photos \(did you mean photos\?\), and it cannot be the name"),
        ("stream:/no/where", "no folder or tar file at /no/where, and it cannot be the name"),
        ("x-{0..999999999}.tar", "names more than 1,000,000 files"),
        ("x-{0..99999999999999999999999999}.tar", "names more than 1,000,000 files"),
        ("x-" + "{a,b}" * 30, "names more than 1,000,000 files"),
        ("{" + "{a..z}" * 20 + ",b}", "names more than 1,000,000 files"),
        ("x-{0..3.tar", "has braces that do not match"),
        ("photos/{cat,owl}", "no file or folder at photos/owl, which photos/{cat,owl} names"),
        ("photos/*.jpg", r"no file or folder at photos/\*.jpg"),
        ("*", "fits .*notes.txt, which is neither a folder nor an image"),
    ],
)
def test_a_location_that_leads_nowhere_is_refused_at_once(location, reason, place, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: pytest.fail("Hugging Face was called"))
    (place / "notes.txt").write_text("")
    with pytest.raises(TokenGameError, match=reason):
        open_images(location)


@pytest.mark.parametrize("location", ["photo", "stream:photo"])
def test_a_mistyped_folder_costs_one_quick_request(location, place, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="pip install tokengame[hub]")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("tried again and again"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
    waits = []

    def unreachable(_, name, timeout):
        waits.append((name, timeout))
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    sentence = (
        r"no folder or tar file at photo \(did you mean photos\?\), and Hugging Face cannot be reached \(no network\)"
    )
    with pytest.raises(TokenGameError, match=sentence):
        open_images(location)
    assert waits == [("photo", hub.ANSWER_SECONDS)]


def test_a_data_set_in_the_cache_needs_no_network(place, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="pip install tokengame[hub]")

    def unreachable(*_, **__):
        raise ConnectionError("no network")

    def loaded(name, **_):
        raise RuntimeError(f"{name} loaded")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
    monkeypatch.setattr(datasets, "load_dataset", loaded)
    (place / "cache" / "me___my_photos" / "default" / "0.0.0" / "abc").mkdir(parents=True)
    with pytest.raises(TokenGameError, match="me/MyPhotos loaded"):
        open_images("me/MyPhotos")


@pytest.mark.parametrize(
    ("file", "advice"), [("1.tar", r"it has tars: --images 'set/\*.tar' reads them"), ("1.zip", "unpack 1.zip")]
)
def test_a_folder_of_archives_says_what_to_do(file, advice, place):
    (place / "set").mkdir()
    (place / "set" / file).write_bytes(b"")
    with pytest.raises(TokenGameError, match=f"no image in set .*{advice}"):
        open_images("set")
