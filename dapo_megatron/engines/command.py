"""How an SGLang server is started: its command line and environment. Pure."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from dapo_megatron.compat import SGLANG_CPU
from dapo_megatron.config import RunConfig

# Without the kernels of AMX and AVX512 machines, SGLang 0.5.23 runs on a CPU with these alone.
_CPU_ARGS = [
    "--device", "cpu",
    "--attention-backend", "torch_native",
    "--sampling-backend", "pytorch",
    "--disable-cuda-graph",
    "--disable-overlap-schedule",  # runs a step ahead to hide the scheduler behind a GPU: here it only adds a step
    "--grammar-backend", "none",
]  # fmt: skip

HUGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")
"""Makes torch ask for huge pages for large tensors on a CPU: a bucket's memory, which the kernel first touches page by
page, would otherwise take longer than the bucket's transfer."""


def engine_command(
    config: RunConfig,
    host: str,
    port: int,
    *,
    cpu: bool,
    replica: int = 0,
    nccl_port: int | None = None,
    options_file: Path | None = None,
) -> list[str]:
    """argv of one server. It gets token ids and returns token ids: the tokenizer stays with the controller.

    Args:
        replica: which of the servers it is; two of one seed could give copies of a prompt the same responses.
        nccl_port: where its processes meet; None lets SGLang choose.
        options_file: YAML of further options that no command line must show, such as the API key.
    """
    e = config.engine
    command = [
        e.python or sys.executable, "-m", "sglang.launch_server",
        "--model-path", config.model.path,
        "--host", host,
        "--port", str(port),
        "--dtype", config.engine_dtype,
        "--tp-size", str(e.tensor_parallel_size),
        "--context-length", str(e.context_length),
        "--mem-fraction-static", str(e.mem_fraction),
        "--max-running-requests", str(1 if e.deterministic else e.max_running_requests),
        "--random-seed", str((e.seed + replica) % 2**31),
        "--skip-tokenizer-init",
        "--skip-server-warmup",
        "--sleep-on-idle",
        "--log-level", "warning",
    ]  # fmt: skip
    if nccl_port is not None:
        command += ["--nccl-port", str(nccl_port)]
    if e.max_total_tokens is not None:
        command += ["--max-total-tokens", str(e.max_total_tokens)]
    if e.deterministic:
        # On CPU compat/sglang_cpu makes the sampler honour seeds; what this option does there needs Triton.
        command += ["--disable-radix-cache", *([] if cpu else ["--enable-deterministic-inference"])]
    if options_file is not None:
        command += ["--config", str(options_file)]
    return command + (_CPU_ARGS if cpu else []) + list(e.extra_args)


def engine_environment(base: Mapping[str, str], *, cpu: bool) -> dict[str, str]:
    """Environment of a server; on CPU the compat folder comes first on its PYTHONPATH."""
    environment = dict(base)
    if cpu:
        environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(SGLANG_CPU), base.get("PYTHONPATH")) if p)
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment.setdefault(*HUGE_PAGES)
    return environment
