#pragma once
#include <stdint.h>

// The input of a site. Field order is known to cpu/__init__.py.
typedef struct {
  const void *x;            // [T, columns], rows x_stride elements apart
  const void *up;           // NULL, or like x: silu(x) * up
  const float *smooth_inv;  // [M, columns]
  const float *norm_weight; // NULL, or [columns]: RMSNorm
  int64_t x_stride, up_stride, columns;
  float eps;
  int type;  // dtype_t of x and up
} smooth_t;

// u[columns] of one token of modality m
void smooth_row(const smooth_t *s, int64_t row, int m, float *u);
