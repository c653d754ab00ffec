"""IEditPipeline: an image and a sentence in, the same image with one thing changed out (Sec. 3.4, Eq. 13)."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import (
    retrieve_latents,
    retrieve_timesteps,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageCms, ImageOps
from transformers import (
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from .masking_iedit import clean_term, difference_term, dilate, feather, segment
from .scheduling_iedit import IEditMaskedScheduler


logger = logging.get_logger(__name__)

MIN_IMAGE_SIZE = 8

# What has to lie beside the weights for `custom_pipeline=`; `pipeline.py` is the name diffusers looks for.
CODE_FILES = ("pipeline.py", "scheduling_iedit.py", "masking_iedit.py")

LOAD_MASK_MODEL = (
    "    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor\n"
    '    repo = "CIDAS/clipseg-rd64-refined"\n'
    "    pipe.register_modules(\n"
    "        mask_model=CLIPSegForImageSegmentation.from_pretrained(repo).to(pipe.device),\n"
    "        mask_processor=CLIPSegProcessor.from_pretrained(repo),\n"
    "    )"
)
LOAD_CAPTIONER = (
    "    from transformers import BlipForConditionalGeneration, BlipProcessor\n"
    '    repo = "Salesforce/blip-image-captioning-large"\n'
    "    pipe.register_modules(\n"
    "        captioner=BlipForConditionalGeneration.from_pretrained(repo).to(pipe.device),\n"
    "        caption_processor=BlipProcessor.from_pretrained(repo),\n"
    "    )"
)


@dataclass
class IEditPipelineOutput(BaseOutput):
    """What `IEditPipeline` returns.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The edited images, as many as `batch size * num_images_per_prompt`, of the source's size; by `output_type`
            a list, an array (N, H, W, C) or a tensor (N, C, H, W) with values in [0, 1], or latents (N, 4, h, w).
        masks (`list[PIL.Image.Image]`, `np.ndarray`, `torch.Tensor` or `None`):
            The mask that each image was edited with, at image size, 1 (white) = edited: mode "L" images, an array
            (N, H, W, 1) or a tensor (N, 1, H, W). `None` where no mask was asked for.
        nsfw_content_detected (`list[bool]` or `None`):
            Whether the safety checker blacked the image out; `None` without a safety checker.
    """

    # `Any` stands for arrays and tensors: which of the three it is, `output_type` decides at run time.
    images: list[Image.Image] | Any
    masks: list[Image.Image] | Any | None
    nsfw_content_detected: list[bool] | None


def _as_list(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _upright_8bit(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation and bring the modes that `Image.convert` clips or refuses to 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit grey, which Pillow opens as "I;16" or, from some formats, as "I".
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")  # type: ignore[return-value]
    if image.mode in ("RGBa", "La"):
        return image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    return image


def _array_in_unit_range(array: np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
    """A float32 CPU tensor in [0, 1] of the same shape: bool and uint8 (0 to 255) are scaled, floats are checked."""
    tensor = array.detach().cpu() if isinstance(array, torch.Tensor) else torch.from_numpy(np.array(array))
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if tensor.dtype == torch.bool:
        return tensor.float()
    if not tensor.is_floating_point():
        raise ValueError(f"`{name}` has to be of dtype uint8, bool or floating point, but is {tensor.dtype}.")
    tensor = tensor.float()
    if tensor.isnan().any():
        raise ValueError(f"`{name}` contains NaN; expected values in [0, 1].")
    if tensor.numel() and (tensor.min() < 0 or tensor.max() > 1):
        raise ValueError(
            f"`{name}` has to have values in [0, 1], but they lie in [{tensor.min():.4g}, {tensor.max():.4g}]."
        )
    return tensor


def _read_image(image) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """One entry of `image` as pairs of pixels (3, H, W) and alpha (1, H, W) or None, both float32 in [0, 1]."""
    if isinstance(image, Image.Image):
        image = _upright_8bit(image)
        has_alpha = image.has_transparency_data
        array = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
        channels = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
        return [(channels[:3], channels[3:] if has_alpha else None)]
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise TypeError(
            "`image` has to be a PIL image, a numpy array, a torch tensor or a list of these, but contains"
            f" {type(image).__name__}."
        )
    is_numpy = isinstance(image, np.ndarray)
    layout = "(H, W), (H, W, C) or (B, H, W, C)" if is_numpy else "(C, H, W) or (B, C, H, W)"
    batch = _array_in_unit_range(image, "image")
    if batch.ndim == 2 and is_numpy:
        batch = batch[..., None]
    if batch.ndim == 3:
        batch = batch[None]
    if is_numpy and batch.ndim == 4:
        batch = batch.permute(0, 3, 1, 2)
    if batch.ndim != 4 or batch.shape[1] not in (1, 3, 4):
        raise ValueError(f"`image` has to have shape {layout} with 1, 3 or 4 channels, but has {tuple(image.shape)}.")
    return [(entry[:3].expand(3, -1, -1), entry[3:] if len(entry) == 4 else None) for entry in batch]


def _read_mask(mask) -> list[torch.Tensor]:
    """One entry of `mask_image` as float32 tensors (1, H, W) in [0, 1]."""
    if isinstance(mask, Image.Image):
        return [torch.from_numpy(np.array(_upright_8bit(mask).convert("L"))).float()[None] / 255]
    if not isinstance(mask, (np.ndarray, torch.Tensor)):
        raise TypeError(
            "`mask_image` has to be a PIL image, a numpy array, a torch tensor or a list of these, but contains"
            f" {type(mask).__name__}."
        )
    if 0 in mask.shape:
        raise ValueError(f"`mask_image` has no pixels: its shape is {tuple(mask.shape)}.")
    if mask.dtype in (np.uint8, torch.uint8) and mask.max() == 1:
        raise ValueError(
            "`mask_image` is uint8 with values 0 and 1 only, where 255 means edit; pass it as bool or float instead."
        )
    tensor = _array_in_unit_range(mask, "mask_image")
    if isinstance(mask, np.ndarray) and tensor.ndim in (3, 4) and tensor.shape[-1] == 1:
        tensor = tensor[..., 0]
    if tensor.ndim == 4 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3:
        raise ValueError(
            "`mask_image` has to have shape (H, W), (B, H, W), (B, H, W, 1) as numpy or (B, 1, H, W) as torch, but"
            f" has {tuple(mask.shape)}."
        )
    return [entry[None] for entry in tensor]


def _check_texts(**texts):
    for name, text in texts.items():
        for entry in () if text is None else _as_list(text):
            if not isinstance(entry, str):
                swapped = "; the image comes first: `pipe(image, prompt)`" if name == "prompt" else ""
                raise TypeError(
                    f"`{name}` has to be a string or a list of strings, but contains {type(entry).__name__}{swapped}."
                )


def _check_scheduler(scheduler):
    # Flow matching schedulers have `scale_noise` instead: their straight line to the noise is not what the UNet knows.
    if not hasattr(scheduler, "add_noise"):
        raise TypeError(
            "`scheduler` has to be one for diffusion models, such as DDIMScheduler or EulerDiscreteScheduler, but"
            f" {type(scheduler).__name__} has no `add_noise`: it is for flow matching or another kind of model."
        )


def _check_finite(values: torch.Tensor, what: str, way_out: str):
    """Raise before NaN or infinity becomes a black picture. `values`: (N, ...), one entry a result."""
    finite = values.isfinite().flatten(1).all(dim=1).tolist()
    if not all(finite):
        results = ", ".join(str(index) for index, is_finite in enumerate(finite) if not is_finite)
        raise FloatingPointError(f"{what} NaN or infinity in result {results} of {len(finite)} (from 0). {way_out}")


def _float16_way_out(name: str, model) -> str:
    if model.dtype == torch.float16:
        return (
            f"In float16 nothing above 65504 has a number: run it in float32, `pipe.{name}.to(torch.float32)`, or load"
            " the pipeline in bfloat16."
        )
    return f"It ran in {str(model.dtype).removeprefix('torch.')}, so the weights of `{name}` may be damaged."


def _denoising_way_out(scheduler, unet, strength: float) -> str:
    config = scheduler.config
    if config.get("rescale_betas_zero_snr") and config.prediction_type == "epsilon" and strength == 1:
        return (
            "At `strength` 1 a scheduler with `rescale_betas_zero_snr` starts from pure noise, out of which a model"
            ' that predicts noise ("epsilon") computes no image: pass a `strength` below 1 or a scheduler without it.'
        )
    if unet.dtype == torch.float16:
        return "In float16 nothing above 65504 has a number: load the pipeline in float32 or bfloat16."
    return "Try another `scheduler`, more `num_inference_steps` or a smaller `guidance_scale`."


class IEditPipeline(StableDiffusionImg2ImgPipeline):
    r"""Text-guided editing that changes what the prompt talks about and keeps the rest (iEdit, arXiv 2305.05947).

    The source is noised to `strength` and denoised towards the prompt; with a mask, Eq. 13 keeps the source's own
    noised latents outside it after every step, and the edited region is set into the source's own pixels, so that
    outside the mask not one byte changes.

    All that [`StableDiffusionImg2ImgPipeline`] offers (LoRA, textual inversion, IP-Adapter, `from_single_file`,
    `from_pipe`, offloading, callbacks ...) works here too.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder:
            As in [`StableDiffusionImg2ImgPipeline`]. The scheduler stays as it is; each call masks a copy.
        mask_model ([`~transformers.CLIPSegForImageSegmentation`], *optional*):
            Predicts the mask from `mask_prompt` or `source_prompt`, for instance `CIDAS/clipseg-rd64-refined`.
        mask_processor ([`~transformers.CLIPSegProcessor`], *optional*): The processor of `mask_model`.
        captioner ([`~transformers.BlipForConditionalGeneration`], *optional*):
            Captions the source for `source_prompt="auto"`, for instance `Salesforce/blip-image-captioning-large`.
        caption_processor ([`~transformers.BlipProcessor`], *optional*): The processor of `captioner`.
        requires_safety_checker (`bool`): Whether to warn when there is no `safety_checker`.

    Example:

    ```py
    >>> from diffusers_iedit import IEditPipeline, mini

    >>> pipe = IEditPipeline.from_pretrained(mini.model_path())
    >>> scene = mini.render(seed=22)  # an orange car and a red ball on green grass
    >>> result = pipe(scene.image, "an orange car and a red cat on green grass", mask_image=scene.mask)
    >>> result.images[0].save("edited.png")
    ```
    """

    model_cpu_offload_seq = "captioner->mask_model->text_encoder->image_encoder->unet->vae"
    _optional_components = [
        "safety_checker",
        "feature_extractor",
        "image_encoder",
        "mask_model",
        "mask_processor",
        "captioner",
        "caption_processor",
    ]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker = None,
        feature_extractor: CLIPImageProcessor = None,
        image_encoder: CLIPVisionModelWithProjection = None,
        mask_model: CLIPSegForImageSegmentation = None,
        mask_processor: CLIPSegProcessor = None,
        captioner: BlipForConditionalGeneration = None,
        caption_processor: BlipProcessor = None,
        requires_safety_checker: bool = True,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        # diffusers would load the folders of SDXL, inpainting and instruction models too, whose UNets fail mid-edit.
        if unet is not None and unet.config.addition_embed_type is not None:
            raise ValueError(
                "`unet` has to be one of Stable Diffusion 1 or 2, but takes further embeddings, like SDXL's. Use the"
                " model's own image-to-image pipeline with `IEditMaskedScheduler.wrap`."
            )
        if unet is not None and vae is not None and unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"`unet` has to take the {vae.config.latent_channels} latent channels of `vae`, but takes"
                f" {unet.config.in_channels}: it is made for inpainting or another task."
            )
        if scheduler is not None:
            _check_scheduler(scheduler)
        self.register_modules(
            mask_model=mask_model,
            mask_processor=mask_processor,
            captioner=captioner,
            caption_processor=caption_processor,
        )

    def to_json_string(self) -> str:
        """The pipeline's `model_index.json`, which names the stock class.

        A class that diffusers knows opens the folder everywhere: in plain diffusers without this package, in
        `IEditPipeline.from_pretrained`, and with `custom_pipeline=`. Our own name would fail in the first, and a
        `[module, class]` pair would ask for `trust_remote_code` in the second. Where this pipeline was loaded from is
        left out.
        """
        config = json.loads(super().to_json_string())
        config["_class_name"] = StableDiffusionImg2ImgPipeline.__name__
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ):
        """Save the components and, beside them, the code files that `custom_pipeline=` needs.

        Nothing that is saved names the folder that this pipeline was loaded from.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; it is made if need be.
            safe_serialization, variant, max_shard_size: As in [`DiffusionPipeline.save_pretrained`].
            push_to_hub (`bool`):
                Also upload the pipeline, code files included. A card that is on the Hub stays; without one, an empty
                one is made.
            kwargs: `repo_id` (by default the folder's name), `commit_message`, `private`, `token` and `create_pr` go
                to [`DiffusionPipeline.push_to_hub`], the rest to [`DiffusionPipeline.save_pretrained`].
        """
        hub_names = ("commit_message", "private", "token", "create_pr")
        hub_kwargs = {name: kwargs.pop(name) for name in hub_names if name in kwargs}
        repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        save_kwargs = {"safe_serialization": safe_serialization, "variant": variant}
        super().save_pretrained(save_directory, max_shard_size=max_shard_size, **save_kwargs, **kwargs)
        # What is not there need not be named, and stock pipelines then do not warn of it.
        index = Path(save_directory, "model_index.json")
        config = json.loads(index.read_text())
        own = set(self._optional_components) - set(StableDiffusionImg2ImgPipeline._optional_components)
        if own := {name for name in own if config.get(name) == [None, None]}:
            part = index.with_name(".model_index.json.part")
            kept = {name: value for name, value in config.items() if name not in own}
            part.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
            part.replace(index)
        # safetensors lets only the owner read the weights. They get the mode of any file that is saved.
        for file in Path(save_directory).rglob("*.safetensors"):
            shutil.copymode(index, file)
        for name in CODE_FILES:
            part = Path(save_directory, f".{name}.part")
            shutil.copyfile(Path(__file__).with_name(name), part)
            part.replace(Path(save_directory, name))
        for name in self.components:
            file = Path(save_directory, name, "config.json")
            config = json.loads(file.read_text()) if file.is_file() else {}
            if config.pop("_name_or_path", None):
                part = file.with_name(".config.json.part")
                part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
                part.replace(file)
        if push_to_hub:
            # Uploads a fresh save of this pipeline, so that the code files are part of the one commit.
            self.push_to_hub(repo_id, **save_kwargs, **hub_kwargs)

    def check_inputs(
        self,
        prompt,
        strength,
        num_inference_steps,
        guidance_scale,
        num_images_per_prompt,
        negative_prompt,
        prompt_embeds,
        negative_prompt_embeds,
        ip_adapter_image,
        ip_adapter_image_embeds,
        callback_on_step_end_tensor_inputs,
        mask_image,
        mask_prompt,
        source_prompt,
        output_type,
    ):
        if not isinstance(strength, Real) or not 0 <= strength <= 1:
            raise ValueError(f"`strength` has to be a number in [0, 1], but is {strength!r}.")
        if not isinstance(num_inference_steps, Integral) or num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` has to be a positive integer, but is {num_inference_steps!r}.")
        if not isinstance(num_images_per_prompt, Integral) or num_images_per_prompt < 1:
            raise ValueError(
                f"`num_images_per_prompt` has to be a positive integer, but is {num_images_per_prompt!r}."
            )
        if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` has to be a finite number, but is {guidance_scale!r}.")
        _check_scheduler(self.scheduler)
        _check_texts(
            prompt=prompt, negative_prompt=negative_prompt, mask_prompt=mask_prompt, source_prompt=source_prompt
        )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` has to be 'pil', 'np', 'pt' or 'latent', but is {output_type!r}.")
        super().check_inputs(
            prompt,
            strength,
            None,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            ip_adapter_image,
            ip_adapter_image_embeds,
            callback_on_step_end_tensor_inputs,
        )
        self._check_mask_choice(mask_image, mask_prompt, source_prompt)
        if source_prompt is not None and prompt is None:
            raise ValueError("`source_prompt` is compared with `prompt`, but `prompt_embeds` was passed instead.")

    def _check_mask_choice(self, mask_image, mask_prompt, source_prompt):
        given = {"mask_image": mask_image, "mask_prompt": mask_prompt, "source_prompt": source_prompt}
        given = [f"`{name}`" for name, value in given.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"Pass only one of `mask_image`, `mask_prompt` and `source_prompt`, not {given}.")
        if mask_image is None and given and (self.mask_model is None or self.mask_processor is None):
            raise ValueError(f"{given[0]} needs a mask model, but there is none. Load one with\n{LOAD_MASK_MODEL}")
        if "auto" in _as_list(source_prompt) and (self.captioner is None or self.caption_processor is None):
            raise ValueError(
                f'`source_prompt="auto"` needs a captioner, but there is none. Load one with\n{LOAD_CAPTIONER}'
            )

    def _is_latents(self, image) -> bool:
        # As in the stock pipeline: a tensor with the VAE's number of channels is taken as it is.
        channels = self.vae.config.latent_channels
        return isinstance(image, torch.Tensor) and image.ndim == 4 and image.shape[1] == channels

    def prepare_image(self, image: PipelineImageInput) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Read `image` in any of its forms.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                PIL images of any mode, set upright by their EXIF orientation; arrays (H, W), (H, W, C) or
                (B, H, W, C), tensors (C, H, W) or (B, C, H, W), with 1, 3 or 4 channels, uint8 or floats in [0, 1].

        Returns:
            `tuple`: The pixels, float32 in [0, 1] on the CPU, shape (B, 3, H, W), and B alpha planes (1, H, W) or
            `None`.

        Raises:
            `ValueError` or `TypeError`: For an empty list, NaN, values outside [0, 1], images of different sizes and
            images under 8 pixels a side.
        """
        entries = [pair for entry in _as_list(image) for pair in _read_image(entry)]
        if not entries:
            raise ValueError("`image` is empty; expected at least one image.")
        sizes = {tuple(pixels.shape[1:]) for pixels, _ in entries}
        if len(sizes) > 1:
            listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
            raise ValueError(f"`image` holds images of different sizes ({listed}); edit them one call a size.")
        height, width = sizes.pop()
        if min(height, width) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"`image` has to be at least {MIN_IMAGE_SIZE} pixels a side, but is {width}x{height} pixels."
            )
        # Channels last in memory, as the stock pipeline's preprocessing leaves them, so that both round alike.
        pixels = torch.stack([pixels.permute(1, 2, 0) for pixels, _ in entries]).permute(0, 3, 1, 2)
        return pixels, [alpha for _, alpha in entries]

    def prepare_mask_image(self, mask_image: PipelineImageInput, batch_size: int, size: tuple[int, int]):
        """Read `mask_image` in any of its forms.

        Args:
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                1 (white) = edit. PIL images are set upright by their EXIF orientation and read as grey; arrays and
                tensors are (H, W), (B, H, W), (B, H, W, 1) as numpy or (B, 1, H, W) as torch: bool, uint8 (255 = edit)
                or floats in [0, 1].
            batch_size (`int`): B, how many images there are; one mask serves all of them.
            size (`tuple[int, int]`): Height and width of the images.

        Returns:
            `torch.Tensor`: float32 in [0, 1] on the CPU, shape (B, 1, H, W).

        Raises:
            `ValueError` or `TypeError`: For another size or number than the images', NaN, values outside [0, 1], and a
            mask that is zero everywhere.
        """
        masks = [mask for entry in _as_list(mask_image) for mask in _read_mask(entry)]
        if len(masks) not in (1, batch_size):
            raise ValueError(
                f"`mask_image` holds {len(masks)} masks for {batch_size} images; pass one or {batch_size}."
            )
        for mask in masks:
            if tuple(mask.shape[1:]) != size:
                raise ValueError(
                    f"`mask_image` has to have the image's size, {size[1]}x{size[0]} pixels, but is"
                    f" {mask.shape[2]}x{mask.shape[1]}."
                )
            if not mask.any():
                raise ValueError("`mask_image` is zero everywhere, so nothing would be edited; 1 (white) means edit.")
        return torch.stack(masks).expand(batch_size, -1, -1, -1)

    def _caption(self, images: list[Image.Image]) -> list[str]:
        inputs = self.caption_processor(images=images, return_tensors="pt").to(self._execution_device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.captioner.dtype)
        token_ids = self.captioner.generate(**inputs, max_new_tokens=30)
        return self.caption_processor.batch_decode(token_ids, skip_special_tokens=True)

    def _predict_mask(self, pixels, prompt, mask_prompt, source_prompt, mask_threshold) -> torch.Tensor:
        if not 0 <= mask_threshold < 1:
            raise ValueError(f"`mask_threshold` has to be a probability in [0, 1), but is {mask_threshold!r}.")
        images = self.image_processor.numpy_to_pil(self.image_processor.pt_to_numpy(pixels))
        if mask_prompt is not None:
            terms = self._expand(mask_prompt, len(images), "mask_prompt")
        else:
            captions = self._expand(source_prompt, len(images), "source_prompt")
            if "auto" in captions:
                automatic = self._caption(images)
                captions = [
                    auto if given == "auto" else given for given, auto in zip(captions, automatic, strict=True)
                ]
            prompts = self._expand(prompt, len(images), "prompt")
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
        probability = segment(self.mask_model, self.mask_processor, images, terms, self._execution_device)
        _check_finite(probability, "`mask_model` gives", _float16_way_out("mask_model", self.mask_model))
        mask = (probability > mask_threshold).float()
        for index, term in enumerate(terms):
            if not mask[index].any():
                raise ValueError(
                    f"The predicted mask is empty: nothing in image {index} looks like {term!r} with a probability"
                    f" above `mask_threshold` {mask_threshold} (the highest is {probability[index].max():.3f})."
                )
        return mask

    @staticmethod
    def _expand(value, batch_size: int, name: str) -> list:
        values = _as_list(value)
        if len(values) not in (1, batch_size):
            raise ValueError(
                f"`{name}` holds {len(values)} entries for a batch of {batch_size}; pass one or {batch_size}."
            )
        return values * batch_size if len(values) == 1 else values

    @staticmethod
    def _check_pixels(name: str, value, smallest: int):
        if not isinstance(value, Integral) or value < smallest:
            raise ValueError(f"`{name}` has to be an integer of at least {smallest} (pixels), but is {value!r}.")

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
        """The mask that `__call__` would edit with, and nothing else (Sec. 3.4).

        Args:
            image: As in `__call__`, B images.
            prompt (`str` or `list[str]`, *optional*): The edit prompt, needed with `source_prompt`.
            mask_prompt, source_prompt, mask_threshold, mask_dilation, mask_feather: As in `__call__`.
            output_type (`str`): `"pil"`, `"np"` or `"pt"`.

        Returns:
            B masks at image size, 1 (white) = edit: a list of mode "L" images, an array (B, H, W, 1) or a tensor
            (B, 1, H, W) in [0, 1].

        Raises:
            `ValueError`: When neither or both ways are given, no mask model is loaded, or nothing is found.
        """
        if mask_prompt is None and source_prompt is None:
            raise ValueError("Pass `mask_prompt`, or `source_prompt` together with `prompt`.")
        if source_prompt is not None and prompt is None:
            raise ValueError("`source_prompt` is compared with `prompt`, which was not passed.")
        _check_texts(prompt=prompt, mask_prompt=mask_prompt, source_prompt=source_prompt)
        self._check_mask_choice(None, mask_prompt, source_prompt)
        self._check_pixels("mask_dilation", mask_dilation, 0)
        self._check_pixels("mask_feather", mask_feather, 0)
        pixels, _ = self.prepare_image(image)
        mask = self._predict_mask(pixels, prompt, mask_prompt, source_prompt, mask_threshold)
        self.maybe_free_model_hooks()
        return self._output_masks(feather(dilate(mask, mask_dilation), mask_feather), output_type)

    @staticmethod
    def _work_size(size: tuple[int, int], processing_resolution: int | None) -> tuple[int, int]:
        if processing_resolution is None:
            return size
        IEditPipeline._check_pixels("processing_resolution", processing_resolution, MIN_IMAGE_SIZE)
        height, width = (max(round(side * processing_resolution / max(size)), 1) for side in size)
        return height, width

    @staticmethod
    def _resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if tuple(images.shape[-2:]) == tuple(size):
            return images
        return F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)

    def _pad(self, images: torch.Tensor, mode: str) -> torch.Tensor:
        # To the right and below only, so that cropping gives every pixel its own place back.
        height, width = images.shape[-2:]
        return F.pad(images, (0, -width % self.vae_scale_factor, 0, -height % self.vae_scale_factor), mode=mode)

    @staticmethod
    def _set_into_source(images, pixels, mask, is_safe) -> torch.Tensor:
        source = pixels.to(images.device).repeat_interleave(len(images) // len(pixels), dim=0)
        mask = mask.to(images.device)
        blended = torch.where(mask > 0, torch.lerp(source, images, mask), source)
        # What the safety checker blacked out stays black.
        return torch.where(torch.tensor(is_safe, device=images.device)[:, None, None, None], blended, images)

    def _output_images(self, images: torch.Tensor, alphas: list[torch.Tensor | None] | None, output_type: str):
        """`images` (N, 3, H, W) in [0, 1] in the form asked for, each with its source's alpha where there is one."""
        alphas = alphas or [None]
        alphas = [alpha for alpha in alphas for _ in range(len(images) // len(alphas))]
        if output_type != "pil" and any(alpha is not None for alpha in alphas):
            opaque = torch.ones_like(images[0, :1])
            alphas = [opaque if alpha is None else alpha for alpha in alphas]
        with_alpha = [
            image if alpha is None else torch.cat([image, alpha.to(image)])
            for image, alpha in zip(images, alphas, strict=True)
        ]
        if output_type == "pil":
            return [self._postprocess(image[None], "pil")[0] for image in with_alpha]
        return self._postprocess(torch.stack(with_alpha), output_type)

    def _output_masks(self, mask: torch.Tensor, output_type: str):
        return self._postprocess(mask, "pt" if output_type == "latent" else output_type)

    def _postprocess(self, images: torch.Tensor, output_type: str):
        return self.image_processor.postprocess(images, output_type, do_denormalize=[False] * len(images))

    def prepare_source_latents(
        self, image: torch.Tensor, num_images_per_prompt: int, dtype, device, generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """z_1 = E(x_1) and the noise for Eq. 2, drawn in the stock pipeline's order.

        Args:
            image (`torch.Tensor`): (B, 3, H, W) in [-1, 1], or latents (B, 4, h, w), which are taken as they are.
            num_images_per_prompt (`int`): n, how often each image is edited.
            generator (`torch.Generator` or a list of B * n of them, *optional*): With a list, every result is what its
                generator alone would give.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Source latents and noise, both (B * n, 4, h, w).
        """
        # The VAE alone may run in another precision than the rest.
        image = image.to(device=device, dtype=dtype if self._is_latents(image) else self.vae.dtype)
        batch_size = len(image) * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` holds {len(generator)} generators for {batch_size} results; pass one for each."
            )
        if self._is_latents(image):
            latents = image
        elif isinstance(generator, list):
            each: list[torch.Tensor] = []
            for index, entry in enumerate(image.split(1)):
                encoded = self.vae.encode(entry)
                own_generators = generator[index * num_images_per_prompt : (index + 1) * num_images_per_prompt]
                each += [retrieve_latents(encoded, own_generator) for own_generator in own_generators]
            latents = self.vae.config.scaling_factor * torch.cat(each)
        else:
            latents = self.vae.config.scaling_factor * retrieve_latents(self.vae.encode(image), generator)
        if len(latents) < batch_size:
            latents = latents.repeat_interleave(num_images_per_prompt, dim=0)
        latents = latents.to(dtype)
        _check_finite(latents, "The latents of `image` hold", _float16_way_out("vae", self.vae))
        noise = randn_tensor(latents.shape, generator=generator, device=device, dtype=dtype)
        return latents, noise

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        prompt: str | list[str] | None = None,
        mask_image: PipelineImageInput | None = None,
        mask_prompt: str | list[str] | None = None,
        source_prompt: str | list[str] | None = None,
        strength: float = 0.7,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        processing_resolution: int | None = None,
        mask_threshold: float = 0.5,
        mask_dilation: int = 0,
        mask_feather: int = 0,
        keep_background: bool = True,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> IEditPipelineOutput | Any:
        r"""Edit `image` towards `prompt`, inside the mask if one is asked for.

        A batch is a list (or array, or tensor) of B images of one size; every argument that can be a list then holds
        one entry an image, or one for all. One image with a list of B prompts is edited towards each.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                The source x_1, of any size from 8 pixels a side up. PIL images of any mode, set upright by their EXIF
                orientation, their alpha kept and returned; arrays (H, W), (H, W, C) or (B, H, W, C), tensors (C, H, W)
                or (B, C, H, W): uint8 or floats in [0, 1]. A tensor (B, 4, h, w) is taken as scaled VAE latents.
            prompt (`str` or `list[str]`, *optional*):
                The edit prompt y_2: what the picture shows after the edit. Or `prompt_embeds`.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these, *optional*):
                M, at the image's size: 1 (white) = edit; values between blend softly. See `prepare_mask_image`.
            mask_prompt (`str` or `list[str]`, *optional*):
                The term that names the region to edit in the source; CLIPSeg finds it (Sec. 3.4).
            source_prompt (`str` or `list[str]`, *optional*):
                A caption y_1 of the source: the words in which it differs from `prompt` become the mask prompt.
                `"auto"` lets the captioner write it.
            strength (`float`, *optional*, defaults to 0.7):
                How much noise the source gets, in [0, 1]; the paper's sampling ratio (0.6 to 0.8). The last
                `int(num_inference_steps * strength)` steps are run.
            num_inference_steps (`int`, *optional*, defaults to 50): The length of the full noise schedule.
            guidance_scale (`float`, *optional*, defaults to 7.5): Classifier-free guidance; off at 1 or less.
            negative_prompt (`str` or `list[str]`, *optional*): What not to show.
            num_images_per_prompt (`int`, *optional*, defaults to 1):
                Results an image; the paper shows 4. The results of one image are adjacent.
            eta (`float`, *optional*, defaults to 0.0): η of DDIM, ignored by other schedulers.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                The source of noise. With a list, one a result, every result is the one its generator gives alone.
            processing_resolution (`int`, *optional*):
                Pixels. The edit runs on a copy whose longer side has this length, and the edited region is scaled back
                and set into the untouched original. By default the edit runs at the image's own size.
            mask_threshold (`float`, *optional*, defaults to 0.5):
                The CLIPSeg probability, in [0, 1), above which a pixel belongs to the predicted mask.
            mask_dilation (`int`, *optional*, defaults to 0):
                Image pixels by which the mask, given or predicted, is grown first.
            mask_feather (`int`, *optional*, defaults to 0):
                Image pixels over which the edited region fades in, from the mask's edge inwards.
            keep_background (`bool`, *optional*, defaults to `True`):
                Whether to set the edited region into the source's own pixels. `False` returns the plain decode of the
                latents, as in the paper, which `mask_feather` does not concern. It matters only with a mask.
            timesteps (`list[int]`, *optional*): A schedule of one's own, descending.
            sigmas (`list[float]`, *optional*): A schedule of one's own, for schedulers that take sigmas.
            prompt_embeds (`torch.Tensor`, *optional*): Text embeddings (B, L, D) in place of `prompt`.
            negative_prompt_embeds (`torch.Tensor`, *optional*): The same in place of `negative_prompt`.
            ip_adapter_image (`PipelineImageInput`, *optional*): Image prompt for IP-Adapters.
            ip_adapter_image_embeds (`list[torch.Tensor]`, *optional*): Its embeddings, one tensor an IP-Adapter.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`): `False` returns the output's fields as a tuple.
            cross_attention_kwargs (`dict`, *optional*): Passed to the attention processors.
            clip_skip (`int`, *optional*): How many of the text encoder's last layers to skip.
            callback_on_step_end (`Callable`, `PipelineCallback` or `MultiPipelineCallbacks`, *optional*):
                Called after each step as `callback(pipe, step, timestep, callback_kwargs)`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*):
                The tensors in `callback_kwargs`, out of `pipe._callback_tensor_inputs`.

        Returns:
            [`IEditPipelineOutput`], or with `return_dict=False` the tuple `(images, masks, nsfw_content_detected)`.

        Raises:
            `ValueError` or `TypeError`: For arguments that do not fit; the message names the argument, what was
            expected and what came.
            `FloatingPointError`: If an edit comes out as NaN or infinity; the message says where, and what helps.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check inputs
        self.check_inputs(
            prompt,
            strength,
            num_inference_steps,
            guidance_scale,
            num_images_per_prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            ip_adapter_image,
            ip_adapter_image_embeds,
            callback_on_step_end_tensor_inputs,
            mask_image,
            mask_prompt,
            source_prompt,
            output_type,
        )
        self._guidance_scale = guidance_scale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False
        device = self._execution_device

        # 2. Read the source x_1 and settle the batch size B
        if self._is_latents(image):
            if processing_resolution is not None:
                raise ValueError("`processing_resolution` resizes pixels, but `image` holds latents.")
            pixels, alphas, num_images = None, None, len(image)
            height, width = (side * self.vae_scale_factor for side in image.shape[-2:])
        else:
            pixels, alphas = self.prepare_image(image)
            num_images = len(pixels)
            height, width = pixels.shape[-2:]
        num_prompts = len(prompt_embeds) if prompt_embeds is not None else len(_as_list(prompt))
        if num_images != num_prompts and 1 not in (num_images, num_prompts):
            raise ValueError(
                f"`prompt` holds {num_prompts} prompts for {num_images} images; pass one or {num_images}."
            )
        batch_size = max(num_images, num_prompts)
        if prompt is not None:
            prompt = self._expand(prompt, batch_size, "prompt")
        if negative_prompt is not None:
            negative_prompt = self._expand(negative_prompt, batch_size, "negative_prompt")
        if num_prompts < batch_size and prompt_embeds is not None:
            prompt_embeds = prompt_embeds.repeat(batch_size, 1, 1)
            if negative_prompt_embeds is not None:
                negative_prompt_embeds = negative_prompt_embeds.repeat(batch_size, 1, 1)
        if num_images < batch_size and pixels is not None and alphas is not None:
            pixels, alphas = pixels.expand(batch_size, -1, -1, -1), alphas * batch_size
        elif num_images < batch_size:
            image = image.expand(batch_size, -1, -1, -1)

        # 3. Find where to edit: M, (B, 1, height, width)
        mask = None
        if mask_image is not None:
            mask = self.prepare_mask_image(mask_image, batch_size, (height, width))
        elif mask_prompt is not None or source_prompt is not None:
            if pixels is None:
                raise ValueError("`image` holds latents, in which no mask can be predicted; pass `mask_image`.")
            mask = self._predict_mask(pixels, prompt, mask_prompt, source_prompt, mask_threshold)
        self._check_pixels("mask_dilation", mask_dilation, 0)
        self._check_pixels("mask_feather", mask_feather, 0)
        if mask is not None:
            mask = dilate(mask, mask_dilation)

        # 4. Encode the edit prompt y_2
        lora_scale = cross_attention_kwargs.get("scale") if cross_attention_kwargs is not None else None
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=lora_scale,
            clip_skip=self.clip_skip,
        )
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        num_results = batch_size * num_images_per_prompt
        added_cond_kwargs = None
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            image_embeds = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image, ip_adapter_image_embeds, device, num_results, self.do_classifier_free_guidance
            )
            added_cond_kwargs = {"image_embeds": image_embeds}

        # 5. Bring source and mask to the size at which the edit runs
        work_size = self._work_size((height, width), processing_resolution)
        native_size = self.unet.config.sample_size * self.vae_scale_factor
        if max(work_size) > 2 * native_size:
            logger.warning(
                f"The edit runs at {work_size[1]}x{work_size[0]} pixels, which takes much memory and is far from the"
                f" {native_size} pixels of the model. Pass `processing_resolution={native_size}` to edit a small copy"
                " and set the result into the original."
            )
        scheduler = self.scheduler
        if mask is not None:
            # A masked copy for this call: the pipeline's own scheduler stays the stock one.
            work_mask = self._pad(F.adaptive_max_pool2d(mask, work_size), mode="constant")
            latent_mask = F.max_pool2d(work_mask, self.vae_scale_factor)
            latent_mask = latent_mask.repeat_interleave(num_images_per_prompt, dim=0)
            scheduler = IEditMaskedScheduler.wrap(self.scheduler, latent_mask)
        if pixels is not None:
            image = self.image_processor.normalize(self._pad(self._resize(pixels, work_size), mode="replicate"))

        # 6. Set timesteps
        timesteps, num_inference_steps = retrieve_timesteps(scheduler, num_inference_steps, device, timesteps, sigmas)
        num_steps = min(int(num_inference_steps * strength), num_inference_steps)
        if num_steps < 1:
            smallest = math.ceil(1e4 / num_inference_steps) / 1e4
            raise ValueError(
                f"`strength` {strength} of `num_inference_steps` {num_inference_steps} would run no step; the smallest"
                f" strength that runs one is {smallest:g}"
                + (f", the smallest step count {math.ceil(1 / strength)}." if strength > 0 else ".")
            )
        first_step = (num_inference_steps - num_steps) * scheduler.order
        timesteps = timesteps[first_step:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first_step)

        # 7. Encode and noise the source: z_1 and z_t (Eq. 2)
        latents, noise = self.prepare_source_latents(
            image, num_images_per_prompt, prompt_embeds.dtype, device, generator
        )
        latents = scheduler.add_noise(latents, noise, scheduler.timesteps[first_step].repeat(num_results))

        # 8. Prepare extra step kwargs and, for distilled models, the guidance embedding
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        timestep_cond = None
        if self.unet.config.time_cond_proj_dim is not None:
            guidance = torch.tensor(self.guidance_scale - 1).repeat(num_results)
            timestep_cond = self.get_guidance_scale_embedding(guidance, self.unet.config.time_cond_proj_dim)
            timestep_cond = timestep_cond.to(device=device, dtype=latents.dtype)

        # 9. Denoise; with a mask, `scheduler.step` ends in Eq. 13
        num_warmup_steps = len(timesteps) - num_steps * scheduler.order
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=num_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                latent_model_input = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
                latent_model_input = scheduler.scale_model_input(latent_model_input, t)
                noise_pred = self.unet(
                    latent_model_input,
                    t,
                    encoder_hidden_states=prompt_embeds,
                    timestep_cond=timestep_cond,
                    cross_attention_kwargs=self.cross_attention_kwargs,
                    added_cond_kwargs=added_cond_kwargs,
                    return_dict=False,
                )[0]
                if self.do_classifier_free_guidance:
                    noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
                    noise_pred = noise_pred_uncond + self.guidance_scale * (noise_pred_text - noise_pred_uncond)
                latents = scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for k in callback_on_step_end_tensor_inputs:
                        callback_kwargs[k] = locals()[k]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)
                    prompt_embeds = callback_outputs.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = callback_outputs.pop("negative_prompt_embeds", negative_prompt_embeds)

                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % scheduler.order == 0):
                    progress_bar.update()

        _check_finite(latents, "The denoised latents hold", _denoising_way_out(scheduler, self.unet, strength))

        # 10. Decode (Eq. 6) and set the edited region into the source's own pixels
        if mask is not None:
            mask = feather(mask, mask_feather).repeat_interleave(num_images_per_prompt, dim=0)
        images, has_nsfw_concept = latents, None
        if output_type != "latent":
            latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
            images = self.vae.decode(latents, return_dict=False, generator=generator)[0]
            _check_finite(images, "The decoded picture holds", _float16_way_out("vae", self.vae))
            images, has_nsfw_concept = self.run_safety_checker(images, device, prompt_embeds.dtype)
            is_safe = [not nsfw for nsfw in has_nsfw_concept or [False] * num_results]
            images = self.image_processor.postprocess(images, "pt", do_denormalize=is_safe)
            images = images[..., : work_size[0], : work_size[1]].float()
            if work_size != (height, width):
                # The large picture is put together on the CPU, so that a GPU holds the small copy alone.
                images = self._resize(images.cpu(), (height, width))
            if mask is not None and keep_background and pixels is not None:
                images = self._set_into_source(images, pixels, mask, is_safe)
        masks = None if mask is None else self._output_masks(mask.to(images.device), output_type)
        if output_type != "latent":
            images = self._output_images(images, alphas, output_type)

        # Offload all models
        self.maybe_free_model_hooks()

        if not return_dict:
            return (images, masks, has_nsfw_concept)
        return IEditPipelineOutput(images=images, masks=masks, nsfw_content_detected=has_nsfw_concept)
