"""Builds iEdit's weakly supervised training set from captioned images (Sec. 3.1), with diffusers_iedit.pairs.

Stopped at any moment, the same command goes on where it was.
"""

from dataclasses import dataclass, field, fields

from diffusers_iedit.pairs.command import RunOptions, run_command
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
class BuildRunOptions(RunOptions):
    """How the build runs: nothing of this changes a row, but for rounding."""

    redo: str | None = field(
        default=None,
        metadata={"choices": STAGES, "help": "build from this stage on again, with new options; go on without it"},
    )


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

    def __post_init__(self):
        self.options()


def work(run, options, engine, redo) -> dict:
    # What --help and a wrong option get is not to wait for these, which take seconds.
    from diffusers_iedit.pairs.build import build
    from diffusers_iedit.pairs.jobs import Options

    read, caption, edit, embed, retrieve, mask = options
    chosen = Options(read, caption, edit.options(), edit.edit_seed, embed, retrieve, mask)
    return build(run.output_dir, chosen, engine, run.batch_size, redo, run.license_note)


def main() -> None:
    stages = (ReadOptions, CaptionOptions, EditArguments, EmbedOptions, RetrieveOptions, MaskOptions)
    run_command(__doc__, BuildRunOptions, stages, STAGES[0], work)


if __name__ == "__main__":
    main()
