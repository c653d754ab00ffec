"""The paper's losses, Eqs. 1-12: one function an equation, the frozen networks behind them, and `IEditLoss`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL.Image import Resampling
from safetensors import safe_open
from torch import nn

from . import mini
from .loading import fetch, usable


if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny
    from transformers import CLIPImageProcessor, CLIPModel


# What is divided by at the least, so that both ends of any schedule are finite: by 1 - alpha_bar in Eq. 3, by
# alpha_bar in Eq. 7 (below this z_t holds nothing of the latents). Stable Diffusion's levels are well inside.
SMALLEST_NOISE = 2**-24
SMALLEST_ALPHA_BAR = 1e-4


def _fp32(tensor: torch.Tensor) -> torch.Tensor:
    # Half precision is too coarse for differences of latents and for sums; double stays double.
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _level(level: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, 1, 1), beside the latents."""
    return _fp32(level).to(latents.device).view(-1, *[1] * (latents.ndim - 1))


def _mask(mask: torch.Tensor, name: str, like: torch.Tensor) -> torch.Tensor:
    """A mask at the height and width of `like`: each value is the share of its cell that is to be edited."""
    if mask.ndim != 4 or mask.shape[1] != 1 or len(mask) not in (1, len(like)):
        raise ValueError(f"`{name}` has to be of shape ({len(like)}, 1, height, width), got {tuple(mask.shape)}.")
    return F.interpolate(_fp32(mask), size=like.shape[-2:], mode="area")


def _clamp(image: torch.Tensor) -> torch.Tensor:
    # Cuts off what no picture can show, but lets the gradient through: a saturated pixel has to find its way back.
    return image + (image.clamp(0, 1) - image).detach()


def _mean_square(difference: torch.Tensor) -> torch.Tensor:
    return difference.square().flatten(1).mean(1)


def noise_latents(latents: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    r"""Eq. 2: $z_t = \sqrt{\alpha_t} z_1 + \sqrt{1 - \alpha_t} \epsilon_1$.

    Args:
        latents (`torch.Tensor`): z_1, the clean latents of the source, shape (B, C, h, w).
        noise (`torch.Tensor`): eps_1, unit Gaussian noise, same shape.
        alpha_bar (`torch.Tensor`): `alphas_cumprod[t]` of each sample, shape (B,), values in [0, 1].

    Returns:
        `torch.Tensor`: z_t, same shape, float32 or double.
    """
    alpha_bar = _level(alpha_bar, latents)
    return alpha_bar.sqrt() * _fp32(latents) + (1 - alpha_bar).sqrt() * _fp32(noise)


def target_noise(noisy_latents: torch.Tensor, target_latents: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    r"""Eq. 3: $\epsilon_2 = (z_t - \sqrt{\alpha_t} z_2) / \sqrt{1 - \alpha_t}$, the noise that leads from z_t to z_2.

    It is far from unit noise where little noise was added: about 30 times as large at t = 1 of Stable Diffusion.

    Args:
        noisy_latents (`torch.Tensor`): z_t, shape (B, C, h, w), in float32: an error in it grows as eps_2 does.
        target_latents (`torch.Tensor`): z_2, the clean latents of the target, same shape. Of z_1 it gives eps_1.
        alpha_bar (`torch.Tensor`): As in `noise_latents`.

    Returns:
        `torch.Tensor`: eps_2, same shape, float32 or double; finite at alpha_bar = 1 too.
    """
    alpha_bar = _level(alpha_bar, noisy_latents)
    sigma = (1 - alpha_bar).clamp(min=SMALLEST_NOISE).sqrt()
    return (_fp32(noisy_latents) - alpha_bar.sqrt() * _fp32(target_latents)) / sigma


def predict_latents(noisy_latents: torch.Tensor, noise_pred: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    r"""Eq. 7: $\hat{z}_1 = (z_t - \sqrt{1 - \alpha_t} \epsilon_\theta) / \sqrt{\alpha_t}$, the latents of the edit.

    An alpha_bar below 1e-4 counts as 1e-4. Only schedules with (almost) zero terminal SNR come there, where z_t holds
    nothing of the latents: the result is finite, an error of the noise times 100. They want a model that predicts v.

    Args:
        noisy_latents (`torch.Tensor`): z_t, shape (B, C, h, w).
        noise_pred (`torch.Tensor`): eps_theta(z_t, t, y_2), same shape.
        alpha_bar (`torch.Tensor`): As in `noise_latents`.

    Returns:
        `torch.Tensor`: z^_1, same shape, float32 or double, with gradients.
    """
    alpha_bar = _level(alpha_bar, noisy_latents)
    return (_fp32(noisy_latents) - (1 - alpha_bar).sqrt() * _fp32(noise_pred)) / alpha_bar.clamp(
        min=SMALLEST_ALPHA_BAR
    ).sqrt()


def target_velocity(
    noisy_latents: torch.Tensor, target_latents: torch.Tensor, alpha_bar: torch.Tensor
) -> torch.Tensor:
    r"""Eq. 3 for models that predict $v = \sqrt{\alpha_t} \epsilon - \sqrt{1 - \alpha_t} z$ (SD 2.x).

    Arguments and result are those of `target_noise`.
    """
    noise = target_noise(noisy_latents, target_latents, alpha_bar)
    alpha_bar = _level(alpha_bar, noisy_latents)
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * _fp32(target_latents)


def predict_latents_from_velocity(
    noisy_latents: torch.Tensor, velocity_pred: torch.Tensor, alpha_bar: torch.Tensor
) -> torch.Tensor:
    r"""Eq. 7 for models that predict v: $\hat{z}_1 = \sqrt{\alpha_t} z_t - \sqrt{1 - \alpha_t} v_\theta$.

    Arguments and result are those of `predict_latents`; nothing is divided, so every alpha_bar in [0, 1] will do.
    """
    alpha_bar = _level(alpha_bar, noisy_latents)
    return alpha_bar.sqrt() * _fp32(noisy_latents) - (1 - alpha_bar).sqrt() * _fp32(velocity_pred)


def flow_noise_latents(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    r"""Eq. 2 for flow matching: $z_t = (1 - s) z_1 + s \epsilon_1$.

    `sigma` is s of each sample, shape (B,), values in [0, 1]; the rest is as in `noise_latents`.
    """
    sigma = _level(sigma, latents)
    return (1 - sigma) * _fp32(latents) + sigma * _fp32(noise)


def flow_target_velocity(
    noisy_latents: torch.Tensor, target_latents: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    r"""Eq. 3 for flow matching: $\epsilon_2 - z_2 = (z_t - z_2) / s$, the velocity that leads from z_t to z_2."""
    return (_fp32(noisy_latents) - _fp32(target_latents)) / _level(sigma, noisy_latents).clamp(min=SMALLEST_NOISE**0.5)


def flow_predict_latents(
    noisy_latents: torch.Tensor, velocity_pred: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    r"""Eq. 7 for flow matching: $\hat{z}_1 = z_t - s v_\theta$."""
    return _fp32(noisy_latents) - _level(sigma, noisy_latents) * _fp32(velocity_pred)


class PredictionType(NamedTuple):
    """What depends on the quantity that the model predicts; all three take the noise level (B,) last."""

    noise_latents: Callable  # Eq. 2: latents, noise -> z_t
    target: Callable  # Eq. 3: z_t, latents -> what the model has to predict to get from z_t to these latents
    predict_latents: Callable  # Eq. 7: z_t, the model's prediction -> z^_1


PREDICTION_TYPES = {
    "epsilon": PredictionType(noise_latents, target_noise, predict_latents),
    "v_prediction": PredictionType(noise_latents, target_velocity, predict_latents_from_velocity),
    "flow_prediction": PredictionType(flow_noise_latents, flow_target_velocity, flow_predict_latents),
}
"""By diffusers' names. The noise level is `alpha_bar`, of "flow_prediction" `sigma`."""


def paired_loss(noise_pred: torch.Tensor, target_noise: torch.Tensor) -> torch.Tensor:
    r"""Eq. 4: $\|\epsilon_2 - \epsilon_\theta(z_t, t, \tau_\theta(y_2))\|^2$. With eps_1 in eps_2's place, Eq. 1.

    Args:
        noise_pred (`torch.Tensor`): What the model predicts, shape (B, C, h, w).
        target_noise (`torch.Tensor`): What it has to predict, same shape.

    Returns:
        `torch.Tensor`: The mean square of each sample, shape (B,).

    Raises:
        ValueError: If the shapes differ.
    """
    if noise_pred.shape != target_noise.shape:
        raise ValueError(
            f"`noise_pred` and `target_noise` have to be of one shape, got {tuple(noise_pred.shape)} and "
            f"{tuple(target_noise.shape)}."
        )
    return _mean_square(_fp32(target_noise) - _fp32(noise_pred))


def masked_loss(
    noise_pred: torch.Tensor,
    source_noise: torch.Tensor,
    target_noise: torch.Tensor,
    source_mask: torch.Tensor,
    target_mask: torch.Tensor,
    background_weight: float = 1.0,
) -> torch.Tensor:
    r"""Eqs. 8 and 9: the target's noise where the target is edited, the source's noise where the source is not.

    $$\|\epsilon_2 \odot M_2 - \epsilon_\theta \odot M_2\|^2 +
      \|\epsilon_1 \odot (1 - M_1) - \epsilon_\theta \odot (1 - M_1)\|^2$$

    What only M_1 covers is left free, and what only M_2 covers is pulled both ways. Both terms are means over the
    whole frame, so a small mask weighs little. Masks count squared, which matters for soft ones.

    Args:
        noise_pred (`torch.Tensor`): What the model predicts, shape (B, C, h, w).
        source_noise (`torch.Tensor`): eps_1, same shape.
        target_noise (`torch.Tensor`): eps_2, same shape.
        source_mask (`torch.Tensor`): M_1, shape (B, 1, H, W), values in [0, 1], 1 = edit. Of any size: a latent
            takes the mean of the pixels that it stands for.
        target_mask (`torch.Tensor`): M_2, likewise.
        background_weight (`float`): Of the second term; the paper's is 1.

    Returns:
        `torch.Tensor`: The loss of each sample, shape (B,).

    Raises:
        ValueError: If the shapes do not fit.
    """
    if not noise_pred.shape == source_noise.shape == target_noise.shape:
        raise ValueError(
            f"`noise_pred`, `source_noise` and `target_noise` have to be of one shape, got {tuple(noise_pred.shape)}, "
            f"{tuple(source_noise.shape)} and {tuple(target_noise.shape)}."
        )
    noise_pred = _fp32(noise_pred)
    foreground = (_fp32(target_noise) - noise_pred) * _mask(target_mask, "target_mask", noise_pred)
    background = (_fp32(source_noise) - noise_pred) * (1 - _mask(source_mask, "source_mask", noise_pred))
    return _mean_square(foreground) + background_weight * _mean_square(background)


def clip_distance(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """D_CLIP of Eqs. 5 and 11: 1 - cosine.

    Args:
        image_embeds (`torch.Tensor`): CLIP embeddings of the images, of any length, shape (B, D).
        text_embeds (`torch.Tensor`): CLIP embeddings of the texts, same shape.

    Returns:
        `torch.Tensor`: Distances in [0, 2], shape (B,).

    Raises:
        ValueError: If the shapes differ.
    """
    if image_embeds.shape != text_embeds.shape:
        raise ValueError(
            f"`image_embeds` and `text_embeds` have to be of one shape, got {tuple(image_embeds.shape)} and "
            f"{tuple(text_embeds.shape)}."
        )
    return 1 - F.cosine_similarity(_fp32(image_embeds), _fp32(text_embeds), dim=-1)


def perceptual_loss(
    features: Callable,
    image: torch.Tensor,
    target_image: torch.Tensor,
    source_mask: torch.Tensor,
    target_mask: torch.Tensor,
) -> torch.Tensor:
    r"""Eq. 10: $\|V(\hat{x}_1 \odot M_1) - V(x_2 \odot M_2)\|^2$.

    Args:
        features (`Callable`): V, images -> features of shape (B, ...) or a list of such, as `VGG16Features`.
        image (`torch.Tensor`): x^_1, the edited image, shape (B, 3, H, W). In [0, 1], masked means black.
        target_image (`torch.Tensor`): x_2, likewise.
        source_mask (`torch.Tensor`): M_1, shape (B, 1, H, W), values in [0, 1], 1 = edit; resized to the image.
        target_mask (`torch.Tensor`): M_2, likewise.

    Returns:
        `torch.Tensor`: The mean square of each sample, shape (B,); of several features, the mean over them.

    Raises:
        ValueError: If a mask's shape does not fit.
    """
    edited = features(image * _mask(source_mask, "source_mask", image))
    wanted = features(target_image * _mask(target_mask, "target_mask", target_image))
    if isinstance(edited, torch.Tensor):
        edited, wanted = [edited], [wanted]
    losses = [_mean_square(_fp32(a) - _fp32(b)) for a, b in zip(edited, wanted, strict=True)]
    return torch.stack(losses).mean(0)


class LatentDecoder(nn.Module):
    """Eq. 6: the frozen decoder D of a VAE, with gradients for the latents.

    Args:
        vae (`AutoencoderKL` or `AutoencoderTiny`): Is frozen. Runs in its own precision, or in that of autocast;
            decoders that overflow in float16 (SDXL's) want bfloat16, or none.
    """

    def __init__(self, vae: "AutoencoderKL | AutoencoderTiny"):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w), scaled as the diffusion model sees them -> float32 images (B, 3, H, W) in [0, 1]."""
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
        return _clamp(_fp32(self.vae.decode(latents.to(self.vae.dtype)).sample) / 2 + 0.5)


class CLIPImageEmbedder(nn.Module):
    """The frozen image half of CLIP, with gradients for the images, which `CLIPImageProcessor` does not give.

    The preprocessing equals the processor's up to its rounding to 8 bits after the resize.

    Args:
        clip (`CLIPModel`): Is frozen.
        processor (`CLIPImageProcessor`): Its image processor: sizes, mean and standard deviation.

    Raises:
        ValueError: If the processor does anything but resize the shorter side bicubically, crop no more than that from
            the centre, and normalise.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, clip: "CLIPModel", processor: "CLIPImageProcessor"):
        super().__init__()
        steps = (processor.do_resize, processor.do_center_crop, processor.do_rescale, processor.do_normalize)
        self.size, crop = processor.size["shortest_edge"], processor.crop_size
        if not all(steps) or processor.resample != Resampling.BICUBIC or not self.size:
            raise ValueError(
                "`processor` has to resize the shortest edge bicubically, centre-crop, rescale and normalise, as "
                f"CLIP's does, got {processor}."
            )
        self.crop = (crop["height"], crop["width"])
        if max(self.crop) > self.size:
            raise ValueError(f"`processor` crops {self.crop} from a shortest edge of {self.size}: that is too small.")
        self.clip = clip.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(processor.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std).view(3, 1, 1), persistent=False)

    def preprocess(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] -> CLIP's `pixel_values`, float32."""
        height, width = image.shape[-2:]
        shorter = min(height, width)
        size = (int(self.size * height / shorter), int(self.size * width / shorter))
        # As Pillow does it: the rows first, and what overshoots is cut off before the columns.
        image = _clamp(F.interpolate(_fp32(image), size=(height, size[1]), mode="bicubic", antialias=True))
        image = _clamp(F.interpolate(image, size=size, mode="bicubic", antialias=True))
        top, left = (size[0] - self.crop[0]) // 2, (size[1] - self.crop[1]) // 2
        return (image[..., top : top + self.crop[0], left : left + self.crop[1]] - self.mean) / self.std

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] -> embeddings (B, D), not normalised."""
        return self.clip.get_image_features(self.preprocess(image)).pooler_output


class VGG16Features(nn.Module):
    """V of Eq. 10: activations of a frozen VGG-16, with gradients for the images.

    The paper names neither the layers nor their scale. At the scale they come in, Eq. 10 can be most of Eq. 12. So by
    default the feature vector of each position is brought to mean square 1 (LPIPS brings it to length 1); Eq. 10 is
    then a mean of 2 - 2 cosine, in [0, 2] like the CLIP distances.

    Args:
        layers (`Sequence[str]`): Which activations, in VGG's names, "relu1_1" to "relu5_3". By default the four that
            Johnson et al. (the paper's reference for perceptual losses) use. No layer after the last one is run.
        normalize (`bool`): False gives the activations as they are: Eq. 10 to the letter.
        width (`int`): Channels of the first block, 64 in VGG-16; the next have 2, 4, 8 and 8 times as many.

    Raises:
        ValueError: If there is no such layer, or none is given.
    """

    # Convolutions in each of the blocks, which end in a max-pooling, and their channels in terms of the first block's.
    BLOCKS = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        layers: Sequence[str] = ("relu1_2", "relu2_2", "relu3_3", "relu4_3"),
        normalize: bool = True,
        width: int = 64,
    ):
        super().__init__()
        modules, positions, channels = [], {}, 3
        for block, (convolutions, times) in enumerate(self.BLOCKS, start=1):
            for number in range(1, convolutions + 1):
                modules += [nn.Conv2d(channels, times * width, 3, padding=1), nn.ReLU(inplace=True)]
                positions[f"relu{block}_{number}"] = len(modules) - 1
                channels = times * width
            modules.append(nn.MaxPool2d(2))
        if not layers or not set(layers) <= set(positions):
            raise ValueError(f"`layers` has to name some of {', '.join(positions)}, got {layers!r}.")
        self.positions = {positions[layer] for layer in layers}
        self.normalize = normalize
        self.features = nn.Sequential(*modules[: max(self.positions) + 1])
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls, model: str | Path = "timm/vgg16.tv_in1k", argument: str = "`model`", **options
    ) -> "VGG16Features":
        """Loads trained weights, by default ImageNet's.

        Args:
            model (`str` or `Path`): A Hub id, or a folder with `model.safetensors`, in which the convolutions have the
                names they have in torchvision and timm, `features.<n>.weight` and `features.<n>.bias`. The file also
                tells the width: `mini` is the thinner VGG-16 of the mini world.
            argument (`str`): What errors call the model.
            **options: `layers` and `normalize`, as for the class.

        Raises:
            ValueError: If there is no such model, or a layer's weights are missing or of another shape.
        """
        file = fetch(model, argument, mini.vgg_path()) / "model.safetensors"
        with usable(argument, model, "VGG-16"), safe_open(file, framework="pt") as weights:
            width = weights.get_slice("features.0.weight").get_shape()[0]
        network = cls(width=width, **options)
        with usable(argument, model, "VGG-16"), safe_open(file, framework="pt") as weights:
            network.load_state_dict({name: weights.get_tensor(name) for name in network.state_dict()})
        return network

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> the activations of the layers, shallow ones first, each (B, C, H', W')."""
        hidden = ((image - self.mean) / self.std).to(next(self.parameters()).dtype)
        activations = []
        for position, module in enumerate(self.features):
            hidden = module(hidden)
            if position in self.positions:
                activations.append(hidden)
        if self.normalize:
            # The constant keeps the gradient of a position without any activation finite.
            activations = [a * (_fp32(a).square().mean(1, keepdim=True) + 1e-4).rsqrt() for a in activations]
        return activations


class IEditLoss:
    r"""
    Eq. 12 of [iEdit](https://huggingface.co/papers/2305.05947), the objective of its fine-tuning:

    $$(1 - \frac{t}{T})(\mathcal{L}_{loc} + \mathcal{L}_{global}) + \frac{t}{T}\mathcal{L}_{mask} +
      \lambda_{perc}\mathcal{L}_{perc}$$

    | term | equation | weight | what it compares |
    |---|---|---|---|
    | "loc" | 11 | 1 - t/T | CLIP of the edited image inside M_1, CLIP of the term y_2^diff |
    | "global" | 5 | 1 - t/T | CLIP of the edited image, CLIP of the edit prompt y_2 |
    | "mask" | 8, 9 | t/T | the prediction, eps_2 inside M_2 and eps_1 outside M_1 |
    | "paired" | 4 | t/T | the prediction, eps_2 |
    | "ldm" | 1 | t/T | the prediction, eps_1 |
    | "perc" | 10 | lambda_perc | features of the edited image inside M_1, of the target inside M_2 |

    The rows of the paper's Table 2 are the terms global, paired; global, ldm, loc; global, ldm, loc, perc; and the
    default. Only what the chosen terms need is computed: without "loc", "global" and "perc" nothing is decoded.

    Models that predict v or a flow's velocity have z_t, eps_1, eps_2 and z^_1 in the form of their `prediction_type`;
    `noise_latents`, `target` and `predict_latents` are its Eqs. 2, 3 and 7 (see `PREDICTION_TYPES`).

    Args:
        terms (`Sequence[str]`): The terms of the sum.
        lambda_perc (`float`): The weight of "perc", 0 or more; the paper does not give its own. "perc" is the one term
            that t does not weight, and Eq. 7 makes its gradient grow as 1 / sqrt(alpha_bar).
        prediction_type (`str`): "epsilon", "v_prediction" or "flow_prediction": what the model predicts, as in its
            scheduler's config.
        num_train_timesteps (`int`): T.
        decode (`Callable`, *optional*): Latents -> images in [0, 1], as `LatentDecoder`; for "loc", "global", "perc".
        embed_image (`Callable`, *optional*): Images -> embeddings, as `CLIPImageEmbedder`; for "loc", "global".
        features (`Callable`, *optional*): Images -> features, as `VGG16Features`; for "perc".
        background_weight (`float`): Of the background in "mask"; the paper's is 1.
        overlap_masks (`bool`): In "mask", edit only where M_1 and M_2 overlap. Otherwise what M_2 alone covers is
            pulled both ways, as the paper has it.

    Raises:
        ValueError: If a term or the prediction type is unknown, no term is given, or a weight is negative.
    """

    # Which of the networks and of the inputs that not every term needs a term cannot do without.
    NEEDS = {
        "loc": ("decode", "embed_image", "source_mask", "term_embeds"),
        "global": ("decode", "embed_image", "prompt_embeds"),
        "mask": ("source_mask", "target_mask"),
        "paired": (),
        "ldm": (),
        "perc": ("decode", "features", "source_mask", "target_mask", "target_image"),
    }

    def __init__(
        self,
        terms: Sequence[str] = ("loc", "global", "mask", "perc"),
        lambda_perc: float = 0.1,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        decode: Callable | None = None,
        embed_image: Callable | None = None,
        features: Callable | None = None,
        background_weight: float = 1.0,
        overlap_masks: bool = False,
    ):
        if not terms or not set(terms) <= set(self.NEEDS):
            raise ValueError(f"`terms` has to name some of {', '.join(self.NEEDS)}, got {terms!r}.")
        if not lambda_perc >= 0:
            raise ValueError(f"`lambda_perc` has to be 0 or more, got {lambda_perc}.")
        if not background_weight >= 0:
            raise ValueError(f"`background_weight` has to be 0 or more, got {background_weight}.")
        if prediction_type not in PREDICTION_TYPES:
            known = ", ".join(PREDICTION_TYPES)
            raise ValueError(f"`prediction_type` has to be one of {known}, got {prediction_type!r}.")
        self.terms = tuple(terms)
        self.lambda_perc = lambda_perc
        self.background_weight = background_weight
        self.overlap_masks = overlap_masks
        self.noise_latents, self.target, self.predict_latents = PREDICTION_TYPES[prediction_type]
        self.num_train_timesteps = num_train_timesteps
        self.networks: dict[str, Any] = {"decode": decode, "embed_image": embed_image, "features": features}

    def __call__(
        self,
        model_pred: torch.Tensor,
        noisy_latents: torch.Tensor,
        source_latents: torch.Tensor,
        target_latents: torch.Tensor,
        level: torch.Tensor,
        timesteps: torch.Tensor,
        source_mask: torch.Tensor | None = None,
        target_mask: torch.Tensor | None = None,
        target_image: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        term_embeds: torch.Tensor | None = None,
        noise_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Computes the loss of each sample.

        Args:
            model_pred (`torch.Tensor`): What the model predicts at z_t, t and y_2, shape (B, C, h, w).
            noisy_latents (`torch.Tensor`): z_t in float32, as from `noise_latents`, same shape.
            source_latents (`torch.Tensor`): z_1, same shape.
            target_latents (`torch.Tensor`): z_2, same shape.
            level (`torch.Tensor`): `alphas_cumprod[t]`, for "flow_prediction" sigma, shape (B,).
            timesteps (`torch.Tensor`): t, shape (B,), values from 0 to T.
            source_mask, target_mask (`torch.Tensor`, *optional*): M_1 and M_2, shape (B, 1, H, W), in [0, 1], 1 =
                edit; as large as the images: for "mask" they are averaged to the size of the latents.
            target_image (`torch.Tensor`, *optional*): x_2, shape (B, 3, H, W), in [0, 1].
            prompt_embeds, term_embeds (`torch.Tensor`, *optional*): CLIP embeddings of y_2 and y_2^diff, shape (B, D).
            noise_weight (`torch.Tensor`, *optional*): A further weight of "mask", "paired" and "ldm", shape (B,).

        Returns:
            `tuple[torch.Tensor, dict[str, torch.Tensor]]`: The weighted sum, shape (B,), and each term without its
            weight, shape (B,).

        Raises:
            ValueError: If a term lacks what it needs, or shapes do not fit.
        """
        given = self.networks | {
            "source_mask": source_mask,
            "target_mask": target_mask,
            "target_image": target_image,
            "prompt_embeds": prompt_embeds,
            "term_embeds": term_embeds,
        }
        for term in self.terms:
            if missing := [name for name in self.NEEDS[term] if given[name] is None]:
                raise ValueError(f"The term {term!r} needs `{'`, `'.join(missing)}`.")

        losses = {}
        noise_1 = self.target(noisy_latents, source_latents, level)
        noise_2 = self.target(noisy_latents, target_latents, level)
        if "ldm" in self.terms:
            losses["ldm"] = paired_loss(model_pred, noise_1)
        if "paired" in self.terms:
            losses["paired"] = paired_loss(model_pred, noise_2)
        if "mask" in self.terms:
            mask_1, mask_2 = given["source_mask"], given["target_mask"]
            edit_mask = mask_1 * mask_2 if self.overlap_masks else mask_2
            losses["mask"] = masked_loss(model_pred, noise_1, noise_2, mask_1, edit_mask, self.background_weight)

        if {"loc", "global", "perc"} & set(self.terms):
            image = given["decode"](self.predict_latents(noisy_latents, model_pred, level))
        if "global" in self.terms:
            losses["global"] = clip_distance(given["embed_image"](image), given["prompt_embeds"])
        if "loc" in self.terms:
            masked = image * _mask(given["source_mask"], "source_mask", image)
            losses["loc"] = clip_distance(given["embed_image"](masked), given["term_embeds"])
        if "perc" in self.terms:
            names = ("target_image", "source_mask", "target_mask")
            losses["perc"] = perceptual_loss(given["features"], image, *(given[name] for name in names))

        t = timesteps / self.num_train_timesteps
        of_noise = t if noise_weight is None else t * noise_weight
        weights: dict[str, Any] = {"loc": 1 - t, "global": 1 - t, "perc": self.lambda_perc}
        weights |= dict.fromkeys(("mask", "paired", "ldm"), of_noise)
        return sum((weights[term] * loss for term, loss in losses.items()), start=torch.zeros(())), losses
