"""The recipes that come with the project, found wherever it is installed."""

from importlib.resources import files
from pathlib import Path


def recipe_path(name: str) -> Path:
    """Path of a recipe by its name, such as demo."""
    return Path(str(files("launch.recipes") / f"{name}.yaml"))
