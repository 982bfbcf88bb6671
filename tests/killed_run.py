"""A training run that may be killed: ``python killed_run.py KIND FOLDER [SAMPLES]``.

KIND is loop, lightning or trainer. It goes on from what an earlier run left in the folder, and
writes ``final.pt`` there at its end. With SAMPLES, it kills itself when that many have been seen.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

EPOCHS, BATCH = 5, 8
GROWTHS: dict[int, object] = {
    1: "2x",
    2: {"deepen": {"net.blocks": "+1"}},
    4: {"width": "1.5x", "pairing": "replicate"},
}


def data() -> TensorDataset:
    """Return 24 images: three batches in an epoch."""
    torch.manual_seed(1)
    return TensorDataset(torch.randn(24, 1, 6, 6), torch.randint(0, 3, (24,)))


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features."""
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Body(nn.Module):
    """A small residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.fc(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


class Killed(nn.Module):
    """What the Trainer trains: returns the loss, and ends the process after some samples."""

    seen, last = 0, -1

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Body()

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return loss and logits."""
        logits = self.net(images)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def count(batch: Tensor) -> None:
    """End the process, without any last word, when enough samples have been seen."""
    Killed.seen += len(batch)
    if 0 <= Killed.last <= Killed.seen:
        os.kill(os.getpid(), signal.SIGKILL)


def loop(folder: Path) -> nn.Module:
    """Train in a loop of one's own, with an average of the weights."""
    import fxgrow.training as training

    held, saved = folder / "run.pt", None
    if held.exists():
        saved = torch.load(held, weights_only=True)
    model = Killed()
    average = torch.optim.swa_utils.AveragedModel(model)
    if saved:
        training.regrow_(model, saved["growth"], averages=[average])
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
    follow = {"optimizer": optimizer, "scheduler": scheduler, "averages": [average]}
    images, labels = data().tensors
    inputs = {"images": images[:2]}
    for step in range(saved["step"] if saved else 0, 15):
        growth = GROWTHS.get(step // 3) if step % 3 == 0 else None
        if isinstance(growth, str):
            training.grow_(model, growth, inputs, **follow)
        elif growth and "deepen" in growth:
            training.deepen_(model, growth["deepen"], inputs, **follow)
        elif growth:
            training.grow_(model, example_inputs=inputs, **follow, **growth)
        at = slice(step % 3 * BATCH, step % 3 * BATCH + BATCH)
        optimizer.zero_grad()
        count(images[at])
        model(images[at], labels[at])["loss"].backward()
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
        state = {
            "model": model.state_dict(), "average": average.state_dict(), "step": step + 1,
            "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
            "growth": training.state_dict(model),
        }  # fmt: skip
        torch.save(state, folder / "new.pt")
        (folder / "new.pt").replace(held)
    return nn.ModuleList([model, average])


def lightning(folder: Path) -> nn.Module:
    """Train with Lightning, with an average of the weights."""
    import lightning.pytorch as pl

    from fxgrow.training.lightning import GrowthCallback

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = Body()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: list[Tensor]) -> Tensor:
            count(batch[0])
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def on_train_end(self) -> None:
            weights = torch.cat([p.detach().flatten() for p in self.parameters()])
            for others in self.all_gather(weights).view(-1, len(weights)):
                if not torch.equal(others, weights):
                    raise RuntimeError("weights differ between processes")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    module = Net()
    average = pl.callbacks.WeightAveraging()
    saving = pl.callbacks.ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
    devices = int(os.environ.get("DEVICES", "1"))
    trainer = pl.Trainer(
        devices=devices, strategy="ddp" if devices > 1 else "auto",
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[average, GrowthCallback(GROWTHS), saving],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(data(), batch_size=BATCH)
    last = folder / "last.ckpt"
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None)
    return module


def trainer(folder: Path) -> nn.Module:
    """Train with the Trainer of transformers."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from fxgrow.training.trainer import GrowthCallback

    rows = [{"images": image, "labels": label} for image, label in data()]
    arguments = TrainingArguments(
        str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, use_cpu=True,
        save_strategy="epoch", report_to=[], disable_tqdm=True, learning_rate=0.01,
    )  # fmt: skip
    model = Killed()
    growth = GrowthCallback(
        GROWTHS, inputs={"images": rows[0]["images"][None].expand(2, -1, -1, -1)}
    )
    run = Trainer(model, arguments, train_dataset=rows, callbacks=[growth])
    model.register_forward_pre_hook(
        lambda module, args, given: count(given["images"]) if module.training else None,
        with_kwargs=True,
    )
    run.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, directory = sys.argv[1], Path(sys.argv[2])
    Killed.last = int(sys.argv[3]) if len(sys.argv) > 3 else -1
    trained = {"loop": loop, "lightning": lightning, "trainer": trainer}[kind](directory)
    torch.save(trained.state_dict(), directory / "final.pt")
