"""Entry point of the controller process; the launcher starts it."""

import argparse
import asyncio
import gc
import logging
import sys


def main() -> int:
    """Serve one trainer until it says goodbye."""
    parser = argparse.ArgumentParser(prog="python -m dapo_megatron.rollout", description=__doc__)
    parser.add_argument("--config", required=True, help="the run's config.yaml")
    parser.add_argument("--link", required=True, help="address to bind, such as tcp://127.0.0.1:5555")
    parser.add_argument("--engines", required=True, nargs="+", help="URLs of the SGLang servers")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

    # Grading workers import this module: what is heavy is imported by the process that runs.
    from dapo_megatron.errors import exit_code

    return exit_code(lambda: asyncio.run(_serve(args.config, args.link, args.engines)))


async def _serve(config_path: str, address: str, engines: list[str]) -> None:
    from dapo_megatron.config import load_config
    from dapo_megatron.grading.pool import GradingPool
    from dapo_megatron.link import LinkServer
    from dapo_megatron.rollout.controller import Controller
    from dapo_megatron.rollout.engine import EngineClient

    config = load_config(config_path)
    g, r = config.grading, config.rollout
    link = LinkServer(address)
    async with (
        GradingPool(
            g.grader,
            g.workers,
            g.timeout_s,
            g.memory_mb,
            thinking=g.thinking,
            boxed_only=config.data.template == "boxed",
        ) as grading,
        EngineClient(engines, concurrency=r.concurrency, timeout_s=r.request_timeout_s) as client,
    ):
        controller = Controller(config, client, grading)
        gc.freeze()  # a collection of the prompts and all modules takes 0.2 s, in the middle of a round
        try:
            await controller.serve(link)
        finally:
            await controller.close()
            link.close()


if __name__ == "__main__":
    sys.exit(main())
