"""The paper's metrics, on cases worked out by hand."""

import pytest
import torch

from diffusers_iedit.evaluation import metrics


SSIMS = [metrics.ssim_m, metrics.ssim_not_m, metrics.ssim_m_region, metrics.ssim_not_m_region]


@pytest.fixture
def mask():
    """The left half of a picture of 32 x 32."""
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    return mask


def test_clip_score_is_two_and_a_half_cosines():
    images = torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, 1.0], [-1.0, 0.0]])
    texts = torch.tensor([[5.0, 0.0]]).expand(4, 2)
    expected = torch.tensor([2.5, 2.5 * 0.5**0.5, 0.0, 0.0])
    torch.testing.assert_close(metrics.clip_score(images, texts), expected)


@pytest.mark.parametrize("ssim", SSIMS)
def test_every_ssim_of_a_picture_with_itself_is_one(ssim, mask):
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert ssim(picture, picture, mask).item() == pytest.approx(1)


@pytest.mark.parametrize("ssim", SSIMS)
def test_flat_grey_levels_leave_only_the_luminance_term(ssim):
    # SSIM of two flat pictures is (2ab + C1) / (a^2 + b^2 + C1) with C1 = 0.01^2; the mask makes all of it count.
    a, b = 0.2, 0.6
    mask = torch.ones(1, 1, 32, 32) if ssim in (metrics.ssim_m, metrics.ssim_m_region) else torch.zeros(1, 1, 32, 32)
    found = ssim(torch.full((1, 3, 32, 32), a), torch.full((1, 3, 32, 32), b), mask)
    assert found.item() == pytest.approx((2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4))


def test_a_change_inside_the_mask_does_not_lower_the_papers_background(mask):
    source = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    edited = source * (1 - mask)
    assert metrics.ssim_not_m(edited, source, mask).item() == pytest.approx(1)
    assert metrics.ssim_m(edited, source, mask).item() < 0.9


def test_black_in_both_pictures_makes_the_whole_frame_milder_than_the_region():
    # Flat backgrounds of 0.2 and 0.6, half of the frame: the luminance term for one half, 1 for the other, but for the
    # windows across the edge.
    mask = (torch.arange(256) < 128).float().expand(1, 1, 32, 256)
    source = torch.full((1, 3, 32, 256), 0.2)
    edited = torch.where(mask > 0, source, 0.6)
    background = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    whole, region = metrics.ssim_not_m(edited, source, mask), metrics.ssim_not_m_region(edited, source, mask)
    assert region.item() == pytest.approx(background, abs=0.03)
    assert whole.item() == pytest.approx((background + 1) / 2, abs=0.03)


def test_pictures_of_a_batch_are_measured_one_by_one(mask):
    source = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    edited = torch.stack([source[0], 1 - source[1]])
    masks = mask.expand(2, -1, -1, -1)
    for ssim in SSIMS:
        alone = [ssim(edited[i : i + 1], source[i : i + 1], mask).item() for i in range(2)]
        assert ssim(edited, source, masks).tolist() == pytest.approx(alone)


@pytest.mark.parametrize("ssim", SSIMS)
def test_a_mask_of_another_size_is_refused(ssim):
    with pytest.raises(ValueError, match=r"`mask` of shape \(B, 1, H, W\)"):
        ssim(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32), torch.ones(1, 1, 16, 16))
