"""Runs in an engine's environment: how SGLang starts its processes, before and after the plugin is loaded.

Prints JSON: the method that it sets, and with the plugin whether a child has what was imported.
"""

import json
import multiprocessing
import sys

from sglang.srt.entrypoints import engine
from sglang.srt.plugins import load_plugins


class Plain(dict):
    """What it holds is an attribute, and every other one is off: options of a server."""

    def __getattr__(self, name):
        return self.get(name, False)


def imported(queue):
    """A child's word on what it found."""
    queue.put("sglang.srt.entrypoints.engine" in sys.modules)


def main():
    engine.resolving_view = lambda options: options
    found = {}
    for when in ("before", "after"):
        if when == "after":
            load_plugins()
        engine._set_envs_and_config(Plain(gc_threshold=None))
        found[when] = {"method": multiprocessing.get_start_method()}
    queue = multiprocessing.SimpleQueue()
    child = multiprocessing.Process(target=imported, args=(queue,))
    child.start()
    found["after"]["imported"] = queue.get()
    child.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
