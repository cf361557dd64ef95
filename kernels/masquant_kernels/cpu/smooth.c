// u = prologue(x) * smooth_inv[m], then per-token quantization. reference.py is the definition.
#include <float.h>
#include <math.h>
#include <omp.h>

#include "common.h"
#include "smooth.h"

void *scratch(int slot, size_t bytes) {
  static _Thread_local struct { void *p; size_t size; } kept[8];
  if (kept[slot].size < bytes) {
    free(kept[slot].p);
    kept[slot].size = (bytes + 4095) & ~(size_t)4095;
    kept[slot].p = aligned_alloc(64, kept[slot].size);
  }
  return kept[slot].p;
}

// exp by 2^n * 2^f, |f| <= 1/2, a Taylor polynomial in f ln 2: below 2 units in the last place.
INLINE f8 exp8(f8 v) {
  v = (f8)_mm256_min_ps(_mm256_max_ps((__m256)v, _mm256_set1_ps(-87.3f)), _mm256_set1_ps(88.3f));
  f8 n = (f8)_mm256_round_ps((__m256)(v * 1.44269504089f), _MM_FROUND_TO_NEAREST_INT);
  f8 f = v - n * 0.693359375f;
  f = f + n * 2.12194440e-4f;  // ln 2 in two parts, so that nothing cancels
  f8 p = splat(1.0f / 5040);
  p = p * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32((__m256)n), 23);
  return (f8)_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256((__m256)p), power));
}

INLINE f8 silu8(f8 v) {
  // Below -87 exp8 stops, where silu is smaller than any value that would matter (1e-36).
  return v / (1.0f + exp8(-v));
}

INLINE void smooth_row_as(const smooth_t *s, int64_t row, int m, float *u, const int type) {
  int64_t columns = s->columns, step = element_size(type), k = 0;
  const char *x = (const char *)s->x + row * s->x_stride * step;
  const char *up = s->up ? (const char *)s->up + row * s->up_stride * step : 0;
  const float *inv = s->smooth_inv + m * columns, *norm = s->norm_weight;
  int64_t even = columns & ~(int64_t)(LANES - 1);
  float rstd = 1;
  if (norm) {
    f8 sums = splat(0);
    for (k = 0; k < even; k += LANES) {
      f8 v = load8(x, k, type);
      sums += v * v;
    }
    float sum = sum8(sums);
    for (; k < columns; k++) sum += load1(x, k, type) * load1(x, k, type);
    rstd = 1.0f / sqrtf(sum / (float)columns + s->eps);
  }
  for (k = 0; k < even; k += LANES) {
    f8 v = load8(x, k, type);
    if (norm) v = v * rstd * load8(norm, k, F32);
    if (up) v = silu8(v) * load8(up, k, type);
    _mm256_storeu_ps(u + k, (__m256)(v * load8(inv, k, F32)));
  }
  if (k < columns) {  // the last few, through a padded copy
    float a[LANES] = {0}, b[LANES] = {0};
    for (int64_t j = k; j < columns; j++) {
      a[j - k] = load1(x, j, type);
      if (norm) a[j - k] = a[j - k] * rstd * norm[j];
      if (up) b[j - k] = load1(up, j, type);
    }
    f8 v = load8(a, 0, F32);
    if (up) v = silu8(v) * load8(b, 0, F32);
    for (int64_t j = k; j < columns; j++) u[j] = v[j - k] * inv[j];
  }
}

void smooth_row(const smooth_t *s, int64_t row, int m, float *u) {
  if (s->type == F32) smooth_row_as(s, row, m, u, F32);
  else if (s->type == F16) smooth_row_as(s, row, m, u, F16);
  else smooth_row_as(s, row, m, u, BF16);
}

// q = round(u / scale), scale = absmax / limit; a row that is not finite: q = 0, scale = NaN.
static void quantize_row(float *u, int64_t columns, int64_t padded, float limit, int8_t *q,
                         float *scale) {
  for (int64_t k = columns; k < padded; k++) u[k] = 0;
  f8 most = splat(0);
  __m256 wrong = _mm256_setzero_ps();
  for (int64_t k = 0; k < padded; k += LANES) {
    f8 a = abs8(load8(u, k, F32));
    most = (f8)_mm256_max_ps((__m256)most, (__m256)a);
    wrong = _mm256_or_ps(wrong, _mm256_cmp_ps((__m256)a, _mm256_set1_ps(FLT_MAX), _CMP_NLE_UQ));
  }
  if (_mm256_movemask_ps(wrong)) {
    *scale = NAN;
    memset(q, 0, (size_t)padded);
    return;
  }
  *scale = fmaxf(max8(most) / limit, FLT_MIN);
  __m256 by = _mm256_set1_ps(*scale);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t k = 0; k < padded; k += 32) {
    __m256i v[4];
    for (int j = 0; j < 4; j++)  // the default rounding of the conversion is half to even
      v[j] = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(u + k + 8 * j), by));
    __m256i low = _mm256_packs_epi32(v[0], v[1]), high = _mm256_packs_epi32(v[2], v[3]);
    __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256((__m256i *)(q + k), bytes);
  }
}

// total: NULL, or where x + residual is written first and then read as the input.
void mq_smooth_quant(const smooth_t *given, const void *residual, int64_t residual_stride,
                     void *total, int64_t tokens, const int32_t *modality, int bits, int8_t *q,
                     float *scale, int threads) {
  smooth_t s = *given;
  int64_t columns = s.columns, padded = ceil_div(columns, BLOCK) * BLOCK;
  float limit = (float)((1 << (bits - 1)) - 1);
  if (total) {
    s.x = total;
    s.x_stride = columns;
  }
#pragma omp parallel for num_threads(threads_for(tokens * columns, threads))
  for (int64_t t = 0; t < tokens; t++) {
    if (total) {
      int64_t a = t * given->x_stride, b = t * residual_stride, c = t * columns;
      for (int64_t k = 0; k < columns; k++)
        store1(total, c + k,
               load1(given->x, a + k, s.type) + load1(residual, b + k, s.type), s.type);
    }
    float *u = scratch(0, (size_t)padded * 4);
    smooth_row(&s, t, modality ? modality[t] : 0, u);
    quantize_row(u, columns, padded, limit, q + t * padded, scale + t);
  }
}
