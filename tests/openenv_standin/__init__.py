"""An environment as `openenv init` lays it out."""
