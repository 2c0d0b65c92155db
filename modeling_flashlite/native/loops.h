// The loops of decode.cpp, compiled once for each level of processor: this file is included once a level, within a
// namespace of its own, with LEVEL 0 (plain C++), 1 (AVX2 and FMA) or 2 (AVX-512 with VBMI and VNNI).

constexpr int kGroup = 32;  // activations that share a scale
constexpr int kTile = 64;   // rows of a tile

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

// Activations in two signed bytes each, x = scale (high + low / 254), one scale for 32 of them: 15 bits. `shift` is what
// codes that are 8 too large add to every product.
void round_row(const float* x, int64_t size, int8_t* high, int8_t* low, float* scales, float* shift) {
  const float magic = 12582912.0f;  // adding it rounds to the nearest integer
  float total = 0;
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
#pragma omp simd reduction(+ : highs, lows)
    for (int i = 0; i < kGroup; ++i) {
      const float value = inverse == 0.0f ? 0.0f : own[i] * inverse, whole = (value + magic) - magic;
      const float rest = ((value - whole) * 254 + magic) - magic;
      high[first + i] = int8_t(int(whole));
      low[first + i] = int8_t(int(rest));
      highs += whole;
      lows += rest;
    }
    scales[first / kGroup] = scale + bad;
    total += (scale + bad) * (highs + lows / 254);
  }
  *shift = -8 * total;
}

// out[64] = the rows of a tile [columns, 32] times one row of activations
#if LEVEL == 2
void tile_product(const uint8_t* tile, int64_t columns, const int8_t* high, const int8_t* low, const float* scales,
                  float shift, float* out) {
  alignas(64) uint8_t order[128];  // from [column, row] to [row, column] of four columns
  for (int row = 0; row < 32; ++row)
    for (int column = 0; column < 4; ++column) order[4 * row + column] = uint8_t(32 * column + row);
  const __m512i first = _mm512_load_si512(order), second = _mm512_load_si512(order + 64);
  const __m512i mask = _mm512_set1_epi8(0x0f);
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t group = 0; group < columns / kGroup; ++group) {
    __m512i large[4], small[4];
    for (int i = 0; i < 4; ++i) large[i] = small[i] = _mm512_setzero_si512();
    const uint8_t* codes = tile + group * kGroup * 32;
#pragma GCC unroll 8
    for (int four = 0; four < kGroup / 4; ++four) {
      const __m512i a = _mm512_loadu_si512(codes + 128 * four), b = _mm512_loadu_si512(codes + 128 * four + 64);
      const __m512i p = _mm512_permutex2var_epi8(a, first, b), q = _mm512_permutex2var_epi8(a, second, b);
      // the codes of the upper rows stay in the upper half of their bytes, and count 16 times
      const __m512i parts[4] = {_mm512_and_si512(p, mask), _mm512_and_si512(q, mask), _mm512_andnot_si512(mask, p),
                                _mm512_andnot_si512(mask, q)};
      int32_t word;
      std::memcpy(&word, high + group * kGroup + 4 * four, 4);
      const __m512i x = _mm512_set1_epi32(word);
      std::memcpy(&word, low + group * kGroup + 4 * four, 4);
      const __m512i y = _mm512_set1_epi32(word);
      for (int i = 0; i < 4; ++i) {
        large[i] = _mm512_dpbusd_epi32(large[i], parts[i], x);
        small[i] = _mm512_dpbusd_epi32(small[i], parts[i], y);
      }
    }
    const __m512 scale = _mm512_set1_ps(scales[group]), less = _mm512_set1_ps(scales[group] / 254);
    for (int i = 0; i < 4; ++i) {
      sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(large[i]), scale, sums[i]);
      sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(small[i]), less, sums[i]);
    }
  }
  const __m512 low_unit = _mm512_set1_ps(1.0f), high_unit = _mm512_set1_ps(1.0f / 16);
  for (int i = 0; i < 4; ++i)
    _mm512_storeu_ps(out + 16 * i, _mm512_fmadd_ps(sums[i], i < 2 ? low_unit : high_unit, _mm512_set1_ps(shift)));
}
#elif LEVEL == 1
void tile_product(const uint8_t* tile, int64_t columns, const int8_t* high, const int8_t* low, const float* scales,
                  float shift, float* out) {
  const __m256i mask = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1);
  __m256 sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = _mm256_setzero_ps();
  for (int64_t group = 0; group < columns / kGroup; ++group) {
    for (int digit = 0; digit < 2; ++digit) {
      const int8_t* x = (digit ? low : high) + group * kGroup;
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
        std::memcpy(&word, x + 4 * four, 4);
        const __m256i four_x = _mm256_set1_epi32(word);
        for (int i = 0; i < 4; ++i) {
          const __m256i lower = _mm256_and_si256(rows[i], mask);
          const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(rows[i], 4), mask);
          parts[i] = _mm256_add_epi16(parts[i], _mm256_maddubs_epi16(lower, four_x));
          parts[4 + i] = _mm256_add_epi16(parts[4 + i], _mm256_maddubs_epi16(upper, four_x));
        }
      }
      const __m256 scale = _mm256_set1_ps(digit ? scales[group] / 254 : scales[group]);
      for (int i = 0; i < 8; ++i)
        sums[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(parts[i], ones)), scale, sums[i]);
    }
  }
  for (int i = 0; i < 8; ++i) {  // the rows of a register are 4 i.. and 16 + 4 i..
    const __m256 sum = _mm256_add_ps(sums[i], _mm256_set1_ps(shift));
    float* place = out + 32 * (i / 4) + 4 * (i % 4);
    _mm_storeu_ps(place, _mm256_castps256_ps128(sum));
    _mm_storeu_ps(place + 16, _mm256_extractf128_ps(sum, 1));
  }
}
#else
void tile_product(const uint8_t* tile, int64_t columns, const int8_t* high, const int8_t* low, const float* scales,
                  float shift, float* out) {
  float sums[kTile] = {};
  for (int64_t first = 0; first < columns; first += 16) {  // 16 times 15 * 127 fit into 16 bits
    for (int digit = 0; digit < 2; ++digit) {
      int16_t parts[kTile] = {};
      for (int64_t column = first; column < first + 16; ++column) {
        const int16_t x = (digit ? low : high)[column];
        const uint8_t* codes = tile + 32 * column;
#pragma omp simd
        for (int row = 0; row < 32; ++row) {
          parts[row] = int16_t(parts[row] + int16_t(codes[row] & 15) * x);
          parts[32 + row] = int16_t(parts[32 + row] + int16_t(codes[row] >> 4) * x);
        }
      }
      const float scale = digit ? scales[first / kGroup] / 254 : scales[first / kGroup];
      for (int row = 0; row < kTile; ++row) sums[row] += scale * float(parts[row]);
    }
  }
  for (int row = 0; row < kTile; ++row) out[row] = sums[row] + shift;
}
#endif

// out[g, i] = queries[g] . keys[i], for keys `stride` apart
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

// out[g] += sum of weights[g, i] values[i], for values `stride` apart
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
