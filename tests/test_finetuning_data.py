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


def place_image(width, height):
    """A picture whose red tells the column, from 0 to 250, and whose green the row; and a mask: where red > 125."""
    x, y = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    pixels = np.stack([x, y, np.zeros_like(x)], 2).round().astype(np.uint8)
    return Image.fromarray(pixels), Image.fromarray(np.where(pixels[..., 0] > 125, 255, 0).astype(np.uint8))


def place_pairs(source_size, target_size):
    """A set of one pair of such pictures."""
    row = make_rows(1)[0]
    for side, size in zip(SIDES, (source_size, target_size), strict=True):
        row[f"{side}_image"], row[f"{side}_mask"] = place_image(*size)
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
    sample = PairStream(place_pairs((64, 32), (32, 64)), 32)[0]
    red, green = 255 * sample["source_image"][0], 255 * sample["target_image"][1]
    # Pixels 16 to 47 of 64.
    expected = 250 * torch.arange(16, 48) / 63
    assert torch.allclose(red, expected.expand(32, 32), atol=1)
    assert torch.allclose(green, expected.view(-1, 1).expand(32, 32), atol=1)


def test_crop_and_flip_are_the_same_for_source_target_and_both_masks():
    # The sizes differ, but the scaled pictures are the same, so equal crops show equal pixels.
    stream = PairStream(place_pairs((96, 48), (192, 96)), 32, random_crop=True, random_flip=True)
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
            # Beside the edge, which is soft after scaling, the mask is where its picture is red.
            red = 255 * sample[f"{side}_image"][0]
            assert sample[f"{side}_mask"][0][red > 140].eq(1).all()
            assert sample[f"{side}_mask"][0][red < 110].eq(0).all()
    assert len(lefts) > 20
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


# Pairs that cannot be used


def test_a_sample_of_a_black_mask_names_its_row():
    rows = make_rows(3)
    rows[1]["target_mask"] = Image.new("L", (64, 64), 127)
    with pytest.raises(ValueError, match=r"^Row 1 of the pairs: `target_mask` is black"):
        PairStream(as_pairs(rows), 32).sample(1, (0.5, 0.5), False)


def test_a_sample_of_a_mask_of_another_size_names_its_row_and_both_sizes():
    rows = make_rows(3)
    rows[2]["source_mask"] = Image.new("L", (64, 32), 255)
    with pytest.raises(
        ValueError, match=r"^Row 2 of the pairs: `source_mask` is 64 x 32, but `source_image` is 64 x 64"
    ):
        PairStream(as_pairs(rows), 32).sample(2, (0.5, 0.5), False)


def test_an_image_that_cannot_be_decoded_names_its_row():
    rows = make_rows(3)
    rows[1]["source_image"] = {"bytes": b"no picture", "path": None}
    with pytest.raises(ValueError, match=r"^Row 1 of the pairs: `source_image` cannot be decoded: "):
        PairStream(as_pairs(rows), 32).sample(1, (0.5, 0.5), False)


@pytest.mark.parametrize("name", ["edit_prompt", "target_term", "source_image", "target_mask"])
def test_a_value_that_is_missing_is_named_with_its_row(name):
    rows = make_rows(3)
    rows[1][name] = None
    with pytest.raises(ValueError, match=f"^Row 1 of the pairs: `{name}` is "):
        PairStream(as_pairs(rows), 32).sample(1, (0.5, 0.5), False)


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
        PairStream(pairs, 32, tokenizer=tokenizer).sample(1, (0.5, 0.5), False)
    assert str(error.value) == fault.replace("the pairs, row 1", "Row 1 of the pairs")


def test_a_picture_with_more_pixels_than_pil_allows_names_its_row(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63 * 63 // 2)
    with pytest.raises(ValueError, match=r"^Row 1 of the pairs: `source_image` cannot be decoded: Image size \(4096 "):
        PairStream(as_pairs(make_rows(3)), 32).sample(1, (0.5, 0.5), False)


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
    return encoder(batch), {name: batch[name] for name in ("row", "drop_caption", "noise_seed")}


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
    sample = PairStream(pairs, 32).sample(0, (0.5, 0.5), False)
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
    family.density = {"weighting_scheme": "logit_normal", "logit_mean": 1.0, "logit_std": 0.5}
    logits = torch.logit((many_timesteps(family)[0] / 1000).clamp(max=0.9995))
    # A large share u is a large index into the timesteps, which fall.
    assert abs(logits.mean() + 1) < 0.03
    assert abs(logits.std() - 0.5) < 0.03


def test_the_mini_encoder_reads_mini_captions():
    """The pairs of these tests are what the mini models were trained for."""
    assert {row["edit_prompt"] for row in make_rows(3)} <= set(mini.captions())
