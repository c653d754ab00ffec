"""Pairs as the training sees them: one endless shuffled stream, one augmentation for a pair, and cached latents."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .. import mini
from ..pairs.schema import FEATURES, load_pairs, read_pair, with_encoded_images
from ..resuming import replacing


ROWS_PER_FILE, ENCODED_AT_ONCE = 64, 8


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


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """8-bit PIL -> float32 (C, H, W) in [0, 1]."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())


class PairStream(torch.utils.data.Dataset):
    """The stream of samples that a training run sees, by their position in it.

    Position p is in epoch p // len(pairs), and each epoch has an order of its own. All that is random about a sample
    (order, crop, flip, caption dropout, timestep, noise) depends on `seed` and its position alone: a resumed run goes
    on at any position, and several processes see what one with their batches together would.

    Args:
        pairs ([`~datasets.Dataset`]): With the columns of `pairs.schema.FEATURES`.
        resolution (`int`): Height and width of the samples, in pixels. Each image is scaled until its shorter side
            is this long and then cropped, so the two of a pair may differ in size.
        random_crop (`bool`): Crop anywhere, at the same relative place in source and target; else from the centre.
        random_flip (`bool`): Mirror half of the pairs.
        caption_dropout (`float`): The share of samples whose prompt is empty, for classifier-free guidance.
        seed (`int`): Of everything random.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Of the model, to which prompts have to
            differ.
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
    ):
        self.pairs = pairs
        self.encoded = with_encoded_images(pairs)
        self.resolution = resolution
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.caption_dropout = caption_dropout
        self.seed = seed
        self.tokenizer = tokenizer

    def draw(self, position: int) -> dict:
        """What is random about a sample: its row, and the crop, flip, caption dropout and noise seed of this visit."""
        epoch, place = divmod(position, len(self.pairs))
        rng = np.random.default_rng([self.seed, 1, position])
        # All are drawn whatever the options are, so that an option changes what it is about and nothing else.
        crop, flip, drop, noise_seed = rng.random(2), rng.random(), rng.random(), rng.integers(2**62)
        return {
            "row": int(_order(len(self.pairs), self.seed, epoch)[place]),
            "crop": tuple(crop) if self.random_crop else (0.5, 0.5),
            "flip": self.random_flip and flip < 0.5,
            "drop_caption": bool(drop < self.caption_dropout),
            "noise_seed": int(noise_seed),
        }

    def sample(self, row: int, crop: tuple[float, float], flip: bool) -> dict:
        """One pair as tensors: images (3, H, W) and masks (1, H, W) in [0, 1], and its texts.

        Raises:
            ValueError: What `pairs.validate` has to say about the row.
        """
        pair, faults = read_pair(self.encoded[row], self.encoded.features, f"Row {row} of the pairs", self.tokenizer)
        if faults:
            raise ValueError(" ".join(faults))
        sample = {name: pair[name] for name in ("source_caption", "edit_prompt", "target_term")}
        for side in ("source", "target"):
            image, mask = pair[f"{side}_image"], pair[f"{side}_mask"]
            scale = self.resolution / min(image.size)
            size = tuple(max(self.resolution, round(edge * scale)) for edge in image.size)
            left, top = (round(place * (edge - self.resolution)) for place, edge in zip(crop, size, strict=True))
            box = (left, top, left + self.resolution, top + self.resolution)
            for name, picture, mode in ((f"{side}_image", image, "RGB"), (f"{side}_mask", mask, "L")):
                resample = Image.Resampling.LANCZOS if mode == "RGB" else Image.Resampling.BILINEAR
                picture = picture.resize(size, resample).crop(box)
                if flip:
                    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                sample[name] = _to_tensor(picture)
        return sample

    def __getitem__(self, position: int) -> dict:
        drawn = self.draw(position)
        crop, flip = drawn.pop("crop"), drawn.pop("flip")
        return self.sample(drawn["row"], crop, flip) | drawn


class CachedPairStream(torch.utils.data.Dataset):
    """The same stream from what `cache_pairs` left behind: latents, masks and embeddings instead of images and texts.

    Args:
        stream (`PairStream`): The stream that was cached.
        folder (`Path`): What `cache_pairs` returned.
    """

    def __init__(self, stream: PairStream, folder: Path):
        self.stream = stream
        self.folder = folder

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
        index = 2 * drawn["row"] + flip if self.stream.random_flip else drawn["row"]
        number, place = divmod(index, ROWS_PER_FILE)
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
    flips = (False, True) if stream.random_flip else (False,)
    visits = [(row, flip) for row in range(len(stream.pairs)) for flip in flips]
    numbers = range(-(-len(visits) // ROWS_PER_FILE))[accelerator.process_index :: accelerator.num_processes]
    hidden = not accelerator.is_local_main_process
    with tqdm(numbers, desc="Caching latents", unit="file", disable=hidden) as progress:
        for number in progress:
            file = folder / f"{number:06}.safetensors"
            if _is_whole(file):
                continue
            samples = [
                stream.sample(row, (0.5, 0.5), flip) for row, flip in visits[number * ROWS_PER_FILE :][:ROWS_PER_FILE]
            ]
            kept: dict[str, list[torch.Tensor]] = {}
            for start in range(0, len(samples), ENCODED_AT_ONCE):
                batch = torch.utils.data.default_collate(samples[start : start + ENCODED_AT_ONCE])
                for name, values in encode(batch).items():
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
