"""What a batch script asks for."""

from itertools import product
from pathlib import Path

import pytest

from dapo_megatron.errors import ConfigError
from dapo_megatron.config import load_config
from launch.sbatch import Request, filled, read_script
from launch.time_limit import check_signal, check_time_limit

ROOT = Path(__file__).parents[3]
RUN = 'exec python -m launch.slurm --recipe a.yaml "$@"\n'


def script(*options, run=RUN):
    return "#!/bin/bash\n# what it is\n" + "".join(f"#SBATCH {o}\n" for o in options) + "\n" + run


def groups(*options):
    return read_script(script(*options), "x.sh").groups


NODES = {"--nodes=3": 3, "--nodes 3": 3, "-N 3": 3, "-N3": 3, "--time=1:00:00": 1}
GPUS = {
    "--gpus-per-node=8": (8, None),
    "--gpus-per-node=h200:8": (8, "h200"),
    "--gres=gpu:h100:4": (4, "h100"),
    "--gres=gpu:2,shard:3": (2, None),
    "--gres=shard:3,gpu:a100-80:2": (2, "a100-80"),
    "--gres=gpu": (1, None),
    "--gres=gres:gpu:h100:4": (4, "h100"),
    "--gpus=24 --gpus-per-node=8": (8, None),
    "--exclusive": (0, None),
}
CPUS = {("--cpus-per-task=16",): 16, ("-c16", "--ntasks-per-node=2"): 32, ("--ntasks-per-node=4",): 4, (): 1}


@pytest.mark.parametrize(("nodes", "gpus", "cpus"), product(NODES, GPUS, CPUS))
def test_every_way_to_ask(nodes, gpus, cpus):
    count, kind = GPUS[gpus]
    assert groups(nodes, gpus, *cpus) == (Request(NODES[nodes], count, CPUS[cpus], kind),)
    assert groups(" ".join([nodes, gpus, *cpus])) == groups(nodes, gpus, *cpus)


def test_cpus_of_gpus():
    assert groups("--gres=gpu:8", "--cpus-per-gpu=12") == (Request(1, 8, 96),)
    assert groups("--cpus-per-gpu=12") == (Request(1, 0, 12),)


@pytest.mark.parametrize(
    ("options", "gib"),
    [
        ("--mem=64G", 64),
        ("--mem 65536", 64),
        ("--mem=1t", 1024),
        ("--mem=512MB", 0.5),
        ("--mem=1048576K", 1),
        ("--mem=0", None),
        ("--time=1:00:00", None),
        ("--mem-per-cpu=2G --cpus-per-task=4 --ntasks-per-node=3", 24),
        ("--mem-per-gpu=100G --gres=gpu:8", 800),
        ("--mem=64G --exclusive", 64),
        ("--mem-per-cpu=2G --exclusive", None),  # of all the node's CPUs
        ("--mem-per-cpu=2G --nodes=2 --ntasks=16", None),
    ],
)
def test_the_memory_of_a_node(options, gib):
    (found,) = groups(options)
    assert found.memory_gib == gib


def test_a_resource_that_is_no_gpu_is_left_to_slurm():
    assert groups("--tres-per-node=license/x:2") == (Request(1, 0, 1),)


def test_a_heterogeneous_job():
    for word in ("hetjob", "packjob"):
        found = groups("--nodes=8", "--gpus-per-node=8", word, "--nodes=2", "--gpus-per-node=4", "--cpus-per-task=9")
        assert found == (Request(8, 8, 1), Request(2, 4, 9))


def test_the_time_limit():
    assert read_script(script("-t 1-00:00:00"), "x.sh").limit_s == 86400
    assert read_script(script("--nodes=2"), "x.sh").limit_s is None


def test_the_signal_is_that_of_the_group_in_which_the_script_runs():
    assert read_script(script("--signal=B:USR1@600", "hetjob", "--signal=B:USR1@60"), "x.sh").signal_s == 600
    assert read_script(script("--signal B:USR1@600"), "x.sh").signal_s == 600
    assert read_script(script("--nodes=2", "hetjob", "--signal=B:USR1@60"), "x.sh").signal_s is None
    with pytest.raises(ConfigError, match="--signal=USR1@60 ends engines and trainer"):
        read_script(script("--signal=B:USR1@600", "hetjob", "--signal=USR1@60"), "x.sh")


def test_what_slurm_does_not_read():
    text = (
        "#!/bin/bash\n##SBATCH --nodes=7\n#SBATCH --nodes=2 # not --nodes=5\nmodule load x\n#SBATCH --nodes=9\n" + RUN
    )
    assert read_script(text, "x.sh").groups == (Request(2, 0, 1),)


def test_the_run():
    run = '.venv/bin/python -m launch.slurm \\\n  --recipe a.yaml seed=3 launch.engine_nodes=1 "$@"  # b=c\n'
    found = read_script(script(run=f"# python -m launch.slurm --recipe no.yaml\n{run}"), "x.sh")
    assert (found.recipe, found.overrides) == ("a.yaml", ("seed=3", "launch.engine_nodes=1"))
    assert read_script(script(run=run.replace("--recipe ", "--recipe=")), "x.sh") == found


def test_the_script_that_runs():
    text = script("--nodes=3")
    assert filled(text, [], "x.sh") == text.replace(' "$@"', "")
    for handed_on in ('"$@"', "$@", '"${@}"', "${@}"):
        other = text.replace('"$@"', handed_on)
        assert "a.yaml 'data.train=[a, b]' seed=3\n" in filled(other, ["data.train=[a, b]", "seed=3"], "x.sh")
    assert r"'x=\1'" in filled(text, [r"x=\1"], "x.sh")


def test_a_script_that_hands_on_no_argument():
    deaf = script("--nodes=3").replace(' "$@"', "")
    assert filled(deaf, [], "x.sh") == deaf
    with pytest.raises(ConfigError, match="^x.sh hands on no argument, and seed=3 is one: end its last line in"):
        filled(deaf, ["seed=3"], "x.sh")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nodes=2-4"], "--nodes=2-4 is not one number"),
        (["--nodes=0"], "--nodes=0"),
        (["--nodes"], "--nodes= is not one number"),
        (["--gpus=16"], "--gpus does not say how many nodes, or GPUs of each: write --gpus-per-node"),
        (["--nodes=2 --gpus-per-task=8"], "write --gpus-per-node"),
        (["--tres-per-node=gres/gpu:8"], "write --gpus-per-node"),
        (
            ["--ntasks=16", "--ntasks-per-node=1"],
            "--ntasks does not say how many nodes, or GPUs of each: write --nodes",
        ),
        (["-w node[1-4]"], "write --nodes"),
        (["-n 16"], "--ntasks does not say how many nodes"),
        (["--gres=gpu:h100:4,gpu:a100:4"], "is no number of GPUs"),
        (["--comment=don't"], "is no whole line of words (No closing quotation)"),
        (["-G 16"], "write --gpus-per-node"),
        (["--gres=gpu:h100"], "'h100' is no number of GPUs"),
        (["--gpus-per-node=h100:4,a100:4"], "is no number of GPUs"),
        (["--cpus-per-task=x"], "--cpus-per-task=x"),
        (["--mem=1.5G"], "--mem=1.5G is no size of memory: write one, such as 64G"),
        (["--mem-per-cpu=all"], "--mem-per-cpu=all is no size of memory"),
        (["--nodes=2", "--array=1-10%1"], "--array=1-10%1: no task of an array is put back alone: submit"),
        (["-a 0-3"], "--array=0-3: "),
    ],
)
def test_refused(options, says):
    with pytest.raises(ConfigError) as e:
        groups(*options)
    assert says in str(e.value) and str(e.value).startswith("x.sh") and "\n" not in str(e.value)


def test_another_script_is_refused():
    with pytest.raises(ConfigError, match="has no line"):
        read_script(script(run="python train.py\n"), "x.sh")


def test_the_scripts_of_the_project():
    for path in (ROOT / "slurm").glob("*.sh"):
        found = read_script(path.read_text(), path.name)
        assert (ROOT / found.recipe).exists(), path
        launch = load_config(ROOT / found.recipe, found.overrides).launch
        check_time_limit(launch, found.limit_s)
        check_signal(launch, found.limit_s, found.signal_s)
        assert found.signal_s > launch.stop_grace_s  # each is enough alone


@pytest.mark.parametrize(
    ("first", "second", "limit_s"),
    [("60", "10", 600.0), ("10", "60", 600.0), ("UNLIMITED", "10", 600.0), ("10", "0", 600.0), ("0", "0", None)],
)
def test_the_time_limit_is_the_shortest_of_the_groups(first, second, limit_s):
    lines = f"#SBATCH --time={first}\n#SBATCH hetjob\n#SBATCH --time={second}\n"
    assert read_script(f"{lines}exec python -m launch.slurm --recipe a.yaml", "x.sh").limit_s == limit_s


@pytest.mark.parametrize(
    "line",
    [
        'python -m launch.slurm --recipe a.yaml "x.y=[1, 2]" z=3 "$@"; echo code=$?',
        'python -m launch.slurm --recipe a.yaml x.y="[1, 2]" z=3; status=$?',
        "srun --mem=1 python -m launch.slurm --recipe a.yaml 'x.y=[1, 2]' z=3 2>&1 | tee --output=x log=1",
        "python -m launch.slurm --recipe=a.yaml 'x.y=[1, 2]' z=3 >out=1 && done=1",
        "A=1 python -m launch.slurm 'x.y=[1, 2]' z=3 --recipe a.yaml & B=2  # C=3",
    ],
)
def test_the_launchers_arguments_end_where_the_shell_ends_them(line):
    found = read_script(script(run=line), "x.sh")
    assert (found.recipe, found.overrides) == ("a.yaml", ("x.y=[1, 2]", "z=3"))


def test_a_quoted_operator_is_no_end():
    found = read_script(script(run="python -m launch.slurm --recipe a.yaml 'x=a;b' y='p|q'"), "x.sh")
    assert found.overrides == ("x=a;b", "y=p|q")
