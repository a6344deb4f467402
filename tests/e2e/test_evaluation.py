"""Prompts of a file, completed by a real server."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from servers import save_tiny_model, serve
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from trl_atropos.trainer.evaluation import evaluate_prompts, load_prompts
from trl_atropos.weight_sync.client import AtroposVLLMClient


MAX_TOKENS = 4
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@torch.no_grad()
def complete(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """What transformers makes of a prompt, greedily."""
    ids = tokenizer.encode(prompt)
    for _ in range(MAX_TOKENS):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return tokenizer.decode(ids[-MAX_TOKENS:], skip_special_tokens=True)


def test_the_completions_of_text_and_chats_are_those_of_the_model(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "model", tied=True, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # Bytes that are not text are shown differently by tokenizers and vLLM.
    expected = {str(number): complete(model, tokenizer, str(number)).strip() for number in range(100, 400)}
    expected = {prompt: text for prompt, text in expected.items() if text.isascii() and len(text) == MAX_TOKENS}
    first, second, third, *_ = expected
    lines = [
        {"prompt": first, "answer": expected[first], "env": "text"},
        {"prompt": second, "answer": expected[second][1:3], "env": "text"},
        {"prompt": [{"role": "user", "content": third}], "answer": expected[third], "env": "chat"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    options = ("--enforce_eager", "True", "--dtype", "float32")
    with serve(directory, *options, log_path=tmp_path / "server.log") as url:
        found = evaluate_prompts(AtroposVLLMClient(url), load_prompts(path), max_tokens=MAX_TOKENS)

    assert (found["eval_text/exact_match"], found["eval_text/contains_answer"]) == (0.5, 1)
    assert (found["eval_chat/exact_match"], found["eval_chat/mean_length"]) == (1, MAX_TOKENS)
    assert (found["eval_num_prompts"], found["eval_mean_length"]) == (3, MAX_TOKENS)
