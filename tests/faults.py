"""Single faults put into a copy of the code, and which of them the tests find.

    python tests/faults.py [--full] [WORDS OF A FAULT'S NAME...]

A fault is tried against the test files that are to find it, by default without `--full`. A fault
in C++ is compiled. Prints a line a fault, and at the end those that nothing has found.
"""

import argparse
import concurrent.futures
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "jax_roipool/"
FAMILY = PACKAGE + "_backends/rectangle_max/"
SUMS = PACKAGE + "_backends/weighted_sum/"
LIBRARY = PACKAGE + "_backends/native/"
NATIVE = LIBRARY + "src/"
EXTENSION = "jax_roipool_cpu.so"
LIMIT = 1200
"""So many seconds, and tests do not end: they take minutes at most. Some faults are such loops."""


class Fault(NamedTuple):
    """One place in the code, what it becomes, and the test files that should turn red."""

    name: str
    path: str
    code: str
    fault: str
    tests: str


def bins(name, code, fault, tests="bins"):
    return Fault(f"bins: {name}", PACKAGE + "_bins.py", code, fault, tests)


def rois(name, code, fault, tests="bad_values errors"):
    return Fault(f"rois: {name}", PACKAGE + "_rois.py", code, fault, tests)


def core(name, code, fault, tests="primitive partitioning"):
    return Fault(f"primitive: {name}", PACKAGE + "_primitive.py", code, fault, tests)


def plan(name, code, fault, tests="partitioning primitive"):
    return Fault(f"partitioning: {name}", PACKAGE + "_partitioning.py", code, fault, tests)


def rules(name, code, fault, tests="gradients forward_mode"):
    return Fault(f"derivatives: {name}", PACKAGE + "_rectangle_max.py", code, fault, tests)


def choice(name, code, fault, tests="backends"):
    return Fault(f"choice: {name}", PACKAGE + "_backends/__init__.py", code, fault, tests)


def levels(name, code, fault, tests="levels"):
    return Fault(f"levels: {name}", PACKAGE + "_levels.py", code, fault, tests)


def layers(name, code, fault, tests="modules"):
    return Fault(f"layers: {name}", PACKAGE + "_layers.py", code, fault, tests)


def float32(name, code, fault, tests="float32"):
    return Fault(f"float32: {name}", PACKAGE + "_float32.py", code, fault, tests)


def taps(name, code, fault, tests="taps"):
    return Fault(f"taps: {name}", PACKAGE + "_taps.py", code, fault, tests)


def sums(file, name, code, fault, tests="weighted_sum"):
    return Fault(f"sums, {file}: {name}", SUMS + file, code, fault, tests)


def averages(file, name, code, fault, tests="averages"):
    return Fault(f"averages, {file}: {name}", PACKAGE + file, code, fault, tests)


def backend(file, name, code, fault, tests="contract"):
    return Fault(f"{file}: {name}", FAMILY + file, code, fault, tests)


def native(file, name, code, fault, tests="contract cpu"):
    return Fault(f"C++, {file}: {name}", NATIVE + file, code, fault, tests)


def cuda(file, name, code, fault, tests="cuda_kernels"):
    return Fault(f"CUDA, {file}: {name}", FAMILY + "cuda/" + file, code, fault, tests)


FAULTS = (
    bins("half to even", "lax.RoundingMethod.AWAY_FROM_ZERO", "lax.RoundingMethod.TO_NEAREST_EVEN"),
    bins("the end is never inclusive", "int(convention.inclusive_end)", "0"),
    bins("a length of 0", "inclusive_end), 1)", "inclusive_end), 0)"),
    bins("clipped a cell early", "0, lanes.size)", "0, lanes.size - 1)"),
    bins("short bins are empty", "lanes.is_end & (whole == 0)", "lanes.is_end & (whole < 0)"),
    bins(
        "rounded up too far",
        "np.where(lanes.is_end, lanes.bins - 1, 0)",
        "np.where(lanes.is_end, lanes.bins, 0)",
    ),
    float32("XLA's quotient", "for step in range(-1, 3)", "for step in range(-1, 0)"),
    float32("a product and a sum are one", "jnp.clip(x * y, -_FAR, _FAR)", "x * y"),
    float32("zero has neighbours", "jnp.abs(approximate) > 1 / _FAR", "approximate == approximate"),
    float32("no derivative", "tangents[0] / divisor", "0 * tangents[0]"),
    taps("a sample past the border", "(position <= sizes)", "(position < sizes)"),
    taps("a sample before the border", "(position >= -1)", "(position > -1)"),
    taps("samples from the bin's start", "number + 0.5", "number"),
    taps(
        "XLA's quotient of a RoI",
        "float32_quotient(length, np.array(output_size, np.float32))",
        "(length / np.array(output_size, np.float32))",
    ),
    taps("bins are a fused sum", "float32_product(length, bin)", "length * bin"),
    taps("unaligned RoIs of no length", "else (0.0, 1.0)", "else (0.0, 0.0)"),
    taps("a sum for a mean", "weights *= 1 / ratios[..., None]", "weights *= ratios[..., None]"),
    taps("columns as rows", "[x[:, :, axis, :bins] for axis", "[x[:, :, 0, :bins] for axis"),
    taps(
        "adaptive samples past a bin",
        "(number < end)[..., None, None]",
        "(number <= end)[..., None, None]",
    ),
    taps("too few cells of a run", "x.max(axis=-1) + 1 for x", "x.max(axis=-1) for x"),
    taps("hats reach past the map", " & (cell < sizes[..., None])", "", "averages"),
    taps("RoIs without area", " & (length > 0) & (cell", " & (cell", "averages"),
    taps(
        "a hat of one slope",
        "((1, (-1, 0)), (-1, (0, 1)))",
        "((1, (-1, 0)), (1, (0, 1)))",
        "averages",
    ),
    taps(
        "bins with the last row",
        "map_size[0] - unread, map_size[1] - unread",
        "map_size",
        "averages",
    ),
    taps(
        "a crop of one row at its start",
        "jnp.where(steps > 0, start, (start + end) / 2)",
        "start",
        "averages",
    ),
    taps(
        "crops in images that are not there",
        "inside &= (image_index >= 0)[..., None, None]",
        "",
        "averages",
    ),
    taps(
        "bins share their rows",
        "x = jnp.expand_dims(jnp.moveaxis(x, 2, 1), (2 - axis, 4))",
        "x = jnp.expand_dims(jnp.moveaxis(x, 2, 1), (1 + axis, 4))",
        "averages",
    ),
    sums(
        "gather.py",
        "taps without weight are read",
        "cell = jnp.where(has_weight, cell, jnp.maximum(other, 0)[..., None])",
        "",
    ),
    sums(
        "gather.py",
        "taps outside of the map",
        "jnp.clip(first[..., None] + lax.iota(jnp.int32, run), 0, size - 1)",
        "first[..., None] + lax.iota(jnp.int32, run)",
    ),
    sums(
        "gather.py",
        "any image",
        "rows = rois.rows.counts & rois.has_image[:, None]",
        "rows = rois.rows.counts",
    ),
    sums(
        "gather.py",
        "groups share images",
        "image += images * lax.broadcasted_iota",
        "image += 0 * lax.broadcasted_iota",
    ),
    sums(
        "gather.py",
        "a block too few",
        "jnp.maximum(-(-axis.used.max() // BLOCK), 1)",
        "jnp.maximum(axis.used.max() // BLOCK, 1)",
    ),
    sums("gather.py", "columns' weights are rows'", "(2 - axis, 3)", "(1 + axis, 3)"),
    sums("matmul.py", "what is not finite is 0", "jnp.where(touched > 0, jnp.nan, sums)", "sums"),
    sums(
        "matmul.py",
        "what is not finite spreads",
        "sums = _sum(jnp.where(is_finite, features, 0), cells",
        "sums = _sum(features, cells",
    ),
    sums(
        "matmul.py",
        "all images",
        "across = jnp.where(is_image[..., None, :, None], across[..., None, :], 0)",
        "across = jnp.broadcast_to(across[..., None, :], (*across.shape[:-1], n, across.shape[-1]))",
    ),
    sums(
        "matmul.py",
        "cotangents of no image",
        'pooled = jnp.where(counts, pooled.astype(dtype), 0)\n        bands = _product("kgph,kgpqc->kghqc", down, pooled)\n        return sums',
        'pooled = pooled.astype(dtype)\n        bands = _product("kgph,kgpqc->kghqc", down, pooled)\n        return sums',
    ),
    averages(
        "_weighted_sum.py",
        "one tangent is enough",
        "total = ad.add_tangents(total, *primitive(*operands, **params))",
        "total = primitive(*operands, **params)[0]",
        "averages",
    ),
    averages(
        "_averages.py",
        "RoIs have a gradient",
        "if not rois_have_gradient:",
        "if False:",
        "roi_align",
    ),
    averages(
        "_averages.py",
        "channels in another order",
        "reshape(G, n, H, W, C, P, Q), (5, 6), (1, 2))",
        "reshape(G, n, H, W, P, Q, C), (4, 5), (1, 2))",
    ),
    averages(
        "_roi_align.py",
        "a ratio of 0",
        "return check_pair(",
        "if sampling_ratio == 0:\n        return 0, 0\n    return check_pair(",
        "roi_align",
    ),
    averages(
        "_roi_align.py",
        "always aligned",
        "aligned=_check_aligned(aligned)",
        "aligned=_check_aligned(aligned) or True",
        "roi_align",
    ),
    averages("_crop_and_resize.py", "x is y", "np.array([1, 0, 3, 2])", "np.array([0, 1, 2, 3])"),
    plan("channels are not summed", '() if "c" in axes.results[0] else c', "()", "partitioning"),
    bins("rows are columns", "jnp.where(lanes.is_row, y1, x1)", "jnp.where(lanes.is_row, x1, y1)"),
    bins("ends are rounded down", "jnp.ceil(end)", "jnp.floor(end)"),
    bins(
        "height and width are mixed up",
        "where(of_each_part(True, True, True, False, False), H, W)",
        "where(of_each_part(True, True, True, False, False), W, H)",
    ),
    rois("masks do nothing", "real &= roi_mask", "real &= roi_mask | True"),
    rois("only x1 and y1 must be finite", "for i in range(4)]", "for i in range(2)]"),
    rois("any scale will do", " & jnp.isfinite(spatial_scale)", ""),
    rois("half an image", "real &= index == jnp.floor(index)", "real &= index == index"),
    rois("cells past int32", "CELL_LIMIT = 2.0**29", "CELL_LIMIT = 2.0**31", "bins oracle"),
    rois("the index is a coordinate", "rois[..., -4:]", "rois[..., :4]", "oracle parity"),
    rois("lists are int32", "isinstance(rois, (list, tuple)) else None", "False else None"),
    rois("any two batches", "rois.shape[0] != features.shape[0]", "False"),
    rois("masks of any length", "if x.shape != rois.shape[:-1]:", "if False:"),
    rois("half a bin", "1 <= rows <= most", "0 <= rows <= most"),
    rois("narrow indices", "if index.dtype.itemsize >= 4:", "if True:", "dtypes bad_values"),
    rois(
        "masks stay where they are",
        "or not (x is rois or any(spec)):",
        "or x is not rois:",
        "sharding",
    ),
    rois(
        "long indices wrap",
        "(np.int64, np.uint64):\n        # What",
        "():\n        # What",
        "roi_align",
    ),
    rois(
        "indices of any length",
        "check_one_a_roi(name, image_index, rois, rois_name)",
        "pass",
        "roi_align",
    ),
    rois(
        "indices of floats", "jnp.issubdtype(image_index.dtype, jnp.integer)", "True", "roi_align"
    ),
    core("every program is for CPUs", "others if platform is None", "['cpu'] if platform is None"),
    core(
        "never joins K", 'letter = "k" if only_rois', 'letter = "g" if only_rois', "primitive vmap"
    ),
    core(
        "joins the wrong way round",
        "sizes = (mapped[0].axis_size, size) if inner else (size, mapped[0].axis_size)",
        "sizes = (mapped[0].axis_size, size)",
        "primitive vmap",
    ),
    core(
        "a mapped axis in front is overlooked",
        "self.dim is not None and self.dim <= self.axis",
        "self.dim is not None and self.dim < self.axis",
        "primitive vmap",
    ),
    core(
        "nothing varies together",
        "*vary_together(*operands),",
        "*operands,",
        "compositions primitive sharding",
    ),
    core("the mesh is forgotten", "if result_sharding is None:", "if True:", "primitive sharding"),
    core(
        "symbols are numbers",
        "symbolic=_are_symbolic(types)",
        "symbolic=False",
        "export",
    ),
    core(
        "kernels where XLA splits the program",
        "partitioned=partitioned and not is_asked",
        "partitioned=False",
        "sharding",
    ),
    plan("sums mix RoIs", "if k != n and set(k) & set(n):", "if False:"),
    plan("bins cost twice", "0 if axes.sums_rois else 2 * bins", "2 * bins"),
    plan(
        "every device has all sums",
        'onto = "k" if together and not axes.sums_rois else None',
        "onto = None",
    ),
    plan(
        "images are counted from 0",
        "packed - images * lax.axis_index(names)",
        "packed - lax.axis_index(names)",
        "partitioning primitive sharding",
    ),
    plan("uneven parts", "array_type.shape[at] % parts == 0 and", "", "partitioning sharding"),
    plan("any axis is explicit", "== tuple(mesh.axis_names)", "!= ()", "partitioning sharding"),
    rules("a gradient twice as large", "_scatter(cotangents[0],", "_scatter(2 * cotangents[0],"),
    rules("int16 for a cell too many", "cells - 1 <=", "cells - 2 <=", "dtypes shapes gradients"),
    rules(
        "users get the narrow argmax",
        "argmax_dtype = np.dtype(np.int32) if with_argmax else _residual_dtype(features_type)",
        "argmax_dtype = _residual_dtype(features_type)",
    ),
    rules(
        "tangents are the maxima",
        "tangents[0], argmax, edges, implementation=implementation",
        "features, argmax, edges, implementation=implementation",
    ),
    rules(
        "the scatter has no transpose",
        "(gathered,) = gather_at_argmax_p(gradient,",
        "(gathered,) = gather_at_argmax_p(0 * gradient,",
    ),
    choice("XLA splits everything", "splits = not partitioned or", "splits = True or"),
    choice("portable first", "None: kernels + portable", "None: portable + kernels"),
    choice("aloud every time", "@functools.cache\ndef _warn_once", "def _warn_once"),
    choice(
        "any name",
        'if implementation not in (None, "xla"',
        'if False and implementation not in (None, "xla"',
        "errors",
    ),
    layers(
        "masks of maxima are left out",
        "roi_mask=roi_mask,\n            convention",
        "roi_mask=None,\n            convention",
    ),
    layers(
        "masks of averages are left out",
        "roi_mask=roi_mask,\n            implementation",
        "roi_mask=None,\n            implementation",
    ),
    layers(
        "masks of pyramids are left out",
        "levels=levels,\n            roi_mask=roi_mask,",
        "levels=levels,",
    ),
    layers("always aligned", "aligned: bool = False", "aligned: bool = True"),
    layers("one sample", "| None = 2", "| None = 1"),
    layers(
        "canonical values are left out",
        "canonical_size=self.canonical_size,",
        "",
    ),
    layers("lists have no hash", 'in ("spatial_scales", "sampling_ratio")', "in ()"),
    layers(
        "no images of averages",
        "aligned=self.aligned,\n            image_index=image_index,\n            roi_mask",
        "aligned=self.aligned,\n            roi_mask",
    ),
    levels("no 1e-6", "log2 + np.float32(1e-6)", "log2"),
    levels(
        "steps in float64",
        "(size.astype(np.float64)).astype(np.float32)",
        "(size.astype(np.float64))",
    ),
    levels("the step belongs below", "(area >= first_area)", "(area > first_area)"),
    levels("negative areas", " & (area >= 0)", ""),
    levels("any coordinate", "map(jnp.isfinite, corners)", "map(jnp.isfinite, corners[:3])"),
    levels("the first level for all", "levels[1:])", "levels[:-1])"),
    levels("a level without RoIs", "own = levels == i", "own = levels == min(i, 1)"),
    levels(
        "all RoIs on every level", "spatial_scale=scale, roi_mask=mask)", "spatial_scale=scale)"
    ),
    levels("masks do nothing", "if roi_mask is not None:", "if False:"),
    levels(
        "a sum of levels",
        "return choose(own, of_level, pooled)",
        "return of_level + pooled",
    ),
    levels("each level anew", "mask = MaskOnto(own, pooled) if", "mask = own if"),
    levels(
        "levels are written into whatever operator's result",
        "if not isinstance(pool, functools.partial) or pool.func not in TAKE_ONTO:",
        "if False:",
    ),
    levels(
        "gradients of the first level only", "of_level + pooled if is_linear else pooled", "pooled"
    ),
    levels("integers have tangents", "if is_linear else pooled", "if True else pooled"),
    plan("choices stay where they are", "if any(sharding.spec):", "if False:", "levels"),
    levels(
        "a scale of the operator's own",
        'for name in ("spatial_scale", "roi_mask"):',
        "for name in ():",
    ),
    levels("maps of any channels", "x.shape[:-3], x.shape[-1:])", "x.shape[:-3])"),
    levels("any pyramid", "scales != [2.0**-k for k in levels]", "False"),
    Fault(
        "explicit axes: RoIs are whole",
        PACKAGE + "_explicit_axes.py",
        "batch = spec[0] if",
        "batch = None if",
        "sharding",
    ),
    Fault(
        "explicit axes: any name will do",
        PACKAGE + "_explicit_axes.py",
        "    if unknown:",
        "    if False:",
        "errors",
    ),
    backend("ordered.py", "NaN is a number", "magnitude > infinity, nan", "magnitude < 0, nan"),
    backend(
        "ordered.py", "negative numbers upside down", "bits < 0, -magnitude", "bits < 0, magnitude"
    ),
    backend("portable.py", "the last of equals", "(other_index < index)", "(other_index > index)"),
    backend(
        "portable.py",
        "bad images pool empty",
        "jnp.where(no_image, 0,",
        "jnp.where(no_image, empty,",
    ),
    backend(
        "blocks.py", "the last of equals", "jnp.minimum(before, cell", "jnp.maximum(before, cell"
    ),
    backend(
        "blocks.py", "a block too few", "-(-cells // (stride * block))", "cells // (stride * block)"
    ),
    backend(
        "blocks.py",
        "windows reach out",
        "row + j * stride, row_end - stride",
        "row + j * stride, row_end - 1",
    ),
    backend(
        "dense.py",
        "a column too many",
        "(cell[None] < end[:, None])",
        "(cell[None] <= end[:, None])",
    ),
    backend(
        "dense.py",
        "bad images are gathered",
        "found = has_image(image_index, images) & (argmax >= 0)",
        "found = argmax >= 0",
    ),
    backend(
        "segment_max.py", "no last row", "jnp.maximum(core_max[:bins], last_key)", "core_max[:bins]"
    ),
    backend(
        "segment_max.py",
        "ties in the last row",
        "jnp.where(last_key == maximum, last, size)",
        "size",
    ),
    Fault(
        "sums.py: narrow sums",
        PACKAGE + "_backends/sums.py",
        "x.dtype if x.dtype.itemsize > 4 else jnp.float32",
        "x.dtype",
        "contract weighted_sum",
    ),
    backend(
        "indexing.py",
        "bad images get gradients",
        "cotangent = jnp.where(found, cotangent, 0)",
        "cotangent = jnp.where(argmax >= 0, cotangent, 0)",
    ),
    backend(
        "tpu/pool.py",
        "the last strip wins ties",
        "wins = earlier >= key",
        "wins = earlier > key",
        "tpu",
    ),
    backend(
        "tpu/pool.py",
        "nothing is a zero",
        "is_nothing = to_bits(earlier, jnp.int32) == negative_zero",
        "is_nothing = to_bits(earlier, jnp.int32) == 1",
        "tpu",
    ),
    backend(
        "tpu/pool.py",
        "a strip's rows are a map's",
        "(best[1] + strip.top) * width",
        "best[1] * width",
        "contract tpu",
    ),
    backend(
        "tpu/schedule.py",
        "the last bin is all there is",
        "jnp.maximum(row_start[..., -1] + 1, row_end[..., -1])",
        "row_end[..., -1]",
        "contract tpu",
    ),
    backend(
        "tpu/schedule.py",
        "packs that reach nowhere",
        "visits |= unit == first",
        "visits |= unit < 0",
        "contract tpu",
    ),
    backend(
        "tpu/scatter.py",
        "a conversion",
        "lax.bitcast_convert_type(to_bits(values, jnp.int32) << 16, jnp.float32)",
        "values.astype(jnp.float32) * (jnp.abs(values) > 1e-38)",
        "contract tpu",
    ),
    native(
        "elements.h",
        "the last NaN wins",
        " & (maximum == maximum);\n  }\n  template <class V>\n  static auto is_same",
        ";\n  }\n  template <class V>\n  static auto is_same",
    ),
    native("maximum_loops.cc", "the last of equals", "(index < best)", "(index > best)"),
    native("maximum_loops.cc", "an odd cell's NaN", "i % 2 == 1 || i + 1 == count", "i % 2 == 1"),
    native(
        "elements.h",
        "unsigned is signed",
        "? std::numeric_limits<L>::min() : L(0)",
        "? L(0) : L(0)",
    ),
    native(
        "elements.h",
        "16-bit floats upside down",
        "bits < 0 ? -magnitude",
        "bits < 0 ? magnitude",
    ),
    native("maximum_loops.cc", "reads past the map", "0 <= cell && cell < cells;", "true;"),
    native(
        "maximum_loops.cc",
        "the last row of equals",
        "E::is_same(value, maximum) & (row < best_row)",
        "E::is_same(value, maximum) & (row > best_row)",
    ),
    native(
        "maximum_loops.cc",
        "the last vector goes on",
        "channel = channels - W::kLanes;",
        "channel = channels - W::kLanes - 1;",
    ),
    native(
        "strips.cc",
        "strips forget the rows before",
        "const bool resume = begin > rows.start;",
        "const bool resume = false;",
    ),
    native("rectangle_max.cc", "begins again", "resume_ = true;", "resume_ = false;"),
    native(
        "rectangle_max.cc",
        "cell 0 for none",
        "std::memset(argmax_of(col), 0xFF",
        "std::memset(argmax_of(col), 0",
    ),
    native(
        "rectangle_max.cc",
        "a page is left out",
        "const int64_t pages = (end - 1) / kPage - start / kPage + 1;",
        "const int64_t pages = (end - 1) / kPage - start / kPage;",
        "cpu gradients",
    ),
    native("memory.h", "bad images pool nothing", "std::memset(at(pooled, first), 0, bytes);", ";"),
    native("memory.h", "levels forget the others", "if (onto == nullptr)", "if (true)", "levels"),
    native("rectangle_max.cc", "groups share images", "!= image % map.num_images", "!= image"),
    native(
        "rectangle_max.cc",
        "tiles reach out",
        "{(rows.start + 1) / 2, rows.end / 2}",
        "{rows.start / 2, rows.end / 2}",
    ),
    native("pyramid.cc", "tiles of one column", "2 * col + i % 2", "2 * col + i / 2"),
    native(
        "pyramid.cc",
        "no row at the end",
        "std::min((band + 1) * rows, to.height)",
        "std::min((band + 1) * rows, to.height - 1)",
    ),
    native(
        "shapes.h",
        "an image too many",
        "index < num_images ?",
        "index <= num_images ?",
        "contract cpu weighted_sum roi_align",
    ),
    native(
        "sum_loops.cc",
        "all vectors read the first",
        "load_to_sum<E, W>(cells + offset + i * W::kLanes)",
        "load_to_sum<E, W>(cells + offset)",
        "weighted_sum",
    ),
    native(
        "sum_loops.cc",
        "rows weigh the square",
        "Sum(row.weight) * Sum(column.weight)",
        "Sum(row.weight) * Sum(row.weight)",
        "weighted_sum roi_align",
    ),
    native(
        "elements.h",
        "bfloat16 rounds halves up",
        "bits + 0x7FFFu + (bits >> 16 & 1u)",
        "bits + 0x8000u",
        "weighted_sum",
    ),
    native(
        "elements.h",
        "float16 has no subnormals",
        "rounded = magnitude < (113u << 23) ?",
        "rounded = magnitude < (103u << 23) ?",
        "weighted_sum",
    ),
    native(
        "weighted_sum.cc",
        "a weight of 0 counts",
        "if (weights[t] == 0) continue;",
        "",
        "weighted_sum roi_align",
    ),
    native(
        "weighted_sum.cc",
        "runs over the border",
        "std::min(start + t - begin, axis.size - 1)",
        "std::min(start, axis.size - 1) + t - begin",
        "weighted_sum",
    ),
    native(
        "weighted_sum.cc",
        "groups share images",
        "!= image % map.num_images",
        "!= image",
        "weighted_sum averages",
    ),
    native(
        "weighted_sum.cc",
        "bins without an image keep garbage",
        "if (image_index < 0) {",
        "if (false) {",
        "weighted_sum roi_align",
    ),
    native(
        "weighted_sum.cc",
        "bands overlap",
        "(band + 1) * map.height / bands}",
        "(band + 1) * map.height / bands + 1}",
        "weighted_sum roi_align",
    ),
    native(
        "rectangle_max_handlers.cc",
        "any argmax",
        "map.cells() - 1 <= std::numeric_limits<int16_t>::max()",
        "map.cells() - 1 <= std::numeric_limits<int32_t>::max()",
        "cpu",
    ),
    cuda(
        "kernels/rectangle_max.cu",
        "rows outside",
        "inside(its.row_end(p), HEIGHT)",
        "its.row_end(p)",
    ),
    cuda(
        "kernels/elements.cuh",
        "bfloat16 is cut off",
        "(bits + 0x7fff + (bits >> 16 & 1)) >> 16",
        "bits >> 16",
    ),
    cuda(
        "kernels/maxima.cuh",
        "NaN is not larger",
        "return !((value <= maximum) | Element::is_nan(maximum));",
        "return value > maximum;",
    ),
    cuda(
        "kernels/maxima.cuh",
        "NaNs are not equal",
        "(Element::is_nan(maximum) & !Element::is_nan(value))",
        "Element::is_nan(maximum)",
    ),
    cuda("kernels/maxima.cuh", "the last of equals", "at < cell[i]", "at > cell[i]"),
    cuda("kernels/rectangle_max.cu", "rows run on", "if (--left_ == 0)", "if (--left_ < 0)"),
    cuda(
        "kernels/rectangle_max.cu",
        "the first two windows",
        "while (windows.remain) take(",
        "if (windows.remain) take(",
    ),
    cuda("kernels/rectangle_max.cu", "an image too many", "image >= IMAGES", "image > IMAGES"),
    cuda(
        "kernels/rectangle_max.cu", "all of one group", "Long(roi / ROIS) * IMAGES + image", "image"
    ),
    cuda(
        "kernels/rectangle_max.cu",
        "windows of the first image",
        "image_of_all * kWindows * kVectors",
        "0",
    ),
    cuda(
        "kernels/rectangle_max.cu",
        "windows that stick out",
        "last_col_(right - WINDOW)",
        "last_col_(right - WINDOW + 1)",
    ),
    cuda("kernels/rectangle_max.cu", "windows of any bin", "right - left >= WINDOW", "true"),
    cuda("kernels/rectangle_max.cu", "places by column", "place / WINDOW", "place % WINDOW"),
    cuda(
        "kernels/windows.cu",
        "rows of a band without windows",
        "first_row + BAND + WINDOW - 1",
        "first_row + BAND",
    ),
    cuda(
        "kernels/windows.cu",
        "all in the first row",
        "i * WINDOW + rows[i].cell[j]",
        "rows[i].cell[j]",
    ),
    cuda(
        "kernels/scatter_at_argmax.cu",
        "sums of the block before",
        "sums_[i * kWarp] = 0;",
        ";",
    ),
    cuda(
        "kernels/scatter_at_argmax.cu",
        "a list too long",
        "min(bins.total - done, kListed - num_listed)",
        "bins.total - done",
    ),
    cuda(
        "kernels/scatter_at_argmax.cu",
        "too many RoIs",
        "num_near + THREADS <= kNear",
        "num_near <= kNear",
    ),
    cuda(
        "kernels/scatter_at_argmax.cu",
        "an empty bin hides others",
        "(roi.row_end(BIN_ROWS - 1) >= top)",
        "(roi.row_end(BIN_ROWS - 1) > top)",
    ),
    cuda(
        "kernels/scatter_at_argmax.cu",
        "cells beside the tile",
        "(x_in_tile < TILE_COLS)",
        "(x_in_tile < WIDTH)",
    ),
    cuda(
        "kernels/scatter_at_argmax.cu",
        "the list before it is there",
        "__syncthreads();\n    Batch one",
        "Batch one",
    ),
    cuda(
        "kernels/scatter_at_argmax.cu",
        "a list that others still read",
        "__syncthreads();\n    num_listed = 0;",
        "num_listed = 0;",
    ),
    cuda(
        "kernels/scatter_at_argmax.cu",
        "RoIs before they are there",
        "continue;\n\n    __syncthreads();",
        "continue;\n",
    ),
    cuda(
        "kernels/rectangle_max.cu",
        "half of a block's bins",
        "item += THREADS",
        "item += 2 * THREADS",
    ),
    cuda(
        "kernels/scatter_at_argmax.cu",
        "counts that others still read",
        "found(is_near, turn ^= 1)",
        "found(is_near, turn)",
    ),
    cuda(
        "kernels/scatter_at_argmax.cu", "bins of every image", "(roi.image() == image) &", "true &"
    ),
    cuda(
        "plans.py",
        "vectors over the end",
        "math.gcd(channels, VECTOR_BYTES // dtype.itemsize, MAX_VECTOR)",
        "min(VECTOR_BYTES // dtype.itemsize, MAX_VECTOR)",
        "cuda_kernels",
    ),
    cuda(
        "plans.py",
        "32 bits for any map",
        "wide_offset = problem.H",
        "wide_offset = 0 * problem.H",
        "cuda_kernels",
    ),
    cuda(
        "plans.py",
        "one name for all",
        "repr((self.source, self.macros))",
        "repr(self.source)",
        "cuda_kernels cuda_lowering",
    ),
    cuda(
        "plans.py",
        "the last block is missing",
        "math.ceil(problem.bins * vectors / items)",
        "max(1, problem.bins * vectors // items)",
        "cuda_kernels",
    ),
    cuda(
        "plans.py",
        "float64 is summed in float32",
        '"double" if sum_bytes > 4',
        '"double" if sum_bytes > 8',
        "cuda_kernels",
    ),
    cuda(
        "nvrtc.py",
        "builtins are not loaded",
        "for path in builtins:",
        "for path in ():",
        "cuda_lowering",
    ),
    cuda("nvrtc.py", "any version", "if version >= OLDEST:", "if version:", "cuda_lowering"),
    Fault(
        "check: nothing is wrong",
        PACKAGE + "_check.py",
        "wrong |= bool(faults)",
        "wrong |= False",
        "check",
    ),
    Fault(
        "check: NaN is never right",
        PACKAGE + "_check.py",
        "equal |= np.isnan(actual) & np.isnan(wanted)",
        "pass",
        "check",
    ),
)


class Workplace:
    """A copy of the project in which one fault at a time is tried."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder / "project"
        self.build = folder / "build"
        files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
        for name in filter(lambda name: (ROOT / name).is_file(), files):
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        # Before an editable installation of the project, in every process that a test starts.
        (self.folder / "sitecustomize.py").write_text(
            "import sys\n"
            "sys.meta_path[:] = [x for x in sys.meta_path if 'editable' not in type(x).__module__]\n"
        )
        source = self.folder / NATIVE
        options = f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"
        self._run("cmake", "-S", source, "-B", self.build, *options)
        if not self.compile():
            sys.exit("the native library does not compile")
        shutil.copy(self.build / EXTENSION, folder / EXTENSION)

    def compile(self) -> bool:
        if self._run("cmake", "--build", self.build).returncode:
            return False
        shutil.copy(self.build / EXTENSION, self.folder / LIBRARY / EXTENSION)
        return True

    def try_out(self, fault: Fault, full: bool) -> str:
        path = self.folder / fault.path
        before = path.read_text()
        if before.count(fault.code) != 1:
            return f"STALE ({before.count(fault.code)} places)"
        path.write_text(before.replace(fault.code, fault.fault))
        is_native = fault.path.startswith(NATIVE)
        try:
            if is_native and not self.compile():
                return "DOES NOT COMPILE"
            files = [f"tests/test_{name}.py" for name in fault.tests.split()]
            options = ["-o", "addopts=--strict-markers", "-p", "no:cacheprovider", "-qx"]
            tests = sys.executable, "-m", "pytest", *options, *["--full"] * full, *files
            try:
                process = self._run(*tests, limit=LIMIT)
            except subprocess.TimeoutExpired:
                return f"found (no end in {LIMIT} s)"
            if process.returncode == 0:
                return "not found"
            found = [x for x in process.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
            return found[0][:110] if found else f"found (exit code {process.returncode})"
        finally:
            path.write_text(before)
            shutil.copy(self.build.parent / EXTENSION, self.folder / LIBRARY / EXTENSION)

    def _run(self, *command, limit=None):
        environment = os.environ | {"PYTHONPATH": str(self.folder), "JAX_PLATFORMS": "cpu"}
        return subprocess.run(
            list(map(str, command)),
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="what `pytest --full` finds")
    parser.add_argument("words", nargs="*", help="only faults whose names have one of these")
    arguments = parser.parse_args()
    faults = [
        fault
        for fault in FAULTS
        if not arguments.words or any(word in fault.name for word in arguments.words)
    ]
    not_found = []
    with tempfile.TemporaryDirectory() as scratch:
        free = queue.Queue()
        for i in range(2):
            free.put(Workplace(pathlib.Path(scratch) / str(i)))

        def try_out(fault):
            workplace = free.get()
            try:
                return workplace.try_out(fault, arguments.full)
            finally:
                free.put(workplace)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for fault, outcome in zip(faults, pool.map(try_out, faults), strict=True):
                print(f"{fault.name}: {outcome}", flush=True)
                if not outcome.startswith(("FAILED", "ERROR", "found")):
                    not_found.append(fault.name)
    print(f"{len(faults) - len(not_found)} of {len(faults)} found", *not_found, sep="\n  ")
    return 1 if not_found else 0


if __name__ == "__main__":
    sys.exit(main())
