"""What is an image: formats, bounds, and any failure of a decoder or transform is an unreadable image."""

import gc
import io
import logging
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile
from timm.data import ImageDataset
from torchvision.datasets import ImageFolder

from tokengame.data.batches import BadImages, checked, plain_views, require_readable
from tokengame.data.datasets import open_images
from tokengame.data.decode import EXTENSIONS, MAX_PIXELS, decoded, open_image, viewed
from tokengame.data.transforms import BAND, to_rgb
from tokengame.errors import TokenGameError

PREPROCESSING = {"input_size": [3, 16, 16], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3,
                 "crop_pct": 1.0, "crop_mode": "center"}  # fmt: skip


def noise(mode="RGB", size=(40, 30)):
    shape = (size[1], size[0], len(Image.new(mode, (1, 1)).getbands()))
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8).squeeze(), mode)


def encoded(image, kind, **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def outcome(content):
    return decoded(lambda: open_image(content))


def png_header(width, height):
    """A PNG of any size in 60 bytes, with no pixels in it."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def tiff_of_tiles(side):
    tags = [(256, 100), (257, 100), (258, 8), (259, 8), (262, 1), (277, 1)]  # 100 x 100 pixels of 8 bits, deflated
    tags += [(322, side), (323, side), (324, 8), (325, 9)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


FAILURES = [OverflowError, NotImplementedError, RuntimeError, TypeError, MemoryError, struct.error, zlib.error,
            RecursionError, KeyError, AttributeError, Image.DecompressionBombError]  # fmt: skip


@pytest.mark.parametrize("kind", FAILURES)
def test_any_failure_of_a_decoder_or_transform_is_the_reason(kind):
    def fail(*_):
        raise kind("planted\nsecond line")

    def good():
        return noise()

    assert "planted" in decoded(fail)
    assert "planted" in viewed(good, fail)
    assert "\n" not in decoded(fail) + viewed(good, fail)


def test_what_stops_a_program_is_no_property_of_an_image():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoded(stop)


@pytest.mark.parametrize("kind", ["AVIF", "JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_damaged_files_are_read_or_skipped(kind):
    good = encoded(noise(), kind)
    flipped = (good[:k] + bytes([good[k] ^ 255]) + good[k + 1 :] for k in range(0, min(len(good), 400), 3))
    assert all(isinstance(outcome(content), Image.Image | str) for content in (*flipped, good[:-9]))
    assert not isinstance(outcome(good), str)


def test_an_unreadable_image_is_counted_and_the_others_measured(tmp_path):
    """A DDS named .png, an empty file, and an image that is absurdly long, among sixty."""
    for i in range(60):
        noise().save(tmp_path / f"{i}.png")
    (tmp_path / "a.png").write_bytes(encoded(noise("RGBA"), "DDS"))
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.png").write_bytes(png_header(100_000_000, 1))
    source = open_images(str(tmp_path))
    tally = BadImages(len(source.names))
    assert sum(len(batch.index) for batch in checked(plain_views(source, PREPROCESSING).loader(16, 0), tally)) == 60
    assert sorted(tally.reasons) == ["a.png", "b.png", "c.png"]
    assert tally.reasons["b.png"] == "the file is empty"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png_header(100_000_000, 1), "pixels are more than"),
        (png_header(1, 100_000_000), "pixels are more than"),
        (png_header(13_000, 13_000), "pixels are more than"),
        (png_header(2**31 - 1, 2**31 - 1), "exceeds limit"),
        (png_header(MAX_PIXELS // 5_000 + 1, 5_000), "pixels are more than"),
        (png_header(60_000, 1), "one side is more than 100 times the other"),
        (png_header(3, 301), "one side is more than 100 times the other"),
        (tiff_of_tiles(45_000), "tiles of"),
    ],
)
def test_an_image_too_large_is_refused_before_it_is_decoded(content, reason, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    assert reason in outcome(content)


def test_costly_formats_may_have_half_the_pixels():
    content = encoded(Image.new("RGB", (6_000, 4_500)), "WEBP", lossless=True, method=0, quality=0)
    assert len(content) < 1_000
    assert "more than 25,000,000" in outcome(content)


def test_no_other_program_is_ever_started(monkeypatch):
    """Pillow has Ghostscript interpret EPS files, whatever they are named."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("started"))
    content = encoded(noise(), "EPS")
    assert outcome(content) == "the file is no JPEG, PNG, WEBP, AVIF, BMP, GIF, TIFF, PPM image, or damaged"


def test_every_extension_is_found_and_the_content_decides(tmp_path):
    for extension in EXTENSIONS:
        (tmp_path / f"x{extension.upper()}").write_bytes(encoded(noise(), "PNG"))
    source = open_images(str(tmp_path))
    assert len(source.names) == len(EXTENSIONS)
    for index in range(len(source.names)):
        assert np.array_equal(decoded(lambda index=index: source.open(index)), noise())


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG", "AVIF"])
def test_the_first_of_several_frames_is_read(kind):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("white", "black", "black")]
    settings = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
    assert np.asarray(outcome(content)).min() >= 250


def test_exif_orientation_is_ignored_as_by_timm_and_torchvision(tmp_path):
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    noise(size=(40, 30)).save(tmp_path / "a" / "x.jpg", exif=exif)
    own = decoded(lambda: open_images(str(tmp_path)).open(0))
    with warnings.catch_warnings(action="ignore"):  # timm leaves the file open
        timms = ImageDataset(str(tmp_path))[0][0]
        gc.collect()
    assert own.size == (40, 30)
    assert np.array_equal(own, timms)
    assert np.array_equal(own, ImageFolder(str(tmp_path))[0][0])


def test_decoders_that_warn_and_log_are_neither_errors_nor_noise(capfd):
    def odd():
        warnings.warn("corrupt EXIF", UserWarning, stacklevel=1)
        logging.getLogger("PIL.TiffImagePlugin").error("more samples than can be decoded")
        return noise()

    with warnings.catch_warnings(action="error"):
        assert not isinstance(decoded(odd), str)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "LA"])
def test_large_images_are_converted_in_bands_to_the_same(mode):
    image = noise(mode, (7, 2 * BAND + 30))
    expected = image.convert("RGBA")
    if "A" in mode:
        expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), expected)
    assert np.array_equal(to_rgb(image), expected.convert("RGB"))


def test_float_images_share_one_scale_over_bands():
    values = np.linspace(0, 40, 3 * BAND, dtype=np.float32)[:, None].repeat(32, 1)
    found = np.asarray(to_rgb(Image.fromarray(values)))[:, 0, 0]
    assert np.array_equal(found, (values[:, 0] / 40 * 255).astype(np.uint8))
    values[-1] = np.nan
    assert decoded(lambda: Image.fromarray(values)) == "a pixel is no finite number"


def folder_with(tmp_path, good, bad):
    for i in range(good):
        noise(size=(4, 4)).save(tmp_path / f"good{i:04}.png")
    for i in range(bad):
        (tmp_path / f"bad{i:04}.png").write_bytes(b"no image")
    return open_images(str(tmp_path))


@pytest.mark.parametrize(("good", "bad"), [(0, 1), (10, 1), (57, 4), (200, 60)])
def test_too_many_unreadable_images_are_found_before_anything_else(good, bad, tmp_path):
    with pytest.raises(TokenGameError, match=r"images tried cannot be read \(more than 5 %\), the first is bad0"):
        require_readable(folder_with(tmp_path, good, bad))


@pytest.mark.parametrize(("good", "bad"), [(20, 1), (60, 3), (190, 10)])
def test_up_to_five_percent_unreadable_images_are_never_refused(good, bad, tmp_path):
    require_readable(folder_with(tmp_path, good, bad))
