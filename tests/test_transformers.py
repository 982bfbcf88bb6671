"""Networks of Hugging Face transformers: heads and MLPs grow, and the function stays."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hugging_face import CORE, EXTRAS, OLD_VIT, VIT_LAYERS, build, outputs
from networks import max_rel
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import FxgrowError
from fxgrow.modules.inputs import batches_for

pytestmark = pytest.mark.filterwarnings("default")  # what transformers and its parts deprecate

VIT_QUERY, VIT_MLP = (
    ("attention.attention.query", "intermediate.dense")
    if OLD_VIT
    else ("attention.q_proj", "mlp.fc1")
)

# What must grow with where="hidden": the attribute that counts heads, if there is one, and a layer
# of an attention and of an MLP with their dims that double.
GROWN: dict[str, tuple[tuple[str, str, int], ...]] = {
    "bert": (
        ("encoder.layer.1.attention.self", "num_attention_heads", 8),
        ("encoder.layer.1.attention.self", "all_head_size", 32),
        ("encoder.layer.1.intermediate.dense", "out_features", 48),
    ),
    "gpt2": (
        ("transformer.h.1.attn", "num_heads", 8),
        ("transformer.h.1.attn", "split_size", 32),
        ("transformer.h.1.attn", "embed_dim", 16),
        ("transformer.h.1.attn.c_attn", "nf", 96),
        ("transformer.h.1.attn.c_proj", "nf", 16),
        ("transformer.h.1.mlp.c_fc", "nf", 128),
    ),
    "llama": (
        ("model.layers.1.self_attn.q_proj", "out_features", 32),
        ("model.layers.1.self_attn.k_proj", "out_features", 16),
        ("model.layers.1.self_attn.v_proj", "out_features", 16),
        ("model.layers.1.self_attn", "head_dim", 4),
        ("model.layers.1.self_attn", "num_key_value_groups", 2),
        ("model.layers.1.mlp.gate_proj", "out_features", 48),
    ),
    "mistral": (
        ("model.layers.1.self_attn.q_proj", "out_features", 32),
        ("model.layers.1.self_attn.k_proj", "out_features", 16),
        ("model.layers.1.mlp.down_proj", "in_features", 48),
    ),
    "vit": (
        (f"{VIT_LAYERS}.1.{VIT_QUERY}", "out_features", 32),
        (f"{VIT_LAYERS}.1.{VIT_MLP}", "out_features", 48),
    ),
    "convnextv2": (("convnextv2.encoder.stages.1.layers.1.pwconv1", "out_features", 96),),
    "t5": (
        ("encoder.block.1.layer.0.SelfAttention", "n_heads", 8),
        ("encoder.block.1.layer.0.SelfAttention", "inner_dim", 32),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "embedding_dim", 8),
        ("decoder.block.1.layer.1.EncDecAttention", "n_heads", 8),
        ("decoder.block.1.layer.2.DenseReluDense.wi", "out_features", 48),
    ),
}
DECODERS = ("gpt2", "llama", "mistral", "t5")


@pytest.mark.parametrize("name", CORE)
def test_heads_and_mlps_grow_and_the_network_still_works(name: str) -> None:
    model, inputs = build(name)
    grown = fxgrow.widen(model, "2x", inputs)
    assert grown.plan.scopes[0].tracer == "dispatch"
    assert not grown.plan.refused
    assert type(grown.model) is type(model)
    before = outputs(model, inputs)
    for old, new in zip(before, outputs(grown.model, inputs), strict=True):
        assert max_rel(old, new) < 1e-10
    assert grown.report.verification.verdict == "preserved"
    for layer, attribute, value in GROWN[name]:
        assert getattr(grown.model.get_submodule(layer), attribute) == value, (layer, attribute)
    for twin in (copy.deepcopy(grown.model), _unpickled(grown.model)):
        for old, new in zip(before, outputs(twin, inputs), strict=True):
            assert max_rel(old, new) < 1e-10
    _check_that_it_trains(grown.model, inputs)
    assert not grown.report.verification.without_gradient


def _unpickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _check_that_it_trains(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """One small step downhill lowers the loss."""
    target = [torch.randn_like(tensor) for tensor in outputs(model, inputs)][:1]

    def loss() -> Tensor:
        first = next(iter(model(**inputs).values()))
        return (first - target[0]).square().mean()

    before = loss()
    before.backward()
    with torch.no_grad():
        size = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-4 / size**0.5 * parameter.grad
        assert loss() < before


@pytest.mark.parametrize("name", DECODERS)
def test_a_grown_decoder_generates_with_its_cache(name: str) -> None:
    model, inputs = build(name)
    grown = fxgrow.widen(model, "2x", inputs, verify=False).model
    settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    prompt = inputs["input_ids"]
    assert torch.equal(model.generate(prompt, **settings), grown.generate(prompt, **settings))


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_fused_attention_grows_too(name: str) -> None:
    model, inputs = build(name, attention="sdpa")
    grown = fxgrow.widen(model, "2x", inputs)
    layer, attribute, value = GROWN[name][0]
    assert getattr(grown.model.get_submodule(layer), attribute) == value
    for old, new in zip(outputs(model, inputs), outputs(grown.model, inputs), strict=True):
        assert max_rel(old, new) < 1e-10


@pytest.mark.parametrize("name", ["llama", "vit", "convnextv2"])
def test_untied_streams_grow(name: str) -> None:
    model, inputs = build(name)
    grown = fxgrow.widen(model, "2x", inputs, where="all")
    kinds = [group.kind for group in grown.plan.groups]
    assert "stream" in kinds
    # The norms of Llama compute in float32 whatever the weights are, and round there.
    tolerance = 1e-6 if name == "llama" else 1e-10
    for old, new in zip(outputs(model, inputs), outputs(grown.model, inputs), strict=True):
        assert max_rel(old, new) < tolerance
    verification = grown.report.verification
    assert verification.verdict == "preserved"
    assert verification.eval.float64.max_rel < 1e-10  # without the casts


TIED = [(name, False) for name in ("gpt2", "opt", "gemma", "gemma2", "t5", "whisper", "bart")]
UNTIED = [(name, True) for name in ("gpt2", "gemma2", "t5")]


@pytest.mark.parametrize(("name", "untie"), TIED + UNTIED)
def test_tied_streams_grow_and_the_network_still_works(name: str, untie: bool) -> None:
    model, inputs = build(name)
    grown = fxgrow.widen(model, "2x", inputs, where="stream", untie=untie)
    assert "stream" in [group.kind for group in grown.plan.groups]
    assert all(group.preserves == "exact" for group in grown.plan.groups)
    assert grown.report.verification.verdict == "preserved"
    wide = grown.model
    embedding, head = wide.get_input_embeddings().weight, wide.get_output_embeddings().weight
    assert (embedding is head) is not untie
    assert wide.config.tie_word_embeddings is not untie
    short = {key: x[:, :4] if key.endswith(("ids", "mask")) else x for key, x in inputs.items()}
    masks = {}
    if "input_ids" in inputs:
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, -2:] = 0
        masks = {"attention_mask": mask}
    for arguments in (inputs, inputs | masks, short):
        with torch.no_grad():
            old, new = model(**arguments).logits, wide(**arguments).logits
        assert max_rel(old, new) < (1e-6 if name in ("gemma", "gemma2", "t5") else 1e-10)
    start = inputs.get("input_ids", inputs.get("input_features"))
    settings = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    assert torch.equal(model.generate(start, **settings), wide.generate(start, **settings))
    _check_that_it_trains(wide, inputs)


def test_a_grown_tied_decoder_is_exported() -> None:
    model, inputs = build("gpt2")
    wide = fxgrow.widen(model, "2x", inputs, where="stream").model
    settings = {**inputs, "use_cache": False}
    program = torch.export.export(wide, (), settings, strict=False)
    assert max_rel(model(**settings).logits, program.module()(**settings).logits) < 1e-10


@pytest.mark.parametrize(
    ("name", "group", "reason"),
    [
        ("bert", "embeddings.word_embeddings", "an output of the network"),
    ],
)
def test_a_stream_that_is_pinned_has_a_true_reason(name: str, group: str, reason: str) -> None:
    model, inputs = build(name)
    pinned = [g for g in fxgrow.inspect(model, inputs).parts[0].groups if g.kind == "pinned"]
    assert any(reason in g.reason for g in pinned if g.name == group)


def test_slopes_of_alibi_pin_the_heads() -> None:
    model, inputs = build("bloom")
    groups = {g.name: g for g in fxgrow.inspect(model, inputs).parts[0].groups}
    attention = groups["transformer.h.0.self_attention.query_key_value"]
    assert attention.kind == "pinned"
    assert "fixed width (aten.baddbmm" in attention.reason
    assert groups["transformer.h.0.mlp.dense_h_to_4h"].kind == "hidden"


class Configured(nn.Module):
    """Attention whose number of heads stands in an object that it shares with others."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(9, 6)
        self.q, self.k, self.v = (nn.Linear(6, 9) for _ in range(3))
        self.out = nn.Linear(9, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(tokens)
        shape = (*tokens.shape, self.config.heads, 3)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        if mask is not None and not bool(mask.all()):  # looks into its data
            scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e9)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return {"logits": self.head(x + self.out(mixed))}


class Config:
    """Sizes of :class:`Configured`."""

    heads = None

    def __init__(self, heads: int) -> None:
        self.heads = heads


@pytest.mark.parametrize("masked", [False, True])
def test_sizes_are_found_in_objects_that_modules_hold(masked: bool) -> None:
    torch.manual_seed(0)
    model = Configured(Config(3)).double().eval()
    inputs = {"tokens": torch.randint(9, (2, 4))}
    if masked:
        inputs["mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    grown = fxgrow.widen(model, "2x", inputs)
    assert grown.model.config.heads == 6
    assert model.config.heads == 3
    assert max_rel(model(**inputs)["logits"], grown.model(**inputs)["logits"]) < 1e-10
    assert fxgrow.verify(model, grown.model, inputs).verdict == "preserved"
    assert fxgrow.Plan.from_json(grown.plan.to_json()) == grown.plan


def test_new_token_ids_stay_within_the_range_of_the_example() -> None:
    model = Configured(Config(3))
    tokens, mask = torch.tensor([[2, 7, 3, 7]]), torch.tensor([[1, 1, 1, 0]])
    first, second = batches_for(model, [(1, 4)], False, {"tokens": tokens, "mask": mask})
    assert first["tokens"] is tokens
    assert not torch.equal(second["tokens"], tokens)
    assert 2 <= int(second["tokens"].min()) <= int(second["tokens"].max()) <= 7
    assert second["mask"].tolist() == [[0, 1, 1, 1]]


class Dropping(nn.Module):
    """Functional dropout, which no module's mode can turn off."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(self.up(x).relu(), 0.5, self.training)
        kept = torch.floor(0.9 + torch.rand(len(x), 1, dtype=x.dtype)) if self.training else 1.0
        return self.down(hidden) * kept


def test_chance_is_left_out_of_the_comparison() -> None:
    x = torch.randn(16, 4, dtype=torch.float64)
    grown = fxgrow.widen(Dropping().double(), "2x", x)
    assert grown.report.verification.train.float64.max_rel < 1e-10


# Where nothing of a network grows, and why.
NOTHING = {
    "mamba": (("hidden",), "nothing to widen"),  # its scan adds D·x: its channels are a stream
}


@pytest.mark.sweep
@pytest.mark.parametrize("where", ["hidden", "all"])
@pytest.mark.parametrize("name", EXTRAS)
def test_other_architectures_are_preserved_or_refused(name: str, where: str) -> None:
    model, inputs = build(name)
    if name in NOTHING and where in NOTHING[name][0]:
        with pytest.raises(FxgrowError, match=NOTHING[name][1]):
            fxgrow.widen(model, "2x", inputs, where=where)
        return
    grown = fxgrow.widen(model, "2x", inputs, where=where)
    assert grown.report.verification.verdict == "preserved"
    tolerance = 1e-6 if where == "all" else 1e-10  # norms that compute in float32
    for old, new in zip(outputs(model, inputs), outputs(grown.model, inputs), strict=True):
        assert max_rel(old, new) < tolerance
