"""The bodies of small requests, and answers that are always the same."""

from __future__ import annotations

import msgspec


UNREGISTERED = {"status": "error", "message": "Trainer not registered. Call /register first.", "batch": []}
NO_EXAMPLE: dict[str, list[object]] = {
    name: []
    for name in (
        *("tokens", "masks", "scores", "advantages", "ref_logprobs", "generation_params"),
        *("inference_logprobs", "messages", "images"),
    )
}
"""What `/latest_example` answers before the first group."""


class Registration(msgspec.Struct):
    """The body of `POST /register`."""

    wandb_group: str
    wandb_project: str
    batch_size: int
    max_token_len: int
    checkpoint_dir: str
    save_checkpoint_interval: int
    starting_step: int
    num_steps: int


class EnvironmentRegistration(msgspec.Struct):
    """The body of `POST /register-env`."""

    max_token_length: int
    desired_name: str
    weight: float
    group_size: int
    min_batch_allocation: float | None = None


class EnvironmentId(msgspec.Struct):
    """The body of `GET /status-env` and `POST /disconnect-env`."""

    env_id: int


class Receipt(msgspec.Struct):
    """The body of `POST /acknowledge`: the batch with this number, of the trainer's own count, is safe with it.

    `num_groups` says how many groups of it, so that half a batch is found; None: all.
    """

    trainer: str
    number: int
    num_groups: int | None = None
