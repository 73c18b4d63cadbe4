"""onnxruntime and OpenVINO: one-layer models over the same weight. They take fp32 or fp16 inputs, made beforehand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Call, copies_for
from peers import GROUP, Layers, Missing, group_quantized, ungrouped
from torch import Tensor

import nybble


def onnxruntime_layers(bits: int, accuracy_level: int) -> Callable[[Tensor, int], Layers]:
    """MatMulNBits, block 64, fp32 input; accuracy level 4 multiplies in int8, 0 in fp32."""

    def build(weight: Tensor, rotation: int) -> Layers:
        try:
            import onnxruntime
        except ImportError as error:
            raise Missing("onnxruntime is not installed") from error
        model = _onnx_model(weight, bits, accuracy_level)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Spinning helps it within a run; after one, its threads must leave the cores to the next contestant.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        count = copies_for(weight.numel() * bits // 8, rotation)
        sessions = [
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for _ in range(count)
        ]

        def bind(x: Tensor) -> Call:
            source = x.float().contiguous()
            value = onnxruntime.OrtValue.ortvalue_from_numpy(source.numpy())
            out = torch.empty(x.shape[0], weight.shape[0])
            target = onnxruntime.OrtValue.ortvalue_from_numpy(out.numpy())
            bindings = []
            for session in sessions:
                binding = session.io_binding()
                binding.bind_ortvalue_input("x", value)
                binding.bind_ortvalue_output("y", target)
                session.run_with_iobinding(binding)
                bindings.append((session, binding))

            def call(turn: int) -> object:
                session, binding = bindings[turn % count]
                session.run_with_iobinding(binding)
                return target

            return call

        return Layers(
            f"onnxruntime {onnxruntime.__version__} MatMulNBits, {bits} bits, accuracy level {accuracy_level}, fp32",
            lambda: ungrouped(weight, bits),
            bind,
            lambda value: torch.from_numpy(value.numpy()),
            0.02 if accuracy_level == 4 else 0.01,
        )

    return build


def _onnx_model(weight: Tensor, bits: int, accuracy_level: int) -> bytes:
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise Missing("onnx is not installed") from error
    q, scales = group_quantized(weight, bits)
    codes = (q + 2 ** (bits - 1)).to(torch.uint8)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4 if bits == 4 else codes
    n, k = weight.shape
    node = helper.make_node(
        "MatMulNBits",
        ["x", "packed", "scales"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=bits,
        block_size=GROUP,
        accuracy_level=accuracy_level,
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(packed.numpy(), "packed"), numpy_helper.from_array(scales.numpy(), "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def openvino_layers(kind: str) -> Callable[[Tensor, int], Layers]:
    """A MatMul over a compressed constant: "u4" and "i8" with int8 activations, "nf4" in bf16 (fp32 without it)."""

    def build(weight: Tensor, rotation: int) -> Layers:
        try:
            import openvino
        except ImportError as error:
            raise Missing("openvino is not installed") from error
        codes, scales, dense = _openvino_codes(weight, kind)
        core = openvino.Core()
        bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
            # Dynamic int8 activations exist for fp32 inference only.
            "INFERENCE_PRECISION_HINT": "bf16" if kind == "nf4" and bf16 else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0 if kind == "nf4" else GROUP,
        }
        count = copies_for(weight.numel() * (8 if kind == "i8" else 4) // 8, rotation)
        requests = []
        for _ in range(count):
            # A fresh model each: one constant shared by all copies would be no rotation.
            compiled = core.compile_model(_openvino_model(openvino, codes, scales, kind), "CPU", settings)
            requests.append(compiled.create_infer_request())

        def bind(x: Tensor) -> Call:
            source = openvino.Tensor(x.float().contiguous().numpy().copy())
            for request in requests:
                request.set_input_tensor(source)
                request.infer()  # repacks the weight for this M at the first call

            def call(turn: int) -> object:
                request = requests[turn % count]
                request.infer()
                return request

            return call

        how = "bf16" if kind == "nf4" else "int8 activations"
        return Layers(
            f"openvino {openvino.__version__.split('-')[0]} {kind}, group 64, {how}",
            lambda: dense,
            bind,
            lambda request: torch.from_numpy(request.get_output_tensor().data.copy()),
            0.01 if kind == "nf4" else 0.02,
        )

    return build


def _openvino_codes(weight: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales, by groups unless "i8", and the weight that they stand for."""
    n, k = weight.shape
    if kind == "nf4":
        groups = weight.float().reshape(n, -1, GROUP)
        scales = groups.abs().amax(-1).half().float()
        book = torch.tensor(nybble.formats.NF4)
        codes = torch.bucketize(groups / scales[..., None], (book[1:] + book[:-1]) / 2).to(torch.uint8)
        dense = (book[codes.long()] * scales[..., None]).reshape(n, k)
    elif kind == "u4":
        q, scales = group_quantized(weight)
        codes, dense = (q + 8).to(torch.uint8), ungrouped(weight)
    else:
        scales = (weight.float().abs().amax(1, keepdim=True) / 127).half().float()
        q = (weight.float() / scales).round().clamp(-127, 127)
        codes, dense = q.to(torch.int8), q * scales
    return codes, scales, dense


def _openvino_model(openvino: object, codes: Tensor, scales: Tensor, kind: str) -> object:
    """A model of x [?, K] with its own copy of the codes."""
    import numpy as np
    import openvino.opset13 as op

    n, k = codes.shape[0], codes[0].numel()
    data = codes if kind == "i8" else codes[..., 0::2] | codes[..., 1::2] << 4
    held = openvino.Tensor(getattr(openvino.Type, kind), openvino.Shape(list(codes.shape)))
    held.data.reshape(-1).view(np.uint8)[:] = data.numpy().reshape(-1).view(np.uint8)
    value = op.convert(openvino.op.Constant(held), "f16")
    if kind == "u4":
        zero = openvino.op.Constant(openvino.Type.u4, openvino.Shape([1, 1, 1]), [8])
        value = op.subtract(value, op.convert(zero, "f16"))
    factor = scales.numpy().astype(np.float16)
    value = op.multiply(value, op.constant(factor if kind == "i8" else factor[..., None]))
    if kind != "i8":
        value = op.reshape(value, np.array([n, k]), False)
    x = op.parameter([-1, k], np.float32, name="x")
    return openvino.Model([op.matmul(x, op.convert(value, "f32"), False, True)], [x], "layer")
