"""torchvision's Mask R-CNN with its pooling replaced by jax_roipool's, beside the original.

    pip install torch torchvision && python examples/torchvision_maskrcnn.py

A `maskrcnn_resnet50_fpn` with random weights makes a training step and detects, twice from the same
state: as it is, and with `jax_roipool.MultiScaleRoIAlign` in the place of its `MultiScaleRoIAlign`
for boxes and for masks. Everything else stays PyTorch's. Prints how far losses, gradients and
detections are apart, and fails if it is further than rounding explains.

Dimension letters:
    N        images
    C, H, W  channels, rows and columns of a map, which are in PyTorch's order
    R        regions of interest of all images
    P, Q     rows and columns of bins
"""

import argparse
import copy
import functools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn
from torchvision.ops import MultiScaleRoIAlign as TorchvisionPooling

import jax_roipool

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4  # of the largest
ROOM = 256  # RoIs are padded to a multiple of it: a program serves every number up to that


@functools.partial(jax.jit, static_argnames="layer")
def pool(
    layer: jax_roipool.MultiScaleRoIAlign,
    maps: Sequence[jax.Array],
    rois: jax.Array,
    roi_mask: jax.Array,
) -> jax.Array:
    """Maps [N, C, H, W] and RoIs [R, 5] to [R, C, P, Q]."""
    channels_last = [x.transpose(0, 2, 3, 1) for x in maps]
    return layer.apply({}, channels_last, rois, roi_mask).transpose(0, 3, 1, 2)


@functools.partial(jax.jit, static_argnames="layer")
def pool_gradient(
    layer: jax_roipool.MultiScaleRoIAlign,
    maps: Sequence[jax.Array],
    rois: jax.Array,
    roi_mask: jax.Array,
    cotangent: jax.Array,
) -> Sequence[jax.Array]:
    """The gradients of the maps."""
    return jax.vjp(lambda maps: pool(layer, maps, rois, roi_mask), maps)[1](cotangent)[0]


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """Returns the tensor's numbers as JAX's."""
    return jnp.asarray(tensor.detach().numpy())


def to_torch(array: jax.Array) -> torch.Tensor:
    """Returns the array's numbers as PyTorch's."""
    return torch.from_numpy(np.array(array))


class PoolFunction(torch.autograd.Function):
    """`pool` and its gradient, as PyTorch differentiates."""

    @staticmethod
    def forward(ctx, layer, rois, *maps):
        R = len(rois)
        padding = -R % ROOM if R else ROOM
        rois = jnp.pad(to_jax(rois), ((0, padding), (0, 0)))
        ctx.arguments = (layer, [to_jax(x) for x in maps], rois, jnp.arange(len(rois)) < R)
        return to_torch(pool(*ctx.arguments)[:R])

    @staticmethod
    def backward(ctx, cotangent):
        roi_mask = ctx.arguments[-1]
        padding = len(roi_mask) - len(cotangent)
        cotangent = jnp.pad(to_jax(cotangent), ((0, padding), *[(0, 0)] * 3))
        grads = pool_gradient(*ctx.arguments, cotangent)
        return None, None, *map(to_torch, grads)


class Pooling(torch.nn.Module):
    """An adapter with the arguments of torchvision's `MultiScaleRoIAlign`."""

    def __init__(self, original: TorchvisionPooling) -> None:
        super().__init__()
        self.names, self.output_size = original.featmap_names, tuple(original.output_size)
        self.options = {
            "sampling_ratio": original.sampling_ratio if original.sampling_ratio > 0 else None,
            "canonical_size": original.canonical_scale,
            "canonical_level": original.canonical_level,
        }

    def forward(
        self,
        features: dict[str, torch.Tensor],
        boxes: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> torch.Tensor:
        """Pools boxes [R of the image, 4] of each image from the maps that have the names."""
        maps = [features[name] for name in self.names]
        # torchvision's guess, from the largest image: the power of two that is next.
        height = max(shape[0] for shape in image_shapes)
        scales = tuple(2.0 ** round(np.log2(x.shape[2] / height)) for x in maps)
        layer = jax_roipool.MultiScaleRoIAlign(self.output_size, scales, **self.options)
        rois = [torch.nn.functional.pad(x, (1, 0), value=n) for n, x in enumerate(boxes)]
        return PoolFunction.apply(layer, torch.cat(rois).detach(), *maps)


def replace_pooling(model: MaskRCNN) -> MaskRCNN:
    """Returns a copy that pools by this package, for boxes and for masks."""
    model = copy.deepcopy(model)
    for name in ("box_roi_pool", "mask_roi_pool"):
        setattr(model.roi_heads, name, Pooling(getattr(model.roi_heads, name)))
    return model


def make_batch(
    generator: torch.Generator, size: int
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Returns two images of noise, and four rectangles in each to be found."""
    images, targets = [], []
    for height, width in ((size, size * 3 // 2), (size, size * 5 // 4)):
        images.append(torch.rand(3, height, width, generator=generator))
        corner = torch.rand(4, 2, generator=generator) * 0.5
        side = 0.05 + torch.rand(4, 2, generator=generator) * 0.4
        boxes = torch.cat([corner, corner + side], 1) * torch.tensor([width, height] * 2)
        masks = torch.zeros(4, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        labels = torch.randint(1, 91, (4,), generator=generator)
        targets.append({"boxes": boxes, "labels": labels, "masks": masks})
    return images, targets


def train_step(
    model: MaskRCNN, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]], seed: int
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Returns the losses, and the gradients of all parameters."""
    torch.manual_seed(seed)  # RoIs are sampled
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, grads


def compare(size: int, seed: int) -> bool:
    """Prints what both models do, and returns whether it is the same but for rounding."""
    torch.manual_seed(seed)
    # Without a threshold random weights detect something, too.
    model = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=size, max_size=2 * size, box_score_thresh=0.0
    )
    ours = replace_pooling(model)
    images, targets = make_batch(torch.Generator().manual_seed(seed), size)

    with torch.no_grad():
        detections, our_detections = (m.eval()(images) for m in (model, ours))
    same = True
    for n, (a, b) in enumerate(zip(detections, our_detections, strict=True)):
        same_labels = torch.equal(a["labels"], b["labels"])
        same &= same_labels
        print(f"image {n}: {len(a['labels'])} labels {'are the same' if same_labels else 'DIFFER'}")
        if same_labels:
            # Where two scores are equal but for rounding, either may come first.
            moved = int(((a["boxes"] - b["boxes"]).abs().amax(1) > 0.01).sum())
            scores = (a["scores"] - b["scores"]).abs().max()
            print(f"    scores differ by {scores:.1e}, {moved} boxes by more than 0.01 pixels")

    (losses, grads), (our_losses, our_grads) = (
        train_step(m, images, targets, seed) for m in (model, ours)
    )
    for name, loss in losses.items():
        difference = abs(loss - our_losses[name])
        same &= difference <= LOSS_TOLERANCE
        print(f"{name:22} {loss:.6f}  difference {difference:.1e}")
    largest = max(grad.abs().max() for grad in grads.values())
    difference = max((grads[name] - our_grads[name]).abs().max() for name in grads)
    same &= grads.keys() == our_grads.keys() and bool(difference <= GRADIENT_TOLERANCE * largest)
    count = sum(grad.numel() for grad in grads.values())
    print(f"gradients of {count} parameters: difference {difference / largest:.1e} of the largest")
    return same


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 1 if the models differ."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", type=int, default=256, help="height of the images, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="decides the weights and the images")
    arguments = parser.parse_args(argv)
    same = compare(arguments.size, arguments.seed)
    print("same" if same else "NOT THE SAME")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
