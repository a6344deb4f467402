"""Train with [`~verl.atropos_sft_trainer.AtroposSFTTrainer`], on every rank that a launcher starts:

torchrun --nproc_per_node 2 -m trl_atropos.verl.train model.path=MODEL data.atropos.api_url=http://localhost:8000 ...
"""

from __future__ import annotations

from .installed import check_verl


check_verl()

import hydra
from omegaconf import DictConfig
from verl.utils.distributed import destroy_global_process_group

from .atropos_sft_trainer import AtroposSFTTrainer
from .cpu import join_process_group


@hydra.main(config_path="config", config_name="atropos_sft_trainer", version_base=None)
def main(config: DictConfig) -> None:
    """Train, with the overrides of Hydra on the command line."""
    join_process_group()
    AtroposSFTTrainer(config=config).fit()
    destroy_global_process_group()


if __name__ == "__main__":
    main()
