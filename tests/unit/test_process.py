import gc

import pytest

from dapo_megatron.process import importing


def test_nothing_is_collected_while_modules_are_imported_and_all_is_after_it():
    frozen = gc.get_freeze_count()
    try:
        with importing():
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() > frozen
        with pytest.raises(ImportError), importing():
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.unfreeze()
