import sys

import pytest

from dapo_megatron.errors import DataError, exit_code


def raises(error):
    def program():
        raise error

    return program


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        (lambda: "done", 0, ""),
        (raises(DataError("row 3 is empty")), 1, "error: row 3 is empty\n"),
        (raises(FileNotFoundError(2, "No such file or directory", "a.json")), 1, "error: No such file or directory"),
        (lambda: sys.exit(), 0, ""),
        (lambda: sys.exit(0), 0, ""),
        (lambda: sys.exit(130), 130, ""),
    ],
)
def test_a_program_ends_with_a_code_and_at_most_one_line(capsys, program, code, said):
    assert exit_code(program) == code
    told = capsys.readouterr().err
    assert told.startswith(said) and told.count("\n") == bool(said)


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError("no file"), SystemExit("in words")])
def test_what_is_no_error_of_a_user_goes_on(error):
    with pytest.raises(type(error)):
        exit_code(raises(error))
