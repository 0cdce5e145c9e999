"""Speed against named peers, and quality on real data; `python -m benchmarks` runs what takes minutes."""
