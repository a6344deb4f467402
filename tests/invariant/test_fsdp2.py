"""Under FSDP2 as accelerate wraps a model, the reference is the checkpoint and a publish is exact, on two gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
from launched_fsdp2 import load, micro_batch, weighted_sum
from launched_states import loss_of
from launcher import run_launcher
from tiny_models import tiny_llama
from transformers import BambaConfig, BambaForCausalLM

from trl_atropos.policy.plan import plan_forward
from trl_atropos.policy.scoring import ForwardPlan, PolicyScorer


SCRIPT = Path(__file__).with_name("launched_fsdp2.py")
LAUNCH_TIMEOUT_S = 300


@pytest.fixture(scope="module", params=[(True, "no"), (False, "bf16")], ids=["tied-float32", "untied-bfloat16"])
def launched(request, tmp_path_factory) -> tuple[Path, str, list[dict[str, Any]]]:
    """The checkpoint, the precision, and what each rank found."""
    is_tied, precision = request.param
    output = tmp_path_factory.mktemp("fsdp2")
    tiny_llama(seed=3, tied=is_tied, initializer_range=0.2).save_pretrained(output / "model")
    return output / "model", precision, launch(SCRIPT, output / "model", output, precision)


def launch(script: Path, checkpoint: Path, output: Path, *arguments: str) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    exit_status, log = run_launcher(
        [*torchrun, fork_server.PROGRAM, script, checkpoint, output, *arguments],
        timeout_s=LAUNCH_TIMEOUT_S,
        environment={},
    )
    assert exit_status == 0, log
    return [torch.load(output / f"rank{rank}.pt") for rank in range(2)]


def test_the_reference_scores_as_the_checkpoint(launched):
    checkpoint, precision, ranks = launched
    model = load(checkpoint).eval()
    with torch.no_grad():
        scores, _ = PolicyScorer(model, ForwardPlan("padded", projects_in_pieces=True))(model, micro_batch())
    # A half that only rank 0 had loaded would be zeros, and the logprobs nats away.
    tolerance = 1e-5 if precision == "no" else 0.1
    for result in ranks:
        torch.testing.assert_close(result["ref_logprobs"], scores.logprobs, rtol=0, atol=tolerance)


def test_a_publish_after_a_forward_pass_is_exact(launched):
    checkpoint, _, ranks = launched
    expected = load(checkpoint).state_dict()
    for result in ranks:
        # The head's group stays whole after its forward pass, and in bfloat16.
        assert result["left_whole"] > 0
        for name, tensor in result["published"].items():
            assert torch.equal(tensor, expected[name]), name


def test_selective_recomputation_gives_the_same_gradient(launched):
    for result in launched[2]:
        for name, gradient in result["gradient"].items():
            assert torch.equal(result["recomputed"][name], gradient), name


def test_the_gradient_is_that_of_one_process_though_logits_are_made_a_few_at_a_time(launched):
    checkpoint, precision, ranks = launched
    model = load(checkpoint)
    scores, _ = PolicyScorer(model, ForwardPlan("padded", projects_in_pieces=True))(model, micro_batch())
    weighted_sum(scores.logprobs).backward()
    tolerance = 1e-5 if precision == "no" else 0.1
    for result in ranks:
        for name, parameter in model.named_parameters():
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(
                result["gradient"][name], parameter.grad, rtol=0, atol=tolerance * scale, msg=name
            )


def test_ranks_whose_trees_have_other_pieces_go_through_layers_with_a_state(tmp_path):
    torch.manual_seed(0)
    config = BambaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
        mamba_chunk_size=8, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    BambaForCausalLM(config).save_pretrained(tmp_path / "model")
    ranks = launch(SCRIPT.with_name("launched_states.py"), tmp_path / "model", tmp_path)
    model = load(tmp_path / "model")
    plan = plan_forward(model, model, "auto", max_length=64, dtype=torch.float32, device=torch.device("cpu"))
    scorer = PolicyScorer(model, plan)
    for rank in range(2):
        (loss_of(scorer, model, rank) / 2).backward()
    for result in ranks:
        assert result["plan"] == ("tree", True)
        for name, parameter in model.named_parameters():
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(result["gradient"][name], parameter.grad, rtol=0, atol=1e-5 * scale, msg=name)
