"""iEdit's blocks in diffusers' modular pipelines: exact outside of the mask, and no pipeline is changed by a run."""

import json
from pathlib import Path

import icc_profiles
import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from diffusers import (
    FluxAutoBlocks,
    FluxKontextAutoBlocks,
    ModularPipelineBlocks,
    QwenImageAutoBlocks,
    SequentialPipelineBlocks,
    StableDiffusion3AutoBlocks,
    StableDiffusionXLAutoBlocks,
    StableDiffusionXLImg2ImgPipeline,
    ZImageAutoBlocks,
)
from diffusers.modular_pipelines import InputParam, OutputParam
from families import FAMILIES, HEIGHT, WIDTH
from hub_server import TOKEN, HubServer, files_in, output
from PIL import Image

from diffusers_iedit import IEditPipeline, mini
from diffusers_iedit.modular_iedit import (
    CODE_FILES,
    IEditBlocks,
    IEditFindMaskStep,
    IEditKeepBackgroundStep,
    IEditMaskSchedulerStep,
)


CELL = 8


# Diffusers' blocks by the name of the family whose tiny models they run on.
AUTO_BLOCKS = {
    "sdxl": StableDiffusionXLAutoBlocks,
    "sd3": StableDiffusion3AutoBlocks,
    "flux": FluxAutoBlocks,
    "qwen-image": QwenImageAutoBlocks,
    "z-image": ZImageAutoBlocks,
}
every_family = pytest.mark.parametrize("family", AUTO_BLOCKS)


class Keep(ModularPipelineBlocks):
    """Keeps a value under a name that no other block has, before the next block changes it."""

    def __init__(self, name, kept):
        super().__init__()
        self.name, self.kept = name, kept

    @property
    def inputs(self):
        return [InputParam(self.name, required=True)]

    @property
    def intermediate_outputs(self):
        return [OutputParam(self.kept)]

    def __call__(self, components, state):
        state.set(self.kept, state.get(self.name).clone())
        return components, state


def image_to_image(family):
    """The blocks of diffusers alone."""
    return AUTO_BLOCKS[family]().get_workflow("image2image")


def init(blocks, family):
    """A pipeline of blocks, with a family's tiny models."""
    pipe = blocks.init_pipeline()
    components, names = FAMILIES[family].pipe().components, set(pipe.component_names)
    pipe.update_components(**{name: each for name, each in components.items() if name in names and each is not None})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def local_editor(family):
    blocks = IEditBlocks().insert_into(image_to_image(family))
    blocks.sub_blocks.insert("keep_source", Keep("image_latents", "source"), list(blocks.sub_blocks).index("iedit"))
    decoder = next(index for index, name in enumerate(blocks.sub_blocks) if name.startswith("decode"))
    blocks.sub_blocks.insert("keep_result", Keep("latents", "result"), decoder)
    return init(blocks, family)


def run(pipe, **arguments):
    how = {"image": PHOTO, "prompt": "a blue car", "height": HEIGHT, "width": WIDTH, "strength": 0.75}
    how |= {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)} | arguments
    return pipe(**how)


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
MASK = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
MASK[17:40, 24:57] = 255
EVERYTHING = np.full_like(MASK, 255)


def on_latents(mask, latents):
    """A mask as latents (B, C, h, w) or (B, C, 1, h, w) have it: bools."""
    cells = F.max_pool2d(torch.from_numpy(mask)[None, None].float(), CELL) > 0
    return (cells if latents.ndim == 4 else cells[:, :, None]).expand_as(latents)


# The edit


@every_family
def test_outside_of_the_mask_all_is_as_it_was_and_inside_it_is_edited(family):
    pipe = local_editor(family)
    state = run(pipe, mask_image=Image.fromarray(MASK))
    inside = on_latents(MASK, state.result)
    assert state.result.shape == state.source.shape
    assert torch.equal(state.result[~inside], state.source[~inside])
    assert (state.result[inside] != state.source[inside]).all()

    (edited,) = state.images
    changed = (np.asarray(edited) != np.asarray(PHOTO)).any(axis=-1)
    assert not changed[MASK == 0].any()
    assert changed[MASK > 0].mean() > 0.9


@every_family
def test_a_mask_of_everything_gives_what_the_blocks_of_diffusers_give(family):
    expected = run(init(image_to_image(family), family)).latents
    assert torch.equal(run(local_editor(family), mask_image=EVERYTHING).latents, expected)


@every_family
def test_a_run_leaves_the_pipeline_as_it_was_even_one_that_fails_in_its_midst(family):
    pipe = local_editor(family)
    attributes, scheduler, config = dict(vars(pipe)), dict(vars(pipe.scheduler)), dict(pipe.config)
    steps = []

    def fail(*_):
        steps.append(None)
        if len(steps) > 2:
            raise RuntimeError("out of memory")

    denoiser = pipe.unet if family == "sdxl" else pipe.transformer
    with denoiser.register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="out of memory"):
        run(pipe, mask_image=MASK)
    after_failure = run(pipe, mask_image=MASK).result

    assert vars(pipe).keys() == attributes.keys()
    assert all(vars(pipe)[name] is value for name, value in attributes.items())
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert all(vars(pipe.scheduler)[name] is value for name, value in scheduler.items())
    assert dict(pipe.config) == config
    assert torch.equal(after_failure, run(local_editor(family), mask_image=MASK).result)


def test_a_soft_mask_blends():
    pipe = local_editor("flux")
    soft = (MASK / 255 / 2).astype(np.float32)
    half, whole = (run(pipe, mask_image=mask) for mask in (soft, MASK))
    inside = on_latents(MASK, half.result)
    assert torch.equal(half.result[~inside], half.source[~inside])
    distances = [(state.result - state.source)[inside].abs().mean() for state in (half, whole)]
    assert 0 < distances[0] < distances[1]


def test_one_mask_serves_several_results_and_each_image_may_have_its_own():
    pipe = local_editor("flux")
    state = run(pipe, mask_image=MASK, num_images_per_prompt=2)
    inside = on_latents(MASK, state.result)
    source = state.source.expand_as(state.result)
    assert len(state.images) == len(state.result) == 2
    assert torch.equal(state.result[~inside], source[~inside])
    assert not torch.equal(*state.result)

    latents_only = local_editor("flux").blocks
    del latents_only.sub_blocks["keep_background"]
    both = {"image": [PHOTO, PHOTO], "prompt": ["a blue car"] * 2}
    state = run(init(latents_only, "flux"), mask_image=MASK, num_images_per_prompt=2, **both)
    inside = on_latents(MASK, state.result)
    assert len(state.result) == 4
    assert torch.equal(state.result[~inside], state.source.repeat_interleave(2, dim=0)[~inside])

    masks = [MASK, np.roll(MASK, 3 * CELL, axis=1)]
    state = run(pipe, mask_image=masks, **both)
    for latents, source, mask, image in zip(state.result, state.source, masks, state.images, strict=True):
        inside = on_latents(mask, latents[None])[0]
        assert torch.equal(latents[~inside], source[~inside])
        assert not (np.asarray(image) != np.asarray(PHOTO))[mask == 0].any()


def test_the_result_has_the_size_and_background_of_a_photo_that_was_scaled():
    photo = PHOTO.resize((150, 110), Image.Resampling.NEAREST)
    mask = Image.fromarray(MASK).resize(photo.size, Image.Resampling.NEAREST)
    (edited,) = run(local_editor("flux"), image=photo, mask_image=mask).images
    assert edited.size == photo.size
    changed = (np.asarray(edited) != np.asarray(photo)).any(axis=-1)
    assert not changed[np.asarray(mask) == 0].any()
    assert changed.any()


def test_a_colour_profile_is_kept_and_changes_no_pixel():
    photo = PHOTO.copy()
    photo.info["icc_profile"] = icc_profiles.display_p3()
    (with_profile,), (without,) = (
        run(local_editor("flux"), image=image, mask_image=MASK).images for image in (photo, PHOTO)
    )
    assert with_profile.info["icc_profile"] == photo.info["icc_profile"]
    assert np.array_equal(with_profile, without)


def test_output_types():
    pipe = local_editor("flux")
    images = {kind: run(pipe, mask_image=MASK, output_type=kind).images for kind in ("pil", "np", "pt")}
    # Of an 8-bit picture the edit was rounded twice: as it was decoded, and as it was set back.
    assert 0 < np.abs(images["np"][0] - np.asarray(images["pil"][0]) / 255).max() < 2 / 255
    assert torch.equal(images["pt"][0].permute(1, 2, 0), torch.from_numpy(images["np"][0]))
    assert (images["np"][0][MASK == 0] == np.asarray(PHOTO)[MASK == 0] / np.float32(255)).all()
    state = run(pipe, mask_image=MASK, output_type="latent")
    assert torch.equal(state.images, state.result)


# Words


@pytest.fixture(scope="module")
def finder():
    """A pipeline of nothing but the block that finds masks, with the mini mask model."""
    mini_pipe = IEditPipeline.from_pretrained(mini.model_path())
    pipe = SequentialPipelineBlocks.from_blocks_dict({"find_mask": IEditFindMaskStep()}).init_pipeline()
    pipe.update_components(mask_model=mini_pipe.mask_model, mask_model_processor=mini_pipe.mask_processor)
    return pipe


@pytest.fixture(scope="module")
def scene():
    return mini.render(22)  # an orange car and a red ball on green grass


@pytest.mark.parametrize(
    "words",
    [
        {"mask_prompt": "red ball"},
        {
            "source_prompt": "an orange car and a red ball on green grass",
            "prompt": "an orange car and a red cat on green grass",
        },
    ],
)
def test_words_find_the_mask_that_the_pipeline_finds(finder, scene, words):
    found = finder(image=scene.image, **words, output="mask_image")
    assert (found.mode, found.size) == ("L", scene.image.size)
    (expected,) = IEditPipeline.from_pretrained(mini.model_path()).predict_mask(scene.image, **words)
    assert np.array_equal(found, expected)
    truth = np.asarray(scene.mask) > 0
    marked = np.asarray(found) > 0
    assert (marked & truth).sum() / (marked | truth).sum() > 0.7


def test_several_images_have_a_mask_each(finder, scene):
    masks = finder(image=[scene.image, scene.image], mask_prompt=["red ball", "orange car"], output="mask_image")
    single = [finder(image=scene.image, mask_prompt=term, output="mask_image") for term in ("red ball", "orange car")]
    assert [np.array_equal(*pair) for pair in zip(masks, single, strict=True)] == [True, True]
    assert not np.array_equal(*masks)


def test_a_dilated_mask_is_larger(finder, scene):
    small, large = (
        np.asarray(finder(image=scene.image, mask_prompt="red ball", mask_dilation=pixels, output="mask_image")) > 0
        for pixels in (0, 2)
    )
    assert large[small].all()
    assert large.sum() > small.sum()


def test_a_given_mask_stays(finder, scene):
    assert finder(image=scene.image, mask_image=scene.mask, output="mask_image") is scene.mask


def test_words_and_edit_in_one_call(finder, scene):
    pipe = local_editor("sdxl")
    pipe.update_components(mask_model=finder.mask_model, mask_model_processor=finder.mask_model_processor)
    side = {"height": scene.image.height, "width": scene.image.width}
    state = run(pipe, image=scene.image, mask_prompt="red ball", prompt="a red cat", **side)
    assert np.array_equal(state.mask_image, finder(image=scene.image, mask_prompt="red ball", output="mask_image"))
    changed = (np.asarray(state.images[0]) != np.asarray(scene.image)).any(axis=-1)
    assert not changed[np.asarray(state.mask_image) == 0].any()
    assert changed.any()


def test_the_found_mask_serves_diffusers_own_inpainting_blocks(finder, scene):
    blocks = StableDiffusionXLAutoBlocks()
    blocks.sub_blocks.insert("find_mask", IEditFindMaskStep(), 0)
    pipe = init(blocks, "sdxl")
    pipe.update_components(mask_model=finder.mask_model, mask_model_processor=finder.mask_model_processor)
    side = {"height": scene.image.height, "width": scene.image.width}
    by_words = run(pipe, image=scene.image, mask_prompt="red ball", **side)
    by_mask = run(pipe, image=scene.image, mask_image=by_words.mask_image, **side)
    assert by_words.mask is not None
    assert np.array_equal(by_words.images[0], by_mask.images[0])


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "Pass `mask_image`, `mask_prompt`, or `source_prompt` together with `prompt`"),
        ({"mask_prompt": "ball", "mask_image": PHOTO}, "either `mask_image` or the words"),
        ({"mask_prompt": "ball", "source_prompt": "a ball"}, "only one of"),
        ({"source_prompt": "a red ball"}, "`source_prompt` is compared with `prompt`, which was not passed"),
        ({"source_prompt": "auto", "prompt": "a red cat"}, "`source_prompt` has to be a caption"),
        ({"source_prompt": "a red ball", "prompt": "a red ball"}, "differ in no word"),
        ({"mask_prompt": "purple house"}, "The predicted mask is empty: nothing in image 0 looks like 'purple house'"),
        ({"mask_prompt": "red ball", "mask_threshold": 1.0}, "`mask_threshold` has to be a probability"),
        ({"mask_prompt": "red ball", "mask_dilation": -1}, "`mask_dilation` has to be an integer of at least 0"),
    ],
)
def test_words_that_find_nothing(finder, scene, words, message):
    with pytest.raises(ValueError, match=message):
        finder(image=scene.image, **words)


def test_words_without_a_mask_model():
    with pytest.raises(ValueError, match=r"load_components\(\['mask_model', 'mask_model_processor'\]\)"):
        run(local_editor("flux"), mask_prompt="ball")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((32, 32), 255, dtype=np.uint8), "has to have the image's size, 96x64 pixels, but is 32x32"),
        (np.zeros_like(MASK), "zero everywhere"),
        ([MASK, MASK], "holds 2 masks for 1 images"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    with pytest.raises(ValueError, match=message):
        run(local_editor("flux"), mask_image=mask)


@pytest.mark.parametrize("words", [{"mask_prompt": "red ball"}, {"mask_image": MASK}])
def test_a_picture_that_diffusers_would_see_lying_on_its_side(finder, words):
    photo = PHOTO.copy()
    photo.getexif()[0x0112] = 6
    pipe = local_editor("flux")
    pipe.update_components(mask_model=finder.mask_model, mask_model_processor=finder.mask_model_processor)
    with pytest.raises(ValueError, match="`image` has to stand upright, but has EXIF orientation 6"):
        run(pipe, image=photo, **words)


def test_a_block_that_stands_too_late():
    blocks = image_to_image("flux")
    place = list(blocks.sub_blocks).index("denoise.before_denoise.prepare_latents")
    blocks.sub_blocks.insert("mask_scheduler", IEditMaskSchedulerStep(), place)
    with pytest.raises(ValueError, match="put this block before those that prepare the denoising"):
        run(init(blocks, "flux"), mask_image=MASK)


def test_several_results_of_several_images_are_not_mixed_up():
    block = SequentialPipelineBlocks.from_blocks_dict({"keep_background": IEditKeepBackgroundStep()})
    with pytest.raises(ValueError, match="one result for each image, but holds 4 of 2"):
        block.init_pipeline()(image=[PHOTO] * 2, images=[PHOTO] * 4, mask_image=MASK)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (StableDiffusionXLAutoBlocks(), "StableDiffusionXLAutoBlocks inpaints by it"),
        (QwenImageAutoBlocks(), "QwenImageAutoBlocks inpaints by it"),
        (FluxAutoBlocks().get_workflow("text2image"), "no block of SequentialPipelineBlocks encodes `image`"),
        (FluxKontextAutoBlocks().get_workflow("image_conditioned"), "starts from pure noise: it has no `strength`"),
    ],
)
def test_blocks_that_are_not_image_to_image(blocks, message):
    with pytest.raises(ValueError, match=message):
        IEditBlocks().insert_into(blocks)


def test_inserting_leaves_the_blocks_of_diffusers_as_they_are():
    workflow = image_to_image("flux")
    before = list(workflow.sub_blocks)
    edited = IEditBlocks().insert_into(workflow)
    assert list(workflow.sub_blocks) == before
    assert [name for name in edited.sub_blocks if name not in before] == ["iedit", "keep_background"]


# Folder and Hub


# In a fresh process: the blocks go to the Hub by the example, with a folder, over a card, and in two versions.
PUSH = """
import os
import runpy
import sys
from pathlib import Path

from diffusers_iedit.modular_iedit import IEditBlocks
from huggingface_hub import HfApi

sys.argv = ["push_blocks.py", "me/blocks", "--private"]
runpy.run_path(os.environ["SCRIPT"], run_name="__main__")
IEditBlocks().save_pretrained(Path(os.environ["TARGET"], "blocks"), push_to_hub=True, repo_id="me/saved")
IEditBlocks().push_to_hub("me/carded")
IEditBlocks().push_to_hub("me/changed")
commit = HfApi().model_info("me/changed").sha
newest = {"path_in_repo": "modular_iedit.py", "path_or_fileobj": b"raise SystemExit('the newest code ran')"}
HfApi().upload_file(repo_id="me/changed", **newest)
"""

# From then on without the package: an edit by the blocks of the folder, by those of the Hub, and by those of a commit.
EDIT = """
import json

for name in [name for name in sys.modules if name.split(".")[0] == "diffusers_iedit"]:
    sys.modules[name] = None
from diffusers import ModularPipelineBlocks, StableDiffusionXLAutoBlocks
from PIL import Image

os.chdir(os.environ["TARGET"])
image = Image.open("source.png")
size = {"height": image.height, "width": image.width}
said = {}
pinned = {"revision": commit}
for name, where, revision in [("folder", "./blocks", {}), ("hub", "me/blocks", {}), ("commit", "me/changed", pinned)]:
    try:
        ModularPipelineBlocks.from_pretrained(where, **revision)
    except ValueError as error:
        said[name] = [str(error)]
    iedit = ModularPipelineBlocks.from_pretrained(where, trust_remote_code=True, **revision)
    said[name].append(type(iedit).__module__)
    iedit.save_pretrained(f"{name}-again")
    blocks = iedit.insert_into(StableDiffusionXLAutoBlocks().get_workflow("image2image"))
    pipe = blocks.init_pipeline("model")
    for component in ("mask_model", "mask_model_processor"):
        pipe.load_components(component, pretrained_model_name_or_path=component)
    pipe.load_components()
    state = pipe(image=image, prompt="a red cat", mask_prompt="red ball", strength=0.7, num_inference_steps=4, **size)
    state.images[0].save(f"{name}-edited.png")
    state.mask_image.save(f"{name}-mask.png")
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory, scene):
    """A Hub that got the blocks, the folder of the process that pushed them and edited with them, and what it said."""
    target = tmp_path_factory.mktemp("target")
    StableDiffusionXLImg2ImgPipeline(**tiny_models.sdxl_components()).save_pretrained(target / "model")
    mini_pipe = IEditPipeline.from_pretrained(mini.model_path())
    mini_pipe.mask_model.save_pretrained(target / "mask_model")
    mini_pipe.mask_processor.save_pretrained(target / "mask_model_processor")
    scene.image.save(target / "source.png")
    script = Path(__file__).parents[1] / "examples" / "push_blocks.py"
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add("models", "me/carded", {"README.md": b"# Written by hand"})
        printed = output(server.run(PUSH + EDIT, SCRIPT=str(script), TARGET=str(target)))
        said = json.loads(printed.splitlines()[-1])
        yield server.repos["models"], target, said


def test_a_folder_of_blocks_has_the_code_and_names_the_class(saved):
    _, target, _ = saved
    files = files_in(target / "blocks")
    assert set(files) == {*CODE_FILES, "modular_config.json"}
    config = json.loads(files["modular_config.json"])
    assert config["auto_map"] == {"ModularPipelineBlocks": "modular_iedit.IEditBlocks"}


@pytest.mark.parametrize("repo_id", ["me/blocks", "me/saved"])
def test_a_push_has_the_files_of_the_folder_and_no_token(saved, repo_id):
    repos, target, _ = saved
    files = repos[repo_id].files()
    assert files_in(target / "blocks").items() <= files.items()
    assert set(files) - set(files_in(target / "blocks")) == {"README.md"}
    assert f'ModularPipelineBlocks.from_pretrained("{repo_id}"' in files["README.md"].decode()
    assert not [path for path, content in files.items() if TOKEN.encode() in content]
    assert repos[repo_id].private == (repo_id == "me/blocks")
    assert len(repos[repo_id].commits) == 2  # The first one made the repository.


def test_a_card_that_is_on_the_hub_stays(saved):
    repos, target, _ = saved
    assert repos["me/carded"].files() == files_in(target / "blocks") | {"README.md": b"# Written by hand"}


@pytest.mark.parametrize("name", ["folder", "hub", "commit"])
def test_saved_blocks_edit_without_this_package_for_who_trusts_them(saved, name):
    _, target, said = saved
    untrusted, module = said[name]
    assert "trust_remote_code=True" in untrusted
    assert module.startswith("diffusers_modules.local.")
    pictures = ("source.png", f"{name}-edited.png", f"{name}-mask.png")
    source, edited, mask = (np.asarray(Image.open(target / picture)) for picture in pictures)
    changed = (edited != source).any(axis=-1)
    assert changed.any()
    assert not changed[mask == 0].any()


@pytest.mark.parametrize("name", ["folder", "hub", "commit"])
def test_saved_blocks_can_be_saved_again(saved, name):
    _, target, _ = saved
    assert files_in(target / f"{name}-again") == files_in(target / "blocks")


def test_a_save_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    IEditBlocks().save_pretrained(tmp_path)
    before = files_in(tmp_path)

    def fail(source, part):
        Path(part).write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(OSError, match="no space left"):
        IEditBlocks().save_pretrained(tmp_path)
    after = files_in(tmp_path)
    assert {name: after[name] for name in before} == before
