"""Speed against named peers, and quality on real data; `python -m benchmarks` runs what takes minutes."""

import likewise  # noqa: F401  # Before torch, so that threads wait as likewise tells them, as in its commands.
