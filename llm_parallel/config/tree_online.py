"""The sections of a run's configuration for methods that learn from answers that the model itself gives: what is asked,
how answers are judged, and what is made of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llm_parallel.config.node import Node


class JudgeConfig(Node):
    """One judge of answers: a number for each, of which more is better."""

    kind: Literal[
        "exact", "contains", "number", "regex", "json", "length", "function", "code", "model", "reward_model"
    ] = "exact"
    """``exact``: 1 if the answer is the record's right one, without blanks around it; ``contains``: 1 if the right one
    occurs in it; ``number``: 1 if the last number of the answer is the last one of the right answer; ``regex``: 1 if
    ``pattern`` is found; ``json``: 1 if the answer is JSON that fits the record's JSON schema; ``length``: minus the
    tokens over ``max_tokens``, divided by it; ``function``: what a Python function of yours says; ``code``: 1 if the
    program in the answer passes the record's tests, run in a sandbox; ``model``: where on ``scale`` a language model
    behind an address puts the answer, from 0 to 1; ``reward_model``: what a model with a value head says of the prompt
    with the answer."""
    field: str = "answer"
    """The record's field with the right answer (a text, a number, or a list of right ones), with the JSON schema, or
    with the answer that ``reads: pair`` compares with."""
    folder: str | None = None
    """``reward_model``: a run of ``method.kind: reward``, or a Hugging Face folder of a model for sequence
    classification with one label; it must have the tokenizer of the policy."""
    weight: float = 1.0
    """What the judge's number is multiplied by before the numbers of all judges are added."""
    pattern: str | None = None
    """``regex``: a regular expression of Python; {field} stands for that field of the record, as it is written."""
    max_tokens: PositiveInt = 256
    """``length``: tokens from which on an answer is too long."""
    file: str | None = None
    """``function``: a file of Python, which is run with your rights."""
    function: str = "reward"
    """``function``: the name of the function in ``file``; it is called with prompt (a list of messages), answer (a
    text), record (the fields of the record) and complete (whether the answer was ended by the model), and returns a
    number."""
    timeout_s: PositiveFloat = 60.0
    """``function``: seconds that a call may take; a longer one ends the run with a sentence. ``model``: seconds of one
    request."""
    pays: Literal["all", "share"] = "all"
    """``code``: 1 for a program that passes all tests, else 0 (``all``); or the share of the tests that it passes."""
    sandbox: Literal["auto", "bwrap", "landlock", "unsafe"] = "auto"
    """``code``: how programs are held: by bubblewrap; by Landlock and seccomp; the first of these that works
    (``auto``); or not at all, with limits on time, memory and output alone (``unsafe``)."""
    cpu_s: PositiveInt = 10
    """``code``: processor-seconds of a program. It may take three times as long, and five seconds."""
    memory_mb: PositiveInt = 1024
    """``code``: memory of a program, in MiB."""
    packages: tuple[str, ...] = ()
    """``code``: folders whose modules programs may import; none: Python's own library alone."""
    at_once: PositiveInt = 4
    """``code``, ``model``: programs, or requests, at a time in each process that judges."""
    url: str | None = None
    """``model``: address of a server with OpenAI's interface, such as http://127.0.0.1:8000/v1."""
    model: str | None = None
    """``model``: the model's name there."""
    template: str | None = None
    """``model``: what it is asked; {prompt} and {answer} (``reads: pair``: {answer_a} and {answer_b}) are filled in,
    and {field} by that field of the record. none: a general question for help, correctness and clarity."""
    reads: Literal["number", "json", "pair"] = "number"
    """``model``: how its reply is read: a last line that is a number (``number``); a JSON object with a number
    ``score`` (``json``); or A, B or tie, for the answer and the record's own ``field``, asked in both orders
    (``pair``): 1 if the answer is better, 1/2 for a tie or where the orders differ, 0 if it is worse."""
    scale: tuple[float, ...] = (1.0, 10.0)
    """``model``: the worst and the best number that it may give."""
    temperature: float = Field(0.0, ge=0.0)
    """``model``: of its replies."""
    max_reply_tokens: PositiveInt = 1024
    """``model``: most tokens of its reply."""
    key_from: str | None = None
    """``model``: the environment variable that holds the API key; none: no key is sent."""
    cache: str | None = None
    """``model``: a folder in which replies are kept, for other runs and processes too; none: they are not."""
    tries: PositiveInt = 4
    """``model``: requests for one reply, if the server is busy or the reply has not the form that is asked for."""


NO_MATTER = ("at_once", "cache", "key_from", "timeout_s", "tries")
"""Fields of a judge that change no number that it gives."""


class RolloutConfig(Node):
    """A round: prompts are answered by the model as it is, the answers are judged, and steps are made on them."""

    prompts: PositiveInt = 64
    """Prompts of a round."""
    answers: PositiveInt = 8
    """Answers to each prompt."""
    epochs: PositiveInt = 1
    """Times that every answer of a round is trained on; ``train.global_batch_size`` answers are one step."""
    max_new_tokens: PositiveInt = 256
    """Most tokens of an answer. An answer that does not end by then counts as unfinished."""
    temperature: PositiveFloat = 1.0
    """Of the draws. The policy that is trained is the one at temperature 1."""
    unfinished_score: float | None = 0.0
    """Score of answers that do not end; none: they are judged like the others."""
    judges: tuple[JudgeConfig, ...] = ()
    """Judges, whose numbers are added."""
    max_running: PositiveInt = 64
    """Answers that a replica has in work at a time."""
    held_out_prompts: PositiveInt = 64
    """Held-out prompts (``chat.eval`` or ``chat.eval_fraction``) that are answered greedily and judged at a time."""
    held_out_interval: PositiveInt | None = 10
    """Rounds between two judgements of held-out prompts; none: never."""
    show: int = Field(2, ge=0)
    """Answers of a round that are shown in the log and the report: the best and the worst of a prompt."""
    keep_rounds: PositiveInt = 2
    """Finished rounds whose files stay beside those that a checkpoint needs."""


class GRPOConfig(Node):
    """Policy gradients by comparing the answers to one prompt (Shao et al. 2024, arXiv 2402.03300)."""

    by_std: bool = True
    """Advantages are divided by the standard deviation of the group (false: Dr. GRPO, arXiv 2503.20783)."""
    leave_one_out: bool = False
    """An answer is compared with the mean of the others (RLOO, arXiv 2402.14740)."""
    divided_by: Literal["token", "sequence", "constant"] = "token"
    """Loss: the mean over all tokens (DAPO), over answers of the mean of each (GRPO's paper), or the sum over an
    answer's tokens divided by ``rollout.max_new_tokens`` in the mean over answers (Dr. GRPO)."""
    clip_low: PositiveFloat = 0.2
    """Ratios under 1 minus this give no gradient where they fall."""
    clip_high: PositiveFloat = 0.2
    """Ratios over 1 plus this give no gradient where they rise; DAPO has 0.28."""
    kl_weight: float = Field(0.0, ge=0.0)
    """Weight of the divergence from the reference (``method.reference``) in the loss."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """How the divergence is estimated."""
    importance_cap: PositiveFloat | None = None
    """Truncated importance weights for the difference between what sampled and what trains; none: not weighted."""


class PPOConfig(Node):
    """Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347): a critic (``method.critic``) says what the
    text so far will earn, and tokens that led to more than that become likelier."""

    gamma: float = Field(1.0, ge=0.0, le=1.0)
    """What a reward one token later is worth."""
    gae_lambda: float = Field(0.95, ge=0.0, le=1.0)
    """Generalized advantage estimation (arXiv 1506.02438): 1 trusts what was earned, 0 what the critic says."""
    whiten: bool = True
    """The advantages of all tokens of a round get mean 0 and deviation 1."""
    clip_low: PositiveFloat = 0.2
    """Ratios under 1 minus this give no gradient where they fall."""
    clip_high: PositiveFloat = 0.2
    """Ratios over 1 plus this give no gradient where they rise."""
    dual_clip: float | None = Field(None, gt=1.0)
    """The loss of a token with a negative advantage A is at most minus this times A (arXiv 1912.09729); none: it has no
    bound."""
    value_clip: PositiveFloat | None = 0.2
    """The critic gains nothing by leaving what it said before the round by more than this; none: no bound."""
    entropy_weight: float = Field(0.0, ge=0.0)
    """Weight of the entropy of the policy's distribution, which is taken from the loss."""
    kl_weight: float = Field(0.02, ge=0.0)
    """Weight of the divergence from the reference (``method.reference``); 0: no reference is held."""
    kl_in: Literal["reward", "loss"] = "reward"
    """``reward``: log p - log q is taken from the reward of each token (InstructGPT, arXiv 2203.02155); ``loss``: an
    estimate of the divergence is added to the loss."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """How the divergence in the loss is estimated."""
    importance_cap: PositiveFloat | None = None
    """Truncated importance weights for the difference between what sampled and what trains; none: not weighted."""


OF_POLICY = "policy"
"""``critic.load`` of a critic that begins as the policy does."""


class CriticConfig(Node):
    """The second model that ``ppo`` trains. It gives every token a number: what the answer will earn from there on."""

    load: str = OF_POLICY
    """``policy``: the model that training begins with, under a new head; else a folder: a run of ``method.kind:
    reward``, another model's run (under a new head), a run of ``ppo`` (its critic), or a Hugging Face folder of a
    language model or of a model for sequence classification with one label."""
    lr: PositiveFloat | None = None
    """Peak of the critic's learning rate, which follows the schedule of ``optim``; none: ``optim.lr``."""
    adapters: bool = False
    """Train adapters of the kind of the section ``adapter`` and the head, on the policy's frozen weights, which both
    models share, instead of a whole model."""


class RejectConfig(Node):
    """Rejection sampling: fine-tuning on the best of several answers of the model's own (Llama 2, arXiv 2307.09288)."""

    keep: Literal["best", "above"] = "best"
    """``best``: the best answer to each prompt, the first of several; ``above``: all answers of at least
    ``least_score``."""
    least_score: float | None = None
    """Answers with less are not kept; none: all may be."""


ONLINE = ("reject", "grpo", "ppo")
"""Kinds of methods that learn from answers that the model gives while it is trained."""
