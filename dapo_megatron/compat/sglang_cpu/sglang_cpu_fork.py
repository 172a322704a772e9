"""A plugin of SGLang 0.5.23 that forks a server's processes instead of spawning them.

A spawned process imports all of SGLang once more: of the 20 s of CPU that a start takes, that is 12, and on a machine
of few cores most of the wait. SGLang asks for it because a process that has used CUDA cannot be forked
(sglang/srt/entrypoints/engine.py, _set_envs_and_config); this plugin is on the path of engines on CPU only.
"""

import gc
import multiprocessing
from typing import Any


def register() -> None:
    """Called by SGLang in each of its processes, before it serves."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", fork, HookType.AFTER)


def fork(result: Any, *_: Any, **__: Any) -> Any:
    """After SGLang has chosen to spawn, and before it starts a process."""
    gc.freeze()  # or each process looks through all that was imported, and gets its own copy of those pages
    gc.enable()
    multiprocessing.set_start_method("fork", force=True)
    return result
