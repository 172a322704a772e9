"""What a server is started with."""

import pytest

from dapo_megatron.engines.command import engine_command
from tests.tiny import run_config


@pytest.mark.parametrize("cpu", [True, False])
def test_a_deterministic_engine_runs_one_request_at_a_time_and_caches_nothing(tmp_path, cpu):
    def command(**engine):
        return engine_command(run_config(tmp_path, engine={"max_running_requests": 64} | engine), "h", 1, cpu=cpu)

    plain, exact = command(), command(deterministic=True)
    assert plain[plain.index("--max-running-requests") + 1] == "64" and "--disable-radix-cache" not in plain
    assert exact[exact.index("--max-running-requests") + 1] == "1" and "--disable-radix-cache" in exact
    # On CPU a plugin makes the sampler hear seeds; elsewhere SGLang's own option does.
    assert ("--enable-deterministic-inference" in exact) == (not cpu)
    assert "--enable-deterministic-inference" not in plain
