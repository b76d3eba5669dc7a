"""Compiles the Triton kernels for an H100 on a machine without a GPU: `python tests/helpers/triton_compile.py`.

Prints one line of JSON per kernel. Kernels must not be interpreted in this process, so tests run it as one of its own.
"""

import json
import re
import subprocess
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import SparseFFN, triton_ffn, triton_linear
from kernels.linear import SparseLinear

H100 = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int8: "*i8",
}
SMALL, LARGE, ODD, ONE = (2304, 5760, 2304), (4096, 11008, 4096), (37, 5, 21), (1, 1, 1)  # (d, d_ff, d_out)
CASES = [  # dtype, tokens, rule, act, gated and with biases, shape
    ("float32", 1, "gate", "relu", True, SMALL),
    ("float32", 16, "neuron", "gelu", False, SMALL),
    ("bfloat16", 1, "gate", "relu", True, LARGE),
    ("bfloat16", 16, "gate", "relu2", True, LARGE),
    ("float16", 1, "neuron", "silu", True, SMALL),
    ("float16", 16, "neuron", "gelu_tanh", True, SMALL),
    ("bfloat16", 3, "neuron", "relu", True, ODD),
    ("float16", 1, "gate", "silu", True, ONE),
]
LINEARS = [  # dtype, tokens, in 8 bits, (d, outputs)
    ("float32", 1, False, (576, 1536)),
    ("bfloat16", 1, False, (4096, 22016)),
    ("bfloat16", 4, False, (4096, 22016)),
    ("bfloat16", 1, True, (4096, 22016)),
    ("float32", 16, True, (576, 1536)),
]


def main() -> None:
    for *case, shape in CASES:
        ffn, x = tensors(getattr(torch, case[0]), *case[1:], *shape)
        report([*case, shape], partial(triton_ffn.launch, ffn, x, triton_ffn.sizes_for(ffn, len(x))))
    for case in LINEARS:
        report(case, partial(triton_linear.launch, *linear_tensors(*case)))


def report(case, call) -> None:
    """Print the figures of all kernels that a call would launch."""
    with recorded_launches() as launches:
        call()
    for kernel, args, options in launches:
        compiled = compile_as_launched(kernel, args, options)
        print(json.dumps({"case": case, "kernel": kernel.__name__} | figures(compiled)), flush=True)


def linear_tensors(dtype, tokens, eight_bits, shape):
    """Maps of one rule by limits and x, without memory."""
    dtype, (d, outputs) = getattr(torch, dtype), shape
    limits = torch.empty(1, d, device="meta")
    kinds = {"scale": limits, "dtype": dtype} if eight_bits else {}
    weight_t = torch.empty(d, outputs, dtype=torch.int8 if eight_bits else dtype, device="meta")
    return SparseLinear(weight_t, (outputs,), limits=limits, **kinds), torch.empty(
        tokens, d, dtype=dtype, device="meta"
    )


def tensors(dtype, tokens, rule, act, gated, d, d_ff, d_out):
    """An FFN and x, without memory."""

    def empty(*size, dtype=dtype):
        return torch.empty(size, dtype=dtype, device="meta")

    b_gate, b_up, b_down = (empty(d_ff), empty(d_ff), empty(d_out)) if gated else (None, None, None)
    w_up = empty(d_ff, d) if gated else None
    threshold = empty(d_ff, dtype=torch.float32)
    ffn = SparseFFN(empty(d_ff, d), w_up, empty(d_ff, d_out), threshold, act, rule, b_gate, b_up, b_down)
    return ffn, empty(tokens, d)


@contextmanager
def recorded_launches():
    """(kernel, positional arguments, keyword arguments) of each launch, none of which happens."""
    launches = []
    with mock.patch.object(triton.JITFunction, "__getitem__", recorder(launches)):
        yield launches


def recorder(launches):
    return lambda kernel, grid: lambda *args, **options: launches.append((kernel, args, options))


def compile_as_launched(kernel, args, options):
    """The kernel specialised to arguments as Triton's launcher would: addresses, and such sizes, divisible by 16."""
    num_warps = options.pop("num_warps")
    signature, constants, attributes = dict.fromkeys(options, "constexpr"), dict(options), {}
    for at, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1 and name != "tokens"):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = "i32" if isinstance(value, int) else POINTERS[value.dtype]
        if not isinstance(value, int) or (value % 16 == 0 and name != "tokens"):
            attributes[(at,)] = [["tt.divisibility", 16]]
    ordered = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, ordered, constants, attributes)
    return triton.compile(source, target=H100, options={"num_warps": num_warps})


def figures(compiled) -> dict[str, int]:
    """What the assembler says of the machine code, in registers per thread and bytes, and what its PTX does."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v[48]\.b32", ptx)),
        "wide_copies": len(re.findall(r"cp\.async\.cg\.shared\.global .*, 0x10,", ptx)),
        "tensor_cores": len(re.findall(r"mma\.sync", ptx)),
        "float_atomics": len(re.findall(r"(?:atom|red)\.\S*\.f(?:16|32)", ptx)),
    }


if __name__ == "__main__":
    main()
