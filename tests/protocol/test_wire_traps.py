"""What the real API does where one would not expect it, and what this package makes of it.

The API is archived, so none of this will change upstream. Each test first shows the trap, then our answer to it.
"""

from __future__ import annotations

import math

import pytest
from atropos_api import make_group, make_registration, restart_api, wait_for_batch

from trl_atropos.errors import AtroposDataTimeout, AtroposProtocolError, AtroposRegistrationError
from trl_atropos.wire.parse import WireLimits, parse_batch


LIMITS = WireLimits(vocab_size=100, max_length=32)


@pytest.fixture
def registered(client):
    client.register(make_registration())
    return client


def scores(batch):
    return [score for group in batch for score in group["scores"]]


# Registration and order of calls


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 4.5}, {"batch_size": None}, {"wandb_group": None}, {"num_steps": "x"}]
)
def test_register_refuses_a_value_of_the_wrong_type_and_the_client_repeats_its_words(api, client, wrong):
    (name,) = wrong

    with pytest.raises(AtroposProtocolError, match=f"HTTP 422.*{name}"):
        client.register(make_registration(**wrong))
    assert api.get("/info").json() == {"batch_size": -1, "max_token_len": -1}


@pytest.mark.parametrize("missing", list(make_registration().__dict__))
def test_all_eight_fields_of_a_registration_are_required(api, missing):
    body = {name: value for name, value in make_registration().__dict__.items() if name != missing}

    assert api.post("/register", body).status_code == 422


def test_an_unregistered_api_answers_batch_with_200_and_the_client_with_an_error(api, client):
    answer = api.get("/batch")
    assert answer.status_code == 200
    assert answer.json()["status"] == "error"
    assert answer.json()["batch"] == []

    with pytest.raises(AtroposRegistrationError, match=r"Trainer not registered\. Call /register first\."):
        client.fetch_batch()


def test_environments_may_register_only_after_the_first_batch_request(api, registered):
    assert api.register_env() == {"status": "wait for trainer to start"}

    assert registered.fetch_batch() is None

    assert api.register_env()["status"] == "success"


def test_the_first_batch_request_may_already_return_data(api, registered):
    api.post_group(4)

    assert scores(registered.fetch_batch()) == [0.0, 1.0, 2.0, 3.0]


# Q1, Q2: all full batches are formed at once, the newest is served first, and the step counter counts the formed ones


def test_q1_batches_are_served_newest_first(api, registered):
    for number in range(3):
        api.post_group(4, scores=[number] * 4)

    assert [scores(registered.fetch_batch())[0] for _ in range(3)] == [2.0, 1.0, 0.0]


def test_q1_new_data_waits_until_the_formed_batches_are_drained(api, registered):
    api.post_group(4, scores=[0] * 4)
    api.post_group(4, scores=[1] * 4)
    assert scores(registered.fetch_batch())[0] == 1.0
    api.post_group(4, scores=[2] * 4)

    assert [scores(registered.fetch_batch())[0] for _ in range(2)] == [0.0, 2.0]


def test_q2_the_step_counter_counts_formed_batches(api, registered):
    for _ in range(3):
        api.post_group(4)
    assert registered.status().current_step == 0

    registered.fetch_batch()

    # One batch is served, three are formed: the counter is no clock, and formed batches are not in the queue.
    assert registered.status().current_step == 3
    assert registered.status().queue_size == 0


# Q4: the first registration wins


def test_q4_registering_again_changes_nothing_and_the_client_refuses_before_it_posts(api, client):
    client.register(make_registration(starting_step=3))
    assert api.post("/register", make_registration(batch_size=16, starting_step=7).__dict__).status_code == 200
    assert api.get("/info").json()["batch_size"] == 4
    assert api.get("/status").json()["current_step"] == 3
    posted = api.count("POST", "/register")

    with pytest.raises(AtroposRegistrationError, match="batch_size 4 and max_token_len 33, this trainer needs 16 and"):
        client.register(make_registration(batch_size=16))
    assert api.count("POST", "/register") == posted


def test_q4_a_restarted_trainer_with_the_same_sizes_finds_its_queue(api, client, caplog):
    client.register(make_registration(starting_step=3))
    api.post_group(4)

    client.register(make_registration(starting_step=8))

    assert "`starting_step=8` has no effect" in caplog.text
    assert client.status().current_step == 3
    assert len(client.fetch_batch()) == 1


# Q5: data before the registration


def test_q5_data_before_the_registration_poisons_a_fresh_api(api, client):
    api.post_group()

    with pytest.raises(AtroposRegistrationError, match="still answers batch_size -1") as caught:
        client.register(make_registration())
    assert caught.value.fix.startswith("Stop all environments, restart `run-api`")
    # Forever: the registration that was answered with success does not count.
    assert api.get("/batch").json()["status"] == "error"


def test_q5_data_after_a_reset_poisons_it_too(api, registered, tmp_path):
    assert api.get("/reset_data").status_code == 200
    api.post_group(4)

    with pytest.raises(AtroposRegistrationError, match="still answers batch_size -1"):
        registered.register(make_registration())
    # Here /batch does not even say so: it answers null, for any amount of data.
    assert api.get("/batch").json() == {"batch": None}
    with pytest.raises(AtroposDataTimeout, match="The registration was wiped by /reset_data"):
        wait_for_batch(registered, tmp_path, timeout_s=0.05)


def test_q5_a_reset_without_data_is_cured_by_registering(api, registered):
    api.get("/reset_data")

    registered.register(make_registration(batch_size=2))

    assert registered.info() == (2, 33)


# Q6: a reset or a restart kills environments and is told from a lost batch


def test_q6_after_a_reset_environments_get_500_and_the_trainer_a_registration_error(api, registered):
    registered.fetch_batch()
    env_id = api.register_env()["env_id"]
    assert api.get("/status-env", {"env_id": env_id}).status_code == 200

    api.get("/reset_data")

    assert api.get("/status-env", {"env_id": env_id}).status_code == 500
    assert api.get("/batch").status_code == 500
    with pytest.raises(AtroposRegistrationError, match="wiped by /reset_data"):
        registered.fetch_batch()


def test_q6_after_a_restart_environments_get_500_and_the_trainer_a_registration_error(api, registered):
    registered.fetch_batch()
    env_id = api.register_env()["env_id"]

    restart_api()

    assert api.get("/status-env", {"env_id": env_id}).status_code == 500
    with pytest.raises(AtroposRegistrationError, match="not registered there, or the API was restarted"):
        registered.fetch_batch()


# Q7: a batch that cannot be written as JSON is lost


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_q7_a_nan_score_is_accepted_and_loses_the_whole_batch(api, registered, score):
    assert api.post_group(2, scores=[score, 1.0]).json() == {"status": "received"}
    api.post_group(2)

    with pytest.raises(AtroposProtocolError, match=r"One batch is lost.*NaN or infinity in the `scores`"):
        registered.fetch_batch()
    assert api.count("GET", "/batch") == 1
    # Asking again does not bring it back, and the API works on.
    assert registered.fetch_batch() is None
    api.post_group(4)
    assert len(registered.fetch_batch()) == 1


# Q8, Q9, Q10: groups that never make a batch


@pytest.mark.parametrize(
    ("sizes", "num_queued"),
    [((3, 3, 3), 3), ((8, 4), 2), ((3, 1), 2)],
    ids=["3 does not divide 4", "a group larger than the batch is at the head", "3 and 1 are never packed together"],
)
def test_q8_sizes_that_do_not_pack_block_for_good_and_the_timeout_says_so(
    api, registered, sizes, num_queued, tmp_path
):
    for size in sizes:
        api.post_group(size)

    with pytest.raises(AtroposDataTimeout) as caught:
        wait_for_batch(registered, tmp_path, timeout_s=0.05)
    assert f"queue_size {num_queued} (groups), the registered batch_size is 4" in caught.value.what
    assert "do not pack" in caught.value.why
    assert "power of two that divides the batch size" in caught.value.fix


def test_q8_powers_of_two_that_divide_the_batch_size_pack(api, registered):
    for size in (2, 1, 1):
        api.post_group(size)

    assert [len(group["tokens"]) for group in registered.fetch_batch()] == [2, 1, 1]


def test_q9_odd_groups_wait_in_a_buffer_and_then_block_the_queue(api, registered, tmp_path):
    registered.fetch_batch()
    env_id = api.register_env(group_size=4)["env_id"]

    assert api.post_group(3, env_id=env_id).json() == {"status": "buffered", "buffer_size": 3}
    assert registered.status().queue_size == 0
    # 3 + 1 is the group size of the environment: both leave the buffer, as two groups that never pack.
    assert api.post_group(1, env_id=env_id).json() == {"status": "buffered", "buffer_size": 0}
    with pytest.raises(AtroposDataTimeout, match=r"queue_size 2 .*those of 3 do not pack"):
        wait_for_batch(registered, tmp_path, timeout_s=0.05)


def test_q10_a_dead_environment_with_an_allocation_blocks_the_others_until_it_is_disconnected(
    api, registered, tmp_path
):
    registered.fetch_batch()
    alive = api.register_env()["env_id"]
    dead = api.register_env(min_batch_allocation=0.5)["env_id"]
    for _ in range(4):
        api.post_group(2, env_id=alive)

    with pytest.raises(AtroposDataTimeout, match=r"`min_batch_allocation`.*POST /disconnect-env"):
        wait_for_batch(registered, tmp_path, timeout_s=0.05)
    api.post("/disconnect-env", {"env_id": dead})

    assert len(wait_for_batch(registered, tmp_path, timeout_s=5)) == 2


# Q11, Q15: what reaches environments only


def test_q11_a_lone_environment_of_weight_minus_one_gets_500_and_the_timeout_says_that_nothing_comes(
    api, registered, tmp_path
):
    registered.fetch_batch()
    env_id = api.register_env(weight=-1)["env_id"]

    assert api.get("/status-env", {"env_id": env_id}).status_code == 500  # division by a total weight of 0

    with pytest.raises(AtroposDataTimeout, match="No environment posts groups: none is started, it died"):
        wait_for_batch(registered, tmp_path, timeout_s=0.05)


def test_q15_one_advantage_per_rollout_is_refused_so_the_group_never_arrives(api, registered):
    assert api.post_group(4, advantages=[1, 1, 1, 1]).status_code == 422

    assert registered.status().queue_size == 0


def test_q15_masks_are_not_checked_against_tokens_by_the_api_but_by_us(api, registered):
    assert api.post_group(2, masks=[]).json() == {"status": "received"}
    assert api.post_group(2).json() == {"status": "received"}

    batch = parse_batch(registered.fetch_batch(), LIMITS)

    assert len(batch.groups) == 1
    assert batch.rejected[0].error.what == "Group 0: `masks` has 0 entries, the group has 2 rollouts."


def test_q15_unknown_fields_are_dropped(api, registered):
    assert api.post_group(4, policy_version=3).status_code == 200

    (group,) = registered.fetch_batch()
    assert "policy_version" not in group


# Reading: what a group looks like after its way through the API


def test_every_optional_field_arrives_and_null_and_empty_read_the_same(api, registered):
    empty = {"advantages": [], "ref_logprobs": [], "overrides": [], "group_overrides": {}, "images": []}
    api.post("/scored_data_list", [make_group(2), make_group(2, inference_logprobs=[[], []], **empty)])

    raw = registered.fetch_batch()
    assert raw[0]["advantages"] is None
    assert raw[1]["advantages"] == []
    batch = parse_batch(raw, LIMITS)

    assert batch.rejected == ()
    with_logprobs, without = batch.groups
    assert with_logprobs.rollouts[0].inference_logprobs[1:].tolist() == [-0.5, -0.25]
    assert all(rollout.inference_logprobs is None for rollout in without.rollouts)
    for rollout in batch.rollouts:
        assert rollout.advantages is rollout.ref_logprobs is rollout.temperature is None
        assert rollout.labels.tolist() == [-100, 6, 7]


def test_the_environment_id_arrives(api, registered):
    registered.fetch_batch()
    env_id = api.register_env(group_size=4)["env_id"]
    api.post_group(4, env_id=env_id)

    assert parse_batch(registered.fetch_batch(), LIMITS).groups[0].env_id == env_id == 0


@pytest.mark.parametrize("token", [True, "6", 6.0])
def test_the_api_turns_lenient_numbers_into_integers_before_we_see_them(api, registered, token):
    assert api.post_group(4, tokens=[[5, token, 7]] * 4, masks=[[-100, -100, 7]] * 4).status_code == 200

    (group,) = registered.fetch_batch()
    assert [type(value) for value in group["tokens"][0]] == [int, int, int]
    assert parse_batch([group], LIMITS).rejected == ()


def test_a_large_batch_comes_gzipped_and_whole(api, registered):
    api.post_group(4, tokens=[[5] * 2000] * 4, masks=[[5] * 2000] * 4, inference_logprobs=None)

    (group,) = registered.fetch_batch()

    assert group["tokens"] == [[5] * 2000] * 4
