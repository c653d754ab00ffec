"""The paper's losses, Eqs. 1-12: each by hand and by a second derivation, its ends and its gradients."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from diffusers_iedit import mini
from diffusers_iedit.losses import (
    PREDICTION_TYPES,
    CLIPImageEmbedder,
    IEditLoss,
    LatentDecoder,
    VGG16Features,
    clip_distance,
    masked_loss,
    noise_latents,
    paired_loss,
    perceptual_loss,
    predict_latents,
    target_noise,
)


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ALPHAS_CUMPROD = DDIMScheduler(**SD).alphas_cumprod
ALPHAS_CUMPROD_ZERO_SNR = DDIMScheduler(**SD, rescale_betas_zero_snr=True).alphas_cumprod
SHAPE = (3, 4, 8, 8)
TABLE_2 = [
    ("global", "paired"),
    ("global", "ldm", "loc"),
    ("global", "ldm", "loc", "perc"),
    ("loc", "global", "mask", "perc"),
]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def filled(*values, shape=(1, 1, 1)):
    """One sample a value, constant over `shape`."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, *shape).clone()


def draw(seed, shape=SHAPE):
    """Random z_1, z_2, eps_1, prediction, and soft masks M_1, M_2, in double precision."""
    z_1, z_2, eps_1, prediction = randn(4, *shape, seed=seed)
    mask_1, mask_2 = randn(2, shape[0], 1, *shape[2:], seed=seed + 1000).sigmoid()
    return z_1, z_2, eps_1, prediction, mask_1, mask_2


def scenes(*seeds):
    """Mini-world images (B, 3, 64, 64) in [0, 1] and the masks of their things (B, 1, 64, 64)."""
    rendered = [mini.render(seed) for seed in seeds]
    images = np.stack([np.asarray(scene.image) for scene in rendered]).transpose(0, 3, 1, 2)
    masks = np.stack([np.asarray(scene.mask) for scene in rendered])[:, None]
    return torch.tensor(images) / 255, torch.tensor(masks) / 255


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(mini.model_path(), subfolder="vae")


@pytest.fixture(scope="module")
def clip():
    return CLIPModel.from_pretrained(mini.clip_path())


@pytest.fixture(scope="module")
def embedder(clip):
    return CLIPImageEmbedder(clip, CLIPImageProcessorPil.from_pretrained(mini.clip_path()))


@pytest.fixture(scope="module")
def vgg_weights():
    """The convolutions of VGG-16 up to relu2_2 under torchvision's names, in He's scale, and one of its head's."""
    sizes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128)}
    weights = {"head.fc.weight": torch.ones(10, 4)}
    for index, (width, channels) in sizes.items():
        std = (2 / (9 * channels)) ** 0.5
        weights[f"features.{index}.weight"] = std * randn(width, channels, 3, 3, seed=index, dtype=torch.float32)
        weights[f"features.{index}.bias"] = 0.1 * randn(width, seed=index + 1, dtype=torch.float32)
    return weights


@pytest.fixture(scope="module")
def vgg_folder(vgg_weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vgg16")
    save_file(vgg_weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def vgg(vgg_folder):
    return VGG16Features.from_pretrained(vgg_folder, layers=("relu1_2", "relu2_2"))


@pytest.fixture(scope="module")
def pair(vae, clip):
    """What a training step knows of two pairs: the arguments of `IEditLoss` but for the noisy ones."""
    (x_1, mask_1), (x_2, mask_2) = scenes(1, 2), scenes(3, 4)
    tokenizer = CLIPTokenizer.from_pretrained(mini.clip_path())
    embeds = []
    with torch.no_grad():
        z_1, z_2 = (vae.encode(x * 2 - 1).latent_dist.mean * vae.config.scaling_factor for x in (x_1, x_2))
        for texts in ([mini.render(3).caption, mini.render(4).caption], ["red car", "blue ball"]):
            tokens = tokenizer(texts, padding=True, return_tensors="pt")
            embeds.append(clip.get_text_features(**tokens).pooler_output)
    return {
        "source_latents": z_1,
        "target_latents": z_2,
        "source_mask": mask_1,
        "target_mask": mask_2,
        "target_image": x_2,
        "prompt_embeds": embeds[0],
        "term_embeds": embeds[1],
    }


@pytest.fixture
def networks(vae, embedder, vgg):
    return {"decode": LatentDecoder(vae), "embed_image": embedder, "features": vgg}


def noisy(criterion, pair, timesteps, alphas_cumprod=ALPHAS_CUMPROD, error=0.1):
    """The noisy arguments of `IEditLoss`, with a prediction that misses eps_1 by `error` unit noise."""
    noise, miss = randn(2, *pair["source_latents"].shape, dtype=torch.float32)
    t = torch.tensor(timesteps)
    z_t = criterion.noise_latents(pair["source_latents"], noise, alphas_cumprod[t])
    return {"model_pred": noise + error * miss, "noisy_latents": z_t, "level": alphas_cumprod[t], "timesteps": t}


# Eqs. 2, 3 and 7


def test_equations_2_3_and_7_by_hand():
    alpha_bar = torch.tensor([0.64, 0.36])
    z_t = noise_latents(filled(1.0, 2.0), filled(0.5, -1.0), alpha_bar)
    torch.testing.assert_close(z_t.flatten(), torch.tensor([1.1, 0.4]))  # 0.8 + 0.6 * 0.5, 1.2 - 0.8
    eps_2 = target_noise(z_t, filled(2.0, 2.0), alpha_bar)
    torch.testing.assert_close(eps_2.flatten(), torch.tensor([-0.5 / 0.6, -1.0]))
    z_hat = predict_latents(z_t, filled(0.0, 0.0), alpha_bar)
    torch.testing.assert_close(z_hat.flatten(), torch.tensor([1.1 / 0.8, 0.4 / 0.6]))


def test_noise_latents_is_what_diffusers_adds():
    z_1, _, eps_1, *_ = (tensor.float() for tensor in draw(0))
    t = torch.tensor([0, 500, 999])
    expected = DDIMScheduler(**SD).add_noise(z_1, eps_1, t)
    torch.testing.assert_close(noise_latents(z_1, eps_1, ALPHAS_CUMPROD[t]), expected)


@pytest.mark.parametrize("seed", range(5))
def test_the_target_noise_is_the_sources_plus_the_scaled_difference_of_the_latents(seed):
    z_1, z_2, eps_1, *_ = draw(seed)
    alpha_bar = randn(3, seed=seed).sigmoid()
    ratio = (alpha_bar / (1 - alpha_bar)).sqrt().view(-1, 1, 1, 1)
    eps_2 = target_noise(noise_latents(z_1, eps_1, alpha_bar), z_2, alpha_bar)
    torch.testing.assert_close(eps_2, eps_1 + ratio * (z_1 - z_2))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_gives_the_target_inside_the_mask_and_the_source_outside(prediction_type, seed):
    z_1, z_2, eps_1, _, mask, _ = draw(seed)
    mask = mask.round()
    level = randn(3, seed=seed).sigmoid()
    noise, target, predict = PREDICTION_TYPES[prediction_type]
    z_t = noise(z_1, eps_1, level)
    perfect = torch.where(mask == 1, target(z_t, z_2, level), target(z_t, z_1, level))
    z_hat = predict(z_t, perfect, level)
    torch.testing.assert_close(z_hat, torch.where(mask == 1, z_2, z_1))
    wrong = [z_1, z_2, eps_1]
    assert all(not torch.allclose(z_hat, other) for other in wrong)


def test_the_velocity_is_the_one_of_diffusers_schedulers():
    z_1, _, eps_1, *_ = draw(0)
    t = torch.tensor([1, 500, 999])
    noise, target, _ = PREDICTION_TYPES["v_prediction"]
    alpha_bar = ALPHAS_CUMPROD[t].double()
    velocity = target(noise(z_1, eps_1, alpha_bar), z_1, alpha_bar)
    expected = DDIMScheduler(**SD).get_velocity(z_1.float(), eps_1.float(), t)
    torch.testing.assert_close(velocity.float(), expected)


def test_the_velocity_of_a_flow_is_noise_minus_latents_on_diffusers_path():
    z_1, _, eps_1, *_ = (tensor.float() for tensor in draw(0))
    scheduler = FlowMatchEulerDiscreteScheduler()
    t, sigma = scheduler.timesteps[[10, 400, 900]], scheduler.sigmas[[10, 400, 900]]
    noise, target, _ = PREDICTION_TYPES["flow_prediction"]
    z_t = noise(z_1, eps_1, sigma)
    torch.testing.assert_close(z_t, scheduler.scale_noise(z_1, t, eps_1))
    torch.testing.assert_close(target(z_t, z_1, sigma), eps_1 - z_1, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_the_ends_of_a_schedule_are_finite(prediction_type, level):
    z_1, z_2, eps_1, prediction, *_ = (tensor.float() for tensor in draw(0))
    level = torch.full((3,), level)
    noise, target, predict = PREDICTION_TYPES[prediction_type]
    z_t = noise(z_1, eps_1, level)
    assert target(z_t, z_2, level).isfinite().all()
    assert predict(z_t, prediction, level).isfinite().all()


def test_with_zero_terminal_snr_a_model_of_v_knows_the_latents():
    z_1, _, eps_1, *_ = (tensor.float() for tensor in draw(0))
    noise, target, predict = PREDICTION_TYPES["v_prediction"]
    alpha_bar = torch.zeros(3)
    z_t = noise(z_1, eps_1, alpha_bar)
    torch.testing.assert_close(predict(z_t, target(z_t, z_1, alpha_bar), alpha_bar), z_1)


def test_half_precision_is_computed_in_fp32():
    z_1, z_2, eps_1, *_ = (tensor.half() for tensor in draw(0))
    alpha_bar = ALPHAS_CUMPROD[torch.tensor([0, 1, 2])]
    z_t = noise_latents(z_1, eps_1, alpha_bar)
    eps_2 = target_noise(z_t, z_2, alpha_bar)
    assert z_t.dtype == eps_2.dtype == predict_latents(z_t, eps_1, alpha_bar).dtype == torch.float32
    exact = target_noise(noise_latents(z_1.double(), eps_1.double(), alpha_bar.double()), z_2.double(), alpha_bar)
    torch.testing.assert_close(eps_2.double(), exact, atol=1e-4, rtol=1e-4)


# Eqs. 1, 4, 8 and 9


def test_equation_4_by_hand():
    prediction, target = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]], [[[0.0, 2.0]]]])
    torch.testing.assert_close(paired_loss(prediction, target), torch.tensor([5.0, 2.0]))


def test_equations_8_and_9_by_hand():
    prediction = torch.zeros(1, 1, 1, 4)
    eps_1, eps_2 = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), torch.tensor([[[[5.0, 6.0, 7.0, 8.0]]]])
    mask_1, mask_2 = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0, 1.0, 0.0]]]])
    # Only in M_1: nothing. In both: eps_2. Only in M_2: both. In neither: eps_1.
    expected = (0 + 6**2 + (7**2 + 3**2) + 4**2) / 4
    torch.testing.assert_close(masked_loss(prediction, eps_1, eps_2, mask_1, mask_2), torch.tensor([expected]))


def test_soft_masks_count_squared():
    eps_1, eps_2 = filled(2.0), filled(10.0)
    loss = masked_loss(filled(0.0), eps_1, eps_2, filled(0.75), filled(0.5))
    torch.testing.assert_close(loss, torch.tensor([25 + 0.25]))


@pytest.mark.parametrize("seed", range(5))
def test_the_masked_loss_is_the_norm_of_the_masked_noises(seed):
    _, eps_2, eps_1, prediction, mask_1, mask_2 = draw(seed)
    for i, loss in enumerate(masked_loss(prediction, eps_1, eps_2, mask_1, mask_2)):
        foreground = torch.linalg.vector_norm(eps_2[i] * mask_2[i] - prediction[i] * mask_2[i]) ** 2
        background = torch.linalg.vector_norm(eps_1[i] * (1 - mask_1[i]) - prediction[i] * (1 - mask_1[i])) ** 2
        torch.testing.assert_close(loss, (foreground + background) / eps_1[i].numel())


def test_a_mask_of_ones_gives_equation_4_and_one_of_zeros_equation_1():
    _, eps_2, eps_1, prediction, mask, _ = draw(0)
    ones, zeros = torch.ones_like(mask), torch.zeros_like(mask)
    torch.testing.assert_close(masked_loss(prediction, eps_1, eps_2, ones, ones), paired_loss(prediction, eps_2))
    torch.testing.assert_close(masked_loss(prediction, eps_1, eps_2, zeros, zeros), paired_loss(prediction, eps_1))


def test_a_perfect_prediction_has_no_masked_loss():
    _, eps_2, eps_1, _, mask, _ = draw(0)
    mask = mask.round()
    assert (masked_loss(torch.where(mask == 1, eps_2, eps_1), eps_1, eps_2, mask, mask) == 0).all()


def test_larger_masks_are_averaged_over_each_latent():
    _, eps_2, eps_1, prediction, *_ = draw(0)
    masks = randn(2, 3, 1, 64, 64).sigmoid()
    means = masks.unflatten(-1, (8, 8)).unflatten(-3, (8, 8)).mean((-1, -3))
    loss = masked_loss(prediction, eps_1, eps_2, *masks)
    torch.testing.assert_close(loss, masked_loss(prediction, eps_1, eps_2, *means))


def test_the_gradient_stays_where_the_masks_are():
    _, eps_2, eps_1, prediction, *_ = draw(0)
    prediction.requires_grad_()
    mask_1, mask_2 = torch.zeros(2, 3, 1, 8, 8)
    mask_1[..., :4] = 1
    mask_2[..., :2] = 1
    masked_loss(prediction, eps_1, eps_2, mask_1, mask_2).sum().backward()
    assert (prediction.grad[..., 2:4] == 0).all()
    assert (prediction.grad[..., :2] != 0).all()
    assert (prediction.grad[..., 4:] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_that_half_precision_cannot_hold_are_summed_in_fp32(dtype):
    eps_1, eps_2, prediction = filled(0.0), filled(400.0), filled(0.0).to(dtype)
    expected = torch.tensor([160_000.0])
    torch.testing.assert_close(paired_loss(prediction, eps_2.to(dtype)), expected)
    ones = filled(1.0).to(dtype)
    torch.testing.assert_close(masked_loss(prediction, eps_1.to(dtype), eps_2.to(dtype), ones, ones), expected)


# Eqs. 5, 10 and 11


def test_equation_5_by_hand():
    image_embeds, text_embeds = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]]), torch.tensor([1.0, 0.0])
    distances = clip_distance(image_embeds, text_embeds.expand(3, 2) * torch.tensor([[5.0], [-1.0], [0.1]]))
    torch.testing.assert_close(distances, torch.tensor([1 - 0.6, 2.0, 0.0]))


def test_the_clip_distance_is_half_the_squared_distance_of_the_unit_embeddings():
    image_embeds, text_embeds = randn(2, 5, 32)
    expected = (F.normalize(image_embeds) - F.normalize(text_embeds)).square().sum(1) / 2
    torch.testing.assert_close(clip_distance(image_embeds, text_embeds), expected)


def test_equation_10_by_hand():
    image, target = filled(2.0, 1.0, shape=(3, 1, 1)), filled(3.0, 3.0, shape=(3, 1, 1))
    loss = perceptual_loss(lambda x: 10 * x, image, target, filled(0.5, 0.0), filled(1.0, 1.0))
    torch.testing.assert_close(loss, torch.tensor([400.0, 900.0]))


def test_several_features_count_alike():
    image, target = filled(1.0, shape=(3, 2, 2)), filled(0.0, shape=(3, 2, 2))
    loss = perceptual_loss(lambda x: [x, 3 * x[:, :, :1, :1]], image, target, filled(1.0), filled(1.0))
    torch.testing.assert_close(loss, torch.tensor([(1 + 9) / 2]))


def test_the_perceptual_loss_sees_nothing_outside_the_masks(vgg):
    (image, mask_1), (target, mask_2) = scenes(1), scenes(2)
    loss = perceptual_loss(vgg, image, target, mask_1, mask_2)
    assert loss > 0
    image, target = image.where(mask_1 == 1, torch.rand(())), target.where(mask_2 == 1, torch.rand(()))
    torch.testing.assert_close(perceptual_loss(vgg, image, target, mask_1, mask_2), loss)
    assert perceptual_loss(vgg, image, image, mask_1, mask_1) == 0


# The frozen networks


@pytest.mark.parametrize(
    ("preprocessing", "size"),
    [
        (None, (64, 64)),
        (None, (128, 128)),
        (None, (75, 120)),
        (224, (384, 384)),
        (224, (64, 64)),
        (224, (301, 384)),
        (224, (384, 301)),
    ],
)
def test_the_preprocessing_is_the_processors_to_its_rounding(clip, preprocessing, size):
    processor = CLIPImageProcessorPil.from_pretrained(mini.clip_path())
    if preprocessing == 224:
        processor = CLIPImageProcessorPil()
        assert processor.size["shortest_edge"] == 224
    pixels = np.asarray(mini.render(5).image.resize(size, Image.Resampling.NEAREST))
    expected = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    image = torch.tensor(pixels.transpose(2, 0, 1))[None] / 255
    preprocessed = CLIPImageEmbedder(clip, processor).preprocess(image)
    assert preprocessed.shape == expected.shape
    # Pillow rounds to 8 bits after each of its two passes: up to 1.5 grey levels of 255 in all.
    tolerance = 1.5 / 255 / min(processor.image_std)
    torch.testing.assert_close(preprocessed, expected, atol=tolerance, rtol=0)


def test_the_embedding_is_what_clip_gives_with_its_own_processor(clip, embedder):
    processor = CLIPImageProcessorPil.from_pretrained(mini.clip_path())
    inputs = processor([mini.render(1).image, mini.render(2).image], return_tensors="pt")
    expected = clip.get_image_features(**inputs).pooler_output
    torch.testing.assert_close(embedder(scenes(1, 2)[0]), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"resample": 0}, {"do_center_crop": False}, {"size": {"height": 224, "width": 224}}, {"crop_size": 256}],
)
def test_a_processor_that_works_differently_is_refused(clip, options):
    with pytest.raises(ValueError, match="`processor`"):
        CLIPImageEmbedder(clip, CLIPImageProcessorPil(**options))


def test_the_decoder_gives_the_pictures_of_the_pipelines(vae):
    latents = randn(2, 4, 16, 16, dtype=torch.float32)
    expected = vae.decode(latents / 0.4488).sample.mul(0.5).add(0.5).clamp(0, 1)
    torch.testing.assert_close(LatentDecoder(vae)(latents), expected)


def test_the_decoder_minds_the_shift_factor():
    vae = AutoencoderKL(latent_channels=4, scaling_factor=1.5, shift_factor=0.2, norm_num_groups=8)
    latents = randn(1, 4, 8, 8, dtype=torch.float32)
    expected = vae.decode(latents / 1.5 + 0.2).sample / 2 + 0.5
    torch.testing.assert_close(LatentDecoder(vae)(latents), expected.clamp(0, 1))


def test_the_decoder_may_be_an_autoencoder_tiny():
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    latents = randn(1, 4, 8, 8, dtype=torch.float32)
    image = LatentDecoder(tiny)(latents)
    torch.testing.assert_close(image, (tiny.decode(latents).sample / 2 + 0.5).clamp(0, 1))
    assert image.shape == (1, 3, 64, 64)


def test_saturated_pixels_keep_their_gradient(vae):
    latents = (10 * randn(1, 4, 16, 16, dtype=torch.float32)).requires_grad_()
    image = LatentDecoder(vae)(latents)
    saturated = (image == 0) | (image == 1)
    assert saturated.any()
    image[saturated].sum().backward()
    assert latents.grad.abs().sum() > 0


def test_vgg16_computes_what_its_file_says(vgg_folder, vgg_weights):
    image = scenes(1)[0]
    hidden = (image - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )

    def convolve(hidden, index):
        weight, bias = (vgg_weights[f"features.{index}.{name}"] for name in ("weight", "bias"))
        return F.conv2d(hidden, weight, bias, padding=1).relu()

    relu1_2 = convolve(convolve(hidden, 0), 2)
    relu2_2 = convolve(convolve(F.max_pool2d(relu1_2, 2), 5), 7)
    network = VGG16Features.from_pretrained(vgg_folder, layers=("relu2_2", "relu1_2"), normalize=False)
    torch.testing.assert_close(network(image), [relu1_2, relu2_2])


def test_normalised_features_compare_directions(vgg, vgg_folder):
    image, target = scenes(1, 2)[0].split(1)
    literal = VGG16Features.from_pretrained(vgg_folder, layers=("relu1_2", "relu2_2"), normalize=False)
    ones = torch.ones(1, 1, 64, 64)
    cosines = [F.cosine_similarity(a, b, dim=1).mean() for a, b in zip(literal(image), literal(target), strict=True)]
    expected = 2 - 2 * torch.stack(cosines).mean()
    loss = perceptual_loss(vgg, image, target, ones, ones)
    torch.testing.assert_close(loss, expected[None], atol=1e-3, rtol=1e-2)


def test_vgg16_has_the_names_and_shapes_of_torchvision():
    weights = VGG16Features(layers=("relu5_3",)).state_dict()
    convolutions = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert set(weights) == {f"features.{i}.{name}" for i in convolutions for name in ("weight", "bias")}
    assert weights["features.17.weight"].shape == (512, 256, 3, 3)


def test_a_thinner_vgg16_loads_by_the_same_lines(tmp_path):
    thin = VGG16Features(layers=("relu5_3",), width=4)
    save_file(thin.state_dict(), tmp_path / "model.safetensors")
    loaded = VGG16Features.from_pretrained(tmp_path, layers=("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_3"))
    image = scenes(1)[0]
    activations = loaded(image)
    assert [tuple(a.shape[1:]) for a in activations] == [
        (4, 64, 64),
        (8, 32, 32),
        (16, 16, 16),
        (32, 8, 8),
        (32, 4, 4),
    ]
    torch.testing.assert_close(activations[-1:], thin(image))


def test_vgg16_runs_no_layer_after_the_last_one_asked_for(vgg):
    assert len(vgg.features) == 9


def test_vgg16_comes_from_the_hub(hub, vgg_folder):
    hub.add("models", "timm/vgg16.tv_in1k", {"model.safetensors": (vgg_folder / "model.safetensors").read_bytes()})
    code = (
        "from diffusers_iedit.losses import VGG16Features; "
        "print(VGG16Features.from_pretrained(layers=['relu2_2']).features[0].bias.sum().item())"
    )
    result = hub.run(code)
    assert result.returncode == 0, result.stderr
    expected = VGG16Features.from_pretrained(vgg_folder, layers=["relu2_2"]).features[0].bias.sum().item()
    assert float(result.stdout) == pytest.approx(expected)


@pytest.mark.parametrize("layers", [(), ("relu1_2", "relu6_1"), "relu1_2"])
def test_unknown_layers_are_refused(vgg_folder, layers):
    with pytest.raises(ValueError, match=r"^`layers`.*relu1_1"):
        VGG16Features(layers=layers)
    with pytest.raises(ValueError, match=r"^`layers`.*relu1_1"):
        VGG16Features.from_pretrained(vgg_folder, layers=layers)


def test_a_folder_without_the_weights_is_refused(tmp_path, vgg_folder):
    with pytest.raises(ValueError, match=r"`model`.*VGG-16"):
        VGG16Features.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"features\.10"):
        VGG16Features.from_pretrained(vgg_folder, layers=["relu3_1"])
    save_file({"features.0.weight": torch.zeros(64, 1, 3, 3), "features.0.bias": torch.zeros(64)}, tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="size mismatch"):
        VGG16Features.from_pretrained(tmp_path, layers=["relu1_1"])


def test_frozen_networks_pass_gradients_on_and_keep_none(vae, clip, vgg, networks):
    latents = randn(1, 4, 16, 16, dtype=torch.float32).requires_grad_()
    image = networks["decode"](latents)
    loss = networks["embed_image"](image).sum() + sum(feature.sum() for feature in vgg(image))
    loss.backward()
    assert latents.grad.abs().sum() > 0
    for network in (vae, clip, vgg):
        assert not network.training
        assert all(not p.requires_grad and p.grad is None for p in network.parameters())


# Eq. 12


def test_equation_12_by_hand(networks, pair):
    criterion = IEditLoss(lambda_perc=0.5, **networks)
    total, terms = criterion(**noisy(criterion, pair, [250, 900]), **pair)
    assert set(terms) == {"loc", "global", "mask", "perc"}
    for i, t in enumerate([0.25, 0.9]):
        loc, whole, mask, perc = (terms[name][i] for name in ("loc", "global", "mask", "perc"))
        torch.testing.assert_close(total[i], (1 - t) * (loc + whole) + t * mask + 0.5 * perc)


def test_the_terms_are_the_equations_by_themselves(vae, networks, pair):
    criterion = IEditLoss(("loc", "global", "mask", "perc", "paired", "ldm"), **networks)
    inputs = noisy(criterion, pair, [250, 900])
    _, terms = criterion(**inputs, **pair)
    alpha_bar, z_t, prediction = (inputs[name] for name in ("level", "noisy_latents", "model_pred"))
    eps_1, eps_2 = (target_noise(z_t, pair[name], alpha_bar) for name in ("source_latents", "target_latents"))
    z_hat = predict_latents(z_t, prediction, alpha_bar)
    image = (vae.decode(z_hat / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    embed, masks = networks["embed_image"], (pair["source_mask"], pair["target_mask"])
    expected = {
        "loc": clip_distance(embed(image * masks[0]), pair["term_embeds"]),
        "global": clip_distance(embed(image), pair["prompt_embeds"]),
        "mask": masked_loss(prediction, eps_1, eps_2, *masks),
        "perc": perceptual_loss(networks["features"], image, pair["target_image"], *masks),
        "paired": paired_loss(prediction, eps_2),
        "ldm": paired_loss(prediction, eps_1),
    }
    torch.testing.assert_close(terms, expected)


def test_the_ldm_term_is_the_loss_of_plain_training(pair):
    criterion = IEditLoss(("ldm",))
    inputs = noisy(criterion, pair, [0, 500])
    _, terms = criterion(**inputs, source_latents=pair["source_latents"], target_latents=pair["target_latents"])
    noise = randn(2, *pair["source_latents"].shape, dtype=torch.float32)[0]
    expected = (inputs["model_pred"] - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(terms["ldm"], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("terms", TABLE_2)
def test_each_row_of_table_2_is_one_setting(terms, networks, pair):
    criterion = IEditLoss(terms, lambda_perc=2.0, **networks)
    total, losses = criterion(**noisy(criterion, pair, [300, 300]), **pair)
    assert set(losses) == set(terms)
    weights = {"loc": 0.7, "global": 0.7, "perc": 2.0}
    torch.testing.assert_close(total, sum(weights.get(term, 0.3) * loss for term, loss in losses.items()))


def test_the_weights_follow_the_length_of_the_schedule(networks, pair):
    criterion = IEditLoss(("global", "mask"), num_train_timesteps=2000, **networks)
    total, terms = criterion(**noisy(criterion, pair, [500, 500]), **pair)
    torch.testing.assert_close(total, 0.75 * terms["global"] + 0.25 * terms["mask"])


def test_networks_in_half_precision_give_nearly_the_same(networks, pair):
    criterion = IEditLoss(**networks)
    half = IEditLoss(**{name: copy.deepcopy(network).bfloat16() for name, network in networks.items()})
    inputs = noisy(criterion, pair, [250, 900]) | pair
    total, half_total = criterion(**inputs)[0], half(**inputs)[0]
    assert half_total.dtype == torch.float32
    torch.testing.assert_close(half_total, total, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_prediction_type_ends_at_the_same_picture(prediction_type, networks, pair):
    criterion = IEditLoss(("global", "mask"), prediction_type=prediction_type, **networks)
    level, t = torch.tensor([0.5, 0.3]), torch.tensor([500, 300])
    z_t = criterion.noise_latents(pair["source_latents"], randn(2, 4, 16, 16, dtype=torch.float32), level)
    perfect = criterion.target(z_t, pair["target_latents"], level)
    everywhere = dict.fromkeys(("source_mask", "target_mask"), torch.ones(2, 1, 64, 64))
    _, terms = criterion(perfect, z_t, level=level, timesteps=t, **(pair | everywhere))
    assert (terms["mask"] == 0).all()
    decoded = networks["decode"](pair["target_latents"])
    torch.testing.assert_close(
        terms["global"], clip_distance(networks["embed_image"](decoded), pair["prompt_embeds"]), atol=1e-4, rtol=1e-4
    )


def test_a_sample_does_not_depend_on_its_neighbours(networks, pair):
    criterion = IEditLoss(**networks)
    inputs = noisy(criterion, pair, [100, 800]) | pair
    total, terms = criterion(**inputs)
    for i in range(2):
        alone, alone_terms = criterion(**{name: tensor[i : i + 1] for name, tensor in inputs.items()})
        torch.testing.assert_close(alone, total[i : i + 1], atol=1e-5, rtol=1e-4)
        for name, loss in alone_terms.items():
            torch.testing.assert_close(loss, terms[name][i : i + 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("term", ["loc", "global", "mask", "perc", "paired", "ldm"])
def test_every_term_trains_the_model_and_nothing_else(term, networks, pair):
    criterion = IEditLoss((term,), **networks)
    inputs = noisy(criterion, pair, [400, 700])
    inputs["model_pred"].requires_grad_()
    total, terms = criterion(**inputs, **pair)
    assert total.shape == terms[term].shape == (2,)
    total.sum().backward()
    assert (inputs["model_pred"].grad.abs().amax((1, 2, 3)) > 0).all()
    assert all(p.grad is None for network in networks.values() for p in network.parameters())


def test_the_localised_term_ignores_what_the_mask_leaves_out(networks, pair):
    criterion = IEditLoss(("loc",), **networks)
    inputs = noisy(criterion, pair, [400, 700])
    empty = pair | {"source_mask": torch.zeros(2, 1, 64, 64)}
    inputs["model_pred"].requires_grad_()
    criterion(**inputs, **empty)[0].sum().backward()
    assert (inputs["model_pred"].grad == 0).all()


def test_nothing_is_decoded_for_the_noise_terms(pair):
    def decode(latents):
        raise AssertionError("decoded")

    criterion = IEditLoss(("ldm", "paired", "mask"), decode=decode)
    total, _ = criterion(**noisy(criterion, pair, [400, 700]), **pair)
    assert total.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("prediction_type", "alphas_cumprod"),
    [
        ("epsilon", ALPHAS_CUMPROD),
        ("v_prediction", ALPHAS_CUMPROD),
        ("v_prediction", ALPHAS_CUMPROD_ZERO_SNR),
        ("epsilon", ALPHAS_CUMPROD_ZERO_SNR),
    ],
)
def test_the_first_and_the_last_timestep_are_finite_under_autocast(
    networks, pair, prediction_type, alphas_cumprod, dtype
):
    criterion = IEditLoss(("loc", "global", "mask", "perc", "paired", "ldm"), 1.0, prediction_type, **networks)
    inputs = noisy(criterion, pair, [0, 999], alphas_cumprod, error=1.0)
    inputs["model_pred"] = inputs["model_pred"].to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        total, terms = criterion(**inputs, **pair)
    total.mean().backward()
    assert all(loss.dtype == torch.float32 and loss.isfinite().all() for loss in (total, *terms.values()))
    assert inputs["model_pred"].grad.isfinite().all()


@pytest.mark.parametrize("terms", [(), ("mask", "clip"), "mask"])
def test_unknown_terms_are_refused(terms):
    with pytest.raises(ValueError, match=r"`terms`.*loc, global, mask, paired, ldm, perc"):
        IEditLoss(terms)


@pytest.mark.parametrize("weight", [-0.1, float("nan")])
def test_a_negative_weight_is_refused(weight):
    with pytest.raises(ValueError, match="`lambda_perc`"):
        IEditLoss(lambda_perc=weight)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match=r"`prediction_type`.*epsilon, v_prediction, flow_prediction, got 'sample'"):
        IEditLoss(prediction_type="sample")


@pytest.mark.parametrize(
    ("term", "name"),
    [
        ("loc", "term_embeds"),
        ("global", "prompt_embeds"),
        ("global", "embed_image"),
        ("mask", "target_mask"),
        ("perc", "target_image"),
        ("perc", "features"),
    ],
)
def test_a_term_without_what_it_needs_is_refused_by_name(networks, pair, term, name):
    criterion = IEditLoss((term,), **(networks | {name: None} if name in networks else networks))
    with pytest.raises(ValueError, match=f"'{term}' needs `{name}`"):
        criterion(**noisy(criterion, pair, [1, 2]), **(pair | ({} if name in networks else {name: None})))


def test_shapes_that_would_broadcast_are_refused():
    _, eps_2, eps_1, prediction, mask, _ = draw(0)
    with pytest.raises(ValueError, match="of one shape"):
        paired_loss(prediction, eps_2[:1])
    with pytest.raises(ValueError, match="of one shape"):
        masked_loss(prediction, eps_1[:1], eps_2, mask, mask)
    with pytest.raises(ValueError, match="of one shape"):
        clip_distance(randn(2, 8), randn(1, 8))
    with pytest.raises(ValueError, match="`source_mask`"):
        masked_loss(prediction, eps_1, eps_2, mask[:, 0], mask)
    with pytest.raises(ValueError, match="`target_mask`"):
        masked_loss(prediction, eps_1, eps_2, mask, mask.expand(-1, 4, -1, -1))
    with pytest.raises(ValueError, match="`target_mask`"):
        perceptual_loss(lambda x: x, prediction, prediction, mask, mask[:2])
