// Computes 2-D convolutions and their gradients on a CPU, as one XLA FFI handler.
//
// Images are float32[batch, height, width, channels] and kernels float32[size, size, in, out], with
// an odd size and size / 2 zeros around each image. One row of the kernel is multiplied with
// size · in neighbouring floats of an image that has its border of zeros. So an output is a sum over
// three loops: rows of the kernel, these floats, and the channels of the output, which fill vector
// registers. Several neighbouring pixels stay in registers until their sums are complete.
//
// The gradient of the images is a sum of the same form: of the output's gradient with its border,
// and the kernel in reversed order. With a stride s, the pixels fall into s · s classes by their
// coordinates modulo s; each class uses its own part of the kernel.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "for_each.h"
#include "huge_pages.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

enum Kind : int64_t { kForward = 0, kInputGradient = 1, kKernelGradient = 2 };

// With fewer products than these, one thread is faster than several.
constexpr int64_t kFewProducts = 1 << 20;
// A batch is cut into at most these pieces; each has its own gradient of the kernel.
constexpr int64_t kMostPieces = 16;
// Pixels whose part of the kernel's gradient is computed while they are in the fastest cache.
constexpr int64_t kPixelsInCache = 128;

// The processor's vectors of floats. Eight pixels with kVectors each leave registers for the kernel.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 2;
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectors = 1;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kVectors = 2;
#else
constexpr int kLanes = 4, kVectors = 1;
#endif
constexpr int kMostPixels = 8;

struct Sizes {
  int64_t batch, height, width, in, out_height, out_width, out, size, stride;

  int64_t border() const { return size / 2; }
  int64_t row() const { return width * in; }
  int64_t image() const { return height * row(); }
  int64_t out_row() const { return out_width * out; }
  int64_t output() const { return out_height * out_row(); }
  int64_t kernel() const { return size * size * in * out; }
  int64_t products() const { return output() * size * size * in; }  // of one image
};

// Images with borders of zeros.
struct Bordered {
  int64_t border, height, width, channels;
  std::vector<float> floats;

  Bordered(int64_t count, int64_t height, int64_t width, int64_t channels, int64_t border)
      : border(border), height(height), width(width), channels(channels),
        floats(count * (height + 2 * border) * row(), 0.0f) {}

  int64_t row() const { return (width + 2 * border) * channels; }
  // Returns where a pixel is; y and x may be in the border.
  float* at(int64_t image, int64_t y, int64_t x) {
    const int64_t row_number = image * (height + 2 * border) + y + border;
    return floats.data() + row_number * row() + (x + border) * channels;
  }
  // Copies `many` images without borders.
  void Fill(const float* images, int64_t many) {
    for (int64_t image = 0; image < many; ++image) {
      for (int64_t y = 0; y < height; ++y, images += width * channels) {
        std::memcpy(at(image, y, 0), images, width * channels * sizeof(float));
      }
    }
  }
};

// A number of channels as vectors, anywhere in memory.
template <int kChannels>
struct Vectors {
  static constexpr int kLength = std::min(kChannels, kLanes), kCount = kChannels / kLength;
  typedef float Vector __attribute__((vector_size(kLength * sizeof(float)), aligned(4), may_alias));
  typedef Vector Registers[kCount];
  static INLINE Vector& Of(float* x, int v) { return reinterpret_cast<Vector*>(x)[v]; }
  static INLINE Vector Of(const float* x, int v) { return reinterpret_cast<const Vector*>(x)[v]; }
};

// Calls task(first, count) with parts of n, whose counts are constants: `most`, and halves of it.
template <int kMost, typename F>
INLINE inline void InParts(int64_t n, int64_t first, F task) {
  for (; n - first >= kMost; first += kMost) task(first, std::integral_constant<int, kMost>());
  if constexpr (kMost > 1) InParts<kMost / 2>(n, first, task);
}

// A sum of products for each pixel of a row of outputs; distances are in floats.
struct Correlation {
  int64_t rows, length;      // of the kernel
  int64_t in_pixel, in_row;  // from one pixel's first float, or row, to the next
  int64_t out_pixel, channels;

  // Writes out[pixel][c] = Σ in[pixel][row][i] · kernel[row][i][c].
  void Row(const float* in, const float* kernel, float* out, int64_t pixels) const {
    InParts<kLanes * kVectors>(channels, 0, [=](int64_t c, auto count) INLINE {
      constexpr int kChannels = decltype(count)::value;
      InParts<kMostPixels>(pixels, 0, [=](int64_t first, auto many) INLINE {
        Pixels<kChannels, decltype(many)::value>(in + first * in_pixel, kernel + c,
                                                 out + first * out_pixel + c);
      });
    });
  }

 private:
  template <int kChannels, int kPixels>
  INLINE void Pixels(const float* in, const float* kernel, float* out) const {
    using V = Vectors<kChannels>;
    typename V::Registers sums[kPixels] = {};
    for (int64_t row = 0; row < rows; ++row, in += in_row) {
      for (int64_t i = 0; i < length; ++i, kernel += channels) {
        for (int p = 0; p < kPixels; ++p) {
          const float factor = in[p * in_pixel + i];
          for (int v = 0; v < V::kCount; ++v) sums[p][v] += V::Of(kernel, v) * factor;
        }
      }
    }
    for (int p = 0; p < kPixels; ++p) {
      for (int v = 0; v < V::kCount; ++v) V::Of(out + p * out_pixel, v) = sums[p][v];
    }
  }
};

void Forward(const Sizes& z, int64_t batch, const float* images, const float* kernel,
             float* outputs) {
  Bordered one(1, z.height, z.width, z.in, z.border());
  const Correlation sum{z.size, z.size * z.in, z.stride * z.in, one.row(), z.out, z.out};
  for (int64_t image = 0; image < batch; ++image, images += z.image()) {
    one.Fill(images, 1);
    for (int64_t y = 0; y < z.out_height; ++y, outputs += z.out_row()) {
      sum.Row(one.at(0, y * z.stride - z.border(), -z.border()), kernel, outputs, z.out_width);
    }
  }
}

// The rows (or columns) of the kernel that a class of pixels uses, from the last to the first.
struct KernelRows {
  int64_t first, count, step;
  KernelRows(const Sizes& z, int64_t residue)
      : first((residue + z.border()) % z.stride),
        count(first < z.size ? (z.size - 1 - first) / z.stride + 1 : 0), step(z.stride) {}
  int64_t operator[](int64_t i) const { return first + (count - 1 - i) * step; }
  // Returns the output that multiplies pixel y with row (*this)[0]; it may be in the border.
  int64_t Output(int64_t y, int64_t border) const {
    return (y + border) / step - (count - 1);
  }
};

// Calls task(y residue, its rows, x residue, its columns) for each class of pixels.
template <typename F>
void ForEachClass(const Sizes& z, F task) {
  for (int64_t y = 0; y < z.stride; ++y) {
    for (int64_t x = 0; x < z.stride; ++x) task(y, KernelRows(z, y), x, KernelRows(z, x));
  }
}

// Returns the kernel as float32[class][its rows][its columns][out][in].
std::vector<float> Reversed(const Sizes& z, const float* kernel) {
  std::vector<float> reversed(z.kernel());
  float* to = reversed.data();
  ForEachClass(z, [&](int64_t, KernelRows rows, int64_t, KernelRows columns) {
    for (int64_t row = 0; row < rows.count; ++row) {
      for (int64_t column = 0; column < columns.count; ++column, to += z.in * z.out) {
        const float* const from = kernel + (rows[row] * z.size + columns[column]) * z.in * z.out;
        for (int64_t o = 0; o < z.out; ++o) {
          for (int64_t i = 0; i < z.in; ++i) to[o * z.in + i] = from[i * z.out + o];
        }
      }
    }
  });
  return reversed;
}

void InputGradient(const Sizes& z, int64_t batch, const float* gradients, const float* reversed,
                   float* images) {
  Bordered one(1, z.out_height, z.out_width, z.out, z.border());
  for (int64_t image = 0; image < batch; ++image, images += z.image()) {
    one.Fill(gradients + image * z.output(), 1);
    const float* kernel = reversed;
    ForEachClass(z, [&](int64_t first_y, KernelRows rows, int64_t first_x, KernelRows columns) {
      const Correlation sum{rows.count, columns.count * z.out, z.out, one.row(),
                            z.stride * z.in, z.in};
      const int64_t pixels = (z.width - first_x + z.stride - 1) / z.stride;
      for (int64_t y = first_y; y < z.height; y += z.stride) {
        const int64_t from_y = rows.Output(y, z.border());
        sum.Row(one.at(0, from_y, columns.Output(first_x, z.border())), kernel,
                images + y * z.row() + first_x * z.in, pixels);
      }
      kernel += rows.count * columns.count * z.out * z.in;
    });
  }
}

// Some rows of pixels of the first images.
struct Band {
  int64_t images, first_y, last_y;  // without the last row
};

// Adds a band's part of some rows of the kernel's gradient: Σ in[pixel][i] · gradient[pixel][c].
template <int kChannels, int kRows>
INLINE inline void AddRows(const Sizes& z, Bordered& images, const float* gradients,
                           const Band& band, int64_t ky, int64_t first, float* result) {
  using V = Vectors<kChannels>;
  typename V::Registers sums[kRows];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < V::kCount; ++v) sums[i][v] = V::Of(result + i * z.out, v);
  }
  for (int64_t image = 0; image < band.images; ++image) {
    for (int64_t y = band.first_y; y < band.last_y; ++y) {
      const float* in = images.at(image, y * z.stride + ky - z.border(), -z.border()) + first;
      const float* gradient = gradients + image * z.output() + y * z.out_row();
      for (int64_t x = 0; x < z.out_width; ++x, in += z.stride * z.in, gradient += z.out) {
        for (int i = 0; i < kRows; ++i) {
          for (int v = 0; v < V::kCount; ++v) sums[i][v] += V::Of(gradient, v) * in[i];
        }
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < V::kCount; ++v) V::Of(result + i * z.out, v) = sums[i][v];
  }
}

void AddBand(const Sizes& z, Bordered& images, const float* gradients, const Band& band,
             float* result) {
  const int64_t length = z.size * z.in;
  for (int64_t ky = 0; ky < z.size; ++ky, result += length * z.out) {
    InParts<kLanes * kVectors>(z.out, 0, [&](int64_t c, auto count) INLINE {
      constexpr int kChannels = decltype(count)::value;
      InParts<kMostPixels>(length, 0, [&](int64_t first, auto many) INLINE {
        AddRows<kChannels, decltype(many)::value>(z, images, gradients + c, band, ky, first,
                                                  result + first * z.out + c);
      });
    });
  }
}

void KernelGradient(const Sizes& z, int64_t batch, const float* images, const float* gradients,
                    float* result) {
  std::fill_n(result, z.kernel(), 0.0f);
  const int64_t many = std::max<int64_t>(1, kPixelsInCache / (z.out_height * z.out_width));
  const int64_t rows = std::max<int64_t>(1, kPixelsInCache / z.out_width);
  Bordered some(many, z.height, z.width, z.in, z.border());
  for (int64_t first = 0; first < batch; first += many) {
    const int64_t count = std::min(many, batch - first);
    some.Fill(images + first * z.image(), count);
    for (int64_t y = 0; y < z.out_height; y += rows) {
      const Band band{count, y, std::min(y + rows, z.out_height)};
      AddBand(z, some, gradients + first * z.output(), band, result);
    }
  }
}

ffi::Error Convolve(ffi::ThreadPool pool, int64_t kind, int64_t stride, Buffer left, Buffer right,
                    ffi::Result<Buffer> result) {
  // (image, kernel) → output; (output's gradient, kernel) → image's; (image, output's) → kernel's.
  Buffer& to = *result;
  Buffer& image = kind == kInputGradient ? to : left;
  Buffer& kernel = kind == kKernelGradient ? to : right;
  Buffer& output = kind == kForward ? to : kind == kInputGradient ? left : right;
  const auto in = image.dimensions(), out = output.dimensions();
  const Sizes z{in[0], in[1], in[2], in[3], out[1], out[2], out[3], kernel.dimensions()[0], stride};
  float* const images = image.typed_data();
  float* const outputs = output.typed_data();
  float* const kernels = kernel.typed_data();
  if (to.element_count() == 0 || z.batch * z.products() == 0) {
    std::fill_n(to.typed_data(), to.element_count(), 0.0f);
    return ffi::Error::Success();
  }
  AskForHugePages(to.untyped_data(), to.size_bytes());
  // The pieces do not depend on the number of threads, so the sums do not either.
  const int64_t length =
      std::max({int64_t{1}, kFewProducts / z.products(), (z.batch - 1) / kMostPieces + 1});
  const int64_t pieces = (z.batch + length - 1) / length;
  std::vector<float> own(kind == kKernelGradient ? (pieces - 1) * z.kernel() : 0);
  if (kind == kInputGradient) own = Reversed(z, kernels);
  ForEach(pool, pieces, [&](int64_t piece) {
    const int64_t first = piece * length, count = std::min(length, z.batch - first);
    float* const some_images = images + first * z.image();
    float* const some_outputs = outputs + first * z.output();
    if (kind == kForward) {
      Forward(z, count, some_images, kernels, some_outputs);
    } else if (kind == kInputGradient) {
      InputGradient(z, count, some_outputs, own.data(), some_images);
    } else {
      float* const gradient = piece ? own.data() + (piece - 1) * z.kernel() : kernels;
      KernelGradient(z, count, some_images, some_outputs, gradient);
    }
  });
  if (kind == kKernelGradient) {
    for (const float* next = own.data(); next != own.data() + own.size(); next += z.kernel()) {
      for (int64_t index = 0; index < z.kernel(); ++index) kernels[index] += next[index];
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Convolution2D, Convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("kind")
                                  .Attr<int64_t>("stride")
                                  .Arg<Buffer>()
                                  .Arg<Buffer>()
                                  .Ret<Buffer>());
