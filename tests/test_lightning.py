"""Networks that grow in Lightning: all callbacks go on, and every checkpoint resumes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxgrow.errors import FxgrowWarning, PlanError

pl = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import (  # noqa: E402
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from fxgrow.training import GrowthSchedule, Plateau  # noqa: E402
from fxgrow.training.lightning import GrowthCallback, regrow_from  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using"),
]
GROWTHS = {1: "2x", 3: {"width": "1.5x", "pairing": "replicate"}}


class Net(pl.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)
        )
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        regrow_from(self, checkpoint)


def data() -> DataLoader[Any]:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(32, 6), torch.randint(0, 3, (32,))), batch_size=8)


def trainer(folder: Path, callbacks: list[Callback], epochs: int = 5, **options: Any) -> Any:
    given = {"logger": False, "enable_checkpointing": False, **options}
    if any(isinstance(one, ModelCheckpoint) for one in callbacks):
        del given["enable_checkpointing"]
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, **given,
    )  # fmt: skip


def each_epoch(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1, **options)


AVERAGES: dict[str, Callable[[], list[Callback]]] = {
    "none": list,
    "swa": lambda: [StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=2)],
    "ema": lambda: [EMAWeightAveraging(decay=0.9)],
}


@pytest.mark.parametrize("growth_first", [True, False])
@pytest.mark.parametrize("average", AVERAGES)
def test_every_checkpoint_resumes_to_the_same_weights(average, growth_first, tmp_path):
    def fit(folder: Path, resume: Path | None = None) -> Net:
        growth, others = GrowthCallback(GROWTHS), AVERAGES[average]()
        callbacks = [growth, *others] if growth_first else [*others, growth]
        module = Net()
        run = trainer(folder, [*callbacks, each_epoch(folder)])
        # Under Python 3.10 the schedule of Lightning's SWA pickles as code.
        run.fit(module, data(), data(), ckpt_path=resume, weights_only=average != "swa")
        return module

    expected = fit(tmp_path / "whole").state_dict()
    assert expected["net.0.weight"].shape == (24, 6)
    for epoch in range(4):
        found = fit(tmp_path / "again", tmp_path / "whole" / f"epoch={epoch}.ckpt").state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), epoch


def test_a_module_that_was_compiled_in_place_grows(tmp_path):
    """Its copies keep what was compiled, which runs the original."""
    growths = {1: {"width": {"net.*": "2x"}}, 3: "1.5x"}

    def fit(compiled: bool) -> Net:
        module = Net()
        if compiled:
            module.compile(backend="eager")
        trainer(tmp_path, [GrowthCallback(growths)]).fit(module, data())
        return module

    plain, compiled = fit(False), fit(True)
    assert compiled.net[0].out_features == 24
    assert vars(compiled)["_compiled_call_impl"] is not None
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())


WAITING = GrowthSchedule.of(
    [{"epochs": None}, {"epochs": None, "width": "2x"}, {"epochs": 9, "width": "1.5x"}],
    plateau=Plateau(patience=1, threshold=0.0),
    where="hidden",
)
SCORES = (0.9, 0.9, 0.8, 0.9, 0.9, 0.9)  # a plateau after the second and the fourth epoch


class Scored(Net):
    """Logs a score, in validation or in training."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.widths: list[int] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        if self.where == "train":
            self.log("score", SCORES[self.current_epoch], on_step=False, on_epoch=True)
        self.widths.append(self.net[0].out_features)
        return super().training_step(batch)

    def validation_step(self, batch: list[Tensor]) -> None:
        if self.where == "val":
            self.log("score", SCORES[self.current_epoch])


@pytest.mark.parametrize("where", ["train", "val"])
def test_a_plateau_grows_and_resumes(where, tmp_path):
    def fit(folder: Path, resume: Path | None = None) -> Scored:
        module = Scored(where)
        growth = GrowthCallback(WAITING, monitor="score")
        run = trainer(folder, [each_epoch(folder), growth], 6)
        run.fit(module, data(), data(), ckpt_path=resume)
        return module

    module = fit(tmp_path / "whole")
    assert module.widths == [8] * 8 + [16] * 8 + [24] * 8
    expected = module.state_dict()
    for epoch in range(5):
        found = fit(tmp_path / "again", tmp_path / "whole" / f"epoch={epoch}.ckpt").state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), epoch


def test_epochs_without_a_validation_do_not_count(tmp_path):
    module = Scored("val")
    growth = GrowthCallback(WAITING, monitor="score")
    trainer(tmp_path, [growth], 6, check_val_every_n_epoch=2).fit(module, data(), data())
    assert module.widths == [8] * 16 + [16] * 8  # after the second value, that of epoch 4


@pytest.mark.parametrize("where", ["val", "train"])
def test_a_checkpoint_written_before_the_end_of_its_epoch_resumes(where, tmp_path):
    def fit(resume: Path | None = None) -> Scored:
        module, saving = Scored(where), each_epoch(tmp_path, save_on_train_epoch_end=False)
        growth = GrowthCallback(WAITING, monitor="score")
        run = trainer(tmp_path, [growth, saving], 6, num_sanity_val_steps=0)
        run.fit(module, data(), data(), ckpt_path=resume)
        return module

    whole = fit()
    assert whole.widths == [8] * 8 + [16] * 8 + [24] * 8
    resume = tmp_path / "epoch=1.ckpt"  # the plateau is over with the metric of this epoch
    if where == "val":
        again = fit(resume)
        torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    else:  # which is lost with the steps of that epoch
        with pytest.warns(FxgrowWarning, match="does not count epoch 2"):
            again = fit(resume)
        assert again.widths[:4] == [8] * 4


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_checkpoint_of_another_precision_resumes(precision, tmp_path):
    """Lightning brings a module to the training's precision after it has read a checkpoint."""

    def fit(resume: Path | None = None) -> Net:
        module = Net()
        run = trainer(tmp_path, [GrowthCallback({1: "2x"}), each_epoch(tmp_path)], 3,
                      precision=precision)  # fmt: skip
        run.fit(module, data(), ckpt_path=resume)
        return module

    whole = fit().state_dict()
    assert whole["net.0.weight"].shape == (16, 6)
    found = fit(tmp_path / "epoch=1.ckpt").state_dict()
    # Lightning itself rounds float64 to the float32 of the module that it loads into.
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6 if precision == "64-true" else 0)
    held = Net.load_from_checkpoint(tmp_path / "epoch=2.ckpt").state_dict()
    assert all(torch.equal(held[name], x.to(held[name].dtype)) for name, x in whole.items())


def test_a_metric_that_is_not_logged_is_named(tmp_path):
    run = trainer(tmp_path, [GrowthCallback(WAITING, monitor="val_los")])
    with pytest.raises(PlanError, match="val_los") as caught:
        run.fit(Net(), data(), data())
    assert "loss, val" in caught.value.message


def test_names_are_checked_before_the_first_step(tmp_path):
    module = Net()
    run = trainer(tmp_path, [GrowthCallback({4: {"width": {"net.7*": "2x"}}})])
    with pytest.raises(PlanError, match="matches no channel group"):
        run.fit(module, data())
    assert module.losses == []


def test_the_loss_does_not_jump_and_what_is_new_trains(tmp_path):
    seen: dict[str, Any] = {}

    class Around(Callback):
        def __init__(self, when: str) -> None:
            self.when = when

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                x, y = data().dataset.tensors
                twin = copy.deepcopy(pl_module).eval()
                seen[self.when] = nn.functional.cross_entropy(twin(x), y).item()
                seen["weight"] = pl_module.net[0].weight.detach().clone()

    growth = GrowthCallback({2: "2x"})
    module = Net()
    trainer(tmp_path, [Around("before"), growth, Around("after")]).fit(module, data())
    assert abs(seen["after"] / seen["before"] - 1) < 1e-6
    assert growth.grown[0].model is module
    assert bool((module.net[0].weight != seen["weight"]).any(1).all())
    assert sum(module.losses[-4:]) < sum(module.losses[:4])


def test_loggers_and_other_callbacks_go_on(tmp_path):
    logger = CSVLogger(tmp_path)
    others = [LearningRateMonitor(), EarlyStopping("val", patience=9), each_epoch(tmp_path)]
    run = trainer(tmp_path, [GrowthCallback(GROWTHS), *others], logger=logger, log_every_n_steps=1)
    run.fit(Net(), data(), data())
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    for name, least in (("loss", 20), ("val", 5), ("lr-AdamW", 5)):
        at = columns.index(name)
        assert sum(bool(line.split(",")[at]) for line in lines[1:]) >= least, name


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_checkpoint_makes_a_module_and_is_tested(weights_only, tmp_path):
    module, growth = Net(), GrowthCallback(GROWTHS)
    saving = each_epoch(tmp_path, save_weights_only=weights_only)
    run = trainer(tmp_path, [growth, saving])
    run.fit(module, data(), data())
    found = Net.load_from_checkpoint(tmp_path / "epoch=4.ckpt")
    assert all(torch.equal(found.state_dict()[n], t) for n, t in module.state_dict().items())
    assert Net.load_from_checkpoint(tmp_path / "epoch=1.ckpt").net[0].out_features == 16
    assert Net.load_from_checkpoint(tmp_path / "epoch=0.ckpt").net[0].out_features == 8
    told = run.validate(module, data(), verbose=False)
    fresh = trainer(tmp_path, [GrowthCallback(GROWTHS)])
    assert fresh.validate(Net(), data(), str(tmp_path / "epoch=4.ckpt"), verbose=False) == told
    assert fresh.test(Net(), data(), str(tmp_path / "epoch=2.ckpt"), verbose=False)


def test_steps_count_optimizer_steps(tmp_path):
    class Widths(Callback):
        seen: list[int] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: object) -> None:
            self.seen.append(pl_module.net[0].out_features)

    growth = GrowthCallback({2: "2x", 5: "1.5x"}, unit="steps")
    run = trainer(tmp_path, [growth, Widths()], epochs=3, accumulate_grad_batches=2)
    run.fit(Net(), data())
    assert Widths.seen == [8] * 4 + [16] * 6 + [24] * 2


class Momentum(pl.LightningModule):
    """Trains one network against an average of it, both its own; it has no ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.ema = torch.optim.swa_utils.AveragedModel(self.net)
        self.head = nn.Linear(3, 3)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        self.ema.update_parameters(self.net)
        aim = self.ema(batch[0]).detach()
        return nn.functional.mse_loss(self.head(self.net(batch[0])), aim + batch[1][:, None])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([*self.net.parameters(), *self.head.parameters()], lr=0.01)


def test_a_part_grows_with_the_averages_beside_it(tmp_path):
    def fit(resume: Path | None = None) -> Momentum:
        growth = GrowthCallback({1: "2x"}, part="net", averages=lambda module: [module.ema])
        module = Momentum()
        run = trainer(tmp_path, [growth, WeightAveraging(), each_epoch(tmp_path)], epochs=3)
        run.fit(module, data(), ckpt_path=resume)
        return module

    expected = fit()
    assert expected.ema.module[0].out_features == 16
    found = fit(tmp_path / "epoch=1.ckpt").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())


def test_averages_that_cannot_follow_are_refused_before_anything_grows(tmp_path):
    class Shadow(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.weights = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    module = Net()
    with pytest.raises(PlanError, match="Shadow"):
        trainer(tmp_path, [GrowthCallback({0: "2x"}), Shadow()]).fit(module, data())
    assert module.net[0].out_features == 8


def test_a_strategy_that_ends_in_another_process_is_refused(tmp_path):
    run = trainer(tmp_path, [GrowthCallback({1: "2x"})])
    run.strategy._launcher = type("Launcher", (), {"_start_method": "spawn"})()
    with pytest.raises(PlanError, match="never grew"):
        run.callbacks[0].setup(run, Net(), "fit")


@pytest.mark.sweep
def test_processes_stay_equal_and_resume(tmp_path):
    script = Path(__file__).with_name("killed_run.py")
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path),
        "DEVICES": "2",
    }  # fmt: skip
    results = []
    for name, last in (("whole", ""), ("killed", "58"), ("killed", "")):
        (tmp_path / name).mkdir(exist_ok=True)
        command = [sys.executable, "-W", "ignore", str(script), "lightning", str(tmp_path / name)]
        done = subprocess.run([*command, *last.split()], env=environment, check=False)
        assert (done.returncode == 0) is (not last)
        if not last:
            results.append(torch.load(tmp_path / name / "final.pt", weights_only=True))
    expected, found = results
    assert expected["net.blocks.1.conv1.weight"].shape[0] == 12
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
