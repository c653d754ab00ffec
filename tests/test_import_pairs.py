"""The import of editing sets: each public form, what is filled in, masks of any convention, and going on."""

import io
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import small_import
from PIL import Image
from small_import import FORMS, options, png, run, runs

from diffusers_iedit import mini
from diffusers_iedit.finetuning.data import PairStream
from diffusers_iedit.pairs import FEATURES, load_pairs, validate
from diffusers_iedit.pairs.columns import SETS, recognise
from diffusers_iedit.pairs.importing import find_masks
from diffusers_iedit.pairs.masks import difference_mask, read_mask
from diffusers_iedit.pairs.options import SegmentOptions


@pytest.fixture(scope="module")
def truth():
    return small_import.pairs()


@pytest.fixture(scope="module")
def sets(tmp_path_factory, truth):
    """A set in each public form, as parquet, by the name of its format: not to be changed."""
    folder = tmp_path_factory.mktemp("sets")
    return {
        name: small_import.write_parquet(folder / name, [form(pair) for pair in truth]) for name, form in FORMS.items()
    }


@pytest.fixture(scope="module")
def imports(tmp_path_factory, sets):
    """What an import makes of each: not to be changed."""
    folder = tmp_path_factory.mktemp("imports")
    for name, source in sets.items():
        run(folder / name, options(source, format=name))
    return {name: folder / name for name in sets}


@pytest.fixture(params=list(FORMS))
def imported(request, imports):
    return imports[request.param]


def report(output_dir):
    return json.loads((output_dir / "report.json").read_text())


def files(output_dir):
    return {file.name: file.read_bytes() for file in (output_dir / "data").iterdir()}


def read(source, **changes):
    """The rows that an import reads, and what it leaves out."""
    chosen = options(source, **changes)
    collection, dropped = chosen.read.collections()["source"], Counter()
    return list(collection.rows(collection.open(), chosen.read, dropped)), dict(dropped)


def iou(mask, other):
    return (mask & other).sum() / (mask | other).sum()


def array(mask):
    return np.asarray(mask) > 127


def opened(encoded):
    return Image.open(io.BytesIO(encoded))


# What an import leaves


def test_an_imported_set_is_one_that_training_takes(imported):
    assert validate(imported) == []
    pairs = load_pairs(imported)
    assert pairs.column_names == list(FEATURES)
    sample = PairStream(pairs, 64).sample(0, (0.5, 0.5), False)
    assert sample["source_mask"].shape == (1, 64, 64)


def test_pictures_captions_and_terms_are_the_true_ones(imported, truth):
    rows = list(load_pairs(imported))
    assert len(rows) == len(truth)
    for row, pair in zip(rows, truth, strict=True):
        np.testing.assert_array_equal(row["source_image"], pair.before.image)
        np.testing.assert_array_equal(row["target_image"], pair.after.image)
        # An instruction is no caption: where the set has nothing else, the captioner wrote it.
        assert (row["source_caption"], row["edit_prompt"]) == (pair.before.caption, pair.after.caption)
        assert difference_is(row, pair)


def difference_is(row, pair):
    """Whether the terms name the things; of "a red car" and "a blue car" all that follows the noun is the same."""
    return (row["source_term"], row["target_term"]) == (pair.before.thing.name, pair.after.thing.name)


def test_masks_are_the_sets_or_what_differs(imports, truth):
    for name, folder in imports.items():
        of_set = bool(SETS[name].mask)
        assert report(folder)["masks"] == {"set" if of_set else "difference": len(truth)}
        for row, pair in zip(load_pairs(folder), truth, strict=True):
            for mask in (row["source_mask"], row["target_mask"]):
                assert iou(array(mask), pair.mask) >= (1 if of_set else 0.9)


def test_the_instructions_are_kept_beside_the_prompts(imported, truth):
    (file,) = (imported / "data").iterdir()
    assert pq.read_table(file)["instruction"].to_pylist() == [pair.instruction for pair in truth]


def test_the_similarity_is_that_of_the_query_and_the_target(imported):
    # The target shows what the prompt says and is like the source in all else.
    assert all(0.5 < row["similarity"] < 1 for row in load_pairs(imported))


def test_without_similarity_the_column_is_not_there(tmp_path, sets):
    run(tmp_path / "pairs", options(sets["ultraedit"], similarity=False))
    assert load_pairs(tmp_path / "pairs").column_names == [name for name in FEATURES if name != "similarity"]
    assert validate(tmp_path / "pairs") == []


def test_the_report_adds_up_and_the_card_says_where_everything_is_from(imported, truth):
    numbers, card = report(imported), (imported / "README.md").read_text()
    assert numbers["rows_in"] == numbers["rows_out"] + sum(numbers["dropped"].values()) == len(truth)
    for stage in numbers["stages"].values():
        assert stage["rows_in"] == stage["rows_out"] + sum(stage["dropped"].values())
    captions = "by `mini`" if "prompt" not in numbers["columns"] else f"the column `{numbers['columns']['prompt']}`"
    assert f"edit prompts {captions}" in card.replace("from the", "the")
    assert str(imported.parent) not in card


# Where sets are read from


WRITERS = {
    "parquet": small_import.write_parquet,
    "image folder": small_import.write_image_folder,
    "arrow": small_import.write_arrow,
    "arrow with splits": small_import.write_arrow_splits,
    "webdataset": small_import.write_webdataset,
}


@pytest.mark.parametrize("name", ["instructpix2pix", "magicbrush", "ultraedit", "nhr-edit"])
@pytest.mark.parametrize("kind", list(WRITERS))
def test_every_form_is_read_from_every_kind_of_files(tmp_path, sets, truth, kind, name):
    rows, dropped = read(WRITERS[kind](tmp_path / "set", [FORMS[name](pair) for pair in truth]))
    assert rows == read(sets[name], format=name)[0]
    assert dropped == {}


def test_the_files_that_nhr_edit_names_are_its_pictures(tmp_path, sets, truth):
    rows = [FORMS["nhr-edit"](pair) for pair in truth]
    named = [{"source": r["source_image"], "edited": r["edited_image"], **r} for r in rows]
    for row in named:
        del row["source_image"], row["edited_image"]
    folder = small_import.write_image_folder(tmp_path / "set", named)
    assert "source_file_name" in (folder / "metadata.jsonl").read_text()
    assert read(folder, format="nhr-edit")[0] == read(sets["nhr-edit"])[0]


def test_a_list_of_instructions_counts_as_its_first(sets, truth):
    rows = read(sets["omniedit"])[0]
    assert [row["instruction"] for row in rows] == [pair.instruction for pair in truth]


def test_the_columns_of_a_public_set_tell_which_it_is():
    for name, form in FORMS.items():
        assert recognise(form(small_import.Pair(0))) == name
    assert recognise(["image", "text"]) is None


def test_the_only_split_is_taken_whatever_it_is_called(tmp_path, truth):
    folder = small_import.write_parquet(tmp_path, [FORMS["ultraedit"](truth[0])], split="test")
    assert len(read(folder)[0]) == 1
    with pytest.raises(ValueError, match="`source_split` 'dev' is none of its splits: test"):
        read(folder, source_split="dev")


def test_a_set_with_several_configurations_is_told_which(tmp_path, truth):
    lines = ["---", "configs:"]
    for number, name in enumerate(("plain", "fancy")):
        small_import.write_parquet(tmp_path / name, [FORMS["ultraedit"](truth[number])])
        lines += [f"- config_name: {name}", f"  data_files: {name}/data/*.parquet"]
    (tmp_path / "README.md").write_text("\n".join([*lines, "---", ""]))
    assert read(tmp_path, source_config="fancy")[0][0]["prompt"] == truth[1].after.caption
    with pytest.raises(ValueError, match=r"cannot be opened: Config name is missing.*plain.*fancy") as told:
        read(tmp_path)
    assert "\n" not in str(told.value)


def test_other_sets_say_what_their_columns_hold(tmp_path, truth):
    rows = [
        {
            "a": png(pair.before.image),
            "b": png(pair.after.image),
            "c": pair.after.caption,
            "d": pair.instruction,
            "e": pair.before.caption,
            "f": runs(pair.mask),
        }
        for pair in truth
    ]
    columns = {"source": "a", "target": "b", "prompt": "c", "instruction": "d", "caption": "e", "mask": "f"}
    found, _ = read(
        small_import.write_parquet(tmp_path, rows), **{f"{role}_column": name for role, name in columns.items()}
    )
    for row, pair in zip(found, truth, strict=True):
        assert (row["caption"], row["prompt"]) == (pair.before.caption, pair.after.caption)
        assert row["instruction"] == pair.instruction
        np.testing.assert_array_equal(array(opened(row["mask"])), pair.mask)


def test_pictures_may_be_files_that_texts_name(tmp_path, truth):
    for name, scene in (("a.png", truth[0].before), ("b.png", truth[0].after)):
        scene.image.save(tmp_path / name)
    datasets.Dataset.from_dict({"a": ["a.png"], "b": ["b.png"]}).to_parquet(tmp_path / "set.parquet")
    (row,), _ = read(tmp_path / "set.parquet", source_column="a", target_column="b")
    np.testing.assert_array_equal(array(opened(row["image"])), array(truth[0].before.image))
    np.testing.assert_array_equal(array(opened(row["target"])), array(truth[0].after.image))


def write_folder(folder, truth, texts):
    folder.mkdir()
    for number, (pair, text) in enumerate(zip(truth, texts, strict=True)):
        pair.before.image.save(folder / f"{number}_before.png")
        pair.after.image.save(folder / f"{number}_after.webp", lossless=True)
        (folder / f"{number}.txt").write_text(text)
    return folder


def test_a_folder_of_pairs_has_captions_of_the_second_picture(tmp_path, truth):
    folder = write_folder(tmp_path / "set", truth, [f"{pair.after.caption}\n" for pair in truth])
    run(tmp_path / "pairs", options(folder))
    for row, pair in zip(load_pairs(tmp_path / "pairs"), truth, strict=True):
        assert (row["source_caption"], row["edit_prompt"]) == (pair.before.caption, pair.after.caption)
        assert iou(array(row["source_mask"]), pair.mask) >= 0.9


def test_a_folder_of_pairs_has_instructions_where_that_is_said(tmp_path, truth):
    folder = write_folder(tmp_path / "set", truth, [pair.instruction for pair in truth])
    rows = read(folder, instruction_column="txt")[0]
    assert [(row["prompt"], row["instruction"]) for row in rows] == [(None, pair.instruction) for pair in truth]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_folder_of_pairs_has_texts_as_editors_write_them(tmp_path, truth, encoding):
    folder = write_folder(tmp_path / "set", truth[:1], [""])
    (folder / "0.txt").write_text("ein süßer Hund", encoding=encoding)
    assert [row["prompt"] for row in read(folder)[0]] == ["ein süßer Hund"]


def test_a_folder_of_pairs_may_have_masks(tmp_path, truth):
    folder = write_folder(tmp_path / "set", truth[:1], ["a caption"])
    small_import.white(truth[0]).save(folder / "0_mask.png")
    np.testing.assert_array_equal(array(opened(read(folder)[0][0]["mask"])), truth[0].mask)


def test_a_pair_without_its_second_picture_is_left_out_and_counted(tmp_path, truth):
    folder = write_folder(tmp_path / "set", truth[:2], ["", ""])
    (folder / "0_after.webp").unlink()
    rows, dropped = read(folder)
    assert len(rows) == 1
    assert dropped == {"target_missing": 1}


def test_of_a_folder_of_pairs_only_files_are_pairs(tmp_path, truth):
    folder = write_folder(tmp_path / "set", truth[:1], ["a caption"])
    for name in ("1_before.png", "1_after.png", "1.txt"):
        (folder / name).mkdir()
    rows, dropped = read(folder)
    assert len(rows) == 1
    assert not dropped


def test_pictures_that_are_called_otherwise_are_no_folder_of_pairs(tmp_path, truth):
    truth[0].before.image.save(tmp_path / "old.png")
    with pytest.raises(ValueError, match=r"`target_column`\. Pairs of picture files are called a_before.png"):
        read(tmp_path)


# What is left out


def test_rows_that_cannot_serve_are_counted_by_reason(tmp_path, truth):
    form = FORMS["ultraedit"]
    damaged = {"bytes": b"no picture", "path": None}
    rows = [
        form(truth[0]),
        form(truth[0]),
        form(truth[1]) | {"source_image": damaged},
        form(truth[1]) | {"edited_image": damaged},
        form(truth[2]) | {"edited_image": png(truth[2].before.image)},
        form(truth[2]) | {"mask_image": damaged},
        form(truth[2]) | {"mask_image": png(Image.new("L", (64, 32), 255))},
        form(truth[3]) | {"target_caption": truth[3].before.caption},
        form(truth[4]) | {"target_caption": ""},
        form(truth[4]) | {"source_caption": "in a", "target_caption": "on the"},
        form(truth[4]) | {"source_caption": 20 * "very " + "red", "target_caption": 20 * "very " + "blue"},
        form(truth[5]) | {"mask_image": png(Image.fromarray(255 - np.uint8(255 * truth[5].mask)))},
    ]
    numbers = run(tmp_path / "pairs", options(small_import.write_parquet(tmp_path / "set", rows), similarity=False))
    assert numbers["dropped"] == {
        "source_unreadable": 1,
        "target_unreadable": 1,
        "unchanged": 1,
        "mask_unreadable": 1,
        "mask_other_aspect": 1,
        "duplicate": 1,
        "same_captions": 1,
        "no_prompt": 1,
        "no_term": 1,
        "edit_cut_off": 1,
        "mask_elsewhere": 1,
    }
    assert (numbers["rows_in"], numbers["rows_out"]) == (12, 1)


def test_one_row_is_a_set(tmp_path, truth):
    source = small_import.write_parquet(tmp_path / "set", [FORMS["ultraedit"](truth[0])])
    assert run(tmp_path / "pairs", options(source, similarity=False))["rows_out"] == 1
    assert validate(tmp_path / "pairs") == []


# Masks


@pytest.mark.parametrize(
    ("convention", "mask"),
    [
        ("white", lambda pair: small_import.white(pair)),
        ("white", lambda pair: small_import.white(pair).convert("1")),
        ("white", lambda pair: Image.fromarray(pair.mask.astype(np.uint8))),
        ("white", lambda pair: Image.fromarray(pair.mask.astype(np.int32) * 65535)),
        ("white", lambda pair: small_import.white(pair).resize((128, 128), Image.Resampling.NEAREST)),
        ("black", lambda pair: Image.fromarray(np.where(pair.mask, 0, 255).astype(np.uint8))),
        ("transparent", small_import.transparent),
        ("transparent", lambda pair: small_import.white(pair)),
        ("painted", lambda pair: Image.merge("LA", (Image.new("L", (64, 64)), small_import.white(pair).convert("L")))),
    ],
)
def test_a_mask_is_read_by_its_convention(truth, convention, mask):
    found = read_mask(mask(truth[0]), truth[0].before.image, convention)
    assert (found.mode, found.size, set(np.unique(found))) == ("L", (64, 64), {0, 255})
    np.testing.assert_array_equal(array(found), truth[0].mask)


@pytest.mark.parametrize("convention", ["white", "transparent"])
def test_of_a_source_with_a_white_region_painted_over_only_that_region_is_the_mask(convention):
    # In the snow and with a white thing much of the source is white before.
    pair = small_import.Pair(next(n for n in range(10**6) if mini.render(n, things=1).scene == "in deep snow"))
    painted = pair.before.image.copy()
    painted.paste("white", mask=Image.fromarray(pair.mask))
    painted.paste("white", (0, 0, 4, 4))
    source = pair.before.image.copy()
    source.paste("white", (0, 0, 4, 4))
    found = read_mask(painted, source, convention)
    assert iou(array(found), pair.mask) > 0.95
    assert not array(found)[:4, :4].any()


@pytest.mark.parametrize(
    ("convention", "mask", "message"),
    [
        ("white", small_import.transparent, "`mask_convention` is white, but a mask has transparency"),
        ("black", small_import.transparent, "`mask_convention` is black, but a mask has transparency"),
        ("painted", small_import.white, "`mask_convention` is painted, but a mask has no transparency"),
    ],
)
def test_a_mask_of_another_convention_is_an_error_that_names_the_option(truth, convention, mask, message):
    with pytest.raises(ValueError, match=message):
        read_mask(mask(truth[0]), truth[0].before.image, convention)


def test_masks_that_mark_what_stays_are_an_error_that_names_the_option(tmp_path, truth):
    form = FORMS["ultraedit"]
    rows = [form(p) | {"mask_image": png(Image.fromarray(np.uint8(255 * ~p.mask)))} for p in truth]
    source = small_import.write_parquet(tmp_path / "set", rows)
    with pytest.raises(
        RuntimeError, match=r"No pair is left of 6 rows.*'mask_elsewhere': 6.*`mask_convention`"
    ) as told:
        run(tmp_path / "pairs", options(source, similarity=False))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "pairs/data").exists()
    numbers = run(tmp_path / "pairs", options(source, similarity=False, mask_convention="black"), redo="read")
    assert (numbers["rows_out"], numbers["masks"]) == (6, {"set": 6})


@pytest.mark.parametrize("value", [0, 255])
def test_a_mask_that_marks_nothing_or_everything_says_nothing(truth, value):
    pair = truth[0]
    pictures = (png(pair.before.image)["bytes"], png(pair.after.image)["bytes"])
    found = find_masks(*pictures, png(Image.new("L", (64, 64), value))["bytes"], SegmentOptions())
    assert found.origin == "difference"
    assert iou(array(opened(found.source)), pair.mask) >= 0.9


def noisy(image):
    noise = np.random.default_rng(0).normal(0, 4, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def compressed(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return Image.open(file)


def shifted(image):
    return Image.fromarray((np.asarray(image).astype(int) + np.array([9, -7, 5])).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("change", [None, noisy, compressed, shifted])
def test_what_differs_is_found_in_spite_of_noise_compression_and_other_colours(change):
    ious = []
    for pair in small_import.pairs(8):
        source, target = (
            scene.image.resize((256, 256), Image.Resampling.BICUBIC) for scene in (pair.before, pair.after)
        )
        found = difference_mask(source, change(target) if change else target)
        true = np.asarray(Image.fromarray(pair.mask).resize((256, 256), Image.Resampling.NEAREST))
        ious.append(iou(found, true))
    assert np.mean(ious) >= 0.9
    assert min(ious) > 0.7


def test_noise_alone_is_no_difference(truth):
    image = truth[0].before.image
    assert not difference_mask(image, noisy(image)).any()


def test_pictures_of_another_aspect_are_compared_by_what_clipseg_finds(tmp_path, truth):
    form = FORMS["instructpix2pix"]
    rows = [
        form(pair) | {"edited_image": png(pair.after.image.crop((0, 0, 64, 60)).resize((80, 64)))} for pair in truth
    ]
    numbers = run(
        tmp_path / "pairs",
        options(small_import.write_parquet(tmp_path / "set", rows), similarity=False),
    )
    assert numbers["masks"] == {"clipseg": numbers["rows_out"]}
    assert numbers["rows_out"] >= 4
    assert validate(tmp_path / "pairs") == []
    row = load_pairs(tmp_path / "pairs")[0]
    assert row["target_mask"].size == row["target_image"].size == (80, 64)
    assert iou(array(row["source_mask"]), np.asarray(truth[0].before.mask) > 0) > 0.7


# Bad input


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("magicbrush", {"caption_model": "/no/such"}, "`caption_model` '/no/such'"),
        ("magicbrush", {"format": "ultraedit"}, "`format` ultraedit does not fit source .*mask_img.*`source_column`"),
        ("magicbrush", {"prompt_column": "pigs"}, "`prompt_column` 'pigs' is no column of source"),
        (
            "ultraedit",
            {"source_column": "source_image", "target_column": "source_image"},
            "`source_column` and `target_column` are both 'source_image' of source",
        ),
        ("magicbrush", {"prompt_column": "turn_index"}, "`prompt_column` 'turn_index' has to hold text, but holds"),
        ("magicbrush", {"mask_column": "turn_index"}, "`mask_column` 'turn_index' has to hold images or runs"),
        ("magicbrush", {"mask_column": "instruction"}, "No pair is left|No image of the source is fit"),
        ("ultraedit", {"min_mask_area": 0.8}, r"No pair is left of 6 rows. Left out: \{'source_mask_empty': 6\}"),
    ],
)
def test_bad_input_is_an_error_of_one_line(tmp_path, sets, name, changes, message):
    with pytest.raises((ValueError, RuntimeError), match=message) as told:
        run(tmp_path / "pairs", options(sets[name], **({"similarity": False} | changes)))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "pairs/data").exists()


def test_instructions_that_are_given_as_prompts_are_an_error_that_names_the_option(tmp_path, sets):
    chosen = options(sets["instructpix2pix"], prompt_column="edit_prompt", similarity=False)
    with pytest.raises(ValueError, match=r"`prompt_column` 'edit_prompt' holds instructions, such as 'make it a .*'"):
        run(tmp_path / "pairs", chosen)


def test_a_set_without_known_columns_says_what_to_pass(tmp_path):
    folder = small_import.write_parquet(tmp_path / "set", [{"picture": png(Image.new("RGB", (64, 64))), "text": "a"}])
    with pytest.raises(ValueError, match=r"No known format fits .*picture, text.*`source_column` and `target_column`"):
        run(tmp_path / "pairs", options(folder))


def test_an_import_is_not_taken_for_a_build(tmp_path, sets, imports):
    from small_build import build
    from small_build import options as build_options

    copy = shutil.copytree(imports["ultraedit"], tmp_path / "pairs")
    with pytest.raises(ValueError, match="does not hold a build"):
        build(copy, build_options(sets["ultraedit"], image_column="source_image"))


# Going on


class Killed(BaseException):
    pass


def test_an_import_stopped_again_and_again_ends_with_the_same_bytes(tmp_path, sets, imports):
    replace_file = os.replace
    stops = 0
    # Few files get their names in each run: what is finished is not done again, or it would never end.
    while not (tmp_path / "pairs/report.json").exists() and stops < 20:
        seen = 0

        def deadly(source, target):
            nonlocal seen
            seen += 1
            if seen > 9:
                raise Killed
            replace_file(source, target)

        try:
            with mock.patch("os.replace", deadly):
                run(tmp_path / "pairs", options(sets["ultraedit"], format="ultraedit"))
        except Killed:
            stops += 1
            assert not (tmp_path / "pairs/report.json").exists()
    assert 2 <= stops < 20
    assert files(tmp_path / "pairs") == files(imports["ultraedit"])
    assert report(tmp_path / "pairs")["dropped"] == report(imports["ultraedit"])["dropped"]


def test_another_option_is_an_error_unless_its_stage_is_redone(tmp_path, sets, imports):
    copy = Path(shutil.copytree(imports["ultraedit"], tmp_path / "pairs"))
    changed = options(sets["ultraedit"], format="ultraedit", min_mask_iou=0.5)
    with pytest.raises(ValueError, match=r"was begun with `min_mask_iou` = 0.0, but now it is 0.5.*--redo mask"):
        run(copy, changed)
    assert run(copy, changed, redo="mask")["rows_out"] == small_import.COUNT


# The command


def command(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["import_pairs.py", *map(str, argv)])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    small_import.script.main()


def test_the_command_imports_and_says_what_became_of_the_rows(tmp_path, sets, imports, monkeypatch, capsys):
    argv = small_import.arguments(sets["ultraedit"], tmp_path / "pairs", "--format", "ultraedit")
    command(monkeypatch, *argv)
    printed = capsys.readouterr().out
    assert f"6 pairs from 6 rows in {tmp_path / 'pairs'}" in printed
    assert "columns: source = source_image, target = edited_image, prompt = target_caption" in printed
    assert "masks: 6 from set" in printed
    assert files(tmp_path / "pairs") == files(imports["ultraedit"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--shard_size", "0"], "import_pairs.py: error: `shard_size` has to be at least 1, but is 0."),
        (["--target_column", "pigs"], "import_pairs.py: error: `target_column` 'pigs' is no column of source"),
        (["--source", "/no/such"], "import_pairs.py: error: `source` '/no/such' "),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, sets, monkeypatch, wrong, said):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, *small_import.arguments(sets["ultraedit"], tmp_path / "pairs", *wrong))
    assert str(end.value).startswith(said)
    assert "\n" not in str(end.value)


SCRIPT = Path(small_import.script.__file__)


@pytest.mark.slow
def test_a_set_of_the_hub_is_imported_and_pushed(hub, tmp_path, sets, imports):
    hub.add("datasets", "me/edits", {f"data/{name}": content for name, content in files(sets["ultraedit"]).items()})
    argv = small_import.arguments("me/edits", tmp_path / "pairs", "--push_to_hub", "--hub_dataset_id", "me/pairs")
    result = hub.run([sys.executable, str(SCRIPT), *argv], OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    pushed = hub.repos["datasets"]["me/pairs"].files()
    assert {name for name in pushed if name.startswith("data/")} == {"data/train-00000-of-00001.parquet"}
    assert b"`me/edits`" in pushed["README.md"]
    assert pushed["data/train-00000-of-00001.parquet"] == files(imports["ultraedit"])["train-00000-of-00001.parquet"]
