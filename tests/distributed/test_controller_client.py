"""What rank 0 asks the controller, and what it makes of the answers; batches are fetched in test_replica_batch.py."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from tests.distributed.harness import run_ranks  # noqa: F401  # first: patches megatron-core on machines without CUDA
from tests.tiny import run_config

from dapo_megatron.checkpoint.train_state import TrainState
from dapo_megatron.errors import DapoError
from dapo_megatron.messages import BeginEvaluation, Done, Evaluate, Evaluation, Hello, RestoreState, Welcome
from dapo_megatron.trainer import controller_client as module
from dapo_megatron.trainer.controller_client import ControllerClient, Meanwhile

STATE, NOTHING = TrainState(7, 9), Meanwhile(lambda: False, lambda: None)


class Rpc:
    """Gives these answers, one after the other; None where the wait is broken off."""

    def __init__(self, *answers):
        self.answers, self.asked, self.closed = list(answers), [], False

    def send(self, request, deadline_s):
        self.asked.append((request, deadline_s))

    def receive(self, is_due):
        if self.answers[0] is None:
            assert is_due()
        return self.answers.pop(0)

    def ask(self, request, deadline_s):
        self.send(request, deadline_s)
        return Done()

    def close(self):
        self.closed = True


@pytest.fixture
def client_of(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "on_first_rank", lambda what, layout, call, **_: call())
    monkeypatch.setattr(module, "all_agree", lambda *_: nullcontext())

    def made(*answers, **sections):
        rpc = Rpc(*answers)
        monkeypatch.setattr(module, "RpcClient", lambda address, keys: rpc)
        layout = SimpleNamespace(rank=0, is_first_of_replica=True)
        return ControllerClient(run_config(tmp_path, **sections), layout, "tcp://c", None), rpc

    return made


def test_a_run_that_goes_on_gives_the_controller_its_state_first(client_of, monkeypatch):
    monkeypatch.setattr("dapo_megatron.data.snapshot.PART_BYTES", 4)
    client, rpc = client_of(Welcome([[5, 6]]))
    assert client.hello(STATE, b"snapshot!") == [[5, 6]]
    requests = [request for request, _ in rpc.asked]
    assert requests == [*map(RestoreState, (b"snap", b"shot", b"!")), Hello(7, True)]
    assert client.state() == b"snapshot!"
    client, rpc = client_of(Welcome([]))
    client.hello(STATE, None)
    assert rpc.asked[0][0] == Hello(7, False) and client.state() == b""


def test_what_is_due_is_done_while_an_answer_is_waited_for(client_of):
    acts = []
    client, rpc = client_of(None, None, Evaluation({"eval/accuracy": 0.5}), data={"eval": "e.jsonl"})
    found = client.evaluate(STATE, Meanwhile(lambda: True, lambda: acts.append(len(rpc.answers))))
    assert found == {"eval/accuracy": 0.5} and acts == [2, 1]
    assert rpc.asked == [(Evaluate(7, 9), client.config.trainer.batch_timeout_s)]


def test_an_evaluation_is_of_held_out_prompts(client_of):
    client, rpc = client_of()
    assert client.evaluate(STATE, NOTHING) == {} and not rpc.asked
    client, rpc = client_of(Done(), data={"eval": "e.jsonl"})
    client.begin_evaluation(STATE)
    assert rpc.asked[0][0] == BeginEvaluation(7, 9)


def test_another_answer_than_asked_for_is_an_error(client_of):
    client, _ = client_of(Done())
    with pytest.raises(DapoError, match="the controller answered Hello with Done"):
        client.hello(STATE, None)


def test_both_connections_end(client_of):
    client, rpc = client_of()
    client.close()
    assert rpc.closed
    client._rpc, client._fetcher = None, None  # another rank
    client.close()
