"""A set of photos before a vision-language model: one photo is the plain model, order and padding change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from refusals import refused
from safetensors.torch import load_file

from mmdiff.modalities.fusion import FUSIONS, QUERY_FUSIONS
from mmdiff.vlm import ARCHITECTURES, Inputs, Reader, VisionLanguageModel
from mmdiff.vlm.small import SMALL, Sizes, make_small

TINY = Sizes(image=16, patch=4, width=16, layers=2, heads=2, queries=3)
PROMPT, ANSWERS = "what is it ?", ["a red circle", "a green square of wood"]
GREEDY = {"max_new_tokens": 4, "do_sample": False}
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
# what the processor of transformers is told: the mark of an image, and settings
TOLD: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("<image>", {}),
    "llava-onevision": ("<image>", {}),
    "idefics3": ("<image>", {"do_image_splitting": False}),
    "smolvlm": ("<image>", {"do_image_splitting": False}),
    "qwen3-vl": (QWEN, {}),
    "qwen3.5": (QWEN, {}),
    "qwen4-exp": (QWEN, {}),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp(kind) for kind in SMALL}
    for kind, folder in made.items():
        make_small(folder, kind, [PROMPT, *ANSWERS], TINY)
    return made


@pytest.fixture(params=list(SMALL))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, folders: dict[str, Path]) -> Path:
    return folders[kind]


def photos(count: int, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def plain(folder: Path) -> tuple[Any, Any]:
    """The model and the processor of transformers alone."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, transformers.AutoProcessor.from_pretrained(folder)


def told(kind: str, processor: Any, sets: list[list[Image.Image]]) -> dict[str, Any]:
    """A batch of the processor alone."""
    mark, settings = TOLD.get(kind, ("", {}))
    texts = [f"{mark * len(members)}\n{PROMPT}" if mark else PROMPT for members in sets]
    return dict(processor(images=sets, text=texts, padding=True, padding_side="left", return_tensors="pt", **settings))


def told_of_single_photos(kind: str, processor: Any, singles: list[Image.Image]) -> dict[str, Any]:
    """One photo in each prompt. LLaVA-OneVision gets the photos as those of one prompt: it would cut single ones."""
    if kind != "llava-onevision":
        return told(kind, processor, [[photo] for photo in singles])
    together = told(kind, processor, [singles])
    count = (together["input_ids"] == processor.image_token_id).sum() // len(singles)
    texts = [f"{'<image>' * count}\n{PROMPT}"] * len(singles)
    return together | dict(processor.tokenizer(texts, return_tensors="pt"))


def without_prompt(tokens: torch.Tensor, length: int, model: Any) -> torch.Tensor:
    return tokens if model.config.is_encoder_decoder else tokens[:, length:]


def test_one_photo_is_the_plain_model(kind: str, folder: Path) -> None:
    model, processor = plain(folder)
    singles = [photo.resize((24, 16)) for photo in photos(2)]
    sets = [[photo] for photo in singles]
    reader = Reader(VisionLanguageModel.from_pretrained(folder))
    inputs, asked = reader(sets, [PROMPT] * 2, ANSWERS), reader(sets, [PROMPT] * 2)
    batch = told_of_single_photos(kind, processor, singles)
    prompt = batch["input_ids"].shape[1]
    torch.testing.assert_close(asked.input_ids, batch["input_ids"], rtol=0, atol=0)
    with torch.no_grad():
        expected = model(**longer(batch, inputs), labels=inputs.labels)
        generated = without_prompt(model.generate(**batch, **GREEDY), prompt, model)
    for fusion in (*FUSIONS, *QUERY_FUSIONS):
        ours = VisionLanguageModel(model, fusion, hidden=8)
        answered = ours(*inputs)
        assert torch.equal(answered.logits, expected.logits) and torch.equal(answered.loss, expected.loss)
        assert torch.equal(answered.weights, torch.ones(2, 1))
        assert torch.equal(ours.generate(*asked[:4], **GREEDY).tokens, generated)


def longer(batch: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """The batch with the answers after the prompts."""
    more = inputs.input_ids.shape[1] - batch["input_ids"].shape[1]
    types = {name: torch.nn.functional.pad(batch[name], (0, more)) for name in ("mm_token_type_ids",) if name in batch}
    return batch | types | {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}


@pytest.mark.parametrize("kind", list(TOLD))
def test_separate_photos_are_the_plain_model_with_several_images(kind: str, folder: Path) -> None:
    model, processor = plain(folder)
    sets = [photos(3), photos(2, seed=1)]
    ours = VisionLanguageModel(model)
    reader = Reader(ours, processor)
    inputs = reader(sets, [PROMPT] * 2, ANSWERS, fused=False)
    asked = reader(sets, [PROMPT] * 2, fused=False)
    batch = told(kind, processor, sets)
    torch.testing.assert_close(asked.input_ids, batch["input_ids"], rtol=0, atol=0)
    with torch.no_grad():
        expected = model(**longer(batch, inputs), labels=inputs.labels)
        generated = model.generate(**batch, **GREEDY)[:, asked.input_ids.shape[1] :]
    answered = ours(*inputs, fused=False)
    assert torch.equal(answered.logits, expected.logits) and torch.equal(answered.loss, expected.loss)
    assert answered.weights is None
    assert torch.equal(ours.generate(*asked[:4], fused=False, **GREEDY).tokens, generated)
    fused = reader(sets, [PROMPT] * 2).input_ids
    counts = [(ids == model.config.image_token_id).sum(dim=1).tolist() for ids in (asked.input_ids, fused)]
    assert counts[0] == [3 * counts[1][0], 2 * counts[1][0]]  # fusion costs n times fewer tokens


@pytest.mark.parametrize("kind", ["llava-onevision", "idefics3", "qwen3-vl"])
def test_a_chat_template_makes_the_prompt(folder: Path) -> None:
    reader = Reader(VisionLanguageModel.from_pretrained(folder))
    mark = str(reader.processor.image_token)
    reader.processor.chat_template = (
        "{% for part in messages[0].content %}{% if part.type == 'image' %}" + mark + "{% else %}user: {{ part.text }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %} answer:{% endif %}"
    )
    sets = [photos(3)]
    own = reader(sets, [f"{mark * 3}user: {PROMPT} answer:"], fused=False)
    assert torch.equal(reader(sets, [PROMPT], fused=False).input_ids, own.input_ids)
    with refused("prompts", ANY, "3"):
        reader(sets, [f"{mark}{PROMPT}"], fused=False)


def test_photos_of_other_shapes_become_squares_or_are_refused(folders: dict[str, Path]) -> None:
    ours = VisionLanguageModel.from_pretrained(folders["qwen3-vl"])
    wide, high = (photos(1)[0].resize(size) for size in ((32, 8), (8, 32)))
    with refused("sets", "2 × 8 and 8 × 2 patches", "size"):
        Reader(ours)([[wide, high]], [PROMPT])
    assert Reader(ours)([[wide, wide]], [PROMPT]).images.shape[-2:] == (8, 32)
    with refused("sets", [(16, 16), (601, 2)]):
        Reader(ours)([[*photos(1), wide.resize((601, 2))]], [PROMPT])
    with refused("size", 0):
        Reader(ours, size=0)
    inputs = Reader(ours, size=16)([[wide, high]], [PROMPT])
    assert inputs.images.shape[-2:] == (16, 16) and ours(*inputs).logits.isfinite().all()


@pytest.mark.parametrize("fusion", ["max", "gated_attention", "query_attention"])
def test_order_and_padding_change_nothing(folder: Path, fusion: str) -> None:
    ours = VisionLanguageModel.from_pretrained(folder, fusion, hidden=8)
    inputs = Reader(ours)([photos(3), photos(2, seed=1)], [PROMPT] * 2, ANSWERS)
    assert inputs.mask.tolist() == [[True, True, True], [True, True, False]]
    there = ours(*inputs)
    assert torch.allclose(there.weights.sum(dim=1), torch.ones(2)) and there.weights[1, 2] == 0
    hollow = inputs.images.clone()
    hollow[1, 2] = torch.nan
    assert torch.equal(ours(hollow, *inputs[1:]).logits, there.logits)
    order = torch.tensor([2, 0, 1])
    turned = ours(inputs.images[:, order], inputs.mask[:, order], *inputs[2:])
    torch.testing.assert_close(turned.logits, there.logits, rtol=1e-5, atol=1e-6)  # the encoder's batch differs
    torch.testing.assert_close(turned.weights, there.weights[:, order], rtol=1e-5, atol=1e-6)
    fewer = ours(inputs.images[:, :1], inputs.mask[:, :1], *inputs[2:])
    assert (fewer.logits - there.logits).abs().max() > 1e-4  # the other photos are seen


def test_a_set_has_the_prompt_of_one_photo_and_generates(folder: Path) -> None:
    ours = VisionLanguageModel.from_pretrained(folder, hidden=8)
    reader = Reader(ours)
    one, many = reader([photos(1)], [PROMPT]), reader([photos(5)], [PROMPT])
    assert reader.tokenizer.decode(one.input_ids[0], skip_special_tokens=True).split() == PROMPT.split()
    labels = reader([photos(1)] * 2, [PROMPT] * 2, ANSWERS).labels
    assert reader.texts(labels.where(labels >= 0, reader.tokenizer.pad_token_id)) == ANSWERS
    assert torch.equal(one.input_ids, many.input_ids)
    found = ours.generate(*many[:4], max_new_tokens=4, num_beams=2)
    assert found.weights.shape == (1, 5) and found.tokens.shape[1] <= 5
    assert all(isinstance(text, str) for text in reader.texts(found.tokens))


@pytest.mark.parametrize("fusion", ["gated_attention", "query_attention"])
def test_only_the_fusion_learns_and_lies_apart(folder: Path, fusion: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = VisionLanguageModel.from_pretrained(folder, fusion, hidden=8).train()
    learning = {name.split(".")[0] for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert learning == {"fusion"} and not ours.model.training
    frozen = {name: tensor.clone() for name, tensor in ours.model.state_dict().items()}
    inputs = Reader(ours)([photos(3), photos(4, seed=1)], [PROMPT] * 2, ANSWERS)
    optimizer = torch.optim.Adam(ours.learn("fusion"), lr=0.05)
    losses = []
    for _ in range(8):
        loss = ours(*inputs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in ours.model.state_dict().items())
    assert all(parameter.grad is None for parameter in ours.model.parameters())
    ours.save_fusion(tmp_path)
    assert set(load_file(tmp_path / "fusion.safetensors")) == set(ours.fusion.state_dict())
    assert json.loads((tmp_path / "fusion.json").read_text())["fusion"] == fusion
    again = VisionLanguageModel.from_pretrained(folder)
    again.load_fusion(tmp_path)
    assert torch.equal(again(*inputs).logits, ours(*inputs).logits)


def test_the_fusion_is_asked_the_question(folder: Path) -> None:
    """Its words alone: not the images' tokens, not the padding, and never the answer."""
    torch.manual_seed(0)
    ours = VisionLanguageModel.from_pretrained(folder, "query_attention", hidden=8)
    torch.nn.init.normal_(ours.fusion.W.weight, std=2)
    reader, sets = Reader(ours), [photos(3), photos(3)]
    prompts = [PROMPT, "a red circle of wood"]
    asked, answered = reader(sets, prompts), reader(sets, prompts, ANSWERS)
    alone = reader(sets[:1], [PROMPT])
    words = alone.input_ids[0][alone.input_ids[0] != ours.model.config.image_token_id]
    mean = ours.model.get_input_embeddings()(words).detach().mean(dim=0)
    found = [ours.question(one.input_ids, one.attention_mask, one.labels) for one in (asked, answered, alone)]
    for question in (one[0] for one in found):
        torch.testing.assert_close(question, mean / mean.square().mean().sqrt(), rtol=1e-4, atol=1e-5)
    assert not any(question.requires_grad for question in found)
    one, other = ours(*answered).weights
    assert (one - other).abs().max() > 1e-3  # the photos are the same
    generated = ours.generate(*asked[:4], **GREEDY)
    torch.testing.assert_close(generated.weights, torch.stack([one, other]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["connector", "all"])
def test_more_can_learn(folder: Path, part: str) -> None:
    ours = VisionLanguageModel.from_pretrained(folder, "mean")
    chosen = ours.learn(part)
    inputs = Reader(ours)([photos(2)], [PROMPT], ANSWERS[:1])
    ours(*inputs).loss.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in chosen)
    seen = any(parameter.grad is not None for parameter in ours.parts.vision.parameters())
    assert seen == (part == "all")


@pytest.mark.parametrize("layers", [-2, [-2, -1]])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_llava_reads_the_layers_that_its_config_names(tmp_path: Path, layers: Any, strategy: str) -> None:
    settings = {"vision_feature_layer": layers, "vision_feature_select_strategy": strategy}
    make_small(tmp_path, "llava", [PROMPT], TINY, **settings)
    model, processor = plain(tmp_path)
    ours = VisionLanguageModel.from_pretrained(tmp_path)
    (photo,) = photos(1)
    batch = told("llava", processor, [[photo]])
    with torch.no_grad():
        expected = model(**batch).logits
        found = ours(*Reader(ours)([[photo]], [PROMPT])).logits
    assert torch.equal(found, expected)


def test_what_cannot_be_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    ours = VisionLanguageModel.from_pretrained(folders["llava"], "mean")
    reader = Reader(ours)
    with refused("sets", [1, 0]):
        reader([photos(1), []], [PROMPT] * 2)
    with refused("prompts", 2):
        reader([photos(1)], [PROMPT] * 2)
    inputs = reader([photos(2)], [PROMPT])
    with refused("input_ids", "[15] image tokens"):
        ours(inputs.images, inputs.mask, inputs.input_ids[:, 1:], inputs.attention_mask[:, 1:])
    with refused("images"):
        ours(inputs.images, inputs.mask.float(), inputs.input_ids, inputs.attention_mask)
    with refused("fusion"):
        ours.load_fusion(tmp_path)
    with refused("model"):
        VisionLanguageModel.from_pretrained(tmp_path)
    with refused("input_ids", "[16] image tokens", "[32]"):
        ours(*inputs, fused=False)
    with refused("part", "eyes"):
        ours.learn("eyes")
    transformers.BertConfig(hidden_size=16).save_pretrained(tmp_path)
    with refused("model", "bert", *ARCHITECTURES):
        VisionLanguageModel.from_pretrained(tmp_path)
    blip = VisionLanguageModel.from_pretrained(folders["blip-2"])
    with refused("fused", False, "blip-2"):
        Reader(blip)([photos(2)], [PROMPT], fused=False)
    with refused("fused", False):
        blip(*Reader(blip)([photos(2)], [PROMPT]), fused=False)
    blip.save_fusion(tmp_path)
    wide = tmp_path / "wide"
    make_small(wide, "llava", [PROMPT], TINY._replace(width=32))
    with refused("fusion", ANY, "16", "32"):
        VisionLanguageModel.from_pretrained(wide).load_fusion(tmp_path)
    VisionLanguageModel.from_pretrained(folders["llava"], "query_attention").save_fusion(tmp_path)
    facts = json.loads((tmp_path / "fusion.json").read_text())
    (tmp_path / "fusion.json").write_text(json.dumps(facts | {"query_dim": 24}))
    with refused("fusion", ANY, "16", "24"):
        ours.load_fusion(tmp_path)
