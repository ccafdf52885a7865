// The handlers of the weighted sum.
#include "fuzzing.h"

extern "C" {
XLA_FFI_Error* jax_roipool_cpu_weighted_sum_v1(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_roipool_cpu_weighted_sum_onto_v1(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_roipool_cpu_weighted_scatter_v1(XLA_FFI_CallFrame*);
}

namespace fuzz {
namespace {

constexpr int64_t kIntMax = INT_MAX;

// The rows or the columns of a RoI's bins, and the taps of each of them.
struct Axis {
  int64_t bins, runs, run;

  int64_t taps() const { return runs * run; }
};

struct Sizes {
  int64_t G, n, H, W, C, K;
  Axis rows, columns;

  int64_t lanes() const { return 3 + rows.bins * rows.runs + columns.bins * columns.runs; }
};

Sizes random_sizes(Random& random, uint64_t number) {
  // One vector of floats has 4 to 16 channels, and the loops take eight vectors at a time.
  constexpr int64_t kAroundVectors[] = {15, 16, 17, 31,  32,  33,  39, 63,
                                        64, 65, 77, 127, 128, 129, 153};
  if (is_large(number)) {
    return {1, 1, 33, 32, 512, 22, {7, 1, 2}, {7, 1, 1}};
  }
  const auto axis = [&](int64_t bins, int64_t runs, int64_t run) {
    return Axis{random.in(1, bins), random.in(1, runs), random.in(1, run)};
  };
  Sizes s = {random.in(1, 3), random.in(1, 3), random.in(1, 8), random.in(1, 8), 1,
             random.in(1, 6), axis(4, 3, 3),   axis(3, 3, 3)};
  s.C = random.one_in(3) ? random.in(1, 9) : random.of(kAroundVectors);
  if (random.one_in(4)) {  // runs that are as long as the map, or longer
    s = {1, s.n, random.in(1, 40), random.in(1, 40), random.in(1, 9), s.K, s.rows, s.columns};
    s.rows = axis(4, 2, s.H + 2);
    s.columns = axis(2, 2, s.W + 2);
  }
  if (random.one_in(4)) {  // each cell in many bins
    s = {1, 1 + random.one_in(3), random.in(4, 32), random.in(4, 32), random.in(1, 20), 0, {}, {}};
    s.K = random.in(20, 70);
    s.rows = axis(2, 2, 4);
    s.columns = axis(2, 2, 4);
  }
  int64_t* const any[] = {
      &s.G,           &s.n, &s.H, &s.W, &s.C, &s.K, &s.rows.bins, &s.rows.runs, &s.columns.bins,
      &s.columns.runs};
  if (random.one_in(6)) *random.of(any) = 0;
  return s;
}

// A source of features or of cotangents: for the most part such that sums of them are finite and
// must be rounded. Sums are subnormal or very large in some cases.
std::function<uint64_t()> values(Random& random, const Dtype& dtype) {
  constexpr int64_t kExponents = 4;
  const int64_t one = dtype.max_exponent();
  const int64_t lowest[] = {0, one - 2, one - 2, one - 2, 2 * one - kExponents};
  return random.one_in(3) ? elements(random, dtype)
                          : similar_floats(random, dtype, random.of(lowest), kExponents);
}

std::function<uint64_t()> weights(Random& random) {
  const auto about_1 = similar_floats(random, kF32, kF32.max_exponent() - 2, 3);
  switch (random.below(4)) {
    case 0: {  // often 0; and sums are often half way between two narrow floats
      return [&random]() -> uint64_t {
        constexpr float kSimple[] = {0, -0.0f, 0, 0.25f, 0.5f, 1, -1, 3};
        const float weight = random.of(kSimple);
        return load<uint32_t>(reinterpret_cast<const char*>(&weight));
      };
    }
    case 1: return elements(random, kF32);
    case 2: {  // few that are special: 0, subnormal, infinite, NaN
      constexpr uint64_t kSpecial[] = {0,          1u << 31,   1,          0x807FFFFF, 0x7F800000,
                                       0xFF800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF};
      return [&random, about_1, kSpecial] {
        return random.one_in(16) ? random.of(kSpecial) : about_1();
      };
    }
    default: return about_1;
  }
}

// To the nearest number of a dtype and, of two, to the even one.
Number rounded(const Dtype& dtype, Number number) {
  if (number == 0 || !std::isfinite(number)) return number;
  const int exponent = std::max(std::ilogb(number), dtype.min_exponent());
  const int last_place = exponent - dtype.mantissa;
  const Number nearest = std::ldexp(std::nearbyint(std::ldexp(number, -last_place)), last_place);
  const Number too_large = std::ldexp(Number(1), dtype.max_exponent() + 1);
  return std::abs(nearest) < too_large ? nearest : std::copysign(Number(INFINITY), number);
}

class SumSignature : public Signature {
 public:
  SumSignature(const Sizes& sizes, const Dtype& dtype) : s_(sizes), dtype_(dtype) {}

  const Dtype& dtype(const std::string& name) const override {
    if (name == "gradient") return sum_dtype(dtype_);
    if (name == "cells") return kS32;
    return name == "rows" || name == "columns" ? kF32 : dtype_;
  }
  std::vector<int64_t> dims(const std::string& name) const override {
    if (name == "features" || name == "gradient") return {s_.G, s_.n, s_.H, s_.W, s_.C};
    if (name == "cells") return {s_.G, s_.K, s_.lanes()};
    if (name == "rows") return {s_.G, s_.K, s_.rows.bins, s_.rows.taps()};
    if (name == "columns") return {s_.G, s_.K, s_.columns.bins, s_.columns.taps()};
    return {s_.G, s_.K, s_.rows.bins, s_.columns.bins, s_.C};
  }
  Attributes attributes(const Target&) const override {
    return {{"row_runs", s_.rows.runs}, {"column_runs", s_.columns.runs}};
  }

 private:
  const Sizes s_;
  const Dtype dtype_;
};

class SumCase : public Case {
 public:
  explicit SumCase(uint64_t number)
      : Case(number),
        dtype_(is_large(number) ? kF64 : random_.of(kFloats)),
        s_(random_sizes(random_, number)),
        signature_(s_, dtype_) {
    for (const char* name : {"features", "cotangent", "onto", "cells", "rows", "columns"}) {
      inputs_.emplace(name, signature_.make(name));
    }
    fill(inputs_.at("features"), values(random_, dtype_));
    fill(inputs_.at("cotangent"), values(random_, dtype_));
    fill(inputs_.at("onto"), elements(random_, dtype_));
    fill(inputs_.at("rows"), weights(random_));
    fill(inputs_.at("columns"), weights(random_));
    fill_cells();
    dtype_.bits == 64 ? expect<double>() : expect<float>();
  }

  const Signature& signature() const override { return signature_; }

 private:
  std::string wrong_operand(const Target&) const override { return ""; }

  void fill_cells() {
    const bool hostile_counts = random_.one_in(3);
    const bool hostile_rows = random_.one_in(3), hostile_columns = random_.one_in(3);
    Array& cells = inputs_.at("cells");
    if (random_.one_in(12)) return fill(cells, [&] { return random_.bits(); });
    const auto image_index = image_indices(random_, s_.n);
    int32_t* lane = reinterpret_cast<int32_t*>(cells.data.get());
    for (int64_t roi = 0; roi < s_.G * s_.K; ++roi) {
      *lane++ = image_index();
      for (const int64_t taps : {s_.rows.taps(), s_.columns.taps()}) {
        const int64_t count = random_.one_in(3) ? random_.below(taps + 1) : taps;
        *lane++ = hostile_counts ? hostile(random_, taps) : count;
      }
      lane = fill_first_cells(lane, s_.H, s_.rows, hostile_rows);
      lane = fill_first_cells(lane, s_.W, s_.columns, hostile_columns);
    }
  }

  // Returns their end.
  int32_t* fill_first_cells(int32_t* lanes, int64_t size, const Axis& axis, bool is_hostile) {
    int32_t* const end = lanes + axis.bins * axis.runs;
    for (; lanes < end; ++lanes) {
      *lanes = is_hostile ? hostile(random_, size) : random_.in(-axis.run, size);
    }
    return end;
  }

  // What the contract says, a term of a sum after the other, in an order that no thread may change.
  template <class Sum>
  void expect() {
    const auto floats = [](const std::vector<Number>& numbers) {
      return std::vector<Sum>(numbers.begin(), numbers.end());  // exact
    };
    const std::vector<Sum> features = floats(decode(dtype_, inputs_.at("features")));
    const std::vector<Sum> cotangent = floats(decode(dtype_, inputs_.at("cotangent")));
    const std::vector<Sum> rows = floats(decode(kF32, inputs_.at("rows")));
    const std::vector<Sum> columns = floats(decode(kF32, inputs_.at("columns")));
    std::vector<Sum> pooled(cotangent.size()), gradient(features.size());
    const int32_t* lanes = reinterpret_cast<const int32_t*>(inputs_.at("cells").data.get());
    for (int64_t roi = 0; roi < s_.G * s_.K; ++roi, lanes += s_.lanes()) {
      if (lanes[0] < 0 || lanes[0] >= s_.n || s_.H * s_.W == 0) continue;
      const int64_t image = roi / s_.K * s_.n + lanes[0];
      const int32_t* const first_rows = lanes + 3;
      const int32_t* const first_columns = first_rows + s_.rows.bins * s_.rows.runs;
      for (int64_t p = 0; p < s_.rows.bins; ++p) {
        for (int64_t q = 0; q < s_.columns.bins; ++q) {
          const int64_t bin = (roi * s_.rows.bins + p) * s_.columns.bins + q;
          for (int64_t t = 0; t < std::min<int64_t>(lanes[1], s_.rows.taps()); ++t) {
            for (int64_t v = 0; v < std::min<int64_t>(lanes[2], s_.columns.taps()); ++v) {
              const Sum row_weight = rows[(roi * s_.rows.bins + p) * s_.rows.taps() + t];
              const Sum column_weight =
                  columns[(roi * s_.columns.bins + q) * s_.columns.taps() + v];
              if (row_weight == 0 || column_weight == 0) continue;
              const Sum weight = row_weight * column_weight;
              const int64_t row = cell(first_rows, p, t, s_.rows, s_.H);
              const int64_t column = cell(first_columns, q, v, s_.columns, s_.W);
              const int64_t at = ((image * s_.H + row) * s_.W + column) * s_.C;
              for (int64_t c = 0; c < s_.C; ++c) {
                pooled[bin * s_.C + c] += weight * features[at + c];
                gradient[at + c] += weight * cotangent[bin * s_.C + c];
              }
            }
          }
        }
      }
    }
    expected_["gradient"].assign(gradient.begin(), gradient.end());
    std::vector<Number>&wanted = expected_["pooled"], &joined = expected_["joined"];
    const std::vector<Number> onto = decode(dtype_, inputs_.at("onto"));
    const int32_t* const cells = reinterpret_cast<const int32_t*>(inputs_.at("cells").data.get());
    const int64_t of_roi = s_.rows.bins * s_.columns.bins * s_.C;
    for (size_t i = 0; i < pooled.size(); ++i) {
      const int64_t image_index = cells[i / of_roi * s_.lanes()];
      wanted.push_back(rounded(dtype_, pooled[i]));
      joined.push_back(0 <= image_index && image_index < s_.n ? wanted[i] : onto[i]);
    }
  }

  // That of a tap, or the one at the border if it is outside of the map.
  static int64_t cell(const int32_t* first, int64_t bin, int64_t tap, const Axis& axis,
                      int64_t size) {
    const int64_t cell = first[bin * axis.runs + tap / axis.run] + tap % axis.run;
    return cell < 0 ? 0 : cell < size ? cell : size - 1;
  }

  const Dtype dtype_;
  const Sizes s_;
  const SumSignature signature_;
};

// Axes may be huge where an array has no elements.
void check_huge_axes() {
  const Axis any = {1, 1, 1}, huge_axis = {kIntMax, kIntMax, 1}, no_bins = {0, kIntMax, 1};
  const Sizes huge[] = {{1, 2, 3, 4, 5, 0, huge_axis, huge_axis},
                        {1, 2, 3, 4, 5, 6, no_bins, any},
                        {1, 2, 3, 4, 5, 6, any, no_bins},
                        {1, 2, 3, 4, 5, 6, {0, 1, kIntMax}, no_bins}};
  Pool pool("of 5, never", 5, Start::kNever);
  for (const Sizes& s : huge) {
    const SumSignature signature(s, kF32);
    for (const Target& target : kSums.targets) {
      std::vector<Array> arrays = signature.zeros(target);
      Array& result = arrays.back();
      std::memset(result.data.get(), 0xA5, result.bytes());
      const std::string error =
          call(target.handler, pool, arrays, target.args, signature.attributes(target), true)
              .message;
      const std::vector<Number> got = decode(kF32, result);
      if (error.empty() && std::count(got.begin(), got.end(), 0) == result.count()) continue;
      fail(std::string(target.name) + " with huge axes does not give zeros, error \"" + error +
           "\"");
    }
  }
}

void check_wrong_calls() {
  const Sizes sizes = {2, 3, 4, 5, 6, 7, {2, 2, 3}, {3, 2, 2}};
  const SumSignature right(sizes, kF32);
  const Axis any = {1, 1, 1};
  for (const Target& target : kSums.targets) {
    const bool is_scatter = target.handler == jax_roipool_cpu_weighted_scatter_v1;
    const size_t map = is_scatter ? target.args : 0, pooled = is_scatter ? 0 : target.args;
    check_wrong_arrays(target, right, map, /*may_be_integers=*/false);
    for (const Dtype& integer : kIntegers) {
      expect_error(target, SumSignature(sizes, integer), target.names[0]);
    }
    for (const Dtype& narrow : {kBf16, kF16}) {
      const SumSignature signature(sizes, narrow);
      if (is_scatter) expect_error(target, signature, "gradient", map, signature.make("features"));
    }

    for (const char* const name : {"rows", "columns"}) {
      const std::string runs = name == std::string("rows") ? "row_runs" : "column_runs";
      for (const int64_t wrong : {int64_t{0}, int64_t{-1}, int64_t{-2}, int64_t{5}, int64_t{12},
                                  int64_t{INT64_MIN}, int64_t{INT64_MAX}}) {
        Attributes attributes = right.attributes(target);
        attributes[runs] = wrong;
        expect_error(target, right.zeros(target), attributes, name);
      }
      Attributes attributes = right.attributes(target);  // with as many taps, but fewer runs
      attributes[runs] = int64_t{1};
      expect_error(target, right.zeros(target), attributes, "cells");
    }
    for (const int64_t taps : {int64_t{1} << 31, int64_t{1} << 60}) {
      for (const Axis& axis : {Axis{0, taps, 1}, Axis{0, 1, taps}}) {
        expect_error(target, SumSignature({1, 1, 1, 1, 1, 1, axis, any}, kF32), "rows");
        expect_error(target, SumSignature({1, 1, 1, 1, 1, 1, any, axis}, kF32), "columns");
      }
    }

    for (const auto& [H, W] :
         {std::pair(int64_t{1} << 16, int64_t{1} << 15), std::pair(int64_t{1} << 31, int64_t{1}),
          std::pair(int64_t{1} << 62, int64_t{1} << 62)}) {
      expect_error(target, SumSignature({1, 1, H, W, 0, 1, any, any}, kF32), target.names[map]);
    }
    for (const int64_t bins : {int64_t{1} << 31, int64_t{1} << 60}) {
      const Axis many = {bins, 1, 1};
      for (const Sizes& s : {Sizes{1, 1, 1, 1, 0, 0, many, any}, {1, 1, 1, 1, 0, 0, any, many}}) {
        expect_error(target, SumSignature(s, kF32), target.names[pooled]);
      }
    }
    expect_error(target, right, "cells", 1, Array(XLA_FFI_DataType_S32, 4, {sizes.G, sizes.K}));
  }
  check_huge_axes();
}

}  // namespace

const Family kSums = {
    {{"jax_roipool_cpu_weighted_sum_v1",
      jax_roipool_cpu_weighted_sum_v1,
      4,
      {"features", "cells", "rows", "columns", "pooled"}},
     {"jax_roipool_cpu_weighted_sum_onto_v1",
      jax_roipool_cpu_weighted_sum_onto_v1,
      5,
      {"features", "cells", "rows", "columns", "onto", "joined"}},
     {"jax_roipool_cpu_weighted_scatter_v1",
      jax_roipool_cpu_weighted_scatter_v1,
      4,
      {"cotangent", "cells", "rows", "columns", "gradient"}}},
    [](uint64_t number) -> std::unique_ptr<Case> { return std::make_unique<SumCase>(number); },
    check_wrong_calls};

}  // namespace fuzz
