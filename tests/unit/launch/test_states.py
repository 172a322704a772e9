"""The launcher's decisions: each row of the table, and that no order of events leads into a dead end or a loop."""

import random
from dataclasses import replace

import pytest

from launch.states import (
    AskToStop,
    End,
    EndTraining,
    EngineLost,
    Finished,
    GraceOver,
    HostLost,
    Limits,
    Phase,
    Progress,
    Requeue,
    StartEngine,
    StartTraining,
    State,
    StopAsked,
    TrainingEnded,
    TrainingFailed,
    decide,
)

CRASH = TrainingFailed("crash", "trainer-1 was killed", "node1")


def state(*, restarts=2, requeue=True, can_fail=True, spares=(), **others):
    """Training in slot 0, an engine each in slots 1 and 2."""
    return State(
        limits=Limits(max_restarts=restarts, can_requeue=requeue, can_fail=can_fail),
        hosts=("node1", "node2", "node3"),
        engines={"engine-0": 1, "engine-1": 2},
        training=frozenset({0}),
        spares=spares,
        **others,
    )


def after(state, *events):
    """(the state after all events, the actions of the last)."""
    actions = []
    for event in events:
        state, actions = decide(state, event)
    return state, actions


def test_an_engine_is_started_again_alone():
    found, actions = after(state(), EngineLost("engine-1", "killed"))
    assert actions == [StartEngine("engine-1")] and found.phase is Phase.RUNNING
    assert found.hosts == ("node1", "node2", "node3")


def test_an_engine_that_failed_twice_moves_to_a_spare_host():
    found, actions = after(state(spares=("node4",)), *2 * [EngineLost("engine-0", "killed")])
    assert actions == [StartEngine("engine-0")]
    assert found.hosts == ("node1", "node4", "node3") and found.spares == ()


@pytest.mark.parametrize(("limit", "says"), [(0, "killed"), (2, "killed (after 2 restarts of engine-0)")])
def test_an_engine_is_not_started_for_ever(limit, says):
    found, actions = after(state(restarts=limit, requeue=False), *(limit + 1) * [EngineLost("engine-0", "killed")])
    assert actions == [End("engine", says)] and found.phase is Phase.OVER


def test_where_the_engines_of_one_host_alone_fail_the_job_comes_back_without_it():
    often = 3 * [EngineLost("engine-0", "killed")]
    why = "killed (after 2 restarts of engine-0)"
    assert after(state(), *often)[1] == [Requeue(why, ("node2",), True)]
    assert after(state(can_fail=False), *often)[1] == after(state(requeue=False), *often)[1] == [End("engine", why)]
    # Others fail too, or there are none: the engines are what is wrong.
    assert after(state(), EngineLost("engine-1", "killed"), *often)[1] == [End("engine", why)]
    alone = replace(state(), engines={"engine-0": 1})
    assert after(alone, *often)[1] == [End("engine", why)]
    # Failed once, it is not left out: the next start would be the same.
    assert after(state(restarts=0), often[0])[1] == [End("engine", "killed")]


def test_one_engine_does_not_use_up_the_restarts_of_another():
    _, actions = after(state(restarts=1), EngineLost("engine-0", "killed"), EngineLost("engine-1", "killed"))
    assert actions == [StartEngine("engine-1")]


def test_the_training_is_started_again_when_nothing_of_it_is_left():
    found, actions = after(state(), CRASH)
    assert actions == [EndTraining()] and found.phase is Phase.RESTARTING
    # What its death does to others is no failure of theirs.
    assert after(found, TrainingFailed("crash", "the controller lost its trainer"))[1] == []
    found, actions = after(found, TrainingEnded())
    assert actions == [StartTraining()] and found.phase is Phase.RUNNING and found.restarts == 1


@pytest.mark.parametrize("kind", ["configuration", "data", "storage"])
def test_what_a_person_must_mend_is_not_tried_again(kind):
    found, actions = after(state(), Progress(3), TrainingFailed(kind, "no such file"))
    assert actions == [End(kind, "no such file")] and found.phase is Phase.OVER


def test_a_restart_without_progress_is_the_last():
    restarted = [CRASH, TrainingEnded()]
    _, actions = after(state(), Progress(4), *restarted, CRASH)
    assert actions == [End("crash", "trainer-1 was killed (again at step 4: no progress)")]
    _, actions = after(state(), Progress(4), *restarted, Progress(5), CRASH)
    assert actions == [EndTraining()]


def test_a_failure_on_the_way_back_to_where_the_last_one_was_is_another():
    back = [Progress(49), CRASH, TrainingEnded(), Progress(40), Progress(45)]
    _, actions = after(state(restarts=3), *back, CRASH)
    assert actions == [EndTraining()]
    _, actions = after(state(restarts=3), *back, CRASH, TrainingEnded(), Progress(40), Progress(45), CRASH)
    assert actions == [End("crash", "trainer-1 was killed (again at step 45: no progress)")]


def test_neither_a_lost_host_nor_one_that_failed_twice_is_a_lack_of_progress():
    at = state(restarts=3, spares=("node4", "node5"))
    _, actions = after(at, Progress(4), HostLost("node1"), TrainingEnded(), CRASH)
    assert actions == [EndTraining()]
    found, actions = after(at, Progress(4), CRASH, TrainingEnded(), CRASH)
    assert actions == [EndTraining()] and found.hosts[0] == "node4"


def test_beyond_the_limit_the_job_goes_back_into_the_queue_if_it_got_further():
    thrice = [CRASH, TrainingEnded(), Progress(5), CRASH, TrainingEnded(), Progress(6), CRASH]
    _, actions = after(state(step=4, step_at_start=4), *thrice)
    assert actions == [Requeue("trainer-1 was killed (after 2 restarts)", ("node1",), True)]
    _, actions = after(state(step=4, step_at_start=4, requeue=False), *thrice)
    assert actions == [End("crash", "trainer-1 was killed (after 2 restarts)")]
    _, actions = after(state(step=9, step_at_start=9, restarts=0), CRASH)
    assert actions == [End("crash", "trainer-1 was killed")]


def test_a_lost_host_is_replaced_or_left_out():
    found, actions = after(state(spares=("node4",)), HostLost("node3"))
    assert actions == [StartEngine("engine-1")] and found.hosts[2] == "node4"
    found, actions = after(state(spares=("node4",)), HostLost("node1"))
    assert actions == [EndTraining()] and found.hosts[0] == "node4" and found.phase is Phase.RESTARTING
    _, actions = after(state(), Progress(2), HostLost("node3"))
    assert actions == [Requeue("node3 is lost, and no spare host is left", ("node3",), True)]
    _, actions = after(state(step=9, step_at_start=9), HostLost("node3"))
    assert actions == [Requeue("node3 is lost, and no spare host is left", ("node3",), True)]
    _, actions = after(state(requeue=False), Progress(2), HostLost("node3"))
    assert actions == [End("crash", "node3 is lost, and no spare host is left")]
    found, actions = after(state(spares=("node4", "node5")), HostLost("node4"))
    assert actions == [] and found.spares == ("node5",)


def test_a_host_that_is_lost_between_two_starts_is_not_started_on():
    found, actions = after(state(spares=("node4",)), CRASH, HostLost("node1"))
    assert actions == [] and found.hosts[0] == "node4"
    assert after(found, TrainingEnded())[1] == [StartTraining()]


def test_a_host_may_call_itself_by_its_domain():
    crash = replace(CRASH, host="node1.cluster.local")
    found, _ = after(state(spares=("node4",)), crash, TrainingEnded(), Progress(1), crash)
    assert found.hosts[0] == "node4"
    found, _ = after(state(), replace(CRASH, host="elsewhere"))
    assert found.failures == {}


def test_a_spare_host_replaces_those_of_its_pool():
    pools = {"node1": 0, "node2": 1, "node3": 1, "node4": 0, "node5": 1}
    at = state(spares=("node4", "node5"), pools=pools)
    found, actions = after(at, HostLost("node3"))
    assert actions == [StartEngine("engine-1")] and found.hosts[2] == "node5" and found.spares == ("node4",)
    found, actions = after(at, Progress(1), HostLost("node3"), HostLost("node2"))
    assert actions == [Requeue("node2 is lost, and no spare host is left", ("node2", "node3"), True)]
    found, _ = after(at, HostLost("node1"))
    assert found.hosts == ("node4", "node2", "node3")


def test_what_shares_a_host_moves_together():
    shared = replace(state(spares=("node4",)), engines={"engine-0": 0, "engine-1": 2})
    found, actions = after(shared, HostLost("node1"))
    assert actions == [StartEngine("engine-0"), EndTraining()] and found.hosts == ("node4", "node2", "node3")


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_stop_is_asked_for_and_waited_for(comes_back):
    found, actions = after(state(), Progress(1, saved=1), StopAsked("time limit", comes_back))
    assert actions == [AskToStop()] and found.phase is Phase.STOPPING
    end = Requeue("time limit", (), False) if comes_back else End("preempted", "stopped: time limit")
    assert after(found, Finished(is_complete=False))[1] == [end]
    assert after(found, Finished(is_complete=True))[1] == [End(None, "finished")]
    (late,) = after(found, GraceOver())[1]
    assert type(late) is type(end)
    (failed,) = after(found, CRASH)[1]
    assert type(failed) is type(end)
    assert after(found, EngineLost("engine-0", "killed"))[1] == []
    assert after(state(requeue=False), StopAsked("time limit", comes_back), Finished(False))[1] == [
        End("preempted", "stopped: time limit")
    ]


def test_a_run_that_stops_can_do_without_the_hosts_of_engines():
    stopping, _ = after(state(), Progress(1, saved=1), StopAsked("time limit", True))
    found, actions = after(stopping, HostLost("node3"))
    assert actions == [] and found.phase is Phase.STOPPING
    assert after(found, Progress(2, saved=2), Finished(False))[1] == [Requeue("time limit", ("node3",), False)]
    assert after(found, HostLost("node1"))[1] == [
        Requeue("time limit; and then node1 was lost", ("node1", "node3"), False)
    ]


def test_where_no_more_failures_are_allowed_the_time_limit_is_none():
    stop = [StopAsked("time limit", True), Finished(False)]
    assert after(state(can_fail=False), Progress(1, saved=1), *stop)[1] == [Requeue("time limit", (), False)]
    # Where nothing more was saved the next start would end in the same way.
    began = {"step": 6, "step_at_start": 6, "saved": 4, "saved_at_start": 4}
    late = [Progress(9, saved=4), stop[0], GraceOver()]
    for events in (stop, late):
        assert after(state(**began), *events)[1][0].is_failure
        assert isinstance(after(state(**began, can_fail=False), *events)[1][0], End)
    # What an earlier start had done beyond its checkpoint is done again first.
    assert after(state(**began), Progress(5, saved=5), *stop)[1] == [Requeue("time limit", (), False)]
    # A checkpoint that makes way for another of its step was saved all the same.
    assert after(state(**began), Progress(5, saved=5), Progress(5, saved=4), *stop)[1][0].is_failure is False
    at = state(**began, can_fail=False, restarts=0)
    assert after(at, *stop)[1] == [End("preempted", "stopped: time limit")]
    assert after(at, HostLost("node3"))[1] == [End("crash", "node3 is lost, and no spare host is left")]
    assert after(at, Progress(7), CRASH)[1] == [End("crash", "trainer-1 was killed")]


def test_who_ends_a_run_for_good_is_heard_before_and_after_who_wants_it_back():
    for_good, wants_back = StopAsked("a person", False), StopAsked("time limit", True)
    for stops in ([wants_back, for_good], [for_good, wants_back]):
        _, actions = after(state(), *stops, Finished(False))
        assert isinstance(actions[0], End)


def test_a_stop_between_two_starts_does_not_wait():
    _, actions = after(state(), Progress(1, saved=1), CRASH, StopAsked("time limit", True))
    assert actions == [Requeue("time limit", (), False)]


def random_event(rng, at):
    host = rng.choice([*at.hosts, *at.spares, "elsewhere"])
    kind = rng.choice(["configuration", "data", "engine", "storage", "preempted", "crash"])
    return rng.choice(
        [
            EngineLost(rng.choice(sorted(at.engines)), "e"),
            TrainingFailed(kind, "t", rng.choice([None, *at.hosts])),
            TrainingEnded(),
            Finished(rng.random() < 0.5),
            HostLost(host),
            Progress(at.step + rng.randrange(2), at.saved + rng.randrange(2)),
            StopAsked("s", rng.random() < 0.5),
            GraceOver(),
        ]
    )


@pytest.mark.parametrize("seed", range(300))
def test_no_order_of_events_leads_into_a_dead_end_or_a_loop(seed):
    rng = random.Random(seed)
    limit, spares = rng.randrange(4), tuple(f"spare{i}" for i in range(rng.randrange(3)))
    pools = {host: rng.randrange(2) for host in ("node1", "node2", "node3", *spares)}
    at = state(restarts=limit, requeue=rng.random() < 0.5, can_fail=rng.random() < 0.5, spares=spares, pools=pools)
    needed = [pools[host] for host in at.hosts]
    if rng.random() < 0.3:
        at = replace(at, engines={"engine-0": 0, "engine-1": 1})
    starts, trainings, ends, asked = 0, 0, 0, 0
    for _ in range(200):
        before = at
        at, actions = decide(at, random_event(rng, at))
        assert len(set(at.hosts)) == len(at.hosts) and not set(at.hosts) & set(at.spares)
        assert [pools[host] for host in at.hosts] == needed
        starts += sum(isinstance(a, StartEngine) for a in actions)
        trainings += StartTraining() in actions
        asked += AskToStop() in actions
        ends += sum(isinstance(a, End | Requeue) for a in actions)
        # Whoever waits has asked for what it waits for.
        assert (at.phase is Phase.RESTARTING) <= (before.phase is Phase.RESTARTING or EndTraining() in actions)
        assert (at.phase is Phase.STOPPING) <= (before.phase is Phase.STOPPING or AskToStop() in actions)
        assert (at.phase is Phase.OVER) == (ends == 1)
        if StartTraining() in actions:
            assert before.phase is Phase.RESTARTING
        for requeue in (a for a in actions if isinstance(a, Requeue)):
            assert at.limits.can_requeue and (at.limits.can_fail or not requeue.is_failure)
    moves = 2 * len(spares)  # a slot has two engines at most
    assert starts <= 2 * limit + moves and trainings <= limit + len(spares) and asked <= 1 and ends <= 1
    # Every phase has a way out.
    at, _ = decide(at, TrainingEnded())
    at, _ = decide(at, GraceOver())
    assert at.phase in (Phase.RUNNING, Phase.OVER)
