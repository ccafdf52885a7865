"""Compiled programs, looked into."""

import math
import re

import jax


class Program:
    """What XLA makes of a function for one platform."""

    def __init__(self, platform, function, *arguments):
        traced = jax.jit(function).trace(*arguments)
        self.program = traced.lower(lowering_platforms=(platform,)).compile()
        self.text = self.program.as_text()

    @property
    def bytes_accessed(self):
        costs = self.program.cost_analysis()
        return (costs[0] if isinstance(costs, list) else costs)["bytes accessed"]

    @property
    def temporary_bytes(self):
        return self.program.memory_analysis().temp_size_in_bytes

    def count(self, *operations):
        """How many of these HLO operations there are, started ones included."""
        names = "|".join(operations)
        return len(re.findall(rf" (?:{names})(?:-start)?\(", self.text))

    def find(self, pattern):
        """All that a regular expression matches."""
        return re.findall(pattern, self.text)

    def trips(self):
        """How often each loop goes round, by the constant that its condition counts up to."""
        conditions = self.find(r" while\(.*condition=(%[\w.-]+)")
        bodies = [self.text[self.text.index(f"\n{name} (") :] for name in conditions]
        return [int(re.search(r" constant\((\d+)\)", body)[1]) for body in bodies]

    def largest(self, *operations):
        """Bytes of the largest array that comes out of one of these HLO operations."""
        results = " ".join(self.find(rf"= ([^=]*?) (?:{'|'.join(operations)})\("))
        arrays = re.findall(r"[a-z](\d+)\[([\d,]+)\]", results)
        sizes = [int(bits) // 8 * math.prod(map(int, shape.split(","))) for bits, shape in arrays]
        return max(sizes, default=0)


MOVES = ("gather", "scatter", "while")
COLLECTIVES = (
    "all-gather",
    "all-to-all",
    "all-reduce",
    "collective-permute",
    "reduce-scatter",
    "ragged-all-to-all",
    "collective-broadcast",
)

# Of this project's benchmark: features, number of RoIs.
WORKLOADS = {
    "vgg-train": ((1, 38, 50, 512), 128),
    "vgg-infer": ((1, 38, 50, 512), 1000),
    "fpn": ((2, 100, 168, 256), 512),
    "fpn-p2": ((2, 200, 336, 256), 1024),
}
