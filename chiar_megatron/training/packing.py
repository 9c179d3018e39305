"""Named tensors side by side in one flat one, so that a single collective carries them all."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class Packing:
    """Where each of some named tensors lies in a flat float64 tensor."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        self._places: dict[str, tuple[int, int]] = {}
        self.size = 0
        for name, shape in self.shapes.items():
            self._places[name] = (self.size, math.prod(shape))
            self.size += math.prod(shape)

    def pack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """All tensors in one; those of `shapes` must be there, in their shapes."""
        for name, shape in self.shapes.items():
            assert parts[name].shape == shape, f"{name}: {tuple(parts[name].shape)}, not {shape}"
        return torch.cat([parts[name].double().flatten() for name in self.shapes])

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def part(self, packed: Tensor, name: str) -> Tensor:
        """A view of one of them."""
        first, count = self._places[name]
        return packed[first : first + count].view(self.shapes[name])
