"""The documentation site builds without warnings and covers the public API."""

import re
import subprocess
import sys
from pathlib import Path

import likewise

DOCS = Path(__file__).parent.parent / "docs"


def test_api_reference_lists_every_public_name() -> None:
    listed = set(re.findall(r"auto(?:function|class):: likewise\.(\w+)", (DOCS / "api.md").read_text()))
    by_module = {name for name in likewise.__all__ if name.endswith("Error")} | {"losses"}
    assert listed == set(likewise.__all__) - by_module


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Language-guided" in (tmp_path / "index.html").read_text()
