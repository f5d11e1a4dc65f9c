"""Servers on localhost that several test files talk to: a judges' endpoint, and a hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from language_self_play.rewards import judge

KEY = "sk-secret-8d1f20"


class Endpoint(ThreadingHTTPServer):
    """Gives the replies of `script` in turn, then `default`; each is a function of the handler."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.default = [], scored(5)
        self.requests, self.times, self.keys = [], [], []
        self.in_flight = self.most_in_flight = 0
        self.lock, self.released = threading.Lock(), threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def prompts(self):
        return [request["messages"][0]["content"] for request in self.requests]

    def handle_error(self, request, client_address):
        pass  # clients that have hung up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append(self.body)
            server.times.append(time.monotonic())
            server.keys.append(self.headers["Authorization"])
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            reply = server.script.pop(0) if server.script else server.default
        try:
            reply(self)
        finally:
            with server.lock:
                server.in_flight -= 1

    @property
    def prompt(self):
        return self.body["messages"][0]["content"]

    def send(self, status, body, **headers):
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def completion(text, tokens=(0, 0)):
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    choice = {"index": 0, "finish_reason": "stop"}
    choice["message"] = {"role": "assistant", "content": text}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})


def says(text, **kwargs):
    return lambda handler: handler.send(200, completion(text, **kwargs))


def scored(score, **kwargs):
    return says(f'It is fine.\n{{"score": {score}}}', **kwargs)


def status(code, message="no", **headers):
    body = json.dumps({"error": {"message": message}})
    return lambda handler: handler.send(code, body, **headers)


def body(text):
    return lambda handler: handler.send(200, text)


def hang(handler):
    handler.server.released.wait(30)


def reset(handler):
    # Lingering for 0 seconds makes closing a reset. The handler's files share the socket.
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.connection.shutdown(socket.SHUT_RD)
    handler.close_connection = True
    handler.connection.close()


def reset_midway(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    reset(handler)


def trickle(handler):
    """A byte every 50 ms, so that no single read ever times out."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    while not handler.server.released.wait(0.05):
        handler.wfile.write(b" ")


@pytest.fixture
def endpoint():
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr(judge, "FIRST_PAUSE_S", 0.01)


class Hub(ThreadingHTTPServer):
    """Data sets or models, for reading: `repos` is name -> file -> bytes; `requests` what was asked for."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, repos):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos, self.requests = repos, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # clients that have hung up


@contextmanager
def serving(repos):
    """A Hub that answers until it is left."""
    server = Hub(repos)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def python_with_hub(tmp_path, url, *arguments):
    """What Python does in a process of its own, which reads the hub's address when it starts."""
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    # hf_xet speaks another protocol to another server; this is its documented switch.
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def handle_any(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        if match := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            if match[1] not in self.server.repos:
                return self.send_missing("Repo")
            data = self.server.repos[match[1]].get(match[2])
            return self.send_file(data) if data is not None else self.send_missing("Entry")
        if match := re.fullmatch(
            r"/api/(?:datasets|models)/([^/]+/[^/]+?)(/(?:revision|tree|paths-info)/.+)?", path
        ):
            files = self.server.repos.get(match[1])
            if files is None:
                return self.send_missing("Repo")
            return self.send_json(self.about(match[1], files, match[2] or "", body))
        return self.send_missing("Entry")

    do_GET = do_HEAD = do_POST = handle_any

    def about(self, repo, files, what, body):
        rows = [self.row(name, data) for name, data in files.items()]
        if what.startswith("/tree/"):
            return rows
        if what.startswith("/paths-info/"):
            named = parse_qs(body.decode()).get("paths", [])
            return [row for row in rows if row["path"] in named]
        siblings = [{"rfilename": name} for name in files]
        return {"id": repo, "sha": self.COMMIT, "siblings": siblings, "private": False, "tags": []}

    def row(self, name, data):
        return {
            "type": "file",
            "path": name,
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
        }

    def send_file(self, data):
        etag = hashlib.sha1(data).hexdigest()
        self.reply(200, data, **{"ETag": f'"{etag}"', "X-Repo-Commit": self.COMMIT})

    def send_json(self, value):
        self.reply(200, json.dumps(value).encode())

    def send_missing(self, what):
        self.reply(404, b"{}", **{"X-Error-Code": f"{what}NotFound"})

    def reply(self, status, data, **headers):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass
