"""The examples that methods are measured on: where they come from, what they hold, and what is refused."""

import dataclasses
import io
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import small_pairs
from PIL import Image

from diffusers_iedit import mini
from diffusers_iedit.evaluation.data import (
    GENERATED_FILE,
    MINI_SPLITS,
    Example,
    ask_for_edit,
    decode_runs,
    edit_instruction,
    load_examples,
)
from diffusers_iedit.mini.judging import Judge
from diffusers_iedit.pairs import FEATURES


sys.path.insert(0, str(Path(__file__).parents[1] / "training" / "mini"))
import make_benchmark


def write(folder, rows, **changes):
    """Pairs in a folder; `changes` are those of the row with number 9, which is beyond what is checked at first."""
    rows[9] |= changes
    return str(small_pairs.write_pairs(folder, rows))


@pytest.fixture
def rows():
    return small_pairs.make_rows(12)


@pytest.mark.parametrize(
    ("source", "target", "instruction"),
    [
        ("red car", "blue ball", "turn the red car into a blue ball"),
        ("bus", "orange train", "turn the bus into an orange train"),
    ],
)
def test_the_terms_make_an_instruction(source, target, instruction):
    assert edit_instruction(source, target) == instruction


def test_a_pair_is_an_example_whose_mask_is_the_sources(tmp_path, rows):
    examples = load_examples(write(tmp_path / "pairs", rows))
    row, example = rows[3], examples[3]
    assert len(examples) == 12
    np.testing.assert_array_equal(example.mask, row["source_mask"])
    assert example == Example(
        key="pair-000003",
        group="all",
        image=row["source_image"],
        mask=example.mask,
        source_caption=row["source_caption"],
        edit_prompt=row["edit_prompt"],
        source_term=row["source_term"],
        target_term=row["target_term"],
        instruction=edit_instruction(row["source_term"], row["target_term"]),
    )
    assert (example.image.mode, example.mask.mode) == ("RGB", "L")


def test_the_keys_are_known_unread_and_are_those_of_the_examples(tmp_path, rows):
    examples = load_examples(write(tmp_path / "pairs", rows))
    assert len(set(examples.keys)) == 12
    assert [example.key for example in examples] == list(examples.keys)


def test_examples_are_a_sequence(tmp_path, rows):
    examples = load_examples(write(tmp_path / "pairs", rows))
    assert [example.key for example in examples[10:]] == ["pair-000010", "pair-000011"]
    assert examples[-1] == examples[11]
    with pytest.raises(IndexError):
        examples[12]


def test_the_split_of_a_set_of_pairs_is_train_unless_another_one_is_asked_for(tmp_path, rows):
    folder = small_pairs.write_pairs(tmp_path / "pairs", rows)
    shutil.copy(folder / "train.parquet", folder / "test.parquet")
    small_pairs.write_pairs(tmp_path / "other", rows[:5])
    shutil.copy(tmp_path / "other" / "train.parquet", folder / "train.parquet")
    assert len(load_examples(str(folder))) == 5
    assert len(load_examples(str(folder), split="test")) == 12


def test_images_that_lie_beside_the_table_are_found(tmp_path, rows):
    folder = tmp_path / "pairs"
    folder.mkdir()
    lines = []
    for number, row in enumerate(rows[:2]):
        line = {}
        for name, value in row.items():
            if isinstance(value, Image.Image):
                value.save(folder / f"{number}-{name}.png")
                line[f"{name}_file_name"] = f"{number}-{name}.png"
            else:
                line[name] = value
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    examples = load_examples(str(folder))
    assert examples[1].image == rows[1]["source_image"]

    before = examples.fingerprint
    rows[5]["source_mask"].save(folder / "1-source_mask.png")
    assert load_examples(str(folder)).fingerprint != before


@pytest.mark.parametrize("name", ["source_mask", "edit_prompt"])
def test_a_set_without_a_column_that_is_needed_is_refused(tmp_path, rows, name):
    small_pairs.write_pairs(tmp_path / "pairs", rows, [column for column in FEATURES if column != name])
    with pytest.raises(ValueError, match=f"column `{name}` is missing"):
        load_examples(str(tmp_path / "pairs"))


def test_an_empty_set_of_pairs_is_refused(tmp_path):
    small_pairs.write_pairs(tmp_path / "pairs", [])
    with pytest.raises(ValueError, match="has no rows"):
        load_examples(str(tmp_path / "pairs"))


def test_a_set_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        load_examples(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_mask": Image.new("L", (32, 64), 255)}, "`source_mask` is 32 x 64, but `source_image` is 64 x 64"),
        ({"source_mask": Image.new("L", (64, 64))}, "`source_mask` is black"),
        ({"source_mask": Image.new("L", (64, 64), 1)}, "`source_mask` is black"),
        ({"source_mask": Image.new("RGB", (64, 64), "white")}, "has to be 8-bit grey .* has mode RGB"),
        ({"source_mask": None}, "`source_mask` is missing"),
        ({"target_term": ""}, "`target_term` is empty"),
        ({"edit_prompt": " "}, "`edit_prompt` is empty"),
        ({"source_image": Image.new("I;16", (64, 64), 300)}, "`source_image` has to be RGB, but .* mode I;16"),
        ({"source_mask": Image.new("LA", (64, 64), (255, 0))}, "has to be 8-bit grey .* has mode LA"),
    ],
)
def test_an_example_that_does_not_fit_is_named_by_its_row_when_it_is_read(tmp_path, rows, changes, message):
    examples = load_examples(write(tmp_path / "pairs", rows, **changes))
    assert examples[8].key == "pair-000008"
    with pytest.raises(ValueError, match=rf"pairs, row 9: .*{message}"):
        examples[9]


def test_a_damaged_image_is_named_by_its_row_and_spoils_no_other_example(tmp_path, rows):
    pairs = datasets.Dataset.from_dict(
        {name: [row[name] for row in rows] for name in FEATURES}, features=FEATURES
    ).cast_column("source_image", datasets.Image(decode=False))
    table = pairs.to_list()
    table[9]["source_image"]["bytes"] = table[9]["source_image"]["bytes"][:200]
    features = datasets.Features(FEATURES | {"source_image": datasets.Image(decode=False)})
    (tmp_path / "pairs").mkdir()
    datasets.Dataset.from_list(table, features=features).cast(FEATURES).to_parquet(tmp_path / "pairs/train.parquet")

    examples = load_examples(str(tmp_path / "pairs"))
    assert examples[8].image == rows[8]["source_image"]
    with pytest.raises(ValueError, match=r"row 9: `source_image` cannot be decoded"):
        examples[9]


def test_the_fingerprint_of_pairs_stays_when_they_move_and_changes_with_what_is_used_of_them(tmp_path, rows):
    original = load_examples(write(tmp_path / "here", rows)).fingerprint
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert load_examples(str(tmp_path / "there")).fingerprint == original

    prints = {original}
    changes = [
        {"source_image": rows[0]["target_image"]},
        {"source_mask": rows[0]["target_mask"]},
        {"source_caption": rows[0]["source_caption"]},
        {"edit_prompt": rows[0]["edit_prompt"]},
        {"source_term": rows[0]["source_term"]},
        {"target_term": rows[0]["target_term"]},
    ]
    for number, change in enumerate(changes):
        prints.add(load_examples(write(tmp_path / f"{number}", small_pairs.make_rows(12), **change)).fingerprint)
    assert len(prints) == 1 + len(changes)
    same = load_examples(write(tmp_path / "target", rows, target_image=rows[0]["target_image"])).fingerprint
    assert same == original


def write_pie_bench(folder, **changes):
    """Three entries in PIE-Bench's format; `changes` are those of the second, where None takes an entry out."""
    mapping = {
        "000000000000": {
            "image_path": "0_random_140/000000000000.jpg",
            "original_prompt": "a slanted bicycle on the road",
            "editing_prompt": "a slanted [rusty] bicycle on the road",
            "editing_instruction": "Make the frame of the bike rusty",
            "editing_type_id": "0",
            "blended_word": "bicycle bicycle",
            "mask": [512 * 100 + 50, 20, 512 * 101 + 50, 30],
        },
        "111000000000": {
            "image_path": "1_change_object_80/1_artificial/1_animal/111000000000.jpg",
            "original_prompt": "a [red] cat on a chair",
            "editing_prompt": "a [blue] cat on a chair",
            "editing_instruction": "Make the cat blue",
            "editing_type_id": "6",
            "blended_word": "cat cat",
            "mask": [512 * 200, 512],
        },
        "922000000000": {
            "image_path": "9_change_style_80/2_natural/922000000000.png",
            "original_prompt": "the sea",
            "editing_prompt": "the sea",
            "editing_instruction": "Make it a storm",
            "editing_type_id": "9",
            "blended_word": "",
            "mask": [0, 512 * 512],
        },
    }
    for number, entry in enumerate(mapping.values()):
        file = folder / "annotation_images" / entry["image_path"]
        file.parent.mkdir(parents=True)
        Image.new("RGB", (512, 512), (40 * number, 90, 120)).save(file)
    entry = {name: value for name, value in (mapping["111000000000"] | changes).items() if value is not None}
    mapping["111000000000"] = entry
    (folder / "mapping_file.json").write_text(json.dumps(mapping))
    return f"pie-bench:{folder}"


def test_a_pie_bench_entry_is_an_example_without_brackets_in_the_group_of_its_editing_type(tmp_path):
    examples = load_examples(write_pie_bench(tmp_path))
    assert examples.keys == ("000000000000", "111000000000", "922000000000")
    assert [example.group for example in examples] == ["random", "change attribute color", "change style"]
    example = examples[1]
    assert (example.source_caption, example.edit_prompt) == ("a red cat on a chair", "a blue cat on a chair")
    assert (example.source_term, example.target_term) == ("red cat", "blue cat")
    assert example.instruction == "Make the cat blue"
    assert (example.target, example.target_mask, example.thing) == (None, None, None)
    assert (example.image.mode, example.image.size, example.mask.mode) == ("RGB", (512, 512), "L")
    np.testing.assert_array_equal(np.asarray(example.mask) == 255, decode_runs([512 * 200, 512]))


def test_pie_benchs_terms_name_the_thing_that_the_changed_word_describes(tmp_path):
    example = load_examples(write_pie_bench(tmp_path))[0]
    assert (example.source_term, example.target_term) == ("bicycle", "rusty bicycle")


@pytest.mark.parametrize(
    ("blended", "terms"),
    [
        ("sea ocean", ("sea", "ocean")),
        ("", (None, None)),
        (None, (None, None)),
        ("sea", (None, None)),
        # As others write it who make this format of PIE-Bench++ and its like.
        (["sea", "ocean"], ("sea", "ocean")),
        (["deep sea,wide ocean", "sky,sky"], ("deep sea", "wide ocean")),
        ('["sea,ocean"]', ("sea", "ocean")),
        (["sea,"], (None, None)),
        ([], (None, None)),
    ],
)
def test_prompts_that_differ_in_nothing_take_their_terms_from_the_blended_words(tmp_path, blended, terms):
    prompts = {"original_prompt": "the sea", "editing_prompt": "the [sea]", "blended_word": blended}
    example = load_examples(write_pie_bench(tmp_path, **prompts))[1]
    assert (example.source_term, example.target_term) == terms


def test_runs_fill_the_mask_row_by_row_and_the_border_always_belongs_to_it():
    mask = decode_runs([512 + 510, 4, 512 * 100 + 50, 20])
    expected = np.zeros((512, 512), dtype=bool)
    expected[0], expected[511], expected[:, 0], expected[:, 511] = True, True, True, True
    expected[1, 510:], expected[2, :2] = True, True
    expected[100, 50:70] = True
    np.testing.assert_array_equal(mask, expected)


def test_runs_may_be_text_as_in_pie_bench_plus_plus(tmp_path):
    example = load_examples(write_pie_bench(tmp_path, mask="102400 512"))[1]
    np.testing.assert_array_equal(np.asarray(example.mask) == 255, decode_runs([512 * 200, 512]))


def test_a_number_may_say_the_type_of_an_edit(tmp_path):
    assert load_examples(write_pie_bench(tmp_path, editing_type_id=3))[1].group == "delete object"


@pytest.mark.parametrize("path", ["{folder}/private.png", "../../private.png", "link.png", "linked/private.png"])
def test_an_image_outside_of_the_folder_is_refused(tmp_path, path):
    Image.new("RGB", (512, 512)).save(tmp_path / "private.png")
    source = write_pie_bench(tmp_path / "pie")
    os.symlink(tmp_path / "private.png", tmp_path / "pie" / "annotation_images" / "link.png")
    os.symlink(tmp_path, tmp_path / "pie" / "annotation_images" / "linked")
    mapping = json.loads((tmp_path / "pie" / "mapping_file.json").read_text())
    mapping["111000000000"]["image_path"] = path.format(folder=tmp_path)
    (tmp_path / "pie" / "mapping_file.json").write_text(json.dumps(mapping))
    with pytest.raises(ValueError, match=r"entry '111000000000': .* of a set only its own files are read"):
        load_examples(source)


def test_a_run_beyond_the_last_pixel_ends_there():
    np.testing.assert_array_equal(decode_runs([512 * 500, 10**6]), decode_runs([512 * 500, 512 * 12]))


@pytest.mark.parametrize("runs", [[5], [0, 4, 9], [-3, 5], [512 * 512, 1], [4, -1], [1.5, 2], ["1", "2"], "12", None])
def test_broken_runs_are_refused_with_the_name_of_their_entry(tmp_path, runs):
    with pytest.raises(ValueError, match=r"mapping_file.json, entry '111000000000': the mask has"):
        load_examples(write_pie_bench(tmp_path, mask=runs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_path": "nowhere.jpg"}, "there is no image .*nowhere.jpg"),
        ({"image_path": None}, "`image_path` is missing"),
        ({"editing_prompt": None}, "`editing_prompt` is missing"),
        ({"editing_instruction": 5}, "`editing_instruction` is missing or no text"),
        ({"editing_instruction": "\ud800"}, "`editing_instruction` is missing or no text"),
        ({"original_prompt": ["a cat"]}, "`original_prompt` is missing or no text"),
        ({"editing_prompt": " [] "}, "`editing_prompt` is empty"),
        ({"image_path": "a\0.png"}, "`image_path`: embedded null byte"),
        ({"image_path": ["a.png"]}, "`image_path` is missing or no text"),
        ({"editing_type_id": True}, "`editing_type_id` has to be one of 0 to 9, but is True"),
        ({"editing_type_id": ["1"]}, "`editing_type_id` has to be one of 0 to 9, but is "),
        ({"blended_word": 5}, "`blended_word` has to be two words, as text or as a list, but is 5"),
        ({"blended_word": ["sea", ["a"]]}, "`blended_word` has to be two words, as text or as a list, but is "),
        ({"blended_word": {"sea": "ocean"}}, "`blended_word` has to be two words, as text or as a list, but is "),
        ({"editing_type_id": "10"}, "`editing_type_id` has to be one of 0 to 9, but is '10'"),
    ],
)
def test_an_entry_that_lacks_something_is_refused_by_its_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"entry '111000000000': {message}"):
        load_examples(write_pie_bench(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is no PIE-Bench folder: no mapping_file.json can be read"),
        ("{", "is no JSON"),
        ("{}", "at least one entry"),
        ("[1]", "at least one entry"),
        ("[" * 100_000, "is no JSON"),
        ('{"../x": {}}', "the key is no name for a file"),
        ('{"' + 300 * "x" + '": {}}', "the key is no name for a file"),
        ('{"1": 5}', "the entry has to be an object, but is 5"),
    ],
)
def test_a_folder_without_a_proper_mapping_file_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "mapping_file.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_examples(f"pie-bench:{tmp_path}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b"no image"), "the image cannot be read"),
        (lambda file: file.write_bytes(file.read_bytes()[:400]), "the image cannot be read"),
        (
            lambda file: Image.new("L", (512, 512)).save(file, "EPS"),
            "the image cannot be read: it is damaged, or",
        ),
        (lambda file: Image.new("I;16", (512, 512), 300).save(file, "PNG"), "the image has to have 8 bits a channel"),
        (lambda file: Image.new("RGB", (640, 512)).save(file), "the mask is 512 x 512, but the image is 640 x 512"),
    ],
)
def test_an_image_that_does_not_fit_is_named_when_its_example_is_read(tmp_path, damage, message):
    source = write_pie_bench(tmp_path)
    damage(next(tmp_path.rglob("111000000000.jpg")))
    examples = load_examples(source)
    assert examples[0].key == "000000000000"
    with pytest.raises(ValueError, match=f"entry '111000000000': {message}"):
        examples[1]


def test_pie_bench_has_no_splits(tmp_path):
    with pytest.raises(ValueError, match="no splits, got 'test'"):
        load_examples(write_pie_bench(tmp_path), split="test")


def test_the_fingerprint_of_pie_bench_stays_when_it_moves_and_changes_with_a_prompt_or_an_image(tmp_path):
    original = load_examples(write_pie_bench(tmp_path / "here")).fingerprint
    assert load_examples(write_pie_bench(tmp_path / "there")).fingerprint == original
    assert load_examples(write_pie_bench(tmp_path / "texts", blended_word="a b")).fingerprint != original
    source = write_pie_bench(tmp_path / "images")
    Image.effect_noise((512, 512), 50).save(next((tmp_path / "images").rglob("111000000000.jpg")))
    assert load_examples(source).fingerprint != original


@pytest.fixture(scope="module")
def mini_examples():
    return {split: list(load_examples("mini", split=split)) for split in MINI_SPLITS}


@pytest.fixture(params=list(MINI_SPLITS))
def benchmark(request, mini_examples):
    return request.param, mini_examples[request.param]


def test_the_mini_benchmark_holds_as_many_real_as_generated_examples(benchmark):
    split, examples = benchmark
    assert Counter(example.group for example in examples) == dict.fromkeys(
        ["real", "generated"], {"test": 160, "choose": 64}[split]
    )
    assert len({example.key for example in examples}) == len(examples)
    assert all(example.key.startswith(example.group) for example in examples)


def test_half_of_each_group_swaps_the_thing_and_half_the_colour_in_pictures_of_one_thing_and_of_two(benchmark):
    _, examples = benchmark
    kinds = Counter()
    for example in examples:
        (colour, noun), (new_colour, new_noun) = example.source_term.split(), example.target_term.split()
        assert (noun == new_noun) != (colour == new_colour)
        kinds[example.group, noun == new_noun, " and " in example.source_caption] += 1
    assert len(kinds) == 8
    assert len(set(kinds.values())) == 1


def test_every_source_shows_a_combination_that_is_in_no_training_picture(benchmark):
    for example in benchmark[1]:
        assert any(
            f"{colour} {noun}" in example.source_caption and example.source_caption.endswith(scene)
            for noun, colour, scene in mini.held_out_combinations()
        ), example.source_caption


def test_the_edit_prompt_changes_the_term_of_the_caption_and_nothing_else(benchmark):
    known = set(mini.captions())
    for example in benchmark[1]:
        assert example.edit_prompt in known
        words = example.source_caption.replace("an ", "a ").replace(example.source_term, example.target_term)
        assert words == example.edit_prompt.replace("an ", "a ")
        assert example.thing == (*example.target_term.split()[::-1], next(s for s in mini.SCENES if s in words))
        assert example.instruction == edit_instruction(example.source_term, example.target_term)


def test_images_and_masks_are_of_one_size_and_the_masks_are_hard(benchmark):
    for example in benchmark[1]:
        assert (example.image.mode, example.image.size) == ("RGB", (mini.SIZE, mini.SIZE))
        assert (example.mask.mode, example.mask.size) == ("L", (mini.SIZE, mini.SIZE))
        assert set(np.unique(example.mask)) == {0, 255}


def test_the_true_edit_of_a_real_example_differs_only_inside_the_old_and_the_new_things_masks(benchmark):
    for example in (example for example in benchmark[1] if example.group == "real"):
        changed = (np.asarray(example.image) != np.asarray(example.target)).any(-1)
        masks = np.maximum(example.mask, example.target_mask) > 0
        assert changed.any()
        assert not (changed & ~masks).any()


def test_of_generated_examples_no_truth_is_known(benchmark):
    generated = [example for example in benchmark[1] if example.group == "generated"]
    assert {(example.target, example.target_mask) for example in generated} == {(None, None)}


def test_the_judge_sees_the_source_term_inside_the_mask(benchmark):
    judge = Judge.from_pretrained(mini.judge_path())
    _, examples = benchmark
    verdicts = judge.look([example.image for example in examples], [example.mask for example in examples])
    right = Counter(
        example.group
        for example, seen in zip(examples, verdicts, strict=True)
        if f"{seen.colour} {seen.noun}" == example.source_term
    )
    # Of drawn pictures it knows 99 %; of the samples only those were kept that it knows.
    assert right["real"] >= 0.97 * len(examples) / 2
    assert right["generated"] >= 0.99 * len(examples) / 2


def test_no_picture_and_no_seed_comes_twice(mini_examples):
    pictures = {example.image.tobytes() for examples in mini_examples.values() for example in examples}
    assert len(pictures) == 2 * (160 + 64)
    seeds = pq.read_table(GENERATED_FILE, columns=["seed"])["seed"].to_pylist()
    for first, count in MINI_SPLITS.values():
        seeds += range(first, first + count)
    assert len(set(seeds)) == len(seeds) == 2 * (160 + 64)
    assert all(140_000 <= seed < 200_000 for seed in seeds)


def test_the_mini_benchmark_is_the_same_each_time_and_test_by_default():
    first, second = load_examples("mini"), load_examples("mini", split="test")
    assert first.fingerprint == second.fingerprint != load_examples("mini", split="choose").fingerprint
    assert all(first[number] == second[number] for number in (0, 3, 160, 319))


def test_another_split_of_the_mini_benchmark_is_refused():
    with pytest.raises(ValueError, match="one of test, choose, got 'train'"):
        load_examples("mini", split="train")


def test_pictures_are_read_only_when_they_are_asked_for(tmp_path, rows, monkeypatch):
    read, open_image = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: read.append(args) or open_image(*args, **options))
    monkeypatch.setattr(mini.Scene, "image", property(read.append))

    load_examples("mini")
    pie_bench = load_examples(write_pie_bench(tmp_path / "pie"))
    assert not read
    pairs = load_examples(write(tmp_path / "pairs", rows))
    # `load_pairs` looks at both images and masks of the first eight.
    assert len(read) == 8 * 4
    read.clear()
    assert (pairs[10].key, len(read)) == ("pair-000010", 2)
    assert (pie_bench[0].key, len(read)) == ("000000000000", 3)


def drawn(scene, **changes):
    """What is to say about a sample that is drawn as the scene; `changes` replace its image or mask."""
    sample = {"image": scene.image, "mask": scene.mask} | changes
    return make_benchmark.fault(scene, **sample, judge=Judge.from_pretrained(mini.judge_path()))


@pytest.mark.parametrize("things", [1, 2])
def test_a_sample_is_taken_only_if_it_shows_its_caption_and_the_mask_its_thing(things):
    scene = mini.render(400_000, things=things)
    left, top, right, bottom = scene.mask.getbbox()
    half, spot = scene.mask.copy(), scene.mask.copy()
    half.paste(0, (left, top, (left + right) // 2, bottom))
    spot.paste(255, (0, 0, 2, 2))
    other_scene = next(name for name in mini.SCENES if name != scene.scene)

    assert drawn(scene) is None
    assert drawn(scene, image=ask_for_edit(scene, 0).image) == "not the things of the caption"
    assert drawn(scene, image=ask_for_edit(scene, 1).image) == "not the things of the caption"
    elsewhere = dataclasses.replace(scene, scene=other_scene).image
    assert drawn(scene, image=elsewhere) == "not the scene of the caption"
    assert drawn(scene, mask=spot) == "a mask that is not in one piece"
    assert drawn(scene, mask=Image.new("L", scene.mask.size)) == "a mask that is not in one piece"
    assert drawn(scene, mask=half) == "a mask of another shape"
    assert drawn(scene, mask=Image.new("L", scene.mask.size, 255)) == "a mask of another size"


def test_a_picture_of_two_things_is_not_taken_with_their_places_changed():
    scene = mini.render(400_000, things=2)
    left, right = scene.things
    changed = scene.swap(right.noun, right.colour, 0).swap(left.noun, left.colour, 1)
    assert drawn(scene, image=changed.image) == "not the things of the caption"


@pytest.mark.slow
def test_the_script_makes_the_generated_examples_that_are_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(make_benchmark, "MINI_SPLITS", {"test": (140_000, 4)})
    monkeypatch.setattr(sys, "argv", ["make_benchmark.py", "--output", str(tmp_path / "made.parquet")])
    make_benchmark.main()
    assert [file.name for file in tmp_path.iterdir()] == ["made.parquet"]
    made = pq.read_table(tmp_path / "made.parquet").to_pylist()
    shipped = pq.read_table(GENERATED_FILE).to_pylist()[:4]
    assert len(made) == 4
    # A sample that is not taken gives its place to the next free seed, which depends on how many are made.
    same = [(new, old) for new, old in zip(made, shipped, strict=True) if new["seed"] == old["seed"]]
    assert len(same) == 3
    for new, old in same:
        images, masks = (
            [np.asarray(Image.open(io.BytesIO(row.pop(name)["bytes"])), dtype=float) for row in (new, old)]
            for name in ("image", "mask")
        )
        # In batches of another size, and on other machines, sums are rounded otherwise.
        assert np.abs(images[0] - images[1]).mean() < 1
        # The set stays the one that its figures were measured on: its masks are an earlier mini CLIPSeg's.
        made_mask, shipped_mask = (mask > 0 for mask in masks)
        assert (made_mask & shipped_mask).sum() > 0.9 * (made_mask | shipped_mask).sum()
        assert new == old
