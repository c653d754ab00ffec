"""The paper's metrics (Sec. 4.1): does the edit show what was asked for, and is the rest of the picture kept?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchmetrics.functional.image import structural_similarity_index_measure


CLIP_SCORE_WEIGHT = 2.5
"""Of the cosine, as in Hessel et al., https://huggingface.co/papers/2104.08718; the paper's figures fit it."""


def clip_score(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """CLIPScore: 2.5 max(cosine, 0).

    Args:
        image_embeds (`torch.Tensor`): CLIP embeddings of the edited images, of any length, shape (B, D).
        text_embeds (`torch.Tensor`): CLIP embeddings of the edit prompts, same shape.

    Returns:
        `torch.Tensor`: Scores in [0, 2.5], shape (B,).
    """
    return CLIP_SCORE_WEIGHT * F.cosine_similarity(image_embeds, text_embeds, dim=-1).clamp(min=0)


def _ssim_map(edited: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    _, full = structural_similarity_index_measure(
        edited.double(), source.double(), data_range=1.0, reduction="none", return_full_image=True
    )
    return full.mean(1, keepdim=True)


def _check(edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> None:
    if edited.shape != source.shape or mask.shape != (len(edited), 1, *edited.shape[-2:]):
        raise ValueError(
            "`edited` and `source` have to be of one shape (B, 3, H, W) and `mask` of shape (B, 1, H, W), got "
            f"{tuple(edited.shape)}, {tuple(source.shape)} and {tuple(mask.shape)}."
        )


def ssim_m(edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """SSIM-M as the paper most likely computed it: both images times the mask, then the mean over the whole frame.

    What is black in both counts as perfectly alike, so a small mask comes out high. Neither high nor low is good by
    itself (Sec. 4.3).

    Args:
        edited (`torch.Tensor`): The edited images, shape (B, 3, H, W), in [0, 1].
        source (`torch.Tensor`): The images before, same shape.
        mask (`torch.Tensor`): Where the edit belongs, shape (B, 1, H, W), 1 = edit.

    Returns:
        `torch.Tensor`: SSIM, at most 1, shape (B,).

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check(edited, source, mask)
    return _ssim_map(edited * mask, source * mask).mean((1, 2, 3))


def ssim_not_m(edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """SSIM of the background as the paper most likely computed it: `ssim_m` of the inverted mask. Higher is better."""
    return ssim_m(edited, source, 1 - mask)


def ssim_m_region(edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of the SSIM map of the two images over the mask alone; arguments and result as for `ssim_m`.

    The map's windows are 11 pixels wide: near the mask's edge they see both sides of it.
    """
    _check(edited, source, mask)
    return (_ssim_map(edited, source) * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))


def ssim_not_m_region(edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`ssim_m_region` of the background: how well it is kept."""
    return ssim_m_region(edited, source, 1 - mask)
