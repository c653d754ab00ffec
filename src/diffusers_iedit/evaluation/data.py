"""The examples that methods are measured on: sets of pairs or of edits, PIE-Bench's forms, and the mini benchmark."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from diffusers.utils import logging
from PIL import Image

from .. import mini
from ..images import open_image
from ..masking_iedit import difference_term
from ..pairs import masks
from ..pairs.caption import CaptionImages
from ..pairs.columns import recognise
from ..pairs.files import locate, read_file, set_roots
from ..pairs.importing import find_masks
from ..pairs.masks import same_aspect
from ..pairs.options import CaptionOptions, ReadPairsOptions, SegmentOptions
from ..pairs.read import open_stream, tar_columns
from ..pairs.schema import (
    FEATURES,
    INSTRUCTION,
    OPTIONAL,
    PairImage,
    load_pairs,
    open_set,
    read_pair,
    with_encoded_images,
)
from ..pairs.sets import stream_folder
from ..pairs.shards import read_table


logger = logging.get_logger(__name__)

_AT_ONCE = 16


@dataclass(frozen=True)
class Example:
    """One picture and one edit that is asked for.

    Args:
        key (`str`): Unique in its set, and fit for a file's name.
        group (`str`): What it is averaged with: "real" or "generated", a PIE-Bench editing type, or "all".
        image (`PIL.Image.Image`): The source x_1, RGB.
        mask (`PIL.Image.Image`): Where the edit belongs: mode L, 255 = edit, as large as `image`.
        source_caption, edit_prompt (`str`): y_1 and y_2.
        source_term, target_term (`str`, *optional*): y_1^diff and y_2^diff: what the edit replaces, and by what.
        instruction (`str`): The edit as a command, for methods that take one.
        target (`PIL.Image.Image`, *optional*): The true edited picture, where it is known.
        target_mask (`PIL.Image.Image`, *optional*): The new thing's true mask in `target`.
        thing (`tuple[str, str, str]`, *optional*): In the mini world, the noun, the colour and the scene that a right
            edit shows.
    """

    key: str
    group: str
    image: Image.Image
    mask: Image.Image
    source_caption: str
    edit_prompt: str
    source_term: str | None
    target_term: str | None
    instruction: str
    target: Image.Image | None = None
    target_mask: Image.Image | None = None
    thing: tuple[str, str, str] | None = None


class Examples(Sequence[Example]):
    """Examples that are read when they are asked for.

    Args:
        keys (`Sequence[str]`): The key of each example: known without reading any.
        read (`Callable`): The example with a number.
        fingerprint (`str`): SHA-256 of what the examples are read from, the same wherever it lies. Of PIE-Bench's
            images it knows the sizes of their files alone.
    """

    def __init__(self, keys: Sequence[str], read: Callable[[int], Example], fingerprint: str):
        self.keys = tuple(keys)
        self.fingerprint = fingerprint
        self._read = read

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index):
        numbers = range(len(self))[index]
        return [self._read(number) for number in numbers] if isinstance(index, slice) else self._read(numbers)


def load_examples(source: str, split: str | None = None, caption_model: str | None = None) -> Examples:
    """Opens a set of examples; their pictures are read one by one, as they are asked for.

    Args:
        source (`str`): One of

            - `"mini"`: the mini benchmark, `mini_benchmark`;
            - `"pie-bench:DIR"`: PIE-Bench's own folder, `from_pie_bench`;
            - a folder or a Hub id with the columns of [`~diffusers_iedit.pairs.FEATURES`], `from_pairs`;
            - one with those of PIE-Bench++ (`UB-CVML-Group/PIE_Bench_pp`), `from_pie_bench_plus`;
            - one with those of a public set of edits, such as MagicBrush, or a folder of pairs, `from_edits`.
        split (`str`, *optional*): "test" (the default) or "choose" of the mini benchmark, or a split of the set
            ("train" by default, or the only one). PIE-Bench has none.
        caption_model (`str`, *optional*): A BLIP model (Hub id, folder or `mini`), for a set that has no captions.

    Returns:
        [`Examples`]: A sequence of [`Example`] with the attributes `keys` and `fingerprint`.

    Raises:
        ValueError: If there is no such set or split, if it is empty, or if it lacks something that an example needs.
            What is wrong with a picture or a mask is raised when its example is read, and names it.
    """
    if source == "mini":
        return mini_benchmark(split or "test")
    if source.startswith("pie-bench:"):
        if split is not None:
            raise ValueError(f"`split` has to be None for PIE-Bench, which has no splits, got {split!r}.")
        return from_pie_bench(source.removeprefix("pie-bench:"))
    columns = _columns(source, split)
    if columns.issuperset(PIE_BENCH_PLUS):
        return from_pie_bench_plus(source, split)
    if not columns.issuperset(FEATURES.keys() - OPTIONAL) and (
        recognise(columns) or stream_folder(source) is not None
    ):
        return from_edits(source, split, caption_model)
    return from_pairs(source, split or "train")


def _columns(source: str, split: str | None) -> set[str]:
    """The columns of a set; none if it cannot be opened."""
    try:
        stream = stream_folder(source)
        if stream is None:
            names = datasets.get_dataset_config_names(source)
            if len(names) > 1:
                # Only of PIE-Bench++ all configurations are taken together.
                return set(open_set(source, split or "V1", streaming=True, name=names[0]).features)
            stream, tars = open_stream(source, split, None, None, "data")
            if stream is None:
                return set(tar_columns(tars))
        return set(stream.features)
    except Exception:
        # Whoever opens it in earnest says why.
        return set()


def edit_instruction(source_term: str, target_term: str) -> str:
    """The edit as a command: "turn the red car into a blue ball"."""
    return f"turn the {source_term} into {'an' if target_term[0].lower() in 'aeiou' else 'a'} {target_term}"


def _check_mask(mask: Image.Image, image: Image.Image, where: str) -> None:
    if mask.mode != "L":
        raise ValueError(f"{where}: the mask has to be 8-bit grey (PIL mode L, 255 = edit), but has mode {mask.mode}.")
    if mask.size != image.size:
        raise ValueError(
            f"{where}: the mask is {mask.width} x {mask.height}, but the image is {image.width} x {image.height}."
        )
    if np.asarray(mask).max() < 128:
        raise ValueError(f"{where}: the mask is black (255 = edit): it marks nothing to edit.")


def from_pairs(source: str, split: str = "train") -> Examples:
    """The examples of a set of pairs: its source images, and its source masks as the place of the edit.

    The targets of a set that was built are retrieved pictures that show something alike (Sec. 3.1), so no example has
    a true `target`. Where the set has instructions, as one that was imported, they are taken.

    Args:
        source (`str`): A folder or a Hub id.
        split (`str`, *optional*, defaults to `"train"`): The split.

    Returns:
        [`Examples`]: All in the group "all".

    Raises:
        ValueError: As for [`~diffusers_iedit.pairs.load_pairs`]; on reading an example, if its row is damaged or its
            mask does not fit.
    """
    columns = ["source_image", "source_mask", "source_caption", "edit_prompt", "source_term", "target_term"]
    load_pairs(source, split=split)
    opened = open_set(source, split)
    if INSTRUCTION in opened.features:
        columns.append(INSTRUCTION)
    encoded = with_encoded_images(opened.select_columns(columns))

    content, roots = hashlib.sha256(), set_roots(source)
    for number, row in enumerate(encoded):
        for name, value in row.items():
            if isinstance(value, dict):
                try:
                    value = read_file(value, roots)
                except (OSError, ValueError) as error:
                    raise ValueError(f"{source}, row {number}: `{name}` cannot be read: {error}.") from error
            # Each part is hashed by itself, so that nothing can move from one to the next unseen.
            content.update(hashlib.sha256(value if isinstance(value, bytes) else str(value).encode()).digest())

    keys = [f"pair-{number:06}" for number in range(len(encoded))]

    def read(number: int) -> Example:
        pair, faults = read_pair(encoded[number], encoded.features, f"{source}, row {number}")
        if faults:
            raise ValueError(" ".join(faults))
        return Example(
            key=keys[number],
            group="all",
            image=pair["source_image"].convert("RGB"),
            mask=pair["source_mask"],
            instruction=pair.get(INSTRUCTION) or edit_instruction(pair["source_term"], pair["target_term"]),
            **{name: pair[name] for name in ("source_caption", "edit_prompt", "source_term", "target_term")},
        )

    return Examples(keys, read, content.hexdigest())


def from_edits(source: str, split: str | None = None, caption_model: str | None = None) -> Examples:
    """The examples of a set with pictures before and after an edit, as its authors hand it out.

    Where the set has masks, they are the place of the edit; else it is what differs between the two pictures. The
    second picture is the true `target` if it shows the same frame.

    Args:
        source (`str`): What `training/import_pairs.py` reads without being told the columns: a public set of edits on
            the Hub or in a folder, MagicBrush's test set, or a folder of pairs.
        split (`str`, *optional*): By default "train", or the only one that there is.
        caption_model (`str`, *optional*): A BLIP model that writes the captions which the set lacks. An instruction is
            none.

    Returns:
        [`Examples`]: All in the group "all".

    Raises:
        ValueError: If the set cannot be opened, has no row that is fit, or has no captions and there is no
            `caption_model`; on reading an example, if it has no mask and nothing that differs.
    """
    options = ReadPairsOptions(source, source_split=split, min_size=1, max_size=2**31)
    collection = options.collections()["source"]
    missing = [role for role in ("caption", "prompt") if role not in collection.find_columns()]
    if missing and caption_model is None:
        raise ValueError(
            f"{source} has no captions of its pictures, and an instruction is none: pass `caption_model`, a BLIP model"
            " that writes them, such as Salesforce/blip-image-captioning-large."
        )
    dropped: Counter[str] = Counter()
    table = _on_disk(collection.rows(collection.open(), options, dropped), collection.schema)
    if dropped:
        logger.warning(f"{source}: {dropped.total()} rows are left out: {dict(dropped)}.")
    if not len(table):
        raise ValueError(f"{source} has no rows that can be evaluated.")
    texts = {role: table[role].to_pylist() for role in ("caption", "prompt", "instruction")}
    if caption_model is not None and missing:
        captioner = CaptionImages(CaptionOptions(caption_model))
        for role in missing:
            texts[role] = _write_captions(captioner, table["image" if role == "caption" else "target"])
    content = hashlib.sha256(json.dumps(texts).encode())
    for column in ("image", "target", "mask"):
        for value in table[column]:
            content.update(hashlib.sha256(value.as_py() or b"").digest())
    keys = [f"edit-{number:06}" for number in range(len(table))]

    def read(number: int) -> Example:
        row, where = table.slice(number, 1).to_pylist()[0], f"{source}, {keys[number]}"
        caption, prompt, instruction = (texts[role][number] for role in ("caption", "prompt", "instruction"))
        if not caption or not prompt:
            raise ValueError(f"{where}: a caption is empty.")
        found = find_masks(row["image"], row["target"], row["mask"], SegmentOptions(min_mask_area=0, max_mask_area=1))
        if found.source is None:
            raise ValueError(f"{where}: it has no mask, and the two pictures do not tell where the edit is.")
        image, target = (open_image(row[name]).convert("RGB") for name in ("image", "target"))
        old, new = difference_term(caption, prompt), difference_term(prompt, caption)
        return Example(
            key=keys[number],
            group="all",
            image=image,
            mask=open_image(found.source),
            source_caption=caption,
            edit_prompt=prompt,
            source_term=old or None,
            target_term=new or None,
            instruction=instruction or (edit_instruction(old, new) if old and new else prompt),
            target=target.resize(image.size) if same_aspect(image.size, target.size) else None,
        )

    return Examples(keys, read, content.hexdigest())


def _on_disk(rows: Iterator[dict], schema: pa.Schema) -> pa.Table:
    """Rows that are read where they lie instead of being kept in memory."""
    # The system keeps the file as long as it is mapped.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.arrow")
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as out:
            while some := list(islice(rows, _AT_ONCE)):
                out.write_table(pa.Table.from_pylist(some, schema=schema))
        return read_table(file)


def _write_captions(captioner: CaptionImages, images: pa.ChunkedArray) -> list[str]:
    captions = []
    for start in range(0, len(images), _AT_ONCE):
        captions += captioner({"image": images[start : start + _AT_ONCE].to_pylist()})["caption"]
    return captions


PIE_BENCH_SIZE = 512
"""Height and width of PIE-Bench's images."""

# By `editing_type_id`, as the folders of its images are called.
_PIE_BENCH_TYPES = (
    "random",
    "change object",
    "add object",
    "delete object",
    "change attribute content",
    "change attribute pose",
    "change attribute color",
    "change attribute material",
    "change background",
    "change style",
)

_PIE_BENCH_TEXTS = ("image_path", "original_prompt", "editing_prompt", "editing_instruction")


def decode_runs(runs: list[int] | str) -> np.ndarray:
    """PIE-Bench's masks: runs [start, length, start, length, ...] of pixels to edit, row after row from the top left.

    As in PIE-Bench's own evaluation (https://huggingface.co/papers/2310.01506), a run that goes beyond the last pixel
    ends there, and all pixels of the border belong to the mask.

    Args:
        runs (`list[int]` or `str`): Starts from 0 and lengths, in pixels; as text, as PIE-Bench++ has them, with
            spaces between.

    Returns:
        `np.ndarray`: bool, shape (512, 512), True = edit.

    Raises:
        ValueError: If these are no such runs.
    """
    mask = masks.decode_runs(runs, (PIE_BENCH_SIZE, PIE_BENCH_SIZE))
    mask[[0, -1]] = True
    mask[:, [0, -1]] = True
    return mask


def _blended_words(value: str | list[str] | None) -> tuple[str | None, str | None]:
    """The two of `blended_word`: "cat dog" in PIE-Bench, ["cat", "dog"] or ["cat,dog", ...] in what is made of it."""
    words = re.findall(r"[^\s,\[\]\"']+", value) if isinstance(value, str) else list(value or ())
    if words and "," in words[0]:
        words = [word.strip() for word in words[0].split(",")]
    return (words[0], words[1]) if len(words) == 2 and all(words) else (None, None)


def _without_brackets(prompt: str) -> str:
    return re.sub(r"[\[\]]", "", prompt)


def _pie_bench_fault(key: str, entry: Any, images: Path, roots: tuple[str, ...]) -> str | None:
    if not re.fullmatch(r"[\w-][\w.-]{0,99}", key):
        return "the key is no name for a file."
    if not isinstance(entry, dict):
        return f"the entry has to be an object, but is {entry!r}."
    for name in _PIE_BENCH_TEXTS:
        # JSON can hold halves of surrogate pairs, which no file can.
        if not isinstance(entry.get(name), str) or re.search(r"[\ud800-\udfff]", entry[name]):
            return f"`{name}` is missing or no text."
    for name in ("original_prompt", "editing_prompt"):
        if not _without_brackets(entry[name]).strip():
            return f"`{name}` is empty."
    number = entry.get("editing_type_id")
    if type(number) not in (int, str) or str(number) not in map(str, range(len(_PIE_BENCH_TYPES))):
        return f"`editing_type_id` has to be one of 0 to 9, but is {number!r}."
    blended = entry.get("blended_word")
    if not isinstance(blended, (str, list, type(None))) or not all(isinstance(word, str) for word in blended or ()):
        return f"`blended_word` has to be two words, as text or as a list, but is {blended!r}."
    try:
        file = locate(str(images / entry["image_path"]), roots)
    except ValueError as error:
        return f"`image_path`: {error}."
    if not os.path.isfile(file):
        return f"there is no image {images / entry['image_path']}."
    try:
        # It refuses whatever is no mask, None among it.
        decode_runs(entry.get("mask"))  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return None


def from_pie_bench(folder: str | Path) -> Examples:
    """PIE-Bench (https://huggingface.co/papers/2310.01506) as it is handed out: 700 images, ten types of edits.

    The folder holds `mapping_file.json` and, in `annotation_images`, the images. The prompts lose the brackets that
    mark what changes. The terms are the words in which the prompts differ, an adjective with its noun; where they
    differ in none that names a thing, the two of `blended_word`, if there are any.

    Args:
        folder (`str` or `Path`): PIE-Bench's folder, or another one in this format.

    Returns:
        [`Examples`]: In the groups "random", "change object" and so on, with PIE-Bench's instructions; true targets
        do not exist.

    Raises:
        ValueError: If there is no mapping file, if it is empty, or if an entry lacks something: an image in the
            folder, a prompt, a well-formed mask. On reading an example, if its image cannot be read, is not of
            512 x 512 pixels or has more than 8 bits a channel.
    """
    file, images = Path(folder) / "mapping_file.json", Path(folder) / "annotation_images"
    try:
        text = file.read_bytes()
        mapping = json.loads(text)
    except OSError as error:
        raise ValueError(f"{folder} is no PIE-Bench folder: no mapping_file.json can be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError(f"{file} has to be an object with at least one entry.")
    roots = set_roots(folder)
    for key, entry in mapping.items():
        if fault := _pie_bench_fault(key, entry, images, roots):
            raise ValueError(f"{file}, entry {key!r}: {fault}")

    sizes = [(images / entry["image_path"]).stat().st_size for entry in mapping.values()]
    keys = list(mapping)

    def read(number: int) -> Example:
        entry, where = mapping[keys[number]], f"{file}, entry {keys[number]!r}"
        try:
            image = open_image(locate(str(images / entry["image_path"]), roots))
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: the image cannot be read: {error}") from error
        if image.mode.startswith(("I", "F")):
            # Made RGB, nearly all of it would be white.
            raise ValueError(f"{where}: the image has to have 8 bits a channel, but has the PIL mode {image.mode}.")
        image = image.convert("RGB")
        mask = Image.fromarray(decode_runs(entry["mask"]).astype(np.uint8) * 255)
        _check_mask(mask, image, where)
        caption, prompt = (_without_brackets(entry[name]) for name in ("original_prompt", "editing_prompt"))
        blended = _blended_words(entry.get("blended_word"))
        return Example(
            key=keys[number],
            group=_PIE_BENCH_TYPES[int(entry["editing_type_id"])],
            image=image,
            mask=mask,
            source_caption=caption,
            edit_prompt=prompt,
            source_term=difference_term(caption, prompt) or blended[0],
            target_term=difference_term(prompt, caption) or blended[1],
            instruction=entry["editing_instruction"],
        )

    return Examples(keys, read, hashlib.sha256(text + json.dumps(sizes).encode()).hexdigest())


PIE_BENCH_PLUS = ("image", "source_prompt", "target_prompt", "mask")
"""The columns of PIE-Bench++ on the Hub that an example is made of."""


def from_pie_bench_plus(source: str, split: str | None = None) -> Examples:
    """PIE-Bench++ (https://huggingface.co/datasets/UB-CVML-Group/PIE_Bench_pp): one configuration a type of edits.

    Brackets in the prompts go, and terms are found, as by `from_pie_bench`. It has no instructions: these name what
    replaces what, or say the prompt where the prompts differ in no word that names a thing.

    Args:
        source (`str`): Its Hub id, or a folder in this format.
        split (`str`, *optional*): By default "V1".

    Returns:
        [`Examples`]: In the groups "random", "change object" and so on, by the configurations' names; "all" if there
        is one only.

    Raises:
        ValueError: If it cannot be opened, or if a column is missing; on reading an example, if its prompts, image or
            mask cannot be used.
    """
    rows: list[tuple[str, datasets.Dataset, int]] = []
    content, roots = hashlib.sha256(), set_roots(source)
    names = datasets.get_dataset_config_names(source)
    for name in names:
        opened = open_set(source, split or "V1", name=name)
        if missing := [column for column in PIE_BENCH_PLUS if column not in opened.features]:
            raise ValueError(f"{source}, {name}: column `{missing[0]}` is missing; there are {list(opened.features)}.")
        opened = opened.cast_column("image", PairImage(roots, decode=False))
        group = re.sub(r"^\d+_|_\d+$", "", name).replace("_", " ") if len(names) > 1 else "all"
        rows += [(group, opened, number) for number in range(len(opened))]
        for row in opened:
            content.update(hashlib.sha256(repr(row).encode()).digest())
    if not rows:
        raise ValueError(f"{source} has no rows.")
    keys = [f"{group.replace(' ', '-')}-{number:04}" for number, (group, _, _) in enumerate(rows)]

    def read(number: int) -> Example:
        group, opened, place = rows[number]
        row, where = opened[place], f"{source}, {keys[number]}"
        caption, prompt = (_without_brackets(row[name] or "").strip() for name in ("source_prompt", "target_prompt"))
        if not caption or not prompt:
            raise ValueError(f"{where}: a prompt is empty.")
        try:
            image = open_image(read_file(row["image"], roots)).convert("RGB")
            mask = Image.fromarray(decode_runs(row["mask"]).astype(np.uint8) * 255)
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        _check_mask(mask, image, where)
        blended = _blended_words(row.get("blended_words"))
        old, new = difference_term(caption, prompt) or blended[0], difference_term(prompt, caption) or blended[1]
        return Example(
            key=keys[number],
            group=group,
            image=image,
            mask=mask,
            source_caption=caption,
            edit_prompt=prompt,
            source_term=old,
            target_term=new,
            instruction=edit_instruction(old, new) if old and new else prompt,
        )

    return Examples(keys, read, content.hexdigest())


MINI_SPLITS = {"test": (140_000, 160), "choose": (150_000, 64)}
"""First seed of `mini.render` and number of examples in each group: seeds that nothing else uses."""

GENERATED_FILE = Path(mini.__file__).parent / "benchmark" / "generated.parquet"
"""The generated half, which `training/mini/make_benchmark.py` writes."""


def things_shown(number: int) -> Literal[1, 2]:
    """How many things example `number` of a group shows: of four, the first two show one thing and the others two."""
    return 1 if number % 4 < 2 else 2


def ask_for_edit(scene: mini.Scene, number: int) -> mini.Scene:
    """The true edit of example `number`: even ones swap the thing, odd ones the colour, for what is not there yet."""
    if number % 2 == 0:
        nouns = [noun for noun in mini.NOUNS if noun not in [thing.noun for thing in scene.things]]
        return scene.swap(thing=nouns[number // 4 % len(nouns)])
    colours = [colour for colour in mini.COLOURS if colour not in [thing.colour for thing in scene.things]]
    return scene.swap(colour=colours[number // 4 % len(colours)])


def mini_benchmark(split: str = "test") -> Examples:
    """The mini benchmark: pictures of the mini world that show a combination which is in no training picture.

    The group "real" is drawn, so its masks, true targets and their masks are exact. The group "generated" was sampled
    by the mini latent diffusion model before its fine-tuning, as the paper's generated set (Sec. 4.1). No truth is
    known of these: only samples were kept in which the judge sees what their caption says, there is no `target`, and
    the mask is CLIPSeg's, where the paper's were drawn by hand. Kept were only masks in one piece that have about the
    shape and size of the drawn thing.

    Half of each group asks for another thing and half for another colour, half of either in pictures of two things.

    Args:
        split (`str`): "test" (160 examples a group), or "choose" (64 others, to choose settings on).

    Returns:
        [`Examples`]: First the real ones, then the generated ones.

    Raises:
        ValueError: If there is no such split.
    """
    if split not in MINI_SPLITS:
        raise ValueError(f"`split` of the mini benchmark has to be one of {', '.join(MINI_SPLITS)}, got {split!r}.")
    first_seed, count = MINI_SPLITS[split]
    generated = pq.read_table(GENERATED_FILE, filters=[("split", "==", split)]).to_pylist()
    scenes = [mini.render(first_seed + n, things=things_shown(n), split="held_out") for n in range(count)]
    keys = [f"{group}-{number:04}" for group in ("real", "generated") for number in range(count)]

    def read(number: int) -> Example:
        if number < count:
            source = scenes[number]
            edited = ask_for_edit(source, number)
            return Example(
                key=keys[number],
                group="real",
                image=source.image,
                mask=source.mask,
                source_caption=source.caption,
                edit_prompt=edited.caption,
                source_term=source.thing.name,
                target_term=edited.thing.name,
                instruction=edit_instruction(source.thing.name, edited.thing.name),
                target=edited.image,
                target_mask=edited.mask,
                thing=(edited.thing.noun, edited.thing.colour, edited.scene),
            )
        row = generated[number - count]
        return Example(
            key=keys[number],
            group="generated",
            image=Image.open(io.BytesIO(row["image"]["bytes"])),
            mask=Image.open(io.BytesIO(row["mask"]["bytes"])),
            instruction=edit_instruction(row["source_term"], row["target_term"]),
            thing=(row["noun"], row["colour"], row["scene"]),
            **{name: row[name] for name in ("source_caption", "edit_prompt", "source_term", "target_term")},
        )

    content = hashlib.sha256(GENERATED_FILE.read_bytes() + repr(scenes).encode())
    return Examples(keys, read, content.hexdigest())
