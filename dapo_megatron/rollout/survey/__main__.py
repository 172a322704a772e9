"""python -m dapo_megatron.rollout.survey --config FILE --prompts N [--output FILE]: generate and grade, train nothing.

A process like the controller's: it imports a user's functions from the same folders. launch/rollout.py starts it,
beside engines whose set and keys are in the folder of the config.
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """0, or 1 after an error, which is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m dapo_megatron.rollout.survey", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="config.yaml, beside keys and engine set")
    parser.add_argument("--prompts", required=True, type=int, help="groups to generate, at most one a prompt")
    parser.add_argument("--output", type=Path, help="jsonl file, one group a line")
    args = parser.parse_args()

    # Grading workers import this module: what is heavy is imported by the process that runs.
    from rich.console import Console

    from dapo_megatron.errors import exit_code
    from dapo_megatron.rollout.survey.generate import survey

    console = Console(highlight=False, soft_wrap=True)
    return exit_code(lambda: survey(args.config, args.prompts, args.output, console))


if __name__ == "__main__":
    sys.exit(main())
