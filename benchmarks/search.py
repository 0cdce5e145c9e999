"""The search for neighbors against faiss's IndexFlatIP, scikit-learn's and LGSSL's, and in lists."""

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

from benchmarks.timing import alternate, told
from likewise.embeddings.lexical import BagOfWordsEncoder
from likewise.neighbors.faiss_index import IVFIndex
from likewise.neighbors.search import DEFAULT_MEMORY_BYTES, ExactIndex, deduplicate_rows, exact_topk

K = 10
_BATCH = 512  # queries that LGSSL searches for at a time
_PER_CENTER = 50


def run() -> list[str]:
    """Compare searches of 20,000 vectors and of 10,000 captions' words."""
    return [*compared(20_000, None, rounds=3), *counted(10_000, rounds=3)]


def compared(rows: int, queries: int | None, rounds: int, dimension: int = 384) -> Iterator[str]:
    """Compare searches of random unit vectors, and of clustered ones in inverted lists.

    Args:
        rows: How many vectors are searched.
        queries: How many of them are searched for, all of them if not given; all searches take time
            proportional to it.
        rounds: Times of which the median is told.
        dimension: Numbers a vector.
    """
    vectors = unit(np.random.default_rng(0).standard_normal((rows, dimension), np.float32))
    asked = np.arange(rows if queries is None else min(queries, rows))
    name = f"top-{K} of {rows:,} x {dimension}" + ("" if len(asked) == rows else f", for {len(asked):,}")
    index, building = timed(partial(ExactIndex, vectors))
    for peer_name, peer_index, search in (
        ("faiss IndexFlatIP, k + 1", faiss.IndexFlatIP(dimension), search_once),
        ("as LGSSL: k, k + 1, row by row", faiss.IndexFlatL2(dimension), search_as_lgssl),
    ):
        peer_index.add(vectors)  # pyrefly: ignore[missing-argument]
        peer = partial(search, peer_index, vectors, asked)
        yield told(f"neighbors, {name}", peer_name, alternate(partial(index.search, asked, K), peer, rounds))
        peer_index.reset()
    needed = memory_needed(vectors, asked)
    yield f"{'':<4}grouping equal rows before: {building:.3f} s; memory beside the vectors: {needed:,.0f} MiB"
    del index, vectors
    vectors = clustered(rows, dimension)
    exact, (lists, building) = ExactIndex(vectors), timed(partial(IVFIndex, vectors))
    times = alternate(partial(lists.search, asked, K), partial(exact.search, asked, K), rounds)
    yield told(f"lists, {name}, clustered", "our exact search", times)
    yield (
        f"{'':<4}recall@{K} {lists.recall:.3f} with {lists.nprobe} of {lists.nlist} lists, "
        f"built and measured in {building:.1f} s"
    )


def counted(rows: int, rounds: int) -> Iterator[str]:
    """Compare searches of hashed words (`--encoder tfidf`), in captions of eight that follow Zipf's law."""
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
        yield told(f"neighbors, words of {rows:,} captions", name, times)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Bring rows to unit length, in place."""
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def clustered(rows: int, dimension: int) -> np.ndarray:
    """Draw unit rows around centers, 50 around each, whose cosine to each other is about 0.7."""
    rng = np.random.default_rng(1)
    centers = rng.normal(size=(max(1, rows // _PER_CENTER), dimension)).astype(np.float32)
    vectors = centers[rng.integers(0, len(centers), rows)]
    vectors += 0.65 * rng.standard_normal(size=vectors.shape, dtype=np.float32)
    return unit(vectors)


def search_once(index: faiss.IndexFlat, vectors: np.ndarray, asked: np.ndarray) -> object:
    """Search for one more than k, and leave to the reader who is whose own neighbor."""
    return index.search(vectors[asked], K + 1)  # pyrefly: ignore[missing-argument]


def search_as_lgssl(index: faiss.IndexFlat, vectors: np.ndarray, asked: np.ndarray) -> object:
    """Follow the procedure of `faiss_knn(exclude_self=True)` in LGSSL's lgssl/utils/faiss.py.

    In batches of 512 it searches for k, then for k + 1, and strikes each row out of its own neighbors.
    """
    nearest = []
    for start in range(0, len(asked), _BATCH):
        own = asked[start : start + _BATCH]
        index.search(vectors[own], K)  # pyrefly: ignore[missing-argument]
        _, found = index.search(vectors[own], K + 1)  # pyrefly: ignore[missing-argument]
        nearest.append(np.stack([row[row != me][:K] for row, me in zip(found, own, strict=True)]))
    return np.concatenate(nearest)


def timed(make: partial) -> tuple:
    """Return what is made and the seconds it took."""
    start = time.perf_counter()
    made = make()
    return made, time.perf_counter() - start


def memory_needed(vectors: np.ndarray, asked: np.ndarray) -> float:
    """Return by how many MiB a fresh process grows while it searches a file of vectors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors"
        vectors.tofile(path)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_memory_needed, path, vectors.shape, asked).result()


def _memory_needed(path: Path, shape: tuple[int, int], asked: np.ndarray) -> float:
    mapped = np.memmap(path, np.float32, "r", shape=shape)
    # Multiplying once lets the libraries take what they keep for themselves.
    exact_topk(np.array(mapped[:64]), deduplicate_rows(mapped[:64]), np.arange(64), K)
    before, peak, done = _anonymous(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    ExactIndex(mapped, memory_bytes=DEFAULT_MEMORY_BYTES).search(asked, K)
    done.set()
    watcher.join()
    return peak - before


def _anonymous() -> float:
    """Return the process's memory in MiB without files that it maps (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def main() -> None:
    """Print a line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000, help="vectors that are searched")
    parser.add_argument("--queries", type=int, help="how many of them are searched for (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="times of which the median is told")
    given = parser.parse_args()
    for line in compared(given.rows, given.queries, given.rounds):
        print(line, flush=True)
    for line in counted(min(given.rows, 10_000), given.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
