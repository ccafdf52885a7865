"""A two-stage digit detector, Faster R-CNN in shape, trained end to end through its pooling.

    python examples/digits_detector.py --output pictures

Handwritten digits (scikit-learn's `load_digits`) are drawn at several sizes over crops of the
photographs that scikit-image carries. A convolutional backbone feeds a region proposal network; its
best boxes, after non-maximum suppression, are pooled; a head names the digit in each box and
corrects the box. `--pooling` chooses `jax_roipool.roi_pool` or `jax_roipool.roi_align`, `--pyramid`
two levels of features by `jax_roipool.pool_levels` instead of one. The losses of both stages are
minimised together: the gradient of the head reaches the backbone through the pooling.

Every shape is static. An image has room for G digits and K regions, and masks tell which are in
use, so that one compiled train step serves every batch, on CPU, GPU and TPU alike.

Training is data-parallel over whatever devices there are: each has its share of a batch and all of
the weights, and XLA adds up the gradients. The batch, and so the losses, do not depend on how many
there are. Several processes train together if each is told its number, here 0 and 1 of 2:

    for i in 0 1; do python examples/digits_detector.py --process $i/2 & done; wait

Dimension letters:
    N        images of a batch
    G        true boxes of an image, MAX_DIGITS of them
    H, W, C  rows, columns and channels of the feature map
    A        anchors of an image
    K        regions of interest of an image, NUM_ROIS of them
    D        detections of an image, NUM_DETECTIONS of them
    M, S     boxes of any kind, and those sampled from them
Boxes are (x1, y1, x2, y2) in image pixels. Functions that name no N are for one image, and vmapped.
"""

import argparse
import contextlib
import functools
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from skimage import color, data, transform, util
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from jax_roipool import assign_levels, pool_levels, roi_align, roi_pool

Array = jax.Array | np.ndarray

# Scenes
IMAGE_SIZE = 128
MAX_DIGITS = 8
GLYPH_SIZES = (24, 48)  # pixels, the smallest and the largest height
NUM_CLASSES = 10  # the background is one more
TRAIN_PHOTOS = (
    *("astronaut", "brick", "camera", "coffee", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry", "moon", "retina"),
)
HELD_OUT_PHOTOS = ("chelsea", "coins", "rocket", "stereo_motorcycle")
TRAIN, HELD_OUT = 0, 1  # keep the random numbers of the two kinds of scenes apart

# Model
STRIDE = 4  # image pixels per cell of the feature map
ANCHOR_STRIDE = 8  # image pixels from anchor to anchor
ANCHOR_HEIGHTS = (22, 32, 44)
ANCHOR_ASPECT = 0.7  # width / height: digits are taller than wide
POOLINGS = {"max": roi_pool, "align": functools.partial(roi_align, sampling_ratio=2)}
PYRAMID_STRIDES = (STRIDE, 2 * STRIDE)
# Boxes of this size in pixels, the middle of the digits', are the first of stride 2**3 = 8.
CANONICAL_SIZE, CANONICAL_LEVEL = 36, 3
DELTA_SCALE = (10.0, 10.0, 5.0, 5.0)  # gives the regression targets about unit variance
MAX_LOG_RATIO = 2.0  # limits the predicted change of the logarithm of a side
NMS_CANDIDATES = 96  # boxes that enter non-maximum suppression
NUM_ROIS = 32
NUM_DETECTIONS = 20
PROPOSAL_IOU, DETECTION_IOU = 0.7, 0.4  # a box that overlaps a better one by more is dropped

# Training and evaluation
LEARNING_RATE = 1.5e-3
WARM_UP = 100  # steps
LOSSES = ("loss", "rpn object", "rpn box", "head class", "head box")  # the first is the others' sum
SHOW_EVERY = 10  # steps
SAVED_SETTINGS = ("seed", "batch_size", "pooling", "pyramid")  # a checkpoint is of these alone
DETECTION_BATCH = 20  # at least
SHOWN_SCORE = 0.5  # detections below are left out of the picture


# Scenes ------------------------------------------------------------------------------------------


class Sources(NamedTuple):
    """What scenes are composed of."""

    photos: list[np.ndarray]  # each [height, width, 3] in [0, 1]
    glyphs: np.ndarray  # [digits, 8, 8] in [0, 1]
    labels: np.ndarray  # [digits]


class Scenes(NamedTuple):
    """A batch of images and their true boxes, padded to G."""

    images: Array  # [N, IMAGE_SIZE, IMAGE_SIZE, 3] in [0, 1]
    boxes: Array  # [N, G, 4]
    labels: Array  # [N, G] in 0..9
    mask: Array  # [N, G], False for padding


def load_photo(name: str) -> np.ndarray:
    """Returns a photograph in colour, its shorter side twice that of a scene."""
    photo = getattr(data, name)()
    if isinstance(photo, tuple):  # the motorcycle comes as a stereo pair
        photo = photo[0]
    photo = util.img_as_float32(photo)
    if photo.ndim == 2:
        photo = color.gray2rgb(photo)
    scale = 2 * IMAGE_SIZE / min(photo.shape[:2])
    shape = [round(scale * side) for side in photo.shape[:2]]
    return transform.resize(photo, shape, anti_aliasing=True)


def load_sources(kind: int) -> Sources:
    """Returns the photographs and digits of TRAIN or HELD_OUT scenes, which share none."""
    photos = [load_photo(name) for name in (TRAIN_PHOTOS, HELD_OUT_PHOTOS)[kind]]
    digits = load_digits()
    split = train_test_split(
        digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    glyphs, labels = split[kind], split[2 + kind]
    return Sources(photos, (glyphs / 16).astype(np.float32), labels)


def random_crop(rng: np.random.Generator, photo: np.ndarray) -> np.ndarray:
    """Returns a crop of the size of a scene, mirrored or not."""
    top, left = (rng.integers(side - IMAGE_SIZE + 1) for side in photo.shape[:2])
    crop = photo[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
    return crop[:, :: rng.choice((-1, 1))].copy()


def random_ink(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """Returns a colour [3], light for a dark background and dark for a light one."""
    ink = rng.uniform(0, 0.3, 3).astype(np.float32)
    return 1 - ink if background.mean() < 0.5 else ink


def ink_box(opacity: np.ndarray) -> np.ndarray:
    """Returns the tight box of a drawn glyph."""
    rows, columns = (np.flatnonzero((opacity > 0.4).any(axis)) for axis in (1, 0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def compose_scene(
    rng: np.random.Generator, sources: Sources
) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
    """Returns an image and the boxes and labels of the 1 to G digits on it."""
    image = random_crop(rng, sources.photos[rng.integers(len(sources.photos))])
    taken = np.zeros(image.shape[:2], bool)
    boxes, labels = [], []
    for _ in range(rng.integers(1, MAX_DIGITS + 1)):
        digit = rng.integers(len(sources.labels))
        height = rng.integers(GLYPH_SIZES[0], GLYPH_SIZES[1] + 1)
        width = round(height * rng.uniform(0.85, 1.15))
        top, left = rng.integers(IMAGE_SIZE - height), rng.integers(IMAGE_SIZE - width)
        window = slice(top, top + height), slice(left, left + width)
        if taken[window].any():
            continue  # a crowded scene has a digit fewer
        taken[window] = True
        glyph = transform.resize(sources.glyphs[digit], (height, width), order=1)
        opacity = np.clip(1.5 * glyph, 0, 1)  # makes faint strokes legible
        image[window] += opacity[..., None] * (random_ink(rng, image[window]) - image[window])
        boxes.append(ink_box(opacity) + np.array([left, top, left, top]))
        labels.append(sources.labels[digit])
    return image, boxes, labels


def compose_scenes(seeds: Sequence[Sequence[int]], sources: Sources) -> Scenes:
    """Returns a scene for each seed, the same one for the same seed."""
    n = len(seeds)
    scenes = Scenes(
        images=np.zeros((n, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32),
        boxes=np.zeros((n, MAX_DIGITS, 4), np.float32),
        labels=np.zeros((n, MAX_DIGITS), np.int32),
        mask=np.zeros((n, MAX_DIGITS), bool),
    )
    for i, seed in enumerate(seeds):
        scenes.images[i], boxes, labels = compose_scene(np.random.default_rng(seed), sources)
        scenes.boxes[i, : len(boxes)] = boxes
        scenes.labels[i, : len(boxes)] = labels
        scenes.mask[i, : len(boxes)] = True
    return scenes


# Devices -----------------------------------------------------------------------------------------


def make_mesh(batch_size: int) -> Mesh:
    """Returns the devices that share a batch evenly, as many of each process, as an axis "data"."""
    count = jax.process_count()
    if batch_size % count:
        sys.exit(f"error: --batch-size {batch_size} is not a multiple of {count} processes")
    of_each = math.gcd(batch_size // count, jax.local_device_count())
    by_process = [[d for d in jax.devices() if d.process_index == i] for i in range(count)]
    devices = np.array([device for devices in by_process for device in devices[:of_each]])
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def on_every_device(make: Callable[[], Any], mesh: Mesh) -> Any:
    """Returns what `make` does, with all of its arrays whole on every device."""
    return jax.jit(make, out_shardings=NamedSharding(mesh, PartitionSpec()))()


def share(size: int) -> range:
    """Returns the rows of a batch that this process has."""
    rows = size // jax.process_count()
    return range(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def distribute(rows: Any, mesh: Mesh) -> Any:
    """Spreads a batch over the devices, given the rows that this process has."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)


# Boxes -------------------------------------------------------------------------------------------


def make_anchors() -> Array:
    """Returns the anchors [A, 4] in the order of the region proposal network's output."""
    centres = (np.arange(IMAGE_SIZE // ANCHOR_STRIDE) + 0.5) * ANCHOR_STRIDE
    y, x, height = np.meshgrid(centres, centres, ANCHOR_HEIGHTS, indexing="ij")
    width = ANCHOR_ASPECT * height
    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    return np.stack(corners, axis=-1).reshape(-1, 4).astype(np.float32)


def pairwise_iou(a: Array, b: Array) -> Array:
    """Returns the intersection over union of boxes [Ma, 4] and [Mb, 4] as [Ma, Mb]."""
    low = jnp.maximum(a[:, None, :2], b[:, :2])
    high = jnp.minimum(a[:, None, 2:], b[:, 2:])
    intersection = jnp.maximum(high - low, 0).prod(axis=-1)
    areas_a, areas_b = ((boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) for boxes in (a, b))
    return intersection / jnp.maximum(areas_a[:, None] + areas_b - intersection, 1e-6)


def centre_and_size(boxes: Array) -> tuple[Array, Array]:
    """Returns the centres [..., 2] and the sizes [..., 2], at least a pixel, of boxes [..., 4]."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, jnp.maximum(high - low, 1)


def encode(boxes: Array, reference: Array) -> Array:
    """Returns the deltas [..., 4] that lead from reference boxes to boxes."""
    centre, size = centre_and_size(boxes)
    from_centre, from_size = centre_and_size(reference)
    shift, growth = (centre - from_centre) / from_size, jnp.log(size / from_size)
    return jnp.concatenate([shift, growth], axis=-1) * jnp.array(DELTA_SCALE)


def decode(deltas: Array, reference: Array) -> Array:
    """Returns the boxes [..., 4] to which deltas lead, clipped to the image."""
    shift, growth = jnp.split(deltas / jnp.array(DELTA_SCALE), 2, axis=-1)
    from_centre, from_size = centre_and_size(reference)
    centre = from_centre + shift * from_size
    size = from_size * jnp.exp(jnp.clip(growth, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    boxes = jnp.concatenate([centre - size / 2, centre + size / 2], axis=-1)
    return jnp.clip(boxes, 0, IMAGE_SIZE)


def non_maximum_suppression(
    boxes: Array, scores: Array, max_iou: float, count: int
) -> tuple[Array, Array]:
    """Picks, of boxes [M, 4] with scores [M], the best that overlap no better one.

    Returns their indices [count], best first, and a mask [count] that is False for padding.
    """
    _, order = jax.lax.top_k(scores, NMS_CANDIDATES)
    iou = pairwise_iou(boxes[order], boxes[order])
    rank = jnp.arange(NMS_CANDIDATES)
    drops = (iou > max_iou) & (rank[:, None] < rank)  # row drops column, if it is kept itself

    def drop(i: Array, kept: Array) -> Array:
        return kept & ~(kept[i] & drops[i])

    kept = jax.lax.fori_loop(0, NMS_CANDIDATES, drop, jnp.ones(NMS_CANDIDATES, bool))
    picked = jnp.argsort(~kept, stable=True)[:count]
    return order[picked], kept[picked]


# Model -------------------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """3 x 3 convolution, group normalisation, ReLU."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(self.features, (3, 3), self.stride, use_bias=False)(x)
        return nn.relu(nn.GroupNorm(num_groups=8)(x))


class Backbone(nn.Module):
    """Images [N, IMAGE_SIZE, IMAGE_SIZE, 3] to features [N, H, W, C], a map for each stride."""

    strides: tuple[int, ...]

    @nn.compact
    def __call__(self, images: Array) -> list[Array]:
        x = ConvBlock(16, stride=2)((images - 0.5) / 0.25)
        x = ConvBlock(32, stride=2)(x)
        x = ConvBlock(48)(x)
        maps = [ConvBlock(48)(x)]
        for _ in self.strides[1:]:
            maps.append(ConvBlock(48, stride=2)(maps[-1]))
        for i in reversed(range(len(maps) - 1)):  # what a coarse map has seen, finer ones get too
            maps[i] += jax.image.resize(maps[i + 1], maps[i].shape, "nearest")
        return maps


class RegionProposalNetwork(nn.Module):
    """Features [N, H, W, C] to logits [N, A] and deltas [N, A, 4] of the anchors."""

    @nn.compact
    def __call__(self, features: Array) -> tuple[Array, Array]:
        x = ConvBlock(64, stride=ANCHOR_STRIDE // STRIDE)(features)
        x = ConvBlock(64)(x)
        logits = nn.Conv(len(ANCHOR_HEIGHTS), (1, 1))(x)
        deltas = nn.Conv(4 * len(ANCHOR_HEIGHTS), (1, 1))(x)
        return logits.reshape(len(x), -1), deltas.reshape(len(x), -1, 4)


class Head(nn.Module):
    """Pooled regions [N, K, P, Q, C] to class logits [N, K, classes + 1] and deltas [N, K, 4]."""

    @nn.compact
    def __call__(self, pooled: Array) -> tuple[Array, Array]:
        x = pooled.reshape(*pooled.shape[:2], -1)
        for _ in range(2):
            x = nn.relu(nn.LayerNorm()(nn.Dense(256)(x)))
        return nn.Dense(NUM_CLASSES + 1)(x), nn.Dense(4)(x)


class Detector(nn.Module):
    """Both stages. Training calls `propose` and `classify`; inference calls the whole."""

    pooling: str = "max"
    strides: tuple[int, ...] = (STRIDE,)

    def setup(self) -> None:
        self.backbone = Backbone(self.strides)
        self.rpn = RegionProposalNetwork()
        self.head = Head()

    def propose(self, images: Array) -> tuple[list[Array], Array, Array]:
        """Returns features, anchor logits [N, A] and anchor deltas [N, A, 4].

        The features are maps [N, H, W, C], one for each stride.
        """
        features = self.backbone(images)
        return features, *self.rpn(features[0])

    def pool(self, features: list[Array], rois: Array, roi_mask: Array) -> Array:
        """Returns each of rois [N, K, 4], pooled from its own map, as [N, K, P, Q, C]."""
        scales = [1 / stride for stride in self.strides]
        return pool_levels(
            functools.partial(POOLINGS[self.pooling], output_size=(7, 7)),
            features,
            rois,
            spatial_scales=scales,
            levels=assign_levels(
                rois, scales, canonical_size=CANONICAL_SIZE, canonical_level=CANONICAL_LEVEL
            ),
            roi_mask=roi_mask,
        )

    def classify(self, features: list[Array], rois: Array, roi_mask: Array) -> tuple[Array, Array]:
        """Returns class logits [N, K, classes + 1] and deltas [N, K, 4] of rois [N, K, 4]."""
        return self.head(self.pool(features, rois, roi_mask))

    def __call__(self, images: Array) -> tuple[Array, Array, Array, Array]:
        """Returns rois [N, K, 4], their mask [N, K], class logits and deltas."""
        features, logits, deltas = self.propose(images)
        rois, roi_mask = jax.vmap(select_proposals)(logits, deltas)
        return rois, roi_mask, *self.classify(features, rois, roi_mask)


def select_proposals(logits: Array, deltas: Array) -> tuple[Array, Array]:
    """Returns the best boxes [K, 4] of the region proposal network and their mask [K]."""
    boxes = decode(deltas, make_anchors())
    picked, mask = non_maximum_suppression(boxes, logits, PROPOSAL_IOU, NUM_ROIS)
    return boxes[picked], mask


class Detections(NamedTuple):
    """What was found in a batch of images, best first, padded to D."""

    boxes: Array  # [N, D, 4]
    labels: Array  # [N, D] in 0..9
    mask: Array  # [N, D], False for padding
    scores: Array  # [N, D]


def select_detections(rois: Array, roi_mask: Array, logits: Array, deltas: Array) -> Detections:
    """Returns the detections of an image, from what `Detector` returns for it."""
    scores = jax.nn.softmax(logits)[:, :NUM_CLASSES] * roi_mask[:, None]
    scores = scores.reshape(-1)  # of each region as each class
    boxes = jnp.repeat(decode(deltas, rois), NUM_CLASSES, axis=0)
    labels = jnp.tile(jnp.arange(NUM_CLASSES), NUM_ROIS)
    # Only boxes of the same class compete: the others are moved out of reach.
    moved = boxes + 2 * IMAGE_SIZE * labels[:, None]
    picked, mask = non_maximum_suppression(moved, scores, DETECTION_IOU, NUM_DETECTIONS)
    return Detections(boxes[picked], labels[picked], mask & (scores[picked] > 0), scores[picked])


def detect(state: TrainState, images: Array) -> Detections:
    """Finds the digits in images [N, IMAGE_SIZE, IMAGE_SIZE, 3]."""
    return jax.vmap(select_detections)(*state.apply_fn({"params": state.params}, images))


# Training ----------------------------------------------------------------------------------------


class Targets(NamedTuple):
    """Boxes sampled from those of an image, S of them, and what to learn from them."""

    indices: Array  # [S] of the boxes among those sampled from
    boxes: Array  # [S, 4]
    mask: Array  # [S], False for padding
    positive: Array  # [S], True for boxes on a digit
    labels: Array  # [S], the digit, or NUM_CLASSES for the background
    deltas: Array  # [S, 4], lead from the boxes to the digits'


def draw(noise: Array, eligible: Array, count: int) -> tuple[Array, Array]:
    """Picks the True entries of eligible [M] with the most noise [M]: indices and mask [count]."""
    priority, indices = jax.lax.top_k(jnp.where(eligible, noise, -1), count)
    return indices, priority >= 0


def sample_targets(
    key: Array,
    boxes: Array,
    mask: Array,
    truth: tuple[Array, Array, Array],
    ious: tuple[float, float],
    counts: tuple[int, int],
) -> Targets:
    """Samples positive and negative boxes, up to counts of each, from boxes [M, 4] with mask [M].

    The truth is the digits' boxes [G, 4], labels [G] and mask [G]. A box is positive from the first
    of the two ious on, or where no other fits a digit better, and negative below the second.
    """
    true_boxes, true_labels, true_mask = truth
    iou = jnp.where(mask[:, None] & true_mask, pairwise_iou(boxes, true_boxes), 0)
    digit, best_iou = iou.argmax(axis=1), iou.max(axis=1)
    best_of_digit = ((iou == iou.max(axis=0)) & (iou > 0)).any(axis=1)
    positive = best_of_digit | (best_iou >= ious[0])
    negative = ~positive & mask & (best_iou < ious[1])

    noise = jax.random.uniform(key, best_iou.shape)
    drawn = draw(noise, positive, counts[0]), draw(noise, negative, counts[1])
    indices, drawn_mask = map(jnp.concatenate, zip(*drawn, strict=True))
    digit, positive = digit[indices], positive[indices]
    return Targets(
        indices=indices,
        boxes=boxes[indices],
        mask=drawn_mask,
        positive=positive,
        labels=jnp.where(positive, true_labels[digit], NUM_CLASSES),
        deltas=encode(true_boxes[digit], boxes[indices]),
    )


def masked_mean(values: Array, mask: Array) -> Array:
    """Returns the mean of the values where the mask is True."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def box_loss(deltas: Array, targets: Targets) -> Array:
    """Returns the smooth L1 loss of deltas [N, S, 4] of the positive boxes."""
    loss = optax.huber_loss(deltas, targets.deltas).sum(axis=-1)
    return masked_mean(loss * targets.positive, targets.mask)


def detector_loss(
    params: Any, state: TrainState, scenes: Scenes, key: Array
) -> tuple[Array, Array]:
    """Returns the sum of the four losses, and all five numbers in the order of LOSSES."""
    variables = {"params": params}
    images, *truth = scenes
    anchor_keys, roi_keys = jax.random.split(key, (2, len(images)))
    features, anchor_logits, anchor_deltas = state.apply_fn(variables, images, method="propose")

    sample_anchors = functools.partial(sample_targets, ious=(0.6, 0.3), counts=(16, 48))
    anchors = jnp.broadcast_to(make_anchors(), anchor_deltas.shape)
    anchor_mask = jnp.ones(anchor_logits.shape, bool)
    targets = jax.vmap(sample_anchors)(anchor_keys, anchors, anchor_mask, truth)
    logits = jnp.take_along_axis(anchor_logits, targets.indices, axis=1)
    deltas = jnp.take_along_axis(anchor_deltas, targets.indices[..., None], axis=1)
    object_loss = optax.sigmoid_binary_cross_entropy(logits, targets.positive.astype(float))
    rpn_losses = masked_mean(object_loss, targets.mask), box_loss(deltas, targets)

    # The true boxes join the proposals, so that the head sees digits from the first step on. Where
    # the proposals lie is not to be learnt from the head's losses.
    rois, roi_mask = jax.vmap(select_proposals)(anchor_logits, anchor_deltas)
    rois = jax.lax.stop_gradient(jnp.concatenate([rois, scenes.boxes], axis=1))
    roi_mask = jnp.concatenate([roi_mask, scenes.mask], axis=1)
    half = NUM_ROIS // 2
    sample_rois = functools.partial(sample_targets, ious=(0.5, 0.5), counts=(half, half))
    targets = jax.vmap(sample_rois)(roi_keys, rois, roi_mask, truth)
    logits, deltas = state.apply_fn(
        variables, features, targets.boxes, targets.mask, method="classify"
    )
    class_loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets.labels)
    head_losses = masked_mean(class_loss, targets.mask), box_loss(deltas, targets)

    losses = jnp.stack([*rpn_losses, *head_losses])
    total = losses.sum()
    return total, jnp.concatenate([total[None], losses])


@jax.jit
def train_step(state: TrainState, scenes: Scenes, key: Array) -> tuple[TrainState, Array]:
    """Returns the state after a step of gradient descent, and the losses [len(LOSSES)]."""
    step_key = jax.random.fold_in(key, state.step)
    grads, losses = jax.grad(detector_loss, has_aux=True)(state.params, state, scenes, step_key)
    return state.apply_gradients(grads=grads), losses


def create_state(
    seed: int, steps: int, pooling: str = "max", *, pyramid: bool = False
) -> TrainState:
    """Returns a detector with random weights, and its optimiser for so many steps."""
    detector = Detector(pooling, PYRAMID_STRIDES if pyramid else (STRIDE,))
    images = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    params = jax.jit(detector.init)(jax.random.key(seed), images)["params"]
    rate = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, min(WARM_UP, steps), steps + 1)
    optimiser = optax.chain(optax.clip_by_global_norm(10), optax.adamw(rate, weight_decay=1e-3))
    return TrainState.create(apply_fn=detector.apply, params=params, tx=optimiser)


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    losses: list[Array],
    settings: argparse.Namespace,
) -> None:
    """Saves a checkpoint with the losses so far, unless there is one of this step."""
    step = int(state.step)
    if manager.latest_step() != step:
        log = {name: getattr(settings, name) for name in SAVED_SETTINGS}
        log["losses"] = np.array(losses[:step]).tolist()
        items = {"state": ocp.args.StandardSave(state), "log": ocp.args.JsonSave(log)}
        manager.save(step, args=ocp.args.Composite(**items))


def restore(
    manager: ocp.CheckpointManager, state: TrainState, settings: argparse.Namespace
) -> tuple[TrainState, list[Array]]:
    """Returns the last checkpoint's state and losses; without a checkpoint, those to start from.

    The state goes to where the given one is, whatever devices it was saved from.
    """
    step = manager.latest_step()
    if step is None:
        return state, []
    items = {"state": ocp.args.StandardRestore(state), "log": ocp.args.JsonRestore()}
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    log = restored["log"]
    for name in SAVED_SETTINGS:
        if log[name] != getattr(settings, name):
            sys.exit(f"error: the checkpoint was made with another {name}, {log[name]}")
    if step > settings.steps:
        sys.exit(f"error: the checkpoint is at step {step} already, past --steps {settings.steps}")
    return restored["state"], [np.array(row, np.float32) for row in log["losses"]]


def train(settings: argparse.Namespace, mesh: Mesh) -> tuple[TrainState, np.ndarray]:
    """Trains, from the last checkpoint if there is one.

    Returns the final state and the losses [steps, len(LOSSES)].
    """
    sources = load_sources(TRAIN)
    create = functools.partial(
        create_state, settings.seed, settings.steps, settings.pooling, pyramid=settings.pyramid
    )
    state = on_every_device(create, mesh)
    key = on_every_device(lambda: jax.random.key(settings.seed), mesh)
    losses = []
    with contextlib.ExitStack() as stack:
        if settings.checkpoint:
            options = ocp.CheckpointManagerOptions(max_to_keep=2)
            manager = ocp.CheckpointManager(settings.checkpoint, options=options)
            stack.enter_context(manager)
            state, losses = restore(manager, state, settings)
            # Runs at the end, after Ctrl-C too.
            stack.callback(lambda: save(manager, state, losses, settings))
        bar = stack.enter_context(
            tqdm(
                total=settings.steps,
                initial=len(losses),
                desc="Training",
                disable=jax.process_index() > 0,
            )
        )
        for step in range(len(losses), settings.steps):
            seeds = [(settings.seed, TRAIN, step, i) for i in share(settings.batch_size)]
            scenes = distribute(compose_scenes(seeds, sources), mesh)
            next_state, step_losses = train_step(state, scenes, key)
            losses.append(step_losses)
            state = next_state  # after the losses: a saved state has all of its losses
            bar.update()
            if step % SHOW_EVERY == 0:
                bar.set_postfix(dict(zip(LOSSES, step_losses.tolist(), strict=True)))
            if settings.checkpoint and (step + 1) % settings.save_every == 0:
                save(manager, state, losses, settings)
    return state, np.array(losses)


# Evaluation --------------------------------------------------------------------------------------


def detect_all(state: TrainState, images: np.ndarray, mesh: Mesh) -> Detections:
    """Finds the digits in any number of images, a batch that the devices can share at a time."""
    detect_on_mesh = jax.jit(detect, out_shardings=NamedSharding(mesh, PartitionSpec()))
    size = math.ceil(DETECTION_BATCH / mesh.size) * mesh.size
    batches = []
    for start in range(0, len(images), size):
        # The last batch is filled up with images from the front: one shape, one compilation.
        rows = [start + i for i in share(size)]
        batch = distribute(images.take(rows, axis=0, mode="wrap"), mesh)
        batches.append(jax.device_get(detect_on_mesh(state, batch)))
    return Detections(
        *(np.concatenate(field)[: len(images)] for field in zip(*batches, strict=True))
    )


def coco_records(batch: Scenes | Detections) -> list[dict[str, Any]]:
    """Returns the boxes of a batch as COCO's annotations; the ids of the images count from 0."""
    records = []
    for image, row in zip(*np.nonzero(batch.mask), strict=True):
        x1, y1, x2, y2 = batch.boxes[image, row].tolist()
        record = {
            "id": len(records) + 1,
            "image_id": int(image),
            "category_id": int(batch.labels[image, row]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
        }
        if isinstance(batch, Detections):
            record["score"] = float(batch.scores[image, row])
        records.append(record)
    return records


def average_precision(scenes: Scenes, detections: Detections) -> tuple[float, float]:
    """Returns COCO's AP and AP50."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports each of its steps
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(len(scenes.images))],
            "categories": [{"id": i} for i in range(NUM_CLASSES)],
            "annotations": coco_records(scenes),
        }
        truth.createIndex()
        scores = COCOeval(truth, truth.loadRes(coco_records(detections)), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return float(scores.stats[0]), float(scores.stats[1])


# Pictures ----------------------------------------------------------------------------------------


def draw_box(axes: Axes, box: np.ndarray, **style: Any) -> None:
    """Draws the outline of a box [4]."""
    x1, y1, x2, y2 = box
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))


def draw_detections(path: Path, scenes: Scenes, detections: Detections) -> None:
    """Draws the first scenes with their true boxes and the detections worth showing."""
    figure = Figure(figsize=(12, 9.4), layout="constrained")
    for i, axes in enumerate(figure.subplots(3, 4).flat):
        axes.set_axis_off()
        if i >= len(scenes.images):
            continue
        axes.imshow(scenes.images[i], extent=(0, IMAGE_SIZE, IMAGE_SIZE, 0))
        for box in scenes.boxes[i][scenes.mask[i]]:
            draw_box(axes, box, color="white", linewidth=3)
        for row in np.flatnonzero(detections.mask[i] & (detections.scores[i] >= SHOWN_SCORE)):
            box, label = detections.boxes[i, row], detections.labels[i, row]
            draw_box(axes, box, color="red", linewidth=1.5)
            axes.text(
                *(box[0], max(box[1] - 2, 8)),
                f"{label}  {detections.scores[i, row]:.2f}",
                fontsize=8,
                color="white",
                bbox={"facecolor": "red", "edgecolor": "none", "pad": 1},
            )
    figure.suptitle("Held-out scenes: true boxes white, detections red with digit and score")
    figure.savefig(path, dpi=100)


def draw_losses(path: Path, losses: np.ndarray) -> None:
    """Draws the losses [steps, len(LOSSES)], averaged over the last few steps."""
    window = max(1, len(losses) // 40)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, curve in zip(LOSSES, losses.T, strict=True):
        smooth = np.convolve(curve, np.full(window, 1 / window), "valid")
        axes.plot(np.arange(window, len(losses) + 1), smooth, label=name)
    axes.set(xlabel="step", ylabel=f"mean of {window} steps", yscale="log", title="Training losses")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


# Command line ------------------------------------------------------------------------------------


def positive_integer(text: str) -> int:
    """Parses a command line value of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive integer")
    return int(text)


def seed_integer(text: str) -> int:
    """Parses a command line value that JAX and NumPy both take as a seed."""
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"'{text}' is not an integer from 0 to 2**31 - 1")
    return int(text)


def folder(text: str) -> Path:
    """Parses the path of a folder, and makes the folder if there is none."""
    path = Path(text).resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"'{text}' cannot be a folder: {error.strerror}"
        ) from error
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"'{text}' is not writable")
    return path


def process(text: str) -> tuple[int, int]:
    """Parses the number of a process, and how many there are."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number and a count, as 0/2 and 1/2")
    return int(number), int(count)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description="Trains a two-stage digit detector through its pooling and evaluates it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=positive_integer, default=2000, help="training steps in all")
    add("--batch-size", type=positive_integer, default=4, help="scenes in a training step")
    add("--scenes", type=positive_integer, default=300, help="held-out scenes to evaluate on")
    add("--seed", type=seed_integer, default=0, help="decides the weights and all scenes")
    add("--pooling", choices=POOLINGS, default="max", help="maxima or RoIAlign of the features")
    add("--pyramid", action="store_true", help="pool from two levels of features")
    add("--output", type=folder, default="digits_detector", help="folder for the pictures")
    add("--checkpoint", type=folder, help="folder to save to, and to resume from if it has a save")
    add("--save-every", type=positive_integer, default=100, help="steps from save to save")
    add("--process", type=process, help="number of this process, and of how many, as 0/2")
    add("--coordinator", default="localhost:9921", help="where process 0 can be reached")
    return parser.parse_args(argv)


def start(settings: argparse.Namespace) -> None:
    """Joins the other processes, if there are any."""
    if settings.process:
        number, count = settings.process
        jax.distributed.initialize(settings.coordinator, count, number)


def run(settings: argparse.Namespace) -> None:
    """Trains, evaluates, writes the pictures and prints the result."""
    mesh = make_mesh(settings.batch_size)
    state, losses = train(settings, mesh)
    seeds = [(settings.seed, HELD_OUT, i) for i in range(settings.scenes)]
    scenes = compose_scenes(seeds, load_sources(HELD_OUT))
    detections = detect_all(state, scenes.images, mesh)
    if jax.process_index() > 0:
        return  # the first one reports
    ap, ap50 = average_precision(scenes, detections)
    draw_detections(settings.output / "detections.png", scenes, detections)
    draw_losses(settings.output / "loss.png", losses)
    print(f"AP {ap:.3f}  AP50 {ap50:.3f}  loss {losses[-50:, 0].mean():.3f}")
    print(f"Pictures: {settings.output / 'detections.png'}, {settings.output / 'loss.png'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    settings = parse_arguments(argv)
    start(settings)
    try:
        run(settings)
    except KeyboardInterrupt:
        hint = f"; --checkpoint {settings.checkpoint} resumes" if settings.checkpoint else ""
        print(f"Interrupted{hint}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
