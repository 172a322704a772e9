"""Whom a run waits for: one situation at a time, and that whatever the phases there is one culprit or none."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.engines.engine_set import EngineSet, Member
from dapo_megatron.errors import Kind
from dapo_megatron.process import FOLLOWS_ENGINES, GREETS_CONTROLLER, Exit
from launch.attempts import REQUEUED, Attempt
from launch.culprit import DOES, PREPARE_S, SUSPECT_S, Condition, judge
from launch.lock import Holder
from launch.look import Process, Snapshot
from launch.states import Phase

TIMEOUT_S = 60.0


def process(name, phase, detail="", phase_s=40.0, silence_s=0.5, ended=None):
    return Process(name, f"host-of-{name}", 7, phase, detail, phase_s, silence_s, ended)


def ended(kind, message="why", time=1.0):
    return Exit("any", "host", 7, kind, message, "update", time)


def run(controller="generate", trainer="generate", detail="", ranks=2, **changes):
    """A run of two ranks, all of which are in one phase."""
    names = [f"trainer-{rank}" for rank in range(ranks)]
    processes = (process("controller", controller, detail), *(process(name, trainer) for name in names))
    engines = EngineSet(1, (Member("engine-0", "http://a:1"), Member("engine-1", "http://b:1")))
    seen = Snapshot(
        name="run",
        step=3,
        total_steps=10,
        is_complete=False,
        ranks=ranks,
        timeout_s=TIMEOUT_S,
        pace=None,
        saved=None,
        push=None,
        attempt=1,
        started=Attempt(0.0, 0, None, None),
        holder=Holder("host-of-launcher", 7, 0.0),
        held_s=5000.0,
        ended=None,
        launcher=process("launcher", Phase.RUNNING),
        processes=processes,
        engines=engines,
        engines_s=500.0,
        log=(),
    )
    return replace(seen, **changes)


def changed(seen, name, **changes):
    return replace(seen, processes=tuple(replace(p, **changes) if p.name == name else p for p in seen.processes))


def culprit(seen):
    verdict = judge(seen)
    assert verdict.condition == Condition.RUNNING
    return verdict.culprit, verdict.line


def test_the_controller_generates():
    assert culprit(run(detail="3/32 kept, 5/40 groups generated")) == (
        "controller",
        "trainer waits for the controller, which generates: 3/32 kept, 5/40 groups generated, 40 s",
    )
    assert culprit(run("evaluate", "evaluate", "step 4"))[1] == (
        "trainer waits for the controller, which evaluates: step 4, 40 s"
    )


def test_the_trainer_works():
    for phase in ("old_logprobs", "update", "push", "verify", "checkpoint", "load"):
        who, line = culprit(run("idle", phase))
        assert who == "trainer" and line == f"controller waits for the trainer, which {DOES[phase]}, 40 s"


def test_both_start():
    assert culprit(run("start", "start")) == ("trainer", "controller waits for the trainer, which starts, 40 s")
    seen = changed(run("start", "start", ranks=1), "trainer-0", detail=GREETS_CONTROLLER)
    assert culprit(seen) == ("controller", "trainer waits for the controller, which starts, 40 s")


def test_nobody_waits_while_groups_are_generated_ahead():
    who, line = culprit(run("generate", "update", "1/4 kept"))
    assert who is None
    assert line == "nobody waits: trainer updates, 40 s; controller generates: 1/4 kept, 40 s"


def test_a_rank_lags_behind():
    seen = changed(run("idle", "push"), "trainer-1", phase="update", phase_s=55.0)
    assert culprit(seen) == ("trainer-1", "trainer waits for trainer-1, which updates, 55 s; others are in push")


def test_engines_are_started():
    seen = changed(run(ranks=1), "trainer-0", detail=FOLLOWS_ENGINES)
    assert culprit(replace(seen, engines_s=20.0)) == (
        "engines",
        "trainer and controller wait for engines, which are being started, 20 s",
    )
    again = EngineSet(2, (Member("engine-0", "http://a:1"), Member("engine-1", "http://b:1", start=2)))
    assert culprit(replace(seen, engines=again))[0] == "engine-1"
    alone = replace(seen, engines=EngineSet(1, (Member("engine-0", "http://a:1"),)))
    assert culprit(alone)[0] == "engine-0"
    # An engine that was replaced after the push began is what the push waits for.
    assert culprit(run("idle", "push", engines=again, engines_s=10.0))[0] == "engine-1"
    assert culprit(run("idle", "push", engines=again, engines_s=500.0))[0] == "trainer"


def test_processes_are_started():
    assert culprit(run(launcher=None, held_s=PREPARE_S - 1))[0] == "launcher"
    # Of an earlier launcher: it is silent, and that says nothing of the new one.
    old = process("launcher", Phase.RUNNING, silence_s=1e5)
    assert culprit(run(launcher=old, holder=Holder("other", 8, 0.0), held_s=5.0))[0] == "launcher"
    assert culprit(run(processes=())) == ("controller", "controller is being started")
    assert culprit(run(processes=run().processes[:2])) == ("trainer-1", "trainer-1 is being started")
    assert culprit(run(launcher=process("launcher", Phase.RESTARTING)))[0] == "launcher"


def test_a_process_is_silent():
    seen = changed(run("idle", "update"), "trainer-1", silence_s=40.0)
    assert culprit(seen) == (
        "trainer-1",
        "trainer-1 (pid 7 on host-of-trainer-1) has not beaten for 40 s, in phase update",
    )
    verdict = judge(changed(seen, "trainer-1", silence_s=TIMEOUT_S))
    assert verdict.condition == Condition.HANGS and verdict.culprit == "trainer-1"
    # Who has ended is not silent, and who has failed is named until the launcher has acted.
    assert culprit(changed(seen, "trainer-1", exit=ended(None), phase="update"))[0] == "trainer"
    assert culprit(changed(seen, "trainer-1", exit=ended("engine", "engine-0 does not answer"))) == (
        "trainer-1",
        "trainer-1 (pid 7 on host-of-trainer-1) stopped (engine): engine-0 does not answer",
    )


def test_of_several_the_longest_silence_and_the_first_failure_are_named():
    silent = changed(changed(run("idle", "update"), "controller", silence_s=20.0), "trainer-1", silence_s=40.0)
    assert culprit(silent)[0] == "trainer-1"
    assert culprit(changed(silent, "controller", silence_s=50.0))[0] == "controller"
    first, later = ended("crash", "it began", 5.0), ended("engine", "and took it along", 6.0)
    assert culprit(changed(changed(run(), "trainer-0", exit=later), "trainer-1", exit=first))[0] == "trainer-1"
    assert culprit(changed(changed(run(), "trainer-0", exit=first), "trainer-1", exit=later))[0] == "trainer-0"


def test_the_launcher_is_gone():
    seen = run(launcher=process("launcher", Phase.RUNNING, silence_s=TIMEOUT_S))
    assert judge(seen).condition == Condition.FAILED and judge(seen).culprit == "launcher"
    in_job = Holder("host-of-launcher", 7, 0.0, 12)
    in_slurm = judge(replace(seen, holder=in_job))
    assert in_slurm.condition == Condition.NOT_RUNNING and "job 12" in in_slurm.line
    early = run(launcher=None, held_s=PREPARE_S)
    assert judge(early).condition == Condition.FAILED and "pid 7 on host-of-launcher" in judge(early).line
    assert judge(replace(early, holder=in_job)).condition == Condition.NOT_RUNNING


def test_nothing_runs():
    def judged(**changes):
        verdict = judge(run(holder=None, **changes))
        assert verdict.culprit is None
        return verdict.condition, verdict.line

    assert judged(ended=ended(None), is_complete=True) == (Condition.FINISHED, "finished at step 3 of 10")
    stopped = judged(ended=ended(None))
    assert stopped == (Condition.NOT_RUNNING, "stopped at step 3 of 10, as the file `stop` asked: --resume goes on")
    assert judged(ended=ended("data", "no prompts\nmore")) == (Condition.FAILED, "no prompts")
    assert judged(ended=ended("crash", ""))[0] == Condition.FAILED
    assert judged(ended=ended("preempted", "stopped by a signal"))[0] == Condition.NOT_RUNNING
    assert judged(ended=None)[0] == Condition.NOT_RUNNING
    queued = judged(
        ended=ended(None), launcher=process("launcher", REQUEUED, "node3 is lost"), started=Attempt(0.0, 0, 12, None)
    )
    assert queued == (Condition.NOT_RUNNING, "SLURM job 12 is back in the queue: node3 is lost")


def test_a_stop_is_asked_for():
    seen = run("idle", "checkpoint", launcher=process("launcher", Phase.STOPPING))
    assert culprit(seen) == ("trainer", "a stop was asked for; controller waits for the trainer, which saves, 40 s")


PHASES = st.sampled_from([*DOES, "done", "something new"])
SECONDS = st.floats(0, 1000)
EXITS = st.one_of(st.none(), st.builds(ended, st.sampled_from([None, *Kind.__args__]), st.sampled_from(["", "a\nb"])))
NAMES = ("controller", "trainer-0", "trainer-1", "trainer-2")


@st.composite
def situations(draw):
    there = draw(st.lists(st.sampled_from(NAMES), unique=True))
    processes = [
        Process(
            name,
            "host",
            1,
            draw(PHASES),
            draw(st.sampled_from(["", "x", FOLLOWS_ENGINES, GREETS_CONTROLLER])),
            *draw(st.tuples(SECONDS, SECONDS, EXITS)),
        )
        for name in sorted(there)
    ]
    members = tuple(Member(f"engine-{i}", "u", draw(st.integers(1, 3))) for i in range(draw(st.integers(1, 3))))
    launcher = st.builds(
        lambda phase, silence: process("launcher", phase, silence_s=silence),
        st.sampled_from([*Phase, REQUEUED, "start"]),
        SECONDS,
    )
    return run(
        ranks=3,
        processes=tuple(processes),
        engines=draw(st.one_of(st.none(), st.just(EngineSet(1, members)))),
        engines_s=draw(SECONDS),
        launcher=draw(st.one_of(st.none(), launcher)),
        holder=draw(st.one_of(st.none(), st.just(Holder("host-of-launcher", 7, 0.0)))),
        ended=draw(EXITS),
    )


@settings(max_examples=500, deadline=None)
@given(situations())
def test_there_is_one_culprit_or_none(seen):
    verdict = judge(seen)
    engines = [m.name for m in seen.engines.members] if seen.engines else []
    assert verdict.culprit in {None, "launcher", "trainer", "engines", *NAMES, *engines}
    assert verdict.line and "\n" not in verdict.line
    if verdict.culprit is not None:
        assert verdict.culprit in verdict.line
    # Silence is never overlooked, and nobody is accused of it without.
    alive = [p for p in (seen.launcher, *seen.processes) if p is not None and p.exit is None]
    if verdict.condition == Condition.HANGS:
        assert max(p.silence_s for p in alive) >= TIMEOUT_S
    elif seen.holder and seen.launcher and verdict.condition == Condition.RUNNING:
        assert all(p.silence_s < TIMEOUT_S for p in alive)
        if any(p.silence_s >= SUSPECT_S for p in alive):
            assert "has not beaten" in verdict.line
