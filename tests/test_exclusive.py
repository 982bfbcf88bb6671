"""Calls from several threads, and under modes of the caller's."""

from __future__ import annotations

import threading

import pytest
import torch
from networks import small_resnet
from torch import Tensor, nn

import fxgrow


def data() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def weights(grown: fxgrow.Grown) -> list[Tensor]:
    return list(grown.model.state_dict().values())


def test_threads_that_widen_and_train_do_not_disturb_each_other():
    torch.manual_seed(0)
    models = [small_resnet().eval() for _ in range(4)]
    alone = [fxgrow.widen(model, "2x", data()) for model in models]
    together: dict[int, fxgrow.Grown] = {}
    failures: list[Exception] = []

    def widen(index: int) -> None:
        try:
            together[index] = fxgrow.widen(models[index], "2x", data())
        except Exception as error:  # shown by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=widen, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    trained = small_resnet()
    while any(thread.is_alive() for thread in threads):
        assert trained(data()).dtype == torch.randn(1).dtype == torch.float32
    assert failures == []
    for index, grown in enumerate(alone):
        assert all(map(torch.equal, weights(grown), weights(together[index])))
    assert nn.Module.__call__.__qualname__.startswith("Module.")


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")],
    ids=["inference", "no_grad", "default device meta"],
)
def test_modes_of_the_caller_change_nothing(mode):
    torch.manual_seed(0)
    model, inputs = small_resnet().eval(), data()
    plain = fxgrow.widen(model, "2x", inputs)
    with mode():
        grown = fxgrow.widen(model, "2x", inputs)
        inspected = fxgrow.inspect(model)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert all(map(torch.equal, weights(plain), weights(grown)))
    assert not any(parameter.is_inference() for parameter in grown.model.parameters())
    assert len(inspected.to_dict()["groups"]) > 1


def test_tensors_of_inference_mode_are_grown():
    with torch.inference_mode():
        model = small_resnet().eval()
    grown = fxgrow.widen(model, "2x", data())
    grown.model(data()).sum().backward()
    assert grown.report.verification.verdict == "preserved"


def test_a_model_without_values_says_so():
    with torch.device("meta"):
        model = small_resnet().eval()
    with pytest.raises(fxgrow.PlanError, match=r"no values \(device meta\).*verify=False"):
        fxgrow.widen(model, "2x", data())
    with pytest.raises(fxgrow.PlanError, match="no values"):
        fxgrow.widen(model, "2x", data(), rescaling="vt_constraint_old_shape", verify=False)
    grown = fxgrow.widen(model, "2x", data(), verify=False)
    assert all(tensor.is_meta for tensor in grown.model.state_dict().values())


def test_an_optimizer_with_a_list_of_its_own_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.LBFGS(model.parameters())
    before = list(optimizer.param_groups[0]["params"])
    grown = fxgrow.widen(model, "2x")
    with pytest.raises(fxgrow.PlanError, match=r"LBFGS keeps the parameters in _params.*new one"):
        fxgrow.grow_optimizer_(optimizer, model, grown)
    assert all(map(torch.equal, before, optimizer.param_groups[0]["params"]))
    optimizer.step(lambda: model(torch.ones(1, 4)).sum())


def test_weights_without_arithmetic_are_refused_by_name():
    model = small_resnet().eval()
    name, weight = next(iter(model.named_parameters()))
    owner, _, local = name.rpartition(".")
    eighth = nn.Parameter(weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    setattr(model.get_submodule(owner), local, eighth)
    with pytest.raises(fxgrow.PlanError, match=f"{name} is torch.float8_e4m3fn, which has no"):
        fxgrow.widen(model, "2x", data())


def test_more_groups_of_an_optimizer_than_parameters_are_given_up_at_once():
    from fxgrow.files.optimizer.order import names_by_group

    groups = [{"params": [index]} for index in range(40_000)]
    with pytest.raises(fxgrow.PlanError, match="are not those of the model's parameters"):
        names_by_group({"state": {}, "param_groups": groups}, {"weight": (2, 2)})
