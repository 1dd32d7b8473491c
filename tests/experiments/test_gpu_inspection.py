"""What the inspection of GPU programs counts, on programs written by hand: no GPU, no plugin."""

from types import SimpleNamespace

import pytest

from experiments.gpu_programs.hlo import Kernel, Module
from experiments.gpu_programs.inspection import Body, Program, inspect, predict
from experiments.gpu_programs.targets import GPU

PROGRAM = """HloModule jit_run, is_scheduled=true

%fused_slice (param_0.1: f32[8,1024], param_1.1: s32[]) -> f32[1024] {
  %param_0.1 = f32[8,1024]{1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %bitcast.1 = f32[8,1,1024]{2,1,0} bitcast(%param_0.1)
  ROOT %part = f32[1024]{0} dynamic-slice(%bitcast.1, %param_1.1), dynamic_slice_sizes={1,1,1024}
}

%fused_update (param_0.2: f32[8,1024], param_1.2: f32[1024], param_2.2: s32[]) -> f32[8,1024] {
  %param_0.2 = f32[8,1024]{1,0} parameter(0)
  %param_1.2 = f32[1024]{0} parameter(1)
  %param_2.2 = s32[] parameter(2)
  %bitcast.2 = f32[1,1024]{1,0} bitcast(%param_1.2)
  ROOT %updated = f32[8,1024]{1,0} dynamic-update-slice(%param_0.2, %bitcast.2, %param_2.2)
}

%gemm_computation (param_0.3: f32[32,64], param_1.3: f32[32,16]) -> f32[64,16] {
  %param_0.3 = f32[32,64]{1,0} parameter(0)
  %param_1.3 = f32[32,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[64,16]{1,0} dot(%param_0.3, %param_1.3), lhs_contracting_dims={0}, x={0}
}

%fused_transpose (param_0.4: f32[1024,1024]) -> f32[1024,1024] {
  %param_0.4 = f32[1024,1024]{1,0} parameter(0)
  ROOT %transpose.1 = f32[1024,1024]{0,1} transpose(%param_0.4), dimensions={1,0}
}

%step_condition (p.1: (s32[], f32[32,64])) -> pred[] {
  %p.1 = (s32[], f32[32,64]{1,0}) parameter(0)
  ROOT %less.1 = pred[] compare(%p.1, %p.1), direction=LT
}

%step (p.2: (s32[], f32[32,64])) -> (s32[], f32[32,64]) {
  %p.2 = (s32[], f32[32,64]{1,0}, /*index=2*/f32[8,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p.2), index=0
  %a = f32[32,64]{1,0} get-tuple-element(%p.2), index=1
  %many = f32[8,1024]{1,0} get-tuple-element(%p.2), index=2
  %b = f32[32,16]{1,0} constant({...})
  %x = f32[4,8,8,3]{3,2,1,0} constant({...})
  %w = f32[16,3,3,3]{3,2,1,0} constant({...})
  %one = f32[1024]{0} fusion(%many, %i), kind=kLoop, calls=%fused_slice
  %put = f32[8,1024]{1,0} fusion(%many, %one, %i), kind=kLoop, calls=%fused_update
  %product = f32[64,16]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm_computation
  %conv = (f32[4,8,8,16]{3,2,1,0}, u8[999]{0}) custom-call(%x, %w), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", backend_config={"a":"(b)"}
  %y = f32[4,8,8,16]{3,2,1,0} get-tuple-element(%conv), index=0
  %dw = (f32[16,3,3,3]{3,2,1,0}, u8[9]{0}) custom-call(%x, %y), dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardFilter"
  %dx = (f32[4,8,8,3]{3,2,1,0}, u8[9]{0}) custom-call(%y, %w), dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardInput"
  ROOT %t = (s32[], f32[32,64]{1,0}, f32[8,1024]{1,0}) tuple(%i, %a, %put)
}

%until_condition (p.3: s32[]) -> pred[] {
  %p.3 = s32[] parameter(0)
  ROOT %less.3 = pred[] compare(%p.3, %p.3), direction=LT
}

%until (p.4: s32[]) -> s32[] {
  %p.4 = s32[] parameter(0)
  ROOT %next = s32[] copy(%p.4)
}

%round_condition (p.5: s32[]) -> pred[] {
  %p.5 = s32[] parameter(0)
  ROOT %less.5 = pred[] copy(%p.5)
}

%round (p.6: f32[1024,1024]) -> f32[1024,1024] {
  %p.6 = f32[1024,1024]{1,0} parameter(0)
  %turned = f32[1024,1024]{0,1} fusion(%p.6), kind=kInput, calls=%fused_transpose
  %zero = s32[] constant(0)
  %found = s32[] while(%zero), condition=%until_condition, body=%until
  %start = (s32[], f32[32,64]{1,0}, f32[8,1024]{1,0}) tuple(%zero, %zero, %zero)
  %steps = (s32[], f32[32,64]{1,0}, f32[8,1024]{1,0}) while(%start), condition=%step_condition, \
body=%step, backend_config={"known_trip_count":{"n":"16"}}
  ROOT %same = f32[1024,1024]{1,0} copy(%turned)
}

ENTRY %main (p.7: f32[1024,1024]) -> f32[1024,1024] {
  %p.7 = f32[1024,1024]{1,0} parameter(0)
  ROOT %rounds = f32[1024,1024]{1,0} while(%p.7), condition=%round_condition, body=%round
}
"""
THUNKS = """000: kWhile         [source]
condition:
    001: kCustomKernel [source] copy
  body:
    002: kCustomKernel [source] turned
    003: kWhile         [source]
condition:
        004: kCustomKernel [source] less
      body:
        005: kCopy [source] next
    006: kWhile         [source]
condition:
        007: kCustomKernel [source] less
      body:
        000: kCommandBuffer [source]
            008: kCustomKernel [source] one
            009: kCustomKernel [source] put
            010: kCustomKernel [source] product
        011: kConvolution [source] conv
        012: kConvolution [source] dw
        013: kConvolution [source] dx
    014: kCopy [source] same
"""
MEMORY = SimpleNamespace(
    argument_size_in_bytes=100,
    output_size_in_bytes=30,
    temp_size_in_bytes=7,
    alias_size_in_bytes=20,
)


def compiled(text=PROGRAM):
    return SimpleNamespace(as_text=lambda: text, memory_analysis=lambda: MEMORY)


def test_kernels_of_a_local_step():
    """Slices and updates in place move their own bytes, scratch memory none."""
    one, put, product, *convolutions = inspect(compiled()).step.kernels
    assert one == Kernel("one", False, 2 * 4096 + 4, 0)
    assert put == Kernel("put", False, 2 * 4096 + 4, 0)
    assert product == Kernel("product", False, 4 * (32 * 64 + 32 * 16 + 64 * 16), 2 * 64 * 16 * 32)
    assert [kernel.name for kernel in convolutions] == ["conv", "dw", "dx"]
    moved, flops = 4 * (4 * 64 * 3 + 16 * 27 + 4 * 64 * 16), 2 * (4 * 64 * 16) * 27
    assert [kernel[1:] for kernel in convolutions] == [(False, moved, flops)] * 3


def test_the_rest_of_a_round():
    """The loop over local steps is left out; one of unknown length is counted once."""
    program = inspect(compiled())
    assert program.local_steps == 16
    names = [kernel.name for kernel in program.round.kernels]
    assert names == ["turned", "same", "next", "less.3", "less.5"]
    assert program.round.large_copies == 2
    assert program.step.large_copies == 0
    assert program.peak == 117


def test_the_host_waits_where_the_device_alone_knows():
    assert (inspect(compiled()).step.waits, inspect(compiled()).round.waits) == (0, 3)
    for line in (
        "  %c = s32[] conditional(%i, %a, %b), branch_computations={%until, %until}\n",
        '  %c = s32[] custom-call(%i), custom_call_target="xla_ffi_python_gpu_callback"\n',
    ):
        assert inspect(compiled(PROGRAM.replace("  %one", line + "  %one"))).step.waits == 1
    unknown = PROGRAM.replace('%step, backend_config={"known_trip_count":{"n":"16"}}', "%step")
    with pytest.raises(ValueError, match="must have a loop of known length"):
        inspect(compiled(unknown))


def test_a_graph_is_one_launch():
    assert inspect(compiled()).step.launches == 6
    program = inspect(compiled(), THUNKS)
    assert program.step.launches == 4
    assert len(program.step.kernels) == 6
    assert program.round.launches == 5


def test_operands_may_come_with_their_types():
    """As other versions of XLA write them."""
    typed = PROGRAM.replace("fusion(%a, %b)", "fusion(f32[32,64]{1,0} %a, f32[32,16]{1,0} %b)")
    assert inspect(compiled(typed)) == inspect(compiled())


def test_a_library_product_and_a_call():
    text = """
%inner (p: f32[2,3]) -> f32[2,3] {
  %p = f32[2,3]{1,0} parameter(0)
  ROOT %q = f32[2,3]{1,0} copy(%p)
}

ENTRY %main (a: f32[8,5], b: f32[5,7]) -> f32[8,7] {
  %a = f32[8,5]{1,0} parameter(0)
  %b = f32[5,7]{1,0} parameter(1)
  %called = f32[2,3]{1,0} call(%a), to_apply=%inner
  %gemm = (f32[8,7]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot":{"lhs_contracting_dimensions":["1"]}}}
}
"""
    module = Module(text)
    copy, gemm = module.kernels(module.entry)
    assert copy == Kernel("q", True, 48, 0)
    assert gemm == Kernel("gemm", False, 4 * (40 + 35 + 56), 2 * 8 * 7 * 5)


def test_prediction():
    gpu = GPU("a GPU", bandwidth=1e9, memory=1e9, flops=1e9)
    small, large = Kernel("", False, 1, 0), Kernel("", False, 5_000, 3_000)
    round_ = Body((small,), launches=5, waits=3)
    program = Program(10, Body((small, large), launches=1, waits=0), round_, peak=0)
    # Local steps wait for the device, 2 and 8 µs; a round for the host, 5 · 4 µs, and thrice.
    assert predict(program, gpu, 100) == pytest.approx(10 * (10 * 10e-6 + 20e-6 + 3 * 20e-6))
    program = program._replace(step=program.step._replace(launches=3))
    assert predict(program, gpu, 100) == pytest.approx(10 * (10 * 12e-6 + 20e-6 + 3 * 20e-6))
