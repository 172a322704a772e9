"""The link between trainer and controller: who has no key is not heard, and nobody ends the controller from outside."""

import asyncio
import contextlib
import socket
import stat
import threading
import time

import msgspec
import pytest
import zmq

from dapo_megatron.errors import ConfigError, DataError, DapoError
from dapo_megatron.keys import make_keys, read_keys, write_keys
from dapo_megatron.messages import Done, Failed, FetchPart, Goodbye, Hello, NextBatch, Part, RestoreState
from dapo_megatron.rpc import RpcClient, RpcServer
from dapo_megatron.run_folder import RunFolder
from launch.ports import reserved_ports


def serve(keys, port, replies, received):
    """A server, in a thread of its own, that gives these replies and ends."""

    async def run():
        server = RpcServer(f"tcp://127.0.0.1:{port}", keys)
        for reply in replies:
            received.append(await server.receive())
            await server.reply(reply)
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=10):
            return thread
        time.sleep(0.05)


@pytest.fixture
def port():
    with reserved_ports(1) as (port,):
        yield port


def test_the_trainer_is_answered_and_hears_of_errors_by_their_kind(port):
    keys, received = make_keys(), []
    thread = serve(keys, port, [Done(), Failed("data", "no prompts are left")], received)
    client = RpcClient(f"tcp://127.0.0.1:{port}", keys)
    assert client.ask(Hello(0), deadline_s=10) == Done()
    with pytest.raises(DataError, match="the controller stopped: no prompts are left"):
        client.ask(NextBatch(1, 0), deadline_s=10)
    client.close()
    thread.join(10)
    assert received == [Hello(0), NextBatch(1, 0)]


def ask_raw(port, request, configure=lambda _: None):
    context = zmq.Context()
    with context.socket(zmq.REQ) as s:
        s.setsockopt(zmq.LINGER, 0)
        configure(s)
        s.connect(f"tcp://127.0.0.1:{port}")
        s.send(msgspec.msgpack.encode(request))
        answered = bool(s.poll(700))
    context.term()
    return answered


def test_strangers_are_not_heard(port):
    keys, others, received = make_keys(), make_keys(), []
    thread = serve(keys, port, [Done()], received)

    def with_a_key_of_its_own(s):
        s.curve_serverkey = keys.controller.public.encode()
        s.curve_publickey = others.trainer.public.encode()
        s.curve_secretkey = others.trainer.secret.encode()

    with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
        s.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 100)
    assert not ask_raw(port, Hello(0))  # without a key
    assert not ask_raw(port, Goodbye(), with_a_key_of_its_own)
    assert received == []
    client = RpcClient(f"tcp://127.0.0.1:{port}", keys)
    assert client.ask(Goodbye(), deadline_s=10) == Done()
    client.close()
    thread.join(10)
    assert received == [Goodbye()]


def test_a_controller_that_does_not_answer_is_named(port):
    client = RpcClient(f"tcp://127.0.0.1:{port}", make_keys())
    with pytest.raises(DapoError, match=f"127.0.0.1:{port} did not answer Goodbye within 0 s"):
        client.ask(Goodbye(), deadline_s=0.2)
    client.close()


def test_keys_are_their_owners_alone_and_differ(tmp_path):
    folder = RunFolder(tmp_path)
    folder.keys.write_text("old, and readable by everybody")
    keys = make_keys()
    write_keys(folder, keys)
    assert read_keys(folder) == keys != make_keys()
    assert {stat.S_IMODE(p.stat().st_mode) for p in (folder.keys, folder.engine_options)} == {0o600}
    assert keys.engine_api_key in folder.engine_options.read_text()
    folder.keys.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(folder)


def test_a_wait_is_interrupted_and_taken_up_again(port):
    keys, received, looks = make_keys(), [], []

    async def run():
        server = RpcServer(f"tcp://127.0.0.1:{port}", keys)
        received.append(await server.receive())
        await asyncio.sleep(1.5)
        await server.reply(Done())
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    client = RpcClient(f"tcp://127.0.0.1:{port}", keys)
    client.send(NextBatch(1, 0), deadline_s=10)
    assert client.receive(lambda: True) is None
    assert client.receive(lambda: looks.append(1) is not None) == Done()
    assert looks and received == [NextBatch(1, 0)]
    client.close()
    thread.join(10)


def test_a_message_that_is_too_long_is_one_line_and_not_sent(port, monkeypatch):
    monkeypatch.setattr("dapo_megatron.rpc.MESSAGE_BYTES", 1000)
    client = RpcClient(f"tcp://127.0.0.1:{port}", make_keys())
    with pytest.raises(DapoError, match="RestoreState takes 0.0 GiB, and a message can carry 2"):
        client.send(RestoreState(bytes(1000)), deadline_s=1)
    client.send(RestoreState(bytes(900)), deadline_s=1)
    client.close()


def test_several_ranks_get_their_own_answers(port):
    keys, received, found = make_keys(), [], {}
    thread = serve(keys, port, [Part(bytes([i]) * 3_000_000) for i in range(6)], received)

    def ask(rank):
        client = RpcClient(f"tcp://127.0.0.1:{port}", keys)
        found[rank] = [client.ask(FetchPart(1, update, rank, 0), deadline_s=20).payload for update in range(2)]
        client.close()

    ranks = [threading.Thread(target=ask, args=(rank,)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    thread.join(10)
    for number, request in enumerate(received):
        assert found[request.replica][request.update] == bytes([number]) * 3_000_000
    assert len(received) == 6
