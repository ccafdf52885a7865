// The gradient: each cotangent added at its argmax, in the order of RoIs and bins, so that the sums
// are the same bits every time. A block owns a tile of cells: it lists the RoIs that may meet it,
// then their bins that do, and each of its warps adds those for channels of its own.
//
//   TILE_ROWS TILE_COLS   cells of a tile
//   SUM                   float or double
//   IN_REGISTERS          whether sums are kept in registers, for few cells, or in shared memory
//   AT_ONCE               bins that a warp loads at once, while it adds those before
#include "elements.cuh"

constexpr int kWarp = 32, kWarps = THREADS / kWarp;
constexpr int kTileRows = (HEIGHT - 1) / TILE_ROWS + 1, kTileCols = (WIDTH - 1) / TILE_COLS + 1;
constexpr int kTileCells = TILE_ROWS * TILE_COLS;
// Of a multiprocessor, at least: as many as leave all that a thread has in registers, and no more
// than any has room for.
constexpr int kWorthwhile = (sizeof(SUM) > 4 ? 512 : 1024) / THREADS;
constexpr int kBlocksAtOnce = kWorthwhile < 16 ? kWorthwhile : 16;
constexpr int kNear = 2 * THREADS;  // RoIs that are listed before their bins are
constexpr int kListed = 256;        // bins that are listed before they are added

// The sums of a lane's channels at the cells of the tile.
class Sums {
 public:
#if IN_REGISTERS
  __device__ Sums(int top, int left) : first_(top * WIDTH + left) {
#pragma unroll
    for (int cell = 0; cell < kTileCells; ++cell) {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) sums_[cell][i] = 0;
    }
  }
  // Of each channel at its cell, if the tile has that.
  __device__ void add(const Elements& x, const Indices& cells) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const unsigned to = unsigned(cells.of[i]) - first_;  // of -1: far below
#pragma unroll
      for (int cell = 0; cell < kTileCells; ++cell) {
        if (to == unsigned(cell / TILE_COLS * WIDTH + cell % TILE_COLS)) {
          sums_[cell][i] += Element::load(x.of[i]);
        }
      }
    }
  }
  __device__ Elements at(int cell) const {
    Elements x;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) x.of[i] = Element::store(sums_[cell][i]);
    return x;
  }

 private:
  unsigned first_;
  SUM sums_[kTileCells][VECTOR];
#else
  __device__ Sums(int top, int left) : top_(top), left_(left) {
    __shared__ SUM sums[kWarps][kTileCells * VECTOR * kWarp];  // a bank a lane
    sums_ = sums[threadIdx.x / kWarp] + threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kTileCells * VECTOR; ++i) sums_[i * kWarp] = 0;
  }
  __device__ void add(const Elements& x, const Indices& cells) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const unsigned cell = int(cells.of[i]), row = cell / WIDTH;  // of -1: far below
      const unsigned y = row - top_, x_in_tile = cell - row * WIDTH - left_;
      if ((y < TILE_ROWS) & (x_in_tile < TILE_COLS)) {
        sums_[((y * TILE_COLS + x_in_tile) * VECTOR + i) * kWarp] += Element::load(x.of[i]);
      }
    }
  }
  __device__ Elements at(int cell) const {
    Elements x;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) x.of[i] = Element::store(sums_[(cell * VECTOR + i) * kWarp]);
    return x;
  }

 private:
  int top_, left_;
  SUM* sums_;
#endif
};

// The bins along one axis that meet the tile: from the first to the last that does, those between
// included.
struct Meeting {
  int first = 0, count = 0;

  Meeting() = default;
  template <class Start, class End>
  __device__ Meeting(int bins, int tile, int tile_end, Start start, End end_of) : first(bins) {
    int end = 0;
#pragma unroll 8
    for (int i = 0; i < bins; ++i) {  // without branches, so that all are loaded at once
      const int from = start(i), to = end_of(i);
      const bool meets = (from < tile_end) & (to > tile) & (from < to);
      first = meets ? min(first, i) : first;
      end = meets ? i + 1 : end;
    }
    count = max(end - first, 0);
  }
};

// How many the threads before this one have, and how many all together. All threads of the block
// are to come, with `turn` 0 and 1 in turn: so no one writes what others still read.
struct Share {
  int before, total = 0;

  __device__ Share(int own, int turn) {
    __shared__ int of_warps[2][kWarps];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    before = own;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int others = __shfl_up_sync(~0u, before, step);
      if (lane >= step) before += others;
    }
    if (lane == kWarp - 1) of_warps[turn][warp] = before;
    __syncthreads();
    before -= own;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      const int its = of_warps[turn][i];
      if (i < warp) before += its;
      total += its;
    }
  }
};

struct Batch {
  Elements cotangents[AT_ONCE];
  Indices cells[AT_ONCE];
};

extern "C" __global__ void __launch_bounds__(THREADS, kBlocksAtOnce)
KERNEL(const Elements* __restrict__ cotangent, const Indices* __restrict__ argmax,
       const int* __restrict__ edges, Elements* __restrict__ gradient) {
  __shared__ int near[kNear], list[kListed];
  int num_near = 0, num_listed = 0, turn = 0;
  int block = blockIdx.x;
  const int left = block % kTileCols * TILE_COLS;
  block /= kTileCols;
  const int top = block % kTileRows * TILE_ROWS;
  block /= kTileRows;
  const int map = block % (GROUPS * IMAGES), slices = block / (GROUPS * IMAGES);
  const int group = map / IMAGES, image = map % IMAGES;
  const int vector = slices * THREADS + threadIdx.x;
  const bool has_vector = vector < kVectors;
  Sums sums(top, left);

  const auto load = [&](int first, Batch& batch) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      if (first + i < num_listed && has_vector) {
        const COUNT bin = COUNT(group) * ROIS * BIN_ROWS * BIN_COLS + list[first + i];
        batch.cotangents[i] = cotangent[bin * kVectors + vector];
        batch.cells[i] = argmax[bin * kVectors + vector];
      } else {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) batch.cells[i].of[j] = -1;
      }
    }
  };
  const auto add = [&](const Batch& batch) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) sums.add(batch.cotangents[i], batch.cells[i]);
  };
  const auto add_listed = [&] {
    __syncthreads();
    Batch one, other;
    load(0, one);
    for (int first = 0; first < num_listed; first += 2 * AT_ONCE) {
      load(first + AT_ONCE, other);
      add(one);
      if (first + AT_ONCE >= num_listed) break;
      load(first + 2 * AT_ONCE, one);
      add(other);
    }
    __syncthreads();
    num_listed = 0;
  };

  // Number by number, of all RoIs of the group.
  const int* const its_edges = edges + Long(group) * kLanes * ROIS;
  for (int base = 0; base < ROIS; base += THREADS) {
    const int k = base + threadIdx.x;
    bool is_near = false;
    if (k < ROIS) {
      const Edges<ROIS> roi{its_edges + k};
      // A bin reaches one cell into the next at most: an empty one at the end hides no more.
      is_near = (roi.image() == image) & (roi.row_start(0) < top + TILE_ROWS) &
                (roi.row_end(BIN_ROWS - 1) >= top) & (roi.col_start(0) < left + TILE_COLS) &
                (roi.col_end(BIN_COLS - 1) >= left);
    }
    const Share found(is_near, turn ^= 1);
    if (is_near) near[num_near + found.before] = k;
    num_near += found.total;
    if (num_near + THREADS <= kNear && base + THREADS < ROIS) continue;

    __syncthreads();
    for (int first = 0; first < num_near; first += THREADS) {
      const int its_place = first + threadIdx.x;
      Meeting p, q;
      if (its_place < num_near) {
        const Edges<ROIS> roi{its_edges + near[its_place]};
        p = Meeting(BIN_ROWS, top, top + TILE_ROWS, [&](int i) { return roi.row_start(i); },
                    [&](int i) { return roi.row_end(i); });
        q = Meeting(BIN_COLS, left, left + TILE_COLS, [&](int i) { return roi.col_start(i); },
                    [&](int i) { return roi.col_end(i); });
      }
      const int own = p.count * q.count;
      const Share bins(own, turn ^= 1);
      for (int done = 0; done < bins.total;) {
        const int now = min(bins.total - done, kListed - num_listed);
        for (int i = max(done - bins.before, 0); i < min(done + now - bins.before, own); ++i) {
          const int bin = (p.first + i / q.count) * BIN_COLS + q.first + i % q.count;
          list[num_listed + bins.before + i - done] = near[its_place] * BIN_ROWS * BIN_COLS + bin;
        }
        num_listed += now, done += now;
        if (num_listed == kListed) add_listed();
      }
    }
    num_near = 0;  // who lists more has met the others in between, in Share
  }
  add_listed();

  if (!has_vector) return;
#pragma unroll
  for (int cell = 0; cell < kTileCells; ++cell) {
    const int row = top + cell / TILE_COLS, col = left + cell % TILE_COLS;
    if (row >= HEIGHT || col >= WIDTH) continue;
    gradient[(Long(map) * kCells + row * WIDTH + col) * kVectors + vector] = sums.at(cell);
  }
}
