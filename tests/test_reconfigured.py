"""Models of transformers that grew in training, as directories that transformers reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxgrow.training
from fxgrow.errors import PlanError, SourceError

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def bert() -> tuple[Any, dict[str, Any]]:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)), {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8,
    }  # fmt: skip


def gpt2() -> tuple[Any, dict[str, Any]]:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), {"n_embd": 32, "n_head": 8}


@pytest.mark.parametrize("make", [bert, gpt2])
def test_a_directory_of_a_model_that_grew_is_read_and_computes_the_same(make, tmp_path):
    torch.manual_seed(0)
    model, fields = make()
    tokens = torch.randint(3, 50, (2, 8))
    fxgrow.training.grow_(model.eval(), "2x", {"input_ids": tokens}, where="all")
    for parameter in model.parameters():  # as training would
        parameter.data.mul_(1.1)
    before = {key: getattr(model.config, key) for key in fields}
    found = fxgrow.training.reconfigured(model)
    assert type(found) is type(model)
    assert not found.training
    assert {key: getattr(model.config, key) for key in fields} == before
    assert {key: getattr(found.config, key) for key in fields} == fields
    found.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(
            loaded(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=1e-6
        )
    # It stands by itself: another growth begins from there.
    assert fxgrow.training.parts_of(found) == ()


def test_a_model_that_no_configuration_describes_is_refused_with_the_reason():
    torch.manual_seed(0)
    model, _ = bert()
    inputs = {"input_ids": torch.randint(3, 50, (2, 8))}
    fxgrow.training.grow_(model, {"bert.encoder.layer.0.intermediate.dense": "2x"}, inputs)
    with pytest.raises(SourceError, match=r"no field of.*from which regrow_ makes"):
        fxgrow.training.reconfigured(model)


def test_what_has_not_grown_or_has_no_configuration_is_refused():
    for model in (bert()[0], torch.nn.Linear(2, 2)):
        with pytest.raises(PlanError, match="no configuration of transformers that growth"):
            fxgrow.training.reconfigured(model)
