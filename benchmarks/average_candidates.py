"""Who is timed at averaging: RoIAlign, and RoIAlign on the levels of a pyramid.

Candidates are as `candidates.py` says. A pyramid's features and gradients are tuples of maps.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import jax
import numpy as np
from candidates import (
    FORWARD,
    GRADIENT,
    MODES,
    THREADS,
    Fill,
    FillFresh,
    ONNXRuntime,
    OpenVINO,
    Run,
    Torchvision,
    to_nchw,
)
from workloads import Inputs, Pyramid

import jax_roipool

ROUNDING = 1e-5  # by which averages may differ, as a share of the largest


class JaxRoIAlign:
    """The best implementation of this package for the platform, called under `jit`."""

    modes = MODES
    convention = "align"
    version = jax_roipool.__version__
    rounding = ROUNDING
    name = "jax_roipool"
    about = f"NHWC, jit, {THREADS} threads, new output"

    def __init__(self, sampling_ratio: int | None) -> None:
        self.sampling_ratio = sampling_ratio

    def average(self, features, rois, output_size):
        return jax_roipool.roi_align(
            features, rois, output_size, sampling_ratio=self.sampling_ratio
        )

    def prepare(self, inputs: Inputs, mode: str, convention: str = convention) -> Run:
        average = functools.partial(self.average, output_size=inputs.cotangent.shape[1:3])
        forward = jax.jit(lambda features, rois: (average(features, rois),))

        @jax.jit
        def forward_and_gradient(features, rois, cotangent):
            averaged, backward = jax.vjp(lambda f: average(f, rois), features)
            return averaged, *backward(cotangent)

        features, rois, cotangent = jax.device_put(inputs)
        if mode == FORWARD:
            return lambda: jax.block_until_ready(forward(features, rois))
        return lambda: jax.block_until_ready(forward_and_gradient(features, rois, cotangent))

    def outputs(self, result: Any) -> tuple[np.ndarray, ...]:
        return tuple(map(np.asarray, jax.tree.leaves(result)))


class JaxLevels(JaxRoIAlign):
    """`pool_levels` with `roi_align`, as torchvision pools a pyramid."""

    def average(self, features, rois, output_size):
        pool = functools.partial(
            jax_roipool.roi_align,
            output_size=output_size,
            sampling_ratio=self.sampling_ratio,
            aligned=False,
        )
        return jax_roipool.pool_levels(pool, features, rois, spatial_scales=Pyramid.scales)


class TorchvisionRoIAlign(Torchvision):
    """`torchvision.ops.roi_align`."""

    convention = "align"

    def __init__(self, sampling_ratio: int | None) -> None:
        super().__init__()
        from torchvision.ops import roi_align

        ratio = -1 if sampling_ratio is None else sampling_ratio
        self.pool = functools.partial(
            roi_align, spatial_scale=1.0, sampling_ratio=ratio, aligned=True
        )


class TorchvisionLevels(Torchvision):
    """`torchvision.ops.MultiScaleRoIAlign`."""

    convention = "align"

    def __init__(self, sampling_ratio: int | None) -> None:
        super().__init__()
        from torchvision.ops import MultiScaleRoIAlign

        self.sampling_ratio = -1 if sampling_ratio is None else sampling_ratio
        self.make_pool = MultiScaleRoIAlign

    def prepare(self, inputs: Inputs, mode: str) -> Run:
        maps = [self.torch.from_numpy(to_nchw(x)) for x in inputs.features]
        for x in maps:
            x.requires_grad_(mode == GRADIENT)
        features = OrderedDict((str(i), x) for i, x in enumerate(maps))
        N, H, W, _ = inputs.features[0].shape
        boxes = [inputs.rois[inputs.rois[:, 0] == n, 1:] for n in range(N)]
        boxes = [self.torch.from_numpy(x) for x in boxes]
        image_shapes = [(int(H / Pyramid.scales[0]), int(W / Pyramid.scales[0]))] * N
        cotangent = self.torch.from_numpy(to_nchw(inputs.cotangent))
        pool = self.make_pool(list(features), inputs.cotangent.shape[1:3], self.sampling_ratio)

        def forward():
            with self.torch.no_grad():
                return (pool(features, boxes, image_shapes),)

        def forward_and_gradient():
            pooled = pool(features, boxes, image_shapes)
            return pooled, *self.torch.autograd.grad(pooled, maps, cotangent)

        return forward if mode == FORWARD else forward_and_gradient


class OpenVINORoIAlign(OpenVINO):
    """ROIAlign-9 of OpenVINO's CPU plugin."""

    convention = "align"
    about = f"NCHW, {THREADS} threads, latency hint, output of the infer request reused"

    def __init__(self, sampling_ratio: int | None) -> None:
        super().__init__()
        from openvino import opset9

        self.opset, self.sampling_ratio = opset9, sampling_ratio or 0

    def make_model(self, inputs: Inputs):
        arrays = [
            to_nchw(inputs.features),
            np.ascontiguousarray(inputs.rois[:, 1:]),
            inputs.rois[:, 0].astype(np.int32),
        ]
        parameters = [self.opset.parameter(x.shape, x.dtype) for x in arrays]
        how = (*inputs.cotangent.shape[1:3], self.sampling_ratio, 1.0, "avg")
        node = self.opset.roi_align(*parameters, *how, aligned_mode="half_pixel_for_nn")
        return self.openvino.Model([node], parameters), arrays


class ONNXRuntimeRoIAlign(ONNXRuntime):
    """RoiAlign of ONNX Runtime's CPU provider, in a model of that one node."""

    convention = "align"

    def __init__(self, sampling_ratio: int | None) -> None:
        super().__init__()
        self.sampling_ratio = sampling_ratio or 0

    def make_node(self, inputs: Inputs):
        feeds = {
            "features": to_nchw(inputs.features),
            "rois": np.ascontiguousarray(inputs.rois[:, 1:]),
            "images": inputs.rois[:, 0].astype(np.int64),
        }
        P, Q = inputs.cotangent.shape[1:3]
        node = self.onnx.helper.make_node(
            "RoiAlign",
            list(feeds),
            ["pooled"],
            output_height=P,
            output_width=Q,
            sampling_ratio=self.sampling_ratio,
            coordinate_transformation_mode="half_pixel",
        )
        return node, feeds, 16


def roi_align(sampling_ratio: int | None) -> dict[str, tuple]:
    """Candidates for RoIAlign, this package's first, by name: ours, and the others."""
    others = (ONNXRuntimeRoIAlign, TorchvisionRoIAlign)
    if sampling_ratio is not None:  # else OpenVINO has NaN for a RoI without area
        others = (OpenVINORoIAlign, *others)
    return _named(JaxRoIAlign, others, sampling_ratio)


def levels(sampling_ratio: int | None) -> dict[str, tuple]:
    """Candidates for RoIAlign on the levels of a pyramid."""
    return _named(JaxLevels, (TorchvisionLevels,), sampling_ratio)


def _named(ours, others, sampling_ratio):
    made = {c.name: functools.partial(c, sampling_ratio) for c in (ours, *others)}
    return made | {c.name: c for c in (Fill, FillFresh)}
