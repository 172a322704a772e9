"""A process that has used torch.distributed ends with its own exit code, whatever gloo's threads do meanwhile."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dapo_megatron
from launch.ports import reserved_ports

PROGRAM = """
import sys
import time

import torch
import torch.distributed as dist

from dapo_megatron.process import leave

rank, end = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=sys.argv[3], rank=rank, world_size=2)
dist.barrier()
time.sleep(rank)
work = dist.all_reduce(torch.ones(4), async_op=True)
if rank == 0:
    print("done", flush=True)
    del work  # gloo's thread has the tensor alone, and comes to drop it while this one does not let go of the GIL
    sys.setswitchinterval(1000)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        pass
else:
    work.wait()
    time.sleep(4)
{"leave": leave, "exit": sys.exit}[end](3)
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("leave", 3), pytest.param("exit", -signal.SIGABRT, id="the interpreter taken down: leave() is needed")],
)
def test_the_end_of_a_process_is_its_own(end, code):
    command = (sys.executable, "-W", "ignore", "-c", PROGRAM)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with reserved_ports(1) as (port,):
        arguments = [(str(rank), end, f"tcp://127.0.0.1:{port}") for rank in (0, 1)]
        ranks = [
            subprocess.Popen([*command, *own], stdout=subprocess.PIPE, text=True, env=environment) for own in arguments
        ]
        try:
            said = [rank.communicate(timeout=60)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    assert said == ["done\n", ""]
    assert ranks[0].returncode == code


def test_every_program_of_ranks_leaves():
    sources = [path.read_text() for path in Path(dapo_megatron.__file__).parent.rglob("*.py")]
    programs = [text for text in sources if "init_parallel(" in text and "__main__" in text]
    assert len(programs) == 5
    assert all(text.endswith("    leave(main())\n") for text in programs)
