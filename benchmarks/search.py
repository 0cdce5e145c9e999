"""Neighbor search against faiss, scikit-learn and LGSSL, and approximate against exact search."""

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import faiss
import numpy as np
from scipy.sparse import csr_array
from sklearn.neighbors import NearestNeighbors

from benchmarks.timing import alternate, format_result
from likewise.embeddings.lexical import BagOfWordsEncoder
from likewise.neighbors.faiss_index import IVFIndex
from likewise.neighbors.search import DEFAULT_MEMORY_BYTES, ExactIndex, deduplicate_rows, exact_topk

K = 10
_BATCH_SIZE = 512  # queries per search in LGSSL
_PER_CENTER = 50


def run() -> list[str]:
    """Compare searches of 20,000 dense vectors and of 10,000 TF-IDF vectors."""
    return [*compare_dense(20_000, None, rounds=3), *compare_sparse(10_000, rounds=3)]


def compare_dense(rows: int, queries: int | None, rounds: int, dim: int = 384) -> Iterator[str]:
    """Compare exact search of random vectors, and approximate search of clustered vectors.

    Args:
        rows: Number of indexed vectors.
        queries: Number of query vectors; defaults to all.
        rounds: Timed rounds.
        dim: Dimension of the vectors.
    """
    vectors = normalize_rows(np.random.default_rng(0).standard_normal((rows, dim), np.float32))
    query_ids = np.arange(rows if queries is None else min(queries, rows))
    name = f"top-{K} of {rows:,} x {dim}" + ("" if len(query_ids) == rows else f", for {len(query_ids):,}")
    index, build_seconds = timed(partial(ExactIndex, vectors))
    for peer_name, peer_index, search in (
        ("faiss IndexFlatIP, k + 1", faiss.IndexFlatIP(dim), search_once),
        ("as LGSSL: k, k + 1, row by row", faiss.IndexFlatL2(dim), search_as_lgssl),
    ):
        peer_index.add(vectors)  # pyrefly: ignore[missing-argument]
        peer = partial(search, peer_index, vectors, query_ids)
        yield format_result(
            f"neighbors, {name}", peer_name, alternate(partial(index.search, query_ids, K), peer, rounds)
        )
        peer_index.reset()
    memory_mb = memory_needed(vectors, query_ids)
    yield f"{'':<4}deduplication: {build_seconds:.3f} s; memory apart from the vectors: {memory_mb:,.0f} MiB"
    del index, vectors
    vectors = make_clusters(rows, dim)
    exact, (ivf, build_seconds) = ExactIndex(vectors), timed(partial(IVFIndex, vectors))
    times = alternate(partial(ivf.search, query_ids, K), partial(exact.search, query_ids, K), rounds)
    yield format_result(f"IVF, {name}, clustered", "exact search", times)
    yield (
        f"{'':<4}recall@{K} {ivf.recall:.3f} with {ivf.nprobe} of {ivf.nlist} lists, "
        f"built and calibrated in {build_seconds:.1f} s"
    )


def compare_sparse(rows: int, rounds: int) -> Iterator[str]:
    """Compare searches of TF-IDF vectors (`--encoder tfidf`) of captions of eight words with Zipf's law."""
    rng = np.random.default_rng(2)
    captions = [" ".join(map("w{}".format, words)) for words in rng.zipf(1.3, (rows, 8)) % 5000]
    vectors = BagOfWordsEncoder(lambda: iter([captions]), use_idf=True).encode(captions, rows)
    sparse = csr_array(vectors)
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)  # pyrefly: ignore[missing-argument]
    peers = {
        "faiss IndexFlatIP, k + 1": lambda: flat.search(vectors, K + 1),  # pyrefly: ignore[missing-argument]
        "scikit-learn, brute, sparse, k + 1": lambda: (
            NearestNeighbors(metric="cosine", algorithm="brute").fit(sparse).kneighbors(sparse, K + 1)
        ),
    }
    for name, peer in peers.items():
        times = alternate(lambda: ExactIndex(vectors).search(np.arange(rows), K), peer, rounds)
        yield format_result(f"neighbors, TF-IDF of {rows:,} captions", name, times)


def normalize_rows(vectors: np.ndarray) -> np.ndarray:
    """Scale rows to unit length, in place."""
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def make_clusters(rows: int, dim: int) -> np.ndarray:
    """Sample unit vectors around centers, 50 per center, with a cosine of about 0.7 within a cluster."""
    rng = np.random.default_rng(1)
    centers = rng.normal(size=(max(1, rows // _PER_CENTER), dim)).astype(np.float32)
    vectors = centers[rng.integers(0, len(centers), rows)]
    vectors += 0.65 * rng.standard_normal(size=vectors.shape, dtype=np.float32)
    return normalize_rows(vectors)


def search_once(index: faiss.IndexFlat, vectors: np.ndarray, query_ids: np.ndarray) -> object:
    """Search for k + 1 neighbors, without removing each vector from its own neighbors."""
    return index.search(vectors[query_ids], K + 1)  # pyrefly: ignore[missing-argument]


def search_as_lgssl(index: faiss.IndexFlat, vectors: np.ndarray, query_ids: np.ndarray) -> object:
    """Follow the procedure of `faiss_knn(exclude_self=True)` in LGSSL's lgssl/utils/faiss.py.

    In batches of 512 it searches for k, then for k + 1, and removes each vector from its own neighbors.
    """
    nearest = []
    for start in range(0, len(query_ids), _BATCH_SIZE):
        batch = query_ids[start : start + _BATCH_SIZE]
        index.search(vectors[batch], K)  # pyrefly: ignore[missing-argument]
        _, neighbors = index.search(vectors[batch], K + 1)  # pyrefly: ignore[missing-argument]
        nearest.append(np.stack([row[row != i][:K] for row, i in zip(neighbors, batch, strict=True)]))
    return np.concatenate(nearest)


def timed(function: partial) -> tuple:
    """Return the result of a call and its seconds."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def memory_needed(vectors: np.ndarray, query_ids: np.ndarray) -> float:
    """Return the growth in MiB of a new process while it searches a file of vectors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors"
        vectors.tofile(path)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_memory_needed, path, vectors.shape, query_ids).result()


def _memory_needed(path: Path, shape: tuple[int, int], query_ids: np.ndarray) -> float:
    mapped = np.memmap(path, np.float32, "r", shape=shape)
    # A first search allocates the buffers of the libraries.
    exact_topk(np.array(mapped[:64]), deduplicate_rows(mapped[:64]), np.arange(64), K)
    before, peak, done = _anonymous(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    ExactIndex(mapped, memory_bytes=DEFAULT_MEMORY_BYTES).search(query_ids, K)
    done.set()
    watcher.join()
    return peak - before


def _anonymous() -> float:
    """Return the anonymous memory of the process in MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def main() -> None:
    """Print one line per comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000, help="indexed vectors")
    parser.add_argument("--queries", type=int, help="query vectors (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    args = parser.parse_args()
    for line in compare_dense(args.rows, args.queries, args.rounds):
        print(line, flush=True)
    for line in compare_sparse(min(args.rows, 10_000), args.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
