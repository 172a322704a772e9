"""Control calls to one SGLang server: pausing, weight-update sessions, versions. Never through a router."""

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from dapo_megatron.engines.wire import Completion, SamplingParams, cached_under, decode_completions
from dapo_megatron.errors import EngineError

SESSIONS_SINCE = (0, 5, 21)
"""First SGLang release whose weight updates must stand between begin_weight_update and end_weight_update; what is asked
of such servers only, all of them know."""

REFUSES = (401, 403)
"""HTTP statuses of one that has another key."""
UP_S = 2.0
"""For an answer to whoever asks whether the server is up."""
NO_SESSION = "no weight-update session is open"
"""What a server answers that is asked to close one."""


class EngineControl:
    """One server, told by its URL; every call has a deadline, and its error names the server and the call."""

    def __init__(self, url: str, timeout_s: float, api_key: str | None = None):
        """
        Args:
            timeout_s: seconds for one call.
            api_key: what the server was started with.
        """
        self.url, self.timeout_s = url, timeout_s
        # A phase of a push is several of them, and the ranks that wait for it must not give up first.
        self._quick_s = min(timeout_s, max(5.0, timeout_s / 4))
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=url, timeout=httpx.Timeout(timeout_s, connect=10.0), headers=headers)
        self.has_sessions = False
        self.tensor_parallel_size = 1

    def wait_ready(self, timeout_s: float, is_replaced: Callable[[], bool] = lambda: False) -> None:
        """Wait until the server answers, then read its release and its tensor parallelism.

        Raises:
            EngineError: it did not answer in time, or is waited for in vain.
        """
        end = time.monotonic() + timeout_s
        while True:
            try:
                status = self._http.get("/model_info", timeout=5.0).status_code
                if status == 200:
                    break
                if status in REFUSES:
                    raise EngineError(f"engine {self.url} refuses this run's key: another program serves there")
            except httpx.TransportError:
                pass
            if is_replaced():
                raise EngineError(f"engine {self.url} was replaced before it answered")
            if time.monotonic() > end:
                raise EngineError(
                    f"engine {self.url} did not answer within {timeout_s:.0f} s: see logs/latest/engine-*.log"
                )
            time.sleep(0.25)
        info = self._call("GET", "/server_info")
        release = tuple(int(n) for n in re.findall(r"\d+", info["version"])[:3])
        self.has_sessions = release >= SESSIONS_SINCE
        self.tensor_parallel_size = info["tp_size"]

    def is_up(self) -> bool:
        """Whether a server answers, be it another program's; asks once."""
        try:
            return self._http.get("/model_info", timeout=UP_S).status_code in (httpx.codes.OK, *REFUSES)
        except httpx.TransportError:
            return False

    def freeze_gc(self) -> None:
        """Take what start-up left out of garbage collection, which would stop the server for 0.4 s now and then.

        A server does so after its own warm-up. Where that is skipped it tries too early, before it listens.
        """
        if self.has_sessions:
            self._call("POST", "/freeze_gc", timeout_s=self._quick_s)

    def pause(self, *, keep_kv: bool = False) -> None:
        """Stop generating; running requests return to the queue and are computed anew under the next weights.

        Args:
            keep_kv: they stay where they are, and go on with the keys and values of the weights before.
        """
        mode = "in_place" if keep_kv else "retract"
        self._call("POST", "/pause_generation", {"mode": mode}, timeout_s=self._quick_s)

    def resume(self) -> None:
        """Go on generating."""
        self._call("POST", "/continue_generation", {}, timeout_s=self._quick_s)

    def begin_update(self) -> None:
        """Open a weight-update session, where the server has such."""
        if self.has_sessions:
            self._call("POST", "/begin_weight_update", {}, timeout_s=self._quick_s)

    def end_update(self) -> None:
        """Close the weight-update session."""
        if self.has_sessions:
            self._call("POST", "/end_weight_update", {}, timeout_s=self._quick_s)

    def abandon_update(self) -> None:
        """Close the session that a push has left open when it failed, if there is one."""
        try:
            self.end_update()
        except EngineError as e:
            if NO_SESSION not in str(e):
                raise

    def flush_cache(self) -> None:
        """Drop the KV cache that the old weights produced, where loading them has not done it.

        Older servers refuse a flush in the middle of an update while retracted requests wait; on newer ones on CPU this
        call runs the garbage collector, which takes longer than the whole push of a small model.
        """
        if not self.has_sessions:
            self._call("POST", "/flush_cache", timeout_s=self._quick_s)

    def set_version(self, version: int) -> None:
        """Name the weights that are served now."""
        self._call(
            "POST",
            "/update_weight_version",
            {"new_version": str(version), "abort_all_requests": False},
            timeout_s=self._quick_s,
        )

    def version(self) -> str:
        """Name of the weights that are served."""
        return str(self._call("GET", "/model_info", timeout_s=self._quick_s)["weight_version"])

    def require_answer(self) -> None:
        """Ask something that the scheduler has a part in answering.

        Raises:
            EngineError: it did not answer.
        """
        self._call("GET", "/server_info", timeout_s=self._quick_s)

    def join_group(self, group: str, address: str, port: int, rank: int, world: int, backend: str) -> None:
        """Join the process group of a sender; blocks until all its members have joined."""
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank,
            "world_size": world,
            "group_name": group,
            "backend": backend,
        }
        self._call("POST", "/init_weights_update_group", body)

    def receive_tensors(
        self, group: str, names: Sequence[str], shapes: Sequence[Sequence[int]], dtype: str, *, flush_cache: bool
    ) -> None:
        """Receive tensors that the group's rank 0 broadcasts as one flat buffer, and load them; blocks until then.

        Args:
            names, shapes: in the order of the buffer.
            dtype: of all of them.
            flush_cache: then drop the KV cache that the old weights produced, where the server has update sessions.
        """
        body = {
            "names": list(names),
            "dtypes": [dtype] * len(names),
            "shapes": [list(s) for s in shapes],
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": flush_cache and self.has_sessions,
        }
        self._call("POST", "/update_weights_from_distributed", body)

    def load_folder(self, folder: Path, *, flush_cache: bool) -> None:
        """Load all weights from a folder of safetensors files, outside of a session; blocks until then.

        A server that cannot find the files refuses, and keeps the weights it has. One that fails while it reads them is
        lost, without an answer: SGLang 0.5.23 looks for the weights to go back to in the same folder.

        Args:
            folder: by a path that the server's node knows it by.
            flush_cache: then drop the KV cache, as receive_tensors does.
        """
        body = {
            "model_path": str(folder),
            "load_format": "safetensors",
            "flush_cache": flush_cache and self.has_sessions,
        }
        self._call("POST", "/update_weights_from_disk", body)

    def sample(
        self, prompts: list[list[int]], params: SamplingParams, cache_key: str | None = None
    ) -> list[Completion]:
        """One sample after each prompt, through the same path as a rollout's (the prefix cache included).

        Args:
            cache_key: what was cached under another one is not found.

        Raises:
            EngineError: the server refused, or aborted one of them.
        """
        body = self._sample_body(prompts, params) | cached_under(cache_key)
        found = decode_completions(self._request("POST", "/generate", body), self.url)
        completions = [c for c in found if c is not None]
        if len(completions) < len(prompts):
            raise EngineError(f"engine {self.url} aborted {len(prompts) - len(completions)} of its samples")
        return completions

    def checksums(self) -> list[dict[str, str]]:
        """{parameter, in the server's words: checksum} of each of its ranks; empty ones where it has no such call."""
        if not self.has_sessions:
            return [{}] * self.tensor_parallel_size
        found = self._call("POST", "/weights_checker", {"action": "checksum", "selector": "target"})
        return [rank["checksums"] for rank in found["ranks"]]

    def fill_cache(self, prompts: list[list[int]], params: SamplingParams) -> None:
        """Sample and forget, whatever version is served: the prefix cache then holds these prompts."""
        self._request("POST", "/generate", self._sample_body(prompts, params))

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def _sample_body(self, prompts: list[list[int]], params: SamplingParams) -> dict[str, Any]:
        return {"input_ids": prompts, "sampling_params": msgspec.to_builtins(params), "return_logprob": True}

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float | None = None) -> Any:
        data = self._request(method, path, body, timeout_s)
        try:
            found = json.loads(data)
        except ValueError:
            return data.decode(errors="replace")
        if isinstance(found, dict) and found.get("success") is False:
            raise EngineError(f"engine {self.url} refused {path}: {str(found)[:500]}")
        return found

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float | None = None
    ) -> bytes:
        limit = timeout_s or self.timeout_s
        try:
            reply = self._http.request(method, path, json=body, timeout=httpx.Timeout(limit, connect=10.0))
        except httpx.TimeoutException:
            raise EngineError(
                f"engine {self.url} did not answer {path} within {limit:.0f} s: see logs/latest/engine-*.log"
            ) from None
        except httpx.TransportError as e:
            raise EngineError(f"engine {self.url} is gone ({path}: {e}): see logs/latest/engine-*.log") from None
        if reply.status_code != 200:
            text = " ".join(reply.text.split())[:500]
            raise EngineError(f"engine {self.url} refused {path}: HTTP {reply.status_code} {text}")
        return reply.content
