"""What every model card cites beside the papers of its loss (`loss/loss_types.py`)."""

from __future__ import annotations


ATROPOS = """@misc{atropos,
  title        = {Atropos: An Async First Environment Rollout Controller},
  author       = {Mahan, Dakota and Jin, Roger and Teknium and Sands, Shannon and Yatsenko, Artem and Suphavadeeprasit, Jai and Malhotra, Karan and Guang, Chen and Li, Joe},
  howpublished = {\\url{https://www.github.com/NousResearch/Atropos}},
  year         = {2025}
}"""
