"""Small ICC profiles for the tests, as a camera or a print shop would put them into a picture."""

import struct

import numpy as np


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(x) + _fixed(y) + _fixed(z)


def _profile(device_class: bytes, space: bytes, connection_space: bytes, tags: dict[bytes, bytes]) -> bytes:
    name = b"test\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78)
    tags = {b"desc": description, b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(0.9642, 1.0, 0.8249)} | tags
    table, data, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for signature, content in tags.items():
        content += bytes(-len(content) % 4)
        table += signature + struct.pack(">II", offset + len(data), len(content))
        data += content
    body = table + data
    header = struct.pack(">I4sI4s4s4s", 128 + len(body), b"\0" * 4, 0x02400000, device_class, space, connection_space)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += _fixed(0.9642) + _fixed(1.0) + _fixed(0.8249)
    return header + bytes(128 - len(header)) + body


def display_p3() -> bytes:
    """Display P3's primaries, adapted to D50, with a gamma of 2.2: near what every iPhone photo carries."""
    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    tags = {
        b"rXYZ": _xyz(0.51512, 0.2412, -0.00105),
        b"gXYZ": _xyz(0.29198, 0.69225, 0.04189),
        b"bXYZ": _xyz(0.1571, 0.06657, 0.78407),
    }
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma))


def grey() -> bytes:
    """A gamma of 1, which makes every grey lighter in sRGB."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": b"curv\0\0\0\0" + bytes(4)})


def cmyk() -> bytes:
    """A press whose inks only darken: each turns white paper into the same grey, which `Image.convert` would not."""
    grid = np.array([(i, j, k, n) for i in (0, 1) for j in (0, 1) for k in (0, 1) for n in (0, 1)])
    lightness = 255 - 60 * grid.sum(axis=1)
    lab = np.stack([lightness, np.full(16, 128), np.full(16, 128)], axis=1).astype(np.uint8)
    ramp = bytes(range(256))
    matrix = b"".join(_fixed(float(row == column)) for row in range(3) for column in range(3))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + 4 * ramp + lab.tobytes() + 3 * ramp
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})
