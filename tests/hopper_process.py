# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
"""Compile the Hopper kernel without a GPU, in a process that Triton's interpreter is not on in.

    python hopper_process.py LATENTS ROPES SLOTS HEADS WARPS PAGE

Prints JSON: bytes of shared memory, and how many of Hopper's products and bulk copies are in the code.
"""

import json
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import compile as compile_source
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from care.kernels.hopper import _attend

VIEW = f"tensordesc<bf16[64, 64],{gl.NVMMASharedLayout(128, 16)!r}>"
POINTERS = {
    "q_latent": "*bf16", "q_rope": "*bf16", "view": VIEW, "table": "*i32", "lengths": "*i32", "sums": "*fp32",
    "logs": "*fp32", "score_scale": "fp32",
}  # fmt: skip


def main() -> None:
    """Compile one variant."""
    latents, ropes, slots, heads, warps, page = map(int, sys.argv[1:])
    constants = {
        "PAGE": page, "LATENTS": latents, "ROPES": ropes, "SLOTS": slots, "HEADS": heads, "num_warps": warps,
    }  # fmt: skip
    names = _attend.arg_names
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = GluonASTSource(_attend, signature, constants, aligned)
    compiled = compile_source(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    code = compiled.asm["ptx"]
    found = {"products": code.count("wgmma.mma_async"), "copies": code.count("cp.async.bulk.tensor")}
    print(json.dumps({"shared": compiled.metadata.shared, **found}))


if __name__ == "__main__":
    main()
