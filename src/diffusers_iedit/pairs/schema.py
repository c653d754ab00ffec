"""The columns of iEdit's training and evaluation sets, and the one place that loads and checks them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import datasets
import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, Value


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

_TEXTS = ("source_caption", "edit_prompt", "source_term", "target_term")

_IMAGES_AND_MASKS = (("source_image", "source_mask"), ("target_image", "target_mask"))

_IMAGES = tuple(name for names in _IMAGES_AND_MASKS for name in names)


def _column_faults(features: Features | None, where: str) -> list[str]:
    if features is None:
        return [f"{where}: the columns are not known; a data set with a schema (parquet, arrow, a Hub id) is needed."]
    faults = []
    for name, expected in FEATURES.items():
        if name not in features:
            faults.append(f"{where}: column `{name}` is missing; there are {', '.join(features)}.")
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


def _row_faults(row: dict, where: str) -> Iterator[str]:
    for name in _TEXTS:
        if not (row[name] or "").strip():
            yield f"{where}: `{name}` is empty."
    images = {}
    for name in _IMAGES:
        if row[name] is None:
            yield f"{where}: `{name}` is missing."
            continue
        try:
            images[name] = FEATURES[name].decode_example(row[name])
        except Exception as error:
            # Damaged files make PIL's decoders raise nearly anything.
            yield f"{where}: `{name}` cannot be decoded: {error}"
    for image_name, mask_name in _IMAGES_AND_MASKS:
        if image_name in images and images[image_name].mode != "RGB":
            yield f"{where}: `{image_name}` has to be RGB, but has the PIL mode {images[image_name].mode}."
        if image_name not in images or mask_name not in images:
            continue
        image, mask = images[image_name], images[mask_name]
        if mask.mode != "L":
            yield f"{where}: `{mask_name}` has to be 8-bit grey (PIL mode L, 255 = edit), but has mode {mask.mode}."
        elif np.asarray(mask).max() < 128:
            # Also the mask of 0 and 1 that somebody forgot to scale.
            yield f"{where}: `{mask_name}` is black (255 = edit): it marks nothing to edit."
        if mask.size != image.size:
            yield (
                f"{where}: `{mask_name}` is {mask.width} x {mask.height}, but `{image_name}` is"
                f" {image.width} x {image.height}."
            )
    if row["similarity"] is None or not -1.001 <= row["similarity"] <= 1.001:
        yield f"{where}: `similarity` has to be a cosine in [-1, 1], but is {row['similarity']}."


def _faults(pairs: Dataset | IterableDataset, where: str, rows: int | None) -> Iterator[str]:
    if column_faults := _column_faults(pairs.features, where):
        yield from column_faults
        return
    # Images are decoded one by one, so that one that cannot be is a fault of its row instead of the end.
    encoded = pairs.select_columns(list(FEATURES))
    for name in _IMAGES:
        encoded = encoded.cast_column(name, Image(decode=False))
    number = -1
    for number, row in enumerate(encoded if rows is None else encoded.take(rows)):
        yield from _row_faults(row, f"{where}, row {number}")
    if number < 0:
        yield f"{where}: there are no rows."


def _open(source: str | os.PathLike, split: str, streaming: bool, revision: str | None) -> Dataset | IterableDataset:
    path, files = os.fspath(source), None
    try:
        if os.path.isdir(path):
            # By itself, `datasets` takes a folder for any other of the same name that it has read before. Told of the
            # files, it looks at these.
            files = datasets.load_dataset_builder(path).config.data_files
        return datasets.load_dataset(path, split=split, data_files=files, streaming=streaming, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        found = "" if os.path.exists(source) else ", which is no folder here,"
        raise ValueError(f"The split {split!r} of {os.fspath(source)!r}{found} cannot be opened: {error}") from error


def validate(
    source: str | os.PathLike | Dataset | IterableDataset, split: str = "train", revision: str | None = None
) -> list[str]:
    """Checks every row of a set of pairs against the schema.

    Args:
        source (`str`, `os.PathLike`, [`~datasets.Dataset`] or [`~datasets.IterableDataset`]): A folder, a Hub id, or
            a data set that is open already.
        split (`str`, *optional*, defaults to `"train"`): The split, for a folder or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.

    Returns:
        `list[str]`: One message a fault, each with the row's number and the column; empty if all is well.

    Raises:
        ValueError: If there is no such folder, Hub id or split.
    """
    if isinstance(source, (Dataset, IterableDataset)):
        return list(_faults(source, "the pairs", rows=None))
    return list(_faults(_open(source, split, True, revision), str(source), rows=None))


def load_pairs(
    source: str | os.PathLike, split: str = "train", streaming: bool = False, revision: str | None = None
) -> Dataset | IterableDataset:
    """Opens a set of pairs, after a check of its columns and of its first rows (`validate` checks every row).

    Args:
        source (`str` or `os.PathLike`): A folder or a Hub id.
        split (`str`, *optional*, defaults to `"train"`): The split.
        streaming (`bool`, *optional*, defaults to `False`): Read while iterating instead of preparing all at first.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: With the columns of `FEATURES`, in that order;
        images decode to PIL.

    Raises:
        ValueError: If it cannot be opened, or if it is no set of pairs, one line a fault.
    """
    pairs = _open(source, split, streaming, revision)
    if faults := list(_faults(pairs, str(source), rows=8)):
        raise ValueError("This is no set of iEdit pairs:\n" + "\n".join(faults))
    return pairs.select_columns(list(FEATURES))
