"""A two-stage digit detector, Faster R-CNN in shape, trained end to end through `RoIPool`.

    python examples/digits_detector.py --output out

Handwritten digits (scikit-learn's `load_digits`) are drawn at several sizes and positions over crops
of the photographs that scikit-image carries. A small convolutional backbone feeds a region proposal
network; its best boxes, after non-maximum suppression, are pooled by `jax_roipool.RoIPool`, and a
head names the digit in each box and corrects the box. All four losses are minimised together, so the
gradient of the head reaches the backbone through the pooling.

Every shape is static: each image has room for G digits and K regions, and a mask tells which are in
use. So one jitted train step serves all batches, on CPU, GPU and TPU alike.

Dimension letters, here and in the comments:
    N images of a batch     H, W, C  rows, columns, channels of the feature map
    G ground-truth boxes    A        anchors of an image, H * W * len(ANCHOR_HEIGHTS) of them
    K regions of interest   D        detections of an image
    M boxes, of any kind
Boxes are (x1, y1, x2, y2) in image pixels. Functions without N in their shapes are for one image and
are vmapped.
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from skimage import color, data, transform, util
from sklearn.datasets import load_digits
from tqdm import tqdm

from jax_roipool import RoIPool

Array = jax.Array

IMAGE_SIZE = 128
MAX_DIGITS = 8  # G
DIGIT_SIZES = (20, 48)  # side of a drawn glyph in pixels, smallest and largest
MAX_COVERED = 0.1  # share of a new digit's window that earlier ones may have taken
NUM_CLASSES = 10  # the head adds one more, the background

LR = 2e-3
WIDTHS = ((16, 2), (32, 2), (48, 1), (48, 1))
STRIDE = 4  # image pixels per cell of the feature map
ANCHOR_STRIDE = 8  # image pixels from anchor to anchor
ANCHOR_HEIGHTS = (18, 28, 42)
ANCHOR_ASPECT = 0.7  # width / height: digits are taller than wide
DELTA_SCALE = (10.0, 10.0, 5.0, 5.0)  # brings the regression targets to about unit variance
MAX_LOG_RATIO = 2.0  # largest predicted change of log width or log height

PRE_NMS = 96  # proposals that enter non-maximum suppression
NUM_ROIS = 32  # K, proposals that leave it, and regions the head is trained on
NUM_DETECTIONS = 20  # D
PROPOSAL_NMS_IOU = 0.7
DETECTION_NMS_IOU = 0.4

TRAIN_PHOTOS = (
    *("astronaut", "brick", "camera", "coffee", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry", "moon", "retina"),
)
HELD_OUT_PHOTOS = ("chelsea", "coins", "rocket", "stereo_motorcycle")

DETECTION_BATCH = 20
SHOWN_SCORE = 0.5
SHOW_EVERY = 10  # steps
SAVE_EVERY = 100  # steps
TRAIN, HELD_OUT = 0, 1  # set the seeds of the training and the held-out scenes apart

LOSS_NAMES = ("loss", "rpn_object", "rpn_box", "head_class", "head_box")


# Scenes ------------------------------------------------------------------------------------------


class Sources(NamedTuple):
    """What scenes are composed of."""

    photos: list[np.ndarray]  # [height, width, 3] each, in [0, 1]
    glyphs: np.ndarray  # [digits, 8, 8], in [0, 1]
    labels: np.ndarray  # [digits]


class Scenes(NamedTuple):
    """A batch of images with their ground truth, padded to G boxes."""

    images: np.ndarray  # [N, IMAGE_SIZE, IMAGE_SIZE, 3] in [0, 1]
    boxes: np.ndarray  # [N, G, 4]
    labels: np.ndarray  # [N, G] in 0..9
    mask: np.ndarray  # [N, G], False for padding


def load_photo(name: str) -> np.ndarray:
    """Returns the photograph in colour, its short side twice that of a scene."""
    photo = getattr(data, name)()
    if isinstance(photo, tuple):  # the motorcycle is a stereo pair with a disparity map
        photo = photo[0]
    photo = util.img_as_float32(photo)
    if photo.ndim == 2:
        photo = color.gray2rgb(photo)
    scale = 2 * IMAGE_SIZE / min(photo.shape[:2])
    shape = [round(side * scale) for side in photo.shape[:2]]
    return transform.resize(photo, shape, anti_aliasing=True)


def load_sources(held_out: bool) -> Sources:
    """Returns the photographs and digits for training, or those kept for the evaluation."""
    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 == 0) == held_out
    photos = [load_photo(name) for name in (HELD_OUT_PHOTOS if held_out else TRAIN_PHOTOS)]
    glyphs = (digits.images[chosen] / 16).astype(np.float32)
    return Sources(photos, glyphs, digits.target[chosen].astype(np.int32))


def crop_photo(rng: np.random.Generator, photo: np.ndarray) -> np.ndarray:
    """Returns a random, perhaps mirrored, crop of the size of a scene."""
    top, left = (rng.integers(side - IMAGE_SIZE + 1) for side in photo.shape[:2])
    crop = photo[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
    return crop[:, :: rng.choice((-1, 1))].copy()


def ink_box(alpha: np.ndarray) -> np.ndarray:
    """Returns the tight box of the visible part of a drawn digit."""
    rows, columns = (np.flatnonzero((alpha > 0.3).any(axis)) for axis in (1, 0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def random_ink(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """Returns a colour, light on a dark background and dark on a light one."""
    ink = rng.uniform(0, 0.35, 3)
    return (1 - ink if background.mean() < 0.5 else ink).astype(np.float32)


def compose_scene(
    rng: np.random.Generator, sources: Sources
) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
    """Returns an image, the boxes of the 1 to G digits drawn on it, and their labels."""
    image = crop_photo(rng, sources.photos[rng.integers(len(sources.photos))])
    taken = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    boxes, labels = [], []
    for _ in range(rng.integers(1, MAX_DIGITS + 1)):
        digit = rng.integers(len(sources.labels))
        height = rng.integers(DIGIT_SIZES[0], DIGIT_SIZES[1] + 1)
        width = round(height * rng.uniform(0.85, 1.15))
        top, left = rng.integers(IMAGE_SIZE - height), rng.integers(IMAGE_SIZE - width)
        window = slice(top, top + height), slice(left, left + width)
        if taken[window].mean() > MAX_COVERED:
            continue  # a crowded scene gets a digit fewer
        taken[window] = True
        glyph = transform.resize(sources.glyphs[digit], (height, width), order=1)
        alpha = np.clip(1.5 * glyph, 0, 1)[..., None]
        image[window] += alpha * (random_ink(rng, image[window]) - image[window])
        boxes.append(ink_box(glyph) + np.array([left, top, left, top], np.float32))
        labels.append(sources.labels[digit])
    return image, boxes, labels


def compose_scenes(seeds: Sequence[Sequence[int]], sources: Sources) -> Scenes:
    """Returns one scene for each seed; the same seed gives the same scene."""
    n = len(seeds)
    scenes = Scenes(
        images=np.zeros((n, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32),
        boxes=np.zeros((n, MAX_DIGITS, 4), np.float32),
        labels=np.zeros((n, MAX_DIGITS), np.int32),
        mask=np.zeros((n, MAX_DIGITS), bool),
    )
    for i, seed in enumerate(seeds):
        image, boxes, labels = compose_scene(np.random.default_rng(seed), sources)
        scenes.images[i] = image
        scenes.boxes[i, : len(boxes)] = boxes
        scenes.labels[i, : len(boxes)] = labels
        scenes.mask[i, : len(boxes)] = True
    return scenes


# Boxes -------------------------------------------------------------------------------------------


def make_anchors() -> np.ndarray:
    """Returns [A, 4], in the order in which the region proposal network flattens its output."""
    centres = (np.arange(IMAGE_SIZE // ANCHOR_STRIDE) + 0.5) * ANCHOR_STRIDE
    y, x, height = np.meshgrid(centres, centres, ANCHOR_HEIGHTS, indexing="ij")
    width = ANCHOR_ASPECT * height
    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    return np.stack(corners, axis=-1).reshape(-1, 4).astype(np.float32)


def pairwise_iou(a: Array, b: Array) -> Array:
    """Returns the intersection over union of boxes [Ma, 4] and [Mb, 4] as [Ma, Mb]."""
    top_left = jnp.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = jnp.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = jnp.prod(jnp.maximum(bottom_right - top_left, 0), axis=-1)
    area_a, area_b = (jnp.prod(boxes[:, 2:] - boxes[:, :2], axis=-1) for boxes in (a, b))
    union = area_a[:, None] + area_b[None, :] - intersection
    return intersection / jnp.maximum(union, 1e-6)


def centre_and_size(boxes: Array) -> tuple[Array, Array]:
    """Splits boxes [..., 4] into centres [..., 2] and sizes [..., 2] of at least a pixel."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, jnp.maximum(high - low, 1)


def encode(boxes: Array, reference: Array) -> Array:
    """Returns the deltas [..., 4] that lead from reference boxes to boxes."""
    (centre, size), (from_centre, from_size) = centre_and_size(boxes), centre_and_size(reference)
    deltas = [(centre - from_centre) / from_size, jnp.log(size / from_size)]
    return jnp.concatenate(deltas, axis=-1) * jnp.array(DELTA_SCALE)


def decode(deltas: Array, reference: Array) -> Array:
    """Returns the boxes [..., 4] at deltas from reference boxes, clipped to the image."""
    deltas = deltas / jnp.array(DELTA_SCALE)
    from_centre, from_size = centre_and_size(reference)
    centre = from_centre + deltas[..., :2] * from_size
    size = from_size * jnp.exp(jnp.clip(deltas[..., 2:], -MAX_LOG_RATIO, MAX_LOG_RATIO))
    boxes = jnp.concatenate([centre - size / 2, centre + size / 2], axis=-1)
    return jnp.clip(boxes, 0, IMAGE_SIZE)


def non_maximum_suppression(
    boxes: Array, scores: Array, iou_threshold: float, candidates: int, size: int
) -> tuple[Array, Array]:
    """Picks the best of boxes [M, 4] that do not overlap a better one.

    Looks at the `candidates` best boxes and returns the indices [size] of those picked, best first,
    and a mask [size] that is False for padding.
    """
    _, order = jax.lax.top_k(scores, candidates)
    iou = pairwise_iou(boxes[order], boxes[order])
    rank = jnp.arange(candidates)
    suppresses = (iou > iou_threshold) & (rank[:, None] < rank[None, :])

    def suppress(i: Array, keep: Array) -> Array:
        return keep & ~(keep[i] & suppresses[i])

    keep = jax.lax.fori_loop(0, candidates, suppress, jnp.ones(candidates, bool))
    picked = jnp.argsort(~keep, stable=True)[:size]
    return order[picked], keep[picked]


def match(boxes: Array, true_boxes: Array, true_mask: Array) -> tuple[Array, Array]:
    """Returns which of true_boxes [G, 4] each of boxes [M, 4] overlaps most, and the IoU.

    The first is an index [M], the second [M, G], zero for padding.
    """
    iou = jnp.where(true_mask, pairwise_iou(boxes, true_boxes), 0)
    return iou.argmax(axis=1), iou


def sample(key: Array, eligible: Array, size: int) -> tuple[Array, Array]:
    """Draws up to `size` of the True entries of eligible [M] at random.

    Returns indices [size] and a mask [size] that is False where too few were eligible.
    """
    priority = jnp.where(eligible, jax.random.uniform(key, eligible.shape), -1)
    priority, indices = jax.lax.top_k(priority, size)
    return indices, priority >= 0


def sample_balanced(
    key: Array, positive: Array, negative: Array, sizes: tuple[int, int]
) -> tuple[Array, Array]:
    """Draws up to sizes[0] positive and sizes[1] negative entries, like `sample`."""
    keys = jax.random.split(key)
    drawn = [sample(*each) for each in zip(keys, (positive, negative), sizes, strict=True)]
    indices, masks = zip(*drawn, strict=True)
    return jnp.concatenate(indices), jnp.concatenate(masks)


# Model -------------------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """Convolution, group normalisation, ReLU."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(self.features, (3, 3), self.stride, use_bias=False)(x)
        return nn.relu(nn.GroupNorm(num_groups=8)(x))


class Backbone(nn.Module):
    """Images [N, IMAGE_SIZE, IMAGE_SIZE, 3] to features [N, H, W, C] at 1 / STRIDE."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = (images - 0.5) / 0.25
        for features, stride in WIDTHS:
            x = ConvBlock(features, stride)(x)
        return x


class RegionProposalNetwork(nn.Module):
    """Features [N, H, W, C] to a logit [N, A] and deltas [N, A, 4] for each anchor."""

    @nn.compact
    def __call__(self, features: Array) -> tuple[Array, Array]:
        n = features.shape[0]
        x = ConvBlock(64, stride=ANCHOR_STRIDE // STRIDE)(features)
        x = ConvBlock(64)(x)
        logits = nn.Conv(len(ANCHOR_HEIGHTS), (1, 1))(x)
        deltas = nn.Conv(len(ANCHOR_HEIGHTS) * 4, (1, 1))(x)
        return logits.reshape(n, -1), deltas.reshape(n, -1, 4)


class Head(nn.Module):
    """Pooled regions [N, K, P, Q, C] to class logits [N, K, classes + 1] and deltas [N, K, 4]."""

    @nn.compact
    def __call__(self, pooled: Array) -> tuple[Array, Array]:
        x = nn.relu(nn.Conv(64, (3, 3), padding="VALID")(pooled))
        x = x.reshape(*x.shape[:2], -1)
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(NUM_CLASSES + 1)(x), nn.Dense(4)(x)


class Detector(nn.Module):
    """The two stages. Training calls `propose` and `classify`, inference the whole."""

    def setup(self) -> None:
        self.backbone = Backbone()
        self.rpn = RegionProposalNetwork()
        self.pool = RoIPool(output_size=(7, 7), spatial_scale=1 / STRIDE)
        self.head = Head()

    def propose(self, images: Array) -> tuple[Array, Array, Array]:
        """Returns features [N, H, W, C], anchor logits [N, A] and anchor deltas [N, A, 4]."""
        features = self.backbone(images)
        return features, *self.rpn(features)

    def classify(self, features: Array, rois: Array, roi_mask: Array) -> tuple[Array, Array]:
        """Returns class logits [N, K, classes + 1] and deltas [N, K, 4] of rois [N, K, 4]."""
        return self.head(self.pool(features, rois, roi_mask))

    def __call__(self, images: Array) -> tuple[Array, Array, Array, Array]:
        """Returns proposals [N, K, 4], their mask [N, K], class logits and deltas."""
        features, logits, deltas = self.propose(images)
        rois, roi_mask = select_proposals(logits, deltas)
        return rois, roi_mask, *self.classify(features, rois, roi_mask)


def select_proposals(logits: Array, deltas: Array) -> tuple[Array, Array]:
    """Returns the K best boxes [N, K, 4] of the region proposal network and their mask [N, K]."""

    def select(logits: Array, deltas: Array) -> tuple[Array, Array]:
        boxes = decode(deltas, make_anchors())
        picked, mask = non_maximum_suppression(boxes, logits, PROPOSAL_NMS_IOU, PRE_NMS, NUM_ROIS)
        return boxes[picked], mask

    return jax.vmap(select)(logits, deltas)


class Detections(NamedTuple):
    """What was found in a batch of images, best first, padded to D."""

    boxes: Array  # [N, D, 4]
    labels: Array  # [N, D]
    scores: Array  # [N, D]
    mask: Array  # [N, D], False for padding


@jax.jit
def detect(state: TrainState, images: Array) -> Detections:
    """Finds the digits in images [N, IMAGE_SIZE, IMAGE_SIZE, 3]."""

    def select(rois: Array, roi_mask: Array, logits: Array, deltas: Array) -> Detections:
        boxes = jnp.repeat(decode(deltas, rois), NUM_CLASSES, axis=0)
        labels = jnp.tile(jnp.arange(NUM_CLASSES), NUM_ROIS)
        scores = (jax.nn.softmax(logits)[:, :NUM_CLASSES] * roi_mask[:, None]).reshape(-1)
        # Boxes of different classes must not suppress each other: move the classes far apart.
        shifted = boxes + 2 * IMAGE_SIZE * labels[:, None]
        picked, mask = non_maximum_suppression(
            shifted, scores, DETECTION_NMS_IOU, PRE_NMS, NUM_DETECTIONS
        )
        mask &= scores[picked] > 0
        return Detections(boxes[picked], labels[picked], scores[picked], mask)

    return jax.vmap(select)(*state.apply_fn({"params": state.params}, images))


# Training ----------------------------------------------------------------------------------------


def masked_mean(values: Array, mask: Array) -> Array:
    """Returns the mean of the values where the mask is True."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def box_loss(deltas: Array, boxes: Array, reference: Array) -> Array:
    """Returns the smooth L1 loss [...] of deltas [..., 4] that should lead to boxes."""
    return optax.huber_loss(deltas, encode(boxes, reference)).sum(axis=-1)


class Targets(NamedTuple):
    """The sampled boxes of an image, M of them, and what to learn from them."""

    indices: Array  # [M] of the boxes that were sampled from
    mask: Array  # [M], False for padding
    positive: Array  # [M], True for those that lie on a digit
    labels: Array  # [M], NUM_CLASSES for the background
    boxes: Array  # [M, 4], the digit's box; without meaning for the background


def anchor_targets(key: Array, true_boxes: Array, labels: Array, true_mask: Array) -> Targets:
    """Samples 64 anchors, at most a quarter of them on digits."""
    best, iou = match(make_anchors(), true_boxes, true_mask)
    # The best anchor of a digit counts as a hit even where none fits it well.
    forced = ((iou > 0) & (iou == iou.max(axis=0))).any(axis=1)
    positive = forced | (iou.max(axis=1) >= 0.6)
    negative = ~forced & (iou.max(axis=1) < 0.3)
    indices, mask = sample_balanced(key, positive, negative, (16, 48))
    best, positive = best[indices], positive[indices]
    return Targets(indices, mask, positive, labels[best], true_boxes[best])


def roi_targets(
    key: Array, rois: Array, roi_mask: Array, true_boxes: Array, labels: Array, true_mask: Array
) -> Targets:
    """Samples K of the regions of interest [M, 4], at most a quarter of them on digits."""
    best, iou = match(rois, true_boxes, true_mask)
    positive = roi_mask & (iou.max(axis=1) >= 0.5)
    sizes = NUM_ROIS // 2, NUM_ROIS - NUM_ROIS // 2
    indices, mask = sample_balanced(key, positive, roi_mask & ~positive, sizes)
    best, positive = best[indices], positive[indices]
    labels = jnp.where(positive, labels[best], NUM_CLASSES)
    return Targets(indices, mask, positive, labels, true_boxes[best])


def take(values: Array, indices: Array) -> Array:
    """Returns values [N, M, ...] at indices [N, K] of each image, as [N, K, ...]."""
    return jax.vmap(lambda v, i: v[i])(values, indices)


def detector_loss(
    params: Any, state: TrainState, scenes: Scenes, key: Array
) -> tuple[Array, dict[str, Array]]:
    """Returns the sum of the four losses, and each of them by name."""
    truth = scenes.boxes, scenes.labels, scenes.mask
    rpn_keys, head_keys = jax.random.split(key, (2, len(scenes.images)))
    features, logits, deltas = state.apply_fn({"params": params}, scenes.images, method="propose")

    anchors = jax.vmap(anchor_targets)(rpn_keys, *truth)
    anchor_boxes = jnp.asarray(make_anchors())[anchors.indices]
    object_loss = optax.sigmoid_binary_cross_entropy(
        take(logits, anchors.indices), anchors.positive.astype(jnp.float32)
    )
    anchor_box_loss = box_loss(take(deltas, anchors.indices), anchors.boxes, anchor_boxes)

    # The head learns from the proposals, not through their coordinates. The true boxes join them,
    # so that it sees digits before the proposals are any good.
    rois, roi_mask = jax.lax.stop_gradient(select_proposals(logits, deltas))
    rois = jnp.concatenate([rois, scenes.boxes], axis=1)
    roi_mask = jnp.concatenate([roi_mask, scenes.mask], axis=1)
    regions = jax.vmap(roi_targets)(head_keys, rois, roi_mask, *truth)
    rois = take(rois, regions.indices)
    class_logits, roi_deltas = state.apply_fn(
        {"params": params}, features, rois, regions.mask, method="classify"
    )
    class_loss = optax.softmax_cross_entropy_with_integer_labels(class_logits, regions.labels)
    roi_box_loss = box_loss(roi_deltas, regions.boxes, rois)

    losses = {
        "rpn_object": masked_mean(object_loss, anchors.mask),
        "rpn_box": masked_mean(anchor_box_loss * anchors.positive, anchors.mask),
        "head_class": masked_mean(class_loss, regions.mask),
        "head_box": masked_mean(roi_box_loss * regions.positive, regions.mask),
    }
    loss = sum(losses.values())
    return loss, {"loss": loss, **losses}


@jax.jit
def train_step(state: TrainState, scenes: Scenes, key: Array) -> tuple[TrainState, Array]:
    """Returns the state after one step of gradient descent, and the losses in LOSS_NAMES' order."""
    step_key = jax.random.fold_in(key, state.step)
    grads, losses = jax.grad(detector_loss, has_aux=True)(state.params, state, scenes, step_key)
    return state.apply_gradients(grads=grads), jnp.stack([losses[name] for name in LOSS_NAMES])


def create_state(seed: int, steps: int) -> TrainState:
    """Returns a detector with random weights and its optimiser."""
    detector = Detector()
    images = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    params = jax.jit(detector.init)(jax.random.key(seed), images)["params"]
    schedule = optax.warmup_cosine_decay_schedule(0, LR, min(100, steps // 4), steps)
    optimiser = optax.chain(
        optax.clip_by_global_norm(10.0), optax.adamw(schedule, weight_decay=1e-3)
    )
    return TrainState.create(apply_fn=detector.apply, params=params, tx=optimiser)


# Checkpoints -------------------------------------------------------------------------------------


def save_checkpoint(
    manager: ocp.CheckpointManager | None, state: TrainState, losses: list[Array], seed: int
) -> None:
    """Saves the training at its present step, unless that is done or there is nowhere to."""
    step = int(state.step)
    if manager is None or manager.latest_step() == step:
        return
    log = {"seed": seed, "losses": np.array(losses[:step]).tolist()}
    items = {"state": ocp.args.StandardSave(state), "log": ocp.args.JsonSave(log)}
    manager.save(step, args=ocp.args.Composite(**items))


def restore_checkpoint(
    manager: ocp.CheckpointManager | None, state: TrainState, seed: int, steps: int
) -> tuple[TrainState, list[Array]]:
    """Returns the last state saved and the losses up to it, or the given state and no losses."""
    step = manager.latest_step() if manager else None
    if step is None:
        return state, []
    items = {"state": ocp.args.StandardRestore(state), "log": ocp.args.JsonRestore()}
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    if restored.log["seed"] != seed or step > steps:
        sys.exit(
            f"The checkpoint is of --seed {restored.log['seed']} at step {step}; "
            f"it cannot be continued with --seed {seed} to --steps {steps}."
        )
    return restored.state, [jnp.array(row) for row in restored.log["losses"]]


def train(
    settings: argparse.Namespace, manager: ocp.CheckpointManager | None
) -> tuple[TrainState, np.ndarray]:
    """Trains from the last checkpoint, or from the start, to the last step.

    Returns the state and the losses [steps, len(LOSS_NAMES)].
    """
    sources = load_sources(held_out=False)
    state = create_state(settings.seed, settings.steps)
    state, losses = restore_checkpoint(manager, state, settings.seed, settings.steps)
    key = jax.random.key(settings.seed)
    try:
        with tqdm(total=settings.steps, initial=len(losses), desc="Training") as bar:
            for step in range(len(losses), settings.steps):
                seeds = [(settings.seed, TRAIN, step, i) for i in range(settings.batch_size)]
                next_state, step_losses = train_step(state, compose_scenes(seeds, sources), key)
                # The losses go first: an interrupt between the two lines loses nothing.
                losses.append(step_losses)
                state = next_state
                bar.update()
                if step % SHOW_EVERY == 0:
                    bar.set_postfix(zip(LOSS_NAMES, step_losses.tolist(), strict=True))
                if (step + 1) % SAVE_EVERY == 0:
                    save_checkpoint(manager, state, losses, settings.seed)
    finally:
        save_checkpoint(manager, state, losses, settings.seed)
    return state, np.array(losses)


# Evaluation --------------------------------------------------------------------------------------


def detect_all(state: TrainState, images: np.ndarray) -> Detections:
    """Finds the digits in any number of images, DETECTION_BATCH of them at a time."""
    batches = []
    for start in range(0, len(images), DETECTION_BATCH):
        # The last batch is filled up with images from the front: one shape, one compilation.
        rows = range(start, start + DETECTION_BATCH)
        batches.append(jax.device_get(detect(state, images.take(rows, axis=0, mode="wrap"))))
    return Detections(*(np.concatenate(field)[: len(images)] for field in zip(*batches)))


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
    """Draws the losses [steps, len(LOSS_NAMES)], averaged over the last few steps."""
    window = max(1, len(losses) // 40)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, curve in zip(LOSS_NAMES, losses.T, strict=True):
        smooth = np.convolve(curve, np.full(window, 1 / window), "valid")
        axes.plot(np.arange(window, len(losses) + 1), smooth, label=name.replace("_", " "))
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
    return path


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description="Trains a two-stage digit detector through RoIPool and evaluates it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=positive_integer, default=1500, help="training steps in all")
    add("--batch-size", type=positive_integer, default=8, help="scenes in a training step")
    add("--scenes", type=positive_integer, default=300, help="held-out scenes to evaluate on")
    add("--seed", type=seed_integer, default=0, help="decides the weights and all scenes")
    add("--output", type=folder, default="digits_detector", help="folder for the pictures")
    add("--checkpoint", type=folder, help="folder to save to, and to resume from if it has a save")
    return parser.parse_args(argv)


def run(settings: argparse.Namespace) -> None:
    """Trains, evaluates, prints the result and writes the pictures."""
    with contextlib.ExitStack() as stack:
        manager = None
        if settings.checkpoint:
            options = ocp.CheckpointManagerOptions(max_to_keep=2)
            manager = stack.enter_context(
                ocp.CheckpointManager(settings.checkpoint, options=options)
            )
        state, losses = train(settings, manager)

    sources = load_sources(held_out=True)
    scenes = compose_scenes([(settings.seed, HELD_OUT, i) for i in range(settings.scenes)], sources)
    detections = detect_all(state, scenes.images)
    ap, ap50 = average_precision(scenes, detections)
    pictures = settings.output / "detections.png", settings.output / "loss.png"
    draw_detections(pictures[0], scenes, detections)
    draw_losses(pictures[1], losses)
    print(f"AP {ap:.3f}  AP50 {ap50:.3f}  loss {losses[-50:, 0].mean():.3f}")
    print("Wrote", *pictures, sep="\n  ")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    settings = parse_arguments(argv)
    try:
        run(settings)
    except KeyboardInterrupt:
        kept = f"; continue with --checkpoint {settings.checkpoint}" if settings.checkpoint else ""
        print(f"Interrupted{kept}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
