"""IEditPipeline: an image and a sentence in, the same image with one thing changed out (Sec. 3.4, Eq. 13)."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
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

from .masking_iedit import MaskFinderMixin, check_finite, check_texts, expand, feather, float16_way_out
from .regions_iedit import (
    as_list,
    blacked_out,
    cut_out,
    pad_to_multiple,
    plan_edits,
    read_photos,
    to_output,
    to_unit_range,
)
from .scheduling_iedit import IEditMaskedScheduler


logger = logging.get_logger(__name__)

# What has to lie beside the weights for `custom_pipeline=`; `pipeline.py` is the name diffusers looks for.
CODE_FILES = ("pipeline.py", "scheduling_iedit.py", "masking_iedit.py", "regions_iedit.py")


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


def _check_scheduler(scheduler):
    # Flow matching schedulers have `scale_noise` instead: their straight line to the noise is not what the UNet knows.
    if not hasattr(scheduler, "add_noise"):
        raise TypeError(
            "`scheduler` has to be one for diffusion models, such as DDIMScheduler or EulerDiscreteScheduler, but"
            f" {type(scheduler).__name__} has no `add_noise`: it is for flow matching or another kind of model."
        )


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


def _pick(values, indices: list[int]):
    """Some entries of a list or tensor that has one for each image or result; what serves all of them as it is."""
    if isinstance(values, torch.Tensor):
        return values[indices]
    return [values[index] for index in indices] if isinstance(values, list) else values


class IEditPipeline(MaskFinderMixin, StableDiffusionImg2ImgPipeline):
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

    def _check_edit_inputs(
        self,
        prompt,
        strength,
        num_inference_steps,
        guidance_scale,
        num_images_per_prompt,
        negative_prompt,
        mask_image,
        mask_prompt,
        source_prompt,
        padding_mask_crop,
        processing_resolution,
        mask_dilation,
        mask_feather,
        output_type,
    ):
        """What the stock pipeline's `check_inputs` does not look at."""
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
        check_texts(negative_prompt=negative_prompt)
        self._check_where(
            prompt,
            mask_image,
            mask_prompt,
            source_prompt,
            mask_dilation,
            mask_feather,
            padding_mask_crop,
            processing_resolution,
            output_type,
        )

    def _is_latents(self, image) -> bool:
        # As in the stock pipeline: a tensor with the VAE's number of channels is taken as it is.
        channels = self.vae.config.latent_channels
        return isinstance(image, torch.Tensor) and image.ndim == 4 and image.shape[1] == channels

    def _device_of(self, model) -> torch.device:
        # Of a model that is offloaded, `device` is the CPU.
        return self._execution_device

    def _after_finding(self) -> None:
        self.maybe_free_model_hooks()

    @property
    def native_resolution(self) -> int:
        """The side of the square pictures that the UNet was made for, in pixels."""
        return self.unet.config.sample_size * self.vae_scale_factor

    def get_timesteps(self, num_inference_steps, strength, device):
        """As in the stock pipeline; a strength that would run no step is an error."""
        if int(num_inference_steps * strength) < 1:
            smallest = math.ceil(1e4 / num_inference_steps) / 1e4
            raise ValueError(
                f"`strength` {strength} of `num_inference_steps` {num_inference_steps} would run no step; the smallest"
                f" strength that runs one is {smallest:g}"
                + (f", the smallest step count {math.ceil(1 / strength)}." if strength > 0 else ".")
            )
        return super().get_timesteps(num_inference_steps, strength, device)

    def prepare_latents(self, image, timestep, batch_size, num_images_per_prompt, dtype, device, generator=None):
        """z_t of Eq. 2, drawn in the stock pipeline's order.

        The results of one image are adjacent, like those of its prompt, and with a list of generators each result is
        what its generator alone would give: the stock pipeline does neither for several images with several results.

        Args:
            image (`torch.Tensor`): (B, 3, H, W) in [-1, 1], or latents (B, 4, h, w), which are taken as they are.
            timestep (`torch.Tensor`): t, once a result.
            batch_size (`int`): B.
            num_images_per_prompt (`int`): n, how often each image is edited.
            generator (`torch.Generator` or a list of B * n of them, *optional*): The source of noise.

        Returns:
            `torch.Tensor`: (B * n, 4, h, w).
        """
        # The VAE alone may run in another precision than the rest.
        image = image.to(device=device, dtype=dtype if self._is_latents(image) else self.vae.dtype)
        num_results = batch_size * num_images_per_prompt
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
        if len(latents) < num_results:
            latents = latents.repeat_interleave(num_images_per_prompt, dim=0)
        latents = latents.to(dtype)
        check_finite(latents, "The latents of `image` hold", float16_way_out("vae", self.vae))
        noise = randn_tensor(latents.shape, generator=generator, device=device, dtype=dtype)
        return self.scheduler.add_noise(latents, noise, timestep)

    def _decode(self, latents: torch.Tensor, generator) -> tuple[torch.Tensor, list[bool]]:
        """Eq. 6: latents -> pictures (N, 3, H, W) in [0, 1], and which of them the safety checker blacked out."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        images = self.vae.decode(scaled, return_dict=False, generator=generator)[0]
        check_finite(images, "The decoded picture holds", float16_way_out("vae", self.vae))
        images, flagged = self.run_safety_checker(images, latents.device, latents.dtype)
        flagged = flagged or [False] * len(images)
        images = self.image_processor.postprocess(images, "pt", do_denormalize=[not flag for flag in flagged])
        return images, flagged

    @contextmanager
    def _masked_scheduler(self, mask: torch.Tensor | None, num_images_per_prompt: int) -> Iterator[None]:
        """While it lasts, the scheduler is a copy that ends its steps in Eq. 13; afterwards it is the one it was."""
        scheduler: Any = self.scheduler  # type: ignore[has-type]
        if mask is not None:
            self.scheduler = IEditMaskedScheduler.wrap(scheduler, mask.repeat_interleave(num_images_per_prompt, 0))
        try:
            yield
        finally:
            self.scheduler = scheduler

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
        padding_mask_crop: int | None = None,
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
                M, at the image's size: 1 (white) = edit; values between blend softly. Of a PIL
                image with transparency, what is painted is the mask; else it is read as grey.
            mask_prompt (`str` or `list[str]`, *optional*):
                The term that names the region to edit in the source; CLIPSeg finds it (Sec. 3.4), even if it is small
                in a large image: see `masking_iedit.search`.
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
            padding_mask_crop (`int`, *optional*):
                Pixels of context around the mask. Only this region is edited, at the model's own size, and it is set
                into the untouched original: for a small thing in a large picture. The mask's bounding box with so much
                context is grown to a square, or where none fits to the picture's aspect; every image of a batch has a
                region of its own. By default the whole image is edited.
            processing_resolution (`int`, *optional*):
                Pixels. The edit runs on a copy whose longer side has this length, and the edited region is scaled back
                and set into the untouched original. By default the edit runs at the image's own size, and with
                `padding_mask_crop` at the model's.
            mask_threshold (`float`, *optional*, defaults to 0.5):
                The CLIPSeg probability, in [0, 1), above which a pixel belongs to the predicted mask.
            mask_dilation (`int`, *optional*, defaults to 0):
                Image pixels by which the mask, given or predicted, is grown first.
            mask_feather (`int`, *optional*, defaults to 0):
                Image pixels over which the edited region fades in, from the mask's edge inwards.
            keep_background (`bool`, *optional*, defaults to `True`):
                Whether to set the edit into the source's own pixels along the mask, its colours brought to theirs.
                `False` returns the plain decode of the latents, as in the paper, which `mask_feather` does not concern
                (with `padding_mask_crop`, of the region). It matters only with a mask.
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
                Called after each step as `callback(pipe, step, timestep, callback_kwargs)`. As in the stock pipeline,
                `pipe._interrupt = True` skips all further steps, and the latents are decoded as they are. Images whose
                edit has not begun, since their regions differ in shape, come back as they are.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*):
                The tensors in `callback_kwargs`, out of `pipe._callback_tensor_inputs`.

        Returns:
            [`IEditPipelineOutput`], or with `return_dict=False` the tuple `(images, masks, nsfw_content_detected)`.

        Raises:
            `ValueError` or `TypeError`: For arguments that do not fit; the message names the argument, what was
            expected and what came.
            `FloatingPointError`: If an edit comes out as NaN or infinity; the message says where, and what helps.
        """
        # 1. Check inputs
        self._check_edit_inputs(
            prompt,
            strength,
            num_inference_steps,
            guidance_scale,
            num_images_per_prompt,
            negative_prompt,
            mask_image,
            mask_prompt,
            source_prompt,
            padding_mask_crop,
            processing_resolution,
            mask_dilation,
            mask_feather,
            output_type,
        )

        # 2. Read the source x_1 and settle the batch size B
        photos = None
        if self._is_latents(image):
            for name, value in (
                ("processing_resolution", processing_resolution),
                ("padding_mask_crop", padding_mask_crop),
            ):
                if value is not None:
                    raise ValueError(f"`{name}` concerns pixels, but `image` holds latents.")
            num_images, size = len(image), tuple(side * self.vae_scale_factor for side in image.shape[-2:])
        else:
            photos = read_photos(image)
            num_images, size = len(photos), photos[0].size
            if output_type != "pil":
                photos = [replace(photo, pixels=to_unit_range(photo.pixels)) for photo in photos]
        num_prompts = len(prompt_embeds) if prompt_embeds is not None else len(as_list(prompt))
        if num_images != num_prompts and 1 not in (num_images, num_prompts):
            raise ValueError(
                f"`prompt` holds {num_prompts} prompts for {num_images} images; pass one or {num_images}."
            )
        batch_size = max(num_images, num_prompts)
        num_results = batch_size * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != num_results:
            raise ValueError(
                f"`generator` holds {len(generator)} generators for {num_results} results; pass one for each."
            )
        if prompt is not None:
            prompt = expand(prompt, batch_size, "prompt")
        if negative_prompt is not None:
            negative_prompt = expand(negative_prompt, batch_size, "negative_prompt")
        if num_prompts < batch_size and prompt_embeds is not None:
            prompt_embeds = prompt_embeds.repeat(batch_size, 1, 1)
        if negative_prompt_embeds is not None:
            if len(negative_prompt_embeds) not in (1, batch_size):
                raise ValueError(
                    f"`negative_prompt_embeds` holds {len(negative_prompt_embeds)} entries for a batch of"
                    f" {batch_size}; pass one or {batch_size}."
                )
            negative_prompt_embeds = negative_prompt_embeds.expand(batch_size, -1, -1)
        if num_images < batch_size and photos is not None:
            photos = photos * batch_size
        elif num_images < batch_size:
            image = image.expand(batch_size, -1, -1, -1)

        # 3. Find where to edit: M, (B, 1, height, width)
        mask = self._masks(
            photos, batch_size, size, prompt, mask_image, mask_prompt, source_prompt, mask_threshold, mask_dilation
        )
        blend = None if mask is None else feather(mask, mask_feather)

        # 4. Settle which region of each image is edited, and at which size
        cutouts = plan_edits(
            photos,
            mask,
            blend if keep_background else None,
            batch_size,
            size,
            padding_mask_crop,
            processing_resolution,
            self.native_resolution,
        )

        # 5. Edit, in one batch unless regions differ in shape, and set what came into the source's own pixels
        cell = self.vae_scale_factor
        pictures: dict[int, torch.Tensor] = {}
        flags: dict[int, bool] = {}
        for size in dict.fromkeys(cutout.size for cutout in cutouts):
            chosen = [index for index, cutout in enumerate(cutouts) if cutout.size == size]
            results = [n for n in range(num_results) if n // num_images_per_prompt in chosen]
            if photos is not None and pictures and self.interrupt:
                pictures |= {n: photos[n // num_images_per_prompt].pixels.clone() for n in results}
                flags |= dict.fromkeys(results, False)
                continue
            latent_mask = None
            if photos is not None:
                pixels = cut_out(_pick(photos, chosen), [cutouts[index].region for index in chosen], size)
                image = pad_to_multiple(pixels, cell, mode="replicate")
            if mask is not None:
                latent_mask = torch.stack([cutouts[index].latent_mask(cell, cell) for index in chosen])
            with self._masked_scheduler(latent_mask, num_images_per_prompt):
                latents, _ = super().__call__(
                    prompt=_pick(prompt, chosen),
                    image=image,
                    strength=strength,
                    num_inference_steps=num_inference_steps,
                    timesteps=timesteps,
                    sigmas=sigmas,
                    guidance_scale=guidance_scale,
                    negative_prompt=_pick(negative_prompt, chosen),
                    num_images_per_prompt=num_images_per_prompt,
                    eta=eta,
                    generator=_pick(generator, results),
                    prompt_embeds=_pick(prompt_embeds, chosen),
                    negative_prompt_embeds=_pick(negative_prompt_embeds, chosen),
                    ip_adapter_image=ip_adapter_image,
                    ip_adapter_image_embeds=ip_adapter_image_embeds,
                    output_type="latent",
                    return_dict=False,
                    cross_attention_kwargs=cross_attention_kwargs,
                    clip_skip=clip_skip,
                    callback_on_step_end=callback_on_step_end,
                    callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                )
            check_finite(latents, "The denoised latents hold", _denoising_way_out(self.scheduler, self.unet, strength))
            if output_type == "latent":
                images = latents
                break
            edited, flagged = self._decode(latents, _pick(generator, results))
            # On the CPU, so that a GPU holds what the model works on alone.
            edited = edited[..., : size[0], : size[1]].float().cpu()
            for n, picture, flag in zip(results, edited, flagged, strict=True):
                pictures[n], flags[n] = picture, flag
                if photos is not None:
                    index = n // num_images_per_prompt
                    source = pixels[chosen.index(index)]
                    # What the safety checker blacked out stays black.
                    pictures[n] = (
                        blacked_out(photos[index]) if flag else cutouts[index].set_back(picture, source, cell, cell)
                    )

        # 6. Bring images and masks into the form asked for
        self.maybe_free_model_hooks()
        indices = [n // num_images_per_prompt for n in range(num_results)]
        masks = None
        if blend is not None:
            mask_type = "pt" if output_type == "latent" else output_type
            masks = to_output([blend[index] for index in indices], mask_type)
        if output_type != "latent":
            sources = None if photos is None else [photos[index] for index in indices]
            images = to_output([pictures[n] for n in range(num_results)], output_type, sources)
        checked = self.safety_checker is not None and output_type != "latent"
        has_nsfw_concept = [flags[n] for n in range(num_results)] if checked else None

        if not return_dict:
            return (images, masks, has_nsfw_concept)
        return IEditPipelineOutput(images=images, masks=masks, nsfw_content_detected=has_nsfw_concept)
