"""Control calls: what servers of each release are asked, how long an answer may take, and what an error says."""

import json
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from dapo_megatron.engines import control as module
from dapo_megatron.engines.control import NO_SESSION, EngineControl
from dapo_megatron.engines.wire import SamplingParams
from dapo_megatron.errors import EngineError

URL = "http://engine:1"


class Server:
    """Notes what it is asked; `answers` are (HTTP status, body), or what goes wrong, by path."""

    def __init__(self):
        self.asked = []
        self.answers = {
            "/model_info": (200, {"weight_version": "3"}),
            "/server_info": (200, {"version": "0.5.23", "tp_size": 2}),
            "/weights_checker": (200, {"ranks": [{"checksums": {"a": "1"}}, {"checksums": {"a": "2"}}]}),
        }

    def handle(self, _, request):
        self.asked.append(request)
        answer = self.answers.get(request.url.path, (200, {}))
        if isinstance(answer, Exception):
            raise answer
        status, body = answer
        return httpx.Response(status, json=body) if not isinstance(body, str) else httpx.Response(status, text=body)

    def paths(self):
        """Of what it was asked since the last time."""
        paths = [request.url.path for request in self.asked]
        self.asked.clear()
        return paths

    def body(self):
        """Of the last request."""
        return json.loads(self.asked[-1].content)


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda *arguments: server.handle(*arguments))
    return server


@pytest.mark.parametrize(
    ("release", "has_sessions"),
    [("0.5.21", True), ("0.5.20.post1", False), ("0.5.9", False), ("0.6", True), ("1.0.0rc1", True), ("0.4.99", False)],
)
def test_an_older_server_has_no_sessions_and_no_checksums_and_is_flushed_by_a_call(server, release, has_sessions):
    server.answers["/server_info"] = (200, {"version": release, "tp_size": 2})
    engine = EngineControl(URL, 60)
    engine.wait_ready(5)
    assert server.paths() == ["/model_info", "/server_info"]
    for call in (engine.begin_update, engine.end_update, engine.flush_cache, engine.freeze_gc):
        call()
    sessions = ["/begin_weight_update", "/end_weight_update", "/freeze_gc"]
    assert server.paths() == (sessions if has_sessions else ["/flush_cache"])
    for flush in (True, False):
        engine.receive_tensors("g", ["a"], [[1]], "float32", flush_cache=flush)
        assert server.body()["flush_cache"] == (flush and has_sessions)
        engine.load_folder(Path("/w/1"), flush_cache=flush)
        assert server.body()["flush_cache"] == (flush and has_sessions)
    assert engine.checksums() == ([{"a": "1"}, {"a": "2"}] if has_sessions else [{}, {}])


def test_a_server_that_loads_is_waited_for(server, monkeypatch):
    answers = [httpx.ConnectError("refused"), (503, {}), httpx.ReadTimeout("slow"), (200, {})]
    server.answers["/model_info"] = answers.pop(0)
    next_one = SimpleNamespace(
        monotonic=module.time.monotonic,
        sleep=lambda _: server.answers.update({"/model_info": answers.pop(0)}),
    )
    monkeypatch.setattr(module, "time", next_one)
    EngineControl(URL, 60).wait_ready(5)
    assert not answers


@pytest.mark.parametrize(
    ("answer", "is_replaced", "says"),
    [
        ((401, {}), False, "refuses this run's key: another program serves there"),
        ((403, {}), False, "refuses this run's key: another program serves there"),
        ((503, {}), False, "did not answer within 0 s: see logs/latest/engine-"),
        ((503, {}), True, "was replaced before it answered"),
    ],
)
def test_one_that_is_waited_for_in_vain(server, answer, is_replaced, says):
    server.answers["/model_info"] = answer
    with pytest.raises(EngineError, match=f"^engine {URL} {says}"):
        EngineControl(URL, 60).wait_ready(0.3, lambda: is_replaced)


@pytest.mark.parametrize(
    ("answer", "is_up"), [((200, {}), True), ((401, {}), True), ((403, {}), True), ((503, {}), False)]
)
def test_one_is_up_that_answers_also_to_another_key(server, answer, is_up):
    server.answers["/model_info"] = answer
    assert EngineControl(URL, 60).is_up() == is_up
    server.answers["/model_info"] = httpx.ConnectError("refused")
    assert not EngineControl(URL, 60).is_up()


@pytest.mark.parametrize(("timeout_s", "quick_s"), [(120, 30), (12, 5), (3, 3)])
def test_what_is_quick_has_a_quarter_of_the_deadline(server, timeout_s, quick_s):
    engine = EngineControl(URL, timeout_s)
    engine.has_sessions = True
    quick = [engine.pause, engine.resume, engine.begin_update, engine.end_update, engine.version, engine.freeze_gc]
    for call in [*quick, engine.require_answer, lambda: engine.set_version(3)]:
        call()
    assert {request.extensions["timeout"]["read"] for request in server.asked} == {quick_s}
    server.asked.clear()
    engine.receive_tensors("g", ["a"], [[1]], "float32", flush_cache=False)
    engine.load_folder(Path("/w/1"), flush_cache=False)
    engine.join_group("g", "a", 1, 1, 2, "gloo")
    assert {request.extensions["timeout"]["read"] for request in server.asked} == {timeout_s}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (httpx.ReadTimeout("slow"), "did not answer /pause_generation within 30 s: see logs/latest/engine-"),
        (httpx.ConnectTimeout("slow"), "did not answer /pause_generation within 30 s: see logs/latest/engine-"),
        (httpx.ReadError("reset"), r"is gone \(/pause_generation: reset\): see logs/latest/engine-"),
        ((400, "no\n such mode"), "refused /pause_generation: HTTP 400 no such mode$"),
        ((200, {"success": False, "message": "busy"}), "refused /pause_generation: .*busy"),
    ],
)
def test_what_goes_wrong_is_one_line_that_names_server_and_call(server, answer, says):
    server.answers["/pause_generation"] = answer
    with pytest.raises(EngineError, match=f"^engine {URL} {says}") as e:
        EngineControl(URL, 120).pause()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("keep_kv", "mode"), [(False, "retract"), (True, "in_place")])
def test_a_pause_takes_the_requests_back_or_leaves_them_in_the_batch(server, keep_kv, mode):
    EngineControl(URL, 60).pause(keep_kv=keep_kv)
    assert server.body() == {"mode": mode}


def test_words_for_an_answer_are_no_error(server):
    server.answers["/continue_generation"] = (200, "Generation continued")
    EngineControl(URL, 60).resume()


def test_a_session_that_is_not_open_need_not_be_closed(server):
    engine = EngineControl(URL, 60)
    engine.has_sessions = True
    server.answers["/end_weight_update"] = (400, NO_SESSION)
    engine.abandon_update()
    server.answers["/end_weight_update"] = (500, "out of memory")
    with pytest.raises(EngineError, match="out of memory"):
        engine.abandon_update()


@pytest.mark.parametrize(("key", "header"), [("secret", "Bearer secret"), (None, None)])
def test_every_call_brings_the_key(server, key, header):
    engine = EngineControl(URL, 60, key)
    engine.pause()
    engine.is_up()
    assert [request.headers.get("Authorization") for request in server.asked] == [header, header]


def test_a_sample_that_the_server_aborted_is_an_error(server):
    meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": [[-0.5, 7, None]], "weight_version": "3"}
    whole, aborted = ({"meta_info": meta | {"finish_reason": {"type": kind}}} for kind in ("stop", "abort"))
    engine, params = EngineControl(URL, 60), SamplingParams(1)
    server.answers["/generate"] = (200, [whole, whole])
    assert [c.token_ids for c in engine.sample([[1], [2]], params, "key")] == [[7], [7]]
    assert server.body()["extra_key"] == "key" and server.body()["input_ids"] == [[1], [2]]
    server.answers["/generate"] = (200, [whole, aborted])
    with pytest.raises(EngineError, match=f"engine {URL} aborted 1 of its samples"):
        engine.sample([[1], [2]], params)
    engine.fill_cache([[1], [2]], params)  # whatever comes back
