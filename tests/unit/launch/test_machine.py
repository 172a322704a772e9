"""What this machine lets a process do."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, subprocess, sys
from dapo_megatron.errors import ConfigError
from launch.machine import raise_open_files_limit
hard = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
try:
    raise_open_files_limit(int(sys.argv[2]))
except ConfigError as e:
    print(e)
else:
    child = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    assert int(subprocess.check_output([sys.executable, "-c", child])) == hard
"""


@pytest.mark.parametrize(
    ("hard", "concurrency", "refused"), [(1024, 768, False), (1024, 769, True), (4096, 1024, False)]
)
def test_the_limit_of_open_files_is_raised_or_the_config_refused(hard, concurrency, refused):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(hard), str(concurrency)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    says = f"a process may open {hard} files here, {concurrency} responses in flight need {concurrency + 256}: "
    assert done.stdout.startswith(says) if refused else done.stdout == ""
