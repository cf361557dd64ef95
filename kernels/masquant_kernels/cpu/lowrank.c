// h = u @ lr_a[m-1] for the tokens of modality m; tokens of the base modality cost nothing.
#include <math.h>
#include <omp.h>

#include "lowrank.h"
#include "smooth.h"

#define ROWS 1024       // tokens whose integers are held at once,
#define HELD (1 << 23)  // or fewer, if they were more integers than this
#define TASK 128        // tokens of a task where panels of columns alone would be too few tasks
#define SLICE 256       // inputs of lr_a that are converted at once: 16 KiB, which stay in cache

// Eight halves, where memory ends before them zeros; past the end of a row they are the next row's.
INLINE f8 halves(const uint16_t *p, const uint16_t *end) {
  if (p + LANES <= end) return load8(p, 0, F16);
  uint16_t some[LANES] = {0};
  if (p < end) memcpy(some, p, (size_t)(end - p) * 2);
  return load8(some, 0, F16);
}

void to_panel(const factor_t *f, int64_t depth, int64_t columns, int16_t *w, float *ws) {
  const __m256i low = _mm256_set1_epi32(0xffff);
  int vectors = (int)ceil_div(columns, LANES);
  for (int64_t from = 0; from < depth; from += GROUP, w += GROUP * PANEL, ws += PANEL) {
    f8 rows[GROUP][PANEL / LANES], most[PANEL / LANES];
    for (int j = 0; j < vectors; j++) most[j] = splat(0);
    for (int k = 0; k < GROUP; k++)
      for (int j = 0; j < vectors; j++) {
        const uint16_t *p = f->first + (from + k) * f->stride + LANES * j;
        rows[k][j] = from + k < depth ? halves(p, f->end) : splat(0);
        most[j] = (f8)_mm256_max_ps((__m256)most[j], (__m256)abs8(rows[k][j]));
      }
    for (int j = 0; j < vectors; j++) {
      __m256 zero = _mm256_cmp_ps((__m256)most[j], _mm256_set1_ps(TINY), _CMP_LT_OQ);
      f8 by = (f8)_mm256_andnot_ps(zero, (__m256)((float)LIMIT / most[j]));
      _mm256_storeu_ps(ws + LANES * j, (__m256)(most[j] / (float)LIMIT));
      for (int p = 0; p < GROUP / 2; p++) {
        __m256i a = _mm256_cvtps_epi32((__m256)(rows[2 * p][j] * by));
        __m256i b = _mm256_cvtps_epi32((__m256)(rows[2 * p + 1][j] * by));
        a = _mm256_or_si256(_mm256_and_si256(a, low), _mm256_slli_epi32(b, 16));
        _mm256_storeu_si256((__m256i *)(w + (p * PANEL + LANES * j) * 2), a);
      }
    }
  }
}

void few_tokens(const float *x, int64_t x_stride, int64_t tokens, const factor_t *f, int64_t depth,
                int64_t columns, float *out) {
  int vectors = (int)ceil_div(columns, LANES);
  for (int64_t t = 0; t < tokens; t++, x += x_stride, out += PANEL) {
    f8 sum[PANEL / LANES];
    for (int j = 0; j < vectors; j++) sum[j] = splat(0);
    for (int64_t k = 0; k < depth; k++)
      for (int j = 0; j < vectors; j++)
        sum[j] += x[k] * halves(f->first + k * f->stride + LANES * j, f->end);
    for (int j = 0; j < vectors; j++) _mm256_storeu_ps(out + LANES * j, (__m256)sum[j]);
  }
}

// The tokens of one modality, `rows` of them, made ready for products with lr_a.
typedef struct {
  float *u;    // [rows][padded], few of them
  int16_t *x;  // or [rows][padded] with
  float *xs;   // [rows][padded / GROUP]
  int64_t rows, padded;
} inputs_t;

static void ready_row(const smooth_t *s, const inputs_t *in, int64_t i, int64_t row, int m) {
  float *u = in->u ? in->u + i * in->padded : scratch(0, (size_t)in->padded * 4);
  smooth_row(s, row, m, u);
  for (int64_t k = s->columns; k < in->padded; k++) u[k] = 0;
  for (int64_t k = 0; !in->u && k < in->padded; k += GROUP)
    in->xs[(i * in->padded + k) / GROUP] = to_block(u + k, in->x + i * in->padded + k);
}

// out[some][PANEL] = inputs from.. times a panel of lr_a
static void multiply(const inputs_t *in, int64_t from, int64_t some, const factor_t *f,
                     int64_t depth, int64_t wide, float *out) {
  if (in->u) {
    few_tokens(in->u + from * in->padded, in->padded, some, f, depth, wide, out);
    return;
  }
  int16_t *w = scratch(3, SLICE * PANEL * 2);
  float *ws = scratch(4, SLICE / GROUP * PANEL * 4);
  memset(out, 0, (size_t)(some * PANEL) * 4);
  for (int64_t k = 0; k < in->padded; k += SLICE) {
    factor_t slice = {f->first + k * f->stride, f->end, f->stride};
    to_panel(&slice, least(SLICE, depth - k), wide, w, ws);
    isa_here()->panel(in->x + from * in->padded + k, in->xs + (from * in->padded + k) / GROUP,
                      in->padded, in->padded / GROUP, (int)some, w, ws,
                      least(SLICE, in->padded - k), wide, out);
  }
}

// h: f32 or bf16 [tokens, count * rank], all of it written. lr_a: f16 [count, columns, rank].
void mq_lowrank_down(const smooth_t *s, int64_t tokens, const int32_t *modality,
                     const uint16_t *lr_a, int64_t count, int64_t rank, void *h, int h_type,
                     int threads) {
  int64_t columns = s->columns, padded = ceil_div(columns, GROUP) * GROUP;
  int64_t panels = ceil_div(rank, PANEL), width = count * rank;
  int64_t most = least(ROWS, least(tokens, HELD / padded + 1)), row_of[ROWS];
  memset(h, 0, (size_t)(tokens * width) * (size_t)element_size(h_type));
  for (int m = 1; m <= count; m++)
    for (int64_t next = 0; next < tokens;) {
      int64_t rows = 0;
      for (; next < tokens && rows < most; next++)
        if (modality[next] == m) row_of[rows++] = next;
      if (!rows) continue;
      inputs_t in = {.rows = rows, .padded = padded};
      if (rows < FEW) {
        in.u = scratch(1, (size_t)(rows * padded) * 4);
      } else {
        in.x = scratch(1, (size_t)(rows * padded) * 2);
        in.xs = scratch(2, (size_t)(rows * (padded / GROUP)) * 4);
      }
      // Panels are shared among threads, tokens too where panels are few.
      int64_t together = panels < 2 * threads ? TASK : rows;
      int used = threads_for(rows * columns * rank, threads);
#pragma omp parallel num_threads(used)
      {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) ready_row(s, &in, i, row_of[i], m);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < panels * ceil_div(rows, together); task++) {
          int64_t first = task % panels * PANEL, wide = least(PANEL, rank - first);
          int64_t from = task / panels * together, some = least(together, rows - from);
          const uint16_t *start = lr_a + (m - 1) * columns * rank;
          factor_t factor = {start + first, start + columns * rank, rank};
          float *out = scratch(5, (size_t)(some * PANEL) * 4);
          multiply(&in, from, some, &factor, columns, wide, out);
          for (int64_t i = 0; i < some; i++) {
            int64_t place = row_of[from + i] * width + (m - 1) * rank + first;
            for (int64_t r = 0; r < wide; r++)
              store1(h, place + r, out[i * PANEL + r], h_type);
          }
        }
      }
    }
}
