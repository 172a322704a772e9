"""Entry point of the controller process; the launcher starts it."""

import argparse
import asyncio
import gc
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dapo_megatron.process import Reporter


def main() -> int:
    """Serve one trainer until it says goodbye."""
    parser = argparse.ArgumentParser(prog="python -m dapo_megatron.rollout", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="config.yaml in the run folder")
    parser.add_argument("--link", required=True, help="address to bind, such as tcp://127.0.0.1:5555")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

    # Grading workers import this module: what is heavy is imported by the process that runs.
    from dapo_megatron.process import Reporter, run_reported
    from dapo_megatron.run_folder import RunFolder

    reporter = Reporter(RunFolder(args.config.parent), "controller")
    return run_reported(reporter, lambda: asyncio.run(_serve(reporter, args.config, args.link)))


async def _serve(reporter: "Reporter", config_path: Path, address: str) -> None:
    from dapo_megatron.process import importing

    with importing():
        from dapo_megatron.config import load_config
        from dapo_megatron.engines.client import EngineClient
        from dapo_megatron.engines.coalescing import CoalescingClient
        from dapo_megatron.engines.engine_set import read_engine_set
        from dapo_megatron.grading.pool import grading_pool
        from dapo_megatron.keys import read_keys
        from dapo_megatron.rollout.controller import Controller
        from dapo_megatron.rpc import RpcServer

    config, keys = load_config(config_path), read_keys(reporter.folder)
    link = RpcServer(address, keys)
    async with (
        grading_pool(config) as grading,
        EngineClient(
            lambda: read_engine_set(reporter.folder),
            concurrency=config.concurrency,
            timeout_s=config.deadlines.request,
            silence_s=config.deadlines.engine,
            api_key=keys.engine_api_key,
            fresh_prefixes=config.keeps_kv,
        ) as client,
    ):
        controller = Controller(config, reporter, CoalescingClient(client), grading)
        gc.freeze()  # a collection of the prompts and all modules takes 0.2 s, in the middle of a round
        try:
            await controller.serve(link)
        finally:
            await controller.close()
            link.close()


if __name__ == "__main__":
    sys.exit(main())
