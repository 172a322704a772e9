"""Run SGLang 0.5.23 on a machine without CUDA. Python imports this file by itself in the engine's processes only,
because the engine is started with this folder on its PYTHONPATH (dapo_megatron.engines.command.engine_environment).

Patches, each shown to be needed by tests/engine/test_compat.py:

stand-ins   sgl_kernel (CUDA kernels) and torchvision (the wheel on the index is a CUDA build that does not load beside
            a CPU torch) are imported unconditionally by SGLang, for kernels and image models that a text model on CPU
            never reaches. They are replaced by modules whose every attribute is a class that refuses to be used.

Beside it lie plugins that SGLang loads itself: sglang_cpu_attention (speed), sglang_cpu_sampling (seeds),
sglang_cpu_fork (half of a start).
"""

import gc
import importlib.abc
import importlib.machinery
import sys
import types

STAND_INS = ("sgl_kernel", "torchvision")


class _Refuses(type):
    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Refuses(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *args: object, **kwargs: object) -> None:
        raise RuntimeError(f"{cls.__name__} has no stand-in on CPU")


class _StandIn(types.ModuleType):
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Refuses(f"{self.__name__}.{name}", (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in STAND_INS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


gc.disable()  # until sglang_cpu_fork: nothing of what SGLang imports is garbage, and looking for some takes a second
sys.meta_path.insert(0, _Finder())
