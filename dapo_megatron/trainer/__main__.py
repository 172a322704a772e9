"""Entry point of a trainer rank; torchrun (or srun) starts one for each device."""

import argparse
import gc
import logging
import os
import sys
from pathlib import Path

import torch

from dapo_megatron.compat import prepare_trainer

prepare_trainer()

from dapo_megatron.actor.actor import Actor
from dapo_megatron.actor.fit import check_fit
from dapo_megatron.actor.parallel import init_parallel
from dapo_megatron.actor.precision import require_precision
from dapo_megatron.checkpoint.store import latest
from dapo_megatron.config import load_config
from dapo_megatron.errors import exit_code
from dapo_megatron.resharding.push import Pusher
from dapo_megatron.trainer.loop import train
from dapo_megatron.trainer.run_link import RunLink
from dapo_megatron.weights.hf_config import read_model


def main() -> int:
    """Train; 1 after an error, which is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m dapo_megatron.trainer", description=__doc__)
    parser.add_argument("--config", required=True, help="the run's config.yaml")
    parser.add_argument("--link", required=True, help="the controller's address")
    parser.add_argument("--engines", required=True, nargs="+", help="URLs of the SGLang servers")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run folder")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    return exit_code(lambda: _train(args))


def _train(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    shape = read_model(config.model.path)
    check_fit(config, shape)
    require_precision(config, shape)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    layout = init_parallel(config)
    actor = Actor(config, shape, layout)
    pusher = Pusher(config, actor, args.engines)
    try:
        resume = latest(Path(config.run_dir)) if args.resume else None
        gc.freeze()  # a collection of what start-up left takes 0.3 s, on one rank while the others wait for it
        train(config, actor, RunLink(config, layout, args.link), pusher, resume)
    finally:
        pusher.close()


if __name__ == "__main__":
    sys.exit(main())
