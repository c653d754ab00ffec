"""Where to edit: the words in which two captions differ, CLIPSeg masks for them, and mask clean-up (Sec. 3.4)."""

import html
import math
import re
import unicodedata
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import logging
from PIL import Image

from .regions_iedit import Photo, as_list, check_pixels, check_sizes, read_masks, read_photos, to_output


logger = logging.get_logger(__name__)

# Words that name nothing in a picture. They end a phrase, and a difference made of them alone is none ("a" -> "an").
_FUNCTION_WORDS = frozenset(
    "a about above across after against along among an and are around as at be before behind being below beneath "
    "beside between beyond but by down during for from front had has have her his in inside into is it its near next "
    "of off on onto or our out outside over past that the their there these this those through to top toward under up "
    "upon was were while with without".split()
)

# Words that look like participles but name things.
_NOUNS_LIKE_PARTICIPLES = frozenset(
    "awning building ceiling clothing drawing earring evening icing morning painting railing spring "
    "string tweed wedding".split()
)

MAX_LOOKS = 640
"""How often `search` shows a picture, or a part of one, to the mask model at most: enough for tiles of 352 pixels, the
input of CLIPSeg, in a photo of 12 megapixels."""

_MAX_TILES = 512  # of these looks; the others are one at the whole picture and second looks

# By how much a look is enlarged to the mask model's own input at most. The mini CLIPSeg was trained on pictures that
# were enlarged as much, and hardly finds a thing that is smaller in its input.
_MAX_ENLARGEMENT = 1.5

_SURROUNDINGS = 1.5  # how wide a second look is, in widths of what it looks at

_BATCH_SIZE = 16


def _content_words(words: list[str]) -> list[str]:
    return [word for word in words if word.lower() not in _FUNCTION_WORDS]


def _continues_phrase(word: str) -> bool:
    # A participle opens a new part of a caption ("a red car | parked", "a white horse | eating grass").
    word = word.lower()
    is_participle = len(word) > 4 and word.endswith(("ing", "ed")) and word not in _NOUNS_LIKE_PARTICIPLES
    return word not in _FUNCTION_WORDS and not is_participle


def _plain(text: str) -> str:
    # Entities, ligatures, wide and combined characters and curly apostrophes: what ftfy does in CLIP's `basic_clean`.
    return unicodedata.normalize("NFKC", html.unescape(html.unescape(text))).replace("’", "'")


def clean_term(term: str) -> str:
    """A term as CLIP's tokenizer cleans text (entities, Unicode, case, whitespace), without punctuation around words.

    CLIP's own tokenizer keeps punctuation; one that has rarely or never seen it takes "red ball!" for something else.

    Args:
        term (`str`): Names something in a picture.

    Returns:
        `str`: The cleaned term, `""` if nothing but punctuation was in it.
    """
    term = _plain(term).lower()
    punctuation = "".join(sign for sign in term if unicodedata.category(sign).startswith("P"))
    words = (word.strip(punctuation) for word in term.split())
    return " ".join(word for word in words if word)


def difference_term(caption: str, other_caption: str) -> str:
    """The words of `caption` that `other_caption` changes: y_1^diff of Sec. 3.4 (swap the arguments for y_2^diff).

    A changed adjective comes with the noun it describes ("red car" for "a red car" against "a blue car"), and words
    that only the other caption has are placed by the phrase beside them ("cat" for "a cat" against "a cat in a hat").
    Several changes are joined by "and".

    Args:
        caption (`str`): The caption of the image that is to be masked.
        other_caption (`str`): The caption it is compared with.

    Returns:
        `str`: The difference term, or `""` where the captions differ in no word that names something.
    """
    words, other_words = (re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", _plain(text)) for text in (caption, other_caption))
    matcher = SequenceMatcher(
        a=[word.lower() for word in words], b=[word.lower() for word in other_words], autojunk=False
    )
    terms = []
    for tag, start, end, other_start, other_end in matcher.get_opcodes():
        if tag == "equal" or not _content_words(words[start:end] + other_words[other_start:other_end]):
            continue
        if not _content_words(words[start:end]) and not (end < len(words) and _continues_phrase(words[end])):
            while start > 0 and words[start - 1].lower() in _FUNCTION_WORDS:
                start -= 1
            while start > 0 and _continues_phrase(words[start - 1]):
                start -= 1
        else:
            while end < len(words) and _continues_phrase(words[end]):
                end += 1
        term = " ".join(_content_words(words[start:end]))
        if term and term not in terms:
            terms.append(term)
    return " and ".join(terms)


@torch.no_grad()
def segment(mask_model, mask_processor, images: list[Image.Image], terms: list[str], device=None) -> torch.Tensor:
    """CLIPSeg's probability that a pixel belongs to what the term names.

    The logits are brought to the images' size before the sigmoid, so that a threshold cuts a smooth surface instead of
    CLIPSeg's coarse grid.

    Args:
        mask_model (`CLIPSegForImageSegmentation`): The segmentation model.
        mask_processor (`CLIPSegProcessor`): Its processor.
        images (`list[PIL.Image.Image]`): B RGB images of one size, H x W.
        terms (`list[str]`): One term an image, cleaned by `clean_term` here.
        device (`torch.device`, *optional*): Where the model runs; its own device by default.

    Returns:
        `torch.Tensor`: Probabilities in [0, 1], float32 on the CPU, shape (B, 1, H, W).
    """
    device = device or mask_model.device
    terms = [clean_term(term) for term in terms]
    inputs = mask_processor(text=terms, images=images, padding=True, truncation=True, return_tensors="pt")
    inputs = inputs.to(device)
    logits = mask_model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        pixel_values=inputs["pixel_values"].to(mask_model.dtype),
    ).logits
    width, height = images[0].size
    logits = logits.float().cpu().reshape(len(images), 1, *logits.shape[-2:])
    return F.interpolate(logits, size=(height, width), mode="bilinear").sigmoid()


def _around_marked(mask: torch.Tensor, margin: int) -> torch.Tensor:
    """The view of (B, 1, H, W) that holds all that is above 0, and `margin` pixels around it."""
    marked = mask.amax((0, 1))
    if not marked.any():
        return mask[..., :0, :0]
    bounds = [marked.amax(dim).nonzero()[[0, -1], 0].tolist() for dim in (1, 0)]
    rows, columns = (slice(max(first - margin, 0), last + 1 + margin) for first, last in bounds)
    return mask[..., rows, columns]


def _grow(mask: torch.Tensor, radius: int) -> torch.Tensor:
    # Farther than from edge to edge it cannot grow. Two one-dimensional windows give the square at a cost that grows
    # with its side, not its area.
    radius = min(radius, max(mask.shape[-2:]))
    window = 2 * radius + 1
    mask = F.max_pool2d(mask, (window, 1), stride=1, padding=(radius, 0))
    return F.max_pool2d(mask, (1, window), stride=1, padding=(0, radius))


class SearchResult(NamedTuple):
    """What `search` found, and how far it looked.

    Attributes:
        probability (`torch.Tensor`): In [0, 1], float32 on the CPU, shape (1, H, W); nowhere above the threshold where
            nothing was found.
        highest (`float`): The highest probability of all that was looked at. What a second look took back counts with
            what was left of it.
        looks (`int`): How often the mask model looked, `MAX_LOOKS` at most.
        smallest_look (`tuple[int, int]`): Width and height of the smallest part of the image that it looked at.
    """

    probability: torch.Tensor
    highest: float
    looks: int
    smallest_look: tuple[int, int]

    @property
    def extent(self) -> str:
        """How far the search went, for an error message."""
        width, height = self.smallest_look
        return (
            f"the highest is {self.highest:.3f}; number of looks: {self.looks}, the closest at {width}x{height} pixels"
        )


def search(
    mask_model, mask_processor, image: Image.Image, term: str, threshold: float = 0.5, device=None
) -> SearchResult:
    """Like `segment`, but finds what is small in a large image, too.

    1. The whole image, as in `segment`. If something large is found, this is its mask.
    2. A second look at what is small: at a square around it, 1.5 times as wide. What it does not show was nothing.
       Where it is much closer than the look before, what it shows gets another one. The mask is the mean of the last
       two looks.
    3. If nothing is left, overlapping square tiles, from coarse to fine, each scale with tiles half as wide as those
       before. What the border of one cuts is whole in another: a pixel has the highest probability that a tile gives
       it. What is found gets a second look, too.

    The first scale at which something is found is the last, and all that is found there is kept. The finest tiles are
    two thirds as wide as the mask model's own input; in large images, as fine as 512 tiles of all scales allow. An
    image no larger than the model's own input is looked at once, for there is no more to see.

    Args:
        mask_model (`CLIPSegForImageSegmentation`): The segmentation model.
        mask_processor (`CLIPSegProcessor`): Its processor.
        image (`PIL.Image.Image`): An RGB image, H x W, 8 pixels a side or more.
        term (`str`): What to look for.
        threshold (`float`): The probability in [0, 1) above which something is found.
        device (`torch.device`, *optional*): Where the model runs; its own device by default.

    Returns:
        `SearchResult`: The probabilities, (1, H, W), and how far the search went, within `MAX_LOOKS` looks.

    Raises:
        `FloatingPointError`: If the model gives NaN or infinity.
    """
    return _Search(mask_model, mask_processor, image, term, threshold, device).run()


class _Search:
    """One search: what looks, for what, and how often it has looked."""

    def __init__(self, mask_model, mask_processor, image, term, threshold, device):
        self.mask_model, self.mask_processor, self.device = mask_model, mask_processor, device
        self.image, self.term, self.threshold = image, term, threshold
        self.input_size = mask_model.config.vision_config.image_size
        self.patch_size = mask_model.config.vision_config.patch_size
        self.closest = math.ceil(self.input_size / _MAX_ENLARGEMENT)
        self.highest, self.looks, self.smallest_look = 0.0, 0, image.size
        self.second_looks_left = MAX_LOOKS - _MAX_TILES - 1

    def run(self) -> SearchResult:
        whole = self._look([self.image])[0]
        found: torch.Tensor | None = whole
        side = max(self.image.size)
        if side > self.input_size:
            boxes = self._boxes(whole, side)
            if all(4 * max(right - left, bottom - top) < side for left, top, right, bottom in boxes):
                found = self._look_again(whole, side, boxes)
            for side in _tile_sides(self.image.size, self.input_size, self.closest):
                if found is not None:
                    break
                tiles = self._look_at_tiles(side)
                found = self._look_again(tiles, side, self._boxes(tiles, side))
        if found is None:
            found = torch.zeros_like(whole)
        return SearchResult(found, max(self.highest, found.max().item()), self.looks, self.smallest_look)

    def _look(self, pictures: list[Image.Image]) -> torch.Tensor:
        """Pictures of one size -> their probabilities, (B, 1, h, w)."""
        self.looks += len(pictures)
        probability = segment(self.mask_model, self.mask_processor, pictures, [self.term] * len(pictures), self.device)
        # It would be below every threshold.
        if not probability.isfinite().all():
            raise FloatingPointError("`mask_model` gives NaN or infinity.")
        return probability

    def _note_size(self, width: int, height: int):
        self.smallest_look = min(self.smallest_look, (width, height), key=math.prod)

    def _look_at_tiles(self, side: int) -> torch.Tensor:
        """The highest probabilities that tiles give, (1, h, w): the image in the scale that makes a tile the input."""
        self._note_size(*(min(side, length) for length in self.image.size))
        size = _scaled(self.image.size, self.input_size / side)
        picture = self.image.resize(size, Image.Resampling.BILINEAR)
        highest = torch.zeros(1, size[1], size[0])
        boxes = _tiles(size, self.input_size)
        for start in range(0, len(boxes), _BATCH_SIZE):
            batch = boxes[start : start + _BATCH_SIZE]
            for box, probability in zip(batch, self._look([picture.crop(box) for box in batch]), strict=True):
                part = _part(highest, box)
                torch.maximum(part, probability, out=part)
        return highest

    def _boxes(self, probability: torch.Tensor, side: int) -> list[tuple[int, int, int, int]]:
        """The boxes, in the image, of what was found in looks `side` wide, the most probable first."""
        found = probability > self.threshold
        self.highest = max(self.highest, probability.masked_fill(found, 0).max().item())
        across = self.image.width / probability.shape[2]
        down = self.image.height / probability.shape[1]
        # What lies within a patch of the model is one thing to it; cells that touch are connected.
        cell = max(round(self.patch_size / 2 * side / self.input_size / max(across, down)), 1)
        boxes = sorted(_connected(found[0], cell), key=lambda box: -_part(probability, box).max().item())
        return [
            (int(left * across), int(top * down), math.ceil(right * across), math.ceil(bottom * down))
            for left, top, right, bottom in boxes
        ]

    def _look_again(self, probability: torch.Tensor, side: int, boxes) -> torch.Tensor | None:
        """What was found in looks `side` wide and stands another look, (1, H, W), or `None` for nothing."""
        width, height = self.image.size
        kept = None
        for box in boxes:
            if max(box[2] - box[0], box[3] - box[1]) < side:
                box, shown = self._confirm(box, probability, (0, 0, width, height), side)
            else:  # wider than a tile: it was looked at closely enough, piece by piece
                shown = _resample(probability, (0, 0, width, height), box)
            if not self._shows(shown):
                continue
            if kept is None:
                kept = torch.zeros(1, height, width)
            part = _part(kept, box)
            torch.maximum(part, shown, out=part)
        return kept

    def _shows(self, probability: torch.Tensor | None) -> bool:
        if probability is None:
            return False
        highest = probability.max().item()
        if highest <= self.threshold:
            self.highest = max(self.highest, highest)
        return highest > self.threshold

    def _confirm(self, box, before: torch.Tensor, region, side: int):
        """Look closer at a box that a look `side` wide found, with the probabilities `before` in `region`.

        Returns:
            `tuple`: The box of the last look, (left, top, right, bottom), and the mean, (1, h, w) there, of the
            probabilities of the last two looks, or `None` where nothing was seen any more.
        """
        while self.second_looks_left:
            self.second_looks_left -= 1
            extent = max(box[2] - box[0], box[3] - box[1])
            here = _around(box, max(round(_SURROUNDINGS * extent), self.closest), self.image.size)
            self._note_size(here[2] - here[0], here[3] - here[1])
            shown = self._look([self.image.crop(here)])[0]
            if not self._shows(shown):
                break
            if side <= max(4 * extent, self.closest):
                common = (*map(max, here[:2], region[:2]), *map(min, here[2:], region[2:]))
                part = _part(shown, [at - here[index % 2] for index, at in enumerate(common)])
                part.add_(_resample(before, region, common)).div_(2)
                return here, shown
            rows, columns = (shown[0] > self.threshold).nonzero().T + torch.tensor([[here[1]], [here[0]]])
            box = (columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1)
            before, region, side = shown, here, max(here[2] - here[0], here[3] - here[1])
        return box, None


def _resample(probability: torch.Tensor, region, box) -> torch.Tensor:
    """Of probabilities (1, *, *) that fill `region`, the part that lies in `box`: (1, h, w) in pixels of the image."""
    across = probability.shape[2] / (region[2] - region[0])
    down = probability.shape[1] / (region[3] - region[1])
    left, right = (round((at - region[0]) * across) for at in (box[0], box[2]))
    top, bottom = (round((at - region[1]) * down) for at in (box[1], box[3]))
    part = _part(probability, (left, top, max(right, left + 1), max(bottom, top + 1)))
    return F.interpolate(part[None], size=(box[3] - box[1], box[2] - box[0]), mode="bilinear")[0]


def _part(tensor: torch.Tensor, box) -> torch.Tensor:
    left, top, right, bottom = box
    return tensor[..., top:bottom, left:right]


def _scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    # Image processors take three rows of pixels for three channels.
    width, height = (max(round(length * factor), 4) for length in size)
    return width, height


def _tiles(size: tuple[int, int], side: int) -> list[tuple[int, int, int, int]]:
    """Boxes of `side` pixels, or as large as the picture, that overlap by half and cover it."""

    def starts(length):
        return [*range(0, length - side, side // 2), max(length - side, 0)]

    width, height = size
    return [
        (left, top, min(left + side, width), min(top + side, height))
        for top in starts(height)
        for left in starts(width)
    ]


def _tile_sides(size: tuple[int, int], input_size: int, finest: int) -> list[int]:
    """The sides of the tiles of all scales, from coarse to fine: each half of the one before, as fine as allowed."""
    while True:
        sides = [finest]
        while 2 * sides[0] < max(size):
            sides.insert(0, 2 * sides[0])
        if sum(len(_tiles(_scaled(size, input_size / side), input_size)) for side in sides) <= _MAX_TILES:
            return sides
        finest = math.ceil(1.02 * finest)


def _connected(found: torch.Tensor, cell: int) -> list[tuple[int, int, int, int]]:
    """The boxes of what is connected in a mask (h, w) of bools: its cells of so many pixels touch, if by a corner."""
    marked = F.max_pool2d(found[None].float(), cell, ceil_mode=True)[0].nonzero()
    cells, boxes = set(map(tuple, marked.tolist())), []
    while cells:
        edge = [cells.pop()]
        rows, columns = set(), set()
        while edge:
            row, column = edge.pop()
            rows.add(row)
            columns.add(column)
            around = {(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)} & cells
            cells -= around
            edge += around
        top, left = cell * min(rows), cell * min(columns)
        part = found[top : cell * (max(rows) + 1), left : cell * (max(columns) + 1)].nonzero()
        (first_row, first_column), (last_row, last_column) = part.amin(0).tolist(), part.amax(0).tolist()
        boxes.append((left + first_column, top + first_row, left + last_column + 1, top + last_row + 1))
    return boxes


def _around(box: tuple[int, int, int, int], side: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The square of `side` pixels about a box's middle: moved into the picture, and no larger than it."""
    width, height = (min(side, length) for length in size)
    left = min(max((box[0] + box[2] - width) // 2, 0), size[0] - width)
    top = min(max((box[1] + box[3] - height) // 2, 0), size[1] - height)
    return left, top, left + width, top + height


def dilate(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Grow a mask by `radius` pixels in every direction (grey-level dilation by a square).

    Args:
        mask (`torch.Tensor`): Shape (B, 1, H, W), values in [0, 1].
        radius (`int`): Pixels, 0 or more.

    Returns:
        `torch.Tensor`: The grown mask, same shape.
    """
    grown = mask.clone()
    part = _around_marked(grown, radius)
    if radius and part.numel():
        part.copy_(_grow(part, radius))
    return grown


def feather(mask: torch.Tensor, width: int) -> torch.Tensor:
    """Let a mask rise from its edge inwards over `width` pixels instead of at once.

    The ramp lies inside, so that nothing outside the mask is ever touched; a pixel d pixels deep in a hard mask gets
    min(d / (width + 1), 1). The image's own border is no edge.

    Args:
        mask (`torch.Tensor`): Shape (B, 1, H, W), values in [0, 1].
        width (`int`): Pixels, 0 or more.

    Returns:
        `torch.Tensor`: The feathered mask, same shape and support.
    """
    feathered = mask.clone()
    part = _around_marked(feathered, 1)
    eroded = total = part
    for _ in range(width):
        eroded = 1 - _grow(1 - eroded, 1)
        if not eroded.any():
            break
        total = total + eroded
    # PyTorch takes no whole numbers from 2**64 on.
    part.copy_(total / float(width + 1))
    return feathered


# Where a pipeline is to edit


_LOAD_MASK_MODEL = """    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor
    repo = "CIDAS/clipseg-rd64-refined"
    {call}
        mask_model=CLIPSegForImageSegmentation.from_pretrained(repo).to(pipe.device),
        mask_processor=CLIPSegProcessor.from_pretrained(repo),
    )"""
_LOAD_CAPTIONER = """    from transformers import BlipForConditionalGeneration, BlipProcessor
    repo = "Salesforce/blip-image-captioning-large"
    {call}
        captioner=BlipForConditionalGeneration.from_pretrained(repo).to(pipe.device),
        caption_processor=BlipProcessor.from_pretrained(repo),
    )"""


def check_texts(**texts) -> None:
    """Raises `TypeError` unless each is a string, a list of strings or None."""
    for name, text in texts.items():
        for entry in () if text is None else as_list(text):
            if not isinstance(entry, str):
                swapped = "; the image comes first: `pipe(image, prompt)`" if name == "prompt" else ""
                raise TypeError(
                    f"`{name}` has to be a string or a list of strings, but contains {type(entry).__name__}{swapped}."
                )


def check_finite(values: torch.Tensor, what: str, way_out: str) -> None:
    """Raise before NaN or infinity becomes a black picture. `values`: (N, ...), one entry a result."""
    finite = values.isfinite().flatten(1).all(dim=1).tolist()
    if not all(finite):
        results = ", ".join(str(index) for index, is_finite in enumerate(finite) if not is_finite)
        raise FloatingPointError(f"{what} NaN or infinity in result {results} of {len(finite)} (from 0). {way_out}")


def float16_way_out(name: str, model) -> str:
    """What helps when `model`, which users call `name`, gives NaN or infinity."""
    if model.dtype == torch.float16:
        return (
            f"In float16 nothing above 65504 has a number: run it in float32, `pipe.{name}.to(torch.float32)`, or load"
            " the pipeline in bfloat16."
        )
    return f"It ran in {str(model.dtype).removeprefix('torch.')}, so the weights of `{name}` may be damaged."


def expand(value, batch_size: int, name: str) -> list:
    """One entry, or a list of one or `batch_size` of them, as a list of `batch_size`."""
    values = as_list(value)
    if len(values) not in (1, batch_size):
        raise ValueError(
            f"`{name}` holds {len(values)} entries for a batch of {batch_size}; pass one or {batch_size}."
        )
    return values * batch_size if len(values) == 1 else values


class MaskFinderMixin:
    """What `mask_image`, `mask_prompt` and `source_prompt` of an edit mean, for whoever has the models to find out.

    The mask model, its processor, the captioner and its processor are None where they are not there.
    """

    mask_model: Any
    mask_processor: Any
    captioner: Any
    caption_processor: Any

    # How a user gives this object a model, for messages.
    _load_call = "pipe.register_modules("

    def _device_of(self, model) -> torch.device:
        """Where mask model or captioner run."""
        return model.device

    def _check_where(
        self,
        prompt,
        mask_image,
        mask_prompt,
        source_prompt,
        mask_dilation,
        mask_feather,
        padding_mask_crop=None,
        processing_resolution=None,
        output_type="pil",
    ) -> None:
        """Raises unless at most one way to say where is given, and possible, and the sizes fit any picture."""
        check_texts(prompt=prompt, mask_prompt=mask_prompt, source_prompt=source_prompt)
        choice = {"mask_image": mask_image, "mask_prompt": mask_prompt, "source_prompt": source_prompt}
        given = [f"`{name}`" for name, value in choice.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"Pass only one of `mask_image`, `mask_prompt` and `source_prompt`, not {given}.")
        if mask_image is None and given and (self.mask_model is None or self.mask_processor is None):
            load = _LOAD_MASK_MODEL.format(call=self._load_call)
            raise ValueError(f"{given[0]} needs a mask model, but there is none. Load one with\n{load}")
        if "auto" in as_list(source_prompt) and (self.captioner is None or self.caption_processor is None):
            load = _LOAD_CAPTIONER.format(call=self._load_call)
            raise ValueError(f'`source_prompt="auto"` needs a captioner, but there is none. Load one with\n{load}')
        if source_prompt is not None and prompt is None:
            raise ValueError("`source_prompt` is compared with `prompt`, which was not passed.")
        check_pixels("mask_dilation", mask_dilation)
        check_pixels("mask_feather", mask_feather)
        check_sizes(bool(given), padding_mask_crop, processing_resolution, output_type)

    def _caption(self, images: list[Image.Image]) -> list[str]:
        inputs = self.caption_processor(images=images, return_tensors="pt").to(self._device_of(self.captioner))
        inputs["pixel_values"] = inputs["pixel_values"].to(self.captioner.dtype)
        token_ids = self.captioner.generate(**inputs, max_new_tokens=30)
        return self.caption_processor.batch_decode(token_ids, skip_special_tokens=True)

    def _terms(self, images: list[Image.Image], prompt, mask_prompt, source_prompt) -> list[str]:
        """What to look for in each image."""
        if mask_prompt is not None:
            terms = expand(mask_prompt, len(images), "mask_prompt")
        else:
            captions = expand(source_prompt, len(images), "source_prompt")
            if "auto" in captions:
                automatic = self._caption(images)
                captions = [
                    auto if given == "auto" else given for given, auto in zip(captions, automatic, strict=True)
                ]
            prompts = expand(prompt, len(images), "prompt")
            terms = [difference_term(caption, text) for caption, text in zip(captions, prompts, strict=True)]
            for term, caption, text in zip(terms, captions, prompts, strict=True):
                if not term:
                    raise ValueError(
                        f"`source_prompt` {caption!r} and `prompt` {text!r} differ in no word that names a thing, so"
                        " there is no region to look for."
                    )
                logger.info(f"Looking for {term!r}: what the prompt changes in {caption!r}.")
        for term in terms:
            if not clean_term(term):
                raise ValueError(f"`mask_prompt` has to name what to edit, but is {term!r}.")
        return terms

    def _find(self, photos: list[Photo], prompt, mask_prompt, source_prompt, mask_threshold: float) -> torch.Tensor:
        """Masks by words, (B, 1, H, W) of zeros and ones."""
        if not 0 <= mask_threshold < 1:
            raise ValueError(f"`mask_threshold` has to be a probability in [0, 1), but is {mask_threshold!r}.")
        images = [photo.image() for photo in photos]
        masks = []
        for index, (image, term) in enumerate(
            zip(images, self._terms(images, prompt, mask_prompt, source_prompt), strict=True)
        ):
            try:
                found = search(
                    self.mask_model, self.mask_processor, image, term, mask_threshold, self._device_of(self.mask_model)
                )
            except FloatingPointError as error:
                raise FloatingPointError(f"{error} {float16_way_out('mask_model', self.mask_model)}") from error
            masks.append((found.probability > mask_threshold).float())
            if not masks[-1].any():
                raise ValueError(
                    f"The predicted mask is empty: nothing in image {index} looks like {term!r} with a probability"
                    f" above `mask_threshold` {mask_threshold} ({found.extent})."
                )
        return torch.stack(masks)

    def _masks(
        self,
        photos: list[Photo] | None,
        batch_size: int,
        size: tuple[int, int],
        prompt,
        mask_image,
        mask_prompt,
        source_prompt,
        mask_threshold: float,
        mask_dilation: int,
    ) -> torch.Tensor | None:
        """M, given or found, dilated: (B, 1, H, W), or None where none was asked for. `photos` is None for latents."""
        if mask_image is not None:
            mask = read_masks(mask_image, batch_size, size)
        elif mask_prompt is None and source_prompt is None:
            return None
        elif photos is None:
            raise ValueError("`image` holds latents, in which no mask can be predicted; pass `mask_image`.")
        else:
            mask = self._find(photos, prompt, mask_prompt, source_prompt, mask_threshold)
        return dilate(mask, mask_dilation)

    @torch.no_grad()
    def predict_mask(
        self,
        image: PipelineImageInput,
        prompt: str | list[str] | None = None,
        mask_prompt: str | list[str] | None = None,
        source_prompt: str | list[str] | None = None,
        mask_threshold: float = 0.5,
        mask_dilation: int = 0,
        mask_feather: int = 0,
        output_type: str = "pil",
    ) -> list[Image.Image] | Any:
        """The mask that an edit would be made with, and nothing else (Sec. 3.4).

        Args:
            image: As for an edit, B images.
            prompt (`str` or `list[str]`, *optional*): The edit prompt, needed with `source_prompt`.
            mask_prompt, source_prompt, mask_threshold, mask_dilation, mask_feather: As for an edit.
            output_type (`str`): `"pil"`, `"np"` or `"pt"`.

        Returns:
            B masks at image size, 1 (white) = edit: a list of mode "L" images, an array (B, H, W, 1) or a tensor
            (B, 1, H, W) in [0, 1].

        Raises:
            `ValueError`: When neither or both ways are given, no mask model is loaded, or nothing is found.
        """
        if mask_prompt is None and source_prompt is None:
            raise ValueError("Pass `mask_prompt`, or `source_prompt` together with `prompt`.")
        self._check_where(prompt, None, mask_prompt, source_prompt, mask_dilation, mask_feather)
        photos = read_photos(image)
        mask = self._find(photos, prompt, mask_prompt, source_prompt, mask_threshold)
        self._after_finding()
        return to_output(list(feather(dilate(mask, mask_dilation), mask_feather)), output_type)

    def _after_finding(self) -> None:
        """Called when the models have done their part."""
