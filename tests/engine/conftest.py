"""One real SGLang server for the whole session: starting it takes tens of seconds."""

import os
from contextlib import contextmanager, suppress

import psutil
import pytest

from dapo_megatron.errors import DapoError
from dapo_megatron.engines.control import EngineControl
from dapo_megatron.engines.command import engine_command, engine_environment
from launch.ports import reserved_ports
from launch.processes import ProcessGroup, tree
from tests.tiny import hf_folder, run_config

ENGINE = {"context_length": 512, "max_total_tokens": 8192, "mem_fraction": 0.1, "max_running_requests": 64}


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A tiny Qwen3 whose folder the server was started from."""
    return hf_folder(tmp_path_factory.mktemp("model"), "qwen3", tied=True, seed=1)


@contextmanager
def serve(model_path, log_dir, **options):
    """(URL, pid) of a server that is up, and ends with the block; `options` are of the config's section."""
    config = run_config(model_path, engine=ENGINE | options)
    log_dir.mkdir(exist_ok=True)
    group = ProcessGroup(log_dir)  # not `with`: leaving it ends every child of this process, other servers too
    with reserved_ports(1) as (port,):
        child = group.start(
            "engine-0",
            engine_command(config, "127.0.0.1", port, cpu=True),
            engine_environment(os.environ, cpu=True),
            grace=False,
        )
        url = f"http://127.0.0.1:{port}"
        control = EngineControl(url, 60)
        try:
            control.wait_ready(120)
            control.close()
            yield url, child.process.pid
        except DapoError:
            print(child.tail(60))
            raise
        finally:
            for process in tree(child):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            child.process.wait()


@pytest.fixture(scope="session")
def engine_url(model_path, tmp_path_factory):
    """URL of a server that is up."""
    with serve(model_path, tmp_path_factory.mktemp("logs")) as (url, _):
        yield url
