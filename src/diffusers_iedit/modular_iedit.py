"""iEdit for Modular Diffusers: blocks that find a mask by words, confine a pipeline to it and keep the background."""

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from diffusers import ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines import ComponentSpec, InputParam, ModularPipeline, OutputParam, PipelineState
from huggingface_hub import create_repo, file_exists, hf_hub_download
from PIL import Image
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from .masking_iedit import MaskFinderMixin
from .regions_iedit import Cutout, Region, as_list, cut_out, read_masks, read_photos, to_output, to_unit_range
from .scheduling_iedit import IEditMaskedScheduler


# What has to lie beside `modular_config.json`.
CODE_FILES = ("modular_iedit.py", "scheduling_iedit.py", "masking_iedit.py", "regions_iedit.py")

_MASK_MODEL = "CIDAS/clipseg-rd64-refined"
_MASK_IMAGE = "Where to edit: masks of the size of `image`, 1 (white) = edit, one for all images or one for each."

_CARD = """---
license: apache-2.0
library_name: diffusers
tags:
- modular-diffusers
- image-editing
---

# iEdit: local edits with modular image-to-image pipelines

Blocks for [Modular Diffusers](https://huggingface.co/docs/diffusers/modular_diffusers/overview). They find by words
what is to change in an image, and keep the rest: outside of the mask the latents are the source's after every step
(Eq. 13 of [iEdit](https://huggingface.co/papers/2305.05947)), and no pixel changes. They work with the blocks of
Stable Diffusion XL, Stable Diffusion 3, Flux, Qwen-Image and Z-Image. Look at the code before you trust it, and name
the commit that you looked at.

```py
from diffusers import FluxAutoBlocks, ModularPipelineBlocks
from diffusers.utils import load_image

iedit = ModularPipelineBlocks.from_pretrained("OWNER/NAME", revision="COMMIT", trust_remote_code=True)
blocks = iedit.insert_into(FluxAutoBlocks().get_workflow("image2image"))
pipe = blocks.init_pipeline("black-forest-labs/FLUX.1-dev")
pipe.load_components()
image = load_image("photo.png")
edited = pipe(image=image, prompt="a blue car", mask_prompt="car", strength=0.7, output="images")[0]
```

The other ways to say where: `source_prompt`, a caption of the image, of which `prompt` changes some words, or
`mask_image`. The mask model is CLIPSeg, `CIDAS/clipseg-rd64-refined`. The image is edited at the size that the
pipeline has by default, or at `height` x `width`, best of its own aspect, and comes back in its own size.
"""


def _check_upright(image):
    """Raises `ValueError` for pictures that this package and diffusers' blocks would see in two orientations."""
    for entry in as_list(image):
        if isinstance(entry, Image.Image) and (orientation := entry.getexif().get(0x0112, 1)) != 1:
            raise ValueError(
                f"`image` has to stand upright, but has EXIF orientation {orientation}, which diffusers' blocks"
                " ignore: open it with `diffusers.utils.load_image`, or apply `PIL.ImageOps.exif_transpose`."
            )


class _MaskFinder(MaskFinderMixin):
    captioner = caption_processor = None

    def __init__(self, components: ModularPipeline):
        self.mask_model, self.mask_processor = components.mask_model, components.mask_model_processor
        self._device = components._execution_device

    def _device_of(self, model) -> torch.device:
        return self._device


class IEditFindMaskStep(ModularPipelineBlocks):
    """
    Finds where to edit by words (Sec. 3.4 of [iEdit](https://huggingface.co/papers/2305.05947)).

    What `mask_prompt` names is looked for with CLIPSeg, or else the words of `source_prompt`, a caption of the image,
    that `prompt` changes. The block stands anywhere before the mask is used. A `mask_image` that is given stays.

    Components:
        mask_model ([`~transformers.CLIPSegForImageSegmentation`]): By default `CIDAS/clipseg-rd64-refined`.
        mask_model_processor ([`~transformers.CLIPSegProcessor`]):
            Its processor. `mask_processor` is an image processor of diffusers' own inpainting blocks.

    Inputs:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these): B images of one size, upright.
        prompt (`str` or `list[str]`, *optional*): What to make of it; needed with `source_prompt`.
        mask_prompt (`str` or `list[str]`, *optional*): What to edit, for instance "the red car".
        source_prompt (`str` or `list[str]`, *optional*): What is in the image, in the words of `prompt`.
        mask_image (*optional*): A mask, in the place of words.
        mask_threshold (`float`, defaults to 0.5): The probability in [0, 1) above which a pixel is part of the mask.
        mask_dilation (`int`, defaults to 0): By how many pixels the mask is grown.

    Outputs:
        mask_image (`PIL.Image.Image`, or a list of B where `image` holds several):
            Mode "L", at image size, 255 = edit. This is also the input of diffusers' own inpainting blocks.

    Raises:
        `ValueError`: When none or several of `mask_image`, `mask_prompt` and `source_prompt` are given, the components
            are not loaded, or nothing is found.
    """

    @property
    def description(self) -> str:
        return "Finds the region to edit: what `mask_prompt` names, or what `prompt` changes in `source_prompt`."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("mask_model", CLIPSegForImageSegmentation, pretrained_model_name_or_path=_MASK_MODEL),
            ComponentSpec("mask_model_processor", CLIPSegProcessor, pretrained_model_name_or_path=_MASK_MODEL),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam.template("image"),
            InputParam.template("prompt", required=False),
            InputParam("mask_prompt", type_hint=str | list[str], description="What to edit."),
            InputParam("source_prompt", type_hint=str | list[str], description="A caption of `image`."),
            InputParam.template("mask_image", required=False, description=_MASK_IMAGE),
            InputParam(
                "mask_threshold", type_hint=float, default=0.5, description="The least probability, in [0, 1)."
            ),
            InputParam("mask_dilation", type_hint=int, default=0, description="By how many pixels the mask is grown."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("mask_image", type_hint=Image.Image | list[Image.Image], description=_MASK_IMAGE)]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        mask_image, mask_prompt, source_prompt = (
            getattr(block_state, name) for name in ("mask_image", "mask_prompt", "source_prompt")
        )
        if mask_image is None and mask_prompt is None and source_prompt is None:
            raise ValueError("Pass `mask_image`, `mask_prompt`, or `source_prompt` together with `prompt`.")
        if mask_image is not None and (mask_prompt is not None or source_prompt is not None):
            raise ValueError("Pass either `mask_image` or the words to find a mask by, not both.")
        if mask_image is None:
            if components.mask_model is None or components.mask_model_processor is None:
                names = [spec.name for spec in self.expected_components]
                raise ValueError(f"`mask_model` is not loaded: call `pipe.load_components({names})`.")
            if "auto" in as_list(source_prompt):
                raise ValueError('`source_prompt` has to be a caption, but is "auto": this block has no captioner.')
            _check_upright(block_state.image)
            masks = _MaskFinder(components).predict_mask(
                block_state.image,
                prompt=block_state.prompt,
                mask_prompt=mask_prompt,
                source_prompt=source_prompt,
                mask_threshold=block_state.mask_threshold,
                mask_dilation=block_state.mask_dilation,
            )
            block_state.mask_image = masks if len(masks) > 1 else masks[0]
        self.set_block_state(state, block_state)
        return components, state


class IEditMaskSchedulerStep(ModularPipelineBlocks):
    """
    Confines an image-to-image pipeline to a mask, by Eq. 13 of [iEdit](https://huggingface.co/papers/2305.05947).

    The blocks after this one get another pipeline object: one with the same components, but for a masked copy of the
    scheduler (see [`IEditMaskedScheduler`]). So the pipeline that runs them is what it was, whatever happens.

    The block stands between the block that encodes `image` into `image_latents` and those that add noise to them.

    Inputs:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these): B images of one size, upright.
        mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
            Masks of the size of `image`, one for all images or one for each: 1 (white) = edit; soft values blend.
        image_latents (`torch.Tensor`):
            The latents of `image` before they are packed, (B, C, h, w) or (B, C, 1, h, w); only their size is read.

    Raises:
        `ValueError`: For a mask that is empty or of another size, or latents that are packed.
    """

    # `expected_components` names no scheduler: of two blocks that do, diffusers believes the first about its class.

    @property
    def description(self) -> str:
        return "Masks the scheduler for the blocks that follow: outside of `mask_image` the source's latents are kept."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam.template("image"),
            InputParam.template("mask_image", description=_MASK_IMAGE),
            InputParam.template("image_latents"),
        ]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        latents = block_state.image_latents
        if latents.ndim not in (4, 5):
            raise ValueError(
                "`image_latents` has to have shape (B, C, h, w) or (B, C, 1, h, w), but has"
                f" {tuple(latents.shape)}: put this block before those that prepare the denoising."
            )
        _check_upright(block_state.image)
        photos = read_photos(block_state.image)
        mask = read_masks(block_state.mask_image, len(photos), photos[0].size)
        if (mask == mask[:1]).all():
            mask = mask[:1]  # It serves any number of results.
        masked = copy.copy(components)
        # By the size of the latents, since most pipelines pack them before they noise them.
        mask = F.adaptive_max_pool2d(mask, latents.shape[-2:])
        masked.scheduler = IEditMaskedScheduler.wrap(components.scheduler, mask)
        return masked, state


class IEditKeepBackgroundStep(ModularPipelineBlocks):
    """
    Sets the edit into the pixels of the source, so that outside of the mask not one byte changes.

    The block stands at the end. Eq. 13 keeps the latents; what the VAE makes of them is not quite the source.

    Inputs:
        image, mask_image: As for [`IEditMaskSchedulerStep`].
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): What was decoded.
        output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"`, or `"latent"`, where nothing is done.

    Outputs:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): The edited images, of the size of `image`.

    Raises:
        `ValueError`: For several results of each of several images, which pipelines put in different orders.
    """

    @property
    def description(self) -> str:
        return "Sets the edited region into the source's own pixels, at the source's own size."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam.template("image"),
            InputParam.template("mask_image", description=_MASK_IMAGE),
            InputParam("images", required=True, description="The decoded images."),
            InputParam.template("output_type"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("images", description="The edited images, of the size of `image`.")]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        if block_state.output_type != "latent":
            photos, edited = read_photos(block_state.image), read_photos(block_state.images)
            if len(photos) not in (1, len(edited)):
                raise ValueError(
                    f"`images` has to hold one result for each image, but holds {len(edited)} of {len(photos)}."
                )
            masks = read_masks(block_state.mask_image, len(photos), photos[0].size)
            if block_state.output_type != "pil":
                photos = [replace(photo, pixels=to_unit_range(photo.pixels)) for photo in photos]
            photos = photos * (len(edited) // len(photos))
            region, cell = Region(0, 0, *photos[0].size), components.vae_scale_factor
            pictures = []
            for photo, mask, result in zip(photos, masks.expand(len(photos), -1, -1, -1), edited, strict=True):
                # The model saw the pixels as they are: diffusers' blocks take them for sRGB.
                source = replace(photo, icc_profile=None)
                cutout = Cutout(source, region, result.size, mask, blend=mask)
                pixels = cut_out([source], [region], result.size)[0]
                pictures.append(cutout.set_back(to_unit_range(result.pixels[:3]), pixels, cell, cell))
            block_state.images = to_output(pictures, block_state.output_type, photos)
        self.set_block_state(state, block_state)
        return components, state


class IEditBlocks(SequentialPipelineBlocks):
    """
    Makes a local editor of diffusers' modular image-to-image pipelines: Stable Diffusion XL, Stable Diffusion 3, Flux,
    Qwen-Image, Z-Image.

    The blocks are [`IEditFindMaskStep`] and [`IEditMaskSchedulerStep`], to be inserted together or one by one where
    they say; [`~IEditBlocks.insert_into`] does it.

    Example:

    ```py
    >>> from diffusers import ModularPipelineBlocks, StableDiffusionXLAutoBlocks
    >>> from diffusers.utils import load_image

    >>> iedit = ModularPipelineBlocks.from_pretrained("OWNER/NAME", trust_remote_code=True)
    >>> blocks = iedit.insert_into(StableDiffusionXLAutoBlocks().get_workflow("image2image"))
    >>> pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
    >>> pipe.load_components()
    >>> image = load_image("photo.png")
    >>> edited = pipe(image=image, prompt="a blue car", mask_prompt="car", strength=0.7, output="images")[0]
    ```
    """

    block_classes = [IEditFindMaskStep, IEditMaskSchedulerStep]
    block_names = ["find_mask", "mask_scheduler"]

    @property
    def description(self) -> str:
        return "Finds the region to edit by words, and confines the blocks that follow to it."

    def insert_into(self, blocks: SequentialPipelineBlocks) -> SequentialPipelineBlocks:
        """
        Returns a copy of image-to-image blocks that edits inside a mask, and keeps every pixel outside of it.

        Args:
            blocks (`SequentialPipelineBlocks`):
                An image-to-image workflow, such as `StableDiffusionXLAutoBlocks().get_workflow("image2image")`. These
                blocks come after the one that encodes the image, and [`IEditKeepBackgroundStep`] at the end.

        Raises:
            ValueError: If `blocks` encodes no image, uses a `mask_image` itself (inpainting), or starts from pure
                noise (instruction models such as Flux Kontext).
        """
        if "mask_image" in blocks.input_names:
            raise ValueError(
                f"`blocks` has to leave `mask_image` to these blocks, but {type(blocks).__name__} inpaints by it: pass"
                ' its `get_workflow("image2image")`.'
            )
        outputs = [block.intermediate_output_names for block in blocks.sub_blocks.values()]
        encoders = [index for index, names in enumerate(outputs) if "image_latents" in names]
        if not encoders:
            raise ValueError(
                f"`blocks` has to be image-to-image, but no block of {type(blocks).__name__} encodes `image` into"
                " `image_latents`."
            )
        if "strength" not in blocks.input_names:
            raise ValueError(
                f"`blocks` has to be image-to-image, but {type(blocks).__name__} starts from pure noise: it has no"
                " `strength`."
            )
        blocks = copy.deepcopy(blocks)
        blocks.sub_blocks.insert("iedit", copy.deepcopy(self), encoders[0] + 1)
        blocks.sub_blocks["keep_background"] = IEditKeepBackgroundStep()
        return blocks

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Part of `save_pretrained`: saves the code files beside `modular_config.json`."""
        os.makedirs(save_directory, exist_ok=True)
        for name in CODE_FILES:
            part = Path(save_directory, f".{name}.part")
            shutil.copyfile(Path(__file__).with_name(name), part)
            part.replace(Path(save_directory, name))
        super().save_config(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """
        Uploads the blocks with all of their code, in one commit. A card that is on the Hub stays.

        Args:
            repo_id (`str`): The repository, which is made if need be.
            commit_message, private, token, create_pr: As in [`~utils.PushToHubMixin.push_to_hub`].

        Returns:
            `str`: The address of the commit.
        """
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            card = Path(folder, "README.md")
            if file_exists(repo_id, card.name, token=token):
                shutil.copyfile(hf_hub_download(repo_id, card.name, token=token), card)
            else:
                card.write_text(_CARD.replace("OWNER/NAME", repo_id))
            self.save_pretrained(folder)
            return self._upload_folder(
                folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr
            )

    def to_json_file(self, json_file_path: str | os.PathLike):
        part = Path(f"{json_file_path}.part")
        super().to_json_file(part)
        part.replace(json_file_path)
