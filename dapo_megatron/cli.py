"""The command line: dapo-megatron run | rollout | config | check | metrics | report | replay | demo."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dapo_megatron.config import RunConfig, load_config
from dapo_megatron.config.explain import fields, value_of
from dapo_megatron.errors import ConfigError, exit_code
from dapo_megatron.run_folder import RunFolder

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="DAPO on Megatron and SGLang."
)


def _find_recipe(text: str) -> Path:
    """A path, or the name of a recipe that comes with the project."""
    from launch.recipes import recipe_path

    path = Path(text)
    shipped = recipe_path(text) if path.name == text and path.suffix not in (".yaml", ".yml") else path
    return shipped if shipped.exists() and not path.is_file() else path


ResumeFrom = Literal["latest", "latest-intact"]
Recipe = Annotated[
    Path, typer.Argument(parser=_find_recipe, help="YAML file, or the name of a recipe that comes along, such as demo")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as needed")]


@app.command(
    epilog="Examples:  dapo-megatron run launch/recipes/demo.yaml trainer.steps=5   |   "
    "dapo-megatron run launch/recipes/demo.yaml --resume   |   dapo-megatron run my.yaml --dry-run   |   "
    "dapo-megatron run my.yaml run_dir=runs/second --resume-weights-only=runs/first/checkpoints/step_000010"
)
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[
        ResumeFrom | None,
        typer.Option(
            metavar="[=latest|latest-intact]",
            help="Go on from the newest checkpoint in run_dir, or from the newest that is undamaged.",
        ),
    ] = None,
    resume_weights_only: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Begin a new run with the weights of a checkpoint; nothing else is taken from it.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, each row of the data too; start nothing.")] = False,
) -> None:
    """Run a job on this machine: engines, controller and trainer ranks."""
    config = load_config(recipe, overrides or [])
    from launch.inputs import check_inputs

    check_inputs(config)
    if resume is not None and resume_weights_only is not None:
        raise ConfigError("give --resume or --resume-weights-only: one goes on with a run, the other begins a new one")
    if dry_run:
        from launch.job import check_new, check_resume
        from launch.local import placed

        folder = RunFolder(Path(config.run_dir))
        check_resume(config, folder, resume) if resume else check_new(config, folder, resume_weights_only)
        with placed(config):
            pass  # this machine has what the run needs
        _print_plan(config)
        _run_module("dapo_megatron.rollout.dry_run", [str(recipe), *(overrides or [])], dict(os.environ))
        print("dry run: nothing was started")
        return
    from launch.local import run_local

    with _stopped_by_hand("go on with --resume"):
        print(f"report: {run_local(config, resume=resume, weights=resume_weights_only)}")


@app.command(
    epilog="Examples:  dapo-megatron rollout my.yaml --prompts 256 --output responses.jsonl   |   "
    "dapo-megatron rollout my.yaml --engine http://node1:30000 rollout.group_size=8 grading.grader=my_grader:is_right"
)
def rollout(
    recipe: Recipe,
    overrides: Overrides = None,
    prompts: Annotated[
        int, typer.Option(min=1, help="Groups to generate: the first that a training would, at most one a prompt.")
    ] = 64,
    output: Annotated[
        Path | None, typer.Option(help="New jsonl file: a line for each group, with its responses and their verdicts.")
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="SGLang server that serves the model already; again for each further one."),
    ] = None,
) -> None:
    """Generate and grade without a trainer; print accuracy, mixed groups, lengths, truncation and tokens/s.

    What a training's first step would see, on this machine's engines alone: no GPU is kept for trainer ranks.
    """
    config = load_config(recipe, overrides or [])
    from launch.inputs import check_data, check_model_files
    from launch.rollout import run_rollout

    check_data(config)
    check_model_files(config)
    kept = "nothing is kept" if output is None else f"finished groups are in {output}"
    with _stopped_by_hand(kept):
        code = run_rollout(config, prompts, output, engine or ())
    if code:
        raise typer.Exit(code)


@app.command(
    epilog="Example:  dapo-megatron demo actor.pipeline_model_parallel_size=2 actor.tensor_model_parallel_size=1"
)
def demo(overrides: Overrides = None) -> None:
    """Train a tiny model to add on this machine's CPU, every part real, in minutes."""
    from launch.demo import prepare, run_folder
    from launch.recipes import recipe_path

    with _stopped_by_hand("the warm-up begins anew next time"):
        prepare(Path("demo"))
    run(recipe_path("demo"), [f"run_dir={run_folder(Path('runs'))}", *(overrides or [])])


@app.command(epilog="Example:  dapo-megatron config launch/recipes/demo.yaml --explain")
def config(
    recipe: Recipe,
    overrides: Overrides = None,
    explain: Annotated[bool, typer.Option(help="Print every option with its documentation.")] = False,
) -> None:
    """Check a recipe and print what it comes to."""
    checked = load_config(recipe, overrides or [])
    console = Console()
    if explain:
        table = Table("option", "value", "what it is", title=Text(str(recipe)))
        for name, _, doc in fields():
            table.add_row(name, Text(str(value_of(checked, name))), Text(doc))
        console.print(table)
    _print_derived(checked, console)


@app.command(epilog="Example:  dapo-megatron check models/smollm2")
def check(model: Annotated[Path, typer.Argument(help="Hugging Face checkpoint folder.")]) -> None:
    """Compare a model's log-probs in the trainer with transformers' (CPU, float32); exit code 1 where they differ."""
    # Hidden from the process: with a GPU in sight, torch and megatron-core would compute there.
    _run_module("dapo_megatron.trainer.check_model", [str(model)], os.environ | {"CUDA_VISIBLE_DEVICES": ""})


@app.command(
    epilog="Examples:  dapo-megatron replay runs/demo/dumps/step_000012   |   dapo-megatron replay runs/demo   |   "
    "dapo-megatron replay runs/demo/batches/step_000011.msgpack actor.tensor_model_parallel_size=1"
)
def replay(
    target: Annotated[
        Path,
        typer.Argument(help="A dump that a run left after too many skipped updates, a dumped batch, or a run folder."),
    ],
    overrides: Overrides = None,
    begin: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT", help="What batches begin with; default: the run's checkpoint of the step before."
        ),
    ] = None,
) -> None:
    """Train what a run has kept again, without engines: the skipped updates of a dump, one micro-batch at a time, to
    find the one without a finite gradient; or the batches of a run with observe.dump_batches=true, step after step."""
    from launch.replay import DUMP, beginning, find_batches, line_of, replay_batches, replay_dump, step_of_batch

    with _stopped_by_hand("nothing was changed"):
        if (target / DUMP).exists():
            print(replay_dump(load_config(target / "config.yaml", overrides or []), target))
            return
        folder, batches = find_batches(target)
        config = load_config(folder.config, overrides or [])
        begin = begin or beginning(folder, step_of_batch(batches[0]))
        print(f"begins with {begin or config.model.path}", flush=True)
        replay_batches(config, batches, begin, lambda step: print(line_of(step), flush=True))


@app.command(epilog="Example:  dapo-megatron report runs/demo")
def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Write report.html from a run folder."""
    from dapo_megatron.observe.report import write_report

    print(write_report(RunFolder(run_dir)))


@app.command(epilog="Example:  dapo-megatron metrics")
def metrics() -> None:
    """List every metric: unit, how a step's updates are reduced, meaning."""
    from dapo_megatron.observe.catalog import CATALOG

    table = Table("metric", "unit", "over updates", "what it is")
    for metric in CATALOG.values():
        table.add_row(metric.name, metric.unit, metric.over_updates, metric.doc)
    Console().print(table)


def _run_module(module: str, arguments: list[str], environment: dict[str, str]) -> None:
    """Run a module in a process of its own; where it fails, its exit code is ours."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    with _stopped_by_hand("nothing was changed"):
        code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise typer.Exit(code)


@contextmanager
def _stopped_by_hand(what_next: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM are one line and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted: every process was stopped; {what_next}", file=sys.stderr)
        raise typer.Exit(130) from None


def _print_plan(config: RunConfig) -> None:
    from dapo_megatron.engines.command import engine_command

    console = Console()
    _print_derived(config, console)
    command = " ".join(engine_command(config, "127.0.0.1", 0, cpu=False))
    for line in (f"engine: {command}", f"trainer: {config.world_size} ranks; run folder: {config.run_dir}"):
        console.print(line, soft_wrap=True, markup=False)


def _print_derived(config: RunConfig, console: Console) -> None:
    table = Table("derived value", "", title="what follows")
    for name, value in config.derived().items():
        table.add_row(name, Text(str(value)))
    console.print(table)


def main() -> None:
    """Entry point: a DapoError is one line on stderr and exit code 1."""
    # typer has no option whose value may be left out.
    arguments = ["--resume=latest" if argument == "--resume" else argument for argument in sys.argv[1:]]
    sys.exit(exit_code(lambda: app(arguments)))


if __name__ == "__main__":
    main()
