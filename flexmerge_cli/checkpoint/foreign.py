"""Names what is not a checkpoint that can be read, by its first bytes, tensor names or file names, and says what to do.
No I/O."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

HEAD_BYTES = 64  # the beginning of a file that `of_bytes` needs
SHARD = re.compile(r"(.*?)-?(\d{1,6})-of-(\d{1,6})(\.\w+)*\.(safetensors|bin|pt|pth)")
STATE_DICT = "save its state dict: torch.save(model.state_dict(), …), or model.save_pretrained(FOLDER)"


@dataclass(frozen=True, slots=True)
class Foreign:
    """A kind of file or folder that cannot be read, and what to do about it."""

    what: str
    """The name with its article, e.g. `a Git LFS pointer`."""
    hint: str


BEGINNINGS = (
    (b"version https://git-lfs", Foreign("a Git LFS pointer, not the file itself", "git lfs pull, in its repository")),
    (b"version https://hawser", Foreign("a Git LFS pointer, not the file itself", "git lfs pull, in its repository")),
    (b"/annex/objects/", Foreign("a git-annex pointer, not the file itself", "git annex get, in its repository")),
    (b"GGUF", Foreign("a GGUF file of llama.cpp", "give the checkpoint that it was converted from")),
    (b"\x89HDF\r\n\x1a\n", Foreign("an HDF5 file of Keras or TensorFlow", "convert it to safetensors first")),
    (b"\x1f\x8b", Foreign("a gzip archive", "unpack it")),
    (b"\x28\xb5\x2f\xfd", Foreign("a zstd archive", "unpack it")),
    (b"\xfd7zXZ\x00", Foreign("an xz archive", "unpack it")),
    (b"BZh", Foreign("a bzip2 archive", "unpack it")),
    (b"\x93NUMPY", Foreign("a numpy array", STATE_DICT)),
    (
        b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19",
        Foreign(
            "saved by torch older than 1.6, in a format that cannot be memory-mapped",
            "convert it: torch.save(torch.load(path, weights_only=True), path)",
        ),
    ),
)  # fmt: skip
TORCHSCRIPT = Foreign(
    "a TorchScript archive, a program with its weights", "torch.save(torch.jit.load(path).state_dict(), NEW_PATH)"
)
ZIP = Foreign("a zip archive as torch.save writes it, under the name of a safetensors file", "call it .bin")
SAFETENSORS = Foreign("a safetensors file under another name", "call it .safetensors")
EMPTY = Foreign("truncated: it is empty", "get a sound copy of the file")
ZEROS = Foreign("zeros where it begins, as a download that broke off leaves it", "get a sound copy of the file")
HTML = Foreign("an HTML page, not the file that was asked for", "download it again, logged in where that is necessary")

# Patterns of tensor names -> what they belong to.
TENSORS = (
    (re.compile(r"lora_(unet|te\d?|transformer)_.*"), "a LoRA in kohya's format"),
    (re.compile(r".*\.lora(_linear_layer)?\.(down|up)\.weight"), "a LoRA in diffusers' format"),
    (re.compile(r".*\.lora_[ab]"), "a LoRA of mlx-lm"),
    (re.compile(r"(.*\.)?_?flat_param(_\d+)?"), "a shard of FSDP, whose parameters are flattened"),
)
LORA_HINT = "merge it into its base with the program that made it, and give the merged model"
FSDP_HINT = "save it with StateDictType.FULL_STATE_DICT"
UNMERGED = "merge it with peft (model.merge_and_unload().save_pretrained(…)), or give the adapter alone"

ZERO_3 = "have no elements, as DeepSpeed ZeRO-3 saves what it did not gather"
ZERO_3_HINT = (
    "save it again with `stage3_gather_16bit_weights_on_model_save: true`, or make the weights with zero_to_fp32.py, "
    "which DeepSpeed puts into the checkpoint's folder"
)

DCP = Foreign(
    "a distributed checkpoint of torch (DCP)",
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt",
)
DEEPSPEED = Foreign(
    "a checkpoint of DeepSpeed, whose weights are in parts", "python zero_to_fp32.py . OUTPUT, in that folder"
)
IN_TRANSFORMERS_4 = "convert it with transformers 4: from_pretrained(FOLDER, {}=True).save_pretrained(NEW_FOLDER)"
# Patterns of files and folders -> what they belong to; used only if there are no weights that can be read.
FILES = (
    (re.compile(r".*\.distcp"), DCP),
    (re.compile(r"zero_to_fp32\.py|global_step\d+|.*_zero_pp_rank_\d+.*|mp_rank_\d+_model_states\.pt"), DEEPSPEED),
    (re.compile(r".*\.gguf"), BEGINNINGS[3][1]),
    (re.compile(r"flax_model.*\.msgpack"), Foreign("a model of Flax", IN_TRANSFORMERS_4.format("from_flax"))),
    (re.compile(r"tf_model.*\.h5"), Foreign("a model of TensorFlow", IN_TRANSFORMERS_4.format("from_tf"))),
    (
        re.compile(r"saved_model\.pb|.*\.ckpt\.(index|meta|data-.*)|.*\.(h5|keras)"),
        Foreign("a model of TensorFlow", "convert it to safetensors first"),
    ),
    (re.compile(r"weights(\.\d+)?\.npz"), Foreign("a model of MLX", "give the checkpoint that it was converted from")),
    (re.compile(r"adapters\.(safetensors|npz)"), Foreign("a LoRA of mlx-lm", LORA_HINT)),
    (re.compile(r".*\.nemo"), Foreign("an archive of NeMo", "unpack it with tar, and give the .ckpt in it")),
    (re.compile(r".*\.onnx"), Foreign("a model in ONNX", "give the checkpoint that it was exported from")),
    (re.compile(r"openvino_model.*"), Foreign("a model of OpenVINO", "give the checkpoint that it was exported from")),
    (re.compile(r".*\.(tflite|mlmodel|mlpackage|engine)"), Foreign("an exported model", "give its checkpoint")),
    (re.compile(r".*\.(zip|tar|tgz|gz|zst|xz|7z)"), Foreign("packed in an archive", "unpack it")),
    (re.compile(r".*\.dvc"), Foreign("kept by DVC and not here", "dvc pull, in its repository")),
)  # fmt: skip


def of_bytes(head: bytes) -> Foreign | None:
    """Return what a file is by its first HEAD_BYTES, or fewer if it has no more; None if they say nothing."""
    if not head:
        return EMPTY
    if not head.strip(b"\0"):
        return ZEROS
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return HTML
    return next((found for start, found in BEGINNINGS if head.startswith(start)), None)


def of_tensors(names: Collection[str]) -> tuple[str, str, str] | None:
    """Return (what, the name that shows it, hint) for a file whose tensors are not a model's; None if they may be."""
    for name in names:
        for pattern, what in TENSORS:
            if pattern.fullmatch(name):
                return what, name, FSDP_HINT if "FSDP" in what else LORA_HINT
    lora = next((name for name in names if ".lora_A." in name), None)
    if lora is not None and any(".base_layer." in name for name in names):
        return "a model with a LoRA that is not merged into it", lora, UNMERGED
    return None


def of_files(names: Sequence[str]) -> tuple[str, Foreign] | None:
    """Return (the name that shows it, what it is) for files and folders without weights; None if unknown."""
    return next(((name, found) for pattern, found in FILES for name in names if pattern.fullmatch(name)), None)


def shards(names: Sequence[str]) -> tuple[int, int, str] | None:
    """Return (how many, of how many, the first) of the shards of one model among the names; None if there are none."""
    found = [(name, match) for name in sorted(names) if (match := SHARD.fullmatch(name)) and int(match[3]) > 1]
    if not found:
        return None
    first, match = found[0]
    same = {other[2] for _, other in found if other[1] == match[1] and other[3] == match[3] and other[5] == match[5]}
    return len(same), int(match[3]), first
