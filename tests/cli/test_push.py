"""`flexmerge push`: a bundle on a Hub of 127.0.0.1, written and read by the real client."""

import hashlib
import shutil

import pytest
import torch
import transformers

from flexmerge_cli import change_plan, merge, push, update
from flexmerge_cli.formats.manifest import Manifest

from ..adapters import LORA, make
from ..families import normal
from ..program import fails, succeeds, tree

TARGET = "hf://org/packed"


@pytest.fixture
def writer(hub, monkeypatch):
    """A Hub where our token may write in `org`."""
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    hub.tokens["hf_writer"] = {"org/packed", "org/packed-task0"}
    hub.writers["hf_writer"] = "org"
    return hub


@pytest.fixture(scope="module")
def made(plan, tmp_path_factory):
    """Groups of one, two and more."""
    path = tmp_path_factory.mktemp("made") / "bundle"
    succeeds("merge", plan, "--method", "average", "--size", "2x", "-o", path)
    return path


def files_of(hub, name="org/packed", branch="main") -> dict[str, bytes]:
    repository = hub.repositories[name]
    found = repository.commits[repository.branches[branch]]
    return {path: data for path, data in found.items() if path != ".gitattributes"}


def contents(files) -> dict[str, int]:
    """sha256 -> bytes of the weights among them."""
    return {hashlib.sha256(d).hexdigest(): len(d) for path, d in files.items() if path.endswith(".safetensors")}


def test_each_weight_is_sent_once_in_one_commit_and_links_are_copies(writer, made):
    dry = succeeds("push", made, TARGET, "--dry-run", "--json").json
    assert dry["pushed"] is False and dry["repositories"][TARGET]["commit"] is None
    assert writer.repositories == {} and not writer.received
    done = succeeds("push", made, TARGET, "--json")
    assert files_of(writer) == tree(made)
    assert writer.received == contents(tree(made))
    assert len(writer.posted) == 1
    told = done.json["repositories"][TARGET]
    assert told["bytes"] == dry["repositories"][TARGET]["bytes"] and f"{told['bytes']:,} bytes to send" in done.err
    assert told["bytes"] == sum(len(data) for data in set(tree(made).values()))
    assert told["commit"] == writer.repositories["org/packed"].branches["main"]
    succeeds("inspect", TARGET, "--verify")


def test_a_second_push_sends_what_changed_and_removes_what_is_gone(writer, made, plan, tmp_path):
    succeeds("push", made, TARGET)
    before = dict(writer.repositories["org/packed"].branches)
    writer.forget()
    again = succeeds("push", made, TARGET, "--json").json["repositories"][TARGET]
    assert (again["bytes"], again["changed"], again["removed"]) == (0, [], [])
    assert again["commit"] == before["main"] and not writer.posted and not writer.received
    writer.repositories["org/packed"].commits[before["main"]]["notes.txt"] = b"ours"
    succeeds("merge", plan, "--method", "average", "--size", "3x", "-o", tmp_path / "other")
    succeeds("push", tmp_path / "other", TARGET)
    found = files_of(writer)
    assert found.pop("notes.txt") == b"ours" and found == tree(tmp_path / "other")
    old, new = contents(tree(made)), contents(tree(tmp_path / "other"))
    assert writer.received == {oid: size for oid, size in new.items() if oid not in old}
    assert len(writer.posted) == 1


def test_after_an_update_only_what_is_new_is_sent(writer, plan, tmp_path):
    change_plan(plan, remove=["task3"], output=tmp_path / "few.json")
    merge(tmp_path / "few.json", tmp_path / "few")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert push("few", TARGET)["pushed"]
    writer.forget()
    update(tmp_path / "few", plan, tmp_path / "all")
    dry = push(tmp_path / "all", TARGET, dry_run=True)["repositories"][TARGET]
    done = push(tmp_path / "all", TARGET)["repositories"][TARGET]
    old, new = contents(tree(tmp_path / "few")), contents(tree(tmp_path / "all"))
    fresh = {oid: size for oid, size in new.items() if oid not in old}
    assert writer.received == fresh and len(fresh) == 1  # the weights of task3
    assert dry["bytes"] == done["bytes"] and dry["changed"] == done["changed"] and dry["commit"] is None
    assert [path for path in done["changed"] if path.startswith("weights/")] == ["weights/task3.safetensors"]
    assert files_of(writer) == tree(tmp_path / "all")


def test_a_task_loads_from_there_and_a_second_one_fetches_its_own_bytes_alone(writer, tmp_path):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 20}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    for number, name in enumerate(("base", "tasks/one", "tasks/two")):
        for key, value in model.named_parameters():
            if number and "embed_tokens" not in key:
                value.data += 0.05 * normal(number, *value.shape)
        model.save_pretrained(tmp_path / name)
    succeeds("plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "bundle")
    succeeds("push", tmp_path / "bundle", TARGET)
    given = torch.arange(2, 14).view(2, 6)
    sent = {}
    for name in ("one", "two"):
        writer.forget()
        found = transformers.LlamaForCausalLM.from_pretrained("org/packed", subfolder=f"tasks/{name}").eval()
        expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "tasks" / name).eval()
        with torch.no_grad():
            assert torch.equal(found(given).logits, expected(given).logits)
        sent[name] = {
            data
            for path in writer.sent
            if path.endswith(".safetensors")
            for data in [files_of(writer)[path.removeprefix("org/packed/")]]
        }
    route = Manifest.model_validate_json((tmp_path / "bundle/manifest.json").read_text()).weight_files
    shared = {path for path in route("one") if path in route("two")}
    assert shared and sent["two"] == {
        (tmp_path / "bundle" / path).read_bytes() for path in route("two") if path not in shared
    }


def test_a_repository_per_task_holds_its_checkpoint(writer, plan, tmp_path):
    succeeds("merge", plan, "--method", "emr", "--size", "3.5x", "-o", tmp_path / "b")
    tasks = [path.name for path in (tmp_path / "b/tasks").glob("*")] + [
        path.name for path in (tmp_path / "b/coded").glob("*")
    ]
    assert len(list((tmp_path / "b/coded").glob("*"))) > 0
    value = succeeds("push", tmp_path / "b", TARGET, "--per-task", "--json").json
    assert set(value["repositories"]) == {f"{TARGET}-{task}" for task in tasks}
    for task in tasks:
        succeeds("export", tmp_path / "b", "--task", task, "-o", tmp_path / "out" / task)
        ours, theirs = files_of(writer, f"org/packed-{task}"), tree(tmp_path / "out" / task)
        in_place = (tmp_path / "b/tasks" / task).exists()
        assert ours == (tree(tmp_path / "b/tasks" / task) if in_place else theirs)
        assert succeeds("inspect", f"hf://org/packed-{task}", "--json").json["kind"] == "checkpoint"


def test_a_kept_adapter_has_a_repository_of_its_own(writer, tmp_path):
    adapted = make(tmp_path / "made", "llama", {"a": LORA(r=2, target_modules=["q_proj"])})
    succeeds("plan", "--base", adapted.base, "--tasks", adapted.tasks, "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "b")
    succeeds("push", tmp_path / "b", TARGET, "--per-task")
    assert files_of(writer, "org/packed-a") == tree(adapted.tasks / "a")


def test_branches_and_private_repositories(writer, made):
    succeeds("push", made, TARGET, "--private", "--revision", "v2")
    assert writer.repositories["org/packed"].private
    assert files_of(writer, branch="v2") == tree(made) and files_of(writer) == {}
    succeeds("push", made, TARGET, "--private")
    assert files_of(writer) == tree(made)


def test_a_card_that_somebody_wrote_there_stays(writer, made, tmp_path):
    writer.add("org/packed", {"README.md": b"# ours"})
    done = succeeds("push", made, TARGET)
    assert "README.md that flexmerge did not write" in done.err
    assert files_of(writer)["README.md"] == b"# ours"
    writer.add("org/packed", {"README.md": (made / "README.md").read_bytes().replace(b"x", b"y")})
    succeeds("push", made, TARGET)
    assert files_of(writer)["README.md"] != (made / "README.md").read_bytes()
    shutil.copytree(made, tmp_path / "b", symlinks=True)
    writer.add("org/packed", {"README.md": (made / "README.md").read_bytes()})
    (tmp_path / "b/README.md").write_text("# mine")
    succeeds("push", tmp_path / "b", TARGET)
    assert files_of(writer)["README.md"] == b"# mine"


# What goes wrong.


def test_a_damaged_bundle_is_not_published(writer, made, tmp_path):
    broken = tmp_path / "b"
    shutil.copytree(made, broken, symlinks=True)
    path = next(iter(sorted(broken.glob("weights/*"))))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    fails(5, "push", broken, TARGET, says=path.name)
    (broken / "manifest.json").unlink()
    fails(4, "push", broken, TARGET, says="no bundle at")
    assert writer.requests == []


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("token", [None, "hf_stranger"])
def test_a_repository_that_one_may_not_write_to_is_told_and_left(hub, made, monkeypatch, token, is_there):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
        hub.tokens[token] = set()
    if is_there:
        hub.add("org/packed", {"x": b"x"})
    fails(4, "push", made, TARGET, says=("may not be written", "nothing was published", "hf auth login"))
    assert hub.repositories.keys() == ({"org/packed"} if is_there else set())
    assert not is_there or files_of(hub) == {"x": b"x"}
    assert not hub.received


@pytest.mark.parametrize("where", ["lfs", "org/packed/commit"])
def test_what_breaks_off_publishes_nothing_and_the_next_push_sends_the_rest(writer, made, where):
    writer.add("org/packed", {"x": b"x"})
    writer.failures[where] = [400]
    fails(4, "push", made, TARGET, says=("nothing was published", "not sent twice"))
    assert files_of(writer) == {"x": b"x"} and not writer.posted
    there = dict(writer.received)
    succeeds("push", made, TARGET)
    assert writer.received == contents(tree(made)) and there.items() <= writer.received.items()
    assert files_of(writer) == tree(made) | {"x": b"x"}


def test_a_repository_that_changes_meanwhile_is_not_overwritten(writer, made):
    writer.add("org/packed", {"x": b"x"})
    writer.failures["org/packed/commit"] = [412]
    fails(4, "push", made, TARGET, says=("changed meanwhile", "nothing was published"))
    assert files_of(writer) == {"x": b"x"}


def test_what_is_asked_wrongly_is_refused_before_the_hub_is_asked(writer, made, monkeypatch):
    fails(2, "push", made, "org/packed", says="hf://org/name")
    fails(2, "push", made, "hf://org/packed:folder", says="a whole repository")
    fails(2, "push", made, "hf://org/packed@v2", says="--revision")
    fails(4, "push", made, TARGET, "--offline", says="offline")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails(4, "push", made, TARGET, says="offline")
    assert writer.requests == []


def test_a_public_repository_is_not_taken_for_a_private_one(writer, made):
    writer.add("org/packed", {"x": b"x"})
    fails(2, "push", made, TARGET, "--private", says="is there and public")
    assert files_of(writer) == {"x": b"x"}


def test_a_manifest_of_strangers_removes_nothing(writer, made):
    writer.add("org/packed", {"manifest.json": b'{"files": {"x": 1}}', "x": b"x"})
    succeeds("push", made, TARGET)
    assert files_of(writer) == tree(made) | {"x": b"x"}
