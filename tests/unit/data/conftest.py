"""A small tokenizer made on the spot, and real data where it lies next to the repository."""

from pathlib import Path

import pytest

from tests.tiny import byte_tokenizer

DATA = Path(__file__).parents[3].parent / "shared" / "data"


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def shared():
    """Path of a real data file or folder; skips the test where it is absent."""

    def find(name):
        if not (DATA / name).exists():
            pytest.skip(f"{DATA / name} is not there")
        return DATA / name

    return find
