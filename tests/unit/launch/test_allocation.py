"""What SLURM told real jobs (tests/slurm/record.py recorded it) is read as what those jobs had."""

import itertools
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, strategies as st

from dapo_megatron.errors import ConfigError, DapoError
from launch.allocation import Allocation, Group, Node, expand_counts, find_allocation, read_allocation
from launch.slurm import begin
from tests.tiny import run_config

RECORDED = Path(__file__).parent / "recorded"
MADE = {
    "plain": [(1, [("node1", 4, 8), ("node2", 4, 8), ("node3", 4, 8)])],
    "no_devices": [(2, [("node1", 1, 0)])],
    "uneven": [(3, [("node1", 16, 8), ("node2", 4, 2)])],
    "het": [(4, [("node1", 4, 8)]), (5, [("node2", 1, 4), ("node3", 1, 4)])],
    "requeued": [(6, [("node1", 1, 2), ("node2", 1, 2)])],
    "het_requeued": [(7, [("node1", 1, 2), ("node2", 1, 2)]), (8, [("node3", 1, 0)])],
}


def recorded(name):
    """(environment, shown, expand) of a recorded job."""
    environment = dict(line.split("=", 1) for line in (RECORDED / f"{name}.env").read_text().splitlines())
    lists = {words[0]: words[1:] for words in map(str.split, (RECORDED / f"{name}.hosts").read_text().splitlines())}
    return environment, (RECORDED / f"{name}.show").read_text(), lists.__getitem__


@pytest.mark.parametrize("name", MADE)
def test_every_recorded_job_is_read(name):
    found = read_allocation(*recorded(name))
    groups = tuple(Group(job, tuple(Node(*node) for node in nodes)) for job, nodes in MADE[name])
    assert found.groups == groups
    assert found.job_id == groups[0].job_id
    assert found.restarts == (1 if "requeued" in name else 0)
    assert found.is_heterogeneous == ("het" in name)
    assert [n.name for n in found.nodes] == [node[0] for _, nodes in MADE[name] for node in nodes]


def test_the_end_is_the_start_and_the_time_limit():
    environment, shown, expand = recorded("het")
    start = float(shown.partition(" StartTime=")[2].split()[0])
    assert read_allocation(environment, shown, expand).ends == start + 600
    unlimited = shown.replace(f" EndTime={start + 600:.0f}", " EndTime=Unknown")
    assert unlimited != shown
    assert read_allocation(environment, unlimited, expand).ends is None


@pytest.mark.parametrize("first", ["900", "Unknown", "901"])
@pytest.mark.parametrize("second", ["900", "Unknown", "901"])
def test_a_heterogeneous_job_ends_with_the_first_of_its_groups(first, second):
    environment, shown, expand = recorded("het_requeued")
    ends = iter([first, second])
    shown = re.sub(r"(?<= EndTime=)\S+", lambda _: next(ends), shown)
    limits = [float(end) for end in (first, second) if end != "Unknown"]
    assert read_allocation(environment, shown, expand).ends == (min(limits) if limits else None)


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:8(IDX:0-7)", 8),
        ("gpu:4(IDX:0,2,4-5)", 4),
        ("gpu:h100:4(IDX:0-3)", 4),
        ("gpu:3090:2(IDX:0-1)", 2),
        ("gpu:a100:2(IDX:0-1),gpu:h100:4(IDX:2-5)", 6),
        ("gpu:a100_1g.5gb:7(IDX:0-6),shard:4(IDX:0)", 7),
        ("shard:gpu:4(IDX:0-3)", 0),
        ("gpu:8", 8),
        ("", 0),
        ("(null)", 0),
    ],
)
def test_gpus_of_every_type_are_counted(gres, gpus):
    environment, shown, expand = recorded("plain")
    changed = shown.replace("GRES=gpu:8(IDX:0-7)", f"GRES={gres}")
    assert changed != shown or gres == "gpu:8(IDX:0-7)"
    assert {n.gpus for n in read_allocation(environment, changed, expand).nodes} == {gpus}


def test_a_job_that_slurm_does_not_put_back_is_known(tmp_path):
    environment, shown, expand = recorded("het")
    assert read_allocation(environment, shown, expand).can_requeue
    assert not read_allocation(environment, shown.replace("Requeue=1", "Requeue=0"), expand).can_requeue
    named = shown.replace("JobName=het", "JobName=x Requeue=0")
    assert named != shown and read_allocation(environment, named, expand).can_requeue


def test_a_name_that_looks_like_an_answer_is_not_one():
    environment, shown, expand = recorded("plain")
    changed = shown.replace("JobName=plain", "JobName=x EndTime=1 Nodes=y GRES=gpu:3(IDX:0-2)")
    assert changed != shown
    assert read_allocation(environment, changed, expand) == read_allocation(environment, shown, expand)


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_CPUS_PER_NODE"])
def test_a_variable_that_is_missing_is_named(name):
    environment, shown, expand = recorded("plain")
    del environment[name]
    with pytest.raises(ConfigError, match=f"{name} is not set"):
        read_allocation(environment, shown, expand)


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "SLURM_HET_SIZE"])
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_number_is_as_good_as_none(name, empty):
    environment, shown, expand = recorded("plain")
    read = read_allocation(environment, shown, expand)
    assert read_allocation(environment | {name: empty}, shown, expand) == read and read.restarts == 0


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_CPUS_PER_NODE"])
def test_an_empty_variable_is_missing(name):
    environment, shown, expand = recorded("plain")
    with pytest.raises(ConfigError, match=f"{name} is not set"):
        read_allocation(environment | {name: ""}, shown, expand)


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "SLURM_HET_SIZE", "SLURM_JOB_ID", "SLURM_JOB_ID_HET_GROUP_1"])
@pytest.mark.parametrize("value", ["one", "-1", "1.0", "4+1", "\u0664"])
def test_what_is_no_number_is_named(name, value):
    environment, shown, expand = recorded("het")
    with pytest.raises(ConfigError, match=f"^{name}={re.escape(value)} is no number: [^\n]+$"):
        read_allocation(environment | {name: value}, shown, expand)


def test_answers_about_other_nodes_or_jobs_are_refused():
    environment, shown, expand = recorded("uneven")
    with pytest.raises(DapoError, match="nothing of job 9"):
        read_allocation(environment | {"SLURM_JOB_ID": "9"}, shown, expand)
    with pytest.raises(DapoError, match="CPUs of 1 nodes"):
        read_allocation(environment | {"SLURM_JOB_CPUS_PER_NODE": "16"}, shown, expand)
    with pytest.raises(DapoError, match="GPUs of node1 where job 3 has node1, node2"):
        gone = "\n".join(line for line in shown.splitlines() if not line.startswith("     Nodes=node2"))
        read_allocation(environment, gone, expand)


def test_a_task_of_an_array_is_refused():
    environment, shown, expand = recorded("plain")
    task = shown.replace("JobId=1 ", "JobId=1 ArrayJobId=1 ArrayTaskId=3 ")
    # Of the task whose number is the array's, scontrol shows the others too.
    others = task.replace("JobId=1 ", "JobId=9 ", 1)
    for answer in (task, task + others):
        with pytest.raises(ConfigError, match="^job 1 is a task of a job array, .*: submit the script without --array"):
            read_allocation(environment, answer, expand)
    named = shown.replace("JobName=plain", "JobName=x ArrayJobId=1")
    assert named != shown and read_allocation(environment, named, expand).job_id == 1


def test_outside_of_a_job_nothing_is_asked():
    with pytest.raises(ConfigError, match="SLURM_JOB_ID is not set: this runs inside a SLURM job"):
        find_allocation({})


@pytest.mark.parametrize(("job", "says"), [("", " is not set"), ("4+1", "=4\\+1 is no number")])
def test_the_launcher_tells_of_a_job_that_has_no_number(job, says, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", job)
    recipe = tmp_path / "run.yaml"
    recipe.write_text(yaml.safe_dump(run_config("nowhere").model_dump()))
    with pytest.raises(ConfigError, match=f"SLURM_JOB_ID{says}"):
        begin(recipe, [])


def compressed(counts):
    """As SLURM writes them."""
    runs = [(count, len(list(run))) for count, run in itertools.groupby(counts)]
    return ",".join(str(count) if times == 1 else f"{count}(x{times})" for count, times in runs)


def test_every_short_list_of_counts():
    for length in range(1, 6):
        for counts in itertools.product((1, 8, 16), repeat=length):
            assert expand_counts(compressed(counts)) == list(counts)


@given(st.lists(st.integers(0, 512), min_size=1, max_size=200))
def test_any_list_of_counts(counts):
    assert expand_counts(compressed(counts)) == counts


@pytest.mark.parametrize("text", ["", "8,", ",8", "x", "8(3)", "8(x)", "8(x3", "8 ,8", "-8", "8(x3)16", "٨", "1e3"])
def test_what_is_no_list_of_counts_is_refused(text):
    with pytest.raises(ConfigError, match="not a list of counts"):
        expand_counts(text)


def test_an_allocation_is_a_value():
    with pytest.raises(AttributeError):
        Allocation(1, 0, (), True, None).job_id = 2
