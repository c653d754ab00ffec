"""What the training sees of the pairs: their order, one augmentation for a pair, cached latents, and the noise."""

import os
import resource

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from small_pairs import make_rows, tiny_models

from diffusers_iedit import IEditPipeline, mini
from diffusers_iedit.finetuning.data import ROWS_PER_FILE, CachedPairStream, PairStream, cache_pairs, draw_noise
from diffusers_iedit.finetuning.families import StableDiffusion, load_family
from diffusers_iedit.finetuning.models import PairEncoder, load_clip
from diffusers_iedit.pairs.schema import FEATURES, validate


SIDES = ("source", "target")
IMAGES = tuple(f"{side}_{kind}" for side in SIDES for kind in ("image", "mask"))
TERMS = ("loc", "global", "mask", "perc")


def as_pairs(rows):
    return Dataset.from_dict({name: [row[name] for row in rows] for name in FEATURES}, features=FEATURES)


def place_image(width, height, marked=(125, 250)):
    """A picture whose red tells the column, from 0 to 250, and whose green the row; and a mask: where red is so."""
    x, y = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    pixels = np.stack([x, y, np.zeros_like(x)], 2).round().astype(np.uint8)
    mask = (pixels[..., 0] > marked[0]) & (pixels[..., 0] <= marked[1])
    return Image.fromarray(pixels), Image.fromarray(255 * mask.astype(np.uint8))


def place_pairs(source_size, target_size, marked=(125, 250)):
    """A set of one pair of such pictures."""
    row = make_rows(1)[0]
    for side, size in zip(SIDES, (source_size, target_size), strict=True):
        row[f"{side}_image"], row[f"{side}_mask"] = place_image(*size, marked)
    return as_pairs([row])


def box_pairs(size, source_box, target_box=None, target_size=None):
    """A set of one pair of such pictures, with these boxes (left, top, right, bottom) for masks."""
    row = make_rows(1)[0]
    for side, pixels, box in (("source", size, source_box), ("target", target_size or size, target_box or source_box)):
        row[f"{side}_image"], mask = place_image(*pixels)[0], Image.new("L", pixels)
        mask.paste(255, box)
        row[f"{side}_mask"] = mask
    return as_pairs([row])


@pytest.fixture(scope="module")
def pairs():
    return as_pairs(make_rows(10))


def equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name
    return True


# Order


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(pairs):
    stream = PairStream(pairs, 32)
    epochs = [[stream.draw(10 * epoch + place)["row"] for place in range(10)] for epoch in range(5)]
    for order in epochs:
        assert sorted(order) == list(range(10))
        assert order != list(range(10))
    assert len({tuple(order) for order in epochs}) == 5


def test_another_seed_gives_another_order_and_other_noise(pairs):
    one, other = ([PairStream(pairs, 32, seed=seed).draw(p) for p in range(10)] for seed in (0, 1))
    assert [drawn["row"] for drawn in one] != [drawn["row"] for drawn in other]
    assert not {drawn["noise_seed"] for drawn in one} & {drawn["noise_seed"] for drawn in other}


def test_a_sample_depends_on_seed_and_position_alone(pairs):
    options = {"random_crop": True, "random_flip": True, "caption_dropout": 0.5, "seed": 3}
    in_order, alone = PairStream(pairs, 32, **options), PairStream(pairs, 32, **options)
    visited = [in_order[position] for position in range(25)]
    np.random.default_rng(0).random(100)
    torch.rand(100)
    for position in (24, 11, 0):
        assert equal(alone[position], visited[position])


def test_every_visit_of_a_row_has_noise_of_its_own(pairs):
    stream = PairStream(pairs, 32)
    assert len({stream.draw(position)["noise_seed"] for position in range(1000)}) == 1000


@pytest.mark.parametrize("option", [{"random_crop": True}, {"random_flip": True}, {"caption_dropout": 0.5}])
def test_an_option_changes_what_it_is_about_and_nothing_else(pairs, option):
    changed_by = {"random_crop": "crop", "random_flip": "flip", "caption_dropout": "drop_caption"}[next(iter(option))]
    plain, with_option = PairStream(pairs, 32), PairStream(pairs, 32, **option)
    changed = 0
    for position in range(100):
        without, drawn = plain.draw(position), with_option.draw(position)
        changed += without.pop(changed_by) != drawn.pop(changed_by)
        assert without == drawn
    assert changed > 30


def test_the_share_of_captions_that_is_dropped_is_the_one_asked_for(pairs):
    for share in (0.0, 0.1, 1.0):
        stream = PairStream(pairs, 32, caption_dropout=share)
        dropped = sum(stream.draw(position)["drop_caption"] for position in range(4000))
        assert dropped == pytest.approx(4000 * share, abs=4 * (4000 * share * (1 - share)) ** 0.5)


# One augmentation for a pair


def test_images_and_masks_of_different_sizes_come_out_at_the_resolution():
    sample = PairStream(place_pairs((90, 48), (40, 101)), 32)[0]
    for name in IMAGES:
        assert sample[name].shape == ((3 if "image" in name else 1), 32, 32)
        assert sample[name].dtype == torch.float32
        assert 0 <= sample[name].min() < sample[name].max() <= 1


def test_the_middle_of_the_longer_side_is_kept_at_the_scale_of_the_shorter_one():
    sample = PairStream(box_pairs((64, 32), (20, 4, 44, 28), (4, 20, 28, 44), (32, 64)), 32)[0]
    red, green = 255 * sample["source_image"][0], 255 * sample["target_image"][1]
    # Pixels 16 to 47 of 64.
    expected = 250 * torch.arange(16, 48) / 63
    assert torch.allclose(red, expected.expand(32, 32), atol=1)
    assert torch.allclose(green, expected.view(-1, 1).expand(32, 32), atol=1)


def test_crop_and_flip_are_the_same_for_source_target_and_both_masks():
    # The sizes differ, but the scaled pictures are the same, so equal crops show equal pixels.
    pairs = place_pairs((96, 48), (192, 96), marked=(120, 130))
    stream = PairStream(pairs, 32, random_crop=True, random_flip=True)
    lefts, flips = set(), 0
    for position in range(40):
        sample = stream[position]
        red = 255 * sample["source_image"][0].mean(0)
        flipped = bool(red[0] > red[-1])
        assert flipped == stream.draw(position)["flip"]
        flips += flipped
        lefts.add(round(float(red.min())))
        assert torch.allclose(sample["source_image"], sample["target_image"], atol=3 / 255)
        for side in SIDES:
            # The mask is where its picture has this red, but for its edge, which is soft after scaling.
            red, mask = 255 * sample[f"{side}_image"][0], sample[f"{side}_mask"][0]
            assert mask[(red > 123) & (red < 127)].gt(0.5).all()
            assert mask[(red < 110) | (red > 140)].eq(0).all()
    assert len(lefts) > 15
    assert 10 < flips < 30


def test_without_random_flip_nothing_is_mirrored_and_with_it_the_others_stay():
    pairs = place_pairs((48, 48), (48, 48))
    plain, flipping = PairStream(pairs, 32), PairStream(pairs, 32, random_flip=True)
    seen = set()
    for position in range(20):
        flip = flipping.draw(position)["flip"]
        seen.add(flip)
        for name in IMAGES:
            expected = plain[position][name]
            assert torch.equal(flipping[position][name], expected.flip(-1) if flip else expected)
    assert seen == {False, True}


# The crop keeps the edit


# Where the mask is, in fractions of the picture.
BOXES = {
    "left": (0, 0.4, 0.1, 0.6),
    "right": (0.9, 0.7, 1, 1),
    "top": (0.4, 0, 0.6, 0.1),
    "middle": (0.4, 0.4, 0.6, 0.6),
}


@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("size", [(90, 40), (40, 90)])
@pytest.mark.parametrize("where", BOXES)
def test_a_crop_holds_all_that_is_marked(where, size, random_crop):
    left, top, right, bottom = (round(share * edge) for share, edge in zip(BOXES[where], 2 * size, strict=True))
    stream = PairStream(box_pairs(size, (left, top, right, bottom)), 32, random_crop=random_crop, random_flip=True)
    area = (right - left) * (bottom - top) * (32 / 40) ** 2
    for position in range(8):
        sample = stream[position]
        for name in ("source_mask", "target_mask"):
            assert sample[name].sum().item() == pytest.approx(area, rel=0.15)
        assert not sample["left_out"]


def test_pictures_of_one_size_are_cropped_alike_and_so_that_both_masks_are_whole():
    pairs = box_pairs((120, 40), (0, 10, 16, 30), (24, 10, 36, 30))
    for position in range(8):
        sample = PairStream(pairs, 32, random_crop=True)[position]
        assert torch.equal(sample["source_image"], sample["target_image"])
        assert sample["source_mask"].sum().item() == pytest.approx(16 * 20 * 0.64, rel=0.15)
        assert sample["target_mask"].sum().item() == pytest.approx(12 * 20 * 0.64, rel=0.15)


def test_pictures_of_other_aspects_are_cropped_each_around_its_own_mask():
    pairs = box_pairs((90, 40), (0, 10, 20, 30), (10, 80, 30, 100), target_size=(40, 100))
    for random_crop in (False, True):
        sample = PairStream(pairs, 32, random_crop=random_crop)[0]
        for name in ("source_mask", "target_mask"):
            assert sample[name].sum().item() == pytest.approx(20 * 20 * 0.64, rel=0.15)


def test_what_no_crop_can_hold_is_scaled_down_with_its_pair_and_the_edges_go_on():
    # Two things at the ends of a 90 x 40 picture: at 32 pixels, the picture would be 72 wide.
    pairs = box_pairs((90, 40), (0, 0, 90, 40), (40, 10, 60, 30))
    for random_crop in (False, True):
        sample = PairStream(pairs, 32, random_crop=random_crop)[0]
        rows = sample["source_mask"][0].sum(1)
        # 32 x 14 pixels in the middle, with what is marked in the target at the same scale.
        assert rows.gt(16).sum().item() == 14
        assert sample["source_mask"].sum().item() == pytest.approx(32 * 14, rel=0.1)
        assert sample["target_mask"].sum().item() == pytest.approx(20 * 20 * (32 / 90) ** 2, rel=0.25)
        for name in ("source_image", "target_image"):
            picture = sample[name]
            assert torch.equal(picture[:, 0], picture[:, 9])
            assert torch.equal(picture[:, -1], picture[:, 22])
            assert not torch.equal(picture[:, 0], picture[:, -1])


def test_a_mask_that_vanishes_among_the_latents_leaves_its_pair_out():
    for side, left_out in ((1, True), (2, True), (3, False)):
        pairs = box_pairs((64, 64), (10, 10, 40, 40), (20, 20, 20 + side, 20 + side))
        assert PairStream(pairs, 64, latent_pixels=8)[0]["left_out"] == left_out
    # One pixel of 512 is nothing at 64.
    assert PairStream(box_pairs((512, 512), (10, 10, 400, 400), (8, 8, 9, 9)), 64, latent_pixels=4)[0]["left_out"]


def test_masks_that_do_not_overlap_are_left_out_where_only_their_overlap_is_edited():
    pairs = box_pairs((64, 64), (0, 0, 20, 20), (30, 30, 60, 60))
    for overlap_masks in (False, True):
        assert PairStream(pairs, 64, latent_pixels=4, overlap_masks=overlap_masks)[0]["left_out"] == overlap_masks


def test_what_is_left_out_is_cached_as_such(encoder, tmp_path):
    pairs = box_pairs((64, 64), (10, 10, 40, 40), (20, 20, 21, 21))
    stream = PairStream(pairs, 32, latent_pixels=4)
    cached = CachedPairStream(stream, cache_pairs(stream, encoder, tmp_path, PartialState()))
    assert bool(cached[0]["left_out"])


# Buckets


BUCKETS = [(32, 32), (24, 48), (48, 24)]
SIZES = [(64, 64), (100, 50), (128, 64), (50, 100), (60, 60), (90, 45), (64, 70)]


@pytest.fixture(scope="module")
def mixed():
    """Pairs of which three are nearly square, three wide and one is high."""
    rows = make_rows(len(SIZES))
    for row, size in zip(rows, SIZES, strict=True):
        for name in IMAGES:
            row[name] = row[name].resize(size)
    return as_pairs(rows)


def test_a_pair_gets_the_bucket_whose_aspect_is_nearest(mixed):
    stream = PairStream(mixed, 64, buckets=BUCKETS)
    for row, (width, height) in enumerate(SIZES):
        nearest = min(BUCKETS, key=lambda size: abs(height * size[1] - width * size[0]))
        for name in IMAGES:
            assert stream.sample(row, None, False)[name].shape[1:] == nearest


def test_the_samples_of_a_step_have_one_size_and_every_row_comes_in_every_epoch(mixed):
    stream = PairStream(mixed, 64, buckets=BUCKETS, samples_per_step=2)
    # Two steps for three rows, two for three, and one for one.
    assert stream.epoch_length == 10
    orders = set()
    for epoch in range(4):
        rows = [stream.draw(position)["row"] for position in range(10 * epoch, 10 * epoch + 10)]
        assert set(rows) == set(range(len(SIZES)))
        orders.add(tuple(rows))
        for first, second in zip(rows[::2], rows[1::2], strict=True):
            assert stream.bucket_of[first] == stream.bucket_of[second]
    assert len(orders) == 4


def test_a_sample_in_buckets_depends_on_seed_and_position_alone(mixed):
    options = {"buckets": BUCKETS, "samples_per_step": 2, "random_crop": True, "random_flip": True, "seed": 3}
    in_order, alone = PairStream(mixed, 64, **options), PairStream(mixed, 64, **options)
    visited = [in_order[position] for position in range(25)]
    for position in (24, 11, 0):
        assert equal(alone[position], visited[position])


def test_buckets_can_be_cached(mixed, encoder, tmp_path):
    stream = PairStream(mixed, 64, buckets=BUCKETS, samples_per_step=2, random_flip=True)
    cached = CachedPairStream(stream, cache_pairs(stream, encoder, tmp_path, PartialState()))
    for position in range(20):
        expected, _ = batch_of(stream, encoder, position)
        for name, value in expected.items():
            tolerance = 0.5 / 255 + 1e-6 if name.endswith(("_image", "_mask")) else 1e-4
            assert torch.allclose(cached[position][name], value[0], atol=tolerance), name


def test_a_picture_whose_size_cannot_be_read_names_its_row():
    rows = make_rows(3)
    rows[1]["source_image"] = {"bytes": b"no picture", "path": None}
    with pytest.raises(ValueError, match=r"^Row 1 of the pairs: `source_image` cannot be decoded: "):
        PairStream(as_pairs(rows), 32, buckets=BUCKETS)


# Few pairs


def test_a_single_pair_fills_every_batch():
    stream = PairStream(as_pairs(make_rows(1)), 32, random_flip=True)
    batch = next(iter(torch.utils.data.DataLoader(stream, 4, sampler=range(4))))
    assert batch["row"].tolist() == [0, 0, 0, 0]
    assert len(set(batch["noise_seed"].tolist())) == 4


# Pairs that cannot be used


def test_a_sample_of_a_black_mask_names_its_row():
    rows = make_rows(3)
    rows[1]["target_mask"] = Image.new("L", (64, 64), 127)
    with pytest.raises(ValueError, match=r"^Row 1 of the pairs: `target_mask` is black"):
        PairStream(as_pairs(rows), 32).sample(1, None, False)


def test_a_sample_of_a_mask_of_another_size_names_its_row_and_both_sizes():
    rows = make_rows(3)
    rows[2]["source_mask"] = Image.new("L", (64, 32), 255)
    with pytest.raises(
        ValueError, match=r"^Row 2 of the pairs: `source_mask` is 64 x 32, but `source_image` is 64 x 64"
    ):
        PairStream(as_pairs(rows), 32).sample(2, None, False)


def test_an_image_that_cannot_be_decoded_names_its_row():
    rows = make_rows(3)
    rows[1]["source_image"] = {"bytes": b"no picture", "path": None}
    with pytest.raises(ValueError, match=r"^Row 1 of the pairs: `source_image` cannot be decoded: "):
        PairStream(as_pairs(rows), 32).sample(1, None, False)


@pytest.mark.parametrize("name", ["edit_prompt", "target_term", "source_image", "target_mask"])
def test_a_value_that_is_missing_is_named_with_its_row(name):
    rows = make_rows(3)
    rows[1][name] = None
    with pytest.raises(ValueError, match=f"^Row 1 of the pairs: `{name}` is "):
        PairStream(as_pairs(rows), 32).sample(1, None, False)


def alpha_mask():
    """A mask that is drawn in the alpha channel, over white."""
    mask = Image.new("LA", (64, 64), (255, 0))
    mask.paste((255, 255), (8, 8, 24, 24))
    return mask


@pytest.mark.parametrize(
    "changes",
    [
        {"source_image": Image.new("I;16", (64, 64), 300)},
        {"target_image": Image.new("RGBA", (64, 64))},
        {"target_mask": alpha_mask()},
        {"source_mask": Image.new("L", (64, 64), 100)},
        {"edit_prompt": "  "},
        {"source_term": "\n"},
        {"similarity": 2.0},
        {"source_caption": "a red car", "edit_prompt": "a red car"},
        {"source_caption": "red car " * 40 + "day", "edit_prompt": "red car " * 40 + "night"},
        {"source_image": {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "path": None}},
    ],
)
def test_a_faulty_row_is_the_same_fault_to_validate_and_when_its_turn_comes(changes):
    rows, tokenizer = make_rows(3), tiny_models.tokenizer()
    rows[1] |= changes
    pairs = as_pairs(rows)
    (fault,) = validate(pairs, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"^Row 1 of the pairs: ") as error:
        PairStream(pairs, 32, tokenizer=tokenizer).sample(1, None, False)
    assert str(error.value) == fault.replace("the pairs, row 1", "Row 1 of the pairs")


def test_a_picture_with_more_pixels_than_pil_allows_names_its_row(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63 * 63 // 2)
    with pytest.raises(ValueError, match=r"^Row 1 of the pairs: `source_image` cannot be decoded: Image size \(4096 "):
        PairStream(as_pairs(make_rows(3)), 32).sample(1, None, False)


# Cached latents


@pytest.fixture(scope="module")
def encoder():
    """Tiny models with everything that the losses need."""
    family = StableDiffusion(IEditPipeline(**tiny_models.sd_components(vae_scale_factor=4)))
    clip, processor = load_clip("mini")
    return PairEncoder(family, TERMS, clip, processor.tokenizer)


def batch_of(stream, encoder, position):
    sample = stream[position]
    batch = torch.utils.data.default_collate([sample])
    return encoder(batch), {name: batch[name] for name in ("row", "drop_caption", "noise_seed", "left_out")}


@pytest.mark.parametrize("random_flip", [False, True])
def test_a_cached_stream_gives_what_stream_and_encoder_give(pairs, encoder, tmp_path, random_flip):
    stream = PairStream(pairs, 32, random_flip=random_flip, caption_dropout=0.5)
    cached = CachedPairStream(stream, cache_pairs(stream, encoder, tmp_path / "cache", PartialState()))
    for position in range(20):
        expected, drawn = batch_of(stream, encoder, position)
        sample = torch.utils.data.default_collate([cached[position]])
        assert sample.keys() == expected.keys() | drawn.keys()
        for name, value in drawn.items():
            assert torch.equal(sample[name], value), name
        for name, value in expected.items():
            assert sample[name].dtype == value.dtype == torch.float32
            assert sample[name].shape == value.shape
            # Images and masks are kept in 8 bits.
            tolerance = 0.5 / 255 + 1e-6 if name.endswith(("_image", "_mask")) else 1e-4
            assert torch.allclose(sample[name], value, atol=tolerance), name


def test_an_interrupted_cache_goes_on_where_it_was(encoder, tmp_path):
    rows = make_rows(2) * (ROWS_PER_FILE + 5)
    stream = PairStream(as_pairs(rows), 32)
    cache_pairs(stream, encoder, tmp_path, PartialState())
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["000000.safetensors", "000001.safetensors", "000002.safetensors"]
    content, times = files[1].read_bytes(), [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    (tmp_path / "000001.4711.partial").write_bytes(content[:100])

    cache_pairs(stream, encoder, tmp_path, PartialState())
    assert files[1].read_bytes() == content
    after = [file.stat().st_mtime_ns for file in files]
    assert [after[0], after[2]] == [times[0], times[2]]
    cached = CachedPairStream(stream, tmp_path)
    assert cached[len(rows) - 1]["source_latents"].shape == (4, 8, 8)


def test_a_file_of_the_cache_that_was_cut_off_is_named_and_written_again(pairs, encoder, tmp_path):
    stream = PairStream(pairs, 32)
    cache_pairs(stream, encoder, tmp_path, PartialState())
    file = tmp_path / "000000.safetensors"
    content = file.read_bytes()
    for cut in (0, len(content) // 2):
        file.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=rf"^The cached latents in {file} cannot be read any more"):
            CachedPairStream(stream, tmp_path)[0]
        cache_pairs(stream, encoder, tmp_path, PartialState())
        assert file.read_bytes() == content


def test_a_cache_that_finds_no_room_says_where_in_one_line(pairs, encoder, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"^The cached latents could not be written to {tmp_path}, which has .*MiB"):
            cache_pairs(PairStream(pairs, 32), encoder, tmp_path, PartialState())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_cache_leaves_no_temporary_files(pairs, encoder, tmp_path):
    cache_pairs(PairStream(pairs, 32), encoder, tmp_path, PartialState())
    assert os.listdir(tmp_path) == ["000000.safetensors"]


def test_a_stream_that_crops_at_random_cannot_be_cached(pairs, encoder, tmp_path):
    stream = PairStream(pairs, 32, random_crop=True)
    with pytest.raises(ValueError, match="`random_crop` and `cache_latents`"):
        cache_pairs(stream, encoder, tmp_path / "cache", PartialState())
    assert not (tmp_path / "cache").exists()


# Texts and latents


def test_latents_are_the_scaled_modes_of_the_vae(pairs, encoder):
    sample = PairStream(pairs, 32).sample(0, None, False)
    encoded = encoder(torch.utils.data.default_collate([sample]))
    vae = encoder.family.pipe.vae
    expected = vae.encode(2 * sample["target_image"][None] - 1).latent_dist.mean * vae.config.scaling_factor
    assert torch.allclose(encoded["target_latents"], expected, atol=1e-6)


def test_what_no_term_needs_is_not_encoded(pairs, encoder):
    batch = torch.utils.data.default_collate([PairStream(pairs, 32)[0]])
    plain = PairEncoder(encoder.family, ("paired",))
    assert plain(batch).keys() == {"source_latents", "target_latents", "prompt_states"}


# Noise


@pytest.fixture(scope="module", params=["mini", "mini-sd3"])
def family(request):
    return load_family(request.param)


def test_noise_and_timestep_do_not_depend_on_the_batch(family):
    timesteps, noise = draw_noise([5, 6, 7], (4, 8, 8), family.draw_timestep)
    torch.manual_seed(1)
    for index, seed in enumerate((5, 6, 7)):
        alone = draw_noise([seed], (4, 8, 8), family.draw_timestep)
        assert torch.equal(alone[0][0], timesteps[index])
        assert torch.equal(alone[1][0], noise[index])
    assert len(set(timesteps.tolist())) == 3


def test_noise_leaves_the_global_random_state_alone(family):
    before = torch.get_rng_state()
    draw_noise([1, 2], (4, 8, 8), family.draw_timestep)
    assert torch.equal(torch.get_rng_state(), before)


def many_timesteps(family):
    stream = PairStream(as_pairs(make_rows(1)), 32)
    seeds = [stream.draw(position)["noise_seed"] for position in range(4000)]
    return draw_noise(seeds, (8,), family.draw_timestep)


def test_timesteps_are_uniform_from_0_to_999_and_noise_is_unit_gaussian():
    timesteps, noise = many_timesteps(load_family("mini"))
    assert timesteps.min() < 10
    assert 990 <= timesteps.max() <= 999
    counts = torch.histc(timesteps.float(), bins=10, min=0, max=1000)
    assert (counts - 400).abs().max() < 100
    assert noise.mean().abs() < 0.03
    assert abs(noise.std() - 1) < 0.03


def test_timesteps_of_flow_matching_have_the_density_of_their_scheme():
    """By default the logit of sigma is a standard normal variable, as in diffusers' scripts."""
    family = load_family("mini-sd3")
    sigma = many_timesteps(family)[0] / 1000
    logits = torch.logit(sigma.clamp(max=0.9995))
    assert abs(logits.mean()) < 0.06
    assert abs(logits.std() - 1) < 0.05
    family.density = family.DENSITY | {"logit_mean": 1.0, "logit_std": 0.5}
    logits = torch.logit((many_timesteps(family)[0] / 1000).clamp(max=0.9995))
    # A large share u is a large index into the timesteps, which fall.
    assert abs(logits.mean() + 1) < 0.03
    assert abs(logits.std() - 0.5) < 0.03


def test_the_mini_encoder_reads_mini_captions():
    """The pairs of these tests are what the mini models were trained for."""
    assert {row["edit_prompt"] for row in make_rows(3)} <= set(mini.captions())
