"""The ladder of deadlines, whatever the options are."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dapo_megatron.config import CheckpointConfig, EngineConfig, LaunchConfig, RolloutConfig, TrainerConfig
from dapo_megatron.config.deadlines import Deadlines

SECONDS = st.floats(0.5, 1e5)


def of(engine=None, trainer=None, checkpoint=None, launch=None, rollout=None):
    return Deadlines.of(
        RolloutConfig(**rollout or {}),
        EngineConfig(**engine or {}),
        TrainerConfig(**trainer or {}),
        CheckpointConfig(**checkpoint or {}),
        LaunchConfig(**launch or {}),
    )


@given(
    collective=st.floats(5, 1e5),
    batch=SECONDS,
    start=SECONDS,
    call=st.none() | SECONDS,
    beat=st.none() | st.floats(5, 1e5),
)
def test_whoever_waits_gives_up_before_those_that_wait_for_it(collective, batch, start, call, beat):
    assume((call or 0) < collective and (beat or 0) <= collective)
    d = of(
        {"call_timeout_s": call, "start_timeout_s": start},
        {"collective_timeout_s": collective, "batch_timeout_s": batch},
        launch={"heartbeat_timeout_s": beat},
    )
    assert max(d.engine_call, d.batch_part) < d.collective < d.waiting
    assert d.heartbeat <= d.collective and max(d.batch, d.engine_start) < d.waiting
    assert d.engine >= d.engine_call  # it may be busy with one


def test_what_is_not_said_follows_from_the_rest():
    d = of(trainer={"collective_timeout_s": 50}, checkpoint={"timeout_s": 7})
    assert (d.engine_call, d.batch_part, d.heartbeat, d.engine, d.saving) == (25, 25, 50, 50, 7)
    assert of(trainer={"collective_timeout_s": 500}).heartbeat == 60
    assert of({"call_timeout_s": 90}, {"collective_timeout_s": 100}).engine == 90
    assert of({"call_timeout_s": 12}, launch={"engine_timeout_s": 12}).engine == 12
    assert of(trainer={"collective_timeout_s": 50}, launch={"engine_timeout_s": 12}).engine_call == 12
    assert of(trainer={"collective_timeout_s": 20}, launch={"engine_timeout_s": 12}).engine_call == 10


def test_one_that_comes_too_late_is_refused():
    with pytest.raises(ValueError, match=r"engine.call_timeout_s=30 must be less than"):
        of({"call_timeout_s": 30}, {"collective_timeout_s": 30})
    of(rollout={"request_timeout_s": 7199})
    with pytest.raises(
        ValueError, match=r"rollout.request_timeout_s=7200 must be less than rollout.function_timeout_s=7"
    ):
        of(rollout={"request_timeout_s": 7200})
    with pytest.raises(ValueError, match=r"launch.heartbeat_timeout_s=31 must not exceed"):
        of(trainer={"collective_timeout_s": 30}, launch={"heartbeat_timeout_s": 31})
    with pytest.raises(ValueError, match=r"launch.engine_timeout_s=29 must not be less than engine.call_timeout_s=30"):
        of({"call_timeout_s": 30}, launch={"engine_timeout_s": 29})
