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
using Buffer = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Buffer>;

namespace {

// Floats of one pass of an inner loop: several vector registers, so that sums do not wait.
constexpr int64_t kLanes = 64;
// Fewer bytes than these are not worth a second thread.
constexpr int64_t kAlone = 1 << 18;

// The length of the inner loops for c channels: a multiple of c, and kLanes if c divides it.
int64_t Lanes(int64_t c) { return c * std::max<int64_t>(1, kLanes / c); }

// One value per channel, repeated for all lanes.
struct Repeated {
  std::vector<float> values;
  template <typename F>
  Repeated(int64_t channels, F value) : values(Lanes(channels)) {
    for (size_t lane = 0; lane < values.size(); ++lane) values[lane] = value(lane % channels);
  }
  const float* data() const { return values.data(); }
};

// Calls loop(start, length) for pieces of n floats; pieces of kLanes have a constant length.
template <typename F>
__attribute__((always_inline)) inline void InLanes(int64_t n, int64_t lanes, F loop) {
  int64_t start = 0;
  if (lanes == kLanes) {
    for (; start + kLanes <= n; start += kLanes) loop(start, kLanes);
  }
  for (; start < n; start += lanes) loop(start, std::min(lanes, n - start));
}

// Adds Σx and Σx² of n floats to sums[lanes] and squares[lanes].
void AddMoments(int64_t n, int64_t lanes, const float* __restrict x, float* __restrict sums,
                float* __restrict squares) {
  InLanes(n, lanes, [=](int64_t at, int64_t length) __attribute__((always_inline)) {
    for (int64_t i = 0; i < length; ++i) {
      sums[i] += x[at + i];
      squares[i] += x[at + i] * x[at + i];
    }
  });
}

void Normalize(int64_t n, int64_t lanes, const float* __restrict x,
               const float* __restrict shortcut, const float* __restrict mean,
               const float* __restrict factor, const float* __restrict bias,
               float* __restrict y) {
  if (shortcut != nullptr) {
    InLanes(n, lanes, [=](int64_t at, int64_t length) __attribute__((always_inline)) {
      for (int64_t i = 0; i < length; ++i) {
        const float value = (x[at + i] - mean[i]) * factor[i] + bias[i] + shortcut[at + i];
        y[at + i] = value > 0 ? value : 0;
      }
    });
  } else {
    InLanes(n, lanes, [=](int64_t at, int64_t length) __attribute__((always_inline)) {
      for (int64_t i = 0; i < length; ++i) {
        const float value = (x[at + i] - mean[i]) * factor[i] + bias[i];
        y[at + i] = value > 0 ? value : 0;
      }
    });
  }
}

// Adds Σg and Σg(x − m) to sums[lanes] and products[lanes], for g the gradient behind the ReLU.
void AddGradients(int64_t n, int64_t lanes, const float* __restrict x, const float* __restrict y,
                  const float* __restrict gradient, const float* __restrict mean,
                  float* __restrict sums, float* __restrict products) {
  InLanes(n, lanes, [=](int64_t at, int64_t length) __attribute__((always_inline)) {
    for (int64_t i = 0; i < length; ++i) {
      const float g = y[at + i] > 0 ? gradient[at + i] : 0;
      sums[i] += g;
      products[i] += g * (x[at + i] - mean[i]);
    }
  });
}

void InputGradient(int64_t n, int64_t lanes, const float* __restrict x, const float* __restrict y,
                   const float* __restrict gradient, const float* __restrict mean,
                   const float* __restrict factor, const float* __restrict of_x,
                   const float* __restrict constant, float* __restrict dx,
                   float* __restrict dshortcut) {
  if (dshortcut != nullptr) {
    InLanes(n, lanes, [=](int64_t at, int64_t length) __attribute__((always_inline)) {
      for (int64_t i = 0; i < length; ++i) {
        const float g = y[at + i] > 0 ? gradient[at + i] : 0;
        dx[at + i] = g * factor[i] - (x[at + i] - mean[i]) * of_x[i] - constant[i];
        dshortcut[at + i] = g;
      }
    });
  } else {
    InLanes(n, lanes, [=](int64_t at, int64_t length) __attribute__((always_inline)) {
      for (int64_t i = 0; i < length; ++i) {
        const float g = y[at + i] > 0 ? gradient[at + i] : 0;
        dx[at + i] = g * factor[i] - (x[at + i] - mean[i]) * of_x[i] - constant[i];
      }
    });
  }
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
    if (images * size * static_cast<int64_t>(sizeof(float)) < kAlone) {
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
    const double m = sums[0][c] / shape.pixels(), square = sums[1][c] / shape.pixels();
    mean->typed_data()[c] = m;
    variance->typed_data()[c] = std::max(0.0, square - m * m);
  }
  const Repeated means(shape.channels, [&](int64_t c) { return mean->typed_data()[c]; });
  const Repeated biases(shape.channels, [&](int64_t c) { return bias.typed_data()[c]; });
  const Repeated factors(shape.channels, [&](int64_t c) {
    return Factor(scale.typed_data()[c], variance->typed_data()[c], epsilon);
  });
  const float* const other = DataOrNull(shortcut);
  shape.ForEachImage(pool, [&](int64_t, int64_t start) {
    Normalize(shape.size, Lanes(shape.channels), x.typed_data() + start,
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
  shape.ForEachImage(pool, [&](int64_t, int64_t start) {
    InputGradient(shape.size, Lanes(shape.channels), x.typed_data() + start, y.typed_data() + start,
                  gradient.typed_data() + start, means.data(), factors.data(), of_x.data(),
                  constants.data(), dx->typed_data() + start, other ? other + start : nullptr);
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
