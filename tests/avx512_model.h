// The AVX-512 instructions that isa_vnni.c uses, in plain C: its loops can be run, and tested, on
// a processor without them. Included in front of that file by tests/test_cpu_kernels.py.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef union { __m512i i; __m512 f; __m256i half[2]; int32_t w[16]; int16_t h[32]; uint8_t u[64];
                int8_t b[64]; float s[16]; } model_t;

static model_t m_load(const void *p) { model_t r; memcpy(&r, p, 64); return r; }
static model_t m_words(int32_t v) { model_t r; for (int j = 0; j < 16; j++) r.w[j] = v; return r; }
static model_t m_float(float v) { model_t r; for (int j = 0; j < 16; j++) r.s[j] = v; return r; }

static __m512i m_dpbusd(__m512i sum, __m512i a, __m512i b) {  // unsigned a, signed b
  model_t r = {sum}, x = {a}, y = {b};
  for (int j = 0; j < 64; j++) r.w[j / 4] += (int32_t)x.u[j] * (int32_t)y.b[j];
  return r.i;
}
static __m512i m_dpwssd(__m512i sum, __m512i a, __m512i b) {
  model_t r = {sum}, x = {a}, y = {b};
  for (int j = 0; j < 32; j++) r.w[j / 2] += (int32_t)x.h[j] * (int32_t)y.h[j];
  return r.i;
}
static __m512i m_shift(__m512i v, int by) {
  model_t r = {v};
  for (int j = 0; j < 32; j++) r.h[j] = (int16_t)((uint16_t)r.h[j] >> by);
  return r.i;
}
static __m512 m_convert(__m512i v) {
  model_t x = {v}, r;
  for (int j = 0; j < 16; j++) r.s[j] = (float)x.w[j];
  return r.f;
}
static int32_t m_sum(__m512i v) {
  model_t x = {v};
  int32_t sum = 0;
  for (int j = 0; j < 16; j++) sum += x.w[j];
  return sum;
}
static float m_sum_floats(__m512 v) {
  model_t x = {.f = v};
  float sum = 0;
  for (int j = 0; j < 16; j++) sum += x.s[j];
  return sum;
}
static __m512i m_bytes(char v) { model_t r; memset(&r, v, 64); return r.i; }

#define _mm512_loadu_si512(p) m_load(p).i
#define _mm512_loadu_ps(p) m_load(p).f
#define _mm512_storeu_ps(p, v) do { model_t t_ = {.f = (v)}; memcpy(p, &t_, 64); } while (0)
#define _mm512_setzero_si512() m_words(0).i
#define _mm512_setzero_ps() m_float(0).f
#define _mm512_set1_epi32(v) m_words(v).i
#define _mm512_set1_epi8(v) m_bytes(v)
#define _mm512_set1_ps(v) m_float(v).f
#define _mm512_xor_si512(a, b) ((__m512i)((a) ^ (b)))
#define _mm512_and_si512(a, b) ((__m512i)((a) & (b)))
#define _mm512_add_epi32(a, b) ((__m512i)((__v16si)(a) + (__v16si)(b)))
#define _mm512_mul_ps(a, b) ((__m512)((a) * (b)))
#define _mm512_fmadd_ps(a, b, c) ((__m512)((a) * (b) + (c)))
#define _mm512_srli_epi16 m_shift
#define _mm512_cvtepi32_ps m_convert
#define _mm512_dpbusd_epi32 m_dpbusd
#define _mm512_dpwssd_epi32 m_dpwssd
#define _mm512_reduce_add_epi32 m_sum
#define _mm512_reduce_add_ps m_sum_floats
