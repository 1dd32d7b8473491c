// Computes batch normalisation, an optional addition, and ReLU in few passes over memory, and their
// gradients, as XLA FFI handlers.
//
// Features are float32[batch, height, width, channels]. With m and v the mean and variance of a
// channel and a = scale / √(v + ε), the outputs are y = max(0, (x − m)a + bias + shortcut).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "for_each.h"
#include "huge_pages.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Result = ffi::Result<Buffer>;

namespace {

// Floats of one pass of an inner loop. They fill several vector registers, so that an addition need
// not wait for the one before.
constexpr int64_t kPass = 64;
// With fewer bytes than these, one thread is faster than several.
constexpr int64_t kFewBytes = 1 << 18;

// The length of the inner loops for c channels: a multiple of c, and kPass if c divides it.
int64_t Lanes(int64_t c) { return c * std::max<int64_t>(1, kPass / c); }

// One value per channel, repeated for all lanes.
struct Repeated {
  std::vector<float> values;
  template <typename F>
  Repeated(int64_t channels, F value) : values(Lanes(channels)) {
    for (size_t lane = 0; lane < values.size(); ++lane) values[lane] = value(lane % channels);
  }
  const float* data() const { return values.data(); }
};

// Calls loop(start, length) for pieces of n floats; pieces of kPass have a constant length.
template <typename F>
INLINE inline void InLanes(int64_t n, int64_t lanes, F loop) {
  int64_t start = 0;
  if (lanes == kPass) {
    for (; start + kPass <= n; start += kPass) loop(start, kPass);
  }
  for (; start < n; start += lanes) loop(start, std::min(lanes, n - start));
}

// Adds Σx and Σx² of n floats to sums[lanes] and squares[lanes].
void AddMoments(int64_t n, int64_t lanes, const float* __restrict x, float* __restrict sums,
                float* __restrict squares) {
  InLanes(n, lanes, [=](int64_t at, int64_t length) INLINE {
    for (int64_t i = 0; i < length; ++i) {
      sums[i] += x[at + i];
      squares[i] += x[at + i] * x[at + i];
    }
  });
}

template <bool kShortcut>
void Normalize(int64_t n, int64_t lanes, const float* __restrict x,
               const float* __restrict shortcut, const float* __restrict mean,
               const float* __restrict factor, const float* __restrict bias,
               float* __restrict y) {
  InLanes(n, lanes, [=](int64_t at, int64_t length) INLINE {
    for (int64_t i = 0; i < length; ++i) {
      float value = (x[at + i] - mean[i]) * factor[i] + bias[i];
      if constexpr (kShortcut) value += shortcut[at + i];
      y[at + i] = value < 0 ? 0 : value;  // keeps NaN
    }
  });
}

// Adds Σg and Σg(x − m) to sums[lanes] and products[lanes], for g the gradient behind the ReLU.
void AddGradients(int64_t n, int64_t lanes, const float* __restrict x, const float* __restrict y,
                  const float* __restrict gradient, const float* __restrict mean,
                  float* __restrict sums, float* __restrict products) {
  InLanes(n, lanes, [=](int64_t at, int64_t length) INLINE {
    for (int64_t i = 0; i < length; ++i) {
      const float g = y[at + i] > 0 ? gradient[at + i] : 0;
      sums[i] += g;
      products[i] += g * (x[at + i] - mean[i]);
    }
  });
}

template <bool kShortcut>
void InputGradient(int64_t n, int64_t lanes, const float* __restrict x, const float* __restrict y,
                   const float* __restrict gradient, const float* __restrict mean,
                   const float* __restrict factor, const float* __restrict of_x,
                   const float* __restrict constant, float* __restrict dx,
                   float* __restrict dshortcut) {
  InLanes(n, lanes, [=](int64_t at, int64_t length) INLINE {
    for (int64_t i = 0; i < length; ++i) {
      const float g = y[at + i] > 0 ? gradient[at + i] : 0;
      dx[at + i] = g * factor[i] - (x[at + i] - mean[i]) * of_x[i] - constant[i];
      if constexpr (kShortcut) dshortcut[at + i] = g;
    }
  });
}

// The features of one call: `images` pieces of `size` floats.
struct Shape {
  int64_t images, size, channels;
  explicit Shape(const Buffer& x) {
    const auto dims = x.dimensions();
    images = dims[0];
    size = dims[1] * dims[2] * dims[3];
    channels = dims[3];
  }
  double pixels() const { return static_cast<double>(images * size) / channels; }
  void ForEachImage(ffi::ThreadPool& pool, std::function<void(int64_t, int64_t)> task) const {
    const auto image = [&](int64_t index) { task(index, index * size); };
    if (images * size * static_cast<int64_t>(sizeof(float)) < kFewBytes) {
      for (int64_t index = 0; index < images; ++index) image(index);
    } else {
      ForEach(pool, images, image);
    }
  }
};

// Calls add(start, n, lanes, first, second) for each image, and returns the sums of both over all
// images, double[2][channels]. They are added in the order of the images, whatever ran first.
template <typename F>
std::vector<std::vector<double>> Sums(ffi::ThreadPool& pool, const Shape& shape, F add) {
  const int64_t lanes = Lanes(shape.channels);
  std::vector<float> partial(shape.images * 2 * lanes, 0.0f);
  shape.ForEachImage(pool, [&](int64_t index, int64_t start) {
    float* const own = partial.data() + index * 2 * lanes;
    add(start, shape.size, lanes, own, own + lanes);
  });
  std::vector<std::vector<double>> sums(2, std::vector<double>(shape.channels, 0.0));
  const float* next = partial.data();
  for (int64_t image = 0; image < shape.images; ++image) {
    for (auto& sum : sums) {
      for (int64_t lane = 0; lane < lanes; lane += shape.channels) {
        for (double& channel : sum) channel += *next++;
      }
    }
  }
  return sums;
}

float Factor(float scale, float variance, float epsilon) {
  return scale / std::sqrt(variance + epsilon);
}

const float* DataOrNull(const Buffer& x) { return x.element_count() ? x.typed_data() : nullptr; }

ffi::Error Forward(ffi::ThreadPool pool, float epsilon, Buffer x, Buffer scale, Buffer bias,
                   Buffer shortcut, Result y, Result mean, Result variance) {
  AskForHugePages(y->untyped_data(), y->size_bytes());
  const Shape shape(x);
  const auto add = [&](int64_t start, int64_t n, int64_t lanes, float* sum, float* square) {
    AddMoments(n, lanes, x.typed_data() + start, sum, square);
  };
  const auto sums = Sums(pool, shape, add);
  for (int64_t c = 0; c < shape.channels; ++c) {
    const double m = sums[0][c] / shape.pixels(), v = sums[1][c] / shape.pixels() - m * m;
    mean->typed_data()[c] = m;
    variance->typed_data()[c] = v < 0 ? 0 : v;  // keeps NaN
  }
  const Repeated means(shape.channels, [&](int64_t c) { return mean->typed_data()[c]; });
  const Repeated biases(shape.channels, [&](int64_t c) { return bias.typed_data()[c]; });
  const Repeated factors(shape.channels, [&](int64_t c) {
    return Factor(scale.typed_data()[c], variance->typed_data()[c], epsilon);
  });
  const float* const other = DataOrNull(shortcut);
  const auto normalize = other ? Normalize<true> : Normalize<false>;
  shape.ForEachImage(pool, [&](int64_t, int64_t start) {
    normalize(shape.size, Lanes(shape.channels), x.typed_data() + start,
              other ? other + start : nullptr, means.data(), factors.data(), biases.data(),
              y->typed_data() + start);
  });
  return ffi::Error::Success();
}

ffi::Error Backward(ffi::ThreadPool pool, float epsilon, Buffer gradient, Buffer x, Buffer y,
                    Buffer scale, Buffer mean, Buffer variance, Result dx, Result dscale,
                    Result dbias, Result dshortcut) {
  AskForHugePages(dx->untyped_data(), dx->size_bytes());
  AskForHugePages(dshortcut->untyped_data(), dshortcut->size_bytes());
  const Shape shape(x);
  const Repeated means(shape.channels, [&](int64_t c) { return mean.typed_data()[c]; });
  const auto add = [&](int64_t start, int64_t n, int64_t lanes, float* sum, float* product) {
    AddGradients(n, lanes, x.typed_data() + start, y.typed_data() + start,
                 gradient.typed_data() + start, means.data(), sum, product);
  };
  const auto sums = Sums(pool, shape, add);
  const auto factor = [&](int64_t c) {
    return Factor(scale.typed_data()[c], variance.typed_data()[c], epsilon);
  };
  for (int64_t c = 0; c < shape.channels; ++c) {
    dscale->typed_data()[c] = sums[1][c] * Factor(1, variance.typed_data()[c], epsilon);
    dbias->typed_data()[c] = sums[0][c];
  }
  const Repeated factors(shape.channels, factor);
  const Repeated of_x(shape.channels, [&](int64_t c) {
    return sums[1][c] / shape.pixels() * factor(c) / (variance.typed_data()[c] + epsilon);
  });
  const Repeated constants(shape.channels, [&](int64_t c) {
    return sums[0][c] / shape.pixels() * factor(c);
  });
  float* const other = dshortcut->element_count() ? dshortcut->typed_data() : nullptr;
  const auto input_gradient = other ? InputGradient<true> : InputGradient<false>;
  shape.ForEachImage(pool, [&](int64_t, int64_t start) {
    input_gradient(shape.size, Lanes(shape.channels), x.typed_data() + start,
                   y.typed_data() + start, gradient.typed_data() + start, means.data(),
                   factors.data(), of_x.data(), constants.data(), dx->typed_data() + start,
                   other ? other + start : nullptr);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(BatchNormForward, Forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("epsilon")
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(BatchNormBackward, Backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("epsilon")
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>()
                                  .Ret<Buffer>());
