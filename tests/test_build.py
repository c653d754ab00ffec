"""The builder of pairs: what a build leaves, its options, and going on with one under the same options only."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import TOKEN
from PIL import Image
from small_build import ANY_MASK, COUNT, arguments, build, build_dataset, command, options, processes, rows, write_pool
from transformers import CLIPTokenizer

from diffusers_iedit import mini
from diffusers_iedit.pairs import FEATURES, load_pairs, validate
from diffusers_iedit.pairs import build as builder
from diffusers_iedit.pairs.build import STAGES
from diffusers_iedit.pairs.mask import mask_iou
from diffusers_iedit.pairs.shards import read_table
from diffusers_iedit.pairs.write import SHEET_ROWS, TILE


FIRST_SEED = 200_000


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A collection of pictures with their captions."""
    return write_pool(tmp_path_factory.mktemp("made") / "pool", range(FIRST_SEED, FIRST_SEED + COUNT))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, pool):
    """The set of pairs that a build makes of `pool`: not to be changed."""
    output_dir = tmp_path_factory.mktemp("undisturbed") / "pairs"
    build(output_dir, options(pool), license_note="Drawn by code: free for all.")
    return output_dir


@pytest.fixture
def finished(tmp_path, undisturbed):
    """A copy of `undisturbed`."""
    return Path(shutil.copytree(undisturbed, tmp_path / "pairs"))


def report(output_dir):
    return json.loads((output_dir / "report.json").read_text())


def times(folder):
    """When each file below a folder was changed last, the lock's aside."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def image_rows(output_dir, column, pool):
    """The rows of a collection whose images stand in a column."""
    images = [image["bytes"] for image in pq.read_table(pool / "train.parquet")["image"].to_pylist()]
    return [images.index(image["bytes"]) for image in rows(output_dir)[column].to_pylist()]


# What a build leaves


def test_the_set_is_what_training_takes(undisturbed):
    assert validate(undisturbed) == []
    pairs = load_pairs(undisturbed)
    assert pairs.features == FEATURES
    assert len(pairs) == report(undisturbed)["rows_out"] > 5


def test_datasets_opens_the_folder_without_what_the_stages_left(undisturbed):
    assert (undisturbed / "work").is_dir()
    opened = datasets.load_dataset(str(undisturbed))
    assert list(opened) == ["train"]
    assert len(opened["train"]) == len(rows(undisturbed))
    assert opened["train"].column_names == list(FEATURES)


def test_a_set_that_was_built_again_is_not_taken_from_the_cache_of_datasets(finished, undisturbed, pool):
    before = len(load_pairs(finished))
    build(finished, options(pool, min_mask_iou=0.5), redo="mask")
    assert len(load_pairs(finished)) == len(rows(finished)) < before == len(load_pairs(undisturbed))


def test_a_set_consists_of_several_files_in_order(undisturbed):
    names = sorted(file.name for file in (undisturbed / "data").iterdir())
    assert names == [f"train-{number:05}-of-{len(names):05}.parquet" for number in range(len(names))]
    assert len(names) > 1


def test_each_source_is_there_once_at_most_and_in_order(undisturbed, pool):
    sources = image_rows(undisturbed, "source_image", pool)
    assert sources == sorted(set(sources))


def test_the_report_adds_up(undisturbed):
    numbers = report(undisturbed)
    assert numbers["rows_in"] == COUNT
    assert numbers["rows_in"] == numbers["rows_out"] + sum(numbers["dropped"].values())
    for stage in numbers["stages"].values():
        assert stage["rows_in"] == stage["rows_out"] + sum(stage["dropped"].values())
        assert stage["seconds"] > 0
    assert numbers["stages"]["write"]["rows_out"] == numbers["rows_out"] == len(rows(undisturbed))


def test_what_reading_leaves_out_is_counted_through_all_shards(tmp_path, pool):
    images = pq.read_table(pool / "train.parquet").to_pylist()
    damaged = {"image": {"bytes": b"no image", "path": None}, "text": "a red car"}
    # One in the middle of each shard, one at the end, and a duplicate.
    mixed = [*images[:6], damaged, *images[6:18], damaged, *images[18:], images[0], damaged]
    (tmp_path / "mixed").mkdir()
    pq.write_table(pa.Table.from_pylist(mixed), tmp_path / "mixed/train.parquet")
    numbers = build(tmp_path / "out", options(tmp_path / "mixed", caption_column="text"))
    assert numbers["rows_in"] == len(mixed)
    assert numbers["stages"]["read source"]["dropped"] == {"unreadable": 3, "duplicate": 1}
    assert numbers["rows_in"] == numbers["rows_out"] + sum(numbers["dropped"].values())


def test_the_card_tells_what_the_set_was_made_of(undisturbed, pool):
    card = (undisturbed / "README.md").read_text()
    assert f"{report(undisturbed)['rows_out']} pairs" in card
    assert "Drawn by code: free for all." in card
    for said in ('"text_weight": 0.65', '"clip_model": "mini"', "| caption | 36 | 36 | - |", "`pool`"):
        assert said in card


def test_what_is_published_names_no_folder_of_this_machine(undisturbed, pool):
    for name in ("README.md", "report.json"):
        assert str(pool.parent) not in (undisturbed / name).read_text()


def test_the_picture_sheet_opens(undisturbed):
    with Image.open(undisturbed / "sheet.jpg") as sheet:
        pairs = rows(undisturbed).to_pylist()
        assert sheet.width == 4 * TILE
        assert sheet.height == min(len(pairs), SHEET_ROWS) * (TILE + 60)
        first = Image.open(io.BytesIO(pairs[0]["target_image"]["bytes"])).resize(
            (TILE, TILE), Image.Resampling.NEAREST
        )
        shown = np.asarray(sheet.crop((2 * TILE, 0, 3 * TILE, TILE)), dtype=int)
        assert np.abs(shown - np.asarray(first)).mean() < 4


# Options


def test_given_captions_take_the_place_of_the_captioners(tmp_path, pool):
    chosen = options(pool, caption_column="text", caption_model="nobody/has-this", **ANY_MASK)
    build(tmp_path / "out", chosen)
    texts = pq.read_table(pool / "train.parquet")["text"].to_pylist()
    sources = image_rows(tmp_path / "out", "source_image", pool)
    assert rows(tmp_path / "out")["source_caption"].to_pylist() == [texts[row] for row in sources]


def test_captions_of_any_kind_pass_through(tmp_path):
    captions = {
        "empty": "",
        "10 KB": "a red car and " * 750,
        "Chinese": "一辆红色的汽车停在草地上",
        "emoji": "a red car 🔥😍 on green grass",
        "control": "a blue\x00 cat\x07\nat\tthe\u200b beach\x1b[31m",
        "plain": "a yellow boat in a room",
    }
    seeds = range(FIRST_SEED, FIRST_SEED + len(captions))
    source = write_pool(tmp_path / "source", seeds, list(captions.values()))
    numbers = build(tmp_path / "out", options(source, caption_column="text", **ANY_MASK))
    kept = rows(tmp_path / "out")["source_caption"].to_pylist()
    assert captions["plain"] in kept
    assert captions["emoji"] in kept
    assert all(text.isprintable() for text in kept)
    assert any(text.startswith("a blue cat at the") for text in kept)
    assert len(kept) + sum(numbers["dropped"].values()) == len(captions)
    assert validate(tmp_path / "out") == []


def test_targets_come_from_the_pool_and_sources_from_the_source(tmp_path, pool):
    source = write_pool(tmp_path / "source", range(FIRST_SEED + 1000, FIRST_SEED + 1010))
    numbers = build(tmp_path / "out", options(source, pool=str(pool), caption_column="text", **ANY_MASK))
    assert len(image_rows(tmp_path / "out", "source_image", source)) == numbers["rows_out"] > 0
    assert len(image_rows(tmp_path / "out", "target_image", pool)) == numbers["rows_out"]
    assert numbers["stages"]["embed pool"]["rows_in"] == COUNT
    assert numbers["rows_in"] == 10


def test_a_source_that_is_in_the_pool_too_is_never_its_own_target(tmp_path, pool):
    chosen = options(pool, pool=str(pool), max_source_similarity=1.0, text_weight=0.0, **ANY_MASK)
    build(tmp_path / "pairs", chosen)
    sources, targets = (image_rows(tmp_path / "pairs", f"{name}_image", pool) for name in ("source", "target"))
    assert len(sources) > COUNT // 2
    assert all(source != target for source, target in zip(sources, targets, strict=True))


@pytest.mark.slow
def test_a_large_pool_is_searched_with_an_index_which_redo_keeps(tmp_path, pool, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (10_000, 8, 8, 3), dtype=np.uint8)
    images = pq.read_table(pool / "train.parquet")["image"].to_pylist()
    for pixels in noise:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    (tmp_path / "large").mkdir()
    pq.write_table(pa.table({"image": images}), tmp_path / "large/train.parquet")
    chosen = options(pool, pool=str(tmp_path / "large"), min_size=8, shard_size=4000, **ANY_MASK)
    build(tmp_path / "pairs", chosen)
    exact = rows(tmp_path / "pairs").select(["source_image", "target_image"]).to_pylist()

    monkeypatch.setattr(builder, "EXACT_LIMIT", 1000)
    index = tmp_path / "pairs/work/embed/pool.index"
    assert not index.exists()
    build(tmp_path / "pairs", chosen, redo="retrieve")
    found = rows(tmp_path / "pairs").select(["source_image", "target_image"]).to_pylist()
    assert len(found) == len(exact)
    assert sum(pair in exact for pair in found) >= 0.9 * len(exact)
    built = index.stat().st_mtime_ns
    build(tmp_path / "pairs", chosen, redo="retrieve")
    assert index.stat().st_mtime_ns == built


def test_a_pool_may_be_smaller_than_the_number_of_candidates(tmp_path):
    source = write_pool(tmp_path / "source", range(FIRST_SEED, FIRST_SEED + 4))
    chosen = options(source, caption_column="text", num_candidates=10, max_source_similarity=None, **ANY_MASK)
    build(tmp_path / "out", chosen)
    sources, targets = (image_rows(tmp_path / "out", f"{name}_image", source) for name in ("source", "target"))
    assert len(sources) == 4
    assert all(source != target for source, target in zip(sources, targets, strict=True))


def test_a_pool_may_be_one_image(tmp_path, pool):
    one = write_pool(tmp_path / "one", range(FIRST_SEED + 1000, FIRST_SEED + 1001))
    numbers = build(tmp_path / "out", options(pool, pool=str(one), caption_column="text", **ANY_MASK))
    assert image_rows(tmp_path / "out", "target_image", one) == [0] * numbers["rows_out"]
    assert numbers["rows_out"] > 0


def test_no_pair_left_is_an_error_that_counts_what_was_left_out(tmp_path):
    one = write_pool(tmp_path / "one", range(FIRST_SEED, FIRST_SEED + 1))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"No pair is left of 1 rows\. Left out: \{'no_neighbour': 1\}"):
            build(tmp_path / "out", options(one, caption_column="text"))


def test_edits_that_come_after_the_last_token_are_dropped_and_counted(tmp_path):
    seeds = range(FIRST_SEED, FIRST_SEED + 8)
    captions = [mini.render(seed).caption for seed in seeds]
    # Of one token a word: the mini CLIP takes 24.
    captions[2], captions[5] = ("and " * 30 + captions[number] for number in (2, 5))
    source = write_pool(tmp_path / "source", seeds, captions)
    numbers = build(tmp_path / "out", options(source, caption_column="text", **ANY_MASK))
    assert numbers["dropped"]["edit_cut_off"] == numbers["stages"]["retrieve"]["dropped"]["edit_cut_off"] == 2
    assert numbers["rows_in"] == numbers["rows_out"] + sum(numbers["dropped"].values())
    tokenizer = CLIPTokenizer.from_pretrained(mini.clip_path())
    assert validate(tmp_path / "out", tokenizer=tokenizer) == []
    assert not [text for text in rows(tmp_path / "out")["source_caption"].to_pylist() if text.startswith("and")]


def test_what_people_give_stays_text_in_the_card(finished, undisturbed, pool):
    note = "<b>CC</b> [x](https://evil)\n\n# Heading | `x`"
    build(finished, options(pool), redo="write", license_note=note)
    card, before = ((folder / "README.md").read_text() for folder in (finished, undisturbed))
    assert r"they may be used: &lt;b&gt;CC&lt;/b&gt; \[x\](https://evil) # Heading \| \`x\`" in card
    assert [line for line in card.splitlines() if line.startswith("#")] == [
        line for line in before.splitlines() if line.startswith("#")
    ]


@pytest.mark.parametrize(("images", "reason"), [([], "it is empty"), ([b"no image"], "{'unreadable': 1}")])
def test_a_source_without_fit_images_is_an_error_that_says_why(tmp_path, images, reason):
    features = datasets.Features({"image": datasets.Image()})
    encoded = pa.array([{"bytes": image, "path": None} for image in images], features.arrow_schema.field("image").type)
    with pa.ipc.new_stream(tmp_path / "source.arrow", features.arrow_schema) as out:
        out.write_table(pa.table([encoded], features.arrow_schema))
    with pytest.raises(RuntimeError, match=rf"No image of the source is fit to use: {reason}"):
        build(tmp_path / "out", options(tmp_path / "source.arrow"))


def test_a_target_serves_no_more_often_than_allowed(finished, pool):
    chosen = {"num_candidates": 2, "max_target_uses": None} | ANY_MASK
    build(finished, options(pool, **chosen), redo="retrieve")
    assert max(np.bincount(image_rows(finished, "target_image", pool))) > 1
    numbers = build(finished, options(pool, **chosen | {"max_target_uses": 1}), redo="retrieve")
    assert max(np.bincount(image_rows(finished, "target_image", pool))) == 1
    assert numbers["stages"]["retrieve"]["dropped"]["target_used_up"] > 0
    assert numbers["rows_in"] == numbers["rows_out"] + sum(numbers["dropped"].values())


def test_targets_are_at_least_as_similar_as_asked(finished, undisturbed, pool):
    limit = float(np.median(rows(undisturbed)["similarity"]))
    numbers = build(finished, options(pool, min_similarity=limit), redo="retrieve")
    assert min(rows(finished)["similarity"].to_pylist()) >= np.float32(limit)
    assert numbers["dropped"]["no_neighbour"] > 0


def mask_overlaps(output_dir):
    """The IoU of the two masks of each pair, whose images are as large as the grid that masks are compared on."""
    pairs = load_pairs(output_dir)
    return [mask_iou(*(np.asarray(pair[f"{name}_mask"]) > 0 for name in ("source", "target"))) for pair in pairs]


@pytest.mark.parametrize("max_target_uses", [None, 1])
def test_reranking_takes_the_target_whose_mask_overlaps_best(finished, pool, max_target_uses):
    numbers = build(
        finished,
        options(pool, rerank_by_mask=True, min_mask_iou=0.2, max_target_uses=max_target_uses),
        redo="retrieve",
    )
    overlaps = mask_overlaps(finished)
    assert min(overlaps) >= 0.2
    assert numbers["rows_in"] == numbers["rows_out"] + sum(numbers["dropped"].values())

    # What the stage mask left: all candidates that pass, of all sources in order.
    used, expected = set(), []
    for file in sorted((finished / "work/mask").glob("*.arrow")):
        passed = read_table(file).to_pandas()
        for _, candidates in passed.groupby("row"):
            free = candidates[~candidates["target"].isin(used)]
            if len(free):
                best = free.iloc[free["iou"].argmax()]
                expected.append(best["iou"])
                used |= {best["target"]} if max_target_uses else set()
    assert overlaps == pytest.approx(expected)


def test_pairs_whose_masks_lie_apart_are_left_out(finished, undisturbed, pool):
    overlaps = np.array(mask_overlaps(undisturbed))
    limit = float(np.median(overlaps))
    numbers = build(finished, options(pool, min_mask_iou=limit), redo="mask")
    assert mask_overlaps(finished) == overlaps[overlaps >= limit].tolist()
    assert numbers["dropped"]["masks_apart"] == (overlaps < limit).sum() > 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"redo": "nothing"}, "`redo` has to be one of read, .*, write, but is 'nothing'"),
        ({"batch_size": 0}, "`batch_size` has to be at least 1, but is 0"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, pool, how, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", options(pool), **how)
    assert not (tmp_path / "out").exists()


# Going on


def test_a_finished_set_is_not_built_again(finished, undisturbed, pool):
    before = times(finished)
    assert build(finished, options(pool)) == report(undisturbed)
    assert times(finished) == before


def test_a_finished_set_does_not_need_what_the_stages_left(finished, undisturbed, pool):
    shutil.rmtree(finished / "work")
    assert build(finished, options(pool)) == report(undisturbed)
    assert not (finished / "work").exists()


CHANGES = {
    "min_size": ("read", 64, 65),
    "max_new_tokens": ("caption", 40, 41),
    "adjective_share": ("edit", 0.5, 0.6),
    "text_weight": ("retrieve", 0.65, 0.7),
    "min_mask_iou": ("mask", 0.0, 0.1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_options_are_refused_with_both_values_and_the_way_out(finished, pool, name):
    stage, old, new = CHANGES[name]
    before = times(finished)
    with pytest.raises(ValueError, match=f"`{name}` = {old}, but now it is {new}.*another folder.*--redo {stage}"):
        build(finished, options(pool, **{name: new}))
    assert times(finished) == before


def test_another_seed_is_refused(finished, pool):
    chosen = options(pool)
    chosen.edit_seed = 1
    with pytest.raises(ValueError, match="`edit_seed` = 0, but now it is 1"):
        build(finished, chosen)


@pytest.mark.parametrize(
    ("part", "path"),
    [("captioner", mini.captioner_path), ("clip", mini.clip_path), ("mask_model", mini.mask_model_path)],
)
def test_other_weights_under_the_same_name_are_refused(tmp_path, part, path):
    name = {"captioner": "caption_model", "clip": "clip_model", "mask_model": "mask_model"}[part]
    model = Path(shutil.copytree(path(), tmp_path / part))
    source = write_pool(tmp_path / "source", range(FIRST_SEED, FIRST_SEED + 2))
    chosen = options(source, **{name: str(model)}, max_source_similarity=None, **ANY_MASK)
    build(tmp_path / "out", chosen)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=f"`{name}_fingerprint` = 'sha256 .*', but now it is 'sha256 "):
        build(tmp_path / "out", chosen)


def test_another_source_under_the_same_name_is_refused(tmp_path):
    source = write_pool(tmp_path / "source", range(FIRST_SEED, FIRST_SEED + 2))
    chosen = options(source, caption_column="text", max_source_similarity=None, **ANY_MASK)
    build(tmp_path / "out", chosen)
    shutil.rmtree(source)
    write_pool(source, range(FIRST_SEED + 2, FIRST_SEED + 4))
    with pytest.raises(ValueError, match=r"`source_fingerprint` = 'sha256 .*--redo read"):
        build(tmp_path / "out", chosen)


def test_redo_takes_new_options_from_a_stage_on_and_keeps_the_stages_before(finished, pool, tmp_path):
    kept = [finished / "work" / stage for stage in STAGES[: STAGES.index("retrieve")]]
    before = [times(folder / "source" if folder.name == "embed" else folder) for folder in kept[1:]]
    build(finished, options(pool, text_weight=0.5), redo="retrieve")
    assert [times(folder / "source" if folder.name == "embed" else folder) for folder in kept[1:]] == before
    build(tmp_path / "anew", options(pool, text_weight=0.5))
    assert rows(finished).equals(rows(tmp_path / "anew"))
    # From now on these options are the ones to go on with.
    assert build(finished, options(pool, text_weight=0.5)) == report(finished)
    with pytest.raises(ValueError, match=r"`text_weight` = 0\.5, but now it is 0\.65"):
        build(finished, options(pool))


def test_redo_with_other_options_for_an_earlier_stage_is_refused_before_anything_is_lost(finished, pool):
    before = times(finished)
    with pytest.raises(ValueError, match=r"`text_weight` = 0.65.*--redo retrieve"):
        build(finished, options(pool, text_weight=0.5), redo="mask")
    assert times(finished) == before


def test_redo_rebuilds_a_set_whose_stages_were_deleted(finished, undisturbed, pool):
    shutil.rmtree(finished / "work")
    build(finished, options(pool), redo="write")
    assert rows(finished).equals(rows(undisturbed))


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, pool):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(
        ValueError, match=r"`output_dir` has to be new, empty or a build that was begun, .* other files"
    ):
        build(tmp_path, options(pool), redo="read")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match=r"`output_dir` has to be a folder that can be written to, got .*thesis.txt"):
        build(tmp_path / "thesis.txt", options(pool))


def test_an_output_folder_inside_the_source_is_refused(tmp_path):
    source = write_pool(tmp_path / "source", range(FIRST_SEED, FIRST_SEED + 2))
    with pytest.raises(ValueError, match=r"`output_dir` .* lies in `source`"):
        build(source / "pairs", options(source))


# The command


@pytest.fixture(scope="module")
def context():
    return processes()


@pytest.fixture
def run(context, tmp_path):
    """Runs the command in a process of its own: exit code and what it printed."""

    def run(*argv, **environment):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        process = context.Process(target=command, args=(argv, log, environment))
        process.start()
        process.join()
        return process.exitcode, log.read_text()

    return run


def test_the_command_builds_with_a_bar_and_a_rate_for_each_stage(run, tmp_path, undisturbed, pool):
    code, printed = run(*arguments(pool, tmp_path / "out"))
    assert code == 0
    assert rows(tmp_path / "out").equals(rows(undisturbed))
    assert f"{len(rows(undisturbed))} pairs from {COUNT} rows in {tmp_path / 'out'}\n" in printed
    assert "left out: 2" in printed
    bars = {line.rpartition("\r")[2].partition(":")[0]: line for line in printed.splitlines() if "rows/s" in line}
    assert list(bars) == [
        *("read source", "caption", "edit", "embed source", "embed prompts", "retrieve", "mask", "write")
    ]
    assert f"{COUNT}/{COUNT}" in bars["caption"]
    # And nothing else but the line on the word data.
    lines = [line for line in printed.split("\n") if line and "rows/s" not in line]
    assert len(lines) == 1 + 1 + len(report(tmp_path / "out")["dropped"])


def test_help_comes_before_the_libraries():
    script = build_dataset.__file__
    argv = [sys.executable, "-X", "importtime", script, "--help"]
    process = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "--source" in process.stdout
    slow = "torch|diffusers|datasets|accelerate|faiss|nltk|pyarrow"
    assert not re.search(rf"\| +({slow})$", process.stderr, re.MULTILINE)


def test_help_lists_the_options_by_name(run):
    code, printed = run("--help")
    assert code == 0
    for option in ("--source", "--text_weight", "--ray_address", "--no_resume", "--redo {read,caption,"):
        assert option in printed


@pytest.mark.parametrize(
    ("argv", "code", "line"),
    [
        (["--shard_size", "0"], 1, "build_dataset.py: error: `shard_size` has to be at least 1, but is 0."),
        (["--batch_size", "none"], 2, "build_dataset.py: error: argument --batch_size/--batch-size: invalid int"),
        (["--redo", "pigs"], 2, "build_dataset.py: error: argument --redo: invalid choice: 'pigs'"),
        (["--image_column", "pigs"], 1, "build_dataset.py: error: `image_column` 'pigs' is no column of source"),
        (["--clip_model", "/no/such"], 1, "build_dataset.py: error: "),
        (["--engine", "ray", "--num_workers", "0"], 1, "build_dataset.py: error: `num_workers` has to be at least 1"),
    ],
)
def test_bad_values_end_with_one_line(run, tmp_path, pool, argv, code, line):
    ended, printed = run(*arguments(pool, tmp_path / "out"), *argv)
    assert ended == code
    assert "Traceback" not in printed
    last = printed.splitlines()[-1]
    assert last.startswith(line)
    assert [said for said in printed.splitlines() if "error" in said] == [last]


def test_no_resume_begins_anew_under_other_options(run, finished, pool):
    code, printed = run(*arguments(pool, finished), "--text_weight", "0.5", "--no_resume")
    assert code == 0, printed
    assert "caption: 100%" in printed
    assert json.loads((finished / "manifest.json").read_text())["retrieve"]["text_weight"] == 0.5


# The Hub


PUSH = """
import sys
from pathlib import Path
from diffusers_iedit.pairs.write import push
print(push(Path(sys.argv[1]), "pairs", True))
"""

LOAD = """
from diffusers_iedit.pairs import load_pairs, validate
assert validate("me/pairs") == []
print(*load_pairs("me/pairs")["edit_prompt"], sep=chr(10))
"""


def output(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


def push(hub, output_dir):
    code = PUSH.replace("sys.argv[1]", repr(str(output_dir)))
    assert output(hub.run(code)) == f"{hub.endpoint}/datasets/me/pairs\n"


@pytest.mark.slow
def test_a_pushed_set_is_loaded_and_replaced_by_a_smaller_one(hub, finished, undisturbed, pool):
    push(hub, finished)
    repo = hub.repos["datasets"]["me/pairs"]
    assert repo.private
    names = {f"data/{file.name}" for file in (finished / "data").iterdir()}
    first = repo.files()
    assert set(first) == names | {"README.md", "report.json", "sheet.jpg"}
    assert not [name for name, content in first.items() if TOKEN.encode() in content]
    assert output(hub.run(LOAD)).splitlines() == rows(undisturbed)["edit_prompt"].to_pylist()

    limit = float(np.median(rows(undisturbed)["similarity"]))
    build(finished, options(pool, min_similarity=limit), redo="retrieve")
    smaller = {f"data/{file.name}" for file in (finished / "data").iterdir()}
    assert not names <= smaller
    push(hub, finished)
    assert {name for name in repo.files() if name.startswith("data/")} == smaller
    assert output(hub.run(LOAD)).splitlines() == rows(finished)["edit_prompt"].to_pylist()


def test_a_folder_without_a_finished_set_is_not_pushed(hub, tmp_path):
    result = hub.run(PUSH.replace("sys.argv[1]", repr(str(tmp_path))))
    assert result.returncode != 0
    assert not hub.repos["datasets"]


def test_new_edits_leave_the_pool_embedded_as_it_was(finished, pool, undisturbed):
    embeddings = times(finished / "work" / "embed" / "source")
    assert embeddings
    chosen = options(pool)
    chosen.edit_seed = 1
    build(finished, chosen, redo="edit")
    assert times(finished / "work" / "embed" / "source") == embeddings
    assert rows(finished)["edit_prompt"] != rows(undisturbed)["edit_prompt"]


def test_another_clip_model_embeds_the_pool_anew(finished, pool, tmp_path):
    embeddings = times(finished / "work" / "embed" / "source")
    chosen = options(pool, clip_model=str(shutil.copytree(mini.clip_path(), tmp_path / "clip")))
    build(finished, chosen, redo="edit")
    assert times(finished / "work" / "embed" / "source").keys() == embeddings.keys()
    assert times(finished / "work" / "embed" / "source") != embeddings


@pytest.mark.slow
def test_a_build_from_the_hub_stays_with_the_commit_it_was_begun_with(hub, pool, tmp_path):
    begun = hub.add("datasets", "me/photos", {"train.parquet": (pool / "train.parquet").read_bytes()})
    script = Path(build_dataset.__file__)
    argv = [sys.executable, str(script), *arguments(Path("me/photos"), tmp_path / "out", "--caption_column", "text")]
    result = hub.run(argv, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    first = rows(tmp_path / "out")

    other = write_pool(tmp_path / "other", range(FIRST_SEED + COUNT, FIRST_SEED + COUNT + 5))
    hub.repos["datasets"]["me/photos"].commit("others", {"train.parquet": (other / "train.parquet").read_bytes()})
    (tmp_path / "out" / "report.json").unlink()
    shutil.rmtree(tmp_path / "out" / "work")
    result = hub.run(argv, OMP_NUM_THREADS="1")
    assert result.returncode == 1
    assert "`source_fingerprint`" in result.stderr
    assert begun in result.stderr
    result = hub.run([*argv, "--source_revision", begun], OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path / "out").equals(first)
