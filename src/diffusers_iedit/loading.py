"""Models by name (a Hub id, a folder, or one that the package ships): where they are, and that all of them is there.

The libraries fill up what is missing: weights at random, tokenizers with no words, schedulers with defaults. Whatever
this module hands out is whole. It imports them only where files are read, so that a mistyped name is known at once.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from . import mini


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedTokenizerBase


# The pipelines that the package ships: folder, and the components that lie elsewhere.
SHIPPED_PIPELINES: dict[str, tuple[Path, dict[str, Path]]] = {
    "mini": (mini.model_path(), {}),
    "mini-base": (mini.model_path(), {"unet": mini.base_unet_path()}),
    "mini-sd3": (mini.model_path("sd3"), {}),
    "mini-sd3-iedit": (mini.model_path("sd3"), {"transformer": mini.sd3_iedit_path()}),
}

MASK_MODEL = "CIDAS/clipseg-rd64-refined"
"""What finds masks for a model that has no mask model of its own."""

CAPTIONER = "Salesforce/blip-image-captioning-large"
"""What captions pictures for a model that has no captioner of its own."""

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class _Pretrained(Protocol):
    @classmethod
    def from_pretrained(cls, folder: Path, **options): ...


class HubError(ValueError):
    """A model is neither on the disk nor to be had from the Hub."""


def _one_line(error: Exception) -> str:
    reason = " ".join(str(error).split())
    return reason if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: {reason}"


@contextmanager
def usable(argument: str, name: str | Path, kind: str) -> Iterator[None]:
    """Whatever goes wrong while a model's files are read is the files' fault: the libraries raise nearly anything.

    Args:
        argument (`str`): What the caller calls the model, for the message: "`clip_model`", "--model".
        name (`str` or `Path`): As it was given.
        kind (`str`): What was expected: "VGG-16".

    Raises:
        ValueError: In the place of any error, in one line.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{argument} {str(name)!r} gives no usable {kind}: {_one_line(error)}") from error


def _near(name: str, shipped: Iterable[str]) -> str:
    """The end of a message: what is called nearly so."""
    path = Path(name)
    beside = path.parent.iterdir() if os.access(path.parent, os.R_OK) and os.path.isdir(path.parent) else ()
    files = ("model_index.json", "config.json", "model.safetensors")
    # `os.path`, as what may not be looked into is no error here.
    names = {folder.name: str(folder) for folder in beside if any(os.path.isfile(folder / file) for file in files)}
    names |= {each: each for each in shipped}
    found = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {names[found[0]]!r}?" if found else ""


def find(name: str | Path, argument: str, shipped: Iterable[str]) -> Path | None:
    """The folder of this name, or None for a Hub id and for what the package ships.

    Args:
        name (`str` or `Path`): A Hub id, a folder, or one of `shipped`.
        argument (`str`): As for `usable`.
        shipped (`Iterable[str]`): What the package ships of this kind: "mini".

    Raises:
        ValueError: If it is none of these.
    """
    name = str(name)
    if name in shipped:
        return None
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise ValueError(f"{argument} {name!r} is a file, and has to be a folder or a Hub id.")
    if not _HUB_ID.fullmatch(name):
        takes = ", ".join(["a folder", "a Hub id (OWNER/NAME)", *shipped])
        raise ValueError(
            f"{argument} {name!r}: there is no such folder or model (it takes {takes}){_near(name, shipped)}"
        )
    return None


def find_pipeline(name: str | Path, argument: str) -> Path | None:
    """As `find`, for the folder of a diffusers pipeline; the package ships those of `SHIPPED_PIPELINES`."""
    folder = find(name, argument, SHIPPED_PIPELINES)
    if folder is not None and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{argument} {str(name)!r} is no folder of a diffusers pipeline, as it has no model_index.json"
        )
    return folder


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the libraries log: the errors of this module say it."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    for library, _ in before:
        library.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _from_hub(name: str, argument: str, shipped: Iterable[str], download: Callable[..., str | Path]) -> Path:
    """What `download` makes of a Hub id: the cache's copy where the Hub gives no answer within seconds.

    Raises:
        HubError: If there is no such model, or if it cannot be had.
    """
    from huggingface_hub import constants, model_info
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    answer = None
    try:
        try:
            # Of its own accord the client waits for an answer for ever, and tries each file for half a minute.
            model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except (OSError, HTTPError) as error:
            answer = error
        with _silent():
            return Path(download(name, local_files_only=answer is not None))
    except Exception as error:
        causes = [*_causes(error), *_causes(answer)]

        def is_due_to(*classes: type[Exception]) -> bool:
            return any(isinstance(cause, classes) for cause in causes)

        # Of a gated model the Hub tells everybody that it is there; its error is one of those that are not.
        if is_due_to(GatedRepoError):
            reason = (
                "the Hugging Face Hub gives it only to those who have accepted its licence: accept it on"
                f" {constants.ENDPOINT}/{name}, and log in with `hf auth login`"
            )
        elif is_due_to(RepositoryNotFoundError, HFValidationError):
            reason = "the Hugging Face Hub has no such model, or needs you to log in for it (`hf auth login`)"
        elif isinstance(error, OSError) and error.errno is not None:
            reason = f"the cache cannot be written to ({error.strerror})"
        elif is_due_to(RemoteEntryNotFoundError):
            reason = f"what the Hugging Face Hub has lacks a file that is needed: {_one_line(error)}"
        elif answer is not None or isinstance(error, HTTPError):
            reason = "the Hugging Face Hub cannot be reached and the model is not in the cache"
        else:
            reason = f"what the Hugging Face Hub has cannot be used: {_one_line(error)}"
        near = _near(name, shipped)
        raise HubError(f"{argument} {name!r}: there is no such folder, and {reason}{near}") from error


def read_index(name: str | Path, argument: str) -> dict:
    """The `model_index.json` of a pipeline, which says of what class it and its components are.

    Args:
        name (`str` or `Path`): A Hub id, of which no other file is fetched, a folder, or what the package ships.
        argument (`str`): As for `usable`.

    Raises:
        ValueError: If there is no such pipeline, or if the file does not name its class.
    """
    folder, _ = SHIPPED_PIPELINES.get(str(name), (None, {}))
    if (folder := folder or find_pipeline(name, argument)) is None:

        def download(name: str, **options) -> str:
            from huggingface_hub import hf_hub_download

            return hf_hub_download(name, "model_index.json", **options)

        folder = _from_hub(str(name), argument, SHIPPED_PIPELINES, download).parent
    with usable(argument, name, "pipeline"):
        index = _read_config(folder / "model_index.json")
        if not isinstance(index.get("_class_name"), str):
            raise ValueError("model_index.json names no pipeline of diffusers (`_class_name`)")
    return index


def fetch(name: str | Path, argument: str, shipped: Path | None = None, subfolder: str = "") -> Path:
    """The folder of a model that is no pipeline. Of a Hub id it is a snapshot, named after its commit.

    Args:
        name (`str` or `Path`): A Hub id, a folder, or `mini`. Of a Hub id only safetensors, JSON and text are fetched.
        argument (`str`): As for `usable`.
        shipped (`Path`, *optional*): What `mini` stands for, if the package ships such a model.
        subfolder (`str`): Where in the folder it lies; of a Hub id, no other files are fetched.

    Raises:
        ValueError: If there is no such model, or if it cannot be had.
    """
    names = () if shipped is None else ("mini",)
    if shipped is not None and name in names:
        return shipped
    if (folder := find(name, argument, names)) is not None:
        return folder / subfolder

    def download(name: str, **options) -> str:
        from huggingface_hub import snapshot_download

        # As one snapshot: file by file, transformers tries an unreachable Hub for minutes.
        kinds = ("*.json", "*.txt", "*.safetensors")
        patterns = [f"{subfolder}/{kind}" if subfolder else kind for kind in kinds]
        return snapshot_download(name, allow_patterns=patterns, **options)

    return _from_hub(str(name), argument, names, download) / subfolder


def _read_config(file: Path) -> dict:
    """A JSON object that says something."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.name} is missing") from None
    except ValueError as error:
        raise ValueError(f"{file.name} is no JSON ({error})") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file.name} has to be a JSON object that is not empty")
    return content


def _check_files(folder: Path) -> None:
    """Raises ValueError if a configuration says nothing, or a file of weights is cut off or not as its index says."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*config.json")):
        _read_config(file)
    names = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            # Reads the header, which says how long the file has to be.
            with safe_open(file, framework="pt") as weights:
                names[file.name] = set(weights.keys())
        except SafetensorError as error:
            raise ValueError(f"{file.name} is damaged or cut off ({error})") from error
    # diffusers believes the index of a model in shards. A shard that is not there may be of a variant not asked for.
    for file in sorted(folder.glob("*.safetensors.index*.json")):
        for name, shard in _read_config(file).get("weight_map", {}).items():
            if name not in names.get(shard, {name}):
                raise ValueError(f"{shard} lacks weights that {file.name} says it has, for instance {name}")


def _load_module(cls: type[_Pretrained], folder: Path, **options) -> torch.nn.Module:
    from transformers import PreTrainedModel

    _read_config(folder / "config.json")
    if issubclass(cls, PreTrainedModel):
        # It raises without a name; the report has them.
        options["ignore_mismatched_sizes"] = True
    with _silent():
        model, report = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    for names, fault in (
        (report["missing_keys"], "are missing"),
        ([name for name, *_ in report["mismatched_keys"]], "have another shape than config.json says"),
    ):
        if names:
            raise ValueError(f"{len(names)} of its weights {fault}, for instance {min(names)}")
    return model


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raises ValueError if its files are not there: transformers then makes one that knows no words."""
    _read_config(folder / "tokenizer_config.json")
    # Either the one file of the fast tokenizers, or all that the slow ones have.
    fast = "tokenizer.json"
    slow = sorted({*tokenizer.vocab_files_names.values()} - {fast})
    if not (folder / fast).is_file() and not (slow and all((folder / file).is_file() for file in slow)):
        raise ValueError(
            f"the tokenizer's files are missing: {', or '.join(filter(None, (fast, ' and '.join(slow))))}"
        )


def _load(cls: type[_Pretrained], folder: Path, **options):
    """`cls.from_pretrained`, given that everything is there; `options` are for models alone."""
    import torch
    from transformers import PreTrainedTokenizerBase

    if not folder.is_dir():
        # The libraries would take its path for a Hub id: `model/scheduler`.
        raise ValueError("its folder is missing")
    _check_files(folder)
    if issubclass(cls, torch.nn.Module):
        return _load_module(cls, folder, **options)
    try:
        loaded = cls.from_pretrained(folder)
    except Exception:
        # The libraries do not say which file is damaged.
        for file in (folder / "tokenizer.json", folder / "vocab.json"):
            if file.is_file():
                _read_config(file)
        raise
    tokenizer = getattr(loaded, "tokenizer", loaded)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        _check_tokenizer(tokenizer, folder)
    return loaded


def load(cls: type, name: str | Path, argument: str, shipped: Path | None = None, subfolder: str = "", **options):
    """A model, processor, tokenizer or scheduler of its own folder, from safetensors only, without code from the Hub.

    Args:
        cls (`type`): A class of transformers or diffusers with `from_pretrained`.
        name, argument, shipped, subfolder: As for `fetch`.
        **options: For `from_pretrained` of a model: `dtype`.

    Raises:
        ValueError: If there is no such model, or if it is not all there.
    """
    folder = fetch(name, argument, shipped, subfolder)
    with usable(argument, name, cls.__name__):
        return _load(cls, folder, **options)


def load_finder(part: Literal["mask_model", "captioner"], name: str | Path, index: dict, argument: str, dtype) -> dict:
    """The mask model or the captioner that goes with a pipeline, and its processor.

    Args:
        part (`str`): Which of the two.
        name (`str` or `Path`): The pipeline: a Hub id, a folder, or what the package ships.
        index (`dict`): Its `model_index.json`. What it does not name is the mini's for a pipeline that the package
            ships, and else `MASK_MODEL` or `CAPTIONER` from the Hub.
        argument (`str`): As for `usable`.
        dtype (`torch.dtype`): Of the model.

    Returns:
        `dict`: Both by the names that [`IEditPipeline`] and [`LocalEditor`] have for them.

    Raises:
        ValueError: If they cannot be had, or are not all there.
    """
    import transformers

    processor, model_class, processor_class, usual, title = {
        "mask_model": ("mask_processor", "CLIPSegForImageSegmentation", "CLIPSegProcessor", MASK_MODEL, "mask model"),
        "captioner": ("caption_processor", "BlipForConditionalGeneration", "BlipProcessor", CAPTIONER, "captioner"),
    }[part]
    subfolders: tuple[str, str] = (part, processor)
    if str(name) in SHIPPED_PIPELINES:
        # They know the words of the mini world, whatever edits it.
        name = mini.model_path()
    elif index.get(part, [None])[0] is None:
        name, argument, subfolders = usual, f"the {title}", ("", "")
    return {
        part: load(getattr(transformers, model_class), name, argument, subfolder=subfolders[0], dtype=dtype),
        processor: load(getattr(transformers, processor_class), name, argument, subfolder=subfolders[1]),
    }


def _component_class(library: str, class_name: str) -> type | None:
    """The class of a component in `model_index.json`, or None if it comes from elsewhere than the two libraries."""
    import diffusers
    import transformers

    known = {"diffusers": diffusers, "transformers": transformers}
    # As with the safety checker: a module of `diffusers.pipelines`.
    module = known.get(library) or getattr(diffusers.pipelines, library, None)
    found = getattr(module, class_name, None)
    return found if isinstance(found, type) and hasattr(found, "from_pretrained") else None


def load_pipeline(
    cls: type[DiffusionPipeline],
    name: str | Path,
    argument: str,
    kind: str | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    **components,
) -> DiffusionPipeline:
    """A pipeline of which every component is whole, from safetensors only, without code from the Hub.

    Args:
        cls (`type`): The pipeline's class, or [`DiffusionPipeline`] for that which the folder names.
        name (`str` or `Path`): A Hub id, a folder, `mini`, `mini-base`, from which `mini` was fine-tuned,
            `mini-sd3`, a `StableDiffusion3Img2ImgPipeline`, or `mini-sd3-iedit`, which was fine-tuned from that.
        argument (`str`): As for `usable`.
        kind (`str`, *optional*): What was expected, in the user's words; by default the class's name.
        dtype (`torch.dtype`, *optional*): Of the models.
        variant (`str`, *optional*): Of the weights, for instance "fp16", for those components that have it.
        **components: What the pipeline is to have in the place of its own components, and other arguments of its
            class. A component that is None is neither fetched nor loaded.

    Raises:
        ValueError: If there is no such model, if it is no pipeline of this class, or if it is not all there.
    """
    import diffusers
    import torch

    folder, elsewhere = SHIPPED_PIPELINES.get(str(name), (None, {}))
    folder = folder or find_pipeline(name, argument)
    if folder is None:

        def download(name: str, **options) -> str | Path:
            return cls.download(name, variant=variant, use_safetensors=True, **components, **options)

        folder = _from_hub(str(name), argument, SHIPPED_PIPELINES, download)
    with usable(argument, name, kind or cls.__name__):
        index = _read_config(folder / "model_index.json")
        named = getattr(diffusers, str(index.get("_class_name")), cls)
        expected = inspect.signature(named if cls is diffusers.DiffusionPipeline else cls).parameters
        for part, entry in index.items():
            if part in components or part not in expected or not isinstance(entry, list):
                continue
            if entry[0] is None:
                if part not in cls._optional_components:
                    # As SD3 without its T5, which `from_pretrained` wants to be told of.
                    components[part] = None
                continue
            # What is of another library is left to `from_pretrained`, which refuses it or knows a newer name.
            if (component_class := _component_class(*entry)) is None:
                continue
            files = elsewhere.get(part, folder / part)
            options: dict[str, torch.dtype | str | None] = {}
            if issubclass(component_class, torch.nn.Module):
                options["dtype"] = dtype
                if variant is not None and any(files.glob(f"*.{variant}[.-]*")):
                    options["variant"] = variant
            try:
                components[part] = _load(component_class, files, **options)
            except Exception as error:
                raise ValueError(f"{part}: {_one_line(error)}") from error
        # A class that has no such component would warn that it leaves None aside.
        components = {part: value for part, value in components.items() if value is not None or part in expected}
        # That a stock class leaves mask model and captioner aside is no news where the package ships them.
        with _silent() if str(name) in SHIPPED_PIPELINES else nullcontext():
            return cls.from_pretrained(folder, dtype=dtype, use_safetensors=True, **components)
