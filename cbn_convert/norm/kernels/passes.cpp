// What kernels/compiled.py calls on the CPU: statistics of activations x [N, C, P], contiguous, and of the patches of a
// conv's input, and passes over weights [C, F]. Sums are in the type of the tensor within a block and in double beyond, as exact as pairwise summation.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t BLOCK = 2048;
constexpr int64_t SMALL = 65536;  // work that is not worth waking other threads for
constexpr int64_t MOST_AXES = 64;

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
struct Vector {
  typedef T type __attribute__((vector_size(32), aligned(alignof(T)), may_alias));
  static constexpr int64_t WIDTH = 32 / sizeof(T);

  static type load(const T* at) { return *reinterpret_cast<const type*>(at); }
  static T sum(type v) {
    typedef T half __attribute__((vector_size(16)));
    half low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    low += high;
    if constexpr (WIDTH == 8) return (low[0] + low[2]) + (low[1] + low[3]);
    return low[0] + low[1];
  }
};

// Sums of x - shift and of its square, in four vectors each, as one would wait for itself.
template <class T>
void shifted_sums(const T* x, int64_t n, T shift, double& sum, double& square) {
  using V = Vector<T>;
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t end = start + BLOCK < n ? start + BLOCK : n;
    typename V::type sums[4] = {}, squares[4] = {};
    int64_t i = start;
    for (; i + 4 * V::WIDTH <= end; i += 4 * V::WIDTH)
      for (int k = 0; k < 4; ++k) {
        const typename V::type d = V::load(x + i + k * V::WIDTH) - shift;
        sums[k] += d, squares[k] += d * d;
      }
    T s = V::sum((sums[0] + sums[1]) + (sums[2] + sums[3])), q = V::sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < end; ++i) {
      const T d = x[i] - shift;
      s += d, q += d * d;
    }
    sum += s, square += q;
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

// x scale + shift in place, x [N, C, P].
template <class T>
void scale(T* x, const T* by, const T* shift, int64_t N, int64_t C, int64_t P, int threads) {
  if (P == 1) {
#pragma omp parallel for num_threads(threads) if (N * C > SMALL)
    for (int64_t n = 0; n < N; ++n) {
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) x[n * C + c] = x[n * C + c] * by[c] + shift[c];
    }
    return;
  }
#pragma omp parallel for num_threads(threads) if (N * C * P > SMALL)
  for (int64_t i = 0; i < N * C; ++i) {
    const T s = by[i % C], t = shift[i % C];
#pragma omp simd
    for (int64_t j = i * P; j < (i + 1) * P; ++j) x[j] = x[j] * s + t;
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

// a . b, summed as everywhere: in four vectors, as one would wait for itself.
template <class T>
double dot(const T* a, const T* b, int64_t n) {
  using V = Vector<T>;
  double sum = 0;
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t end = start + BLOCK < n ? start + BLOCK : n;
    typename V::type sums[4] = {};
    int64_t i = start;
    for (; i + 4 * V::WIDTH <= end; i += 4 * V::WIDTH)
      for (int k = 0; k < 4; ++k) sums[k] += V::load(a + i + k * V::WIDTH) * V::load(b + i + k * V::WIDTH);
    T s = V::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < end; ++i) s += a[i] * b[i];
    sum += s;
  }
  return sum;
}

// found[r][k] = w[r] . u[k] of R rows w and A rows u, all [n]. A value that is loaded serves all products it is in.
template <class T, int R, int A>
void products_of(const T* w, const T* u, int64_t n, double (*found)[MOST_AXES]) {
  using V = Vector<T>;
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < A; ++k) found[r][k] = 0;
  if (n < 2 * V::WIDTH) {  // as of a depthwise conv: a vector and what is left of one are slower
    T sums[R][A] = {};
    for (int64_t f = 0; f < n; ++f)
      for (int r = 0; r < R; ++r)
        for (int k = 0; k < A; ++k) sums[r][k] += w[r * n + f] * u[k * n + f];
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < A; ++k) found[r][k] = sums[r][k];
    return;
  }
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t end = start + BLOCK < n ? start + BLOCK : n;
    typename V::type sums[R][A] = {};
    int64_t i = start;
    for (; i + V::WIDTH <= end; i += V::WIDTH) {
      typename V::type x[R];
      for (int r = 0; r < R; ++r) {
        x[r] = V::load(w + r * n + i);
        if (R > 1) __builtin_prefetch(w + (R + r) * n + i, 0, 2);  // the next ones come from memory in the meantime
      }
      for (int k = 0; k < A; ++k) {
        const typename V::type y = V::load(u + k * n + i);
        for (int r = 0; r < R; ++r) sums[r][k] += x[r] * y;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < A; ++k) {
        T sum = V::sum(sums[r][k]);
        for (int64_t f = i; f < end; ++f) sum += w[r * n + f] * u[k * n + f];
        found[r][k] += sum;
      }
  }
}

// The same of K rows u.
template <class T, int R>
void products(const T* w, const T* u, int64_t K, int64_t n, double (*found)[MOST_AXES]) {
  int64_t k = 0;
  for (; k + 4 <= K; k += 4) products_of<T, R, 4>(w, u + k * n, n, reinterpret_cast<double(*)[MOST_AXES]>(*found + k));
  for (; k < K; ++k) products_of<T, R, 1>(w, u + k * n, n, reinterpret_cast<double(*)[MOST_AXES]>(*found + k));
}

// to[r] += sum over k of factors[r][k] u[k], of R rows `to` and A rows u, all [n].
template <class T, int R, int A>
void add_of(T* to, const double (*factors)[MOST_AXES], const T* u, int64_t n) {
  using V = Vector<T>;
  T by[R][A];
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < A; ++k) by[r][k] = T(factors[r][k]);
  int64_t i = 0;
  for (; i + V::WIDTH <= n; i += V::WIDTH) {
    typename V::type y[A];
    for (int k = 0; k < A; ++k) y[k] = V::load(u + k * n + i);
    for (int r = 0; r < R; ++r) {
      auto* at = reinterpret_cast<typename V::type*>(to + r * n + i);
      if (R > 1) __builtin_prefetch(to + (R + r) * n + i, 1, 2);  // as in products_of
      typename V::type sum = *at;
      for (int k = 0; k < A; ++k) sum += by[r][k] * y[k];
      *at = sum;
    }
  }
  for (; i < n; ++i)
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < A; ++k) to[r * n + i] += by[r][k] * u[k * n + i];
}

// The same of K rows u.
template <class T, int R>
void add(T* to, const double (*factors)[MOST_AXES], const T* u, int64_t K, int64_t n) {
  int64_t k = 0;
  for (; k + 4 <= K; k += 4)
    add_of<T, R, 4>(to, reinterpret_cast<const double(*)[MOST_AXES]>(*factors + k), u + k * n, n);
  for (; k < K; ++k) add_of<T, R, 1>(to, reinterpret_cast<const double(*)[MOST_AXES]>(*factors + k), u + k * n, n);
}

// Some positions of a conv's output that lie in one line of it: the images and lines they are of, and where they begin.
struct Run {
  int64_t image, line, first, count;
};

constexpr int64_t STRIP = 64;  // positions whose patches are made at once

// The input of a conv and the positions of its output that are looked at, as in patch_moments; G groups of F entries.
template <class T>
struct Looked {
  const T *y, *mean;
  int64_t N, G, F, per_image, per_channel;
  const Axis &h, &w;

  int64_t positions() const { return N * h.count * w.count; }
  int64_t strips() const { return (positions() + STRIP - 1) / STRIP; }

  // The patches of a strip, about their mean: [F, STRIP], and zeros where there are no more positions.
  void patches(int64_t g, int64_t strip, T* to) const {
    Run runs[STRIP];
    int64_t many = 0, at = strip * STRIP;
    const int64_t end = std::min(at + STRIP, positions()), missing = (strip + 1) * STRIP - end;
    while (at < end) {
      const int64_t line = at / w.count, first = at % w.count, count = std::min(w.count - first, end - at);
      runs[many++] = {line / h.count, line % h.count, first, count}, at += count;
    }
    const int64_t size = h.kernel * w.kernel;
    for (int64_t f = 0; f < F; ++f) {
      const T *channel = y + (g * (F / size) + f / size) * per_channel, about = mean[g * F + f];
      const int64_t kh = f % size / w.kernel, kw = f % w.kernel;
      for (int64_t r = 0; r < many; ++r) {
        const int64_t row = h.at(runs[r].line, kh), first = runs[r].first, count = runs[r].count;
        // of the positions of the line, those whose entry is inside
        int64_t begin = 0, end = row < 0 || row >= h.size ? 0 : count;
        while (begin < end && w.at(first + begin, kw) < 0) ++begin;
        while (end > begin && w.at(first + end - 1, kw) >= w.size) --end;
        const T* from = channel + runs[r].image * per_image + row * h.memory + w.at(first, kw) * w.memory;
        const int64_t hop = w.step * w.stride * w.memory;
        for (int64_t j = 0; j < begin; ++j) to[j] = -about;
        if (hop == 1) {
#pragma omp simd
          for (int64_t j = begin; j < end; ++j) to[j] = from[j] - about;
        } else {
          for (int64_t j = begin; j < end; ++j) to[j] = from[j * hop] - about;
        }
        for (int64_t j = end; j < count; ++j) to[j] = -about;
        to += count;
      }
      std::fill(to, to + missing, T(0)), to += missing;
    }
  }

  // Adds to found [K, F] what strips of a group, `step` apart, have in common with their products with probes [K, F].
  void along(int64_t g, int64_t strip, int64_t step, const T* probes, double* found, int64_t K) const {
    std::vector<T> p(F * STRIP), made(K * STRIP);
    for (; strip < strips(); strip += step) {
      patches(g, strip, p.data());
      std::fill(made.begin(), made.end(), T(0));
      int64_t k = 0;
      for (; k + 2 <= K; k += 2) probed<2>(p.data(), made.data() + k * STRIP, probes + k * F, found + k * F);
      if (k < K) probed<1>(p.data(), made.data() + k * STRIP, probes + k * F, found + k * F);
    }
  }

  // The same of R probes and of one strip; `made` [R, STRIP] gets their products with the patches.
  template <int R>
  void probed(const T* p, T* made, const T* probes, double* found) const {
    double some[R][MOST_AXES];
    for (int64_t f = 0; f < F; f += MOST_AXES) {
      const int64_t n = std::min(MOST_AXES, F - f);
      for (int r = 0; r < R; ++r)
        for (int64_t i = 0; i < n; ++i) some[r][i] = probes[r * F + f + i];
      add<T, R>(made, some, p + f * STRIP, n, STRIP);
    }
    for (int64_t f = 0; f < F; f += MOST_AXES) {
      const int64_t n = std::min(MOST_AXES, F - f);
      products<T, R>(made, p + f * STRIP, n, STRIP, some);
      for (int r = 0; r < R; ++r)
        for (int64_t i = 0; i < n; ++i) found[r * F + f + i] += some[r][i];
    }
  }
};

// The covariance of the patches along probes [G, K, F]: Sigma v for each of them.
template <class T>
void covariance_along(const Looked<T>& at, const T* probes, T* out, int64_t K, int threads) {
  const int64_t size = K * at.F, work = at.positions() * at.G * size;
  const bool apart = at.G >= threads;  // whether a thread takes whole groups, or strips of each
  const int64_t parts = apart ? 1 : threads;
  std::vector<double> sums(at.G * parts * size, 0.0);
#pragma omp parallel for num_threads(threads) if (work > SMALL)
  for (int64_t i = 0; i < at.G * parts; ++i)
    at.along(i / parts, i % parts, parts, probes + i / parts * size, sums.data() + i * size, K);
  for (int64_t i = 0; i < at.G * size; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[(i / size * parts + part) * size + i % size];
    out[i] = T(sum / at.positions());
  }
}

// Calls `pass` with the first of every ROWS channels that share their patches, and how many there are.
constexpr int ROWS = 3;
template <class Pass>
void over_rows(int64_t C, int64_t per_group, int64_t work, int threads, const Pass& pass) {
  const int64_t blocks = (per_group + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(threads) if (work > SMALL)
  for (int64_t b = 0; b < C / per_group * blocks; ++b) {
    const int64_t first = b % blocks * ROWS, c = b / blocks * per_group + first;
    if (first + ROWS <= per_group) {
      pass(c, std::integral_constant<int, ROWS>());
    } else {
      for (int64_t i = 0; i < per_group - first; ++i) pass(c + i, std::integral_constant<int, 1>());
    }
  }
}

// Mean, variance beside the axes and principal axes of the patches of each group: [G, F], [G, F] and [G, K, F].
template <class T>
struct Patches {
  const T *mean, *rest, *axes;
  int64_t F, K, per_group;

  const T* mean_of(int64_t c) const { return mean + c / per_group * F; }
  const T* rest_of(int64_t c) const { return rest + c / per_group * F; }
  const T* axes_of(int64_t c) const { return axes + c / per_group * K * F; }
};

// What the weights of R channels make of patches: w . p, w . Sigma w and w . w.
template <class T, int R>
struct Response {
  double along[R] = {}, across[R] = {}, length[R] = {}, by_axis[R][MOST_AXES];

  Response(const T* rows, const Patches<T>& patches, int64_t c) {
    using V = Vector<T>;
    const T *p = patches.mean_of(c), *d = patches.rest_of(c);
    const int64_t F = patches.F;
    for (int64_t start = 0; start < F; start += BLOCK) {
      const int64_t end = start + BLOCK < F ? start + BLOCK : F;
      typename V::type a[R] = {}, q[R] = {}, l[R] = {};
      int64_t f = start;
      // short rows as in products_of
      for (; F >= 2 * V::WIDTH && f + V::WIDTH <= end; f += V::WIDTH) {
        const typename V::type mean = V::load(p + f), rest = V::load(d + f);
        for (int r = 0; r < R; ++r) {
          const typename V::type w = V::load(rows + r * F + f), square = w * w;
          a[r] += w * mean, q[r] += square * rest, l[r] += square;
        }
      }
      for (int r = 0; r < R; ++r) {
        T sums[] = {V::sum(a[r]), V::sum(q[r]), V::sum(l[r])};
        for (int64_t i = f; i < end; ++i) {
          const T w = rows[r * F + i];
          sums[0] += w * p[i], sums[1] += w * w * d[i], sums[2] += w * w;
        }
        along[r] += sums[0], across[r] += sums[1], length[r] += sums[2];
      }
    }
    products<T, R>(rows, patches.axes_of(c), patches.K, F, by_axis);
    for (int r = 0; r < R; ++r)
      for (int64_t k = 0; k < patches.K; ++k) across[r] += by_axis[r][k] * by_axis[r][k];
  }
};

struct Limits {
  double least_var, tiny, least_axis, least_part, least;
};

// Axes [K, F] of a covariance of which `along` is what it makes of the probes, and the variance `rest` [F] that they leave
// of `rest`: `principal_axes` in functional.py. Returns whether all is finite.
template <class T>
bool principal_axes(const T* probes, const T* along, T* axes, T* rest, int64_t K, int64_t F, const Limits& at) {
  double trace = 0;
  for (int64_t f = 0; f < F; ++f) trace += rest[f];
  bool finite = true;
  for (int64_t k = 0; k < K; ++k) {
    T* u = axes + k * F;
    const double own = dot(probes + k * F, along + k * F, F);
    for (int64_t f = 0; f < F; ++f) u[f] = along[k * F + f];
    double earlier[1][MOST_AXES];
    products<T, 1>(probes + k * F, axes, k, F, earlier);
    for (int64_t l = 0; l < k; ++l) earlier[0][l] = -earlier[0][l];
    add<T, 1>(u, earlier, axes, k, F);
    const double size = dot(probes + k * F, u, F);
    finite = finite && std::isfinite(own);
    const T factor = size > at.least_axis * own + at.least_part * trace + at.tiny ? T(1 / std::sqrt(size)) : T(0);
    for (int64_t f = 0; f < F; ++f) u[f] *= factor;
  }
  const T least = T(at.least_var / (1 + at.least_var) * trace / F);
  for (int64_t f = 0; f < F; ++f) {
    const T most = rest[f] > least ? rest[f] - least : T(0);
    T explained = 0;
    for (int64_t k = 0; k < K; ++k) explained += axes[k * F + f] * axes[k * F + f];
    if (explained > most) {
      const T factor = std::sqrt(most / explained);
      for (int64_t k = 0; k < K; ++k) axes[k * F + f] *= factor;
      explained = most;
    }
    rest[f] -= explained;
    finite = finite && std::isfinite(rest[f]);
  }
  return finite;
}

// What the patches of a group are after a look at which its mean [F], variance [F] and, of each of the probes [K, F],
// what their covariance makes of it was found: `Carried.with_patches`. scratch: K F numbers. Returns whether all is finite.
template <class T>
bool join_patches(const T* p, const T* rest, const T* axes, const T* fp, const T* fd, const T* probes, const T* found,
                  T* to_p, T* to_rest, T* to_axes, T* scratch, int64_t F, int64_t K, double share, const Limits& at) {
  const T part = T(share), left = T(1 - share);
  T* step = to_p;  // until it is the mean
  double sum = 0;
  for (int64_t f = 0; f < F; ++f) {
    step[f] = fp[f] - p[f];
    to_rest[f] = fd[f] + left * step[f] * step[f];
    sum += to_rest[f];
  }
  const T at_least = T(at.least_var * sum / F + at.tiny);
  for (int64_t f = 0; f < F; ++f) {
    T before = rest[f];
    for (int64_t k = 0; k < K; ++k) before += axes[k * F + f] * axes[k * F + f];
    to_rest[f] = before + part * (to_rest[f] + at_least - before);
  }
  for (int64_t k = 0; k < K; ++k) {
    T* along = scratch + k * F;
    const T between = T(dot(probes + k * F, step, F)) * left;
    for (int64_t f = 0; f < F; ++f) along[f] = part * (found[k * F + f] + between * step[f]);
    double kept[1][MOST_AXES];
    products<T, 1>(probes + k * F, axes, K, F, kept);
    for (int64_t l = 0; l < K; ++l) kept[0][l] *= left;
    add<T, 1>(along, kept, axes, K, F);
  }
  for (int64_t f = 0; f < F; ++f) to_p[f] = p[f] + part * step[f];
  return principal_axes(probes, scratch, to_axes, to_rest, K, F, at);
}

// Mean and variance of a channel, joined with those of a batch: `pooled` in functional.py.
template <class T>
void join_statistics(const T* table, const T* found_mean, const T* found_var, T* out, int64_t c, int64_t C, double share) {
  const double mean = table[c], var = table[C + c], step = found_mean[c] - mean;
  out[c] = T(mean + share * step);
  out[C + c] = T(var + share * (found_var[c] - var) + share * (1 - share) * step * step);
}

// What a carried window at theta is after a look: `Kernels.join`. Returns whether all is finite.
template <class T>
int join(const T* theta, const T* bias, const Patches<T>& patches, const T* table, const T* found_mean,
         const T* found_var, const Patches<T>& found, const T* probes, T* out, T* out_mean, T* out_rest, T* out_axes,
         T* scratch, int64_t C, double share, double of_patches, const Limits& at, int threads) {
  const int64_t F = patches.F, K = patches.K, per_group = patches.per_group;
  const T floor = T(at.least);
  int finite = 1;
#pragma omp parallel for reduction(&& : finite) num_threads(threads) if (C / per_group * F * K > SMALL)
  for (int64_t g = 0; g < C / per_group; ++g) {
    const int64_t first = g * F, many = g * K * F;
    finite = finite && join_patches(patches.mean + first, patches.rest + first, patches.axes + many, found.mean + first,
                                    found.rest + first, probes + many, found.axes + many, out_mean + first,
                                    out_rest + first, out_axes + many, scratch + many, F, K, of_patches, at);
  }
  const Patches<T> joined{out_mean, out_rest, out_axes, F, K, per_group};
  over_rows(C, per_group, C * F * (1 + K), threads, [&](int64_t first, auto many) {
    const Response<T, many> to(theta + first * F, joined, first);
    for (int r = 0; r < many; ++r) {
      const int64_t c = first + r;
      join_statistics(table, found_mean, found_var, out, c, C, share);
      out[2 * C + c] = T(to.along[r] + (bias ? bias[c] : T(0)));
      out[3 * C + c] = T(to.across[r]) < floor ? floor : T(to.across[r]);
      out[4 * C + c] = T(to.length[r]) < floor ? floor : T(to.length[r]);
    }
  });
  for (int64_t c = 0; c < 2 * C; ++c) finite = finite && std::isfinite(out[c]);
  return finite;
}

// The first two of the rows [rows, C] of a table after a look whose patches do not count: `Kernels.pool`.
template <class T>
int pool(const T* table, const T* found_mean, const T* found_var, T* out, int64_t rows, int64_t C, double share) {
  std::copy(table + 2 * C, table + rows * C, out + 2 * C);
  bool finite = true;
  for (int64_t c = 0; c < C; ++c) {
    join_statistics(table, found_mean, found_var, out, c, C, share);
    finite = finite && std::isfinite(found_mean[c]) && std::isfinite(found_var[c]);
  }
  return finite;
}

// A carried window's statistics at other weights and, where `rows` is given, what folds the norm layer into them.
// table [5, C]: mean, var, anchor, spread, square, or the first two alone without patches, which then stay as they are.
// out [7, C]: the table at theta, the scale s and the shift beta + s (b - M); rows [C, F]: s theta. The running
// statistics, where given, are those of the table at theta, too.
template <class T>
void fold(const T* theta, const T* bias, const Patches<T>& patches, const T* table, const T* gamma, const T* beta,
          T* out, T* rows, T* running_mean, T* running_var, int64_t C, double eps, double least, int threads) {
  const T floor = T(least);
  const int64_t F = patches.F;
  const T *mean = table, *var = table + C, *anchor = table + 2 * C, *spread = table + 3 * C, *square = table + 4 * C;
  over_rows(C, patches.per_group, C * F * (1 + patches.K), threads, [&](int64_t first, auto many) {
    const T* row = theta + first * F;
    std::optional<Response<T, many>> at;
    if (patches.mean) at.emplace(row, patches, first);
    for (int r = 0; r < many; ++r, row += F) {
      const int64_t c = first + r;
      const T b = bias ? bias[c] : T(0);
      T m = mean[c], v = var[c];
      if (at) {
        const T a = T(at->along[r] + b), q = T(at->across[r]) < floor ? floor : T(at->across[r]),
                l = T(at->length[r]) < floor ? floor : T(at->length[r]);
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
  });
}

// From g, the gradient of the rows s theta, that of theta in its place, and that of gamma. g_shift is that of beta.
// Nothing goes through M and S where there are no patches.
template <class T>
void folded_gradient(const T* theta, const T* bias, const Patches<T>& patches, const T* table, const T* gamma, T* g,
                     const T* g_shift, T* g_gamma, int64_t C, double eps, double least, int threads) {
  const int64_t F = patches.F;
  over_rows(C, patches.per_group, C * F * (1 + patches.K), threads, [&](int64_t first, auto many) {
    const T* rows = theta + first * F;
    double through_var[many], by_axis[many][MOST_AXES];
    for (int r = 0; r < many; ++r) {
      const int64_t c = first + r;
      const T* row = rows + r * F;
      T* to = g + c * F;
      const double mean = table[c], var = table[C + c];
      const double t = g_shift[c] * ((bias ? bias[c] : 0.0) - mean) + dot(row, to, F);
      const double inv_std = 1 / std::sqrt(var + eps), s = gamma ? gamma[c] * inv_std : inv_std;
      g_gamma[c] = T(t * inv_std);
      if (!patches.mean) {
#pragma omp simd
        for (int64_t f = 0; f < F; ++f) to[f] *= T(s);
        continue;
      }
      const T *p = patches.mean_of(c), *d = patches.rest_of(c);
      const double anchor = table[2 * C + c], spread = table[3 * C + c], square = table[4 * C + c];
      const double g_mean = -s * g_shift[c], g_var = -0.5 * s * t * inv_std * inv_std;
      const T a = T(s), b = T(g_mean), k = square > T(least) ? T(g_mean * (mean - anchor) / square) : T(0),
              v = spread > T(least) ? T(g_var * 2 * var / spread) : T(0);
#pragma omp simd
      for (int64_t f = 0; f < F; ++f) to[f] = a * to[f] + b * p[f] + (k + v * d[f]) * row[f];
      through_var[r] = v;
    }
    if (!patches.mean) return;
    products<T, many>(rows, patches.axes_of(first), patches.K, F, by_axis);
    for (int r = 0; r < many; ++r)
      for (int64_t k = 0; k < patches.K; ++k) by_axis[r][k] *= through_var[r];
    add<T, many>(g + first * F, by_axis, patches.axes_of(first), patches.K, F);
  });
}

}  // namespace

// One C function per template and type, which takes its arguments side by side, eight bytes each: a call of one pointer
// costs Python less than one of twenty.
#define EXPORT(T, name)                                                                                             \
  void cbn_statistics_##name(const Arguments& a) {                                                                  \
    statistics(a.in<T>(0), a.out<T>(1), a.out<T>(2), a[3], a[4], a[5], a[6]);                                        \
  }                                                                                                                 \
  void cbn_scale_##name(const Arguments& a) { scale(a.out<T>(0), a.in<T>(1), a.in<T>(2), a[3], a[4], a[5], a[6]); }  \
  void cbn_patch_moments_##name(const Arguments& a) {                                                               \
    const int64_t N = a[5], C = a[6], per_image = a[7], per_channel = a[8], G = a[9], K = a[10], threads = a[29];       \
    const Axis &h = a.axis(11), &w = a.axis(20);                                                                       \
    patch_moments(a.in<T>(0), a.out<T>(1), a.out<T>(2), N, C, per_image, per_channel, h, w, threads);                   \
    const Looked<T> at{a.in<T>(0), a.in<T>(1), N, G, C / G * h.kernel * w.kernel, per_image, per_channel, h, w};         \
    covariance_along(at, a.in<T>(3), a.out<T>(4), K, threads);                                                        \
  }                                                                                                                 \
  int cbn_pool_##name(const Arguments& a) {                                                                         \
    return pool(a.in<T>(0), a.in<T>(1), a.in<T>(2), a.out<T>(3), a[4], a[5], a.number(6));                          \
  }                                                                                                                 \
  int cbn_join_##name(const Arguments& a) {                                                                         \
    const int64_t F = a[18], K = a[19], per_group = a[20];                                                          \
    return join(a.in<T>(0), a.in<T>(1), Patches<T>{a.in<T>(2), a.in<T>(3), a.in<T>(4), F, K, per_group}, a.in<T>(5), \
                a.in<T>(6), a.in<T>(7), Patches<T>{a.in<T>(8), a.in<T>(9), a.in<T>(11), F, K, per_group},             \
                a.in<T>(10), a.out<T>(12), a.out<T>(13), a.out<T>(14), a.out<T>(15), a.out<T>(16), a[17],             \
                a.number(21), a.number(22), {a.number(23), a.number(24), a.number(25), a.number(26), a.number(27)},     \
                a[28]);        \
  }                                                                                                                 \
  void cbn_fold_##name(const Arguments& a) {                                                                        \
    fold(a.in<T>(0), a.in<T>(1), Patches<T>{a.in<T>(2), a.in<T>(3), a.in<T>(4), a[13], a[14], a[15]}, a.in<T>(5),     \
         a.in<T>(6), a.in<T>(7), a.out<T>(8), a.out<T>(9), a.out<T>(10), a.out<T>(11), a[12], a.number(16),           \
         a.number(17), a[18]);                                                                                       \
  }                                                                                                                 \
  void cbn_folded_gradient_##name(const Arguments& a) {                                                             \
    folded_gradient(a.in<T>(0), a.in<T>(1), Patches<T>{a.in<T>(2), a.in<T>(3), a.in<T>(4), a[11], a[12], a[13]},      \
                    a.in<T>(5), a.in<T>(6), a.out<T>(7), a.in<T>(8), a.out<T>(9), a[10], a.number(14), a.number(15),  \
                    a[16]);                                                                                          \
  }

extern "C" {
int cbn_version() { return 13; }  // to be raised with every change of what a function takes
EXPORT(float, f32)
EXPORT(double, f64)
}
