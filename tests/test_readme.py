"""The README's code does what it says, as written."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def prepare(emoji: Path, folder: Path) -> None:
    """Put captioned photos and a labelled folder where the README has them."""
    with emoji.open() as stream:
        for row in csv.DictReader(stream):
            name = f"{row['house']}-{row['instance']}.png"
            if row["split"] == "train":
                target = folder / "photos" / row["house"] / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.with_suffix(".txt").write_text(row["caption"])
                shutil.copy(emoji.parent / row["file"], target)
            target = folder / "labelled" / row["split"] / row["category"] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(emoji.parent / row["file"], target)


def test_python_code_runs_as_written(emoji: Path, tmp_path: Path) -> None:
    prepare(emoji, tmp_path)
    found = re.search(r"<!-- tested -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    told = subprocess.run(
        [sys.executable, "-c", found.group(1)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    assert 0 <= float(told.stdout) <= 1
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_commands_of_the_readme_run_as_written(emoji: Path, tmp_path: Path) -> None:
    prepare(emoji, tmp_path)
    block = README.read_text().split("## Your own images")[1].split("```bash\n")[1].split("```")[0]
    commands = [line.split("#")[0].strip() for line in block.splitlines() if line.startswith("likewise ")]
    assert [c.split()[1] for c in commands] == [
        "import",
        "embed",
        "audit",
        "diagnose",
        "train",
        "evaluate",
        "report",
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        # What a test cannot have: the paper's encoder comes from the hub, and 20 epochs take too long.
        small = command.replace("--epochs 20", "--steps 2").replace(
            "resnet18 --size 64", "resnet10t --size 32"
        )
        small += " --encoder all-MiniLM-L6-v2" if " embed " in command else ""
        told = subprocess.run(
            [*small.split(), "--quiet"],
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert told.returncode == 0, (small, told.stderr)
    assert "Content-Security-Policy" in (tmp_path / "run" / "report.html").read_text()
