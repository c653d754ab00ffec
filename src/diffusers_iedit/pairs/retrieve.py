"""The pseudo-target of each source: the pool's nearest images to the mean of image and prompt embedding (Sec. 3.1)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from ..resuming import replacing
from .options import RetrieveOptions


EXACT_LIMIT = 1_000_000
"""The largest pool, in images, for which comparing with every image is advised; above it, build an index."""

MIN_INDEXED = 39 * 256
"""The smallest pool, in images, that an index can be trained on: 39 for each of the 256 values of a code's byte."""

# Rows that are in memory at once, as float32: 100 MB for 768 dimensions.
_CHUNK = 32_768
# Pairs of query and candidate that are compared exactly at once: scattered rows, each of which maps a few pages.
_PAIRS = 4096
# Candidates that all queries together may get from one look at the pool: 100 MB of similarities and rows.
_MAX_FOUND = 2**23
# What is asked for on top of the candidates wanted: enough that a second look at the pool is rare, and with an index,
# whose order is only roughly right, that the best are among them.
_SPARE, _SPARE_WITH_INDEX = 32, 128
# faiss compares so few queries one by one; with 20 or more it calls the BLAS, which rounds by the size of the batch.
_FEW = 16


def _unit(vectors, name: str) -> np.ndarray:
    """(n, D) vectors as float32 of length 1."""
    vectors = np.asarray(vectors, dtype=np.float64)
    if vectors.ndim != 2:
        raise ValueError(f"`{name}` must have the shape (B, D), got {vectors.shape}.")
    lengths = np.sqrt(np.vecdot(vectors, vectors))
    faulty = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(faulty):
        raise ValueError(
            f"`{name}` must be finite and not zero, but row {faulty[0]} has the length {lengths[faulty[0]]}."
        )
    return (vectors / lengths[:, None]).astype(np.float32)


class Embeddings:
    """The image embeddings of a pool, (N, D), that lie in several .npy files, without loading them.

    Files are mapped only while rows are copied out of them, so that the memory taken does not grow with the pool.

    Args:
        files (`Sequence[Path]`): One file a shard, in the order of the pool: float16 arrays of shape (n, D), of unit
            length but for the rounding.

    Raises:
        ValueError: No files or rows, another dtype or shape, files that differ in D; and when rows are read, one that
            is not of unit length (NaN and zero among them).
    """

    def __init__(self, files: Sequence[str | Path]):
        self._files = [Path(file) for file in files]
        dims, first_rows = set(), [0]
        for file in self._files:
            try:
                array = np.load(file, mmap_mode="r")
            except (ValueError, EOFError) as error:
                raise ValueError(f"`files` must be whole .npy files, but {file} is not: {error}") from None
            if array.dtype != np.float16 or array.ndim != 2:
                raise ValueError(
                    f"`files` must hold float16 of shape (n, D), but {file} holds {array.dtype} of {array.shape}."
                )
            dims.add(array.shape[1])
            first_rows.append(first_rows[-1] + len(array))
        if first_rows[-1] == 0:
            raise ValueError(f"`files` must hold at least one embedding, got {len(self._files)} files without any.")
        if len(dims) > 1:
            raise ValueError(f"`files` must agree in the number of dimensions, got {sorted(dims)}.")
        self.dim = dims.pop()
        self._first_rows = np.array(first_rows)

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The embeddings of some rows.

        Args:
            rows (`np.ndarray`): Row numbers from 0 to N - 1, ascending, shape (n,).

        Returns:
            `np.ndarray`: What is stored, as float32, shape (n, D).
        """
        vectors = np.empty((len(rows), self.dim), dtype=np.float32)
        ends = np.searchsorted(rows, self._first_rows)
        for number in np.flatnonzero(np.diff(ends)):
            start, end = ends[number : number + 2]
            # Mapped anew each time: pages of a mapping that stays would count as this process's memory.
            vectors[start:end] = np.load(self._files[number], mmap_mode="r")[
                rows[start:end] - self._first_rows[number]
            ]
        lengths = np.sqrt(np.vecdot(vectors, vectors))
        faulty = np.flatnonzero(~(np.abs(lengths - 1) < 0.01))
        if len(faulty):
            row, length = rows[faulty[0]], lengths[faulty[0]]
            raise ValueError(
                f"`files` must hold embeddings of length 1, but that of row {row} has the length {length}."
            )
        return vectors

    def chunks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """All embeddings in order, as (the first row, float32 of shape (`size` or fewer, D))."""
        for first in range(0, len(self), size):
            yield first, self.take(np.arange(first, min(first + size, len(self))))


def query_embeddings(image_embeds: np.ndarray, prompt_embeds: np.ndarray, text_weight: float = 0.5) -> np.ndarray:
    """What the pool is searched for: the mean of the source's and the edit prompt's CLIP embedding (Sec. 3.1).

    Args:
        image_embeds (`np.ndarray`): Embeddings of the sources x_1, shape (B, D), of any length but zero.
        prompt_embeds (`np.ndarray`): Embeddings of the edit prompts y_2, same shape.
        text_weight (`float`): Share of the prompt in [0, 1]; 0.5 is the paper's mean.

    Returns:
        `np.ndarray`: float32 of unit length, shape (B, D).

    Raises:
        ValueError: Shapes that differ, NaN or zero embeddings, a weight outside [0, 1].
    """
    if not 0 <= text_weight <= 1:
        raise ValueError(f"`text_weight` must lie in [0, 1], got {text_weight}.")
    images, prompts = _unit(image_embeds, "image_embeds"), _unit(prompt_embeds, "prompt_embeds")
    if images.shape != prompts.shape:
        raise ValueError(
            f"`image_embeds` and `prompt_embeds` must have one shape, got {images.shape} and {prompts.shape}."
        )
    return _unit((1 - text_weight) * images + text_weight * prompts, "image_embeds + prompt_embeds")


def build_index(embeddings: Embeddings, file: str | Path, num_lists: int | None = None, seed: int = 0) -> None:
    """Builds the index that `Retrieve` searches a large pool with, and saves it.

    It is faiss' IVF-PQ: `num_lists` spherical k-means clusters, and a code of D / 4 bytes for what is left of an
    embedding. 39 embeddings a list, chosen at random, train it. The same pool, seed, machine and number of threads
    give the same file.

    Args:
        embeddings (`Embeddings`): The pool; at least `MIN_INDEXED` rows, D a multiple of 4.
        file (`str` or `Path`): Where the index goes; it appears there when it is complete.
        num_lists (`int`, *optional*): Number of clusters, at most N / 39; 2 sqrt(N) by default.
        seed (`int`): Chooses the training embeddings.

    Raises:
        ValueError: A pool too small, D not a multiple of 4, too many lists.
    """
    if len(embeddings) < MIN_INDEXED:
        raise ValueError(
            f"`embeddings` must have at least {MIN_INDEXED} rows to be indexed, got {len(embeddings)}: search them "
            "without an index."
        )
    if embeddings.dim % 4:
        raise ValueError(f"`embeddings` must have a multiple of 4 dimensions to be indexed, got {embeddings.dim}.")
    if num_lists is None:
        num_lists = min(2 * math.isqrt(len(embeddings)), len(embeddings) // 39)
    elif not 1 <= num_lists <= len(embeddings) // 39:
        raise ValueError(f"`num_lists` must lie in 1 .. {len(embeddings) // 39} (rows / 39), got {num_lists}.")

    quantizer = faiss.IndexFlatIP(embeddings.dim)
    index = faiss.IndexIVFPQ(quantizer, embeddings.dim, num_lists, embeddings.dim // 4, 8, faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical = True
    # More would not make the codes better, only the training longer.
    index.pq.cp.max_points_per_centroid = 39
    num_training = max(39 * num_lists, MIN_INDEXED)
    rows = np.random.default_rng(seed).choice(len(embeddings), num_training, replace=False)
    rows.sort()
    training = np.empty((num_training, embeddings.dim), dtype=np.float32)
    for start in range(0, num_training, _CHUNK):
        training[start : start + _CHUNK] = embeddings.take(rows[start : start + _CHUNK])
    index.train(training)
    del training
    for _, chunk in embeddings.chunks(_CHUNK):
        index.add(chunk)
    with replacing(Path(file)) as partial:
        faiss.write_index(index, str(partial))


def _read_index(file: Path, pool: Embeddings) -> faiss.IndexIVFPQ:
    if not file.is_file():
        raise ValueError(f"`index_file` must be the file that `build_index` wrote, but there is no {file}.")
    try:
        # Mapped, so that the processes of a machine share one copy of the lists.
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise ValueError(f"`index_file` {file} is damaged; build it again. faiss says: {error}") from None
    if not isinstance(index, faiss.IndexIVFPQ):
        raise ValueError(f"`index_file` must be an IVF-PQ index, but {file} is a {type(index).__name__}.")
    if (index.ntotal, index.d) != (len(pool), pool.dim):
        raise ValueError(
            f"`index_file` {file} belongs to another pool: it has {index.ntotal} rows of {index.d} dimensions, "
            f"`pool_files` have {len(pool)} of {pool.dim}."
        )
    return index


class Retrieve:
    """Finds for each source the pool's nearest images to the mean of its image and edit prompt embedding (Sec. 3.1).

    Similarities are cosines, computed in float64 for each pair alone and rounded to float32; equal ones are ordered by
    pool row. What is promised:

    - Without an index the targets are the true best ones, whatever the sizes of batch and files and the number of
      threads. faiss compares all pairs in float32, whose rounding depends on those; so more is asked for than is
      needed, and more again where what was left out could come within the rounding error of what was found.
    - With an index they are the best of what it finds in `num_probes` of its lists. For one index file that does not
      depend on the batch or the number of threads either.

    Each call without an index reads the whole pool: give it thousands of sources at a time. Building another
    `Retrieve` is cheap: files are opened, not read.

    Args:
        pool_files (`Sequence[Path]`): The pool's embeddings, see `Embeddings`.
        index_file (`Path`, *optional*): What `build_index` wrote for the same files, for pools above
            `EXACT_LIMIT`. By default every pool image is compared.
        text_weight (`float`): Share of the prompt in the query, in [0, 1]; 0.5 is the paper's mean.
        num_candidates (`int`): How many targets a source gets at most, k.
        min_similarity (`float`, *optional*): Candidates with a smaller cosine of query and target are left out. Off by
            default, as what is small depends on model and text weight: CLIP's texts and images lie far apart.
        max_source_similarity (`float`, *optional*): Candidates with a larger cosine of source and target image are
            left out, because a copy of the source shows no edit. The default is meant for re-encoded, resized and
            slightly cropped copies, not for other pictures of the same thing. `None`: only the source itself.
        num_probes (`int`): How many of the index's lists are searched: more find more and take longer.

    Raises:
        ValueError: Options out of range, faulty files, an index that is damaged or belongs to another pool.
    """

    def __init__(
        self,
        pool_files: Sequence[str | Path],
        index_file: str | Path | None = None,
        text_weight: float = 0.5,
        num_candidates: int = 10,
        min_similarity: float | None = None,
        max_source_similarity: float | None = 0.97,
        num_probes: int = 64,
    ):
        RetrieveOptions(text_weight, num_candidates, min_similarity, max_source_similarity)  # checks them
        if num_probes < 1:
            raise ValueError(f"`num_probes` must be at least 1, got {num_probes}.")
        self.text_weight = text_weight
        self.num_candidates = num_candidates
        self.min_similarity = -math.inf if min_similarity is None else min_similarity
        self.max_source_similarity = math.inf if max_source_similarity is None else max_source_similarity
        self.num_probes = num_probes
        self._pool = Embeddings(pool_files)
        self._index = None if index_file is None else _read_index(Path(index_file), self._pool)

    def __call__(self, batch: dict) -> dict[str, np.ndarray]:
        """Retrieves the targets of a batch.

        Args:
            batch (`dict`): `image_embeds` and `prompt_embeds`, (B, D): the CLIP embeddings of sources and edit
                prompts; `pool_row`, (B,) int: the source's own row in the pool, -1 where it is not in it.

        Returns:
            `dict`: `targets`, (B, k) int64: pool rows, best first, -1 where none is left; `similarities`, (B, k)
            float32: their cosines with the query, -inf where none is left.

        Raises:
            ValueError: Arrays of other shapes, NaN or zero embeddings, rows that are not in the pool.
        """
        queries = query_embeddings(batch["image_embeds"], batch["prompt_embeds"], self.text_weight)
        sources = _unit(batch["image_embeds"], "image_embeds")
        pool_rows = np.asarray(batch["pool_row"])
        if queries.shape[1] != self._pool.dim:
            raise ValueError(
                f"`image_embeds` must have the pool's {self._pool.dim} dimensions, got {queries.shape[1]}."
            )
        if pool_rows.shape != queries.shape[:1] or pool_rows.dtype.kind != "i":
            raise ValueError(
                f"`pool_row` must be {len(queries)} integers, got {pool_rows.dtype} of shape {pool_rows.shape}."
            )
        if len(pool_rows) and not (pool_rows.min() >= -1 and pool_rows.max() < len(self._pool)):
            raise ValueError(
                f"`pool_row` must lie in -1 .. {len(self._pool) - 1}, got {pool_rows.min()} .. {pool_rows.max()}."
            )

        targets = np.full((len(queries), self.num_candidates), -1, dtype=np.int64)
        similarities = np.full(targets.shape, -np.inf, dtype=np.float32)
        depth = self.num_candidates + (_SPARE if self._index is None else _SPARE_WITH_INDEX)
        probes = self.num_probes
        unfinished = np.arange(len(queries))
        while len(unfinished):
            depth = min(depth, len(self._pool))
            step = max(_MAX_FOUND // depth, 1)
            incomplete = []
            for part in np.split(unfinished, range(step, len(unfinished), step)):
                if self._index is None:
                    found, bound = self._search_pool(queries[part], depth)
                else:
                    found, bound = self._search_index(queries[part], depth, probes, self._index), None
                best, scores, complete = self._rank(queries[part], sources[part], pool_rows[part], found, bound)
                targets[part, : best.shape[1]], similarities[part, : best.shape[1]] = best, scores
                incomplete.append(part[~complete])
            if depth == len(self._pool) and (self._index is None or probes >= self._index.nlist):
                break
            unfinished = np.concatenate(incomplete)
            depth, probes = 2 * depth, 2 * probes
        return {"targets": targets, "similarities": similarities}

    def _search_pool(self, queries: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """The `depth` pool rows most similar to each query as float32 has it, and what no other row can exceed."""
        found = np.empty((len(queries), 0), dtype=np.int64)
        scores = np.empty((len(queries), 0), dtype=np.float32)
        for first, chunk in self._pool.chunks(_CHUNK):
            chunk /= np.sqrt(np.vecdot(chunk, chunk))[:, None]
            new_scores, new_found = faiss.knn(
                queries, chunk, min(depth, len(chunk)), metric=faiss.METRIC_INNER_PRODUCT
            )
            scores = np.concatenate((scores, new_scores), axis=1)
            found = np.concatenate((found, new_found + first), axis=1)
            if scores.shape[1] > depth:
                best = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
                scores, found = np.take_along_axis(scores, best, axis=1), np.take_along_axis(found, best, axis=1)
        # Twice the error bound of a float32 dot product of unit vectors, in whatever order it is summed.
        return found, scores.min(axis=1) + self._pool.dim * np.finfo(np.float32).eps

    @staticmethod
    def _search_index(queries: np.ndarray, depth: int, probes: int, index: faiss.IndexIVFPQ) -> np.ndarray:
        """The `depth` pool rows that the index finds in the nearest `probes` lists, -1 where there are fewer."""
        index.nprobe = min(probes, index.nlist)
        nearest = [
            index.quantizer.search(queries[start : start + _FEW], index.nprobe)
            for start in range(0, len(queries), _FEW)
        ]
        scores, lists = (np.concatenate(column) for column in zip(*nearest, strict=True))
        # faiss declares the arguments of the C++ method, which are not those of the Python one.
        search: Any = index.search_preassigned
        return search(queries, depth, lists, scores)[1]

    def _rank(
        self,
        queries: np.ndarray,
        sources: np.ndarray,
        pool_rows: np.ndarray,
        found: np.ndarray,
        bound: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best allowed ones of the rows found, their similarities, and whether no other row can be among them."""
        scores = np.full(found.shape, np.inf, dtype=np.float32)
        source_scores = np.zeros(found.shape, dtype=np.float32)
        pairs = np.argsort(found, axis=None)
        pairs = pairs[np.count_nonzero(found == -1) :]
        for start in range(0, len(pairs), _PAIRS):
            some = pairs[start : start + _PAIRS]
            vectors = self._pool.take(found.flat[some]).astype(np.float64)
            vectors /= np.sqrt(np.vecdot(vectors, vectors))[:, None]
            owners = some // found.shape[1]
            scores.flat[some] = np.vecdot(vectors, queries[owners])
            source_scores.flat[some] = np.vecdot(vectors, sources[owners])
        if bound is None:
            # An index's rough order is trusted this far: it left out nothing better than the worst it gave.
            bound = np.nextafter(scores.min(axis=1), np.float32(-np.inf))

        allowed = (
            (found != -1)
            & (found != pool_rows[:, None])
            & (scores >= self.min_similarity)
            & (source_scores <= self.max_source_similarity)
        )
        scores[~allowed] = -np.inf
        found = np.where(allowed, found, -1)
        order = np.lexsort((found, -scores))[:, : self.num_candidates]
        targets, scores = np.take_along_axis(found, order, axis=1), np.take_along_axis(scores, order, axis=1)
        worst = scores[:, -1] if order.shape[1] == self.num_candidates else np.float32(-np.inf)
        return targets, scores, (worst > bound) | (bound < self.min_similarity)


def assign_targets(targets: np.ndarray, uses: Counter, max_target_uses: int | None = None) -> np.ndarray:
    """Chooses one candidate for each source, so that no pool image serves too often.

    Sources choose in order, each the first of its candidates that may still be used. Where candidates are to be
    preferred by something else than similarity, such as how well their masks overlap, bring each row into that order
    before. Called for one part of the sources after the other with the same `uses`, it chooses as for all at once.

    Args:
        targets (`np.ndarray`): Pool rows in the order of preference, shape (N, k); -1 = no candidate, at any place.
        uses (`Counter`): How often each pool row has been chosen before; updated.
        max_target_uses (`int`, *optional*): How often a pool row may be chosen; any number of times by default.

    Returns:
        `np.ndarray`: The chosen column of each row of `targets`, int64, shape (N,), -1 where none could be chosen.

    Raises:
        ValueError: `max_target_uses` below 1.
    """
    if max_target_uses is not None and max_target_uses < 1:
        raise ValueError(f"`max_target_uses` must be at least 1, got {max_target_uses}.")
    limit = math.inf if max_target_uses is None else max_target_uses
    choice = np.full(len(targets), -1, dtype=np.int64)
    for number, candidates in enumerate(np.asarray(targets).tolist()):
        for column, row in enumerate(candidates):
            if row != -1 and uses[row] < limit:
                uses[row] += 1
                choice[number] = column
                break
    return choice
