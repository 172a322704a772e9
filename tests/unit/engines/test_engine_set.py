"""The file that says who serves."""

import asyncio

import pytest

from dapo_megatron.engines import engine_set
from dapo_megatron.engines.client import EngineClient
from dapo_megatron.engines.engine_set import EngineSet, Member, read_engine_set, write_engine_set
from dapo_megatron.errors import ConfigError
from dapo_megatron.run_folder import RunFolder
from tests.unit.engines.fake_engine import PARAMS


def test_the_set_is_written_and_read_and_missing_is_told(tmp_path, monkeypatch):
    folder, engines = (
        RunFolder(tmp_path),
        EngineSet(5, (Member("engine-0", "http://a:1", 3), Member("engine-1", "http://b:2"))),
    )
    with pytest.raises(ConfigError, match=r"engines\.json cannot be read"):
        read_engine_set(folder)
    write_engine_set(folder, engines)
    assert read_engine_set(folder) == engines
    folder.engine_set.rename(tmp_path / "aside")  # another node replaces it at this moment
    monkeypatch.setattr(engine_set.time, "sleep", lambda _: (tmp_path / "aside").rename(folder.engine_set))
    assert read_engine_set(folder) == engines

    async def run():
        folder.engine_set.write_text("{")
        async with EngineClient(lambda: read_engine_set(folder), concurrency=4, timeout_s=5) as client:
            await client.generate([1], PARAMS)

    with pytest.raises(ConfigError, match=r"engines\.json cannot be read"):
        asyncio.run(run())
