"""What is pooled: feature maps and RoIs of named sizes, always the same ones.

N images of H x W cells and C channels, R RoIs over all of them, P x Q bins in each.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

SMALLEST_ROI = 4  # cells
LARGEST_ROI = 0.6  # of the map
LONGEST_ROI = 3  # times as long as wide


class Inputs(NamedTuple):
    """Arrays of a workload, float32, as jax_roipool lays them out."""

    features: np.ndarray | tuple[np.ndarray, ...]  # [N, H, W, C], or of each level of a pyramid
    rois: np.ndarray  # [R, 5]: image index, x1, y1, x2, y2 in whole cells, the ends included
    cotangent: np.ndarray  # [R, P, Q, C]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of a call, and the seed of its contents."""

    name: str
    map_shape: tuple[int, int, int, int]  # N, H, W, C
    num_rois: int  # R
    roi_area: float | None = None  # share of the map; None: log-uniform from smallest to largest
    output_size: tuple[int, int] = (7, 7)  # P, Q
    seed: int = 0

    def inputs(self) -> Inputs:
        """The workload's arrays, equal at every call."""
        rng = np.random.default_rng(self.seed)
        features = rng.standard_normal(self.map_shape, dtype=np.float32)
        rois = self._rois(rng)
        cotangent_shape = (self.num_rois, *self.output_size, self.map_shape[3])
        return Inputs(features, rois, rng.standard_normal(cotangent_shape, dtype=np.float32))

    def _rois(self, rng: np.random.Generator) -> np.ndarray:
        N, H, W, _ = self.map_shape
        R = self.num_rois
        if self.roi_area is None:
            area = _log_uniform(rng, SMALLEST_ROI, LARGEST_ROI * H * W, R)
        else:
            area = np.full(R, self.roi_area * H * W)
        width_per_height = _log_uniform(rng, 1 / LONGEST_ROI, LONGEST_ROI, R)
        width = np.clip(np.rint(np.sqrt(area * width_per_height)), 1, W)
        height = np.clip(np.rint(np.sqrt(area / width_per_height)), 1, H)
        x1 = rng.integers(0, W - width, endpoint=True)
        y1 = rng.integers(0, H - height, endpoint=True)
        columns = (rng.integers(0, N, R), x1, y1, x1 + width - 1, y1 + height - 1)
        return np.stack(columns, axis=1).astype(np.float32)

    def small(self) -> Workload:
        """The same in little, to try the benchmark out."""
        N, H, W, C = self.map_shape
        return dataclasses.replace(
            self, map_shape=(N, H // 4, W // 4, C // 16), num_rois=self.num_rois // 16
        )


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """Sizes of a call on the levels of a feature pyramid, and the seed of its contents."""

    name: str
    map_shape: tuple[int, int, int, int]  # N, H and W of an image in pixels, C
    num_rois: int  # R
    output_size: tuple[int, int] = (7, 7)  # P, Q
    seed: int = 0

    scales = (1 / 4, 1 / 8, 1 / 16, 1 / 32)

    def inputs(self) -> Inputs:
        """A map for each scale, and RoIs in pixels; equal at every call."""
        rng = np.random.default_rng(self.seed)
        N, H, W, C = self.map_shape
        features = tuple(
            rng.standard_normal((N, int(H * scale), int(W * scale), C), dtype=np.float32)
            for scale in self.scales
        )
        area = _log_uniform(rng, 16**2, 700**2, self.num_rois)
        width_per_height = _log_uniform(rng, 1 / 2, 2, self.num_rois)
        width = np.minimum(np.sqrt(area * width_per_height), W)
        height = np.minimum(np.sqrt(area / width_per_height), H)
        x1, y1 = rng.uniform(0, W - width), rng.uniform(0, H - height)
        image = np.sort(rng.integers(0, N, self.num_rois))  # torchvision takes a list of each
        rois = np.stack([image, x1, y1, x1 + width, y1 + height], axis=1).astype(np.float32)
        cotangent = rng.standard_normal((self.num_rois, *self.output_size, C), dtype=np.float32)
        return Inputs(features, rois, cotangent)

    def small(self) -> Pyramid:
        """The same in little, to try the benchmark out."""
        N, H, W, C = self.map_shape
        return dataclasses.replace(
            self, map_shape=(N, H // 4, W // 4, C // 16), num_rois=self.num_rois // 16
        )


def _log_uniform(rng: np.random.Generator, low: float, high: float, size: int) -> np.ndarray:
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("vgg-train", (1, 38, 50, 512), 128),
        Workload("vgg-infer", (1, 38, 50, 512), 1000),
        Workload("fpn", (2, 100, 168, 256), 512),
        Workload("fpn-p2", (2, 200, 336, 256), 1024),
    )
}


PYRAMIDS = {
    workload.name: workload
    for workload in (
        Pyramid("pyramid-train", (2, 800, 1344, 256), 512),
        Pyramid("pyramid-infer", (2, 800, 1344, 256), 2000),
    )
}


def curves(base: Workload) -> dict[str, dict[float, Workload]]:
    """Workloads that differ from the base in one quantity, by its name and its values."""
    N, _, _, C = base.map_shape
    return {
        "number of RoIs": {
            R: dataclasses.replace(base, num_rois=R) for R in (8, 32, 128, 512, 2048)
        },
        "cells of the map": {
            H * W: dataclasses.replace(base, map_shape=(N, H, W, C))
            for H, W in ((10, 13), (19, 25), (38, 50), (76, 100), (152, 200))
        },
        "RoI area / map area": {
            area: dataclasses.replace(base, roi_area=area)
            for area in (0.003, 0.01, 0.03, 0.1, 0.3, 0.9)
        },
    }
