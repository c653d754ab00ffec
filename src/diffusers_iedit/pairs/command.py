"""What the scripts that make sets of pairs share: how they run, what they say, and how they end."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging


if TYPE_CHECKING:
    from ..engines import LocalEngine, RayEngine


@dataclass
class RunOptions:
    """How the build runs: nothing of this changes a row, but for rounding."""

    output_dir: Path = field(metadata={"help": "folder of the data set; large, as it holds the images"})
    engine: str = field(
        default="local", metadata={"choices": ["local", "ray"], "help": "this machine, or a Ray cluster"}
    )
    ray_address: str | None = field(
        default=None, metadata={"help": "the cluster's address, or auto; by default a local Ray is started"}
    )
    num_workers: int = field(default=1, metadata={"help": "Ray: actors a stage, at most"})
    gpus_per_worker: float | None = field(
        default=None, metadata={"help": "Ray: GPUs of each actor; may be a fraction; by default one if there is one"}
    )
    batch_size: int = field(default=16, metadata={"help": "images that a model looks at together"})
    resume: bool = field(default=True, metadata={"help": "go on with a build that was stopped"})
    redo: str | None = field(
        default=None,
        metadata={"help": "begin at this stage again, with new options; go on without it"},
    )
    license_note: str = field(
        default="Not stated. The images belong to their owners.",
        metadata={"help": "for the card: under what terms the images may be used; a finished set needs --redo write"},
    )
    push_to_hub: bool = field(default=False, metadata={"help": "upload the finished data set"})
    hub_dataset_id: str | None = field(default=None, metadata={"help": "its Hub id; by default the folder's name"})
    hub_private: bool = field(default=False, metadata={"help": "make a new Hub repository private"})


def run_command(
    description: str | None,
    run_options: type[RunOptions],
    stages: Sequence[type],
    first_stage: str,
    work: Callable[[RunOptions, list[Any], LocalEngine | RayEngine, str | None], dict],
) -> None:
    """Parses the command line, does the work, says what came of it, and pushes it if that is asked for.

    Args:
        description (`str`): For the help.
        run_options, stages: Dataclasses whose fields are the options.
        first_stage (`str`): Where to begin with `--no_resume`.
        work (`Callable`): From how it runs, the options of the stages, the engine and the stage to begin at again to
            the report.
    """
    script = Path(sys.argv[0]).name
    # Under `accelerate launch` every process comes here: what all of them have to say is said by the first.
    is_first = os.environ.get("RANK", "0") == "0"
    level = logging.WARNING if is_first else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    # A bar for each model's weights would break the stage's own.
    transformers_logging.disable_progress_bar()
    usage = "%(prog)s --source SOURCE --output_dir OUTPUT_DIR [options, see --help]"
    parser = HfArgumentParser((run_options, *stages), description=description, usage=usage)
    try:
        # Older versions of argparse cannot write to None.
        with open(os.devnull, "w") as nowhere, ExitStack() as silenced:
            if not is_first:
                silenced.enter_context(redirect_stdout(nowhere))
                silenced.enter_context(redirect_stderr(nowhere))
            run, *options = parser.parse_args_into_dataclasses()
    except ValueError as error:
        sys.exit(f"{script}: error: {error}" if is_first else 1)

    # What --help and a wrong option get is not to wait for these, which take seconds.
    from accelerate import PartialState

    from ..engines import make_engine
    from .write import push

    # Given again, `--redo` would begin its stage again.
    again = "Run the same command again" if run.resume and not run.redo else "Run it again without --redo, --no_resume"
    try:
        engine = make_engine(run.engine, run.ray_address, run.num_workers, run.gpus_per_worker)
        report = work(run, options, engine, run.redo if run.resume else first_stage)
        if engine.is_main:
            print(f"{report['rows_out']:,} pairs from {report['rows_in']:,} rows in {run.output_dir}")
            for reason, count in report["dropped"].items():
                print(f"  left out: {count:,} {reason}")
            if run.push_to_hub:
                print(push(run.output_dir, run.hub_dataset_id or run.output_dir.resolve().name, run.hub_private))
    except (ValueError, RuntimeError, ImportError) as error:
        sys.exit(f"{script}: error: {error}")
    except OSError as error:
        # A full disk above all: what is finished stays, and nothing is half-written.
        sys.exit(f"{script}: error: {str(error).rstrip('.')}. {again} to go on.")
    except KeyboardInterrupt:
        sys.exit(f"{script}: stopped. {again} to go on." if is_first else 1)
    PartialState().destroy_process_group()
