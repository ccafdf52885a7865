// The handlers of the maximum.
#include "fuzzing.h"

extern "C" {
XLA_FFI_Error* jax_roipool_cpu_max_v2(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_roipool_cpu_max_onto_v1(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_roipool_cpu_argmax_v2(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_roipool_cpu_argmax_onto_v1(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_roipool_cpu_gather_v2(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_roipool_cpu_scatter_v2(XLA_FFI_CallFrame*);
}

namespace fuzz {
namespace {

Number lowest(const Dtype& dtype) {
  if (dtype.kind == 'f') return -INFINITY;
  return dtype.kind == 'u' ? 0 : -std::ldexp(Number(1), dtype.bits - 1);
}

struct Sizes {
  int64_t G, n, H, W, C, K, P, Q;

  int64_t cells() const { return H * W; }
  int64_t lanes() const { return 1 + 2 * P + 2 * Q; }
};

Sizes random_sizes(Random& random, uint64_t number) {
  constexpr int64_t kAroundVectors[] = {1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100};
  if (is_large(number)) return {1, 1, 33, 32, 512, 22, 7, 7};
  Sizes s = {random.in(1, 3), random.in(1, 3), random.in(1, 8), random.in(1, 8), 1, 1, 1, 1};
  s.C = random.of(kAroundVectors);
  s.K = random.in(1, 6);
  s.P = random.in(1, 4);
  s.Q = random.in(1, 4);
  if (random.one_in(4)) {  // many cells in a bin
    s = {1, s.n, random.in(1, 40), random.in(1, 40), random.in(1, 9), s.K, s.P, s.Q};
  }
  if (random.one_in(4)) {  // and each cell in many bins
    s = {1, 1 + random.one_in(3), random.in(8, 32), random.in(8, 32), random.in(1, 20), 0, 0, 0};
    s.K = random.in(32, 48);
    s.P = random.in(1, 2);
    s.Q = random.in(1, 2);
  }
  if (random.one_in(16)) {  // about as many cells as an int16 has indices for
    s = {1, 1, random.in(1, 2), 0, random.in(1, 2), 2, 2, s.Q};
    s.W = (SHRT_MAX + 1) / s.H + random.in(0, 1);
  }
  int64_t* const any[] = {&s.G, &s.n, &s.H, &s.W, &s.C, &s.K, &s.P, &s.Q};
  if (random.one_in(6)) *random.of(any) = 0;
  return s;
}

// Bins of one axis of one RoI: edges inside of the map, at most one cell of overlap.
void roi_like_bins(Random& random, int64_t size, int64_t bins, int32_t* start, int32_t* end) {
  const bool is_whole = random.below(4) > 0;
  const int64_t first = random.below(is_whole ? 3 : size + 2) - 1;
  const int64_t length = is_whole ? size : random.below(size + 3);
  const auto edge = [&](int64_t cell) { return std::clamp<int64_t>(first + cell, 0, size); };
  for (int64_t i = 0; i < bins; ++i) {
    start[i] = edge(i * length / bins);
    end[i] = edge(((i + 1) * length + bins - 1) / bins);
  }
}

bool is_scatter(const Target& target) { return target.handler == jax_roipool_cpu_scatter_v2; }
bool has(const Target& target, const std::string& name) {
  return std::count(target.names.begin(), target.names.end(), name) > 0;
}

class MaximumSignature : public Signature {
 public:
  MaximumSignature(const Sizes& sizes, const Dtype& dtype, const Dtype& argmax,
                   bool empty_is_lowest = false)
      : s_(sizes), dtype_(dtype), argmax_(argmax), empty_is_lowest_(empty_is_lowest) {}

  const Dtype& dtype(const std::string& name) const override {
    if (name == "gradient") return sum_dtype(dtype_);
    if (name == "edges") return kS32;
    return name == "argmax" ? argmax_ : dtype_;
  }
  std::vector<int64_t> dims(const std::string& name) const override {
    if (name == "features" || name == "gradient") return {s_.G, s_.n, s_.H, s_.W, s_.C};
    if (name == "edges") return {s_.G, s_.K, s_.lanes()};
    return {s_.G, s_.K, s_.P, s_.Q, s_.C};
  }
  Attributes attributes(const Target& target) const override {
    if (!has(target, "pooled") && !has(target, "joined")) return {};
    return {{"empty_is_lowest", empty_is_lowest_}};
  }

 private:
  const Sizes s_;
  const Dtype dtype_, argmax_;
  const bool empty_is_lowest_;
};

class MaximumCase : public Case {
 public:
  explicit MaximumCase(uint64_t number)
      : Case(number),
        dtype_(is_large(number)   ? kF64
               : random_.below(2) ? random_.of(kFloats)
                                  : random_.of(kIntegers)),
        argmax_dtype_(random_.below(2) ? kS16 : kS32),
        s_(random_sizes(random_, number)),
        empty_is_lowest_(random_.below(2)),
        signature_(s_, dtype_, argmax_dtype_, empty_is_lowest_) {
    for (const char* name : {"features", "edges", "onto", "cotangent", "argmax"}) {
      inputs_.emplace(name, signature_.make(name));
    }
    fill(inputs_.at("features"), elements(random_, dtype_));
    fill(inputs_.at("onto"), elements(random_, dtype_));
    fill(inputs_.at("cotangent"), elements(random_, dtype_));
    const bool hostile_argmax = random_.one_in(2);
    fill(inputs_.at("argmax"), [&] {
      return hostile_argmax ? hostile(random_, s_.cells()) : random_.below(s_.cells() + 1) - 1;
    });
    fill_edges();
    expect();
  }

  const Signature& signature() const override { return signature_; }

 private:
  std::string wrong_operand(const Target& target) const override {
    if (is_scatter(target) && dtype_.kind != 'f') return "cotangent";
    const bool is_short = argmax_dtype_.bits == 16 && s_.cells() - 1 > SHRT_MAX;
    return has(target, "argmax") && is_short ? "argmax" : "";
  }

  void fill_edges() {
    const bool hostile_rows = random_.one_in(3), hostile_cols = random_.one_in(3);
    Array& edges = inputs_.at("edges");
    if (random_.one_in(12)) return fill(edges, [&] { return random_.bits(); });
    const auto image_index = image_indices(random_, s_.n);
    int32_t* lane = reinterpret_cast<int32_t*>(edges.data.get());
    for (int64_t roi = 0; roi < s_.G * s_.K; ++roi) {
      *lane++ = image_index();
      lane = fill_axis(lane, s_.H, s_.P, hostile_rows);
      lane = fill_axis(lane, s_.W, s_.Q, hostile_cols);
    }
  }

  // Returns the end of the starts and ends of the bins.
  int32_t* fill_axis(int32_t* lanes, int64_t size, int64_t bins, bool is_hostile) {
    roi_like_bins(random_, size, bins, lanes, lanes + bins);
    for (int64_t i = 0; is_hostile && i < 2 * bins; ++i) lanes[i] = hostile(random_, size);
    return lanes + 2 * bins;
  }

  // What the contract says, an element of a pooled array after the other.
  void expect() {
    const int32_t* const edges = reinterpret_cast<const int32_t*>(inputs_.at("edges").data.get());
    const std::vector<Number> features = decode(dtype_, inputs_.at("features"));
    const std::vector<Number> onto = decode(dtype_, inputs_.at("onto"));
    const std::vector<Number> cotangent = decode(dtype_, inputs_.at("cotangent"));
    const std::vector<Number> argmax = decode(argmax_dtype_, inputs_.at("argmax"));
    std::vector<Number>&pooled = expected_["pooled"], &firsts = expected_["argmax"];
    std::vector<Number>&tangent = expected_["tangent"], &gradient = expected_["gradient"];
    std::vector<Number>& joined = expected_["joined"];
    gradient.resize(features.size());
    for (size_t i = 0; i < cotangent.size(); ++i) {
      const int64_t c = i % s_.C, q = i / s_.C % s_.Q, p = i / s_.C / s_.Q % s_.P;
      const int64_t roi = i / s_.C / s_.Q / s_.P;
      const int32_t* const lanes = edges + roi * s_.lanes();
      const int64_t image_index = lanes[0];
      const int32_t *const rows = lanes + 1, *const cols = rows + 2 * s_.P;
      const bool has_image = 0 <= image_index && image_index < s_.n;
      const int64_t image = (roi / s_.K * s_.n + image_index) * s_.cells();
      const auto at = [&](int64_t cell) { return (image + cell) * s_.C + c; };

      Number maximum = 0;
      int64_t first = -1;
      for (int64_t row = std::max(rows[p], 0);
           has_image && row < std::min<int64_t>(rows[s_.P + p], s_.H); ++row) {
        for (int64_t col = std::max(cols[q], 0); col < std::min<int64_t>(cols[s_.Q + q], s_.W);
             ++col) {
          const Number value = features[at(row * s_.W + col)];
          if (first >= 0 && !(value > maximum) && (!std::isnan(value) || std::isnan(maximum))) {
            continue;
          }
          maximum = value;
          first = row * s_.W + col;
        }
      }
      if (first < 0 && has_image && empty_is_lowest_) maximum = lowest(dtype_);
      pooled.push_back(maximum + 0);  // never -0
      joined.push_back(has_image ? pooled.back() : onto[i]);
      firsts.push_back(first);

      const bool has_cell = has_image && 0 <= argmax[i] && argmax[i] < s_.cells();
      tangent.push_back(has_cell ? features[at(argmax[i])] : 0);
      if (!has_cell || dtype_.kind != 'f') continue;
      Number& sum = gradient[at(argmax[i])];
      sum = dtype_.bits == 64 ? Number(static_cast<double>(sum) + static_cast<double>(cotangent[i]))
                              : Number(static_cast<float>(sum) + static_cast<float>(cotangent[i]));
    }
  }

  const Dtype dtype_, argmax_dtype_;
  const Sizes s_;
  const bool empty_is_lowest_;
  const MaximumSignature signature_;
};

void check_wrong_calls() {
  const Sizes sizes = {2, 3, 4, 5, 6, 7, 2, 3};
  const Sizes huge[] = {{1, 1, 1 << 16, 1 << 15, 0, 1, 1, 1},
                        {1, 1, int64_t{1} << 31, 1, 0, 1, 1, 1},
                        {1, 1, int64_t{1} << 62, int64_t{1} << 62, 0, 1, 1, 1}};
  const MaximumSignature right(sizes, kF32, kS32);
  for (const Target& target : kMaxima.targets) {
    const size_t map = is_scatter(target) ? 3 : 0, pooled = is_scatter(target) ? 0 : target.args;
    check_wrong_arrays(target, right, map, /*may_be_integers=*/true);
    for (const Sizes& s : huge) {
      expect_error(target, MaximumSignature(s, kF32, kS32), target.names[map]);
    }
    for (const int64_t bins : {int64_t{1} << 31, int64_t{1} << 60}) {
      for (const Sizes& s : {Sizes{1, 1, 1, 1, 0, 0, bins, 1}, Sizes{1, 1, 1, 1, 0, 0, 1, bins}}) {
        expect_error(target, MaximumSignature(s, kF32, kS32), target.names[pooled]);
      }
    }
    Array image_index_only(XLA_FFI_DataType_S32, 4, {sizes.G, sizes.K});
    const size_t edges = target.names[1] == std::string("edges") ? 1 : 2;
    expect_error(target, right, "edges", edges, std::move(image_index_only));
    if (has(target, "argmax")) {
      expect_error(target, MaximumSignature({1, 1, 128, 257, 1, 1, 1, 1}, kF32, kS16), "argmax");
    }
    if (is_scatter(target)) {
      for (const Dtype& integer : kIntegers) {
        expect_error(target, MaximumSignature(sizes, integer, kS32), "cotangent");
      }
      for (const Dtype& narrow : {kBf16, kF16}) {
        const MaximumSignature signature(sizes, narrow, kS32);
        expect_error(target, signature, "gradient", map, signature.make("features"));
      }
    }
  }
}

}  // namespace

const Family kMaxima = {
    {{"jax_roipool_cpu_max_v2", jax_roipool_cpu_max_v2, 2, {"features", "edges", "pooled"}},
     {"jax_roipool_cpu_max_onto_v1",
      jax_roipool_cpu_max_onto_v1,
      3,
      {"features", "edges", "onto", "joined"}},
     {"jax_roipool_cpu_argmax_v2",
      jax_roipool_cpu_argmax_v2,
      2,
      {"features", "edges", "pooled", "argmax"}},
     {"jax_roipool_cpu_argmax_onto_v1",
      jax_roipool_cpu_argmax_onto_v1,
      3,
      {"features", "edges", "onto", "joined", "argmax"}},
     {"jax_roipool_cpu_gather_v2",
      jax_roipool_cpu_gather_v2,
      3,
      {"features", "argmax", "edges", "tangent"}},
     {"jax_roipool_cpu_scatter_v2",
      jax_roipool_cpu_scatter_v2,
      3,
      {"cotangent", "argmax", "edges", "gradient"}}},
    [](uint64_t number) -> std::unique_ptr<Case> { return std::make_unique<MaximumCase>(number); },
    check_wrong_calls};

}  // namespace fuzz
