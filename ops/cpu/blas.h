// OpenBLAS with one thread: a product runs on the thread that calls it, since the kernels split work over threads themselves. Threads of
// OpenBLAS would wait for those of OpenMP, and would split a product by their number, which changes the rounding.
#pragma once
#include <cblas.h>

#include <cstdint>

namespace blas {

struct OneThread {
  OneThread() { scipy_openblas_set_num_threads(1); }
};
static const OneThread one_thread;

enum Side : char { AS_IS, TURNED };

// c [m, n] = a [m, k] @ b [k, n], or c + that. Rows are lda, ldb, ldc elements apart. A matrix that is TURNED is stored as its transpose.
static inline void product(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, Side of_a, const float *b, int64_t ldb, Side of_b,
                           float *c, int64_t ldc, bool add) {
  scipy_cblas_sgemm(CblasRowMajor, of_a == TURNED ? CblasTrans : CblasNoTrans, of_b == TURNED ? CblasTrans : CblasNoTrans,
                    static_cast<blasint>(m), static_cast<blasint>(n), static_cast<blasint>(k), 1.0f, a, static_cast<blasint>(lda), b,
                    static_cast<blasint>(ldb), add ? 1.0f : 0.0f, c, static_cast<blasint>(ldc));
}

}  // namespace blas
