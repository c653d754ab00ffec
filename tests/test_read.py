"""Reading captioned images: every kind of source, images of every kind, and what damaged ones cost."""

import io
import json
import os
import tarfile
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import output
from PIL import Image

from diffusers_iedit.pairs.read import (
    ReadOptions,
    UnfitImageError,
    clean_text,
    first_occurrences,
    fit_image,
    read_rows,
)


def noise(seed=0, width=90, height=80):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(seed):
    return encode(noise(seed), "JPEG")


def opened(encoded):
    image = Image.open(io.BytesIO(encoded))
    image.load()
    return image


def read(source, **options):
    """Captions, images and what was dropped, read part by part as a build does."""
    options = ReadOptions(str(source), **options)
    collection = options.collections()["source"]
    stream, dropped, rows = collection.open(), Counter(), []
    for part in range(stream.num_shards):
        rows += read_rows(stream.shard(num_shards=stream.num_shards, index=part), collection, options, dropped)
    return rows, dict(dropped)


def captions(rows):
    return [row["caption"] for row in rows]


def error_of(source, **options):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the tests look at the message)
        read(source, **options)
    return str(error.value)


def write_tar(file, samples):
    """A webdataset tar of `{"name.jpg": bytes}` or of a number of good samples; returns the members' places."""
    if isinstance(samples, int):
        samples = {k: v for n in range(samples) for k, v in sample(n).items()}
    with tarfile.open(file, "w") as tar:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with tarfile.open(file) as tar:
        return {member.name: member for member in tar}


def sample(number):
    return {f"{number:03}.jpg": jpeg(number), f"{number:03}.txt": f"caption {number}".encode()}


def write_parquet(file, columns, **options):
    pq.write_table(pa.table(columns), file, **options)
    return file


# Sources


def test_a_folder_of_images_is_a_source_without_captions(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    rows, dropped = read(tmp_path)
    assert [row["image"] for row in rows] == [jpeg(0), jpeg(1), jpeg(2)]
    assert captions(rows) == [None] * 3
    assert dropped == {}


def test_a_folder_of_images_may_have_its_captions_in_metadata(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    lines = [json.dumps({"file_name": f"{n}.jpg", "text": f"caption {n}"}) for n in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert captions(read(tmp_path, caption_column="text")[0]) == ["caption 0", "caption 1"]


IMAGE_COLUMNS = {
    "binary": pa.array([jpeg(0), jpeg(1)], pa.binary()),
    "large_binary": pa.array([jpeg(0), jpeg(1)], pa.large_binary()),
    "struct": pa.array([{"bytes": jpeg(0), "path": None}, {"bytes": jpeg(1), "path": "1.jpg"}]),
    "struct without paths": pa.array([{"bytes": jpeg(0)}, {"bytes": jpeg(1)}]),
}


@pytest.mark.parametrize("images", IMAGE_COLUMNS.values(), ids=IMAGE_COLUMNS)
def test_parquet_holds_images_in_any_type_of_bytes(tmp_path, images):
    file = write_parquet(tmp_path / "a.parquet", {"picture": images, "alt": ["a", "b"], "width": [1, 2]})
    rows, _ = read(file, image_column="picture", caption_column="alt")
    assert [row["image"] for row in rows] == [jpeg(0), jpeg(1)]
    assert captions(rows) == ["a", "b"]


@pytest.mark.parametrize("in_struct", [True, False])
def test_parquet_may_name_images_by_path(tmp_path, in_struct):
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    paths = [str(tmp_path / "0.jpg"), str(tmp_path / "gone.jpg")]
    images = [{"bytes": None, "path": path} for path in paths] if in_struct else paths
    rows, dropped = read(write_parquet(tmp_path / "a.parquet", {"image": images}))
    assert [row["image"] for row in rows] == [jpeg(0)]
    assert dropped == {"missing": 1}


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_an_arrow_file_is_a_source(tmp_path, new):
    table = pa.table({"image": [jpeg(0), jpeg(1)], "text": ["a", "b"]})
    with new(str(tmp_path / "a.arrow"), table.schema) as out:
        out.write_table(table)
    assert captions(read(tmp_path / "a.arrow", caption_column="text")[0]) == ["a", "b"]


def test_a_tar_of_jpg_and_txt_is_a_source(tmp_path):
    write_tar(tmp_path / "a.tar", 3)
    rows, dropped = read(tmp_path / "a.tar", image_column="jpg", caption_column="txt")
    assert [row["image"] for row in rows] == [jpeg(0), jpeg(1), jpeg(2)]
    assert captions(rows) == ["caption 0", "caption 1", "caption 2"]
    assert dropped == {}


def test_of_a_tar_only_visible_files_of_a_sample_count(tmp_path):
    names = {"__pax": b"", "a/._000.jpg": b"", "a/000.jpg": jpeg(0), "a/000.json": b"{broken", "a/000.TXT": b"one"}
    write_tar(tmp_path / "a.tar", names | {"b/000.jpg": jpeg(1), "b/000.txt": b"two"})
    rows, dropped = read(tmp_path / "a.tar", image_column="jpg", caption_column="txt")
    assert captions(rows) == ["one", "two"]
    assert dropped == {}


def test_columns_that_are_not_asked_for_are_not_read(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"image": [jpeg(0)], "text": ["a"], "embedding": [[0.0] * 768]})
    collection = ReadOptions(str(tmp_path), caption_column="text").collections()["source"]
    assert collection.open().column_names == ["image", "text"]


def test_a_folder_of_several_files_is_read_file_by_file(tmp_path):
    for number in range(3):
        write_parquet(tmp_path / f"{number}.parquet", {"image": [jpeg(number)], "text": [str(number)]})
    assert ReadOptions(str(tmp_path)).collections()["source"].open().num_shards == 3
    assert captions(read(tmp_path, caption_column="text")[0]) == ["0", "1", "2"]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_patterns_choose_among_the_files_of_a_folder(tmp_path, kind):
    for number in range(12):
        if kind == "parquet":
            write_parquet(tmp_path / f"{number:03}.parquet", {"jpg": [jpeg(number)], "txt": [str(number)]})
        else:
            write_tar(tmp_path / f"{number:03}.tar", {"0.jpg": jpeg(number), "0.txt": str(number).encode()})
    chosen = {"source_files": [f"00[1-2].{kind}", f"01*.{kind}"], "image_column": "jpg", "caption_column": "txt"}
    assert captions(read(tmp_path, **chosen)[0]) == ["1", "2", "10", "11"]


@pytest.mark.parametrize("splits", [False, True])
def test_what_datasets_saved_to_disk_is_read(tmp_path, splits):
    images = [{"bytes": jpeg(number), "path": None} for number in range(3)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    saved = datasets.Dataset.from_dict({"image": images, "text": ["0", "1", "2"]}, features=features)
    (datasets.DatasetDict({"train": saved}) if splits else saved).save_to_disk(tmp_path / "saved")
    assert captions(read(tmp_path / "saved", caption_column="text")[0]) == ["0", "1", "2"]


def test_the_pool_may_be_another_collection_with_other_columns(tmp_path):
    write_tar(tmp_path / "a.tar", 1)
    write_parquet(tmp_path / "b.parquet", {"picture": [jpeg(5)]})
    options = ReadOptions(
        str(tmp_path / "a.tar"), image_column="jpg", caption_column="txt",
        pool=str(tmp_path / "b.parquet"), pool_image_column="picture",
    )  # fmt: skip
    collections = options.collections()
    rows = [list(read_rows(each.open(), each, options, Counter())) for each in collections.values()]
    assert list(collections) == ["source", "pool"]
    assert [row["image"] for (row,) in rows] == [jpeg(0), jpeg(5)]
    assert [row["caption"] for (row,) in rows] == ["caption 0", None]


def test_without_a_pool_there_is_one_collection():
    assert list(ReadOptions("somewhere").collections()) == ["source"]


@pytest.mark.parametrize("path", ["{folder}/private.jpg", "../private.jpg", "link.jpg", "file://{folder}/private.jpg"])
def test_a_path_that_leads_out_of_the_collection_stops_the_reading(tmp_path, path):
    (tmp_path / "private.jpg").write_bytes(jpeg(0))
    (tmp_path / "pool").mkdir()
    os.symlink(tmp_path / "private.jpg", tmp_path / "pool" / "link.jpg")
    path = path.format(folder=tmp_path)
    write_parquet(tmp_path / "pool" / "a.parquet", {"image": [{"bytes": None, "path": path}]})
    for source in (tmp_path / "pool", tmp_path / "pool" / "a.parquet"):
        error = error_of(source)
        assert error.startswith(
            f"`source` '{source}': a row cannot be read: it names the file {path}, which is not in"
        )


def test_images_that_are_links_out_of_a_folder_stop_the_reading(tmp_path):
    (tmp_path / "private.jpg").write_bytes(jpeg(0))
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "0.jpg").write_bytes(jpeg(1))
    os.symlink(tmp_path / "private.jpg", tmp_path / "pool" / "1.jpg")
    assert "1.jpg, which is not in" in error_of(tmp_path / "pool")


def test_a_file_name_in_the_metadata_may_not_lead_out_of_a_folder_either(tmp_path):
    (tmp_path / "private.jpg").write_bytes(jpeg(0))
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "0.jpg").write_bytes(jpeg(1))
    (tmp_path / "pool" / "metadata.jsonl").write_text('{"file_name": "../private.jpg", "text": "a"}')
    assert "../private.jpg" in error_of(tmp_path / "pool")


# What cannot be opened


@pytest.mark.parametrize("path", ["/nowhere/at/all", "nowhere/at"])
def test_a_source_that_is_not_there_is_named(path):
    assert error_of(path).startswith(f"`source` {path!r} cannot be opened: Couldn't")


def test_an_empty_folder_is_no_source(tmp_path):
    assert "`source`" in error_of(tmp_path)
    assert "doesn't contain any data files" in error_of(tmp_path)


def test_patterns_that_fit_no_file_are_an_error(tmp_path):
    write_tar(tmp_path / "a.tar", 1)
    assert "`source`" in error_of(tmp_path, source_files=["b*.tar"])


def test_a_file_of_another_kind_is_no_source(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"")
    assert "`source` has to end in .parquet, .arrow, .tar" in error_of(tmp_path / "a.zip")


def test_patterns_do_not_go_with_a_single_file(tmp_path):
    write_tar(tmp_path / "a.tar", 1)
    assert "`source_files` chooses among several files" in error_of(tmp_path / "a.tar", source_files=["*"])


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_split_that_is_not_there_is_an_error_with_those_that_are(tmp_path, kind):
    if kind == "tar":
        write_tar(tmp_path / "test.tar", 1)
    else:
        write_parquet(tmp_path / "test.parquet", {"image": [jpeg(0)]})
    assert "`source_split` 'val' is none of its splits: test." in error_of(tmp_path, source_split="val")


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize(
    ("option", "columns"), [("image_column", {"image_column": "png"}), ("caption_column", {"caption_column": "alt"})]
)
def test_a_column_that_is_not_there_is_an_error_with_those_that_are(tmp_path, kind, option, columns):
    if kind == "tar":
        write_tar(tmp_path / "a.tar", 1)
    else:
        write_parquet(tmp_path / "a.parquet", {"jpg": [jpeg(0)], "txt": ["a"]})
    message = error_of(tmp_path / f"a.{kind}", **({"image_column": "jpg"} | columns))
    assert message.startswith(f"`{option}` {columns[option]!r} is no column of source")
    assert message.endswith("its columns: jpg, txt.")


def test_the_pool_s_errors_name_the_pool_s_options(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"image": [jpeg(0)], "width": [1]})
    options = ReadOptions(str(file), pool=str(file), pool_image_column="picture")
    with pytest.raises(ValueError, match="`pool_image_column` 'picture' is no column of pool"):
        options.collections()["pool"].open()
    options = ReadOptions(str(file), pool=str(file), pool_split="test")
    with pytest.raises(ValueError, match="`pool_split` 'test'"):
        options.collections()["pool"].open()


def test_columns_of_another_type_are_an_error(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"image": [jpeg(0)], "width": [1], "texts": [["a", "b"]]})
    assert "`image_column` 'width' has to hold images, but holds Value('int64')" in error_of(
        file, image_column="width"
    )
    assert "`caption_column` 'texts' has to hold text" in error_of(file, caption_column="texts")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}, "b.parquet has no rows."),
        ({"image": [jpeg(1)]}, "b.parquet has no column text, but "),
        ({"image": [jpeg(1)], "text": ["b"], "url": ["c"]}, "a.parquet has no column url, but "),
        ({"image": [jpeg(1)], "text": [5]}, "b.parquet has int64 in column text, but "),
    ],
)
def test_a_table_that_does_not_go_with_the_others_is_named(tmp_path, columns, message):
    write_parquet(tmp_path / "a.parquet", {"image": [jpeg(0)], "text": ["a"]})
    write_parquet(tmp_path / "b.parquet", columns)
    error = error_of(tmp_path, caption_column="text")
    assert error.startswith(f"`source` '{tmp_path}' cannot be opened: {tmp_path}/{message}")
    assert "\n" not in error


def test_files_without_types_are_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("image,text\n0.jpg,a\n")
    assert "`source`" in error_of(tmp_path)
    assert "make parquet of it" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_size": 0}, "`min_size` has to be at least 1, but is 0"),
        ({"max_size": 0}, "`max_size` has to be at least 1"),
        ({"shard_size": 0}, "`shard_size` has to be at least 1"),
        ({"min_size": 100, "max_size": 99}, r"`max_size` \(99\) has to be at least `min_size` \(100\)"),
    ],
)
def test_sizes_that_make_no_sense_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        ReadOptions("somewhere", **options)


# Damage


def test_unfit_images_are_counted_by_reason_and_the_rest_is_read(tmp_path):
    images = [jpeg(0), None, b"", b"<html>gone</html>", jpeg(1)[:4000], encode(noise(width=63)), jpeg(2)]
    rows, dropped = read(write_parquet(tmp_path / "a.parquet", {"image": images}))
    assert [row["image"] for row in rows] == [jpeg(0), jpeg(2)]
    assert dropped == {"missing": 2, "unreadable": 1, "truncated": 1, "too_small": 1}


def test_broken_members_of_a_tar_cost_only_themselves(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        {"000.txt": b"no image"}
        | sample(1)
        | {"002.jpg": b"garbage", "002.txt": b"two"}
        | {"003.jpg": jpeg(3)}
        | {"004.jpg": jpeg(4), "004.txt": "caf\xe9 noir".encode("latin-1")}
        | sample(5),
    )
    rows, dropped = read(tmp_path / "a.tar", image_column="jpg", caption_column="txt")
    assert captions(rows) == ["caption 1", "", "caf\ufffd noir", "caption 5"]
    assert dropped == {"missing": 1, "unreadable": 1}


def test_a_sample_that_is_twice_in_a_tar_is_read_twice(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            for name, content in sample(0).items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert len(read(tmp_path / "a.tar", image_column="jpg")[0]) == 2


CUTS = {
    "within an image": ("002.jpg", lambda member: member.offset_data + 1000),
    "within a caption": ("002.txt", lambda member: member.offset_data + 3),
    "within a header": ("002.jpg", lambda member: member.offset + 100),
    "between two members": ("002.jpg", lambda member: member.offset),
    "within the padding": ("002.txt", lambda member: member.offset_data + 100),
}


@pytest.mark.parametrize(("name", "place"), CUTS.values(), ids=CUTS)
@pytest.mark.filterwarnings("ignore:The rest of a damaged file")
def test_a_tar_that_is_cut_off_keeps_its_whole_samples_and_is_counted(tmp_path, name, place):
    file = tmp_path / "0.tar"
    members = write_tar(file, 4)
    file.write_bytes(file.read_bytes()[: place(members[name])])
    write_tar(tmp_path / "1.tar", 1)
    rows, dropped = read(tmp_path, image_column="jpg", caption_column="txt")
    assert captions(rows) == ["caption 0", "caption 1", "caption 0"]
    assert dropped == {"damaged_file": 1}


@pytest.mark.filterwarnings("ignore:The rest of a damaged file")
def test_a_tar_with_a_garbled_header_is_counted_as_damaged(tmp_path):
    members = write_tar(tmp_path / "a.tar", 4)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    start = members["002.jpg"].offset
    content[start : start + 100] = b"x" * 100
    (tmp_path / "a.tar").write_bytes(content)
    rows, dropped = read(tmp_path / "a.tar", image_column="jpg", caption_column="txt")
    assert captions(rows) == ["caption 0", "caption 1"]
    assert dropped == {"damaged_file": 1}


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, bytes(100)], ids=["empty", "garbage", "short"])
def test_a_first_tar_that_is_damaged_is_counted_and_named_and_the_others_are_read(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    write_tar(tmp_path / "1.tar", 2)
    with pytest.warns(UserWarning, match="damaged file .*0.tar"):
        rows, dropped = read(tmp_path, image_column="jpg", caption_column="txt")
    assert captions(rows) == ["caption 0", "caption 1"]
    assert dropped == {"damaged_file": 1}


def test_a_source_of_damaged_tars_alone_is_an_error(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"garbage" * 1000)
    assert "`image_column` 'jpg' is no column" in error_of(tmp_path, image_column="jpg")


DAMAGED_TABLES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "bad first page or message": lambda content: content[:8] + b"\xff" * 60 + content[68:],
}


@pytest.mark.parametrize("damage", DAMAGED_TABLES.values(), ids=DAMAGED_TABLES)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.filterwarnings("ignore:The rest of a damaged file")
def test_a_damaged_table_is_counted_and_the_other_files_are_read(tmp_path, kind, damage):
    for number in range(3):
        table = pa.table({"image": [jpeg(number)] * 4, "text": [str(number)] * 4})
        file = tmp_path / f"{number}.{kind}"
        if kind == "parquet":
            pq.write_table(table, file, row_group_size=2)
        else:
            with pa.ipc.new_stream(str(file), table.schema) as out:
                out.write_table(table, max_chunksize=2)
    file = tmp_path / f"1.{kind}"
    file.write_bytes(damage(file.read_bytes()))
    rows, dropped = read(tmp_path, caption_column="text")
    assert Counter(captions(rows)) - Counter({"1": 2}) == {"0": 4, "2": 4}
    assert dropped == {"damaged_file": 1}


def test_a_first_table_that_is_damaged_is_an_error(tmp_path):
    (tmp_path / "0.parquet").write_bytes(b"garbage" * 1000)
    assert "`source`" in error_of(tmp_path / "0.parquet")


class Failing:
    """A stream that ends in an error after one row."""

    def __init__(self, error):
        self.error = error

    def __iter__(self):
        yield {"image": {"bytes": jpeg(0), "path": None}}
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Server Disconnected"),
        TimeoutError("timed out"),
        OSError(5, "Input/output error"),
        FileNotFoundError("hf://datasets/a/b/c.parquet"),
        EOFError("connection closed"),
        ValueError("json"),
        RuntimeError("Cannot send a request, as the client has been closed."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_is_no_damage_stops_the_reading(error):
    options, dropped = ReadOptions("somewhere"), Counter()
    with pytest.raises(type(error)):
        list(read_rows(Failing(error), options.collections()["source"], options, dropped))
    assert dropped == {}


def test_an_image_that_a_server_does_not_find_stops_the_reading(monkeypatch):
    monkeypatch.setattr("diffusers_iedit.pairs.read.set_roots", lambda source: ("/nowhere", "memory://"))
    options, dropped = ReadOptions("somewhere"), Counter()
    stream = [{"image": {"bytes": None, "path": "memory://gone.jpg"}}]
    with pytest.raises(FileNotFoundError):
        list(read_rows(stream, options.collections()["source"], options, dropped))
    assert dropped == {}


def test_a_folder_of_images_of_the_hub_is_a_source(hub):
    hub.add("datasets", "me/photos", {f"{number}.jpg": jpeg(number) for number in range(2)})
    code = """
from collections import Counter
from diffusers_iedit.pairs.read import ReadOptions, read_rows
options = ReadOptions("me/photos")
collection = options.collections()["source"]
print([len(row["image"]) for row in read_rows(collection.open(), collection, options, Counter())])
"""
    assert output(hub.run(code)) == f"{[len(jpeg(number)) for number in range(2)]}\n"


# Runs in a process whose Hub is the one on loopback.
READ_FROM_HUB = """
import json
import time
from collections import Counter
from diffusers_iedit.pairs.read import ReadOptions, read_rows

time.sleep = lambda seconds: None  # between attempts
results = {}
for kind in ("tar", "parquet"):
    for name in ("other", "cut", "401", "404", "500"):
        files = [f"good.{kind}", f"{name}.{kind}"]
        options = ReadOptions("someone/pictures", image_column="jpg", caption_column="txt", source_files=files)
        collection = options.collections()["source"]
        dropped, captions, failed = Counter(), [], False
        stream = collection.open()
        try:
            for row in read_rows(stream, collection, options, dropped):
                captions.append(row["caption"])
        except Exception:
            failed = True
        results[f"{kind} {name}"] = [captions, failed, dropped]
print(json.dumps(results))
"""


def test_a_hub_that_fails_half_way_stops_the_reading_and_is_no_damaged_file(hub, tmp_path):
    files = {}
    for name in ("good", "other", "cut", "401", "404", "500"):
        write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(0), "0.txt": name.encode()})
        write_parquet(tmp_path / "a.parquet", {"jpg": [jpeg(0)], "txt": [name]})
        files[f"{name}.tar"] = (tmp_path / "a.tar").read_bytes()
        files[f"{name}.parquet"] = (tmp_path / "a.parquet").read_bytes()
    hub.add("datasets", "someone/pictures", files)
    hub.fail(r"^GET .*/resolve/.*/cut\.")
    for status in (401, 404, 500):
        hub.fail(rf"^GET .*/resolve/.*/{status}\.", status=status)

    result = hub.run(READ_FROM_HUB)
    assert result.returncode == 0, result.stderr
    expected = {}
    for kind in ("tar", "parquet"):
        expected[f"{kind} other"] = [["good", "other"], False, {}]
        expected |= {f"{kind} {fault}": [["good"], True, {}] for fault in ("cut", "401", "404", "500")}
    assert json.loads(result.stdout) == expected


# Images


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_is_fit_keeps_its_bytes(kind):
    encoded = encode(noise(), kind)
    assert fit_image(encoded, 64, 768)[0] == encoded


def gradient(mode):
    """From dark on the left to bright on the right, in a mode of more than 8 bits."""
    ramp = np.tile(np.linspace(0, 1, 90, dtype=np.float32), (80, 1))
    return Image.fromarray((ramp * 65535).astype(np.uint16) if mode == "I;16" else ramp)


ODD = {
    "L": (encode(noise().convert("L")), "PNG"),
    "LA": (encode(noise().convert("LA")), "PNG"),
    "1": (encode(noise().convert("1")), "PNG"),
    "P": (encode(noise().convert("P")), "PNG"),
    "P, one colour transparent": (encode(noise().convert("P"), transparency=3), "PNG"),
    "RGB, one colour transparent": (encode(noise(), transparency=(0, 0, 0)), "PNG"),
    "RGBA": (encode(noise().convert("RGBA")), "PNG"),
    "L JPEG": (encode(noise().convert("L"), "JPEG"), "JPEG"),
    "CMYK JPEG": (encode(noise().convert("CMYK"), "JPEG"), "JPEG"),
    "CMYK TIFF with profile": (encode(noise().convert("CMYK"), "TIFF", icc_profile=bytes(200)), "PNG"),
    "LAB TIFF": (encode(noise().convert("LAB"), "TIFF"), "PNG"),
    "I;16 PNG": (encode(gradient("I;16")), "PNG"),
    "I;16 TIFF": (encode(gradient("I;16"), "TIFF"), "PNG"),
    "F TIFF": (encode(gradient("F"), "TIFF"), "PNG"),
    "GIF": (encode(noise(), "GIF"), "PNG"),
    "animated GIF": (encode(noise(), "GIF", save_all=True, append_images=[noise(1)]), "PNG"),
    "RGBA WEBP": (encode(Image.merge("RGBA", (*noise().split(), noise().getchannel(0))), "WEBP"), "JPEG"),
    "BMP": (encode(noise(), "BMP"), "PNG"),
    "AVIF": (encode(noise(), "AVIF"), "PNG"),
    "MPO": (encode(noise(), "MPO", save_all=True, append_images=[noise(1)]), "JPEG"),
}


@pytest.mark.parametrize(("encoded", "kind"), ODD.values(), ids=ODD)
@pytest.mark.filterwarnings("error")
def test_an_image_of_an_odd_mode_becomes_rgb_with_nothing_left_of_the_old(encoded, kind):
    fit = opened(fit_image(encoded, 64, 768)[0])
    assert (fit.mode, fit.format, fit.size) == ("RGB", kind, (90, 80))
    assert not fit.info.keys() & {"transparency", "icc_profile"}


@pytest.mark.parametrize("encoded", [encode(gradient("I;16")), encode(gradient("F"), "TIFF")], ids=["I;16", "F"])
def test_more_than_8_bits_are_scaled_not_clipped(encoded):
    row = np.asarray(opened(fit_image(encoded, 64, 768)[0]))[0, :, 0].astype(int)
    np.testing.assert_allclose(row, np.linspace(0, 255, 90), atol=1.01)


@pytest.mark.filterwarnings("error")
def test_numbers_that_are_none_in_an_image_do_no_harm():
    values = np.asarray(gradient("F")).copy()
    values[0, 0], values[0, 1] = np.nan, -np.inf
    row = np.asarray(opened(fit_image(encode(Image.fromarray(values), "TIFF"), 64, 768)[0]))[1, :, 0]
    np.testing.assert_allclose(row.astype(int), np.linspace(0, 255, 90), atol=1.01)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode):
    image = Image.new("RGBA", (90, 80), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 45, 80))
    fit = opened(fit_image(encode(image.convert(mode)), 64, 768)[0])
    assert fit.getpixel((10, 10)) == (255, 255, 255)
    assert fit.getpixel((80, 10)) == Image.new("RGB", (1, 1), "red").convert("L" if mode == "LA" else "RGB").convert(
        "RGB"
    ).getpixel((0, 0))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_that_its_camera_turned_is_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    encoded = encode(noise().resize((45, 40)).resize((90, 80)), kind, exif=exif)
    fit, _ = fit_image(encoded, 64, 768)
    assert opened(fit).size == ((80, 90) if orientation > 4 else (90, 80))
    assert opened(fit).getexif().get(0x112, 1) == 1
    assert (fit == encoded) is (orientation == 1)


@pytest.mark.parametrize(
    "exif", [b"garbage", b"II*\0\x08\0\0\0\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\4ab\0\0"]
)
def test_damaged_exif_does_not_cost_the_image(exif):
    encoded = encode(noise(), "JPEG", exif=b"Exif\0\0" + exif)
    assert fit_image(encoded, 64, 768)[0] == encoded


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_large_image_is_scaled_down_to_the_largest_size(kind):
    fit = opened(fit_image(encode(noise(0, 900, 600), kind), 64, 200)[0])
    assert fit.size == (300, 200)
    assert fit.format == ("PNG" if kind == "PNG" else "JPEG")


def test_a_huge_jpeg_is_decoded_at_a_fraction_of_its_size():
    ramp = Image.linear_gradient("L").resize((4000, 3000)).convert("RGB")
    fit = opened(fit_image(encode(ramp, "JPEG"), 64, 256)[0])
    assert fit.size == (341, 256)
    np.testing.assert_allclose(np.asarray(fit)[:, 100, 0].astype(int), np.linspace(0, 255, 256), atol=3)


@pytest.mark.parametrize(("width", "height"), [(2000, 64), (64, 2000), (20000, 70)])
def test_an_extreme_aspect_ratio_stays(width, height):
    encoded = encode(Image.new("RGB", (width, height), "green"), "JPEG")
    assert fit_image(encoded, 64, 768)[0] == encoded


def test_scaling_an_extreme_aspect_ratio_leaves_both_sides_some_pixels():
    fit = opened(fit_image(encode(Image.new("RGB", (20000, 70))), 1, 3)[0])
    assert fit.size == (857, 3)


UNFIT = {
    "one pixel": (encode(Image.new("RGB", (1, 1))), "too_small"),
    "a pixel too narrow": (encode(noise(width=63)), "too_small"),
    "decompression bomb": (encode(Image.new("1", (20000, 20000))), "too_large"),
    "nothing": (b"", "missing"),
    "null": (None, "missing"),
    "a web page": (b"<html>404</html>", "unreadable"),
    "truncated JPEG": (jpeg(0)[:-2000], "truncated"),
    "truncated PNG": (encode(noise())[:-2000], "truncated"),
    "truncated GIF": (encode(noise(), "GIF")[:-2000], "truncated"),
    "truncated WEBP": (encode(noise(), "WEBP")[:-2000], "unreadable"),
    "JPEG header alone": (jpeg(0)[:20], "unreadable"),
    "PNG with a bad chunk": (encode(noise())[:60] + b"\xff" * 40 + encode(noise())[100:], "unreadable"),
    "a program (EPS)": (encode(noise(), "EPS"), "unreadable"),
    "a format that no photograph comes in (PPM)": (encode(noise(), "PPM"), "unreadable"),
}


@pytest.mark.parametrize(("encoded", "reason"), UNFIT.values(), ids=UNFIT)
def test_an_unfit_image_is_refused_by_reason(encoded, reason):
    with pytest.raises(UnfitImageError) as error:
        fit_image(encoded, 64, 768)
    assert str(error.value) == reason


def test_any_damage_to_an_image_is_an_unfit_image():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        whole = np.frombuffer(encode(noise(), kind), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[rng.integers(0, len(whole), 20)] = rng.integers(0, 256, 20)
            damaged[rng.integers(0, 64, 2)] = rng.integers(0, 256, 2)
            try:
                fit, _ = fit_image(damaged.tobytes(), 8, 768)
            except UnfitImageError:
                continue
            assert opened(fit).mode == "RGB"


def test_too_little_memory_is_no_reason_to_leave_an_image_out(monkeypatch):
    def load(self):
        raise MemoryError

    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", load)
    with pytest.raises(MemoryError):
        fit_image(jpeg(0), 64, 768)


def test_the_hash_tells_pixels_apart_not_files():
    lossless, again, other = encode(noise()), encode(noise(), compress_level=1), encode(noise(1))
    hashes = [fit_image(encoded, 64, 768)[1] for encoded in (lossless, again, other)]
    assert lossless != again
    assert hashes[0] == hashes[1] != hashes[2]
    assert all(0 <= each < 2**64 for each in hashes)


def test_the_hash_tells_sizes_apart():
    wide, high = (encode(Image.new("RGB", size)) for size in ((80, 64), (64, 80)))
    assert fit_image(wide, 64, 768)[1] != fit_image(high, 64, 768)[1]


# Captions


FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (None, ""),
        ("", ""),
        (" \t\n", ""),
        ("a  red\tcar\r\non grass\n", "a red car on grass"),
        ("a\x00red\x07car\x1b[0m", "a red car [0m"),
        ("绿草上的红色汽车", "绿草上的红色汽车"),
        ("红色\u3000汽车", "红色 汽车"),
        (f"a car \U0001f697 {FAMILY}", f"a car \U0001f697 {FAMILY}"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("\ufeffa\u200b red \u202ecar", "a red car"),
        ("soft\u00adhyphen, no\u00a0break", "softhyphen, no break"),
        ("half \ud83d a pair", "half a pair"),
    ],
)
def test_clean_text_leaves_one_line_of_visible_characters(text, clean):
    assert clean_text(text) == clean
    clean_text(text).encode()


def test_captions_of_any_kind_arrive(tmp_path):
    texts = ["", None, "car " * 2500, "红色汽车", "a \U0001f697", "a\x00b\nc"]
    file = write_parquet(tmp_path / "a.parquet", {"image": [jpeg(n) for n in range(6)], "text": texts})
    rows, _ = read(file, caption_column="text")
    assert captions(rows) == ["", None, ("car " * 2500).strip(), "红色汽车", "a \U0001f697", "a b c"]


# Duplicates


def test_first_occurrences_keeps_each_image_once_at_its_first_place():
    rng = np.random.default_rng(0)
    for _ in range(50):
        shards = [rng.integers(0, 12, rng.integers(0, 8)).astype(np.uint64) for _ in range(rng.integers(0, 5))]
        seen, expected = set(), []
        for shard in shards:
            expected.append([])
            for row, value in enumerate(shard):
                if value not in seen:
                    expected[-1].append(row)
                seen.add(value)
        assert [rows.tolist() for rows in first_occurrences(shards)] == expected


def test_first_occurrences_tells_hashes_apart_that_differ_in_the_last_bit():
    hashes = [np.array([2**64 - 1, 2**64 - 2], np.uint64), np.array([2**64 - 1, 2**63, 2**63 + 1], np.uint64)]
    assert [rows.tolist() for rows in first_occurrences(hashes)] == [[0, 1], [1, 2]]
