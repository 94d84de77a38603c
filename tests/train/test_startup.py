"""Commands start quickly."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from softprompt.data.samples import open_source

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "scipy", "matplotlib", "jinja2")


COMMANDS = ("softprompt", "compare", "benchmark", "doctor", "export", "gpu", "replay", "report", "runs", "sample", "prompts")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_none_of_the_large_libraries(command: str) -> None:
    program = (
        f"import runpy, sys\nsys.argv = ['x', '--help']\n"
        f"try:\n    runpy.run_module('train.{command}', run_name='__main__')\n"
        f"except SystemExit as end:\n    print('CODE', end.code)\n"
        f"print('LOADED', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.endswith("CODE 0\nLOADED []\n"), done.stdout + done.stderr


def test_the_package_is_imported_in_under_a_second_beyond_torch() -> None:
    program = "import time, torch\nbegan = time.perf_counter()\nimport softprompt\nprint(time.perf_counter() - began)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert float(done.stdout) < 1


def test_a_list_of_12000_samples_is_opened_without_a_look_at_each(tmp_path: Path) -> None:
    (tmp_path / "sample").mkdir()
    names = ["sample", *(f"group_{n % 7}/sample_{n:05d}" for n in range(11_999))]  # of which only the first is there
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names))
    began = time.perf_counter()
    source = open_source(tmp_path / "list.txt", size=64, check=False)
    assert time.perf_counter() - began < 1
    assert len(source) == len(set(source.names)) == 12_000
