"""The files of a folder that are the model: preference, variants, and what is never guessed."""

import json

import pytest
from safetensors.torch import save_file

from flexmerge_cli.checkpoint.access import Access
from flexmerge_cli.checkpoint.checkpoint import find_weights, open_checkpoint
from flexmerge_cli.checkpoint.choose import choose_weights, variants
from flexmerge_cli.errors import SourceError, UsageError

from ..families import encoder, normal, plain, write_checkpoint, write_family
from ..program import fails, succeeds

STATE = encoder()


@pytest.mark.parametrize(("names", "chosen"), [
    (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
    (["model.safetensors.index.json", "pytorch_model.bin"], "model.safetensors.index.json"),
    (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], "pytorch_model.bin.index.json"),
    (["model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
    (["pytorch_model.bin", "model.fp16.safetensors"], "pytorch_model.bin"),
    (["model.fp16.safetensors"], "model.fp16.safetensors"),
    (["model.fp16.safetensors", "pytorch_model.fp16.bin"], "model.fp16.safetensors"),
    (["model.fp16.safetensors", "model.bf16.safetensors"], None),
    (["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
    (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16.safetensors"),
    (["diffusion_pytorch_model.bin"], "diffusion_pytorch_model.bin"),
    (["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"],
     "model.safetensors.index.fp16.json"),
    (["diffusion_pytorch_model.safetensors.fp16.index.json"], "diffusion_pytorch_model.safetensors.fp16.index.json"),
    (["epoch3.safetensors"], "epoch3.safetensors"),
    (["epoch3.pt", "optimizer.pt", "rng_state_0.pth", "scheduler.pt"], "epoch3.pt"),
    (["epoch3.safetensors", "epoch4.safetensors"], None),
    (["adapter_model.safetensors"], "adapter_model.safetensors"),
    (["training_args.bin", "optimizer.bin"], None),
    (["config.json"], None),
    ([], None),
])  # fmt: skip
def test_the_weights_of_a_folder(names, chosen):
    assert choose_weights(names) == chosen
    assert choose_weights(list(reversed(names))) == chosen


def test_a_variant_is_taken_where_it_is():
    names = ["model.safetensors", "model.fp16.safetensors", "model.fp16.safetensors.index.json"]
    assert choose_weights(names, "fp16") == "model.fp16.safetensors"
    assert choose_weights(["model.safetensors"], "fp16") == "model.safetensors"
    assert choose_weights(["model.bf16.safetensors"], "fp16") is None
    assert list(variants(["model.fp16.safetensors", "model.ema.safetensors", "model.safetensors"])) == ["ema", "fp16"]
    assert variants(["model.safetensors.index.json", "pytorch_model.bin.index.json", "a.fp16.safetensors"]) == {}


# On the disk.


@pytest.fixture
def two_variants(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    half = {name: value.half() for name, value in STATE.items()}
    save_file(half, folder / "model.fp16.safetensors")
    save_file({name: value.bfloat16() for name, value in STATE.items()}, folder / "model.bf16.safetensors")
    return folder


def test_several_variants_are_a_choice(two_variants):
    with pytest.raises(UsageError, match=r"2 variants \(bf16, fp16\)") as raised:
        open_checkpoint(str(two_variants))
    assert raised.value.hint == "choose one: --variant bf16"
    found = open_checkpoint(str(two_variants), access=Access(variant="fp16"))
    assert {tensor.dtype for tensor in found.tensors.values()} == {"F16"}
    assert find_weights(two_variants) is not None, "--tasks must not pass over it"
    with pytest.raises(SourceError, match="no weights of variant `int8`") as raised:
        open_checkpoint(str(two_variants), access=Access(variant="int8"))
    assert raised.value.hint == "--variant bf16"


def test_where_a_source_has_no_variant_its_plain_weights_are_taken_and_said(tmp_path):
    write_checkpoint(tmp_path, STATE)
    said = []
    open_checkpoint(str(tmp_path), access=Access(variant="fp16", on_message=said.append))
    assert said == [f"{tmp_path} has no variant fp16: using its plain weights"]


def test_sharded_variants(tmp_path):
    write_checkpoint(tmp_path, STATE, layout="shards")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / "model.safetensors.index.json").unlink()
    for path in list(tmp_path.glob("*.safetensors")):
        path.rename(path.with_name(path.name.replace("model-", "model.fp16-")))
    index["weight_map"] = {name: shard.replace("model-", "model.fp16-") for name, shard in index["weight_map"].items()}
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    found = open_checkpoint(str(tmp_path))
    assert set(found.tensors) == set(STATE)
    assert found.ignored == ()
    assert "model.safetensors.index.fp16.json" not in found.side_files


def test_other_weights_are_told_and_no_side_files(tmp_path):
    write_checkpoint(tmp_path, STATE)
    save_file(STATE, tmp_path / "model.fp16.safetensors")
    assert open_checkpoint(str(tmp_path)).ignored == ("model.fp16.safetensors",)


def test_several_weight_files_are_a_choice(tmp_path):
    for number in (3, 4):
        save_file(STATE, tmp_path / f"epoch{number}.safetensors")
    with pytest.raises(UsageError, match="2 weight files") as raised:
        open_checkpoint(str(tmp_path))
    assert raised.value.hint == f"name it: {tmp_path}/epoch3.safetensors"
    assert set(open_checkpoint(f"{tmp_path}/epoch3.safetensors").tensors) == set(STATE)


def test_a_pipeline_of_diffusers_is_one_model_and_each_component_another(tmp_path):
    for name in ("unet", "vae"):
        (tmp_path / name).mkdir()
        save_file(STATE, tmp_path / name / "diffusion_pytorch_model.safetensors")
        (tmp_path / name / "config.json").write_text('{"_class_name": "X", "_diffusers_version": "0.30"}')
    (tmp_path / "model_index.json").write_text("{}")
    found = open_checkpoint(str(tmp_path))
    assert set(found.tensors) == {f"{part}/{name}" for part in ("unet", "vae") for name in STATE}
    assert set(open_checkpoint(f"{tmp_path}/unet").tensors) == set(STATE)
    assert open_checkpoint(f"{tmp_path}/unet").config["_class_name"] == "X"


def test_a_pipeline_without_weights_and_one_of_several_variants_are_told(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    with pytest.raises(SourceError, match="and no subfolder with weights"):
        open_checkpoint(str(tmp_path))
    for variant in ("fp16", "bf16"):
        save_file(STATE, tmp_path / f"unet/diffusion_pytorch_model.{variant}.safetensors")
    with pytest.raises(UsageError, match="2 variants") as raised:
        open_checkpoint(str(tmp_path))
    assert raised.value.hint == "choose one: --variant bf16"
    assert open_checkpoint(str(tmp_path), access=Access(variant="fp16")).parts == {"unet": "diffusion_pytorch_model"}


# Through the commands.


def test_a_plan_remembers_the_variant(tmp_path):
    folders = write_family(tmp_path / "made", plain())
    for folder in [folders.base, *folders.tasks.values()]:
        state = open_state(folder)
        save_file({name: value.bfloat16() for name, value in state.items()}, folder / "model.bf16.safetensors")
        save_file({name: value.half() for name, value in state.items()}, folder / "model.fp16.safetensors")
        (folder / "model.safetensors").unlink()
    fails(2, "plan", *folders.arguments, "-o", tmp_path / "plan.json", says="--variant")
    succeeds("plan", *folders.arguments, "--variant", "fp16", "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "bundle")
    succeeds("export", tmp_path / "bundle", "--task", "task0", "-o", tmp_path / "out")
    dtypes = succeeds("inspect", tmp_path / "out", "--json").json["dtypes"]
    assert list(dtypes) == ["F16"]
    shown = succeeds("inspect", folders.tasks["task0"], "--variant", "bf16", "--json").json
    assert list(shown["dtypes"]) == ["BF16"]
    recipe = {"version": 1, "base": str(folders.base), "variant": "bf16"}
    recipe["tasks"] = {name: str(path) for name, path in folders.tasks.items()}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    merge = ["merge", tmp_path / "recipe.yaml", "--plan", tmp_path / "kept.json", "--force", "-o", tmp_path / "other"]
    succeeds(*merge)
    before = (tmp_path / "kept.json").read_bytes()
    succeeds(*merge)
    assert (tmp_path / "kept.json").read_bytes() == before
    assert b'"variant":"bf16"' in before


def open_state(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_what_diffusers_wrote_is_exported_by_its_names(tmp_path):
    folders = write_family(tmp_path / "made", plain())
    for folder in [folders.base, *folders.tasks.values()]:
        (folder / "model.safetensors").rename(folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text('{"_class_name": "X", "_diffusers_version": "0.30"}')
    succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "bundle")
    succeeds("export", tmp_path / "bundle", "--task", "task0", "-o", tmp_path / "out")
    assert (tmp_path / "out/diffusion_pytorch_model.safetensors").is_file()
    succeeds("export", tmp_path / "bundle", "--task", "task0", "--link", "-o", tmp_path / "linked")
    assert (tmp_path / "linked/diffusion_pytorch_model.safetensors").stat().st_nlink > 1


def test_a_file_of_timm_is_a_model(tmp_path):
    """`pytorch_model.bin` or `model.safetensors`, and a config that names an architecture."""
    config = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    base = {
        "conv1.weight": normal(0, 4, 3, 3, 3),
        "layer1.0.conv1.weight": normal(1, 4, 4),
        "fc.weight": normal(2, 3, 4),
    }
    for name, layout in (("base", "file"), ("a", "bin"), ("b", "file")):
        state = {key: value + (name != "base") * 0.01 for key, value in base.items()}
        write_checkpoint(tmp_path / name, state, layout=layout)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    given = ["--base", tmp_path / "base", "--task", f"a={tmp_path}/a", "--task", f"b={tmp_path}/b"]
    succeeds("plan", *given, "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "--method", "average", "-o", tmp_path / "bundle")
    succeeds("export", tmp_path / "bundle", "--task", "a", "-o", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == config


def test_extra_metadata_of_safetensors_is_no_matter(tmp_path):
    tmp_path.joinpath("m").mkdir()
    save_file(STATE, tmp_path / "m/model.safetensors", metadata={"format": "pt", "note": "ü" * 999, "modelspec": "{}"})
    assert set(open_checkpoint(str(tmp_path / "m")).tensors) == set(STATE)
