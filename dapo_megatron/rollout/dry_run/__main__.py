"""python -m dapo_megatron.rollout.dry_run RECIPE [section.key=value ...]: what the controller would read and call.

A process like the controller's: it imports a user's functions from the same folders.
"""

import sys

from dapo_megatron.errors import exit_code


def main() -> int:
    """0, or 1 after an error, which is one line on stderr."""
    # Grading workers import this module: what is heavy is imported by the process that runs.
    from rich.console import Console

    from dapo_megatron.config import load_config
    from dapo_megatron.rollout.dry_run.checks import dry_run

    recipe, *overrides = sys.argv[1:]
    return exit_code(lambda: dry_run(load_config(recipe, overrides), Console(highlight=False, soft_wrap=True)))


if __name__ == "__main__":
    sys.exit(main())
