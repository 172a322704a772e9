import pytest
from rich.table import Table

from benchmarks.weight_push import Measured, add_row


def test_the_ratio_is_of_bytes_per_second_and_of_medians():
    row = Measured("TP 2", 2, 3_000_000_000, [4.0, 9.0, 5.0], [1.0, 4.0, 7.0])
    assert row.ratio == pytest.approx(4 / 5)
    table = Table("", "engines", "push s", "GB/s", "broadcast s", "GB/s", "ratio", "target")
    add_row(table, row)
    assert [next(iter(column.cells)) for column in table.columns] == [
        "TP 2", "2", "5.00", "0.60", "4.00", "0.75", "0.80", "0.8",
    ]  # fmt: skip
