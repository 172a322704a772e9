"""The configuration files of a small cluster. Pure."""

from pathlib import Path

NETWORK = "10.77.0"
LOGIN = "login"
"""Name of the node that runs slurmctld, and that users are on."""
MESSAGE_TIMEOUT_S = 5


def address(node: str) -> str:
    """IPv4 address of a node."""
    return f"{NETWORK}.{254 if node == LOGIN else int(node.removeprefix('node'))}"


def hosts(nodes: list[str]) -> str:
    """/etc/hosts of every node: there is no DNS."""
    lines = ["127.0.0.1 localhost"]
    for node in (LOGIN, *nodes):
        # torch's TCPStore listens on IPv6 and looks up the names of its IPv4 clients as well.
        lines += [f"{address(node)} {node}", f"::ffff:{address(node)} {node}"]
    return "\n".join(lines) + "\n"


def slurm_conf(folder: Path, nodes: list[str], cpus: int, gpus: int) -> str:
    """slurm.conf of a cluster whose daemons keep their files in `folder`; each node has `cpus` and `gpus`."""
    gres = f"Gres=gpu:{gpus}" if gpus else ""
    return f"""\
ClusterName=test
SlurmctldHost={LOGIN}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until the credentials of its last start have expired: two minutes by default.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/nodes/%n
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/nodes/%n/slurmd.pid
MailProg=/bin/true
# Without cgroups, which nodes on one machine would share: a process that leaves its parents escapes SLURM.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
# The nodes have as many CPUs as we say, and come back by themselves after a power cut.
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
# Everything that takes minutes on a cluster takes seconds.
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout={MESSAGE_TIMEOUT_S}
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={",".join(nodes)} CPUs={cpus} RealMemory=64000 {gres} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


def gres_conf(folder: Path, nodes: list[str], gpus: int) -> str:
    """gres.conf: the devices of a node are in the folder, the same for all; SLURM counts them and never opens one."""
    return f"NodeName={','.join(nodes)} Name=gpu File={folder}/devices/gpu[0-{gpus - 1}]\n" if gpus else ""
