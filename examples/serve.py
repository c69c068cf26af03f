"""A pruned Vision Transformer behind HTTP: dynamic batching, a dial for each class of service, a floor on quality.

FastAPI with uvicorn, not LitServe: it has types, and one process with one copy of the weights can batch by dial, while
LitServe batches in the order of arrival in processes of its own.

    pip install 'tokengame[serve]'
    python examples/serve.py --backbone fashion
    curl --data-binary @photo.jpg 'http://127.0.0.1:8000/predict?service=balanced'
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import prometheus_client as prometheus
import torch
import tyro
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from torch import Tensor, nn

from tokengame import PrunedViT, TokenGameError, kernels
from tokengame.backbones import load_model, wrap
from tokengame.backbones.classes import require_classes
from tokengame.backbones.load import EMBEDDED
from tokengame.cli.common import WithModel, prune_by_name
from tokengame.cli.main import terminable
from tokengame.data.class_map import ClassMap
from tokengame.data.decode import open_image, viewed
from tokengame.data.given import some_of
from tokengame.data.scenes import CLASSES
from tokengame.data.transforms import transform_for
from tokengame.errors import first_line
from tokengame.measure.evaluate import keep_freed_memory
from tokengame.policies.policy import SHIPPED
from tokengame.ranges import Range, require
from tokengame.runtime.rule import RULE

TOP, CHECKED, MINUTE = 5, 512, 60.0
"""classes of an answer; images that agreement is measured on, at most; seconds of which images per second is a mean"""
SHARES = tuple(number / 20 for number in range(1, 21))
"""buckets of shares: of tokens kept, of the compute"""
HELP = """Serve one pruned model over HTTP: POST /predict, GET /metrics (for Prometheus), GET /health.

examples:
  python examples/serve.py --backbone fashion
  python examples/serve.py --backbone vit_tiny_patch16_224 --dial fast=0.6 --dial exact=0
  python examples/serve.py --backbone my_vit/ --policy policy.safetensors --images photos/ --least-agreement 0.95
"""
Waiting = tuple[Tensor, asyncio.Future[dict[str, Any]]]
"""a request that waits for its batch: the image [channels, height, width], and where the answer goes"""


@dataclass(kw_only=True)
class Serve(WithModel):
    """Flags of the server, beside --model-kwargs and --device, which are those of tokengame eval."""

    json: tyro.conf.Suppress[bool] = False
    seed: tyro.conf.Suppress[int] = 0

    backbone: str
    """as for tokengame eval: a name of timm, Hugging Face, open_clip or torchvision; "fashion" is the embedded one"""
    weights: str | None = None
    """local checkpoint; without one the library downloads its own"""
    policy: str | None = None
    """policy file, name of a shipped one, or "rule"; by default the one that ships for the backbone, else the rule"""
    dial: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=DIAL, a class of service; the first is for requests that name none; by default balanced, the policy's
    recommendation, and exact, which keeps all tokens"""
    images: str | None = None
    """some of yours, in the forms of tokengame eval, on which agreement with the native model is measured first"""
    least_agreement: Annotated[float | None, Range(0, 1)] = None
    """the floor on quality: no dial is served that agrees on a smaller share of --images"""
    class_map: str | None = None
    """text file, one class name a line in the model's order"""
    batch_size: Annotated[int, Range(1, 4096, whole=True)] = 32
    """images of a batch, at most"""
    wait_ms: Annotated[float, Range(0, 10_000)] = 2.0
    """how long the first request of a batch waits for others"""
    max_waiting: Annotated[int, Range(1, 10**6, whole=True)] = 256
    """requests inside at a time; further ones get 503"""
    max_bytes: Annotated[int, Range(1, 2**28, whole=True)] = 20_000_000
    """of a request's body"""
    host: str = "127.0.0.1"
    """address to listen on"""
    port: Annotated[int, Range(0, 65_535, whole=True)] = 8000
    """0: any free one"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """what the model computes in"""

    def check(self) -> None:
        """Raise TokenGameError where flags alone are wrong, or there is no such device."""
        super().check()
        self.require_device()
        floor = "--least-agreement is measured on images: name some with --images"
        require(self.least_agreement is None or self.images is not None, floor)

    def dials(self, recommended: float) -> dict[str, float]:
        """By class of service."""
        found: dict[str, float] = {}
        for pair in self.dial:
            name, _, number = pair.partition("=")
            with suppress(ValueError):
                found[name] = float(number)
            sentence = f"--dial takes NAME=DIAL with a dial from 0 to 1, each name once, e.g. fast=0.6, not {pair!r}"
            require(name.isidentifier() and 0 <= found.get(name, -1) <= 1, sentence)
        require(len(found) == len(self.dial), "--dial has a name twice: give each class of service one dial")
        return found or {"balanced": recommended, "exact": 0.0}

    def load(self) -> tuple[nn.Module, PrunedViT]:
        """The native model and the pruned one."""
        model = load_model(self.backbone, self.weights, self.settings, self.note)
        model = self.place(model).to(getattr(torch, self.dtype))
        require_classes(wrap(model))
        shipped = (SHIPPED / f"{self.backbone}.safetensors").is_file()
        return model, prune_by_name(model, self.policy or (self.backbone if shipped else RULE))

    def names(self, classes: int) -> list[str]:
        """Of classes: those of --class-map, those of the embedded model, or their numbers."""
        if self.class_map is None:
            return list(CLASSES) if self.backbone == EMBEDDED else [str(number) for number in range(classes)]
        found = ClassMap(self.class_map)
        found.require_classes(classes)
        return list(found.index)


@torch.inference_mode()
def measured(model: nn.Module, fast: PrunedViT, dials: Mapping[str, float], images: str) -> dict[str, float]:
    """The share of `images` whose class is the native model's, for each dial."""
    backbone = wrap(model)
    batches, _ = some_of(images, backbone.preprocessing(), CHECKED)
    weight, total, same = next(fast.parameters()), 0, dict.fromkeys(dials, 0)
    for batch in batches:
        view = batch.images.to(weight.device, weight.dtype)
        native, total = backbone.native(view).argmax(1), total + len(view)
        for name, dial in dials.items():
            fast.dial = dial
            same[name] += int((fast.predict(view).logits.argmax(1) == native).sum())
    return {name: number / total for name, number in same.items()}


def require_floor(agreement: Mapping[str, float], dials: Mapping[str, float], floor: float) -> None:
    """Raise TokenGameError if a dial agrees with the native model less often than the operator allows."""
    low = [f"{name}={dials[name]:g} ({share:.1%})" for name, share in agreement.items() if share < floor]
    sentence = f"not served, because --least-agreement is {floor:.1%} and it agrees with the native model less often: "
    require(not low, f"{sentence}{', '.join(low)}; give a lower dial, or a lower floor")


class Metrics:
    """What /metrics shows, in a registry of its own."""

    def __init__(self) -> None:
        self.registry, self.recent = prometheus.CollectorRegistry(), deque[tuple[float, int]]()
        self.start, count, spread = time.monotonic(), prometheus.Counter, prometheus.Histogram
        own: dict[str, Any] = {"namespace": "tokengame", "labelnames": ["service"], "registry": self.registry}
        self.requests = count("requests", "Requests to /predict.", **own | {"labelnames": ["service", "code"]})
        self.latency = spread("request_seconds", "From the request to its answer, those with code 200.", **own)
        self.batch = spread("batch_images", "Images of a batch.", **own, buckets=[2**power for power in range(9)])
        self.kept = spread("kept_share", "Share of the tokens left at the end.", **own, buckets=SHARES)
        self.compute = spread("compute_share", "Share of the native compute.", **own, buckets=SHARES)
        text = "Mean over the last minute, of all classes of service."
        rate = prometheus.Gauge("images_per_second", text, namespace="tokengame", registry=self.registry)
        rate.set_function(self.images_per_second)
        prometheus.ProcessCollector(registry=self.registry)

    def images_per_second(self) -> float:
        """Of all classes of service together."""
        now = time.monotonic()
        while self.recent and self.recent[0][0] < now - MINUTE:
            self.recent.popleft()
        return sum(images for _, images in self.recent) / min(MINUTE, now - self.start)

    def add(self, service: str, answers: list[dict[str, Any]]) -> None:
        """One batch through the model."""
        self.recent.append((time.monotonic(), len(answers)))
        self.batch.labels(service).observe(len(answers))
        for answer in answers:
            self.kept.labels(service).observe(answer["kept"][-1] / answer["tokens"])
            self.compute.labels(service).observe(answer["compute"])


class Engine:
    """The model, the one thread that runs it, and a queue for each class of service."""

    def __init__(self, settings: Serve):
        settings.check()
        model, self.fast = settings.load()
        self.settings, self.dials = settings, settings.dials(self.fast.dial)
        self.agreement = measured(model, self.fast, self.dials, settings.images) if settings.images else {}
        require_floor(self.agreement, self.dials, settings.least_agreement or 0.0)
        backbone = self.fast.game.backbone
        self.names, preprocessing = settings.names(backbone.classes), backbone.preprocessing()
        self.transform, self.metrics = transform_for(preprocessing, train=False), Metrics()
        self.queues = {name: asyncio.Queue[Waiting]() for name in self.dials}
        self.model_free, self.places = asyncio.Lock(), asyncio.Semaphore(settings.max_waiting)
        self.model_thread, self.decoder = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        for service in self.dials:  # the first call takes longer
            self.model_thread.submit(self.predict, service, [torch.zeros(preprocessing["input_size"])]).result()

    async def answer(self, service: str, content: bytes) -> dict[str, Any]:
        """What the model says about the image in a file; HTTPException where there is none in it."""
        read = partial(viewed, partial(open_image, content), self.transform)
        image = await asyncio.get_running_loop().run_in_executor(self.decoder, read)
        if isinstance(image, str):
            raise HTTPException(422, f"the body cannot be read as an image: {image}")
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.queues[service].put_nowait((image, answer))
        return await answer

    async def run(self, service: str) -> None:
        """Answer the requests of one class of service, batch by batch."""
        queue = self.queues[service]
        while True:
            batch = [await queue.get()]
            with suppress(TimeoutError):
                async with asyncio.timeout(self.settings.wait_ms / 1000):
                    while len(batch) < self.settings.batch_size:
                        batch.append(await queue.get())
            async with self.model_free:
                while len(batch) < self.settings.batch_size and not queue.empty():  # came while the model was busy
                    batch.append(queue.get_nowait())
                await self.deliver(service, batch)

    async def deliver(self, service: str, batch: list[Waiting]) -> None:
        """Run a batch and give each request its own answer; a failure is of this batch alone."""
        loop, images = asyncio.get_running_loop(), [image for image, _ in batch]
        found: list[Any] = []
        try:
            found = await loop.run_in_executor(self.model_thread, self.predict, service, images)
            self.metrics.add(service, found)
        except Exception as error:
            found = [HTTPException(500, f"the model failed: {first_line(error)}")] * len(batch)
        for (_, answer), result in zip(batch, found, strict=True):
            if not answer.done():  # it is where the request was cancelled
                answer.set_exception(result) if isinstance(result, Exception) else answer.set_result(result)

    @torch.inference_mode()
    def predict(self, service: str, images: list[Tensor]) -> list[dict[str, Any]]:
        """An answer for each image [channels, height, width]."""
        self.fast.dial, weight = self.dials[service], next(self.fast.parameters())
        output = self.fast.predict(torch.stack(images).to(weight.device, weight.dtype))
        native, macs = self.fast.macs(output)
        about = {"service": service, "dial": self.dials[service], "tokens": output.total, "batch": len(images)}
        columns = torch.stack(output.kept, 1).tolist(), (macs / native).tolist(), self.tops(output.logits)
        return [
            {"top": top, "kept": kept, "compute": share, **about} for kept, share, top in zip(*columns, strict=True)
        ]

    def tops(self, logits: Tensor) -> Iterator[list[dict[str, Any]]]:
        """The likeliest classes of each image, given [B, classes] logits."""
        likeliest = logits.float().softmax(1).topk(min(TOP, logits.shape[1]))
        for classes, probabilities in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True):
            rows = zip(classes, probabilities, strict=True)
            yield [{"class": c, "name": self.names[c], "probability": share} for c, share in rows]


async def content_of(request: Request, most: int) -> bytes:
    """The image file that a request brings: its body, or the first file of a form."""
    body = limited(request, most)
    try:
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return b"".join([chunk async for chunk in body])
        form = await MultiPartParser(request.headers, body, max_files=1).parse()
    except MultiPartException as error:
        raise HTTPException(400, f"the form cannot be read: {error.message}") from None
    except ClientDisconnect:
        raise HTTPException(400, "the connection ended before the body did") from None
    files = [await value.read() for value in form.values() if isinstance(value, UploadFile)]
    await form.close()
    if not files:
        raise HTTPException(400, "the form has no file: send the image as one, e.g. curl --form image=@photo.jpg")
    return files[0]


async def limited(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body in pieces, up to `most` bytes in all."""
    length, read = request.headers.get("content-length", "0"), 0
    async for chunk in request.stream():
        read += len(chunk)
        if max(read, int(length)) > most:
            raise HTTPException(413, f"the body is larger than {most:,} bytes: send a smaller image")
        yield chunk


class Application:
    """The three addresses."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.app = FastAPI(title="tokengame", lifespan=self.lifespan)
        self.app.add_api_route("/predict", self.predict, methods=["POST"])
        self.app.add_api_route("/metrics", self.metrics)
        self.app.add_api_route("/health", self.health)

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncGenerator[None, None]:
        """Run the queues while the server runs; at its end all requests have had their answers."""
        tasks = [asyncio.create_task(self.engine.run(service)) for service in self.engine.dials]
        yield
        for task in tasks:
            task.cancel()
        self.engine.model_thread.shutdown()
        self.engine.decoder.shutdown()

    async def predict(self, request: Request, service: str | None = None) -> Response:
        """The likeliest classes of one image: the file as the body, or in a form."""
        start, engine = time.perf_counter(), self.engine
        name = next(iter(engine.dials)) if service is None else service
        counted = name if name in engine.dials else "unknown"
        try:
            answer = await self.answer(request, name)
        except HTTPException as error:
            engine.metrics.requests.labels(counted, error.status_code).inc()
            raise
        seconds = time.perf_counter() - start
        engine.metrics.requests.labels(counted, 200).inc()
        engine.metrics.latency.labels(counted).observe(seconds)
        return JSONResponse(answer | {"milliseconds": 1000 * seconds})

    async def answer(self, request: Request, service: str) -> dict[str, Any]:
        """HTTPException where the request cannot be answered."""
        engine = self.engine
        if service not in engine.dials:
            raise HTTPException(404, f"no service {service[:40]!r}; there are {', '.join(engine.dials)}")
        if engine.places.locked():
            raise HTTPException(503, f"{engine.settings.max_waiting} requests are inside already: try again later")
        async with engine.places:
            content = await content_of(request, engine.settings.max_bytes)
            if not content:
                raise HTTPException(400, "the body is empty: send an image file")
            return await engine.answer(service, content)

    async def metrics(self) -> Response:
        """In Prometheus' text format."""
        text = prometheus.generate_latest(self.engine.metrics.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_PLAIN_0_0_4)

    async def health(self) -> dict[str, Any]:
        """What is served."""
        engine, dtype = self.engine, getattr(torch, self.engine.settings.dtype)
        services = {name: {"dial": d, "agreement": engine.agreement.get(name)} for name, d in engine.dials.items()}
        status = str(kernels.status(dtype, torch.device(engine.settings.torch_device).type))
        return {"status": "ok", "backbone": engine.settings.backbone, "services": services, "kernels": status}


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; 0 then, 2 after a sentence on bad input."""
    try:
        with terminable():
            settings = tyro.cli(Serve, args=arguments, prog="python examples/serve.py", description=HELP)
            keep_freed_memory()
            engine = Engine(settings)
            with socket.create_server((settings.host, settings.port)) as listening:
                host, port = listening.getsockname()[:2]
                dials = ", ".join(f"{name} (dial {dial:.3g})" for name, dial in engine.dials.items())
                print(f"serving {settings.backbone} at http://{host}:{port}: {dials}", flush=True)
                config = uvicorn.Config(Application(engine).app, log_level="warning", timeout_graceful_shutdown=30)
                uvicorn.Server(config).run(sockets=[listening])
    except (TokenGameError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # also SIGTERM; uvicorn has answered what was inside
        print("stopped", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
