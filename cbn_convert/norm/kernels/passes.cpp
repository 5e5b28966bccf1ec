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

// Carried.moved of carried.py: statistics at other weights. out [5, C]: mean, var, anchor, spread, square.
template <class T>
void move(const T* theta, const T* bias, const T* patch_mean, const T* patch_var, const T* mean, const T* var,
          const T* anchor, const T* spread, const T* square, T* out, int64_t C, int64_t F, int64_t per_group,
          double least, int threads) {
  const T floor = T(least);
#pragma omp parallel for num_threads(threads) if (C * F > SMALL)
  for (int64_t c = 0; c < C; ++c) {
    const int64_t at = (c / per_group) * F;
    const T *row = theta + c * F, *p = patch_mean + at, *d = patch_var + at;
    double along = bias ? double(bias[c]) : 0, across = 0, length = 0;
    for (int64_t start = 0; start < F; start += BLOCK) {
      const int64_t end = start + BLOCK < F ? start + BLOCK : F;
      T a = 0, b = 0, s = 0;
#pragma omp simd reduction(+ : a, b, s)
      for (int64_t f = start; f < end; ++f) {
        const T w = row[f] * row[f];
        a += row[f] * p[f];
        b += w * d[f];
        s += w;
      }
      along += a;
      across += b;
      length += s;
    }
    const T a = T(along), q = T(across) < floor ? floor : T(across), l = T(length) < floor ? floor : T(length);
    T m = mean[c] + (a - anchor[c]) + (std::sqrt(l / square[c]) - 1) * (mean[c] - anchor[c]), v = var[c] * (q / spread[c]);
    if (square[c] <= floor && l > floor) m = a, v = q;
    out[c] = m, out[C + c] = v, out[2 * C + c] = a, out[3 * C + c] = q, out[4 * C + c] = l;
  }
}

// From g, the gradient of the rows scale * theta, that of theta in its place; t is what the scale gets of it. The
// per-channel vectors are those of FoldGradient in functional.py. Nothing goes through M and S where patch_mean is null.
template <class T>
void folded_gradient(const T* theta, T* g, const T* patch_mean, const T* patch_var, const T* scale, const T* inv_std,
                     const T* away, const T* g_shift, const T* along_length, const T* along_spread, T* t, int64_t C,
                     int64_t F, int64_t per_group, int threads) {
#pragma omp parallel for num_threads(threads) if (C * F > SMALL)
  for (int64_t c = 0; c < C; ++c) {
    const T* row = theta + c * F;
    T* to = g + c * F;
    double sum = double(g_shift[c]) * away[c];
    for (int64_t start = 0; start < F; start += BLOCK) {
      const int64_t end = start + BLOCK < F ? start + BLOCK : F;
      T part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t f = start; f < end; ++f) part += row[f] * to[f];
      sum += part;
    }
    t[c] = T(sum);
    const double s = scale[c];
    if (!patch_mean) {
#pragma omp simd
      for (int64_t f = 0; f < F; ++f) to[f] *= T(s);
      continue;
    }
    const T *p = patch_mean + (c / per_group) * F, *d = patch_var + (c / per_group) * F;
    const double g_mean = -s * g_shift[c], g_var = -0.5 * s * sum * inv_std[c] * inv_std[c];
    const T a = T(s), b = T(g_mean), k = T(g_mean * along_length[c]), v = T(g_var * along_spread[c]);
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
  void cbn_move_##name(const T* theta, const T* bias, const T* patch_mean, const T* patch_var, const T* mean,       \
                       const T* var, const T* anchor, const T* spread, const T* square, T* out, int64_t C,          \
                       int64_t F, int64_t per_group, double least, int threads) {                                   \
    move(theta, bias, patch_mean, patch_var, mean, var, anchor, spread, square, out, C, F, per_group, least,        \
         threads);                                                                                                  \
  }                                                                                                                 \
  void cbn_folded_gradient_##name(const T* theta, T* g, const T* patch_mean, const T* patch_var, const T* scale,    \
                                  const T* inv_std, const T* away, const T* g_shift, const T* along_length,         \
                                  const T* along_spread, T* t, int64_t C, int64_t F, int64_t per_group,             \
                                  int threads) {                                                                    \
    folded_gradient(theta, g, patch_mean, patch_var, scale, inv_std, away, g_shift, along_length, along_spread, t,  \
                    C, F, per_group, threads);                                                                      \
  }

extern "C" {
int cbn_version() { return 5; }  // to be raised with every change of a signature
EXPORT(float, f32)
EXPORT(double, f64)
}
