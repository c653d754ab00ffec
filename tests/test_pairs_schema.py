"""The columns of a set of pairs: what `load_pairs` opens, and what `validate` finds."""

import importlib
import io
import json
import os
import shutil
import sys
import zipfile
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_models
from hub_server import files_in, output
from PIL import EpsImagePlugin, Image

from diffusers_iedit.pairs import FEATURES, load_pairs, validate


TEXTS = ("source_caption", "edit_prompt", "source_term", "target_term")


def mask(width, height, mode="L"):
    image = Image.new("L", (width, height))
    image.paste(255, (4, 4, 20, 20))
    return image.convert(mode)


def row(number=0):
    """A pair without a fault; its images differ in size."""
    noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return {
        "source_image": Image.fromarray(noise),
        "target_image": Image.fromarray(noise[:30, :35]),
        "source_caption": f"a red car number {number}",
        "edit_prompt": f"a blue car number {number}",
        "source_term": "red car",
        "target_term": "blue car",
        "source_mask": mask(50, 40),
        "target_mask": mask(35, 30),
        "similarity": 0.5,
    }


def dataset(rows, features=FEATURES):
    columns = {name: [each[name] for each in rows] for name in features}
    return datasets.Dataset.from_dict(columns, features=features)


def save(folder, pairs, split="train"):
    pairs.to_parquet(folder / f"{split}-00000.parquet")
    return folder


def encode(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def save_with_path(folder, path):
    """A set of one pair whose source image is not in the table, which names a file."""
    folder.mkdir(exist_ok=True)
    table = pq.read_table(save(folder, dataset([row()])) / "train-00000.parquet")
    rows = table.to_pylist()
    rows[0]["source_image"] = {"bytes": None, "path": str(path)}
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / "train-00000.parquet")
    return folder


def faults(**changes):
    """What is wrong with three rows of which the second is changed."""
    return validate(dataset([row(0), row(1) | changes, row(2)]))


@pytest.mark.parametrize("streaming", [False, True])
def test_load_pairs_gives_the_rows_of_a_folder(tmp_path, streaming):
    pairs = load_pairs(save(tmp_path, dataset([row(n) for n in range(10)])), streaming=streaming)
    assert isinstance(pairs, datasets.IterableDataset if streaming else datasets.Dataset)
    rows = list(pairs)
    assert [each["edit_prompt"] for each in rows] == [f"a blue car number {n}" for n in range(10)]
    np.testing.assert_array_equal(rows[3]["source_image"], row(3)["source_image"])
    np.testing.assert_array_equal(rows[3]["target_mask"], row(3)["target_mask"])
    assert rows[3]["target_mask"].mode == "L"


@pytest.mark.parametrize("streaming", [False, True])
def test_load_pairs_gives_the_columns_in_their_order_and_no_others(tmp_path, streaming):
    shuffled = dataset([row()]).select_columns(sorted(FEATURES)).add_column("url", ["http://a"])
    assert load_pairs(save(tmp_path, shuffled), streaming=streaming).column_names == list(FEATURES)


def test_load_pairs_opens_the_split_it_is_asked_for(tmp_path):
    save(tmp_path, dataset([row(0)]))
    save(tmp_path, dataset([row(1)]), "test")
    assert load_pairs(tmp_path, split="test")[0]["edit_prompt"] == "a blue car number 1"


def test_load_pairs_checks_the_first_rows_and_validate_all(tmp_path):
    rows = [row(n) for n in range(12)]
    rows[10]["source_term"] = ""
    save(tmp_path, dataset(rows))
    assert len(load_pairs(tmp_path)) == 12
    assert validate(tmp_path) == [f"{tmp_path}, row 10: `source_term` is empty."]


@pytest.mark.parametrize("streaming", [False, True])
def test_load_pairs_raises_with_a_line_for_each_fault(tmp_path, streaming):
    save(tmp_path, dataset([row() | {"source_term": " ", "similarity": 2.0}]))
    with pytest.raises(ValueError, match="no set of iEdit pairs") as error:
        load_pairs(tmp_path, streaming=streaming)
    assert len(str(error.value).splitlines()) == 3


def test_validate_finds_nothing_in_a_right_set(tmp_path):
    pairs = dataset([row(n) for n in range(3)])
    assert validate(pairs) == []
    assert validate(pairs.to_iterable_dataset()) == []
    assert validate(save(tmp_path, pairs)) == []


def test_more_columns_than_needed_are_fine_whatever_is_in_them():
    pairs = dataset([row()]).add_column("photo", [{"bytes": b"damaged", "path": None}])
    assert validate(pairs.cast_column("photo", datasets.Image())) == []


def test_other_types_for_the_same_things_are_fine():
    types = {name: datasets.Value("large_string") for name in TEXTS} | {"similarity": datasets.Value("float64")}
    assert validate(dataset([row()], datasets.Features(FEATURES | types))) == []


def test_several_columns_that_are_missing_are_one_fault_in_one_line(tmp_path):
    pairs = dataset([row()]).select_columns(["source_image", "similarity"])
    (fault,) = validate(pairs)
    assert fault.startswith("the pairs: columns `target_image`, `source_caption`, `edit_prompt`, ")
    assert " are missing; there are source_image, similarity. " in fault
    assert fault.endswith("training/import_pairs.py makes such a set.")
    with pytest.raises(ValueError, match=r"^This is no set of iEdit pairs: .* are missing; there are .*[.]$"):
        load_pairs(save(tmp_path, pairs))


def test_a_set_may_lack_the_similarity(tmp_path):
    pairs = dataset([row(n) for n in range(3)]).remove_columns("similarity")
    assert validate(pairs) == []
    for streaming in (False, True):
        loaded = load_pairs(save(tmp_path, pairs), streaming=streaming)
        assert loaded.column_names == [name for name in FEATURES if name != "similarity"]


def test_a_column_that_is_missing_is_one_fault():
    (fault,) = validate(dataset([row()]).remove_columns("edit_prompt"))
    assert fault.startswith("the pairs: column `edit_prompt` is missing; there are source_image, target_image,")


@pytest.mark.parametrize(
    ("name", "value", "feature"),
    [
        ("source_mask", b"png", datasets.Value("binary")),
        ("edit_prompt", 3, datasets.Value("int64")),
        ("edit_prompt", ["a", "b"], datasets.List(datasets.Value("string"))),
        ("similarity", "0.5", datasets.Value("string")),
        ("similarity", 1, datasets.Value("int64")),
    ],
)
def test_a_column_of_another_type_is_one_fault(name, value, feature):
    (fault,) = validate(dataset([row() | {name: value}], datasets.Features(FEATURES | {name: feature})))
    assert fault.startswith(f"the pairs: column `{name}` has to be ")
    assert fault.endswith(f", but is {feature}.")


def test_a_stream_without_types_is_one_fault():
    stream = datasets.IterableDataset.from_generator(lambda: iter([row()]))
    assert validate(stream) == [
        "the pairs: the columns are not known; a data set with a schema (parquet, arrow, a Hub id) is needed."
    ]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("text", ["", " \n", None])
def test_an_empty_text_is_one_fault(name, text):
    assert faults(**{name: text}) == [f"the pairs, row 1: `{name}` is empty."]


@pytest.mark.parametrize("name", ["source_image", "target_image", "source_mask", "target_mask"])
def test_an_image_that_is_missing_is_one_fault(name):
    assert faults(**{name: None}) == [f"the pairs, row 1: `{name}` is missing."]


@pytest.mark.parametrize("name", ["source_image", "target_image", "source_mask", "target_mask"])
@pytest.mark.parametrize("damage", ["garbage", "cut", "too large"])
def test_an_image_that_cannot_be_decoded_is_one_fault_and_the_rows_after_it_are_checked(name, damage):
    whole = datasets.Image().encode_example(row()["source_image"])["bytes"]
    large = whole[:16] + (2**16).to_bytes(4, "big") * 2 + whole[24:29]
    large += zlib.crc32(large[12:]).to_bytes(4, "big") + whole[33:]
    damaged = {"garbage": b"garbage", "cut": whole[: len(whole) // 2], "too large": large}
    rows = [row(0), row(1) | {name: {"bytes": damaged[damage], "path": None}}, row(2) | {"edit_prompt": ""}]
    first, second = validate(dataset(rows))
    assert first.startswith(f"the pairs, row 1: `{name}` cannot be decoded: ")
    assert second == "the pairs, row 2: `edit_prompt` is empty."


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_an_image_of_another_mode_is_one_fault(mode):
    found = faults(source_image=row(1)["source_image"].convert(mode))
    assert found == [f"the pairs, row 1: `source_image` has to be RGB, but has the PIL mode {mode}."]


@pytest.mark.parametrize("mode", ["1", "RGB", "LA"])
def test_a_mask_of_another_mode_is_one_fault(mode):
    (fault,) = faults(source_mask=mask(50, 40, mode))
    assert fault.startswith("the pairs, row 1: `source_mask` has to be 8-bit grey")
    assert fault.endswith(f"has mode {mode}.")


def test_a_mask_of_another_size_than_its_image_is_one_fault():
    assert faults(target_mask=mask(50, 40)) == [
        "the pairs, row 1: `target_mask` is 50 x 40, but `target_image` is 35 x 30."
    ]


@pytest.mark.parametrize("value", [0, 1, 127])
def test_a_mask_that_marks_nothing_is_one_fault(value):
    assert faults(source_mask=Image.new("L", (50, 40), value)) == [
        "the pairs, row 1: `source_mask` is black (255 = edit): it marks nothing to edit."
    ]


@pytest.mark.parametrize("similarity", [float("nan"), float("inf"), 1.01, -1.01, 31.0, None])
def test_a_similarity_that_is_no_cosine_is_one_fault(similarity):
    (fault,) = faults(similarity=similarity)
    assert fault.startswith("the pairs, row 1: `similarity` has to be a cosine in [-1, 1], but is ")


@pytest.mark.parametrize("similarity", [-1.0, 0.0, 1.0, np.nextafter(np.float32(1), np.float32(2))])
def test_a_cosine_may_be_rounded_beyond_one(similarity):
    assert faults(similarity=similarity) == []


def test_a_row_may_have_several_faults():
    assert len(faults(source_mask=Image.new("RGB", (3, 3)), edit_prompt="", similarity=None)) == 4


def test_a_set_without_rows_is_one_fault(tmp_path):
    assert validate(dataset([])) == ["the pairs: there are no rows."]
    with pytest.raises(ValueError, match="has no rows"):
        load_pairs(save(tmp_path, dataset([])), streaming=True)


@pytest.mark.parametrize("function", [load_pairs, validate])
@pytest.mark.parametrize("source", ["/nowhere/at/all", "nowhere/at"])
def test_a_folder_that_is_not_there_is_an_error_that_says_so(function, source):
    with pytest.raises(ValueError, match=f"'{source}', which is no folder here, cannot be opened: Couldn't "):
        function(source)


@pytest.mark.parametrize("function", [load_pairs, validate])
def test_a_split_that_is_not_there_is_an_error_that_says_so(tmp_path, function):
    save(tmp_path, dataset([row()]))
    with pytest.raises(ValueError, match=r"The split 'test' of .*train"):
        function(tmp_path, split="test")


@pytest.mark.parametrize("function", [load_pairs, validate])
def test_a_file_in_the_place_of_its_folder_is_an_error_that_says_so(tmp_path, function):
    save(tmp_path, dataset([row()]))
    (file,) = tmp_path.rglob("*.parquet")
    with pytest.raises(
        ValueError, match=f"^'{file}' is a file, and has to be the folder that it lies in, or a Hub id"
    ):
        function(file)


@pytest.mark.parametrize("function", [load_pairs, validate])
def test_a_folder_without_data_is_an_error_that_says_so(tmp_path, function):
    with pytest.raises(ValueError, match=r"cannot be opened: .* doesn't contain any data files"):
        function(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_parquet_file_is_an_error_that_says_so(tmp_path, streaming):
    (tmp_path / "train-00000.parquet").write_bytes(b"garbage" * 100)
    with pytest.raises(ValueError, match="cannot be opened"):
        load_pairs(tmp_path, streaming=streaming)


def test_a_folder_is_not_taken_for_another_one_of_its_name(tmp_path):
    for name, count in (("first", 1), ("second", 2)):
        folder = tmp_path / name / "pairs"
        folder.mkdir(parents=True)
        save(folder, dataset([row(number) for number in range(count)]))
    assert [len(load_pairs(tmp_path / name / "pairs")) for name in ("first", "second")] == [1, 2]


def test_a_folder_that_was_written_anew_is_read_anew(tmp_path):
    for count in (1, 2):
        assert len(load_pairs(save(tmp_path, dataset([row(number) for number in range(count)])))) == count


# What lies elsewhere


@pytest.fixture
def elsewhere(tmp_path):
    """A picture of the machine that is none of the set's, fit for its row, also in an archive."""
    folder = tmp_path / "private"
    folder.mkdir()
    row()["source_image"].save(folder / "photo.png")
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        archive.write(folder / "photo.png", "photo.png")
    (tmp_path / "pairs").mkdir()
    os.symlink(folder / "photo.png", tmp_path / "pairs" / "link.png")
    os.symlink(folder, tmp_path / "pairs" / "linked")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "path",
    [
        "{elsewhere}/photo.png",
        "../private/photo.png",
        "link.png",
        "linked/photo.png",
        "{pairs}/../private/photo.png",
        "{pairs}-not/photo.png",
        "file://{elsewhere}/photo.png",
        "zip://photo.png::{elsewhere}/photos.zip",
        "zip://photo.png::file://{elsewhere}/photos.zip",
        "simplecache::{elsewhere}/photo.png",
        "https://127.0.0.1:9/photo.png",
        "https://127.0.0.1:9::{pairs}/train-00000.parquet",
        "hf://datasets/someone/pictures@main/photo.png",
    ],
)
def test_a_picture_that_is_not_in_the_folder_of_the_set_is_not_read(tmp_path, elsewhere, path, streaming):
    path = path.format(elsewhere=elsewhere, pairs=tmp_path / "pairs")
    folder = save_with_path(tmp_path / "pairs", path)
    (fault,) = validate(folder)
    assert fault.startswith(
        f"{folder}, row 0: `source_image` cannot be decoded: it names the file {path}, which is not"
    )
    with pytest.raises(ValueError, match="of a set only its own files are read"):
        load_pairs(folder, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "path",
    ["images/photo.png", "{pairs}/images/photo.png", "images/../link.png", "zip://photo.png::{pairs}/photos.zip"],
)
def test_a_picture_in_the_folder_of_the_set_may_be_named_by_its_path(tmp_path, elsewhere, path, streaming):
    folder = tmp_path / "pairs"
    shutil.copytree(elsewhere, folder / "images")
    shutil.move(folder / "images" / "photos.zip", folder)
    (folder / "link.png").unlink()
    os.symlink(folder / "images" / "photo.png", folder / "link.png")
    save_with_path(folder, path.format(pairs=folder))
    assert validate(folder) == []
    (pair,) = load_pairs(folder, streaming=streaming)
    np.testing.assert_array_equal(pair["source_image"], row()["source_image"])


def test_a_picture_that_is_gone_is_a_fault(tmp_path):
    (fault,) = validate(save_with_path(tmp_path / "pairs", "gone.png"))
    assert "row 0: `source_image` cannot be decoded: " in fault
    assert "gone.png" in fault


def test_the_links_of_a_downloaded_snapshot_lead_to_its_own_files(tmp_path):
    snapshot = tmp_path / "datasets--me--pairs" / "snapshots" / "0123"
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    row()["source_image"].save(blobs / "4567", "PNG")
    os.symlink("../../blobs/4567", snapshot / "photo.png")
    assert validate(save_with_path(snapshot, "photo.png")) == []


def test_a_picture_elsewhere_is_found_in_any_row_before_a_copy_of_the_set_could_hold_it(tmp_path, elsewhere):
    folder = save(tmp_path / "pairs", dataset([row(number) for number in range(9)]))
    save_with_path(tmp_path / "one", elsewhere / "photo.png")
    shutil.move(tmp_path / "one" / "train-00000.parquet", folder / "train-00001.parquet")
    with pytest.raises(ValueError, match=r"pairs, row 9: `source_image` .* of a set only its own files are read"):
        load_pairs(folder)
    stream = iter(load_pairs(folder, streaming=True))
    with pytest.raises(ValueError, match="of a set only its own files are read"):
        list(stream)


def test_of_a_set_of_the_hub_its_own_pictures_are_read_and_no_others(tmp_path, elsewhere, hub):
    columns = {name: value for name, value in row().items() if not isinstance(value, Image.Image)}
    pictures = {name: encode(value) for name, value in row().items() if isinstance(value, Image.Image)}
    line = json.dumps(columns | {f"{name}_file_name": f"{name}.png" for name in pictures}).encode()
    hub.add("datasets", "me/folder", {f"{name}.png": png for name, png in pictures.items()} | {"metadata.jsonl": line})
    for name, path in {
        "private": elsewhere / "photo.png",
        "other": "hf://datasets/me/folder@main/source_image.png",
        "own": "hf://datasets/me/own@main/photo.png",
    }.items():
        folder = save_with_path(tmp_path / name, path)
        hub.add("datasets", f"me/{name}", files_in(folder) | {"photo.png": pictures["source_image"]})
    code = """
import json
from diffusers_iedit.pairs import load_pairs, validate
found = {}
for name in ("folder", "own", "private", "other"):
    for streaming in (False, True):
        try:
            pairs = list(load_pairs(f"me/{name}", streaming=streaming))
            found[f"{name} {streaming}"] = [list(pair["source_image"].size) for pair in pairs]
        except ValueError as error:
            found[f"{name} {streaming}"] = str(error).splitlines()[-1]
print(json.dumps(found))
"""
    found = json.loads(output(hub.run(code)))
    for streaming in (False, True):
        assert found[f"folder {streaming}"] == found[f"own {streaming}"] == [[50, 40]]
        for name in ("private", "other"):
            assert "of a set only its own files are read" in found[f"{name} {streaming}"]


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "TGA", "PDF"])
def test_a_picture_in_a_format_that_no_photograph_comes_in_is_a_fault(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    image = {"bytes": encode(row()["source_image"], kind), "path": None}
    expected = "row 0: `source_image` cannot be decoded: it is damaged, or none of JPEG, PNG,"
    (fault,) = validate(dataset([row() | {"source_image": image}]))
    assert expected in fault
    with pytest.raises(ValueError, match=expected):
        load_pairs(save(tmp_path, dataset([row() | {"source_image": image}])))


# Prompts


def test_the_same_prompt_twice_is_one_fault():
    assert faults(edit_prompt="a red  car number 1 ") == [
        "the pairs, row 1: `source_caption` and `edit_prompt` are the same: there is nothing to edit."
    ]


def test_prompts_that_differ_after_the_last_token_are_one_fault_to_those_who_name_the_tokenizer(tmp_path):
    # One token a letter.
    long = "a red car, and all around it so many other things that the edit comes after them: 12345678901234567890"
    pairs = dataset([row(), row(1) | {"source_caption": f"{long} day", "edit_prompt": f"{long} night"}])
    assert validate(pairs) == []
    tokenizer = tiny_models.tokenizer()
    expected = "row 1: `source_caption` and `edit_prompt` are the same tokens to the model, which takes 77"
    (fault,) = validate(pairs, tokenizer=tokenizer)
    assert expected in fault
    with pytest.raises(ValueError, match=expected):
        load_pairs(save(tmp_path, pairs), tokenizer=tokenizer)


# Tables


def rewrite(table, damage):
    if damage == "no rows":
        return table.slice(0, 0)
    if damage == "a column less":
        return table.drop_columns("similarity")
    if damage == "a column more":
        return table.append_column("url", pa.array(["http://a"] * len(table)))
    return table.set_column(table.schema.get_field_index("similarity"), "similarity", pa.array(["high"] * len(table)))


@pytest.mark.parametrize("open_set", [load_pairs, validate, lambda folder: load_pairs(folder, streaming=True)])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no bytes", "{file} is no whole Parquet file: Parquet file size is 0 bytes"),
        ("no rows", "{file} has no rows."),
        ("a column less", "{file} has no column similarity, but {first} of the same set has."),
        ("a column more", "{first} has no column url, but {file} of the same set has."),
        ("another type", "{file} has string in column similarity, but {first} of the same set has float."),
    ],
)
def test_a_table_that_does_not_go_with_the_others_is_named(tmp_path, capfd, open_set, damage, message):
    first, file = tmp_path / "train-00000.parquet", tmp_path / "train-00001.parquet"
    save(tmp_path, dataset([row(number) for number in range(9)]))
    if damage == "no bytes":
        file.touch()
    else:
        pq.write_table(rewrite(pq.read_table(first), damage), file)
    with pytest.raises(ValueError, match="cannot be opened") as error:
        open_set(tmp_path)
    reason = message.format(file=file, first=first)
    assert str(error.value) == f"The split 'train' of '{tmp_path}' cannot be opened: {reason}"
    assert "Failed to read" not in capfd.readouterr().err


def test_a_set_of_one_table_without_rows_names_it(tmp_path):
    save(tmp_path, dataset([]))
    with pytest.raises(ValueError, match=r"train-00000.parquet has no rows\.$"):
        load_pairs(tmp_path)


def test_tables_may_differ_in_what_datasets_casts(tmp_path):
    save(tmp_path, dataset([row()]))
    types = {name: datasets.Value("large_string") for name in TEXTS} | {"similarity": datasets.Value("float64")}
    other = dataset([row(1)], datasets.Features(FEATURES | types)).select_columns(sorted(FEATURES))
    other.to_parquet(tmp_path / "train-00001.parquet")
    assert validate(tmp_path) == []


def test_without_its_libraries_the_package_names_the_extra_that_brings_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.delitem(sys.modules, "diffusers_iedit.pairs")
    with pytest.raises(ImportError, match=r'needs nltk: pip install "diffusers-iedit\[data\]"'):
        importlib.import_module("diffusers_iedit.pairs")
