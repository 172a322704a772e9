"""Weights through the run folder when engines are replaced; these are HTTP servers that load what SGLang would."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed.harness import actor_on_rank, run_ranks  # first: patches megatron-core on machines without CUDA
from tests.tiny import hf_folder, run_config

from dapo_megatron.engines.engine_set import EngineSet, Member
from dapo_megatron.resharding.push import Pusher
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.weights.hf_folder import HfFolder


class Engine:
    """Serves from its making on; what is asked at a path of `fails` is refused, after a call of what is there."""

    def __init__(self, model, start):
        self.model, self.start, self.version, self.factor = HfFolder(model), start, "default", None
        self.is_paused, self.fails, self.asked = False, {}, set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, path, body):
        self.asked.add(path)
        if path in self.fails:
            self.fails[path]()
            return {"success": False}
        match path:
            case "/model_info":
                return {"weight_version": self.version}
            case "/server_info":
                return {"version": "0.5.23", "tp_size": 1}
            case "/pause_generation" | "/continue_generation":
                self.is_paused = path == "/pause_generation"
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/update_weights_from_disk":
                self.load(HfFolder(Path(body["model_path"])))
        return {}

    def load(self, folder):
        """`factor` becomes what all tensors of the model have been multiplied by."""
        factors = {float((folder.tensor(name) / self.model.tensor(name)).mean()) for name in self.model.files}
        assert self.is_paused and len(factors) == 1
        (self.factor,) = factors

    def state(self):
        return self.version, self.factor, self.is_paused

    def _handler(engine):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                reply = json.dumps(engine.answer(self.path, json.loads(data) if data else None)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        return Handler


class Run:
    """Of one rank; the first has the engines."""

    def __init__(self, config):
        self.actor, self.folder, self.now = actor_on_rank(config), RunFolder(Path(config.run_dir)).weights, None
        self.engines = [Engine(config.model.path, start) for start in (1, 1, 2)] if dist.get_rank() == 0 else [None] * 3
        self.pusher = Pusher(config, self.actor, lambda: self.now)

    def replace(self, *engines):
        """The launcher's word: these serve."""
        if dist.get_rank() == 0:
            generation = self.now.generation + 1 if self.now else 1
            members = tuple(Member(f"engine-{i}", e.url, e.start) for i, e in enumerate(engines))
            self.now = EngineSet(generation, members)

    def double(self):
        for module in self.actor.modules:
            for parameter in module.parameters():
                parameter.data.mul_(2)

    def seen(self):
        """[(version, factor, whether it is paused) of each engine]; the folders of weights."""
        if dist.get_rank() == 0:
            return [engine.state() for engine in self.engines], sorted(p.name for p in self.folder.iterdir())
        return None


def between_pushes(config):
    run = Run(config)
    first, second, third = run.engines
    run.replace(first, second)
    run.pusher.connect()
    run.pusher.push(601)
    if second:
        second.asked.clear()
    run.replace(first, third)
    run.double()
    run.pusher.push(602)
    seen = run.seen(), run.pusher.has_reconnected, second and second.asked
    run.pusher.close()
    return seen, run.folder.exists()


def in_a_push(config, path):
    """The second engine fails at what is asked at `path`."""
    run = Run(config)
    first, second, third = run.engines
    run.replace(first, second)
    run.pusher.connect()
    run.pusher.push(601)
    run.double()

    def fails():
        while path == "/update_weight_version" and first.version != "602":
            time.sleep(0.01)
        run.replace(first, third)

    if second:
        second.fails[path] = fails
    run.pusher.push(602)
    seen = run.seen(), run.pusher.has_reconnected
    run.double()
    run.pusher.push(603)
    return seen, run.seen(), run.pusher.has_reconnected


@pytest.fixture(params=[1, 2])
def config(request, tmp_path):
    actor = {"pipeline_model_parallel_size": request.param}
    config = run_config(hf_folder(tmp_path / "model", layers=2), actor=actor, resharding={"transport": "disk"})
    return config.model_copy(update={"run_dir": str(tmp_path / "run")})


def first_rank(config, function, *args):
    return run_ranks(config.actor.pipeline_model_parallel_size, function, config, *args)[0]


def test_one_that_was_replaced_between_two_pushes_is_asked_for_nothing_and_the_other_has_the_weights(config):
    (states, folders), has_reconnected, asked = (found := first_rank(config, between_pushes))[0]
    assert states == [("602", 2.0, False), ("601", 1.0, False), ("602", 2.0, False)] and folders == ["602"]
    assert has_reconnected and not asked and not found[1]


@pytest.mark.parametrize("path", ["/update_weights_from_disk", "/update_weight_version"])
def test_one_that_is_replaced_in_a_push_gets_this_push_and_so_do_all_others_anew(config, path):
    """The first one may serve the version already."""
    (seen, has_reconnected), later, reconnected_later = first_rank(config, in_a_push, path)
    lost = "601", 1.0 if path == "/update_weights_from_disk" else 2.0, True
    assert seen == ([("602", 2.0, False), lost, ("602", 2.0, False)], ["602"]) and has_reconnected
    assert later == ([("603", 4.0, False), lost, ("603", 4.0, False)], ["603"]) and not reconnected_later
