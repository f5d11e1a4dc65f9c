"""Pushing to a hub: a real HTTP server on localhost that keeps what it is sent, and misbehaves."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import _http

from language_self_play import publish
from language_self_play.cli import main
from language_self_play.config import Config
from language_self_play.run_folder import RunFolder

# The hub's client hands a file to its HTTP library in a way that this one would rather not have.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_secret_3f9c1d77"
API_KEY = "sk-secret-8d1f20aa"
REPO = "ann/arena-lsp"
WEIGHTS = bytes(range(256)) * 700
REPO_URL = r"/api/models/(?P<repo>[^/]+/[^/]+)"


class Hub(ThreadingHTTPServer):
    """Repositories by name; `faults` are (method, path pattern, reply) tried before anything else."""

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.blobs, self.faults, self.requests = {}, {}, [], []
        self.released = threading.Event()
        self.user_agents = set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo=REPO, branch="main"):
        return self.repos[repo]["branches"][branch]["files"]

    def fail(self, method, pattern, reply, times=1000):
        self.faults.append([method, pattern, reply, times])

    def add_repo(self, repo, private=False, **files):
        main = {"files": {n.replace("__", "."): b for n, b in files.items()}, "commits": ["c0"]}
        self.repos[repo] = {"private": private, "branches": {"main": main}}

    def handle_error(self, request, client_address):
        pass  # clients that have hung up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        self.body = self._read()
        server, path = self.server, unquote(urlsplit(self.path).path)
        server.requests.append((self.command, path))
        server.user_agents.add(self.headers["User-Agent"])
        for fault in server.faults:
            method, pattern, reply, times = fault
            if method == self.command and re.search(pattern, path) and times > 0:
                fault[3] -= 1
                return reply(self)
        # Uploads go to storage, whose addresses are signed and see no token.
        if not path.startswith("/lfs/") and self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid username or password."})
        for method, pattern, reply in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                if "repo" in match.groupdict() and match["repo"] not in server.repos:
                    return self.send(404, {"error": "Repository not found"})
                return reply(self, **match.groupdict())
        return self.send(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_POST = do_PUT = handle_any

    def _read(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def json(self):
        return json.loads(self.body)

    def send(self, status, body, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def create(handler):
    asked = handler.json
    repo = f"{asked['organization']}/{asked['name']}"
    url = f"{handler.server.url}/{repo}"
    if repo in handler.server.repos:
        return handler.send(409, {"error": "You already created this model repo", "url": url})
    handler.server.add_repo(repo, private=asked.get("visibility") == "private")
    return handler.send(200, {"url": url})


def info(handler, repo, branch="main"):
    entry = handler.server.repos[repo]
    if branch not in entry["branches"]:
        return handler.send(
            404, {"error": "no such revision"}, **{"X-Error-Code": "RevisionNotFound"}
        )
    here = entry["branches"][branch]
    siblings = [{"rfilename": name} for name in here["files"]]
    known = {"id": repo, "private": entry["private"], "sha": here["commits"][-1]}
    return handler.send(200, {**known, "siblings": siblings, "tags": []})


def make_branch(handler, repo, branch):
    branches = handler.server.repos[repo]["branches"]
    if branch in branches:
        return handler.send(409, {"error": "Reference already exists"})
    branches[branch] = {"files": dict(branches["main"]["files"]), "commits": ["c0"]}
    return handler.send(200, {})


def validate_yaml(handler):
    """As the hub: metadata must be a YAML table."""
    head = handler.json["content"].split("\n---\n")[0].removeprefix("---\n")
    try:
        good = isinstance(yaml.safe_load(head), dict)
    except yaml.YAMLError:
        good = False
    errors = [] if good else [{"message": "metadata must be a table"}]
    return handler.send(200 if good else 400, {"errors": errors, "warnings": []})


def preupload(handler, repo, branch):
    there = handler.server.repos[repo]["branches"][branch]["files"]
    answers = []
    for file in handler.json["files"]:
        is_large = file["path"].endswith(".safetensors")
        oid = None
        if (data := there.get(file["path"])) is not None:
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            oid = hashlib.sha256(data).hexdigest() if is_large else git
        mode = "lfs" if is_large else "regular"
        answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        answers.append(answer | ({"oid": oid} if oid else {}))
    return handler.send(200, {"files": answers})


def lfs_batch(handler, repo):
    objects = []
    for wanted in handler.json["objects"]:
        href = f"{handler.server.url}/lfs/{wanted['oid']}?signature=of-the-storage"
        new = wanted["oid"] not in handler.server.blobs
        objects.append(wanted | ({"actions": {"upload": {"href": href}}} if new else {}))
    return handler.send(200, {"transfer": "basic", "objects": objects})


def store(handler, oid):
    if hashlib.sha256(handler.body).hexdigest() != oid:
        return handler.send(400, {"error": "wrong hash"})
    handler.server.blobs[oid] = handler.body
    return handler.send(200, b"")


def commit(handler, repo, branch):
    """All of it or nothing."""
    here = handler.server.repos[repo]["branches"][branch]
    files = dict(here["files"])
    for line in handler.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        match item["key"]:
            case "file":
                files[value["path"]] = base64.b64decode(value["content"])
            case "lfsFile":
                files[value["path"]] = handler.server.blobs[value["oid"]]
            case "deletedFile":
                del files[value["path"]]
            case "header":
                here["message"] = value["summary"]
    here["files"] = files
    here["commits"].append(f"c{len(here['commits'])}")
    oid = here["commits"][-1]
    url = f"{handler.server.url}/{repo}/commit/{oid}"
    return handler.send(200, {"commitUrl": url, "commitOid": oid})


ROUTES = [
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("GET", REPO_URL, info),
    ("GET", REPO_URL + "/revision/(?P<branch>.+)", info),
    ("POST", REPO_URL + "/branch/(?P<branch>.+)", make_branch),
    ("POST", REPO_URL + "/preupload/(?P<branch>.+)", preupload),
    ("POST", REPO_URL + "/commit/(?P<branch>.+)", commit),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", "/lfs/(?P<oid>.+)", store),
]


def status(code, message="no"):
    return lambda handler: handler.send(code, {"error": message})


def body(text):
    return lambda handler: handler.send(200, text.encode())


def hang(handler):
    handler.server.released.wait(10)
    die(handler)


def die(handler):
    """Hang up without a word."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


# ---------------------------------------------------------------- runs and calls


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # conftest sets it for all tests
    # Read from HF_ENDPOINT when it was imported, before there was this server.
    monkeypatch.setattr(constants, "HF_URL_HOSTS", constants.HF_URL_HOSTS | {"127.0.0.1"})
    # hf_xet speaks another protocol to another server; this is its documented switch.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()
    huggingface_hub.close_session()


def write_files(folder, **files):
    folder.mkdir(parents=True)
    for name, data in files.items():
        file = folder / name.replace("__", ".")
        file.write_bytes(data if isinstance(data, bytes) else data.encode())


MODEL = {
    "config__json": '{"model_type": "llama"}',
    "model__safetensors": WEIGHTS,
    "tokenizer__json": "{}",
    "chat_template__jinja": "{{ messages }}",
    "README__md": '---\nlibrary_name: transformers\n---\n\npath = "."  # this folder\n',
}
ADAPTER = {
    "adapter_config__json": '{"base_model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct"}',
    "adapter_model__safetensors": WEIGHTS[:5000],
    "README__md": "---\nlibrary_name: peft\n---\n",
}


@pytest.fixture
def unfinished(tmp_path, make_config):
    """A run of 6 steps with checkpoints of steps 2 and 4, and no model/."""
    run = RunFolder(tmp_path / "run")
    run.create(make_config(steps=6))
    for step in (2, 4):
        place = run.checkpoints_folder / f"step-{step:06d}"
        files = {name: data for name, data in MODEL.items() if name != "README__md"}
        write_files(place / "model", **files | {"model__safetensors": WEIGHTS[step:]})
        (place / "optimizer.safetensors").write_bytes(b"moments")
        (place / "state.json").write_text("{}")
    return run


@pytest.fixture
def run(unfinished):
    """The same, finished."""
    write_files(unfinished.model_folder, **MODEL)
    return unfinished


def push(run, *options, repo=REPO):
    return main(["push", str(run.folder), repo, *options])


def one_sentence(capsys, *words):
    """What was said on stderr: one line that holds `words`, and no secret."""
    out, err = capsys.readouterr()
    assert TOKEN not in out + err
    assert API_KEY not in out + err
    assert "signature" not in err
    assert "Traceback" not in err
    assert err.startswith("lsp: ")
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err, err
    return err


# ---------------------------------------------------------------- what arrives


def test_every_file_of_the_model_arrives_byte_for_byte(hub, run, capsys):
    assert push(run) == 0
    sent = {file.name: file.read_bytes() for file in run.model_folder.iterdir()}
    sent["README.md"] = sent["README.md"].replace(b'"."  # this folder', f'"{REPO}"'.encode())
    assert hub.files() == sent
    assert hub.files()["model.safetensors"] == WEIGHTS
    assert f'path = "{REPO}"' in hub.files()["README.md"].decode()
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"Pushed: {hub.url}/{REPO}"
    assert TOKEN not in out + err
    assert not hub.repos[REPO]["private"]
    assert len(hub.repos[REPO]["branches"]["main"]["commits"]) == 2  # one commit of ours
    assert hub.repos[REPO]["branches"]["main"]["message"].startswith("Upload model after 6 steps")


def test_the_card_on_disk_is_not_changed_by_a_push(hub, run):
    before = (run.model_folder / "README.md").read_bytes()
    assert push(run) == 0
    assert (run.model_folder / "README.md").read_bytes() == before


def test_nothing_hidden_partial_unsafe_or_of_the_training_is_sent(hub, run, capsys):
    stray = {
        ".env": API_KEY,
        ".key.json": API_KEY,
        ".config.json.new": "{",
        "optimizer.safetensors": "m",
        "state.json": "{}",
    }
    stray |= {"pytorch_model.bin": "pickle", "events.jsonl": "{}", "training.log": "x"}
    for name, text in stray.items():
        (run.model_folder / name).write_text(text)
    write_files(run.model_folder / "runs", x__json="{}")
    assert push(run) == 0
    assert set(hub.files()) == {name.replace("__", ".") for name in MODEL}
    out = capsys.readouterr().out
    assert "left out: .config.json.new, .env, .key.json, events.jsonl, optimizer.safetensors" in out


def test_an_adapter_is_pushed_alone(hub, run):
    write_files(run.adapter_folder, **ADAPTER)
    assert push(run, "--adapter") == 0
    assert set(hub.files()) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.files()["adapter_model.safetensors"] == WEIGHTS[:5000]


def test_a_private_repository_is_made_private_and_stays_so(hub, run):
    assert push(run, "--private") == 0
    assert hub.repos[REPO]["private"]
    assert push(run) == 0
    assert hub.repos[REPO]["private"]


def test_private_is_refused_for_a_public_repository_before_anything_is_sent(hub, run, capsys):
    hub.add_repo(REPO)
    assert push(run, "--private") == 2
    one_sentence(capsys, REPO, "is public", "leave --private out")
    assert hub.files() == {}
    assert hub.blobs == {}


def test_a_branch_is_made_and_main_left_alone(hub, run, capsys):
    assert push(run, "--branch", "step-6", "--message", "six steps") == 0
    assert hub.files() == {}
    assert hub.files(branch="step-6")["model.safetensors"] == WEIGHTS
    assert hub.repos[REPO]["branches"]["step-6"]["message"] == "six steps"
    assert capsys.readouterr().out.endswith(f"Pushed: {hub.url}/{REPO}/tree/step-6\n")
    assert push(run, "--branch", "step-6") == 0  # a branch that exists


def test_pushing_again_sends_nothing_and_says_so(hub, run, capsys):
    assert push(run) == 0
    before = len(hub.requests)
    assert push(run) == 0
    assert "Nothing has changed since the last push: " in capsys.readouterr().out
    assert "PUT" not in {method for method, _ in hub.requests[before:]}
    assert len(hub.repos[REPO]["branches"]["main"]["commits"]) == 2


def test_weights_of_an_earlier_push_are_removed_and_other_files_stay(hub, run):
    old = {"adapter_config__json": b"{}", "adapter_model__safetensors": b"a", "notes__md": b"mine"}
    hub.add_repo(REPO, **old)
    hub.files().update({"model-00001-of-00002.safetensors": b"b", "gguf/model.safetensors": b"c"})
    hub.files()["model.safetensors.index.json"] = b"{}"
    assert push(run) == 0
    added = {name.replace("__", ".") for name in MODEL}
    assert set(hub.files()) == added | {"notes.md", "gguf/model.safetensors"}


def test_a_checkpoint_is_pushed_with_a_card_that_says_so(hub, unfinished):
    assert push(unfinished, "--checkpoint", "2") == 0
    assert hub.files()["model.safetensors"] == WEIGHTS[2:]
    assert "optimizer.safetensors" not in hub.files()
    assert "2 of 6; this is a checkpoint" in hub.files()["README.md"].decode()
    assert not (unfinished.checkpoints_folder / "step-000002/model/README.md").exists()


def test_a_dry_run_lists_the_files_and_connects_to_nothing(hub, run, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert push(run, "--dry-run") == 0
    out = capsys.readouterr().out
    assert re.search(r"model\.safetensors +179\.2 kB", out)
    assert re.search(r"5 files +179\.3 kB", out)
    assert hub.requests == []


# ---------------------------------------------------------------- what is refused before anything is sent


def test_an_unfinished_run_is_refused_with_what_to_do(hub, unfinished, capsys):
    assert push(unfinished) == 2
    one_sentence(capsys, "has not finished", "--resume", "--checkpoint 4")
    assert push(unfinished, "--checkpoint", "3") == 2
    one_sentence(capsys, "--checkpoint 3: ", "there are 2, 4")
    assert hub.requests == []


def test_what_is_no_run_is_refused(hub, run, tmp_path, capsys):
    for path, words in {
        tmp_path / "none": "no such folder",
        run.config_file: "is a file",
        tmp_path: "no run here",
        run.model_folder: f"is a part of the run {run.folder}",
        run.checkpoints_folder / "step-000002" / "model": "--checkpoint STEP",
    }.items():
        assert main(["push", str(path), REPO]) == 2
        one_sentence(capsys, str(path), words)
    assert hub.requests == []


@pytest.mark.parametrize(
    "repo",
    [
        "",
        "arena",
        "a/b/c",
        "ann/",
        "/arena",
        "ann/a..b",
        "ann/a--b",
        "ann/a b",
        "ann/é",
        "ann/x.git",
    ],
)
def test_a_malformed_repo_id_is_refused(hub, run, repo, capsys):
    assert push(run, repo=repo) == 2
    one_sentence(capsys, f"REPO_ID = {repo!r}: must be OWNER/NAME")
    assert hub.requests == []


def test_a_part_that_the_run_lacks_is_refused_with_the_other(hub, run, unfinished, capsys):
    assert push(run, "--adapter") == 2
    one_sentence(capsys, "adapter: no such folder", "a whole model", "without --adapter")
    os.rename(
        run.checkpoints_folder / "step-000002/model", run.checkpoints_folder / "step-000002/adapter"
    )
    assert push(run, "--checkpoint", "2") == 2
    one_sentence(capsys, "an adapter alone", "with --adapter")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_model_that_is_not_whole_is_refused(hub, run, missing, capsys):
    (run.model_folder / missing).write_bytes(b"")
    assert push(run) == 2
    one_sentence(
        capsys, "is not whole", "config.json" if missing == "config.json" else "*.safetensors"
    )


def test_an_adapter_whose_base_only_its_author_has_is_refused(hub, run, capsys):
    write_files(run.adapter_folder, **ADAPTER)
    config = run.adapter_folder / "adapter_config.json"
    config.write_text('{"base_model_name_or_path": "/home/ann/models/qwen"}')
    assert push(run, "--adapter") == 2
    one_sentence(capsys, "/home/ann/models/qwen", "without --adapter")
    config.write_text("{}")
    assert push(run, "--adapter") == 2
    one_sentence(capsys, "is damaged")
    assert hub.requests == []


def test_without_a_token_it_says_how_to_get_one(hub, run, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert push(run) == 2
    one_sentence(capsys, "hf auth login", "HF_TOKEN")
    assert hub.requests == []


def test_an_endpoint_that_is_no_address_and_offline_mode_are_refused(hub, run, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(run) == 2
    one_sentence(capsys, "HF_HUB_OFFLINE is set", "unset it")
    monkeypatch.setenv("HF_ENDPOINT", "localhost:1")
    assert push(run) == 2
    one_sentence(capsys, "HF_ENDPOINT = 'localhost:1'", "https://")


# ---------------------------------------------------------------- a hub that misbehaves


@pytest.mark.parametrize(
    ("code", "exit_code", "words"),
    [
        (400, 2, "refuses it (400: because)"),
        (401, 2, "does not accept your token (401: because)"),
        (402, 2, "refuses it (402: because)"),
        (403, 2, "may not write there (403"),
        (404, 2, "knows no such owner"),
        (409, 75, "at the same moment"),
        (412, 75, "at the same moment"),
        (413, 2, "refuses it (413"),
        (429, 75, "could not take it now (429"),
        (500, 75, "could not take it now (500"),
        (503, 75, "could not take it now (503"),
    ],
)
@pytest.mark.parametrize("at", ["/api/repos/create", "/preupload/", "/commit/", "/lfs/"])
def test_a_refusal_is_one_sentence_wherever_it_comes(hub, run, code, exit_code, words, at, capsys):
    if code == 409 and at == "/api/repos/create":
        return  # there it says that the repository exists, which is welcome
    method = "PUT" if at == "/lfs/" else "POST"
    hub.fail(method, at, status(code, "because"))
    assert push(run) == exit_code
    one_sentence(capsys, REPO, words)
    if REPO in hub.repos:
        assert hub.files() == {}


def test_a_wrong_token_is_refused_and_not_shown(hub, run, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_token")
    assert push(run) == 2
    assert "hf_wrong_token" not in one_sentence(capsys, "does not accept your token (401")


def test_a_token_that_may_write_but_not_create_pushes_to_what_is_there(hub, run):
    hub.add_repo(REPO)
    hub.fail("POST", "/api/repos/create", status(403))
    assert push(run) == 0
    assert hub.files()["model.safetensors"] == WEIGHTS


def test_metadata_that_the_hub_refuses_is_said_to_be_so(hub, run, capsys):
    (run.model_folder / "README.md").write_text("---\n- no\n- table\n---\n")
    assert push(run) == 2
    one_sentence(capsys, "refuses it (400: metadata must be a table)")
    (run.model_folder / "README.md").write_bytes(b"\xff\xfe")
    assert push(run) == 2
    one_sentence(capsys, "README.md: can't be read")


def test_a_hub_that_is_not_there_can_be_asked_again(hub, run, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert push(run) == 75
    one_sentence(capsys, f"http://127.0.0.1:{port}: can't be reached", "check the network", "again")


@pytest.mark.parametrize("at", ["/api/repos/create", "/lfs/", "/commit/"])
def test_a_hub_that_does_not_answer_is_given_up(hub, run, at, monkeypatch, capsys):
    monkeypatch.setattr(publish, "TIMEOUT_S", 0.2)
    hub.fail("PUT" if at == "/lfs/" else "POST", at, hang)
    assert push(run) == 75
    one_sentence(capsys, f"{hub.url}: did not answer within 0.2 seconds", "again")


@pytest.mark.parametrize("at", ["/api/repos/create", "/lfs/", "/commit/"])
def test_after_a_hub_that_died_midway_the_same_command_finishes(hub, run, at, capsys):
    hub.fail("PUT" if at == "/lfs/" else "POST", at, die)
    assert push(run) == 75
    err = one_sentence(capsys, f"{hub.url}: the upload broke off", "run the same command again")
    assert "while uploading" not in err  # but why
    if REPO in hub.repos:
        assert hub.files() == {}
    hub.faults.clear()
    before = len(hub.requests)
    assert push(run) == 0
    assert hub.files()["model.safetensors"] == WEIGHTS
    sent_again = [path for method, path in hub.requests[before:] if method == "PUT"]
    assert len(sent_again) == (0 if at == "/commit/" else 1)


def test_a_short_disturbance_is_ridden_out(hub, run):
    hub.fail("PUT", "/lfs/", die, times=2)
    hub.fail("POST", "/preupload/", status(503), times=2)
    assert push(run) == 0
    assert hub.files()["model.safetensors"] == WEIGHTS


@pytest.mark.parametrize("reply", ["<html>log in to the hotel's network</html>", "{}", "[]", '"x"'])
@pytest.mark.parametrize("at", ["/api/repos/create", "/preupload/", "/commit/"])
def test_replies_that_are_not_a_hubs_are_one_sentence(hub, run, at, reply, capsys):
    hub.fail("POST", at, body(reply))
    assert push(run) == 75
    one_sentence(capsys, f"{hub.url}: the upload broke off")


@pytest.mark.parametrize(
    ("code", "exit_code", "words"), [(403, 2, "may not write there (403"), (401, 2, "(401")]
)
def test_what_the_faster_uploader_is_refused_is_said_alike(
    hub, run, code, exit_code, words, monkeypatch, capsys
):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.fail("GET", "/xet-write-token/", status(code))
    assert push(run) == exit_code
    one_sentence(capsys, REPO, words)
    assert hub.files() == {}


def test_what_the_hub_says_can_not_steer_the_terminal(hub, run, capsys):
    hub.fail("POST", "/commit/", status(403, "\x1b[2J\nsecond line"))
    assert push(run) == 2
    assert "\x1b" not in one_sentence(capsys, "403")


# ---------------------------------------------------------------- a process of its own


def test_a_trained_run_is_pushed_by_the_command_and_loads_from_what_arrived(hub, tmp_path):
    from transformers import AutoModelForCausalLM

    from language_self_play import self_play

    config = Config.from_recipe(
        "arena", steps=1, threads=1, eval={"tasks": []}, log={"progress": "none"}
    )
    run = self_play(config, tmp_path / "run")
    code = (
        "import sys; from language_self_play.cli import main; code = main(sys.argv[1:]);"
        "print({'torch', 'transformers'} & set(sys.modules)); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "push", str(run.folder), REPO]
    hub.fail("PUT", "/lfs/", status(503), times=1)  # ridden out, and not with a signed address
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.splitlines()[-2:] == [f"Pushed: {hub.url}/{REPO}", "set()"]
    got = tmp_path / "got"
    got.mkdir()
    for name, data in hub.files().items():
        (got / name).write_bytes(data)
        for secret in (TOKEN, API_KEY, str(tmp_path)):
            assert secret.encode() not in data
            assert secret not in result.stdout.replace(str(run.model_folder), "")
            assert secret not in run.config_file.read_text()
    sent = AutoModelForCausalLM.from_pretrained(run.model_folder).state_dict()
    arrived = AutoModelForCausalLM.from_pretrained(got).state_dict()
    assert all((sent[name] == arrived[name]).all() for name in sent)
    assert f'path = "{REPO}"' in (got / "README.md").read_text("utf-8")
    assert any("language-self-play/" in agent for agent in hub.user_agents)


def test_ctrl_c_stops_it_with_nothing_committed(hub, run):
    hub.fail("PUT", "/lfs/", hang)
    command = [sys.executable, "-m", "language_self_play", "push", str(run.folder), REPO]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment(), stdout=pipe, stderr=pipe, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while ("PUT" not in {m for m, _ in hub.requests}) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "lsp: interrupted"
    assert hub.files() == {}


def environment():
    """Of this process, as a user would set it."""
    return os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
