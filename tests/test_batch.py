"""`iedit batch`: the edits of `iedit edit` by the file, through stops, failures and full disks. The mini model."""

# ruff: noqa: F811 (fixtures are imported and then named as arguments)

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from accidents import two_ranks
from datasets import Dataset, Features, Value
from datasets import Image as DataImage
from PIL import Image
from test_build_reliability import small_disk  # noqa: F401

from diffusers_iedit import IEditPipeline, cli, mini
from diffusers_iedit.batch import Results, open_source
from diffusers_iedit.resuming import lock_folder


PROMPT = "a red cat on green grass"
QUICK = ("--model", "mini", "--steps", "2")


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """The mini model, which every command would load for itself."""
    load, loaded = cli._load_pipeline, {}

    def load_once(*args, **kwargs):
        key = repr((args, sorted(kwargs.items())))
        if key not in loaded:
            loaded[key] = load(*args, **kwargs)
        return loaded[key]

    with mock.patch.object(cli, "_load_pipeline", load_once):
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six scenes with masks, `0.png` and `0-mask.png` to `5...`, and a picture of 4 x 4 scenes, `large.png`."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(6):
        scene = mini.render(seed=seed)
        scene.image.save(folder / f"{seed}.png")
        scene.mask.save(folder / f"{seed}-mask.png")
    large = mini.render_large(seed=0, grid=4)
    large.image.save(folder / "large.png")
    large.mask.save(folder / "large-mask.png")
    return folder


def plain_jobs():
    return [{"image": f"{n}.png", "prompt": PROMPT, "mask": f"{n}-mask.png"} for n in range(6)]


def write_jobs(pictures, jobs, name):
    file = pictures / f"{name}.jsonl"
    file.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return file


def batch(jobs_file, output_dir, *options):
    """Runs the command; returns its exit code."""
    try:
        return cli.main([str(arg) for arg in ("batch", jobs_file, "--output-dir", output_dir, *QUICK, *options)])
    except SystemExit as stop:  # argparse
        return stop.code


def results(output_dir):
    return [json.loads(line) for line in (output_dir / "results.jsonl").read_text().splitlines()]


def outputs(output_dir):
    return {file.name: file.read_bytes() for file in sorted(output_dir.rglob("*.png"))}


def settled(output_dir):
    """The results without what differs from run to run."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in results(output_dir)]


@pytest.fixture(scope="module")
def jobs_file(pictures):
    return write_jobs(pictures, plain_jobs(), "jobs")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, jobs_file):
    output_dir = tmp_path_factory.mktemp("undisturbed") / "out"
    assert batch(jobs_file, output_dir) == 0
    return output_dir


@pytest.fixture
def edits():
    """How many pictures each call of the pipeline edits, in the order of the calls."""
    call, sizes = IEditPipeline.__call__, []

    def counted(self, *args, **kwargs):
        sizes.append(len(kwargs["image"]))
        return call(self, *args, **kwargs)

    with mock.patch.object(IEditPipeline, "__call__", counted):
        yield sizes


# What it does


def test_each_job_has_its_picture_and_its_line(undisturbed):
    assert sorted(outputs(undisturbed)) == [f"00000{n}.png" for n in range(1, 7)]
    assert settled(undisturbed) == [{"job": n, "output": f"00000{n}.png", "seed": n} for n in range(1, 7)]
    assert all(0 < row["seconds"] < 60 for row in results(undisturbed))


JOBS = [
    {"image": "0.png", "prompt": PROMPT},
    {"image": "0.png", "prompt": PROMPT, "mask": "0-mask.png", "strength": 0.5, "seed": 0, "mask_dilation": 2},
    {"image": "1.png", "prompt": PROMPT, "mask": "1-mask.png", "mask_feather": 3, "guidance_scale": 3, "steps": 6},
    {"image": "2.png", "prompt": PROMPT, "mask": "2-mask.png", "negative_prompt": "a dog", "output": "deep/er/a.jpg"},
    {"image": "2.png", "prompt": "a red cat under a night sky", "mask_prompt": "car", "mask_threshold": 0.3},
    {"image": "1.png", "prompt": "a red cat under a night sky", "source_prompt": "a yellow cup under a night sky"},
    {"image": "1.png", "prompt": "a red cat under a night sky", "source_prompt": "auto"},
    {"image": "large.png", "prompt": PROMPT, "mask": "large-mask.png"},
    {"image": "large.png", "prompt": PROMPT, "mask": "large-mask.png", "crop_padding": 4, "num_inference_steps": 5},
    {"image": "large.png", "prompt": PROMPT, "mask": "large-mask.png", "whole_frame": True},
    {"image": "large.png", "prompt": PROMPT, "processing-resolution": 128, "output": "b.webp"},
]


def test_a_job_gives_the_bytes_of_edit_with_its_seed(pictures, tmp_path, monkeypatch):
    assert batch(write_jobs(pictures, JOBS, "many"), tmp_path / "out") == 0
    monkeypatch.chdir(pictures)
    for row, job in zip(results(tmp_path / "out"), JOBS, strict=True):
        argv = ["edit", job["image"], job["prompt"], *QUICK, "--seed", str(row["seed"])]
        for key, value in job.items():
            if key not in ("image", "prompt", "output", "seed"):
                argv += [f"--{key}"] if value is True else [f"--{key}={value}"]
        alone = tmp_path / f"alone{Path(row['output']).suffix}"
        assert cli.main([*argv, "-o", str(alone)]) == 0
        assert alone.read_bytes() == (tmp_path / "out" / row["output"]).read_bytes(), job


def test_the_options_of_the_command_are_for_jobs_that_do_not_say_otherwise(pictures, tmp_path, capsys):
    jobs = [
        {"image": "0.png", "prompt": PROMPT},
        {"image": "0.png", "prompt": PROMPT, "strength": 0.9, "seed": 8},
        {"image": "0.png", "prompt": PROMPT, "strength": None, "whole_frame": False, "mask": None, "output": None},
        {"image": "2.png", "prompt": PROMPT, "mask_prompt": "car"},
    ]
    file = write_jobs(pictures, jobs, "defaults")
    options = ("--mask", pictures / "0-mask.png", "--strength", "0.5", "--seed", "7")
    assert batch(file, tmp_path / "out", *options) == 0
    said = [dict(job) for job in jobs]
    said[0] |= {"mask": "0-mask.png", "strength": 0.5, "seed": 7}
    said[1] |= {"mask": "0-mask.png"}
    said[2] = said[0]
    said[3] |= {"strength": 0.5, "seed": 7}
    said[2] = said[2] | {"output": "000003.png"}
    assert batch(write_jobs(pictures, said, "said"), tmp_path / "said") == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "said")


def test_what_a_job_says_is_false_is_not_done_though_the_command_asks_for_it(pictures, tmp_path):
    plain = {"image": "0.png", "prompt": PROMPT, "mask": "0-mask.png", "seed": 5, "steps": 2}
    jobs = [plain, plain | {"fast": None, "output": "null.png"}, plain | {"fast": False, "output": "slow.png"}]
    assert batch(write_jobs(pictures, jobs, "off"), tmp_path / "out", "--fast") == 0
    assert batch(write_jobs(pictures, [plain], "plain"), tmp_path / "plain") == 0
    edited = outputs(tmp_path / "out")
    assert edited["000001.png"] == edited["null.png"] != edited["slow.png"]
    assert edited["slow.png"] == outputs(tmp_path / "plain")["000001.png"]


def test_jobs_of_one_kind_and_size_are_edited_together_if_asked(pictures, jobs_file, tmp_path, edits, undisturbed):
    assert batch(jobs_file, tmp_path / "plain", "--batch-size", 4) == 0
    assert edits == [4, 2]
    # A neighbour shows in the last bits of floats: a value in a few pixels, inside of the mask.
    for name in outputs(undisturbed):
        one, other = (np.asarray(Image.open(folder / name), int) for folder in (undisturbed, tmp_path / "plain"))
        assert np.abs(one - other).max() <= 1, name
    edits.clear()
    jobs = [*plain_jobs()[:3], {"image": "large.png", "prompt": PROMPT}, {"image": "3.png", "prompt": PROMPT}]
    jobs += [{"image": "4.png", "prompt": PROMPT, "strength": 0.5}]
    assert batch(write_jobs(pictures, jobs, "kinds"), tmp_path / "kinds", "--batch-size", 8) == 0
    # With a mask, without one, of another size, of another strength.
    assert edits == [3, 1, 1, 1]


def test_other_families_are_edited_too(pictures, tmp_path):
    file = write_jobs(pictures, plain_jobs()[:2], "flow")
    assert batch(file, tmp_path / "out", "--model", "mini-sd3", "--batch-size", 2) == 0
    assert len(outputs(tmp_path / "out")) == 2


def test_the_bar_shows_rate_and_time_left(jobs_file, tmp_path, capfd):
    assert batch(jobs_file, tmp_path / "out") == 0
    out, err = capfd.readouterr()
    assert out.startswith(f"{tmp_path / 'out' / 'results.jsonl'}: ")
    assert out.endswith(" s, 6 edits\n")
    assert "/6 [" in err
    assert "edits/s]" in err
    # The pipeline's own bar, of each edit, would hide it.
    assert "it/s" not in err


# Data sets


@pytest.fixture(scope="module")
def data_set(pictures, tmp_path_factory):
    """A folder with the plain jobs as a data set."""
    columns = {"prompt": [PROMPT] * 6, "seed": [*range(1, 6), None]}
    features = {"prompt": Value("string"), "seed": Value("int64")}
    for column, ending in (("image", ""), ("mask", "-mask")):
        files = [pictures / f"{n}{ending}.png" for n in range(6)]
        columns[column] = [{"bytes": file.read_bytes(), "path": None} for file in files]
        features[column] = DataImage()
    folder = tmp_path_factory.mktemp("sets") / "jobs"
    (folder / "data").mkdir(parents=True)
    Dataset.from_dict(columns, features=Features(features)).to_parquet(folder / "data/train-00000-of-00001.parquet")
    return folder


def test_the_rows_of_a_data_set_are_jobs_too(data_set, tmp_path, undisturbed, edits):
    assert batch(data_set, tmp_path / "out") == 0
    assert outputs(tmp_path / "out") == outputs(undisturbed)
    assert settled(tmp_path / "out") == settled(undisturbed)
    edits.clear()
    assert batch(data_set, tmp_path / "out") == 0
    assert edits == []


def test_a_data_set_is_known_by_the_same_name_in_another_process(data_set):
    code = f"from diffusers_iedit.batch import open_source; print(open_source({str(data_set)!r}).fingerprint)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split()[-1] == open_source(str(data_set)).fingerprint


def test_a_path_in_a_data_set_is_not_read(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text('{"image": "/etc/hostname", "prompt": "a red cat"}\n')
    assert batch(tmp_path / "set", tmp_path / "out") == 2
    assert f"{tmp_path / 'set'}: column 'image' has to hold pictures" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_data_set_is_one_line(tmp_path, capsys):
    assert batch(tmp_path / "none", tmp_path / "out") == 2
    assert re.fullmatch(r"iedit batch: error: .*none', which is no folder here, .*\n", capsys.readouterr().err)


# What fails


FAULTS = {
    "none.png: no such file": {"image": "none.png", "prompt": PROMPT},
    "bad.png: cannot be read as an image": {"image": "bad.png", "prompt": PROMPT},
    "`mask_image` has to have the image's size": {"image": "0.png", "prompt": PROMPT, "mask": "large-mask.png"},
    "would run no step": {"image": "0.png", "prompt": PROMPT, "strength": 0.1},
    "cannot be written (File name too long)": {"image": "0.png", "prompt": PROMPT, "output": "a" * 300 + ".png"},
}


def test_what_fails_is_recorded_and_the_rest_is_done(pictures, tmp_path, capsys):
    (pictures / "bad.png").write_bytes(b"no picture")
    jobs = [job for pair in zip(FAULTS.values(), plain_jobs(), strict=False) for job in pair]
    assert batch(write_jobs(pictures, jobs, "faults"), tmp_path / "out", "--batch-size", 4) == 1
    rows = results(tmp_path / "out")
    assert [row["job"] for row in rows] == list(range(1, 11))
    for message, row in zip(FAULTS, rows[::2], strict=True):
        assert message in row["error"]
        assert "output" not in row
    assert [row["output"] for row in rows[1::2]] == sorted(outputs(tmp_path / "out"))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"iedit batch: error: 5 of 10 edits failed, see {tmp_path}/out/results.jsonl; --retry-fail")


def test_of_a_batch_that_fails_each_is_tried_alone(jobs_file, tmp_path, undisturbed):
    call = IEditPipeline.__call__

    def one_at_most(self, *args, **kwargs):
        if len(kwargs["image"]) > 1:
            raise torch.OutOfMemoryError("too many")
        return call(self, *args, **kwargs)

    with mock.patch.object(IEditPipeline, "__call__", one_at_most):
        assert batch(jobs_file, tmp_path / "out", "--batch-size", 4) == 0
    assert outputs(tmp_path / "out") == outputs(undisturbed)


def test_what_failed_is_tried_again_only_if_asked(pictures, tmp_path, undisturbed, edits):
    mended = pictures / "mended.png"
    mended.unlink(missing_ok=True)
    jobs = plain_jobs()
    jobs[2]["image"] = "mended.png"
    file = write_jobs(pictures, jobs, "retried")
    assert batch(file, tmp_path / "out") == 1
    shutil.copy(pictures / "2.png", mended)
    edits.clear()
    assert batch(file, tmp_path / "out") == 1
    assert edits == []
    assert batch(file, tmp_path / "out", "--retry-failed") == 0
    assert edits == [1]
    assert outputs(tmp_path / "out") == outputs(undisturbed)
    assert settled(tmp_path / "out") == settled(undisturbed)


# Bad input


@pytest.fixture
def refused(pictures, tmp_path, capsys):
    """Runs the command on these lines: it has to say one line, and leave nothing."""

    def run(lines, *options, output_dir="out"):
        file = pictures / "refused.jsonl"
        file.write_bytes("".join(line + "\n" for line in lines).encode())
        before = sorted(tmp_path.rglob("*"))
        with mock.patch.object(cli, "_load_pipeline", side_effect=AssertionError):
            assert batch(file, tmp_path / output_dir, *options) == 2
        assert sorted(tmp_path.rglob("*")) == before
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err.removeprefix(f"iedit batch: error: {file}, ").rstrip("\n")

    return run


GOOD = '{"image": "0.png", "prompt": "a red cat"}'


def with_key(key, value):
    return json.dumps({"image": "0.png", "prompt": "a red cat", key: value})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "0.png", "prompt"', "is no JSON (Expecting"),
        ("[" * 100_000, "is no JSON ("),
        ('["0.png", "a red cat"]', 'has to be a JSON object, but is ["0.png", "a red cat"]'),
        ('{"image": "0.png"}', "the following arguments are required: --prompt"),
        ('{"prompt": "a cat"}', "the following arguments are required: --image"),
        (with_key("colour", "red"), "unknown key 'colour'"),
        (with_key("stren", 0.5), "unknown key 'stren'"),
        (with_key("model", "mini"), "unknown key 'model'"),
        (with_key("num_images", 2), "unknown key 'num_images'"),
        (with_key("strength", 7), "argument --strength: has to be above 0 and at most 1, but is 7"),
        (with_key("strength", "much"), "argument --strength: invalid number value: 'much'"),
        (with_key("strength", True), "argument --strength: expected one argument"),
        (with_key("guidance_scale", float("nan")), "argument --guidance-scale: has to be a finite number, but is nan"),
        (with_key("seed", 1.5), "argument --seed: invalid whole number value: '1.5'"),
        (with_key("mask_prompt", ["cat"]), "'mask_prompt' has to be a text, a number or true, but is ['cat']"),
        (with_key("whole_frame", "yes"), "argument --whole-frame: ignored explicit argument 'yes'"),
        (with_key("crop_padding", 4), "--crop-padding needs a mask: pass --mask, --mask-prompt or --source-prompt"),
        (with_key("output", "a.gif"), "output 'a.gif' has to end in one of .png, .webp"),
        (with_key("output", "../a.png"), "output '../a.png' lies outside of "),
        (with_key("output", "/a.png"), "output '/a.png' lies outside of "),
        (with_key("output", "a\0.png"), "embedded null"),
        (
            '{"image": "0.png", "prompt": "a", "mask": "m.png", "mask_prompt": "cat"}',
            "argument --mask-prompt: not allowed with argument --mask",
        ),
    ],
)
def test_a_line_that_cannot_be_used_is_named_before_any_work_is_done(refused, line, message):
    assert refused([GOOD, "", line]).startswith(f"line 3: {message}")


@pytest.mark.parametrize("names", [("a.png", "a.png"), ("a.png", "b/../a.png"), ("000002.png", None)])
def test_two_jobs_with_one_output_are_refused(refused, names):
    lines = [with_key("output", name) for name in names]
    assert refused(lines) == f"line 2: has the output of line 1, '{names[1] or '000002.png'}'"


def test_an_output_by_way_of_a_link_is_outside_too(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/link").symlink_to(tmp_path)
    assert "lies outside of" in refused([with_key("output", "link/a.png")])


def test_an_output_that_another_job_reads_is_refused(refused, pictures):
    lines = [GOOD, with_key("output", str(pictures / "0.png"))]
    message = f"line 2: its output {pictures / '0.png'} is read in line 1, and would be lost"
    assert refused(lines, "--any-output") == message


def test_outputs_may_lie_elsewhere_if_that_is_said(pictures, tmp_path):
    jobs = [plain_jobs()[0] | {"output": "../a.png"}, plain_jobs()[1] | {"output": str(tmp_path / "b/b.png")}]
    assert batch(write_jobs(pictures, jobs, "elsewhere"), tmp_path / "out", "--any-output") == 0
    assert [row["output"] for row in results(tmp_path / "out")] == [f"{tmp_path}/a.png", f"{tmp_path}/b/b.png"]
    assert (tmp_path / "a.png").exists()
    assert (tmp_path / "b/b.png").exists()


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_a_file_without_jobs_is_refused(refused, pictures, lines):
    message = f"iedit batch: error: {pictures / 'refused.jsonl'} has no jobs; expected a JSON object a line"
    assert refused(lines).startswith(message)


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys):
    assert batch(tmp_path / "none.jsonl", tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        f"iedit batch: error: {tmp_path}/none.jsonl: cannot be read (No such file or directory)\n"
    )


def test_a_mask_for_all_that_is_not_there_is_one_line(refused, tmp_path):
    assert refused([GOOD], "--mask", tmp_path / "none.png") == f"iedit batch: error: {tmp_path}/none.png: no such file"


@pytest.fixture
def refused_folder(undisturbed, tmp_path, capsys, edits):
    """Runs the command on a folder that holds an undisturbed batch: it has to say one line and change nothing."""

    def run(file, *options):
        shutil.copytree(undisturbed, tmp_path / "out")
        before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert batch(file, tmp_path / "out", *options) == 2
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
        assert edits == []
        return capsys.readouterr().err.splitlines()[-1].removeprefix("iedit batch: error: ")

    return run


def test_the_folder_of_another_file_of_jobs_is_left_alone(refused_folder, pictures, tmp_path):
    message = refused_folder(write_jobs(pictures, plain_jobs()[:5], "other"))
    assert message.startswith(f"{tmp_path / 'out'} holds another batch: jobs was '")
    assert message.endswith("Take another folder")


def test_the_folder_of_other_options_says_which(refused_folder, jobs_file):
    message = refused_folder(jobs_file, "--strength", "0.5", "--batch-size", "2")
    assert "another batch: batch_size was 1 and is 2; strength was None and is '0.5'. Take" in message


def test_a_folder_with_something_else_is_left_alone(jobs_file, tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert batch(jobs_file, tmp_path) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"iedit batch: error: {tmp_path} is not empty, and what it holds is no batch's: take another folder"
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_of_two_runs_in_one_folder_the_second_is_refused(jobs_file, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with lock_folder(tmp_path / "out", "batch"):
        assert batch(jobs_file, tmp_path / "out") == 2
    message = f"Another batch is at work on {tmp_path / 'out'}: wait for it, or choose another folder."
    assert capsys.readouterr().err.splitlines()[-1] == f"iedit batch: error: {message}"


def test_float16_on_the_cpu_is_refused(jobs_file, tmp_path, capsys):
    assert batch(jobs_file, tmp_path / "out", "--device", "cpu", "--dtype", "float16") == 2
    assert "--dtype float16" in capsys.readouterr().err.splitlines()[-1]


# Out of disk


def test_a_full_disk_is_one_line_and_with_more_space_it_goes_on(small_disk, jobs_file, undisturbed, capsys):
    ends = []
    for size in range(12, 200, 12):
        subprocess.run(["mount", "-o", f"remount,size={size}k", small_disk], check=True)
        if (code := batch(jobs_file, small_disk / "out")) == 0:
            break
        assert code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("iedit batch: error: [Errno 28]")
        assert last.endswith("Run the same command again to go on.")
        assert not [*small_disk.rglob("*.part*")]
        ends.append(len(Results(small_disk / "out").read()))
    assert len(ends) > 1
    assert ends == sorted(ends)
    assert outputs(small_disk / "out") == outputs(undisturbed)
    assert settled(small_disk / "out") == settled(undisturbed)


def test_of_rows_for_which_there_is_no_room_none_is_written(tmp_path):
    results = Results(tmp_path)
    results.append([{"job": 1}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))
    try:
        with pytest.raises(OSError, match=str(results.file)):
            results.append([{"job": 2}, {"job": 3}, {"job": 4}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert results.file.read_text() == '{"job": 1}\n'


# Killed


def test_killed_before_any_of_its_files_got_its_name_it_goes_on_and_does_nothing_twice(
    jobs_file, tmp_path, undisturbed, edits
):
    replace, append, copies = os.replace, Results.append, []

    def copy():
        copies.append(Path(shutil.copytree(tmp_path / "out", tmp_path / "copies" / str(len(copies)))))

    def recorded_replace(source, target):
        copy()
        replace(source, target)

    def recorded_append(self, rows):
        copy()
        append(self, rows)

    with mock.patch("os.replace", recorded_replace), mock.patch.object(Results, "append", recorded_append):
        assert batch(jobs_file, tmp_path / "out") == 0
    assert len(copies) == 2 + 6 * 2 + 1
    for state in copies[::2]:
        done = len(Results(state).read())
        edits.clear()
        assert batch(jobs_file, state) == 0
        assert len(edits) == 6 - done
        assert outputs(state) == outputs(undisturbed)
        assert settled(state) == settled(undisturbed)
        assert not [*state.rglob("*.part*")]


@pytest.mark.parametrize("left", [b"", b'{"job": 1, "outp', b'{"job": 1}\n{"job": 2, "output": "00'])
def test_a_line_that_was_cut_off_counts_as_not_done(jobs_file, tmp_path, undisturbed, edits, left):
    shutil.copytree(undisturbed, tmp_path / "out")
    file = tmp_path / "out/results.jsonl"
    first, *rest = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + left.replace(b'{"job": 1}\n', rest[0]).replace(b'"job": 1', b'"job": 3'))
    done = len(Results(tmp_path / "out").read())
    assert batch(jobs_file, tmp_path / "out") == 0
    assert len(edits) == 6 - done
    assert outputs(tmp_path / "out") == outputs(undisturbed)
    assert settled(tmp_path / "out") == settled(undisturbed)


def test_a_row_after_one_that_was_cut_off_is_whole(tmp_path):
    results = Results(tmp_path)
    results.append([{"job": 1}])
    with results.file.open("ab") as opened:
        opened.write(b'{"job": 2, "outp')
    results.append([{"job": 3}])
    assert results.read() == {1: {"job": 1}, 3: {"job": 3}}


def test_where_a_batch_is_not_done_whole_it_is_edited_whole(jobs_file, tmp_path, edits):
    """So that a stop does not change who is edited beside whom."""
    assert batch(jobs_file, tmp_path / "out", "--batch-size", 4) == 0
    undisturbed = outputs(tmp_path / "out")
    results = Results(tmp_path / "out")
    results.rewrite(row for row in results.read().values() if row["job"] != 3)
    (tmp_path / "out/000003.png").unlink()
    edits.clear()
    assert batch(jobs_file, tmp_path / "out", "--batch-size", 4) == 0
    assert edits == [4]
    assert outputs(tmp_path / "out") == undisturbed


def in_a_process(jobs_file, output_dir, environment, kill_at, *options):
    os.environ.update(environment)
    torch.set_num_threads(1)
    original, seen = os.fsync, 0

    def fsync(*args):
        nonlocal seen
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    os.fsync = fsync
    sys.exit(batch(jobs_file, output_dir, *options))


def start(jobs_file, output_dir, environment={}, kill_at=0, options=()):
    arguments = (jobs_file, output_dir, environment, kill_at, *options)
    process = multiprocessing.get_context("spawn").Process(target=in_a_process, args=arguments)
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [1, 2, 5, 8])
def test_killed_and_called_again_it_comes_to_the_same(jobs_file, tmp_path, undisturbed, kill_at):
    process = start(jobs_file, tmp_path / "out", kill_at=kill_at)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert batch(jobs_file, tmp_path / "out") == 0
    assert outputs(tmp_path / "out") == outputs(undisturbed)
    assert settled(tmp_path / "out") == settled(undisturbed)
    assert not [*(tmp_path / "out").rglob("*.part*")]


# Several processes


@pytest.mark.slow
def test_two_processes_share_the_jobs_and_come_to_the_same(jobs_file, tmp_path, undisturbed):
    ranks = [start(jobs_file, tmp_path / "out", environment) for environment in two_ranks()]
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert outputs(tmp_path / "out") == outputs(undisturbed)
    assert settled(tmp_path / "out") == settled(undisturbed)


@pytest.mark.slow
def test_the_command_comes_to_the_same_on_ray(jobs_file, tmp_path, undisturbed):
    command = [sys.executable, "-m", "diffusers_iedit.cli", "batch", jobs_file, "--output-dir", "out", *QUICK]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command += ["--engine", "ray", "--num-workers", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path / "out") == outputs(undisturbed)
    assert settled(tmp_path / "out") == settled(undisturbed)
