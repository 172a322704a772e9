"""Run megatron-core 0.16.1 without CUDA (gloo). Imported by entry points only, and only where there is no CUDA.

`install()` must come before the first import of `megatron.core`. Each patch has a name, so that
tests/distributed/test_compat.py can leave one out and show that it is still needed.
"""

import importlib.abc
import importlib.machinery
import re
import sys
import types
from typing import Any

import torch

PATCHES = ("constants", "device", "to_cuda", "synchronize", "rng", "streams", "experts")

_CPU = torch.device("cpu")
_CUDA_TENSOR = re.compile(r"torch\.cuda\.(\w+Tensor)$")


def install(without: frozenset[str] = frozenset()) -> None:
    """Patch torch.cuda and the loader of megatron.core.

    Args:
        without: names of patches (PATCHES) to leave out; for the test that shows each one is needed.

    Raises:
        RuntimeError: CUDA is available, or megatron.core was imported already.
    """
    if torch.cuda.is_available():
        raise RuntimeError("megatron_cpu.install() is for machines without CUDA")
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron_cpu.install() must run before megatron.core is imported")
    for name in PATCHES:
        if name not in without:
            _PATCH[name]()


def _constants() -> None:
    # megatron.core says device="cuda" literally (schedules, clip_grads, optimizer) and compares param.type() with
    # 'torch.cuda.FloatTensor' (optimizer, distrib_optimizer); neither has an option. The string constants of its
    # modules are rewritten while they load; nothing outside megatron.core is touched.
    sys.meta_path.insert(0, _Finder())


def _device() -> None:
    # device=torch.cuda.current_device() at about 60 allocation sites.
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda *args, **kwargs: None
    cuda.device_count = lambda: 1  # async_utils takes the rank modulo this


def _to_cuda() -> None:
    # language_module (tied embeddings under PP) and distrib_optimizer (checkpoints) call .cuda() on tensors.
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    tensor.cuda = module.cuda = lambda self, *args, **kwargs: self


def _synchronize() -> None:
    # p2p_communication after every exchange, dist_checkpointing before it writes.
    torch.cuda.synchronize = lambda *args, **kwargs: None


def _rng() -> None:
    # On CPU tensors the "CUDA generator" is the default generator.
    cuda: Any = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    # These two reach the generator through cuda._lazy_call, whose callbacks never run without CUDA.
    import megatron.core.tensor_parallel.random as tensor_parallel_random

    tensor_parallel_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    tensor_parallel_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


class _Stream:
    """A stream or an event on a device that does everything in order: nothing to wait for."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def record_event(self, *_: object) -> "_Stream":
        return _Stream()

    def wait_stream(self, *_: object) -> None:
        pass

    synchronize = wait_event = wait_stream


def _streams() -> None:
    # The all-to-all token dispatcher copies its counts to the host on a stream of its own.
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda stream: _Stream()


def _experts() -> None:
    # moe_utils uses te_general_gemm, which it only defines where TransformerEngine imports.
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    # The dispatcher turns its split sizes into numpy only if they are on a GPU; all_to_all_single wants sequences.
    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host


_PATCH = dict(zip(PATCHES, (_constants, _device, _to_cuda, _synchronize, _rng, _streams, _experts), strict=True))


def _rewrite(constant: Any) -> Any:
    if isinstance(constant, types.CodeType):
        return constant.replace(co_consts=tuple(_rewrite(c) for c in constant.co_consts))
    if isinstance(constant, tuple):
        return tuple(_rewrite(c) for c in constant)
    if isinstance(constant, str):
        return "cpu" if constant == "cuda" else _CUDA_TENSOR.sub(r"torch.\1", constant)
    return constant


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        return _rewrite(super().get_code(fullname))


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
