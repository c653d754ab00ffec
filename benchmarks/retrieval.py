"""What finding the pseudo-targets costs: exact search and IVF-PQ with exact re-ranking, in time, recall and memory.

    python benchmarks/retrieval.py
    python benchmarks/retrieval.py --pool 100000 --memory_pool 200000 --queries 500

The embeddings are synthetic and lie on disk as a build leaves them: fp16, of unit length, in shards. As those of CLIP
they share one direction (two images have a mean cosine of 0.5), fall into groups of uneven size (Zipf's law) and vary
in few directions: inside a group a Gaussian of `LATENT` dimensions whose standard deviations fall as 1 / sqrt(number),
plus white noise in all. A query is the mean of a pool image and of a text: another pool image with noise, moved along
one direction of its own, as CLIP's texts lie apart from its images. Memory is the peak of a fresh process that builds
the index and searches, with it and without.
"""

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from diffusers_iedit.pairs.retrieve import Embeddings, Retrieve, build_index


SHARDS = 20
LATENT = 64
GROUPS = 10_000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=1_000_000, help="images that time and recall are measured with")
    parser.add_argument("--memory_pool", type=int, default=2_000_000, help="images that memory is measured with")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--k", type=int, default=10, help="targets a source")
    parser.add_argument("--num_probes", type=int, default=64, help="lists of the index that are searched")
    parser.add_argument("--work_dir", type=Path, help="where a temporary folder of 1.5 KB an image is made")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--memory_of", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pool % SHARDS or args.memory_pool < args.pool:
        parser.error(f"--pool must be a multiple of {SHARDS} and at most --memory_pool")
    return args


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_pool(folder: Path, size: int, shard_size: int, dim: int) -> None:
    """Writes embeddings of at least `size` images, in shards that do not depend on it."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((dim, LATENT + 1)))[0].T.astype(np.float32)
    deviations = 1 / np.sqrt(np.arange(1, LATENT + 1, dtype=np.float32))
    deviations /= np.linalg.norm(deviations)
    centres = rng.standard_normal((GROUPS, LATENT), dtype=np.float32) * deviations
    shares = 1 / np.arange(1, GROUPS + 1)
    shares /= shares.sum()
    for number in range(math.ceil(size / shard_size)):
        rng = np.random.default_rng([1, number])
        groups = rng.choice(GROUPS, shard_size, p=shares)
        inside = rng.standard_normal((shard_size, LATENT), dtype=np.float32) * deviations
        vectors = rng.standard_normal((shard_size, dim), dtype=np.float32)
        vectors *= 0.35 / math.sqrt(dim)
        vectors += directions[0] + (0.75 * centres[groups] + 0.55 * inside) @ directions[1:]
        np.save(folder / f"{number:05}.npy", unit(vectors).astype(np.float16))


def make_batch(files: list[Path], queries: int) -> dict[str, np.ndarray]:
    """Sources from the pool, and texts that ask for what other images of the pool show."""
    pool = Embeddings(files)
    rng = np.random.default_rng(2)
    sources, targets = np.sort(rng.choice(len(pool), (2, queries), replace=False))
    texts = rng.permutation(pool.take(targets))
    texts += 0.5 * unit(rng.standard_normal(texts.shape)) + unit(rng.standard_normal((1, pool.dim)))
    return {"image_embeds": pool.take(sources), "prompt_embeds": unit(texts), "pool_row": sources}


def measure_memory_here(files: list[Path], args: argparse.Namespace) -> float:
    """MiB at this process's peak: building an index, searching with it, and searching without."""
    batch = make_batch(files, args.queries)
    index_file = args.memory_of / "memory.index"
    build_index(Embeddings(files), index_file)
    Retrieve(files, index_file, num_candidates=args.k, num_probes=args.num_probes)(batch)
    Retrieve(files, num_candidates=args.k)(batch)
    # In KiB on Linux, in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def measure_memory(folder: Path, args: argparse.Namespace) -> float:
    """`measure_memory_here` in a process of its own, as a process's peak never falls again."""
    options = [f"--{name}={getattr(args, name)}" for name in ("queries", "k", "num_probes")]
    command = [sys.executable, __file__, *options, f"--memory_of={folder}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def timed(function: Callable) -> tuple[float, Any]:
    """The seconds that a call took, and what it gave."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def measure(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    generate_s, _ = timed(lambda: make_pool(folder, max(args.pool, args.memory_pool), args.pool // SHARDS, args.dim))
    # Before this process grows: a child's peak starts from what its parent has.
    memory_s, memory_mib = timed(lambda: measure_memory(folder, args))

    files, index_file = sorted(folder.glob("*.npy"))[:SHARDS], folder / "pool.index"
    batch = make_batch(files, args.queries)
    exact_s, exact = timed(lambda: Retrieve(files, num_candidates=args.k)(batch))
    build_s, _ = timed(lambda: build_index(Embeddings(files), index_file))
    search_s, approximate = timed(
        lambda: Retrieve(files, index_file, num_candidates=args.k, num_probes=args.num_probes)(batch)
    )
    pairs = list(zip(exact["targets"], approximate["targets"], strict=True))
    return {
        "generate_s": generate_s,
        "exact_s": exact_s,
        "build_s": build_s,
        "search_s": search_s,
        "speed_up": exact_s / search_s,
        "recall_at_1": float(np.mean([true[0] == found[0] for true, found in pairs])),
        "recall_at_k": float(np.mean([np.isin(true, found).mean() for true, found in pairs])),
        "index_mib": index_file.stat().st_size / 2**20,
        "memory_run_s": memory_s,
        "peak_mib": memory_mib,
    }


def main():
    args = parse_args()
    if args.memory_of is not None:
        print(json.dumps(measure_memory_here(sorted(args.memory_of.glob("*.npy")), args)))
        return

    if args.work_dir is not None:
        args.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        results = measure(Path(folder), args)
    settings = {
        **{name: getattr(args, name) for name in ("pool", "memory_pool", "dim", "queries", "k", "num_probes")},
        "threads": faiss.omp_get_max_threads(),
        "faiss": faiss.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    print(f"exact search      {results['exact_s']:9.1f} s")
    print(f"index: building   {results['build_s']:9.1f} s, {results['index_mib']:.0f} MiB")
    print(f"index: search     {results['search_s']:9.1f} s, {results['speed_up']:.1f} times as fast as exact")
    print(f"index: recall@1   {results['recall_at_1']:9.4f}, recall@{args.k} {results['recall_at_k']:.4f}")
    print(f"peak memory       {results['peak_mib']:9.0f} MiB with {args.memory_pool} images")
    if args.json is not None:
        with open(args.json, "w") as file:
            json.dump({"settings": settings, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
