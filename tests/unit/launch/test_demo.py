"""The demo makes its own folder, and removes no other."""

import pytest

from dapo_megatron.errors import ConfigError
from launch import demo


def test_a_folder_of_somebody_elses_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "warm_up", lambda folder, updates: None)
    for theirs in (tmp_path / "folder", tmp_path / "file"):
        if theirs.name == "folder":
            theirs.mkdir()
            (theirs / "thesis.tex").write_text("years of work")
        else:
            theirs.write_text("years of work")
        with pytest.raises(ConfigError, match="not the demo's own"):
            demo.prepare(theirs)
    assert (tmp_path / "folder" / "thesis.tex").exists()


def test_its_own_is_made_once_and_anew_where_it_was_interrupted(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(demo, "warm_up", lambda folder, updates: made.append(folder))
    folder = tmp_path / "demo"
    folder.mkdir()  # empty
    demo.prepare(folder)
    demo.prepare(folder)
    assert made == [folder]
    (folder / "task.json").write_text('{"torn')
    demo.prepare(folder)
    (folder / "task.json").unlink()
    demo.prepare(folder)
    assert made == [folder] * 3
