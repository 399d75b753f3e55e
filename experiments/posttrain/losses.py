"""The losses of preferences, each a function of a few lines. To try another one, change it here, or add one to OF_PAIRS, and its name to
LOSSES of experiments/posttrain/settings.py.

The score of an answer y to a prompt x, float32 [B, P] for P pairs in each of B rows, is

    dpo, ipo, kto     log pi(y | x) - log pi_ref(y | x), the sums over the tokens of the answer; pi_ref: the reference model
    simpo             log pi(y | x) / |y|
    reward            the output of the model's score head after the last token

With prefer.length_normalised the scores of dpo, ipo and kto are divided by |y|, the number of tokens of the answer.

    difference = score of the chosen answer - score of the rejected answer

The settings s are those of config.prefer, a settings.Settings.
"""

from mindspore import ops

softplus, sigmoid = ops.Softplus(), ops.Sigmoid()


def minus_log_sigmoid(x):
    return softplus(-x)


def dpo(s, difference):
    """Direct preference optimisation, -log sigmoid(beta d). With label smoothing e, as if a share e of the pairs were the wrong way round:
    -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d). Source: Rafailov et al. 2023, equation 7; Mitchell 2023 (conservative DPO)."""
    right = minus_log_sigmoid(s.beta * difference)
    return (1 - s.label_smoothing) * right + s.label_smoothing * minus_log_sigmoid(-s.beta * difference)


def ipo(s, difference):
    """Identity preference optimisation, (d - 1 / (2 beta))^2. Source: Azar et al. 2023, equation 17, where beta is tau. TRL divides the
    scores by the lengths, which is prefer.length_normalised here."""
    gap = difference - 1 / (2 * s.beta)
    return gap * gap


def simpo(s, difference):
    """-log sigmoid(beta d - margin), without a reference model. Source: Meng et al. 2024, equation 6, where the margin is gamma."""
    return minus_log_sigmoid(s.beta * difference - s.margin)


def reward(s, difference):
    """Bradley-Terry, -log sigmoid(d - margin). Source: Bradley and Terry 1952; Touvron et al. 2023 (Llama 2), equations 1 and 2."""
    return minus_log_sigmoid(difference - s.margin)


def kto(s, score, desirable, reference_point):
    """Kahneman-Tversky optimisation, of answers that are each desirable or not, without pairs:

        desirable     weight * (1 - sigmoid(beta (score - z)))
        undesirable   weight * (1 - sigmoid(beta (z - score)))

    desirable: 1 or 0, of the shape of score. reference_point: z, one number without a gradient, the divergence from the reference model:
    the mean score of answers to other prompts, at least 0. Source: Ethayarajh et al. 2024, equation 8.
    """
    gain = s.beta * (score - reference_point)
    wanted = s.desirable_weight * (1 - sigmoid(gain))
    return desirable * wanted + (1 - desirable) * s.undesirable_weight * (1 - sigmoid(-gain))


OF_PAIRS = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "reward": reward}
