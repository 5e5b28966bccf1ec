// What kernels/compiled.py calls on the CPU: statistics of activations x [N, C, P], contiguous, and passes over weights
// [C, F]. Sums are in the type of the tensor within a block and in double beyond, as exact as pairwise summation.

#include <cmath>
#include <cstdint>

namespace {

constexpr int64_t BLOCK = 2048;
constexpr int64_t SMALL = 65536;  // work that is not worth waking other threads for

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
      double along = b, across = 0, length = 0;
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
      const T a = T(along), q = T(across) < floor ? floor : T(across), l = T(length) < floor ? floor : T(length);
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

// one C function per template and type
#define EXPORT(T, name)                                                                                             \
  void cbn_statistics_##name(const T* x, T* mean, T* var, int64_t N, int64_t C, int64_t P, int threads) {           \
    statistics(x, mean, var, N, C, P, threads);                                                                     \
  }                                                                                                                 \
  void cbn_fold_##name(const T* theta, const T* bias, const T* patch_mean, const T* patch_var, const T* table,       \
                       const T* gamma, const T* beta, T* out, T* rows, T* running_mean, T* running_var, int64_t C,  \
                       int64_t F, int64_t per_group, double eps, double least, int threads) {                       \
    fold(theta, bias, patch_mean, patch_var, table, gamma, beta, out, rows, running_mean, running_var, C, F,        \
         per_group, eps, least, threads);                                                                           \
  }                                                                                                                 \
  void cbn_folded_gradient_##name(const T* theta, const T* bias, const T* patch_mean, const T* patch_var,           \
                                  const T* table, const T* gamma, T* g, const T* g_shift, T* g_gamma, int64_t C,    \
                                  int64_t F, int64_t per_group, double eps, double least, int threads) {            \
    folded_gradient(theta, bias, patch_mean, patch_var, table, gamma, g, g_shift, g_gamma, C, F, per_group, eps,    \
                    least, threads);                                                                                \
  }

extern "C" {
int cbn_version() { return 6; }  // to be raised with every change of a signature
EXPORT(float, f32)
EXPORT(double, f64)
}
