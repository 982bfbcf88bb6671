"""GradMax: new channels that keep the function and learn fastest."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fxgrow.grow.data import directions as algebra
from fxgrow.grow.data.directions import Directions
from fxgrow.grow.data.inits import DataDriven, shapes_of
from fxgrow.grow.data.pairs import LayerPair
from fxgrow.grow.data.statistics import Seen, correlation, patches


class GradMax(DataDriven):
    """New channels that give zeros and learn fastest (Evci et al. 2022).

    New rows are zeros, so that the function is kept. New columns are the leading singular vectors
    of the gradient of an auxiliary layer of zeros, from what the writer reads to what the reader
    puts out, and have the mean norm of the reader's old columns: of all orthogonal columns of
    that norm, they give the new rows the largest gradients.
    """

    pairing = "zero_z"
    nothing = "no new channel would get a gradient that is strong enough"

    def _problem(self, pair: LayerPair, model: nn.Module) -> str:
        if not pair.slope:
            return (
                f"what lies between {pair.writer} and {pair.reader} has slope 0 at 0 as torch "
                "differentiates it, so new rows of zeros would never learn (a ReLU does; "
                "nn.Threshold(-1e-30, 0) differs from it by 1e-30 and has slope 1)"
            )
        if not _mean_norm(model, pair):
            return f"{pair.reader} has no weights but zeros to take a scale from"
        return ""

    def _directions(
        self, network: nn.Module, pairs: Mapping[str, LayerPair]
    ) -> dict[str, Directions]:
        def correlated(_: str, seen: Seen) -> tuple[Tensor, ...]:
            return (correlation(seen.reader, patches(seen.writer, seen.x), seen.descent),)

        averages = self.averages(network, pairs, correlated)
        return {
            name: algebra.gradmax(
                averages[name][0], pair.slope, _mean_norm(network, pair), shapes_of(network, pair)
            )
            for name, pair in pairs.items()
        }


def _mean_norm(network: nn.Module, pair: LayerPair) -> float:
    """Return the mean norm of the columns of a pair's reader, 1 where it has none."""
    weight = network.get_parameter(f"{pair.reader}.weight").detach().double()
    if not weight.shape[1]:
        return 1.0
    return float(weight.transpose(0, 1).flatten(1).norm(dim=1).mean())
