"""The builder under accidents: killed, cut off, out of disk, started twice, in several processes and on Ray."""

# ruff: noqa: F811 (fixtures are imported and then named as arguments)

import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from unittest import mock

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from accidents import two_ranks
from small_build import (
    ANY_MASK,
    COUNT,
    arguments,
    build,
    build_and_die,
    build_and_wait,
    command,
    options,
    rows,
)
from test_build import context, finished, pool, times, undisturbed  # noqa: F401

from diffusers_iedit.engines import LocalEngine, RayEngine
from diffusers_iedit.pairs.build import STAGES


def unfinished(output_dir):
    """Makes a finished set one that has all shards of all stages, but whose last files are still to be written."""
    (output_dir / "report.json").unlink()


def leftovers(output_dir):
    return [file for file in output_dir.rglob("*") if file.suffix == ".partial"]


# Killed


# In each stage: when its third file is to get its name, which is the second shard's, half done.
@pytest.mark.parametrize(
    "stage",
    [stage if stage in ("read", "mask") else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES],
)
def test_a_build_that_was_killed_in_a_stage_goes_on(context, tmp_path, undisturbed, pool, stage):
    output_dir = tmp_path / "pairs"
    process = context.Process(
        target=build_and_die, args=(output_dir, options(pool), stage, 4 if stage == "read" else 3)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (output_dir / "report.json").exists()
    assert len(leftovers(output_dir / "work" / stage)) == 1
    done = times(output_dir / "work")
    shards = [file for file in done if file.suffix in (".arrow", ".npy", ".parquet") and stage in file.parts]
    assert shards

    build(output_dir, options(pool))
    assert rows(output_dir).equals(rows(undisturbed))
    assert leftovers(output_dir) == []
    after = times(output_dir / "work")
    redone = {file.name for file in done.keys() & after.keys() if done[file] != after[file]}
    # What is chosen over all shards is chosen again; no shard is built again.
    assert redone <= {"kept.npz", "assigned.npz"}


def test_a_build_that_was_killed_at_once_goes_on(context, tmp_path, undisturbed, pool):
    output_dir = tmp_path / "pairs"
    process = context.Process(target=build_and_die, args=(output_dir, options(pool), "pairs", 1))
    process.start()
    process.join()
    assert len(leftovers(output_dir)) == 1
    assert not (output_dir / "manifest.json").exists()
    build(output_dir, options(pool))
    assert rows(output_dir).equals(rows(undisturbed))


def states(output_dir, chosen, folder):
    """Builds, and copies all files each time that one is to get its name: what a kill would leave at these moments."""
    replace_file, copies = os.replace, []

    def recorded(source, target):
        copies.append(Path(shutil.copytree(output_dir, folder / str(len(copies)) / "pairs")))
        replace_file(source, target)

    with mock.patch("os.replace", recorded):
        build(output_dir, chosen)
    return copies


def test_a_build_that_was_killed_while_it_put_the_set_into_place_goes_on(finished, tmp_path, undisturbed, pool):
    unfinished(finished)
    shutil.rmtree(finished / "data")
    shutil.rmtree(finished / "work/write")
    copies = states(finished, options(pool), tmp_path)
    assert len([copy for copy in copies if (copy / "work/write/data").exists()]) == 3
    assert not (copies[-1] / "work/write/data").exists()
    for copy in copies:
        build(copy, options(pool))
        assert rows(copy).equals(rows(undisturbed))
        assert leftovers(copy) == []


@pytest.mark.slow
def test_a_build_that_was_killed_before_any_of_its_files_got_its_name_goes_on(tmp_path, undisturbed, pool):
    copies = states(tmp_path / "pairs", options(pool), tmp_path)
    assert len(copies) > 50
    for copy in copies:
        build(copy, options(pool))
        assert rows(copy).equals(rows(undisturbed))
        shutil.rmtree(copy)


@pytest.mark.slow
def test_a_command_that_is_killed_at_random_again_and_again_comes_to_its_end(context, tmp_path, undisturbed, pool):
    seed = time.time_ns()
    rng, kills = random.Random(seed), 0
    while not (tmp_path / "pairs/report.json").exists():
        process = context.Process(target=command, args=(arguments(pool, tmp_path / "pairs"), tmp_path / "log"))
        process.start()
        # A little longer each time, so that it comes to an end.
        process.join(rng.uniform(0.2, 1 + 0.2 * kills))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
    assert kills > 2, f"seed {seed}"
    assert rows(tmp_path / "pairs").equals(rows(undisturbed)), f"seed {seed}"


def test_ctrl_c_ends_a_command_with_one_line_and_the_next_one_goes_on(context, tmp_path, undisturbed, pool):
    argv, log = arguments(pool, tmp_path / "pairs"), tmp_path / "log"
    process = context.Process(target=command, args=(argv, log))
    process.start()
    while not list((tmp_path / "pairs").glob("work/caption/*.json")):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 1
    said = [line for line in log.read_text().splitlines() if line and "rows" not in line and "NLTK" not in line]
    assert said == ["build_dataset.py: stopped. Run the same command again to go on."]

    process = context.Process(target=command, args=(argv, log))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert rows(tmp_path / "pairs").equals(rows(undisturbed))


# Damaged


SHARDS = {
    "read": "read/source/00000-0001.arrow",
    "caption": "caption/00000-0001.arrow",
    "edit": "edit/00000-0001.arrow",
    "embed images": "embed/source/00000-0001.npy",
    "embed prompts": "embed/prompt/00000-0001.npy",
    "retrieve": "retrieve/00000-0001.arrow",
    "mask": "mask/00000-0001.arrow",
}


@pytest.mark.parametrize("stage", SHARDS)
def test_a_shard_that_was_cut_off_is_built_again(finished, undisturbed, pool, stage):
    unfinished(finished)
    shard = finished / "work" / SHARDS[stage]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    build(finished, options(pool))
    assert shard.read_bytes() == whole
    assert rows(finished).equals(rows(undisturbed))


@pytest.mark.parametrize("left", ["", '{"rows_in": 12, "rows'])
@pytest.mark.parametrize(
    "marker", ["read/source/part-00000.json", "read/source/00000-0001.json", "mask/00000-0001.json"]
)
def test_a_shard_without_a_whole_marker_is_built_again(finished, undisturbed, pool, marker, left):
    unfinished(finished)
    file = finished / "work" / marker
    file.write_text(left)
    build(finished, options(pool))
    assert len(file.read_text()) > 100
    assert rows(finished).equals(rows(undisturbed))


@pytest.mark.parametrize("damage", ["cut off", "deleted", "deleted, and what the stages left"])
def test_a_file_of_the_finished_set_is_built_again(finished, undisturbed, pool, damage):
    file = finished / "data/train-00000-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    if damage != "cut off":
        file.unlink()
    if damage.endswith("left"):
        shutil.rmtree(finished / "work")
    build(finished, options(pool))
    assert rows(finished).equals(rows(undisturbed))


def test_a_damaged_file_is_counted_once_though_its_end_is_reached_twice(tmp_path, pool):
    images = pq.read_table(pool / "train.parquet").to_pylist()
    with tarfile.open(tmp_path / "web.tar", "w") as tar:
        for number, row in enumerate(images):
            for kind, content in (("png", row["image"]["bytes"]), ("txt", row["text"].encode())):
                member = tarfile.TarInfo(f"{number:03}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with (tmp_path / "web.tar").open("r+b") as tar:
        tar.truncate(tar.seek(0, os.SEEK_END) * 2 // 3)
    chosen = options(tmp_path / "web.tar", image_column="png", caption_column="txt", **ANY_MASK)
    first = build(tmp_path / "pairs", chosen)
    assert first["stages"]["read source"]["dropped"] == {"damaged_file": 1}
    expected = rows(tmp_path / "pairs")

    unfinished(tmp_path / "pairs")
    (tmp_path / "pairs/work/read/source/part-00000.json").unlink()
    again = build(tmp_path / "pairs", chosen)
    assert rows(tmp_path / "pairs").equals(expected)
    assert again["dropped"] == first["dropped"]
    assert again["rows_in"] == first["rows_in"]


def test_files_that_an_earlier_version_grouped_otherwise_do_not_get_into_the_set(finished, undisturbed, pool):
    unfinished(finished)
    for file in (finished / "data").iterdir():
        shutil.copy(file, finished / "work/write" / file.name.replace("of-00002", "of-00003"))
    build(finished, options(pool))
    assert rows(finished).equals(rows(undisturbed))


# Twice


def test_a_second_build_of_a_folder_is_refused_at_once_and_the_first_goes_on(context, tmp_path, undisturbed, pool):
    waiting, go_on = context.Event(), context.Event()
    arguments = (tmp_path / "pairs", options(pool), waiting, go_on)
    first = context.Process(target=build_and_wait, args=arguments, daemon=True)
    first.start()
    assert waiting.wait(60)
    before = times(tmp_path / "pairs")
    with pytest.raises(
        RuntimeError, match=r"Another build is at work on .*pairs: wait for it, or choose another folder\."
    ):
        build(tmp_path / "pairs", options(pool))
    assert times(tmp_path / "pairs") == before
    go_on.set()
    first.join()
    assert first.exitcode == 0
    assert rows(tmp_path / "pairs").equals(rows(undisturbed))


# Out of disk


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, of 200 KB; `grow` makes it large."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_an_error_of_one_line_and_with_more_space_the_build_goes_on(
    context, small_disk, tmp_path, undisturbed, pool
):
    needed = sum(file.stat().st_size for file in undisturbed.rglob("*") if file.is_file())
    ends = []
    for number, size in enumerate(range(200_000, 2 * needed, 150_000)):
        subprocess.run(["mount", "-o", f"remount,size={size}", small_disk], check=True)
        log = tmp_path / f"log-{number}"
        process = context.Process(target=command, args=(arguments(pool, small_disk / "pairs"), log))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        last = log.read_text().splitlines()[-1]
        assert last.startswith("build_dataset.py: error: [Errno 28]")
        assert last.endswith("Run the same command again to go on.")
        assert "Traceback" not in log.read_text()
        assert leftovers(small_disk) == []
        ends.append(last)
    assert len(ends) > 1
    assert rows(small_disk / "pairs").equals(rows(undisturbed))


# Several processes


def run_processes(context, argv, log):
    """The command as `accelerate launch` starts it, in two processes that stay off the GPU: their exit codes."""
    launched = [
        context.Process(target=command, args=(argv, log, environment), daemon=True) for environment in two_ranks()
    ]
    for process in launched:
        process.start()
    for process in launched:
        process.join(120)
    return [process.exitcode for process in launched]


def test_several_processes_build_the_same_rows_and_one_of_them_speaks(context, tmp_path, undisturbed, pool):
    log = tmp_path / "log"
    assert run_processes(context, arguments(pool, tmp_path / "pairs"), log) == [0, 0]
    assert rows(tmp_path / "pairs").equals(rows(undisturbed))
    printed = log.read_text()
    assert printed.count("caption: 100%") <= 2  # At its end a bar may be drawn twice.
    assert printed.count("pairs from") == printed.count("WordNet not found") == 1


@pytest.mark.parametrize("bad", [["--shard_size", "0"], ["--batch_size", "none"], ["--image_column", "pigs"]])
def test_several_processes_end_with_one_error_and_none_hangs(context, tmp_path, pool, bad):
    codes = run_processes(context, [*arguments(pool, tmp_path / "pairs"), *bad], tmp_path / "log")
    assert set(codes) <= {1, 2}
    printed = (tmp_path / "log").read_text()
    assert printed.count("error:") == 1
    assert "Traceback" not in printed


def patience(log):
    """Writes after how long a process gives up waiting for the others."""
    alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(alone, ACCELERATE_USE_CPU="true")
    LocalEngine()
    backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    log.write_text(str(backend.options._timeout.days))


def test_a_process_waits_for_days_for_one_that_has_more_to_do(context, tmp_path):
    process = context.Process(target=patience, args=(tmp_path / "log",))
    process.start()
    process.join()
    assert int((tmp_path / "log").read_text()) >= 1


# Ray


@pytest.fixture(scope="module")
def ray_engine():
    """A Ray on this machine, with two actors a stage."""
    import ray

    with mock.patch.dict(os.environ, RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1"):
        yield RayEngine(None, num_workers=2, gpus_per_worker=0)
    ray.shutdown()


def ray_actors():
    """The processes of actors on this machine's Ray."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "ray::MapWorker" in " ".join(child.cmdline()[:1])]


@pytest.mark.slow
def test_ray_builds_the_same_rows_though_a_worker_is_killed(ray_engine, finished, undisturbed, pool):
    unfinished(finished)
    for stage in ("mask", "write"):
        shutil.rmtree(finished / "work" / stage)
    killed = []

    def kill():
        while not killed:
            for actor in ray_actors():
                with_marker = list((finished / "work/mask").glob("*.json"))
                if with_marker and len(with_marker) < 3:
                    actor.kill()
                    killed.append(actor.pid)
            time.sleep(0.02)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    build(finished, options(pool), engine=ray_engine)
    assert killed
    assert rows(finished).equals(rows(undisturbed))


@pytest.mark.slow
def test_an_error_in_a_shard_on_ray_is_raised_as_it_is(ray_engine):
    def job(shard):
        if shard == "1":
            raise OSError(28, "No space left on device", "/work/mask")
        yield 1

    job.has_model = False
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '/work/mask'$"):
        list(ray_engine.run(job, ["0", "1", "2"]))


def gpus_of_actors(log):
    """Writes what share of a GPU an actor gets, on a Ray that believes in one: with a model, and without."""
    import ray

    def job(shard):
        yield int(100 * ray.get_runtime_context().get_assigned_resources().get("GPU", 0))

    ray.init(num_cpus=4, num_gpus=1, include_dashboard=False)
    engine, shares = RayEngine(None, num_workers=1, gpus_per_worker=0.5), []
    for job.has_model in (True, False):
        shares += engine.run(job, ["0"])
    log.write_text(str(shares))


@pytest.mark.slow
def test_stages_with_a_model_get_their_share_of_a_gpu(context, tmp_path):
    process = context.Process(target=gpus_of_actors, args=(tmp_path / "log",))
    process.start()
    process.join()
    assert (tmp_path / "log").read_text() == "[50, 0]"


@pytest.mark.slow
def test_the_command_builds_the_same_rows_on_ray(tmp_path, undisturbed, pool):
    script = Path(__file__).parents[1] / "training/build_dataset.py"
    ray = ["--engine", "ray", "--num_workers", "2"]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, script, *arguments(pool, tmp_path / "pairs", *ray)]
    result = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"pairs from {COUNT} rows" in result.stdout
    assert rows(tmp_path / "pairs").equals(rows(undisturbed))
