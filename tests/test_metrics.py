"""The paper's metrics, on cases worked out by hand."""

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

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


def texture(height, width, seed=0):
    """Noise that is smooth over a few pixels, one channel, (height, width) in [0, 1]."""
    noise = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(seed))
    blurred = torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2)[0, 0]
    return (blurred - blurred.min()) / (blurred.max() - blurred.min())


def as_image(grey):
    """(H, W) -> an RGB image of it, (1, 3, H, W)."""
    return grey.expand(1, 3, *grey.shape).clone()


@pytest.fixture
def disc():
    """A disc of radius 16 in the middle of a picture of 64 x 64, as a mask."""
    place = torch.arange(64) - 31.5
    return (place**2 + place[:, None] ** 2 < 256).float()[None, None]


@pytest.mark.parametrize("ssim", SSIMS[:2])
def test_ssim_of_the_whole_frame_is_that_of_torchmetrics(ssim):
    source = torch.rand(2, 3, 40, 52, generator=torch.Generator().manual_seed(0))
    edited = (source + 0.1 * torch.randn(source.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    mask = torch.ones(2, 1, 40, 52) if ssim is metrics.ssim_m else torch.zeros(2, 1, 40, 52)
    expected = structural_similarity_index_measure(
        edited.double(), source.double(), data_range=1.0, reduction="none", return_full_image=True
    )[1].mean((1, 2, 3))
    torch.testing.assert_close(ssim(edited, source, mask), expected)


def test_ssim_counts_the_windows_that_fit_in_the_frame():
    # Around the only window that fits in 11 x 11 pixels lies the whole picture. Its SSIM by hand, with a Gaussian.
    source, edited = torch.rand(2, 1, 3, 11, 11, generator=torch.Generator().manual_seed(0)).double()
    line = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2)).double()
    weight = torch.outer(line, line) / line.sum() ** 2

    def mean(image):
        return (image * weight).sum((-1, -2))

    a, b = mean(source), mean(edited)
    variances, covariance = mean(source**2) - a**2 + mean(edited**2) - b**2, mean(source * edited) - a * b
    expected = (2 * a * b + 1e-4) * (2 * covariance + 9e-4) / (a**2 + b**2 + 1e-4) / (variances + 9e-4)
    assert metrics.ssim(edited, source).item() == pytest.approx(expected.mean().item())


def test_ssim_is_one_for_equal_and_negative_for_inverted_pictures():
    picture = as_image(texture(32, 32))
    assert metrics.ssim(picture, picture).item() == 1
    assert metrics.ssim(1 - picture, picture).item() < 0


def test_clip_similarity_is_the_cosine_whatever_its_sign():
    images = torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, 1.0], [-1.0, 0.0]])
    texts = torch.tensor([[5.0, 0.0]]).expand(4, 2)
    torch.testing.assert_close(metrics.clip_similarity(images, texts), torch.tensor([1.0, 0.5**0.5, 0.0, -1.0]))


def test_clip_directional_compares_the_change_of_the_image_with_that_of_the_text():
    # From x to y, from y to x, and from x to z, where the text goes from x to y; by hand 1, -1 and 1 / 2.
    x, y, z = torch.eye(3)
    edited, source = torch.stack([y, x, z]), torch.stack([x, y, x])
    found = metrics.clip_directional(edited, source, y.expand(3, 3), x.expand(3, 3))
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0, 0.5]))
    longer = metrics.clip_directional(5 * edited, source, y.expand(3, 3), 3 * x.expand(3, 3))
    torch.testing.assert_close(longer, found)


def test_clip_directional_of_what_has_not_changed_is_zero():
    x, y = torch.eye(2)[:, None]
    assert metrics.clip_directional(x, x, y, x).item() == 0
    assert metrics.clip_directional(y, x, y, y).item() == 0


def test_mse_and_psnr_of_flat_pictures():
    # (0.6 - 0.2)^2 = 0.16, and -10 log10 0.16 = 7.96 dB; black against white is 1 and 0 dB.
    edited = torch.stack([torch.full((3, 8, 8), value) for value in (0.6, 1.0)])
    source = torch.stack([torch.full((3, 8, 8), value) for value in (0.2, 0.0)])
    assert metrics.mse(edited, source).tolist() == pytest.approx([0.16, 1])
    assert metrics.psnr(edited, source).tolist() == pytest.approx([7.9588, 0], abs=1e-4)


def test_mse_and_psnr_look_at_the_region_alone(mask):
    source = torch.zeros(1, 3, 32, 32)
    edited = 0.5 * mask.expand(1, 3, 32, 32)
    assert metrics.mse(edited, source, mask).item() == pytest.approx(0.25)
    assert metrics.mse(edited, source, 1 - mask).item() == 0
    assert metrics.mse(edited, source).item() == pytest.approx(0.125)
    assert metrics.psnr(edited, source, mask).item() == pytest.approx(6.0206, abs=1e-4)


def test_psnr_of_equal_pictures_is_one_hundred():
    picture = as_image(texture(16, 16))
    assert metrics.mse(picture, picture).item() == 0
    assert metrics.psnr(picture, picture).item() == metrics.HIGHEST_PSNR == 100


def test_one_value_that_is_one_step_off_is_below_the_psnr_of_equal_pictures():
    picture = torch.zeros(1, 3, 226, 226)
    edited = picture.clone()
    edited[0, 0, 0, 0] = 1 / 255
    assert metrics.psnr(edited, picture).item() < 100


def test_background_equal_counts_pixels_and_not_values(mask):
    # 512 pixels of background. Of two, one value each is one step off; of one, all three are.
    source = as_image(texture(32, 32))
    source = (255 * source).round() / 255
    edited = source.clone()
    for x, channels in ((16, [0]), (17, [2]), (18, [0, 1, 2])):
        edited[0, channels, 5, x] += torch.where(source[0, channels, 5, x] > 0.5, -1, 1) / 255
    assert metrics.background_equal(edited, source, mask).item() == pytest.approx(509 / 512)


def test_background_equal_is_blind_to_the_mask_and_to_what_eight_bits_do_not_hold(mask):
    source = (255 * as_image(texture(32, 32))).round() / 255
    edited = torch.where(mask > 0, 1 - source, source + 0.4 / 255)
    assert metrics.background_equal(edited, source, mask).item() == 1
    assert metrics.background_equal(1 - edited, source, mask).item() < 0.05


@pytest.mark.parametrize(
    "metric",
    [metrics.background_equal, metrics.shift, metrics.ssim_not_m_region, lambda a, b, m: metrics.mse(a, b, 1 - m)],
)
def test_what_there_is_no_background_for_is_not_a_number(metric):
    picture = as_image(texture(32, 32))
    assert metric(picture, picture, torch.ones(1, 1, 32, 32)).isnan().all()


def test_shift_is_the_length_of_the_way_that_the_background_has_moved(disc):
    wide = texture(80, 80)
    source, edited = wide[8:72, 8:72], wide[5:69, 12:76]
    found = metrics.shift(as_image(edited), as_image(source), disc)
    assert found.item() == pytest.approx(5, abs=0.1)


def test_shift_sees_half_a_pixel(disc):
    # The same surface, with pixels of 2 x 2 of its points, once from its first column on and once from its second.
    fine = torch.nn.functional.avg_pool2d(texture(134, 134)[None, None], 5, stride=1)[0, 0]
    source, edited = (
        torch.nn.functional.avg_pool2d(fine[None, None, 1:129, start : start + 128], 2)[0, 0] for start in (0, 1)
    )
    found = metrics.shift(as_image(edited), as_image(source), disc)
    assert found.item() == pytest.approx(0.5, abs=0.1)


def test_shift_of_a_still_background_is_zero_whatever_the_mask_shows(disc):
    source = as_image(0.1 * texture(64, 64))
    edited = torch.where(disc > 0, (torch.arange(64) > 32).float(), source)
    assert metrics.shift(source, source, disc).item() == 0
    assert metrics.shift(edited, source, disc).item() == 0


def test_what_stands_still_in_the_mask_does_not_hold_the_background_back(disc):
    wide = texture(80, 80)
    thing = as_image(texture(64, 64, seed=1))
    edited, source = (torch.where(disc > 0, thing, as_image(wide[8:72, x : x + 64])) for x in (11, 8))
    assert metrics.shift(edited, source, disc).item() == pytest.approx(3, abs=0.1)


def test_noise_is_hardly_a_shift(disc):
    source = as_image(texture(64, 64))
    edited = source + 0.05 * torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    assert metrics.shift(edited, source, disc).item() < 0.1


def test_a_background_that_has_changed_has_not_moved():
    # The same slow wave from black to white under two different noises: their likest places are far from each other.
    wave = 0.5 - 0.5 * torch.cos(torch.pi * torch.arange(64) / 63).expand(64, 64)
    for seed in range(4):
        edited, source = (wave + 0.1 * texture(80, 80, seed + other)[8:72, 8:72] for other in (10, 20))
        found = metrics.shift(as_image(edited), as_image(source), torch.zeros(1, 1, 64, 64))
        assert found.item() < 1


def test_flat_pictures_have_no_shift(disc):
    assert metrics.shift(torch.ones(1, 3, 64, 64), torch.zeros(1, 3, 64, 64), disc).item() == 0


def test_lpips_is_the_weighted_distance_of_directions():
    # One layer, two positions, two channels: (3, 4) against (4, 3), and (2, 0) against (0, 5), with weights 1 and 2.
    # By hand: 1 * 0.2^2 + 2 * 0.2^2 = 0.12 and 1 + 2 = 3, the mean 1.56. A second layer is equal in both: 0.
    edited = torch.tensor([[3.0, 2.0], [4.0, 0.0]]).view(1, 2, 1, 2)
    source = torch.tensor([[4.0, 0.0], [3.0, 5.0]]).view(1, 2, 1, 2)
    weights = [torch.tensor([1.0, 2.0]), torch.tensor([1.0])]
    same = torch.ones(1, 1, 3, 3)
    assert metrics.lpips([edited, same], [source, same], weights).item() == pytest.approx(1.56)
    assert metrics.lpips([edited, same], [edited, 7 * same], weights).item() == 0


def test_structure_distance_compares_self_similarities():
    # Keys along x, x and y against x, y and y: of the nine cosines, four change by 1.
    x, y = torch.eye(2)
    edited, source = torch.stack([x, x, y])[None], torch.stack([x, y, y])[None]
    assert metrics.structure_distance(edited, source).item() == pytest.approx(4 / 9)


def test_structure_distance_is_blind_to_where_the_keys_point_and_how_long_they_are():
    keys = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
    turned = 2 * keys @ torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]
    assert metrics.structure_distance(keys, keys).item() == 0
    assert metrics.structure_distance(turned, keys).item() == pytest.approx(0, abs=1e-12)


def test_fid_of_two_spreads():
    # Sets with the means (0, 0) and (3, 4) and the same spread: |(3, 4)|^2 = 25. With standard deviations of s and 3 s
    # in each of two directions: 2 (3 s - s)^2.
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert metrics.fid(corners + torch.tensor([3.0, 4.0]), corners) == pytest.approx(25)
    variance = 4 / 3
    assert metrics.fid(3 * corners, corners) == pytest.approx(2 * 4 * variance)


def test_fid_of_a_set_with_itself_is_zero_even_with_fewer_images_than_features():
    features = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    # Rounding alone would make it negative.
    assert metrics.fid(features, features.flip(0)) == 0


def test_fid_of_more_images_than_features_is_that_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    features, reference = (torch.randn(n, 6, generator=generator).double() for n in (60, 40))
    features = 2 * features + torch.arange(6)
    network = torch.nn.Identity()
    network.num_features = 6
    expected = FrechetInceptionDistance(network)
    expected.update(reference, real=True)
    expected.update(features, real=False)
    assert metrics.fid(features, reference) == pytest.approx(expected.compute().item(), rel=1e-5)


def test_fid_of_few_images_is_exact():
    """Of two pictures and their like, moved along an axis in which neither spreads: the distance is that alone."""
    features = torch.zeros(2, 50)
    features[1, 0] = 3.0
    moved = features.clone()
    moved[:, 1] = 0.5
    assert metrics.fid(moved, features) == pytest.approx(0.25, abs=1e-12)


@pytest.mark.parametrize(
    ("features", "reference", "message"),
    [((1, 4), (3, 4), "two images a set or more, got 1 and 3"), ((3, 4), (3, 5), r"got \(3, 4\) and \(3, 5\)")],
)
def test_fid_refuses_sets_that_it_cannot_compare(features, reference, message):
    with pytest.raises(ValueError, match=message):
        metrics.fid(torch.rand(features), torch.rand(reference))


@pytest.mark.parametrize("metric", [metrics.mse, metrics.psnr, metrics.background_equal, metrics.shift])
def test_shapes_that_do_not_fit_are_refused(metric):
    with pytest.raises(ValueError, match="have to be of one shape"):
        metric(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 31), torch.ones(1, 1, 32, 32))


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        # 4 x 8 pixels: the rows grow by two each way.
        ((10, 14), (4, 12), ((8, 16), (4, 12))),
        # At the frame's edge the square moves inwards.
        ((0, 2), (4, 12), ((0, 8), (4, 12))),
        ((18, 20), (28, 30), ((18, 20), (28, 30))),
        # As wide as the frame, which is lower: no square fits.
        ((5, 6), (0, 30), ((0, 20), (0, 30))),
    ],
)
def test_the_window_of_an_edit_is_the_smallest_square_that_fits(rows, columns, expected):
    mask = torch.zeros(1, 20, 30)
    mask[:, slice(*rows), slice(*columns)] = 1
    assert metrics.edit_window(mask) == tuple(slice(*side) for side in expected)


def test_the_window_of_an_empty_mask_is_the_frame():
    assert metrics.edit_window(torch.zeros(1, 20, 30)) == (slice(0, 20), slice(0, 30))
