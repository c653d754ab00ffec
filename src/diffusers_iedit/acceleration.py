"""What makes an edit faster and leaves it the same edit: precision, layout, few steps, guidance where it helps.

`benchmarks/fast.py` measures each of them on the mini models.
"""

import copy
import math
from numbers import Real
from typing import Any, TypeVar

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.callbacks import PipelineCallback


_Pipeline = TypeVar("_Pipeline")

# Those that guide by a batch of two halves, and whether their models denoise by flow matching, or else predict the
# noise or its velocity. Others are distilled to few steps, or of guidance, or show their model the source.
_GUIDED_PIPELINES = {
    "StableDiffusionImg2ImgPipeline": False,
    "StableDiffusionXLImg2ImgPipeline": False,
    "KolorsImg2ImgPipeline": False,
    "StableDiffusion3Img2ImgPipeline": True,
}

FEW_STEPS: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 3.0}
"""What an edit with `few_steps` takes, chosen by `benchmarks/fast.py`."""


def devices() -> list[str]:
    """The kinds of device that PyTorch finds here, the fastest first."""
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name in is_there if is_there[name]]


def fast_dtype(device: str | torch.device, of_transformer: bool = False) -> torch.dtype:
    """The precision in which models run fastest on a device, and do not overflow.

    Args:
        device (`str` or `torch.device`): Where they run.
        of_transformer (`bool`):
            Whether they are a transformer and its text encoders (SD3, Flux, Qwen-Image ...), some of which overflow
            in float16; a UNet and CLIP do not.

    Returns:
        `torch.dtype`: On CUDA float16, or bfloat16 for transformers; on an x86 CPU with instructions for bfloat16
        (AVX512-BF16 or AMX) that; else float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if of_transformer else torch.float16
    capabilities = torch.cpu.get_capabilities() if kind == "cpu" else {}
    has_bfloat16 = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if has_bfloat16 else torch.float32


def prepare(pipe: _Pipeline, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> _Pipeline:
    """Move a pipeline to its device, in the precision and the memory layout in which it is fastest there.

    The weights of convolutions (UNet, VAE, ControlNet) are laid out as `torch.channels_last`. What an edit keeps
    outside its mask is exact in every precision.

    Args:
        pipe ([`IEditPipeline`], [`LocalEditor`] or `DiffusionPipeline`):
            Is changed. One that is to be offloaded or was quantised is left to diffusers' own methods.
        device (`str` or `torch.device`, *optional*): By default the first of `devices`.
        dtype (`torch.dtype`, *optional*): By default `fast_dtype`'s.

    Returns:
        The same pipeline.
    """
    inner: Any = getattr(pipe, "pipe", pipe)
    device = device or devices()[0]
    dtype = dtype or fast_dtype(device, of_transformer=hasattr(inner, "transformer"))
    # Loaded in this precision, what has to stay in float32 is in float32, and would be cast too.
    pipe.to(*(device,) if inner.dtype == dtype else (device, dtype))  # type: ignore[attr-defined]
    for model in inner.components.values():
        # Of the layouts, that of 4 dimensions has no place for the 5 of a video's convolutions.
        if isinstance(model, torch.nn.Module) and not any(each.ndim == 5 for each in model.parameters()):
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return pipe


def _known_class(pipe) -> str | None:
    return next((each.__name__ for each in type(pipe).__mro__ if each.__name__ in _GUIDED_PIPELINES), None)


def few_steps(pipe: _Pipeline) -> tuple[_Pipeline, dict[str, Any]]:
    """A pipeline that edits in a quarter of the steps, and what its calls take for it.

    Models that predict the noise or its velocity get DPM-Solver++ (2M) with Karras sigmas, and those that match flows
    keep their scheduler, both with `FEW_STEPS`. Where guidance is high, few steps fail: at 7.5, take more of them.

    Args:
        pipe ([`IEditPipeline`], [`LocalEditor`] or `DiffusionPipeline`): Stays as it is.

    Returns:
        `tuple`: A copy that shares all models, and arguments for its calls. Of any other pipeline than Stable
        Diffusion's, SDXL's, Kolors' and Stable Diffusion 3's, and of models that are made for few steps already
        (turbo, LCM): the pipeline itself and no arguments.

    Example:

    ```py
    >>> from diffusers_iedit import IEditPipeline, acceleration, mini

    >>> pipe = acceleration.prepare(IEditPipeline.from_pretrained(mini.model_path()))
    >>> fast, settings = acceleration.few_steps(pipe)
    >>> scene = mini.render(seed=22)
    >>> edited = fast(scene.image, "an orange car and a red cat on green grass", mask_image=scene.mask, **settings)
    ```
    """
    inner: Any = getattr(pipe, "pipe", pipe)
    if (name := _known_class(inner)) is None:
        return pipe, {}
    scheduler = inner.scheduler
    if not _GUIDED_PIPELINES[name]:
        config = scheduler.config
        is_usual = (
            type(scheduler).__name__ in DPMSolverMultistepScheduler._compatibles
            and config.get("prediction_type") in ("epsilon", "v_prediction")
            # Turbo models, and those that start from no signal at all.
            and config.get("timestep_spacing") != "trailing"
            and not config.get("rescale_betas_zero_snr")
            # Of an LCM, guidance is an input.
            and inner.unet.config.time_cond_proj_dim is None
        )
        if not is_usual:
            return pipe, {}
        options = {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True}
        scheduler = DPMSolverMultistepScheduler.from_config(config, **options)
    fast: Any = copy.copy(inner)
    fast.scheduler = scheduler
    if inner is not pipe:
        editor: Any = copy.copy(pipe)
        editor.pipe = fast
        fast = editor
    return fast, dict(FEW_STEPS)


class GuidanceCutoffCallback(PipelineCallback):
    """Classifier-free guidance in the first steps alone: the others cost half, as the model sees one batch, not two.

    For `callback_on_step_end` of [`IEditPipeline`] and the image-to-image pipelines of Stable Diffusion, SDXL, Kolors
    and Stable Diffusion 3, also through [`LocalEditor`]; with any number of images and results, and with IP-Adapters.
    diffusers' own `SDCFGCutoffCallback` keeps the embeddings of one result, and its callback for Stable Diffusion 3
    does not reach the pooled embeddings of the image-to-image pipeline.

    Args:
        share (`float`): Of the steps that are run, in (0, 1]: how many are guided, rounded up.

    Raises:
        `ValueError`: For another `share`; after the first step, for a pipeline that guides in another way.

    Example:

    ```py
    >>> from diffusers_iedit.acceleration import GuidanceCutoffCallback

    >>> edited = pipe(image, prompt, mask_image=mask, callback_on_step_end=GuidanceCutoffCallback(0.5))
    ```
    """

    tensor_inputs: list[str] = []

    def __init__(self, share: float):
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
            raise ValueError(f"`share` has to be a number above 0 and at most 1, but is {share!r}.")
        super().__init__(cutoff_step_ratio=float(share))

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        if _known_class(pipeline) is None:
            raise ValueError(
                f"`GuidanceCutoffCallback` cannot serve {type(pipeline).__name__}: it is for pipelines that guide by a"
                f" batch of two halves, {', '.join(_GUIDED_PIPELINES)}."
            )
        # 0.28 of 25 steps are 7, whatever binary fractions make of it.
        guided = math.ceil(round(self.config.cutoff_step_ratio * pipeline.num_timesteps, 6))
        remaining = pipeline.num_timesteps - 1 - step_index
        if pipeline.do_classifier_free_guidance and remaining and step_index + 1 >= guided:
            pipeline._guidance_scale = 1.0
            _keep_second_half(getattr(pipeline, "unet", None) or pipeline.transformer, remaining)
        return callback_kwargs


def _keep_second_half(denoiser: torch.nn.Module, remaining: int) -> None:
    """For so many calls, of conditions for twice as many latents as there are, a model gets the second half.

    A callback cannot change them all: pipelines take back only some. Any other call stays what it is, so that an edit
    which ends early, interrupted or by an error, leaves nothing behind that matters.
    """

    def second_half(value, both: int):
        if isinstance(value, torch.Tensor):
            return value.chunk(2)[1] if value.ndim > 0 and len(value) == both else value
        if isinstance(value, dict):
            return {name: second_half(each, both) for name, each in value.items()}
        return [second_half(each, both) for each in value] if isinstance(value, list) else value

    def hook(_, args: tuple, kwargs: dict[str, Any]):
        nonlocal remaining
        both = 2 * len(args[0] if args else kwargs["hidden_states"])
        is_own = len(kwargs["encoder_hidden_states"]) == both
        remaining -= 1
        if not is_own or not remaining:
            handle.remove()
        return (args, second_half(kwargs, both)) if is_own else None

    handle = denoiser.register_forward_pre_hook(hook, with_kwargs=True)
