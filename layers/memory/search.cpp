// The k best of all pairs of product keys, for rows of scores on a CPU: of each row of scores of
// either side, what PairSearch of search.hpp finds. Plain C ABI, no torch headers.

#include "search.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

struct MoeZooProductSearch {  // layers/memory/native.py: Job
  const float *rows, *cols;   // [count, n]
  const int32_t *i, *j;       // the pairs of places to look at
  int64_t* slots;             // [count, k]
  int64_t count, n, k, m, pairs;
  int32_t threads;
};

extern "C" int moe_zoo_product_search(const MoeZooProductSearch* job) {
  const int64_t n = job->n, k = job->k;
#pragma omp parallel num_threads(job->threads)
  {
    PairSearch search(int(n), int(k), int(job->m), int(job->pairs), job->i, job->j);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < job->count; r++)
      search(job->rows + r * n, job->cols + r * n, job->slots + r * k);
  }
  return 0;
}
