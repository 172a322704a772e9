"""The grading pool against answers and graders that hang, crash, raise and eat memory."""

import asyncio
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dapo_megatron.config import GradingConfig
from dapo_megatron.errors import DapoError
from dapo_megatron.grading.answers import grade
from dapo_megatron.grading.pool import DEFAULT_GRADER, GradingPool
from dapo_megatron.user_code import load_function


@pytest.fixture(autouse=True)
def graders_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def load(reference):
    return load_function(reference, "grading.grader", "text", "truth")


def grade_all(cases, grader=None, workers=2, timeout_s=2.0, memory_mib=256, **options):
    """Verdicts on (text, *truths) graded at once, the unknowns by reason, and the seconds it took."""

    async def run():
        async with GradingPool(grader, workers, timeout_s, memory_mib, **options) as pool:
            start = time.perf_counter()
            verdicts = await asyncio.gather(*(pool.grade(*case) for case in cases))
            return verdicts, dict(pool.unknown), time.perf_counter() - start

    result = asyncio.run(asyncio.wait_for(run(), 120))
    assert multiprocessing.active_children() == []
    return result


@pytest.mark.parametrize(
    "text, truth, verdict",
    [
        ("Answer:34", "34", "right"),
        ("Answer: 34.0", "34", "right"),
        ("**Answer:** 34", "34", "right"),
        ("Answer: 1,234", "1234", "right"),
        ("Answer: \\frac{1}{2}", "0.5", "right"),
        ("Answer: \\frac{1}{2}", "0.25", "wrong"),
        ("Answer: 0.5", "**1/2**.", "right"),
        ("\ud800\udfff Answer: 34 \udc00", "34", "wrong"),
        ("\ud800 text \udc00\nAnswer: 34", "34", "right"),
        ("\udc00\nAnswer: \\frac{68}{2}", "34", "right"),
        ("no answer", "34", "wrong"),
    ],
)
def test_verdicts_of_the_default_grader(text, truth, verdict):
    assert grade_all([(text, truth)])[0] == [verdict]


def test_several_truths_are_right_if_one_is():
    cases = [
        ("Answer: 34", "33", "34"),
        ("Answer: 34", "34", "33"),
        ("Answer: 34", "33", "35"),
        ("Answer: \\frac{1}{2}", "2", "0.5"),
        ("Answer: \\frac{1}{2}", "x", "0.25", "2^{-2}"),
    ]
    assert grade_all(cases)[0] == ["right", "right", "wrong", "right", "wrong"]
    user = [("34", "33", "34"), ("34", "33", "35")]
    assert grade_all(user, grader="hostile_graders:takes_two_of_three")[0] == ["right", "wrong"]


def test_a_grader_that_raises_on_one_truth_may_still_find_another_right():
    cases = [("", "33", "34"), ("", "34", "33"), ("", "35", "33"), ("", "35")]
    verdicts, unknown, _ = grade_all(cases, grader="hostile_graders:raises_on_one_truth")
    assert verdicts == ["right", "right", "unknown", "wrong"] and unknown == {"raised": 1}


@pytest.mark.parametrize("grader", [None, "hostile_graders:takes_two_of_three"])
def test_only_what_follows_the_thought_is_graded(grader):
    answer = "34" if grader else "Answer: 34"
    texts = [f"<think>Answer: 12</think>{answer}", f"Answer: 12</think>{answer}", f"<think>{answer}", answer]
    texts.append(f"<think>a</think><think>{answer}")
    verdicts = grade_all([(text, "34") for text in texts], grader, thinking=("<think>", "</think>"))[0]
    assert verdicts == ["right", "right", "wrong", "wrong", "wrong"]
    assert grade_all([("<think>Answer: 34", "34")])[0] == ["right"]


def test_boxed_only_makes_the_box_the_rule():
    texts = ["\\boxed{34}\nAnswer: 35", "Answer: 34", "The answer is 34."]
    assert grade_all([(text, "34") for text in texts], boxed_only=True)[0] == ["right", "wrong", "wrong"]
    assert grade_all([(text, "34") for text in texts])[0] == ["wrong", "right", "right"]


@pytest.mark.parametrize("grader", [None, DEFAULT_GRADER])
def test_the_built_in_grader_is_quick_by_either_name(grader, monkeypatch):
    async def no_worker(*_):
        raise AssertionError("a worker was asked")

    monkeypatch.setattr(GradingPool, "_ask_worker", no_worker)
    assert grade_all([("Answer: 34", "34"), ("Answer: 35", "34")], grader)[0] == ["right", "wrong"]
    assert GradingConfig().grader is None and load(DEFAULT_GRADER) is grade


def test_hostile_answers_are_never_right_and_do_not_stop_the_others():
    hostile = [
        "Answer: 9^9^9^9",
        "Answer: 100000000!",
        "Answer: " + "(" * 2000 + "34" + ")" * 2000,
        "Answer: 10^{10^{10}}",
        "Answer: " + "{" * 2000 + "35" + "}" * 2000,
        "x" * 1_000_000,
        "Answer: " + "x" * 1_000_000,
        "Answer: \ud800",
    ]
    good = ["Answer: \\frac{68}{2}"] * 4
    verdicts, unknown, seconds = grade_all([(text, "34") for text in hostile + good])
    assert "right" not in verdicts[: len(hostile)]
    assert verdicts[len(hostile) :] == ["right"] * 4
    assert sum(unknown.values()) == verdicts.count("unknown") > 0
    assert seconds < 20


def test_the_fast_path_needs_no_worker_and_little_time():
    texts = ["Let us think. " * 300 + f"\nAnswer: {number}" for number in range(1000)]
    verdicts, unknown, seconds = grade_all([(text, "34") for text in texts])
    assert verdicts.count("right") == 1 and unknown == {}
    assert seconds < 1.0


def test_the_caller_imports_neither_torch_nor_sympy():
    code = "import sys, dapo_megatron.grading.pool; print({'torch', 'sympy', 'math_verify'} & set(sys.modules))"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


def test_workers_do_not_import_torch():
    verdicts, _, _ = grade_all([("torch", ""), ("sys", "")], grader="hostile_graders:reports_its_modules")
    assert verdicts == ["wrong", "right"]


def test_a_user_grader_gets_the_whole_text_and_always_a_worker():
    pairs = [
        ("3 apples", "34"),
        ("4 apples", "34"),
        ("3" * 1_000_000, "34"),
        ("\ud800 apples", "? lone surrogate"),
    ]
    verdicts, unknown, _ = grade_all(pairs, grader="hostile_graders:first_character")
    assert verdicts == ["right", "wrong", "right", "right"] and unknown == {}


@pytest.mark.parametrize(
    "grader, bad, reason",
    [
        ("hangs", "hang", "timeout"),
        ("spins", "any", "timeout"),
        ("exits", "exit", "crashed"),
        ("quits", "any", "raised"),
        ("eats_memory", "eat", "raised"),
        ("raises", "any", "raised"),
    ],
)
def test_a_bad_grader_gives_unknown(grader, bad, reason):
    verdicts, unknown, seconds = grade_all([(bad, "34")] * 3, grader=f"hostile_graders:{grader}", timeout_s=1.0)
    assert verdicts == ["unknown"] * 3
    # A crash before the pool has read that the worker took the answer looks like a time-out to it.
    assert sum(unknown.values()) == 3 and (reason in unknown or grader == "exits")
    assert seconds < 8, "a worker that is deep in C is killed at once, not after a grace period"


def test_by_cpu_time_who_waits_is_not_late_and_who_computes_is():
    slow = [("Answer: 34", "34")] * 3
    verdicts, unknown, _ = grade_all(slow, "hostile_graders:waits", timeout_s=0.3, by_cpu_time=True)
    assert verdicts == ["right"] * 3 and not unknown
    assert grade_all(slow, "hostile_graders:waits", timeout_s=0.3)[0] == ["unknown"] * 3
    verdicts, unknown, seconds = grade_all(slow, "hostile_graders:spins", timeout_s=0.3, by_cpu_time=True)
    assert verdicts == ["unknown"] * 3 and unknown == {"timeout": 3} and seconds < 8
    # The time of one answer is not taken from the next: three of 0.2 s each in one worker.
    assert grade_all(slow, "hostile_graders:computes", 1, timeout_s=0.3, by_cpu_time=True)[0] == ["right"] * 3


def test_by_cpu_time_who_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr("dapo_megatron.grading.pool.WAITING", 2.0)
    verdicts, unknown, _ = grade_all([("hang", "34")], "hostile_graders:hangs", timeout_s=0.5, by_cpu_time=True)
    assert verdicts == ["unknown"] and unknown == {"timeout": 1}


@pytest.mark.parametrize(
    "grader, bad, line",
    [
        ("raises", "any", "3 answers without verdict: 3 raised, the last: hostile_graders.Unpicklable: broken"),
        ("hangs", "hang", "3 answers without verdict: 3 timeout, the last: no verdict within 0.5 s"),
    ],
)
def test_the_pool_says_in_a_line_why_there_was_no_verdict(grader, bad, line):
    async def run():
        async with GradingPool(f"hostile_graders:{grader}", workers=2, timeout_s=0.5, memory_mib=256) as pool:
            assert pool.trouble is None
            await asyncio.gather(*(pool.grade(bad, "34") for _ in range(3)))
            assert pool.trouble == line

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize(
    "value, verdict",
    [
        ("True", "right"),
        ("False", "wrong"),
        ("1", "right"),
        ("0", "wrong"),
        ("__import__('numpy').bool_(True)", "right"),
        ("__import__('numpy').bool_(False)", "wrong"),
        ("__import__('numpy').int64(1)", "right"),
    ],
)
def test_verdicts_of_a_user_grader(value, verdict):
    assert grade_all([(value, "34")], grader="hostile_graders:returns")[0] == [verdict]


@pytest.mark.parametrize(
    "value, shown",
    [
        ("-1.0", "-1.0 (float)"),
        ("1.0", "1.0 (float)"),
        ("0.0", "0.0 (float)"),
        ("float('nan')", "nan (float)"),
        ("None", "None (NoneType)"),
        ("2", "2 (int)"),
        ("-1", "-1 (int)"),
        ("'no'", "'no' (str)"),
        ("(False, 'reason')", "(False, 'reason') (tuple)"),
        ("{'score': 0}", "{'score': 0} (dict)"),
        ("[]", "[] (list)"),
        ("'two\\nlines'", "'two\\nlines' (str)"),
        ("__import__('numpy').float64(1)", "np.float64(1.0) (numpy.float64)"),
        ("__import__('numpy').array([True])", "array([ True]) (numpy.ndarray)"),
        ("(x for x in 'ab')", None),
    ],
)
def test_what_is_no_verdict_ends_the_run_in_one_line(value, shown):
    with pytest.raises(
        DapoError, match="^grading.grader=hostile_graders:returns returned .*: return True or False$"
    ) as e:
        grade_all([(value, "34")], grader="hostile_graders:returns")
    assert shown is None or f"returned {shown}:" in str(e.value)
    assert "\n" not in str(e.value) and len(str(e.value)) < 200


def test_an_async_grader_is_run_to_its_end():
    cases = [("34", "34"), ("35", "34")]
    assert grade_all(cases, grader="hostile_graders:grades_later")[0] == ["right", "wrong"]
    assert grade_all([("34", "34")], grader="hostile_graders:hangs_later", timeout_s=0.5)[0] == ["unknown"]
    with pytest.raises(DapoError, match=r"scores_later returned -1.0 \(float\)"):
        grade_all(cases, grader="hostile_graders:scores_later")


@pytest.mark.parametrize("grader", ["takes_one", "takes_three", "takes_names_only"])
def test_a_grader_of_other_arguments_is_refused_at_the_start(grader):
    with pytest.raises(DapoError, match=f"{grader} cannot be called as {grader}.text, truth.") as caught:
        grade_all([], grader=f"hostile_graders:{grader}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("grader", ["takes_two_of_three", "an_object"])
def test_a_grader_may_take_more_or_be_an_object(grader):
    assert grade_all([("34", "34"), ("35", "34")], grader=f"hostile_graders:{grader}")[0] == ["right", "wrong"]


@pytest.mark.parametrize("grader, bad", [("hangs", "hang"), ("exits", "exit"), ("eats_memory", "eat")])
def test_other_answers_are_graded_beside_a_bad_one(grader, bad):
    pairs = [("34", "34"), (bad, "34"), ("35", "34")] + [("34", "34")] * 20 + [(bad, "34"), ("34", "34")]
    verdicts, _, seconds = grade_all(pairs, grader=f"hostile_graders:{grader}", timeout_s=1.0)
    expected = ["unknown" if text == bad else "right" if text == truth else "wrong" for text, truth in pairs]
    assert verdicts == expected
    assert seconds < 15


def test_good_answers_do_not_wait_for_a_hanging_one():
    async def run():
        async with GradingPool("hostile_graders:hangs", workers=2, timeout_s=20.0, memory_mib=256) as pool:
            hanging = asyncio.create_task(pool.grade("hang", "34"))
            verdicts = await asyncio.wait_for(asyncio.gather(*(pool.grade("34", "34") for _ in range(50))), 10)
            assert verdicts == ["right"] * 50 and not hanging.done()
            hanging.cancel()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_killed_workers_are_replaced():
    async def run():
        async with GradingPool("hostile_graders:hangs", workers=2, timeout_s=5.0, memory_mib=256) as pool:
            assert await pool.grade("34", "34") == "right"
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, 9)
            await asyncio.sleep(0.5)
            assert await pool.grade("34", "34") == "right"

    asyncio.run(asyncio.wait_for(run(), 60))


def test_workers_die_with_the_caller():
    code = (
        "import asyncio, multiprocessing, os\n"
        "from dapo_megatron.grading.pool import GradingPool\n"
        "async def run():\n"
        "    async with GradingPool('hostile_graders:hangs', 2, 60.0, 256) as pool:\n"
        "        waiting = asyncio.create_task(pool.grade('hang', '34'))\n"
        "        await asyncio.sleep(0.5)\n"
        "        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)\n"
        "        os.kill(os.getpid(), 9)\n"
        "asyncio.run(run())\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[3])])
    caller = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    workers = [int(pid) for pid in caller.stdout.split()]
    assert len(workers) == 2
    end = time.monotonic() + 10
    while any(map(_runs, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(_runs, workers))


def _runs(pid):
    # A dead worker may stay a zombie: who inherits an orphan need not collect it.
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    "reference, message",
    [
        ("no_colon", "not of the form package.module:function"),
        (":function", "not of the form package.module:function"),
        ("no_such_package.module:grade", "importing no_such_package.module failed"),
        ("hostile_graders:no_such_function", "has no function no_such_function"),
        ("hostile_graders:not_callable", "has no function not_callable"),
        ("raises_at_import:grade", "importing raises_at_import failed .ValueError: no licence"),
    ],
)
def test_a_bad_reference_is_one_clear_line(reference, message):
    with pytest.raises(DapoError, match=message) as caught:
        load(reference)
    assert "\n" not in str(caught.value)
    with pytest.raises(DapoError, match=message):
        grade_all([("34", "34")], grader=reference)


def test_a_grader_whose_import_ends_the_process_is_one_clear_line():
    with pytest.raises(DapoError, match="its process dies while it imports the grader"):
        grade_all([("34", "34")], grader="exits_at_import:grade")


def test_those_that_wait_in_the_queue_have_the_time_of_those_before_them(monkeypatch):
    """One worker, four answers of a second each: the last is no slower than its limit of three."""

    async def run():
        async with GradingPool("hostile_graders:waits", 1, 3.0, 256) as graders:
            monkeypatch.setattr("dapo_megatron.grading.pool.START_TIMEOUT_S", 0.5)
            return await asyncio.gather(*(graders.grade(f"text {i}", "truth") for i in range(4))), graders.unknown

    verdicts, unknown = asyncio.run(asyncio.wait_for(run(), 120))
    assert verdicts == ["right"] * 4 and not unknown


def test_a_pool_that_broke_under_several_answers_is_replaced_once():
    async def run():
        async with GradingPool("hostile_graders:first_character", 1, 2.0, 256) as graders:
            broken = graders._pool
            graders._replace(broken)
            replaced = graders._pool
            graders._replace(broken)
            assert graders._pool is replaced is not broken
            assert await graders.grade("truth", "truth") == "right"

    asyncio.run(asyncio.wait_for(run(), 120))


def test_a_grader_may_take_what_is_allowed_beside_its_imports():
    cases = [("take", "200"), ("take", "600")]
    assert grade_all(cases, "hostile_graders:takes_memory", memory_mib=256)[:2] == (["right", "unknown"], {"raised": 1})


def test_each_answer_has_its_own_cpu_time():
    """The limit of a process is on its whole life: one worker computes longer than any answer may."""
    verdicts, unknown, _ = grade_all(
        [(f"text {i}", "truth") for i in range(13)],
        "hostile_graders:computes",
        workers=1,
        timeout_s=1.0,
        by_cpu_time=True,
    )
    assert verdicts == ["right"] * 13 and unknown == {}
