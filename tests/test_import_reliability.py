"""The import under accidents: killed in each stage, in several processes and on Ray."""

import os
import signal
from unittest import mock

import pytest
import small_import
from accidents import two_ranks
from small_build import processes
from small_import import FORMS, options, run

from diffusers_iedit.engines import RayEngine
from diffusers_iedit.pairs.options import IMPORT_STAGES


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A set that has nothing but pictures and instructions, so that every stage has work."""
    rows = [FORMS["nhr-edit"](pair) for pair in small_import.pairs(10)]
    return small_import.write_parquet(tmp_path_factory.mktemp("made") / "set", rows)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source):
    output_dir = tmp_path_factory.mktemp("undisturbed") / "pairs"
    run(output_dir, options(source))
    return files(output_dir)


def files(output_dir):
    return {file.name: file.read_bytes() for file in (output_dir / "data").iterdir()}


# When the third file is to get its name, which is the second shard's, half done; the last stage has one shard.
@pytest.mark.parametrize("stage", IMPORT_STAGES)
def test_an_import_that_was_killed_in_a_stage_ends_with_the_same_bytes(tmp_path, source, undisturbed, stage):
    number = {"read": 4, "write": 1}.get(stage, 3)
    process = processes().Process(
        target=small_import.run_and_die, args=(tmp_path / "pairs", options(source), stage, number)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "pairs/report.json").exists()
    run(tmp_path / "pairs", options(source))
    assert files(tmp_path / "pairs") == undisturbed
    assert not list((tmp_path / "pairs").rglob("*.partial"))


def test_several_processes_import_the_same_pairs_and_one_of_them_speaks(tmp_path, source, undisturbed):
    argv, log = small_import.arguments(source, tmp_path / "pairs"), tmp_path / "log"
    launched = [
        processes().Process(target=small_import.command, args=(argv, log, environment), daemon=True)
        for environment in two_ranks()
    ]
    for process in launched:
        process.start()
    for process in launched:
        process.join(300)
    assert [process.exitcode for process in launched] == [0, 0]
    assert files(tmp_path / "pairs") == undisturbed
    assert (tmp_path / "log").read_text().count("10 pairs from 10 rows") == 1


def test_ray_imports_the_same_pairs(tmp_path, source, undisturbed):
    import ray

    with mock.patch.dict(os.environ, RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1"):
        run(tmp_path / "pairs", options(source), engine=RayEngine(None, num_workers=2, gpus_per_worker=0))
        ray.shutdown()
    assert files(tmp_path / "pairs") == undisturbed
