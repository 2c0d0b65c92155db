// Coded models: products with 4-bit codes, of any number of rows, and whole decoder layers for a token of each row.
//
// modeling_flashlite/native/__init__.py compiles this file and puts it in the place of the Python path, which is its
// reference. Codes stay in the tiles of tiles_flashlite.py: [T, columns, 32] bytes, byte (t, k, j) holding the code of
// row 64 t + j in its lower and of row 64 t + j + 32 in its upper half, both 8 too large.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_LEVELS
#include <immintrin.h>
#endif

namespace plain {
#define LEVEL 0
#include "loops.h"
#undef LEVEL
}  // namespace plain
#ifdef HAS_LEVELS
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
namespace avx2 {
#define LEVEL 1
#include "loops.h"
#undef LEVEL
}  // namespace avx2
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")
namespace avx512 {
#define LEVEL 2
#include "loops.h"
#undef LEVEL
}  // namespace avx512
#pragma GCC pop_options
#endif

namespace {

using plain::kGroup;
using plain::kTile;

struct Loops {
  decltype(&plain::rms_norm) rms_norm;
  decltype(&plain::round_row) round_row;
  decltype(&plain::tile_rows) tile_rows;
  decltype(&plain::rare_rows) rare_rows;
  decltype(&plain::widen_float) widen_float;
  decltype(&plain::widen_bfloat16) widen_bfloat16;
  decltype(&plain::finish_float) finish_float;
  decltype(&plain::finish_bfloat16) finish_bfloat16;
  decltype(&plain::dots_float) dots_float;
  decltype(&plain::dots_bfloat16) dots_bfloat16;
  decltype(&plain::mix_float) mix_float;
  decltype(&plain::mix_bfloat16) mix_bfloat16;
  decltype(&plain::softmax) softmax;
  decltype(&plain::silu_times) silu_times;
};

#define LOOPS(level)                                                                                               \
  Loops {                                                                                                          \
    level::rms_norm, level::round_row, level::tile_rows, level::rare_rows, level::widen_float,                     \
        level::widen_bfloat16, level::finish_float, level::finish_bfloat16, level::dots_float,                     \
        level::dots_bfloat16, level::mix_float, level::mix_bfloat16, level::softmax, level::silu_times             \
  }

int64_t best_level() {
#ifdef HAS_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return 1;
#endif
  return 0;
}

Loops loops_of(int64_t level) {
#ifdef HAS_LEVELS
  if (level == 2) return LOOPS(avx512);
  if (level == 1) return LOOPS(avx2);
#endif
  return LOOPS(plain);
}

Loops loops = loops_of(best_level());

// Use the loops of a level, 0 to what the processor has; returns the level in use.
int64_t use_level(int64_t level) {
  level = std::clamp<int64_t>(level, 0, best_level());
  loops = loops_of(level);
  return level;
}

constexpr int64_t kBytesOfThread = 1 << 14;  // of codes, below which waking another thread costs more than it saves

// A view of tensors that the caller holds
struct Weight {
  const uint8_t* tiles;  // [tiles, columns, 32]
  const float *step, *factors, *bias;
  const int64_t* numbers;
  // where the rare digits of each tile begin; pairs of 64 column + row in the tile, and the bits of a float
  const int32_t *rare_starts, *rare_entries;
  int64_t count, columns, in_features, rows;
};

// The fields of NativeWeight in kernels.py
using Parts = std::vector<std::optional<at::Tensor>>;

template <typename T>
const T* pointer(const std::optional<at::Tensor>& tensor, int64_t least, const char* name) {
  if (!tensor) return nullptr;
  TORCH_CHECK(tensor->is_cpu() && tensor->is_contiguous() && tensor->numel() >= least, name,
              " must be contiguous on the CPU and have at least ", least, " entries.");
  return tensor->const_data_ptr<T>();
}

Weight weight_of(const Parts& parts, const std::optional<at::Tensor>& bias, int64_t in_features) {
  TORCH_CHECK(parts.size() == 6 && parts[0] && parts[1], "a weight must have six parts, tiles and steps among them.");
  const auto &tiles = *parts[0], &step = *parts[1];
  const auto &numbers = parts[2], &factors = parts[3];
  TORCH_CHECK(tiles.dim() == 3 && tiles.size(2) == 32 && tiles.size(1) % kGroup == 0 && in_features <= tiles.size(1) &&
                  step.numel() <= kTile * tiles.size(0) && (!numbers || factors),
              "tiles ", tiles.sizes(), ", ", step.numel(), " steps and ", in_features, " inputs do not fit together.");
  const int64_t columns = tiles.size(1), rows = step.numel(), rare = parts[5] ? parts[5]->numel() / 2 : 0;
  Weight weight{pointer<uint8_t>(parts[0], 0, "tiles"),
                pointer<float>(parts[1], 0, "step"),
                pointer<float>(factors, numbers ? columns : in_features, "factors"),
                pointer<float>(bias, rows, "bias"),
                pointer<int64_t>(numbers, columns, "numbers"),
                pointer<int32_t>(parts[4], tiles.size(0) + 1, "rare_starts"),
                pointer<int32_t>(parts[5], 0, "rare_entries"),
                tiles.size(0),
                columns,
                in_features,
                rows};
  bool wrong = false;
  for (int64_t k = 0; weight.numbers && k < columns; ++k)
    wrong |= k < in_features ? weight.numbers[k] != k : weight.numbers[k] < 0 || weight.numbers[k] >= in_features;
  TORCH_CHECK(!wrong, "numbers must be 0..", in_features - 1, ", the inputs, and then some of them.");
  TORCH_CHECK(!weight.rare_starts == !weight.rare_entries, "rare digits must have starts and entries.");
  for (int64_t tile = 0; weight.rare_starts && tile <= weight.count; ++tile)
    wrong |= weight.rare_starts[tile] < (tile ? weight.rare_starts[tile - 1] : 0) || weight.rare_starts[tile] > rare;
  for (int64_t i = 0; i < rare; ++i)
    wrong |= weight.rare_entries[2 * i] < 0 || weight.rare_entries[2 * i] >= kTile * in_features;
  TORCH_CHECK(!wrong, "rare digits must lie within the weight, tile after tile.");
  return weight;
}

constexpr int64_t kExactRows = 4;     // up to which activations have two bytes: where weights are what takes time
constexpr int64_t kRowsAtOnce = 120;  // bytes of so many rows stay in the cache

void widen(const float* x, const float* factors, int64_t n, float* out) { loops.widen_float(x, factors, n, out); }
void widen(const uint16_t* x, const float* factors, int64_t n, float* out) {
  loops.widen_bfloat16(x, factors, n, out);
}
void finish(float* sums, const float* low, const float* step, const float* bias, int64_t n, float* out) {
  loops.finish_float(sums, low, step, bias, n, out);
}
void finish(float* sums, const float* low, const float* step, const float* bias, int64_t n, uint16_t* out) {
  loops.finish_bfloat16(sums, low, step, bias, n, out);
}

// Rows as bytes: those of the first bytes, then, if there are two, those of the second
struct Bytes {
  std::vector<int8_t> bytes;
  std::vector<float> scales, shifts;
  std::vector<float> inputs;  // for rare digits, [in_features, count]

  template <typename T>
  void take(const Weight& weight, const T* x, int64_t count, bool two) {
    const int64_t columns = weight.columns, inputs = weight.in_features, groups = columns / kGroup;
    bytes.resize((1 + two) * count * columns);
    scales.resize((1 + two) * count * groups);
    shifts.resize((1 + two) * count);
    if (weight.rare_starts) this->inputs.resize(inputs * count);
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      std::vector<float> wide(columns, 0.0f);
      for (int64_t m = begin; m < end; ++m) {
        const T* own = x + m * inputs;
        widen(own, weight.factors, inputs, wide.data());
        for (int64_t k = 0; weight.rare_starts && k < inputs; ++k) this->inputs[k * count + m] = wide[k];
        for (int64_t k = inputs; weight.numbers && k < columns; ++k)
          wide[k] = plain::widen(own[weight.numbers[k]]) * weight.factors[k];
        const int64_t low = two ? count + m : m;
        loops.round_row(wide.data(), columns, &bytes[m * columns], two ? &bytes[low * columns] : nullptr,
                        &scales[m * groups], &scales[low * groups], &shifts[m], &shifts[low]);
      }
    });
  }
};

// out[m] = weight x[m] + bias for rows [count, in_features]; outputs lie `stride` apart. More than kExactRows rows are
// rounded to 8 bits, which costs at most sqrt(32 / 12) / 127 = 1.3% of the norm of 32 activations.
template <typename T>
void product(const Weight& weight, const T* x, int64_t count, T* out, int64_t stride) {
  thread_local Bytes own;
  const bool two = count <= kExactRows;
  const int64_t grain = std::max<int64_t>(1, kBytesOfThread / (32 * weight.columns));
  for (int64_t from = 0; from < count; from += kRowsAtOnce) {
    const int64_t some = std::min(kRowsAtOnce, count - from);
    own.take(weight, x + from * weight.in_features, some, two);
    // a worker has one of its own under this name
    const int8_t* bytes = own.bytes.data();
    const float *scales = own.scales.data(), *shifts = own.shifts.data(), *inputs = own.inputs.data();
    T* to = out + from * stride;
    at::parallel_for(0, weight.count, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> sums((1 + two) * some * kTile), turned(weight.rare_starts ? some * kTile : 0);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t rare = weight.rare_starts ? weight.rare_starts[tile] : 0;
        const int64_t rare_count = weight.rare_starts ? weight.rare_starts[tile + 1] - rare : 0;
        const int32_t* entries = weight.rare_entries + 2 * rare;
        plain::fetch(entries, 8 * rare_count);
        loops.tile_rows(weight.tiles + tile * weight.columns * 32, weight.columns, (1 + two) * some, bytes, scales,
                        shifts, sums.data());
        loops.rare_rows(entries, rare_count, inputs, some, turned.data(), sums.data());
        const int64_t first = tile * kTile, count_of = std::min<int64_t>(kTile, weight.rows - first);
        const float *step = weight.step + first, *bias = weight.bias ? weight.bias + first : nullptr;
        for (int64_t m = 0; m < some; ++m) {
          const float* low = two ? &sums[(some + m) * kTile] : nullptr;
          finish(&sums[m * kTile], low, step, bias, count_of, to + m * stride + first);
        }
      }
    });
  }
}

// out = row `id` of a table
void look_up(const Weight& weight, int64_t id, float* out) {
  const int64_t tile = id / kTile, row = id % kTile, inputs = weight.in_features;
  const uint8_t* codes = weight.tiles + tile * weight.columns * 32 + row % 32;
  const auto digit = [&](int64_t k) { return float((row < 32 ? codes[32 * k] & 15 : codes[32 * k] >> 4) - 8); };
  const auto factor = [&](int64_t k) { return weight.factors ? weight.factors[k] : 1.0f; };
  for (int64_t k = 0; k < inputs; ++k) out[k] = digit(k) * factor(k);
  for (int64_t k = inputs; weight.numbers && k < weight.columns; ++k) out[weight.numbers[k]] += digit(k) * factor(k);
  const int64_t end = weight.rare_starts ? weight.rare_starts[tile + 1] : 0;
  for (int64_t i = end ? weight.rare_starts[tile] : 0; i < end; ++i) {
    const int64_t key = weight.rare_entries[2 * i];
    float value;
    std::memcpy(&value, weight.rare_entries + 2 * i + 1, 4);
    if (key % kTile == row) out[key / kTile] += value * factor(key / kTile);
  }
  for (int64_t k = 0; k < inputs; ++k) out[k] *= weight.step[id];
}

// A weight that a layer holds
struct Held : torch::CustomClassHolder {
  Parts parts;
  std::optional<at::Tensor> bias;
  Weight weight;

  Held(Parts parts_, std::optional<at::Tensor> bias_, int64_t in_features)
      : parts(parts_), bias(bias_), weight(weight_of(parts, bias, in_features)) {}

  // x [M, K] of any floating type times the weight: [M, rows] in x's type
  at::Tensor rows(const at::Tensor& x) const {
    TORCH_CHECK(x.dim() == 2 && x.size(1) == weight.in_features && x.is_cpu(), "x must be [M, ", weight.in_features,
                "] on the CPU, not ", x.sizes(), ".");
    const bool small = x.scalar_type() == at::kBFloat16;
    const at::Tensor own = (small ? x : x.to(at::kFloat)).contiguous();
    at::Tensor out = at::empty({x.size(0), weight.rows}, own.options());
    if (small)
      product(weight, static_cast<const uint16_t*>(own.const_data_ptr()), x.size(0),
              static_cast<uint16_t*>(out.mutable_data_ptr()), weight.rows);
    else
      product(weight, own.const_data_ptr<float>(), x.size(0), out.mutable_data_ptr<float>(), weight.rows);
    return out.to(x.scalar_type());
  }
};

using Helds = std::vector<c10::intrusive_ptr<Held>>;

void dots(const float* k, int64_t s, int64_t n, int64_t d, const float* q, int64_t g, float* out, int64_t o) {
  loops.dots_float(k, s, n, d, q, g, out, o);
}
void dots(const uint16_t* k, int64_t s, int64_t n, int64_t d, const float* q, int64_t g, float* out, int64_t o) {
  loops.dots_bfloat16(k, s, n, d, q, g, out, o);
}
void mix(const float* v, int64_t s, int64_t n, int64_t d, const float* w, int64_t ws, int64_t g, float* out) {
  loops.mix_float(v, s, n, d, w, ws, g, out);
}
void mix(const uint16_t* v, int64_t s, int64_t n, int64_t d, const float* w, int64_t ws, int64_t g, float* out) {
  loops.mix_bfloat16(v, s, n, d, w, ws, g, out);
}

// Slots [begin, begin + count) of a tensor of keys or their means, and what is added to their logits
struct Run {
  bool mean;
  int64_t begin, count;
  float bias;
};

// What the cache and the encoder hold for one row and key-value head; keys are `width` wide, values `size`
template <typename T>
struct Head {
  T *keys, *values, *mean_keys, *mean_values, *sub_keys;
  const T *cross_keys, *cross_values;
  const bool* cross_mask;
  int64_t cross, width, size;
};

struct Spec {
  int64_t block, sub_block, top, memory;  // -1: no limit
};

template <typename T>
void append(const Head<T>& head, int64_t slot, const float* key, const float* value, const Spec& spec) {
  for (int64_t d = 0; d < head.width; ++d) plain::narrow(key[d], head.keys[slot * head.width + d]);
  for (int64_t d = 0; d < head.size; ++d) plain::narrow(value[d], head.values[slot * head.size + d]);
  const int64_t b = spec.block, c = spec.sub_block, done = (slot + 1) / b;
  if (done * b != slot + 1) return;
  const auto mean = [](const T* from, int64_t count, int64_t size, T* to) {
    for (int64_t d = 0; d < size; ++d) {
      float sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += plain::widen(from[i * size + d]);
      plain::narrow(sum / count, to[d]);
    }
  };
  const int64_t first = slot + 1 - b;
  mean(head.keys + first * head.width, b, head.width, head.mean_keys + (done - 1) * head.width);
  mean(head.values + first * head.size, b, head.size, head.mean_values + (done - 1) * head.size);
  for (int64_t part = first / c; part < (slot + 1) / c; ++part)
    mean(head.keys + part * c * head.width, c, head.width, head.sub_keys + part * head.width);
}

// The `top` candidate blocks from `first` on with the largest share of a head's softmax over sub-blocks, in rising order
template <typename T>
std::vector<int64_t> choose(const Head<T>& head, const float* queries, int64_t groups, int64_t first, int64_t count,
                            const Spec& spec) {
  const int64_t parts = spec.block / spec.sub_block, total = count * parts;
  thread_local std::vector<float> logits, shares;
  logits.resize(groups * total);
  shares.assign(count, 0.0f);
  dots(head.sub_keys + first * parts * head.width, head.width, total, head.width, queries, groups, logits.data(), total);
  for (int64_t g = 0; g < groups; ++g) {
    loops.softmax(&logits[g * total], total);
    for (int64_t block = 0; block < count; ++block) {
      const float* share = &logits[g * total + block * parts];
      shares[block] = std::max(shares[block], std::accumulate(share, share + parts, 0.0f));
    }
  }
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::nth_element(order.begin(), order.begin() + spec.top, order.end(), [&](int64_t a, int64_t b) {
    return shares[a] > shares[b] || (shares[a] == shares[b] && a < b);
  });
  order.resize(spec.top);
  std::sort(order.begin(), order.end());
  return order;
}

// What the query in `slot` attends to; see attention_flashlite.py
template <typename T>
std::vector<Run> runs_of(const Head<T>& head, const float* queries, int64_t groups, int64_t slot, const Spec& spec) {
  const int64_t b = spec.block, block = slot / b;
  const int64_t reach = spec.memory < 0 ? block : std::max<int64_t>(spec.memory, 1);
  if ((spec.top < 0 || block <= spec.top + 2) && block <= reach + 1) return {{false, 0, slot + 1, 0.0f}};
  const int64_t first = spec.memory < 0 ? 1 : std::max<int64_t>(block - spec.memory, 1);
  const int64_t count = std::max<int64_t>(block - 1 - first, 0);
  std::vector<Run> runs{{false, 0, b, 0.0f}};
  const auto add = [&](int64_t begin, int64_t end) {
    if (runs.back().begin + runs.back().count == begin) runs.back().count += end - begin;
    else runs.push_back({false, begin, end - begin, 0.0f});
  };
  std::vector<int64_t> chosen;
  const bool all = spec.top < 0 || spec.top >= count;
  if (all) add(first * b, (first + count) * b);
  else if (spec.top > 0) chosen = choose(head, queries, groups, first, count, spec);
  for (const int64_t index : chosen) add((first + index) * b, (first + index + 1) * b);
  add((block - 1) * b, slot + 1);
  if (all) return runs;
  // grid slots between the chosen blocks
  int64_t from = first;
  for (const int64_t index : chosen) {
    if (first + index > from) runs.push_back({true, from, first + index - from, std::log(float(b))});
    from = first + index + 1;
  }
  if (from < block - 1) runs.push_back({true, from, block - 1 - from, std::log(float(b))});
  return runs;
}

// out [groups, size] of queries [groups, width] in `slot`
template <typename T>
void attend(const Head<T>& head, const float* queries, int64_t groups, int64_t slot, const Spec& spec, float* out) {
  const std::vector<Run> runs = runs_of(head, queries, groups, slot, spec);
  int64_t total = head.cross;
  for (const Run& run : runs) total += run.count;
  thread_local std::vector<float> logits;
  logits.resize(groups * total);
  int64_t at = 0;
  const auto keys_of = [&](const Run& run) { return (run.mean ? head.mean_keys : head.keys) + run.begin * head.width; };
  const auto values_of = [&](const Run& run) {
    return (run.mean ? head.mean_values : head.values) + run.begin * head.size;
  };
  for (size_t i = 0; i < runs.size(); ++i) {
    const Run& run = runs[i];
    // runs are short and lie anywhere: those that come next are on their way while this one is read
    if (i + 2 < runs.size()) plain::fetch(keys_of(runs[i + 2]), runs[i + 2].count * head.width * sizeof(T));
    plain::fetch(values_of(run), run.count * head.size * sizeof(T));
    dots(keys_of(run), head.width, run.count, head.width, queries, groups, &logits[at], total);
    for (int64_t g = 0; run.bias != 0 && g < groups; ++g)
      for (int64_t i = 0; i < run.count; ++i) logits[g * total + at + i] += run.bias;
    at += run.count;
  }
  if (head.cross) dots(head.cross_keys, head.width, head.cross, head.width, queries, groups, &logits[at], total);
  for (int64_t g = 0; head.cross_mask && g < groups; ++g)
    for (int64_t i = 0; i < head.cross; ++i)
      if (!head.cross_mask[i]) logits[g * total + at + i] = -std::numeric_limits<float>::infinity();
  for (int64_t g = 0; g < groups; ++g) loops.softmax(&logits[g * total], total);
  std::fill_n(out, groups * head.size, 0.0f);
  at = 0;
  for (const Run& run : runs) {
    mix(values_of(run), head.size, run.count, head.size, &logits[at], total, groups, out);
    at += run.count;
  }
  if (head.cross) mix(head.cross_values, head.size, head.cross, head.size, &logits[at], total, groups, out);
}

// What a layer's cache holds: keys, values and the summaries of blocks, all [B, M, .., ..], and the encoder's part
struct Cached {
  at::Tensor keys, values, mean_keys, mean_values, sub_keys;
  std::optional<at::Tensor> cross_keys, cross_values, cross_mask;
  std::vector<int64_t> slots;  // of each row, or one of all
  int64_t slot(int64_t row) const { return slots[slots.size() == 1 ? 0 : row]; }
};

template <typename T>
T* head_of(const at::Tensor& states, int64_t row, int64_t head) {
  return static_cast<T*>(states.data_ptr()) + row * states.stride(0) + head * states.stride(1);
}

constexpr int64_t kWorkOfThread = 1 << 15;  // multiplications of attention

struct Layer : torch::CustomClassHolder {
  Helds reads, gates;  // joint, or apart
  c10::intrusive_ptr<Held> out, down;
  // [before, after, before_mlp, after_mlp, queries, keys], empty where there is none
  std::vector<at::Tensor> norms;
  std::optional<at::Tensor> query_bias, query_matrix;  // of relative positions, [N, 3 H] and [N, H, 3 H]
  std::vector<int64_t> places;                         // of queries, keys, values; of gate, up
  int64_t states, heads, key_heads, size, inner;
  Spec spec;
  float eps, multiplier;

  Layer(Helds reads_, c10::intrusive_ptr<Held> out_, Helds gates_, c10::intrusive_ptr<Held> down_,
        std::vector<at::Tensor> norms_, std::optional<at::Tensor> query_bias_, std::optional<at::Tensor> query_matrix_,
        std::vector<int64_t> places_, std::vector<int64_t> sizes, double eps_, double multiplier_)
      : reads(reads_), gates(gates_), out(out_), down(down_), norms(norms_), query_bias(query_bias_),
        query_matrix(query_matrix_), places(places_), states(sizes.at(0)), heads(sizes.at(1)), key_heads(sizes.at(2)),
        size(sizes.at(3)), inner(sizes.at(4)), spec{sizes.at(5), sizes.at(6), sizes.at(7), sizes.at(8)},
        eps(float(eps_)), multiplier(float(multiplier_)) {
    TORCH_CHECK(norms.size() == 6 && places.size() == 5 && out->weight.in_features == heads * size &&
                    down->weight.in_features == inner && out->weight.rows == states && down->weight.rows == states &&
                    heads % key_heads == 0 && places[2] + key_heads * size <= rows(reads) &&
                    places[4] + inner <= rows(gates),
                "the parts of the layer do not fit together.");
    for (const auto& weights : {reads, gates})
      for (const auto& held : weights) TORCH_CHECK(held->weight.in_features == states, "a layer reads other states.");
    for (const auto& norm : norms)
      TORCH_CHECK(norm.is_contiguous() && norm.scalar_type() == at::kFloat, "norms must be contiguous float32.");
    for (int i = 0; i < 4; ++i) TORCH_CHECK(norms[i].numel() == 0 || norms[i].numel() == states, "a norm does not fit.");
    TORCH_CHECK((heads * size) % std::max<int64_t>(norms[4].numel(), 1) == 0 &&
                    (key_heads * size) % std::max<int64_t>(norms[5].numel(), 1) == 0,
                "a norm of heads does not fit.");
    if (query_bias)
      TORCH_CHECK(query_bias->numel() == heads * 3 * size && query_matrix->numel() == heads * size * 3 * size &&
                      query_bias->is_contiguous() && query_matrix->is_contiguous() &&
                      query_bias->scalar_type() == at::kFloat && query_matrix->scalar_type() == at::kFloat,
                  "the map of queries does not fit.");
  }

  // cosines and sines of a position
  int64_t angles() const { return query_bias ? size : (heads + key_heads) * size; }

  static int64_t rows(const Helds& weights) {
    int64_t sum = 0;
    for (const auto& held : weights) sum += held->weight.rows;
    return sum;
  }

  static void products(const Helds& weights, const float* x, int64_t count, float* to) {
    int64_t at = 0;
    const int64_t stride = rows(weights);
    for (const auto& held : weights) {
      product(held->weight, x, count, to + at, stride);
      at += held->weight.rows;
    }
  }

  void normalize(int which, float* x, int64_t length, float* to) const {
    const int64_t run = norms[which].numel();
    if (run == 0 && x != to) std::copy_n(x, length, to);
    for (int64_t at = 0; run && at < length; at += run)
      loops.rms_norm(x + at, norms[which].const_data_ptr<float>(), run, eps, to + at);
  }

  // Queries [N, width] and keys [M, width] with their positions
  void turn(float* row, const float* cos, const float* sin, float* queries, float* keys) const {
    normalize(4, row + places[0], heads * size, row + places[0]);
    normalize(5, row + places[1], key_heads * size, row + places[1]);
    const int64_t half = size / 2;
    if (!query_bias) {
      for (int64_t n = 0; n < heads + key_heads; ++n) {
        const float* from = n < heads ? row + places[0] + n * size : row + places[1] + (n - heads) * size;
        float* to = n < heads ? queries + n * size : keys + (n - heads) * size;
        for (int64_t d = 0; d < size; ++d)
          to[d] = from[d] * cos[n * size + d] + from[d < half ? d + half : d - half] * sin[n * size + d];
      }
      return;
    }
    std::vector<float> mapped(3 * size);
    for (int64_t n = 0; n < heads; ++n) {
      const float* matrix = query_matrix->const_data_ptr<float>() + n * size * 3 * size;
      std::copy_n(query_bias->const_data_ptr<float>() + n * 3 * size, 3 * size, mapped.data());
      loops.mix_float(matrix, 3 * size, size, 3 * size, row + places[0] + n * size, 0, 1, mapped.data());
      float* to = queries + n * 2 * size;
      for (int64_t d = 0; d < size; ++d) {
        to[d] = mapped[d];
        to[size + d] = mapped[size + d] * cos[d] + mapped[2 * size + d] * sin[d];
      }
    }
    for (int64_t m = 0; m < key_heads; ++m) {
      float* to = keys + m * 2 * size;
      std::copy_n(row + places[1] + m * size, size, to);
      std::copy_n(cos, half, to + size);
      std::copy_n(sin, half, to + size + half);
    }
  }

  template <typename T>
  void attention(float* rows_, int64_t batch, const float* cos, const float* sin, const Cached& cached,
                 float* to) const {
    const int64_t width = cached.keys.size(3), stride = rows(reads), groups = heads / key_heads;
    std::vector<float> queries(batch * heads * width), keys(batch * key_heads * width);
    for (int64_t row = 0; row < batch; ++row) {
      const int64_t own = cached.slots.size() == 1 ? 0 : row * angles();
      turn(rows_ + row * stride, cos + own, sin + own, &queries[row * heads * width], &keys[row * key_heads * width]);
    }
    const int64_t cross = cached.cross_keys ? cached.cross_keys->size(2) : 0;
    const int64_t each = (cached.slot(0) + cross + 1) * width * groups;
    const int64_t grain = std::max<int64_t>(1, kWorkOfThread / each);
    at::parallel_for(0, batch * key_heads, grain, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t row = index / key_heads, m = index % key_heads;
        const Head<T> head{head_of<T>(cached.keys, row, m),
                           head_of<T>(cached.values, row, m),
                           head_of<T>(cached.mean_keys, row, m),
                           head_of<T>(cached.mean_values, row, m),
                           head_of<T>(cached.sub_keys, row, m),
                           cross ? head_of<T>(*cached.cross_keys, row, m) : nullptr,
                           cross ? head_of<T>(*cached.cross_values, row, m) : nullptr,
                           cached.cross_mask ? cached.cross_mask->const_data_ptr<bool>() + row * cross : nullptr,
                           cross,
                           width,
                           size};
        append(head, cached.slot(row), &keys[index * width], rows_ + row * stride + places[2] + m * size, spec);
        attend(head, &queries[index * groups * width], groups, cached.slot(row), spec, to + index * groups * size);
      }
    });
  }

  // x [batch, states] after the layer, in place
  void run(float* x, int64_t batch, const float* cos, const float* sin, const Cached& cached) const {
    std::vector<float> normed(batch * states), read(batch * rows(reads)), attended(batch * heads * size);
    std::vector<float> gate(batch * rows(gates)), acted(batch * inner);
    const auto add = [&](int which, float* branch) {
      for (int64_t row = 0; row < batch; ++row) normalize(which, branch + row * states, states, branch + row * states);
      for (int64_t i = 0; i < batch * states; ++i) x[i] += multiplier * branch[i];
    };
    for (int64_t row = 0; row < batch; ++row) normalize(0, x + row * states, states, &normed[row * states]);
    products(reads, normed.data(), batch, read.data());
    if (cached.keys.scalar_type() == at::kBFloat16)
      attention<uint16_t>(read.data(), batch, cos, sin, cached, attended.data());
    else
      attention<float>(read.data(), batch, cos, sin, cached, attended.data());
    product(out->weight, attended.data(), batch, normed.data(), states);
    add(1, normed.data());
    for (int64_t row = 0; row < batch; ++row) normalize(2, x + row * states, states, &normed[row * states]);
    products(gates, normed.data(), batch, gate.data());
    for (int64_t row = 0; row < batch; ++row) {
      float* own = &gate[row * rows(gates)];
      loops.silu_times(own + places[3], own + places[4], inner);
      std::copy_n(own + places[3], inner, &acted[row * inner]);
    }
    product(down->weight, acted.data(), batch, normed.data(), states);
    add(3, normed.data());
  }

  void check(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, const Cached& cached) const {
    const auto& keys = cached.keys;
    const int64_t width = query_bias ? 2 * size : size, batch = x.size(0), blocks = keys.size(2) / spec.block;
    const auto type = keys.scalar_type();
    TORCH_CHECK(x.dim() == 2 && x.size(1) == states && x.is_cpu() && (type == at::kFloat || type == at::kBFloat16),
                "states must be [B, ", states, "] on the CPU, and the cache float32 or bfloat16.");
    const auto fits = [&](const at::Tensor& held, int64_t slots, int64_t last) {
      return held.dim() == 4 && held.is_cpu() && held.scalar_type() == type && held.size(0) == batch &&
             held.size(1) == key_heads && held.size(2) >= slots && held.size(3) == last && held.stride(3) == 1 &&
             held.stride(2) == last;
    };
    const int64_t cross = cached.cross_keys ? cached.cross_keys->size(2) : 0;
    const int64_t places = cached.slots.size();
    TORCH_CHECK(places == 1 || places == batch, "there must be one slot, or one of each row.");
    const auto [least, most] = std::minmax_element(cached.slots.begin(), cached.slots.end());
    TORCH_CHECK(*least >= 0 && fits(keys, *most + 1, width) && fits(cached.values, *most + 1, size) &&
                    fits(cached.mean_keys, blocks, width) && fits(cached.mean_values, blocks, size) &&
                    fits(cached.sub_keys, blocks * (spec.block / spec.sub_block), width) &&
                    (!cached.cross_keys || (fits(*cached.cross_keys, 0, width) && cached.cross_values &&
                                            fits(*cached.cross_values, cross, size))) &&
                    (!cached.cross_mask ||
                     (cached.cross_mask->is_contiguous() && cached.cross_mask->scalar_type() == at::kBool &&
                      cached.cross_mask->numel() == batch * cross)),
                "the cache does not fit the layer.");
    for (const auto* part : {&cos, &sin})
      TORCH_CHECK(part->is_contiguous() && part->scalar_type() == at::kFloat && part->numel() == places * angles(),
                  "cosines and sines must be contiguous float32, ", angles(), " of each slot.");
  }
};

// One token of each row through a layer, x [B, D] -> [B, D]; the cache's buffers take it up in `slots`.
at::Tensor layer_step(const c10::intrusive_ptr<Layer>& layer, const at::Tensor& x, const at::Tensor& cos,
                      const at::Tensor& sin, const at::Tensor& keys, const at::Tensor& values,
                      const at::Tensor& mean_keys, const at::Tensor& mean_values, const at::Tensor& sub_keys,
                      std::vector<int64_t> slots, const std::optional<at::Tensor>& cross_keys,
                      const std::optional<at::Tensor>& cross_values, const std::optional<at::Tensor>& cross_mask) {
  const Cached cached{keys, values, mean_keys, mean_values, sub_keys, cross_keys, cross_values, cross_mask, slots};
  layer->check(x, cos, sin, cached);
  at::Tensor wide = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  wide.copy_(x);
  layer->run(wide.mutable_data_ptr<float>(), x.size(0), cos.const_data_ptr<float>(), sin.const_data_ptr<float>(),
             cached);
  return wide.to(x.scalar_type());
}

// A decoder whose table and layers are all codes
struct Decoder : torch::CustomClassHolder {
  std::vector<c10::intrusive_ptr<Layer>> layers;
  std::vector<int64_t> kinds;  // of the layers' angles
  c10::intrusive_ptr<Held> table;
  at::Tensor norm;  // empty where there is none
  float eps, multiplier;

  Decoder(std::vector<c10::intrusive_ptr<Layer>> layers_, std::vector<int64_t> kinds_, c10::intrusive_ptr<Held> table_,
          at::Tensor norm_, double eps_, double multiplier_)
      : layers(layers_), kinds(kinds_), table(table_), norm(norm_), eps(float(eps_)), multiplier(float(multiplier_)) {
    TORCH_CHECK(kinds.size() == layers.size() && norm.is_contiguous() && norm.scalar_type() == at::kFloat,
                "the parts of the decoder do not fit together.");
    for (const auto& layer : layers)
      TORCH_CHECK(layer->states == table->weight.in_features && (!norm.numel() || norm.numel() == layer->states),
                  "a layer reads other states.");
  }
};

// One token of each row, ids [B, 1] -> last hidden states [B, 1, D] of the caches' type; `caches` are the five buffers
// of each layer, which take it up in `slots`, and `angles` cosines and sines of each kind of layer.
at::Tensor decoder_step(const c10::intrusive_ptr<Decoder>& decoder, const at::Tensor& ids,
                        const std::vector<at::Tensor>& angles, const std::vector<at::Tensor>& caches,
                        std::vector<int64_t> slots) {
  const int64_t batch = ids.size(0), count = decoder->layers.size();
  const Weight& table = decoder->table->weight;
  TORCH_CHECK(ids.dim() == 2 && ids.size(1) == 1 && ids.is_cpu() && ids.scalar_type() == at::kLong &&
                  int64_t(caches.size()) == 5 * count && count > 0,
              "ids must be int64 [B, 1] on the CPU, with five buffers of each of ", count, " layers.");
  const auto options = caches[0].options();
  at::Tensor states = at::empty({batch, table.in_features}, options.dtype(at::kFloat));
  float* x = states.mutable_data_ptr<float>();
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t id = ids.const_data_ptr<int64_t>()[row * ids.stride(0)];
    TORCH_CHECK(id >= 0 && id < table.rows, "token ", id, " is outside the table of ", table.rows, " rows.");
    float* own = x + row * table.in_features;
    look_up(table, id, own);
    for (int64_t k = 0; k < table.in_features; ++k) own[k] *= decoder->multiplier;
  }
  for (int64_t index = 0; index < count; ++index) {
    const int64_t kind = 2 * decoder->kinds[index], at = 5 * index;
    TORCH_CHECK(kind >= 0 && kind + 1 < int64_t(angles.size()), "angles of a kind of layers are missing.");
    const Cached cached{caches[at], caches[at + 1], caches[at + 2], caches[at + 3], caches[at + 4], {}, {}, {}, slots};
    const auto &cos = angles[kind], &sin = angles[kind + 1];
    decoder->layers[index]->check(states, cos, sin, cached);
    decoder->layers[index]->run(x, batch, cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), cached);
  }
  for (int64_t row = 0; decoder->norm.numel() && row < batch; ++row) {
    float* own = x + row * table.in_features;
    loops.rms_norm(own, decoder->norm.const_data_ptr<float>(), table.in_features, decoder->eps, own);
  }
  return states.to(caches[0].scalar_type()).unsqueeze(1);
}

}  // namespace

TORCH_LIBRARY(flashlite_native, library) {
  library.def("best_level", &best_level);
  library.def("use_level", &use_level);
  library.class_<Held>("Held")
      .def(torch::init<Parts, std::optional<at::Tensor>, int64_t>())
      .def("rows", [](const c10::intrusive_ptr<Held>& held, const at::Tensor& x) { return held->rows(x); });
  library.class_<Layer>("Layer")
      .def(torch::init<Helds, c10::intrusive_ptr<Held>, Helds, c10::intrusive_ptr<Held>, std::vector<at::Tensor>,
                       std::optional<at::Tensor>, std::optional<at::Tensor>, std::vector<int64_t>, std::vector<int64_t>,
                       double, double>())
      .def("step", &layer_step);
  library.class_<Decoder>("Decoder")
      .def(torch::init<std::vector<c10::intrusive_ptr<Layer>>, std::vector<int64_t>, c10::intrusive_ptr<Held>,
                       at::Tensor, double, double>())
      .def("step", &decoder_step);
}
