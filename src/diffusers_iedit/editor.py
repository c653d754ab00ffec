"""LocalEditor: the local edit of `IEditPipeline` with whatever pipeline of diffusers a user has."""

import copy
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, _get_task_class
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from PIL import Image, ImageChops
from transformers import (
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
)

from . import mini
from .masking_iedit import MaskFinderMixin, check_finite, expand, feather
from .pipeline import IEditPipeline, IEditPipelineOutput
from .regions_iedit import (
    Cutout,
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


class EditingFamily(NamedTuple):
    """Pipelines that start from noise and see the source as further tokens: they never noise the source's latents.

    Attributes:
        patch (`int`): How many of the VAE's cells a side are one cell of the latents, before they become tokens.
        has_frames (`bool`): Whether the VAE is a video's, with an axis of frames.
        area (`int`, *optional*):
            In pixels; to which the pipeline scales the source that its model sees. Edits of whole pictures run at
            this size, or what the model sees would be elsewhere than what it edits.
    """

    patch: int = 1
    has_frames: bool = False
    area: int | None = None


EDITING_FAMILIES = {
    "FluxKontextPipeline": EditingFamily(),
    "Flux2Pipeline": EditingFamily(patch=2),
    "Flux2KleinPipeline": EditingFamily(patch=2),
    "QwenImageEditPipeline": EditingFamily(has_frames=True, area=1024**2),
    "QwenImageEditPlusPipeline": EditingFamily(has_frames=True, area=1024**2),
    "StableDiffusionInstructPix2PixPipeline": EditingFamily(),
}
"""By class; their `_encode_vae_image`, where they have one, encodes the source. All other pipelines are served that
take `image` and `strength`: these noise the source's latents by their scheduler, which tells all there is to know."""

_SERVED = (
    "an image-to-image pipeline with a VAE and a `strength` (SD, SDXL, SD3, Flux, Chroma, Qwen-Image, Z-Image, Kolors,"
    f" LCM, and with a ControlNet), or one of {', '.join(EDITING_FAMILIES)}"
)

# Settled by the region, or by what comes back.
_OWN_ARGUMENTS = ("height", "width", "max_area", "_auto_resize", "return_dict")

# Of Z-Image, whose configuration does not say.
_USUAL_RESOLUTION = 1024


def _image_to_image_class(class_name: str) -> type[DiffusionPipeline] | None:
    """The class that edits pictures with the models of a pipeline of another class, or None."""
    found = _get_task_class(AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, class_name, throw_error_if_not_exist=False)
    return found if found is not None and found.__name__ != class_name else None


def _call_parameters(cls: type[DiffusionPipeline]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls.__call__).parameters


def _family_of(cls: type[DiffusionPipeline]) -> EditingFamily | None:
    return next((EDITING_FAMILIES[each.__name__] for each in cls.__mro__ if each.__name__ in EDITING_FAMILIES), None)


def _edits_pictures(cls: type[DiffusionPipeline]) -> bool:
    """Whether the editor serves a class, as far as that can be told before its models are loaded."""
    takes, parts = _call_parameters(cls), inspect.signature(cls.__init__).parameters
    starts_from_image = _family_of(cls) is not None or {"image", "strength"} <= takes.keys()
    # What has frames makes videos.
    return (
        starts_from_image and not {"mask_image", "num_frames"} & takes.keys() and {"vae", "scheduler"} <= parts.keys()
    )


def pipeline_class(class_name: str, model: str = "`model`") -> type[DiffusionPipeline]:
    """The class that edits pictures with the models of a folder, by the `_class_name` of its `model_index.json`.

    Args:
        class_name (`str`): As it stands there.
        model (`str`): What the caller calls the model, for the message.

    Raises:
        `ValueError`: If diffusers has none, or none that this editor serves.
    """
    if class_name in EDITING_FAMILIES:
        return getattr(diffusers, class_name)
    found = _get_task_class(AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, class_name, throw_error_if_not_exist=False)
    # The mapping lacks Chroma, whose classes are called as the others are.
    by_name = class_name if "Img2Img" in class_name else class_name.replace("Pipeline", "Img2ImgPipeline")
    for cls in (found, *(getattr(diffusers, name, None) for name in (class_name, by_name))):
        if isinstance(cls, type) and issubclass(cls, DiffusionPipeline) and _edits_pictures(cls):
            return cls
    if libraries := getattr(getattr(diffusers, by_name, None), "_backends", None):
        # What diffusers has in the place of a class that it cannot import, as Kolors' without sentencepiece.
        raise ValueError(f"{model} is a {class_name}, which needs {', '.join(libraries)}: not all are installed.")
    raise ValueError(f"{model} is a {class_name}, which this editor does not serve; expected the models of {_SERVED}.")


def class_for_prompts(index: dict[str, Any], model: str) -> type[DiffusionPipeline]:
    """As `pipeline_class`, of a whole `model_index.json`; what needs a control image beside the prompt is refused."""
    cls = pipeline_class(index["_class_name"], model)
    if "control_image" in _call_parameters(cls):
        raise ValueError(f"{model} is a {cls.__name__}, which needs a `control_image`; `LocalEditor` takes one.")
    return cls


def check_arguments(cls: type[DiffusionPipeline], arguments: Mapping[str, Any]) -> None:
    """Raises for arguments of an edit that a pipeline's class does not take, before any work is done.

    Args:
        cls (`type`): The class.
        arguments (`Mapping`): All that an edit is told beside the editor's own arguments.

    Raises:
        `ValueError` or `TypeError`: The message names argument and class.
    """
    name, takes = cls.__name__, _call_parameters(cls)
    if "strength" in arguments and "strength" not in takes:
        raise ValueError(
            f"`strength` was passed, but {name} has none: it starts from noise, and sees the source beside it."
        )
    for embeds in ("prompt_embeds", "negative_prompt_embeds"):
        pooled = f"{embeds.removesuffix('prompt_embeds')}pooled_prompt_embeds"
        if arguments.get(embeds) is not None and pooled in takes and arguments.get(pooled) is None:
            raise ValueError(f"`{embeds}` was passed without `{pooled}`, which {name} needs beside it.")
    for argument in arguments:
        if argument in _OWN_ARGUMENTS:
            raise TypeError(f"`{argument}` cannot be passed: `LocalEditor` settles it.")
        # Also where a pipeline has `**kwargs`: those are for what is deprecated, and it would pass over a slip.
        if argument not in takes:
            raise TypeError(f"`{argument}` is an argument of neither `LocalEditor` nor {name}.")


def _check_pipeline(pipe) -> None:
    name = type(pipe).__name__
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"`pipe` has to be a loaded pipeline of diffusers, but is {name}.")
    if not _edits_pictures(type(pipe)):
        other = _image_to_image_class(name)
        way_out = f"; load its models as {other.__name__}: `{other.__name__}.from_pipe(pipe)`" if other else ""
        if isinstance(pipe, IEditPipeline):
            way_out = ": it edits locally by itself"
        has_masks = "mask_image" in _call_parameters(type(pipe))
        kind = "has masks of its own" if has_masks else "is not known to edit pictures"
        raise ValueError(f"`pipe` is a {name}, which {kind}{way_out}. Expected {_SERVED}.")
    unet = getattr(pipe, "unet", None)
    channels = pipe.vae.config.get("latent_channels")
    if unet is not None and _family_of(type(pipe)) is None and unet.config.in_channels != channels:
        raise ValueError(
            f"`pipe` has a `unet` that takes {unet.config.in_channels} channels, where its `vae` has {channels}: its"
            " models are made for inpainting or another task."
        )
    # A scheduler that cannot be masked is an error now, not after the mask was found.
    IEditMaskedScheduler.wrap(pipe.scheduler, None)


class LocalEditor(MaskFinderMixin):
    r"""Local edits with any image-to-image or editing pipeline of diffusers: what [`IEditPipeline`] does around its
    model, around the user's own.

    The mask is given or found by words, its surroundings are cut out and edited at the model's own size, Eq. 13 of
    [iEdit](https://huggingface.co/papers/2305.05947) keeps the source outside the mask after every step, and the edit
    is set into the source's own pixels: outside the mask not one byte changes.

    The pipeline is never changed: each edit runs on a shallow copy of it with a masked copy of its scheduler. Its
    LoRAs, IP-Adapters, offloading and quantisation stay what they are.

    Args:
        pipe (`DiffusionPipeline`):
            A loaded pipeline: an image-to-image class (with `image` and `strength`), or an editing class out of
            `EDITING_FAMILIES`.
        mask_model ([`~transformers.CLIPSegForImageSegmentation`], *optional*):
            Finds the mask by words, for instance `CIDAS/clipseg-rd64-refined`.
        mask_processor ([`~transformers.CLIPSegProcessor`], *optional*): The processor of `mask_model`.
        captioner ([`~transformers.BlipForConditionalGeneration`], *optional*):
            Captions the source for `source_prompt="auto"`, for instance `Salesforce/blip-image-captioning-large`.
        caption_processor ([`~transformers.BlipProcessor`], *optional*): The processor of `captioner`.

    Raises:
        `TypeError`: If `pipe` is no pipeline, or its scheduler's class cannot be masked.
        `ValueError`: If `pipe` is none that edits pictures; the message says which class to load instead.

    Example:

    ```py
    >>> import torch
    >>> from diffusers import AutoPipelineForImage2Image
    >>> from diffusers.utils import load_image
    >>> from diffusers_iedit import LocalEditor

    >>> pipe = AutoPipelineForImage2Image.from_pretrained(
    ...     "stabilityai/stable-diffusion-xl-base-1.0", dtype=torch.float16
    ... ).to("cuda")
    >>> editor = LocalEditor(pipe)
    >>> image, mask = load_image("photo.jpg"), load_image("mask.png")
    >>> edited = editor(image, "a blue car", mask_image=mask, padding_mask_crop=64, strength=0.8).images[0]
    ```
    """

    _load_call = "editor = LocalEditor(\n        pipe,"

    def __init__(
        self,
        pipe: DiffusionPipeline,
        mask_model: CLIPSegForImageSegmentation | None = None,
        mask_processor: CLIPSegProcessor | None = None,
        captioner: BlipForConditionalGeneration | None = None,
        caption_processor: BlipProcessor | None = None,
    ):
        _check_pipeline(pipe)
        self.pipe: Any = pipe
        self.mask_model, self.mask_processor = mask_model, mask_processor
        self.captioner, self.caption_processor = captioner, caption_processor
        # Whether a callback interrupted the last edit.
        self._interrupted = False

    @classmethod
    def from_pretrained(cls, model: str | Path, **kwargs) -> "LocalEditor":
        """Load a pipeline, and the editor on it.

        Args:
            model (`str` or `Path`):
                A Hub id or a folder of the models of any pipeline that `pipeline_class` has a class for, or `"mini"`,
                `"mini-base"`, `"mini-sd3"` or `"mini-sd3-iedit"`, which the package ships. If it has a mask model and
                a captioner, as the folders of [`IEditPipeline`] do, these are loaded too.
            kwargs:
                `mask_model`, `mask_processor`, `captioner` and `caption_processor` as for the editor; all others go to
                [`AutoPipelineForImage2Image.from_pretrained`]: `dtype`, `device_map`, `quantization_config`,
                `controlnet`, ... Weights are read from safetensors only.

        Raises:
            `ValueError`: If diffusers has no pipeline that edits pictures with these models.
            `OSError`: If there are no such models.
        """
        from .loading import SHIPPED_PIPELINES, load_pipeline

        names = ("mask_model", "mask_processor", "captioner", "caption_processor")
        finders: dict[str, Any] = {name: kwargs.pop(name) for name in names if name in kwargs}
        if str(model) in SHIPPED_PIPELINES:
            pipe = load_pipeline(DiffusionPipeline, model, "`model`", **kwargs)
            # They know the words of the mini world, whatever edits it.
            source = str(mini.model_path())
            config = DiffusionPipeline.load_config(source)
        else:
            of_hub = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
            where = {name: kwargs[name] for name in of_hub if name in kwargs}
            source = str(model)
            config = DiffusionPipeline.load_config(source, **where)
            loader: Any = pipeline_class(str(dict(config).get("_class_name")))
            if loader.__name__ not in EDITING_FAMILIES and loader in AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.values():
                # It also finds the class that goes with a `controlnet`.
                loader = AutoPipelineForImage2Image
            pipe = loader.from_pretrained(model, use_safetensors=True, **kwargs)
        classes = (CLIPSegForImageSegmentation, CLIPSegProcessor, BlipForConditionalGeneration, BlipProcessor)
        for name, finder in zip(names, classes, strict=True):
            if name not in finders and config.get(name, [None])[0] is not None:
                finders[name] = finder.from_pretrained(source, subfolder=name)
        return cls(pipe, **finders)

    def to(self, *args, **kwargs) -> "LocalEditor":
        """Move the pipeline, the mask model and the captioner, as [`DiffusionPipeline.to`] does."""
        for model in (self.pipe, self.mask_model, self.captioner):
            if model is not None:
                model.to(*args, **kwargs)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the pipeline."""
        return self.pipe.dtype

    @property
    def native_resolution(self) -> int:
        """The side of the square pictures that the model was made for, in pixels."""
        cells = getattr(self.pipe, "default_sample_size", None)
        if cells is None:
            denoiser = getattr(self.pipe, "unet", None) or self.pipe.transformer
            cells = denoiser.config.get("sample_size")
        return _USUAL_RESOLUTION if cells is None else cells * self.pipe.vae_scale_factor

    @property
    def _cell(self) -> int:
        """The side of what one cell of the mask decides on, in pixels."""
        family = _family_of(type(self.pipe))
        return self.pipe.vae_scale_factor * (1 if family is None else family.patch)

    @property
    def _multiple(self) -> int:
        """What the sides of the model's pictures are multiples of, in pixels: transformers see 2 x 2 cells at once."""
        return self.pipe.vae_scale_factor * (2 if hasattr(self.pipe, "transformer") else 1)

    def settled_resolution(self, size: tuple[int, int]) -> int | None:
        """The longer side at which a picture of these two sides is edited whole, if the model wants one.

        Returns:
            `int`: In pixels; None for a model that edits pictures at their own size.
        """
        family = _family_of(type(self.pipe))
        if family is None or family.area is None:
            return None
        height, width = size
        shown = width / height
        # The pipeline rounds the sides of what it shows to 32, which changes the aspect, until they stay.
        for _ in range(4):
            across = math.sqrt(family.area * shown)
            sides = 32 * round(across / shown / 32), 32 * round(across / 32)
            shown = sides[1] / sides[0]
        return math.floor(max(size) * min(sides[0] / height, sides[1] / width))

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        prompt: str | list[str] | None = None,
        mask_image: PipelineImageInput | None = None,
        mask_prompt: str | list[str] | None = None,
        source_prompt: str | list[str] | None = None,
        padding_mask_crop: int | None = None,
        processing_resolution: int | None = None,
        mask_threshold: float = 0.5,
        mask_dilation: int = 0,
        mask_feather: int = 0,
        keep_background: bool = True,
        output_type: str = "pil",
        **pipeline_kwargs,
    ) -> IEditPipelineOutput:
        r"""Edit `image` towards `prompt`, inside the mask if one is asked for.

        A batch is a list (or array, or tensor) of B images of one size, edited one after the other: `prompt`,
        `negative_prompt` and what says where may then be lists of B. With a list of generators, one a result, every
        result is made for itself, and is the one that its generator gives alone.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                The source, of any size from 8 pixels a side up, as [`IEditPipeline`] reads it; no latents.
            prompt (`str` or `list[str]`, *optional*):
                What the picture shows after the edit, or for an instruction model what is to be done. Or pass the
                pipeline's own embeddings, with all that it wants beside them.
            mask_image, mask_prompt, source_prompt, mask_threshold, mask_dilation, mask_feather, keep_background:
                As in [`IEditPipeline`].
            padding_mask_crop (`int`, *optional*):
                Pixels of context around the mask: only this region is edited, at the model's own size. See
                [`IEditPipeline`].
            processing_resolution (`int`, *optional*):
                Pixels; the longer side at which the edit runs. By default the image's own (with
                Qwen-Image-Edit, its pipeline's), and with `padding_mask_crop` the model's.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`.
            pipeline_kwargs:
                Go to the pipeline unread: `strength`, `num_inference_steps`, `guidance_scale`, `generator`,
                `num_images_per_prompt`, `callback_on_step_end`, `control_image`, `ip_adapter_image`, ... What shows
                the source in another form, like a `control_image`, has to show the region that is edited. `height`,
                `width` and `max_area` are settled here.

        Returns:
            [`IEditPipelineOutput`]: The results of one image are adjacent. If a callback sets `_interrupt` on the
            pipeline that it is given, the results whose turn did not come are as the source.

        Raises:
            `ValueError` or `TypeError`: For arguments that do not fit; the message names the argument, what was
            expected and what came. What the pipeline itself raises passes through.
            `FloatingPointError`: If an edit comes out as NaN or infinity.
        """
        # 1. Check inputs
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(
                "`output_type` has to be 'pil', 'np' or 'pt', as an edit is set back in pixels, but is"
                f" {output_type!r}."
            )
        self._check_where(
            prompt,
            mask_image,
            mask_prompt,
            source_prompt,
            mask_dilation,
            mask_feather,
            padding_mask_crop,
            processing_resolution,
        )
        check_arguments(type(self.pipe), pipeline_kwargs)
        self._check_steps(pipeline_kwargs)
        num_results = pipeline_kwargs.get("num_images_per_prompt", 1)
        if isinstance(num_results, bool) or not isinstance(num_results, Integral) or num_results < 1:
            raise ValueError(f"`num_images_per_prompt` has to be a positive integer, but is {num_results!r}.")

        # 2. Read the sources
        photos = read_photos(image)
        if output_type != "pil":
            photos = [replace(photo, pixels=to_unit_range(photo.pixels)) for photo in photos]
        embeds = pipeline_kwargs.get("prompt_embeds")
        num_prompts = len(as_list(prompt)) if embeds is None else len(embeds)
        batch_size = max(len(photos), num_prompts)
        if len(photos) not in (1, batch_size):
            raise ValueError(
                f"`prompt` holds {batch_size} prompts for {len(photos)} images; pass one or {len(photos)}."
            )
        photos = photos * batch_size if len(photos) == 1 else photos
        prompts = expand(prompt, batch_size, "prompt")
        size = photos[0].size
        if padding_mask_crop is None and processing_resolution is None:
            processing_resolution = self.settled_resolution(size)
        generator = pipeline_kwargs.get("generator")
        if isinstance(generator, list) and len(generator) != batch_size * num_results:
            raise ValueError(
                f"`generator` holds {len(generator)} generators for {batch_size * num_results} results; pass one for"
                " each."
            )

        # Also the masks and the pooled ones that go with them.
        embeddings = {
            name: value for name, value in pipeline_kwargs.items() if "prompt_embeds" in name and value is not None
        }
        for name, value in embeddings.items():
            if len(value) not in (1, batch_size):
                raise ValueError(
                    f"`{name}` holds {len(value)} entries for a batch of {batch_size}; pass one or {batch_size}."
                )

        # 3. Find where to edit, and settle which region of each image is edited at which size
        mask = self._masks(
            photos, batch_size, size, prompt, mask_image, mask_prompt, source_prompt, mask_threshold, mask_dilation
        )
        blend = None if mask is None else feather(mask, mask_feather)
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

        # 4. Edit, image by image: pipelines take lists of images for references, or in an order of their own
        pictures: list[torch.Tensor] = []
        flags: list[bool] | None = None
        indices = [index for index in range(batch_size) for _ in range(num_results)]
        interrupted = False
        while len(pictures) < len(indices) and not interrupted:
            index = indices[len(pictures)]
            own = dict(pipeline_kwargs)
            if isinstance(generator, list):
                # Else pipelines encode the source with one generator for all results, and draw the noise with each.
                own |= {"generator": generator[len(pictures)], "num_images_per_prompt": 1}
            for name, value in pipeline_kwargs.items():
                if name == "negative_prompt" and batch_size > 1:
                    own[name] = expand(value, batch_size, name)[index]
                elif name in embeddings and len(value) > 1:
                    own[name] = value[index : index + 1]
            edited, flagged, interrupted = self._edit(cutouts[index], prompts[index], own)
            pictures += edited
            if flagged is not None:
                flags = [*(flags or ()), *flagged]
        if flags is not None:
            flags += [False] * (len(indices) - len(flags))
        pictures += [photos[index].pixels for index in indices[len(pictures) :]]

        # 5. Bring images and masks into the form asked for
        masks = None if blend is None else to_output([blend[index] for index in indices], output_type)
        images = to_output(pictures, output_type, [photos[index] for index in indices])
        self._interrupted = interrupted
        return IEditPipelineOutput(images=images, masks=masks, nsfw_content_detected=flags)

    def _check_steps(self, pipeline_kwargs: dict[str, Any]) -> None:
        """Raises if so little strength of so few steps runs none, where the pipeline does not say so itself."""
        takes = _call_parameters(type(self.pipe))
        # Latent consistency models run all their steps at every strength.
        if "strength" not in takes or "original_inference_steps" in takes or not hasattr(self.pipe, "unet"):
            return
        if any(pipeline_kwargs.get(name) is not None for name in ("timesteps", "sigmas", "denoising_start")):
            return
        steps, strength = (  # type: Any, Any
            pipeline_kwargs.get(name, takes[name].default) for name in ("num_inference_steps", "strength")
        )
        # Of other types, the pipeline says what it thinks.
        are_numbers = isinstance(steps, Integral) and isinstance(strength, Real)
        if are_numbers and 0 <= strength <= 1 and int(steps * strength) < 1:
            raise ValueError(f"`strength` {strength} of `num_inference_steps` {steps} would run no step.")

    def _edit(self, cutout: Cutout, prompt: str | None, pipeline_kwargs: dict[str, Any]):
        """Edit one picture.

        Returns:
            `tuple`: The pictures, like its pixels; whether the safety checker blacked each out, or None without one;
            and whether a callback interrupted the run.
        """
        takes = _call_parameters(type(self.pipe))
        # As the model sees it: pipelines read PIL images alike, and these have 8 bits.
        pixels = (cut_out([cutout.photo], [cutout.region], cutout.size) * 255).round() / 255
        (source,) = to_output([pad_to_multiple(pixels, self._multiple, mode="replicate")[0]], "pil")
        settled = {"width": source.width, "height": source.height, "max_area": source.width * source.height}
        # Flux Kontext would show its model the source at another size.
        settled["_auto_resize"] = False
        # Not the user's pipeline is changed for a call, but a copy, which shares all of its models.
        pipe = copy.copy(self.pipe)
        if cutout.mask is not None:
            mask = cutout.latent_mask(self._cell, self._multiple)[None]
            pipe.scheduler = IEditMaskedScheduler.wrap(self.pipe.scheduler, mask, self._encode(source))
        output = pipe(
            prompt=prompt,
            image=source,
            output_type="pt",
            **{name: value for name, value in settled.items() if name in takes},
            **pipeline_kwargs,
        )
        check_finite(
            output.images, "The edited picture holds", "Try another precision, or fewer `num_inference_steps`."
        )
        flagged = getattr(output, "nsfw_content_detected", None)
        edited = output.images[..., : cutout.size[0], : cutout.size[1]].float().cpu()
        pictures = [
            # What the safety checker blacked out stays black.
            blacked_out(cutout.photo) if flag else cutout.set_back(picture, pixels[0], self._cell, self._multiple)
            for picture, flag in zip(edited, flagged or [False] * len(edited), strict=True)
        ]
        return pictures, flagged, bool(getattr(pipe, "interrupt", False))

    def _encode(self, source: Image.Image) -> torch.Tensor | None:
        """The source's latents as `wrap` takes them, (1, C, h, w), if the pipeline does not tell its scheduler."""
        family = _family_of(type(self.pipe))
        if family is None:
            return None
        pixels = self.pipe.image_processor.preprocess(source, source.height, source.width)
        pixels = pixels.to(self.pipe._execution_device, self.pipe.vae.dtype)
        pixels = pixels[:, :, None] if family.has_frames else pixels
        if not hasattr(self.pipe, "_encode_vae_image"):
            # Also from an `AutoencoderTiny`, which has no distribution.
            encoded = retrieve_latents(self.pipe.vae.encode(pixels), sample_mode="argmax")
            return encoded * self.pipe.vae.config.scaling_factor
        return self.pipe._encode_vae_image(image=pixels, generator=None)

    def apply(self, image: PipelineImageInput, edits: Sequence[dict[str, Any]]) -> IEditPipelineOutput:
        """Several edits of one picture, one after the other: the source of each is the result of the one before.

        Where regions overlap, the later edit edits what the earlier one made, so their order matters. What lies in no
        mask stays the same byte. If a callback interrupts an edit, it is the last.

        Args:
            image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): One picture.
            edits (list of `dict`):
                What `__call__` takes besides `image`, for each edit. `seed` (`int`) stands for a `generator` on the
                CPU with this seed.

        Returns:
            [`IEditPipelineOutput`]: One PIL image, and one mask, the union of all; an edit without a mask may change
            every pixel.

        Raises:
            `ValueError` or `TypeError`: As `__call__`, and for an empty `edits`.
        """
        if isinstance(edits, (str, Mapping)) or not isinstance(edits, Iterable):
            raise TypeError(f"`edits` has to be a list of dicts, but is {type(edits).__name__}.")
        edits = list(edits)
        if not edits:
            raise ValueError("`edits` is empty; expected a dict for each edit.")
        for number, edit in enumerate(edits):
            if not isinstance(edit, dict):
                raise TypeError(f"`edits[{number}]` has to be a dict, but is {type(edit).__name__}.")
            for name in {"output_type", "image"} & edit.keys():
                raise ValueError(f"`edits[{number}]` holds `{name}`, which `apply` settles.")
            if edit.get("num_images_per_prompt", 1) != 1:
                raise ValueError(f"`edits[{number}]` asks for several results, but the next edit needs one.")
            if {"seed", "generator"} <= edit.keys():
                raise ValueError(f"`edits[{number}]` holds both `seed` and `generator`.")
            seed: Any = edit.get("seed", 0)
            is_whole = isinstance(seed, Integral) and not isinstance(seed, bool)
            if not is_whole or not 0 <= seed < 2**63:
                raise ValueError(f"`edits[{number}]` holds the `seed` {seed!r}; expected an integer in [0, 2**63).")
            if not isinstance(edit.get("prompt", ""), str):
                raise TypeError(f"`edits[{number}]` has to hold one `prompt`, a string.")
            theirs = {name: value for name, value in edit.items() if name not in {*_EDIT_ARGUMENTS, "seed"}}
            with _named(f"`edits[{number}]`"):
                check_arguments(type(self.pipe), theirs)
        photos = read_photos(image)
        if len(photos) != 1:
            raise ValueError(f"`image` has to be one picture, but holds {len(photos)}.")

        (result,) = to_output([photos[0].pixels], "pil", photos)
        union = Image.new("L", result.size)
        flags: list[bool] | None = None
        for number, edit in enumerate(edits):
            edit = dict(edit)
            if "seed" in edit:
                edit["generator"] = torch.Generator().manual_seed(edit.pop("seed"))
            with _named(f"`edits[{number}]`"):
                output = self(result, **edit)
            (result,) = output.images
            own = Image.new("L", result.size, 255) if output.masks is None else output.masks[0]
            union = ImageChops.lighter(union, own)
            if output.nsfw_content_detected is not None:
                flags = [any([*(flags or ()), *output.nsfw_content_detected])]
            if self._interrupted:
                break
        return IEditPipelineOutput(images=[result], masks=[union], nsfw_content_detected=flags)


# What an edit is told beside the picture, and what else goes to the pipeline.
_EDIT_ARGUMENTS = frozenset(inspect.signature(LocalEditor.__call__).parameters) - {"self", "pipeline_kwargs"}


@contextmanager
def _named(which: str) -> Iterator[None]:
    """Says in a `ValueError` or `TypeError` of one edit which of several it was."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):
            raise
        raise type(error)(f"{which}: {error}") from error
