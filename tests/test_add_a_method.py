"""docs/add-a-method.md works as written: its files, put into a checkout, are a method that passes its own tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mucs_cli.composition import conf_folder

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs" / "add-a-method.md"
BLOCK = re.compile(r"^## \d\. [^\n]*`(?P<path>[\w/.]+)`\n\n```\w+\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the page's reader has, with the page's blocks in the files that their headings name."""
    skipped = shutil.ignore_patterns("conf", "__pycache__")
    shutil.copytree(REPOSITORY / "mucs_cli", tmp_path / "mucs_cli", ignore=skipped)
    # inside the package, where an installed one has it: nothing of the surrounding installation is found instead
    shutil.copytree(conf_folder(), tmp_path / "mucs_cli" / "conf")
    (tmp_path / "conf").symlink_to(tmp_path / "mucs_cli" / "conf")
    (tmp_path / "tests" / "methods").mkdir(parents=True)
    for name in ("conftest.py", "commands.py", "test_config.py", "methods/conftest.py", "methods/method_runs.py"):
        shutil.copy(REPOSITORY / "tests" / name, tmp_path / "tests" / name)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    for block in BLOCK.finditer(PAGE.read_text()):
        assert not (tmp_path / block["path"]).exists()
        (tmp_path / block["path"]).write_text(block["text"])
    return tmp_path


def python(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(checkout), "CI": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_pages_method_passes_the_pages_test_and_is_in_the_help(checkout: Path) -> None:
    files = {block["path"] for block in BLOCK.finditer(PAGE.read_text())}
    assert files == {"mucs_cli/methods/pooled.py", "conf/method/pooled.yaml", "tests/methods/test_pooled.py"}
    listed = python(checkout, "-m", "mucs_cli", "score", "--help")
    assert "method.side=2" in listed.stdout, listed.stderr
    command = "-m pytest -q tests/methods/test_pooled.py tests/test_config.py -k pooled"
    assert command.removeprefix("-m pytest -q ") in PAGE.read_text()
    tested = python(checkout, *command.split(), "-p", "no:cacheprovider")
    assert tested.returncode == 0, tested.stdout
    own, of_configuration = 3, 1
    (passed,) = re.findall(r"(\d+) passed", tested.stdout)
    assert int(passed) > own + of_configuration


def test_the_pages_code_is_in_the_houses_form(checkout: Path) -> None:
    pytest.importorskip("ruff")
    for arguments in (["format", "--check"], ["check"]):
        done = python(checkout, "-m", "ruff", *arguments, "mucs_cli/methods/pooled.py", "tests/methods/test_pooled.py")
        assert done.returncode == 0, done.stdout + done.stderr
