"""Who runs the shards of some work: this process (or the several of `accelerate launch`), or a Ray cluster."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import ClassVar, Protocol, TypeVar

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


Shard = TypeVar("Shard")


class Job(Protocol):
    """Builds one shard, named by a string; yields numbers of rows as these are done.

    It can be pickled, and may be run twice.
    """

    # Whether a GPU makes it faster.
    has_model: ClassVar[bool]

    def __call__(self, shard: str) -> Iterator[int]: ...


class LocalEngine:
    """Runs the shards here, one after the other; under `accelerate launch` every process takes its share."""

    def __init__(self):
        self.state = PartialState(
            # Without it, processes that are to stay off the GPU would not know of each other.
            cpu=parse_flag_from_env("ACCELERATE_USE_CPU"),
            # By default those that have waited for another one for half an hour give up.
            timeout=timedelta(days=7),
        )
        self.is_main = self.state.is_main_process

    def share(self, shards: list[Shard]) -> list[Shard]:
        """Those of the shards that this process builds."""
        return shards[self.state.process_index :: self.state.num_processes]

    def run(self, job: Job, shards: list[str]) -> Iterator[int]:
        """Builds the shards and yields numbers of rows as these are done."""
        for shard in shards:
            yield from job(shard)

    def wait(self) -> None:
        """Returns when every process has come here."""
        try:
            self.state.wait_for_everyone()
        except RuntimeError:
            # Another one has ended, and has said why.
            sys.exit(1)


# What a shard may meet that is the user's to put right.
_ERRORS = {kind.__name__: kind for kind in (OSError, ValueError, RuntimeError)}


class _RayWorker:
    """An actor: keeps its job, and with it the model that the job loads."""

    def __init__(self, job: Job):
        self.job = job

    def __call__(self, batch: dict) -> dict:
        try:
            return {"rows": [sum(self.job(str(shard))) for shard in batch["shard"]], "kind": [""], "error": [""]}
        except tuple(_ERRORS.values()) as error:
            # Ray would wrap it in errors and pages of its own.
            kind = next(name for name, kind in _ERRORS.items() if isinstance(error, kind))
            return {"rows": [0], "kind": [kind], "error": [str(error)]}


class RayEngine:
    """Runs the shards on a Ray cluster, by Ray Data, in pools of actors.

    All nodes have to see the output folder, the sources and local models under the same absolute paths.

    Args:
        address (`str`, *optional*): The cluster; by default a local Ray is started.
        num_workers (`int`): Actors a stage.
        gpus_per_worker (`float`): GPUs that each of them holds.
    """

    is_main = True

    def __init__(self, address: str | None, num_workers: int, gpus_per_worker: float):
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise ImportError('The Ray engine needs Ray: pip install "diffusers-iedit[ray]"') from error

        if num_workers < 1:
            raise ValueError(f"`num_workers` has to be at least 1, but is {num_workers}.")
        if not ray.is_initialized():
            # With no CPU to spare beyond its actors, Ray Data waits for ever.
            ray.init(
                address=address,
                num_cpus=None if address else max(os.cpu_count() or 1, num_workers + 2),
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        # It tells of every stage, at length.
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False
        self.num_workers, self.gpus_per_worker = num_workers, gpus_per_worker

    def share(self, shards: list[Shard]) -> list[Shard]:
        """All of them: there is one driver."""
        return shards

    def run(self, job: Job, shards: list[str]) -> Iterator[int]:
        """Builds the shards and yields the rows of each when it is done."""
        import ray

        tasks = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        built = tasks.map_batches(
            _RayWorker,
            fn_constructor_args=(job,),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(self.num_workers, len(shards))),
            num_cpus=1,
            num_gpus=self.gpus_per_worker if job.has_model else 0,
        )
        for row in built.iter_rows():
            if row["kind"]:
                raise _ERRORS[row["kind"]](row["error"])
            yield int(row["rows"])

    def wait(self) -> None:
        """There is one driver: nothing to wait for."""


def make_engine(
    kind: str, ray_address: str | None, num_workers: int, gpus_per_worker: float | None
) -> LocalEngine | RayEngine:
    """The engine that a command was asked for.

    Args:
        kind (`str`): "local" or "ray".
        ray_address, num_workers: As for `RayEngine`.
        gpus_per_worker (`float`, *optional*): As for `RayEngine`; by default one if there is one here.
    """
    if kind == "local":
        return LocalEngine()
    import torch

    gpus = float(torch.cuda.is_available()) if gpus_per_worker is None else gpus_per_worker
    return RayEngine(ray_address, num_workers, gpus)
