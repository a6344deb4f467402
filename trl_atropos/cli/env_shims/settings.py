"""Shims for what the command line of an environment makes of its settings."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

from .shim import Shim


PLACEHOLDER_KEY = "none"
"""What a server that asks for no key is sent."""


class ServerList(Shim):
    """A server configuration that counts, although `config_init` returns it without a list around it."""

    name = "server_list"
    why = "Without a list around its server configuration an environment ignores base_url and asks ports 9004 to 9007."
    upstream = "atroposlib/envs/server_handling/server_manager.py: ServerManager.__init__"

    def install(self) -> None:
        """Put a list around a single configuration that has a `base_url`."""
        from atroposlib.envs import base

        original = base.resolve_openai_configs

        @functools.wraps(original)
        def resolve(default_server_configs: Any, openai_config_dict: dict[str, Any], **kwargs: Any) -> Any:
            base_url = openai_config_dict.get("base_url")
            if base_url and not isinstance(default_server_configs, list) and self._is_for_us(**kwargs):
                self.acts(f"one server at {base_url}, not four at localhost:9004 to 9007")
                default_server_configs = [base.APIServerConfig(**default_server_configs.model_dump())]
            return original(
                default_server_configs=default_server_configs, openai_config_dict=openai_config_dict, **kwargs
            )

        base.resolve_openai_configs = resolve

    @staticmethod
    def _is_for_us(*, yaml_config: dict[str, Any], cli_passed_flags: dict[str, Any], **_: Any) -> bool:
        told = yaml_config.get("openai") or {}
        servers = told if isinstance(told, list) else [told]
        if len(servers) > 1:
            # Upstream takes several servers of a YAML file as they are.
            return False
        is_told = "openai.base_url" in cli_passed_flags or any("base_url" in server for server in servers)
        # Upstream asks the nodes of a Slurm job, and the URL of `config_init` is a placeholder.
        return is_told or "SLURM_JOB_NODELIST" not in os.environ


class OneServer(Shim):
    """`--openai.*` for an environment with several default servers: they change the first, and the others go."""

    name = "one_server"
    why = "An environment with several default servers takes no --openai options, and asks ports that nobody serves."
    upstream = "atroposlib/envs/server_handling/openai_server.py: resolve_openai_configs"

    def install(self) -> None:
        """Keep the first of several default servers when the command line names a `base_url`."""
        from atroposlib.envs import base

        original = base.BaseEnv.cli.__func__

        def cli(env_cls: Any) -> Any:
            config_init = env_cls.config_init

            # Before `cli`: `serve` and `process` read the defaults in different ways, but both from here.
            def first_server(_: Any) -> Any:
                config, servers = config_init()
                if isinstance(servers, list) and len(servers) > 1 and _is_told("openai.base_url"):
                    self.acts(f"one server as --openai.base_url says, not the file's {len(servers)}")
                    servers = servers[:1]
                return config, servers

            env_cls.config_init = classmethod(first_server)
            return original(env_cls)

        base.BaseEnv.cli = classmethod(cli)


class EnvConfigClass(Shim):
    """An environment's own options, where it names their class nowhere but in the signature of its constructor."""

    name = "env_config_cls"
    why = "A class without config_init and env_config_cls takes none of its own --env options, and has no place for them."
    upstream = "atroposlib/envs/base.py: BaseEnv.config_init; environments/dataset_environment/dataset_env.py"

    def install(self) -> None:
        """Take the annotation of `config` where neither `config_init` nor `env_config_cls` says anything."""
        from atroposlib.envs import base

        original = base.BaseEnv.cli.__func__

        def cli(env_cls: Any) -> Any:
            inherits = env_cls.config_init.__func__ is base.BaseEnv.config_init.__func__
            found = _annotated_config(env_cls)
            if inherits and env_cls.env_config_cls is base.BaseEnvConfig and found is not base.BaseEnvConfig:
                self.acts(f"--env takes the options of {found.__name__}, the config of {env_cls.__name__}.__init__")
                env_cls.env_config_cls = found
                # Without a check: what has no default comes from the command line.
                env_cls.config_init = classmethod(lambda _: (found.model_construct(), base.ServerBaseline()))
            return original(env_cls)

        base.BaseEnv.cli = classmethod(cli)


def _annotated_config(env_cls: Any) -> Any:
    """The class of the parameter `config` of a constructor, or the one that all environments share."""
    from atroposlib.envs.base import BaseEnvConfig

    try:
        found = get_type_hints(env_cls.__init__).get("config")
    except NameError:
        # An annotation that names something which is imported for type checkers only.
        return BaseEnvConfig
    return found if isinstance(found, type) and issubclass(found, BaseEnvConfig) else BaseEnvConfig


class OpenaiConfig(Shim):
    """The old name of a server's configuration."""

    name = "openai_config"
    why = "Files import OpenaiConfig, the name that APIServerConfig had before Atropos 0.4."
    upstream = "atroposlib/envs/base.py: APIServerConfig"

    def install(self) -> None:
        """Find `OpenaiConfig` where `APIServerConfig` is."""
        from atroposlib.envs import base
        from atroposlib.envs.server_handling import openai_server

        for module in (base, openai_server):
            if not hasattr(module, "OpenaiConfig"):
                # A function of the module, so that it is known when a file asks for the name.
                module.__getattr__ = self._found_in(module.__name__, base.APIServerConfig)

    def _found_in(self, module: str, config_class: type) -> Callable[[str], type]:
        def find(name: str) -> type:
            if name != "OpenaiConfig":
                raise AttributeError(f"module {module!r} has no attribute {name!r}")
            self.acts("OpenaiConfig is APIServerConfig, its name of today")
            return config_class

        return find


def _is_told(option: str) -> bool:
    return any(word.partition("=")[0] == f"--{option}" for word in sys.argv)


class Wandb(Shim):
    """No Weights & Biases unless the command line or the YAML file says so."""

    name = "wandb"
    why = "process and evaluate set use_wandb for everybody, and many files do; without a login the environment hangs or ends."
    upstream = "atroposlib/envs/base.py: get_cli_process_config_cls, get_cli_evaluate_config_cls, setup_wandb"

    def install(self) -> None:
        """Set `use_wandb` to false where neither YAML nor command line names it."""
        from atroposlib.envs import base

        original = base.merge_dicts

        @functools.wraps(original)
        def merge_dicts(defaults: dict[str, Any], *told: dict[str, Any]) -> dict[str, Any]:
            merged: dict[str, Any] = original(defaults, *told)
            if defaults.get("use_wandb") and not any("use_wandb" in settings for settings in told):
                self.acts("use_wandb is off; --env.use_wandb true turns it on")
                merged["use_wandb"] = False
            return merged

        base.merge_dicts = merge_dicts


class WandbName(Shim):
    """A name to register with."""

    name = "wandb_name"
    why = "The API refuses an environment without wandb_name (422); the class' `name` is meant to be it but is not copied."
    upstream = "atroposlib/envs/base.py: CliServeConfig.run"

    def install(self) -> None:
        """Take the class' `name`, or else its Python name, for a `wandb_name` that is not set."""
        from atroposlib.envs.base import BaseEnv

        original = BaseEnv.__init__

        @functools.wraps(original)
        def init(env: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            if config.wandb_name is None:
                config.wandb_name = type(env).name or type(env).__name__
                self.acts(f"the environment registers as {config.wandb_name!r}")
            original(env, config, *args, **kwargs)

        BaseEnv.__init__ = init


class ApiKey(Shim):
    """A placeholder key for a local server that asks for none."""

    name = "api_key"
    why = "Current versions of the openai package refuse an empty API key, the default of a server configuration."
    upstream = "atroposlib/envs/server_handling/server_baseline.py: APIServerConfig.api_key"

    def install(self) -> None:
        """Fill `api_key` of the servers before an environment makes their clients."""
        from atroposlib.envs.base import BaseEnv

        original = BaseEnv.__init__

        @functools.wraps(original)
        def init(env: Any, config: Any, server_configs: Any, *args: Any, **kwargs: Any) -> None:
            for server in server_configs if isinstance(server_configs, list) else []:
                if server.base_url and not server.api_key:
                    # An explicit "" is refused although the variable is set: openai reads it for None only.
                    key = os.environ.get("OPENAI_API_KEY")
                    told = "the key of OPENAI_API_KEY" if key else "a placeholder; --openai.api_key sets a real one"
                    self.acts(f"{server.base_url} gets {told}")
                    server.api_key = key or PLACEHOLDER_KEY
            original(env, config, server_configs, *args, **kwargs)

        BaseEnv.__init__ = init
