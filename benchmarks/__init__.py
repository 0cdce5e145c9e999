"""Speed against named peers, and quality on real data; `python -m benchmarks` runs what takes minutes."""

import os

# As in the command line (see likewise/cli/__main__.py). It must be set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
