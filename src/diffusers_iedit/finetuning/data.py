"""Pairs as the training sees them: one endless shuffled stream, one augmentation for a pair, and cached latents."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from diffusers.training_utils import find_nearest_bucket
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .. import mini
from ..pairs.schema import FEATURES, load_pairs, read_pair, with_encoded_images
from ..resuming import replacing


ROWS_PER_FILE, ENCODED_AT_ONCE = 64, 8

SMALLEST_SHARE = 0.1
"""Of a latent, that a mask has to cover somewhere: the losses square it."""

# What counts as marked where a crop is placed, as in `read_pair`.
_MARKED = [255 if value > 127 else 0 for value in range(256)]


# Seeds that nothing else uses.
MINI_PAIRS, MINI_SEED = 256, 160_000


def open_pairs(source: str, split: str = "train", tokenizer: PreTrainedTokenizerBase | None = None) -> Dataset:
    """The pairs to train on: what [`~diffusers_iedit.pairs.load_pairs`] opens, or `mini`.

    `mini` draws 256 scenes of the mini world, each beside itself with another thing or in another colour, with exact
    captions and masks: no scene and no edit that is kept from the training of the mini models. What retrieval finds in
    a collection is never so true to the source.

    Raises:
        ValueError: As `load_pairs`.
    """
    if source != "mini":
        return load_pairs(source, split, tokenizer=tokenizer)
    rows: dict[str, list] = {name: [] for name in FEATURES}
    held_out, seed = set(mini.held_out_captions()), MINI_SEED
    while len(rows["similarity"]) < MINI_PAIRS:
        scene = mini.render(seed, things=1, split="train")
        things = [scene.swap(thing=noun) for noun in mini.NOUNS if noun != scene.thing.noun]
        edits = things if seed % 2 else [scene.swap(colour=c) for c in mini.COLOURS if c != scene.thing.colour]
        edited = edits[seed // 2 % len(edits)]
        seed += 1
        if edited.caption in held_out:
            continue
        for side, shown in (("source", scene), ("target", edited)):
            rows[f"{side}_image"].append(shown.image)
            rows[f"{side}_mask"].append(shown.mask)
            rows[f"{side}_term"].append(shown.thing.name)
        rows["source_caption"].append(scene.caption)
        rows["edit_prompt"].append(edited.caption)
        rows["similarity"].append(1.0)
    return Dataset.from_dict(rows, features=FEATURES)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """8-bit PIL -> float32 (C, H, W) in [0, 1]."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())


def _place(edge: int, start: int, end: int, length: int, place: float | None) -> int:
    """Where a crop begins along one axis, so that it holds what is marked; negative where the picture is too short.

    Args:
        edge (`int`): The picture's, in pixels.
        start, end (`int`): Of what is marked.
        length (`int`): The crop's, at least that of what is marked.
        place (`float`, *optional*): In [0, 1]: how far between the first and the last such place. By default, as near
            to the centre as can be.
    """
    free = edge - length
    if free <= 0:
        return free // 2
    first, last = max(0, end - length), min(free, start)
    return min(max(round(free / 2), first), last) if place is None else round(first + place * (last - first))


class PairStream(torch.utils.data.Dataset):
    """The stream of samples that a training run sees, by their position in it.

    Position p is in epoch p // len(pairs), and each epoch has an order of its own. All that is random about a sample
    (order, crop, flip, caption dropout, timestep, noise) depends on `seed` and its position alone: a resumed run goes
    on at any position, and several processes see what one with their batches together would.

    Each picture is scaled until it covers the sample's size, and cropped so that the crop holds what its mask marks:
    M_1 in the source, M_2 in the target, and in two pictures of one aspect both, as these lie over one another. Where
    that is larger than the crop, the pair is scaled down until it fits, and the edges of the pictures go on outwards.

    Args:
        pairs ([`~datasets.Dataset`]): With the columns of `pairs.schema.FEATURES`.
        resolution (`int`): Height and width of the samples, in pixels. The two pictures of a pair may differ in size.
        random_crop (`bool`): Crop anywhere, at the same relative place in source and target; else from the centre, as
            far as the masks allow.
        random_flip (`bool`): Mirror half of the pairs.
        caption_dropout (`float`): The share of samples whose prompt is empty, for classifier-free guidance.
        seed (`int`): Of everything random.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Of the model, to which prompts have to
            differ.
        buckets (`list[tuple[int, int]]`, *optional*): Heights and widths to choose from in the place of `resolution`:
            a pair gets the one whose aspect is nearest to its source's. The samples of a step have one size, so an
            epoch is as many steps as they fill, and a bucket's last step is filled up with its first rows.
        samples_per_step (`int`): With `buckets`: of all processes and accumulated batches together.
        latent_pixels (`int`): The side of what one latent stands for, in pixels.
        overlap_masks (`bool`): Whether only the masks' overlap is edited.

    Raises:
        ValueError: With `buckets`, if a row's source cannot be read.
    """

    def __init__(
        self,
        pairs: Dataset,
        resolution: int,
        random_crop: bool = False,
        random_flip: bool = False,
        caption_dropout: float = 0.0,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        buckets: list[tuple[int, int]] | None = None,
        samples_per_step: int = 1,
        latent_pixels: int = 1,
        overlap_masks: bool = False,
    ):
        self.pairs = pairs
        self.encoded = with_encoded_images(pairs)
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.caption_dropout = caption_dropout
        self.seed = seed
        self.tokenizer = tokenizer
        self.sizes = buckets or [(resolution, resolution)]
        self.bucket_of = np.array(list(self._find_buckets()) if buckets else [0] * len(pairs))
        # Without buckets, steps may go from one epoch into the next.
        self.samples_per_step = samples_per_step if buckets else 1
        self.latent_pixels = latent_pixels
        self.overlap_masks = overlap_masks
        self._epoch: tuple[int, np.ndarray] | None = None

    def _find_buckets(self) -> Iterator[int]:
        """The number of each row's bucket; of its source, only the size is read."""
        feature = self.encoded.features["source_image"]
        for number, row in enumerate(self.encoded.select_columns("source_image")):
            try:
                width, height = feature.open(row["source_image"]).size
            except (OSError, ValueError, TypeError) as error:
                raise ValueError(f"Row {number} of the pairs: `source_image` cannot be decoded: {error}.") from error
            yield find_nearest_bucket(height, width, self.sizes)

    def _order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, in whole steps of one bucket."""
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(len(self.pairs))
            if len(self.sizes) > 1:
                rows = [order[self.bucket_of[order] == bucket] for bucket in range(len(self.sizes))]
                count = self.samples_per_step
                # `resize` begins anew where rows lack.
                steps = [np.resize(of, (-(-len(of) // count), count)) for of in rows if len(of)]
                order = rng.permutation(np.concatenate(steps)).ravel()
            self._epoch = (epoch, order)
        return self._epoch[1]

    @property
    def epoch_length(self) -> int:
        """The samples of an epoch."""
        counts = np.bincount(self.bucket_of)
        return int((-(-counts // self.samples_per_step) * self.samples_per_step).sum())

    def draw(self, position: int) -> dict:
        """What is random about a sample: its row, and the crop, flip, caption dropout and noise seed of this visit."""
        epoch, place = divmod(position, self.epoch_length)
        rng = np.random.default_rng([self.seed, 1, position])
        # All are drawn whatever the options are, so that an option changes what it is about and nothing else.
        crop, flip, drop, noise_seed = rng.random(2), rng.random(), rng.random(), rng.integers(2**62)
        return {
            "row": int(self._order(epoch)[place]),
            "crop": tuple(crop) if self.random_crop else None,
            "flip": self.random_flip and flip < 0.5,
            "drop_caption": bool(drop < self.caption_dropout),
            "noise_seed": int(noise_seed),
        }

    def _boxes(self, pair: dict, size: tuple[int, int], crop: tuple[float, float] | None) -> dict[str, tuple]:
        """Of source and target: the size (width, height) to which they are scaled, and the crop's left and top."""
        lengths = (size[1], size[0])
        sides = ("source", "target")
        sizes = {side: pair[f"{side}_image"].size for side in sides}
        scales = {
            side: max(length / edge for length, edge in zip(lengths, sizes[side], strict=True)) for side in sides
        }
        marked = {side: pair[f"{side}_mask"].point(_MARKED).getbbox() for side in sides}
        boxes = {side: tuple(edge * scales[side] for edge in marked[side]) for side in sides}
        # Less than 1 where what is marked is larger than the crop.
        scaled = {side: tuple(round(edge * scales[side]) for edge in sizes[side]) for side in sides}
        if scaled["source"] == scaled["target"]:
            left, top, right, bottom = zip(*boxes.values(), strict=True)
            boxes = dict.fromkeys(sides, (min(left), min(top), max(right), max(bottom)))
        shrink = min(
            min(1.0, length / (box[axis + 2] - box[axis]))
            for box in boxes.values()
            for axis, length in enumerate(lengths)
        )
        found = {}
        for side in sides:
            edges, places = [], []
            for axis, length in enumerate(lengths):
                edge = max(length if shrink == 1 else 1, round(sizes[side][axis] * scales[side] * shrink))
                start = math.floor(boxes[side][axis] * shrink)
                # Rounding may make it a pixel more than there is room for.
                end = min(math.ceil(boxes[side][axis + 2] * shrink), start + length, edge)
                edges.append(edge)
                places.append(_place(edge, start, end, length, crop and crop[axis]))
            found[side] = (tuple(edges), tuple(places))
        return found

    def sample(self, row: int, crop: tuple[float, float] | None, flip: bool) -> dict:
        """One pair as tensors: images (3, H, W) and masks (1, H, W) in [0, 1], its texts, and whether it is left out.

        A pair is to be left out where one of its masks (with `overlap_masks`, their overlap) covers less than a tenth
        of any latent: the losses would take it for one without an edit.

        Raises:
            ValueError: What `pairs.validate` has to say about the row.
        """
        pair, faults = read_pair(self.encoded[row], self.encoded.features, f"Row {row} of the pairs", self.tokenizer)
        if faults:
            raise ValueError(" ".join(faults))
        sample = {name: pair[name] for name in ("source_caption", "edit_prompt", "target_term")}
        height, width = self.sizes[self.bucket_of[row]]
        for side, (size, (left, top)) in self._boxes(pair, (height, width), crop).items():
            for name, mode in ((f"{side}_image", "RGB"), (f"{side}_mask", "L")):
                resample = Image.Resampling.LANCZOS if mode == "RGB" else Image.Resampling.BILINEAR
                picture = pair[name].resize(size, resample)
                # Outside of a picture, a crop is black.
                picture = picture.crop((left, top, left + width, top + height))
                if mode == "RGB" and (left < 0 or top < 0):
                    picture = _continue_edges(picture, (-left, -top, *size))
                if flip:
                    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                sample[name] = _to_tensor(picture)
        masks = [sample["source_mask"], sample["target_mask"]]
        masks += [masks[0] * masks[1]] if self.overlap_masks else []
        sample["left_out"] = any(
            F.avg_pool2d(mask[None], self.latent_pixels).max().item() < SMALLEST_SHARE for mask in masks
        )
        return sample

    def __getitem__(self, position: int) -> dict:
        drawn = self.draw(position)
        crop, flip = drawn.pop("crop"), drawn.pop("flip")
        return self.sample(drawn["row"], crop, flip) | drawn

    def visits(self) -> list[list[tuple[int, bool]]]:
        """Every row, and its mirror image if the stream flips, in lists of `ROWS_PER_FILE` of one size each."""
        flips = (False, True) if self.random_flip else (False,)
        lists = []
        for bucket in range(len(self.sizes)):
            visits = [(int(row), flip) for row in np.flatnonzero(self.bucket_of == bucket) for flip in flips]
            lists += [visits[start : start + ROWS_PER_FILE] for start in range(0, len(visits), ROWS_PER_FILE)]
        return lists


def _continue_edges(picture: Image.Image, inside: tuple[int, int, int, int]) -> Image.Image:
    """Repeats the outermost pixels of what lies inside of (left, top, width, height) outwards."""
    left, top, width, height = inside
    left, top = max(left, 0), max(top, 0)
    pixels = np.asarray(picture)
    columns = np.clip(np.arange(pixels.shape[1]), left, min(left + width, pixels.shape[1]) - 1)
    rows = np.clip(np.arange(pixels.shape[0]), top, min(top + height, pixels.shape[0]) - 1)
    return Image.fromarray(pixels[rows][:, columns])


class CachedPairStream(torch.utils.data.Dataset):
    """The same stream from what `cache_pairs` left behind: latents, masks and embeddings instead of images and texts.

    Args:
        stream (`PairStream`): The stream that was cached.
        folder (`Path`): What `cache_pairs` returned.
    """

    def __init__(self, stream: PairStream, folder: Path):
        self.stream = stream
        self.folder = folder
        self.epoch_length = stream.epoch_length
        self.places = {
            visit: (number, place)
            for number, visits in enumerate(stream.visits())
            for place, visit in enumerate(visits)
        }

    @lru_cache(maxsize=64)  # noqa: B019 (a stream lives as long as its process)
    def _open(self, number: int) -> dict:
        path = self.folder / f"{number:06}.safetensors"
        try:
            file = safe_open(path, framework="pt")
        except Exception as error:
            raise ValueError(
                f"The cached latents in {path} cannot be read any more: {error}. The next run encodes them again."
            ) from error
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)

    def __getitem__(self, position: int) -> dict:
        drawn = self.stream.draw(position)
        _, flip = drawn.pop("crop"), drawn.pop("flip")
        number, place = self.places[drawn["row"], flip]
        sample = {name: values[place] for name, values in self._open(number).items()}
        return {name: (v.float() / 255 if v.dtype == torch.uint8 else v) for name, v in sample.items()} | drawn


def _is_whole(file: Path) -> bool:
    """Whether a safetensors file is there and as long as its header says."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def cache_pairs(stream: PairStream, encode: Callable[[dict], dict], folder: Path, accelerator: Accelerator) -> Path:
    """Encodes every pair once, and its mirror image if the stream flips, into safetensors files of 64 each.

    The processes share the files. A file is complete or absent, so an interrupted call goes on where it was; one that
    has been cut off since is written again.

    Args:
        stream (`PairStream`): Must not crop at random.
        encode (`Callable`): A batch of `stream` -> the tensors to keep, each with the batch first. Images and masks in
            [0, 1] (names ending in "_image" or "_mask") are kept in 8 bits, everything else as it is.
        folder (`Path`): A folder that belongs to these pairs, models and options.
        accelerator (`Accelerator`): Says which process this is.

    Returns:
        `Path`: `folder`.

    Raises:
        ValueError: If the stream crops at random.
        OSError: If a file cannot be written; those before it are whole.
    """
    if stream.random_crop:
        raise ValueError("`random_crop` and `cache_latents` exclude each other: there is no end of crops to cache.")
    folder.mkdir(parents=True, exist_ok=True)
    files = stream.visits()
    numbers = range(len(files))[accelerator.process_index :: accelerator.num_processes]
    hidden = not accelerator.is_local_main_process
    with tqdm(numbers, desc="Caching latents", unit="file", disable=hidden) as progress:
        for number in progress:
            file = folder / f"{number:06}.safetensors"
            if _is_whole(file):
                continue
            samples = [stream.sample(row, None, flip) for row, flip in files[number]]
            kept: dict[str, list[torch.Tensor]] = {}
            for start in range(0, len(samples), ENCODED_AT_ONCE):
                batch = torch.utils.data.default_collate(samples[start : start + ENCODED_AT_ONCE])
                for name, values in (encode(batch) | {"left_out": batch["left_out"]}).items():
                    if name.endswith(("_image", "_mask")):
                        values = values.mul(255).round().byte()
                    kept.setdefault(name, []).append(values.cpu())
            try:
                with replacing(file) as partial:
                    partial.write_bytes(save({name: torch.cat(values).contiguous() for name, values in kept.items()}))
            except OSError as error:
                free = shutil.disk_usage(folder).free / 2**20
                raise OSError(
                    f"The cached latents could not be written to {folder}, which has {free:,.0f} MiB free: {error}."
                    " The files before this one are whole, and a later run goes on after them."
                ) from error
    accelerator.wait_for_everyone()
    return folder


def draw_noise(
    noise_seeds: list[int], shape: tuple[int, ...], draw_timestep: Callable[[torch.Generator], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """t and eps_1 of each sample (Eq. 2), from its own seed: the same on every device, in whatever batch it comes.

    Args:
        noise_seeds (`list[int]`): Of each sample.
        shape (`tuple[int]`): Of one sample's noise.
        draw_timestep (`Callable`): A generator -> t, as `Family.draw_timestep`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: timesteps (B,) and noise (B, *shape), on CPU.
    """
    timesteps, noise = [], []
    for seed in noise_seeds:
        generator = torch.Generator().manual_seed(int(seed))
        timesteps.append(draw_timestep(generator))
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(timesteps), torch.stack(noise)
