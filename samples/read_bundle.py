"""Read any flexmerge bundle with numpy and json alone: `python read_bundle.py BUNDLE [TASK]` checks every tensor.

`read_task(bundle, task)` gives {name: (dtype, array)}; bfloat16 comes as float32 values. The format is on one page:
manifest.json says which files a task reads; a part is stored once, in the file of exactly the tasks that read it. A
tensor under its plain name is dense. Otherwise it is decoded from `<tensor>@<role>[.<task>]`:

    masked    base + gamma · mask · unified     mask: one bit per element, least significant first; gamma may be absent
"""

import json
import sys
from pathlib import Path

import numpy as np

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
         "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "C64": "<c8"}  # fmt: skip


def read_file(path):
    """A safetensors file: {name: (dtype, bits)}."""
    data = np.memmap(path, np.uint8, mode="r")
    size = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + size].tobytes())
    header.pop("__metadata__", None)
    start = {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}
    end = {name: 8 + size + entry["data_offsets"][1] for name, entry in header.items()}
    return {n: (e["dtype"], data[start[n] : end[n]].view(NUMPY[e["dtype"]])) for n, e in header.items()}


def floats(part):
    """Bits as float32."""
    dtype, bits = part
    return (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else bits.astype(np.float32)


def bits_of(values, dtype):
    """float32 rounded to a dtype, half to even, as bits."""
    if dtype != "BF16":
        return values.astype(NUMPY[dtype])
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def read_task(bundle, task):
    """{own name: (dtype, bits in the task's shape)}."""
    manifest = json.loads((Path(bundle) / "manifest.json").read_bytes())
    names = {name: record["names"] for name, record in manifest["tasks"].items()}
    dense, coded = {}, {}
    for path in manifest["tasks"][task]["files"]:
        if path.startswith("weights/"):
            found = read_file(Path(bundle) / path)
            coded |= found
            first = names[manifest["files"][path]["tasks"][0]]  # a dense part has its first reader's name
            plain = {tensor["name"]: first.get(tensor["name"], tensor["name"]) for tensor in manifest["tensors"]}
            dense |= {name: found[own] for name, own in plain.items() if own in found}
    unit_of = {tensor: unit["name"] for unit in manifest["units"] for tensor in unit["tensors"]}
    tensors = {}
    for tensor in (t for t in manifest["tensors"] if task in t["digests"]):
        dtype = tensor.get("dtypes", {}).get(task, tensor["dtype"])
        shape = tensor.get("shapes", {}).get(task, tensor["shape"])
        name = tensor.get("of", tensor["name"])
        if name in dense:
            part = dense[name]
            bits = part[1] if part[0] == dtype else bits_of(floats(part), dtype)
        else:
            base, unified = floats(coded[f"{name}@base"]), floats(coded[f"{name}@unified"])
            mask = np.unpackbits(coded[f"{name}@mask.{task}"][1], count=base.size, bitorder="little").astype(bool)
            gamma = coded.get(f"{unit_of[name]}@gamma.{task}", ("F32", np.ones(1, np.float32)))[1][0]
            bits = bits_of(np.where(mask, base + gamma * unified, base), dtype)
        tensors[names[task].get(tensor["name"], tensor["name"])] = dtype, bits.reshape(shape)
    return tensors


def check(bundle, task):
    """Compare every tensor with its digest: xxh3-128 over the xxh3-128s of its 1 MiB pieces."""
    import xxhash

    manifest = json.loads((Path(bundle) / "manifest.json").read_bytes())
    own, tensors = manifest["tasks"][task]["names"], read_task(bundle, task)
    for tensor in (t for t in manifest["tensors"] if task in t["digests"]):
        data = tensors[own.get(tensor["name"], tensor["name"])][1].tobytes()
        pieces = [xxhash.xxh3_128_digest(data[at : at + 2**20]) for at in range(0, len(data), 2**20)]
        if xxhash.xxh3_128_hexdigest(b"".join(pieces)) != tensor["digests"][task]:
            sys.exit(f"{task}: {tensor['name']} is damaged")
    return len(tensors)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for each in sys.argv[2:] or json.loads((folder / "manifest.json").read_bytes())["tasks"]:
        print(f"{each}: {check(folder, each)} tensors, all sound")
