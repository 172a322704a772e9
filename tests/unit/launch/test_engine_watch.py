"""Engines that answer, that never begin to, and that no longer do: with a real HTTP server in each one's place."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dapo_megatron.engines.engine_set import Member
from launch.engine_watch import EngineWatch
from launch.hosts import reaches
from launch.ports import reserved_ports

LOOK_S = 0.8
SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        ok = self.path == "/server_info" and self.headers["Authorization"] == "Bearer key"
        self.send_response(200 if ok else int(sys.argv[2]))
        self.end_headers()
    def log_message(self, *_): pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def server():
    with reserved_ports(1) as (port,):
        pass
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(port), "401"])
    end = time.monotonic() + 30
    while not reaches("127.0.0.1", port):
        assert time.monotonic() < end, "the server does not listen"
    yield process, f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture
def watch():
    watch = EngineWatch("key", timeout_s=3 * LOOK_S, start_timeout_s=5 * LOOK_S)
    yield watch
    watch.close()


def silent_after(watch, seconds):
    time.sleep(seconds)
    return {member.name: message for member, message in watch.silent()}


def test_one_that_no_longer_answers_hangs_sooner_than_one_that_never_did(server, watch):
    process, url = server
    watch.follow([Member("engine-0", url), Member("engine-1", "http://127.0.0.1:9")])
    assert silent_after(watch, 4 * LOOK_S) == {}
    os.kill(process.pid, signal.SIGSTOP)
    found = silent_after(watch, 2 * LOOK_S)
    assert list(found) == ["engine-1"] and "has not begun to answer for" in found["engine-1"]
    found = silent_after(watch, 2.5 * LOOK_S)
    assert list(found) == ["engine-0", "engine-1"]
    assert f"engine-0 ({url}) hangs: it has not answered for " in found["engine-0"]


def test_what_replaces_one_has_its_own_time(server, watch):
    process, url = server
    watch.follow([Member("engine-0", url)])
    time.sleep(2 * LOOK_S)
    os.kill(process.pid, signal.SIGSTOP)
    assert list(silent_after(watch, 4 * LOOK_S)) == ["engine-0"]
    watch.follow([Member("engine-0", url, start=2)])
    assert silent_after(watch, 0) == {}
    os.kill(process.pid, signal.SIGCONT)
    assert silent_after(watch, 5.5 * LOOK_S) == {}


def test_one_that_is_followed_on_has_no_new_time(watch):
    """The engine set is written whenever another engine is started."""
    mute = Member("engine-0", "http://127.0.0.1:9")
    watch.follow([mute])
    assert silent_after(watch, 3 * LOOK_S) == {}
    watch.follow([mute, Member("engine-1", "http://127.0.0.1:9")])
    assert list(silent_after(watch, 2.5 * LOOK_S)) == ["engine-0"]


def test_a_refusal_is_no_answer(server):
    watch = EngineWatch("another key", timeout_s=1, start_timeout_s=1.5 * LOOK_S)
    watch.follow([Member("engine-0", server[1])])
    assert list(silent_after(watch, 2 * LOOK_S)) == ["engine-0"]
    watch.close()
