"""Eq. 13 of iEdit on any image-to-image scheduler of diffusers: edit inside a mask, keep the source outside of it."""

import copy
import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    SchedulerMixin,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from .regions_iedit import as_list, read_mask


MaskInput = torch.Tensor | Image.Image | np.ndarray | list[Image.Image] | list[np.ndarray]

# Schedulers by what gives the noise level at index i of their schedule. A class in none of the lists is refused: a
# source at the wrong level would look almost right.

# alphas_cumprod[timesteps[i]], where the uncounted ones do not keep i, their step index.
UNCOUNTED = (DDIMScheduler, DDIMParallelScheduler, DDPMScheduler, DDPMParallelScheduler, PNDMScheduler)
TIMESTEP_LEVELS = (*UNCOUNTED, LCMScheduler, TCDScheduler)
# sigmas[i], with the noise added to the source.
SIGMA_LEVELS = (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
# sigmas[i], with a straight line between source and noise.
FLOW_LEVELS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
SERVED = (*TIMESTEP_LEVELS, *SIGMA_LEVELS, *FLOW_LEVELS)


def _check_served(scheduler_class: type):
    if not issubclass(scheduler_class, SERVED):
        raise TypeError(
            f"`IEditMaskedScheduler` cannot mask {scheduler_class.__name__}: the noise level its steps arrive at is "
            f"unknown. Use one of {', '.join(sorted(served.__name__ for served in SERVED))}, or a subclass of one."
        )


def _read_mask(mask) -> torch.Tensor:
    """Bring PIL images, numpy arrays and lists of either to shape (B, 1, H, W); anything else stays as it is."""
    entries = as_list(mask)
    if not entries or not all(isinstance(entry, (Image.Image, np.ndarray)) for entry in entries):
        return mask
    planes = [plane for entry in entries for plane in read_mask(entry, "mask")]
    sizes = {tuple(plane.shape[1:]) for plane in planes}
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise ValueError(f"`mask` must hold masks of one size, but they are {listed} pixels.")
    return torch.stack(planes)


def _read_source_latents(source_latents) -> torch.Tensor | None:
    """Source latents of shape (B, C, h, w), where a frame axis of 1 is taken off."""
    if source_latents is None:
        return None
    if not isinstance(source_latents, torch.Tensor) or not source_latents.is_floating_point():
        got = type(source_latents).__name__
        if isinstance(source_latents, torch.Tensor):
            got = f"a tensor of {source_latents.dtype}"
        raise TypeError(f"`source_latents` must be a floating point tensor, but is {got}.")
    latents = _without_frames(source_latents)
    if latents.ndim != 4 or latents.numel() == 0:
        raise ValueError(
            "`source_latents` must have shape (batch_size or 1, channels, height, width), as the model's latents have "
            f"before they are packed, but has shape {tuple(source_latents.shape)}."
        )
    return latents.detach()


def _without_frames(latents: torch.Tensor) -> torch.Tensor:
    """Drops a frame axis of 1, which Qwen-Image's latents have: as second axis in its pipelines, third in its VAE."""
    if latents.ndim == 5 and 1 in latents.shape[1:3]:
        return latents.squeeze(1 if latents.shape[1] == 1 else 2)
    return latents


def _pack(latents: torch.Tensor, side: int) -> torch.Tensor:
    """
    Packs latents (B, C, h, w) into tokens of `side` x `side` cells, (B, h / side * w / side, C * side * side), in the
    order of diffusers' `_pack_latents`.
    """
    return F.pixel_unshuffle(latents, side).flatten(2).transpose(1, 2).contiguous()


def _token_side(height: int, width: int, tokens: int) -> int | None:
    """How many of `height` x `width` latent cells a token has on a side: 1 (Flux.2), 2 (Flux, Qwen-Image) or None."""
    for side in (1, 2):
        if height % side == width % side == 0 and height * width == tokens * side * side:
            return side
    return None


class IEditMaskedScheduler:
    r"""
    Mixin that confines a scheduler's steps to a mask, by Eq. 13 of [iEdit](https://huggingface.co/papers/2305.05947):

    $$\tilde{z}_t = (1 - M) \odot z_t + M \odot \tilde{z}_t$$

    After every `step`, the latents outside the mask are replaced by the source latents $z_t$ at the noise level the
    step arrived at; after the last step, by the clean source latents. Where the mask is exactly 1, and everywhere
    while no mask is set, results are bit for bit those of the scheduler it is mixed into.

    The source and its noise are those of the first `add_noise` (flow matching: `scale_noise`) call after
    `set_timesteps`, which image-to-image pipelines make themselves. Editing pipelines (Flux Kontext, Flux.2,
    Qwen-Image-Edit, InstructPix2Pix) start from noise and never make it: for them, the source is given to
    [`~IEditMaskedScheduler.wrap`] as `source_latents`, and the noise is the first sample given to `step`.

    Latents are maps of shape `(batch_size, channels, height, width)`, or tokens of shape
    `(batch_size, tokens, channels)`, as a pipeline packs them before its first step: 2 x 2 latent cells a token (Flux,
    Chroma, Qwen-Image) or one (Flux.2). Source, noise and mask are packed alike, so that each value of a token is
    blended by the mask of its own cell. Latents of videos are refused.

    Use [`~IEditMaskedScheduler.wrap`] to mask a pipeline's scheduler, or mix it in by hand, before the scheduler:
    `class MaskedEuler(IEditMaskedScheduler, EulerDiscreteScheduler)`.

    Example:

    ```py
    >>> import torch
    >>> from diffusers import AutoPipelineForImage2Image
    >>> from diffusers.utils import load_image
    >>> from diffusers_iedit import IEditMaskedScheduler

    >>> pipe = AutoPipelineForImage2Image.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
    >>> mask = torch.zeros(1, 1, 1024, 1024)
    >>> mask[..., 300:700, 200:800] = 1  # 1 = edit
    >>> pipe.scheduler = IEditMaskedScheduler.wrap(pipe.scheduler, mask)
    >>> image = load_image("photo.png").resize((1024, 1024))
    >>> edited = pipe("a blue car", image=image, strength=0.7).images[0]
    ```
    """

    # What the scheduler has that this is mixed into.
    config: Any
    timesteps: torch.Tensor
    sigmas: torch.Tensor

    _mask: Any = None
    _soft = False
    _source_latents: Any = None
    # Of the present run, as they came: both, or neither.
    _source: Any = None
    _noise: Any = None
    # Source, noise and mask in the form of the run's latents.
    _on_latents: Any = None
    # DDIM, DDPM and PNDM have neither of these, all others have both.
    _begin_index: Any = None
    _step_index: Any = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if IEditMaskedScheduler not in cls.__bases__:
            return
        _check_served(cls)
        # Not plain overrides: pipelines read the signatures of `set_timesteps` and `step` to see what they take.
        cls.set_timesteps = _forget_source(cls.set_timesteps)
        cls.step = _blend_source(cls.step)
        if issubclass(cls, FLOW_LEVELS):
            cls.scale_noise = _capture_source_of_scale_noise(cls.scale_noise)
        else:
            cls.add_noise = _capture_source_of_add_noise(cls.add_noise)

    @staticmethod
    def wrap(
        scheduler: SchedulerMixin, mask: MaskInput | None, source_latents: torch.Tensor | None = None
    ) -> "IEditMaskedScheduler":
        """
        Returns a copy of a scheduler that edits inside a mask only.

        The copy is an instance of `IEditMaskedScheduler` and of the scheduler's own class, under whose name it is
        saved: a pipeline that holds it loads without this package. Mask and source are not saved.

        Args:
            scheduler (`SchedulerMixin`):
                The scheduler to copy; it is left as it is. If it is masked already, the copy has the new mask and
                source.
            mask (`torch.Tensor`, `PIL.Image.Image`, `np.ndarray`, a list of the last two, or `None`):
                See [`~IEditMaskedScheduler.set_mask`].
            source_latents (`torch.Tensor`, *optional*):
                What to keep outside of the mask, for pipelines that start from noise: floating point latents of shape
                `(batch_size or 1, channels, height, width)`, or with a frame axis of 1 beside the channels. They are
                the model's own latents before they are packed into tokens, shifted and scaled as the pipeline does it
                (Flux Kontext: `(latents - shift_factor) * scaling_factor`; Qwen-Image-Edit: minus `latents_mean`, over
                `latents_std`; Flux.2: in 2 x 2 patches, normalised by the VAE's batch norm, so four times the VAE's
                channels). The first sample given to `step`, over the scheduler's `init_noise_sigma` if it has one, is
                taken for pure noise, also where the schedule of a flow-matching scheduler begins below 1, since that
                is what these pipelines start from. Do not give it for pipelines that noise the source themselves
                (image-to-image), which is an error.

        Raises:
            TypeError: If the scheduler's class is not one that can be masked, or `mask` or `source_latents` is of
                another type or dtype.
            ValueError: If `mask` or `source_latents` has a wrong shape, `mask` wrong values, or the scheduler has
                inverted sigmas.
        """
        _check_served(type(scheduler))
        masked = copy.deepcopy(scheduler)
        if not isinstance(scheduler, IEditMaskedScheduler):
            masked.__class__ = _masked_class(scheduler.__class__)
        masked.set_mask(mask)
        masked._source_latents = _read_source_latents(source_latents)
        return masked

    @property
    def mask(self) -> torch.Tensor | None:
        """The mask as a tensor, of shape `(batch_size or 1, 1, height, width)`, or None."""
        return self._mask

    def set_mask(self, mask: MaskInput | None) -> None:
        """
        Sets the region to edit, or with None lets the scheduler edit everything.

        Args:
            mask (`torch.Tensor`, `PIL.Image.Image`, `np.ndarray`, a list of the last two, or `None`):
                A floating point tensor of shape `(batch_size or 1, 1, height, width)` with values in [0, 1], where 1
                means edit. Values in between blend linearly. A mask of another size than the latents is resized so
                that each latent cell gets the largest value it touches: no edited pixel is lost, and a mask of zeros
                and ones stays one. Only where `add_noise` or `scale_noise` is given latents that are packed already,
                as in Modular Diffusers, it must have the size of the latents before packing. PIL images (white = edit)
                and arrays (H, W), (B, H, W) or (B, H, W, 1), bool, uint8 (255 = edit) or floats in [0, 1], are read as
                [`IEditPipeline`] reads its `mask_image`.

        Raises:
            TypeError: If `mask` is of another type or dtype.
            ValueError: If `mask` has a wrong shape or values, or the scheduler has inverted sigmas.
        """
        if mask is not None:
            if getattr(self.config, "invert_sigmas", False):
                raise ValueError(
                    f"`mask` cannot be set on {type(self).__name__} with `invert_sigmas=True`: its schedule ends at "
                    "sigma 1, which `scale_noise` takes for pure noise."
                )
            mask = _read_mask(mask)
            if not isinstance(mask, torch.Tensor) or not mask.is_floating_point():
                got = f"a tensor of {mask.dtype}" if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise TypeError(
                    "`mask` must be a floating point tensor, a PIL image, a numpy array of bool, uint8 or floats, or a"
                    f" list of images or arrays, but is {got}."
                )
            if mask.ndim != 4 or mask.shape[1] != 1 or mask.numel() == 0:
                raise ValueError(
                    f"`mask` must have shape (batch_size or 1, 1, height, width), but has shape {tuple(mask.shape)}."
                )
            low, high = (value.item() for value in mask.aminmax())
            if not (low >= 0 and high <= 1):  # False for NaN, which `aminmax` passes on
                raise ValueError(f"`mask` must have values in [0, 1], but they range from {low} to {high}.")
            self._soft = not ((mask == 0) | (mask == 1)).all().item()
        self._mask = mask
        self._on_latents = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """
        Sets the index of the first timestep that is run, as pipelines do before the first step.

        diffusers' own method, also for DDIM, DDPM and PNDM, which lack it: PNDM repeats a timestep, so that a timestep
        alone does not tell where a run begins.
        """
        self._begin_index = begin_index

    def _arrive(self, timestep):
        """Sets `_step_index` to the index a step from `timestep` arrived at, for schedulers that do not count."""
        index = self._begin_index if self._step_index is None else self._step_index
        if index is None or index >= len(self.timesteps) or self.timesteps[index] != timestep:
            indices = (self.timesteps == timestep).nonzero()
            if len(indices) == 0:
                raise ValueError(
                    f"`timestep` must be one of `timesteps` while a `mask` is set, but is {timestep}: the noise level "
                    "this step arrived at is unknown."
                )
            # The second if it repeats, as in diffusers' `index_for_timestep`.
            index = indices[:2][-1].item()
        self._step_index = index + 1

    def _capture(self, source, noise):
        """Takes the source and its noise from the first noising of a run."""
        if self._source is not None:
            return
        if self._mask is not None and self._source_latents is not None:
            raise ValueError(
                "`source_latents` is for pipelines that start from noise, but this one noises source latents of its "
                f"own, of shape {tuple(source.shape)}: wrap its scheduler without `source_latents`."
            )
        self._source, self._noise = source, noise

    def _start_from(self, sample, timestep):
        """Takes the source that was given, and its noise from the first sample of a run."""
        if self._source_latents is None:
            raise RuntimeError(
                "A `mask` is set, but there are no source latents to keep outside of it. They are taken from the "
                "first `add_noise` (flow matching: `scale_noise`) call after `set_timesteps`: use an image-to-image "
                "pipeline, or make that call with the source latents and noise before the first `step`. For a "
                "pipeline that starts from noise, wrap its scheduler with `source_latents`."
            )
        if timestep != self.timesteps[0]:
            raise ValueError(
                "`source_latents` needs a run from pure noise, which begins at the first of `timesteps`, "
                f"{self.timesteps[0]}, but the first step is at {timestep}."
            )
        self._source, self._noise = self._source_latents, sample / getattr(self, "init_noise_sigma", 1.0)

    def _lay_on(self, sample: torch.Tensor):
        """Brings source, noise and mask to the form of the latents: their device, batch size and packing."""
        source, noise = (_without_frames(latents).to(sample.device) for latents in (self._source, self._noise))
        if sample.ndim not in (3, 4) or source.ndim not in (3, 4):
            raise ValueError(
                "`mask` needs latents of shape (batch_size, channels, height, width), or packed into "
                f"(batch_size, tokens, channels), but they have shape {tuple(sample.shape)}: video latents cannot be "
                "masked."
            )

        # Packed latents do not tell their height and width: those of the source do, or else those of the mask.
        height, width = (self._mask if source.ndim == 3 else source).shape[-2:]
        side = _token_side(height, width, sample.shape[1]) if sample.ndim == 3 else None
        if source.ndim == sample.ndim == 3 and (side is None or sample.shape[2] % side**2):
            raise ValueError(
                f"`mask` must have the height and width of the latents before they were packed to shape "
                f"{tuple(sample.shape)}, 1 or 2 x 2 cells a token, but has shape {tuple(self._mask.shape)}."
            )
        if side is not None:
            source, noise = (_pack(latents, side) if latents.ndim == 4 else latents for latents in (source, noise))
        if source.shape[1:] != sample.shape[1:] or source.shape[0] not in (1, sample.shape[0]):
            name = "`mask`" if self._source_latents is None else "`source_latents`"
            packed = ", packed into tokens of 1 or 2 x 2 cells" if sample.ndim == 3 else ""
            raise ValueError(
                f"{name} needs latents of the source's shape {tuple(self._source.shape)}{packed}, but they have shape "
                f"{tuple(sample.shape)}."
            )
        if self._mask.shape[0] not in (1, sample.shape[0]):
            raise ValueError(
                f"`mask` must have batch size 1 or that of the latents, {sample.shape[0]}, but has "
                f"{self._mask.shape[0]}."
            )

        mask = self._mask.to(sample.device)
        if mask.shape[-2:] != (height, width):
            mask = F.adaptive_max_pool2d(mask, (height, width))
        if side is not None:
            mask = _pack(mask.expand(-1, sample.shape[2] // side**2, -1, -1), side)
        self._on_latents = source.expand(sample.shape), noise, mask

    def _source_at_level(self, source: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """z_t of Eq. 13: the source at the noise level of `_step_index`, the clean source past the last timestep."""
        index = self._step_index
        if index >= len(self.timesteps):
            return source
        if isinstance(self, TIMESTEP_LEVELS):
            return self.add_noise(source, noise, self.timesteps[index : index + 1])

        # `add_noise` is not asked: without a begin index it looks sigmas up by timestep, which Karras sigmas repeat
        # once rounded, and it knows none of the levels halfway between two sigmas that second order schedulers visit.
        sigma = self.sigmas[index]
        if isinstance(self, KDPM2DiscreteScheduler) and not self.state_in_first_order:
            sigma = self.sigmas_interpol[index]
        elif isinstance(self, KDPM2AncestralDiscreteScheduler) and not self.state_in_first_order:
            sigma = self.sigmas_interpol[index - 1]
        elif isinstance(self, DPMSolverSDEScheduler) and not self.state_in_first_order:
            sigma = self.mid_point_sigma

        alpha: float | torch.Tensor = 1.0
        if isinstance(self, FLOW_LEVELS):
            alpha = 1.0 - sigma
        elif hasattr(self, "_sigma_to_alpha_sigma_t"):
            alpha, sigma = self._sigma_to_alpha_sigma_t(sigma)
        return alpha * source + sigma * noise

    def _blend(self, sample: torch.Tensor, clean: bool = False) -> torch.Tensor:
        """Eq. 13 on the latents a step arrived at, or on `clean` ones that it predicts."""
        placed = self._on_latents
        if placed is None or placed[0].shape != sample.shape or placed[0].device != sample.device:
            self._lay_on(sample)
        source, noise, mask = self._on_latents
        if not clean:
            source = self._source_at_level(source, noise)
        source = source.to(sample)
        if self._soft:
            sample = ((1 - mask) * source + mask * sample).to(sample.dtype)
        # Selected rather than multiplied, so that what the model makes of the outside, NaN included, ends here.
        return torch.where(mask == 0, source, sample)


def _forget_source(base_set_timesteps):
    @functools.wraps(base_set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        base_set_timesteps(self, *args, **kwargs)
        self._source = self._noise = self._on_latents = self._begin_index = self._step_index = None

    return set_timesteps


def _capture_source_of_add_noise(base_add_noise):
    @functools.wraps(base_add_noise)
    def add_noise(self, original_samples, noise, timesteps):
        self._capture(original_samples, noise)
        return base_add_noise(self, original_samples, noise, timesteps)

    return add_noise


def _capture_source_of_scale_noise(base_scale_noise):
    @functools.wraps(base_scale_noise)
    def scale_noise(self, sample, timestep, noise=None):
        self._capture(sample, noise)
        return base_scale_noise(self, sample, timestep, noise)

    return scale_noise


def _blend_source(base_step):
    @functools.wraps(base_step)
    def step(self, model_output, timestep, sample, *args, **kwargs):
        if self._mask is None:
            return base_step(self, model_output, timestep, sample, *args, **kwargs)
        if self._source is None:
            self._start_from(sample, timestep)
        output = base_step(self, model_output, timestep, sample, *args, **kwargs)
        if isinstance(self, UNCOUNTED):
            self._arrive(timestep)
        # LCM's own pipeline returns not the latents but what the last step predicts, `denoised`.
        returns_denoised = isinstance(self, LCMScheduler)
        if isinstance(output, tuple):
            latents, *others = output
            if returns_denoised:
                others[0] = self._blend(others[0], clean=True)
            return (self._blend(latents), *others)
        output.prev_sample = self._blend(output.prev_sample)
        if returns_denoised:
            output.denoised = self._blend(output.denoised, clean=True)
        return output

    return step


@functools.cache
def _masked_class(scheduler_class: type) -> type:
    # Under the scheduler's own name and module, which is what `save_pretrained` writes down.
    namespace = {name: getattr(scheduler_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(scheduler_class.__name__, (IEditMaskedScheduler, scheduler_class), namespace)


class IEditMaskedDDIM(IEditMaskedScheduler, DDIMScheduler):
    """
    `DDIMScheduler`, the paper's, that edits inside a mask only; see [`IEditMaskedScheduler`].

    It takes DDIM's configuration, and is `DDIMScheduler` until [`~IEditMaskedScheduler.set_mask`] gives it a mask. In
    a pipeline that is to be saved, prefer [`~IEditMaskedScheduler.wrap`], whose result is saved as a `DDIMScheduler`.
    """
