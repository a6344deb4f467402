"""Train a model on Atropos environments.

Everything at once on one machine without a GPU: `make quickstart`. By hand, one terminal each:

CPU
    run-api --port 8000
    VLLM_CPU_KVCACHE_SPACE=1 trl vllm-serve --model MODEL --host 127.0.0.1 --port 8001 --max_model_len 512 \
        --weight-transfer-config '{"backend": "trl_atropos_shm"}' \
        --middleware trl_atropos.serving.generate_endpoint.GenerateEndpoint
    python examples/envs/capitals.py serve --env.tokenizer_name MODEL --openai.model_name MODEL \
        --openai.tokenizer_name MODEL --openai.base_url http://127.0.0.1:8001/v1
    accelerate launch --cpu examples/scripts/atropos.py \
        --config examples/configs/quickstart.yaml --model_name_or_path MODEL --atropos_api_url http://localhost:8000

GPU: the server and the trainer on different devices; the weights travel over NCCL.
    run-api --port 8000
    CUDA_VISIBLE_DEVICES=0 trl vllm-serve --model MODEL --host 127.0.0.1 --port 8001 \
        --middleware trl_atropos.serving.generate_endpoint.GenerateEndpoint
    python ENVIRONMENT.py serve --openai.server_type vllm --openai.base_url http://127.0.0.1:8001/v1
    CUDA_VISIBLE_DEVICES=1,2,3 accelerate launch examples/scripts/atropos.py --model_name_or_path MODEL \
        --atropos_api_url http://localhost:8000 --output_dir out --per_device_train_batch_size 8

A run that ended early goes on with `--resume_from_checkpoint true`, or with the path of a checkpoint.

Options: `python examples/scripts/atropos.py --help`.
"""

from __future__ import annotations

import logging

# First: imported before torch, it makes threads on a CPU sleep while they wait for each other.
from trl_atropos import AtroposConfig, AtroposParser, AtroposTrainer


# isort: split
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config


def main(training_args: AtroposConfig, model_args: ModelConfig) -> None:
    logging.basicConfig(level=training_args.get_process_log_level(), format="%(levelname)s %(name)s: %(message)s")
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
        quantization_config=get_quantization_config(model_args),
    )
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    trainer = AtroposTrainer(
        model=model, args=training_args, processing_class=tokenizer, peft_config=get_peft_config(model_args)
    )
    # From the command line everything is a string.
    checkpoint = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(checkpoint).lower() == "true" else checkpoint)
    trainer.save_model()
    trainer.save_state()
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(*AtroposParser((AtroposConfig, ModelConfig)).parse_args_and_config())
