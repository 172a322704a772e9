"""The processes of a SLURM job in containers: options of srun for pyxis, a command before the command for apptainer."""

from collections.abc import Sequence
from pathlib import Path

from dapo_megatron.config.launch import ContainerConfig


def image_file(container: ContainerConfig) -> Path | None:
    """The file that the image is; None: a registry has it. Pure."""
    image = container.image
    is_file = image.startswith(("/", ".")) or image.endswith((".sqsh", ".sif"))
    return Path(image) if is_file and "://" not in image else None


def in_container(
    container: ContainerConfig | None, command: Sequence[str], folders: Sequence[str], *, gpus: bool
) -> tuple[list[str], list[str]]:
    """(options of srun, command) of a step. Pure.

    Args:
        command: its first word is a Python, for which the container's stands.
        folders: that the processes need beside `container.mounts`, under the same paths; the first is where they work.
    """
    if container is None:
        return [], list(command)
    inside = [container.python, *command[1:]]
    mounts = [*(f"{folder}:{folder}" for folder in dict.fromkeys(folders)), *container.mounts]
    if container.runtime == "pyxis":
        options = [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]
        return [*options, f"--container-workdir={folders[0]}"], inside
    binds = [word for mount in mounts for word in ("--bind", mount)]
    nvidia = ["--nv"] if gpus else []
    return [], ["apptainer", "exec", *nvidia, *binds, "--pwd", folders[0], container.image, *inside]
