// Computes 2-D convolutions and their gradients with oneDNN, as one XLA FFI handler.
//
// Images are float32[batch, height, width, channels] and kernels float32[height, width, in, out].

#include <omp.h>

#include <algorithm>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "for_each.h"
#include "oneapi/dnnl/dnnl.hpp"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using dnnl::convolution_backward_data;
using dnnl::convolution_backward_weights;
using dnnl::convolution_forward;
using dnnl::memory;
using Tag = memory::format_tag;

namespace {

enum Kind : int64_t { kForward = 0, kInputGradient = 1, kKernelGradient = 2 };

constexpr auto kAlgorithm = dnnl::algorithm::convolution_direct;

// A primitive, with the kernel's layout that oneDNN prefers.
struct Convolution {
  dnnl::primitive primitive;
  memory::desc image, kernel, output, scratchpad;
  dnnl::reorder reorder;  // of the kernel, to or from the layout of JAX
  bool reorders = false;
};

const dnnl::engine& Engine() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

memory::dims ImageDims(const std::vector<int64_t>& d) { return {d[0], d[3], d[1], d[2]}; }
memory::dims KernelDims(const std::vector<int64_t>& d) { return {d[3], d[2], d[0], d[1]}; }

memory::desc Image(const std::vector<int64_t>& dims) {
  return {ImageDims(dims), memory::data_type::f32, Tag::nhwc};
}
memory::desc Kernel(const std::vector<int64_t>& dims, Tag tag) {
  return {KernelDims(dims), memory::data_type::f32, tag};
}

Convolution Make(int64_t kind, int64_t stride, int64_t padding, const std::vector<int64_t>& image,
                 const std::vector<int64_t>& kernel, const std::vector<int64_t>& output) {
  const memory::dims strides{stride, stride}, pad{padding, padding};
  dnnl::primitive_attr attr;  // several threads run one primitive
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  const auto src = Image(image), dst = Image(output), any = Kernel(kernel, Tag::any);
  const auto plain = Kernel(kernel, Tag::hwio);
  const auto forward = convolution_forward::primitive_desc(
      Engine(), dnnl::prop_kind::forward_training, kAlgorithm, src, any, dst, strides, pad, pad,
      attr);
  Convolution made;
  if (kind == kForward) {
    made.primitive = convolution_forward(forward);
    made.kernel = forward.weights_desc();
    made.scratchpad = forward.scratchpad_desc();
  } else if (kind == kInputGradient) {
    const auto desc = convolution_backward_data::primitive_desc(
        Engine(), kAlgorithm, src, any, dst, strides, pad, pad, forward, attr);
    made.primitive = convolution_backward_data(desc);
    made.kernel = desc.weights_desc();
    made.scratchpad = desc.scratchpad_desc();
  } else {
    const auto desc = convolution_backward_weights::primitive_desc(
        Engine(), kAlgorithm, src, any, dst, strides, pad, pad, forward, attr);
    made.primitive = convolution_backward_weights(desc);
    made.kernel = desc.diff_weights_desc();
    made.scratchpad = desc.scratchpad_desc();
  }
  made.image = src;
  made.output = dst;
  if (made.kernel != plain) {
    const bool to_plain = kind == kKernelGradient;
    made.reorders = true;
    made.reorder = dnnl::reorder(
        to_plain ? dnnl::reorder::primitive_desc(Engine(), made.kernel, Engine(), plain)
                 : dnnl::reorder::primitive_desc(Engine(), plain, Engine(), made.kernel));
  }
  return made;
}

// Returns the primitive for these shapes; it is made once.
const Convolution& Cached(int64_t kind, int64_t stride, int64_t padding,
                          const std::vector<int64_t>& image, const std::vector<int64_t>& kernel,
                          const std::vector<int64_t>& output) {
  static std::mutex mutex;
  static std::map<std::vector<int64_t>, Convolution> made;
  std::vector<int64_t> key{kind, stride, padding};
  for (const auto* dims : {&image, &kernel, &output}) key.insert(key.end(), dims->begin(), dims->end());
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = made.find(key);
  if (found != made.end()) return found->second;
  return made.emplace(key, Make(kind, stride, padding, image, kernel, output)).first->second;
}

std::vector<int64_t> Dims(ffi::Span<const int64_t> dims) { return {dims.begin(), dims.end()}; }

void Run(ffi::ThreadPool& pool, int64_t kind, int64_t stride, int64_t padding,
         ffi::Buffer<ffi::F32>& left, ffi::Buffer<ffi::F32>& right,
         ffi::Result<ffi::Buffer<ffi::F32>>& result) {
  // (image, kernel) -> output; (output's gradient, kernel) -> image's; (image, output's) -> kernel's.
  float* const out = result->typed_data();
  float* const image = kind == kInputGradient ? out : left.typed_data();
  float* const kernel = kind == kKernelGradient ? out : right.typed_data();
  float* const output = kind == kForward         ? out
                        : kind == kInputGradient ? left.typed_data()
                                                 : right.typed_data();
  auto image_dims = Dims(kind == kInputGradient ? result->dimensions() : left.dimensions());
  auto kernel_dims = Dims(kind == kKernelGradient ? result->dimensions() : right.dimensions());
  auto output_dims = Dims(kind == kForward         ? result->dimensions()
                          : kind == kInputGradient ? left.dimensions()
                                                   : right.dimensions());
  // Each thread convolves one part of the batch.
  const int64_t batch = image_dims[0], threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t length = (batch + threads - 1) / threads;
  const int64_t chunks = batch == 0 ? 0 : (batch + length - 1) / length;
  const int64_t image_size = image_dims[1] * image_dims[2] * image_dims[3];
  const int64_t output_size = output_dims[1] * output_dims[2] * output_dims[3];
  const auto of_chunk = [&](int64_t chunk) -> const Convolution& {
    auto own_image = image_dims, own_output = output_dims;
    own_image[0] = own_output[0] = std::min(length, batch - chunk * length);
    return Cached(kind, stride, padding, own_image, kernel_dims, own_output);
  };
  if (chunks == 0) {
    std::fill_n(out, result->element_count(), 0.0f);
    return;
  }
  dnnl::stream stream(Engine());
  omp_set_num_threads(1);  // XLA's threads share the work; OpenMP's would compete with them
  const Convolution& first = of_chunk(0);
  const memory plain(Kernel(kernel_dims, Tag::hwio), Engine(), kernel);
  const size_t size = first.kernel.get_size();
  // All chunks read the same kernel; each writes its own gradient.
  const int64_t copies = kind == kKernelGradient ? chunks : 1;
  const bool direct = !first.reorders && copies == 1;
  std::vector<float> own(direct ? 0 : copies * size / sizeof(float));
  float* const kernels = direct ? kernel : own.data();
  if (kind != kKernelGradient && first.reorders) {
    first.reorder.execute(stream, {{DNNL_ARG_FROM, plain}, {DNNL_ARG_TO, {first.kernel, Engine(), kernels}}});
    stream.wait();
  }
  ForEach(pool, chunks, [&](int64_t chunk) {
    omp_set_num_threads(1);
    const Convolution& conv = of_chunk(chunk);
    dnnl::stream stream(Engine());
    memory src(conv.image, Engine(), image + chunk * length * image_size);
    memory dst(conv.output, Engine(), output + chunk * length * output_size);
    const int64_t copy = kind == kKernelGradient ? chunk : 0;
    memory weights(conv.kernel, Engine(), kernels + copy * (size / sizeof(float)));
    thread_local std::vector<char> bytes;
    bytes.resize(std::max(bytes.size(), conv.scratchpad.get_size()));
    std::unordered_map<int, memory> args{
        {DNNL_ARG_SCRATCHPAD, {conv.scratchpad, Engine(), bytes.data()}}};
    args[kind == kInputGradient ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC] = src;
    args[kind == kForward ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST] = dst;
    args[kind == kKernelGradient ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS] = weights;
    conv.primitive.execute(stream, args);
    stream.wait();
  });
  if (kind != kKernelGradient || direct) return;
  const int64_t count = size / sizeof(float);
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {  // in this order, whatever thread was first
    for (int64_t index = 0; index < count; ++index) own[index] += own[chunk * count + index];
  }
  if (first.reorders) {
    first.reorder.execute(stream, {{DNNL_ARG_FROM, {first.kernel, Engine(), kernels}}, {DNNL_ARG_TO, plain}});
    stream.wait();
  } else {
    std::copy_n(kernels, count, kernel);
  }
}

ffi::Error Convolve(ffi::ThreadPool pool, int64_t kind, int64_t stride, int64_t padding,
                    ffi::Buffer<ffi::F32> left, ffi::Buffer<ffi::F32> right,
                    ffi::Result<ffi::Buffer<ffi::F32>> result) {
  try {
    Run(pool, kind, stride, padding, left, right, result);
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("oneDNN: ") + error.what());
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Convolution2D, Convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("kind")
                                  .Attr<int64_t>("stride")
                                  .Attr<int64_t>("padding")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
