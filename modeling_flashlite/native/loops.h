// The loops of decode.cpp, compiled once for each level of processor: this file is included once a level, within a
// namespace of its own, with LEVEL 0 (plain C++), 1 (AVX2 and FMA) or 2 (AVX-512 with VBMI and VNNI).

constexpr int kGroup = 32;  // activations that share a scale
constexpr int kTile = 64;   // rows of a tile

template <int N>
using Constant = std::integral_constant<int, N>;

// Begin to read bytes that are needed soon
inline void fetch(const void* from, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
#endif
}

inline float widen(float value) { return value; }
inline float widen(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, uint16_t& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  out = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp by a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2]: relative error 2e-7; 0 below -87
inline float quick_exp(float x) {
  const float bounded = x > 88.0f ? 88.0f : (x < -87.0f ? -87.0f : x);
  const float shifted = bounded * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
  const float r = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  const uint32_t power = uint32_t(bits - 0x4b400000 + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, 4);
  return x < -87.0f ? 0.0f : p * scale + (x - x);  // not a number stays so
}

// out = x * weight / sqrt(mean(x^2) + eps)
void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* out) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / size + eps);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

template <typename T>
void widen_row(const T* x, const float* factors, int64_t size, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) out[i] = widen(x[i]) * (factors ? factors[i] : 1.0f);
}

// out = sums * step + bias; sums are those of the first bytes and, if there are two, of the second
template <typename T>
void finish_row(float* sums, const float* low, const float* step, const float* bias, int64_t size, T* out) {
  if (low)
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) sums[i] += low[i];
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) narrow(sums[i] * step[i] + (bias ? bias[i] : 0.0f), out[i]);
}

// Activations as signed bytes, x = scale (high + low / 254), one scale for 32 of them: 15 bits, or 8 without `low`. The
// shifts are what codes that are 8 too large add to every product.
#if LEVEL == 2
void round_row(const float* x, int64_t size, int8_t* high, int8_t* low, float* scales, float* low_scales, float* shift,
               float* low_shift) {
  __m512 total = _mm512_setzero_ps(), low_total = _mm512_setzero_ps();
  for (int64_t first = 0; first < size; first += kGroup) {
    const __m512 own[2] = {_mm512_loadu_ps(x + first), _mm512_loadu_ps(x + first + 16)};
    const float peak = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(own[0]), _mm512_abs_ps(own[1])));
    const bool bad = _mm512_fpclass_ps_mask(own[0], 0x99) | _mm512_fpclass_ps_mask(own[1], 0x99);
    const float scale = bad ? NAN : (peak > 1e-30f ? peak : 1e-30f) / 127;
    const __m512 inverse = _mm512_set1_ps(bad ? 0.0f : 1 / scale), unit = _mm512_set1_ps(scale);
    for (int i = 0; i < 2; ++i) {
      const __m512 value = bad ? _mm512_setzero_ps() : _mm512_mul_ps(own[i], inverse);
      const __m512i whole = _mm512_cvtps_epi32(value);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high + first + 16 * i), _mm512_cvtsepi32_epi8(whole));
      total = _mm512_fmadd_ps(unit, _mm512_cvtepi32_ps(whole), total);
      if (!low) continue;
      const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(value, _mm512_cvtepi32_ps(whole)), _mm512_set1_ps(254));
      const __m512i rounded = _mm512_cvtps_epi32(rest);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(low + first + 16 * i), _mm512_cvtsepi32_epi8(rounded));
      low_total = _mm512_fmadd_ps(unit, _mm512_cvtepi32_ps(rounded), low_total);
    }
    scales[first / kGroup] = scale;
    if (low) low_scales[first / kGroup] = scale / 254;
  }
  *shift = -8 * _mm512_reduce_add_ps(total);
  if (low) *low_shift = -8 * _mm512_reduce_add_ps(low_total) / 254;
}
#else
void round_row(const float* x, int64_t size, int8_t* high, int8_t* low, float* scales, float* low_scales, float* shift,
               float* low_shift) {
  const float magic = 12582912.0f;  // adding it rounds to the nearest integer
  float total = 0, low_total = 0;
  for (int64_t first = 0; first < size; first += kGroup) {
    const float* own = x + first;
    float peak = 0, bad = 0;
#pragma omp simd reduction(max : peak) reduction(+ : bad)
    for (int i = 0; i < kGroup; ++i) {
      const float size_of = std::fabs(own[i]);
      peak = size_of > peak ? size_of : peak;
      bad += own[i] * 0.0f;
    }
    const float scale = (peak > 1e-30f ? peak : 1e-30f) / 127, inverse = bad == 0 ? 1 / scale : 0.0f;
    float highs = 0, lows = 0;
#pragma omp simd reduction(+ : highs)
    for (int i = 0; i < kGroup; ++i) {
      const float value = inverse == 0.0f ? 0.0f : own[i] * inverse, whole = (value + magic) - magic;
      high[first + i] = int8_t(int(whole));
      highs += whole;
    }
    scales[first / kGroup] = scale + bad;
    total += (scale + bad) * highs;
    if (!low) continue;
#pragma omp simd reduction(+ : lows)
    for (int i = 0; i < kGroup; ++i) {
      const float value = inverse == 0.0f ? 0.0f : own[i] * inverse, whole = (value + magic) - magic;
      const float rest = ((value - whole) * 254 + magic) - magic;
      low[first + i] = int8_t(int(rest));
      lows += rest;
    }
    low_scales[first / kGroup] = scale / 254;
    low_total += scale / 254 * lows;
  }
  *shift = -8 * total;
  if (low) *low_shift = -8 * low_total;
}
#endif

// tile_rows: out[count, 64] = the rows of a tile [columns, 32] times rows of bytes x [count, columns] with their scales
// [count, columns / 32] and shifts [count]
#if LEVEL == 2
// From [column, row] to [row, column] of four columns
struct Order {
  alignas(64) uint8_t at[128];
  constexpr Order() : at{} {
    for (int row = 0; row < 32; ++row)
      for (int column = 0; column < 4; ++column) at[4 * row + column] = uint8_t(32 * column + row);
  }
};
constexpr Order kOrder;

// `R` rows of bytes, and `P` halves of the tile's rows from `half` on: what the registers hold
template <int R, int P>
void tile_block(const uint8_t* tile, int64_t columns, int half, const int8_t* x, const float* scales,
                const float* shifts, float* out) {
  __m512i places[P];
  for (int i = 0; i < P; ++i) places[i] = _mm512_load_si512(kOrder.at + 64 * (half + i));
  const __m512i mask = _mm512_set1_epi8(0x0f);
  const int64_t groups = columns / kGroup;
  __m512 sums[R][2 * P];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < 2 * P; ++i) sums[r][i] = _mm512_setzero_ps();
  for (int64_t group = 0; group < groups; ++group) {
    __m512i products[R][2 * P];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int i = 0; i < 2 * P; ++i) products[r][i] = _mm512_setzero_si512();
    const uint8_t* codes = tile + group * kGroup * 32;
    const int8_t* own = x + group * kGroup;
#pragma GCC unroll 8
    for (int four = 0; four < kGroup / 4; ++four) {
      const __m512i a = _mm512_loadu_si512(codes + 128 * four), b = _mm512_loadu_si512(codes + 128 * four + 64);
#pragma GCC unroll 2
      for (int i = 0; i < P; ++i) {
        // the codes of the upper rows stay in the upper half of their bytes, and count 16 times
        const __m512i both = _mm512_permutex2var_epi8(a, places[i], b);
        const __m512i lower = _mm512_and_si512(both, mask), upper = _mm512_andnot_si512(mask, both);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          int32_t word;
          std::memcpy(&word, own + r * columns + 4 * four, 4);
          const __m512i four_x = _mm512_set1_epi32(word);
          products[r][2 * i] = _mm512_dpbusd_epi32(products[r][2 * i], lower, four_x);
          products[r][2 * i + 1] = _mm512_dpbusd_epi32(products[r][2 * i + 1], upper, four_x);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512 scale = _mm512_set1_ps(scales[r * groups + group]);
#pragma GCC unroll 16
      for (int i = 0; i < 2 * P; ++i)
        sums[r][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[r][i]), scale, sums[r][i]);
    }
  }
  const __m512 units[2] = {_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f / 16)};
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < 2 * P; ++i)
      _mm512_storeu_ps(out + kTile * r + 32 * (i % 2) + 16 * (half + i / 2),
                       _mm512_fmadd_ps(sums[r][i], units[i % 2], _mm512_set1_ps(shifts[r])));
}

void tile_rows(const uint8_t* tile, int64_t columns, int64_t count, const int8_t* x, const float* scales,
               const float* shifts, float* out) {
  const int64_t groups = columns / kGroup;
  const auto block = [&](auto rows, auto halves, int64_t from) {
    for (int half = 0; half < 2; half += halves)
      tile_block<rows, halves>(tile, columns, half, x + from * columns, scales + from * groups, shifts + from,
                               out + from * kTile);
  };
  int64_t from = 0;
  for (; count - from >= 6; from += 6) block(Constant<6>{}, Constant<1>{}, from);
  switch (count - from) {
    case 5: block(Constant<5>{}, Constant<1>{}, from); break;
    case 4: block(Constant<4>{}, Constant<1>{}, from); break;
    case 3: block(Constant<3>{}, Constant<2>{}, from); break;
    case 2: block(Constant<2>{}, Constant<2>{}, from); break;
    case 1: block(Constant<1>{}, Constant<2>{}, from); break;
  }
}
#elif LEVEL == 1
void tile_rows(const uint8_t* tile, int64_t columns, int64_t count, const int8_t* x, const float* scales,
               const float* shifts, float* out) {
  const __m256i mask = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1);
  for (int64_t row = 0; row < count; ++row, x += columns, scales += columns / kGroup, out += kTile) {
    __m256 sums[8];
    for (int i = 0; i < 8; ++i) sums[i] = _mm256_setzero_ps();
    for (int64_t group = 0; group < columns / kGroup; ++group) {
      __m256i parts[8];  // eight rows each, pairs of columns; eight times 2 * 15 * 127 fit into 16 bits
      for (int i = 0; i < 8; ++i) parts[i] = _mm256_setzero_si256();
      for (int four = 0; four < kGroup / 4; ++four) {
        const __m256i* codes = reinterpret_cast<const __m256i*>(tile + group * kGroup * 32 + 128 * four);
        const __m256i a = _mm256_loadu_si256(codes), b = _mm256_loadu_si256(codes + 1);
        const __m256i c = _mm256_loadu_si256(codes + 2), d = _mm256_loadu_si256(codes + 3);
        const __m256i ab = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
        const __m256i cd = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
        const __m256i rows[4] = {_mm256_unpacklo_epi16(ab, cd), _mm256_unpackhi_epi16(ab, cd),
                                 _mm256_unpacklo_epi16(ab_high, cd_high), _mm256_unpackhi_epi16(ab_high, cd_high)};
        int32_t word;
        std::memcpy(&word, x + group * kGroup + 4 * four, 4);
        const __m256i four_x = _mm256_set1_epi32(word);
        for (int i = 0; i < 4; ++i) {
          const __m256i lower = _mm256_and_si256(rows[i], mask);
          const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(rows[i], 4), mask);
          parts[i] = _mm256_add_epi16(parts[i], _mm256_maddubs_epi16(lower, four_x));
          parts[4 + i] = _mm256_add_epi16(parts[4 + i], _mm256_maddubs_epi16(upper, four_x));
        }
      }
      const __m256 scale = _mm256_set1_ps(scales[group]);
      for (int i = 0; i < 8; ++i)
        sums[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(parts[i], ones)), scale, sums[i]);
    }
    for (int i = 0; i < 8; ++i) {  // the rows of a register are 4 i.. and 16 + 4 i..
      const __m256 sum = _mm256_add_ps(sums[i], _mm256_set1_ps(shifts[row]));
      float* place = out + 32 * (i / 4) + 4 * (i % 4);
      _mm_storeu_ps(place, _mm256_castps256_ps128(sum));
      _mm_storeu_ps(place + 16, _mm256_extractf128_ps(sum, 1));
    }
  }
}
#else
void tile_rows(const uint8_t* tile, int64_t columns, int64_t count, const int8_t* x, const float* scales,
               const float* shifts, float* out) {
  for (int64_t row = 0; row < count; ++row, x += columns, scales += columns / kGroup, out += kTile) {
    float sums[kTile] = {};
    for (int64_t first = 0; first < columns; first += 16) {  // 16 times 15 * 127 fit into 16 bits
      int16_t parts[kTile] = {};
      for (int64_t column = first; column < first + 16; ++column) {
        const uint8_t* codes = tile + 32 * column;
#pragma omp simd
        for (int i = 0; i < 32; ++i) {
          parts[i] = int16_t(parts[i] + int16_t(codes[i] & 15) * x[column]);
          parts[32 + i] = int16_t(parts[32 + i] + int16_t(codes[i] >> 4) * x[column]);
        }
      }
      for (int i = 0; i < kTile; ++i) sums[i] += scales[first / kGroup] * float(parts[i]);
    }
    for (int i = 0; i < kTile; ++i) out[i] = sums[i] + shifts[row];
  }
}
#endif

// sums[rows, 64] += the rare digits of a tile times inputs [columns, rows]; an entry is 64 times its column plus its
// row, and the bits of a float. The sums are made in `turned`, [64, rows].
void rare_rows(const int32_t* entries, int64_t count, const float* inputs, int64_t rows, float* turned, float* sums) {
  if (count == 0) return;
  if (rows > 1)
    for (int64_t i = 0; i < kTile * rows; ++i) turned[i] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = uint32_t(entries[2 * i]), column = key / kTile, row = key % kTile;
    float value;
    std::memcpy(&value, entries + 2 * i + 1, 4);
    if (rows == 1) {
      sums[row] += value * inputs[column];
      continue;
    }
    float* own = turned + row * rows;
    const float* input = inputs + column * rows;
#pragma omp simd
    for (int64_t m = 0; m < rows; ++m) own[m] += value * input[m];
  }
  for (int64_t m = 0; rows > 1 && m < rows; ++m)
    for (int64_t j = 0; j < kTile; ++j) sums[m * kTile + j] += turned[j * rows + m];
}

// dots: out[g, i] = queries[g] . keys[i], for keys `stride` apart
// mix: out[g] += sum of weights[g, i] values[i], for values `stride` apart
#if LEVEL == 2
inline __m512 sixteen(const float* from, __mmask16 some) { return _mm512_maskz_loadu_ps(some, from); }
inline __m512 sixteen(const uint16_t* from, __mmask16 some) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from)), 16));
}
inline __mmask16 first_of(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1 << count) - 1); }

// The sums of four registers
inline __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

constexpr int64_t kAhead = 32;  // keys between the one that is read and the one that is fetched

// `G` queries and up to four keys at a time
template <int G, typename T>
void dots_block(const T* keys, int64_t stride, int64_t count, int64_t size, const float* queries, float* out,
                int64_t out_stride) {
  for (int64_t i = 0; i < count; i += 4) {
    if (i + kAhead + 4 <= count) fetch(keys + (i + kAhead) * stride, 4 * size * sizeof(T));
    const T* own[4];
    for (int k = 0; k < 4; ++k) own[k] = keys + std::min(i + k, count - 1) * stride;
    __m512 sums[G][4];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sums[g][k] = _mm512_setzero_ps();
    for (int64_t d = 0; d < size; d += 16) {
      const __mmask16 some = first_of(size - d);
      __m512 key[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) key[k] = sixteen(own[k] + d, some);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const __m512 query = _mm512_maskz_loadu_ps(some, queries + g * size + d);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sums[g][k] = _mm512_fmadd_ps(query, key[k], sums[g][k]);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
      _mm_mask_storeu_ps(out + g * out_stride + i, __mmask8(first_of(std::min<int64_t>(count - i, 4))),
                         totals(sums[g][0], sums[g][1], sums[g][2], sums[g][3]));
  }
}

// `G` sums of values, 64 of their dimensions at a time
template <int G, typename T>
void mix_block(const T* values, int64_t stride, int64_t count, int64_t size, const float* weights,
               int64_t weight_stride, float* out) {
  for (int64_t first = 0; first < size; first += 64) {
    __mmask16 some[4];
    __m512 sums[G][4];
#pragma GCC unroll 4
    for (int d = 0; d < 4; ++d) {
      some[d] = first_of(std::max<int64_t>(size - first - 16 * d, 0));
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sums[g][d] = _mm512_maskz_loadu_ps(some[d], out + g * size + first + 16 * d);
    }
    for (int64_t i = 0; i < count; ++i) {
      __m512 value[4];
#pragma GCC unroll 4
      for (int d = 0; d < 4; ++d) value[d] = sixteen(values + i * stride + first + 16 * d, some[d]);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const __m512 weight = _mm512_set1_ps(weights[g * weight_stride + i]);
#pragma GCC unroll 4
        for (int d = 0; d < 4; ++d) sums[g][d] = _mm512_fmadd_ps(weight, value[d], sums[g][d]);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
      for (int d = 0; d < 4; ++d) _mm512_mask_storeu_ps(out + g * size + first + 16 * d, some[d], sums[g][d]);
  }
}

template <typename T>
void dots(const T* keys, int64_t stride, int64_t count, int64_t size, const float* queries, int64_t groups, float* out,
          int64_t out_stride) {
  for (; groups >= 4; groups -= 4, queries += 4 * size, out += 4 * out_stride)
    dots_block<4>(keys, stride, count, size, queries, out, out_stride);
  if (groups == 3) dots_block<3>(keys, stride, count, size, queries, out, out_stride);
  if (groups == 2) dots_block<2>(keys, stride, count, size, queries, out, out_stride);
  if (groups == 1) dots_block<1>(keys, stride, count, size, queries, out, out_stride);
}

template <typename T>
void mix(const T* values, int64_t stride, int64_t count, int64_t size, const float* weights, int64_t weight_stride,
         int64_t groups, float* out) {
  for (; groups >= 4; groups -= 4, weights += 4 * weight_stride, out += 4 * size)
    mix_block<4>(values, stride, count, size, weights, weight_stride, out);
  if (groups == 3) mix_block<3>(values, stride, count, size, weights, weight_stride, out);
  if (groups == 2) mix_block<2>(values, stride, count, size, weights, weight_stride, out);
  if (groups == 1) mix_block<1>(values, stride, count, size, weights, weight_stride, out);
}
#else
template <typename T>
void dots(const T* keys, int64_t stride, int64_t count, int64_t size, const float* queries, int64_t groups, float* out,
          int64_t out_stride) {
  for (int64_t i = 0; i < count; ++i) {
    const T* key = keys + i * stride;
    for (int64_t g = 0; g < groups; ++g) {
      const float* query = queries + g * size;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < size; ++d) sum += widen(key[d]) * query[d];
      out[g * out_stride + i] = sum;
    }
  }
}

template <typename T>
void mix(const T* values, int64_t stride, int64_t count, int64_t size, const float* weights, int64_t weight_stride,
         int64_t groups, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const T* value = values + i * stride;
    for (int64_t g = 0; g < groups; ++g) {
      const float weight = weights[g * weight_stride + i];
      float* own = out + g * size;
#pragma omp simd
      for (int64_t d = 0; d < size; ++d) own[d] += weight * widen(value[d]);
    }
  }
}
#endif

void widen_float(const float* x, const float* factors, int64_t n, float* out) { widen_row(x, factors, n, out); }
void widen_bfloat16(const uint16_t* x, const float* factors, int64_t n, float* out) { widen_row(x, factors, n, out); }
void finish_float(float* sums, const float* low, const float* step, const float* bias, int64_t n, float* out) {
  finish_row(sums, low, step, bias, n, out);
}
void finish_bfloat16(float* sums, const float* low, const float* step, const float* bias, int64_t n, uint16_t* out) {
  finish_row(sums, low, step, bias, n, out);
}
void dots_float(const float* k, int64_t s, int64_t n, int64_t d, const float* q, int64_t g, float* out, int64_t o) {
  dots(k, s, n, d, q, g, out, o);
}
void dots_bfloat16(const uint16_t* k, int64_t s, int64_t n, int64_t d, const float* q, int64_t g, float* out,
                   int64_t o) {
  dots(k, s, n, d, q, g, out, o);
}
void mix_float(const float* v, int64_t s, int64_t n, int64_t d, const float* w, int64_t ws, int64_t g, float* out) {
  mix(v, s, n, d, w, ws, g, out);
}
void mix_bfloat16(const uint16_t* v, int64_t s, int64_t n, int64_t d, const float* w, int64_t ws, int64_t g,
                  float* out) {
  mix(v, s, n, d, w, ws, g, out);
}

// x = softmax(x)
void softmax(float* x, int64_t count) {
  float peak = -std::numeric_limits<float>::infinity(), sum = 0;
#pragma omp simd reduction(max : peak)
  for (int64_t i = 0; i < count; ++i) peak = x[i] > peak ? x[i] : peak;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    x[i] = quick_exp(x[i] - peak);
    sum += x[i];
  }
  const float scale = 1 / sum;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] *= scale;
}

// gate = gate sigmoid(gate) up
void silu_times(float* gate, const float* up, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) gate[i] = gate[i] / (1 + quick_exp(-gate[i])) * up[i];
}
