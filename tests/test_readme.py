"""The code of the README and the guide runs as written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))


def marked_blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page that are marked as tested."""
    return re.findall(rf"<!-- tested -->\n```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_readme_python_runs_as_written(workdir: Path) -> None:
    (code,) = marked_blocks(README, "python")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=workdir, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "knn" in result.stdout
    assert (workdir / "report.html").stat().st_size > 10_000


def test_readme_commands_run_as_written(workdir: Path) -> None:
    (block,) = marked_blocks(README, "bash")
    commands = [line.split("#")[0].strip() for line in block.splitlines()]
    assert [command.split()[1] for command in commands] == [
        "import",
        "embed",
        "audit",
        "analyze-pairs",
        "train",
        "evaluate",
        "report",
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        # A small encoder that needs no download, and two steps, because 20 epochs take too long.
        small = command.replace("--epochs 20", "--max-steps 2").replace(
            "resnet18 --image-size 64", "resnet10t --image-size 32"
        )
        small += " --encoder all-MiniLM-L6-v2" if " embed " in command else ""
        result = subprocess.run(
            [*small.split(), "--quiet"],
            cwd=workdir,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, (small, result.stderr)
    assert "Content-Security-Policy" in (workdir / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    "page", [page for page in GUIDE if marked_blocks(page, "python")], ids=lambda page: page.stem
)
def test_guide_python_runs_as_written(
    page: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workdir)
    for code in marked_blocks(page, "python"):
        exec(compile(code, page.name, "exec"), {})  # noqa: S102  # the guide's own code
    assert capsys.readouterr().out


def test_every_guide_python_block_is_tested() -> None:
    for page in GUIDE:
        assert page.read_text().count("```python") == len(marked_blocks(page, "python")), page.name
