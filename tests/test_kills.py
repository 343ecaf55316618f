"""A slice of scripts/reliability/kills.py: a few kills while a run is trained, sampled, unlearned and scored."""

import json
import random
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "reliability" / "kills.py"


def test_a_run_that_is_killed_and_typed_again_ends_with_the_same_bits() -> None:
    seed = random.SystemRandom().randrange(2**31)
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--only", "attribution", "--seed", str(seed)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    print(ended.stdout, ended.stderr)  # with the seed, where it fails
    assert ended.returncode == 0
    result = json.loads(ended.stdout)
    assert result["seed"] == seed
    assert result["kills"] == 3
    assert result["attempts"] > 3
    assert result["differing_files"] == []
    assert result["equal_files"] == result["files"] * result["rounds"] > 10
