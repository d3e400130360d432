"""Texts: every script has tokens, tokenizers are kept, the likeliest text is found, and each odd text has its rule."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Generator, Tensor

from mmdiff.config import Config, load_config
from mmdiff.data.table import Table
from mmdiff.metrics.text import captions, perplexity
from mmdiff.modalities import Shape, Text
from mmdiff.model import MTDiffusionModel
from mmdiff.training import train

SHAPE = Shape((2, 8, 8), 6, 10)
SMALL = {"dim": 16, "depth": 1, "heads": 2}
SENTENCES = ["a small red ring at the top", "a large blue ring", "日本語のテキスト", "مرحبا بالعالم"] * 2


def text(**settings: Any) -> Text:
    torch.manual_seed(0)
    return Text(SHAPE, **{"max_tokens": 12, **SMALL, **settings})


def params(modality: Text, count: int, scale: float = 1.0) -> Tensor:
    generator = Generator().manual_seed(1)
    features = scale * torch.randn(count, 6, 8, 8, generator=generator)
    return modality.decode(features, scale * torch.randn(count, 10, generator=generator)).detach()


# ------------------------------------------------------------------------------------------------- texts and tokens


@pytest.mark.parametrize("raw", ["", " ", "a\r\nb\t\0", "日本語 🎉 é", "العالم", "\U0010ffff", "<unk> [PAD]", "x" * 60])
def test_every_text_comes_back_byte_by_byte(raw: str, tmp_path: Path) -> None:
    settings = Text.settings_from_data(None, SENTENCES)
    assert settings == Text.settings_from_data(None, SENTENCES)  # a function of the texts
    assert settings["max_tokens"] == max(len(text(**settings).tokens.encode(one)) for one in SENTENCES) < 10
    modality = text(**settings | {"max_tokens": 64})
    value = modality.preprocess(raw)
    assert modality.postprocess(value[None]) == [raw]
    assert modality.parse(str(modality.save(raw, tmp_path / "text"))) == raw


def test_a_long_text_is_cut_which_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    modality = text(max_tokens=4)
    with caplog.at_level(logging.WARNING):
        values = [modality.preprocess("abcdef"), modality.preprocess("abcdefgh"), modality.preprocess("abcd")]
    assert modality.postprocess(torch.stack(values)) == ["abcd"] * 3
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "max_tokens = 4" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "call"),
    [
        ("text", "int", lambda: text().preprocess(3)),
        ("text", "list", lambda: text().preprocess(["a", "b"])),
        ("text", "'a\\ud800'", lambda: text().preprocess("a\ud800")),
        ("text", None, lambda: Text.settings_from_data(None, [None, math.nan])),
        ("text", 300, lambda: text().check(torch.full((1, 12), 300))),
        ("text", "a text", lambda: text().check(torch.tensor([[256] + [1] * 11]))),
        ("text", "none.txt", lambda: text().parse("none.txt")),
        ("vocabulary", 255, lambda: Text.settings_from_data(None, SENTENCES, vocabulary=255)),
        ("merges", "a", lambda: text(merges=["a"])),
        ("merges", "1 merges", lambda: text(merges=["ab c"])),
        ("heads", 3, lambda: text(heads=3)),
        ("max_tokens", 0, lambda: text(max_tokens=0)),
        ("max_tokens", None, lambda: Text.settings_from_stream(None)),
        ("tokenizer", "no/such/folder", lambda: Text.settings_from_files(tokenizer="no/such/folder")),
        ("encoder", "no/such/folder", lambda: Text.settings_from_files(encoder="no/such/folder")),
    ],
)
def test_what_is_no_text_is_refused(key: str, value: Any, call: Callable[[], Any]) -> None:
    with refused(key, value):
        call()


# ------------------------------------------------------------------------------------ tokenizers, encoders of others


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text encoder of transformers with its tokenizer, which knows six words."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    words = ["[UNK]", "[CLS]", "[SEP]", "a", "red", "ring"]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = BertConfig(
        vocab_size=6,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


def a_model(**settings: Any) -> MTDiffusionModel:
    torch.manual_seed(0)
    caption = {"kind": "text", "max_tokens": 4, **SMALL, **settings}
    backbone = {"kind": "unet", "block_out_channels": [8, 16], "attention_head_dim": 8, "norm_num_groups": 4}
    return MTDiffusionModel({"image": {"kind": "image", "channels": 1, "size": 8}, "caption": caption}, backbone)


@pytest.mark.parametrize("setting", ["tokenizer", "encoder"])
def test_a_model_keeps_the_tokenizer_and_the_encoder_that_it_names(setting: str, bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    settings = {setting: str(folder)}
    settings |= Text.settings_from_files(**settings)
    assert settings["tokenizer_size"][1] == 6
    assert Text.settings_from_data(None, ["a red ring", "a"], **settings) == {"max_tokens": 3}
    model = a_model(**settings)
    model.load_initial_weights()
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(folder)
    again = MTDiffusionModel.from_pretrained(tmp_path / "model")
    one, other = model.modalities["caption"], again.modalities["caption"]
    value = other.preprocess("a red ring")[None]
    assert value.tolist() == [[3, 4, 5, 6]] and other.postprocess(value) == ["a red ring"]
    assert torch.equal(one.context(value), other.context(value))


def test_signs_that_the_vocabulary_lacks_are_told_once(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = {"tokenizer": str(bert)}
    modality = text(**source, **Text.settings_from_files(**source))
    assert modality.preprocess("a green ring")[:3].tolist() == [3, 0, 5]
    modality.preprocess("a blue ring")
    assert len(caplog.records) == 1 and "vocabulary" in caplog.text


def test_a_frozen_encoder_gives_what_transformers_gives_and_stays(bert: Path) -> None:
    from transformers import BertModel

    source = {"encoder": str(bert)}
    modality = text(max_tokens=8, **source, **Text.settings_from_files(**source))
    modality.load_initial_weights()
    hidden = BertModel.from_pretrained(bert).eval()(torch.tensor([[1, 3, 4, 5, 2]])).last_hidden_state.mean(dim=1)
    value = modality.preprocess("a red ring")[None]
    torch.testing.assert_close(modality.frozen(value, modality.end, modality.tokens.frame()), hidden)
    modality.train()
    assert not modality.frozen.network.training
    modality.context(value).square().sum().backward()
    assert all(parameter.grad is None for parameter in modality.frozen.parameters())
    with refused("max_tokens", 15):
        text(max_tokens=15, **source, **Text.settings_from_files(**source))


# ------------------------------------------------------------------------------------------------------ the likelihood


def test_padding_belongs_to_no_text() -> None:
    """What stands after the end changes nothing: neither likelihood nor encoding, for any longest text."""
    short, long = text(max_tokens=5), text(max_tokens=9)
    state = short.state_dict()
    for name, tensor in long.state_dict().items():
        state[name] = state[name] if state[name].shape == tensor.shape else torch.cat([state[name], tensor[5:]])
    long.load_state_dict(state)
    memory, raws = params(short, 3), ["", "ab", "abcd"]
    one, other = (torch.stack([m.preprocess(raw) for raw in raws]) for m in (short, long))
    torch.testing.assert_close(short.token_nll(memory, one), long.token_nll(memory, other)[:, :5])
    assert (long.token_nll(memory, other)[:, 5:] == 0).all()
    torch.testing.assert_close(short.context(one), long.context(other))


def test_the_search_finds_the_likeliest_of_all_texts() -> None:
    modality = text(max_tokens=2, beams=256)
    with torch.no_grad():
        modality.decoder.out.weight.mul_(20)  # far from uniform
        row = params(modality, 1, scale=3.0)
        pairs = torch.cartesian_prod(torch.arange(256), torch.arange(257))
        every = torch.cat([torch.tensor([[256, 256]]), pairs])  # all texts of 0, 1 and 2 bytes
        nll = torch.cat([modality.nll(row.expand(len(part), -1, -1), part) for part in every.split(8192)])
        assert torch.exp(-2 * nll.double()).sum() == pytest.approx(1, abs=1e-4)
        assert modality.mode(row).tolist() == [every[nll.argmin()].tolist()]
        modality.beams = 1
        assert modality.nll(row, modality.mode(row)) >= nll.min() - 1e-6


# ---------------------------------------------------------------------------------------------------------------- rows


def test_one_of_several_captions_is_drawn_at_every_visit() -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"caption": [["a", None, "b", "c"], ["d"], [None], None, []]})
    modality = text()
    settings = {"preprocess": {"caption": modality.preprocess}, "placeholders": {"caption": modality.placeholder()}}
    table = Table(rows, {"caption": "caption"}, one_of=["caption"], seed=3, **settings)

    def read(*visits: Any) -> list[str]:
        return modality.postprocess(table.batch(*visits).values["caption"])

    drawn = read([0] * 600, range(600))
    assert all(150 < drawn.count(one) < 250 for one in "abc") and len(drawn) == 600
    assert read([0, 0], [7, 8]) == drawn[7:9]  # by sample number, however the batch is split
    assert read([0, 1]) == ["a", "d"]  # where training does not visit
    assert table.batch([0, 1, 2, 3, 4], range(5)).present["caption"].tolist() == [True, True, False, False, False]


def test_a_file_of_captions_trains_and_resumes_to_the_bit(tiny: dict[str, Any], tmp_path: Path) -> None:
    from omegaconf import OmegaConf
    from PIL import Image
    from safetensors.torch import load_file

    lines = []
    for k in range(16):
        Image.new("L", (8, 8), 15 * k).save(tmp_path / f"{k}.png")
        lines.append(json.dumps({"image": f"{k}.png", "caption": [f"grey {k}", f"{k} of 16"] if k % 3 else None}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    modalities = {"image": {"kind": "image"}, "caption": {"kind": "text", **SMALL}}
    data = {"source": str(tmp_path / "rows.jsonl"), "holdout": 8, "one_of": ["caption"]}
    path = tmp_path / "captions.yaml"
    OmegaConf.save(OmegaConf.create({**tiny, "data": data, "modalities": modalities}), path)
    more = ["train.steps=4", "train.checkpoint_every=2"]
    one, other = (
        train(load_config(path, [f"output={tmp_path / name}", *more]), progress=False) for name in ("one", "other")
    )
    for later in ("checkpoints/step-4", "pipeline"):
        shutil.rmtree(other / later)
    train(load_config(path, [f"output={other}", *more, "train.resume=auto"]), progress=False)
    a, b = (load_file(folder / "checkpoints/step-4/weights.safetensors") for folder in (one, other))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_an_encoded_row_has_one_caption(configure: Callable[..., Config]) -> None:
    from mmdiff.encode.encoder import Encoder, Request

    config = configure("data.one_of=[label]")
    with refused("data.one_of", ["label"]):
        Encoder(config, Request(config, Path("out")))


# -------------------------------------------------------------------------------------------------------------- scores


def test_scores_of_texts() -> None:
    words = {"colour": ["red", "blue"], "shape": ["ring"]}
    scores = captions(
        ["a red ring", "a Blue ring.", "", "a red cat"], ["a red ring", "a blue ring", "", "a blue cat"], words
    )
    assert [scores[name] for name in ("exact match", "colour", "shape", "all attributes")] == [0.5, 0.75, 1.0, 0.75]
    edits = [0, 2 / 11, 0, 4 / 10]
    assert 0.2 < scores["BLEU-4"] < 1 and scores["character error rate"] == pytest.approx(sum(edits) / 4)
    assert captions(["我看", "x"], ["我看见", ""])["character error rate"] == pytest.approx((1 / 3 + 1) / 2)
    uniform = perplexity(torch.tensor([2, 6]).numpy() * math.log(7), torch.tensor([2, 6]).numpy())
    assert uniform["perplexity"] == pytest.approx(7) and uniform["nats per text"] == pytest.approx(4 * math.log(7))


def test_the_rule_reads_captions_of_shapes() -> None:
    from mmdiff.data import RAW_RULES
    from mmdiff.data.sources import load
    from mmdiff.modalities import Image

    rows = load("shapes", {"rows": 60, "validation_rows": 1, "size": 32})["train"]
    images = torch.stack([Image(Shape((3, 32, 32), 6, 10), 3, 32).preprocess(rows[k]["image"]) for k in range(60)])
    read, truth = RAW_RULES["shapes"]["caption"](images), [rows[k]["caption"] for k in range(60)]
    assert sum(one == other for one, other in zip(read, truth)) >= 57  # sizes and places near a border between words
    assert len(RAW_RULES["shapes"]["caption"](torch.zeros(2, 3, 32, 32))) == 2  # nothing is there
