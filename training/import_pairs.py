"""Imports a set of pictures before and after an edit (InstructPix2Pix's, MagicBrush, UltraEdit, OmniEdit, NHR-Edit, or
one of your own) as iEdit's training set, with diffusers_iedit.pairs. What the set lacks is filled in.

Stopped at any moment, the same command goes on where it was.
"""

from dataclasses import dataclass, field

from diffusers_iedit.pairs.command import RunOptions, run_command
from diffusers_iedit.pairs.options import (
    IMPORT_STAGES,
    CaptionOptions,
    ReadPairsOptions,
    SegmentOptions,
    SimilarityOptions,
)


@dataclass
class ImportRunOptions(RunOptions):
    """How the import runs: nothing of this changes a row, but for rounding."""

    redo: str | None = field(
        default=None,
        metadata={"choices": IMPORT_STAGES, "help": "begin at this stage again, with new options; go on without it"},
    )
    license_note: str = field(
        default="As those of the set they come from.",
        metadata={"help": "for the card: under what terms the images may be used; a finished set needs --redo write"},
    )


def work(run, options, engine, redo) -> dict:
    # What --help and a wrong option get is not to wait for these, which take seconds.
    from diffusers_iedit.pairs.importing import import_pairs
    from diffusers_iedit.pairs.jobs import ImportOptions

    report = import_pairs(run.output_dir, ImportOptions(*options), engine, run.batch_size, redo, run.license_note)
    if engine.is_main:
        print("columns: " + ", ".join(f"{role} = {column}" for role, column in report["columns"].items()))
        print("masks: " + ", ".join(f"{count:,} from {origin}" for origin, count in report["masks"].items()))
    return report


def main() -> None:
    stages = (ReadPairsOptions, CaptionOptions, SimilarityOptions, SegmentOptions)
    run_command(__doc__, ImportRunOptions, stages, IMPORT_STAGES[0], work)


if __name__ == "__main__":
    main()
