// The CPU's passes over activations x [N, C, P], contiguous, and the per-channel work between them. What they compute is
// written down in cbn_convert/norm/functional.py; kernels/compiled.py calls them. Sums over positions are in the type of
// x within a block and in double beyond, so that they are as exact as pairwise summation.

#include <cmath>
#include <cstdint>

namespace {

constexpr int64_t BLOCK = 2048;
constexpr int64_t SMALL = 65536;  // work that is not worth waking other threads for
constexpr double NEGLIGIBLE = 1e-15;  // as in functional.py

enum Act { NONE, RELU, RELU6 };

template <int act, class T>
inline T activate(T z) {
  if (act != NONE) z = z > 0 ? z : (z == z ? T(0) : z);
  if (act == RELU6) z = z < 6 ? z : (z == z ? T(6) : z);
  return z;
}

// the gradient g taken through the activation, as torch does it at the edges; z is its input
template <int act, class T>
inline T through(T g, T z) {
  if (act == RELU) return z > 0 ? g : T(0);
  if (act == RELU6) return z > 0 && z < 6 ? g : T(0);
  return g;
}

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

template <int act, class T>
void normalize(const T* x, T* y, const T* mean, const T* scale, const T* shift, int64_t N, int64_t C, int64_t P,
               int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) if (N * C * P > SMALL)
  for (int64_t n = 0; n < N; ++n)
    for (int64_t c = 0; c < C; ++c) {
      const T m = mean[c], a = scale[c], b = shift[c];
      const T* from = x + (n * C + c) * P;
      T* to = y + (n * C + c) * P;
#pragma omp simd
      for (int64_t i = 0; i < P; ++i) to[i] = activate<act>((from[i] - m) * a + b);
    }
}

// out: γ's and β's gradient, ∂L/∂M and 2 ∂L/∂S, C numbers each; g_x may be null
template <int act, class T>
void backward(const T* g, const T* x, T* g_x, const T* mean, const T* inv_std, const T* scale, const T* shift, T* out,
              double share, int64_t N, int64_t C, int64_t P, int threads) {
#pragma omp parallel for num_threads(threads) if (N * C * P > SMALL)
  for (int64_t c = 0; c < C; ++c) {
    const T m = mean[c], a = scale[c], b = shift[c];
    double total = 0, products = 0;
    for (int64_t n = 0; n < N; ++n)
      for (int64_t start = 0; start < P; start += BLOCK) {
        const int64_t end = start + BLOCK < P ? start + BLOCK : P;
        const T *gs = g + (n * C + c) * P, *xs = x + (n * C + c) * P;
        T s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
        for (int64_t i = start; i < end; ++i) {
          const T d = xs[i] - m, gi = through<act>(gs[i], d * a + b);
          s += gi;
          q += gi * d;
        }
        total += s;
        products += q;
      }
    const double g_gamma = products * inv_std[c];
    const double g_mean = -double(a) * total, g_var = -double(a) * inv_std[c] * g_gamma;
    out[c] = T(g_gamma);
    out[C + c] = T(total);
    out[2 * C + c] = T(g_mean);
    out[3 * C + c] = T(g_var);
    if (!g_x) continue;
    const T slope = T(share * g_var), constant = T(share * g_mean);
    for (int64_t n = 0; n < N; ++n) {
      const T *gs = g + (n * C + c) * P, *xs = x + (n * C + c) * P;
      T* to = g_x + (n * C + c) * P;
#pragma omp simd
      for (int64_t i = 0; i < P; ++i) {
        const T d = xs[i] - m;
        to[i] = through<act>(gs[i], d * a + b) * a + (slope * d + constant);
      }
    }
  }
}

template <int act, class T>
void input_gradient(const T* g, const T* x, T* g_x, const T* mean, const T* scale, const T* shift, const T* slope,
                    const T* constant, int64_t N, int64_t C, int64_t P, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) if (N * C * P > SMALL)
  for (int64_t n = 0; n < N; ++n)
    for (int64_t c = 0; c < C; ++c) {
      const T m = mean[c], a = scale[c], b = shift[c], s = slope[c], k = constant[c];
      const int64_t at = (n * C + c) * P;
#pragma omp simd
      for (int64_t i = at; i < at + P; ++i) {
        const T d = x[i] - m;
        g_x[i] = through<act>(g[i], d * a + b) * a + (s * d + k);
      }
    }
}

// The past has n iterations; theta is null where it is only averaged. Returns whether mean and var are all finite.
template <class T>
int window(const T* mean, const T* var, const T* past_mean, const T* past_var, const T* anchor, const T* explained,
           const T* patch_mean, const T* covariance, const T* theta, const T* bias, T* M, T* S, T* along, T* pull,
           T* running_mean, T* running_var, int64_t C, int64_t F, int64_t per_group, int64_t n, int64_t slots,
           int taylor, double newest_weight, double momentum, double correction, int threads) {
  int finite = 1;
  for (int64_t c = 0; c < C; ++c) finite &= std::isfinite(mean[c]) && std::isfinite(var[c]);
#pragma omp parallel for num_threads(threads) if (theta && C * F * n > SMALL)
  for (int64_t c = 0; c < C; ++c) {
    double m_sum = 0, mean_c = mean[c], var_c = var[c];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = c * slots + i;
      double m = past_mean[at];
      if (theta) {
        const T *row = theta + c * F, *p = patch_mean + ((c / per_group) * slots + i) * F, *k = covariance + at * F;
        T reply = 0, gain = 0;
#pragma omp simd reduction(+ : reply, gain)
        for (int64_t f = 0; f < F; ++f) {
          reply += row[f] * p[f];
          gain += row[f] * k[f];
        }
        // kept for the second loop, which needs all means first
        pull[c * n + i] = T(double(reply) + (bias ? double(bias[c]) : 0.0) - double(anchor[at]));
        along[c * n + i] = T(double(gain) - double(explained[at]));
        m += pull[c * n + i];
      }
      m_sum += m;
    }
    const double rest = 1 - newest_weight, center = newest_weight * mean_c + rest * m_sum / n;
    double s_sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = c * slots + i;
      double v = past_var[at], spread = double(past_mean[at]) - center;
      if (theta) {
        const double drift = pull[c * n + i], gain = along[c * n + i];
        spread += drift;
        double slope, across = 0;
        if (taylor) {
          v += 2 * gain - drift * drift;
          slope = v > 0;
          across = slope * drift;
          v = v > 0 ? v : (v == v ? 0 : v);
        } else {
          const double inverse = 1 / (explained[at] > NEGLIGIBLE ? double(explained[at]) : NEGLIGIBLE);
          const double growth = 1 + gain * inverse;
          v *= growth;
          slope = v * inverse;
          v *= growth;
        }
        along[c * n + i] = T(slope);
        pull[c * n + i] = T(spread - across);
      }
      s_sum += v + spread * spread;
    }
    const double step = mean_c - center, s = newest_weight * (var_c + step * step) + rest * s_sum / n;
    M[c] = T(center);
    S[c] = T(s);
    if (running_mean && finite) {
      running_mean[c] = T(running_mean[c] + momentum * (center - running_mean[c]));
      running_var[c] = T(running_var[c] + momentum * (s * correction - running_var[c]));
    }
  }
  return finite;
}

template <class T>
void through_the_past(const T* covariance, const T* patch_mean, const T* along, const T* pull, const T* grad_mean,
                      const T* grad_var, T* g_theta, T* g_b, int64_t C, int64_t F, int64_t per_group, int64_t n,
                      int64_t slots, double w, int threads) {
#pragma omp parallel for num_threads(threads) if (C * F * n > SMALL)
  for (int64_t c = 0; c < C; ++c) {
    double b = 0;
    T* to = g_theta + c * F;
    for (int64_t i = 0; i < n; ++i) {
      const T u = T(w * grad_var[c] * along[c * n + i]);
      const T v = T(w * grad_mean[c] + w * grad_var[c] * pull[c * n + i]);
      b += v;
      const T *k = covariance + (c * slots + i) * F, *p = patch_mean + ((c / per_group) * slots + i) * F;
      if (i == 0) {
#pragma omp simd
        for (int64_t f = 0; f < F; ++f) to[f] = u * k[f] + v * p[f];
      } else {
#pragma omp simd
        for (int64_t f = 0; f < F; ++f) to[f] += u * k[f] + v * p[f];
      }
    }
    g_b[c] = T(b);
  }
}

}  // namespace

// one C function per template and type; `act` chooses the instance
#define CHOOSE(f, ...) (act == RELU ? f<RELU>(__VA_ARGS__) : act == RELU6 ? f<RELU6>(__VA_ARGS__) : f<NONE>(__VA_ARGS__))
#define EXPORT(T, name)                                                                                             \
  void cbn_statistics_##name(const T* x, T* mean, T* var, int64_t N, int64_t C, int64_t P, int threads) {           \
    statistics(x, mean, var, N, C, P, threads);                                                                     \
  }                                                                                                                 \
  void cbn_normalize_##name(const T* x, T* y, const T* mean, const T* scale, const T* shift, int64_t N, int64_t C,  \
                            int64_t P, int act, int threads) {                                                      \
    CHOOSE(normalize, x, y, mean, scale, shift, N, C, P, threads);                                                  \
  }                                                                                                                 \
  void cbn_backward_##name(const T* g, const T* x, T* g_x, const T* mean, const T* inv_std, const T* scale,         \
                           const T* shift, T* out, double share, int64_t N, int64_t C, int64_t P, int act,          \
                           int threads) {                                                                           \
    CHOOSE(backward, g, x, g_x, mean, inv_std, scale, shift, out, share, N, C, P, threads);                         \
  }                                                                                                                 \
  void cbn_input_gradient_##name(const T* g, const T* x, T* g_x, const T* mean, const T* scale, const T* shift,     \
                                 const T* slope, const T* constant, int64_t N, int64_t C, int64_t P, int act,       \
                                 int threads) {                                                                     \
    CHOOSE(input_gradient, g, x, g_x, mean, scale, shift, slope, constant, N, C, P, threads);                       \
  }                                                                                                                 \
  int cbn_window_##name(const T* mean, const T* var, const T* past_mean, const T* past_var, const T* anchor,        \
                        const T* explained, const T* patch_mean, const T* covariance, const T* theta,               \
                        const T* bias, T* M, T* S, T* along, T* pull, T* running_mean, T* running_var, int64_t C,   \
                        int64_t F, int64_t per_group, int64_t n, int64_t slots, int taylor, double newest_weight,   \
                        double momentum, double correction, int threads) {                                          \
    return window(mean, var, past_mean, past_var, anchor, explained, patch_mean, covariance, theta, bias, M, S,     \
                  along, pull, running_mean, running_var, C, F, per_group, n, slots, taylor, newest_weight,         \
                  momentum, correction, threads);                                                                   \
  }                                                                                                                 \
  void cbn_through_the_past_##name(const T* covariance, const T* patch_mean, const T* along, const T* pull,         \
                                   const T* grad_mean, const T* grad_var, T* g_theta, T* g_b, int64_t C, int64_t F, \
                                   int64_t per_group, int64_t n, int64_t slots, double w, int threads) {            \
    through_the_past(covariance, patch_mean, along, pull, grad_mean, grad_var, g_theta, g_b, C, F, per_group, n,    \
                     slots, w, threads);                                                                            \
  }

extern "C" {
int cbn_version() { return 1; }  // to be raised with every change of a signature
EXPORT(float, f32)
EXPORT(double, f64)
}
