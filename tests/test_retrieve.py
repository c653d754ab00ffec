"""Retrieving pseudo-targets: the right neighbours, in a certain order, from a pool that stays on disk."""

import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import faiss
import numpy as np
import pytest

from diffusers_iedit.pairs import retrieve
from diffusers_iedit.pairs.retrieve import (
    MIN_INDEXED,
    Embeddings,
    Retrieve,
    assign_targets,
    build_index,
    query_embeddings,
)


DIM = 32
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "retrieval.py"


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def random_unit(*shape, seed=0):
    return unit(np.random.default_rng(seed).standard_normal(shape))


def save(folder, vectors, ends=()):
    """Writes a pool's files, cut at `ends`."""
    folder.mkdir(exist_ok=True)
    files = []
    for number, part in enumerate(np.split(vectors.astype(np.float16), ends)):
        files.append(folder / f"{number}.npy")
        np.save(files[-1], part)
    return files


def make_batch(count, pool_row=None, seed=1):
    return {
        "image_embeds": random_unit(count, DIM, seed=seed),
        "prompt_embeds": random_unit(count, DIM, seed=seed + 1),
        "pool_row": np.full(count, -1) if pool_row is None else np.asarray(pool_row),
    }


def part_of(batch, start, end):
    return {name: column[start:end] for name, column in batch.items()}


def in_batches(stage, batch, size):
    """What the stage gives for a batch that comes in pieces."""
    results = [stage(part_of(batch, start, start + size)) for start in range(0, len(batch["pool_row"]), size)]
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


def assert_same(result, expected):
    for name, column in expected.items():
        np.testing.assert_array_equal(result[name], column)


@pytest.fixture
def pool(tmp_path):
    """300 embeddings in three files, one of them empty."""
    return save(tmp_path / "pool", random_unit(300, DIM), ends=(120, 120))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A pool large enough for an index, in groups, with 400 copies of one image; its files and its index."""
    folder = tmp_path_factory.mktemp("large")
    centres = random_unit(100, DIM, seed=5)
    vectors = unit(np.tile(centres, (101, 1)) + 0.5 * random_unit(10_100, DIM, seed=6))
    vectors[1000:9000:20] = vectors[0]
    files = save(folder / "pool", vectors, ends=(3000, 7000))
    build_index(Embeddings(files), folder / "pool.index")
    return files, folder / "pool.index"


# The query


def test_the_query_is_the_mean_of_image_and_prompt_embedding():
    images, prompts = random_unit(4, DIM), random_unit(4, DIM, seed=1)
    np.testing.assert_allclose(query_embeddings(images, prompts), unit((images + prompts) / 2), atol=1e-6)


@pytest.mark.parametrize(("text_weight", "expected"), [(0.0, 0), (1.0, 1)])
def test_the_text_weight_reaches_from_the_image_alone_to_the_prompt_alone(text_weight, expected):
    embeds = random_unit(2, 4, DIM)
    np.testing.assert_allclose(query_embeddings(*embeds, text_weight), embeds[expected], atol=1e-6)


def test_the_query_does_not_depend_on_the_length_of_the_embeddings():
    images, prompts = random_unit(4, DIM), random_unit(4, DIM, seed=1)
    np.testing.assert_allclose(query_embeddings(7 * images, prompts), query_embeddings(images, prompts), atol=1e-6)


# The neighbours


@pytest.mark.parametrize("text_weight", [0.5, 0.65])
def test_targets_are_the_nearest_images_best_first(pool, text_weight):
    batch = make_batch(50)
    result = Retrieve(pool, text_weight=text_weight, num_candidates=7)(batch)

    vectors = unit(np.concatenate([np.load(file) for file in pool]).astype(np.float64))
    cosines = query_embeddings(batch["image_embeds"], batch["prompt_embeds"], text_weight) @ vectors.T
    expected = np.argsort(-cosines, axis=1)[:, :7]
    np.testing.assert_array_equal(result["targets"], expected)
    np.testing.assert_allclose(result["similarities"], np.take_along_axis(cosines, expected, axis=1), atol=1e-6)
    assert result["targets"].dtype == np.int64
    assert result["similarities"].dtype == np.float32


def test_a_source_is_never_its_own_target(pool):
    rows = np.arange(0, 300, 3)
    batch = make_batch(100, pool_row=rows)
    batch["image_embeds"] = batch["prompt_embeds"] = Embeddings(pool).take(rows)
    assert (Retrieve(pool, max_source_similarity=None)(batch)["targets"] != rows[:, None]).all()
    batch["pool_row"] = np.full(100, -1)
    assert (Retrieve(pool, max_source_similarity=None)(batch)["targets"][:, 0] == rows).all()


def test_near_duplicates_of_the_source_are_left_out_however_many_there_are(tmp_path):
    source = random_unit(1, DIM)
    copies = unit(source + 0.05 * random_unit(200, DIM, seed=3))
    others = unit(source + 1.5 * random_unit(100, DIM, seed=4))
    files = save(tmp_path / "pool", np.concatenate((copies, others)), ends=(50,))
    batch = {"image_embeds": source, "prompt_embeds": source, "pool_row": np.array([-1])}

    result = Retrieve(files, num_candidates=5)(batch)
    vectors = Embeddings(files).take(np.arange(300))
    assert (vectors[:200] @ source[0]).min() > 0.97 > (vectors[200:] @ source[0]).max()
    np.testing.assert_array_equal(result["targets"][0], 200 + np.argsort(-vectors[200:] @ source[0])[:5])
    assert (Retrieve(files, max_source_similarity=None)(batch)["targets"] < 200).all()


def test_a_source_similarity_of_1_keeps_exact_copies(tmp_path):
    files = save(tmp_path / "pool", np.tile(random_unit(100, DIM), (2, 1)))
    sources = Embeddings(files).take(np.arange(100))
    batch = {"image_embeds": sources, "prompt_embeds": sources, "pool_row": np.arange(100)}
    result = Retrieve(files, max_source_similarity=1.0)(batch)
    np.testing.assert_array_equal(result["targets"][:, 0], np.arange(100, 200))


def test_a_pool_smaller_than_k_leaves_the_rest_empty(tmp_path):
    files = save(tmp_path / "pool", random_unit(4, DIM))
    result = Retrieve(files, num_candidates=6)(make_batch(2, pool_row=[-1, 2]))
    assert sorted(result["targets"][0]) == [-1, -1, 0, 1, 2, 3]
    assert sorted(result["targets"][1]) == [-1, -1, -1, 0, 1, 3]
    np.testing.assert_array_equal(result["targets"] == -1, np.isneginf(result["similarities"]))
    assert (result["targets"][:, 4:] == -1).all()


def test_candidates_below_the_least_similarity_are_left_out(pool):
    batch = make_batch(50)
    everything = Retrieve(pool, num_candidates=300)(batch)
    result = Retrieve(pool, num_candidates=300, min_similarity=0.25)(batch)
    kept = everything["similarities"] >= 0.25
    assert 0 < kept.sum() < kept.size
    np.testing.assert_array_equal(result["targets"], np.where(kept, everything["targets"], -1))


def test_a_batch_may_be_empty(pool):
    result = Retrieve(pool, num_candidates=3)(part_of(make_batch(1), 0, 0))
    assert result["targets"].shape == result["similarities"].shape == (0, 3)


# The same result every time


def test_equal_images_come_in_the_order_of_the_pool(tmp_path):
    vectors = random_unit(2000, DIM)
    copies = np.random.default_rng(2).permutation(2000)[:500]
    vectors[copies] = vectors[copies[0]]
    files = save(tmp_path / "pool", vectors, ends=(700, 1100))
    batch = make_batch(1)
    batch["prompt_embeds"] = vectors[copies[:1]]
    np.testing.assert_array_equal(Retrieve(files)(batch)["targets"][0], np.sort(copies)[:10])


@pytest.mark.parametrize("count", [60, 500])
@pytest.mark.parametrize("seed", range(5))
def test_images_that_only_rounding_tells_apart_come_in_the_order_of_the_pool(tmp_path, count, seed):
    # All elements of the query are equal, so that the order of an embedding's elements does not change the cosine.
    vector = 0.7 + np.random.default_rng(seed).standard_normal(DIM)
    vectors = unit(np.random.default_rng(seed + 1).permuted(np.tile(vector, (count, 1)), axis=1))
    files = save(tmp_path / "pool", np.concatenate((vectors, -vectors)), ends=(20,))
    batch = {"image_embeds": np.ones((1, DIM)), "prompt_embeds": np.ones((1, DIM)), "pool_row": np.array([-1])}
    result = Retrieve(files, max_source_similarity=None)(batch)
    np.testing.assert_array_equal(result["targets"][0], np.arange(10))
    assert len(np.unique(result["similarities"])) == 1


def check_batches_and_threads(files, index_file):
    stages = [Retrieve(files), Retrieve(files, index_file, num_probes=1)]
    # As far from one list of the index as from the next.
    index = faiss.read_index(str(index_file))
    centres = faiss.downcast_index(index.quantizer).reconstruct_n(0, index.nlist)
    neighbours = np.argsort(-centres @ centres.T, axis=1)[:, 1]
    between = centres + centres[neighbours]
    batch = {"image_embeds": between, "prompt_embeds": between, "pool_row": np.full(len(between), -1)}
    threads = faiss.omp_get_max_threads()
    try:
        for stage in stages:
            expected = stage(batch)
            for size, count in ((7, 3), (19, 2), (1000, 4)):
                faiss.omp_set_num_threads(count)
                assert_same(in_batches(stage, batch, size), expected)
    finally:
        faiss.omp_set_num_threads(threads)


def test_the_result_depends_neither_on_the_batch_nor_on_the_threads(large):
    check_batches_and_threads(*large)


@pytest.mark.slow
def test_nor_does_it_with_as_many_dimensions_as_clip_has(tmp_path):
    # So many that the BLAS sums them in an order that depends on the size of the batch.
    files = save(tmp_path / "pool", random_unit(MIN_INDEXED, 768), ends=(5000,))
    build_index(Embeddings(files), tmp_path / "pool.index", num_lists=200)
    check_batches_and_threads(files, tmp_path / "pool.index")


def test_the_result_does_not_depend_on_how_the_pool_is_cut(large, tmp_path, monkeypatch):
    files, _ = large
    batch = make_batch(20)
    batch["prompt_embeds"][:2] = Embeddings(files).take([0])
    expected = Retrieve(files)(batch)
    vectors = np.concatenate([np.load(file) for file in files])
    other = save(tmp_path / "pool", vectors, ends=(1, 999, 8000))
    for name, size in (("_CHUNK", 777), ("_PAIRS", 100), ("_MAX_FOUND", 500)):
        monkeypatch.setattr(retrieve, name, size)
        assert_same(Retrieve(other)(batch), expected)


def test_no_file_stays_mapped_between_reads(pool):
    stage = Retrieve(pool)
    stage(make_batch(5))
    if sys.platform == "linux":
        assert str(pool[0]) not in Path("/proc/self/maps").read_text()


# The index


def test_the_index_finds_most_of_the_true_neighbours_and_ranks_them_exactly(large):
    files, index_file = large
    rows = np.arange(1, 10_100, 50)
    batch = make_batch(len(rows), pool_row=rows) | {"image_embeds": Embeddings(files).take(rows)}
    exact, found = Retrieve(files)(batch), Retrieve(files, index_file)(batch)
    assert (exact["targets"][:, 0] == found["targets"][:, 0]).mean() >= 0.95
    same = exact["targets"] == found["targets"]
    np.testing.assert_array_equal(exact["similarities"][same], found["similarities"][same])
    assert (np.diff(found["similarities"]) <= 0).all()


def test_searching_every_list_is_as_good_as_no_index(large, monkeypatch):
    files, index_file = large
    batch = make_batch(40)
    monkeypatch.setattr(retrieve, "_SPARE_WITH_INDEX", 10_100)
    assert_same(Retrieve(files, index_file, num_probes=10_000)(batch), Retrieve(files)(batch))


def test_the_index_is_searched_further_until_enough_remain(large, monkeypatch):
    files, index_file = large
    source = Embeddings(files).take([0])
    batch = {"image_embeds": source, "prompt_embeds": source, "pool_row": np.array([0])}
    monkeypatch.setattr(retrieve, "_SPARE_WITH_INDEX", 1)
    result = Retrieve(files, index_file, num_candidates=300, min_similarity=-1, num_probes=1)(batch)
    assert (result["targets"] != -1).all()
    assert not np.isin(result["targets"], np.arange(1000, 9000, 20)).any()


def test_the_index_is_searched_no_further_than_the_least_similarity(large, monkeypatch):
    files, index_file = large
    stage = Retrieve(files, index_file, min_similarity=0.99)
    depths = []
    search = stage._search_index
    monkeypatch.setattr(stage, "_search_index", lambda *args: depths.append(args[1]) or search(*args))
    assert (stage(make_batch(10))["targets"] == -1).all()
    assert len(depths) == 1


def test_the_same_seed_builds_the_same_index(large, tmp_path):
    files, index_file = large
    build_index(Embeddings(files), tmp_path / "again.index")
    build_index(Embeddings(files), tmp_path / "other.index", seed=1)
    assert (tmp_path / "again.index").read_bytes() == index_file.read_bytes()
    assert (tmp_path / "other.index").read_bytes() != index_file.read_bytes()


def test_an_index_that_could_not_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    def write_half(index, file):
        Path(file).write_text("half")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(faiss, "write_index", write_half)
    embeddings = Embeddings(save(tmp_path / "pool", random_unit(MIN_INDEXED, 8)))
    (tmp_path / "pool.index").write_text("the one before")
    with pytest.raises(RuntimeError, match="No space left"):
        build_index(embeddings, tmp_path / "pool.index", num_lists=10)
    assert (tmp_path / "pool.index").read_text() == "the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pool", "pool.index"]


def test_a_faulty_embedding_is_not_indexed(tmp_path):
    vectors = random_unit(MIN_INDEXED, 8)
    vectors[-1] = np.nan
    with pytest.raises(ValueError, match=r"`files` .* row 9983 has the length nan"):
        build_index(Embeddings(save(tmp_path / "pool", vectors)), tmp_path / "pool.index")


@pytest.mark.parametrize("length", [0, 20, 3000, -1000, -1])
def test_a_truncated_index_is_refused(large, tmp_path, length):
    files, index_file = large
    (tmp_path / "pool.index").write_bytes(index_file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"`index_file` .*pool.index is damaged"):
        Retrieve(files, tmp_path / "pool.index")


def test_an_index_of_another_pool_is_refused(large, pool, tmp_path):
    _, index_file = large
    with pytest.raises(ValueError, match=r"`index_file` .* 10100 rows of 32 dimensions, .* 300 of 32"):
        Retrieve(pool, index_file)
    other_dim = save(tmp_path / "pool", random_unit(10_100, 2 * DIM))
    with pytest.raises(ValueError, match=r"`index_file` .* 10100 rows of 32 dimensions, .* 10100 of 64"):
        Retrieve(other_dim, index_file)


def test_an_index_of_another_kind_or_none_at_all_is_refused(pool, tmp_path):
    flat = faiss.IndexFlatIP(DIM)
    flat.add(Embeddings(pool).take(np.arange(300)))
    faiss.write_index(flat, str(tmp_path / "flat.index"))
    with pytest.raises(ValueError, match=r"`index_file` must be an IVF-PQ index"):
        Retrieve(pool, tmp_path / "flat.index")
    with pytest.raises(ValueError, match=r"`index_file` .* there is no"):
        Retrieve(pool, tmp_path / "absent.index")


@pytest.mark.parametrize(
    ("rows", "dim", "num_lists", "message"),
    [
        (MIN_INDEXED - 1, 8, None, r"`embeddings` must have at least 9984 rows"),
        (MIN_INDEXED, 10, None, r"`embeddings` must have a multiple of 4 dimensions"),
        (MIN_INDEXED, 8, 257, r"`num_lists` must lie in 1 \.\. 256"),
        (MIN_INDEXED, 8, 0, r"`num_lists` must lie in 1 \.\. 256"),
    ],
)
def test_what_cannot_be_indexed_is_refused(tmp_path, rows, dim, num_lists, message):
    embeddings = Embeddings(save(tmp_path / "pool", random_unit(rows, dim)))
    with pytest.raises(ValueError, match=message):
        build_index(embeddings, tmp_path / "pool.index", num_lists=num_lists)


# Faulty input


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([], r"`files` must hold at least one embedding, got 0 files"),
        ([np.zeros((0, 4), np.float16)], r"`files` must hold at least one embedding, got 1 files"),
        ([np.ones((2, 4), np.float32)], r"`files` must hold float16 .*0.npy holds float32"),
        ([np.ones(4, np.float16)], r"`files` must hold float16 of shape \(n, D\)"),
        ([np.ones((2, 4), np.float16), np.ones((2, 8), np.float16)], r"`files` must agree .* \[4, 8\]"),
    ],
)
def test_faulty_pool_files_are_refused(tmp_path, arrays, message):
    files = [tmp_path / f"{number}.npy" for number in range(len(arrays))]
    for file, array in zip(files, arrays, strict=True):
        np.save(file, array)
    with pytest.raises(ValueError, match=message):
        Embeddings(files)


@pytest.mark.parametrize("length", [0, 5, 3000])
def test_a_truncated_pool_file_is_refused(pool, length):
    pool[2].write_bytes(pool[2].read_bytes()[:length])
    with pytest.raises(ValueError, match=r"`files` must be whole .npy files, but .*2.npy is not"):
        Embeddings(pool)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1.0])
def test_a_pool_embedding_that_is_not_of_unit_length_is_refused(tmp_path, value):
    vectors = random_unit(20, DIM)
    vectors[13] = value
    stage = Retrieve(save(tmp_path / "pool", vectors, ends=(7,)))
    with pytest.raises(ValueError, match=r"`files` .* row 13 has the length"):
        stage(make_batch(1))


@pytest.mark.parametrize(
    "options",
    [
        {"text_weight": 1.1},
        {"text_weight": float("nan")},
        {"num_candidates": 0},
        {"num_probes": 0},
        {"min_similarity": -1.1},
        {"max_source_similarity": 97},
    ],
)
def test_an_option_out_of_range_is_refused(pool, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must"):
        Retrieve(pool, **options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_embeds", np.zeros((3, DIM)), r"`image_embeds` must be finite and not zero, but row 0"),
        ("prompt_embeds", np.full((3, DIM), np.nan), r"`prompt_embeds` must be finite and not zero, but row 0"),
        ("prompt_embeds", random_unit(2, DIM), r"`image_embeds` and `prompt_embeds` must have one shape"),
        ("prompt_embeds", random_unit(DIM), r"`prompt_embeds` must have the shape \(B, D\)"),
        ("prompt_embeds", -random_unit(3, DIM, seed=1), r"image_embeds \+ prompt_embeds` .* row 0 has the length 0"),
        ("pool_row", np.array([0, 1]), r"`pool_row` must be 3 integers"),
        ("pool_row", np.array([0, 1, 2.0]), r"`pool_row` must be 3 integers, got float64"),
        ("pool_row", np.array([0, 1, 300]), r"`pool_row` must lie in -1 \.\. 299, got 0 \.\. 300"),
        ("pool_row", np.array([0, 1, -2]), r"`pool_row` must lie in -1 \.\. 299, got -2 \.\. 1"),
    ],
)
def test_a_faulty_batch_is_refused(pool, name, value, message):
    with pytest.raises(ValueError, match=message):
        Retrieve(pool)(make_batch(3) | {name: value})


def test_embeddings_of_another_model_than_the_pool_are_refused(pool):
    batch = {"image_embeds": np.ones((1, 8)), "prompt_embeds": np.ones((1, 8)), "pool_row": np.array([-1])}
    with pytest.raises(ValueError, match=r"`image_embeds` must have the pool's 32 dimensions, got 8"):
        Retrieve(pool)(batch)


# How often a target may serve


def test_each_source_takes_its_first_candidate_that_has_uses_left():
    targets = np.array([[5, 6, 7], [5, 6, 7], [6, 5, 7], [5, 6, -1], [5, 6, 7]])
    uses = Counter()
    np.testing.assert_array_equal(assign_targets(targets, uses, max_target_uses=1), [0, 1, 2, -1, -1])
    assert uses == {5: 1, 6: 1, 7: 1}
    np.testing.assert_array_equal(assign_targets(targets, Counter(), max_target_uses=2), [0, 0, 0, 1, 2])


def test_without_a_limit_each_source_takes_its_first_candidate():
    targets = np.array([[5, 6], [5, 6], [-1, 6], [-1, -1]])
    np.testing.assert_array_equal(assign_targets(targets, Counter()), [0, 0, 1, -1])


def test_assigning_in_parts_is_the_same_as_all_at_once():
    targets = np.random.default_rng(0).integers(-1, 12, (40, 3))
    uses = Counter()
    parts = [assign_targets(part, uses, max_target_uses=2) for part in np.split(targets, (7, 30))]
    np.testing.assert_array_equal(np.concatenate(parts), assign_targets(targets, Counter(), max_target_uses=2))


def test_a_target_that_may_never_serve_is_refused():
    with pytest.raises(ValueError, match=r"`max_target_uses` must be at least 1, got 0"):
        assign_targets(np.zeros((1, 1), np.int64), Counter(), max_target_uses=0)


# The benchmark


@pytest.mark.slow
def test_the_benchmark_measures_time_recall_and_memory(tmp_path, monkeypatch, capsys):
    sizes = ["--pool=10000", "--memory_pool=11000", "--dim=72", "--queries=50", "--k=5"]
    monkeypatch.setattr(
        sys, "argv", [str(BENCHMARK), *sizes, f"--work_dir={tmp_path / 'work'}", f"--json={tmp_path / 'figures.json'}"]
    )
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert 0.5 < results["recall_at_1"] <= 1
    assert 0.5 < results["recall_at_k"] <= 1
    assert results["speed_up"] == results["exact_s"] / results["search_s"] > 0
    assert 10 < results["peak_mib"] < 3 * 1024
    assert "\npeak memory" in capsys.readouterr().out
    assert list((tmp_path / "work").iterdir()) == []
