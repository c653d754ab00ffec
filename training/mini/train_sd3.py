"""Trains the mini SD3Transformer2DModel, a flow-matching model, on the latents and text states of the others."""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Run, add_run_arguments, load_world, save_half, world_captions
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from diffusers.training_utils import compute_density_for_timestep_sampling
from train_unet import cache_latents, judge_samples, save_sheet
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from diffusers_iedit.mini import captions
from diffusers_iedit.mini.judging import Judge


T5_TOKENS = 256
"""Rows that the T5 encoder gives in the pipeline by default (`max_sequence_length`)."""


def silent_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 encoder that says nothing: the rows of zeros that the pipeline has without one.

    A folder without a T5 can be loaded only by those who name it.
    """
    tokenizer = T5Tokenizer(extra_ids=0)
    t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    for parameter in t5.parameters():
        torch.nn.init.zeros_(parameter)
    return t5.eval(), tokenizer


def frozen_components(vae: Path, clip: Path, dtype: torch.dtype = torch.float32) -> dict:
    """All components of the pipeline but the transformer, from the folders of the mini VAE and CLIP."""
    autoencoder = AutoencoderKL.from_pretrained(vae, torch_dtype=dtype).eval()
    # SD3's pipelines compute with it, where the others take None.
    autoencoder.register_to_config(shift_factor=0.0)
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    text_encoder = CLIPTextModelWithProjection.from_pretrained(clip, dtype=dtype).eval()
    t5, t5_tokenizer = silent_t5(2 * text_encoder.config.hidden_size)
    return {
        "vae": autoencoder,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        # The pipeline has to have two.
        "text_encoder_2": text_encoder,
        "tokenizer_2": tokenizer,
        "text_encoder_3": t5.to(dtype),
        "tokenizer_3": t5_tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


@torch.no_grad()
def encode(pipe: StableDiffusion3Pipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's states as the pipeline computes them, (N, 24, 256), and the pooled ones, (N, 256); both fp16."""
    states, pooled = [], []
    for start in range(0, len(texts), 512):
        batch = texts[start : start + 512]
        both = pipe.encode_prompt(
            batch, None, [""] * len(batch), do_classifier_free_guidance=False, max_sequence_length=1
        )
        states.append(both[0][:, : pipe.tokenizer_max_length].half())
        pooled.append(both[2].half())
    return torch.cat(states), torch.cat(pooled)


class OneRowForAll:
    """[`JointAttnProcessor2_0`] for text states of which the last row stands for `count` equal ones.

    T5's rows of zeros are equal, and stay so from block to block. One that counts for all of them in the softmax gives
    what they would give, at a quarter of the cost.
    """

    def __init__(self, count: int):
        self.log_count = math.log(count)

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def heads(states: torch.Tensor, norm: torch.nn.Module | None) -> torch.Tensor:
            states = states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return states if norm is None else norm(states)

        image, text = hidden_states, encoder_hidden_states
        query = torch.cat([heads(attn.to_q(image), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)], 2)
        key = torch.cat([heads(attn.to_k(image), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)], 2)
        value = torch.cat([heads(attn.to_v(image), None), heads(attn.add_v_proj(text), None)], 2)
        weights = F.pad(key.new_full((1, 1, 1, 1), self.log_count), (key.shape[2] - 1, 0))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=weights)
        image, text = attended.transpose(1, 2).flatten(2).tensor_split([image.shape[1]], dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def build_transformer(layers: int, heads: int, width: int) -> SD3Transformer2DModel:
    """The model before training, for text states and pooled ones of this width."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        caption_projection_dim=32 * heads,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        # In patches: pictures of up to 128 pixels.
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    # As in DiT, every block starts as the identity, and the whole as 0; diffusers leaves this to the trainer.
    modulations = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    for linear in modulations:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return transformer


@torch.no_grad()
def let_through(linear: torch.nn.Linear, inputs: torch.Tensor) -> None:
    """Scales a projection so that these inputs, (..., D), leave it with unit variance.

    The text states lack CLIP's final norm, and are far from unit variance.
    """
    linear.weight.div_(F.linear(inputs.to(linear.weight), linear.weight).std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, steps=5_000, batch_size=96, learning_rate=2e-3, precision="bf16")
    # Samples are made by the stock pipeline, which takes its time.
    parser.set_defaults(warmup_steps=200, report_steps=1_000)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4, help="of 32 channels each")
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--vae", type=Path, help="folder of the mini VAE; by default what train_vae.py left behind")
    parser.add_argument("--clip", type=Path, help="folder of the mini CLIP; by default what train_clip.py left behind")
    parser.add_argument("--judge", type=Path, help="folder of the judge, for the progress report")
    args = parser.parse_args()

    run = Run("sd3", args)
    world = load_world(args.work_dir, args.world_size)
    frozen = frozen_components(args.vae or args.work_dir / "vae" / "vae", args.clip or args.work_dir / "clip" / "clip")
    judge = Judge.from_pretrained(args.judge or args.work_dir / "judge" / "judge").to(run.device)
    width = 2 * frozen["text_encoder"].config.hidden_size
    # Samples are made by the average of the weights, and with T5's rows in full, as in use.
    averaged = build_transformer(args.layers, args.heads, width).eval()
    pipe = StableDiffusion3Pipeline(**frozen, transformer=averaged).to(run.device)
    pipe.set_progress_bar_config(disable=True)

    # Everything that a step needs waits on the device: the model is so small that a GPU would wait for the rest.
    latents = cache_latents(pipe.vae, world, run.folder.parent / "latents.npy")
    latents = torch.from_numpy(latents).to(run.device)
    texts, text_of_scene = np.unique(world_captions(world), return_inverse=True)
    states, pooled = encode(pipe, ["", *texts.tolist()])
    text_of_scene = text_of_scene + 1

    transformer = build_transformer(args.layers, args.heads, width)
    transformer.set_attn_processor(OneRowForAll(T5_TOKENS))
    let_through(transformer.context_embedder, states[::16])
    let_through(transformer.time_text_embed.text_embedder.linear_1, pooled[::16])
    transformer = run.prepare(transformer)
    ema = run.average(transformer)
    test_texts = captions(1)[::11][:48]

    for step, rng in run.steps():
        chosen = rng.choice(len(world), args.batch_size, replace=False)
        dropped = rng.random(args.batch_size) < args.caption_dropout
        text = torch.from_numpy(np.where(dropped, 0, text_of_scene[chosen])).to(run.device)
        generator = torch.Generator(run.device).manual_seed(int(rng.integers(2**62)))
        z_0 = latents[torch.from_numpy(chosen).to(run.device)].float()
        noise = torch.randn(z_0.shape, generator=generator, device=run.device)
        sigma = compute_density_for_timestep_sampling(
            "logit_normal", len(z_0), logit_mean=0.0, logit_std=1.0, device=run.device, generator=generator
        )
        z_t = torch.lerp(z_0, noise, sigma.view(-1, 1, 1, 1))

        with run.accelerator.autocast():
            velocity = transformer(
                hidden_states=z_t,
                encoder_hidden_states=F.pad(states[text].float(), (0, 0, 0, 1)),
                pooled_projections=pooled[text].float(),
                timestep=1000 * sigma,
            ).sample.float()
        loss = F.mse_loss(velocity, noise - z_0)
        run.update(loss)
        ema.step(transformer.parameters())

        if (step + 1) % args.report_steps == 0:
            ema.copy_to(averaged.parameters())
            images = pipe(
                test_texts,
                guidance_scale=3.0,
                num_inference_steps=14,
                generator=torch.Generator().manual_seed(0),
            ).images
            run.log(step + 1, loss=loss, **judge_samples(judge, images, test_texts))
            save_sheet(images, run.folder / f"samples-{step + 1}.png")

    ema.copy_to(averaged.parameters())
    with run.finished("sd3") as folder:
        save_half(averaged, folder)


if __name__ == "__main__":
    main()
