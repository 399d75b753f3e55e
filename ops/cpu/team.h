// Runs a task of microseconds in stages, each of which uses the results of the previous one. Threads take pieces of a stage dynamically, so
// that a thread that wakes late does not delay the others. The result of a piece does not depend on the thread.
#pragma once
#include <atomic>
#include <thread>

#include "few_rows.h"
#include "int8.h"

class Team {
 public:
  explicit Team(int threads) : threads(threads) {}

  // One thread's way through the stages.
  class Worker {
   public:
    explicit Worker(Team &team) : team(team) {}

    // f(i) for i in 0 ... pieces - 1, each on one thread; returns when all are done.
    template <typename F>
    void stage(int64_t pieces, F f) {
      const int64_t start = end;
      end += pieces;
      for (int64_t i = team.next.load(); i < end; i = team.next.load()) {
        if (!team.next.compare_exchange_weak(i, i + 1)) continue;
        f(i - start);
        team.done.fetch_add(1);
      }
      for (int spins = 0; team.done.load() < end; spins++)
        if (spins > 1000) std::this_thread::yield();
    }

   private:
    Team &team;
    int64_t end = 0;  // of the stages so far, in pieces
  };

  // f(worker) on each thread
  template <typename F>
  void run(F f) {
#pragma omp parallel num_threads(threads)
    {
      Worker worker(*this);
      f(worker);
    }
  }

 private:
  const int threads;
  alignas(64) std::atomic<int64_t> next{0};  // pieces of all stages that were taken
  alignas(64) std::atomic<int64_t> done{0};
};

// Columns of a product of few rows, in pieces.
struct Columns {
  int64_t n, piece;

  Columns(int64_t n, int threads) : n(n), piece(few::piece(n, threads)) {}
  int64_t pieces() const { return (n + piece - 1) / piece; }
  int64_t first(int64_t i) const { return i * piece; }
  int64_t last(int64_t i) const { return std::min(n, (i + 1) * piece); }
};

// to [m, n] = x [m, k] w [k, n] in these columns
static inline void multiply(const Columns &columns, int64_t i, int64_t m, int64_t k, const float *x, const float *w, float *to) {
  few::columns(m, columns.n, k, x, w, columns.first(i), columns.last(i), to);
}

// The same of a matrix [n, k] in 8 bits
static inline void multiply(const Columns &columns, int64_t i, int64_t m, int64_t, const float *x, const int8::Matrix &w, float *to) {
  int8::columns(m, columns.n, x, w, columns.first(i), columns.last(i), to);
}

// The same with the residual stream of [m, n] added. W: const float *, or int8::Matrix
template <typename W>
static inline void multiply_add(const Columns &columns, int64_t i, int64_t m, int64_t k, const float *x, const W &w,
                                const float *residual, float *to) {
  multiply(columns, i, m, k, x, w, to);
  for (int64_t r = 0; r < m; r++)
#pragma omp simd
    for (int64_t c = columns.first(i); c < columns.last(i); c++) to[r * columns.n + c] += residual[r * columns.n + c];
}
