"""Read any flexmerge bundle with numpy and json alone: `python read_bundle.py BUNDLE [TASK]` checks every tensor.

`read_task(bundle, task)` gives {name: (dtype, array)}; bfloat16 comes as its bits. The format is on one page:
manifest.json says which files of weights/ a task reads; links in tasks/NAME lead to the same files. A part is stored
once, in the file of exactly the tasks that read it. A tensor under its plain name is dense. Otherwise it is decoded
from `<tensor>@<role>[.<task>]`, as its group's kind says:

    masked     base + gamma · mask · unified     mask: one bit an element; gamma, of the unit, may be absent
    superposed base + sign · unified             signs are drawn, with the method's seed
    residual   centre + residual, both float32   centre: base, unified, codes and scale, or none at all
               scale · levels[codes]             low_bit, bitdelta: codes of b bits, every row from a new byte on
               left · right                      low_rank, tsv_c: a float64 product
               values at index                   sparse, free: ascending positions, a bitmap or Elias–Fano

A task with `adapter` is the base, `<tensor>@base` or a plain name with the same bits, and what its own file adds: a
value, scale · left · right summed term by term in float64, or · vector along an axis; `changes` says where it lies.
Where models differ in their vocabularies, a tensor is the rows that all have, at the places that `vocabularies` gives
as runs, and `<tensor>@rows` at the others. A tensor of `splits` is `<tensor>@part0`, …, side by side along `dim`. Bits
are counted from the least significant of a byte.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
         "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "C64": "<c8"}  # fmt: skip
CODED = ("base", "unified", "codes", "scale", "levels", "left", "right", "index", "values")
RUNS = {0.1875: 32, 0.3125: 16, 0.5: 8, 0.75: 4}  # bits of an element -> elements of a pattern
GAUSS = {1: [0.797884560803], 2: [0.452780034636, 1.510417608499],
         3: [0.245094178944, 0.756005281206, 1.343909278505, 2.151945704537]}  # fmt: skip


def read_file(path):
    """A safetensors file: {name: (dtype, bits)}."""
    data = np.memmap(path, np.uint8, mode="r")
    size = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + size].tobytes())
    header.pop("__metadata__", None)
    rest, parts = data[8 + size :], {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        parts[name] = entry["dtype"], rest[start:end].view(NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return parts


def floats(part, precision=np.float32):
    """Bits as float32, or as float64."""
    dtype, bits = part
    return ((bits.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else bits).astype(precision)


def scales(part):
    """float32 [m, 1]; bytes stand for powers of 2^(1/4), and 0 for 0."""
    dtype, bits = part
    steps = np.concatenate([[0], np.exp2((np.arange(1, 256) - 192) / 4)]).astype(np.float32)
    return (steps[bits] if dtype == "U8" else floats(part))[:, None]


def bits_of(values, dtype):
    """float32 rounded to a dtype, half to even, as bits."""
    if dtype != "BF16":
        return values.astype(NUMPY[dtype])
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def numbers(packed, count, width):
    """uint8 [..., bytes] -> count numbers of so many bits, [..., count]."""
    bits = np.unpackbits(packed, axis=-1, bitorder="little", count=count * width)
    return bits.reshape(*bits.shape[:-1], count, width) @ (1 << np.arange(width))


def positions(blob, size, count):
    """Where the kept elements are, ascending in [0, size)."""
    low = max(0, (size // max(1, count)).bit_length() - 1)
    low_bytes, high_bits = -(-count * low // 8), count + (size - 1 >> low) + 1
    if not count or -(-size // 8) <= low_bytes + -(-high_bits // 8):
        return np.flatnonzero(np.unpackbits(blob, bitorder="little"))
    high = np.flatnonzero(np.unpackbits(blob[low_bytes:], bitorder="little")) - np.arange(count)
    return (high << low) + numbers(blob[:low_bytes], count, low)


def decode(parts, size, bits, levels=None):
    """{role: (dtype, bits)} to float32 [size]; levels: what a code stands for, where that is not stored."""
    if "index" in parts:
        values = np.zeros(size, np.float32)
        values[positions(parts["index"][1], size, parts["values"][1].size)] = floats(parts["values"])
    elif "left" in parts:
        values = floats(parts["left"], np.float64) @ floats(parts["right"], np.float64)
    elif bits < 1:  # patterns of signs
        codes, run, at = parts["codes"][1], RUNS[bits], np.arange(RUNS[bits])
        m = parts["scale"][1].size  # rows; a row of codes may be those of eight, four or two
        odd = sum((at[:, None] & at) >> bit & 1 for bit in range(5)) & 1
        patterns = np.concatenate([1 - 2 * odd, 2 * odd - 1]).astype(np.float32)
        n = size // m
        runs = numbers(codes, m // len(codes) * -(-n // run), run.bit_length()).reshape(m, -(-n // run))
        values = patterns[runs].reshape(m, -1)[:, :n] * scales(parts["scale"])
    else:
        if "levels" in parts:
            levels = parts["levels"][1]
        elif levels is None and bits > 3:  # evenly spaced; else those of a normal distribution
            levels = np.arange(1 << bits) - ((1 << bits - 1) - 1)
        elif levels is None:
            levels = [-level for level in GAUSS[bits][::-1]] + GAUSS[bits]
        codes = parts["codes"][1]
        values = np.float32(levels)[numbers(codes, size // len(codes), bits)] * scales(parts["scale"])
    return values.astype(np.float32).reshape(-1)


def decode_residual(parts, name, task, size, method, group):
    """centre + residual of one tensor and task, float32 [size]. parts: all that the task reads."""
    shared = {role: parts[f"{name}@{role}"] for role in CODED if f"{name}@{role}" in parts}
    # Tasks with bits of their own: equal ones share a part, named by the first of them. A mixture has all parts.
    owners = [task] if group["kind"] == "mixture" else group["tasks"]
    own = {role: parts[f"{name}@{role}.{who}"] for who in owners for role in CODED
           if f"{name}@{role}.{who}" in parts}  # fmt: skip
    bits, centre_bits = method["args"].get("bits", 1), method["args"].get("centre_bits")
    if "run" in method["args"]:
        bits = {run: bits for bits, run in RUNS.items()}[method["args"]["run"]]
    if "bits" in group:
        bits = group["bits"][task]
    elif "codes" in shared and len(shared["codes"][1]) == 1:  # a vector: 8 bits on 8 bits
        bits = centre_bits = 8
    if not own:  # 0 bits: the centre alone
        return decode(shared, size, centre_bits) if "codes" in shared else floats(*shared.values()).reshape(-1)
    residual = decode(own, size, bits, [-1, 1] if method["name"] == "bitdelta" else None)
    if "codes" in shared:
        return decode(shared, size, centre_bits) + residual
    centre = shared.get("base", shared.get("unified"))
    return residual if centre is None else floats(centre).reshape(-1) + residual


def signs(seed, task, name, count):
    """The signs of a tensor's elements, float32 [count]: bits of splitmix64, the lowest of its 64 first; 1 is +."""
    text = "\0".join(["flexmerge/superposed/1", str(seed), task, name])
    key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], "<u8")
    z = np.arange(1, count // 64 + 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    drawn = np.unpackbits(z.astype("<u8").view(np.uint8), bitorder="little", count=count)
    return 2 * drawn.astype(np.float32) - 1


def place(file, at):
    """An array of an adapter's file: (dtype, bits)."""
    kind = np.dtype(NUMPY[at["dtype"]])
    strides = [step * kind.itemsize for step in at["strides"]] if "strides" in at else None
    return at["dtype"], np.ndarray(at["shape"], kind, file, at["offset"], strides)


def adapt(part, change, file):
    """(dtype, bits) of what an adapter makes of a base's part."""
    dtype, bits = part = place(file, change["value"]) if "value" in change else part
    if "left" not in change and "vector" not in change:
        return part
    values = floats(part, np.float64 if dtype == "F64" else np.float32).reshape(bits.shape[0], -1)
    if "left" in change:
        left, right = (floats(place(file, change[side]), np.float64) for side in ("left", "right"))
        total = left[:, :1] * right[:1]
        for k in range(1, len(right)):
            total += left[:, k, None] * right[k]
        values = values + (total * change["scale"]).astype(np.float32)
    else:
        vector = floats(place(file, change["vector"]))[0]
        values = values * (vector[:, None] if change["axis"] == 0 else vector.repeat(values.shape[1] // len(vector)))
    return dtype, bits_of(values, dtype)


def read_stored(bundle, task):
    """{aligned name: (dtype, bits)} of all that has a digest."""
    manifest = json.loads((Path(bundle) / "manifest.json").read_bytes())
    adapter = manifest["tasks"][task].get("adapter")
    weights = np.memmap(Path(bundle) / "tasks" / task / adapter["weights"], np.uint8, mode="r") if adapter else None
    names = {name: record["names"] for name, record in manifest["tasks"].items()}
    dense, coded, tensors = {}, {}, {}
    for path in (path for path in manifest["tasks"][task]["files"] if path.startswith("weights/")):
        found = read_file(Path(bundle) / path)
        coded |= found
        first = names[manifest["files"][path]["tasks"][0]]  # a dense part has its first reader's name
        plain = {tensor["name"]: first.get(tensor["name"], tensor["name"])
                 for tensor in manifest["tensors"] + manifest.get("rows", [])}  # fmt: skip
        dense |= {name: found[own] for name, own in plain.items() if own in found}
    places = {name: (unit["name"], group) for unit in manifest["units"] for group in unit["groups"]
              for name in unit["tensors"] if task in group["tasks"]}  # fmt: skip
    for tensor in (t for t in manifest["tensors"] + manifest.get("rows", []) if task in t["digests"]):
        name, dtype = tensor.get("of", tensor["name"]), tensor.get("dtypes", {}).get(task, tensor["dtype"])
        shape = tensor.get("shapes", {}).get(task, tensor["shape"])
        if adapter:
            base = coded.get(f"{name}@base", dense.get(name, coded.get(name)))
            dtype, bits = adapt(base, adapter["changes"].get(name, {}), weights)
        elif name in dense:
            stored, bits = dense[name]
            bits = bits if stored == dtype else bits_of(floats(dense[name]), dtype)
        elif places[name][1]["kind"] in ("residual", "mixture"):
            group = places[name][1]
            method = manifest["methods"][group["method"]]
            bits = bits_of(decode_residual(coded, name, task, int(np.prod(shape)), method, group), dtype)
        elif places[name][1]["kind"] == "superposed":
            base, unified = floats(coded[f"{name}@base"]), floats(coded[f"{name}@unified"])
            seed = manifest["methods"][places[name][1]["method"]]["args"]["seed"]
            bits = bits_of(base + signs(seed, task, name, base.size).reshape(base.shape) * unified, dtype)
        else:
            base, unified = floats(coded[f"{name}@base"]), floats(coded[f"{name}@unified"])
            mask = numbers(coded[f"{name}@mask.{task}"][1], base.size, 1).reshape(base.shape)
            gamma = coded.get(f"{places[name][0]}@gamma.{task}", ("F32", np.ones(1, np.float32)))[1][0]
            bits = bits_of(np.where(mask, base + gamma * unified, base), dtype)
        tensors[tensor["name"]] = dtype, bits.reshape(shape)
    return tensors


def read_task(bundle, task):
    """{own name: (dtype, bits in the task's shape)}."""
    manifest, stored = json.loads((Path(bundle) / "manifest.json").read_bytes()), read_stored(bundle, task)
    own, joined = manifest["tasks"][task]["names"], {}
    for tensor in (t for t in manifest["tensors"] if task in t["digests"]):
        name, (dtype, bits) = tensor["name"], stored[tensor["name"]]
        for rows in (v["tasks"][task] for v in manifest.get("vocabularies", [])
                     if name in v["tensors"] and task in v["tasks"]):  # fmt: skip
            common = np.concatenate([np.arange(first, first + count) for first, count in rows["common"]])
            others = np.setdiff1d(np.arange(rows["rows"]), common)
            if len(others):
                bits = np.concatenate([bits, stored[f"{tensor.get('of', name)}@rows"][1]])
            bits = bits[np.argsort(np.concatenate([common, others]))]
        joined[own.get(name, name)] = dtype, bits
    for split in manifest.get("splits", []):
        names = (own.get(name, name) for name in (f"{split['tensor']}@part{k}" for k in range(split["parts"])))
        if parts := [(name, *joined.pop(name)) for name in names if name in joined]:
            whole = np.concatenate([bits for *_, bits in parts], axis=split["dim"])
            joined[parts[0][0].removesuffix("@part0")] = parts[0][1], whole
    return joined


def check(bundle, task):
    """Compare every tensor with its digest: xxh3-128 over the xxh3-128s of its 1 MiB pieces."""
    import xxhash

    manifest = json.loads((Path(bundle) / "manifest.json").read_bytes())
    tensors = read_stored(bundle, task)
    for tensor in (t for t in manifest["tensors"] + manifest.get("rows", []) if task in t["digests"]):
        data = tensors[tensor["name"]][1].tobytes()
        pieces = [xxhash.xxh3_128_digest(data[at : at + 2**20]) for at in range(0, len(data), 2**20)]
        if xxhash.xxh3_128_hexdigest(b"".join(pieces)) != tensor["digests"][task]:
            sys.exit(f"{task}: {tensor['name']} is damaged")
    return sum(task in tensor["digests"] for tensor in manifest["tensors"])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for each in sys.argv[2:] or json.loads((folder / "manifest.json").read_bytes())["tasks"]:
        print(f"{each}: {check(folder, each)} tensors, all sound")
