"""What PPO adds to a round: a critic, which is trained beside the policy, and what each token earned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_parallel.checkpoint.base import load_adapters, load_base, load_other, load_trunk, path_of_base
from llm_parallel.checkpoint.content import ADAPTED
from llm_parallel.checkpoint.folders import find_checkpoint
from llm_parallel.checkpoint.load import content_of, load_weights, refuse_damaged
from llm_parallel.checkpoint.run_file import read_config
from llm_parallel.config.tree import ModelConfig, RunConfig
from llm_parallel.config.tree_online import OF_POLICY, PPOConfig
from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.errors import UserError
from llm_parallel.model.gpt import build_network
from llm_parallel.model.hf import is_hf_folder, load_hf_weights
from llm_parallel.model.numerics import Numerics
from llm_parallel.objectives.advantage import gae, token_rewards, whitened
from llm_parallel.objectives.policy import ClippedPolicy
from llm_parallel.objectives.value import ClippedValue
from llm_parallel.parallel.engine import POLICY, Engine, Models, Network, build_engine
from llm_parallel.parallel.groups import Groups
from llm_parallel.parallel.layout import Layout
from llm_parallel.train.beside import CRITIC, critic_adapter, critic_in, critic_model
from llm_parallel.train.open import policy_engine
from llm_parallel.train.run import AlsoTrained

Numbers = NDArray[np.float32]
ROUNDS_TO_LEARN = 5
"""Rounds after which a critic is expected to say more than nothing."""
WORSE = -0.2
"""Share of what was earned that a critic explains, below which it is said to be wrong. Where nearly all answers are
right it is about 0, as nobody can tell the few others (-0.04 to 0 on the four-digit task)."""


def network_beside(
    config: RunConfig, model: ModelConfig, groups: Groups, adapter: AdapterConfig | None = None
) -> Network:
    """Another model in the run's layout and precision, with all of its weights in full or with adapters."""
    layout = Layout.from_config(config.model_copy(update={"model": model}), groups.mesh.world_size)
    numerics = replace(Numerics.from_config(config), base="full" if adapter is None else adapter.base)
    return build_network(model, numerics, groups, layout.stages, config.seed, adapter)


def load_beside(path: str, network: Network, verify: bool) -> list[str]:
    """Loads the weights of a network with a value head from a folder: a head that it does not hold stays as it is, and
    of a run of PPO it is the critic. Returns what is to be said of it. Collective. Raises UserError."""
    if is_hf_folder(path):
        return load_hf_weights(path, network.models)
    folder = find_checkpoint(path)
    if verify:
        refuse_damaged(folder, network.groups)
    if network.base is not None:
        said = load_base(path_of_base(folder, content_of(folder)), network)
        load_adapters(folder, network)
        return said
    if read_config(folder).adapter is not None and read_config(folder).trains != "ppo":
        raise UserError(
            f"{path} holds adapters, and a critic that begins with it trains all of its weights; merge them with "
            "`llm-parallel convert --merge`"
        )
    if critic_in(folder) is not None:
        if CRITIC in content_of(folder).get(ADAPTED, ()):
            raise UserError(
                f"{path} is a run of ppo whose critic is adapters on its policy's weights; give another model, such as "
                "a run of method.kind = reward"
            )
        load_other(folder, CRITIC, network)
    elif read_config(folder).model.value_head:
        load_weights(folder, network)
    else:
        load_trunk(folder, network)
    return []


def policy_and_critic(config: RunConfig, groups: Groups) -> Models:
    """Both models with initial weights, and their optimizers."""
    adapter = critic_adapter(config)
    network = network_beside(config, critic_model(config), groups, adapter)
    policy = policy_engine(config, groups)
    if adapter is not None:
        share_frozen(network, policy.network)
    return {POLICY: policy, CRITIC: build_engine(network, config.optim, config.parallel)}


def share_frozen(network: Network, owner: Network) -> None:
    """Lets the frozen weights of a network be those of another with the same layers: they are held once, and loaded
    with the other's."""
    for chunk, other in zip(network.models, owner.models, strict=True):
        theirs = dict(other.named_parameters())
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                parameter.data = theirs[name].data
                if hasattr(parameter, "stored"):
                    parameter.stored = theirs[name].stored


def new_critic(config: RunConfig, models: Models) -> list[str]:
    """Gives the critic the weights that it begins with. Collective. Raises UserError."""
    critic, load = models[CRITIC], config.method.critic.load
    assert isinstance(critic, Engine) and config.checkpoint.load is not None
    if critic.network.base is not None:  # on the policy's weights, with factors that add nothing and a new head
        return []
    path = config.checkpoint.load if load == OF_POLICY else load
    said = load_beside(path, critic.network, config.checkpoint.verify)
    critic.optimizer.reload_model_params()
    return said if load != OF_POLICY else []  # what is to be said of the policy's folder was said


def policy_objective(ppo: PPOConfig) -> ClippedPolicy:
    """What a step of the policy minimises."""
    return ClippedPolicy(
        ppo.clip_low,
        ppo.clip_high,
        ppo.dual_clip,
        kl_weight=ppo.kl_weight if ppo.kl_in == "loss" else 0.0,
        estimator=ppo.estimator,
        entropy_weight=ppo.entropy_weight,
        importance_cap=ppo.importance_cap,
    )


def also_trained(config: RunConfig) -> Mapping[str, AlsoTrained]:
    """The critic, and what its steps minimise."""
    rate = 1.0 if config.method.critic.lr is None else config.method.critic.lr / config.optim.lr
    return {CRITIC: AlsoTrained(ClippedValue(config.method.ppo.value_clip), rate)}


def earned(
    config: RunConfig,
    scores: Sequence[float],
    lengths: Sequence[int],
    old: Numbers,
    values: Numbers,
    reference: Numbers | None,
) -> tuple[dict[str, Numbers], dict[str, float]]:
    """Advantages and returns of all tokens of all answers, one answer behind the other as the given numbers are, and
    what is recorded of them. All processes compute the same from the same numbers, whatever the layout. ``reference``:
    log-probabilities under the reference, if there is one."""
    ppo = config.method.ppo
    weight = ppo.kl_weight if ppo.kl_in == "reward" else 0.0
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]

    def table(numbers: Numbers) -> Tensor:
        """[answers, tokens of the longest]."""
        found = torch.zeros(mask.shape, dtype=torch.float64)
        found[mask] = torch.from_numpy(numbers).double()
        return found

    logps, others = table(old), None if reference is None else table(reference)
    rewards = token_rewards(torch.tensor(scores, dtype=torch.float64), mask, logps, others, weight)
    advantages, returns = gae(rewards, table(values), mask, ppo.gamma, ppo.gae_lambda)
    gains = returns[mask]
    left = (gains - torch.from_numpy(values)).var(unbiased=False) / gains.var(unbiased=False).clamp(min=1e-12)
    columns = {
        "advantage": (whitened(advantages, mask) if ppo.whiten else advantages)[mask].numpy(),
        "return": gains.numpy(),
        "value": values,
    }
    total = float(rewards.sum(1).mean())
    numbers = {
        "objective/scores": float(np.mean(scores)),
        "objective/rlhf_reward": total,
        "objective/non_score_reward": total - float(np.mean(scores)),
        "objective/entropy": float(-logps.sum(1).mean()),
        "val/explained_variance": 1.0 - float(left),
    }
    if others is not None:
        numbers["objective/kl"] = float((logps - others).sum(1).mean())
    return columns, numbers


def remarks(numbers: Mapping[str, float], scores: Sequence[float], number: int, config: RunConfig) -> list[str]:
    """Sentences about a round that teaches PPO little, each with its remedy."""
    found, ppo = [], config.method.ppo
    if len(set(scores)) == 1:
        found.append(
            f"all answers have the score {scores[0]:g}, of which nothing is learned; give prompts that the model "
            "answers well sometimes, more method.rollout.answers, or a judge that says more than right or wrong"
        )
    explained = numbers["val/explained_variance"]
    if number >= ROUNDS_TO_LEARN and explained < WORSE and len(set(scores)) > 1:
        found.append(
            f"the critic predicts what is earned worse than a constant would (val/explained_variance {explained:.2f}); "
            "raise method.critic.lr or method.rollout.epochs, or begin with method.critic.load = a reward model"
        )
    if "objective/kl" in numbers and numbers["objective/kl"] > 0:
        cost = ppo.kl_weight * numbers["objective/kl"]
        spread = float(np.std(scores))
        if cost > 2 * spread > 0:
            found.append(
                f"the policy is {numbers['objective/kl']:.3g} nats an answer from its reference, which costs "
                f"{cost:.3g} where scores differ by {spread:.3g}; lower method.ppo.kl_weight or optim.lr"
            )
    return found
