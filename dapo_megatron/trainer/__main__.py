"""Entry point of a trainer rank; the launcher (or torchrun, srun) starts one for each device."""

import gc

gc.disable()  # until all is imported: nothing of that is garbage, and looking for some takes a second

import argparse
import logging
import os
from pathlib import Path

import torch

from dapo_megatron.compat import prepare_trainer

prepare_trainer()

from dapo_megatron.actor.actor import Actor
from dapo_megatron.actor.layout_check import check_layout
from dapo_megatron.actor.precision import require_precision
from dapo_megatron.config import load_config
from dapo_megatron.distributed.layout import init_parallel
from dapo_megatron.engines.engine_set import read_engine_set
from dapo_megatron.keys import read_keys
from dapo_megatron.process import Reporter, leave, run_reported
from dapo_megatron.resharding.push import Pusher
from dapo_megatron.run_folder import RunFolder
from dapo_megatron.trainer.controller_client import ControllerClient
from dapo_megatron.trainer.loop import Start, train
from dapo_megatron.trainer.recorder import Recorder
from dapo_megatron.trainer.roll_call import missing_ranks_named
from dapo_megatron.weights.hf_config import read_model


def main() -> int:
    """Train; 1 after an error, which is one line on stderr and in the exit record."""
    parser = argparse.ArgumentParser(prog="python -m dapo_megatron.trainer", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="config.yaml in the run folder")
    parser.add_argument("--link", required=True, help="the controller's address")
    parser.add_argument("--push-ports", nargs="+", type=int, help="where the weight groups meet")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    parser.add_argument("--weights", type=Path, help="checkpoint of which only the weights are taken")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    reporter = Reporter(RunFolder(args.config.parent), f"trainer-{os.environ['RANK']}")
    return run_reported(reporter, lambda: _train(args, reporter))


def _train(args: argparse.Namespace, reporter: Reporter) -> None:
    folder, config = reporter.folder, load_config(args.config)
    shape = read_model(config.model.path)
    check_layout(config, shape)
    require_precision(config, shape)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    layout, keys = init_parallel(config), read_keys(folder)
    actor = Actor(config, shape, layout)
    pusher = Pusher(config, actor, lambda: read_engine_set(folder), keys.engine_api_key, args.push_ports)
    controller = ControllerClient(config, layout, args.link, keys)
    recorder = Recorder(config, layout, reporter)
    try:
        gc.freeze()  # a collection of what start-up left takes 0.3 s, on one rank while the others wait for it
        gc.enable()
        with missing_ranks_named(folder):
            train(config, actor, controller, pusher, recorder, Start(args.resume, args.weights))
    finally:
        recorder.close()
        pusher.close()
        controller.close()
    reporter.phase("done")


if __name__ == "__main__":
    leave(main())
