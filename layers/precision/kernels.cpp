// Number formats for CPU rows x columns, equal bit for bit to the torch ops of quantize.py.
// Plain C ABI, no torch headers. Build without -ffast-math and with -ffp-contract=off: every
// operation here and in the headers is one float32 operation of the definition, in the same order.

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "better.hpp"
#include "eden.hpp"
#include "elements.hpp"
#include "hif4.hpp"
#include "rotation.hpp"

namespace {

using namespace zoo;

struct Segment {
  int64_t begin = 0, end = 0;               // rows of x
  int64_t out_begin = 0, out_end = 0;       // rows of out
  int64_t first_band = 0;
  Upper above;
};

// How the rows of out are walked: bands of rows within a segment, tiles of columns within a band.
struct Plan {
  std::vector<Segment> segments;
  std::vector<float> enc, dec;  // [segments, out_cols], scales above each column
  int64_t bands = 0, tile_cols = 0;
  int band_rows = 1;
};

// Calls work(segment, row of out, rows, first column, columns, tile) on bands [first, last).
template <class Work>
void walk(const Job& job, const Plan& plan, int64_t first, int64_t last, Work work) {
  Reader read(job, plan.band_rows * plan.tile_cols);
  size_t at = 0;
  for (int64_t band = first; band < last; band++) {
    while (at + 1 < plan.segments.size() && plan.segments[at + 1].first_band <= band) at++;
    const Segment& s = plan.segments[at];
    const int64_t offset = (band - s.first_band) * plan.band_rows, row = s.out_begin + offset;
    const int rows = int(least(plan.band_rows, s.out_end - row));
    for (int64_t from = 0; from < job.out_cols; from += plan.tile_cols) {
      const int64_t n = least(plan.tile_cols, job.out_cols - from);
      work(at, row, rows, from, n, read(s.begin + offset, s.end, rows, from, n));
    }
  }
}

// Calls work(first, last) with an equal share of n items for each thread.
template <class Work>
void share(int threads, int64_t n, Work work) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t of = omp_get_num_threads(), me = omp_get_thread_num();
      work(n * me / of, n * (me + 1) / of);
    }
    return;
  }
#endif
  work(0, n);
}

void raise(std::atomic<int32_t>& found, int32_t peak) {
  int32_t seen = found.load(std::memory_order_relaxed);
  while (seen < peak && !found.compare_exchange_weak(seen, peak, std::memory_order_relaxed)) {}
}

// The largest magnitude of each segment, or of each column of each segment.
std::vector<std::atomic<int32_t>> peaks(const Job& job, const Plan& plan) {
  const bool by_column = job.level == kColumn;
  std::vector<std::atomic<int32_t>> found(plan.segments.size() * (by_column ? job.out_cols : 1));
  share(job.threads, plan.bands, [&](int64_t first, int64_t last) {
    std::vector<int32_t> column(by_column ? plan.tile_cols : 0);
    walk(job, plan, first, last,
             [&](size_t at, int64_t, int rows, int64_t from, int64_t n, Tile t) {
      if (!by_column) {
        int32_t peak = 0;
        for (int r = 0; r < rows; r++) peak = larger(peak, peak_of<64>(t.at + r * t.stride, n));
        return raise(found[at], peak);
      }
      std::fill(column.begin(), column.end(), 0);
      for (int r = 0; r < rows; r++)
        for (int64_t c = 0; c < n; c++)
          column[c] = larger(column[c], bits(t.at[r * t.stride + c]) & kSize);
      for (int64_t c = 0; c < n; c++) raise(found[at * job.out_cols + from + c], column[c]);
    });
  });
  return found;
}

// The scales above the blocks that span more than a row.
void find_above(const Job& job, Plan& plan) {
  if (job.given) {
    for (size_t i = 0; i < plan.segments.size(); i++) {
      const float dec = int64_t(i) < job.segments ? job.given[i] : 1.0f;
      plan.segments[i].above = {1.0f / dec, dec};
      if (int64_t(i) < job.segments) job.scale[i] = dec;
    }
    return;
  }
  if (job.level == kSegment) {
    const auto found = peaks(job, plan);
    for (size_t i = 0; i < plan.segments.size(); i++) {
      plan.segments[i].above = upper_of(found[i].load(), job.rule, job.top);
      if (int64_t(i) < job.segments) job.scale[i] = plan.segments[i].above.dec;
    }
  }
  if (job.level == kColumn) {
    const auto found = peaks(job, plan);
    plan.enc.resize(found.size()), plan.dec.resize(found.size());
    for (size_t i = 0; i < found.size(); i++) {
      const Upper above = upper_of(found[i].load(), job.rule, job.top);
      plan.enc[i] = above.enc, plan.dec[i] = above.dec;
      if (int64_t(i) < job.segments * job.out_cols) job.scale[i] = above.dec;
    }
  }
}

// Fills out with what `Blocks` makes of each row, or of each band of block_rows rows.
template <class Blocks, class Round>
void quantize(const Job& job, const Plan& plan, const Round& round) {
  auto* const out = static_cast<typename Blocks::Out*>(job.out);
  share(job.threads, plan.bands, [&](int64_t first, int64_t last) {
    Blocks blocks(job, round);
    float enc[kMostCols], dec[kMostCols];
    walk(job, plan, first, last,
             [&](size_t at, int64_t row, int rows, int64_t from, int64_t n, Tile t) {
      Upper above = plan.segments[at].above;
      const int64_t begin = row * job.out_cols + from;
      if (job.block_rows == 1) {
        if (job.level == kRow) {
          above = upper_of(peak_of<64>(t.at, n), job.rule, job.top);
          job.scale[row] = above.dec;
        }
        return blocks.row(t.at, out + begin, n, uint32_t(begin), above);
      }
      for (int64_t c = 0; c < n && job.level != kColumn; c++) enc[c] = above.enc, dec[c] = above.dec;
      const size_t column = at * job.out_cols + from;
      const Above columns = job.level == kColumn ? Above{&plan.enc[column], &plan.dec[column]}
                                                 : Above{enc, dec};
      for (int r = 0; r < rows; r += job.block_rows) {
        const int64_t skip = r * job.out_cols;
        blocks.band(t.at + r * t.stride, t.stride, out + begin + skip,
                    int(least(job.block_rows, rows - r)), int(n), uint32_t(begin + skip), columns);
      }
    });
  });
}

template <template <class, class> class Blocks, class Out>
void round(const Job& job, const Plan& plan) {
  const Grid grid(job.mantissa_bits, job.min_exponent, job.largest);
  if (job.key)
    quantize<Blocks<Stochastic, Out>>(job, plan, Stochastic{grid, {*job.key, job.operand}});
  else
    quantize<Blocks<Nearest, Out>>(job, plan, Nearest{grid});
}

template <class Out>
void hif4(const Job& job, const Plan& plan) {
  if (job.key)
    quantize<Units<StochasticK, Out>>(job, plan, StochasticK{{*job.key, job.operand}});
  else
    quantize<Units<HalfAway, Out>>(job, plan, HalfAway{});
}

template <class Out>
void eden(const Job& job, const Plan& plan) {
  const Grid grid(job.mantissa_bits, job.min_exponent, job.largest);
  quantize<Eden<Stochastic, Out>>(job, plan, Stochastic{grid, {*job.key, job.operand}});
}

// The rotation alone.
template <class Out>
void copy(const Job& job, const Plan& plan) {
  share(job.threads, plan.bands, [&](int64_t first, int64_t last) {
    walk(job, plan, first, last,
             [&](size_t, int64_t row, int rows, int64_t from, int64_t n, Tile t) {
      Out* out = static_cast<Out*>(job.out) + row * job.out_cols + from;
      for (int r = 0; r < rows; r++)
        for (int64_t c = 0; c < n; c++) store(out + r * job.out_cols + c, t.at[r * t.stride + c]);
    });
  });
}

template <class Out>
void run(const Job& job, Plan& plan) {
  if (job.rule == kRotate) return copy<Out>(job, plan);
  if (job.rule == kHiF4) return hif4<Out>(job, plan);
  find_above(job, plan);
  if (job.rule == kEden) return eden<Out>(job, plan);
  if (job.rule == kThreeQuarters) return round<Shrunk, Out>(job, plan);
  if (job.rule < kTwoLevel) return round<Microscaling, Out>(job, plan);
  if (job.rule == kTwoLevel) return round<TwoLevel, Out>(job, plan);
  if (job.rule < kScaled) return round<Better, Out>(job, plan);
  round<Scaled, Out>(job, plan);
}

// Segments of x and of out. Returns whether the ends rise within the rows.
bool lay_out(const Job& job, Plan& plan) {
  const int64_t step = job.axis == -2 && job.hadamard ? job.hadamard : 1;
  int64_t begin = 0, out_begin = 0;
  for (int64_t i = 0; i <= job.segments; i++) {  // one more for rows past the last end
    const bool last = i == job.segments;
    Segment s;
    s.begin = begin, s.end = last ? job.rows : job.ends[i];
    if (s.end < s.begin || s.end > job.rows) return false;
    if (last && step > 1) s.end = s.begin;  // those rows are left out
    s.out_begin = out_begin;
    s.out_end = last ? job.out_rows : out_begin + (s.end - s.begin + step - 1) / step * step;
    begin = s.end, out_begin = s.out_end;
    if (!last && job.moved) job.moved[i] = s.out_end;
    s.first_band = plan.bands;
    plan.bands += (s.out_end - s.out_begin + plan.band_rows - 1) / plan.band_rows;
    plan.segments.push_back(s);
  }
  return true;
}

constexpr int kTileNumbers = 1 << 14;  // of a band: 64 KiB, in the second-level cache

}  // namespace

// 0 when done, 1 for ends that fall or leave the rows, 2 for an unknown rule, block or rotation.
extern "C" int moe_zoo_quantize(const MoeZooJob* given) {
  Job job = *given;
  const int d = job.hadamard;
  if (job.rule < 0 || job.rule >= kRules || job.block_rows < 1 || job.block_cols < 1 ||
      (job.block_rows > 1 && job.block_cols > kMostCols) || d > 256 || (d & (d - 1)))
    return 2;
  if (only_above(job) || job.rule == kRotate) {  // blocks say nothing then
    const bool columns = job.axis == -2 && (job.level == kColumn || d);
    job.block_rows = columns ? 32 : 1, job.block_cols = columns ? 1 : 1024;
  }
  if (job.rule == kEden && (!job.key || d < kEdenBlock)) return 2;
  if (job.rule == kEden && job.axis == -2) job.block_rows = d;  // a tile's blocks at once
  Plan plan;
  plan.tile_cols = job.out_cols;
  if (job.block_rows > 1) {
    plan.band_rows = larger(job.block_rows, job.axis == -2 ? d : 1);
    const int step = larger(job.block_cols, larger(job.axis == -1 ? d : 1, kLanes));
    plan.tile_cols = larger(step, smaller(kMostCols, kTileNumbers / plan.band_rows) / step * step);
  }
  if (!lay_out(job, plan)) return 1;
  job.out_bf16 ? run<uint16_t>(job, plan) : run<float>(job, plan);
  return 0;
}
