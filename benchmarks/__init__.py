"""Benchmarks: speed against other tools, and quality on real data; `python -m benchmarks` takes minutes."""

import os

# As in the command line (see likewise/cli/__main__.py). It must be set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
