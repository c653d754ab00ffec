"""Stage 7: what lies beside the parquet files - the report, the dataset card and its picture sheet - and the push."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..images import open_image
from ..markdown import code, escape
from .schema import FEATURES, load_pairs


SHEET_ROWS = 8
TILE = 192

DESCRIPTIONS = {
    "source_image": "x_1, the image to edit",
    "target_image": "x_2, the pseudo-target: the image of the pool nearest to source image and edit prompt together",
    "source_caption": "y_1, the caption of the source image",
    "edit_prompt": "y_2, the caption after the edit",
    "source_term": "the words that the edit replaces",
    "target_term": "the words that take their place",
    "source_mask": "M_1, where the source image shows the source term; 8-bit, 255 = edit",
    "target_mask": "M_2, where the target image shows the target term; 8-bit, 255 = edit",
    "similarity": "cosine of the query and the target's CLIP embedding",
    "instruction": "the edit as a command",
}


def picture_sheet(files: list[Path], rows: int = SHEET_ROWS) -> Image.Image:
    """Pairs evenly spread over a data set: source, its mask, target, its mask, and the words beneath.

    Args:
        files (`list[Path]`): The parquet files, in order.
        rows (`int`): Pairs to show, at most.

    Returns:
        `PIL.Image.Image`: RGB; one pair a row.
    """
    counts = [pq.ParquetFile(file).metadata.num_rows for file in files]
    ends = np.cumsum(counts)
    chosen = np.unique(np.linspace(0, ends[-1] - 1, min(rows, ends[-1])).astype(int))
    font, line = ImageFont.load_default(14), 20
    height = TILE + 3 * line
    sheet = Image.new("RGB", (4 * TILE, len(chosen) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, number in enumerate(chosen):
        file = int(np.searchsorted(ends, number, side="right"))
        pair = _row(pq.ParquetFile(files[file]), number - (ends[file] - counts[file]))
        for column, name in enumerate(("source_image", "source_mask", "target_image", "target_mask")):
            image = open_image(pair[name]["bytes"]).convert("RGB")
            # Small pictures are enlarged as they are, pixel by pixel.
            resample = Image.Resampling.LANCZOS if max(image.size) > TILE else Image.Resampling.NEAREST
            sheet.paste(ImageOps.contain(image, (TILE, TILE), resample), (column * TILE, place * height))
        terms = f"{pair['source_term']} -> {pair['target_term']}"
        if "similarity" in pair:
            terms += f", similarity {pair['similarity']:.3f}"
        for below, text in enumerate((pair["source_caption"], pair["edit_prompt"], terms)):
            draw.text((4, place * height + TILE + below * line), text, ("black", "black", "grey")[below], font)
    return sheet


def _row(file: pq.ParquetFile, row: int) -> dict:
    """A row of a Parquet file; only its row group is read."""
    group = 0
    while row >= file.metadata.row_group(group).num_rows:
        row -= file.metadata.row_group(group).num_rows
        group += 1
    return file.read_row_group(group).slice(row, 1).to_pylist()[0]


def dataset_card(report: dict, manifest: dict, license_note: str) -> DatasetCard:
    """The README of a set that was built: what is in it, what it was made from and by, and what was left out.

    Args:
        report (`dict`): As in report.json.
        manifest (`dict`): As in manifest.json: the options by stage.
        license_note (`str`): Under what terms the source images may be used.
    """
    manifest = _public(manifest)
    read = manifest["read"]
    captions = f"by {code(manifest['caption']['caption_model'])}"
    if read["caption_column"] is not None:
        captions = f"from the column {code(read['caption_column'])}"
    return _card(
        report,
        manifest,
        license_note,
        FEATURES,
        DESCRIPTIONS,
        tags=["weak-supervision"],
        what=f"""\
{report["rows_out"]:,} pairs of a source image with a pseudo-target image, an edit prompt and the masks of what the
edit changes: the weakly supervised training set of the paper [iEdit](https://arxiv.org/abs/2305.05947) (Sec. 3.1),
mined from {code(read["source"])}. The targets were retrieved, not edited: they show what the prompt asks for in
another picture.""",
        how=f"""captions {captions}, edit prompts by
WordNet, embeddings by {code(manifest["embed"]["clip_model"])}, masks by {code(manifest["mask"]["mask_model"])}.""",
        limits="""\
Captions, edits, targets and masks were made by models and nobody checked them. They carry the biases of the source
images and of the models. The images may show people and brands, and whoever publishes them needs the right to.""",
    )


def imported_card(report: dict, manifest: dict, license_note: str, features: Features) -> DatasetCard:
    """The README of a set that was imported; `features` are its columns, the rest as for `dataset_card`."""
    manifest = _public(manifest)
    read, columns = manifest["read"], report["columns"]
    captioner = f"by {code(manifest['caption']['caption_model'])}"
    captions = [
        f"{what} {'from the column ' + code(columns[role]) if role in columns else captioner}"
        for what, role in (("source captions", "caption"), ("edit prompts", "prompt"))
    ]
    origins = {
        "set": "the set's own",
        "difference": "what differs between the two pictures",
        "clipseg": f"of the terms, by {code(manifest['mask']['mask_model'])}",
    }
    masks = "; ".join(f"{origins[name]} ({count:,})" for name, count in report["masks"].items())
    return _card(
        report,
        manifest,
        license_note,
        features,
        DESCRIPTIONS
        | {
            "target_image": "x_2, the image after the edit",
            "source_mask": "M_1, where the edit changes the source image; 8-bit, 255 = edit",
            "target_mask": "M_2, the same in the target image",
        },
        tags=[],
        what=f"""\
{report["rows_out"]:,} pairs of a picture before and after an edit, with captions and the masks of what the edit
changes, in the columns of the training sets of [iEdit](https://arxiv.org/abs/2305.05947). They come from
{code(read["source"])}.""",
        how=f"""{", ".join(captions)}, terms from the words in which these differ. Masks: {masks}.""",
        limits="""\
What models and comparisons have filled in nobody has checked. The images may show people and brands, and whoever
publishes them needs the right to.""",
    )


def _public(manifest: dict) -> dict:
    """Of a local path only the name: the rest is nobody's business."""

    def public(value):
        if isinstance(value, list):
            return [public(item) for item in value]
        is_path = isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))
        return os.path.basename(os.path.abspath(value)) if is_path else value

    return {stage: {name: public(value) for name, value in options.items()} for stage, options in manifest.items()}


def _card(
    report: dict,
    manifest: dict,
    license_note: str,
    features: Features,
    descriptions: dict[str, str],
    tags: list[str],
    what: str,
    how: str,
    limits: str,
) -> DatasetCard:
    rows = report["rows_out"]
    size = next(
        name
        for limit, name in ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e99, "n>1M"))
        if rows < limit
    )
    data = DatasetCardData(
        pretty_name="iEdit pairs",
        task_categories=["image-to-image", "text-to-image"],
        language="en",
        tags=["iedit", "image-editing", "diffusers", *tags],
        size_categories=size,
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    )
    # The cache of `datasets` knows a local set by the folder's name and the card: these numbers tell it from others.
    num_bytes = sum(report["files"].values())
    info = DatasetInfo(
        features=features,
        splits=SplitDict({"train": SplitInfo("train", num_bytes, rows)}),
        download_size=num_bytes,
        dataset_size=num_bytes,
    )
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    columns = "\n".join(f"| `{name}` | {descriptions[name]} |" for name in features)
    counts = "\n".join(
        f"| {stage} | {numbers['rows_in']:,} | {numbers['rows_out']:,} |"
        f" {', '.join(f'{reason} {count:,}' for reason, count in numbers['dropped'].items()) or '-'} |"
        f" {numbers['seconds']:,.0f} |"
        for stage, numbers in report["stages"].items()
    )
    options = json.dumps(manifest, indent=2, ensure_ascii=False)
    return DatasetCard(
        f"""---
{data.to_yaml()}
---

# iEdit pairs

{what}

![pairs: source, mask, target, mask](sheet.jpg)

```python
from datasets import load_dataset

pairs = load_dataset("path/of/this/folder/or/its/Hub/id", split="train")
```

| column | meaning |
|---|---|
{columns}

## Licence of the images

Under what terms they may be used: {escape(license_note)}

## How it was made

By [diffusers-iedit](https://pypi.org/project/diffusers-iedit/): {how}

| stage | rows in | rows out | left out | seconds of work |
|---|---|---|---|---|
{counts}

All options:

```json
{options}
```

## Limits

{limits}
""",
        ignore_metadata_errors=True,
    )


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Uploads a finished data set in one commit, so that the Hub has the old revision or the new one.

    Args:
        folder (`Path`): What the build left: data, card, sheet, report.
        repo_id (`str`): Hub id of the data set; created if it is not there.
        private (`bool`): Whether a new repository is private.

    Returns:
        `str`: Its address.
    """
    load_pairs(folder, streaming=True)
    api = HfApi()
    repo = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo.repo_id,
        repo_type="dataset",
        folder_path=folder,
        allow_patterns=["data/*.parquet", "README.md", "report.json", "sheet.jpg"],
        # Files of an earlier, longer set would be mixed with the new ones.
        delete_patterns=["data/*.parquet"],
        commit_message="Upload iEdit pairs",
    )
    return repo.url
