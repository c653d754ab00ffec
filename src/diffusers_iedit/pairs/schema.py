"""The columns of iEdit's training and evaluation sets, and the one place that loads and checks them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import datasets
import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, Value
from PIL import ExifTags, ImageOps
from PIL.Image import Image as PILImage

from ..images import open_image
from .files import check_tables, locate, read_file, set_roots


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FEATURES = Features(
    {
        # x_1, x_2: RGB. They may differ in size.
        "source_image": Image(),
        "target_image": Image(),
        # y_1, y_2.
        "source_caption": Value("string"),
        "edit_prompt": Value("string"),
        # y_1^diff, y_2^diff: what the masks show.
        "source_term": Value("string"),
        "target_term": Value("string"),
        # M_1, M_2: 8-bit, 255 = edit, as large as their image.
        "source_mask": Image(),
        "target_mask": Image(),
        # Cosine of the query and the target's CLIP embedding.
        "similarity": Value("float32"),
    }
)
"""The columns of a set of pairs (symbols as in the paper)."""

OPTIONAL = ("similarity",)
"""Those that a set may lack: nothing is trained or measured by them."""

INSTRUCTION = "instruction"
"""A column that imported sets have besides: the edit as a command ("make it blue"), which describes no picture."""

_TEXTS = ("source_caption", "edit_prompt", "source_term", "target_term")

_IMAGES_AND_MASKS = (("source_image", "source_mask"), ("target_image", "target_mask"))

_IMAGES = tuple(name for names in _IMAGES_AND_MASKS for name in names)


def _column_faults(features: Features | None, where: str) -> list[str]:
    if features is None:
        return [f"{where}: the columns are not known; a data set with a schema (parquet, arrow, a Hub id) is needed."]
    faults = []
    if missing := [f"`{name}`" for name in FEATURES if name not in (*features, *OPTIONAL)]:
        columns = f"column {missing[0]} is" if len(missing) == 1 else f"columns {', '.join(missing)} are"
        faults.append(
            f"{where}: {columns} missing; there are {', '.join(features)}. Of pictures before and after an edit,"
            " training/import_pairs.py makes such a set."
        )
    for name, expected in FEATURES.items():
        if name not in features:
            continue
        found = features[name]
        if isinstance(expected, Image):
            fits = isinstance(found, Image)
        elif expected.dtype == "string":
            fits = isinstance(found, Value) and found.dtype in ("string", "large_string")
        else:
            fits = isinstance(found, Value) and found.dtype.startswith("float")
        if not fits:
            faults.append(f"{where}: column `{name}` has to be {expected}, but is {found}.")
    return faults


class PairImage(Image):
    """[`~datasets.Image`] for sets that anybody may have made: it opens photographs' formats and the set's own files.

    Args:
        roots (`tuple[str]`, *optional*): Where the set's files are, from `set_roots`; without them, anywhere.
        decode (`bool`): As for [`~datasets.Image`].
    """

    def __init__(self, roots: tuple[str, ...] | None = None, decode: bool = True):
        super().__init__(decode=decode)
        # No field of the dataclass: it is not to get into files that are written from the set.
        self.roots = roots

    def __eq__(self, other: object) -> bool:
        # The schema of a set that was opened is the one that it was written with.
        return isinstance(other, Image) and (self.mode, self.decode) == (other.mode, other.decode)

    __hash__ = Image.__hash__

    def open(self, value: dict) -> PILImage:
        """The image of a value with "bytes" and "path", upright.

        Raises:
            FileNotFoundError, ValueError: If it cannot be read, in one line.
        """
        image = open_image(read_file(value, self.roots))
        return ImageOps.exif_transpose(image) if image.getexif().get(ExifTags.Base.Orientation) else image

    def decode_example(self, value: dict, token_per_repo_id: dict | None = None) -> PILImage:
        return self.open(value)


def with_encoded_images(pairs: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same rows with their images as they are stored, for `read_pair`."""
    for name in pairs.features.keys() & set(_IMAGES):
        pairs = pairs.cast_column(name, PairImage(getattr(pairs.features[name], "roots", None), decode=False))
    return pairs


def same_tokens(tokenizer: PreTrainedTokenizerBase, text: str, other: str) -> bool:
    """Whether a model with this tokenizer sees no difference, for instance as it comes after the last token."""
    first, second = tokenizer([text, other], truncation=True).input_ids
    return first == second


def read_pair(
    row: dict, features: Features, where: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[dict, list[str]]:
    """Decodes and checks a row: the one check of `validate`, of `load_pairs` and of a row whose turn it is.

    Args:
        row (`dict`): Of a set `with_encoded_images`; columns that it lacks are not looked at.
        features ([`~datasets.Features`]): Of that set.
        where (`str`): What the messages call the row.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Of the model that the pairs are for.

    Returns:
        `tuple[dict, list[str]]`: The row with decoded images, without those that cannot be decoded, and one message a
        fault.
    """
    pair, faults = dict(row), []
    for name in _TEXTS:
        if name in row and not (row[name] or "").strip():
            faults.append(f"{where}: `{name}` is empty.")
    if not faults and {"source_caption", "edit_prompt"} <= row.keys():
        texts = row["source_caption"], row["edit_prompt"]
        if texts[0].split() == texts[1].split():
            faults.append(f"{where}: `source_caption` and `edit_prompt` are the same: there is nothing to edit.")
        elif tokenizer is not None and same_tokens(tokenizer, *texts):
            faults.append(
                f"{where}: `source_caption` and `edit_prompt` are the same tokens to the model, which takes"
                f" {tokenizer.model_max_length}: there is nothing to edit."
            )
    for name in _IMAGES:
        if name not in row:
            continue
        del pair[name]
        if row[name] is None:
            faults.append(f"{where}: `{name}` is missing.")
            continue
        try:
            pair[name] = features[name].open(row[name])
        except (OSError, ValueError) as error:
            faults.append(f"{where}: `{name}` cannot be decoded: {error}.")
    for image_name, mask_name in _IMAGES_AND_MASKS:
        if image_name in pair and pair[image_name].mode != "RGB":
            faults.append(f"{where}: `{image_name}` has to be RGB, but has the PIL mode {pair[image_name].mode}.")
        if image_name not in pair or mask_name not in pair:
            continue
        image, mask = pair[image_name], pair[mask_name]
        if mask.mode != "L":
            faults.append(
                f"{where}: `{mask_name}` has to be 8-bit grey (PIL mode L, 255 = edit), but has mode {mask.mode}."
            )
        elif mask.getextrema()[1] < 128:
            # Also the mask of 0 and 1 that somebody forgot to scale.
            faults.append(f"{where}: `{mask_name}` is black (255 = edit): it marks nothing to edit.")
        if mask.size != image.size:
            faults.append(
                f"{where}: `{mask_name}` is {mask.width} x {mask.height}, but `{image_name}` is"
                f" {image.width} x {image.height}."
            )
    if "similarity" in row and (row["similarity"] is None or not -1.001 <= row["similarity"] <= 1.001):
        faults.append(f"{where}: `similarity` has to be a cosine in [-1, 1], but is {row['similarity']}.")
    return pair, faults


def _faults(
    pairs: Dataset | IterableDataset, where: str, rows: int | None, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    if column_faults := _column_faults(pairs.features, where):
        yield from column_faults
        return
    # Images are decoded one by one, so that one that cannot be is a fault of its row instead of the end.
    encoded = with_encoded_images(_known_columns(pairs))
    number = -1
    try:
        for number, row in enumerate(encoded if rows is None else encoded.take(rows)):
            yield from read_pair(row, encoded.features, f"{where}, row {number}", tokenizer)[1]
    except _UNREADABLE as error:
        yield f"{where}: the row with number {number + 1} cannot be read: {_reason(error)}"
        return
    if number < 0:
        yield f"{where}: there are no rows."


def _known_columns(pairs: Dataset | IterableDataset) -> Dataset | IterableDataset:
    return pairs.select_columns([name for name in FEATURES if name in pairs.features])


# What `datasets` and pyarrow raise of files that are damaged, empty or of another kind than the first.
_UNREADABLE = (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError)


def _reason(error: Exception) -> str:
    """The message of an error of `datasets` on one line; of one that only says that there was another, that one's."""
    while isinstance(error.__cause__, Exception) and isinstance(error, datasets.exceptions.DatasetGenerationError):
        error = error.__cause__
    return " ".join(str(error).split())


def _paths_elsewhere(pairs: Dataset, where: str) -> Iterator[str]:
    """A fault for the first row that names a picture which is not part of the set. None is read for that."""
    # `datasets` follows all paths when it writes a set that was opened to another place.
    for name, feature in pairs.features.items():
        if not isinstance(feature, PairImage):
            continue
        # As `_open` made it.
        assert feature.roots is not None
        number = 0
        for chunk in pairs.data.column(name).chunks:
            for place in np.flatnonzero(chunk.field("bytes").is_null()):
                path = chunk.field("path")[int(place)].as_py()
                try:
                    locate(path or "", feature.roots)
                except ValueError as error:
                    yield f"{where}, row {number + place}: `{name}` cannot be decoded: {error}."
                    return
            number += len(chunk)


def open_set(
    source: str | os.PathLike,
    split: str,
    streaming: bool = False,
    revision: str | None = None,
    name: str | None = None,
) -> Dataset | IterableDataset:
    """Opens a set of any columns, of its configurations the one of this name; images are read as `load_pairs` says.

    Raises:
        ValueError: If it cannot be opened.
    """
    path, files, options = os.fspath(source), None, {}
    if os.path.isfile(path):
        raise ValueError(f"{path!r} is a file, and has to be the folder that it lies in, or a Hub id.")
    try:
        config = datasets.load_dataset_builder(path, name, revision=revision).config
        if os.path.isdir(path):
            # By itself, `datasets` takes a folder for any other of the same name that it has read before. Told of the
            # files, it looks at these.
            files = config.data_files
            check_tables((files or {}).get(split, ()))
        if hasattr(config, "decode_num_threads"):
            # Streamed from the Hub, threads would decode pictures before they get here, in any format.
            options["decode_num_threads"] = 0
        pairs = datasets.load_dataset(
            path, name, split=split, data_files=files, streaming=streaming, revision=revision, **options
        )
    except _UNREADABLE as error:
        found = "" if os.path.exists(source) else ", which is no folder here,"
        raise ValueError(f"The split {split!r} of {path!r}{found} cannot be opened: {_reason(error)}") from error
    roots = set_roots(path)
    for name, feature in (pairs.features or {}).items():
        if isinstance(feature, Image):
            pairs = pairs.cast_column(name, PairImage(roots))
    return pairs


def validate(
    source: str | os.PathLike | Dataset | IterableDataset,
    split: str = "train",
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[str]:
    """Checks every row of a set of pairs against the schema.

    Args:
        source (`str`, `os.PathLike`, [`~datasets.Dataset`] or [`~datasets.IterableDataset`]): A folder, a Hub id, or
            a data set that is open already.
        split (`str`, *optional*, defaults to `"train"`): The split, for a folder or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Of the model that the pairs are for: finds
            rows whose prompts are the same to it, above all those that it cuts off before they differ.

    Returns:
        `list[str]`: One message a fault, each with the row's number and the column; empty if all is well.

    Raises:
        ValueError: If there is no such folder, Hub id or split.
    """
    if isinstance(source, (Dataset, IterableDataset)):
        return list(_faults(source, "the pairs", None, tokenizer))
    return list(_faults(open_set(source, split, True, revision), str(source), None, tokenizer))


def load_pairs(
    source: str | os.PathLike,
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Dataset | IterableDataset:
    """Opens a set of pairs, after a check of its columns and of its first rows (`validate` checks every row).

    Its images are read from the set alone: a row that names a picture elsewhere on this machine, or one in a format
    that no photograph comes in, is a faulty row.

    Args:
        source (`str` or `os.PathLike`): A folder or a Hub id.
        split (`str`, *optional*, defaults to `"train"`): The split.
        streaming (`bool`, *optional*, defaults to `False`): Read while iterating instead of preparing all at first.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): As for `validate`.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: With the columns of `FEATURES`, in that order, without
        those of `OPTIONAL` that the set lacks; images decode to PIL.

    Raises:
        ValueError: If it cannot be opened, or if it is no set of pairs, one line a fault.
    """
    pairs = open_set(source, split, streaming, revision)
    faults = list(_faults(pairs, str(source), 8, tokenizer))
    if not faults and not streaming:
        faults = list(_paths_elsewhere(pairs, str(source)))
    if faults:
        raise ValueError("This is no set of iEdit pairs:" + ("\n" if len(faults) > 1 else " ") + "\n".join(faults))
    return _known_columns(pairs)
