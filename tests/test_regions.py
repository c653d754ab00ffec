"""The picture's side of an edit: what is read, which region is cut out, and how an edit is set back."""

import icc_profiles
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageDraw

from diffusers_iedit import mini
from diffusers_iedit.regions_iedit import (
    Region,
    bounding_box,
    cut_out,
    match_colours,
    pad_to_multiple,
    read_masks,
    read_photos,
    resize,
    set_back,
    surrounding_region,
    to_output,
    work_size,
)


def picture(width=64, height=48, mode="RGB", seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def smooth_picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def mask_of(size, box):
    """(1, H, W): 1 in the box (left, top, right, bottom), right and bottom left out."""
    mask = torch.zeros(1, *size)
    left, top, right, bottom = box
    mask[:, top:bottom, left:right] = 1
    return mask


# Reading pictures


def test_a_pil_picture_keeps_its_own_bytes():
    source = picture()
    (photo,) = read_photos(source)
    assert photo.pixels.dtype == torch.uint8
    assert np.array_equal(photo.pixels.permute(1, 2, 0).numpy(), np.asarray(source))
    assert np.array_equal(np.asarray(to_output([photo.pixels], "pil", [photo])[0]), np.asarray(source))


def test_dpi_and_colour_profile_are_carried_and_nothing_else():
    source = picture()
    source.info.update(dpi=(300, 300), icc_profile=icc_profiles.display_p3(), exif=b"Exif\0\0", comment="secret")
    photo = read_photos(source)[0]
    image = to_output([photo.pixels], "pil", [photo])[0]
    assert image.info == {"dpi": (300, 300), "icc_profile": icc_profiles.display_p3()}


@pytest.mark.parametrize("dpi", [(0, 0), (300, 0), (float("nan"), 300), (1e9, 1e9), (-72, -72), 300, "300", (300,)])
def test_a_dpi_that_no_file_can_be_saved_with_is_left_out(dpi):
    source = picture()
    source.info["dpi"] = dpi
    photo = read_photos(source)[0]
    assert "dpi" not in to_output([photo.pixels], "pil", [photo])[0].info


def test_models_see_srgb_and_the_profile_leads_back():
    source = Image.new("RGB", (16, 16), (200, 60, 40))
    source.info["icc_profile"] = icc_profiles.display_p3()
    photo = read_photos(source)[0]
    as_srgb = np.asarray(photo.image())[0, 0].astype(int)
    # P3's red is stronger than sRGB's, so the same colour needs more red and less green in sRGB.
    assert as_srgb[0] > 205
    assert as_srgb[1] < 55
    back = photo.from_srgb(photo.to_srgb(photo.pixels[:3]))
    assert (back * 255 - photo.pixels[:3]).abs().max() <= 2


def test_a_profile_that_cannot_be_used_is_kept_and_said(caplog):
    source = picture()
    source.info["icc_profile"] = b"no profile at all"
    photo = read_photos(source)[0]
    assert np.array_equal(np.asarray(photo.image()), np.asarray(source))
    assert "colour profile cannot be used" in caplog.text
    assert photo.icc_profile == b"no profile at all"


def test_what_is_read_already_is_taken_as_it_is():
    (photo,) = read_photos(picture())
    assert read_photos(photo)[0] is photo
    assert read_photos([photo, photo]) == [photo, photo]


def test_a_cmyk_photo_becomes_srgb_by_its_profile_which_is_left_out():
    source = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    source.info["icc_profile"] = icc_profiles.cmyk()
    photo = read_photos(source)[0]
    assert photo.icc_profile is None
    colour = photo.pixels[:3, 0, 0].tolist()
    assert max(colour) - min(colour) <= 3, "the profile's cyan ink is grey"
    assert 150 < colour[0] < 230


def test_a_cmyk_photo_with_a_broken_profile_is_converted_without_it(caplog):
    source = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    source.info["icc_profile"] = b"broken"
    photo = read_photos(source)[0]
    assert photo.icc_profile is None
    assert photo.pixels[:3, 0, 0].tolist() == [0, 255, 255]
    assert "colour profile cannot be used" in caplog.text


@pytest.mark.parametrize("mode", ["1", "L", "LA", "F"])
def test_a_grey_photo_becomes_srgb_by_its_profile_which_is_left_out(mode):
    source = Image.new("L", (16, 16), 255 if mode == "1" else 100).convert(mode)
    source.info["icc_profile"] = icc_profiles.grey()
    photo = read_photos(source)[0]
    assert photo.icc_profile is None
    colour = photo.pixels[:3, 0, 0].tolist()
    assert max(colour) - min(colour) <= 1
    assert min(colour) >= (254 if mode == "1" else 150)


@pytest.mark.parametrize("profile", [icc_profiles.grey(), b"broken"])
def test_a_transparent_grey_level_stays_transparent_whatever_the_profile(profile):
    source = Image.new("L", (16, 16), 100)
    source.putpixel((3, 2), 7)
    source.info.update(transparency=7, icc_profile=profile)
    alpha = read_photos(source)[0].pixels[3]
    assert alpha[2, 3] == 0
    assert alpha.sum() == 255 * (16 * 16 - 1)


def test_a_lab_picture_becomes_srgb_and_its_profile_is_left_out():
    lab = ImageCms.createProfile("LAB")
    source = ImageCms.profileToProfile(picture(), ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
    source.info["icc_profile"] = ImageCms.ImageCmsProfile(lab).tobytes()
    assert read_photos(source)[0].icc_profile is None


# Reading masks


def strokes(colour, mode="RGBA", size=(32, 24)):
    """A layer as every canvas gives it: strokes of one colour on a transparent ground."""
    layer = Image.new("RGBA", size, (0, 0, 0, 0))
    ImageDraw.Draw(layer).rectangle((8, 6, 15, 11), fill=(*colour, 255))
    return layer.convert(mode)


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (220, 30, 30)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_of_a_mask_with_transparency_what_is_painted_is_the_mask_in_any_colour(colour, mode):
    mask = read_masks(strokes(colour, mode), 1, (24, 32))
    assert torch.equal(mask[0], mask_of((24, 32), (8, 6, 16, 12)))


def test_half_transparent_paint_is_a_soft_mask():
    layer = Image.new("RGBA", (32, 24), (0, 0, 0, 0))
    layer.paste((255, 255, 255, 128), (8, 6, 16, 12))
    assert read_masks(layer, 1, (24, 32)).max() == pytest.approx(128 / 255)


def test_an_opaque_mask_is_read_by_its_grey_with_and_without_an_alpha_channel():
    grey = Image.new("L", (32, 24), 0)
    ImageDraw.Draw(grey).rectangle((8, 6, 15, 11), fill=255)
    for mode in ("L", "RGB", "RGBA", "LA"):
        assert torch.equal(read_masks(grey.convert(mode), 1, (24, 32))[0], mask_of((24, 32), (8, 6, 16, 12)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_a_label_image_of_zeros_and_ones_is_an_error_and_no_mask_of_next_to_nothing(dtype):
    labels = np.zeros((24, 32), dtype=dtype)
    labels[6:12, 8:16] = 1 if dtype is np.uint8 else 255
    with pytest.raises(ValueError, match="`mask_image` has the grey values 0 and 1 only, where 255 means edit"):
        read_masks(Image.fromarray(labels), 1, (24, 32))


def test_a_layer_without_a_stroke_is_the_error_of_an_empty_mask():
    with pytest.raises(ValueError, match="`mask_image` is zero everywhere"):
        read_masks(Image.new("RGBA", (32, 24), (255, 255, 255, 0)), 1, (24, 32))


# Which region


def test_the_bounding_box_holds_all_that_is_above_zero():
    mask = mask_of((40, 60), (5, 7, 9, 30))
    mask[0, 35, 50] = 0.01
    assert bounding_box(mask) == Region(top=7, left=5, height=29, width=46)


@pytest.mark.parametrize(
    ("box", "padding", "expected"),
    [
        ((40, 40, 50, 44), 5, Region(32, 35, 20, 20)),  # a square around it
        ((40, 40, 50, 44), 0, Region(37, 40, 10, 10)),
        ((0, 0, 1, 1), 6, Region(0, 0, 13, 13)),  # moved at a corner, not cut
        ((119, 99, 120, 100), 6, Region(87, 107, 13, 13)),
        ((0, 20, 110, 30), 10, Region(0, 0, 100, 120)),  # too wide for a square, and nearly all of the picture
        ((0, 40, 90, 50), 10, Region(0, 0, 92, 110)),  # too wide for a square: the picture's aspect
        ((0, 0, 120, 100), 32, Region(0, 0, 100, 120)),  # touches all borders
    ],
)
def test_the_region_around_a_mask(box, padding, expected):
    assert surrounding_region(mask_of((100, 120), box), padding) == expected


def test_every_region_lies_in_its_picture_and_holds_its_mask():
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = tuple(rng.integers(8, 300, 2).tolist())
        top, left = (int(rng.integers(0, side)) for side in size)
        bottom, right = (int(rng.integers(start + 1, side + 1)) for start, side in zip((top, left), size, strict=True))
        mask, padding = mask_of(size, (left, top, right, bottom)), int(rng.integers(0, 60))
        region = surrounding_region(mask, padding)
        assert region.of(mask).sum() == mask.sum()
        assert region.of(mask).shape[1:] == region.size
        assert min(region.size) >= 1
        # Square, or else the picture's aspect as far as whole pixels allow.
        if region.height != region.width:
            scale = min(side / whole for side, whole in zip(region.size, size, strict=True))
            assert all(abs(side - scale * whole) <= 1 for side, whole in zip(region.size, size, strict=True))


def test_a_panorama_is_cut_out_in_squares_where_they_fit():
    assert surrounding_region(mask_of((64, 4000), (2000, 20, 2020, 40)), 10) == Region(10, 1990, 40, 40)
    region = surrounding_region(mask_of((64, 4000), (2000, 0, 3000, 64)), 10)
    assert region == Region(0, 0, 64, 4000)


def test_the_work_size_has_the_resolution_as_its_longer_side():
    assert work_size((300, 400), 100) == (75, 100)
    assert work_size((30, 30), 64) == (64, 64)
    assert work_size((300, 400), None) == (300, 400)


# Cutting out and setting back


@pytest.mark.parametrize("size", [(48, 64), (300, 400), (128, 150)])
def test_what_is_cut_out_and_set_back_has_not_moved(size):
    photo = read_photos(smooth_picture(400, 300))[0]
    region = Region(20, 30, *size) if size != (300, 400) else Region(0, 0, 300, 400)
    cut = cut_out([photo], [region], (64, 64) if size[0] == size[1] else work_size(region.size, 100))
    back = resize(cut, region.size)
    original = region.of(photo.pixels).float() / 255
    offsets = [(dy, dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2)]
    errors = [(back[0] - original.roll(offset, dims=(-2, -1))).abs().mean().item() for offset in offsets]
    assert offsets[int(np.argmin(errors))] == (0, 0)


def test_setting_back_changes_nothing_outside_the_mask_and_not_the_source():
    photo = read_photos(picture(mode="RGBA"))[0]
    before = photo.pixels.clone()
    region, mask = Region(8, 10, 30, 40), mask_of((48, 64), (20, 20, 30, 32))
    result = set_back(photo, region, torch.zeros(3, 30, 40), mask)
    assert torch.equal(photo.pixels, before)
    inside = mask.bool().expand(4, -1, -1).clone()
    assert not result[:3][inside[:3]].any()
    inside[3] = False
    assert torch.equal(result[~inside], before[~inside])


def test_a_soft_mask_mixes():
    photo = read_photos(Image.new("RGB", (16, 16), (100, 100, 100)))[0]
    result = set_back(photo, Region(0, 0, 16, 16), torch.ones(3, 16, 16), torch.full((1, 16, 16), 0.5))
    assert set(result.unique().tolist()) == {178}


def test_without_a_mask_the_region_is_replaced():
    photo = read_photos(picture())[0]
    result = set_back(photo, Region(4, 5, 10, 12), torch.zeros(3, 10, 12), None)
    assert not Region(4, 5, 10, 12).of(result).any()
    assert torch.equal(result[:, :4], photo.pixels[:, :4])


def test_an_edit_is_set_into_the_photos_own_colour_space():
    source = Image.new("RGB", (32, 32), (120, 120, 120))
    source.info["icc_profile"] = icc_profiles.display_p3()
    photo = read_photos(source)[0]
    red = torch.zeros(3, 16, 16)
    red[0] = 1
    result = set_back(photo, Region(8, 8, 16, 16), red, None)
    inside = result[:, 16, 16].tolist()
    # sRGB's red is a little less than P3's.
    assert 220 < inside[0] < 245
    assert inside[1] > 40
    assert result[:, 0, 0].tolist() == [120, 120, 120]


def test_padding_is_to_the_right_and_below():
    padded = pad_to_multiple(torch.ones(1, 1, 9, 16), 8, "constant")
    assert padded.shape == (1, 1, 16, 16)
    assert padded[0, 0, :9].all()
    assert not padded[0, 0, 9:].any()


def test_arrays_have_alpha_where_one_of_the_pictures_has():
    photos = read_photos([picture(), picture(mode="RGBA")])
    array = to_output([photo.pixels for photo in photos], "np", photos)
    assert array.shape == (2, 48, 64, 4)
    assert (array[0, ..., 3] == 1).all()


# Colours


def vae_like_error(size, seed):
    """What a VAE does to colours: an offset that drifts slowly over the picture."""
    coarse = torch.randn(1, 3, 3, 3, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.03
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=True)[0]


def test_a_drift_of_colours_is_taken_out_of_the_edit():
    source = torch.from_numpy(np.asarray(smooth_picture(96, 80)).copy()).permute(2, 0, 1) / 255 * 0.8 + 0.1
    mask = mask_of((80, 96), (30, 20, 60, 60))
    target = source.clone()
    target[:, 25:55, 35:55] = torch.tensor([0.8, 0.2, 0.2])[:, None, None]
    edited = torch.where(mask > 0, target, source) - vae_like_error((80, 96), seed=1)
    corrected = match_colours(edited, source, mask, mask)
    inside = mask.bool().expand(3, -1, -1)
    before, after = ((each - target)[inside].abs().mean() for each in (edited, corrected))
    assert after < 0.5 * before
    assert torch.equal(corrected[~inside], source[~inside])


def test_what_was_edited_beside_the_mask_counts_as_far_as_it_is_background():
    source = torch.full((3, 48, 64), 0.5)
    mask, latent_mask = mask_of((48, 64), (20, 18, 36, 30)), mask_of((48, 64), (16, 16, 40, 32))
    edited = source - 0.04 * latent_mask  # a drift in what was edited alone, which the far surroundings do not show
    corrected = match_colours(edited, source, mask, latent_mask)
    assert (corrected - source).abs().max() < 0.005
    edited = source - 0.45 * latent_mask  # another thing, larger than the mask, of which no colour is taken
    corrected = match_colours(edited, source, mask, latent_mask)
    assert torch.allclose(corrected[mask.expand(3, -1, -1) > 0], edited[mask.expand(3, -1, -1) > 0], atol=0.02)


@pytest.mark.parametrize("box", [(0, 0, 64, 48), (0, 0, 1, 1), (63, 47, 64, 48), (0, 0, 64, 24)])
def test_a_mask_at_the_border_or_everywhere_is_matched_to_what_there_is(box):
    source, edited = torch.full((3, 48, 64), 0.5), torch.full((3, 48, 64), 0.45)
    mask = mask_of((48, 64), box)
    corrected = match_colours(edited, source, mask, mask)
    assert corrected.isfinite().all()
    expected = edited if box == (0, 0, 64, 48) else source
    assert torch.allclose(corrected, expected, atol=1e-3)


def test_a_mini_scene_is_read_as_it_is():
    scene = mini.render(seed=3)
    assert np.array_equal(np.asarray(read_photos(scene.image)[0].image()), np.asarray(scene.image))
