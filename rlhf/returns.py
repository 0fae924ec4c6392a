"""From a reward model's verdict on a response to an advantage for every token."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.errors import ShapeError
from rlhf.masking import expect_bool, expect_same_shape, keep


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, *, kl_coef: float) -> Tensor:
    """The reward PPO maximises, per token (Ziegler et al. 2019, eq. 2; Stiennon et al. 2020).

        reward_t = -kl_coef * kl_t + (score if t is the last response token else 0)

    Summed over a response this is R(x, y) = r(x, y) - kl_coef * log(pi(y|x) / pi_ref(y|x)). The
    score lands on the last True position, which is the EOS when there is one, and never on a pad:
    one position later it would reach the EOS only through the value of a token nobody emitted.

    Args:
        scores: [B] reward model's verdict on the whole response.
        kl: [B, R] per-token KL estimate in nats, policy against reference.
        response_mask: [B, R] bool, True on tokens the policy emitted.
        kl_coef: price of one nat, in reward-model units.

    Returns:
        [B, R] in reward-model units, at least fp32, 0 on padding.

    Raises:
        ShapeError: shapes do not fit, the mask is not bool, or a row has no response token (its
            score would be lost).
    """
    expect_same_shape(kl=kl, response_mask=response_mask)
    expect_bool(response_mask=response_mask)
    if kl.ndim != 2 or scores.shape != kl.shape[:1]:
        raise ShapeError(f"scores {list(scores.shape)}, kl {list(kl.shape)}: must be [B], [B, R].")
    has_token = response_mask.any(dim=1)
    if not has_token.all():
        rows = (~has_token).nonzero().flatten().tolist()
        raise ShapeError(
            f"response_mask is all False in rows {rows}: their scores have no token to land on. "
            "Every response holds at least one token, its EOS if it is empty."
        )
    positions = torch.arange(kl.shape[1], device=kl.device).expand_as(kl)
    last = torch.where(response_mask, positions, -1).amax(dim=1, keepdim=True)  # [B, 1]
    score_rewards = torch.where(positions == last, scores.unsqueeze(1), 0.0)
    return score_rewards - kl_coef * keep(kl, response_mask)


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16).

        delta_t     = reward_t + gamma * value_{t+1} - value_t
        advantage_t = sum over l >= 0 of (gamma * lam)^l * delta_{t+l}
        return_t    = advantage_t + value_t

    A response ends: after its last token the value is 0 and the sum stops, wherever padding says
    the row ends. (A response cut off at the length limit is treated as ended too.)

    Args:
        rewards: [B, R] in reward-model units, KL penalty included.
        values: [B, R] critic's estimate before the token is emitted.
        response_mask: [B, R] bool, True on tokens the policy emitted.
        gamma: discount per token, in [0, 1].
        lam: bias-variance dial; 0 is one-step TD, 1 is Monte Carlo.

    Returns:
        (advantages, returns), each [B, R], at least fp32, both 0 on padding.

    Raises:
        ShapeError: the three tensors differ in shape or are not [B, R], the mask is not bool, or
            a True follows a False: responses are padded on the right, so "the next token" would
            be a position that does not count.
    """
    expect_same_shape(rewards=rewards, values=values, response_mask=response_mask)
    expect_bool(response_mask=response_mask)
    if rewards.ndim != 2:
        raise ShapeError(f"rewards {list(rewards.shape)}: must be [B, R].")
    holes = (response_mask[:, 1:] & ~response_mask[:, :-1]).any(dim=1)
    if holes.any():
        raise ShapeError(
            f"response_mask has True after False in rows {holes.nonzero().flatten().tolist()}: "
            "responses start at column 0 and are padded on the right."
        )
    rewards, values = keep(rewards, response_mask), keep(values, response_mask)
    # Values are 0 on padding now, so the last token's next value is 0 with or without padding.
    next_values = pad(values, (0, 1))[:, 1:]
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    following = torch.zeros_like(deltas[:, 0])  # [B] the advantage one token later
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + gamma * lam * following
        advantages[:, t] = following
    return advantages, advantages + values
