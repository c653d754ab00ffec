"""Trains the mini BLIP, whose image tower starts from the mini CLIP's, to write a picture's caption."""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import Run, add_run_arguments, load_world, save_half, to_tensor
from train_clip import draw_batch
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipProcessor, CLIPModel
from transformers import BlipImageProcessorPil as BlipImageProcessor

from diffusers_iedit.mini import SIZE, Scene, captions, render


MAX_TOKENS = 48
"""Far more than a caption's 13, so that the model can be begun with a text and asked for 30 more."""


def build_processor() -> BlipProcessor:
    """BLIP's processor, with a WordPiece vocabulary in which every word of the mini world is one token.

    Any other text is spelt out in characters, or unknown where these are not ASCII.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    characters = [character for character in map(chr, range(33, 127)) if not character.isupper()]
    words = sorted({word for text in captions(1) for word in text.split()} | {"and"})
    tokens = dict.fromkeys([*special, *characters, *(f"##{character}" for character in characters), *words])
    tokenizer = BertTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, bos_token="[DEC]", model_max_length=MAX_TOKENS
    )
    image_processor = BlipImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return BlipProcessor(image_processor, tokenizer)


def build_model(clip: CLIPModel, tokenizer: BertTokenizer) -> BlipForConditionalGeneration:
    """BLIP for captions; its image tower has the weights of the mini CLIP's."""
    vision = clip.config.vision_config
    shared = {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_attention_heads": vision.num_attention_heads,
        "hidden_act": vision.hidden_act,
        "projection_dim": vision.projection_dim,
    }
    config = BlipConfig(
        vision_config=shared
        | {
            "num_hidden_layers": vision.num_hidden_layers,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "initializer_range": 0.02,
        },
        text_config=shared
        | {
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TOKENS,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
        },
        projection_dim=vision.projection_dim,
        image_text_hidden_size=vision.projection_dim,
    )
    model = BlipForConditionalGeneration._from_config(config, attn_implementation="eager")

    weights = {
        name: weight for name, weight in clip.vision_model.state_dict().items() if not name.startswith("embeddings.")
    }
    for layer in range(vision.num_hidden_layers):
        attention = f"encoder.layers.{layer}.self_attn."
        for kind in ("weight", "bias"):
            weights[f"{attention}qkv.{kind}"] = torch.cat(
                [weights.pop(f"{attention}{part}_proj.{kind}") for part in "qkv"]
            )
            weights[f"{attention}projection.{kind}"] = weights.pop(f"{attention}out_proj.{kind}")
    # CLIP normalises its embeddings before the first layer, BLIP does not. With the spread of a typical patch in
    # place of each patch's own, this is linear, and goes into the embeddings.
    scale, shift = weights.pop("pre_layrnorm.weight"), weights.pop("pre_layrnorm.bias")
    embeddings = clip.vision_model.embeddings
    place = embeddings.position_embedding.weight.detach()
    with torch.no_grad():
        pictures = to_tensor(np.stack([np.asarray(render(seed).image) for seed in range(32)]))
        spread = embeddings(pictures)[:, 1:].std(-1).mean()
        first = clip.vision_model.pre_layrnorm(embeddings.class_embedding + place[0])
    patch = embeddings.patch_embedding.weight.detach()
    weights["embeddings.patch_embedding.weight"] = (patch - patch.mean(0)) * scale[:, None, None, None] / spread
    weights["embeddings.patch_embedding.bias"] = shift
    weights["embeddings.class_embedding"] = torch.zeros(1, 1, vision.hidden_size)
    place = (place - place.mean(1, keepdim=True)) * scale / spread
    weights["embeddings.position_embedding"] = torch.cat([first[None], place[1:]])[None]
    model.vision_model.load_state_dict(weights)
    return model


@torch.no_grad()
def measure(model: BlipForConditionalGeneration, processor: BlipProcessor, scenes: list[Scene]) -> float:
    """The share of pictures that get exactly their caption."""
    inputs = processor(images=[scene.image for scene in scenes], return_tensors="pt").to(model.device)
    said = processor.batch_decode(model.generate(**inputs, max_new_tokens=30), skip_special_tokens=True)
    return float(np.mean([text == scene.caption for text, scene in zip(said, scenes, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, steps=3_000, batch_size=64, learning_rate=8e-4, precision="bf16")
    parser.add_argument("--clip", type=Path, help="folder of the mini CLIP; by default what train_clip.py left behind")
    args = parser.parse_args()

    run = Run("captioner", args)
    world = load_world(args.work_dir, args.world_size)
    processor = build_processor()
    tokenizer = processor.tokenizer
    model = build_model(CLIPModel.from_pretrained(args.clip or args.work_dir / "clip" / "clip"), tokenizer)
    model = run.prepare(model)
    watched = {
        f"{name}_{split or 'all'}": [render(seed, things=things, split=split) for seed in range(96)]
        for things, name in ((1, "one"), (2, "two"))
        for split in (None, "held_out")
    }

    for step, rng in run.steps():
        images, _, said, _ = draw_batch(world, rng, args.batch_size, partial=0, masked=0)
        inputs = tokenizer(said.texts(), padding=True, return_tensors="pt").to(run.device)
        inputs.input_ids[:, 0] = tokenizer.bos_token_id  # BLIP begins with [DEC], its tokenizer with [CLS]
        with run.accelerator.autocast():
            loss = model(
                pixel_values=to_tensor(images).to(run.device),
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                labels=inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100),
            ).loss
        run.update(loss)
        if (step + 1) % args.report_steps == 0:
            model.eval()
            run.log(
                step + 1, loss=loss, **{name: measure(model, processor, scenes) for name, scenes in watched.items()}
            )
            model.train()

    with run.finished("captioner") as folder:
        save_half(run.accelerator.unwrap_model(model), folder)
        processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
