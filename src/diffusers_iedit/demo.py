"""The page of `iedit demo`: a form for the options of `iedit edit`, with a brush. `cli` settles what they mean."""

import functools
import inspect
import logging
import math
import os
import secrets
import shlex
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageChops, ImageFilter

from . import cli, mini
from .acceleration import few_steps
from .images import open_image
from .loading import SHIPPED_PIPELINES, read_index
from .pipeline import IEditPipeline
from .regions_iedit import Photo, read_photos


if TYPE_CHECKING:
    from .editor import LocalEditor

# Read by gradio as it is imported. Nothing is to be told to its makers, and nothing looked up at theirs.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
try:
    import gradio as gr
except ImportError as error:
    raise cli.UserError('the page needs gradio: pip install "diffusers-iedit[demo]"') from error


logger = logging.getLogger(__name__)

MAX_MEGAPIXELS = 40
"""Of a picture, by default. A larger one is refused by its header."""

MAX_FILE_SIZE = "250mb"
"""Of an upload: what 40 megapixels take without compression, twice."""

KEPT_SECONDS = 3600
"""How long files lie on the disk that were uploaded or made; looked after every `CLEANED_SECONDS`."""

CLEANED_SECONDS = 300

MAX_SESSIONS = 500
"""How many people's pages are remembered; the one that was idle longest is forgotten first."""

MAX_WAITING = 16
"""How many edits, masks and captions may wait for the device. Who comes next is told that it is busy."""

KEPT_MEGAPIXELS = 200
"""How much of a person's earlier pictures is kept for going back."""

# The longer side of what the page shows, in pixels.
PREVIEW_SIDES = (512, 1024)

BY_WORDS, BY_CHANGES, BY_BRUSH, EVERYWHERE = "By words", "By what the prompt changes", "By brush", "Everywhere"

# Of the mask over the picture.
MASK_COLOUR, MASK_OPACITY = (255, 45, 85), 0.55
_BRUSH = (f"rgb{MASK_COLOUR}", MASK_OPACITY)

# Whoever paints means the brush: gradio's editor does not tell of strokes.
CHOOSE_BRUSH = f"""() => document.addEventListener("pointerdown", (event) => {{
    if (event.target.closest("#canvas canvas")) document.querySelector("#where input[value='{BY_BRUSH}']").click();
}})"""

CSS = """
/* Room for the bar that shows how far an edit is. */
#told { min-height: 4rem }
#gallery .grid-wrap { height: auto; min-height: 0 }
"""

# What is asked of every edit, and what else may be, by the names of the command's options.
SETTINGS = (
    "strength",
    "steps",
    "guidance-scale",
    "negative-prompt",
    "seed",
    "mask-threshold",
    "mask-dilation",
    "mask-feather",
    "crop-padding",
    "processing-resolution",
    "whole-frame",
    "fast",
)
# Those of them that are never left empty, so that the command need not say what it does anyway.
DEFAULTS = {"strength": inspect.signature(IEditPipeline.__call__).parameters["strength"].default}
# How all of them stand on a new page.
EMPTY: dict[str, Any] = dict.fromkeys(SETTINGS, "") | DEFAULTS | {"whole-frame": False, "fast": False}
# Those of them that are for a mask that is found: what is painted is meant as it is.
OF_FOUND_MASKS = ("mask-threshold", "mask-dilation")


@dataclass(frozen=True)
class Source:
    """A picture to edit.

    Args:
        photo ([`Photo`]): As it is edited.
        name (`str`): Of its file, in the command.
        stem (`str`): Of the name of the picture that was opened, from which it was made.
        suffix (`str`): Of the files that its edits are downloaded as: that of its own format, or `.png`.
        notes (`tuple[str]`): What of the picture that was opened these files do not keep.
        commands (`tuple[str]`): What made it of that picture.
    """

    photo: Photo
    name: str
    stem: str
    suffix: str
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    @functools.cached_property
    def preview(self) -> Image.Image:
        return _preview(self.photo)

    @property
    def megapixels(self) -> float:
        height, width = self.photo.size
        return height * width / 1e6

    def next_name(self, kind: str, suffix: str) -> str:
        """Of a file that belongs to the next edit."""
        return f"{self.stem}-{kind}{len(self.commands) + 1}{suffix}"


@dataclass(frozen=True)
class Results:
    """The results of one edit.

    Args:
        source ([`Source`]): What was edited.
        images (`list[PIL.Image.Image]`): At its size.
        mask (`PIL.Image.Image`, *optional*): Where it was edited.
        painted (`PIL.Image.Image`, *optional*): The mask that it was told.
        prompt (`str`): What it is to show.
        options (`list[str]`): All others of the command, but for its output.
        told (`str`): What there is to say of it.
    """

    source: Source
    images: list[Image.Image]
    mask: Image.Image | None
    painted: Image.Image | None
    prompt: str
    options: list[str]
    told: str

    @functools.cached_property
    def previews(self) -> list[Image.Image]:
        return [_preview(read_photos(image)[0]) for image in self.images]

    def file_name(self, number: int, suffix: str) -> str:
        """What the command calls a result, by its number from 0."""
        numbered = f"-{number + 1}" if len(self.images) > 1 else ""
        return self.source.next_name("edit", f"{numbered}{suffix}")

    def command(self, suffix: str) -> str:
        """The command that makes the results, in files of this format."""
        picture_and_prompt, output = [self.source.name, self.prompt], self.source.next_name("edit", suffix)
        options = [*self.options, *(_option("output", output) if output.startswith("-") else ("-o", output))]
        if any(each.startswith("-") for each in picture_and_prompt):
            return shlex.join(["iedit", "edit", *options, "--", *picture_and_prompt])
        return shlex.join(["iedit", "edit", *picture_and_prompt, *options])

    def as_source(self, number: int) -> Source:
        """A result as what is edited next. In the commands it is in a PNG, which keeps every byte."""
        (photo,) = read_photos(self.images[number])
        commands = (*self.source.commands, self.command(".png"))
        return replace(self.source, photo=photo, name=self.file_name(number, ".png"), commands=commands)


@dataclass
class Session:
    """What one person has on the page. The server keeps it in its memory, each for themselves.

    Args:
        sources (`list[Source]`): What was edited, one after the other; the last one is what will be.
        results ([`Results`], *optional*): Of the last edit of that one.
        selected (`int`): Which of them is compared and downloaded.
        found (`PIL.Image.Image`, *optional*): The mask that words found, at the picture's size.
        shown (`PIL.Image.Image`, *optional*): The same as it was laid over the picture, without any stroke.
        stopped (`bool`): Whether the edit that runs, or waits, is not wanted any more.
    """

    sources: list[Source] = field(default_factory=list)
    results: Results | None = None
    selected: int = 0
    found: Image.Image | None = None
    shown: Image.Image | None = None
    stopped: bool = False

    @property
    def source(self) -> Source:
        if not self.sources:
            raise cli.UserError("There is no picture yet: drop one, paste one, or take an example.")
        return self.sources[-1]

    def open(self, source: Source | None) -> None:
        """Begin with another picture, or with none."""
        self.sources = [] if source is None else [source]
        self._changed()

    def add(self, source: Source) -> None:
        self.sources.append(source)
        # The picture that was opened stays, and the one that will be edited.
        while len(self.sources) > 2 and sum(each.megapixels for each in self.sources) > KEPT_MEGAPIXELS:
            del self.sources[1]
        self._changed()

    def go_back(self) -> None:
        self.sources.pop()
        self._changed()

    def _changed(self) -> None:
        # Whatever still runs is an edit of another picture.
        self.results, self.found, self.shown, self.selected, self.stopped = None, None, None, 0, True


@dataclass(frozen=True)
class Example:
    """A picture to try.

    Args:
        image (`PIL.Image.Image`): The picture.
        name (`str`): What it shows.
        prompt (`str`): What it is to show.
        words (`str`): Where.
        settings (`dict`): What else its edit is told, by the names of the command's options.
    """

    image: Image.Image
    name: str
    prompt: str
    words: str
    settings: dict[str, Any]


def _upload(**options) -> gr.Image:
    """An upload of a picture, given on as it is: gradio would open it, in any format and of any size."""
    component = gr.Image(type="filepath", image_mode=None, sources=["upload", "clipboard"], **options)

    def as_it_is(payload: Any) -> Any:
        if payload is None or payload.path is None:
            return None
        # Gradio looks only at those that call themselves files.
        if not Path(payload.path).resolve().is_relative_to(Path(gr.utils.get_upload_folder()).resolve()):
            raise gr.Error("This file was not uploaded by a user.", title="", print_exception=False)
        return payload.path

    component.preprocess = as_it_is  # type: ignore[method-assign]
    return component


def _editor(max_pixels: int, **options) -> gr.ImageEditor:
    """A canvas of which the layers alone are read: gradio would open anything, in any format and of any size."""
    component = gr.ImageEditor(type="pil", format="png", **options)

    def layer(file: Any, flatten_on_white: bool = False) -> Image.Image | None:
        if file is None or flatten_on_white:
            return None
        return open_image(file if isinstance(file, bytes) else file.path, max_pixels)

    component.convert_and_format_image = layer  # type: ignore[method-assign]
    return component


def _preview(photo: Photo) -> Image.Image:
    """A picture as the page shows it: neither too large to send nor too small to paint on."""
    image = photo.image()
    smallest, largest = PREVIEW_SIDES
    scale = min(max(smallest / max(image.size), 1), largest / max(image.size))
    if scale == 1:
        return image
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def _layer(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask as the editor's layer: coloured where it is white."""
    alpha = mask.resize(size, Image.Resampling.BILINEAR).point(lambda value: round(255 * MASK_OPACITY) * (value > 127))
    layer = Image.new("RGBA", size, (*MASK_COLOUR, 0))
    layer.putalpha(alpha)
    return layer


def _painted(canvas: dict[str, Any] | None, size: tuple[int, int]) -> Image.Image:
    """What the layers of the editor's value cover: mode "L", 255 where any does."""
    painted = Image.new("L", size)
    for layer in canvas["layers"] if canvas else ():
        alpha = layer.convert("RGBA").getchannel("A").resize(size)
        painted = ImageChops.lighter(painted, alpha.point(lambda value: 255 * (value > 255 * MASK_OPACITY / 2)))
    return painted


def _canvas(picture: Image.Image, *layers: Image.Image) -> dict[str, Any]:
    """What makes the editor show a picture and layers of its size."""
    value = {"background": picture, "layers": list(layers), "composite": None}
    return gr.update(value=value, canvas_size=picture.size, visible=True)


def _reporter(progress: gr.Progress, session: Session | None = None) -> Callable[[int, int], bool]:
    """Shows how far an edit is; it goes on until its session stops it."""

    def on_step(done: int, of: int) -> bool:
        progress((done, of), desc="Editing", unit="steps")
        return session is None or not session.stopped

    return on_step


def _new_file(name: str) -> Path:
    """A path in gradio's folder, from which it serves files. Nobody can guess it who was not given it."""
    folder = Path(gr.utils.get_upload_folder(), secrets.token_hex(16))
    folder.mkdir(parents=True)
    return folder / name


def _save(image: Image.Image, name: str) -> str:
    path = _new_file(name)
    cli._save(image, path)
    return str(path)


def _in_sentences(handler: Callable) -> Callable:
    """Says on the page what went wrong, and never with a traceback."""

    @functools.wraps(handler)
    def told(*args, **kwargs):
        try:
            return handler(*args, **kwargs)
        except cli.UserError as error:
            message = " ".join(str(error).split())
        except Exception as error:
            logger.exception("An edit failed.")
            message = f"This did not work, and it is no fault of yours: {cli._in_one_line(error)}"
        raise gr.Error(message, title="", duration=20, print_exception=False)

    return told


class Demo:
    """What the page does with a loaded model.

    Args:
        pipe ([`IEditPipeline`] or [`LocalEditor`]): What edits, with a mask model.
        name (`str`): Of the model.
        model_options (`list[str]`): The options of `iedit edit` that choose it.
        max_megapixels (`float`): Of a picture.
    """

    def __init__(
        self,
        pipe: "IEditPipeline | LocalEditor",
        name: str,
        model_options: list[str],
        max_megapixels: float = MAX_MEGAPIXELS,
    ):
        self.pipe = pipe
        self.name = name
        self.model_options = model_options
        self.max_pixels = int(max_megapixels * 1e6)
        denoiser: Any = getattr(pipe, "pipe", pipe)
        denoiser.set_progress_bar_config(disable=True)
        takes = inspect.signature(type(denoiser).__call__).parameters
        self.num_steps = takes["num_inference_steps"].default
        arguments = {"strength": "strength", "guidance-scale": "guidance_scale", "negative-prompt": "negative_prompt"}
        self.not_taken = {name for name, argument in arguments.items() if argument not in takes}
        if not few_steps(pipe)[1]:
            self.not_taken.add("fast")

    @classmethod
    def load(
        cls,
        model: str,
        device: str | None = None,
        dtype: str = "auto",
        vae: str | None = None,
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> "Demo":
        """Loads a model as `iedit edit` does; a captioner only if the model has one of its own."""
        with cli._model_errors():
            index = read_index(model, "--model")
        captions = model in SHIPPED_PIPELINES or index.get("captioner", [None])[0] is not None
        pipe = cli._load_pipeline(model, device, dtype, True, True, captions, {}, vae)
        chosen = {"--model": model, "--device": device, "--dtype": dtype, "--vae": vae}
        usual = (None, "auto", cli.DEFAULT_MODEL)
        options = [part for name, value in chosen.items() if value not in usual for part in (name, value)]
        return cls(pipe, model, options, max_megapixels)

    def open(self, file: str) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                return open_image(file, self.max_pixels)
        except (ValueError, OSError) as error:
            raise cli.UserError(f"{Path(file).name} cannot be read as a picture: {error}") from error

    def read(self, file: str) -> Source:
        """The picture in a file that was uploaded."""
        path = Path(file)
        image = self.open(file)
        try:
            (photo,) = read_photos(image)
        except ValueError as error:
            raise cli.UserError(f"{path.name}: {error}") from error
        image_format = {"MPO": "JPEG"}.get(image.format or "", image.format)
        suffix = next((suffix for suffix, (written, _) in cli.FORMATS.items() if written == image_format), ".png")
        notes = cli._read_notes(path, image, Path(f"edited{suffix}"))
        return Source(photo, path.name, path.stem, suffix, tuple(notes))

    def caption(self, source: Source) -> str:
        (caption,) = self.pipe._caption([source.photo.image()])
        return caption

    def values(
        self,
        where: str,
        prompt: str | None,
        words: str | None,
        caption: str | None,
        mask_name: str,
        settings: Sequence[Any],
    ) -> dict[str, Any]:
        """What an edit is told, by the names of the command's options."""
        values = {"prompt": (prompt or "").strip()}
        if where == BY_WORDS:
            values["mask-prompt"] = (words or "").strip()
        elif where == BY_CHANGES:
            values["source-prompt"] = (caption or "").strip() or "auto"
        elif where == BY_BRUSH:
            values["mask"] = mask_name
        for name, value in zip(SETTINGS, settings, strict=True):
            is_default = value is None or value == "" or value is False or value == DEFAULTS.get(name)
            if is_default or (name in OF_FOUND_MASKS and where not in (BY_WORDS, BY_CHANGES)):
                continue
            values[name] = value
        if not values["prompt"] and where != BY_WORDS:
            raise cli.UserError("Say in the prompt what the picture shows after the edit.")
        if where == BY_WORDS and not values["mask-prompt"]:
            raise cli.UserError("Name what is to be changed, such as `red ball`, or choose another way to say where.")
        if where == BY_CHANGES and values["source-prompt"] == "auto" and self.pipe.captioner is None:
            raise cli.UserError("Say what the picture shows now: what the prompt says otherwise is looked for.")
        return values

    def find_mask(self, source: Source, values: dict[str, Any]) -> Image.Image:
        """Where the words say."""
        given = self._parse(source, values)
        given = {name: given[name] for name in cli.MASK_ARGUMENTS if name in given and name != "mask_feather"}
        with cli._pipeline_errors(self.pipe):
            (mask,) = self.pipe.predict_mask(source.photo, **given)
        return mask

    def edit(
        self,
        source: Source,
        values: dict[str, Any],
        mask: Image.Image | None,
        num_images: int,
        on_step: Callable[[int, int], bool],
    ) -> Results:
        """Edits a picture as the command does.

        Args:
            source ([`Source`]): The picture.
            values (`dict`): From `values`.
            mask (`PIL.Image.Image`, *optional*): What was painted, at the picture's size.
            num_images (`int`): How many results.
            on_step (`Callable`): Is told how many steps are done, of how many; what it returns is whether to go on.

        Raises:
            `UserError`: If the edit cannot be made so.
        """
        if not values["prompt"]:
            raise cli.UserError("Say in the prompt what the picture shows after the edit.")
        started = time.perf_counter()
        values = values | {"seed": values.get("seed", secrets.randbelow(2**32))}
        parsed = self._parse(source, values)
        largest = math.isqrt(self.max_pixels)
        if parsed.get("processing_resolution", 0) > largest:
            raise cli.UserError(f"processing-resolution has to be at most {largest}: no larger picture is taken.")
        seeds = range(parsed["seed"], parsed["seed"] + num_images)
        given = {name: parsed[name] for name in cli.EDIT_ARGUMENTS if name in parsed}
        if mask is not None:
            given["mask_image"] = mask
        pipe = self.pipe
        if "fast" in parsed:
            pipe, few = few_steps(pipe)
            given = few | given
        photo, notes = cli._settle(pipe, source.photo, given, "whole_frame" in parsed)
        runs, done = num_images if hasattr(self.pipe, "pipe") else 1, 0

        def callback(denoiser, step, timestep, tensors):
            nonlocal done
            done += 1
            denoiser._interrupt = not on_step(done, runs * denoiser.num_timesteps)
            return tensors

        output = cli._make_results(pipe, photo, given | {"callback_on_step_end": callback}, seeds)
        options = [part for name, value in values.items() if name != "prompt" for part in _option(name, value)]
        if num_images > 1:
            options += ["--num-images", str(num_images)]
        used = None if output.masks is None else output.masks[0]
        told = [f"{time.perf_counter() - started:.1f} s", *notes, *source.notes]
        options += self.model_options
        return Results(source, list(output.images), used, mask, values["prompt"], options, ", ".join(told))

    def _parse(self, source: Source, values: dict[str, Any]) -> dict[str, Any]:
        return cli._parse_job(cli._job_parser(), {}, {"image": source.name, "output": "edited.png"} | values)


def _option(name: str, value: Any) -> list[str]:
    if value is True:
        return [f"--{name}"]
    return [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]


class Page:
    """The handlers of the page. Each takes what components hold, and returns what they hold then.

    Args:
        demo ([`Demo`]): What does the work.
        examples (`list[Example]`): What the page offers to try.
    """

    def __init__(self, demo: Demo, examples: Sequence[Example]):
        self.demo = demo
        self.examples = examples

    # The picture

    @_in_sentences
    def open_file(self, session: Session, file: str | None):
        session.open(None if file is None else self.demo.read(file))
        return self._picture(session)

    @_in_sentences
    def open_example(self, session: Session, number: int):
        example = self.examples[number]
        session.open(self.demo.read(str(_example_file(example))))
        settings = [gr.update(value=value) for value in (EMPTY | example.settings).values()]
        return *self._picture(session), example.prompt, BY_WORDS, example.words, *settings

    @_in_sentences
    def start_again(self, session: Session):
        session.open(None)
        return self._picture(session)

    @_in_sentences
    def use_result(self, session: Session):
        if session.results is None:
            raise cli.UserError("There is no result yet.")
        session.add(session.results.as_source(session.selected))
        return self._picture(session)

    @_in_sentences
    def undo(self, session: Session):
        if len(session.sources) > 1:
            session.go_back()
        return self._picture(session)

    def _picture(self, session: Session):
        """What shows the picture that is to be edited, without any results yet."""
        is_open, undos = bool(session.sources), len(session.sources) - 1
        return (
            session,
            gr.update(value=None, visible=not is_open),
            _canvas(session.source.preview) if is_open else gr.update(value=None, visible=False),
            gr.update(visible=is_open),
            gr.update(value=f"Undo ({undos})" if undos > 1 else "Undo", visible=undos > 0),
            gr.update(visible=not is_open),
            *self._results(session),
        )

    # Where

    def choose_where(self, where: str):
        finds = where in (BY_WORDS, BY_CHANGES)
        return gr.update(visible=where == BY_WORDS), gr.update(visible=where == BY_CHANGES), gr.update(visible=finds)

    @_in_sentences
    def write_caption(self, session: Session):
        return self.demo.caption(session.source)

    @_in_sentences
    def show_mask(self, session: Session, where, prompt, words, caption, *settings):
        source = session.source
        mask = self.demo.find_mask(source, self.demo.values(where, prompt, words, caption, "", settings))
        return session, self._overlay(session, source, mask)

    def _overlay(self, session: Session, source: Source, mask: Image.Image) -> dict[str, Any]:
        """Lays a mask over the picture, which the brush may change."""
        layer = _layer(mask, source.preview.size)
        session.found, session.shown = mask, _painted({"layers": [layer]}, layer.size)
        return _canvas(source.preview, layer)

    def _strokes(self, session: Session, canvas: dict[str, Any] | None) -> Image.Image:
        """Where the brush or the eraser changed what the page laid over the picture, at the size of the canvas."""
        painted = _painted(canvas, session.source.preview.size)
        return painted if session.shown is None else ImageChops.difference(painted, session.shown)

    def _mask(self, session: Session, canvas: dict[str, Any] | None) -> Image.Image:
        """What is painted, at the size of the picture: of a mask that was found, whatever the brush did not change."""
        height, width = session.source.photo.size
        painted = _painted(canvas, session.source.preview.size).resize((width, height), Image.Resampling.BILINEAR)
        mask = painted.point(lambda value: 255 * (value > 127))
        if session.found is not None:
            # Wider by a pixel of the canvas, whose pixels are not the picture's.
            strokes = self._strokes(session, canvas).filter(ImageFilter.MaxFilter(3))
            mask = Image.composite(mask, session.found, strokes.resize((width, height), Image.Resampling.NEAREST))
        if not mask.getbbox():
            raise cli.UserError(
                "Nothing is painted: paint over what is to change, or choose another way to say where."
            )
        return mask

    # The edit

    def begin(self, session: Session):
        session.stopped = False
        return session

    def stop(self, session: Session):
        session.stopped = True
        return session

    @_in_sentences
    def run(
        self,
        session: Session,
        where: str,
        prompt: str,
        words: str,
        caption: str,
        canvas: dict[str, Any] | None,
        num_images: int,
        progress=gr.Progress(),  # noqa: B008
        *settings,
    ):
        source = session.source
        values = self.demo.values(where, prompt, words, caption, source.next_name("mask", ".png"), settings)
        painted = self._mask(session, canvas) if where == BY_BRUSH else None
        results = None
        if not session.stopped:
            progress(0, desc="Editing")
            results = self.demo.edit(source, values, painted, int(num_images), _reporter(progress, session))
        if results is None or session.stopped:
            gr.Info("Stopped.", duration=5)
            return session, gr.skip(), *self._results(session, session.selected)
        session.results = results
        overlay = gr.skip()
        if where in (BY_WORDS, BY_CHANGES) and results.mask is not None:
            overlay = self._overlay(session, source, results.mask)
        return session, overlay, *self._results(session)

    @_in_sentences
    def select(self, session: Session, selected: gr.SelectData):
        return session, *self._results(session, selected.index)

    def _results(self, session: Session, number: int = 0):
        """What shows the results, of which one is compared with the source and downloaded."""
        session.selected, results = number, session.results
        if results is None:
            return (
                *[gr.update(value=None, visible=False)] * 5,
                gr.update(visible=False),
                "The results will stand here.",
            )
        count, suffix = len(results.images), results.source.suffix
        told = f"Result {number + 1} of {count}, {results.told}" if count > 1 else results.told
        painted = results.painted and _save(results.painted, results.source.next_name("mask", ".png"))
        return (
            gr.update(value=results.previews, selected_index=number, visible=count > 1),
            gr.update(value=(results.source.preview, results.previews[number]), visible=True),
            gr.update(value="\n".join((*results.source.commands, results.command(suffix))), visible=True),
            gr.update(value=_save(results.images[number], results.file_name(number, suffix)), visible=True),
            gr.update(value=painted, visible=painted is not None),
            gr.update(visible=True),
            told,
        )

    # Over HTTP

    @_in_sentences
    def api_edit(
        self,
        image: str | None,
        prompt: str,
        words: str | None = None,
        caption: str | None = None,
        mask: str | None = None,
        num_images: int = 1,
        strength: float = DEFAULTS["strength"],
        steps: str | None = None,
        guidance_scale: str | None = None,
        negative_prompt: str | None = None,
        seed: str | None = None,
        mask_threshold: str | None = None,
        mask_dilation: str | None = None,
        mask_feather: str | None = None,
        crop_padding: str | None = None,
        processing_resolution: str | None = None,
        whole_frame: bool = False,
        fast: bool = False,
        progress=gr.Progress(),  # noqa: B008
    ):
        """Edits a picture, as `iedit edit` does: where `words`, `caption` or `mask` say, or everywhere.

        Returns:
            The results in the format of the picture, and the command that makes them.
        """
        settings = (
            *(strength, steps, guidance_scale, negative_prompt, seed, mask_threshold, mask_dilation, mask_feather),
            *(crop_padding, processing_resolution, whole_frame, fast),
        )
        source = self._read(image)
        ways = {BY_WORDS: words, BY_CHANGES: caption, BY_BRUSH: mask}
        given = [where for where, value in ways.items() if value]
        if len(given) > 1:
            raise cli.UserError("Pass only one of `words`, `caption` and `mask`.")
        where = given[0] if given else EVERYWHERE
        values = self.demo.values(where, prompt, words, caption, Path(mask or "").name, settings)
        painted = self.demo.open(mask) if mask else None
        results = self.demo.edit(source, values, painted, int(num_images), _reporter(progress))
        suffix = source.suffix
        files = [_save(image, results.file_name(number, suffix)) for number, image in enumerate(results.images)]
        return files, results.command(suffix)

    @_in_sentences
    def api_mask(
        self,
        image: str | None,
        prompt: str | None = None,
        words: str | None = None,
        caption: str | None = None,
        mask_threshold: str | None = None,
        mask_dilation: str | None = None,
    ):
        """Finds where a picture would be edited: a mask in its size, white where."""
        if words and caption:
            raise cli.UserError("Pass only one of `words` and `caption`.")
        source = self._read(image)
        given = {"mask-threshold": mask_threshold, "mask-dilation": mask_dilation}
        settings = [given.get(name) for name in SETTINGS]
        values = self.demo.values(BY_CHANGES if caption else BY_WORDS, prompt, words, caption, "", settings)
        return _save(self.demo.find_mask(source, values), f"{source.stem}-mask.png")

    def _read(self, image: str | None) -> Source:
        if image is None:
            raise cli.UserError("Pass the picture as `image`.")
        return self.demo.read(image)


def mini_examples() -> list[Example]:
    """Pictures of the mini world, a large one among them."""
    small, large = mini.render(seed=22), mini.render_large(seed=2, grid=5)
    room = {"mask-dilation": "2"}
    return [
        Example(small.image, "ball", small.swap(thing="cat").caption, small.thing.name, room),
        Example(large.image, "large", large.swap(colour="blue").caption, large.thing.name, room),
    ]


def _example_file(example: Example) -> Path:
    path = _new_file(f"{example.name}.png")
    example.image.save(path)
    return path


def _controls(demo: Demo) -> dict[str, Any]:
    """The settings by their names. What is left empty is the command's default, and what is wrong, it says."""

    def entry(name: str, label: str, info: str, usual: str = "") -> gr.Textbox:
        # Not `gr.Number`, which cannot be empty.
        shown = name not in demo.not_taken
        return gr.Textbox(label=label, info=info, placeholder=usual, max_lines=1, min_width=160, visible=shown)

    with gr.Row():
        entries = {
            "steps": entry("steps", "Steps", "More take longer.", str(demo.num_steps)),
            "guidance-scale": entry("guidance-scale", "Guidance", "How closely to follow the prompt."),
            "negative-prompt": entry("negative-prompt", "Negative prompt", "What not to show."),
            "seed": entry("seed", "Seed", "The same one gives the same results.", "a new one"),
            "mask-threshold": entry("mask-threshold", "Mask threshold", "How sure words have to be, 0 to 1.", "0.5"),
            "mask-dilation": entry("mask-dilation", "Grow the mask", "By pixels, for the new thing.", "0"),
            "mask-feather": entry("mask-feather", "Feather the mask", "Over pixels, for a soft edge.", "0"),
            "crop-padding": entry("crop-padding", "Crop padding", "Pixels seen around the mask.", "automatic"),
            "processing-resolution": entry(
                "processing-resolution", "Resolution", "Longer side of the edit, in pixels.", "the model's"
            ),
        }
    with gr.Row():
        return entries | {
            "whole-frame": gr.Checkbox(
                label="Whole frame", info="Edit all of a large picture at once.", min_width=160
            ),
            "fast": gr.Checkbox(
                label="Fast",
                info="A quarter of the steps, and less guidance.",
                min_width=160,
                visible="fast" not in demo.not_taken,
            ),
        }


def build(demo: Demo, examples: Sequence[Example] = ()) -> gr.Blocks:
    """The page.

    Args:
        demo ([`Demo`]): What does the work.
        examples (`list[Example]`): What the page offers to try.
    """
    page = Page(demo, examples)
    # One run at a time: edits, masks and captions stand in one queue.
    on_device: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1, "api_visibility": "private"}
    at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

    with gr.Blocks(
        title="iedit", analytics_enabled=False, delete_cache=(CLEANED_SECONDS, KEPT_SECONDS), fill_width=True
    ) as blocks:
        session = gr.State(Session(), time_to_live=KEPT_SECONDS)
        gr.Markdown(
            "# Change one thing in a picture\n"
            "Open a picture, say what it shows after the edit, and where. Outside that place not one byte changes."
        )
        with gr.Row():
            with gr.Column(min_width=320):
                source = _upload(
                    label=f"Picture (at most {demo.max_pixels / 1e6:g} megapixels)", height=300, elem_id="source"
                )
                offered = gr.Dataset(
                    label="Or an example",
                    components=[gr.Image(visible=False, format="png"), gr.Textbox(visible=False)],
                    samples=[[str(_example_file(example)), example.prompt] for example in examples],
                    type="index",
                    visible=bool(examples),
                    elem_id="examples",
                )
                canvas = _editor(
                    demo.max_pixels,
                    label="Picture and mask",
                    height=440,
                    sources=(),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(default_size=40, colors=[_BRUSH], default_color=_BRUSH, color_mode="fixed"),
                    eraser=gr.Eraser(default_size=40),
                    buttons=[],
                    visible=False,
                    elem_id="canvas",
                )
                with gr.Row(visible=False) as of_picture:
                    undo = gr.Button("Undo", size="sm", visible=False, elem_id="undo")
                    another = gr.Button("Another picture", size="sm", elem_id="another")
                prompt = gr.Textbox(
                    label="What the picture shows after the edit",
                    placeholder="an orange car and a red cat on green grass",
                    elem_id="prompt",
                )
                where = gr.Radio(
                    [BY_WORDS, BY_CHANGES, BY_BRUSH, EVERYWHERE], value=BY_WORDS, label="Where", elem_id="where"
                )
                words = gr.Textbox(label="The thing to change", placeholder="red ball", elem_id="words")
                with gr.Group(visible=False) as of_caption:
                    caption = gr.Textbox(
                        label="What the picture shows now",
                        info="The place is where the words above say otherwise.",
                        placeholder="an orange car and a red ball on green grass",
                        elem_id="caption",
                    )
                    write = gr.Button(
                        "Write it for me", size="sm", visible=demo.pipe.captioner is not None, elem_id="write"
                    )
                show = gr.Button("Show the mask", elem_id="show")
                strength = gr.Slider(
                    0.05,
                    1,
                    value=DEFAULTS["strength"],
                    step=0.05,
                    label="Strength",
                    info="How far to go from the picture.",
                    visible="strength" not in demo.not_taken,
                    elem_id="strength",
                )
                num_images = gr.Slider(1, 4, value=4, step=1, label="Results", elem_id="count")
                with gr.Row():
                    run = gr.Button("Edit", variant="primary", elem_id="run")
                    stop = gr.Button("Stop", elem_id="stop")
                with gr.Accordion("More settings", open=False):
                    settings = {"strength": strength} | _controls(demo)
            with gr.Column(min_width=320):
                told = gr.Markdown("The results will stand here.", elem_id="told")
                slider = gr.ImageSlider(
                    label="Before and after", format="png", interactive=False, visible=False, elem_id="slider"
                )
                gallery = gr.Gallery(
                    label="Results",
                    format="png",
                    columns=4,
                    height="auto",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    visible=False,
                    elem_id="gallery",
                )
                with gr.Row(visible=False) as of_results:
                    use = gr.Button("Use as source", elem_id="use")
                    download = gr.DownloadButton("Download", variant="primary", elem_id="download")
                    download_mask = gr.DownloadButton("Download the mask", visible=False, elem_id="download-mask")
                command = gr.Textbox(
                    label="The same by command", buttons=["copy"], lines=2, visible=False, elem_id="command"
                )
        gr.Markdown(
            f"Model: `{demo.name}`. Pictures are seen by nobody else on this page; they are removed"
            f" {round((KEPT_SECONDS + CLEANED_SECONDS) / 60)} minutes after they were last used."
        )

        results = [gallery, slider, command, download, download_mask, of_results, told]
        picture = [session, source, canvas, of_picture, undo, offered, *results]
        chosen = [settings[name] for name in SETTINGS]
        asked = [session, where, prompt, words, caption]

        source.input(page.open_file, [session, source], picture, api_visibility="private").failure(
            lambda: None, None, source, **at_once
        )
        offered.click(
            page.open_example, [session, offered], [*picture, prompt, where, words, *chosen], api_visibility="private"
        )
        another.click(page.start_again, session, picture, **at_once)
        use.click(page.use_result, session, picture, api_visibility="private")
        undo.click(page.undo, session, picture, api_visibility="private")

        where.change(page.choose_where, where, [words, of_caption, show], **at_once)
        blocks.load(None, js=CHOOSE_BRUSH, api_visibility="private")
        write.click(page.write_caption, session, caption, **on_device)
        for showing in (show.click, words.submit, caption.submit):
            showing(page.show_mask, [*asked, *chosen], [session, canvas], show_progress_on=canvas, **on_device)

        for running in (run.click, prompt.submit):
            running(page.begin, session, session, **at_once).then(
                page.run,
                [*asked, canvas, num_images, *chosen],
                [session, canvas, *results],
                show_progress_on=[told],
                **on_device,
            )
        stop.click(page.stop, session, session, **at_once)

        def leave(request: gr.Request) -> None:
            # Gradio passes it no state.
            page.stop(blocks.app.state_holder[request.session_hash][session._id])

        blocks.unload(leave)
        gallery.select(page.select, session, [session, *results], show_progress_on=slider, api_visibility="private")

        with gr.Column(visible=False):
            mask = _upload(label="Mask")
            files = gr.Files(label="Results")
            line = gr.Textbox(label="Command")
            mask_file = gr.File(label="Mask")
            over_http = gr.Button()
        public = on_device | {"api_visibility": "public"}
        over_http.click(
            page.api_edit,
            [source, prompt, words, caption, mask, num_images, *chosen],
            [files, line],
            api_name="edit",
            **public,
        )
        over_http.click(
            page.api_mask,
            [source, prompt, words, caption, *(settings[name] for name in OF_FOUND_MASKS)],
            mask_file,
            api_name="mask",
            **public,
        )
    return blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=4)


def launch(blocks: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, share: bool = False) -> str:
    """Serves the page, and returns at once.

    Returns:
        `str`: Its address.

    Raises:
        `UserError`: If the port is taken.
    """
    font = ("system-ui", "sans-serif")
    # Darker than gradio's own, for contrast.
    theme = gr.themes.Default(font=font, font_mono=("ui-monospace", "monospace")).set(
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
    )
    try:
        _, local, public = blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            inbrowser=False,
            theme=theme,
            css=CSS,
            footer_links=["api"],
            run_history=False,
            enable_monitoring=False,
            max_file_size=MAX_FILE_SIZE,
            state_session_capacity=MAX_SESSIONS,
            ssr_mode=False,
            show_error=True,
        )
    except OSError as error:
        raise cli.UserError(f"the page cannot be served: {error}") from error
    return public or local


def serve(
    model: str = cli.DEFAULT_MODEL,
    device: str | None = None,
    dtype: str = "auto",
    vae: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> None:
    """Loads a model and serves the page, until Ctrl-C or SIGTERM.

    Args:
        model, device, dtype, vae: As `iedit edit` takes them.
        host (`str`): The address to listen at.
        port (`int`, *optional*): By default the first free one from 7860.
        share (`bool`): Whether gradio makes a public address for it.
        max_megapixels (`float`): Of a picture.

    Raises:
        `UserError`: If the model or the port cannot be had.
    """
    _check_port(host, port)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with tempfile.TemporaryDirectory(prefix="iedit-demo-") as folder:
        # Where gradio puts what is uploaded and made.
        os.environ["GRADIO_TEMP_DIR"] = folder
        demo = Demo.load(model, device, dtype, vae, max_megapixels)
        blocks = build(demo, mini_examples() if model in SHIPPED_PIPELINES else ())
        print(f"{launch(blocks, host, port, share)}: Ctrl-C ends it", flush=True)
        stop.wait()
        blocks.close(verbose=False)


def _check_port(host: str, port: int | None) -> None:
    """Before a model is loaded, which may take minutes."""
    if port is None:
        return
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise cli.UserError(
            f"--port {port}: cannot be listened at on {host} ({os.strerror(error.errno or 0)})"
        ) from error
