"""Keeps the inference server on the newest policy: what is sent, how it travels, and the proof that it arrived."""
