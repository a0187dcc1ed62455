"""What a function that is called in Python writes to stderr."""

import subprocess
import sys
from pathlib import Path


def test_a_function_that_is_called_without_absl_flags_logs_its_own_lines_alone():
    program = "from core.base.command_line import *; configure_logging(); logging.info('begun')"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[3], check=True
    )
    (line,) = result.stderr.splitlines()
    assert line.endswith(" begun")
