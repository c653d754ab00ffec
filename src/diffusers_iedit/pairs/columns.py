"""The columns of public sets of edits, in one table. Nothing here imports a library that takes long."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


ROLES = ("source", "target", "prompt", "instruction", "caption", "mask")
"""What a column can hold: a picture before and after the edit, what is seen after it, the edit as a command, what is
seen before it, and where it is."""

IMAGE_ROLES = ("source", "target", "mask")

CONVENTIONS = ("white", "black", "transparent", "painted")
"""What marks the edit in a mask: white or black; of a layer, what is transparent, or what is painted."""


@dataclass(frozen=True)
class SetColumns:
    """Where a set keeps what; of several names the first that there is. What the set has not is empty.

    Args:
        source, target, prompt, instruction, caption, mask (`tuple[str, ...]`): As in `ROLES`.
        mask_convention (`str`): What marks the edit in a mask, one of `CONVENTIONS`.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    prompt: tuple[str, ...] = ()
    instruction: tuple[str, ...] = ()
    caption: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()
    mask_convention: str = "white"

    def find(self, columns: Iterable[str]) -> dict[str, str]:
        """The column of each role that these columns of a set have; those of a tar may end as their files do."""
        by_name = {column.split(".")[0]: column for column in columns} | {column: column for column in columns}
        found = {}
        for role in ROLES:
            if name := next((name for name in getattr(self, role) if name in by_name), None):
                found[role] = by_name[name]
        return found


SETS = {
    # https://huggingface.co/datasets/timbrooks/instructpix2pix-clip-filtered; samples of it call the first input_image
    "instructpix2pix": SetColumns(
        source=("original_image", "input_image"),
        target=("edited_image",),
        prompt=("edited_prompt",),
        instruction=("edit_prompt",),
        caption=("original_prompt",),
    ),
    # https://huggingface.co/datasets/osunlp/MagicBrush; only the test set, a folder, has captions
    "magicbrush": SetColumns(
        source=("source_img",),
        target=("target_img",),
        prompt=("target_caption",),
        instruction=("instruction",),
        caption=("source_caption",),
        mask=("mask_img",),
        mask_convention="transparent",
    ),
    # https://huggingface.co/datasets/BleachNick/UltraEdit_Region_Based_100k
    "ultraedit": SetColumns(
        source=("source_image",),
        target=("edited_image",),
        prompt=("target_caption",),
        instruction=("edit_prompt",),
        caption=("source_caption",),
        mask=("mask_image",),
    ),
    # https://huggingface.co/datasets/TIGER-Lab/OmniEdit-Filtered-1.2M; the list says the same in several ways
    "omniedit": SetColumns(source=("src_img",), target=("edited_img",), instruction=("edited_prompt_list",)),
    # https://huggingface.co/datasets/iitolstykh/NHR-Edit; `datasets` calls what its metadata.jsonl has as
    # source_file_name and edited_file_name by the first word
    "nhr-edit": SetColumns(
        source=("source_image", "source"), target=("edited_image", "edited"), instruction=("edit_instruction",)
    ),
}
"""Public sets by the names of `--format`. Their `edit_prompt` is an instruction; this package's is a caption."""

FOLDER = SetColumns(source=("before",), target=("after",), prompt=("txt",), mask=("mask",))
"""A folder of pairs: a_before.png, a_after.png, and a.txt and a_mask.png if they are there."""


_COMMANDS = frozenset(
    "add alter apply change color colour convert crop delete erase get give have insert let make move paint place "
    "put remove replace rotate swap switch transform turn".split()
)


def is_instruction(text: str) -> bool:
    """Whether a text begins as a command does: "make it blue", "let the cat sleep"."""
    first, _, _ = text.strip().partition(" ")
    return first.lower().strip(",.:") in _COMMANDS


def recognise(columns: Iterable[str]) -> str | None:
    """The name of the public set that has these columns, or None if there is none or more than one."""
    columns = list(columns)
    fits = []
    for name, known in SETS.items():
        found = known.find(columns)
        if {"source", "target", "instruction"} <= found.keys():
            fits.append((len(found), name))
    fits.sort(reverse=True)
    return fits[0][1] if fits and (len(fits) == 1 or fits[0][0] > fits[1][0]) else None
