"""Inception-v3 up to its last pooling, whose features FID compares, for weights in torchvision's and timm's names.

The network is spelled out here because torchvision exists for some builds of torch only, and timm needs torchvision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from ..loading import fetch, usable


_ROW_3, _COLUMN_3, _ROW_7, _COLUMN_7 = (1, 3), (3, 1), (1, 7), (7, 1)


# A block is a list of branches, whose outputs are concatenated. A branch is a list of steps: a convolution (name,
# channels, kernel[, stride]), a list of convolutions side by side, or the name of a pooling.
def _mixed_5(channels: int) -> list[list]:
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["average", ("branch_pool", channels, 1)],
    ]


def _mixed_6(channels: int) -> list[list]:
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", channels, 1), ("branch7x7_2", channels, _ROW_7), ("branch7x7_3", 192, _COLUMN_7)],
        [
            ("branch7x7dbl_1", channels, 1),
            ("branch7x7dbl_2", channels, _COLUMN_7),
            ("branch7x7dbl_3", channels, _ROW_7),
            ("branch7x7dbl_4", channels, _COLUMN_7),
            ("branch7x7dbl_5", 192, _ROW_7),
        ],
        ["average", ("branch_pool", 192, 1)],
    ]


def _mixed_7(pooling: str) -> list[list]:
    return [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, _ROW_3), ("branch3x3_2b", 384, _COLUMN_3)]],
        [
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            [("branch3x3dbl_3a", 384, _ROW_3), ("branch3x3dbl_3b", 384, _COLUMN_3)],
        ],
        [pooling, ("branch_pool", 192, 1)],
    ]


_MIXED_6A: list[list] = [
    [("branch3x3", 384, 3, 2)],
    [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
    ["halve"],
]

_MIXED_7A: list[list] = [
    [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
    [
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, _ROW_7),
        ("branch7x7x3_3", 192, _COLUMN_7),
        ("branch7x7x3_4", 192, 3, 2),
    ],
    ["halve"],
]

# The classes of the weights with which FID is defined; ImageNet's have 1000.
_FID_CLASSES = 1008


class _Convolution(nn.Module):
    def __init__(self, before: int, after: int, kernel, stride: int = 1, padding: str | None = None):
        super().__init__()
        padding = padding or ("same" if stride == 1 else "valid")
        self.conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=1e-3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(hidden)))


class _Mixed(nn.Module):
    def __init__(self, before: int, branches: list[list], poolings: dict):
        super().__init__()
        self.branches, self.poolings = branches, poolings
        for branch in branches:
            channels = before
            for step in branch:
                if isinstance(step, str):
                    continue
                convolutions = step if isinstance(step, list) else [step]
                for name, *shape in convolutions:
                    self.add_module(name, _Convolution(channels, *shape))
                channels = convolutions[0][1]

    def _step(self, step, hidden: torch.Tensor) -> torch.Tensor:
        if isinstance(step, str):
            return self.poolings[step](hidden)
        if isinstance(step, list):
            return torch.cat([self._step(convolution, hidden) for convolution in step], dim=1)
        return getattr(self, step[0])(hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        outputs = []
        for branch in self.branches:
            output = hidden
            for step in branch:
                output = self._step(step, output)
            outputs.append(output)
        return torch.cat(outputs, dim=1)


class Inception(nn.Module):
    """The features of Inception-v3 that FID (https://huggingface.co/papers/1706.08500) compares.

    Args:
        fid_network (`bool`): Whether it is the network with which FID is defined (2015-12-05, 1008 classes). It leaves
            the border out of its averages and pools by the maximum in the last block.
    """

    SIZE = 299

    def __init__(self, fid_network: bool = False):
        super().__init__()
        poolings = {
            "average": nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=not fid_network),
            "maximum": nn.MaxPool2d(3, stride=1, padding=1),
            "halve": nn.MaxPool2d(3, stride=2),
        }
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, padding="valid")
        self.Mixed_5b = _Mixed(192, _mixed_5(32), poolings)
        self.Mixed_5c = _Mixed(256, _mixed_5(64), poolings)
        self.Mixed_5d = _Mixed(288, _mixed_5(64), poolings)
        self.Mixed_6a = _Mixed(288, _MIXED_6A, poolings)
        self.Mixed_6b = _Mixed(768, _mixed_6(128), poolings)
        self.Mixed_6c = _Mixed(768, _mixed_6(160), poolings)
        self.Mixed_6d = _Mixed(768, _mixed_6(160), poolings)
        self.Mixed_6e = _Mixed(768, _mixed_6(192), poolings)
        self.Mixed_7a = _Mixed(768, _MIXED_7A, poolings)
        self.Mixed_7b = _Mixed(1280, _mixed_7("average"), poolings)
        self.Mixed_7c = _Mixed(2048, _mixed_7("maximum" if fid_network else "average"), poolings)
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, model: str) -> Inception:
        """Loads trained weights.

        Args:
            model (`str`): A Hub id or a folder with `model.safetensors`. Weights with 1008 classes are taken for those
                with which FID is defined.

        Raises:
            ValueError: If there is no such model, or a layer's weights are missing or of another shape.
        """
        file = fetch(model, "`model`") / "model.safetensors"
        with usable("`model`", model, "Inception-v3"), safe_open(file, framework="pt") as weights:
            network = cls(fid_network=weights.get_slice("fc.weight").get_shape()[0] == _FID_CLASSES)
            # Not all files hold the counters of batches, which only training needs.
            names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
            network.load_state_dict({name: weights.get_tensor(name) for name in names}, strict=False)
        return network

    def preprocess(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, 3, 299, 299) in [-1, 1], without aliasing; the sides' ratio is lost."""
        return 2 * F.interpolate(image, (self.SIZE, self.SIZE), mode="bilinear", antialias=True) - 1

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """What `preprocess` gives -> features (B, 2048)."""
        hidden = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        hidden = F.max_pool2d(hidden, 3, stride=2)
        hidden = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden))
        hidden = F.max_pool2d(hidden, 3, stride=2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                hidden = block(hidden)
        return hidden.mean((2, 3))
