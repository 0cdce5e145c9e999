"""The documentation site builds without warnings and lists the public API."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import likewise

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("guide/*.md")), *sorted(DOCS.glob("results/*.md"))]


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


def documented_commands(page: Path) -> list[tuple[str, list[str]]]:
    """Return the name and the flags of each command in the shell blocks of a page."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [
        re.match(r"(?:torchrun .* -m likewise\.cli|likewise) ([a-z-]+)([^#]*)", line) for line in lines
    ]
    return [(match[1], re.findall(r"(?<!\S)--?[a-z][a-z-]*", match[2])) for match in commands if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_documented_commands_and_flags_exist(page: Path) -> None:
    from likewise.cli.__main__ import app

    for name, flags in documented_commands(page):
        known = {flag for argument in app[name].assemble_argument_collection() for flag in argument.names}
        assert set(flags) <= known, (page.name, name)
