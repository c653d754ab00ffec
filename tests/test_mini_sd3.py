"""The mini SD3, a flow-matching model of the mini world: its folder, what it makes, and the script that trains it."""

import importlib
import logging
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Img2ImgPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import load_file
from small_pairs import process_as_before

from diffusers_iedit import IEditMaskedScheduler, IEditPipeline, loading, mini
from diffusers_iedit.mini.judging import Judge


TRAINING = Path(__file__).parents[1] / "training" / "mini"


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusion3Img2ImgPipeline.from_pretrained(mini.model_path("sd3"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def train_sd3(monkeypatch):
    monkeypatch.syspath_prepend(str(TRAINING))
    return importlib.import_module("train_sd3")


# The folder


def test_the_mini_models_have_names():
    assert mini.model_path() == mini.model_path("iedit")
    assert mini.model_path("sd3").name == "sd3"
    with pytest.raises(ValueError, match="`name` has to be one of 'iedit', 'sd3', but is 'sdxl'"):
        mini.model_path("sdxl")


def test_mini_sd3_is_a_name_where_a_pipeline_is_named(pipe):
    loaded = loading.load_pipeline(DiffusionPipeline, "mini-sd3", "--model")
    assert type(loaded) is StableDiffusion3Img2ImgPipeline
    for name, module in loaded.components.items():
        if isinstance(module, torch.nn.Module):
            assert module.dtype == torch.float32
            theirs = pipe.components[name].state_dict()
            assert all(torch.equal(weight, theirs[key]) for key, weight in module.state_dict().items())


def test_that_a_folder_of_its_class_has_no_mask_model_is_no_news(capsys):
    """`capsys` is what a handler of diffusers' that begins now writes into."""
    handler = logging.StreamHandler()
    diffusers_logging.add_handler(handler)
    try:
        loading.load_pipeline(DiffusionPipeline, mini.model_path("sd3"), "--model", mask_model=None, captioner=None)
    finally:
        diffusers_logging.remove_handler(handler)
    assert "captioner" not in capsys.readouterr().err


def test_mini_sd3_is_no_model_for_iedit_pipeline():
    with pytest.raises(ValueError, match="--model 'mini-sd3' gives no usable IEditPipeline"):
        loading.load_pipeline(IEditPipeline, "mini-sd3", "--model")


def test_its_vae_and_its_text_encoders_are_those_of_the_mini_model(pipe):
    theirs = load_file(mini.model_path() / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, theirs[key].float()) for key, weight in pipe.vae.state_dict().items())
    assert pipe.vae.config.shift_factor == 0.0
    theirs = load_file(mini.clip_path() / "model.safetensors")
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        assert all(torch.equal(weight, theirs[key].float()) for key, weight in encoder.state_dict().items())


def test_its_t5_says_what_the_pipeline_has_without_one(pipe):
    arguments = {"prompt": "a red car", "prompt_2": None, "prompt_3": None, "negative_prompt": "Zwölf 日本 🚗"}
    with torch.no_grad():
        with_t5 = pipe.encode_prompt(**arguments)
        components = pipe.components | {"text_encoder_3": None, "tokenizer_3": None}
        without = StableDiffusion3Img2ImgPipeline(**components).encode_prompt(**arguments)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(with_t5, without, strict=True))


def test_an_edit_shows_what_the_prompt_names_and_leaves_the_latents_outside(pipe):
    judge = Judge.from_pretrained(mini.judge_path())
    scenes = [mini.render(seed) for seed in range(4)]
    targets = [
        scene.swap(thing=next(noun for noun in mini.NOUNS if noun not in scene.caption))
        if seed % 2
        else scene.swap(colour=next(colour for colour in mini.COLOURS if colour not in scene.caption))
        for seed, scene in enumerate(scenes)
    ]
    masks = [scene.mask for scene in scenes]
    with torch.no_grad():
        images = pipe.image_processor.preprocess([scene.image for scene in scenes])
        source = pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
    masked = StableDiffusion3Img2ImgPipeline(**pipe.components)
    masked.scheduler = IEditMaskedScheduler.wrap(pipe.scheduler, masks)
    masked.set_progress_bar_config(disable=True)
    latents = masked(
        [target.caption for target in targets],
        image=source,
        strength=0.7,
        guidance_scale=3.0,
        num_inference_steps=14,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    outside = (F.adaptive_max_pool2d(masked.scheduler.mask, latents.shape[-2:]) == 0).expand_as(latents)
    assert torch.equal(latents[outside], source[outside])
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    verdicts = judge.look(pipe.image_processor.postprocess(decoded), masks)
    right = [
        (verdict.noun, verdict.colour) == (target.thing.noun, target.thing.colour)
        for verdict, target in zip(verdicts, targets, strict=True)
    ]
    assert sum(right) >= 3


# The training


def test_one_row_stands_for_all_of_t5s(train_sd3):
    torch.manual_seed(0)
    transformer = train_sd3.build_transformer(layers=2, heads=2, width=32)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    states = torch.randn(2, 5, 32)
    inputs = {"hidden_states": torch.randn(2, 4, 16, 16), "pooled_projections": torch.randn(2, 32)}
    inputs["timestep"] = torch.tensor([100.0, 900.0])

    def run(rows):
        transformer.zero_grad()
        output = transformer(**inputs, encoder_hidden_states=F.pad(states, (0, 0, 0, rows))).sample
        output.square().mean().backward()
        return output.detach(), [parameter.grad.clone() for parameter in transformer.parameters()]

    output, gradients = run(256)
    transformer.set_attn_processor(train_sd3.OneRowForAll(256))
    quick_output, quick_gradients = run(1)
    torch.testing.assert_close(quick_output, output, rtol=1e-4, atol=1e-4)
    for quick, gradient in zip(quick_gradients, gradients, strict=True):
        torch.testing.assert_close(quick, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_a_new_model_predicts_nothing_yet_and_takes_text_at_its_own_scale(train_sd3):
    transformer = train_sd3.build_transformer(layers=1, heads=1, width=32)
    inputs = {"hidden_states": torch.randn(1, 4, 16, 16), "pooled_projections": torch.randn(1, 32)}
    states = 50 * torch.randn(1, 5, 32)
    with torch.no_grad():
        output = transformer(**inputs, encoder_hidden_states=states, timestep=torch.tensor([500.0])).sample
    assert not output.any()
    train_sd3.let_through(transformer.context_embedder, states)
    assert F.linear(states, transformer.context_embedder.weight).std().item() == pytest.approx(1, rel=1e-3)


@pytest.fixture
def train(train_sd3, monkeypatch):
    """A function that runs the script on 24 scenes, with a checkpoint after every step, and gives the trained part."""

    def run(work_dir: Path) -> Path:
        folders = {"vae": mini.model_path() / "vae", "clip": mini.clip_path(), "judge": mini.judge_path()}
        options = {"work_dir": work_dir, "world_size": 24, "steps": 5, "batch_size": 4, "warmup_steps": 1}
        options |= {"layers": 1, "heads": 1, "mixed_precision": "no", "checkpoint_minutes": 0, "report_steps": 5}
        argv = [word for name, value in (folders | options).items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["train_sd3.py", *argv])
        try:
            with process_as_before():
                train_sd3.main()
        finally:
            torch.set_flush_denormal(False)
        return work_dir / "sd3" / "sd3"

    return run


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(train, train_sd3, tmp_path, monkeypatch, capsys):
    whole = train(tmp_path / "whole")
    assert "step 5  loss " in capsys.readouterr().out
    assert Image.open(tmp_path / "whole" / "sd3" / "samples-5.png").size == (768, 256)
    transformer = SD3Transformer2DModel.from_pretrained(whole)
    assert transformer.dtype == torch.float32
    assert {weight.dtype for weight in load_file(whole / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    assert transformer.proj_out.weight.any()

    update, updates = train_sd3.Run.update, []

    def stop_at_the_fourth(self, loss):
        updates.append(loss)
        if len(updates) == 4:
            raise KeyboardInterrupt
        update(self, loss)

    monkeypatch.setattr(train_sd3.Run, "update", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped")
    assert [folder.name for folder in (tmp_path / "stopped" / "sd3").iterdir()] == ["checkpoint-000003"]
    monkeypatch.setattr(train_sd3.Run, "update", update)
    resumed = train(tmp_path / "stopped")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()
