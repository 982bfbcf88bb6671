"""Grow a network while it trains: in place, with its optimizer, schedule, rates and evidence.

>>> import torch, fxgrow.training
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
>>> grown = fxgrow.training.grow_(net, "2x", optimizer=optimizer)
>>> grown.model is net, net[0].out_features
(True, 16)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxgrow.lazy import imported_late

if TYPE_CHECKING:
    from fxgrow.training.certificate import Certificate as Certificate
    from fxgrow.training.certificate import certify as certify
    from fxgrow.training.clipping import clip_grad_norm_ as clip_grad_norm_
    from fxgrow.training.in_place import Grown as Grown
    from fxgrow.training.in_place import deepen_ as deepen_
    from fxgrow.training.in_place import grow_ as grow_
    from fxgrow.training.ledger import FlopLedger as FlopLedger
    from fxgrow.training.ledger import Flops as Flops
    from fxgrow.training.ledger import flops as flops
    from fxgrow.training.ledger import forecast as forecast
    from fxgrow.training.monitoring import Monitor as Monitor
    from fxgrow.training.monitoring import effective_rank as effective_rank
    from fxgrow.training.monitoring import monitor as monitor
    from fxgrow.training.parts import Part as Part
    from fxgrow.training.parts import parts_of as parts_of
    from fxgrow.training.plateau import Plateau as Plateau
    from fxgrow.training.probing import Ranking as Ranking
    from fxgrow.training.probing import Tried as Tried
    from fxgrow.training.probing import probe as probe
    from fxgrow.training.reconfigured import reconfigured as reconfigured
    from fxgrow.training.resume import regrow_ as regrow_
    from fxgrow.training.resume import state_dict as state_dict
    from fxgrow.training.schedule import GrowthSchedule as GrowthSchedule
    from fxgrow.training.schedule import GrowthStage as GrowthStage
    from fxgrow.training.seed import seed_network as seed_network
    from fxgrow.training.stages import GrowthClock as GrowthClock
    from fxgrow.training.stages import enter_stage_ as enter_stage_

_HOMES: dict[str, str] = {
    **dict.fromkeys(("Certificate", "certify"), "fxgrow.training.certificate"),
    "clip_grad_norm_": "fxgrow.training.clipping",
    **dict.fromkeys(("Part", "parts_of"), "fxgrow.training.parts"),
    **dict.fromkeys(("Grown", "deepen_", "grow_"), "fxgrow.training.in_place"),
    **dict.fromkeys(("regrow_", "state_dict"), "fxgrow.training.resume"),
    **dict.fromkeys(("GrowthSchedule", "GrowthStage"), "fxgrow.training.schedule"),
    "Plateau": "fxgrow.training.plateau",
    "reconfigured": "fxgrow.training.reconfigured",
    "seed_network": "fxgrow.training.seed",
    **dict.fromkeys(("Monitor", "effective_rank", "monitor"), "fxgrow.training.monitoring"),
    **dict.fromkeys(("Ranking", "Tried", "probe"), "fxgrow.training.probing"),
    **dict.fromkeys(("FlopLedger", "Flops", "flops", "forecast"), "fxgrow.training.ledger"),
    **dict.fromkeys(("GrowthClock", "enter_stage_"), "fxgrow.training.stages"),
}

__all__ = sorted(_HOMES)
__getattr__ = imported_late(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
