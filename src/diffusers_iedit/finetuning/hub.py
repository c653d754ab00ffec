"""A fine-tuned model on the Hub: the check before a run, the model card, and the push in one commit.

`python -m diffusers_iedit.finetuning.hub FOLDER REPO_ID` pushes what a run left, again or for the first time.
"""

import argparse
import difflib
import json
import os
import re
import shlex
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from ..loading import SHIPPED_PIPELINES
from ..markdown import code, escape


COMMAND = "python -m diffusers_iedit.finetuning.hub"
# As in pipeline.py, whose import takes seconds that neither the check nor the command need.
CODE_FILES = ("pipeline.py", "scheduling_iedit.py", "masking_iedit.py", "regions_iedit.py")
# Of a pipeline's class: what the card calls it, what was trained, and the tags that diffusers' own scripts give.
FAMILIES = {
    "IEditPipeline": ("Stable Diffusion", "UNet", ["stable-diffusion", "stable-diffusion-diffusers"]),
    "StableDiffusionXLImg2ImgPipeline": (
        "Stable Diffusion XL",
        "UNet",
        ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"],
    ),
    "StableDiffusion3Img2ImgPipeline": ("Stable Diffusion 3", "transformer", ["sd3", "sd3-diffusers"]),
}
LORA_FILE = "lora/pytorch_lora_weights.safetensors"
# What a component's `save_pretrained` leaves: weights, configs, and a tokenizer's vocabulary and templates.
COMPONENT_SUFFIXES = (".json", ".txt", ".safetensors", ".jinja")
# https://huggingface.co/docs/hub/repositories-licenses, as of August 2026: no library has the list.
LICENSES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 "
    "bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc "
    "cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 "
    "cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
    "cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 "
    "eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research "
    "lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 "
    "postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license "
    "fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma "
    "unknown other"
).split()


def check_license(name: str | None) -> None:
    """Makes sure, before a run starts, that the Hub will know its licence.

    Args:
        name (`str`, *optional*): As the Hub writes it: "apache-2.0".

    Raises:
        `ValueError`: If the Hub has no licence of this name.
    """
    if name is None or name in LICENSES:
        return
    near = difflib.get_close_matches("-".join(name.lower().split()), LICENSES)
    hint = f"; near to it are {', '.join(near)}" if near else ""
    raise ValueError(
        "`license` has to be a name from https://huggingface.co/docs/hub/repositories-licenses, or other, got"
        f" {name!r}{hint}."
    )


def check_hub(repo_id: str, token: str | None = None, private: bool | None = None) -> str:
    """Makes sure, before a run starts, that its end can be pushed; creates the repository if need be.

    Args:
        repo_id (`str`): Hub id of the model; without a namespace, one of the token's owner.
        token (`str`, *optional*): By default HF_TOKEN, or what `hf auth login` stored.
        private (`bool`, *optional*): Whether a new repository is private.

    Returns:
        `str`: The id with its namespace.

    Raises:
        `ValueError`: If the token is refused, may not write there, or the Hub cannot be reached.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # Of a repository that is there, the line above also accepts a token that may only read it.
        api.auth_check(repo_id, write=True)
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{repo_id} on the Hub cannot be written to with the token in HF_TOKEN or of `hf auth login`: {reason}"
        ) from error
    return repo_id


def write_model_card(
    folder: Path,
    template: Path,
    *,
    repo_id: str,
    base_model: str,
    dataset: str,
    settings: dict[str, object],
    losses: dict[str, float],
    loss_plot: str,
    evaluation: list[dict[str, object]] | None = None,
    evaluation_note: str = "",
    pictures: list[str] = [],
    license: str | None = None,
    lora: bool = False,
    pipeline_class: str = "IEditPipeline",
) -> None:
    """Fills the template of the model card and leaves it as README.md in the folder of the model.

    Of local paths only the last name gets into the card. It shows `settings` as they come: they must not hold a token.
    Names and values stay text: nothing in them makes a link, a table or HTML.

    Args:
        folder (`Path`): The saved pipeline.
        template (`Path`): model_card.md, a Jinja template.
        repo_id (`str`): Hub id of the model; of one that is not pushed the folder's name, which a later push replaces.
        base_model (`str`): What was fine-tuned: a Hub id, a folder, "mini" or "mini-base".
        dataset (`str`): What it was trained on: a Hub id or a folder.
        settings (`dict`): The training's settings by name; those that are `None` are left out.
        losses (`dict`): The mean of each loss term at the end of the training.
        loss_plot (`str`): Picture of the loss curves, as a path inside the folder.
        evaluation (`list[dict]`, *optional*): The rows of a table, all with the first one's columns.
        evaluation_note (`str`): What was measured, on what and how.
        pictures (`list[str]`): Sample edits, as paths inside the folder.
        license (`str`, *optional*): The Hub's name of a licence; by default the base model's is said to apply.
        lora (`bool`): Whether a LoRA was trained, which is merged into the model and also lies in the folder "lora".
        pipeline_class (`str`): Of the saved pipeline. For `IEditPipeline` the card shows the four doors to it, and for
            any other one how `LocalEditor` edits with it.

    Raises:
        `ValueError`: If a picture is not in the folder, or if the Hub has no such licence.
    """
    check_license(license)
    for picture in (loss_plot, *pictures):
        if not (folder / picture).is_file():
            raise ValueError(f"`loss_plot` and `pictures` have to be files in {folder}, but {picture!r} is not there.")

    def shown(value: object) -> str:
        # The names of methods have models in them.
        if isinstance(value, str):
            for path in (str(folder), base_model):
                value = value.replace(path, _public(path))
        return _cell(value)

    mini = base_model in SHIPPED_PIPELINES
    base_id = base_model if _is_hub_id(base_model) and not mini else None
    dataset_id = dataset if _is_hub_id(dataset) else None
    base, data = f"the local model {code(_public(base_model))}", f"the local data set {code(_public(dataset))}"
    if mini:
        base = "the mini model of diffusers-iedit"
    if base_id:
        base = f"[{base_id}](https://huggingface.co/{base_id})"
    if dataset_id:
        data = f"[{dataset_id}](https://huggingface.co/datasets/{dataset_id})"

    is_iedit = pipeline_class == "IEditPipeline"
    family, denoiser, tags = FAMILIES[pipeline_class]
    tags = ["iedit", "image-editing", *tags, "diffusers-training"]
    card = ModelCard.from_template(
        ModelCardData(
            license=license,
            base_model=base_id,
            datasets=[dataset_id] if dataset_id else None,
            pipeline_tag="image-to-image",
            library_name="diffusers",
            tags=tags + ["lora"] * lora,
        ),
        template_path=str(template),
        repo_id=repo_id,
        base=base,
        data=data,
        settings={name: _cell(value) for name, value in settings.items() if value is not None},
        losses={name: _cell(value) for name, value in losses.items()},
        loss_plot=loss_plot,
        evaluation=[{name: shown(value) for name, value in row.items()} for row in evaluation or []],
        evaluation_note=evaluation_note,
        pictures=pictures,
        lora=lora,
        pipeline_class=pipeline_class,
        family=family,
        denoiser=denoiser,
        is_iedit=is_iedit,
    )
    part = folder / ".README.md.part"
    card.save(part)
    part.replace(folder / "README.md")


def _is_path(name: str) -> bool:
    return os.path.isabs(name) or os.path.exists(name)


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not _is_path(name)


def _public(text: str) -> str:
    """Of a local path only the name, as the rest is nobody's business."""
    return os.path.basename(os.path.abspath(text)) if _is_path(text) else text


def _cell(value) -> str:
    """A value as a table of the card shows it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(_public(str(value)))


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload iEdit pipeline",
) -> str:
    """Uploads the model in a run's folder in one commit, so that the Hub has the old revision or the new one.

    That is the pipeline with its code files, if it has some, the LoRA, the card and the pictures that the card shows;
    nothing else that lies in the folder. Files of an earlier push that this one lacks stay on the Hub, as nothing
    tells them from what somebody added there by hand.

    Args:
        folder (`Path`): What the run left.
        repo_id (`str`): Hub id of the model; created if it is not there. The card that is pushed names it.
        token (`str`, *optional*): By default HF_TOKEN, or what `hf auth login` stored.
        private (`bool`, *optional*): Whether a new repository is private.
        commit_message (`str`): The commit's first line.

    Returns:
        `str`: The model's address.

    Raises:
        `ValueError`: If the folder is no whole pipeline.
        `RuntimeError`: If the push failed; says how to repeat it.
    """
    folder = Path(folder).resolve()
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wanted = ["model_index.json"]
    index = json.loads((folder / "model_index.json").read_text()) if "model_index.json" in there else {}
    # Of anything that is not known as another pipeline, an IEditPipeline is expected, which brings its code.
    kind = index.get("_class_name")
    kind = kind if kind in FAMILIES else "IEditPipeline"
    is_iedit = kind == "IEditPipeline"
    wanted += CODE_FILES if is_iedit else ()
    if missing := sorted(set(wanted) - there):
        raise ValueError(f"`folder` has to be a saved {kind}, but {folder} lacks {', '.join(missing)}.")
    for component, origin in index.items():
        if not isinstance(origin, list) or origin[0] is None:
            continue
        saved = [path.relative_to(folder).as_posix() for path in sorted((folder / component).glob("*"))]
        saved = [path for path in saved if path.endswith(COMPONENT_SUFFIXES)]
        if not saved:
            raise ValueError(f"`folder` has to be a saved {kind}, but {folder} lacks the folder {component}.")
        wanted += saved
    card = (folder / "README.md").read_text(encoding="utf-8") if "README.md" in there else ""
    # A name in the card may look like a picture too; no other file of the run is to go along for that.
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+\.(?:png|jpg|jpeg|webp|gif))\)", card)
    wanted += [path for path in dict.fromkeys([*pictures, LORA_FILE]) if path in there]

    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        files = [CommitOperationAdd(path, folder / path) for path in wanted]
        if card:
            card = re.sub(r'(?m)^repo = ".*"(?=  # this repository$)', f'repo = "{repo.repo_id}"', card)
            files.append(CommitOperationAdd("README.md", card.encode()))
        # `upload_folder` may make several commits of one push.
        api.create_commit(repo.repo_id, files, commit_message=commit_message)
    except Exception as error:
        command = f"{COMMAND} {shlex.quote(str(folder))} {repo_id}{' --private' * bool(private)}"
        raise RuntimeError(
            f"The push to {repo_id} failed: {error}\n\nThe folder is whole, and the Hub keeps its last whole revision."
            f" To push again, with a token in HF_TOKEN or after `hf auth login`:\n    {command}"
        ) from error
    return repo.url


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Push a fine-tuned model to the Hub, with the token in HF_TOKEN or that of `hf auth login`.",
    )
    parser.add_argument("folder", type=Path, help="what the training left")
    parser.add_argument("repo_id", help="Hub id of the model; created if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    args = parser.parse_args()
    try:
        print(push_folder(args.folder, args.repo_id, private=args.private or None))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
