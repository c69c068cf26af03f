"""Policies on the hub, against a small server that speaks the part of its interface that huggingface_hub uses."""

import base64
import hashlib
import json
import re
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub
import pytest
import torch
from conftest import policy_for, tiny_vit
from huggingface_hub import ModelCard, constants
from test_card import ROW

import tokengame
from tokengame.cli.common import prune_by_name
from tokengame.errors import TokenGameError
from tokengame.policies import Policy
from tokengame.policies.hub import FILE
from tokengame.policies.policy import find_policy

TOKEN = "hf_of_a_test"
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"
)  # huggingface_hub's own, of its client


class StandIn(BaseHTTPRequestHandler):
    """Repositories as dictionaries of files; large files come over LFS, as those of safetensors do on the hub."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self):
        body, hub = self.body(), self.server
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}"
            hub.private[name] = made.get("visibility", made.get("private"))
            known = name in hub.repos
            hub.repos.setdefault(name, {})
            return self.answer(409 if known else 200, {"url": f"{hub.address}/{name}"})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**found, "actions": {"upload": {"href": f"{hub.address}/blob/{found['oid']}"}}}
                for found in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        name, what = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path).groups()
        if what == "preupload":
            files = [
                {"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if f["path"] == FILE else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        self.commit(hub.repos[name], [json.loads(line) for line in body.splitlines()])
        return self.answer(200, {"commitUrl": f"{hub.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def commit(self, files, lines):
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.server.blobs[line["value"]["oid"]]

    def do_PUT(self):
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/blob/")
        self.server.blobs[self.path.removeprefix("/blob/")] = content
        self.answer(200)

    def do_GET(self):
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if found is None:
            return self.answer(404, {"error": f"the stand-in has no {self.path}"}, X_Error_Message=self.path)
        files = self.server.repos.get(found.group(1))
        if files is None:
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if found.group(2) not in ("main", "1" * 40):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        content = files.get(found.group(3))
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit="1" * 40)
        return self.answer(200, content, X_Repo_Commit="1" * 40, ETag=f'"{hashlib.sha256(content).hexdigest()}"')

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in; nothing of the user's is read or written."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.daemon_threads = True
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.repos, server.blobs, server.private = {}, {}, {}
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose protocol is that of a compiled library
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.utils.disable_progress_bars()
    yield server
    huggingface_hub.utils.enable_progress_bars()
    server.shutdown()
    server.server_close()


@pytest.fixture
def policy():
    rows = [ROW, ROW | {"dial": 0.6, "gmacs_ratio": 0.5, "drop_pp_bound95": 4.0}]
    made = policy_for(tiny_vit())
    made.card |= {"calibration": rows, "licence": "Apache-2.0"}
    return made


def saved(policy, path):
    policy.save(path)
    return path.read_bytes()


def test_a_policy_comes_back_from_the_hub_byte_for_byte(policy, hub, tmp_path):
    before = saved(policy, tmp_path / "before.safetensors")
    address = policy.push_to_hub("someone/fast-vit", token=TOKEN)
    assert address == f"{hub.address}/someone/fast-vit/commit/{'1' * 40}"
    assert set(hub.repos["someone/fast-vit"]) == {FILE, "README.md", "calibration.svg"}
    assert hub.repos["someone/fast-vit"][FILE] == before
    for name in ("someone/fast-vit", "hf:someone/fast-vit", "someone/fast-vit@main"):
        assert saved(Policy.from_pretrained(name), tmp_path / "after.safetensors") == before
    assert find_policy("hf:someone/fast-vit").read_bytes() == before
    policy.push_to_hub("someone/fast-vit", token=TOKEN)  # again, into the repository that is there


@torch.no_grad()
def test_pruning_by_a_name_on_the_hub_equals_pruning_by_the_policy(policy, hub):
    policy.push_to_hub("someone/fast-vit", token=TOKEN, private=True)
    assert hub.private["someone/fast-vit"] in ("private", True)
    model, images = tiny_vit(), torch.randn(3, 3, 32, 32)
    wanted = tokengame.prune(model, policy)(images)
    assert torch.equal(tokengame.prune(model, "hf:someone/fast-vit")(images), wanted)
    assert torch.equal(prune_by_name(model, "hf:someone/fast-vit")(images), wanted), "of the command line"


def refused(call, *arguments, **settings):
    with pytest.raises(TokenGameError) as caught:
        call(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_there_is_one_sentence(hub):
    hub.repos["someone/other"] = {"model.safetensors": b"weights"}
    hub.repos["someone/damaged"] = {FILE: b"no safetensors"}
    assert "has none of this name" in refused(Policy.from_pretrained, "someone/nothing")
    assert f"holds no {FILE}" in refused(tokengame.prune, tiny_vit(), "hf:someone/other")
    assert "no such revision" in refused(Policy.from_pretrained, "hf:someone/other@v2")
    assert "damaged" in refused(Policy.from_pretrained, "someone/damaged")
    for name in ("hf:name", "hf:a/b/c", "hf:/b", "nothing"):
        assert "user/name" in refused(Policy.from_pretrained, name)
    assert "cannot load the policy a/b c" in refused(Policy.from_pretrained, "a/b c")


def test_pushing_without_the_right_to_is_one_sentence(policy, hub):
    assert "hf auth login" in refused(policy.push_to_hub, "someone/fast-vit")
    assert "hf auth login" in refused(policy.push_to_hub, "someone/fast-vit", token="hf_another")
    assert not hub.repos


@pytest.mark.usefixtures("hub")
def test_a_policy_of_another_backbone_is_refused(policy):
    policy.push_to_hub("someone/fast-vit", token=TOKEN)
    assert "does not fit: its dim" in refused(tokengame.prune, tiny_vit(embed_dim=64), "hf:someone/fast-vit")


@pytest.mark.usefixtures("hub")
def test_without_a_connection_the_copy_here_serves_and_else_a_sentence_says_so(policy, monkeypatch):
    policy.push_to_hub("someone/fast-vit", token=TOKEN)
    first = find_policy("hf:someone/fast-vit")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed}")  # where nothing listens
    assert find_policy("hf:someone/fast-vit") == first
    assert "no connection" in refused(Policy.from_pretrained, "someone/never-seen")
    assert "no connection" in refused(policy.push_to_hub, "someone/fast-vit", token=TOKEN)


def test_the_model_card_has_the_figures_of_the_policy(policy, tmp_path):
    policy.save_pretrained(tmp_path / "fast-vit", "someone/fast-vit")
    card = ModelCard.load(tmp_path / "fast-vit" / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "tokengame")
    assert card.data.pipeline_tag == "image-classification"
    lines = [line for line in card.text.splitlines() if line.startswith("| 0")]
    assert lines[0] == "| 0.2 | 0.80 | 50% | 90.0% | 0.0100 | +0.50 | -1.00 to +2.00 | 3.00 |"
    assert len(lines) == 2
    assert 'tokengame.prune(model, "hf:someone/fast-vit")' in card.text
    assert policy.card["backbone"]["name"] in card.text
    assert "(calibration.svg)" in card.text
    assert (tmp_path / "fast-vit" / "calibration.svg").read_bytes().startswith(b"<?xml")
    assert Policy.from_pretrained(tmp_path / "fast-vit").card == policy.card


@pytest.mark.parametrize("kept", ["embedding", "features"])
def test_the_model_card_of_what_has_no_classes(kept, policy, tmp_path):
    whole = {name: ROW[name] for name in ("dial", "gmacs", "gmacs_ratio", "keep", "images")}
    policy.card |= {"keeps": kept, "calibration": [whole | {"distance": 0.01, "distance_bound95": 0.02}]}
    policy.card["licence"] = "of my institute"
    policy.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert card.data.license is None
    assert "of my institute" in card.text
    assert "| 0.2 | 0.80 | 50% | 0.01000 | 0.02000 |" in card.text


def test_a_policy_without_a_calibration_has_a_card_too(tmp_path):
    policy_for(tiny_vit()).save_pretrained(tmp_path)
    assert "None yet" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "calibration.svg").exists()
