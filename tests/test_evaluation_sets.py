"""Examples from the sets that people hand out: PIE-Bench++ of the Hub, MagicBrush, and what was imported."""

import json

import numpy as np
import pytest
import small_import
import small_pairs
from PIL import Image
from small_import import FORMS, options, png, run, runs

from diffusers_iedit import cli
from diffusers_iedit.evaluation.data import load_examples
from diffusers_iedit.pairs import FEATURES


@pytest.fixture(scope="module")
def truth():
    return small_import.pairs(3)


def array(mask):
    return np.asarray(mask) > 127


def check(example, pair):
    """An example with the true captions and terms, and the set's instruction."""
    np.testing.assert_array_equal(example.image, pair.before.image)
    np.testing.assert_array_equal(example.target, pair.after.image)
    assert (example.source_caption, example.edit_prompt) == (pair.before.caption, pair.after.caption)
    assert (example.source_term, example.target_term) == (pair.before.thing.name, pair.after.thing.name)
    assert example.instruction == pair.instruction


# PIE-Bench++


SIZE = 512


def write_pie_bench_plus(folder, truth, **changes):
    """Two configurations as on the Hub, of one row and the others; `changes` are those of the last row."""
    rows = [
        {
            "image": png(pair.before.image.resize((SIZE, SIZE))),
            "id": f"{number:012}",
            "source_prompt": pair.before.caption.replace(pair.before.thing.name, f"[{pair.before.thing.name}]"),
            "target_prompt": pair.after.caption.replace(pair.after.thing.name, f"[{pair.after.thing.name}]"),
            "edit_action": "{}",
            "aspect_mapping": "{}",
            "blended_words": "[]",
            "mask": runs(array(Image.fromarray(pair.mask).resize((SIZE, SIZE)))),
        }
        for number, pair in enumerate(truth)
    ]
    rows[-1] |= changes
    lines = ["---", "configs:"]
    for name, some in (("0_random_1", rows[:1]), ("6_change_attribute_color_2", rows[1:])):
        small_import.write_parquet(folder / name, some, split="V1")
        lines += [f"- config_name: {name}", "  data_files:", "  - split: V1", f"    path: {name}/data/V1-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)


def test_pie_bench_plus_plus_of_the_hub_is_read_with_all_its_configurations(tmp_path, truth):
    examples = load_examples(write_pie_bench_plus(tmp_path, truth))
    assert [example.group for example in examples] == ["random", "change attribute color", "change attribute color"]
    assert len(set(examples.keys)) == 3
    for example, pair in zip(examples, truth, strict=True):
        assert (example.source_caption, example.edit_prompt) == (pair.before.caption, pair.after.caption)
        assert (example.source_term, example.target_term) == (pair.before.thing.name, pair.after.thing.name)
        assert example.instruction.startswith(f"turn the {pair.before.thing.name} into ")
        inside = (slice(1, -1), slice(1, -1))
        true = array(Image.fromarray(pair.mask).resize((SIZE, SIZE)))
        np.testing.assert_array_equal(array(example.mask)[inside], true[inside])
        assert example.target is None
    assert load_examples(str(tmp_path)).fingerprint == examples.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": "12 x"}, "mask has to be a list of integers"),
        ({"mask": f"{SIZE**2} 1"}, "mask has a run of 1 pixels from 262144"),
        ({"target_prompt": "[]"}, "a prompt is empty"),
        ({"image": png(Image.new("RGB", (64, 64)))}, "the mask is 512 x 512, but the image is 64 x 64"),
    ],
)
def test_a_row_of_pie_bench_plus_plus_that_does_not_fit_is_named(tmp_path, truth, changes, message):
    examples = load_examples(write_pie_bench_plus(tmp_path, truth, **changes))
    assert examples[1].group == "change attribute color"
    with pytest.raises(ValueError, match=rf"change-attribute-color-0002: .*{message}"):
        examples[2]


# MagicBrush


@pytest.fixture(scope="module")
def magicbrush(tmp_path_factory, truth):
    """Its form on the Hub, split dev."""
    return str(
        small_import.write_parquet(tmp_path_factory.mktemp("dev"), [FORMS["magicbrush"](p) for p in truth], "dev")
    )


def test_magicbrush_is_read_with_its_masks_and_captions_by_blip(magicbrush, truth):
    for example, pair in zip(load_examples(magicbrush, "dev", caption_model="mini"), truth, strict=True):
        check(example, pair)
        np.testing.assert_array_equal(array(example.mask), pair.mask)


def test_a_set_of_instructions_without_a_captioner_says_what_is_missing(magicbrush):
    with pytest.raises(ValueError, match=r"has no captions .* an instruction is none: pass `caption_model`"):
        load_examples(magicbrush, "dev")


def write_sessions(folder, truth):
    """MagicBrush's test set as it is handed out: two pictures, of which the second has two turns."""
    sessions, descriptions = {}, {}
    for key, turns in (("7", truth[:1]), ("12", truth[1:])):
        sessions[key], descriptions[key] = [], {}
        (folder / "images" / key).mkdir(parents=True)
        for number, pair in enumerate(turns, 1):
            names = {"input": f"{key}-input{number}.png", "mask": f"{key}-mask{number}.png"}
            names["output"] = f"{key}-output{number}.png"
            pair.before.image.save(folder / "images" / key / names["input"])
            small_import.transparent(pair).save(folder / "images" / key / names["mask"])
            pair.after.image.save(folder / "images" / key / names["output"])
            sessions[key].append(names | {"instruction": pair.instruction})
            descriptions[key] |= {names["input"]: pair.before.caption, names["output"]: pair.after.caption}
    (folder / "edit_sessions.json").write_text(json.dumps(sessions))
    (folder / "global_descriptions.json").write_text(json.dumps(descriptions))
    return str(folder)


def test_the_test_set_of_magicbrush_has_captions_of_its_own(tmp_path, truth):
    examples = load_examples(write_sessions(tmp_path, truth))
    for example, pair in zip(examples, truth, strict=True):
        check(example, pair)
        np.testing.assert_array_equal(array(example.mask), pair.mask)
    (tmp_path / "global_descriptions.json").unlink()
    with pytest.raises(ValueError, match="has no captions"):
        load_examples(str(tmp_path))


@pytest.mark.parametrize("sessions", ["{", '{"7": [{"input": "7-input.png"}]}', "[1]"])
def test_sessions_of_another_form_are_one_line(tmp_path, truth, sessions):
    write_sessions(tmp_path, truth)
    (tmp_path / "edit_sessions.json").write_text(sessions)
    with pytest.raises(ValueError, match=f"{tmp_path} is not MagicBrush's test set: .*") as told:
        load_examples(str(tmp_path))
    assert "\n" not in str(told.value)


def test_a_picture_outside_of_the_set_is_refused(tmp_path, truth):
    folder = tmp_path / "set"
    write_sessions(folder, truth)
    sessions = json.loads((folder / "edit_sessions.json").read_text())
    sessions["7"][0]["input"] = "../../../private.png"
    truth[0].before.image.save(tmp_path / "private.png")
    (folder / "edit_sessions.json").write_text(json.dumps(sessions))
    with pytest.raises(ValueError, match="of a set only its own files are read"):
        load_examples(str(folder))


# Others


def test_a_set_without_masks_is_edited_where_its_pictures_differ(tmp_path, truth):
    source = small_import.write_parquet(tmp_path, [FORMS["instructpix2pix"](pair) for pair in truth])
    for example, pair in zip(load_examples(str(source)), truth, strict=True):
        check(example, pair)
        assert (array(example.mask) & pair.mask).sum() / (array(example.mask) | pair.mask).sum() >= 0.9


def test_rows_that_are_left_out_are_said(tmp_path, truth, caplog):
    rows = [FORMS["instructpix2pix"](pair) for pair in truth]
    rows[1]["edited_image"] = rows[1]["original_image"]
    examples = load_examples(str(small_import.write_parquet(tmp_path, rows)))
    assert len(examples) == 2
    assert "1 rows are left out: {'unchanged': 1}" in caplog.text


def test_an_imported_set_keeps_its_instructions(tmp_path, truth):
    source = small_import.write_parquet(tmp_path / "set", [FORMS["ultraedit"](pair) for pair in truth])
    run(tmp_path / "pairs", options(source, similarity=False))
    for example, pair in zip(load_examples(str(tmp_path / "pairs")), truth, strict=True):
        assert example.instruction == pair.instruction
        assert example.edit_prompt == pair.after.caption
        np.testing.assert_array_equal(array(example.mask), pair.mask)


def test_a_set_without_similarity_is_evaluated(tmp_path):
    columns = [name for name in FEATURES if name != "similarity"]
    pairs = small_pairs.write_pairs(tmp_path / "pairs", small_pairs.make_rows(2), columns)
    assert len(load_examples(str(pairs))) == 2


def test_methods_that_are_given_a_mask_get_the_sets(tmp_path, magicbrush, truth, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    argv = ["evaluate", "--data", magicbrush, "--split", "dev", "--caption-model", "mini", "--num-examples", "1"]
    argv += ["--output-dir", str(tmp_path / "out"), "--model", "mini", "--methods", "iedit-given", "--steps", "4"]
    assert cli.main([*argv, "--metrics", "psnr_to_target"]) == 0
    edited = Image.open(next((tmp_path / "out/images").glob("iedit-given*/edit-000000.png")))
    changed = (np.asarray(edited) != np.asarray(truth[0].before.image)).any(-1)
    assert changed.any()
    assert not (changed & ~truth[0].mask).any()
