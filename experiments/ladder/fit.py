"""The curve of a ladder, L = E + A / N^alpha, and how far it can be trusted. N: the parameters in a model's layers.

The tokens of a rung are in proportion to N, so the curve says how the loss falls where size and tokens grow together. It can't tell the two
apart, as Hoffmann et al. 2022 do with runs of many lengths for each size.
"""

import numpy as np

ALPHAS = np.arange(0.02, 1.502, 0.005)
SCALE = 1e5  # N is counted in units of it, so that A is a loss
DRAWS, BAND = 400, (5, 95)  # of the bootstrap; percentiles


def fits(n, losses):
    """n [rungs], losses [draws, rungs] -> [draws, 4]: for each draw E, A, alpha and the sum of squared residuals of the best curve by least
    squares with E and A of 0 or more. Rows are NaN where there is none, as the loss does not fall with N."""
    n, losses = np.asarray(n, float), np.asarray(losses, float)
    out = np.full((len(losses), 4), np.nan)
    least = np.full(len(losses), np.inf)
    for alpha in ALPHAS:
        x = np.stack([np.ones(len(n)), (n / SCALE) ** -alpha], axis=1)
        found = losses @ np.linalg.pinv(x).T  # [draws, 2]: E, A
        rest = np.sum((losses - found @ x.T) ** 2, axis=1)
        better = (found >= 0).all(1) & (rest < least)
        least[better] = rest[better]
        out[better] = np.column_stack([found, np.full(len(losses), alpha), rest])[better]
    return out


def at(curves, n):
    """Returns the losses that curves [..., 4] give for N."""
    curves = np.asarray(curves, float)
    return curves[..., 0] + curves[..., 1] * (n / SCALE) ** -curves[..., 2]


def predict(n, loss, wanted, noise):
    """Returns {"E", "A", "alpha", "loss", "low", "high"}: the best curve through the rungs, and its loss at N = wanted.

    low, high: 90 % of the losses that a bootstrap gives: the curve is fitted again to the rungs' losses with normal noise added. noise: its
    standard deviation, in nats, such as that of a loss over seeds; where the residuals of the best curve are larger, theirs. The band holds
    if the curve has the right form. Raises ValueError for losses that do not fall with N.
    """
    loss = np.asarray(loss, float)
    curve = fits(n, loss[None])[0]
    if np.isnan(curve).any() or curve[1] == 0:
        raise ValueError(f"the losses {loss.round(3).tolist()} do not fall with the sizes {list(n)}; train the rungs longer")
    spread = max(noise, np.sqrt(curve[3] / (len(n) - 3))) if len(n) > 3 else noise
    drawn = at(fits(n, loss + spread * np.random.default_rng(0).standard_normal((DRAWS, len(n)))), wanted)
    low, high = np.nanpercentile(drawn, BAND)
    E, A, alpha, _ = map(float, curve)
    return {"E": E, "A": A, "alpha": alpha, "loss": float(at(curve, wanted)), "low": float(low), "high": float(high)}
