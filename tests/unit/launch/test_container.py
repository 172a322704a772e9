"""Commands in containers, as srun and apptainer take them."""

from pathlib import Path

import pytest

from dapo_megatron.config.launch import ContainerConfig
from launch.container import image_file, in_container

COMMAND = ["/home/me/.venv/bin/python", "-m", "launch.task", "/runs/a/steps/engine-0.json"]
FOLDERS = ["/home/me/dapo", "/runs/a"]


def test_without_a_container_nothing_changes():
    assert in_container(None, COMMAND, FOLDERS, gpus=True) == ([], COMMAND)


def test_pyxis_is_told_by_options_of_srun():
    container = ContainerConfig(runtime="pyxis", image="/images/dapo.sqsh", mounts=["/models:/models", "/data:/in"])
    options, command = in_container(container, COMMAND, FOLDERS, gpus=True)
    assert options == [
        "--container-image=/images/dapo.sqsh",
        "--container-mounts=/home/me/dapo:/home/me/dapo,/runs/a:/runs/a,/models:/models,/data:/in",
        "--container-workdir=/home/me/dapo",
    ]
    assert command == ["python3", *COMMAND[1:]]


@pytest.mark.parametrize("gpus", [True, False])
def test_apptainer_is_a_command_around_the_command(gpus):
    container = ContainerConfig(runtime="apptainer", image="dapo.sif", mounts=["/m:/m"], python="/opt/bin/python")
    options, command = in_container(container, COMMAND, ["/w", "/w"], gpus=gpus)
    around = ["apptainer", "exec", *(["--nv"] if gpus else []), "--bind", "/w:/w", "--bind", "/m:/m", "--pwd", "/w"]
    assert options == [] and command == [*around, "dapo.sif", "/opt/bin/python", *COMMAND[1:]]


@pytest.mark.parametrize(
    ("runtime", "image", "is_file"),
    [
        ("pyxis", "/images/dapo.sqsh", True),
        ("pyxis", "./dapo.sqsh", True),
        ("pyxis", "dapo.sqsh", True),
        ("pyxis", "../dapo", True),
        ("pyxis", "nvcr.io#nvidia/pytorch:25.06-py3", False),
        ("pyxis", "ubuntu", False),
        ("pyxis", "docker://ubuntu:24.04", False),
        ("apptainer", "dapo.sif", True),
        ("apptainer", "/images/sandbox", True),
        ("apptainer", "docker://ghcr.io/me/dapo.sif", False),
        ("apptainer", "library://me/dapo.sif", False),
    ],
)
def test_an_image_is_a_file_or_of_a_registry(runtime, image, is_file):
    assert image_file(ContainerConfig(runtime=runtime, image=image)) == (Path(image) if is_file else None)
