"""The scripts in `examples/` run as written on real images."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = {
    "train_simclr.py": "photos/ labeled/ out/ --backbone resnet10t --image-size 32 --batch-size 32"
    " --epochs 1",
    "use_encoder.py": "random:resnet10t photos/ cat.jpg",
    "custom_method.py": "photos/ labeled/ out/",
    "custom_pairs.py": "photos/ out/",
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_example_runs_as_written(name: str, workdir: Path) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) <= 60
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *ARGUMENTS[name].split()],
        cwd=workdir,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout
