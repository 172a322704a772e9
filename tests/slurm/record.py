"""Records what SLURM tells jobs of several shapes, for tests without it: python -m tests.slurm.record"""

from tests.slurm.cluster import REPOSITORY, Cluster

RECORDED = REPOSITORY / "tests" / "unit" / "launch" / "recorded"
SHAPES = {
    "plain": ("--nodes=3", "--gres=gpu:8", "--cpus-per-task=4"),
    "no_devices": ("--nodes=1", "--time=5"),
    "uneven": ("--nodes=2", "--ntasks=5", "--cpus-per-task=4", "--gpus=10"),
    "het": ("--nodes=1", "--gres=gpu:8", "--cpus-per-task=4", "--time=10", ":", "--nodes=2", "--gpus-per-node=4"),
    "requeued": ("--nodes=2", "--gres=gpu:2", "--time=5", "--requeue"),
    "het_requeued": ("--nodes=2", "--gres=gpu:2", "--time=5", "--requeue", ":", "--nodes=1"),
}
SCRIPT = r"""
env | grep ^SLURM_ | sort >{out}.env
SLURM_TIME_FORMAT=%s scontrol --details show job $SLURM_JOB_ID >{out}.show
(env | sed -n 's/^SLURM_JOB_NODELIST.*=//p'; sed -n 's/^ *Nodes=\([^ ]*\) .*/\1/p' {out}.show) | sort -u >{out}.lists
while read -r list; do echo "$list" $(scontrol show hostnames "$list"); done <{out}.lists >{out}.hosts
{again}
"""
AGAIN = '[ "$SLURM_RESTART_COUNT" = 1 ] || { scontrol requeue $SLURM_JOB_ID; sleep 60; }'


def main() -> None:
    """Write NAME.env, NAME.show and NAME.hosts for every shape."""
    with Cluster(4) as cluster:
        for name, options in SHAPES.items():
            script = SCRIPT.format(out=cluster.shared / name, again=AGAIN if "--requeue" in options else "")
            cluster.wait_for_state(cluster.sbatch(script, f"--job-name={name}", *options), "COMPLETED")
        RECORDED.mkdir(exist_ok=True)
        for path in cluster.shared.iterdir():
            if path.suffix in (".env", ".show", ".hosts"):
                text = path.read_text().replace(str(REPOSITORY), "/home/user/dapo_megatron")
                (RECORDED / path.name).write_text(text.replace(str(cluster.folder), "/home/user"))


if __name__ == "__main__":
    main()
