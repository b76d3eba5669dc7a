"""Compiles the Triton kernels for an H100 on a machine without a GPU: `python tests/helpers/triton_compile.py`.

Prints one line of JSON per kernel. Kernels must not be interpreted in this process, so tests run it as one of its own.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import SparseFFN, triton_ffn

H100 = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
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


def main() -> None:
    for case in CASES:
        for name, compiled in compiled_kernels(*case):
            print(json.dumps({"case": case, "kernel": name} | figures(compiled)), flush=True)


def compiled_kernels(dtype, tokens, rule, act, gated, shape) -> Iterator[tuple[str, object]]:
    """Name and machine code of both kernels, as a call of such an FFN would launch them."""
    ffn, x = tensors(getattr(torch, dtype), tokens, rule, act, gated, *shape)
    with recorded_launches() as launches:
        triton_ffn.launch(ffn, x, triton_ffn.sizes_for(ffn, tokens))
    for kernel, args, options in launches:
        yield kernel.__name__, compile_as_launched(kernel, args, options)


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
