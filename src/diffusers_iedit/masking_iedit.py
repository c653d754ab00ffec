"""Where to edit: the words in which two captions differ, CLIPSeg masks for them, and mask clean-up (Sec. 3.4)."""

import html
import re
import unicodedata
from difflib import SequenceMatcher

import torch
import torch.nn.functional as F
from PIL import Image


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


def dilate(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Grow a mask by `radius` pixels in every direction (grey-level dilation by a square).

    Args:
        mask (`torch.Tensor`): Shape (B, 1, H, W), values in [0, 1].
        radius (`int`): Pixels, 0 or more.

    Returns:
        `torch.Tensor`: The grown mask, same shape.
    """
    window = 2 * radius + 1
    # Two one-dimensional windows give the square at a cost that grows with its side, not its area.
    mask = F.max_pool2d(mask, (window, 1), stride=1, padding=(radius, 0))
    return F.max_pool2d(mask, (1, window), stride=1, padding=(0, radius))


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
    eroded = total = mask
    for _ in range(width):
        eroded = 1 - dilate(1 - eroded, 1)
        if not eroded.any():
            break
        total = total + eroded
    return total / (width + 1)
