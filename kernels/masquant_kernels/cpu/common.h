// Shared by the CPU kernels: element types, 8-lane floats, the thread rule.
// x86-64 with AVX2, FMA and F16C; callers check that (build.py).
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 128  // inputs of one nibble block; q rows are padded to whole blocks
#define LANES 8

typedef float f8 __attribute__((vector_size(32)));
typedef enum { F32 = 0, BF16 = 1, F16 = 2 } dtype_t;  // as cpu/__init__.py numbers them

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int element_size(int type) { return type == F32 ? 4 : 2; }

INLINE f8 splat(float v) { return (f8)_mm256_set1_ps(v); }

INLINE f8 load8(const void *p, int64_t i, const int type) {
  if (type == F32) return (f8)_mm256_loadu_ps((const float *)p + i);
  __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)p + i));
  if (type == F16) return (f8)_mm256_cvtph_ps(half);
  return (f8)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE float load1(const void *p, int64_t i, const int type) {
  if (type == F32) return ((const float *)p)[i];
  uint16_t half = ((const uint16_t *)p)[i];
  if (type == F16) return _cvtsh_ss(half);
  union { uint32_t u; float f; } bits = {(uint32_t)half << 16};
  return bits.f;
}

// f32 -> bf16, to nearest even; a NaN stays one (rounding up could carry it to infinity).
INLINE uint16_t bf16_of(float v) {
  union { float f; uint32_t u; } bits = {v};
  if (v != v) return (uint16_t)(bits.u >> 16 | 0x40);
  return (uint16_t)((bits.u + 0x7fff + (bits.u >> 16 & 1)) >> 16);
}

INLINE void store1(void *p, int64_t i, float v, const int type) {
  if (type == F32) ((float *)p)[i] = v;
  else ((uint16_t *)p)[i] = type == F16 ? (uint16_t)_cvtss_sh(v, 0) : bf16_of(v);
}

INLINE void store8(void *p, int64_t i, f8 v, const int type) {
  if (type == F32) {
    _mm256_storeu_ps((float *)p + i, (__m256)v);
  } else if (type == F16) {
    _mm_storeu_si128((__m128i *)((uint16_t *)p + i), _mm256_cvtps_ph((__m256)v, 0));
  } else {
    for (int j = 0; j < LANES; j++) store1(p, i + j, v[j], BF16);
  }
}

INLINE float sum8(f8 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

INLINE float max8(f8 v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

INLINE f8 abs8(f8 v) { return (f8)_mm256_andnot_ps(_mm256_set1_ps(-0.0f), (__m256)v); }

// A region that does little work costs more to share among threads than to do.
INLINE int threads_for(int64_t work, int threads) { return work < 65536 ? 1 : threads; }

// Aligned scratch of this thread, kept between calls: page faults would cost more than the work.
void *scratch(int slot, size_t bytes);
