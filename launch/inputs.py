"""Does what a run reads exist, and does it fit the configuration? Checked before anything is started."""

from pathlib import Path

from dapo_megatron.actor.layout_check import check_layout
from dapo_megatron.actor.precision import Machine, check_precision, require_precision
from dapo_megatron.config import RunConfig
from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.engines.stop_tokens import stop_token_ids
from dapo_megatron.errors import ConfigError
from dapo_megatron.weights.families import ModelShape
from dapo_megatron.weights.hf_config import read_model
from dapo_megatron.weights.hf_folder import HfFolder, check_weights
from launch.container import image_file


def check_inputs(config: RunConfig, machine: Machine | None = None) -> None:
    """Check data files, model and precision.

    Args:
        machine: where the run will train; None: this one.

    Raises:
        DapoError: a file is missing, the model is not supported or does not fit the layout, or the machine cannot
            train in FP8.
    """
    check_data(config)
    check_shape(config, machine)
    check_model_files(config)


def check_job_inputs(config: RunConfig) -> None:
    """Check what a SLURM job reads, on its first node; raises as check_inputs.

    In a container the paths of data and model are its own, and controller and ranks look for them there.
    """
    if config.launch.container is None:
        check_inputs(config)
    else:
        check_image(config)


def check_image(config: RunConfig) -> None:
    """Raise ConfigError where the image of the job's container is a file that does not exist."""
    container = config.launch.container
    if container is not None and (path := image_file(container)) is not None and not path.exists():
        raise ConfigError(f"launch.container.image={container.image} does not exist")


def check_data(config: RunConfig) -> None:
    """Raise ConfigError for the first data file that does not exist."""
    for name, paths in (("data.train", config.data.train), ("data.eval", config.data.eval or [])):
        for path in paths:
            if not Path(path).exists():
                raise ConfigError(f"{name}={path} does not exist")


def check_shape(config: RunConfig, machine: Machine | None = None) -> ModelShape:
    """The numbers in the model's config.json, which fit layout and precision; raises as check_inputs."""
    shape = read_model(config.model.path)
    check_layout(config, shape)
    if machine is None:
        require_precision(config, shape)
    else:
        check_precision(config, shape, machine)
    return shape


def check_model_files(config: RunConfig) -> None:
    """Raise DapoError where weights or tokenizer are missing or do not fit config.json."""
    check_weights(HfFolder(config.model.path), read_model(config.model.path))
    stop_token_ids(config.model.path, load_tokenizer(config.model.path))
