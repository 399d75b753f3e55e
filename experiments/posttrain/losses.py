"""The losses of preferences and of rewards, each a function of a few lines. To try another one, change it here, or add one to
OF_PAIRS or to `of_each_answer`, and its name to LOSSES or RL_LOSSES of experiments/posttrain/settings.py.

Preferences. The score of an answer y to a prompt x, float32 [B, P] for P pairs in each of B rows, is

    dpo, ipo, kto     log pi(y | x) - log pi_ref(y | x), the sums over the tokens of the answer; pi_ref: the reference model
    simpo             log pi(y | x) / |y|
    reward            the output of the model's score head after the last token

With prefer.length_normalised the scores of dpo, ipo and kto are divided by |y|, the number of tokens of the answer.

    difference = score of the chosen answer - score of the rejected answer

The settings s are those of config.prefer, a settings.Settings.

Rewards. For each prompt x, a group of answers y_1 ... y_G is sampled, and answer i has the reward r_i. For token t of answer i,

    A_i    the advantage, see advantages()
    log_ratio_it   log pi(y_it | x, y_i<t) - the log-probability with which it was sampled; its exponential is the ratio rho_it

    loss of a token = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_coef k3

The settings s are then those of config.rl, a settings.RLSettings. Dims: B answers, one in each row, S tokens.
"""

import mindspore as ms
import numpy as np
from mindspore import ops

softplus, sigmoid = ops.Softplus(), ops.Sigmoid()
exp, minimum, maximum, less, cast, expand = ops.Exp(), ops.Minimum(), ops.Maximum(), ops.Less(), ops.Cast(), ops.ExpandDims()
DEVIATION_EPS = 1e-4  # added to the deviation of a group's rewards, as in TRL


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


def advantages(rewards, good, group_size, deviation):
    """Returns (advantages, kept), float32 [answers], on the host.

    A_i = (r_i - mean of the group's r) / (their standard deviation + 1e-4). rewards: float32 [answers], those of a group side by side.
    good: 1, or 0 for an answer without a reward, which counts nowhere. deviation: False leaves out the division. kept: 1 for the good
    answers of groups that teach something: their rewards are not all equal. Sources: Shao et al. 2024 (DeepSeekMath), section 4.1.2;
    without the division Liu et al. 2025 (Dr. GRPO); the dropping of other groups Yu et al. 2025 (DAPO), section 3.2.
    """
    r, g = (np.asarray(x, np.float64).reshape(-1, group_size) for x in (rewards, good))
    count = g.sum(1, keepdims=True)
    apart = (r - (r * g).sum(1, keepdims=True) / np.maximum(count, 1)) * g
    if deviation:
        apart = apart / (np.sqrt((apart**2).sum(1, keepdims=True) / np.maximum(count - 1, 1)) + DEVIATION_EPS)
    highest, lowest = (f(np.where(g > 0, r, fill), axis=1, keepdims=True) for f, fill in ((np.max, -np.inf), (np.min, np.inf)))
    kept = g * (highest > lowest)
    return (apart * kept).ravel().astype(np.float32), kept.ravel().astype(np.float32)


def clipped(s, ratio, advantage):
    """Returns (-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), 1 where the bound holds it, else 0). Sources: Schulman et al. 2017
    (PPO), equation 7; with two bounds Yu et al. 2025 (DAPO), equation 8."""
    free = ratio * advantage
    held = minimum(maximum(ratio, 1 - s.clip_low), 1 + s.clip_high) * advantage
    return -minimum(free, held), cast(less(held, free), ms.float32)


def k3(logp, reference):
    """An estimate of KL(pi || pi_ref) from one sampled token, exp(d) - d - 1 with d = log pi_ref - log pi, which is never negative. Source:
    Schulman 2020, "Approximating KL divergence"; Shao et al. 2024, equation 4."""
    d = reference - logp
    return exp(d) - d - 1


def mean_log_ratio(total, length):
    """The logarithm of GSPO's ratio, one for each answer: the mean of log_ratio over its tokens. total_B: their sum, length_B. Returns
    [B, 1]. Source: Zheng et al. 2025 (GSPO), equation 7."""
    return expand(total / maximum(length, 1.0), 1)


def of_each_answer(s, total, length):
    """Returns [B], whose sum over all answers, divided by that of denominators(), is the loss. total_B: sums of the losses of tokens.

    grpo, gspo   the mean over the tokens of each answer, then over answers. Shao et al. 2024, equation 3; Zheng et al. 2025, equation 5
    dapo         the mean over all tokens. Yu et al. 2025, equation 8
    dr_grpo      the sum over tokens / max_new_tokens, then the mean over answers. Liu et al. 2025 (Dr. GRPO), section 3
    """
    if s.loss == "dapo":
        return total
    if s.loss == "dr_grpo":
        return total / s.max_new_tokens
    return total / maximum(length, 1.0)


def denominators(loss, length):
    """Returns what each answer of `length` tokens adds to the denominator of the loss, [B], on the host: see of_each_answer."""
    return length if loss == "dapo" else np.minimum(length, 1)
