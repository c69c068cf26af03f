"""A load test of examples/serve.py on loopback: all tokens beside pruned, in turn, every answer checked.

    python examples/load_test.py --backbone vit_tiny_patch16_224 --weights vit_tiny.safetensors --images photos/

Both servers run the same kernels on the same threads and differ in the dial alone: 0 keeps all tokens. Rounds alternate
between them, so that what else the machine does affects both. Before, this process predicts each image alone with the
same model; an answer is wrong if its class differs, or a probability by more than the tolerance. The client shares the
cores with the server: its processor time is in the table, beside the server's.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.request import urlopen

import numpy as np
import torch
import tyro
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serve import Serve
from torch import Tensor

from tokengame import TokenGameError
from tokengame.data.datasets import open_images
from tokengame.data.decode import open_image, viewed
from tokengame.data.transforms import transform_for
from tokengame.files import write_csv
from tokengame.measure.conditions import conditions
from tokengame.ranges import Range, require
from tokengame.report.console import console, progress, show_rows

SERVER = Path(__file__).parent / "serve.py"
METRICS = ("tokengame_batch_images_count", "tokengame_batch_images_sum", "process_cpu_seconds_total")
"""of a server, read before and after a round"""
WARM_UP = 64
"""requests to each server that are not counted"""
SHOWN = {
    "server": "server",
    "requests_per_second": "req/s",
    "median_ms": "median ms",
    "p95_ms": "p95",
    "p99_ms": "p99",
    "mean_batch": "batch",
    "errors": "errors",
    "wrong": "wrong",
    "compute": "compute",
}
"""columns of the table and their headings"""


@dataclass(kw_only=True)
class LoadTest:
    """Send the same requests to a server that keeps all tokens and to one that prunes, and check every answer."""

    backbone: str
    """as for examples/serve.py"""
    images: str
    """a folder or tar of photos, whose files are sent as they are; "fashion": embedded scenes"""
    weights: str | None = None
    """local checkpoint"""
    policy: str | None = None
    """as for examples/serve.py"""
    dial: Annotated[float | None, Range(0, 1)] = None
    """of the pruned server; by default the policy's recommendation"""
    requests: Annotated[int, Range(1, 10**7, whole=True)] = 10_000
    """to each server"""
    concurrency: Annotated[int, Range(1, 512, whole=True)] = 32
    """connections, each with one request at a time"""
    batch_size: Annotated[int, Range(1, 4096, whole=True)] = 32
    """of the servers, at most"""
    rounds: Annotated[int, Range(1, 1000, whole=True)] = 10
    """turns of each server"""
    threads: Annotated[int, Range(1, 4096, whole=True)] = 2
    """of the model in each server"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """what the models compute in"""
    tolerance: Annotated[float, Range(0, 1)] = 1e-3
    """largest difference of a probability: images that are computed in a batch differ by rounding"""
    output: Path = Path("build/serving.csv")
    """result file"""

    def settings(self) -> Serve:
        """Those of the servers."""
        given = {"weights": self.weights, "policy": self.policy, "dtype": self.dtype, "batch_size": self.batch_size}
        return Serve(backbone=self.backbone, max_waiting=2 * self.concurrency, **given)  # type: ignore[arg-type]

    def flags(self, name: str, dial: float) -> list[str]:
        """The command line of a server with one class of service."""
        settings, wanted = self.settings(), ("backbone", "weights", "policy", "dtype", "batch_size", "max_waiting")
        pairs = [(f"--{name.replace('_', '-')}", getattr(settings, name)) for name in wanted]
        given = [str(word) for pair in pairs if pair[1] is not None for word in pair]
        return [sys.executable, str(SERVER), *given, "--dial", f"{name}={dial}", "--port", "0"]


class Answer(NamedTuple):
    """What came back for an image; status 0 where nothing did."""

    image: int
    seconds: float
    status: int
    body: bytes


class Expected(NamedTuple):
    """What the model says about an image that it is given alone."""

    probabilities: Tensor  # [classes]
    kept: list[int]


@dataclass
class Tally:
    """All rounds of one server."""

    expected: list[Expected]
    tolerance: float
    seconds: list[float] = field(default_factory=list)
    """of each round"""
    latencies: list[float] = field(default_factory=list)
    cpu: float = 0.0
    """seconds of this process"""
    metrics: dict[str, float] = field(default_factory=lambda: dict.fromkeys(METRICS, 0.0))
    errors: int = 0
    wrong: int = 0
    other_tokens: int = 0
    """answers made with another number of tokens than the image alone"""
    difference: float = 0.0
    """largest, of a probability"""
    compute: list[float] = field(default_factory=list)

    def check(self, answer: Answer) -> None:
        """Compare an answer with what the model says about its image alone."""
        self.latencies.append(answer.seconds)
        if answer.status != 200:
            self.errors += 1
            return
        found, expected = json.loads(answer.body), self.expected[answer.image]
        pairs = [(top["probability"], float(expected.probabilities[top["class"]])) for top in found["top"]]
        difference = max(abs(one - other) for one, other in pairs)
        same = found["top"][0]["class"] == int(expected.probabilities.argmax())
        self.wrong += not (same and difference <= self.tolerance)
        self.other_tokens += found["kept"] != expected.kept
        self.difference = max(self.difference, difference)
        self.compute.append(found["compute"])

    def row(self, name: str) -> dict[str, Any]:
        """A row of the result file."""
        number = len(self.latencies)
        median, p95, p99 = (1000 * np.percentile(self.latencies, [50, 95, 99])).tolist()
        batches, images, cpu = (self.metrics[key] for key in METRICS)
        return {
            "server": name, "requests": number, "requests_per_second": number / sum(self.seconds),
            "median_ms": median, "p95_ms": p95, "p99_ms": p99, "mean_batch": images / max(batches, 1),
            "errors": self.errors, "wrong": self.wrong, "largest_difference": self.difference,
            "other_tokens": self.other_tokens, "compute": float(np.mean(self.compute or [np.nan])),
            "server_cpu_ms": 1000 * cpu / number, "client_cpu_ms": 1000 * self.cpu / number,
        }  # fmt: skip


def encoded(image: Image.Image) -> bytes:
    """The file that an image, not decoded yet, was opened from; a PNG of one that is from none."""
    file = getattr(image, "fp", None)
    with image:
        if file is not None:
            file.seek(0)
            return file.read()
        image.save(written := io.BytesIO(), "PNG")
        return written.getvalue()


@torch.inference_mode()
def alone(
    settings: Serve, files: list[bytes], dials: dict[str, float | None]
) -> dict[str, tuple[float, list[Expected]]]:
    """By server: its dial, and what the model says about each image alone."""
    _, fast = settings.load()
    transform, dtype = transform_for(fast.game.backbone.preprocessing(), train=False), next(fast.parameters()).dtype
    recommended, found = fast.dial, {}
    for name, wanted in dials.items():
        fast.dial = recommended if wanted is None else wanted
        expected = []
        for content in progress(files, f"expected, {name}", len(files)):
            view = viewed(partial(open_image, content), transform)
            if not isinstance(view, Tensor):
                raise TokenGameError(f"an image of {len(content):,} bytes cannot be read: {view}")
            output = fast.predict(view[None].to(dtype))
            expected.append(Expected(output.logits[0].float().softmax(0), [int(kept) for kept in output.kept]))
        found[name] = fast.dial, expected
    return found


@contextmanager
def servers(commands: list[list[str]], threads: int) -> Iterator[list[str]]:
    """HOST:PORT of each server; all run in this context."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) for words in commands]
    try:
        lines = [next(iter(process.stdout or ()), "") for process in processes]
        require(all("http://" in line for line in lines), "a server did not start; it says above why")
        yield [line.partition("http://")[2].split()[0].rstrip(":") for line in lines]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.communicate()


def read_metrics(address: str) -> dict[str, float]:
    """Those of `METRICS`."""
    with urlopen(f"http://{address}/metrics") as response:
        families = text_string_to_metric_families(response.read().decode())
    samples = [sample for family in families for sample in family.samples]
    return {name: sum(sample.value for sample in samples if sample.name == name) for name in METRICS}


def client(address: str, files: list[bytes], numbers: Iterator[int]) -> list[Answer]:
    """One connection: the next of `numbers`, which all connections share, whenever an answer is there."""
    connection, found = HTTPConnection(address, timeout=60), []
    for number in numbers:  # an iterator of a list gives each number to one thread
        start, status, body = time.perf_counter(), 0, b""
        try:
            connection.request("POST", "/predict", files[number])
            response = connection.getresponse()
            status, body = response.status, response.read()
        except (OSError, HTTPException):  # counted; the next request connects anew
            connection.close()
        found.append(Answer(number, time.perf_counter() - start, status, body))
    connection.close()
    return found


def play(address: str, files: list[bytes], numbers: list[int], concurrency: int, tally: Tally | None) -> None:
    """One round; without a tally a warm-up. Answers are checked after it, so that checking takes no time from it."""
    before, start, cpu, shared = read_metrics(address), time.perf_counter(), time.process_time(), iter(numbers)
    with ThreadPoolExecutor(concurrency) as pool:
        parts = list(pool.map(lambda _: client(address, files, shared), range(concurrency)))
    if tally is None:
        return
    tally.seconds.append(time.perf_counter() - start)
    tally.cpu += time.process_time() - cpu
    for name, value in read_metrics(address).items():
        tally.metrics[name] += value - before[name]
    for answer in itertools.chain.from_iterable(parts):
        tally.check(answer)


def main(test: LoadTest) -> int:
    """0 if every answer was right, 1 otherwise."""
    torch.set_num_threads(test.threads)
    source = open_images(test.images)
    require(hasattr(source, "open"), f"{test.images} is a stream, of which no file can be sent again")
    files = [encoded(source.open(number)) for number in range(min(len(source.names), test.requests))]  # type: ignore
    found = alone(test.settings(), files, {"all_tokens": 0.0, "pruned": test.dial})
    tallies = {name: Tally(expected, test.tolerance) for name, (_, expected) in found.items()}
    commands = [test.flags(name, dial) for name, (dial, _) in found.items()]
    with servers(commands, test.threads) as started:
        addresses = dict(zip(tallies, started, strict=True))
        for address in addresses.values():
            play(address, files, [number % len(files) for number in range(WARM_UP)], test.concurrency, None)
        parts = np.array_split(np.arange(test.requests) % len(files), test.rounds)
        for number, part in enumerate(progress(parts, "rounds", len(parts))):
            for name in sorted(addresses, reverse=number % 2 == 1):
                play(addresses[name], files, part.tolist(), test.concurrency, tallies[name])
    report(test, {name: dial for name, (dial, _) in found.items()}, tallies)
    return int(any(tally.errors or tally.wrong for tally in tallies.values()))


def report(test: LoadTest, dials: dict[str, float], tallies: dict[str, Tally]) -> None:
    """Show the table and write the result file."""
    rows = [{**tally.row(name), "dial": dials[name]} for name, tally in tallies.items()]
    unpruned, pruned = (tally.seconds for tally in tallies.values())
    ratios = [one / other for one, other in zip(unpruned, pruned, strict=True)]
    show_rows(rows, SHOWN)
    speedup = rows[1]["requests_per_second"] / rows[0]["requests_per_second"]
    client, busy = (max(row[key] for row in rows) for key in ("client_cpu_ms", "server_cpu_ms"))
    console.print(f"processor time a request: the client's at most {client:.2f} ms, the server's at most {busy:.1f} ms")
    console.print(f"{speedup:.2f} x as many requests a second; {min(ratios):.2f} to {max(ratios):.2f} in single rounds")
    about = {"concurrency": test.concurrency, "batch_size": test.batch_size, "rounds": test.rounds, "dtype": test.dtype}
    own = {"tolerance": test.tolerance, "speedup": speedup, "speedup_of_rounds": ratios}
    where = conditions(getattr(torch, test.dtype))
    write_csv([row | about | own | where for row in rows], test.output)
    console.print(f"wrote {test.output}", markup=False)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(LoadTest, prog="python examples/load_test.py", description=__doc__)))
    except TokenGameError as error:
        sys.exit(f"error: {error}")
