"""Who is timed: this package's implementations, the peers installed here, and two floors.

A candidate has

- `name`, `version`, and `about`: how it is called,
- `modes`: which of FORWARD and GRADIENT it has,
- `convention`: the one of this package that its answer equals; None for a floor, which has none,
- `rounding`, of this package's: by what share of the largest others may differ from it,
- `prepare(inputs, mode)`: a function of no arguments to time, with everything that its users do
  once already done,
- `outputs(result)`: what that function returned, as NumPy arrays in this package's layout.
"""

from __future__ import annotations

import functools
import mmap
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from workloads import Inputs

import jax_roipool
from jax_roipool._backends.rectangle_max import FAMILY

FORWARD, GRADIENT = "forward", "forward + gradient"
MODES = (FORWARD, GRADIENT)
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

Run = Callable[[], Any]


def roi_pool() -> dict[str, Callable]:
    """Candidates for RoI max pooling, by name, this package's best first."""
    ours = {
        f"jax_roipool {name}": functools.partial(JaxRoIPool, name)
        for name in FAMILY.candidates(None, jax.default_backend())
    }
    return ours | {c.name: c for c in (OpenVINO, ONNXRuntime, Torchvision, Fill, FillFresh)}


def available(makers: dict[str, Callable]) -> tuple[list, dict[str, str]]:
    """The candidates that run here, and why others do not."""
    found, missing = [], {}
    for name, make in makers.items():
        if not name.startswith("jax_roipool") and jax.default_backend() != "cpu":
            missing[name] = f"compared on the CPU only, and JAX runs on {jax.default_backend()}"
            continue
        try:
            found.append(make())
        except ModuleNotFoundError as error:
            missing[name] = f"{error.name} is not installed"
        except Exception as error:  # a library that is installed can fail to load in any way
            missing[name] = f"cannot run: {type(error).__name__}: {error}"
    return found, missing


class JaxRoIPool:
    """One of this package's implementations, called under `jit`."""

    modes = MODES
    convention = "torchvision"
    version = jax_roipool.__version__
    rounding = 0.0

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self.name = f"jax_roipool {implementation}"
        self.about = f"NHWC, jit, {THREADS} threads, new output"
        # Raises if the implementation is not for this platform, or was not built.
        jax_roipool.roi_pool(
            jnp.ones((1, 1, 1)), jnp.ones((1, 4)), 1, implementation=implementation
        )

    def prepare(self, inputs: Inputs, mode: str, convention: str = convention) -> Run:
        output_size = inputs.cotangent.shape[1:3]
        how = {"convention": convention, "implementation": self.implementation}

        @jax.jit
        def forward(features, rois):
            return (jax_roipool.roi_pool(features, rois, output_size, **how),)

        @jax.jit
        def forward_and_gradient(features, rois, cotangent):
            (pooled,), backward = jax.vjp(lambda f: forward(f, rois), features)
            return pooled, *backward((cotangent,))

        features, rois, cotangent = jax.device_put(inputs)
        if mode == FORWARD:
            return lambda: jax.block_until_ready(forward(features, rois))
        return lambda: jax.block_until_ready(forward_and_gradient(features, rois, cotangent))

    def outputs(self, result: Any) -> tuple[np.ndarray, ...]:
        return tuple(map(np.asarray, result))


class OpenVINO:
    """ROIPooling of OpenVINO's CPU plugin."""

    name = "OpenVINO"
    modes = (FORWARD,)
    convention = "openvino"
    about = (
        f"NCHW, {THREADS} threads, latency hint, output of the infer request reused; converting "
        "to its blocked layout and back is part of a request"
    )

    def __init__(self) -> None:
        # It would fork this process to report that it is in use.
        sys.modules.setdefault("openvino_telemetry", None)
        import openvino
        from openvino import opset2

        self.openvino, self.opset = openvino, opset2
        self.version = openvino.__version__

    def make_model(self, inputs: Inputs):
        """The model of the one operator, and what it is fed."""
        arrays = [to_nchw(inputs.features), inputs.rois]
        parameters = [self.opset.parameter(array.shape, np.float32) for array in arrays]
        node = self.opset.roi_pooling(*parameters, inputs.cotangent.shape[1:3], 1.0, "max")
        return self.openvino.Model([node], parameters), arrays

    def prepare(self, inputs: Inputs, mode: str) -> Run:
        model, arrays = self.make_model(inputs)
        config = {
            "INFERENCE_NUM_THREADS": THREADS,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = self.openvino.Core().compile_model(model, "CPU", config).create_infer_request()
        # Else it copies the inputs and the output.
        return lambda: request.infer(arrays, share_inputs=True, share_outputs=True)

    def outputs(self, result: Any) -> tuple[np.ndarray, ...]:
        return (to_nhwc(result[0]),)


class ONNXRuntime:
    """MaxRoiPool of ONNX Runtime's CPU provider, in a model of that one node."""

    name = "ONNX Runtime"
    modes = (FORWARD,)
    convention = "torchvision"
    about = f"NCHW, {THREADS} threads, new output"

    def __init__(self) -> None:
        import onnx
        import onnxruntime

        self.onnx, self.onnxruntime = onnx, onnxruntime
        self.version = onnxruntime.__version__

    def make_node(self, inputs: Inputs):
        """The operator, what it is fed, and an opset that has it."""
        feeds = {"features": to_nchw(inputs.features), "rois": inputs.rois}
        node = self.onnx.helper.make_node(
            "MaxRoiPool", list(feeds), ["pooled"], pooled_shape=inputs.cotangent.shape[1:3]
        )
        return node, feeds, 13

    def prepare(self, inputs: Inputs, mode: str) -> Run:
        helper = self.onnx.helper
        node, feeds, opset = self.make_node(inputs)
        dtypes = {k: helper.np_dtype_to_tensor_dtype(v.dtype) for k, v in feeds.items()}
        graph = helper.make_graph(
            [node],
            "roi_pooling",
            [helper.make_tensor_value_info(k, dtypes[k], v.shape) for k, v in feeds.items()],
            [helper.make_tensor_value_info("pooled", dtypes["features"], None)],
        )
        # An old opset and IR, which ONNX Runtime reads whatever the version of onnx.
        imports = [helper.make_opsetid("", opset)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=8)
        options = self.onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        session = self.onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return lambda: session.run(None, feeds)

    def outputs(self, result: Any) -> tuple[np.ndarray, ...]:
        return tuple(map(to_nhwc, result))


class Torchvision:
    """`torchvision.ops.roi_pool`, on the CPU or on a CUDA device, where a call only starts it."""

    name = "torchvision"
    modes = MODES
    convention = "torchvision"
    about = f"NCHW, {THREADS} threads allowed, new output"

    def __init__(self, device: str = "cpu") -> None:
        import torch
        from torchvision import __version__
        from torchvision.ops import roi_pool

        torch.set_num_threads(THREADS)
        self.torch, self.pool, self.device = torch, roi_pool, device
        torch.zeros(1, device=device)  # raises if this torch has no such device
        self.version = __version__

    def prepare(self, inputs: Inputs, mode: str) -> Run:
        features = self.torch.from_numpy(to_nchw(inputs.features)).to(self.device)
        features.requires_grad_(mode == GRADIENT)
        cotangent = self.torch.from_numpy(to_nchw(inputs.cotangent)).to(self.device)
        rois = self.torch.from_numpy(inputs.rois).to(self.device)
        output_size = inputs.cotangent.shape[1:3]

        def forward():
            with self.torch.no_grad():
                return (self.pool(features, rois, output_size),)

        def forward_and_gradient():
            pooled = self.pool(features, rois, output_size)
            return pooled, *self.torch.autograd.grad(pooled, features, cotangent)

        return forward if mode == FORWARD else forward_and_gradient

    def outputs(self, result: Any) -> tuple[np.ndarray, ...]:
        return tuple(to_nhwc(tensor.detach().cpu().numpy()) for tensor in result)


class Fill:
    """No pooling: fills memory that is in use already with as many bytes as the output has."""

    name = "fill warm memory"
    version = np.__version__
    modes = (FORWARD,)
    convention = None
    about = f"the floor for an output that is reused: NumPy's fill, {THREADS} threads"

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(THREADS)

    def prepare(self, inputs: Inputs, mode: str) -> Run:
        warm = np.ones(inputs.cotangent.size, np.float32)
        return lambda: self.fill(warm)

    def fill(self, array: np.ndarray) -> np.ndarray:
        if array.nbytes < 2**21:  # waking other threads would take longer
            array.fill(1)
        else:
            list(self.pool.map(lambda piece: piece.fill(1), np.array_split(array, THREADS)))
        return array


class FillFresh(Fill):
    """The same in memory that the system has just given out, which costs a fault on each page."""

    name = "fill fresh memory"
    about = f"the floor for an output in pages new to the process: the same, {THREADS} threads"

    def prepare(self, inputs: Inputs, mode: str) -> Run:
        # Not np.empty: the allocator may hand out pages that were in use before, or huge ones.
        return lambda: self.fill(
            np.frombuffer(_new_pages(inputs.cotangent.nbytes), dtype=np.float32)
        )


def _new_pages(nbytes: int) -> mmap.mmap:
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def to_nchw(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2))


def to_nhwc(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 3, 1)
