"""The methods that an evaluation compares, each through the pipeline that diffusers or this package has for it."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import json
import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers.utils import numpy_to_pil
from PIL import Image

from ..editor import LocalEditor, class_for_prompts
from ..loading import SHIPPED_PIPELINES, load_finder, load_pipeline, read_index
from ..pipeline import IEditPipeline
from .data import Example


DEFAULT_MODEL = "CompVis/stable-diffusion-v1-4"

TRAINING_ARGS = "training_args.json"
"""What a training leaves of its options in the model's folder."""


def find_base(model: str) -> str:
    """What a model was fine-tuned from.

    Args:
        model (`str`): A Hub id, a folder, or `mini`.

    Returns:
        `str`: `mini-base` for `mini`; what `training_args.json` in the model's folder names, as a path that holds here
        if it is a folder; or else `CompVis/stable-diffusion-v1-4`, the paper's.

    Raises:
        ValueError: If the file does not tell.
    """
    if model == "mini":
        return "mini-base"
    file = Path(model) / TRAINING_ARGS
    if not file.is_file():
        return DEFAULT_MODEL
    try:
        trained = json.loads(file.read_text(encoding="utf-8"))
        base, output_dir = trained["model"], Path(trained["output_dir"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not tell from what {model} was trained; `base_model` does.") from error
    if base in SHIPPED_PIPELINES:
        return base
    starts, home = [Path()], str(Path(model).resolve())
    # A relative path is one from where the training ran, and from there the model's folder was `output_dir`.
    if home.endswith(f"{os.sep}{output_dir}"):
        starts.insert(0, Path(home[: -len(str(output_dir))]))
    for start in starts:
        if (start / base).is_dir():
            return str(start / base)
    return base


@dataclass(frozen=True)
class Settings:
    """What all methods are told alike; one that has no use for a setting leaves it alone.

    Args:
        model (`str`): The fine-tuned pipeline: a Hub id, a folder, or `mini`.
        base_model (`str`, *optional*): What it was fine-tuned from, for the methods without fine-tuning; by default
            what [`find_base`] finds.
        instruct_model (`str`, *optional*): An InstructPix2Pix pipeline.
        editor_model (`str`, *optional*): The pipeline of `editor:MODEL` and `editor-m:MODEL`, which name it.
        strength (`float`): In (0, 1].
        guidance_scale (`float`): Of the prompt.
        image_guidance_scale (`float`): Of the image, in InstructPix2Pix.
        num_inference_steps (`int`): At strength 1.
        mask_dilation (`int`): How far a mask grows, in pixels.
        scheduler (`str`, *optional*): A class of diffusers, instead of the model's own.
    """

    model: str = DEFAULT_MODEL
    base_model: str | None = None
    instruct_model: str | None = None
    editor_model: str | None = None
    strength: float = 0.7
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5
    num_inference_steps: int = 50
    mask_dilation: int = 0
    scheduler: str | None = None

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise ValueError(f"`strength` has to be above 0 and at most 1, got {self.strength}.")
        if self.num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` has to be 1 or more, got {self.num_inference_steps}.")
        if self.mask_dilation < 0:
            raise ValueError(f"`mask_dilation` has to be 0 or more, got {self.mask_dilation}.")
        if self.scheduler is not None and not hasattr(diffusers, self.scheduler):
            raise ValueError(f"`scheduler` has to be the name of a class of diffusers, got {self.scheduler!r}.")
        if self.base_model is None:
            object.__setattr__(self, "base_model", find_base(self.model))


class Models:
    """Loads pipelines, each model once.

    Args:
        device (`str` or `torch.device`), dtype (`torch.dtype`): Where the models run, and in which precision.
    """

    def __init__(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        self.device, self.dtype = device, dtype
        self._loaded: dict[str, DiffusionPipeline] = {}
        self._indices: dict[str, dict] = {}
        self._finders: dict[str, dict] = {}

    def load(self, cls: type[DiffusionPipeline], name: str, argument: str = "`model`") -> DiffusionPipeline:
        """As [`~diffusers_iedit.loading.load_pipeline`]: a Hub id, a folder, or what the package ships.

        No safety checker takes part: it would black out pictures, which would then be measured.

        Raises:
            ValueError: If there is no such model, if it is not of this kind, or if it is not all there.
        """
        if name not in self._loaded:
            no_checker: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
            takes = inspect.signature(cls.__init__).parameters
            no_checker = {part: value for part, value in no_checker.items() if part in takes}
            pipe = load_pipeline(cls, name, argument, dtype=self.dtype, **no_checker)
            self._loaded[name] = pipe.to(self.device)
        return self._loaded[name]

    def pipeline(self, cls: type[DiffusionPipeline], name: str, scheduler: str | None = None) -> DiffusionPipeline:
        """A pipeline over the components of a Stable Diffusion, which all pipelines share."""
        components = self.load(IEditPipeline, name).components
        if cls is not IEditPipeline:
            ours = ("mask_model", "mask_processor", "captioner", "caption_processor")
            components = {part: component for part, component in components.items() if part not in ours}
        return _prepare(cls(**components, requires_safety_checker=False), scheduler)

    def editor(self, name: str, scheduler: str | None = None, finds_mask: bool = False) -> LocalEditor:
        """An editor on a pipeline of any family, which shares the models of a Stable Diffusion with all pipelines.

        Raises:
            ValueError: If there is no such model, if it edits no pictures by a prompt, if its scheduler cannot be
                masked, or if it is not all there.
        """
        argument = "The model of `editor`"
        if name not in self._indices:
            self._indices[name] = read_index(name, argument)
        cls = class_for_prompts(self._indices[name], f"{argument} {name!r}")
        if cls is StableDiffusionImg2ImgPipeline:
            self.load(IEditPipeline, name, argument)
            pipe = self.pipeline(cls, name, scheduler)
        else:
            pipe = _prepare(copy.copy(self.load(cls, name, argument)), scheduler)
        if finds_mask and name not in self._finders:
            finders = load_finder("mask_model", name, self._indices[name], argument, self.dtype)
            finders["mask_model"].to(self.device)
            self._finders[name] = finders
        try:
            return LocalEditor(pipe, **self._finders.get(name, {}))
        except TypeError as error:
            raise ValueError(f"{argument} {name!r}: {error}") from error

    def weights_hash(self, name: str) -> str:
        """SHA-256 of the weights of a loaded model's UNet or transformer."""
        content, pipe = hashlib.sha256(), self._loaded[name]
        for values in (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).state_dict().values():
            content.update(values.float().cpu().numpy().tobytes())
        return content.hexdigest()


def _prepare(pipe: DiffusionPipeline, scheduler: str | None) -> DiffusionPipeline:
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Method:
    """One way to edit a picture. A user's own method is a subclass, given to the evaluation as `module:Class`.

    Attributes:
        title (`str`): Its name in the tables.
        given_mask (`bool`): Whether it sees the example's own mask, which no user has by himself.
        uses (`tuple[str, ...]`): Which of the models in [`Settings`] it loads.

    Args:
        models ([`Models`]): Loads pipelines.
    """

    title = "?"
    given_mask = False
    uses: tuple[str, ...] = ()

    def __init__(self, models: Models):
        self.models = models

    def has_strength(self, settings: Settings) -> bool:
        """Whether `strength` makes a difference, so that there are curves of it."""
        return True

    def load(self, settings: Settings) -> None:
        """Loads what it uses, so that a model that is not there is found before any work is done."""
        for use in self.uses:
            name = getattr(settings, use)
            try:
                index = read_index(name, f"`{use}`")
                if "unet" not in index or "text_encoder_2" in index:
                    raise ValueError(
                        f"`{use}` {name!r} is a {index['_class_name']}, by which `methods` edits as editor:{name}."
                    )
                self.models.load(IEditPipeline, name, f"`{use}`")
            except ValueError as error:
                said = Path(settings.model) / TRAINING_ARGS
                if use == "base_model" and said.exists():
                    raise ValueError(f"{error} {said} names it.") from error
                raise

    def __call__(
        self, examples: list[Example], settings: Settings, generators: list[torch.Generator]
    ) -> list[Image.Image]:
        """Edits some pictures.

        Args:
            examples (`list[Example]`): The pictures, of one size, and what is asked for.
            settings ([`Settings`]): With the variant's changes.
            generators (`list[torch.Generator]`): One for each, on the CPU, newly seeded: for an example, all methods
                get the same noise.

        Returns:
            `list[PIL.Image.Image]`: RGB, of the sources' size.
        """
        raise NotImplementedError

    @staticmethod
    def run(
        pipe: DiffusionPipeline | LocalEditor,
        examples: list[Example],
        settings: Settings,
        generators: list[torch.Generator],
        prompt: str = "edit_prompt",
        arguments: tuple[str, ...] = ("strength", "guidance_scale", "num_inference_steps"),
        **others,
    ) -> list[Image.Image]:
        """Calls a pipeline with the pictures, the texts that `prompt` names, and those settings that it takes.

        Raises:
            FloatingPointError: If the result holds NaN or infinity.
        """
        pixels: Any = pipe(
            image=[example.image for example in examples],
            prompt=[getattr(example, prompt) for example in examples],
            generator=generators,
            output_type="np",
            **{name: getattr(settings, name) for name in arguments},
            **others,
        ).images
        if not np.isfinite(pixels).all():
            raise FloatingPointError(
                "the edited image holds NaN or infinity; float32 or bfloat16 may help, or a `scheduler` without"
                " `rescale_betas_zero_snr`."
            )
        # Stock pipelines round sizes down to what the VAE takes.
        size = examples[0].image.size
        return [image if image.size == size else image.resize(size) for image in numpy_to_pil(pixels)]


class SDEdit(Method):
    """SDEdit (https://huggingface.co/papers/2108.01073) with the base: diffusers' image-to-image pipeline."""

    title = "SDEdit"
    uses = ("base_model",)

    def __call__(self, examples, settings, generators):
        pipe = self.models.pipeline(StableDiffusionImg2ImgPipeline, settings.base_model, settings.scheduler)
        return self.run(pipe, examples, settings, generators)


class _MaskedMethod(Method):
    """An edit in the given mask, in the one that CLIPSeg predicts if it is `masked`, or without one."""

    masked = False

    def edit(self, examples, settings, generators, **where) -> list[Image.Image]:
        """As `__call__`, told where to edit."""
        raise NotImplementedError

    def __call__(self, examples, settings, generators):
        if self.given_mask:
            where = {"mask_image": [example.mask for example in examples]}
        elif self.masked and all(example.source_term for example in examples):
            where = {"mask_prompt": [example.source_term for example in examples]}
        elif self.masked and len(examples) > 1:
            pairs = zip(examples, generators, strict=True)
            return [image for example, generator in pairs for image in self([example], settings, [generator])]
        else:
            # Without a term there is nothing that CLIPSeg could be asked for, and the edit goes without a mask.
            where = {}
        if where:
            where["mask_dilation"] = settings.mask_dilation
        return self.edit(examples, settings, generators, **where)


class _IEditMethod(_MaskedMethod):
    """`IEditPipeline` with one of the models and one of the ways to a mask."""

    def edit(self, examples, settings, generators, **where):
        pipe = self.models.pipeline(IEditPipeline, getattr(settings, self.uses[0]), settings.scheduler)
        return self.run(pipe, examples, settings, generators, **where)


class SDEditM(_IEditMethod):
    """SDEdit with the base and Eq. 13 in the mask that CLIPSeg predicts: iEdit-M without its fine-tuning."""

    title = "SDEdit + Eq. 13"
    uses = ("base_model",)
    masked = True


class SDEditGiven(_IEditMethod):
    """SDEdit with the base and Eq. 13 in the given mask."""

    title = "SDEdit + Eq. 13, given mask"
    uses = ("base_model",)
    given_mask = True


class IEdit(_IEditMethod):
    """iEdit without a mask at inference (Sec. 3.3)."""

    title = "iEdit"
    uses = ("model",)


class IEditM(_IEditMethod):
    """iEdit-M: with the mask that CLIPSeg predicts (Sec. 3.4)."""

    title = "iEdit-M"
    uses = ("model",)
    masked = True


class IEditGiven(_IEditMethod):
    """iEdit-M with the given mask."""

    title = "iEdit-M, given mask"
    uses = ("model",)
    given_mask = True


class BlendedDiffusion(Method):
    """Blended Latent Diffusion (https://huggingface.co/papers/2206.02779): inpainting with a 4-channel UNet."""

    title = "Blended Latent Diffusion"
    given_mask = True
    uses = ("base_model",)

    def __call__(self, examples, settings, generators):
        pipe = self.models.pipeline(StableDiffusionInpaintPipeline, settings.base_model, settings.scheduler)
        masks = [example.mask for example in examples]
        width, height = (side // pipe.vae_scale_factor * pipe.vae_scale_factor for side in masks[0].size)
        return self.run(pipe, examples, settings, generators, mask_image=masks, width=width, height=height)


class Inpainting(BlendedDiffusion):
    """The same from pure noise, which forgets what was in the mask: in the place of DALL-E 2."""

    title = "Inpainting from noise"

    def has_strength(self, settings):
        return False

    def __call__(self, examples, settings, generators):
        return super().__call__(examples, replace(settings, strength=1.0), generators)


class InstructPix2Pix(Method):
    """InstructPix2Pix (https://huggingface.co/papers/2211.09800): follows the instruction, and has no strength."""

    title = "InstructPix2Pix"
    uses = ("instruct_model",)

    def has_strength(self, settings):
        return False

    def load(self, settings):
        self.models.load(StableDiffusionInstructPix2PixPipeline, settings.instruct_model, "`instruct_model`")

    def __call__(self, examples, settings, generators):
        pipe = self.models.load(StableDiffusionInstructPix2PixPipeline, settings.instruct_model)
        names = ("guidance_scale", "image_guidance_scale", "num_inference_steps")
        pipe = _prepare(copy.copy(pipe), settings.scheduler)
        return self.run(pipe, examples, settings, generators, prompt="instruction", arguments=names)


class _EditorMethod(_MaskedMethod):
    """`LocalEditor` on a model of any family, which edits at the model's own size, with one of the ways to a mask.

    A model that has a strength is told the edit prompt, any other one the instruction. Settings that its pipeline does
    not take are left out.
    """

    uses = ("editor_model",)

    def _editor(self, settings: Settings) -> LocalEditor:
        return self.models.editor(str(settings.editor_model), settings.scheduler, finds_mask=self.masked)

    def load(self, settings):
        self._editor(settings)

    def has_strength(self, settings):
        return "strength" in inspect.signature(type(self._editor(settings).pipe).__call__).parameters

    def edit(self, examples, settings, generators, **where):
        editor = self._editor(settings)
        takes = inspect.signature(type(editor.pipe).__call__).parameters
        names = ("strength", "guidance_scale", "image_guidance_scale", "num_inference_steps")
        resolution = editor.settled_resolution(examples[0].image.size) or editor.native_resolution
        return self.run(
            editor,
            examples,
            settings,
            generators,
            prompt="edit_prompt" if "strength" in takes else "instruction",
            arguments=tuple(name for name in names if name in takes),
            processing_resolution=resolution,
            **where,
        )


class EditorGiven(_EditorMethod):
    """`LocalEditor` in the given mask."""

    title = "LocalEditor, given mask"
    given_mask = True


class EditorM(_EditorMethod):
    """`LocalEditor` in the mask that CLIPSeg predicts: the model's own, the mini's for what the package ships, or the
    usual one from the Hub.
    """

    title = "LocalEditor"
    masked = True


METHODS = {
    "sdedit": SDEdit,
    "sdedit-m": SDEditM,
    "sdedit-given": SDEditGiven,
    "iedit": IEdit,
    "iedit-m": IEditM,
    "iedit-given": IEditGiven,
    "blended": BlendedDiffusion,
    "inpaint": Inpainting,
    "instruct-pix2pix": InstructPix2Pix,
}

EDITORS = {"editor": EditorGiven, "editor-m": EditorM}
"""Methods that a model is named with: `editor:MODEL`."""


@dataclass(frozen=True)
class Variant:
    """A method with what is set otherwise for it."""

    name: str
    method: str
    method_class: type[Method] = field(repr=False)
    changes: dict
    settings: Settings

    @property
    def title(self) -> str:
        changed = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.changes.items())
        model = f" ({self.settings.editor_model})" if "editor_model" in self.method_class.uses else ""
        return ", ".join(part for part in (self.method_class.title + model, changed) if part)

    @property
    def slug(self) -> str:
        """A name for its folder."""
        plain = re.sub(r"[^\w.-]+", "-", self.name).strip("-.")
        # Names that differ have folders that differ, whatever signs they are made of.
        return plain if plain == self.name else f"{plain[:60]}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"

    @property
    def models(self) -> tuple[str, ...]:
        """The models that it loads."""
        return tuple(getattr(self.settings, use) for use in self.method_class.uses)


def parse_variant(text: str, settings: Settings) -> Variant:
    """A variant from its name: `METHOD`, or `METHOD@SETTING=VALUE@SETTING=VALUE`.

    Args:
        text (`str`): METHOD is one of `METHODS`, one of `EDITORS` with a model, as in `editor:mini-sd3`, or
            `module:Class` for a subclass of [`Method`].
        settings ([`Settings`]): What holds unless the name says otherwise.

    Raises:
        ValueError: If there is no such method or setting, if a value does not fit, or if a model that the method needs
            is not named.
    """
    method, *parts = text.split("@")
    module, _, name = method.partition(":")
    changes = {}
    if module in EDITORS and name:
        method_class: type[Method] = EDITORS[module]
        settings = replace(settings, editor_model=name)
    elif ":" in method and module not in EDITORS:
        try:
            method_class = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"The method {method!r} cannot be imported: {error}") from error
        if not (isinstance(method_class, type) and issubclass(method_class, Method)):
            raise ValueError(f"{method!r} has to be a subclass of diffusers_iedit.evaluation.methods.Method.")
    elif method in METHODS:
        method_class = METHODS[method]
    else:
        known = ", ".join([*METHODS, *(f"{editor}:MODEL" for editor in EDITORS)])
        raise ValueError(f"There is no method {method!r}. There are {known}, and module:Class.")

    kinds: dict[str, type] = {
        field.name: str if field.default is None else type(field.default) for field in fields(Settings)
    }
    for part in parts:
        key, _, value = part.partition("=")
        if key not in kinds:
            raise ValueError(f"{text!r}: there is no setting {key!r}. There are {', '.join(kinds)}.")
        try:
            changes[key] = kinds[key](value)
        except ValueError as error:
            raise ValueError(f"{text!r}: {key} has to be a {kinds[key].__name__}, got {value!r}.") from error
    variant = Variant(text, method, method_class, changes, replace(settings, **changes))
    for use in method_class.uses:
        if getattr(variant.settings, use) is None:
            raise ValueError(f"The method {method!r} needs `{use}`, which was not given.")
    return variant
