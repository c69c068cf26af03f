"""The page of `tokengame demo`: what is behind it, and the real command in a real browser."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
from urllib.request import urlopen

import browser as chrome
import numpy as np
import pytest
import timm
import torch
from conftest import policy_for, tiny_vit
from PIL import Image

from tokengame.backbones import load_model, wrap
from tokengame.cli.demo import require_free
from tokengame.cli.main import main, parse
from tokengame.data.scenes import CLASSES, FashionScenes
from tokengame.data.transforms import to_rgb, transform_for
from tokengame.errors import TokenGameError
from tokengame.report.class_names import class_names
from tokengame.report.demo import DemoPage, verdict
from tokengame.report.figures import overlay
from tokengame.report.side_by_side import SideBySide
from tokengame.runtime import prune


@pytest.fixture(scope="module")
def scenes():
    """Some examples, as pictures and as the embedded model takes them."""
    pictures = [FashionScenes("test", 8, seed=4)[index].image for index in range(8)]
    prepare = transform_for(wrap(load_model("fashion")).preprocessing(), train=False)
    return pictures, torch.stack([prepare(to_rgb(picture)) for picture in pictures])


@pytest.fixture(scope="module")
def models(scenes):
    """The embedded model, and pruned by the starting rule with thresholds, as the command's default is."""
    model = load_model("fashion")
    fast = prune(model, images=scenes[1].repeat(4, 1, 1, 1), progress=False)
    return SideBySide(fast, CLASSES, scenes[1])


def image_file(folder, picture, name="photo.png"):
    picture.save(folder / name)
    return folder / name


@pytest.mark.parametrize("dial", [0.0, 0.5, 0.9])
def test_both_answers_are_those_of_the_models(models, scenes, dial):
    """Probabilities against a softmax of the model's own call, compute against PrunedViT's count."""
    native, fast = load_model("fashion"), prune(load_model("fashion"), images=scenes[1].repeat(4, 1, 1, 1))
    fast.dial = dial
    for photo in scenes[1][:3]:
        found = models.compare(photo, dial)
        with torch.no_grad():
            for answer, model in ((found.native, native), (found.pruned, fast)):
                best = model(photo[None]).softmax(1)[0].topk(5)
                assert [number for number, _ in answer.best] == best.indices.tolist()
                assert [share for _, share in answer.best] == pytest.approx(best.values.tolist(), abs=1e-4)
        before, after = fast.macs(fast.predict(photo[None]))
        assert found.native.gmacs == pytest.approx(before / 1e9)
        assert found.pruned.gmacs == pytest.approx(float(after) / 1e9)
        assert found.same == (found.native.best[0][0] == found.pruned.best[0][0])
        assert min(found.native.milliseconds, found.pruned.milliseconds, found.unpruned_milliseconds) > 0
    if dial == 0:
        assert found.same
        assert found.strip.counts == [196] * 4


def test_the_tokens_shown_are_those_kept(models, scenes):
    """Each panel is compared with the photo itself, faded where a token is gone."""
    picture, photo = scenes[0][2], scenes[1][2]
    found = models.compare(photo, 0.7, side=112)  # the size of a scene, so that nothing is resized
    models.fast.dial = 0.7
    output = models.fast.predict(photo[None])
    pixels = np.asarray(to_rgb(picture))
    drawn = np.asarray(found.strip.picture)
    panels = [drawn[:112, left : left + 112] for left in range(0, drawn.shape[1], 112 + 6)]
    assert np.abs(panels[0].astype(int) - pixels).max() <= 1
    last = output.alive[0].numpy()
    assert np.abs(panels[-1].astype(int) - overlay(pixels, last, (14, 14))).max() <= 1
    assert 0 < last.sum() < 196
    counts = [196]
    for panel in panels[1:]:
        same = np.abs(panel.astype(int) - pixels).reshape(14, 8, 14, 8, 3).max((1, 3, 4)) <= 1
        counts.append(int(same.sum()))
    assert counts == found.strip.counts
    assert counts[-1] == last.sum()


def test_neighbours_of_an_embedding(scenes):
    """Found again by an exhaustive search; an example is no neighbour of its own."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=112, embed_dim=48, depth=4, num_heads=2, num_classes=0
    ).eval()
    examples, fast = scenes[1], prune(model, gmacs_ratio=0.6)
    models = SideBySide(fast, (), examples)
    found = models.compare(examples[3], fast.dial, example=3)
    with torch.no_grad():
        native, pruned = model(examples), fast(examples[3:4])
    for answer, query in ((found.native, native[3:4]), (found.pruned, pruned)):
        near = torch.cosine_similarity(query, native).argsort(descending=True).tolist()
        assert [number for number, _ in answer.best] == [number for number in near if number != 3][:5]
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(native[3], pruned[0], dim=0)), abs=1e-4)
    html = DemoPage(models).example(3, fast.dial)[2]
    assert html.count("data:image/png") == 10
    assert "nearest example, cosine" in html
    with pytest.raises(TokenGameError, match="two example photos"):
        SideBySide(fast, (), examples[:1])


def test_a_broken_file_gets_a_sentence(models, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not a photo")
    photo, picture, html = DemoPage(models).uploaded(str(tmp_path / "broken.jpg"), 0.5)
    assert photo is picture is None
    assert "Cannot read broken.jpg (the file is no JPEG" in html
    assert "Traceback" not in html


def test_an_upload_is_shown_as_the_model_sees_it(models, scenes, tmp_path):
    path = image_file(tmp_path, scenes[0][5])
    photo, _, html = DemoPage(models).uploaded(str(path), 0.5)
    assert torch.equal(photo.pixels, scenes[1][5])
    assert re.search(r"196 → \d+ → \d+ → \d+ tokens", html)


def test_class_names_are_text_not_html(models, scenes):
    spiteful = SideBySide(models.fast, ["<script>", *CLASSES[1:]], scenes[1])
    html = DemoPage(spiteful).example(0, 0.5)[2]
    assert "<script>" not in html


def test_the_verdict_says_slower_where_slower(models, scenes):
    found = models.compare(scenes[1][0], 0.5)
    slow = type(found)(found.strip, found.pruned, found.native, found.unpruned_milliseconds)
    texts = sorted([verdict(found, True), verdict(slow, True)], key=lambda text: "slower" in text)
    assert ["slower: 0." in text for text in texts] == [False, True]


def test_classes_have_names(tmp_path):
    assert class_names(wrap(tiny_vit())) == [f"class {number}" for number in range(5)]
    imagenet = class_names(wrap(tiny_vit(num_classes=1000)))
    assert (imagenet[0], imagenet[999], len(imagenet)) == ("tench", "toilet tissue", 1000)
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne f\n")
    assert class_names(wrap(tiny_vit()), str(tmp_path / "names.txt")) == ["a", "b", "c", "d", "e f"]
    assert class_names(wrap(tiny_vit(num_classes=0))) == []


def test_the_dial_of_a_policy(scenes):
    model = tiny_vit(img_size=112)
    policy = policy_for(model)
    models = SideBySide(prune(model, policy), [f"class {n}" for n in range(5)], scenes[1])
    kept = [sum(models.compare(scenes[1][0], dial).strip.counts) for dial in (0.0, 0.3, 0.5, 0.7, 1.0)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]


def test_bad_flags_get_a_sentence(capsys):
    assert main(["demo", "--host", "no.such.host.invalid"]) == 2
    assert "cannot serve at no.such.host.invalid:7860" in capsys.readouterr().err
    assert main(["demo", "--port", "0"]) == 2
    assert "--port must be a whole number from 1 to 65,535, not 0" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 2
        assert f"cannot serve at 127.0.0.1:{port} (" in capsys.readouterr().err
    assert parse(["demo"]).backbone == "fashion"


def test_without_gradio_a_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    assert main(["demo", "--port", str(free_port())]) == 2
    assert "pip install tokengame[demo]" in capsys.readouterr().err


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of the real command with the embedded model; at the end it is interrupted as by Ctrl-C."""
    pytest.importorskip("gradio", reason="pip install tokengame[demo]")
    port, folder = free_port(), tmp_path_factory.mktemp("served")
    require_free("127.0.0.1", port)
    command = [sys.executable, "-m", "tokengame", "demo", "--port", str(port), "--count", "6", "--json"]
    environment = os.environ | {"TMPDIR": str(folder)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("open http"):
            break
    assert process.poll() is None, "".join(said)
    yield said[-1].split()[1]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.strip() == f'{{"url": "http://127.0.0.1:{port}/"}}'
    assert "Traceback" not in err
    assert not list(folder.glob("tokengame-demo-*")), "uploaded photos are deleted"


@pytest.mark.skipif(chrome.missing() is not None, reason=str(chrome.missing()))
def test_in_a_browser(served, scenes, tmp_path):
    photo = image_file(tmp_path, scenes[0][6])
    (tmp_path / "broken.jpg").write_bytes(photo.read_bytes()[:60])
    with chrome.chromium(tmp_path / "profile") as browser:
        page = chrome.Page(browser, served)
        assert re.search(r"[0-9.]+ GMACs · [0-9.]+ ms", page.text)
        first = page.picture

        page.upload(photo)
        assert page.picture != first
        uploaded, counts = page.picture, kept(page.text)
        with urlopen(uploaded) as answer:  # the picture that is shown: the photo and three stages
            assert Image.open(io.BytesIO(answer.read())).size[0] == 4 * 224 + 3 * 6

        page.move_dial(0.8)
        chrome.until(browser, lambda: page.picture != uploaded)
        assert sum(kept(page.text)) < sum(counts)
        page.move_dial(0)
        assert kept(page.text) == [196] * 4
        assert "Same prediction" in page.text

        page.upload(tmp_path / "broken.jpg")
        assert "Cannot read broken.jpg (" in page.text
        chrome.until(browser, lambda: not page.picture)

        page.take(3)
        chrome.until(browser, lambda: page.picture)
        assert "Same prediction" in page.text
        assert page.picture not in (first, uploaded)

        elsewhere = [url for url in chrome.requests(browser) if not url.startswith(served)]
        assert not elsewhere, "nothing is loaded from another place"
        errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not errors


def kept(text: str) -> list[int]:
    """Tokens of the pruned model at the start and after each stage."""
    return [int(count) for count in re.search(r"(\d+(?: → \d+)+) tokens", text)[1].split(" → ")]
