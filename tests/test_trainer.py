"""Networks that grow in the Trainer of transformers: what is new trains, checkpoints resume."""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import fxgrow
import fxgrow.training
from fxgrow.errors import PlanError, SourceError, UsageError

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch") and pytest.importorskip("safetensors")

from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from fxgrow.training import GrowthSchedule, Plateau  # noqa: E402
from fxgrow.training.replicas import wrap_anew  # noqa: E402
from fxgrow.training.trainer import GrowthCallback, regrow_from  # noqa: E402

GROWTHS = {1: "2x", 3: {"width": "1.5x", "pairing": "replicate"}}


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def rows() -> list[dict[str, Any]]:
    torch.manual_seed(1)
    mask = torch.ones(8, dtype=torch.long)
    return [
        {"input_ids": torch.randint(3, 40, (8,)), "attention_mask": mask, "labels": index % 3}
        for index in range(16)
    ]


def trainer(folder: Path, growth: GrowthCallback, *others: TrainerCallback, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "num_train_epochs": 5, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": [],
        "disable_tqdm": True, "learning_rate": 0.01, "save_strategy": "no",
    }  # fmt: skip
    model = options.pop("model", None) or bert()
    given = TrainingArguments(str(folder), **{**arguments, **options})
    return Trainer(
        model, given, train_dataset=rows(), eval_dataset=rows()[:8], callbacks=[growth, *others]
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return a run that was not killed: where its checkpoints are, and its model."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder, GrowthCallback(GROWTHS), save_strategy="epoch")
    run.train()
    return folder, run.model


@pytest.mark.parametrize("made_anew", [False, True])
@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
def test_every_checkpoint_resumes_to_the_same_weights(epoch, made_anew, whole, tmp_path):
    folder, model = whole
    name = f"checkpoint-{2 * epoch}"
    if made_anew:  # True stands for the last one in the folder
        shutil.copytree(folder / name, tmp_path / name)
        run = trainer(
            tmp_path, GrowthCallback(GROWTHS), restore_callback_states_from_checkpoint=True
        )
        run.train(resume_from_checkpoint=True)
    else:
        run = trainer(tmp_path, GrowthCallback(GROWTHS, resume_from=folder / name))
        run.train(resume_from_checkpoint=str(folder / name))
    found, expected = run.model.state_dict(), model.state_dict()
    assert expected["bert.pooler.dense.weight"].shape == (48, 16)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class Around(TrainerCallback):
    """Notes the loss in eval mode as a step begins."""

    def __init__(self, step: int, seen: list[Any]) -> None:
        self.step, self.seen = step, seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            batch = {
                name: torch.stack([torch.as_tensor(row[name]) for row in rows()])
                for name in rows()[0]
            }
            model = kwargs["model"]
            loss = copy.deepcopy(model).eval()(**batch).loss.item()
            weight = model.bert.pooler.dense.weight.detach().clone()
            self.seen.append((loss, weight))


def test_the_loss_does_not_jump_and_what_is_new_trains(tmp_path):
    seen: list[Any] = []
    growth = GrowthCallback({3: "2x"}, unit="steps")
    run = trainer(tmp_path, growth, Around(3, seen), logging_strategy="epoch")
    run.callback_handler.callbacks.insert(0, Around(3, seen))
    run.train()
    (before, narrow), (after, wide) = seen
    assert abs(after / before - 1) < 1e-6
    assert (narrow.shape, wide.shape) == ((16, 16), (32, 16))
    assert growth.grown[0].model is run.model
    trained = run.model.bert.pooler.dense.weight
    assert bool((trained != wide).any(1).all())
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1


def test_a_network_in_mixed_precision_grows_deeper(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, num_labels=3, n_positions=8, pad_token_id=0
    )
    model = transformers.GPT2ForSequenceClassification(config)
    growth = GrowthCallback({1: [{"deepen": {"transformer.h": "+1"}}, {"width": "2x"}]})
    run = trainer(tmp_path, growth, model=model, bf16=True, num_train_epochs=2)
    run.train()
    _, new = model.transformer.h
    assert new.mlp.c_fc.weight.shape == (16, 128)
    assert new.mlp.c_fc.weight.dtype == torch.float32
    assert bool(new.mlp.c_proj.weight.any())


def llama(config: Any = None) -> Any:
    torch.manual_seed(0)
    config = config or transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3,
        intermediate_size=16, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config)


def test_a_deeper_network_resumes_from_its_saved_configuration(tmp_path):
    growths = {1: {"deepen": {"model.layers": "+1"}}, 2: "2x"}
    run = trainer(tmp_path, GrowthCallback(growths), model=llama(), save_strategy="epoch")
    run.train()
    for epoch in (2, 3):
        folder = tmp_path / f"checkpoint-{2 * epoch}"
        config = transformers.AutoConfig.from_pretrained(folder)
        assert config.num_hidden_layers == 2
        model = regrow_from(llama(config), folder)
        assert safetensors.torch.load_model(model, folder / "model.safetensors") == (set(), [])
    resumed = trainer(tmp_path, GrowthCallback(growths), model=llama(config))
    resumed.train(resume_from_checkpoint=str(folder))
    assert all(map(torch.equal, run.model.parameters(), resumed.model.parameters()))
    # The weights of a network that is deeper and nothing else are loaded into one of that depth.
    early = trainer(tmp_path, GrowthCallback(growths), model=llama(config))
    with pytest.raises(PlanError, match="configuration that the training began with"):
        early.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_weights_under_other_names_are_told_of_as_they_are_written(tmp_path, monkeypatch):
    def renamed(self: Any, folder: Any, **options: Any) -> None:
        state = {f"old.{name}": tensor.clone() for name, tensor in self.state_dict().items()}
        Path(folder).mkdir(exist_ok=True)
        safetensors.torch.save_file(state, Path(folder) / "model.safetensors")

    def run(folder: Path, names: Any, resume: bool = False) -> None:
        monkeypatch.setattr(transformers.BertForSequenceClassification, "save_pretrained", names)
        growth = GrowthCallback({1: "2x"})
        trainer(folder, growth, num_train_epochs=2, save_strategy="epoch").train(
            resume_from_checkpoint=resume
        )

    with pytest.warns(fxgrow.FxgrowWarning, match=r"checkpoint-2 .*old.*save_original_format"):
        run(tmp_path, renamed)
    with pytest.raises(PlanError, match=r"names that .* has not .*renamed.*save_original_format"):
        run(tmp_path, renamed, resume=True)


def vit() -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def test_weights_under_older_names_are_loaded_as_the_networks_own(tmp_path, recwarn):
    given = [{"pixel_values": torch.randn(3, 16, 16), "labels": index % 3} for index in range(16)]

    lists = torch.nn.ModuleList
    blocks = next(name for name, module in vit().named_modules() if isinstance(module, lists))

    def run() -> Any:
        growths = {1: {"deepen": {blocks: "+1"}}, 2: "2x"}
        made = trainer(tmp_path, GrowthCallback(growths), model=vit(), save_strategy="epoch")
        made.train_dataset = given
        return made

    whole = run()
    whole.train()
    for epoch in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{2 * epoch}"
        again = run()
        again.train(resume_from_checkpoint=str(folder))
        assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    model = regrow_from(vit(), folder)
    if weights.keys() == model.state_dict().keys():
        pytest.skip("this transformers writes the network's own names")
    assert safetensors.torch.load_model(model, folder / "model.safetensors") == (set(), [])
    copied = copy.deepcopy(model).state_dict()
    assert all(torch.equal(copied[name], value) for name, value in model.state_dict().items())
    assert not [one for one in recwarn if "names that" in str(one.message)]


def test_the_best_model_is_that_since_the_last_growth(tmp_path):
    scores = iter([0.9, 0.8, 0.7, 0.6])
    run = trainer(
        tmp_path, GrowthCallback({2: "2x"}), num_train_epochs=4, eval_strategy="epoch",
        save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="score",
        greater_is_better=True,
    )  # fmt: skip
    run.compute_metrics = lambda _: {"score": next(scores)}
    run.train()
    assert run.state.best_metric == 0.7
    assert run.model.bert.pooler.dense.weight.shape == (32, 16)


def test_averages_grow_too(tmp_path):
    model = bert()
    ema = torch.optim.swa_utils.AveragedModel(model)
    growth = GrowthCallback({1: "2x"}, averages=lambda _: [ema])
    trainer(tmp_path, growth, model=model, num_train_epochs=2).train()
    assert ema.module.bert.pooler.dense.weight.shape == (32, 16)
    ema.update_parameters(model)


class Beside(torch.nn.Module):
    """A network that holds an average of a part of it, in its own state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bert()
        self.ema = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        return self.net(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


@pytest.mark.parametrize("is_inside", [False, True])
def test_averages_grow_again_in_a_resumed_run(is_inside, tmp_path):
    def fit(resume: bool | str) -> tuple[Any, Any]:
        model = Beside() if is_inside else bert()
        ema = model.ema if is_inside else torch.optim.swa_utils.AveragedModel(model)
        part = "net" if is_inside else ""
        named = (lambda one: [one.ema]) if is_inside else (lambda _: [ema])
        inputs = {"input_ids": torch.randint(3, 40, (2, 8))}
        growth = GrowthCallback({1: "2x", 2: "2x"}, part=part, averages=named, inputs=inputs)
        trainer(
            tmp_path, growth, model=model, num_train_epochs=3, save_strategy="epoch"
        ).train(resume_from_checkpoint=resume)  # fmt: skip
        return model, ema

    expected, average = fit(False)
    found, again = fit(str(tmp_path / "checkpoint-4"))
    shapes = [tensor.shape for tensor in average.state_dict().values()]
    assert shapes == [tensor.shape for tensor in again.state_dict().values()]
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))


def test_weights_of_no_checkpoint_are_refused_with_the_way_out(whole, tmp_path):
    folder, _ = whole
    run = trainer(tmp_path, GrowthCallback(GROWTHS))
    with pytest.raises(PlanError, match="no checkpoint") as caught:
        run.train(resume_from_checkpoint=str(folder / "checkpoint-10"))
    assert "resume_from=" in caught.value.way_out
    assert run.model.bert.pooler.dense.weight.shape == (16, 16)


def test_a_checkpoint_of_an_earlier_stage_does_not_undo_growth(whole):
    folder, _ = whole
    run = trainer(folder, GrowthCallback({0: "4x"}))
    run.train()
    with pytest.raises(PlanError, match="has grown already"):
        run.train(resume_from_checkpoint=str(folder / "checkpoint-6"))


def on_two_processes(script: str, *given: str) -> list[tuple[str, str]]:
    """Return what two processes that meet by gloo write."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = str(Path(__file__).parent)
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), tests, *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    return [run.communicate(timeout=300) for run in runs]


def test_several_processes_grow_alike_and_resume(tmp_path):
    script = """
        import pathlib, sys
        sys.path.insert(0, sys.argv[1])
        import torch
        import torch.distributed as dist
        from test_trainer import GrowthCallback, TrainerCallback, bert, trainer

        class Equal(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                own = torch.cat([p.detach().flatten() for p in model.parameters()])
                every = [torch.empty_like(own) for _ in range(2)]
                dist.all_gather(every, own)
                assert torch.equal(*every), state.global_step

        growths = {0: "2x", 1: "1.5x", 3: {"width": "2x", "pairing": "replicate"}}
        folder = pathlib.Path(sys.argv[2])
        given = dict(ddp_backend="gloo", save_strategy="epoch", num_train_epochs=4)
        given["per_device_train_batch_size"] = 4
        whole = trainer(folder, GrowthCallback(growths), Equal(), **given)
        whole.train()
        assert whole.model_wrapped.module is whole.model
        for epoch in (2, 3):
            again = trainer(folder, GrowthCallback(growths), Equal(), **given)
            again.train(resume_from_checkpoint=str(folder / f"checkpoint-{2 * epoch}"))
            assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
        print("equal", whole.model.bert.encoder.layer[0].intermediate.dense.out_features)
    """
    for out, err in on_two_processes(script, str(tmp_path)):
        assert "equal 96" in out, err[-2000:]


def test_a_network_in_parts_is_refused_as_the_trainer_is_made(monkeypatch, tmp_path):
    growth, args = GrowthCallback({1: "2x"}), TrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    growth.on_init_end(args, None, None, model=bert())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(PlanError, match=r"2 processes \(fsdp\).*between two calls"):
        growth.on_init_end(args, None, None, model=bert())
    with pytest.raises(PlanError, match="in no DistributedDataParallel"):
        wrap_anew(bert(), 2)


WAITING = GrowthSchedule.of(
    [{"epochs": None}, {"epochs": None, "width": "2x"}, {"epochs": 9, "width": "1.5x"}],
    plateau=Plateau(patience=1, threshold=0.0),
    where="hidden",
)
SCORES = (0.9, 0.9, 0.8, 0.9, 0.9)  # a plateau after the second and the fourth evaluation


def waiting(folder: Path, growth: GrowthCallback, scores: Any = SCORES, **options: Any) -> Any:
    left = iter(scores)
    run = trainer(folder, growth, eval_strategy="epoch", save_strategy="epoch", **options)
    run.compute_metrics = lambda _: {"score": next(left)}
    return run


def test_a_config_that_tells_the_old_sizes_is_told(tmp_path):
    model = bert()
    grown = fxgrow.training.grow_(model, "2x")
    assert model.config.intermediate_size == 16
    assert "config" in grown.advice
    model.save_pretrained(tmp_path / "saved")
    config = transformers.BertConfig.from_pretrained(tmp_path / "saved")
    again = transformers.BertForSequenceClassification(config)
    fxgrow.training.regrow_(again, fxgrow.training.state_dict(model))
    again.load_state_dict(model.state_dict())
    assert "config" not in fxgrow.training.grow_(torch.nn.Sequential(*mlp()), "2x").advice


def mlp() -> list[torch.nn.Module]:
    return [torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)]


class Widths(TrainerCallback):
    """Notes how wide the pooler is in each step."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append(len(kwargs["model"].bert.pooler.dense.weight))


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_plateau_of_evaluations_grows_and_resumes(made_anew, tmp_path):
    first, widths = tmp_path / "whole", Widths()
    run = waiting(first, GrowthCallback(WAITING, monitor="eval_score"))
    run.add_callback(widths)
    run.train()
    assert widths.found == [16] * 4 + [32] * 4 + [48] * 2
    for epoch in (1, 2, 3):
        name = f"checkpoint-{2 * epoch}"
        folder = tmp_path / f"{made_anew}{epoch}"
        shutil.copytree(first / name, folder / name)
        again = waiting(
            folder, GrowthCallback(WAITING, monitor="eval_score"), SCORES[epoch:],
            restore_callback_states_from_checkpoint=made_anew,
        )  # fmt: skip
        again.train(resume_from_checkpoint=True)
        found, expected = again.model.state_dict(), run.model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), epoch


def test_an_evaluation_counts_in_the_checkpoint_of_its_step(tmp_path):
    """The Trainer would save first, evaluate then, and leave that out as it resumes."""

    def run(folder: Path, scores: Any) -> Any:
        growth = GrowthCallback(WAITING, monitor="eval_score")
        left = iter(scores)
        made = trainer(folder, growth, eval_strategy="epoch", save_strategy="steps", save_steps=2)
        made.compute_metrics = lambda _: {"score": next(left)}
        return made

    whole, again = run(tmp_path / "whole", SCORES), run(tmp_path / "again", SCORES[2:])
    whole.train()
    told = [one for one in whole.state.log_history if "eval_score" in one]
    assert [one["step"] for one in told] == [2, 4, 6, 8, 10]
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    again.train(resume_from_checkpoint=True)
    found, expected = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_metric_that_cannot_be_waited_on_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no metric is named"):
        GrowthCallback(WAITING)
    with pytest.raises(UsageError, match="no plateau"):
        GrowthCallback({1: "2x"}, monitor="eval_loss")
    with pytest.raises(PlanError, match="evaluations, and there are none"):
        trainer(tmp_path, GrowthCallback(WAITING, monitor="eval_loss")).train()
    with pytest.raises(PlanError, match="eval_loss") as caught:
        waiting(tmp_path, GrowthCallback(WAITING, monitor="eval_los")).train()
    assert "not there" in caught.value.message


def test_names_are_checked_before_the_first_step(tmp_path):
    for wrong in ({4: {"width": {"bert.poolr*": "2x"}}}, {4: {"deepen": {"bert.layers": "+1"}}}):
        run = trainer(tmp_path, GrowthCallback(wrong))
        with pytest.raises(PlanError, match=r"poolr|layers"):
            run.train()
        assert run.state.global_step == 0


def test_what_json_does_not_hold_is_not_made_anew_from_it(tmp_path):
    growth = GrowthCallback({1: "2x"}, inputs=torch.ones(1, 4))
    with pytest.raises(UsageError, match="restore_callback_states"):
        trainer(tmp_path, growth, restore_callback_states_from_checkpoint=True)


def test_a_module_that_is_copied_or_pickled_forgets_the_callback(tmp_path):
    run = trainer(tmp_path, GrowthCallback({0: "2x"}))
    twin = copy.deepcopy(copy.deepcopy(run.model))
    torch.save(run.model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    for model in (twin, again):
        model.load_state_dict(run.model.state_dict())
        wide = {n: torch.cat([t, t]) if t.ndim else t for n, t in model.state_dict().items()}
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict(wide)


def test_a_checkpoint_makes_a_model_outside_the_trainer(whole):
    folder, model = whole
    found = regrow_from(bert(), folder / "checkpoint-10")
    safetensors.torch.load_model(found, str(folder / "checkpoint-10" / "model.safetensors"))
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    with pytest.raises(SourceError) as refused:
        fxgrow.load(folder / "checkpoint-10")
    assert "regrow_from(model," in refused.value.way_out


@pytest.mark.parametrize(
    "callbacks",
    [
        None, [], {"C": 3}, {"C": {"attributes": {"progress": {"done": 1, "part": ""}}}},
        {"C": {"attributes": {"progress": {"done": 1, "part": 3, "growth": {}}}}},
        {"C": {"attributes": {"progress": {"done": 1, "part": "", "growth": {"stages": 3}}}}},
    ],
)  # fmt: skip
def test_what_is_no_record_of_growth_is_refused(callbacks, tmp_path):
    with pytest.raises(SourceError):
        regrow_from(torch.nn.Linear(2, 2), tmp_path)
    state = json.dumps({"stateful_callbacks": callbacks})
    (tmp_path / "trainer_state.json").write_text(state)
    with pytest.raises(SourceError):
        regrow_from(torch.nn.Linear(2, 2), tmp_path)
    (tmp_path / "trainer_state.json").write_text("[" * 100_000)
    with pytest.raises(SourceError):
        regrow_from(torch.nn.Linear(2, 2), tmp_path)
