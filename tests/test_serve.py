"""The server example in a real process on loopback, compared with the pruned model run directly, image by image."""

import csv
import io
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
import tyro
from PIL import Image

import tokengame
from tokengame.backbones import load_model
from tokengame.data.datasets import open_images
from tokengame.data.scenes import CLASSES
from tokengame.data.transforms import transform_for

for package in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
    pytest.importorskip(package, reason="pip install tokengame[serve]")
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DIALS = {"fast": 0.8, "balanced": 0.5, "exact": 0.0}
MAX_BYTES = 200_000
FORM = b'--edge\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n--edge--\r\n'
TYPE = {"Content-Type": "multipart/form-data; boundary=edge"}


def rgb(content):
    return Image.open(io.BytesIO(content)).convert("RGB")


@pytest.fixture(scope="module")
def files():
    """Many different images, as they are sent."""
    scenes, found = open_images("fashion"), []
    for number in range(48):
        file = io.BytesIO()
        scenes.open(number).save(file, "PNG")
        found.append(file.getvalue())
    return found


@pytest.fixture(scope="module")
def native():
    return load_model("fashion")


@pytest.fixture(scope="module")
def expected(files, native):
    """(service, image): what the pruned model says about the image alone."""
    fast = tokengame.prune(native)
    transform, found = transform_for(fast.game.backbone.preprocessing(), train=False), {}
    for service, fast.dial in DIALS.items():
        for number, content in enumerate(files):
            found[service, number] = fast.predict(transform(rgb(content))[None])
    return found


@pytest.fixture(scope="module")
def modules():
    """Both examples, imported as they import each other."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import load_test
        import serve

        yield serve, load_test
    finally:
        sys.path.remove(str(EXAMPLES))


class Server:
    """The example in a process of its own, on a free port."""

    def __init__(self, *flags):
        command = [sys.executable, str(EXAMPLES / "serve.py"), "--backbone", "fashion", "--port", "0", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        assert "http://" in line, self.process.communicate()[1]
        self.port = int(re.search(r":(\d+): ", line).group(1))

    def send(self, method, path, body=None, headers=None):
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()

    def predict(self, content, service=None, headers=None):
        status, body = self.send("POST", "/predict" + (f"?service={service}" if service else ""), content, headers)
        return status, json.loads(body)

    def metrics(self):
        """(name, service, code or None): value; buckets left out."""
        families = text_string_to_metric_families(self.send("GET", "/metrics")[1].decode())
        samples = [sample for family in families for sample in family.samples if "le" not in sample.labels]
        return Counter({(s.name, s.labels.get("service"), s.labels.get("code")): s.value for s in samples})

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        out, errors = self.process.communicate(timeout=60)
        return self.process.returncode, out, errors


@pytest.fixture(scope="module")
def server():
    dials = [word for name, dial in DIALS.items() for word in ("--dial", f"{name}={dial}")]
    running = Server(*dials, "--batch-size", "8", "--wait-ms", "20", "--max-bytes", str(MAX_BYTES))
    yield running
    code, out, errors = running.stop()
    assert (code, out) == (0, "stopped\n"), errors
    assert "Traceback" not in errors


def assert_answers(answer, output, service):
    """An answer of the server is what the model says about the image alone."""
    probabilities = output.logits[0].softmax(0)
    assert answer["service"] == service
    assert answer["dial"] == DIALS[service]
    assert answer["kept"] == [int(kept) for kept in output.kept]
    assert answer["tokens"] == output.total
    assert len(answer["top"]) == 5
    for top, number in zip(answer["top"], probabilities.argsort(descending=True), strict=False):
        assert (top["class"], top["name"]) == (int(number), CLASSES[int(number)])
        assert top["probability"] == pytest.approx(float(probabilities[number]), abs=1e-4)
    assert answer["milliseconds"] > 0


def test_an_answer_is_what_the_pruned_model_gives(server, files, expected, native):
    fast = tokengame.prune(native)
    for number, service in enumerate(DIALS):
        status, answer = server.predict(files[number], service)
        assert status == 200
        assert_answers(answer, expected[service, number], service)
        fast.dial = DIALS[service]
        unpruned, pruned = fast.macs(expected[service, number])
        assert answer["compute"] == pytest.approx(float(pruned[0]) / unpruned)
    assert server.predict(files[0])[1]["service"] == "fast", "the first is for requests that name none"


def test_a_form_is_taken_too(server, files, expected):
    body = FORM % (b"image", b'; filename="photo.png"', files[3])
    status, answer = server.predict(body, "balanced", TYPE)
    assert status == 200
    assert_answers(answer, expected["balanced", 3], "balanced")


def test_many_at_once_are_batched_and_each_gets_its_own_answer(server, files, expected):
    """Three classes of service in one queue of clients, with bad requests between them."""
    before = server.metrics()
    work = [(service, number) for number in range(len(files)) for service in (*DIALS, None)]

    def one(item):
        service, number = item
        return server.predict(files[number], service) if service else server.predict(files[number][:999])

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(one, work))
    for (service, number), (status, answer) in zip(work, answers, strict=True):
        assert status == (200 if service else 422)
        if service:
            assert_answers(answer, expected[service, number], service)
            assert 1 <= answer["batch"] <= 8
    change = server.metrics()
    change.subtract(before)
    for service in DIALS:
        assert change["tokengame_requests_total", service, "200"] == len(files)
        assert change["tokengame_request_seconds_count", service, None] == len(files)
        assert change["tokengame_batch_images_sum", service, None] == len(files)
        assert change["tokengame_batch_images_count", service, None] <= len(files) / 2, "they went in batches"
        kept = sum(int(expected[service, n].kept[-1]) / expected[service, n].total for n in range(len(files)))
        assert change["tokengame_kept_share_sum", service, None] == pytest.approx(kept)
    assert change["tokengame_compute_share_sum", "fast", None] < change["tokengame_compute_share_sum", "exact", None]
    assert change["tokengame_requests_total", "fast", "422"] == len(files)
    assert server.metrics()["tokengame_images_per_second", None, None] > 0


BAD = {
    "empty": (b"", None, {}, 400, "the body is empty"),
    "no image": (b"hello", None, {}, 422, "cannot be read as an image: the file is no JPEG"),
    "cut short": (1000, None, {}, 422, "cannot be read as an image"),
    "too large": (bytes(MAX_BYTES + 1), None, {}, 413, "larger than 200,000 bytes"),
    "unknown service": (None, "best", {}, 404, "no service 'best'; there are fast, balanced, exact"),
    "a form without a file": (FORM % (b"image", b"", b"x"), None, TYPE, 400, "the form has no file"),
    "a form of nothing": (b"x", None, {"Content-Type": "multipart/form-data"}, 400, "the form cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_a_code_and_one_sentence(server, files, expected, case):
    content, service, headers, code, words = BAD[case]
    content = files[5][:content] if isinstance(content, int) else files[5] if content is None else content
    status, answer = server.predict(content, service, headers)
    assert (status, list(answer)) == (code, ["detail"])
    assert words in answer["detail"]
    assert "\n" not in answer["detail"]
    status, answer = server.predict(files[5], "exact")
    assert status == 200, "the next request is answered"
    assert_answers(answer, expected["exact", 5], "exact")


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(server):
    file = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(file, "PNG")
    status, answer = server.predict(file.getvalue())
    assert status == 422
    assert "12,000 x 12,000 pixels" in answer["detail"]


def test_a_connection_that_breaks_off_harms_no_other(server, files, expected):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\nsome of it")
    status, answer = server.predict(files[7], "fast")
    assert status == 200
    assert_answers(answer, expected["fast", 7], "fast")


def test_health_says_what_is_served(server):
    status, body = server.send("GET", "/health")
    found = json.loads(body)
    assert (status, found["status"], found["backbone"]) == (200, "ok", "fashion")
    assert found["services"] == {name: {"dial": dial, "agreement": None} for name, dial in DIALS.items()}


def test_a_full_server_says_so_and_a_stopped_one_answers_what_is_inside(files, expected):
    server = Server("--dial", "fast=0.8", "--max-waiting", "3", "--wait-ms", "1000", "--batch-size", "64")
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(server.predict, files[:12]))
    for number, (status, answer) in enumerate(answers):
        if status == 200:
            assert_answers(answer, expected["fast", number], "fast")
        else:
            assert (status, answer) == (503, {"detail": "3 requests are inside already: try again later"})
    assert {status for status, _ in answers} == {200, 503}
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.request("POST", "/predict", files[20])
        for _ in range(3):  # by then the request is inside
            server.send("GET", "/health")
        server.process.send_signal(signal.SIGTERM)
        assert_answers(json.loads(connection.getresponse().read()), expected["fast", 20], "fast")
    out, errors = server.process.communicate(timeout=60)
    assert (server.process.returncode, out) == (0, "stopped\n"), errors


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    """Some of the images on disk."""
    place = tmp_path_factory.mktemp("operator")
    for number in range(40):
        (place / f"{number:02}.png").write_bytes(files[number])
    return place


def test_agreement_is_counted_at_each_dial(modules, native, files, folder):
    fast, dials = tokengame.prune(native), {"hard": 0.95, "exact": 0.0}
    found = modules[0].measured(native, fast, dials, str(folder))
    transform = transform_for(fast.game.backbone.preprocessing(), train=False)
    views = torch.stack([transform(rgb(content)) for content in files[:40]])
    with torch.no_grad():
        wanted = native(views).argmax(1)
    fast.dial = 0.95
    assert found == {"hard": pytest.approx(float((fast(views).argmax(1) == wanted).float().mean())), "exact": 1.0}
    assert found["hard"] < 1


def test_no_dial_below_the_floor_is_served(modules, folder, capsys):
    flags = ["--backbone", "fashion", "--dial", "hard=1", "--dial", "exact=0", "--images", str(folder)]
    assert modules[0].main([*flags, "--least-agreement", "0.99"]) == 2
    said = capsys.readouterr()
    (sentence,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert re.search(
        r"--least-agreement is 99.0% .*: hard=1 \(\d+\.\d%\); give a lower dial, or a lower floor", sentence
    )
    assert "exact=0" not in sentence
    assert said.out == "", "nothing was served"


def test_a_floor_that_all_dials_meet_lets_them_through(modules, folder):
    serve = modules[0]
    settings = serve.Serve(backbone="fashion", dial=("exact=0",), images=str(folder), least_agreement=1.0)
    assert serve.Engine(settings).agreement == {"exact": 1.0}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dial", "fast"], "--dial takes NAME=DIAL"),
        (["--dial", "fast=1.5"], "--dial takes NAME=DIAL"),
        (["--dial", "fast=nan"], "--dial takes NAME=DIAL"),
        (["--dial", "fast=0.1", "--dial", "fast=0.2"], "--dial has a name twice"),
        (["--least-agreement", "0.9"], "name some with --images"),
        (["--least-agreement", "95", "--images", "fashion"], "--least-agreement must be a number from 0 to 1, not 95"),
        (["--batch-size", "0"], "--batch-size must be a whole number from 1"),
        (["--class-map", "nowhere.txt"], "no class map at nowhere.txt"),
        (["--policy", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_mistakes_in_flags_get_a_sentence(modules, flags, words, capsys):
    assert modules[0].main(["--backbone", "fashion", *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_port_that_is_taken_gets_a_sentence(modules, server, capsys):
    assert modules[0].main(["--backbone", "fashion", "--port", str(server.port)]) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_the_load_test_finds_every_answer_right(tmp_path):
    flags = ["--backbone", "fashion", "--images", "fashion", "--requests", "120", "--concurrency", "8", "--rounds", "2"]
    command = [sys.executable, str(EXAMPLES / "load_test.py"), *flags, "--threads", "1", "--output", "result.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "result.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["server"], row["requests"], row["errors"], row["wrong"]) for row in rows] == [
        ("all_tokens", "120", "0", "0"), ("pruned", "120", "0", "0"),
    ]  # fmt: skip
    for row in rows:
        assert 0 < float(row["median_ms"]) <= float(row["p95_ms"]) <= float(row["p99_ms"])
        assert float(row["requests_per_second"]) > 0
        assert row["tokengame"] == tokengame.__version__
        assert row["command"].startswith("load_test.py --backbone fashion")
    assert float(rows[1]["compute"]) < float(rows[0]["compute"])


def test_the_load_test_counts_what_is_wrong(modules):
    module = modules[1]
    right = module.Expected(torch.tensor([0.7, 0.2, 0.1]), [3])
    top = [{"class": 0, "probability": 0.7}, {"class": 1, "probability": 0.2}]

    def tally(status=200, **changes):
        found = module.Tally([right], 1e-3)
        body = json.dumps({"top": top, "kept": [3], "compute": 0.5} | changes).encode()
        found.check(module.Answer(0, 0.01, status, body))
        return found.errors, found.wrong, found.other_tokens

    assert tally() == (0, 0, 0)
    assert tally(status=503) == (1, 0, 0)
    assert tally(top=top[::-1]) == (0, 1, 0), "another class"
    assert tally(top=[{"class": 0, "probability": 0.69}]) == (0, 1, 0), "another probability"
    assert tally(kept=[4]) == (0, 0, 1)


def test_files_are_sent_as_they_are(modules, files, tmp_path):
    (tmp_path / "0.png").write_bytes(files[0])
    assert modules[1].encoded(open_images(str(tmp_path)).open(0)) == files[0]
    scene = open_images("fashion").open(0)
    assert Image.open(io.BytesIO(modules[1].encoded(scene))).tobytes() == scene.tobytes()


def test_command_lines_of_the_page_parse(modules):
    page = (ROOT / "docs" / "serving.md").read_text()
    kinds = {"examples/serve.py": modules[0].Serve, "examples/load_test.py": modules[1].LoadTest}
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", page, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["python"]:
                found.append(words[1])
                tyro.cli(kinds[words[1]], args=words[2:])
    assert set(found) == set(kinds)
