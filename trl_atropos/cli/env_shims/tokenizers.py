"""Shims for tokenizers: what transformers 5 changed, and which one is loaded."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from .shim import Shim


NO_TOKENIZER = "none"
"""Default of `APIServerConfig.tokenizer_name`: the model's name is used."""


class ReturnDict(Shim):
    """Token ids from `apply_chat_template`, as in transformers 4."""

    name = "return_dict"
    why = "`apply_chat_template` of transformers 5 returns a BatchEncoding where environments expect a list of token ids."
    upstream = "transformers/tokenization_utils_base.py: apply_chat_template; atroposlib/utils/tokenize_for_trainer.py"

    def install(self) -> None:
        """Make `return_dict=False` the default of `apply_chat_template`."""
        from transformers import PreTrainedTokenizerBase

        original = PreTrainedTokenizerBase.apply_chat_template

        @functools.wraps(original)
        def apply_chat_template(tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
            tokenizes = kwargs.get("tokenize", True)
            # The mask of the assistant's tokens exists in a dict only.
            if tokenizes and "return_dict" not in kwargs and not kwargs.get("return_assistant_tokens_mask"):
                self.acts("apply_chat_template returns token ids, as in transformers 4, not a BatchEncoding")
                kwargs["return_dict"] = False
            return original(tokenizer, *args, **kwargs)

        PreTrainedTokenizerBase.apply_chat_template = apply_chat_template


class ServerTokenizer(Shim):
    """The environment's tokenizer for its inference servers, where the model's name is no directory."""

    name = "tokenizer_name"
    why = "The client of a server loads its tokenizer by the model's name, which may be an alias that no hub knows."
    upstream = "atroposlib/envs/server_handling/vllm_server.py: VLLMServer.__init__"

    def install(self) -> None:
        """Fill `tokenizer_name` of the servers before an environment makes their clients."""
        from atroposlib.envs.base import BaseEnv

        original = BaseEnv.__init__

        @functools.wraps(original)
        def init(env: Any, config: Any, server_configs: Any, *args: Any, **kwargs: Any) -> None:
            local = Path(config.tokenizer_name).is_dir()
            for server in server_configs if isinstance(server_configs, list) else [server_configs]:
                if local and server.tokenizer_name == NO_TOKENIZER and not Path(server.model_name).is_dir():
                    self.acts(f"the servers' tokenizer is the environment's, {config.tokenizer_name}")
                    server.tokenizer_name = config.tokenizer_name
            original(env, config, server_configs, *args, **kwargs)

        BaseEnv.__init__ = init
