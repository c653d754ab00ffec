"""What a set of pairs is built by, stage after stage. Nothing here imports a library that takes long."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .columns import CONVENTIONS, SETS


if TYPE_CHECKING:
    from .read import Collection
    from .sets import PairCollection


STAGES = ("read", "caption", "edit", "embed", "retrieve", "mask", "write")
"""The stages of a build."""

IMPORT_STAGES = ("read", "caption", "edit", "embed", "mask", "write")
"""The stages of an import: the targets are there."""


def _check_sizes(options: ReadOptions | ReadPairsOptions) -> None:
    for name in ("min_size", "max_size", "shard_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"`{name}` has to be at least 1, but is {getattr(options, name)}.")
    if options.max_size < options.min_size:
        raise ValueError(f"`max_size` ({options.max_size}) has to be at least `min_size` ({options.min_size}).")


@dataclass
class ReadOptions:
    """Stage 1, read: which images, and which of them are fit to use."""

    source: str = field(metadata={"help": "the source images: Hub id, folder, or parquet, arrow or tar file"})
    source_split: str = field(default="train", metadata={"help": "split of the source"})
    source_files: list[str] | None = field(
        default=None, metadata={"help": "only these files of the source, as patterns: cc3m-train-000*.tar"}
    )
    source_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub id"})
    image_column: str = field(default="image", metadata={"help": "column of the images (webdataset: jpg)"})
    caption_column: str | None = field(
        default=None,
        metadata={
            "help": "keep the captions of this column instead of writing new ones: the LAION captions of Table 2"
        },
    )
    pool: str | None = field(
        default=None, metadata={"help": "where to look for the pseudo-targets; by default the source itself"}
    )
    pool_split: str = field(default="train", metadata={"help": "split of the pool"})
    pool_files: list[str] | None = field(default=None, metadata={"help": "only these files of the pool"})
    pool_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub id"})
    pool_image_column: str | None = field(
        default=None, metadata={"help": "column of the pool's images; by default --image_column"}
    )
    min_size: int = field(default=64, metadata={"help": "leave out images whose shorter side has fewer pixels"})
    max_size: int = field(
        default=768,
        metadata={"help": "scale images down whose shorter side has more pixels; 384 is what iEdit trains at"},
    )
    shard_size: int = field(default=1000, metadata={"help": "images a shard: what a stopped build may have to repeat"})

    def __post_init__(self):
        _check_sizes(self)

    def collections(self) -> dict[str, Collection]:
        """The source, and the pool if it is another collection."""
        # With all that reads images, which `--help` is not to wait for.
        from .read import Collection

        found = {
            "source": Collection(
                self.source,
                self.source_split,
                self.source_files,
                self.source_revision,
                self.image_column,
                self.caption_column,
                "source",
            )
        }
        if self.pool is not None:
            image_column = self.pool_image_column or self.image_column
            found["pool"] = Collection(
                self.pool, self.pool_split, self.pool_files, self.pool_revision, image_column, None, "pool"
            )
        return found


@dataclass
class CaptionOptions:
    """Stage 2, caption: what describes the source images."""

    caption_model: str = field(
        default="Salesforce/blip-image-captioning-large", metadata={"help": "BLIP: Hub id, folder or mini"}
    )
    max_new_tokens: int = field(default=40, metadata={"help": "longest caption, in tokens"})
    num_beams: int = field(default=1, metadata={"help": "beams of the caption search; 1 is greedy"})

    def __post_init__(self):
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` has to be at least 1, but is {getattr(self, name)}.")


@dataclass(frozen=True)
class EditOptions:
    """Which changes are made. Every filter is here; the defaults suit captions of photographs.

    Args:
        nouns (`bool`): Change nouns, to co-hyponyms.
        adjectives (`bool`): Change adjectives: colours to other colours, others to their antonyms.
        adjective_share (`float`): Chance, 0 to 1, that a caption which offers both gets its adjective changed.
            Captions hold more nouns than adjectives, so that a choice among all words would seldom change a colour.
        people (`bool`): Change people ("man" -> "woman", "chef" -> "waiter"), where no "his" or "her" depends on them.
            Only the people of the package's list are ever changed or chosen.
        natural_colours (`bool`): Animals, food and plants get only colours they have: a pool has no purple dogs.
        vocabulary (`frozenset[str]`, *optional*): The nouns (in the singular) and adjectives that the pool can show.
            What is changed, what it becomes and what a changed adjective describes then all come from these words, and
            `common_words` and `natural_colours` do not apply.
        keep (`frozenset[str]`): Words, in the singular, that stay, and whose adjectives stay too.
        common_words (`bool`): Take nouns only from the package's list of everyday visible things, and change only what
            is on it or of a kind that is ("labrador"); the list also says which things can stand in each other's
            places. Without it any noun of WordNet that `min_count` lets through will do: more variety and many odd
            edits ("a hat on a bell"), fewer of them with `max_hypernym_levels=1`.
        min_count (`int`): How often SemCor must use a noun in its sense, where `common_words` is off: rare words name
            what a pool seldom has.
        max_senses (`int`): How many of a word's senses, the most frequent first, are looked at for an antonym or for a
            visible thing: later ones are rarely what a caption means.
        max_hypernym_levels (`int`): How many levels up co-hyponyms are looked for. The default stays close to the
            thing; a small vocabulary needs more (8 reaches from a cat to a bird and from a cup to a hat).
        min_choices (`int`): Go one level up, within the limit, while there are fewer co-hyponyms than this.
        max_length (`int`): Longest caption in characters. What is longer is no caption.
    """

    nouns: bool = True
    adjectives: bool = True
    adjective_share: float = 0.5
    people: bool = True
    natural_colours: bool = True
    vocabulary: frozenset[str] | None = None
    keep: frozenset[str] = frozenset()
    common_words: bool = True
    min_count: int = 5
    max_senses: int = 2
    max_hypernym_levels: int = 5
    min_choices: int = 5
    max_length: int = 1000

    def __post_init__(self):
        if not (self.nouns or self.adjectives):
            raise ValueError("`nouns` or `adjectives` must be true, or there is nothing to change.")
        if not 0 <= self.adjective_share <= 1:
            raise ValueError(f"`adjective_share` must be a chance from 0 to 1, got {self.adjective_share}.")
        for name in ("max_senses", "max_hypernym_levels", "min_choices", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")
        for name, value in (("vocabulary", self.vocabulary or frozenset()), ("keep", self.keep)):
            if not isinstance(value, frozenset):
                raise ValueError(f"`{name}` must be a frozenset of words, got {type(value).__name__}.")


@dataclass
class EmbedOptions:
    """Stage 4, embed: what the images and the edit prompts are compared by."""

    clip_model: str = field(default="openai/clip-vit-large-patch14", metadata={"help": "CLIP: Hub id, folder or mini"})


@dataclass
class RetrieveOptions:
    """Stage 5, retrieve: which image of the pool becomes the pseudo-target."""

    text_weight: float = field(
        default=0.5,
        metadata={
            "help": "share of the prompt in the query: 0.5 is the paper's mean, recommend_text_weight.py finds better"
        },
    )
    num_candidates: int = field(
        default=10,
        metadata={"help": "nearest neighbours that an edit may choose from, when some are used up or masks decide"},
    )
    min_similarity: float | None = field(
        default=None, metadata={"help": "drop neighbours whose cosine with the query is smaller"}
    )
    max_source_similarity: float | None = field(
        default=0.97, metadata={"help": "drop neighbours whose cosine with the source is larger: copies of it"}
    )
    max_target_uses: int | None = field(
        default=None, metadata={"help": "how many edits may have the same target; any number by default"}
    )

    def __post_init__(self):
        if not 0 <= self.text_weight <= 1:
            raise ValueError(f"`text_weight` must lie in [0, 1], got {self.text_weight}.")
        for name in ("num_candidates", "max_target_uses"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("min_similarity", "max_source_similarity"):
            if getattr(self, name) is not None and not -1 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [-1, 1], got {getattr(self, name)}.")


@dataclass
class SegmentOptions:
    """Stage 6, mask: where a pair differs, and which pairs are kept."""

    mask_model: str = field(default="CIDAS/clipseg-rd64-refined", metadata={"help": "CLIPSeg: Hub id, folder or mini"})
    mask_threshold: float = field(default=0.5, metadata={"help": "probability above which a pixel belongs to a mask"})
    min_mask_area: float = field(
        default=0.005, metadata={"help": "drop pairs with a mask below this share of its image: nothing was found"}
    )
    max_mask_area: float = field(
        default=0.9, metadata={"help": "drop pairs with a mask above this share of its image: nothing is left to keep"}
    )
    min_mask_iou: float = field(
        default=0.0,
        metadata={"help": "drop pairs whose masks overlap less (IoU): the loss with masks harms on such pairs"},
    )

    def __post_init__(self):
        if not 0 <= self.mask_threshold < 1:
            raise ValueError(f"`mask_threshold` has to be a probability in [0, 1), but is {self.mask_threshold}.")
        if not 0 <= self.min_mask_area < self.max_mask_area <= 1:
            raise ValueError(
                "`min_mask_area` and `max_mask_area` have to be shares with 0 <= min < max <= 1, but are"
                f" {self.min_mask_area} and {self.max_mask_area}."
            )
        if not 0 <= self.min_mask_iou <= 1:
            raise ValueError(f"`min_mask_iou` has to lie in [0, 1], but is {self.min_mask_iou}.")


@dataclass
class MaskOptions(SegmentOptions):
    """Stage 6, mask, of a build, which has several targets to choose from."""

    rerank_by_mask: bool = field(
        default=False,
        metadata={"help": "of the nearest neighbours take the one whose mask overlaps the source's best"},
    )


@dataclass
class ReadPairsOptions:
    """Stage 1, read, of an import: which set, what its columns hold, and which pictures are fit to use."""

    source: str = field(metadata={"help": "the set: Hub id, folder, or parquet, arrow or tar file"})
    source_split: str | None = field(
        default=None, metadata={"help": "split of the set; by default train, or the only one that there is"}
    )
    source_config: str | None = field(
        default=None, metadata={"help": "configuration of the set, if it has several to choose from"}
    )
    source_files: list[str] | None = field(
        default=None, metadata={"help": "only these files of the set, as patterns: data/train-000*"}
    )
    source_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub id"})
    format: str | None = field(
        default=None,
        metadata={"choices": list(SETS), "help": "whose columns these are; by default that is seen by their names"},
    )
    source_column: str | None = field(default=None, metadata={"help": "column of the pictures before the edit"})
    target_column: str | None = field(default=None, metadata={"help": "column of the pictures after the edit"})
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "column of captions of the pictures after the edit; by default BLIP writes them"},
    )
    instruction_column: str | None = field(
        default=None, metadata={"help": "column of the edits as commands (make it blue), which describe no picture"}
    )
    caption_column: str | None = field(
        default=None,
        metadata={"help": "column of captions of the pictures before the edit; by default BLIP writes them"},
    )
    mask_column: str | None = field(
        default=None, metadata={"help": "column of the masks; by default they are what differs between the pictures"}
    )
    mask_convention: str | None = field(
        default=None,
        metadata={
            "choices": list(CONVENTIONS),
            "help": "what marks the edit in these masks; by default white, or what the format says",
        },
    )
    min_size: int = field(default=64, metadata={"help": "leave out pictures whose shorter side has fewer pixels"})
    max_size: int = field(
        default=768,
        metadata={"help": "scale pictures down whose shorter side has more pixels; 384 is what iEdit trains at"},
    )
    shard_size: int = field(default=500, metadata={"help": "pairs a shard: what a stopped import may have to repeat"})

    def __post_init__(self):
        _check_sizes(self)

    def collections(self) -> dict[str, PairCollection]:
        """The set."""
        # With all that reads images, which `--help` is not to wait for.
        from .sets import PairCollection

        return {"source": PairCollection(self)}


@dataclass
class SimilarityOptions(EmbedOptions):
    """Stage 4, embed, of an import: how well picture and prompt tell where each edit leads."""

    similarity: bool = field(
        default=True,
        metadata={"help": "embed the pairs for the column similarity; without it, CLIP only counts the tokens"},
    )
