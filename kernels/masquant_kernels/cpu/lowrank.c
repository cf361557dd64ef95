// h = u @ lr_a[m-1] for the tokens of modality m; tokens of the base modality cost nothing.
#include <math.h>
#include <omp.h>

#include "lowrank.h"
#include "smooth.h"

#define ROWS 1024       // tokens whose integers are held at once,
#define HELD (1 << 23)  // or fewer, if they were more integers than this
#define TASK 128        // tokens of a task, which takes a panel of columns
#define SLICE 256       // inputs of lr_a that are converted at once: 16 KiB, which stay in cache

void to_panel(const uint16_t *factor, int64_t stride, int64_t depth, int64_t columns, int16_t *w,
              float *ws) {
  const __m256i low = _mm256_set1_epi32(0xffff);
  for (int64_t from = 0; from < depth; from += GROUP, w += GROUP * PANEL, ws += PANEL) {
    float rows[GROUP][PANEL] __attribute__((aligned(32)));
    f8 most[PANEL / 8];
    for (int j = 0; j < PANEL / 8; j++) most[j] = splat(0);
    for (int k = 0; k < GROUP; k++)
      for (int j = 0; j < PANEL / 8; j++) {
        f8 v = splat(0);
        const uint16_t *p = factor + (from + k) * stride + 8 * j;
        if (from + k < depth && 8 * j + 8 <= columns) v = load8(p, 0, F16);
        else if (from + k < depth)
          for (int64_t i = 8 * j; i < columns; i++) v[i - 8 * j] = load1(p, i - 8 * j, F16);
        *(f8 *)&rows[k][8 * j] = v;
        most[j] = (f8)_mm256_max_ps((__m256)most[j], (__m256)abs8(v));
      }
    for (int j = 0; j < PANEL / 8; j++) {
      __m256 zero = _mm256_cmp_ps((__m256)most[j], _mm256_set1_ps(TINY), _CMP_LT_OQ);
      f8 by = (f8)_mm256_andnot_ps(zero, (__m256)((float)LIMIT / most[j]));
      _mm256_storeu_ps(ws + 8 * j, (__m256)(most[j] / (float)LIMIT));
      for (int p = 0; p < GROUP / 2; p++) {
        __m256i a = _mm256_cvtps_epi32((__m256)(*(f8 *)&rows[2 * p][8 * j] * by));
        __m256i b = _mm256_cvtps_epi32((__m256)(*(f8 *)&rows[2 * p + 1][8 * j] * by));
        a = _mm256_or_si256(_mm256_and_si256(a, low), _mm256_slli_epi32(b, 16));
        _mm256_storeu_si256((__m256i *)(w + (p * PANEL + 8 * j) * 2), a);
      }
    }
  }
}

// h: f32 or bf16 [tokens, count * rank], all of it written. lr_a: f16 [count, columns, rank].
void mq_lowrank_down(const smooth_t *s, int64_t tokens, const int32_t *modality,
                     const uint16_t *lr_a, int64_t count, int64_t rank, void *h, int h_type,
                     int threads) {
  const isa_t *isa = isa_here();
  int64_t columns = s->columns, padded = ceil_div(columns, GROUP) * GROUP;
  int64_t panels = ceil_div(rank, PANEL), width = count * rank;
  int64_t most = least(ROWS, least(tokens, HELD / padded + 1));
  memset(h, 0, (size_t)(tokens * width) * (size_t)element_size(h_type));
  int16_t *x = scratch(1, (size_t)(most * padded) * 2);
  float *xs = scratch(2, (size_t)(most * (padded / GROUP)) * 4);
  int64_t row_of[ROWS];
  for (int m = 1; m <= count; m++)
    for (int64_t next = 0; next < tokens;) {
      int64_t rows = 0;
      for (; next < tokens && rows < most; next++)
        if (modality[next] == m) row_of[rows++] = next;
      if (!rows) continue;
      int used = threads_for(rows * columns * 4, threads);
#pragma omp parallel for num_threads(used)
      for (int64_t i = 0; i < rows; i++) {
        float *u = scratch(0, (size_t)(padded + BLOCK) * 4);
        smooth_row(s, row_of[i], m, u);
        for (int64_t k = columns; k < padded; k++) u[k] = 0;
        for (int64_t k = 0; k < padded; k += GROUP)
          xs[i * (padded / GROUP) + k / GROUP] = to_block(u + k, x + i * padded + k);
      }
#pragma omp parallel for num_threads(threads_for(rows * columns * rank, threads)) schedule(dynamic)
      for (int64_t task = 0; task < panels * ceil_div(rows, TASK); task++) {
        int64_t first = task % panels * PANEL, wide = least(PANEL, rank - first);
        int64_t from = task / panels * TASK, some = least(TASK, rows - from);
        int16_t *w = scratch(3, SLICE * PANEL * 2);
        float *ws = scratch(4, SLICE / GROUP * PANEL * 4);
        float *out = scratch(5, TASK * PANEL * 4);
        memset(out, 0, TASK * PANEL * 4);
        const uint16_t *factor = lr_a + (m - 1) * columns * rank + first;
        for (int64_t k = 0; k < padded; k += SLICE) {
          int64_t depth = least(SLICE, padded - k);
          to_panel(factor + k * rank, rank, least(depth, columns - k), wide, w, ws);
          isa->panel(x + from * padded + k, xs + (from * padded + k) / GROUP, padded,
                     padded / GROUP, (int)some, w, ws, depth, wide, out);
        }
        for (int64_t i = 0; i < some; i++)
          for (int64_t r = 0; r < wide; r++)
            store1(h, row_of[from + i] * width + (m - 1) * rank + first + r, out[i * PANEL + r],
                   h_type);
      }
    }
}
