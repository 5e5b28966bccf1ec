// What kernels/compiled.py calls on the CPU: statistics of activations x [N, C, P], contiguous, and of the patches of a
// conv's input, and passes over weights [C, F]. Sums are in the type of the tensor within a block and in double beyond, as exact as pairwise summation.

#include <cmath>
#include <cstdint>

namespace {

constexpr int64_t BLOCK = 2048;
constexpr int64_t SMALL = 65536;  // work that is not worth waking other threads for

// What a function is given: addresses, 0 for what is not there, integers and doubles.
struct Arguments {
  int64_t slots[1];  // and more

  int64_t operator[](int i) const { return slots[i]; }
  double number(int i) const { return reinterpret_cast<const double*>(slots)[i]; }
  template <class T> const T* in(int i) const { return reinterpret_cast<const T*>(slots[i]); }
  template <class T> T* out(int i) const { return reinterpret_cast<T*>(slots[i]); }
  const struct Axis& axis(int i) const { return *reinterpret_cast<const Axis*>(slots + i); }
};

template <class T>
void shifted_sums(const T* x, int64_t n, T shift, double& sum, double& square) {
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t end = start + BLOCK < n ? start + BLOCK : n;
    T s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
    for (int64_t i = start; i < end; ++i) {
      const T d = x[i] - shift;
      s += d;
      q += d * d;
    }
    sum += s;
    square += q;
  }
}

template <class T>
void statistics(const T* x, T* mean, T* var, int64_t N, int64_t C, int64_t P, int threads) {
#pragma omp parallel for num_threads(threads) if (N * C * P > SMALL)
  for (int64_t c = 0; c < C; ++c) {
    // The sums are of distances to a first guess of the mean: those of x itself would lose the variance beside the mean.
    const int64_t first = P < BLOCK ? P : BLOCK;
    double sum = 0, square = 0;
    shifted_sums(x + c * P, first, T(0), sum, square);
    const T guess = T(sum / first);
    sum = square = 0;
    for (int64_t n = 0; n < N; ++n) shifted_sums(x + (n * C + c) * P, P, guess, sum, square);
    const double count = double(N) * P, rest = sum / count;
    mean[c] = T(guess + rest);
    const double v = square / count - rest * rest;
    var[c] = T(v < 0 ? 0 : v);
  }
}

// One axis of a conv's input, and the positions of its output that are looked at: `count` from `first` on, `step` apart.
struct Axis {
  int64_t size, memory, kernel, stride, padding, dilation, first, step, count;

  // Where the patch of position i has its k-th entry; outside of the input there are zeros.
  int64_t at(int64_t i, int64_t k) const { return (first + i * step) * stride - padding + k * dilation; }
};

// Mean and biased variance [C, K_h, K_w] of every entry of the patches of y [N, C, H, W], which may lie in memory in any
// order: steps of `per_image` and `per_channel` numbers.
template <class T>
void patch_moments(const T* y, T* mean, T* var, int64_t N, int64_t C, int64_t per_image, int64_t per_channel,
                   const Axis& h, const Axis& w, int threads) {
  const double count = double(N) * h.count * w.count;
  const int64_t work = N * C * h.kernel * w.kernel * h.count * w.count;
#pragma omp parallel for num_threads(threads) if (work > SMALL)
  for (int64_t c = 0; c < C; ++c) {
    const T* channel = y + c * per_channel;
    for (int64_t kh = 0; kh < h.kernel; ++kh) {
      for (int64_t kw = 0; kw < w.kernel; ++kw) {
        // the positions whose entry is inside
        int64_t begin = 0, end = w.count;
        while (begin < end && w.at(begin, kw) < 0) ++begin;
        while (end > begin && w.at(end - 1, kw) >= w.size) --end;
        const int64_t hop = w.step * w.stride * w.memory;
        double guess = 0, sum = 0, square = 0, inside = 0;
        for (int64_t i = 0; i < h.count; ++i) {
          const int64_t row = h.at(i, kh);
          if (row < 0 || row >= h.size || begin == end) continue;
          const T* first = channel + row * h.memory + w.at(begin, kw) * w.memory;
          if (inside == 0) guess = *first;  // keeps the variance beside a large mean
          for (int64_t n = 0; n < N; ++n) {
            const T* entry = first + n * per_image;
            for (int64_t j = begin; j < end; ++j, entry += hop) {
              const double d = *entry - guess;
              sum += d;
              square += d * d;
            }
          }
          inside += N * (end - begin);
        }
        const double zeros = count - inside;
        const double rest = (sum - zeros * guess) / count, v = (square + zeros * guess * guess) / count - rest * rest;
        const int64_t to = (c * h.kernel + kh) * w.kernel + kw;
        mean[to] = T(guess + rest);
        var[to] = T(v < 0 ? 0 : v);
      }
    }
  }
}

// What weights make of the moments of patches: b + w . p, d . w^2 and w . w.
template <class T>
struct Response {
  double along = 0, across = 0, length = 0;

  Response(const T* row, const T* p, const T* d, int64_t F) {
    for (int64_t start = 0; start < F; start += BLOCK) {
      const int64_t end = start + BLOCK < F ? start + BLOCK : F;
      T a = 0, q = 0, l = 0;
#pragma omp simd reduction(+ : a, q, l)
      for (int64_t f = start; f < end; ++f) {
        const T w = row[f] * row[f];
        a += row[f] * p[f];
        q += w * d[f];
        l += w;
      }
      along += a;
      across += q;
      length += l;
    }
  }
};

// What a carried window at theta, with p and d [G, F], is after a look: `Kernels.join`. Returns whether all is finite.
template <class T>
int join(const T* theta, const T* bias, const T* patch_mean, const T* patch_var, const T* table, const T* found_mean,
         const T* found_var, const T* found_patch_mean, const T* found_patch_var, T* out, T* out_patch_mean,
         T* out_patch_var, int64_t C, int64_t F, int64_t per_group, double share, double of_patches, double least_var,
         double tiny, double least, int threads) {
  const T floor = T(least), part = T(of_patches);
  int finite = 1;
#pragma omp parallel for reduction(&& : finite) num_threads(threads) if (C / per_group * F > SMALL)
  for (int64_t g = 0; g < C / per_group; ++g) {
    const T *p = patch_mean + g * F, *fp = found_patch_mean + g * F, *fd = found_patch_var + g * F;
    const T* d = patch_var + g * F;
    T *to_p = out_patch_mean + g * F, *to_d = out_patch_var + g * F;
    double sum = 0;
    for (int64_t f = 0; f < F; ++f) {
      const T step = fp[f] - p[f];
      to_p[f] = p[f] + part * step;
      to_d[f] = fd[f] + (1 - part) * step * step;
      sum += to_d[f];
    }
    const T at_least = T(least_var * sum / F + tiny);
    for (int64_t f = 0; f < F; ++f) {
      to_d[f] = d[f] + part * (to_d[f] + at_least - d[f]);
      finite = finite && std::isfinite(to_d[f]);  // as it is only where to_p is
    }
  }
#pragma omp parallel for reduction(&& : finite) num_threads(threads) if (C * F > SMALL)
  for (int64_t c = 0; c < C; ++c) {
    const int64_t group = c / per_group * F;
    const Response<T> at(theta + c * F, out_patch_mean + group, out_patch_var + group, F);
    const double mean = table[c], var = table[C + c], step = found_mean[c] - mean;
    out[c] = T(mean + share * step);
    out[C + c] = T(var + share * (found_var[c] - var) + share * (1 - share) * step * step);
    out[2 * C + c] = T(at.along + (bias ? bias[c] : T(0)));
    out[3 * C + c] = T(at.across) < floor ? floor : T(at.across);
    out[4 * C + c] = T(at.length) < floor ? floor : T(at.length);
    finite = finite && std::isfinite(out[c]) && std::isfinite(out[C + c]);
  }
  return finite;
}

// A carried window's statistics at other weights and, where `rows` is given, what folds the norm layer into them.
// table [5, C]: mean, var, anchor, spread, square, or the first two alone without patches, which then stay as they are.
// out [7, C]: the table at theta, the scale s and the shift beta + s (b - M); rows [C, F]: s theta. The running
// statistics, where given, are those of the table at theta, too.
template <class T>
void fold(const T* theta, const T* bias, const T* patch_mean, const T* patch_var, const T* table, const T* gamma,
          const T* beta, T* out, T* rows, T* running_mean, T* running_var, int64_t C, int64_t F, int64_t per_group,
          double eps, double least, int threads) {
  const T floor = T(least);
  const T *mean = table, *var = table + C, *anchor = table + 2 * C, *spread = table + 3 * C, *square = table + 4 * C;
#pragma omp parallel for num_threads(threads) if (C * F > SMALL)
  for (int64_t c = 0; c < C; ++c) {
    const T* row = theta + c * F;
    const T b = bias ? bias[c] : T(0);
    T m = mean[c], v = var[c];
    if (patch_mean) {
      const T *p = patch_mean + (c / per_group) * F, *d = patch_var + (c / per_group) * F;
      const Response<T> at(row, p, d, F);
      const T a = T(at.along + b), q = T(at.across) < floor ? floor : T(at.across),
              l = T(at.length) < floor ? floor : T(at.length);
      m = m + (a - anchor[c]) + (std::sqrt(l / square[c]) - 1) * (m - anchor[c]), v = v * (q / spread[c]);
      if (square[c] <= floor && l > floor) m = a, v = q;
      out[2 * C + c] = a, out[3 * C + c] = q, out[4 * C + c] = l;
    }
    const double inv_std = 1 / std::sqrt(double(v) + eps);
    const T s = T(gamma ? gamma[c] * inv_std : inv_std);
    out[c] = m, out[C + c] = v, out[5 * C + c] = s, out[6 * C + c] = s * (b - m) + (beta ? beta[c] : T(0));
    if (running_mean) running_mean[c] = m, running_var[c] = v;
    if (rows) {
      T* to = rows + c * F;
#pragma omp simd
      for (int64_t f = 0; f < F; ++f) to[f] = s * row[f];
    }
  }
}

// From g, the gradient of the rows s theta, that of theta in its place, and that of gamma. g_shift is that of beta.
// Nothing goes through M and S where patch_mean is null.
template <class T>
void folded_gradient(const T* theta, const T* bias, const T* patch_mean, const T* patch_var, const T* table,
                     const T* gamma, T* g, const T* g_shift, T* g_gamma, int64_t C, int64_t F, int64_t per_group,
                     double eps, double least, int threads) {
#pragma omp parallel for num_threads(threads) if (C * F > SMALL)
  for (int64_t c = 0; c < C; ++c) {
    const T* row = theta + c * F;
    T* to = g + c * F;
    const double mean = table[c], var = table[C + c];
    double t = g_shift[c] * ((bias ? bias[c] : 0.0) - mean);
    for (int64_t start = 0; start < F; start += BLOCK) {
      const int64_t end = start + BLOCK < F ? start + BLOCK : F;
      T part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t f = start; f < end; ++f) part += row[f] * to[f];
      t += part;
    }
    const double inv_std = 1 / std::sqrt(var + eps), s = gamma ? gamma[c] * inv_std : inv_std;
    g_gamma[c] = T(t * inv_std);
    if (!patch_mean) {
#pragma omp simd
      for (int64_t f = 0; f < F; ++f) to[f] *= T(s);
      continue;
    }
    const T *p = patch_mean + (c / per_group) * F, *d = patch_var + (c / per_group) * F;
    const double anchor = table[2 * C + c], spread = table[3 * C + c], square = table[4 * C + c];
    const double g_mean = -s * g_shift[c], g_var = -0.5 * s * t * inv_std * inv_std;
    const T a = T(s), b = T(g_mean), k = square > T(least) ? T(g_mean * (mean - anchor) / square) : T(0),
            v = spread > T(least) ? T(g_var * 2 * var / spread) : T(0);
#pragma omp simd
    for (int64_t f = 0; f < F; ++f) to[f] = a * to[f] + b * p[f] + (k + v * d[f]) * row[f];
  }
}

}  // namespace

// One C function per template and type, which takes its arguments side by side, eight bytes each: a call of one pointer
// costs Python less than one of twenty.
#define EXPORT(T, name)                                                                                             \
  void cbn_statistics_##name(const Arguments& a) {                                                                  \
    statistics(a.in<T>(0), a.out<T>(1), a.out<T>(2), a[3], a[4], a[5], a[6]);                                        \
  }                                                                                                                 \
  void cbn_patch_moments_##name(const Arguments& a) {                                                               \
    patch_moments(a.in<T>(0), a.out<T>(1), a.out<T>(2), a[3], a[4], a[5], a[6], a.axis(7), a.axis(16), a[25]);       \
  }                                                                                                                 \
  int cbn_join_##name(const Arguments& a) {                                                                         \
    return join(a.in<T>(0), a.in<T>(1), a.in<T>(2), a.in<T>(3), a.in<T>(4), a.in<T>(5), a.in<T>(6), a.in<T>(7),       \
                a.in<T>(8), a.out<T>(9), a.out<T>(10), a.out<T>(11), a[12], a[13], a[14], a.number(15), a.number(16),  \
                a.number(17), a.number(18), a.number(19), a[20]);                                                    \
  }                                                                                                                 \
  void cbn_fold_##name(const Arguments& a) {                                                                        \
    fold(a.in<T>(0), a.in<T>(1), a.in<T>(2), a.in<T>(3), a.in<T>(4), a.in<T>(5), a.in<T>(6), a.out<T>(7),             \
         a.out<T>(8), a.out<T>(9), a.out<T>(10), a[11], a[12], a[13], a.number(14), a.number(15), a[16]);             \
  }                                                                                                                 \
  void cbn_folded_gradient_##name(const Arguments& a) {                                                             \
    folded_gradient(a.in<T>(0), a.in<T>(1), a.in<T>(2), a.in<T>(3), a.in<T>(4), a.in<T>(5), a.out<T>(6), a.in<T>(7), \
                    a.out<T>(8), a[9], a[10], a[11], a.number(12), a.number(13), a[14]);                             \
  }

extern "C" {
int cbn_version() { return 8; }  // to be raised with every change of what a function takes
EXPORT(float, f32)
EXPORT(double, f64)
}
