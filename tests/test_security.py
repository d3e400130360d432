"""Folders and configs of strangers: reading them runs no code of theirs, contacts nobody and stays inside of them."""

from __future__ import annotations

import errno
import io
import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import datasets
import pytest
import torch
from omegaconf import OmegaConf
from refusals import refused

from mmdiff.benchmarks.fusion.settings import load_settings
from mmdiff.clip import load_clip
from mmdiff.config import load_config, parse_config, parse_overrides, save_config
from mmdiff.data import open_splits
from mmdiff.errors import InputError, printable
from mmdiff.evaluation.judges import find_judge
from mmdiff.modalities.encoders import ClipTower, build_encoder
from mmdiff.model import MTDiffusionModel
from mmdiff.pipeline import MTDiffusionPipeline

Cli = Callable[..., Any]
Tree = dict[str, Any]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the working directory a module of a stranger, `payload_of_a_stranger`, that leaves this file when it runs."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    marker = tmp_path / "it-ran"
    (folder / "payload_of_a_stranger.py").write_text(
        f"""
import pathlib
import torch
import mmdiff.modalities
pathlib.Path({str(marker)!r}).touch()
class Label(mmdiff.modalities.Label):
    pass
class Network(torch.nn.Flatten):
    pass
def promised() -> torch.nn.Module:
    return torch.nn.Flatten()
def silent():
    pathlib.Path({str(marker)!r}).write_text("called")
def number() -> int:
    pathlib.Path({str(marker)!r}).write_text("called")
"""
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, ""])
    monkeypatch.delitem(sys.modules, "payload_of_a_stranger", raising=False)
    return marker


@pytest.fixture
def contacts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Hosts that anything tried to reach; the libraries are told that they are online."""
    found: list[Any] = []

    def refuse(*address: Any, **_: Any) -> None:
        found.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return found


# ------------------------------------------------------------------------------------------- code that is named by path

MODALITY = {"kind": "payload_of_a_stranger:Label", "num_classes": 10}
ENCODER = {"kind": "image_set", "channels": 3, "size": 16, "max_images": 2, "encoder": {"kind": "os:system"}}


@pytest.mark.parametrize("entry", [MODALITY, ENCODER], ids=["modality", "encoder"])
def test_show_imports_nothing_unless_trusted(cli: Cli, tiny: Tree, payload: Path, entry: Tree) -> None:
    tiny["modalities"] = {"image": {"kind": "image", "channels": 1, "size": 16}, "label": entry}
    OmegaConf.save(OmegaConf.create(tiny), "config.yaml")
    complaint = cli("show", "config.yaml").complaint
    assert "--trust-custom-modalities" in complaint and "trust_custom_modalities=True" in complaint
    assert not payload.exists()
    if entry is MODALITY:
        assert cli("show", "config.yaml", "--trust-custom-modalities").code == 0
        assert payload.exists()


def test_evaluate_imports_nothing_that_the_config_names(cli: Cli, run_copy: Path, payload: Path) -> None:
    """The pipeline names none, config.yaml does."""
    answer = cli("evaluate", run_copy, f"modalities.label.kind={MODALITY['kind']}")
    assert "modalities.label.kind" in answer.complaint and "--trust-custom-modalities" in answer.complaint
    assert not payload.exists()


@pytest.mark.parametrize("section", ["modality_config", "backbone_config"])
def test_a_pipeline_imports_nothing(cli: Cli, run_copy: Path, payload: Path, section: str) -> None:
    file = run_copy / "pipeline" / "model" / "config.json"
    config = json.loads(file.read_text())
    config[section]["label"] = {"nested": [{"encoder": {"kind": "payload_of_a_stranger:Network"}}]}
    file.write_text(json.dumps(config))
    assert "trust_custom_modalities=True" in cli("sample", run_copy, "--out", "grid.png").complaint
    assert not payload.exists()


def test_training_does_not_trust_a_judge(cli: Cli, run_copy: Path, tiny_file: Path, payload: Path) -> None:
    file = run_copy / "pipeline" / "model" / "config.json"
    config = json.loads(file.read_text())
    config["modality_config"]["label"]["kind"] = MODALITY["kind"]
    file.write_text(json.dumps(config))
    more = ["train.steps=2", "evaluate.at_end=true", "evaluate.num_samples=20", f"evaluate.judges.label={run_copy}"]
    answer = cli("train", tiny_file, *more)
    assert answer.code == 2 and "evaluate.judges.label" in answer.complaint
    assert not payload.exists() and not tiny_file.with_name("run").exists()


def test_an_encoder_must_promise_a_module_before_it_is_called(payload: Path) -> None:
    own = [f"payload_of_a_stranger:{name}" for name in ("silent", "number")]
    for path in ("os:system", "subprocess:Popen", "builtins:exec", *own):
        with refused("encoder.kind", path):
            build_encoder({"kind": path}, 3, (4, 4))
        assert not (payload.exists() and payload.read_text())


def test_an_encoder_of_ones_own_is_built(payload: Path) -> None:
    for name in ["Network", "promised"]:
        assert build_encoder({"kind": f"payload_of_a_stranger:{name}"}, 3, (4, 4)).width == 48


def test_the_working_directory_does_not_stand_in_for_installed_packages(tmp_path: Path) -> None:
    """It leaves the search path before the first import; what a refusal needs stands for the rest, torch too."""
    for name in ("torch", "numpy", "datasets", "typer", "yaml", "omegaconf", "diffusers", "pydantic"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')")
    command = [sys.executable, "-m", "mmdiff", "show", "nowhere.yaml"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 2 and "nowhere.yaml" in answer.stderr, answer.stderr
    assert not (tmp_path / "it-ran").exists()


# --------------------------------------------------------------------------------------------------- open_clip, weights


ASKS_FOR_CODE = [
    ({"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}, "'trust_remote_code'"),
    ({"text_cfg": {"tokenizer_kwargs": {"code_revision": "main"}}}, "'code_revision'"),
    ({"vision_cfg": {"timm_model_name": "hf-hub:a/b"}}, "a further place"),
    ({"text_cfg": {}, "auto_map": {"AutoTokenizer": "evil.Tokenizer"}}, "'auto_map'"),
    *(({"text_cfg": {"hf_model_name": place}}, "a further place") for place in ("../evil", "/evil", "a:b", "here")),
]


def test_a_clip_folder_that_asks_for_code_or_another_folder_is_refused(
    tmp_path: Path, contacts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    folder, file = f"local-dir:{tmp_path}", tmp_path / "open_clip_config.json"
    for config, fact in ASKS_FOR_CODE:
        file.write_text(json.dumps({"model_cfg": config}))
        with refused("zero_shot.model", folder, file.name, fact):
            load_clip("zero_shot", folder, None)
    file.write_text("[]")
    with refused("zero_shot.model", folder):
        load_clip("zero_shot", folder, None)
    assert contacts == []


def test_code_beside_a_clip_model_is_refused_however_it_is_spelled(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text("{}")
    hidden = (
        ('{"auto\\u005fmap": {"AutoTokenizer": "a.B"}}', "'auto_map'"),
        ('{"a": [{"trust_remote_code": true}]}', "'trust_remote_code'"),
        ("[" * 9000, "JSON"),
    )
    for name, (text, fact) in itertools.product(("config.json", "tokenizer_config.json"), hidden):
        (tmp_path / name).write_text(text)
        with refused("zero_shot.model", f"local-dir:{tmp_path}", name, fact):
            load_clip("zero_shot", f"local-dir:{tmp_path}", None)
        (tmp_path / name).unlink()


def test_an_encoder_of_open_clip_has_a_plain_name(contacts: list[Any]) -> None:
    for model in ("local-dir:/tmp", "hf-hub:a/b", "../x", ""):
        with refused("encoder.model", model):
            ClipTower(3, model)
    assert contacts == []


def test_a_local_pipeline_never_asks_the_hub_for_its_autoencoder(run_copy: Path, contacts: list[Any]) -> None:
    folder = run_copy / "pipeline"
    config = json.loads((folder / "model" / "config.json").read_text())
    config["modality_config"]["image"] |= {
        "space": "latent", "autoencoder": "stranger/vae", "latent_channels": 1, "latent_factor": 1
    }  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(config))
    with refused("model_index.json: autoencoder", None):
        MTDiffusionPipeline.from_pretrained(folder)
    assert contacts == []


@pytest.mark.parametrize("missing", ["model", "scheduler", "model/diffusion_pytorch_model.safetensors"])
def test_a_local_pipeline_never_asks_the_hub_for_what_it_lacks(
    cli: Cli, run_copy: Path, contacts: list[Any], tmp_path: Path, missing: str
) -> None:
    path = run_copy / "pipeline" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert cli("sample", run_copy, "--out", tmp_path / "grid.png").complaint
    assert contacts == []


def test_nothing_is_unpickled() -> None:
    """torch.load and np.load stay strict, and no module reads pickles, evaluates texts or trusts remote code."""
    source = "\n".join(file.read_text() for file in sorted((ROOT / "mmdiff").rglob("*.py")))
    for call, strict in (("torch.load", "weights_only=True"), ("np.load", "allow_pickle=False")):
        found = re.findall(rf"{re.escape(call)}\(([^\n]*)", source)
        assert found and all(strict in arguments for arguments in found)
    for word in (r"\bimport pickle", r"\bpickle\.load", r"[^.\w]eval\(", r"[^.\w]exec\(", r"trust_remote_code=True"):
        assert not re.search(word, source), word
    assert not re.search(r"weights_only=False|allow_pickle=True|yaml\.(unsafe_|full_)?load\(", source)


# -------------------------------------------------------------------------------------------------------------- configs


def bomb(levels: int = 10) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, levels)]
    return "\n".join(lines)


def references(levels: int = 30) -> str:
    return "\n".join(["a0: text", *(f'a{k}: "${{a{k - 1}}}${{a{k - 1}}}"' for k in range(1, levels))])


EVIL_YAML = {
    "anchors": (bomb(), "aliases"),
    "anchor in itself": ("a: &a [*a]", "alias"),
    "merged anchors": ("a: &a {x: 1}\n" + "b: &b {<<: *a, y: *b}", "alias"),
    "references": (references(), "many"),
    "depth": ("[" * 5000 + "]" * 5000, "nested"),
    "depth of mappings": ("{a: " * 300 + "1" + "}" * 300, "nested"),
    "size": ("# " + "x" * 2_000_000, "larger"),
    "environment": ("name: ${oc.env:HOME}", "resolver"),
    "decoded": ("name: ${oc.decode:'1'}", "resolver"),
    "nested": ("name: ${a.${oc.env:HOME}}", "resolver"),
    "in a key": ("${oc.env:HOME}: 1", "resolver"),
    "python": ("a: !!python/object/apply:os.system [touch it-ran]", "YAML"),
    "not text": ("\x00\x01", "YAML"),
}


def test_yaml_of_a_stranger_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for (text, fact), (key, load) in itertools.product(
        EVIL_YAML.values(), {"config": load_config, "EXPERIMENT": load_settings}.items()
    ):
        file.write_text(text)
        started = time.perf_counter()
        with refused(key, ANY, fact):
            load(file)
        assert time.perf_counter() - started < 2, text[:50]


def test_the_environment_stays_out_of_every_line(monkeypatch: pytest.MonkeyPatch, tiny_file: Path, cli: Cli) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "hunter2")
    text = "${oc.env:SECRET_OF_MINE}"
    for arguments in (["show", tiny_file, f"data.source={text}"], ["check-modality", "label", f"num_classes={text}"]):
        answer = cli(*arguments)
        assert "resolver" in answer.complaint and "hunter2" not in answer.err + answer.out
    with refused("override", text, "resolver"):
        parse_overrides([f"a={{b: ['{text}']}}"])


def test_a_name_in_the_data_is_no_reference(tiny: Tree, tmp_path: Path) -> None:
    tiny["modalities"]["label"] |= {"names": ["a", "${oc.env:HOME}"]}
    with refused("config", "${oc.env:HOME}"):
        save_config(parse_config(tiny), tmp_path / "config.yaml")


def test_plain_references_are_read(tiny_file: Path) -> None:
    config = load_config(tiny_file, ["train.steps=7", "sample.steps=${train.steps}"])
    assert config.sample.steps == 7


NAMES = ["../up", "a/b", "a\\b", "/root", "", ".hidden", "..", "a\x00b", "a\x1b[2J", "a\nb", "a\u202eb", "x" * 300]


def test_names_that_leave_their_folder_are_refused(tiny: Tree) -> None:
    modality = {"kind": "image", "channels": 1, "size": 16}
    for name in NAMES:
        with refused("name", name):
            parse_config({**tiny, "name": name})
        with refused(f"evaluate.masking.{name}.[key]", name):
            parse_config({**tiny, "evaluate": {"masking": {name: {}}}})
        with refused("modalities", name):
            MTDiffusionModel({name: modality}, {"kind": "unet", "block_out_channels": [8, 16]}, anchor=name)


def test_a_terminal_obeys_no_text_of_a_stranger(cli: Cli, tiny_file: Path) -> None:
    for text in ["\x1b[2J", "\x07", "\u202e", "\x9b31m", "\r", "\u2028", "\ud800"]:
        assert text not in str(InputError(f"key{text}", text, f"the columns are {text}"))
        assert text not in printable(text, keep="\n\t")
        assert text not in (answer := cli("show", tiny_file, f"data.source=no{text}where")).out + answer.err


# -------------------------------------------------------------------------------------------------------------- folders

LINKS = ["pipeline/model/diffusion_pytorch_model.safetensors", "evaluation.json", "samples", "config.yaml", "pipeline"]


@pytest.mark.parametrize("name", LINKS)
def test_links_out_of_a_run_folder_are_refused(cli: Cli, run_copy: Path, tmp_path: Path, name: str) -> None:
    inside, outside = run_copy / name, tmp_path / "outside"
    if inside.exists():
        shutil.move(inside, outside)
    else:
        outside.write_text("precious")
    inside.symlink_to(outside)
    for arguments in (
        ["evaluate", run_copy],
        ["sample", run_copy, "--out", tmp_path / "grid.png"],
        ["train", run_copy / "config.yaml", f"output={run_copy}", "train.resume=auto"],
    ):
        assert "is a link that leads out of its folder" in cli(*arguments).complaint
    assert outside.is_dir() or name != "evaluation.json" or outside.read_text() == "precious"


@pytest.mark.parametrize("name", ["model", "model/config.json", "model_index.json", "scheduler/more.json"])
def test_links_out_of_a_pipeline_are_refused_in_python(run_copy: Path, tmp_path: Path, name: str) -> None:
    inside, outside = run_copy / "pipeline" / name, tmp_path / "outside"
    if inside.exists():
        shutil.move(inside, outside)
    inside.symlink_to(outside)
    with refused("pipeline", str(inside), "leads out"):
        MTDiffusionPipeline.from_pretrained(run_copy / "pipeline")
    if name == "model/config.json":
        with refused("model", str(inside), "leads out"):
            MTDiffusionModel.from_pretrained(run_copy / "pipeline", subfolder="model")


def test_a_snapshot_of_the_hub_keeps_its_links(run_copy: Path, tmp_path: Path) -> None:
    """Its files are links to the blobs beside it, and to nothing else."""
    home = tmp_path / "models--a--b"
    snapshot = home / "snapshots" / "0123"
    shutil.copytree(run_copy / "pipeline", snapshot)
    (home / "blobs").mkdir()
    file, other = snapshot / "model" / "config.json", tmp_path / "other"
    shutil.copy(file, other)
    shutil.move(file, home / "blobs" / "abc")
    file.symlink_to(Path("../../../blobs/abc"))
    MTDiffusionPipeline.from_pretrained(snapshot)
    file.unlink()
    file.symlink_to(other)
    with refused("pipeline", str(file), "leads out"):
        MTDiffusionPipeline.from_pretrained(snapshot)


def test_a_run_folder_may_be_a_link(cli: Cli, finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(finished_run)
    arguments = ["--num", 1, "--steps", 1, "--out", tmp_path / "grid.png"]
    assert cli("sample", tmp_path / "link", *arguments).code == 0


def test_a_judge_stays_in_its_folder(finished_run: Path, run_copy: Path, tmp_path: Path) -> None:
    (run_copy / "pipeline" / "model" / "more.json").symlink_to("/etc/hostname")
    config = load_config(finished_run / "config.yaml", [f"evaluate.judges.label={run_copy}"])
    with refused("evaluate.judges.label", str(run_copy / "pipeline" / "model" / "more.json"), "leads out"):
        find_judge(config, None, "label", None, trust=False)


def test_evil_numbers_in_a_model_are_one_line(cli: Cli, run_copy: Path, tmp_path: Path) -> None:
    for value in [10**9, 10**30, -1, "x", None, [], 1e308]:
        file = run_copy / "pipeline" / "model" / "config.json"
        config = json.loads(file.read_text())
        config["backbone_config"]["block_out_channels"] = [value, value]
        file.write_text(json.dumps(config))
        torch.manual_seed(0)
        assert cli("sample", run_copy, "--out", tmp_path / "grid.png").complaint


# ----------------------------------------------------------------------------------------------------------- data, hub


def tar(file: Path, name: str, kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(file, "w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, "/etc/hostname", 2 if kind == tarfile.REGTYPE else 0
        archive.addfile(member, io.BytesIO(b"42"))
    return file


def test_a_shard_names_members_of_its_own_and_holds_files_alone(tmp_path: Path) -> None:
    members = [(name, tarfile.REGTYPE) for name in ("../a.cls", "/a.cls", "x/../../a.cls", "..\\a.cls")]
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
    for name, kind in [*members, *(("a.cls", kind) for kind in kinds)]:
        shard = tar(tmp_path / "data.tar", name, kind)
        with refused("data.source", str(shard), name):
            open_splits(str(shard), holdout=2)
    assert open_splits(str(tar(tmp_path / "whole.tar", "a.cls")), split="train", validation_split="train")


def test_a_saved_data_set_names_files_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"label": [0, 1]}).save_to_disk(str(folder))
    state = json.loads((folder / "state.json").read_text())
    for name in ("../out.arrow", "/out.arrow", "a/../../out.arrow", "", None, 3):
        (folder / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
        with refused("data.source", str(folder), f"names {name!r}"):
            open_splits(str(folder), holdout=2)


BENCHMARK = "fusion.yaml"
READERS: dict[str, list[Any]] = {
    "show": ["show", "config.yaml"],
    "evaluate": ["evaluate", "run"],
    "speed": ["benchmark", "speed", "config.yaml"],
    "fusion": ["benchmark", "fusion", BENCHMARK],
}


@pytest.mark.parametrize("command", READERS)
def test_what_only_reads_asks_the_hub_for_no_rows(
    cli: Cli, tiny: Tree, run_copy: Path, contacts: list[Any], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_copy.parent)
    run_copy.rename("run")
    tiny["data"]["source"] = "stranger/rows"
    tiny["modalities"]["label"] = {"kind": "label"}  # the data say how many classes there are
    OmegaConf.save(OmegaConf.create(tiny), "config.yaml")
    stranger = OmegaConf.load("run/config.yaml")
    stranger.data.source = "stranger/rows"
    OmegaConf.save(stranger, "run/config.yaml")
    fusion = OmegaConf.load(ROOT / "experiments" / "fusion" / "accuracy_shapes.yaml")
    fusion.data.source = "stranger/rows"
    OmegaConf.save(fusion, BENCHMARK)
    complaint = cli(*READERS[command]).complaint
    assert "data.source" in complaint and "--trust-custom-modalities" in complaint
    assert contacts == []


@pytest.mark.parametrize("command", ["speed", "fusion"])
def test_a_benchmark_imports_nothing_unless_trusted(cli: Cli, tiny: Tree, payload: Path, command: str) -> None:
    tiny["modalities"] = {"image": {"kind": "image", "channels": 1, "size": 16}, "label": MODALITY}
    OmegaConf.save(OmegaConf.create(tiny), "config.yaml")
    fusion = OmegaConf.load(ROOT / "experiments" / "fusion" / "accuracy_shapes.yaml")
    fusion.encoder = {"kind": "payload_of_a_stranger:Network"}
    OmegaConf.save(fusion, BENCHMARK)
    assert "--trust-custom-modalities" in cli(*READERS[command]).complaint
    assert not payload.exists()


# ---------------------------------------------------------------------------------------------------------- permission


def test_what_the_disk_refuses_is_one_line(cli: Cli, tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (errno.EACCES, errno.EROFS, errno.ENOSPC):

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(code, "said", str(tiny_file))

        monkeypatch.setattr(Path, "is_file", refuse)
        answer = cli("show", tiny_file)
        assert answer.code == 1 and str(tiny_file) in answer.err and answer.err.count("\n") == 1
