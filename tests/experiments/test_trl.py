"""The losses of post-training against those of TRL, on log-probabilities of a tiny model of ours. Run where TRL is installed (peers)."""

from collections import defaultdict
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest

from experiments.posttrain import losses, policy
from experiments.posttrain.settings import RL_LOSSES, rl_settings, settings
from parallel.sharding import Sharding
from parallel.step import value_and_grad
from parallel.trees import tree_paths
from qwen3.model import build
from tests.experiments.test_prefer import config_of as preferences_of
from tests.experiments.test_rl import config_of, made_batch, tensors
from tests.tiny import DENSE, FUSED, assert_close, random_params

pytest.importorskip("trl")
torch = pytest.importorskip("torch")


def trl_grpo(s, logp, batch):
    """(loss, its gradient by logp_BS) of GRPOTrainer._compute_loss, called on the least that it reads: its code, without a trainer."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    leaf, mask = torch.tensor(logp, dtype=torch.float64, requires_grad=True), torch.tensor(batch["loss_weights"])
    me = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros_like(leaf), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if s.loss == "gspo" else "token",
        loss_type="grpo" if s.loss == "gspo" else s.loss,
        beta=s.kl_coef,
        epsilon_low=s.clip_low,
        epsilon_high=s.clip_high,
        max_completion_length=s.max_new_tokens,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {"prompt_ids": torch.zeros(len(logp), 1), "prompt_mask": torch.ones(len(logp), 1), "completion_mask": mask}
    inputs |= {
        "completion_ids": torch.zeros_like(mask),
        "advantages": torch.tensor(batch["advantages"].max(1) + batch["advantages"].min(1)),
    }
    inputs |= {"old_per_token_logps": torch.tensor(batch["sampled"]), "ref_per_token_logps": torch.tensor(batch["reference"])}
    inputs |= {"num_items_in_batch": mask.sum()}
    loss = GRPOTrainer._compute_loss(me, None, inputs)
    loss.backward()
    return loss.item(), leaf.grad.numpy()


@pytest.mark.parametrize("loss", RL_LOSSES)
def test_the_losses_of_rewards_and_their_gradients_are_trls(loss):
    config, params, batch = config_of(loss), random_params(DENSE), made_batch(DENSE, loss)
    batch = {name: value[:-1] for name, value in batch.items()}  # the last answer does not count, which TRL does not know
    s, given = rl_settings(config), tensors(batch)
    score, model = build(DENSE, kernels=FUSED).score, policy.Policy(config, DENSE, Sharding(), False, FUSED, "none", 1)
    ids = [given[name] for name in ("tokens", "targets", "positions", "segment_ids")]
    want, slope = trl_grpo(s, -score(params, *ids)[0].asnumpy(), batch)
    assert model.loss_fn(params, given)[0].asnumpy() == pytest.approx(want, rel=1e-5)
    c = ms.Tensor(slope.astype(np.float32))
    _, got = value_and_grad(lambda p: model.loss_fn(p, given)[0])(params)
    _, expected = value_and_grad(lambda p: -(score(p, *ids)[0] * c).sum())(params)
    for (_, g), (_, e) in zip(tree_paths(got), tree_paths(expected)):
        assert_close(e, g, 1e-5)


@pytest.mark.parametrize("deviation", [True, False])
def test_advantages_are_trls_on_rewards_of_a_group(deviation):
    """TRL's formula: the rewards minus the group's mean, over torch's std of the group + 1e-4."""
    rewards = np.random.default_rng(0).normal(size=16).astype(np.float32)
    groups = torch.tensor(rewards).view(-1, 4)
    want = groups - groups.mean(1, keepdim=True)
    want = want / (groups.std(1, keepdim=True) + 1e-4) if deviation else want
    np.testing.assert_allclose(losses.advantages(rewards, np.ones(16), 4, deviation)[0], want.flatten().numpy(), rtol=1e-5)


def trl_dpo(kind, beta, logp, mask, reference):
    """(loss, its gradient by the log-probabilities [2 pairs, T] of the answers) of DPOTrainer._compute_loss, as in trl_grpo."""
    from trl.trainer.dpo_trainer import DPOTrainer

    leaf, mask = torch.tensor(logp, requires_grad=True), torch.tensor(mask)
    out = SimpleNamespace(log_probs=leaf * mask, entropy=leaf * 0, mean_logits=leaf * 0, is_top1=mask > 0)
    me = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    whole = torch.cat([torch.zeros(len(logp), 1), mask], 1)  # with a first token, which has no log-probability
    chosen, rejected = torch.tensor(reference).sum(1).chunk(2)
    inputs = {"input_ids": whole.long(), "attention_mask": whole, "completion_mask": whole}
    loss = DPOTrainer._compute_loss(me, lambda **_: out, {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}, False)
    loss.backward()
    return loss.item(), leaf.grad.numpy()


@pytest.mark.parametrize("loss, kind, by_length", [("dpo", "sigmoid", False), ("dpo", "sigmoid_norm", True), ("ipo", "ipo", True)])
def test_the_losses_of_preferences_and_their_gradients_are_trls(loss, kind, by_length):
    rng, s = np.random.default_rng(0), settings(preferences_of(loss))
    mask = (np.arange(6) < rng.integers(1, 7, 8)[:, None]).astype(np.float32)  # of 4 chosen answers, and 4 rejected ones
    logp, reference = (-rng.uniform(0, 5, mask.shape).astype(np.float32) * mask for _ in range(2))
    want, slope = trl_dpo(kind, s.beta, logp, mask, reference)

    def mean_loss(logp):
        score = ((logp - ms.Tensor(reference)) * ms.Tensor(mask)).sum(1)
        score = score / ms.Tensor(mask).sum(1) if by_length else score
        return losses.OF_PAIRS[loss](s, score[:4] - score[4:]).mean()

    value, grad = ms.value_and_grad(mean_loss)(ms.Tensor(logp))
    assert value.asnumpy() == pytest.approx(want, rel=1e-5)
    assert_close(slope, grad, 1e-5)
