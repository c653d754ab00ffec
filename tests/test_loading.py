"""Loading, saving and extending IEditPipeline: the four doors, adapters, single files, offloading."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from hub_server import files_in
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from test_pipeline import QUICK, box_mask, generator, make_pipe, picture

import diffusers_iedit
from diffusers_iedit import IEditMaskedScheduler, IEditPipeline


PACKAGE = Path(diffusers_iedit.__file__).parent
CODE_FILES = {"pipeline.py", "scheduling_iedit.py", "masking_iedit.py", "regions_iedit.py"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline with a mask model."""
    mask_model, mask_processor = tiny_models.clipseg()
    path = tmp_path_factory.mktemp("model") / "iedit"
    make_pipe(mask_model=mask_model, mask_processor=mask_processor).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    """A saved stock pipeline, as the Hub has them."""
    path = tmp_path_factory.mktemp("model") / "plain"
    make_pipe(StableDiffusionImg2ImgPipeline, seed=1).save_pretrained(path)
    return path


def edit(pipe, **arguments):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"mask_image": box_mask(), "generator": generator(), "output_type": "np"} | QUICK | arguments
    return pipe(picture(), **arguments).images


# The four doors


def test_door_1_our_class_needs_no_trust(folder):
    pipe = IEditPipeline.from_pretrained(folder)
    assert np.array_equal(edit(pipe), edit(make_pipe()))
    assert len(pipe.predict_mask(picture(), mask_prompt="car", mask_threshold=0.3)) == 1


def test_door_2_plain_diffusers_runs_the_saved_code_without_this_package(folder, tmp_path):
    script = f"""
import sys
sys.modules["diffusers_iedit"] = None
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, custom_pipeline={str(folder)!r}, trust_remote_code=True)
assert type(pipe).__module__.startswith("diffusers_modules."), type(pipe).__module__
source, mask = (Image.open({str(tmp_path)!r} + name) for name in ("/source.png", "/mask.png"))
image = pipe(source, {QUICK["prompt"]!r}, mask_image=mask, strength=0.75, num_inference_steps=4,
             generator=torch.Generator().manual_seed(0)).images[0]
image.save({str(tmp_path)!r} + "/edited.png")
pipe.save_pretrained({str(tmp_path)!r} + "/again")
"""
    picture().save(tmp_path / "source.png")
    box_mask().save(tmp_path / "mask.png")
    subprocess.run([sys.executable, "-c", script], check=True, env=environment(HF_MODULES_CACHE=tmp_path / "modules"))

    edited = np.asarray(Image.open(tmp_path / "edited.png"))
    assert np.array_equal(edited, np.asarray(edit(make_pipe(), output_type="pil")[0]))
    # A pipeline whose class came with the weights gives the code away again.
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == CODE_FILES


def environment(**variables):
    return os.environ | {name: str(value) for name, value in variables.items()}


@pytest.mark.parametrize("code", ["saved", "package"])
def test_door_3_our_code_over_other_weights(folder, plain_folder, code):
    custom_pipeline = str(folder if code == "saved" else PACKAGE)
    pipe = DiffusionPipeline.from_pretrained(plain_folder, custom_pipeline=custom_pipeline, trust_remote_code=True)
    assert type(pipe).__name__ == "IEditPipeline"
    assert np.array_equal(edit(pipe), edit(make_pipe(seed=1)))


def test_code_from_a_folder_runs_only_with_the_callers_trust(folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder))


def test_door_4_the_weights_open_in_stock_diffusers(folder):
    for cls in (StableDiffusionImg2ImgPipeline, DiffusionPipeline):
        pipe = cls.from_pretrained(folder)
        assert type(pipe) is StableDiffusionImg2ImgPipeline
        pipe.set_progress_bar_config(disable=True)
        images = pipe(image=picture(), generator=generator(), output_type="np", **QUICK).images
        assert np.array_equal(images, edit(make_pipe(), mask_image=None))


def test_stock_weights_open_in_our_class_and_take_a_mask_model(plain_folder):
    mask_model, mask_processor = tiny_models.clipseg()
    pipe = IEditPipeline.from_pretrained(plain_folder, mask_model=mask_model, mask_processor=mask_processor)
    assert pipe.mask_model is mask_model
    assert np.array_equal(edit(pipe), edit(make_pipe(seed=1)))


# Saving


def test_the_code_files_lie_beside_the_weights(folder):
    for name in CODE_FILES:
        assert (folder / name).read_bytes() == (PACKAGE / name).read_bytes()
    assert {path.name for path in folder.iterdir() if path.is_file()} == CODE_FILES | {"model_index.json"}
    assert not list(folder.rglob("*.bin"))


def test_a_saved_pipeline_does_not_tell_where_it_was_loaded_from(folder, tmp_path):
    pipe = IEditPipeline.from_pretrained(folder)
    assert pipe.unet.config._name_or_path == str(folder / "unet")
    pipe.save_pretrained(tmp_path)
    old, new = files_in(folder), files_in(tmp_path)
    assert not [name for name, content in new.items() if str(folder).encode() in content]
    assert new["model_index.json"] == old["model_index.json"]
    assert new["unet/config.json"] == old["unet/config.json"]


def test_a_wrapped_scheduler_is_saved_as_the_stock_one(tmp_path):
    pipe = make_pipe()
    pipe.scheduler = IEditMaskedScheduler.wrap(pipe.scheduler, torch.ones(1, 1, 8, 8))
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert "mask" not in (tmp_path / "scheduler" / "scheduler_config.json").read_text()


def test_every_component_survives_a_round_trip(tmp_path):
    captioner, caption_processor = tiny_models.blip()
    mask_model, mask_processor = tiny_models.clipseg()
    checker, feature_extractor = tiny_models.safety_checker()
    pipe = make_pipe(
        captioner=captioner,
        caption_processor=caption_processor,
        mask_model=mask_model,
        mask_processor=mask_processor,
        safety_checker=checker,
        feature_extractor=feature_extractor,
        image_encoder=tiny_models.image_encoder()[0],
    )
    pipe.save_pretrained(tmp_path)
    again = IEditPipeline.from_pretrained(tmp_path)
    assert {name for name, component in again.components.items() if component is None} == set()
    assert np.array_equal(edit(again, mask_image=None), edit(pipe, mask_image=None))


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_corrupted_weight_file_is_named(folder, tmp_path, damage):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000] if damage == "truncated" else b"not a safetensors file" * 100)
    with pytest.raises(OSError, match=re.escape(weights.name)):
        IEditPipeline.from_pretrained(broken)


def test_a_folder_that_is_no_pipeline_is_named(tmp_path):
    with pytest.raises(OSError, match=f"model_index.json.*{re.escape(str(tmp_path))}"):
        IEditPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({"in_channels": 9}, "`unet` has to take the 4 latent channels .* but takes 9"),
        ({"addition_embed_type": "text"}, "`unet` has to be one of Stable Diffusion 1 or 2"),
    ],
)
def test_models_for_other_tasks_are_refused_before_an_edit(unet, message):
    with pytest.raises(ValueError, match=message):
        IEditPipeline(**tiny_models.sd_components(**unet))


# What the stock pipeline offers


def test_from_pipe_shares_the_components_both_ways():
    stock = make_pipe(StableDiffusionImg2ImgPipeline)
    ours = IEditPipeline.from_pipe(stock)
    assert ours.unet is stock.unet
    assert np.array_equal(edit(ours), edit(make_pipe()))
    back = StableDiffusionImg2ImgPipeline.from_pipe(ours)
    assert back.unet is stock.unet


def test_lora_weights_load_and_scale(tmp_path):
    pipe = make_pipe()
    base = edit(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    pipe.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))

    pipe = make_pipe()
    pipe.load_lora_weights(tmp_path)
    assert not np.allclose(edit(pipe), base, atol=1e-4)
    np.testing.assert_allclose(edit(pipe, cross_attention_kwargs={"scale": 0.0}), base, atol=1e-5)


def test_lora_weights_of_the_text_encoder_load_too(tmp_path):
    pipe = make_pipe()
    base = edit(pipe)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    pipe.save_lora_weights(tmp_path, text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder))

    pipe = make_pipe()
    pipe.load_lora_weights(tmp_path)
    assert not np.allclose(edit(pipe), base, atol=1e-4)
    pipe.unload_lora_weights()
    np.testing.assert_allclose(edit(pipe), base, atol=1e-5)


def test_textual_inversion_adds_a_token(tmp_path):
    pipe = make_pipe()
    path = tmp_path / "embedding.safetensors"
    save_file({"<toy>": torch.full((32,), 3.0)}, path)
    before = edit(pipe, prompt="a <toy>")
    pipe.load_textual_inversion(str(path))
    assert "<toy>" in pipe.tokenizer.get_vocab()
    assert not np.array_equal(edit(pipe, prompt="a <toy>"), before)


def ip_adapter_weights(unet, image_dim=32, num_tokens=4):
    """The published layout: a projection of the image embedding, and a key and a value matrix a cross-attention."""
    width = unet.config.cross_attention_dim
    rng = torch.Generator().manual_seed(0)
    adapter, index = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            out = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                adapter[f"{index}.{part}.weight"] = torch.randn(out, width, generator=rng)
            index += 2
    projection = {
        "proj.weight": torch.randn(width * num_tokens, image_dim, generator=rng),
        "proj.bias": torch.zeros(width * num_tokens),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": adapter}


def test_ip_adapter_steers_the_edit():
    image_encoder, feature_extractor = tiny_models.image_encoder()
    pipe = make_pipe(image_encoder=image_encoder, feature_extractor=feature_extractor)
    pipe.load_ip_adapter(ip_adapter_weights(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    one, other = (edit(pipe, ip_adapter_image=picture(32, 32, seed=seed)) for seed in (1, 2))
    assert not np.array_equal(one, other)
    embeds = pipe.prepare_ip_adapter_image_embeds(picture(32, 32, seed=1), None, "cpu", 1, True)
    assert np.array_equal(edit(pipe, ip_adapter_image_embeds=embeds), one)


def ldm_unet_state_dict(unet):
    """The weights of a two-level, one-layer UNet under the names of the original Stable Diffusion checkpoints."""
    blocks = {
        "conv_in.": "input_blocks.0.0.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "down_blocks.0.resnets.0.": "input_blocks.1.0.",
        "down_blocks.0.downsamplers.0.conv.": "input_blocks.2.0.op.",
        "down_blocks.1.resnets.0.": "input_blocks.3.0.",
        "down_blocks.1.attentions.0.": "input_blocks.3.1.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
        "up_blocks.0.resnets.0.": "output_blocks.0.0.",
        "up_blocks.0.attentions.0.": "output_blocks.0.1.",
        "up_blocks.0.resnets.1.": "output_blocks.1.0.",
        "up_blocks.0.attentions.1.": "output_blocks.1.1.",
        "up_blocks.0.upsamplers.0.conv.": "output_blocks.1.2.conv.",
        "up_blocks.1.resnets.0.": "output_blocks.2.0.",
        "up_blocks.1.resnets.1.": "output_blocks.3.0.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
    }
    layers = {
        "norm1.": "in_layers.0.",
        "conv1.": "in_layers.2.",
        "time_emb_proj.": "emb_layers.1.",
        "norm2.": "out_layers.0.",
        "conv2.": "out_layers.3.",
        "conv_shortcut.": "skip_connection.",
    }
    renamed = {}
    for name, tensor in unet.state_dict().items():
        block = next(prefix for prefix in blocks if name.startswith(prefix))
        rest = name.removeprefix(block)
        if "resnets" in block:
            layer = next(prefix for prefix in layers if rest.startswith(prefix))
            rest = layers[layer] + rest.removeprefix(layer)
        renamed[f"model.diffusion_model.{blocks[block]}{rest}"] = tensor
    return renamed


def test_from_single_file_loads_an_original_checkpoint(tmp_path, plain_folder):
    components = tiny_models.sd_components(seed=1)
    path = tmp_path / "checkpoint.safetensors"
    save_file(ldm_unet_state_dict(components.pop("unet")), path)
    pipe = IEditPipeline.from_single_file(str(path), config=str(plain_folder), **components)
    assert np.array_equal(edit(pipe), edit(make_pipe(seed=1)))


def test_slicing_gives_the_same_edit():
    pipe = make_pipe()
    expected = edit(pipe)
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    np.testing.assert_allclose(edit(pipe), expected, atol=1e-5)


def test_offloading_reaches_every_model():
    mask_model, mask_processor = tiny_models.clipseg()
    captioner, caption_processor = tiny_models.blip()
    pipe = make_pipe(
        mask_model=mask_model, mask_processor=mask_processor, captioner=captioner, caption_processor=caption_processor
    )
    arguments = {"mask_image": None, "source_prompt": "auto", "mask_threshold": 0.3}
    expected = edit(pipe, **arguments)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(edit(pipe, **arguments), expected)
    models = {name: component for name, component in pipe.components.items() if isinstance(component, torch.nn.Module)}
    assert {"captioner", "mask_model", "text_encoder", "unet", "vae"} <= set(models)
    assert all(hasattr(model, "_hf_hook") for model in models.values())


def test_importing_the_package_is_cheap_and_silent():
    script = (
        "import sys, torch, time; start = time.process_time(); import diffusers_iedit;"
        "assert time.process_time() - start < 0.5; assert 'diffusers' not in sys.modules;"
        "assert 'transformers' not in sys.modules; assert 'IEditPipeline' in dir(diffusers_iedit)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == result.stderr == ""
