"""A trainer rank of the weight-push benchmark: Megatron's parameters, pushed whenever it is told to."""

import os
from multiprocessing.connection import Connection

from dapo_megatron.compat import prepare_trainer

prepare_trainer()

from dapo_megatron.actor.actor import Actor
from dapo_megatron.config import RunConfig
from dapo_megatron.distributed.layout import init_parallel
from dapo_megatron.engines.engine_set import of_urls
from dapo_megatron.resharding.push import Pusher
from dapo_megatron.weights.hf_config import read_model


def push_when_told(pipe: Connection, config: RunConfig, port: int, rank: int) -> None:
    """Each message is the engines' URLs; the answer is what the push to them measured.

    Args:
        port: where the ranks meet.
    """
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(config.world_size)
    actor = Actor(config, read_model(config.model.path), init_parallel(config))
    actor.load_hf(config.model.path)
    pipe.send("ready")
    urls: list[str] = []
    pusher = Pusher(config, actor, lambda: of_urls(urls))
    version, connected = 0, urls
    while urls := pipe.recv():
        if urls != connected:
            pusher.connect()
            connected = urls
        version += 1
        pipe.send(pusher.push(version))
