"""The exact self-join against faiss's IndexFlatIP on the same vectors."""

import faiss
import numpy as np

from benchmarks.timing import alternate, told
from likewise.neighbors.search import group_equal, top_k


def run(n: int = 20_000, dimension: int = 384, k: int = 10) -> str:
    """Compare the whole self-join of n random unit vectors."""
    vectors = np.random.default_rng(0).normal(size=(n, dimension)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def ours() -> object:
        return top_k(vectors, group_equal(vectors), np.arange(n), k)

    def peer() -> object:
        index = faiss.IndexFlatIP(dimension)
        index.add(vectors)  # pyrefly: ignore[missing-argument]
        return index.search(vectors, k + 1)  # pyrefly: ignore[missing-argument]

    return told(
        f"neighbors, top-{k} of {n:,} x {dimension}", "faiss IndexFlatIP, k + 1", alternate(ours, peer, 3)
    )
