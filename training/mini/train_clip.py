"""Trains the mini CLIP, whose text tower becomes the pipeline's text encoder, and builds its tokenizer."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    COLOUR_LIST,
    NOUN_LIST,
    SCENE_LIST,
    MiniWorld,
    Run,
    add_run_arguments,
    describe,
    load_world,
    save_half,
    to_tensor,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffusers_iedit.mini import SIZE, caption, captions, render


MAX_TOKENS = 24
BLACK = len(SCENE_LIST)
"""Scene index of a picture whose background was blacked out."""


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level BPE in which every word of the mini world is one token and any other text still has tokens."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([*captions(1), "and"], trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, special tokens.
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)
    words = sorted({word for text in captions(1) for word in text.split()} | {"and"})
    split = [word for word in words if len(tokenizer(word).input_ids) != 3]
    if split:
        raise RuntimeError(f"The tokenizer splits words of the mini world: {split}")
    return tokenizer


@dataclass
class Content:
    """What a picture shows or a text says, so that a batch knows which text describes which picture.

    `count` 0 marks a partial text ("red car", "car"): it names one thing, and describes every picture that has it.
    """

    count: np.ndarray  # (N,)
    nouns: np.ndarray  # (N, 2), -1 = no second thing
    colours: np.ndarray  # (N, 2), -1 = no second thing, or any colour in a partial text
    scenes: np.ndarray  # (N,)

    def __getitem__(self, index) -> "Content":
        return Content(self.count[index], self.nouns[index], self.colours[index], self.scenes[index])

    def texts(self) -> list[str]:
        return [self._text(row) for row in range(len(self.count))]

    def _text(self, row: int) -> str:
        named = [
            (NOUN_LIST[noun], COLOUR_LIST[colour] if colour >= 0 else "")
            for noun, colour in zip(self.nouns[row], self.colours[row], strict=True)
            if noun >= 0
        ]
        if self.count[row] == 0:
            return f"{named[0][1]} {named[0][0]}".strip()
        scene = SCENE_LIST[self.scenes[row]] if self.scenes[row] != BLACK else ""
        return caption(named, scene).strip()

    def describes(self, picture: "Content") -> np.ndarray:
        """(pictures, texts) bool."""
        noun = picture.nouns[:, None, :] == self.nouns[None, :, :]
        colour = picture.colours[:, None, :] == self.colours[None, :, :]
        scene = picture.scenes[:, None] == self.scenes[None]
        whole = (noun & colour).all(2) & scene & (picture.count[:, None] == self.count[None])
        has = (picture.nouns[:, None, :] == self.nouns[None, :, :1]) & (
            (picture.colours[:, None, :] == self.colours[None, :, :1]) | (self.colours[None, :, :1] < 0)
        )
        return np.where(self.count[None] == 0, has.any(2), whole)


def draw_batch(world: MiniWorld, rng: np.random.Generator, size: int, partial: float, masked: float):
    """Pictures (uint8, (B, 64, 64, 3)), what they show, what is said of each, and a hard negative for that text.

    `partial` is the share of texts that name one thing only, `masked` that of pictures with all but one thing black.
    """
    chosen = np.sort(rng.choice(len(world), size, replace=False))
    images, labels = world.images[chosen].copy(), world.labels[chosen].copy()
    shows = Content(
        (world.nouns[chosen] >= 0).sum(1),
        world.nouns[chosen].astype(int),
        world.colours[chosen].astype(int),
        world.scenes[chosen].astype(int),
    )

    # A shift of up to 3 pixels keeps the small set of pictures from being learnt by heart.
    for row, (down, right) in enumerate(rng.integers(0, 7, (size, 2))):
        padded = np.pad(images[row], ((3, 3), (3, 3), (0, 0)), mode="edge")
        images[row] = padded[down : down + SIZE, right : right + SIZE]
        padded = np.pad(labels[row], 3)
        labels[row] = padded[down : down + SIZE, right : right + SIZE]

    # Everything but one thing black: CLIP losses on edits look at pictures cut out along a mask.
    for row in np.flatnonzero(rng.random(size) < masked):
        slot = rng.integers(shows.count[row])
        images[row][labels[row] != slot + 1] = 0
        shows.nouns[row] = shows.nouns[row, slot], -1
        shows.colours[row] = shows.colours[row, slot], -1
        shows.count[row], shows.scenes[row] = 1, BLACK

    said = Content(*(field.copy() for field in (shows.count, shows.nouns, shows.colours, shows.scenes)))
    for row in np.flatnonzero(rng.random(size) < partial):
        slot = rng.integers(shows.count[row])
        said.count[row] = 0
        said.nouns[row] = shows.nouns[row, slot], -1
        said.colours[row] = shows.colours[row, slot] if rng.random() < 0.7 else -1, -1

    wrong = Content(*(field.copy() for field in (said.count, said.nouns, said.colours, said.scenes)))
    for row in range(size):
        change = rng.integers(6)
        if said.count[row] == 2 and change < 3:
            if change in (0, 2):
                wrong.nouns[row] = wrong.nouns[row, ::-1]
            if change in (1, 2):
                wrong.colours[row] = wrong.colours[row, ::-1]
            continue
        slot = rng.integers(max(said.count[row], 1))
        if change == 3 and said.scenes[row] != BLACK and said.count[row] > 0:
            wrong.scenes[row] = rng.integers(len(SCENE_LIST))
        elif change == 4 or said.colours[row, slot] < 0:
            wrong.nouns[row, slot] = rng.integers(len(NOUN_LIST))
        else:
            wrong.colours[row, slot] = rng.integers(len(COLOUR_LIST))
    return images, shows, said, wrong


class AttributeHead(torch.nn.Module):
    """Reads the content of a picture or text off its embedding; it only speeds up training and is thrown away."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = [len(NOUN_LIST) + 1] * 2 + [len(COLOUR_LIST) + 1] * 2 + [len(SCENE_LIST) + 1]
        self.linear = torch.nn.Linear(width, sum(self.sizes))

    def forward(self, embeds: torch.Tensor, content: Content) -> torch.Tensor:
        """Mean cross-entropy over all attributes; "no second thing" is a class of its own."""
        targets = np.concatenate([content.nouns, content.colours, content.scenes[:, None]], axis=1)
        targets = torch.from_numpy(targets % np.array(self.sizes)).to(embeds.device)
        logits = self.linear(embeds).split(self.sizes, dim=1)
        return torch.stack(
            [F.cross_entropy(part, target) for part, target in zip(logits, targets.T, strict=True)]
        ).mean()


@torch.no_grad()
def embed_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str], batch: int = 1024) -> torch.Tensor:
    """Unit-length embeddings, (N, D)."""
    embeds = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(texts[start : start + batch], padding=True, return_tensors="pt").to(clip.device)
        embeds.append(clip.get_text_features(**inputs).pooler_output)
    return F.normalize(torch.cat(embeds), dim=-1)


@torch.no_grad()
def embed_images(clip: CLIPModel, images: np.ndarray) -> torch.Tensor:
    """Unit-length embeddings of uint8 images, (N, D)."""
    return F.normalize(clip.get_image_features(to_tensor(images).to(clip.device)).pooler_output, dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, steps=3_000, batch_size=64, learning_rate=1e-3, precision="bf16")
    parser.add_argument("--partial", type=float, default=0.25, help="share of texts that name one thing only")
    parser.add_argument("--masked", type=float, default=0.2, help="share of pictures with all but one thing black")
    args = parser.parse_args()

    run = Run("clip", args)
    world = load_world(args.work_dir, args.world_size)
    tokenizer = build_tokenizer()
    tower = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "projection_dim": 128,
        "hidden_act": "gelu",
    }
    config = CLIPConfig(
        text_config=tower
        | {
            "num_hidden_layers": 3,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config=tower | {"num_hidden_layers": 4, "image_size": SIZE, "patch_size": 8},
        projection_dim=tower["projection_dim"],
    )
    # On CPU, eager attention trains faster in bf16 than the fused kernel.
    clip, head = CLIPModel._from_config(config, attn_implementation="eager"), AttributeHead(tower["projection_dim"])
    clip = run.prepare(clip, extra=[head])
    head = run.accelerator.prepare(head)

    scenes = [render(seed) for seed in range(192)]
    test_images = np.stack([describe(scene)[0] for scene in scenes])
    two = np.array([len(scene.things) == 2 for scene in scenes])
    # All captions take seconds to embed; while training, one in eight of the two-thing captions will do.
    choices = sorted({*captions(1), *captions(2)[::8], *(scene.caption for scene in scenes)})
    answers = torch.tensor([choices.index(scene.caption) for scene in scenes])

    for step, rng in run.steps():
        images, shows, said, wrong = draw_batch(world, rng, args.batch_size, args.partial, args.masked)
        texts = tokenizer(said.texts() + wrong.texts(), padding=True, return_tensors="pt").to(run.device)
        with run.accelerator.autocast():
            image_embeds = clip.get_image_features(to_tensor(images).to(run.device)).pooler_output.float()
            text_embeds = clip.get_text_features(**texts).pooler_output.float()

        # Each picture against all texts (hard negatives included), each text against all pictures. Captions repeat in
        # a batch, and a partial text describes many pictures, so a row can have several right answers.
        describes = np.concatenate([said.describes(shows), wrong.describes(shows)], axis=1)
        targets = torch.from_numpy(describes).float().to(run.device)
        logits = clip.logit_scale.exp() * F.normalize(image_embeds, dim=-1) @ F.normalize(text_embeds, dim=-1).T
        image_loss = F.cross_entropy(logits, targets / targets.sum(1, keepdim=True))
        logits, targets = logits[:, : len(images)].T, targets[:, : len(images)].T
        text_loss = F.cross_entropy(logits, targets / targets.sum(1, keepdim=True))

        # Attributes as classes first, contrast alone at the end.
        full = np.flatnonzero(said.count > 0)
        attributes = head(image_embeds, shows) + head(text_embeds[full], said[full])
        loss = (image_loss + text_loss) / 2 + (1 - step / args.steps) * attributes
        run.update(loss)
        with torch.no_grad():
            clip.logit_scale.clamp_(max=np.log(100))

        if (step + 1) % args.report_steps == 0:
            clip.eval()
            similarity = embed_images(clip, test_images) @ embed_texts(clip, tokenizer, choices).T
            right = (similarity.argmax(1).cpu() == answers).numpy()
            run.log(
                step + 1,
                loss=loss,
                image=image_loss,
                attributes=attributes,
                one=right[~two].mean(),
                two=right[two].mean(),
            )
            clip.train()

    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    with run.finished("clip") as folder:
        save_half(run.accelerator.unwrap_model(clip), folder)
        tokenizer.save_pretrained(folder)
        image_processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
