"""Builds iEdit's weakly supervised training set from captioned images (Sec. 3.1), with diffusers_iedit.pairs.

Stopped at any moment, the same command goes on where it was.
"""

import logging
import os
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields
from pathlib import Path

from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from diffusers_iedit.pairs.options import (
    STAGES,
    CaptionOptions,
    EditOptions,
    EmbedOptions,
    MaskOptions,
    ReadOptions,
    RetrieveOptions,
)


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
        metadata={"choices": STAGES, "help": "build from this stage on again, with new options; go on without it"},
    )
    license_note: str = field(
        default="Not stated. The images belong to their owners.",
        metadata={"help": "for the card: under what terms the images may be used; a finished set needs --redo write"},
    )
    push_to_hub: bool = field(default=False, metadata={"help": "upload the finished data set"})
    hub_dataset_id: str | None = field(default=None, metadata={"help": "its Hub id; by default the folder's name"})
    hub_private: bool = field(default=False, metadata={"help": "make a new Hub repository private"})


@dataclass
class EditArguments:
    """Stage 3, edit: which changes are made; explained at `EditOptions`."""

    edit_seed: int = field(default=0, metadata={"help": "another seed gives the same captions other edits"})
    nouns: bool = field(default=True, metadata={"help": "change nouns, to co-hyponyms"})
    adjectives: bool = field(default=True, metadata={"help": "change adjectives, to other colours and antonyms"})
    adjective_share: float = field(
        default=EditOptions.adjective_share,
        metadata={"help": "chance that an adjective changes where a noun could too"},
    )
    people: bool = field(default=True, metadata={"help": "change people: man -> woman, chef -> waiter"})
    natural_colours: bool = field(
        default=True, metadata={"help": "animals, food and plants only get colours that they have"}
    )
    vocabulary: list[str] | None = field(
        default=None, metadata={"help": "change only these words, and only to each other: what the pool can show"}
    )
    keep: list[str] = field(default_factory=list, metadata={"help": "words that stay, with their adjectives"})
    common_words: bool = field(default=True, metadata={"help": "take new nouns from a list of everyday things"})
    min_count: int = field(
        default=EditOptions.min_count, metadata={"help": "without that list: how often SemCor must use a new noun"}
    )
    max_senses: int = field(
        default=EditOptions.max_senses,
        metadata={"help": "senses of a word that are looked at, the most frequent first"},
    )
    max_hypernym_levels: int = field(
        default=EditOptions.max_hypernym_levels, metadata={"help": "how far up WordNet co-hyponyms are looked for"}
    )
    min_choices: int = field(
        default=EditOptions.min_choices, metadata={"help": "look one level up while there are fewer co-hyponyms"}
    )
    max_length: int = field(
        default=EditOptions.max_length, metadata={"help": "longest caption in characters; others are dropped"}
    )

    def options(self) -> EditOptions:
        values = {field.name: getattr(self, field.name) for field in fields(EditOptions)}
        values["vocabulary"] = None if self.vocabulary is None else frozenset(self.vocabulary)
        return EditOptions(**values | {"keep": frozenset(self.keep)})


def main() -> None:
    # Under `accelerate launch` every process comes here: what all of them have to say is said by the first.
    is_first = os.environ.get("RANK", "0") == "0"
    level = logging.WARNING if is_first else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    # A bar for each model's weights would break the stage's own.
    transformers_logging.disable_progress_bar()
    stages = (ReadOptions, CaptionOptions, EditArguments, EmbedOptions, RetrieveOptions, MaskOptions)
    usage = "%(prog)s --source SOURCE --output_dir OUTPUT_DIR [options, see --help]"
    parser = HfArgumentParser((RunOptions, *stages), description=__doc__, usage=usage)
    try:
        # Older versions of argparse cannot write to None.
        with open(os.devnull, "w") as nowhere, ExitStack() as silenced:
            if not is_first:
                silenced.enter_context(redirect_stdout(nowhere))
                silenced.enter_context(redirect_stderr(nowhere))
            run, read, caption, edit, embed, retrieve, mask = parser.parse_args_into_dataclasses()
            edit_options = edit.options()
    except ValueError as error:
        sys.exit(f"build_dataset.py: error: {error}" if is_first else 1)

    # What --help and a wrong option get is not to wait for these, which take seconds.
    import torch
    from accelerate import PartialState

    from diffusers_iedit.engines import LocalEngine, RayEngine
    from diffusers_iedit.pairs.build import build
    from diffusers_iedit.pairs.jobs import Options
    from diffusers_iedit.pairs.write import push

    # Given again, `--redo` would begin its stage again.
    again = "Run the same command again" if run.resume and not run.redo else "Run it again without --redo, --no_resume"
    try:
        if run.engine == "ray":
            gpus = float(torch.cuda.is_available()) if run.gpus_per_worker is None else run.gpus_per_worker
            engine = RayEngine(run.ray_address, run.num_workers, gpus)
        else:
            engine = LocalEngine()
        redo = run.redo if run.resume else STAGES[0]
        options = Options(read, caption, edit_options, edit.edit_seed, embed, retrieve, mask)
        report = build(run.output_dir, options, engine, run.batch_size, redo, run.license_note)
        if engine.is_main:
            print(f"{report['rows_out']:,} pairs from {report['rows_in']:,} rows in {run.output_dir}")
            for reason, count in report["dropped"].items():
                print(f"  left out: {count:,} {reason}")
            if run.push_to_hub:
                print(push(run.output_dir, run.hub_dataset_id or run.output_dir.resolve().name, run.hub_private))
    except (ValueError, RuntimeError, ImportError) as error:
        sys.exit(f"build_dataset.py: error: {error}")
    except OSError as error:
        # A full disk above all: what is finished stays, and nothing is half-written.
        sys.exit(f"build_dataset.py: error: {str(error).rstrip('.')}. {again} to go on.")
    except KeyboardInterrupt:
        sys.exit(f"build_dataset.py: stopped. {again} to go on." if is_first else 1)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
